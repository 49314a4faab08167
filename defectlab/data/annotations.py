"""Readers of box annotations: VOC xml, YOLO txt and DeepPCB txt (COCO json: `coco`), all into one form.

A box is (x1, y1, x2, y2) in pixels of the upright image, as `images.decode` and every viewer show it, 0 to its width or
height. Where a file states the size of the stored pixels instead, its boxes are turned with the image.

VOC counts xmin and ymin from 1, but much annotation software writes positions counted from 0 and lifts 0 to 1, and no
file says which it is. Coordinates are therefore kept as they are (at most one pixel off at two sides). NEU-DET is such
a case: in images of 200 pixels 1500 of its coordinates are 1 and 575 are 200.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml

from defectlab.data.images import find_files, find_images, read_header
from defectlab.files import DataError

DUPLICATES = "duplicate boxes dropped"
TINY = "boxes smaller than one pixel, kept"
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
    found = Counter({DUPLICATES: len(objects) - len(kept), TINY: int(_tiny(unique).sum())})
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
    """Class names as one sees them, without blanks around them; DataError for an empty one."""
    found = list(found)
    if any(isinstance(name, bool) for name in found):
        raise DataError(f"{source} has a class that yaml reads as true or false, such as yes or no: put it in quotes")
    names = [" ".join(str("" if name is None else name).split()) for name in found]
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


def _parse_voc(path: Path) -> tuple[list[tuple[str, list[float]]], tuple[int, int] | None, Counter[str]]:
    """The objects (class name, x1 y1 x2 y2) of an xml, the image's size, None where it states none (or 0), and how many
    objects are marked."""
    try:
        tree = _xml(path)
        width, height = (int(tree.findtext(f"size/{side}") or 0) for side in ("width", "height"))
        corners = ("xmin", "ymin", "xmax", "ymax")
        items = list(tree.iter("object"))
        boxes = [[float(item.findtext(f"bndbox/{corner}")) for corner in corners] for item in items]
        marks = Counter(
            f"boxes marked {mark}, kept"
            for mark in ("difficult", "truncated", "occluded")
            for item in items
            if (item.findtext(mark) or "0").strip() == "1"
        )
    except (ElementTree.ParseError, OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise DataError(
            f"{path} is no VOC xml with a name and xmin, ymin, xmax, ymax for each object ({error}): restore it"
        ) from error
    names = clean_names((item.findtext("name") for item in items), path)
    return list(zip(names, boxes, strict=True)), (width, height) if width and height else None, marks


def read_voc(folder: Path, class_names: Sequence[str] | None = None) -> Annotations:
    """Images with one VOC xml each, anywhere below `folder`, matched by the file's stem.

    The xml's own <filename> is not used: in several public sets it is wrong. Where two folders hold images of one
    stem, the xml must lie beside its own. `class_names` None: those found, sorted. Raises DataError: an image without
    xml or the reverse, an unreadable file, another image size than the xml states, a class that is not in
    `class_names`, a box without area or more than 1 pixel outside its image (up to 1 pixel it is clipped).
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
        parsed[beside[0]] = xml, *_parse_voc(xml)
    if without := [path for path in images if path not in parsed]:
        raise DataError(f"{without[0]} has no xml: annotate it (an xml without objects says that it has none)")
    names = tuple(class_names or sorted({name for _, objects, *_ in parsed.values() for name, _ in objects}))
    found = (
        checked(path, xml, [(index_of(name, names, xml), box) for name, box in objects], stated=size, notes=notes)
        for path, (xml, objects, size, notes) in parsed.items()
    )
    return collected(names, found, folder)


# --------------------------------------------------------------------------------------------------------------- YOLO


def yolo_yamls(folder: Path) -> dict[Path, dict[str, Any]]:
    """The yaml files directly in `folder` that say something of the set: names or parts."""
    found = {}
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        try:
            content = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise DataError(f"{path} is no yaml ({' '.join(str(error).split())}): correct it") from error
        if isinstance(content, dict) and content.keys() & {"names", "nc", "train", "val", "test"}:
            found[path] = content
    return found


def _yolo_names(folder: Path) -> tuple[str, ...]:
    """Class names from classes.txt (one a line) or from `names` in data.yaml (a list, or index: name)."""
    listed = {}
    for path in (folder / "classes.txt", folder / "labels" / "classes.txt"):
        if path.is_file():
            listed[path] = [line for line in read_text(path).splitlines() if line.strip()]
    for path, content in yolo_yamls(folder).items():
        names = content.get("names")
        if names is None and listed:
            continue  # says only how the set is split
        try:
            listed[path] = [names[index] for index in range(len(names))]  # a list and a mapping alike
        except (TypeError, KeyError) as error:
            raise DataError(f"{path} gives no class names 0, 1, ... under `names` ({error!r}): add them") from error
        if content.get("nc") not in (None, len(listed[path])):
            raise DataError(f"{path} says nc: {content['nc']} and names {len(listed[path])} classes: correct it")
    if not any(listed.values()):
        raise DataError(f"{folder} holds neither classes.txt nor data.yaml: write the class names, one a line")
    read = {path: unique(clean_names(names, path), path) for path, names in listed.items()}
    (first, names), *rest = read.items()
    for path, other in rest:
        if other != names:
            raise DataError(f"{first} names the classes {names}, {path} {other}: correct or remove one of them")
    return names


