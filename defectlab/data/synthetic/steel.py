"""Synthetic stand-ins with exact boxes, drawn in seconds: hot-rolled steel strip and bare circuit boards.

The `smoke` profile and the tests need data of the real layouts without a download, so that one reader reads both.
Nothing measured on these pictures says anything about the real sets.

What is imitated: NEU-DET (He et al., "An end-to-end steel surface defect detection approach via fusing multiple
hierarchical features", IEEE TIM 69, 2020), DeepPCB (Tang et al., "Online PCB defect detector on a new PCB defect
dataset", arXiv 1902.06197) and PKU-Market-PCB (Huang & Wei, "A PCB dataset for defects detection and classification",
arXiv 1901.08204). Sizes and contrasts were chosen by eye beside the pictures of NEU-DET and DeepPCB; objects are kept
large enough for a small detector at 96-128 pixels.

A box is x1, y1, x2, y2 in whole pixels counted from 0, x2 and y2 one past the last pixel: what the readers expect. No
object touches the first row or column, so that VOC coordinates are at least 1 as in the real sets.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.special import expit

from defectlab.data.synthetic.boards import BOARD_KINDS, PKU_KINDS, Box, board_pair, bounds, grown, overlap, pku_pair
from defectlab.data.synthetic.pasted import _ellipse_distance, _field

# ----------------------------------------------------------------------------------------------------------- stand-in


def write_steel_masks(folder: Path, count: int = 16, size: int = 100, seed: int = 0) -> None:
    """Write a stand-in of NEU-Seg: images/<part>/<kind>_<number>.jpg and annotations/<part>/<kind>_<number>.png.

    `count` drawn strips of `size` x `size` pixels for each of `MASKED_KINDS`, the last quarter for testing. A mask
    marks where the drawing changed the strip by a third of its largest change or more; objects of other kinds are
    background. The same seed draws the same pictures.
    """
    for kind in MASKED_KINDS:
        for number in range(count):
            rng = np.random.default_rng([seed, STEEL_KINDS.index(kind), number])
            clean, picture, objects = _steel_picture(rng, kind, size)
            change = np.abs(picture.astype(int) - clean)
            mask = np.zeros((size, size), np.uint8)
            for name, (x1, y1, x2, y2) in objects:
                if name in MASKED_KINDS:
                    window = change[y1:y2, x1:x2]
                    drawn = np.pad(window > window.max() / 3, 2)
                    # a torn line or a grainy patch is one object: gaps of up to four pixels are closed
                    closed = ndimage.binary_closing(drawn, np.ones((3, 3)), 2)[2:-2, 2:-2]
                    mask[y1:y2, x1:x2][closed] = MASKED_KINDS.index(name) + 1
            part = "test" if number >= count - count // 4 else "training"
            for group, pixels, suffix in (("images", picture, "jpg"), ("annotations", mask, "png")):
                path = Path(folder) / group / part / f"{kind}_{number}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path, **({"quality": 95} if suffix == "jpg" else {}))


MASKED_KINDS = ("inclusion", "patches", "scratches")  # those that NEU-Seg marks; mask values 1, 2, 3
STEEL_KINDS = ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")
VISIBLE = 6  # grey levels: a steel pixel that changes by more belongs to the object, and only such pixels do

# ------------------------------------------------------------ hot-rolled steel strip

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
    """Defect-free strip, (S, S) uint8, with the background usual for pictures of `kind`."""
    low, high, grain, correlation, streak = _GROUND[kind]
    down, across = (np.mgrid[0:size, 0:size] + 0.5) / size - 0.5
    light = 1 + rng.uniform(-0.35, 0.35) * across + rng.uniform(-0.2, 0.2) * down
    streaks = _field(rng, (1, size), (0, size / 25)) + 0.5 * _field(rng, (1, size), (0, size / 150))
    cloud = _field(rng, (size, 1), (size / 12, 0)) if kind in ("scratches", "patches") else 0.0
    image = rng.uniform(low, high) * light + streak * (streaks + cloud)
    image += grain * _field(rng, (size, size), correlation) + rng.normal(0, 1.5, (size, size))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _opacity(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 well inside the outline (distance < 1), 0 well outside, half on it."""
    return expit((1 - distance) / softness)


