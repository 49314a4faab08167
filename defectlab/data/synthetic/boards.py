"""Synthetic bare circuit boards with exact boxes, in the layout of DeepPCB.

A board is a mask, True where copper is. A box is x1, y1, x2, y2 in whole pixels counted from 0, x2 and y2 one past the
last pixel.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation, binary_erosion, label

BOARD_KINDS = ("open", "short", "mousebite", "spur", "copper", "pin-hole")  # in the order of DeepPCB's types 1-6

# How each kind changes the number of connected pieces of copper, and of bare ground, in its neighbourhood.
_PIECES = {
    "open": (1, -1),
    "short": (-1, 1),
    "mousebite": (0, 0),
    "spur": (0, 0),
    "copper": (1, 0),
    "pin-hole": (0, 1),
}
_ADDS_COPPER = ("short", "spur", "copper")
_HEADINGS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))

Box = tuple[int, int, int, int]


def bounds(mask: np.ndarray) -> Box:
    """Smallest box around the True pixels of `mask` (H, W), which has at least one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def grown(box: Box, margin: int) -> Box:
    return box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin


def _inside(box: Box, height: int, width: int) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: int) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _stroke(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], thickness: float, fill: int) -> None:
    """Polyline through `points` (x, y) with round ends and joints."""
    draw.line(points, fill=fill, width=max(1, round(thickness)))
    for x, y in points:
        _disc(draw, x, y, thickness / 2, fill)


