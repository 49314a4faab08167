"""Readers of box annotations: VOC xml and DeepPCB txt (`yolo`, `coco`: the others), all into one form.

A box is (x1, y1, x2, y2) in pixels of the upright image, as `images.decode` and every viewer show it, 0 to its width or
height. Where a file states the size of the stored pixels instead, its boxes are turned with the image.

VOC counts xmin and ymin from 1, but much annotation software writes positions counted from 0 and lifts 0 to 1, and no
file says which it is. Coordinates are therefore kept as they are (at most one pixel off at two sides). NEU-DET is such
a case: in images of 200 pixels 1500 of its coordinates are 1 and 575 are 200.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from defectlab.data.images import find_files, find_images, read_header
from defectlab.files import DataError

DUPLICATES = "duplicate boxes dropped"
TINY = "boxes smaller than one pixel, kept"
UPRIGHT = "images turned by their orientation tag, boxes taken as a viewer shows them"
AROUND = "turned boxes, the upright box around each taken"
TOLERANCE = 1.0  # pixels that a box may lie outside: files count from 0 or from 1, and round


@dataclass(frozen=True)
class AnnotatedImage:
    """One image and its boxes; an image may have none."""

    path: Path
    width: int
    height: int
    boxes: np.ndarray  # (n, 4) float32, x1 y1 x2 y2 in pixels, inside the image, area > 0
    labels: np.ndarray  # (n,) int64, index into Annotations.class_names
    notes: Counter[str] = field(default_factory=Counter)  # what was left out or stands out -> how often


@dataclass(frozen=True)
class Annotations:
    """What a reader returns: the images sorted by path."""

    class_names: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]
    of_the_set: Counter[str] = field(default_factory=Counter)  # further notes

    @property
    def notes(self) -> Counter[str]:
        """Those of the set and of all images; always with the duplicates."""
        total = Counter({DUPLICATES: 0})
        total.update(self.of_the_set)
        for image in self.images:
            total.update(image.notes)
        return total


# ------------------------------------------------------------------------------------------- what the readers share


def same(name: str) -> str:
    """A name of a file in the one Unicode form in which names are compared: a Mac writes accents as letters apart."""
    return unicodedata.normalize("NFC", name)


def around(box: Sequence[float], degrees: float) -> list[float]:
    """The upright box around a box (x1, y1, x2, y2) that is turned about its centre."""
    x1, y1, x2, y2 = box
    cos, sin = (abs(f(math.radians(degrees))) for f in (math.cos, math.sin))
    width, height = (x2 - x1) * cos + (y2 - y1) * sin, (x2 - x1) * sin + (y2 - y1) * cos
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def _turned(box: np.ndarray, turned: int, width: int, height: int) -> np.ndarray:
    """Boxes (n, 4) of the stored pixels as boxes of the upright image of this size, for orientation 5 to 8."""
    x1, y1, x2, y2 = box.T
    left, right = (width - y2, width - y1) if turned in (6, 7) else (y1, y2)
    top, bottom = (height - x2, height - x1) if turned in (7, 8) else (x1, x2)
    return np.stack([left, top, right, bottom], 1)


def checked(
    path: Path,
    source: Path,
    objects: Sequence[tuple[int, Sequence[float]]],
    normalised: bool = False,
    stated: tuple[int, int] | None = None,
    notes: Counter[str] | None = None,
) -> AnnotatedImage:
    """The objects (label, x1 y1 x2 y2) that the file `source` gives for an image, checked.

    `normalised`: the coordinates are parts of the width and height. `stated`: the size that `source` gives, if any.
    """
    width, height, turned = read_header(path, f"restore this image, or remove what {source} says of it")
    boxes, limits = np.array([box for _, box in objects], np.float64).reshape(-1, 4), (width, height) * 2
    if stated is not None and stated != (width, height):
        if turned not in (5, 6, 7, 8) or stated != (height, width):
            raise DataError(
                f"{source} says {stated[0]} x {stated[1]} pixels, its image {path} has {width} x {height}: "
                "its boxes do not fit, annotate this image again"
            )
        boxes = _turned(boxes, turned, width, height)
    if normalised:
        boxes *= limits
    clipped = boxes.clip(0, limits).astype(np.float32)
    kept: dict[tuple, None] = {}  # a set that keeps its order
    for number, (raw, box, (label, _)) in enumerate(zip(boxes, clipped, objects, strict=True), 1):
        printed = ", ".join(f"{value:g}" for value in raw)
        if not np.isfinite(raw).all() or (abs(raw - box) > TOLERANCE).any():
            raise DataError(
                f"{source}: box {number} ({printed}) lies outside {path.name} with its {width} x {height} pixels: "
                "correct or remove it"
            )
        if box[2] <= box[0] or box[3] <= box[1]:
            raise DataError(f"{source}: box {number} ({printed}) has no area (x1 y1 x2 y2): correct or remove it")
        kept[label, *box.tolist()] = None
    labels = np.array([key[0] for key in kept], np.int64)
    unique = np.array([key[1:] for key in kept], np.float32).reshape(-1, 4)
    is_turned = int(turned in range(2, 9))  # other tags mean nothing
    found = Counter({DUPLICATES: len(objects) - len(kept), TINY: int(_tiny(unique).sum()), UPRIGHT: is_turned})
    return AnnotatedImage(path, width, height, unique, labels, found + (notes or Counter()))


def _tiny(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2] < 1).all(1)


def collected(
    names: Sequence[str], images: Iterable[AnnotatedImage], source: Path, notes: Counter[str] | None = None
) -> Annotations:
    """DataError where every box is smaller than a pixel."""
    images = tuple(sorted(images, key=lambda image: image.path))
    boxes = np.concatenate([np.zeros((0, 4)), *(image.boxes for image in images)])
    if len(boxes) and _tiny(boxes).all():
        raise DataError(
            f"{source}: all {len(boxes)} boxes are smaller than one pixel, they look like parts of the width and "
            "height: give them in the unit of the format"
        )
    return Annotations(tuple(names), images, notes or Counter())


def clean_names(found: Iterable[Any], source: Path) -> list[str]:
    """Class names as seen: one Unicode form, no invisible letters, single blanks. DataError for an empty one."""
    names = []
    for name in found:
        text = same("" if name is None else str(name))
        names.append(" ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split()))
    if "" in names:
        raise DataError(f"{source} has a class with an empty name: name it")
    return names


def unique(names: Sequence[str], source: Path) -> tuple[str, ...]:
    if double := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{source} gives the class name {double[0]!r} twice, in {list(names)}: correct it")
    return tuple(names)


def index_of(name: str, class_names: Sequence[str], source: Path) -> int:
    if name not in class_names:
        raise DataError(f"{source} names the class {name!r}: correct it, or add it to {', '.join(class_names)}")
    return class_names.index(name)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: restore it, or remove its image") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): save it as UTF-8 text") from error


# --------------------------------------------------------------------------------------------------------- Pascal VOC


def _xml(path: Path) -> ElementTree.Element:
    """The root of an xml in whatever encoding it declares: the parser itself knows few."""
    content = path.read_bytes()
    declared = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([\w.-]+)", content)
    if declared is None:
        return ElementTree.fromstring(content)
    text = content.decode(declared[1].decode())
    return ElementTree.fromstring(text[text.index("?>") + 2 :])


class _Voc(NamedTuple):
    """What an xml says."""

    objects: list[tuple[str, list[float]]]  # class name, x1 y1 x2 y2
    size: tuple[int, int] | None  # of the image; None where it states none (or 0)
    notes: Counter[str]  # how many objects are marked or turned
    file: str  # the name of the image, which is wrong in several public sets


def _parse_voc(path: Path) -> _Voc:
    try:
        tree = _xml(path)
        if tree.tag != "annotation":
            raise ValueError(f"its root is <{tree.tag}>")
        width, height = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
        corners = ("xmin", "ymin", "xmax", "ymax")
        items = list(tree.iter("object"))
        if odd := [number for number, item in enumerate(items, 1) if item.find("bndbox") is None]:
            raise ValueError(f"object {odd[0]} has no bndbox: is it a polygon or a turned box?")
        boxes = [[float(item.findtext(f"bndbox/{corner}")) for corner in corners] for item in items]
        turns = [_rotation(item) for item in items]
        boxes = [around(box, turn) if turn else box for box, turn in zip(boxes, turns, strict=True)]
        marks = Counter(
            f"boxes marked {mark}, kept"
            for mark in ("difficult", "truncated", "occluded")
            for item in items
            if (item.findtext(mark) or "0").strip() == "1"
        )
    except (SyntaxError, OSError, ArithmeticError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise DataError(
            f"{path} is no VOC xml with a name and xmin, ymin, xmax, ymax for each object ({error}): restore it"
        ) from error
    names = clean_names((item.findtext("name") for item in items), path)
    marks[AROUND] += sum(map(bool, turns))
    size = (width, height) if width and height else None
    file = re.split(r"[/\\]", tree.findtext("filename") or "")[-1]
    return _Voc(list(zip(names, boxes, strict=True)), size, marks, same(file.strip()))


def _rotation(item: ElementTree.Element) -> float:
    """Degrees by which an object's box is turned: the attribute `rotation` of some annotation software."""
    found = (a.findtext("value") for a in item.iter("attribute") if a.findtext("name") == "rotation")
    return float(next(found, None) or 0) % 360