def _steel_object(rng: np.random.Generator, kind: str, ground: np.ndarray, unit: float) -> np.ndarray:
    """The window `ground` (H, W) float with one object of `kind` drawn into it; `unit` is pixels at 200 pixels."""
    height, width = ground.shape
    row, column = np.mgrid[0:height, 0:width].astype(float)
    spread = ground.std()  # a coarse ground needs more contrast
    rough = _field(rng, ground.shape, (height / 10, width / 10))
    middle = (height / 2, width / 2)
    # An ellipse of wavy outline that fills the window.
    area = _ellipse_distance(row, column, middle, (0.5 * height, 0.5 * width), 0.0) + 0.15 * rough

    if kind == "crazing":  # a net of fine dark cracks: zero contours of a smooth field, torn here and there
        net = _field(rng, ground.shape, (2.4 * unit, 4.0 * unit))
        slope = np.hypot(*np.gradient(net))
        cracks = np.exp(-((net / (0.9 * unit * slope + 1e-3)) ** 2))
        torn = _opacity(1 - 2 * _field(rng, ground.shape, (4 * unit, 4 * unit)) - 1.2, 0.3)
        return ground - (70 + spread) * rng.uniform(0.8, 1.2) * cracks * torn * _opacity(area, 0.08)
    if kind == "inclusion":  # dark smooth streaks along the rolling direction
        opacity = np.zeros_like(ground)
        for _ in range(rng.integers(1, 4)):
            radii = (height * rng.uniform(0.2, 0.48), width * rng.uniform(0.18, 0.4))
            centre = [rng.uniform(r, side - r) for r, side in zip(radii, (height, width), strict=True)]
            streak = _ellipse_distance(row, column, centre, radii, rng.uniform(-0.04, 0.04)) + 0.2 * rough
            opacity = np.maximum(opacity, _opacity(streak, 0.12))
        return ground - (rng.uniform(22, 45) + 0.8 * spread) * opacity
    if kind == "patches":  # one large dark patch with frayed edges
        square = (np.abs(2 * row / height - 1) ** 4 + np.abs(2 * column / width - 1) ** 4) ** 0.25
        grain = _field(rng, ground.shape, (0.9 * unit, 0.7 * unit))
        opacity = _opacity(square + 0.2 * rough + 0.12 * grain + 0.1, 0.12)
        return ground * (1 - rng.uniform(0.65, 0.8) * opacity) + 6 * grain * opacity
    if kind == "pitted_surface":  # an area of many small dark pits
        pits = np.clip(_field(rng, ground.shape, (1.3 * unit, 0.9 * unit)) - 0.5, 0, 1.5)
        return ground - (rng.uniform(45, 75) + spread) * pits * _opacity(area, 0.06)
    if kind == "rolled-in_scale":  # dark flecks of scale, each with a light rim, on a smudge
        flecks = np.zeros_like(ground)
        for _ in range(rng.integers(7, 15)):
            radii = np.array([rng.uniform(1.5, 3.2), rng.uniform(4.0, 9.0)]) * unit
            centre = rng.uniform(0.14, 0.86, 2) * (height, width)
            fleck = _ellipse_distance(row, column, centre, radii, rng.uniform(-0.2, 0.7)) + 0.3 * rough
            flecks = np.maximum(flecks, _opacity(fleck, 0.15))
        rim = np.clip(np.roll(flecks, round(2 * unit), axis=0) - flecks, 0, 1)
        depth = rng.uniform(55, 80) + spread
        return ground - depth * flecks + 0.35 * depth * rim - 14 * _opacity(area + 0.1, 0.1)
    # scratches: one or two bright thin lines along the rolling direction, torn and a little slanted
    light = np.zeros_like(ground)
    for start in rng.uniform(0.2, 0.8, rng.integers(1, 3)) * width:
        end = np.clip(start + rng.uniform(-0.5, 0.5) * width, 0.1 * width, 0.9 * width)
        thickness = unit * (rng.uniform(1.2, 2.2) + 0.4 * _field(rng, (height, 1), (height / 12, 0)))
        distance = np.abs(column - (start + (end - start) * row / height)) / np.clip(thickness, 0.6, None)
        torn = np.clip(1.1 + 0.6 * _field(rng, (height, 1), (height / 25, 0)), 0.1, 1.2)
        light = np.maximum(light, np.exp(-(distance**2)) * torn)
    return ground + (rng.uniform(95, 140) + spread) * light


def _steel_picture(
    rng: np.random.Generator, kind: str, size: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, Box]]]:
    """Defect-free strip and the same with 1-4 objects, both (S, S) uint8, and the objects' kinds and boxes.

    The two differ inside the boxes only, and each box is the smallest around the pixels in it that differ by
    more than `VISIBLE`. Boxes do not overlap. About one picture in ten has one object of another kind.
    """
    unit = size / 200
    clean = _steel_ground(rng, kind, size)
    picture, objects = clean.copy(), []
    kinds = [kind] * rng.integers(1, 5)
    if len(kinds) > 1 and rng.random() < 0.13:
        kinds[1] = str(rng.choice([k for k in STEEL_KINDS if k != kind]))
    for wanted in kinds:
        for _ in range(10):  # a crowded picture gets fewer objects than wanted
            low_height, high_height, low_width, high_width = _WINDOW[wanted]
            height = round(unit * rng.uniform(low_height, high_height))
            width = round(unit * rng.uniform(low_width, high_width))
            top, left = rng.integers(1, size - height + 1), rng.integers(1, size - width + 1)
            window = (int(left), int(top), int(left) + width, int(top) + height)
            if any(overlap(grown(window, round(3 * unit)), box) for _, box in objects):
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
            picture[top + y0 : top + y1, left + x0 : left + x1] = drawn[y0:y1, x0:x1]
            objects.append((wanted, (window[0] + x0, window[1] + y0, window[0] + x1, window[1] + y1)))
            break
    return clean, picture, objects


