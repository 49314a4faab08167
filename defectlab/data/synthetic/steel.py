"""Synthetic hot-rolled steel strip with exact boxes (the layout of NEU-DET) or masks (of NEU-Seg).

Sizes and contrasts were chosen by eye beside the images of NEU-DET; objects are kept large enough for a small detector
at 96-128 pixels. Boxes are those of `boards`. No object touches the first row or column, so that VOC coordinates are at
least 1 as in the real set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.special import expit

from defectlab.data.images import save_image
from defectlab.data.synthetic.boards import Box, bounds
from defectlab.data.synthetic.pasted import ellipse_distance, smooth_field

MASKED_KINDS = ("inclusion", "patches", "scratches")  # those that NEU-Seg marks; mask values 1, 2, 3
STEEL_KINDS = ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")
VISIBLE = 6  # grey levels: a steel pixel that changes by more belongs to the object, and only such pixels do

# Background: lowest and highest level, standard deviation of the grain and its correlation length down and
# across, standard deviation of the streaks along the rolling direction (top to bottom). Grey levels, pixels.
_GROUND = {
    "crazing": (120, 160, 22, (0.8, 0.8), 9),
    "inclusion": (80, 125, 2.5, (0.7, 0.7), 3),
    "patches": (165, 205, 26, (0.9, 0.6), 16),
    "pitted_surface": (140, 200, 4, (0.7, 0.7), 6),
    "rolled-in_scale": (115, 150, 11, (0.7, 2.2), 5),
    "scratches": (85, 125, 3, (0.6, 0.6), 3),
}
# Window in which an object is drawn, at 200 pixels: lowest and highest height, lowest and highest width.
_WINDOW = {
    "crazing": (45, 85, 65, 115),
    "inclusion": (40, 110, 20, 36),
    "patches": (50, 105, 38, 72),
    "pitted_surface": (75, 120, 75, 120),
    "rolled-in_scale": (42, 85, 42, 75),
    "scratches": (60, 150, 16, 32),
}


def _steel_ground(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    """Defect-free strip, (S, S) uint8, with the background usual for images of `kind`."""
    low, high, grain, correlation, streak = _GROUND[kind]
    down, across = (np.mgrid[0:size, 0:size] + 0.5) / size - 0.5
    light = 1 + rng.uniform(-0.35, 0.35) * across + rng.uniform(-0.2, 0.2) * down
    streaks = smooth_field(rng, (1, size), (0, size / 25)) + 0.5 * smooth_field(rng, (1, size), (0, size / 150))
    cloud = smooth_field(rng, (size, 1), (size / 12, 0)) if kind in ("scratches", "patches") else 0.0
    image = rng.uniform(low, high) * light + streak * (streaks + cloud)
    image += grain * smooth_field(rng, (size, size), correlation) + rng.normal(0, 1.5, (size, size))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _opacity(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 well inside the outline (distance < 1), 0 well outside, half on it."""
    return expit((1 - distance) / softness)


