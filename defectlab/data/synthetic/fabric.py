"""Synthetic woven cloth, in the layout that data_scripts/aitex.py gives the AITEX tiles."""

from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from defectlab.data.images import save_image
from defectlab.data.synthetic.pasted import ellipse_distance, smooth_field

SIDE, TILES = 256, 3  # px of a tile, tiles of a strip
KINDS = {"broken_pick": "010", "fuzzyball": "019", "nep": "030"}  # with the numbers of AITEX
_STRIPS = {"train": (8, 4), "test": (5, 3)}  # good ones, and defective ones of each kind


def draw_cloth(rng: np.random.Generator, height: int, width: int, fabric: int) -> np.ndarray:
    """Plain weave, (H, W) float in grey levels: threads of uneven thickness in both directions, uneven light.

    `fabric`: which cloth, 0 or 1: distance of the threads and brightness.
    """
    pitch, level = ((5.0, 95.0), (7.0, 140.0))[fabric]
    row, column = np.mgrid[0:height, 0:width].astype(float)
    row += 1.5 * smooth_field(rng, (1, width), (0, 40))  # threads wander
    column += 1.5 * smooth_field(rng, (height, 1), (40, 0))
    weft, warp = np.sin(2 * np.pi * row / pitch), np.sin(2 * np.pi * column / pitch)
    uneven = 1 + 0.25 * smooth_field(rng, (height, 1), (2, 0)) + 0.25 * smooth_field(rng, (1, width), (0, 2))
    light = level * (1 + 0.06 * smooth_field(rng, (1, width), (0, 60)))
    return light + 18 * uneven * np.where(weft * warp > 0, weft, warp) + rng.normal(0, 5, (height, width))


def add_flaw(rng: np.random.Generator, cloth: np.ndarray, kind: str, at: int) -> tuple[np.ndarray, np.ndarray]:
    """The cloth with one defect of `kind` in the tile whose left edge is at column `at`, and its mask (H, W) bool."""
    row, column = np.mgrid[0 : cloth.shape[0], 0 : cloth.shape[1]].astype(float)
    centre = rng.uniform(60, SIDE - 60, 2) + np.array([0, at])
    if kind == "broken_pick":  # a weft thread is missing over a part of the width
        line = np.abs(row - centre[0] - 2 * smooth_field(rng, (1, cloth.shape[1]), (0, 30))) < 2.5
        mask = line & (np.abs(column - centre[1]) < rng.uniform(25, 50))
        return np.where(mask, 0.5 * cloth, cloth), mask
    radius = rng.uniform(9, 16) if kind == "fuzzyball" else rng.uniform(4, 7)
    distance = ellipse_distance(row, column, centre, (radius, radius * rng.uniform(0.7, 1.4)), rng.uniform(0, np.pi))
    mask = distance + 0.2 * smooth_field(rng, cloth.shape, (4, 4)) < 1
    if kind == "nep":  # a hard bright knot
        return np.where(mask, cloth + 70, cloth), mask
    return np.where(mask, gaussian_filter(cloth, 4) + rng.choice([-45, 45]), cloth), mask  # fluff hides the weave


def write_fabric(folder: Path, seed: int = 0) -> None:
    """PART/KIND/STRIP_K.png, ground_truth/KIND/STRIP_K_mask.png, unmarked/STRIP_K.png, and one whole strip of each
    kind in the test part: grey PNGs, masks 0 or 255. A strip has one defect, in its middle tile."""
    rng, number, width = np.random.default_rng(seed), 0, SIDE * TILES
    for part, (good, defective) in _STRIPS.items():
        kinds = ["good"] * good + [kind for kind in KINDS for _ in range(defective)]
        for i, kind in enumerate(kinds):
            number += 1 + i % 2  # consecutive numbers are one roll
            fabric = (number // 3) % 2
            strip = f"{number:04}_{KINDS.get(kind, '000')}_{fabric:02}"
            cloth, mask = draw_cloth(rng, SIDE, width, fabric), np.zeros((SIDE, width), bool)
            if kind != "good":
                cloth, mask = add_flaw(rng, cloth, kind, SIDE)
            image, marks = cloth.clip(0, 255).astype(np.uint8), mask * np.uint8(255)
            for k in range(TILES):
                columns, name = slice(k * SIDE, (k + 1) * SIDE), f"{strip}_{k}"
                if marks[:, columns].any():
                    save_image(folder / f"ground_truth/{kind}/{name}_mask.png", marks[:, columns])
                marked = kind == "good" or marks[:, columns].any()
                save_image(folder / (f"{part}/{kind}" if marked else "unmarked") / f"{name}.png", image[:, columns])
            if part == "test" and kind != kinds[i - 1]:
                save_image(folder / f"whole_strips/{strip}.png", image)
                if kind != "good":
                    save_image(folder / f"whole_strips/{strip}_mask.png", marks)
