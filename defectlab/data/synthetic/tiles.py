"""Synthetic magnetic tiles and metal nuts.

Magnitudes and contrasts of tiles are rounded from the images of the real set.
"""

from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, rotate

from defectlab.data.images import save_image
from defectlab.data.synthetic.pasted import add_defect, ellipse_distance, grinding_lines, require_size, smooth_field

_COUNTS = {"Free": 60, "Blowhole": 6, "Break": 6, "Crack": 6, "Fray": 6, "Uneven": 6}


def draw_tile(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One defect-free tile, (H, W) uint8: vertical polishing lines, uneven light, bevelled side edges.

    Raises ValueError when a side is shorter than 32 pixels.
    """
    require_size(height, width)
    row, column = np.mgrid[0:height, 0:width].astype(float)
    level = rng.uniform(75.0, 165.0)
    # Light: darker towards the sides (the tile is curved), with large bright and dark patches.
    log_light = -0.35 * np.abs(2 * column / width - 1) ** 2 * rng.uniform(0.3, 1.3)
    log_light += rng.uniform(0.10, 0.24) * smooth_field(rng, (height, width), (height / 5, width / 6))
    log_light += rng.uniform(0.05, 0.17) * smooth_field(rng, (1, width), (0, width / 15))
    log_grain = 0.035 * smooth_field(rng, (height, width), (0.6, 0.4))
    log_grain += 0.03 * smooth_field(rng, (height, width), (6, 0.6))
    log_image = log_light + log_grain + rng.uniform(0.6, 1.2) * grinding_lines(rng, height, width)

    for distance in (column, width - 1 - column):  # bevels: a dark seam between two differently lit faces
        if rng.random() < 0.7:
            seam = width * rng.uniform(0.02, 0.06) + 0.4 * smooth_field(rng, (height, 1), (height / 8, 0))
            log_image += np.where(distance < seam, rng.uniform(-0.5, 0.4), 0.0)
            log_image -= rng.uniform(0.3, 0.9) * np.exp(-(((distance - seam) / 1.2) ** 2))
        log_image -= rng.uniform(0.0, 0.6) * np.exp(-distance)
    for distance in (row, height - 1 - row):  # a curved lower or upper end shows as a dark arc
        if rng.random() < 0.25:
            sag = height * rng.uniform(0.02, 0.05) * (2 * column / width - 1) ** 2
            log_image -= rng.uniform(0.6, 1.4) / (1 + np.exp(2 * (distance - sag)))
    for _ in range(rng.poisson(0.7)):  # harmless faint stains, which the real normal tiles have too
        down = (row - rng.uniform(0, height)) / (height * rng.uniform(0.03, 0.12))
        across = (column - rng.uniform(0, width)) / (width * rng.uniform(0.03, 0.12))
        stain = np.hypot(down, across) + 0.25 * smooth_field(rng, (height, width), (4, 4))
        log_image -= rng.uniform(0.05, 0.18) * np.exp(-(((stain - 1) / 0.3) ** 2))
    image = level * np.exp(log_image) + rng.normal(0, 1.0, (height, width))
    return np.clip(image, 4, 255).astype(np.uint8)


def write_magnetic_tile(folder: Path, seed: int = 0, counts: dict[str, int] | None = None) -> None:
    """Write a synthetic set in the layout of the magnetic tiles: MT_<Type>/Imgs/exp{0..6}_num_{id}.jpg and .png.

    Grey JPEGs, height 89-160 and width 44-250 (about 0.4 of the real size), and grey PNG masks: above 127
    is defect; half the masks have grey edges, those of Free are all zero. As in the real set, a mask can be empty
    although the tile is defective: that of the last Uneven tile is, if there is more than one. `counts`: images per
    type (default 60 Free, 6 of each defect; a type left out has none); ValueError for an unknown type.
    """
    counts = _COUNTS if counts is None else counts
    if unknown := sorted(set(counts) - set(_COUNTS)):
        raise ValueError(f"unknown tile type {unknown[0]!r}: use some of {', '.join(_COUNTS)}")
    rng = np.random.default_rng(seed)
    numbers = iter(rng.choice(400_000, sum(counts.values()), replace=False))  # ids are unique in the real set
    for type_name in _COUNTS:
        count = counts.get(type_name, 0)
        for i in range(count):
            height = int(rng.integers(89, 161))
            width = int(np.clip(height * np.exp(rng.uniform(np.log(0.4), np.log(2.5))), 44, 250))
            image = draw_tile(rng, height, width)
            mask = np.zeros((height, width), bool)
            if type_name != "Free":
                image, mask = add_defect(image, type_name.lower(), rng)
            if type_name == "Uneven" and i == count - 1 > 0:
                mask = np.zeros_like(mask)
            stem = Path(folder) / f"MT_{type_name}" / "Imgs" / f"exp{rng.integers(7)}_num_{next(numbers)}"
            save_image(stem.with_suffix(".jpg"), image)
            save_image(stem.with_suffix(".png"), _grey_mask(mask, soft=rng.random() < 0.5))


def _grey_mask(mask: np.ndarray, soft: bool) -> np.ndarray:
    """Mask as grey values (H, W) uint8; soft edges keep to their side of 127: the threshold loses nothing."""
    edges = 255 * gaussian_filter(mask.astype(float), 0.6 if soft else 0.0)
    return np.where(mask, np.clip(edges, 128, 255), np.clip(edges, 0, 127)).astype(np.uint8)


# ------------------------------------------------------------ a metal nut


def _draw_nut(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A four-lobed nut seen from above: RGB float (S, S, 3) in 0-255 and its silhouette (S, S) bool.

    The lobes lean one way, as the real ones do, so a mirrored nut is no rotated nut.
    """
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size * 2 - 1
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    phase = 4 * angle
    outline = 0.66 - 0.17 * np.sin(phase - 0.8 * np.sin(phase))  # a leaning wave: steep on one flank
    body = (radius < outline) & (radius > 0.24)
    light = 95 + 14 * smooth_field(rng, (size, size), (1, 1)) + 20 * np.sin(14 * radius + 0.7 * np.sin(phase))
    light += 45 * np.exp(-(((outline - radius) / 0.03) ** 2)) + 60 * np.exp(-(((radius - 0.26) / 0.02) ** 2))
    light = np.where(body, np.clip(light, 30, 255), 26 + rng.normal(0, 1.5, (size, size)))
    return light[..., None] * (0.92, 1.02, 0.96), body


def _nut_defect(rng, rgb: np.ndarray, body: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The nut with one defect, RGB float (S, S, 3), and the mask of the defect (S, S) bool."""
    size = len(body)
    if kind == "flip":  # the nut lies on its other face: mirrored, and a broad bright collar around the hole
        rgb, body = rgb[:, ::-1].copy(), body[:, ::-1]
        y, x = (np.mgrid[0:size, 0:size] + 0.5) / size * 2 - 1
        return rgb * (1 + 0.8 * np.exp(-(((np.hypot(x, y) - 0.36) / 0.05) ** 2)))[..., None], body
    row, column = np.mgrid[0:size, 0:size].astype(float)
    rough = smooth_field(rng, body.shape, (size / 40, size / 40))
    inside = np.argwhere(body)
    centre = inside[rng.integers(len(inside))]
    if kind == "bent":  # the tip of a lobe is bent out of the light
        tips = np.argwhere(body & (np.hypot(row - size / 2, column - size / 2) > 0.36 * size))
        centre = tips[rng.integers(len(tips))]
        mask = body & (np.hypot(row - centre[0], column - centre[1]) + size / 60 * rough < 0.11 * size)
        return np.where(mask[..., None], 0.3 * rgb + 12, rgb), mask
    stretch = 1.0 if kind == "color" else 3.0
    distance = ellipse_distance(row, column, centre, (stretch, 1 / stretch), rng.uniform(0, np.pi))
    mask = body & (distance + size / 60 * rough < rng.uniform(0.05, 0.09) * size)
    mask[tuple(centre)] = True
    if kind == "color":
        colour = np.array([(30, 30, 90), (110, 35, 35), (25, 25, 28)][rng.integers(3)], float)
        return np.where(mask[..., None], 0.25 * rgb + 0.75 * colour, rgb), mask
    marks = rng.normal(150, 35, (1, size))[..., None] * (1.0, 0.95, 0.9)
    return np.where(mask[..., None], 0.3 * rgb + 0.7 * marks, rgb), mask


def write_mvtec(
    folder: Path, category: str = "metal_nut", seed: int = 0, size: int = 128, train: int = 24, test: int = 6
) -> None:
    """Write a synthetic set in the layout of MVTec AD: `folder`/`category`/train/good/NNN.png, test/good/NNN.png,
    test/<type>/NNN.png and ground_truth/<type>/NNN_mask.png (0 or 255), types bent, color, flip, scratch. Beside it,
    which the real set does not have, the nut itself: nut/<train or test>/<type>/NNN_mask.png.

    `train` normal images, `test` images of good and of each type; RGB, `size` x `size` pixels. `category` only names
    the folder: the image is always the nut.
    """
    rng = np.random.default_rng(seed)
    root = Path(folder) / category
    jobs = [("train", "good", train)] + [("test", t, test) for t in ("good", "bent", "color", "flip", "scratch")]
    for part, kind, count in jobs:
        for i in range(count):
            rgb, nut = _draw_nut(rng, size)
            if kind != "good":
                rgb, defect = _nut_defect(rng, rgb, nut, kind)
            degrees = rng.uniform(0, 360)
            rgb = rotate(rgb, degrees, reshape=False, order=1, mode="constant", cval=25)
            save_image(root / part / kind / f"{i:03d}.png", np.clip(rgb, 0, 255).astype(np.uint8))
            if kind != "good":
                _save_mask(root / "ground_truth" / kind / f"{i:03d}_mask.png", defect, degrees)
            if kind == "flip":
                nut = defect  # the nut was mirrored, and all of it is the defect
            _save_mask(root / "nut" / part / kind / f"{i:03d}_mask.png", nut, degrees)


def _save_mask(path: Path, mask: np.ndarray, degrees: float) -> None:
    save_image(path, rotate(mask.astype(np.uint8), degrees, reshape=False, order=0) * np.uint8(255))
