"""Readers of box annotations: VOC xml, YOLO txt, COCO json and DeepPCB txt, all into one form.

A box is (x1, y1, x2, y2) in pixels of the image as it is stored, 0 to its width or height; an EXIF rotation is not
applied. VOC counts xmin and ymin from 1, but much annotation software writes positions counted from 0 and lifts 0 to 1,
and no file says which it is. Coordinates are therefore kept as they are (at most one pixel off at two sides). NEU-DET
is such a case: in images of 200 pixels 1500 of its coordinates are 1 and 575 are 200.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import yaml

from defectlab.data.images import IMAGE_SUFFIXES, find_files, opened
from defectlab.files import DataError

TOLERANCE = 1.0  # pixels that a box may lie outside: files count from 0 or from 1, and round


@dataclass(frozen=True)
class AnnotatedImage:
    """One image and its boxes; an image may have none."""

    path: Path
    width: int
    height: int
    boxes: np.ndarray  # (n, 4) float32, x1 y1 x2 y2 in pixels, inside the image, area > 0
    labels: np.ndarray  # (n,) int64, index into Annotations.class_names
    duplicates: int  # boxes left out because one of the same class and coordinates stood before them


@dataclass(frozen=True)
class Annotations:
    """What a reader returns: the images sorted by path."""

    class_names: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]

    @property
    def duplicates(self) -> int:
        return sum(image.duplicates for image in self.images)


# ------------------------------------------------------------------------------------------- what the readers share


def _checked(
    path: Path,
    source: Path,
    objects: Sequence[tuple[int, Sequence[float]]],
    normalised: bool = False,
    stated: tuple[int, int] | None = None,
) -> AnnotatedImage:
    """The objects (label, x1 y1 x2 y2) that the file `source` gives for an image, checked.

    `normalised`: the coordinates are parts of the width and height. `stated`: the size that `source` gives, if any.
    """
    with opened(path, f"restore this image, or remove what {source} says of it") as image:
        width, height = image.size
    if stated is not None and stated != (width, height):
        raise DataError(
            f"{source} says {stated[0]} x {stated[1]} pixels, its image {path} has {width} x {height}: "
            "its boxes do not fit, annotate this image again"
        )
    boxes, limits = np.array([box for _, box in objects], np.float64).reshape(-1, 4), (width, height) * 2
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
    return AnnotatedImage(path, width, height, unique, labels, len(objects) - len(kept))


def _index(name: str, class_names: Sequence[str], source: Path) -> int:
    if name not in class_names:
        raise DataError(f"{source} names the class {name!r}: correct it, or add it to {', '.join(class_names)}")
    return class_names.index(name)


def _find_images(folder: Path) -> list[Path]:
    images = find_files(folder, IMAGE_SUFFIXES)
    if not images:
        raise DataError(f"{folder} holds no jpg, png, bmp or tif image: give the folder that holds them")
    return images


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: restore it, or remove its image") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): save it as UTF-8 text") from error


# --------------------------------------------------------------------------------------------------------- Pascal VOC


def _parse_voc(path: Path) -> tuple[list[tuple[str, list[float]]], tuple[int, int] | None]:
    """The objects (class name, x1 y1 x2 y2) of an xml and the image's size, None where it states none (or 0)."""
    try:
        tree = ElementTree.parse(path).getroot()
        width, height = (int(tree.findtext(f"size/{side}") or 0) for side in ("width", "height"))
        corners = ("xmin", "ymin", "xmax", "ymax")
        objects = [
            (item.findtext("name").strip(), [float(item.findtext(f"bndbox/{corner}")) for corner in corners])
            for item in tree.iter("object")
        ]
    except (ElementTree.ParseError, OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no VOC xml with a name and xmin, ymin, xmax, ymax for each object ({error}): restore it"
        ) from error
    return objects, (width, height) if width and height else None


