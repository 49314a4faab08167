"""Synthetic raceways of a ball screw with a pit that grows, in the layout that data_scripts/bsdata.py unpacks."""

from pathlib import Path

import numpy as np

from defectlab.data.images import save_image
from defectlab.data.synthetic.pasted import ellipse_distance, smooth_field

HEIGHT, WIDTH = 128, 64  # px; the real frames are some 1130 px wide and 460 high
PLACES = (320, 335, 400, 430, 470, 500, 570, 600, 640)  # mm along the screw, of a camera each
MOMENTS = 5  # frames of each place, while its pit grows
_BROWN = np.array([1.0, 0.86, 0.62])  # of the steel and its oil


def draw_raceway(rng: np.random.Generator, place: np.random.Generator, age: float) -> tuple[np.ndarray, np.ndarray]:
    """A frame: colour (H, W, 3) uint8, mask (H, W) bool of the pit, which `age` in 0..1 makes larger.

    `place` draws what stays from frame to frame (where groove and pit are), `rng` the light and the oil of this one.
    """
    row, column = np.mgrid[0:HEIGHT, 0:WIDTH].astype(float)
    along = row - place.uniform(0.1, 0.3) * (WIDTH - column)  # the groove runs up to the right
    middle = place.uniform(0.35, 0.55) * HEIGHT
    scratches = smooth_field(place, (HEIGHT, WIDTH), (0.7, 20))
    pit = ellipse_distance(row, column, (middle, place.uniform(0.35, 0.65) * WIDTH), (6 + 9 * age, 8 + 13 * age), -0.2)
    mask = pit + 0.5 * smooth_field(place, (HEIGHT, WIDTH), (2.5, 2.5)) * min(1.0, 4 * age) < 1
    grey = 95 + rng.uniform(-25, 40) + 7 * scratches + 25 * smooth_field(rng, (HEIGHT, WIDTH), (25, 25))
    grey = grey - 45 * np.exp(-(((along - middle + 8) / 9) ** 2))  # the dark edge of the groove, no defect
    stain = smooth_field(rng, (HEIGHT, WIDTH), (9, 12)) > 1.6  # oil, darker than the steel, no defect
    grey = grey - 25 * stain - mask * (40 + 14 * smooth_field(place, (HEIGHT, WIDTH), (1.2, 1.2)))
    colour = grey[..., None] * _BROWN + rng.normal(0, 3, (HEIGHT, WIDTH, 3))
    return colour.clip(0, 255).astype(np.uint8), mask


def write_screws(folder: Path, seed: int = 0) -> None:
    """images/01_<moment>_<micrometres>_000_crop_1.jpg and its mask in masks/, .png (0 or 255)."""
    for number, millimetres in enumerate(PLACES):
        for moment in range(MOMENTS):
            rng, place = np.random.default_rng([seed, number, moment]), np.random.default_rng([seed, number])
            colour, mask = draw_raceway(rng, place, moment / (MOMENTS - 1))
            name = f"01_2009{number + 7:02}{moment:02}0000_{1000 * millimetres}_000_crop_1"
            save_image(folder / "images" / f"{name}.jpg", colour)
            save_image(folder / "masks" / f"{name}.png", mask * np.uint8(255))