def _draw_board(rng: np.random.Generator, size: int, pitch: float) -> np.ndarray:
    """A board without defects: copper (S, S) bool.

    Traces run along a grid of `pitch` pixels, turn by 45 degrees and never touch each other.
    """
    rows = columns = int(size / pitch) + 1
    offset_x, offset_y = rng.uniform(0.0, 0.5, 2) * pitch
    taken = set()  # grid points in half pitches, so that the middle of a diagonal step counts, too
    canvas = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(canvas)
    pads = []  # drilled: x, y, radius of the pad, radius of its hole

    def place(point):
        return offset_x + point[1] / 2 * pitch, offset_y + point[0] / 2 * pitch

    for _ in range(rng.integers(1, 3)):  # copper areas
        r, c = 2 * int(rng.integers(rows - 2)), 2 * int(rng.integers(columns - 2))
        across, down = 2 * int(rng.integers(1, 3)), 2 * int(rng.integers(1, 3))
        points = {(i, j) for i in range(r, r + down + 1) for j in range(c, c + across + 1)}
        if points & taken:
            continue
        taken |= points
        (x0, y0), (x1, y1) = place((r, c)), place((r + down, c + across))
        edge = 0.3 * pitch
        draw.rounded_rectangle((x0 - edge, y0 - edge, x1 + edge, y1 + edge), radius=edge, fill=255)
        if rng.random() < 0.5:
            pads.append((x0, y0, 0.3 * pitch, 0.16 * pitch))
    for _ in range(rows * columns // 2):  # traces
        path = [(2 * int(rng.integers(rows)), 2 * int(rng.integers(columns)))]
        if path[0] in taken:
            continue
        heading, own = int(rng.integers(8)), {path[0]}
        for _ in range(rng.integers(3, 11)):
            down, across = _HEADINGS[heading]
            r, c = path[-1]
            step = {(r + down, c + across), (r + 2 * down, c + 2 * across)}
            r, c = r + 2 * down, c + 2 * across
            if not (0 <= r < 2 * rows and 0 <= c < 2 * columns) or step & (taken | own):
                break
            path.append((r, c))
            own |= step
            heading = (heading + int(rng.choice([-1, 0, 0, 0, 1]))) % 8
        if len(path) < 3:
            continue
        taken |= own
        _stroke(draw, [place(point) for point in path], pitch * rng.uniform(0.3, 0.55), 255)
        for x, y in (place(path[0]), place(path[-1])):
            shape = rng.random()
            if shape < 0.5:
                pads.append((x, y, pitch * rng.uniform(0.36, 0.42), pitch * rng.uniform(0.14, 0.18)))
            elif shape < 0.75:
                half = 0.36 * pitch
                draw.rectangle((x - half, y - half, x + half, y + half), fill=255)
    for r in range(rows):  # vias, and fiducial marks, where nothing else is
        for c in range(columns):
            if (2 * r, 2 * c) not in taken and rng.random() < 0.4:
                x, y = place((2 * r, 2 * c))
                if rng.random() < 0.7:
                    pads.append((x, y, 0.28 * pitch, 0.14 * pitch))
                else:
                    _disc(draw, x, y, 0.38 * pitch, 255)
    for x, y, radius, _ in pads:
        _disc(draw, x, y, radius, 255)
    for x, y, _, hole in pads:
        _disc(draw, x, y, hole, 0)
    return np.asarray(canvas) > 0


def _reach(mask: np.ndarray, start: tuple[int, int], direction: np.ndarray, limits: tuple[float, float]) -> int | None:
    """Pixels from `start` (row, column) along the unit vector `direction` to the first True pixel of `mask` (H, W).

    None where that pixel is nearer than the first or farther than the second of `limits`.
    """
    steps = np.arange(2, int(limits[1]) + 1)
    at = np.rint(np.add(start, steps[:, None] * direction)).astype(int)  # (steps, 2)
    at = at[((at >= 0) & (at < mask.shape)).all(axis=1)]
    hits = np.flatnonzero(mask[at[:, 0], at[:, 1]])
    return int(steps[hits[0]]) if len(hits) and steps[hits[0]] >= limits[0] else None


def _propose(
    rng: np.random.Generator, kind: str, copper: np.ndarray, edge: np.ndarray, unit: float
) -> np.ndarray | None:
    """Outline (H, W) bool of one try at a defect of `kind`, or None where the place does not suit it.

    `edge` holds the rows and columns (N, 2) of copper pixels beside bare ground; `unit` is 1/32 of the pitch.
    """
    canvas = Image.new("L", copper.shape[::-1], 0)
    draw = ImageDraw.Draw(canvas)
    row, column = edge[rng.integers(len(edge))]
    if kind in ("copper", "pin-hole"):
        row, column = rng.integers(0, copper.shape)
    reach = max(3, round(4 * unit))
    around = copper[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
    inward = np.argwhere(around).mean(axis=0) - np.argwhere(~around).mean(axis=0) if 0 < around.mean() < 1 else None
    if kind not in ("copper", "pin-hole"):
        if inward is None:
            return None
        angle = np.arctan2(*inward) + rng.normal(0, 0.2)
        inward = np.array([np.sin(angle), np.cos(angle)])

    def along(distance):  # (x, y) of the point that lies `distance` pixels inward of the edge
        return column + distance * inward[1], row + distance * inward[0]

    if kind in ("open", "short"):
        adds = kind == "short"
        limits = (8 * unit, 38 * unit) if adds else (8 * unit, 24 * unit)
        length = _reach(copper if adds else ~copper, (row, column), -inward if adds else inward, limits)
        if length is None:
            return None
        thickness = unit * (rng.uniform(5, 7) if adds else rng.uniform(8, 12))
        bend = rng.normal(0, 0.08 * length, 2)
        middle = np.add(along((-0.5 if adds else 0.5) * length), bend)
        over = 2 * unit if adds else thickness
        far = -length - over if adds else length + over
        _stroke(draw, [along(over if adds else -over), tuple(middle), along(far)], thickness, 255)
    elif kind == "spur":
        tip = np.add(along(-unit * rng.uniform(11, 16)), rng.normal(0, 1.5 * unit, 2))
        _stroke(draw, [along(2 * unit), tuple(tip)], unit * rng.uniform(4.5, 7), 255)
    else:  # a blob of three discs: a bite out of the edge, or an island
        radius = unit * (rng.uniform(5, 7) if kind == "mousebite" else rng.uniform(4, 5.5))
        heading = rng.uniform(0, 2 * np.pi)
        for shift in (-0.9, 0.0, 0.9):
            x, y = np.add((column, row), shift * radius * np.array([np.cos(heading), np.sin(heading)]))
            _disc(draw, x, y, radius * rng.uniform(0.7, 1.0), 255)
    return np.asarray(canvas) > 0


def _pieces(copper: np.ndarray) -> np.ndarray:
    return np.array([label(copper)[1], label(~copper)[1]])


def _defective_board(
    rng: np.random.Generator, template: np.ndarray, unit: float, kinds: list[str]
) -> tuple[np.ndarray, list[tuple[str, Box]]]:
    """`template` (H, W) bool with defects of `kinds`, in this order, and their kinds and boxes.

    A try counts if the pieces of copper and of bare ground in the neighbourhood change as is the mark of its kind
    (`_PIECES`), so a bite never cuts a trace through and a spur never reaches its neighbour. A kind that finds no
    place in 80 tries is left out. Boxes do not overlap and are the smallest around the pixels that differ.
    """
    height, width = template.shape
    margin, grow = round(4 * unit), round(2 * unit)
    copper, objects = template.copy(), []
    edge = np.argwhere(template & ~binary_erosion(template, border_value=1))
    for kind in kinds:
        adds = kind in _ADDS_COPPER
        for _ in range(80):
            outline = _propose(rng, kind, copper, edge, unit)
            if outline is None:
                continue
            changed = outline & (copper != adds)
            if not changed.any() or (kind in ("copper", "pin-hole") and (outline & (copper == adds)).any()):
                continue
            box = bounds(changed)
            sides = box[2] - box[0], box[3] - box[1]
            near = grown(box, margin)
            if min(sides) < 6 * unit or not 12 * unit <= max(sides) <= 40 * unit or not _inside(near, height, width):
                continue
            if any(overlap(near, other) for _, other in objects):
                continue
            crop = np.s_[near[1] : near[3], near[0] : near[2]]
            if label(changed[crop])[1] != 1:  # two bites at once would need two boxes
                continue
            before = _pieces(copper[crop])
            trials = [changed[crop]]
            if kind in ("mousebite", "spur", "copper", "pin-hole"):  # with some distance to the next piece
                trials.append(binary_dilation(changed[crop], iterations=grow))
            if all((_pieces(np.where(trial, adds, copper[crop])) - before == _PIECES[kind]).all() for trial in trials):
                copper[changed] = adds
                objects.append((kind, box))
                break
    return copper, objects


def _mixed(rng: np.random.Generator, kinds: tuple[str, ...], count: int) -> list[str]:
    """`count` kinds in random order, as evenly as possible."""
    return [str(kind) for _ in range(0, count, len(kinds)) for kind in rng.permutation(kinds)][:count]


def board_pair(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, list[tuple[str, Box]]]:
    """Template and inspected board (S, S) bool, True where copper is, and the 3-10 defects' kinds and boxes."""
    pitch = size / 10
    objects = []
    while len(objects) < 3:  # a board that is too crowded for three defects is drawn again
        template = _draw_board(rng, size, pitch)
        kinds = _mixed(rng, BOARD_KINDS, int(rng.integers(4, 11)))
        copper, objects = _defective_board(rng, template, pitch / 32, kinds)
    return template, copper, objects


def write_board(folder: Path, count: int = 60, size: int = 640, seed: int = 0) -> None:
    """Write a synthetic set in the layout of DeepPCB below `folder`/PCBData.

    groupNNNNN/NNNNN/<name>_test.jpg (inspected) and <name>_temp.jpg (without defects): grey JPEG (quality 95) of
    `size` x `size` pixels, 0 where copper is and 255 elsewhere, up to JPEG noise. groupNNNNN/NNNNN_not/<name>.txt: a
    line `x1 y1 x2 y2 type` for each of the 3-10 defects, type 1-6 as in `BOARD_KINDS`. trainval.txt and test.txt
    (the last fifth, rounded up): a line `image txt` for each board, the image without its `_test`, as published.
    A group has 20 boards. The boards of one seed are the same whatever `count` is. ValueError for a `size` below 160.
    """
    if size < 160:
        raise ValueError(f"boards of {size} pixels are too small for their defects: give size=160 or more")
    root, lines = Path(folder) / "PCBData", []
    for i in range(count):
        number = f"{10000 + i // 20:05d}"
        images, boxes = root / f"group{number}" / number, root / f"group{number}" / f"{number}_not"
        images.mkdir(parents=True, exist_ok=True)
        boxes.mkdir(parents=True, exist_ok=True)
        template, copper, objects = board_pair(np.random.default_rng([seed, i]), size)
        name = f"{number}{i % 20:03d}"
        for part, board in (("temp", template), ("test", copper)):
            Image.fromarray(np.where(board, 0, 255).astype(np.uint8)).save(images / f"{name}_{part}.jpg", quality=95)
        text = "".join(f"{' '.join(map(str, box))} {BOARD_KINDS.index(kind) + 1}\n" for kind, box in objects)
        (boxes / f"{name}.txt").write_text(text, encoding="utf-8")
        lines.append(f"group{number}/{number}/{name}.jpg group{number}/{number}_not/{name}.txt\n")
    train = count * 4 // 5
    root.mkdir(parents=True, exist_ok=True)
    (root / "trainval.txt").write_text("".join(lines[:train]), encoding="utf-8")
    (root / "test.txt").write_text("".join(lines[train:]), encoding="utf-8")