def read_voc(folder: Path, class_names: Sequence[str] | None = None) -> Annotations:
    """Images with one VOC xml each, anywhere below `folder`, matched by the file's stem.

    The xml's own <filename> is not used: in several public sets it is wrong. Where two folders hold images of one
    stem, the xml must lie beside its own. `class_names` None: those found, sorted. Raises DataError: an image without
    xml or the reverse, an unreadable file, another image size than the xml states, a class that is not in
    `class_names`, a box without area or more than 1 pixel outside its image (up to 1 pixel it is clipped).
    """
    folder = Path(folder)
    images, by_stem = _find_images(folder), defaultdict(list)
    for path in images:
        by_stem[path.stem].append(path)
    parsed = {}
    for xml in find_files(folder, {".xml"}):
        candidates = by_stem[xml.stem]
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
    names = tuple(class_names or sorted({name for _, objects, _ in parsed.values() for name, _ in objects}))
    checked = (
        _checked(path, xml, [(_index(name, names, xml), box) for name, box in objects], stated=size)
        for path, (xml, objects, size) in sorted(parsed.items())
    )
    return Annotations(names, tuple(checked))


# --------------------------------------------------------------------------------------------------------------- YOLO


def _yolo_names(folder: Path) -> tuple[str, ...]:
    """Class names from classes.txt (one a line) or from `names` in data.yaml (a list, or index: name)."""
    places = (folder / name for name in ("classes.txt", "labels/classes.txt", "data.yaml", "data.yml"))
    listed = next((path for path in places if path.is_file()), None)
    if listed is None:
        raise DataError(f"{folder} holds neither classes.txt nor data.yaml: write the class names, one a line")
    if listed.suffix == ".txt":
        names = [line.strip() for line in _text(listed).splitlines() if line.strip()]
    else:
        try:
            names = yaml.safe_load(_text(listed))["names"]
            names = [names[index] for index in range(len(names))]  # a list and a mapping alike
        except (yaml.YAMLError, TypeError, KeyError) as error:
            raise DataError(f"{listed} gives no class names 0, 1, ... under `names` ({error!r}): add them") from error
    if not names or len(set(names)) != len(names):
        raise DataError(f"{listed} should give different class names, it gives {names}: correct it")
    return tuple(str(name) for name in names)


def _parse_yolo(path: Path, class_names: Sequence[str]) -> list[tuple[int, list[float]]]:
    objects = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            index, x, y, width, height = line.split()
            label, x, y, width, height = int(index), float(x), float(y), float(width), float(height)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number} is not `class x y width height` but {line.strip()[:60]!r}: correct or remove it"
            ) from error
        if not 0 <= label < len(class_names):
            raise DataError(
                f"{path}, line {number} has class {label}, there are {len(class_names)} names "
                f"(0 {class_names[0]} to {len(class_names) - 1} {class_names[-1]}): correct it or add the name"
            )
        objects.append((label, [x - width / 2, y - height / 2, x + width / 2, y + height / 2]))
    return objects


def read_yolo(folder: Path, class_names: Sequence[str] | None = None) -> Annotations:
    """Images below a folder `images`, their txt under the same path below `labels`.

    So `images/train/a.jpg` has `labels/train/a.txt`, and `train/images/a.jpg` has `train/labels/a.txt`. A line is
    `class x y width height`, centre and size as parts of the image's. An image without txt has no object.
    `class_names` None: from classes.txt (also in labels), or `names` of data.yaml, in `folder`. Raises DataError: no
    image or no txt at all, a txt without image, another line, a class index without a name, a box as in `read_voc`.
    """
    folder = Path(folder)
    names = tuple(class_names or _yolo_names(folder))
    sources = {}
    for path in _find_images(folder):
        parts = list(path.relative_to(folder).parts)
        if "images" in parts[:-1]:
            parts[parts.index("images")] = "labels"
            sources[path] = folder.joinpath(*parts).with_suffix(".txt")
    texts = [path for path in find_files(folder, {".txt"}) if "labels" in path.relative_to(folder).parts[:-1]]
    texts = [path for path in texts if path.name != "classes.txt"]
    if alone := sorted(set(texts) - set(sources.values())):
        raise DataError(f"{alone[0]} has no image under the same path below `images`: restore it, or remove the txt")
    if not texts:
        raise DataError(f"{folder} should hold images below `images` and txt files below `labels`: arrange them so")
    checked = (
        _checked(path, source, _parse_yolo(source, names) if source.is_file() else [], normalised=True)
        for path, source in sources.items()
    )
    return Annotations(names, tuple(checked))


