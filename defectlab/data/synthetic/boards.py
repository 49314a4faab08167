"""Synthetic bare circuit boards with exact boxes, in the layout of DeepPCB.

A board is a mask, True where copper is. A box is x1, y1, x2, y2 in whole pixels counted from 0, x2 and y2 one past the
last pixel.
"""

from pathlib import Path

import numpy as np

from defectlab.data.images import save_image

BOARD_KINDS = ("open", "short", "mousebite", "spur", "copper", "pin-hole")  # in the order of DeepPCB's types 1-6
ADDS_COPPER = {"short", "spur", "copper"}

Box = tuple[int, int, int, int]

# A board has `_LANES` x `_LANES` grid points. Tracks run along lanes and are half as wide as the lanes are apart.
_LANES = 10
# Defects across a track: their middle and half height, counted in lanes from the middle of the track. Ground begins at
# 0.25, the next track at 0.75; a defect is cut to the copper or the ground that it changes.
_ACROSS = {
    "open": (0.0, 0.3),
    "short": (0.5, 0.3),
    "mousebite": (0.25, 0.25),
    "spur": (0.25, 0.3),
    "copper": (0.5, 0.13),
    "pin-hole": (0.0, 0.13),
}


def bounds(mask: np.ndarray) -> Box:
    """Smallest box around the True pixels of `mask` (H, W), which has at least one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _draw_tracks(rng: np.random.Generator, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copper (S, S) bool without defects, and where a track passes straight: grid points (lanes, lanes) bool.

    `row` (S, 1) and `column` (1, S) are the pixels' places in lanes. Tracks end in drilled pads; others stand alone.
    """
    copper, holes = np.zeros((2, row.size, column.size), bool)
    straight = np.zeros((_LANES, _LANES), bool)
    for lane in range(_LANES):
        first, last, cut = rng.integers(0, 2), rng.integers(8, 10), rng.integers(3, 7)
        tracks = [(first, cut), (cut + 1, last)] if rng.random() < 0.4 else [(first, last)]
        pads = {point for point in (0, 9) if not first <= point <= last}
        for start, end in tracks:
            copper |= (np.abs(row - lane - 0.5) < 0.25) & (column > start + 0.5) & (column < end + 0.5)
            straight[lane, start + 1 : end] = True
            pads |= {start, end}
        for point in pads:
            distance = (row - lane - 0.5) ** 2 + (column - point - 0.5) ** 2
            copper |= distance < 0.36**2
            holes |= distance < 0.16**2
    return copper & ~holes, straight


def board_pair(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, list[tuple[str, Box]]]:
    """Template and inspected board (S, S) bool, True where copper is, and the 3-10 defects' kinds and boxes.

    Boxes do not overlap and are the smallest around the pixels that differ.
    """
    row, column = ((pixel + 0.5) * _LANES / size for pixel in np.ogrid[:size, :size])
    template, straight = _draw_tracks(rng, row, column)
    free = straight[:-1] & straight[1:]  # a track here and on the next lane: every kind fits
    copper, turns, objects = template.copy(), int(rng.integers(4)), []
    kinds = rng.permutation(BOARD_KINDS * 2)[: rng.integers(3, 11)].tolist()
    for kind in kinds:
        places = np.argwhere(free)
        if not len(places):
            break
        lane, point = rng.choice(places)
        free[max(0, lane - 1) : lane + 2, point] = False
        middle, half = _ACROSS[kind]
        across = (row - lane - 0.5 - middle) / half
        along = (column - point - 0.5 - rng.uniform(-0.2, 0.2)) / rng.uniform(0.2, 0.25)
        is_straight = kind in ("open", "short")
        shape = (np.abs(across) < 1) & (np.abs(along) < 1) if is_straight else across**2 + along**2 < 1
        changed = shape & (template != (kind in ADDS_COPPER))
        copper ^= changed
        objects.append((kind, bounds(np.rot90(changed, turns))))
    return np.rot90(template, turns), np.rot90(copper, turns), objects


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
        name, images, boxes = f"{number}{i % 20:03d}", f"group{number}/{number}", f"group{number}/{number}_not"
        (root / boxes).mkdir(parents=True, exist_ok=True)
        template, copper, objects = board_pair(np.random.default_rng([seed, i]), size)
        for part, board in (("temp", template), ("test", copper)):
            save_image(root / images / f"{name}_{part}.jpg", np.where(board, 0, 255).astype(np.uint8))
        text = "".join(f"{' '.join(map(str, box))} {BOARD_KINDS.index(kind) + 1}\n" for kind, box in objects)
        (root / boxes / f"{name}.txt").write_text(text, encoding="utf-8")
        lines.append(f"{images}/{name}.jpg {boxes}/{name}.txt\n")
    train = count * 4 // 5
    for listed, part in (("trainval.txt", lines[:train]), ("test.txt", lines[train:])):
        (root / listed).write_text("".join(part), encoding="utf-8")
