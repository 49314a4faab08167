"""Synthetic stand-ins, drawn in seconds: magnetic tiles, a metal nut, and defects for real normal tiles.

The `smoke` profile and the tests need data of the real layout without a download; `add_defect` also makes the
development split of the anomaly experiments, by drawing defects onto held-out normal tiles. Nothing measured
on these images says anything about the real sets.

What is imitated: the magnetic-tile set (Huang, Qiu & Yuan, "Surface defect saliency of magnetic tile", The
Visual Computer 36, 2020) and MVTec AD metal_nut (Bergmann et al., CVPR 2019). The numbers in `_AREA` and the
contrasts in `add_defect` are rounded from the masks and images of the real tile set.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import (
    binary_dilation,
    distance_transform_edt,
    gaussian_filter,
    gaussian_filter1d,
    rotate,
)

KINDS = ("blowhole", "break", "crack", "fray", "uneven")

# Share of the image that a defect covers: median, spread of its logarithm, smallest, largest.
_AREA = {
    "blowhole": (0.0014, 0.7, 0.0004, 0.0070),
    "break": (0.0130, 1.1, 0.0015, 0.2200),
    "crack": (0.0031, 0.6, 0.0010, 0.0150),
    "fray": (0.1600, 0.6, 0.0300, 0.4300),
    "uneven": (0.2400, 0.5, 0.0500, 0.4800),
}
_SMALLEST_DEFECT = 6  # pixels: below this a pit on a small tile is only noise
_COUNTS = {"Free": 60, "Blowhole": 6, "Break": 6, "Crack": 6, "Fray": 6, "Uneven": 6}


# ------------------------------------------------------------ magnetic tiles


def _field(rng: np.random.Generator, shape: tuple[int, int], sigma: tuple[float, float]) -> np.ndarray:
    """Smooth random field of mean 0 and standard deviation 1; `sigma` is its correlation length in pixels."""
    field = gaussian_filter(rng.standard_normal(shape), sigma, mode="reflect")
    return (field - field.mean()) / (field.std() + 1e-12)


def _grinding_lines(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Log-brightness (H, W) of vertical polishing lines: most faint, a few bright."""
    fine, coarse = rng.standard_normal((2, width))
    faint = gaussian_filter1d(fine, 0.5) + gaussian_filter1d(coarse, 2.0)
    bright = (rng.random(width) < 0.03) * rng.uniform(1.5, 5.0, width)
    fading = _field(rng, (height, width), (height / 5, 1.0))
    return 0.05 * (faint + bright) * np.clip(0.8 + 0.7 * fading, 0.0, None)