def read_voc(folder: Path, class_names: Sequence[str] | None = None) -> Annotations:
    """Images with one VOC xml each, anywhere below `folder`, matched by the file's stem.

    The xml's own <filename> is wrong in several public sets: it counts only where it names another image of the set,
    which is an error. Where two folders hold images of one stem, the xml must lie beside its own. `class_names` None:
    those found, sorted. Raises DataError: an image without xml or the reverse, an unreadable file, another image size
    than the xml states, a class that is not in `class_names`, a box without area or more than 1 pixel outside its image
    (up to 1 pixel it is clipped).
    """
    folder = Path(folder)
    images, by_stem = find_images(folder), defaultdict(list)
    for path in images:
        by_stem[same(path.stem)].append(path)
    parsed = {}
    for xml in find_files(folder, {".xml"}):
        candidates = by_stem[same(xml.stem)]
        beside = [path for path in candidates if path.parent == xml.parent] or candidates
        if len(beside) != 1:
            raise DataError(
                f"{xml} has {len(beside)} images of its name below {folder}: keep one, or put the xml beside its own"
            )
        if beside[0] in parsed:
            raise DataError(f"{beside[0]} has two xml files, one is {xml}: keep one")
        parsed[beside[0]] = xml, _parse_voc(xml)
    by_name = {same(path.name): path for path in images}
    for path, (xml, said) in parsed.items():
        if said.file in by_name and said.file != same(path.name):
            raise DataError(f"{xml} says that it is of {by_name[said.file]}, its name says {path}: correct one of both")
    if without := [path for path in images if path not in parsed]:
        raise DataError(f"{without[0]} has no xml: annotate it (an xml without objects says that it has none)")
    names = tuple(class_names or sorted({name for _, said in parsed.values() for name, _ in said.objects}))
    found = []
    for path, (xml, said) in parsed.items():
        objects = [(index_of(name, names, xml), box) for name, box in said.objects]
        found.append(checked(path, xml, objects, stated=said.size, notes=said.notes))
    return collected(names, found, folder)


# ------------------------------------------------------------------------------------------------------------ DeepPCB


def read_deep_pcb(folder: Path, class_names: Sequence[str]) -> Annotations:
    """`folder`/PCBData/group*/*/NAME_test.jpg with the boxes in *_not/NAME.txt: lines `x1 y1 x2 y2 type`, type from 1.

    The templates NAME_temp.jpg are not read. Raises DataError as `read_voc`.
    """
    images = []
    for path in sorted(Path(folder).glob("PCBData/group*/*/*_test.jpg")):
        source = path.parent.with_name(path.parent.name + "_not") / (path.stem.removesuffix("_test") + ".txt")
        objects = []
        for line in filter(str.strip, read_text(source).splitlines()):
            try:
                *box, kind = (int(value) for value in line.split())
                objects.append((range(1, len(class_names) + 1).index(kind), np.reshape(box, 4)))
            except ValueError as error:
                raise DataError(f"{source} has the line {line!r}, not `x1 y1 x2 y2 type`: restore it") from error
        images.append(checked(path, source, objects))
    return Annotations(tuple(class_names), tuple(images))