def _parse_yolo(path: Path, class_names: Sequence[str]) -> tuple[list[tuple[int, list[float]]], Counter[str]]:
    """The objects of a txt, and how many lines are not the plain `class x y width height`."""
    objects, notes = [], Counter()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            index, *values = map(float, line.split())
            if not index.is_integer() or (len(values) > 5 and len(values) % 2):
                raise ValueError
            if len(values) > 5:
                x, y = values[::2], values[1::2]
                box = [min(x), min(y), max(x), max(y)]
                notes["polygons, their boxes taken"] += 1
            else:
                x, y, width, height = values[:4]
                box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
                if len(values) == 5:
                    notes["confidences (a sixth column: predictions of a model?), ignored"] += 1
        except ValueError as error:
            raise DataError(
                f"{path}, line {number} is not `class x y width height` but {line.strip()[:60]!r}: correct or remove it"
            ) from error
        if not 0 <= index < len(class_names):
            raise DataError(
                f"{path}, line {number} has class {index:g}, there are {len(class_names)} names "
                f"(0 {class_names[0]} to {len(class_names) - 1} {class_names[-1]}): correct it or add the name"
            )
        objects.append((int(index), box))
    return objects, notes


def read_yolo(folder: Path, class_names: Sequence[str] | None = None) -> Annotations:
    """Images below a folder `images`, their txt under the same path below `labels`.

    So `images/train/a.jpg` has `labels/train/a.txt`, and `train/images/a.jpg` has `train/labels/a.txt`. A line is
    `class x y width height`, centre and size as parts of the image's; of a polygon `class x1 y1 x2 y2 x3 y3 ...` the
    box is taken, a sixth column (confidence) is ignored. An image without txt has no object. `class_names` None: from
    classes.txt (also in labels), or `names` of data.yaml, in `folder`. Raises DataError: no image or no txt at all, a
    txt without image or with two, another line, a class index without a name, a box as in `read_voc`.
    """
    folder = Path(folder)
    names = tuple(class_names or _yolo_names(folder))
    texts = [path for path in find_files(folder, {".txt"}) if "labels" in path.relative_to(folder).parts[:-1]]
    by_path = {same(str(path)): path for path in texts if path.name != "classes.txt"}
    sources: dict[Path, Path | None] = {}
    images = find_images(folder)
    for path in images:
        parts = list(path.relative_to(folder).parts)
        if "images" in parts[:-1]:
            parts[parts.index("images")] = "labels"
            sources[path] = by_path.get(same(str(folder.joinpath(*parts).with_suffix(".txt"))))
    if not by_path:
        raise DataError(f"{folder} should hold images below `images` and txt files below `labels`: arrange them so")
    owner: dict[Path, Path] = {}
    for path, source in sources.items():
        if source in owner:
            raise DataError(
                f"{source} has two images, {owner[source]} and {path}: keep one, or rename one with its txt"
            )
        if source is not None:
            owner[source] = path
    if alone := [path for path in by_path.values() if path not in owner]:
        raise DataError(f"{alone[0]} has no image under the same path below `images`: restore it, or remove the txt")

    def read(path: Path, source: Path | None) -> AnnotatedImage:
        if source is None:
            return checked(path, path, [], notes=Counter({"images without a txt, taken as free of defects": 1}))
        objects, notes = _parse_yolo(source, names)
        return checked(path, source, objects, normalised=True, notes=notes)

    outside = Counter({"images outside of a folder `images`, left out": len(images) - len(sources)})
    return collected(names, (read(*pair) for pair in sources.items()), folder, outside)


# ------------------------------------------------------------------------------------------------------------ DeepPCB


def read_deep_pcb(folder: Path, class_names: Sequence[str]) -> Annotations:
    """`folder`/PCBData/group*/*/NAME_test.jpg with the boxes in *_not/NAME.txt: lines `x1 y1 x2 y2 type`, type from 1.

    The templates NAME_temp.jpg are not read. Raises DataError as `read_voc`.
    """
    images = []
    for path in sorted(Path(folder).glob("PCBData/group*/*/*_test.jpg")):
        source = path.parent.with_name(path.parent.name + "_not") / (path.stem.removesuffix("_test") + ".txt")
        objects = []
        for line in read_text(source).splitlines():
            try:
                *box, kind = (int(value) for value in line.split())
                objects.append((range(1, len(class_names) + 1).index(kind), np.reshape(box, 4)))
            except ValueError as error:
                raise DataError(f"{source} has the line {line!r}, not `x1 y1 x2 y2 type`: restore it") from error
        images.append(checked(path, source, objects))
    return Annotations(tuple(class_names), tuple(images))