def draw_tile(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One defect-free tile, (H, W) uint8: vertical polishing lines, uneven light, bevelled side edges.

    Raises ValueError when a side is shorter than 32 pixels.
    """
    _require_size(height, width)
    row, column = np.mgrid[0:height, 0:width].astype(float)
    level = rng.uniform(75.0, 165.0)
    # Light: darker towards the sides (the tile is curved), with large bright and dark patches.
    log_light = -0.35 * np.abs(2 * column / width - 1) ** 2 * rng.uniform(0.3, 1.3)
    log_light += rng.uniform(0.10, 0.24) * _field(rng, (height, width), (height / 5, width / 6))
    log_light += rng.uniform(0.05, 0.17) * _field(rng, (1, width), (0, width / 15))
    log_grain = 0.035 * _field(rng, (height, width), (0.6, 0.4)) + 0.03 * _field(rng, (height, width), (6, 0.6))
    log_image = log_light + log_grain + rng.uniform(0.6, 1.2) * _grinding_lines(rng, height, width)

    for distance in (column, width - 1 - column):  # bevels: a dark seam between two differently lit faces
        if rng.random() < 0.7:
            seam = width * rng.uniform(0.02, 0.06) + 0.4 * _field(rng, (height, 1), (height / 8, 0))
            log_image += np.where(distance < seam, rng.uniform(-0.5, 0.4), 0.0)
            log_image -= rng.uniform(0.3, 0.9) * np.exp(-(((distance - seam) / 1.2) ** 2))
        log_image -= rng.uniform(0.0, 0.6) * np.exp(-distance)
    for distance in (row, height - 1 - row):  # a curved lower or upper end shows as a dark arc
        if rng.random() < 0.25:
            sag = height * rng.uniform(0.02, 0.05) * (2 * column / width - 1) ** 2
            log_image -= rng.uniform(0.6, 1.4) / (1 + np.exp(2 * (distance - sag)))
    for _ in range(rng.poisson(0.7)):  # harmless faint stains, which the real normal tiles have too
        stain = np.hypot(
            (row - rng.uniform(0, height)) / (height * rng.uniform(0.03, 0.12)),
            (column - rng.uniform(0, width)) / (width * rng.uniform(0.03, 0.12)),
        ) + 0.25 * _field(rng, (height, width), (4, 4))
        log_image -= rng.uniform(0.05, 0.18) * np.exp(-(((stain - 1) / 0.3) ** 2))
    image = level * np.exp(log_image) + rng.normal(0, 1.0, (height, width))
    return np.clip(image, 4, 255).astype(np.uint8)


def _smallest(score: np.ndarray, area: int) -> np.ndarray:
    """The `area` pixels of lowest score, as a mask: every defect shape below is cut out to an exact size."""
    mask = np.zeros(score.size, bool)
    mask[np.argpartition(score.ravel(), area - 1)[:area]] = True
    return mask.reshape(score.shape)


def _ellipse_distance(row, column, centre, radii, angle) -> np.ndarray:
    """Distance from `centre` (row, column) in units of the ellipse's radii, so 1 is its outline."""
    down, right = row - centre[0], column - centre[1]
    along = down * np.cos(angle) + right * np.sin(angle)
    across = right * np.cos(angle) - down * np.sin(angle)
    return np.hypot(along / radii[0], across / radii[1])


def _crack_path(rng: np.random.Generator, height: int, width: int, length: int) -> np.ndarray:
    """Mask (H, W) of a meandering one-pixel line, about `length` pixels long, mostly vertical."""
    from_edge = rng.random() < 0.5
    start_row = 0.0 if from_edge else rng.uniform(0.1, 0.5) * height
    heading = rng.normal(0, 0.35) + np.cumsum(rng.normal(0, 0.12, 2 * length)) * rng.choice([0.4, 1.0])
    row = start_row + 0.5 * np.cumsum(np.cos(heading))
    column = rng.uniform(0.12, 0.88) * width + 0.5 * np.cumsum(np.sin(heading))
    if rng.random() < 0.5:
        row = height - 1 - row
    inside = (row > -0.5) & (row < height - 0.5) & (column > -0.5) & (column < width - 0.5)
    inside[0] = True  # the start is inside up to rounding, and keeps the path from being empty
    path = np.zeros((height, width), bool)
    path[
        np.clip(np.rint(row[inside]).astype(int), 0, height - 1),
        np.clip(np.rint(column[inside]).astype(int), 0, width - 1),
    ] = True
    return path


def _defect_mask(rng: np.random.Generator, kind: str, height: int, width: int) -> np.ndarray:
    """Outline of one defect as a mask (H, W), of an area drawn from `_AREA`."""
    median, spread, low, high = _AREA[kind]
    share = np.clip(median * np.exp(spread * rng.standard_normal()), low, high)
    area = max(_SMALLEST_DEFECT, round(share * height * width))
    row, column = np.mgrid[0:height, 0:width].astype(float)
    radius = np.sqrt(area / np.pi)
    rough = _field(rng, (height, width), (max(1.0, radius / 3),) * 2)

    if kind == "blowhole":  # one pit, seldom two or three
        pits = []
        for _ in range(rng.choice([1, 2, 3], p=[0.75, 0.15, 0.1])):
            centre = rng.uniform(0.06, 0.94, 2) * (height, width)
            stretch = rng.uniform(1.0, 1.6)
            pits.append(_ellipse_distance(row, column, centre, (stretch, 1 / stretch), rng.uniform(-0.6, 0.6)))
        return _smallest(np.min(pits, axis=0) + 0.15 * radius * rough, area)
    if kind == "crack":
        thickness = max(1.3, 0.012 * min(height, width)) * rng.uniform(0.8, 1.3)
        path = _crack_path(rng, height, width, int(np.clip(area / thickness, 5, 0.9 * height)))
        # A path that leaves the tile is shorter than planned: such a crack covers less, it is not fatter.
        area = max(_SMALLEST_DEFECT, int(np.clip(area, path.sum(), 1.5 * thickness * path.sum())))
        return _smallest(distance_transform_edt(~path) + 0.3 * rng.random((height, width)), area)
    if kind == "break":  # a corner, or a piece of the border, is chipped off
        centre = np.array([rng.choice([0, height - 1]), rng.choice([0, width - 1])], float)
        if rng.random() < 0.4:
            side = rng.integers(2)
            centre[side] = rng.uniform(0.1, 0.9) * (height, width)[side]
        stretch = rng.uniform(1.0, 1.8)
        distance = _ellipse_distance(row, column, centre, (stretch, 1 / stretch), rng.uniform(-0.4, 0.4))
        return _smallest(distance + 0.2 * radius * rough, area)
    if kind == "fray":  # a smooth drop reaching in from one side
        side, far = rng.integers(2), rng.integers(2)
        sizes = (height, width)
        centre = rng.uniform(0.25, 0.75, 2) * sizes
        centre[side] = abs(far * (sizes[side] - 1) - rng.uniform(0.0, 1.0) * radius)
        radii = (1.5, 1 / 1.5) if side == 0 else (1 / 1.5, 1.5)
        distance = _ellipse_distance(row, column, centre, radii, rng.uniform(-0.2, 0.2))
        return _smallest(distance + 0.12 * radius * rough, area)
    # uneven: the part above or below a wavy, tilted line across the tile
    boundary = rng.uniform(-0.12, 0.12) * column + 0.012 * height * _field(rng, (1, width), (0, width / 10))
    return _smallest(row * rng.choice([-1, 1]) + boundary, area)


def add_defect(image: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one defect onto a tile, real or drawn.

    `image` is (H, W) uint8 with H, W >= 32 and stays as it is; `kind` is one of `KINDS`. Returns the new
    image (H, W) uint8 and its mask (H, W) bool, which covers 6 pixels at least and 48 % of the image at most.
    Contrast is a multiple of the image's own grey spread (its standard deviation, held in 10-45 grey levels);
    the image may change up to 2 pixels outside the mask (a soft outline).
    Raises ValueError for an unknown kind, another dtype or dimension, or a side below 32 pixels.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown defect kind {kind!r}: use one of {', '.join(KINDS)}")
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}: give a grey uint8 image of shape (H, W)")
    height, width = image.shape
    _require_size(height, width)
    grey = image.astype(float)
    spread = np.clip(grey.std(), 10.0, 45.0)  # the floor keeps a defect visible on a flat image
    mask = _defect_mask(rng, kind, height, width)
    local = gaussian_filter(grey, 3.0)  # brightness around each pixel, without the lines
    texture = grey - local
    noise = rng.standard_normal(image.shape)

    # keep: share of the tile's texture; depth: change of brightness in spreads; own: the defect's texture.
    if kind == "blowhole":
        keep, depth, own = 0.3, -rng.uniform(1.0, 2.2), 0.10 * noise
    elif kind == "crack":
        keep, depth, own = 0.6, -rng.uniform(0.6, 1.5), 0.15 * noise
    elif kind == "break":
        facets = _field(rng, image.shape, (max(2.0, height / 60), max(2.0, width / 60)))
        keep, depth, own = 0.3, -rng.uniform(0.6, 1.5), 0.30 * facets + 0.10 * noise
    elif kind == "fray":
        cloud = _field(rng, image.shape, (height / 10, width / 10))
        keep, depth, own = 0.35, -rng.uniform(0.6, 1.4), 0.15 * cloud + 0.08 * noise
    else:
        lines = _grinding_lines(rng, height, width) / 0.10
        keep, depth, own = 0.5, rng.choice([-0.7, 1.0], p=[0.3, 0.7]) * rng.uniform(0.5, 1.2), 0.35 * lines
    shift = depth * spread
    own *= np.minimum(spread, 4 + 0.5 * local)
    if shift < 0 and local[mask].mean() < max(20.0, 0.5 * np.median(grey)):
        shift = -shift  # no room below: what is dark around it, such as a bevel, shows the defect as lighter
    elif shift < 0:
        shift = np.maximum(shift, -0.7 * local)
    elif np.percentile(local[mask] + shift, 90) > 240:  # no room above: darken instead of saturating
        shift = -shift
    inside = local + keep * texture + shift + own - own[mask].mean()

    opacity = np.maximum(gaussian_filter(mask.astype(float), 0.6), 0.9 * mask)
    opacity *= binary_dilation(mask, iterations=2)
    if kind == "break" and mask.sum() > 60:  # parts of the broken edge catch the light
        rim = mask & binary_dilation(~mask) & (_field(rng, image.shape, (3, 3)) > 0)
        inside = inside + rim * rng.uniform(0.3, 1.0) * spread
    out = grey + opacity * (inside - grey)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8), mask