def _steel_object(rng: np.random.Generator, kind: str, ground: np.ndarray, unit: float) -> np.ndarray:
    """The window `ground` (H, W) float with one object of `kind` drawn into it; `unit` is pixels at 200 pixels."""
    height, width = ground.shape
    row, column = np.mgrid[0:height, 0:width].astype(float)
    spread = ground.std()  # a coarse ground needs more contrast
    rough = smooth_field(rng, ground.shape, (height / 10, width / 10))
    middle = (height / 2, width / 2)
    # An ellipse of wavy outline that fills the window.
    area = ellipse_distance(row, column, middle, (0.5 * height, 0.5 * width), 0.0) + 0.15 * rough

    if kind == "crazing":  # a net of fine dark cracks: zero contours of a smooth field, torn here and there
        net = smooth_field(rng, ground.shape, (2.4 * unit, 4.0 * unit))
        slope = np.hypot(*np.gradient(net))
        cracks = np.exp(-((net / (0.9 * unit * slope + 1e-3)) ** 2))
        torn = _opacity(1 - 2 * smooth_field(rng, ground.shape, (4 * unit, 4 * unit)) - 1.2, 0.3)
        return ground - (70 + spread) * rng.uniform(0.8, 1.2) * cracks * torn * _opacity(area, 0.08)
    if kind == "inclusion":  # dark smooth streaks along the rolling direction
        opacity = np.zeros_like(ground)
        for _ in range(rng.integers(1, 4)):
            radii = (height * rng.uniform(0.2, 0.48), width * rng.uniform(0.18, 0.4))
            centre = [rng.uniform(r, side - r) for r, side in zip(radii, (height, width), strict=True)]
            streak = ellipse_distance(row, column, centre, radii, rng.uniform(-0.04, 0.04)) + 0.2 * rough
            opacity = np.maximum(opacity, _opacity(streak, 0.12))
        return ground - (rng.uniform(22, 45) + 0.8 * spread) * opacity
    if kind == "patches":  # one large dark patch with frayed edges
        square = (np.abs(2 * row / height - 1) ** 4 + np.abs(2 * column / width - 1) ** 4) ** 0.25
        grain = smooth_field(rng, ground.shape, (0.9 * unit, 0.7 * unit))
        opacity = _opacity(square + 0.2 * rough + 0.12 * grain + 0.1, 0.12)
        return ground * (1 - rng.uniform(0.65, 0.8) * opacity) + 6 * grain * opacity
    if kind == "pitted_surface":  # an area of many small dark pits
        pits = np.clip(smooth_field(rng, ground.shape, (1.3 * unit, 0.9 * unit)) - 0.5, 0, 1.5)
        return ground - (rng.uniform(45, 75) + spread) * pits * _opacity(area, 0.06)
    if kind == "rolled-in_scale":  # dark flecks of scale, each with a light rim, on a smudge
        flecks = np.zeros_like(ground)
        for _ in range(rng.integers(7, 15)):
            radii = np.array([rng.uniform(1.5, 3.2), rng.uniform(4.0, 9.0)]) * unit
            centre = rng.uniform(0.14, 0.86, 2) * (height, width)
            fleck = ellipse_distance(row, column, centre, radii, rng.uniform(-0.2, 0.7)) + 0.3 * rough
            flecks = np.maximum(flecks, _opacity(fleck, 0.15))
        rim = np.clip(np.roll(flecks, round(2 * unit), axis=0) - flecks, 0, 1)
        depth = rng.uniform(55, 80) + spread
        return ground - depth * flecks + 0.35 * depth * rim - 14 * _opacity(area + 0.1, 0.1)
    # scratches: one or two bright thin lines along the rolling direction, torn and a little slanted
    light = np.zeros_like(ground)
    for start in rng.uniform(0.2, 0.8, rng.integers(1, 3)) * width:
        end = np.clip(start + rng.uniform(-0.5, 0.5) * width, 0.1 * width, 0.9 * width)
        thickness = unit * (rng.uniform(1.2, 2.2) + 0.4 * smooth_field(rng, (height, 1), (height / 12, 0)))
        distance = np.abs(column - (start + (end - start) * row / height)) / np.clip(thickness, 0.6, None)
        torn = np.clip(1.1 + 0.6 * smooth_field(rng, (height, 1), (height / 25, 0)), 0.1, 1.2)
        light = np.maximum(light, np.exp(-(distance**2)) * torn)
    return ground + (rng.uniform(95, 140) + spread) * light


def _near(a: Box, b: Box, margin: int) -> bool:
    return all(a[i] - margin < b[i + 2] and b[i] < a[i + 2] + margin for i in (0, 1))


def steel_image(rng: np.random.Generator, kind: str, size: int) -> tuple[np.ndarray, np.ndarray, list[tuple[str, Box]]]:
    """Defect-free strip and the same with 1-4 objects, both (S, S) uint8, and the objects' kinds and boxes.

    The two differ inside the boxes only, and each box is the smallest around the pixels in it that differ by
    more than `VISIBLE`. Boxes do not overlap. About one image in ten has one object of another kind.
    """
    unit = size / 200
    clean = _steel_ground(rng, kind, size)
    image, objects = clean.copy(), []
    kinds = [kind] * rng.integers(1, 5)
    if len(kinds) > 1 and rng.random() < 0.13:
        kinds[1] = str(rng.choice([k for k in STEEL_KINDS if k != kind]))
    for wanted in kinds:
        for _ in range(10):  # a crowded image gets fewer objects than wanted
            low_height, high_height, low_width, high_width = _WINDOW[wanted]
            height = round(unit * rng.uniform(low_height, high_height))
            width = round(unit * rng.uniform(low_width, high_width))
            top, left = rng.integers(1, size - height + 1), rng.integers(1, size - width + 1)
            window = (int(left), int(top), int(left) + width, int(top) + height)
            if any(_near(window, box, round(3 * unit)) for _, box in objects):
                continue
            ground = clean[top : top + height, left : left + width]
            drawn = _steel_object(rng, wanted, ground.astype(float), unit)
            drawn = np.clip(np.rint(drawn), 0, 255).astype(np.uint8)
            visible = np.abs(drawn.astype(int) - ground) > VISIBLE
            if not visible.any():
                continue
            x0, y0, x1, y1 = bounds(visible)
            if min(x1 - x0, y1 - y0) < 8 * unit:
                continue
            image[top + y0 : top + y1, left + x0 : left + x1] = drawn[y0:y1, x0:x1]
            objects.append((wanted, (window[0] + x0, window[1] + y0, window[0] + x1, window[1] + y1)))
            break
    return clean, image, objects