# ------------------------------------------------------------ files


def _write_voc(path: Path, folder: str, database: str, shape: tuple[int, int, int], objects) -> None:
    """Pascal VOC annotation of the picture `path.stem`.jpg of `shape` (height, width, depth)."""
    root = ElementTree.Element("annotation")

    def add(parent, name, value=None):
        element = ElementTree.SubElement(parent, name)
        element.text = None if value is None else str(value)
        return element

    add(root, "folder", folder)
    add(root, "filename", f"{path.stem}.jpg")
    add(add(root, "source"), "database", database)
    size = add(root, "size")
    for name, value in zip(("height", "width", "depth"), shape, strict=True):
        add(size, name, value)
    add(root, "segmented", 0)
    for kind, box in objects:
        item = add(root, "object")
        for name, value in (("name", kind), ("pose", "Unspecified"), ("truncated", 0), ("difficult", 0)):
            add(item, name, value)
        corners = add(item, "bndbox")
        for name, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            add(corners, name, value)
    ElementTree.indent(root, "\t")
    path.write_text(ElementTree.tostring(root, encoding="unicode") + "\n", encoding="utf-8")


def write_steel(folder: Path, count: int = 20, size: int = 200, seed: int = 0) -> None:
    """Write a stand-in of NEU-DET: `folder`/IMAGES/<kind>_<number>.jpg and `folder`/ANNOTATIONS/<kind>_<number>.xml.

    `count` pictures of each of `STEEL_KINDS`, numbers from 1; JPEG (quality 95) of `size` x `size` pixels stored
    as RGB with R = G = B, as the real ones are; boxes as Pascal VOC xml. A picture has 1-4 objects; a few hold one
    of another kind than the file name says. The pictures of one seed are the same whatever `count` is, and so are
    their bytes (with the same versions of numpy, scipy and pillow).
    Raises ValueError when `size` is below 100.
    """
    if size < 100:
        raise ValueError(f"steel pictures of {size} pixels are too small for their objects: give size=100 or more")
    images, annotations = Path(folder) / "IMAGES", Path(folder) / "ANNOTATIONS"
    images.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(parents=True, exist_ok=True)
    for k, kind in enumerate(STEEL_KINDS):
        for number in range(1, count + 1):
            _, picture, objects = _steel_picture(np.random.default_rng([seed, k, number]), kind, size)
            name = f"{kind}_{number}"
            Image.fromarray(picture).convert("RGB").save(images / f"{name}.jpg", quality=95)
            _write_voc(annotations / f"{name}.xml", kind[:2], "NEU-DET", (size, size, 1), objects)


def write_board(folder: Path, count: int = 60, size: int = 640, seed: int = 0) -> None:
    """Write a stand-in of DeepPCB below `folder`/PCBData.

    groupNNNNN/NNNNN/<name>_test.jpg (inspected) and <name>_temp.jpg (without defects): grey JPEG (quality 95) of
    `size` x `size` pixels, 0 where copper is and 255 elsewhere, up to JPEG noise. groupNNNNN/NNNNN_not/<name>.txt: a
    line `x1 y1 x2 y2 type` for each of the 3-10 defects, type 1-6 as in `BOARD_KINDS`. trainval.txt and test.txt
    (the last fifth, rounded up): a line `picture txt` for each board, the picture without its `_test`, as published.
    A group has 20 boards. The boards of one seed are the same whatever `count` is, and so are their bytes (with the
    same versions of numpy, scipy and pillow). Raises ValueError when `size` is below 160.
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


def write_pku(folder: Path, count: int = 4, seed: int = 0) -> None:
    """Write a stand-in of PKU-Market-PCB below `folder`/PCB_DATASET, for tests of its reader.

    images/<Class>/<board>_<name>_<number>.jpg: RGB JPEG (quality 95) of 600 x 400 pixels, and
    Annotations/<Class>/ the same with .xml, Pascal VOC. `count` pictures of each class in `PKU_KINDS`; <name> is the
    class in lower case, in the file name and in the xml. A picture has 2-5 defects of its class only. Boards are
    numbered 01, 04, 05, ... 12 as in the real set and reused by all classes. The same seed writes the same bytes
    (with the same versions of numpy, scipy and pillow).
    """
    boards = (1, *range(4, 13))
    root = Path(folder) / "PCB_DATASET"
    for folder_name in PKU_KINDS:
        images, annotations = root / "images" / folder_name, root / "Annotations" / folder_name
        images.mkdir(parents=True, exist_ok=True)
        annotations.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            board, number = boards[i % len(boards)], i // len(boards) + 1
            _, picture, objects = pku_pair(seed, board, folder_name, number)
            name = f"{board:02d}_{folder_name.lower()}_{number:02d}"
            Image.fromarray(picture).save(images / f"{name}.jpg", quality=95)
            _write_voc(annotations / f"{name}.xml", folder_name, "Unknown", picture.shape, objects)