def _require_size(height: int, width: int) -> None:
    if min(height, width) < 32:
        raise ValueError(f"a tile of {height} x {width} pixels is too small: give both sides at least 32 pixels")


def write_magnetic_tile(folder: Path, seed: int = 0, counts: dict[str, int] | None = None) -> None:
    """Write a stand-in of the magnetic-tile set: `folder`/MT_<Type>/Imgs/exp{0..6}_num_{id}.jpg and .png.

    Grey JPEGs (quality 95), height 89-160 and width 44-250 (about 0.4 of the real size), and grey PNG masks,
    where > 127 is defect; half the masks have grey edges, those of Free are all zero. As in the real set, a
    mask can be empty although the tile is defective: that of the last Uneven tile is, if there is more than
    one. `counts` gives the number of images per type (default 60 Free, 6 of each defect; a type left out has
    none); an unknown type raises ValueError. The same seed writes the same bytes (with the same versions of
    numpy, scipy and pillow).
    """
    counts = _COUNTS if counts is None else counts
    if unknown := sorted(set(counts) - set(_COUNTS)):
        raise ValueError(f"unknown tile type {unknown[0]!r}: use some of {', '.join(_COUNTS)}")
    rng = np.random.default_rng(seed)
    numbers = iter(rng.choice(400_000, sum(counts.values()), replace=False))  # ids are unique in the real set
    for type_name in _COUNTS:
        images = Path(folder) / f"MT_{type_name}" / "Imgs"
        images.mkdir(parents=True, exist_ok=True)
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
            stem = images / f"exp{rng.integers(7)}_num_{next(numbers)}"
            Image.fromarray(image).save(stem.with_suffix(".jpg"), quality=95)
            Image.fromarray(_grey_mask(mask, soft=rng.random() < 0.5)).save(stem.with_suffix(".png"))


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
    light = 95 + 14 * _field(rng, (size, size), (1, 1)) + 20 * np.sin(14 * radius + 0.7 * np.sin(phase))
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
    rough = _field(rng, body.shape, (size / 40, size / 40))
    inside = np.argwhere(body)
    centre = inside[rng.integers(len(inside))]
    if kind == "bent":  # the tip of a lobe is bent out of the light
        tips = np.argwhere(body & (np.hypot(row - size / 2, column - size / 2) > 0.36 * size))
        centre = tips[rng.integers(len(tips))]
        mask = body & (np.hypot(row - centre[0], column - centre[1]) + size / 60 * rough < 0.11 * size)
        return np.where(mask[..., None], 0.3 * rgb + 12, rgb), mask
    stretch = 1.0 if kind == "color" else 3.0
    distance = _ellipse_distance(row, column, centre, (stretch, 1 / stretch), rng.uniform(0, np.pi))
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
    """Write a stand-in in the layout of MVTec AD: `folder`/`category`/train/good/NNN.png, test/good/NNN.png,
    test/<type>/NNN.png and ground_truth/<type>/NNN_mask.png (0 or 255), types bent, color, flip, scratch. Beside it,
    which the real set does not have, the drawn nut itself: nut/<train or test>/<type>/NNN_mask.png.

    `train` normal images, `test` images of good and of each type; RGB, `size` x `size` pixels. `category`
    only names the folder: the picture is always the nut. The same seed writes the same bytes (with the same
    versions of numpy, scipy and pillow).
    """
    rng = np.random.default_rng(seed)
    root = Path(folder) / category
    jobs = [("train", "good", train)] + [("test", t, test) for t in ("good", "bent", "color", "flip", "scratch")]
    for part, kind, count in jobs:
        (root / part / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rgb, nut = _draw_nut(rng, size)
            if kind != "good":
                rgb, defect = _nut_defect(rng, rgb, nut, kind)
            degrees = rng.uniform(0, 360)
            rgb = rotate(rgb, degrees, reshape=False, order=1, mode="constant", cval=25)
            Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).save(root / part / kind / f"{i:03d}.png")
            if kind != "good":
                _save_mask(root / "ground_truth" / kind / f"{i:03d}_mask.png", defect, degrees)
            if kind == "flip":
                nut = defect  # the nut was mirrored, and all of it is the defect
            _save_mask(root / "nut" / part / kind / f"{i:03d}_mask.png", nut, degrees)


def _save_mask(path: Path, mask: np.ndarray, degrees: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    turned = rotate(mask.astype(np.uint8), degrees, reshape=False, order=0) * np.uint8(255)
    Image.fromarray(turned).save(path)