# ------------------------------------------------------------ files


def _voc(name: str, folder: str, size: int, objects: list[tuple[str, Box]]) -> str:
    """Pascal VOC annotation of the square image `name`.jpg."""
    boxes = "".join(
        f"\t<object>\n\t\t<name>{kind}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<truncated>0</truncated>\n"
        f"\t\t<difficult>0</difficult>\n\t\t<bndbox>\n\t\t\t<xmin>{x1}</xmin>\n\t\t\t<ymin>{y1}</ymin>\n"
        f"\t\t\t<xmax>{x2}</xmax>\n\t\t\t<ymax>{y2}</ymax>\n\t\t</bndbox>\n\t</object>\n"
        for kind, (x1, y1, x2, y2) in objects
    )
    return (
        f"<annotation>\n\t<folder>{folder}</folder>\n\t<filename>{name}.jpg</filename>\n\t<source>\n"
        f"\t\t<database>NEU-DET</database>\n\t</source>\n\t<size>\n\t\t<height>{size}</height>\n"
        f"\t\t<width>{size}</width>\n\t\t<depth>1</depth>\n\t</size>\n\t<segmented>0</segmented>\n{boxes}</annotation>\n"
    )


def write_steel(folder: Path, count: int = 20, size: int = 200, seed: int = 0) -> None:
    """Write a synthetic set in the layout of NEU-DET: IMAGES/<kind>_<number>.jpg, ANNOTATIONS/<kind>_<number>.xml.

    `count` images of each of `STEEL_KINDS`, numbers from 1; JPEG of `size` x `size` pixels stored as RGB with
    R = G = B, as the real ones are; boxes as Pascal VOC xml. The images of one seed are the same whatever `count` is.
    ValueError for a `size` below 100.
    """
    if size < 100:
        raise ValueError(f"steel images of {size} pixels are too small for their objects: give size=100 or more")
    annotations = Path(folder) / "ANNOTATIONS"
    annotations.mkdir(parents=True, exist_ok=True)
    for k, kind in enumerate(STEEL_KINDS):
        for number in range(1, count + 1):
            _, image, objects = steel_image(np.random.default_rng([seed, k, number]), kind, size)
            name = f"{kind}_{number}"
            save_image(Path(folder) / "IMAGES" / f"{name}.jpg", np.repeat(image[..., None], 3, 2))
            (annotations / f"{name}.xml").write_text(_voc(name, kind[:2], size, objects), encoding="utf-8")


def write_steel_masks(folder: Path, count: int = 16, size: int = 100, seed: int = 0) -> None:
    """Write a synthetic set in the layout of NEU-Seg: images/<part>/<kind>_<number>.jpg, annotations/... .png.

    `count` strips of `size` x `size` pixels for each of `MASKED_KINDS`, the last quarter for testing. A mask
    marks where the drawing changed the strip by a third of its largest change or more; objects of other kinds are
    background.
    """
    for kind in MASKED_KINDS:
        for number in range(count):
            rng = np.random.default_rng([seed, STEEL_KINDS.index(kind), number])
            clean, image, objects = steel_image(rng, kind, size)
            change = np.abs(image.astype(int) - clean)
            mask = np.zeros((size, size), np.uint8)
            for name, (x1, y1, x2, y2) in objects:
                if name in MASKED_KINDS:
                    window = change[y1:y2, x1:x2]
                    drawn = np.pad(window > window.max() / 3, 2)
                    # a torn line or a grainy patch is one object: gaps of up to four pixels are closed
                    closed = ndimage.binary_closing(drawn, np.ones((3, 3)), 2)[2:-2, 2:-2]
                    mask[y1:y2, x1:x2][closed] = MASKED_KINDS.index(name) + 1
            part = "test" if number >= count - count // 4 else "training"
            save_image(Path(folder) / "images" / part / f"{kind}_{number}.jpg", image)
            save_image(Path(folder) / "annotations" / part / f"{kind}_{number}.png", mask)