# --------------------------------------------------------------------------------------------------------------- COCO


def read_coco(annotation_file: Path, images: Path, class_names: Sequence[str] | None = None) -> Annotations:
    """The images that a COCO json lists, found below `images`: at their `file_name`, else by its last part alone.

    `class_names` None: the json's categories, by ascending id. A bbox is x, y, width, height in pixels. Raises
    DataError: an unreadable json, an image that is missing, listed twice or found twice, another size than stated, an
    annotation of an unknown image or category or marked `iscrowd`, a box as in `read_voc`.
    """
    annotation_file, images = Path(annotation_file), Path(images)
    by_name = defaultdict(list)
    for path in _find_images(images):
        by_name[path.name].append(path)
    content = _text(annotation_file)
    try:
        fields = json.loads(content)
        categories = {item["id"]: str(item["name"]) for item in sorted(fields["categories"], key=lambda c: c["id"])}
        names = tuple(class_names or categories.values())
        listed = {
            item["id"]: (str(item["file_name"]), (int(item["width"]), int(item["height"]))) for item in fields["images"]
        }
        objects = {index: [] for index in listed}
        for item in fields["annotations"]:
            where = f"{annotation_file}: annotation {item.get('id')}"
            if item["image_id"] not in listed or item["category_id"] not in categories:
                raise DataError(f"{where} is of an image or category that is not listed: correct or remove it")
            if item.get("iscrowd", 0):
                raise DataError(f"{where} is marked iscrowd, not one object: box each object, or remove it")
            x, y, width, height = (float(value) for value in item["bbox"])
            label = _index(categories[item["category_id"]], names, annotation_file)
            objects[item["image_id"]].append((label, [x, y, x + width, y + height]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{annotation_file} is no COCO json of boxes ({error!r}): export it again") from error

    checked, seen = [], set()
    for index, (name, size) in listed.items():
        found = [images / name] if (images / name).is_file() else by_name[Path(name).name]
        if len(found) > 1:
            raise DataError(f"{annotation_file}: {name} fits {found[0]} and {found[1]}: give its path in {images}")
        path = found[0] if found else images / name
        if path in seen:
            raise DataError(f"{annotation_file} lists {name} twice: remove one")
        seen.add(path)
        checked.append(_checked(path, annotation_file, objects[index], stated=size))
    return Annotations(names, tuple(sorted(checked, key=lambda image: image.path)))


# ------------------------------------------------------------------------------------------------------------ DeepPCB


def read_deep_pcb(folder: Path, class_names: Sequence[str]) -> Annotations:
    """`folder`/PCBData/group*/*/NAME_test.jpg with the boxes in *_not/NAME.txt: lines `x1 y1 x2 y2 type`, type from 1.

    The templates NAME_temp.jpg are not read. Raises DataError as `read_voc`.
    """
    images = []
    for path in sorted(Path(folder).glob("PCBData/group*/*/*_test.jpg")):
        source = path.parent.with_name(path.parent.name + "_not") / (path.stem.removesuffix("_test") + ".txt")
        objects = []
        for line in _text(source).splitlines():
            try:
                *box, kind = (int(value) for value in line.split())
                objects.append((range(1, len(class_names) + 1).index(kind), np.reshape(box, 4)))
            except ValueError as error:
                raise DataError(f"{source} has the line {line!r}, not `x1 y1 x2 y2 type`: restore it") from error
        images.append(_checked(path, source, objects))
    return Annotations(tuple(class_names), tuple(images))
