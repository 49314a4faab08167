"""Reader of YOLO txt files, with classes.txt or data.yaml: into the form of `annotations`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from defectlab.data.annotations import (
    AnnotatedImage,
    Annotations,
    checked,
    clean_names,
    collected,
    read_text,
    same,
    unique,
)
from defectlab.data.images import find_files, find_images
from defectlab.files import DataError


def yolo_yamls(folder: Path) -> dict[Path, dict[str, Any]]:
    """The yaml files below `folder` that say something of the set: names or parts. All values are text, as written."""
    found = {}
    for path in find_files(folder, {".yaml", ".yml"}):
        try:
            content = yaml.load(read_text(path), Loader=yaml.BaseLoader)  # `no` is no class False, 007 not 7
        except yaml.YAMLError as error:
            raise DataError(f"{path} is no yaml ({' '.join(str(error).split())}): correct it") from error
        if isinstance(content, dict) and content.keys() & {"names", "nc", "train", "val", "test"}:
            found[path] = content
    return found


def _listed(path: Path) -> list[str]:
    """The lines of a classes.txt; DataError for an empty line between names, or a comment: names count by line."""
    lines = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if odd := [number for number, line in enumerate(lines, 1) if not line or line.startswith("#")]:
        raise DataError(f"{path}, line {odd[0]} names no class, so all later names would move: remove it, or name it")
    return lines


def _yolo_names(folder: Path) -> tuple[str, ...]:
    """Class names from classes.txt (one a line) or from `names` in data.yaml (a list, or index: name), which agree."""
    listed = {path: _listed(path) for path in find_files(folder, {".txt"}) if path.name == "classes.txt"}
    for path, content in yolo_yamls(folder).items():
        names = content.get("names")
        if names is None and listed:
            continue  # says only how the set is split
        try:
            given = isinstance(names, list)
            listed[path] = names if given else [names[str(index)] for index in range(len(names))]
        except (TypeError, KeyError) as error:
            raise DataError(f"{path} gives no class names 0, 1, ... under `names` ({error!r}): add them") from error
        if content.get("nc") not in (None, str(len(listed[path]))):
            raise DataError(f"{path} says nc: {content['nc']} and names {len(listed[path])} classes: correct it")
    if not any(listed.values()):
        raise DataError(f"{folder} holds neither classes.txt nor data.yaml: write the class names, one a line")
    read = {path: unique(clean_names(names, path), path) for path, names in listed.items()}
    (first, names), *rest = read.items()
    for path, other in rest:
        if other != names:
            raise DataError(f"{first} names the classes {names}, {path} {other}: correct or remove one of them")
    return names


def _parse_yolo(
    path: Path, class_names: Sequence[str], keypoints: bool
) -> tuple[list[tuple[int, list[float]]], Counter[str]]:
    """The objects of a txt, and how many lines are not the plain `class x y width height`."""
    objects, notes = [], Counter()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            index, *values = map(float, line.split())
            if keypoints and len(values) > 5:
                values = values[:4]
                notes["keypoints behind the boxes, ignored"] += 1
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
    box is taken; a sixth column (confidence) and keypoints (`kpt_shape` in data.yaml) are ignored. An image without txt
    has no object. `class_names` None: from classes.txt, or `names` of data.yaml, anywhere below `folder`. Raises
    DataError: no image or no txt at all, a txt without image or with two, another line, lists of names that differ, a
    class index without a name, a box as in `read_voc`.
    """
    folder = Path(folder)
    names = tuple(class_names or _yolo_names(folder))
    keypoints = any("kpt_shape" in content for content in yolo_yamls(folder).values())
    texts = [path for path in find_files(folder, {".txt"}) if "labels" in path.relative_to(folder).parts[:-1]]
    by_path = {same(str(path.with_suffix(".txt"))): path for path in texts if path.name != "classes.txt"}
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
        objects, notes = _parse_yolo(source, names, keypoints)
        return checked(path, source, objects, normalised=True, notes=notes)

    outside = Counter({"images outside of a folder `images`, left out": len(images) - len(sources)})
    return collected(names, (read(*pair) for pair in sources.items()), folder, outside)
