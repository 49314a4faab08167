"""Defects drawn onto normal tiles, real or synthetic.

They make the test part of the synthetic tiles, and the anomalous half of every anomaly set's dev split. The numbers in
`_AREA` and the contrasts in `add_defect` are rounded from the masks and images of the real magnetic tiles.
"""

import numpy as np
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter, gaussian_filter1d

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


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], sigma: tuple[float, float]) -> np.ndarray:
    """Smooth random field of mean 0 and standard deviation 1; `sigma` is its correlation length in pixels."""
    field = gaussian_filter(rng.standard_normal(shape), sigma, mode="reflect")
    return (field - field.mean()) / (field.std() + 1e-12)


def grinding_lines(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Log-brightness (H, W) of vertical polishing lines: most faint, a few bright."""
    fine, coarse = rng.standard_normal((2, width))
    faint = gaussian_filter1d(fine, 0.5) + gaussian_filter1d(coarse, 2.0)
    bright = (rng.random(width) < 0.03) * rng.uniform(1.5, 5.0, width)
    fading = smooth_field(rng, (height, width), (height / 5, 1.0))
    return 0.05 * (faint + bright) * np.clip(0.8 + 0.7 * fading, 0.0, None)


def _smallest(score: np.ndarray, area: int) -> np.ndarray:
    """The `area` pixels of lowest score, as a mask: every defect shape below is cut out to an exact size."""
    mask = np.zeros(score.size, bool)
    mask[np.argpartition(score.ravel(), area - 1)[:area]] = True
    return mask.reshape(score.shape)


def ellipse_distance(row, column, centre, radii, angle) -> np.ndarray:
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
    places = ((row, height), (column, width))
    path[tuple(np.clip(np.rint(place[inside]).astype(int), 0, side - 1) for place, side in places)] = True
    return path


def _defect_mask(rng: np.random.Generator, kind: str, height: int, width: int) -> np.ndarray:
    """Outline of one defect as a mask (H, W), of an area drawn from `_AREA`."""
    median, spread, low, high = _AREA[kind]
    share = np.clip(median * np.exp(spread * rng.standard_normal()), low, high)
    area = max(_SMALLEST_DEFECT, round(share * height * width))
    row, column = np.mgrid[0:height, 0:width].astype(float)
    radius = np.sqrt(area / np.pi)
    rough = smooth_field(rng, (height, width), (max(1.0, radius / 3),) * 2)

    if kind == "blowhole":  # one pit, seldom two or three
        pits = []
        for _ in range(rng.choice([1, 2, 3], p=[0.75, 0.15, 0.1])):
            centre = rng.uniform(0.06, 0.94, 2) * (height, width)
            stretch = rng.uniform(1.0, 1.6)
            pits.append(ellipse_distance(row, column, centre, (stretch, 1 / stretch), rng.uniform(-0.6, 0.6)))
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
        distance = ellipse_distance(row, column, centre, (stretch, 1 / stretch), rng.uniform(-0.4, 0.4))
        return _smallest(distance + 0.2 * radius * rough, area)
    if kind == "fray":  # a smooth drop reaching in from one side
        side, far = rng.integers(2), rng.integers(2)
        sizes = (height, width)
        centre = rng.uniform(0.25, 0.75, 2) * sizes
        centre[side] = abs(far * (sizes[side] - 1) - rng.uniform(0.0, 1.0) * radius)
        radii = (1.5, 1 / 1.5) if side == 0 else (1 / 1.5, 1.5)
        distance = ellipse_distance(row, column, centre, radii, rng.uniform(-0.2, 0.2))
        return _smallest(distance + 0.12 * radius * rough, area)
    # uneven: the part above or below a wavy, tilted line across the tile
    boundary = rng.uniform(-0.12, 0.12) * column + 0.012 * height * smooth_field(rng, (1, width), (0, width / 10))
    return _smallest(row * rng.choice([-1, 1]) + boundary, area)


def add_defect(image: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one defect onto a tile, real or synthetic.

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
    require_size(height, width)
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
        facets = smooth_field(rng, image.shape, (max(2.0, height / 60), max(2.0, width / 60)))
        keep, depth, own = 0.3, -rng.uniform(0.6, 1.5), 0.30 * facets + 0.10 * noise
    elif kind == "fray":
        cloud = smooth_field(rng, image.shape, (height / 10, width / 10))
        keep, depth, own = 0.35, -rng.uniform(0.6, 1.4), 0.15 * cloud + 0.08 * noise
    else:
        lines = grinding_lines(rng, height, width) / 0.10
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
        rim = mask & binary_dilation(~mask) & (smooth_field(rng, image.shape, (3, 3)) > 0)
        inside = inside + rim * rng.uniform(0.3, 1.0) * spread
    out = grey + opacity * (inside - grey)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8), mask


def require_size(height: int, width: int) -> None:
    if min(height, width) < 32:
        raise ValueError(f"a tile of {height} x {width} pixels is too small: give both sides at least 32 pixels")
