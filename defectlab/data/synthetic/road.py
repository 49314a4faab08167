"""Synthetic road with potholes, colour and disparity, in the layout that data_scripts/road_depth.py unpacks."""

from pathlib import Path

import numpy as np

from defectlab.data.images import save_image
from defectlab.data.synthetic.pasted import ellipse_distance, smooth_field

HEIGHT, WIDTH = 64, 96  # px, a tenth of the area of the real frames
FRAMES = {1: 22, 2: 40, 3: 5}  # of each session, as the real set has them
_LEVEL = {1: 110.0, 2: 140.0, 3: 90.0}  # grey of the road in each session


def draw_road(rng: np.random.Generator, session: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A frame: colour (H, W, 3) uint8, disparity (H, W) uint16 with gaps (0), mask (H, W) bool of a pothole; a dark
    patch beside it is flat."""
    row, column = np.mgrid[0:HEIGHT, 0:WIDTH].astype(float)
    grey = (
        _LEVEL[session]
        + 10 * smooth_field(rng, (HEIGHT, WIDTH), (1, 1))
        + 8 * smooth_field(rng, (HEIGHT, WIDTH), (12, 12))
    )
    disparity = 560 + 4 * smooth_field(rng, (HEIGHT, WIDTH), (6, 6))

    def blob(side: int) -> np.ndarray:
        centre = rng.uniform(20, HEIGHT - 20), side * WIDTH / 2 + rng.uniform(16, WIDTH / 2 - 16)
        radii = rng.uniform(8, 14, 2)
        wobble = 0.15 * smooth_field(rng, (HEIGHT, WIDTH), (4, 4))
        return ellipse_distance(row, column, centre, radii, rng.uniform(0, np.pi)) + wobble

    side = int(rng.integers(2))
    hole, patch = blob(side), blob(1 - side)
    mask = hole < 1
    grey = grey - 25 * mask - 30 * (patch < 1)  # the patch is darker than the hole
    disparity = disparity - 60 * np.clip(1.3 - hole, 0, 1) * (hole < 1.3)
    gaps = smooth_field(rng, (HEIGHT, WIDTH), (2, 2)) > (2.0 if session == 2 else 1.5)
    colour = grey[..., None] + np.array([2.0, 0.0, -4.0]) + rng.normal(0, 3, (HEIGHT, WIDTH, 3))
    return colour.clip(0, 255).astype(np.uint8), np.where(gaps, 0, disparity).astype(np.uint16), mask


def write_road(folder: Path, seed: int = 0) -> None:
    """dataset1 to dataset3: rgb/NN.jpg, disp/NN.png (16 bit), label/NN.png (0 or 255)."""
    rng = np.random.default_rng(seed)
    for session, count in FRAMES.items():
        for number in range(1, count + 1):
            colour, disparity, mask = draw_road(rng, session)
            where = folder / f"dataset{session}"
            save_image(where / f"rgb/{number:02}.jpg", colour)
            save_image(where / f"disp/{number:02}.png", disparity)
            save_image(where / f"label/{number:02}.png", mask * np.uint8(255))
