"""Reader of COCO json: into the form of `annotations`."""

from __future__ import annotations

import json
import math
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from defectlab.data.annotations import (
    AROUND,
    Annotations,
    around,
    checked,
    clean_names,
    collected,
    index_of,
    read_text,
    same,
    unique,
)
from defectlab.data.images import find_images
from defectlab.files import DataError


class _Fields:
    """A JSON object of which missing or odd fields are named: by file, kind and number."""

    def __init__(self, content: Any, where: str):
        self.content, self.where = content, where

    def __getitem__(self, name: str) -> Any:
        if not isinstance(self.content, dict) or self.content.get(name) is None:
            raise DataError(f"{self.where} has no `{name}`: it is no COCO json of boxes, export it again")
        return self.content[name]

    def items(self, name: str) -> list[_Fields]:
        if not isinstance(self[name], list):
            raise DataError(f"{self.where}: `{name}` is no list: it is no COCO json of boxes, export it again")
        return [_Fields(item, f"{self.where}: {name}[{number}]") for number, item in enumerate(self[name])]

    def number(self, name: str, count: int | None = None) -> Any:
        """A finite number, or `count` of them."""
        try:
            values = [float(value) for value in (self[name] if count else [self[name]])]
        except (TypeError, ValueError, OverflowError):
            values = []
        if len(values) != (count or 1) or not all(map(math.isfinite, values)):
            wanted = f"{count} numbers" if count else "a number"
            raise DataError(f"{self.where}: `{name}` is {self[name]!r}, not {wanted}: correct it")
        return values if count else values[0]


def _key(value: Any) -> str:
    """An id as text: "1", 1 and 1.0 are the same."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _by_id(items: Iterable[_Fields]) -> dict[str, _Fields]:
    """By `id`, in the order of the ids; "1" and 1 are the same. DataError for one that stands twice."""
    found: dict[str, _Fields] = {}
    for item in items:
        if (key := _key(item["id"])) in found:
            both = f"{found[key].content} and {item.content}"
            raise DataError(f"{item.where}: the id {key} stands twice, for {both}: give each its own (exports merged?)")
        found[key] = item
    return dict(
        sorted(found.items(), key=lambda pair: (pair[0].isdigit(), int(pair[0]) if pair[0].isdigit() else pair[0]))
    )


def read_coco(annotation_file: Path, images: Path, class_names: Sequence[str] | None = None) -> Annotations:
    """The images that a COCO json lists, found below `images`: at their `file_name`, else by its last part alone.

    `class_names` None: the json's categories, by ascending id. A bbox is x, y, width, height in pixels. Regions marked
    `iscrowd` are not one object: they are left out, and counted. Raises DataError: an unreadable json, a missing field,
    an id that stands twice, an image that is missing, listed twice or found twice, another size than stated, an
    annotation of an unknown image or category, a box as in `read_voc`.
    """
    annotation_file, images = Path(annotation_file), Path(images)
    by_path, by_name = {}, defaultdict(list)
    for path in find_images(images):
        by_path[same(path.relative_to(images).as_posix())] = path
        by_name[same(path.name)].append(path)
    try:
        fields = _Fields(json.loads(read_text(annotation_file)), str(annotation_file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{annotation_file} is no COCO json of boxes ({error}): export it again") from error
    categories = _by_id(fields.items("categories"))
    titles = clean_names((item["name"] for item in categories.values()), annotation_file)
    called = dict(zip(categories, unique(titles, annotation_file), strict=True))
    names = tuple(class_names or called.values())
    listed = _by_id(fields.items("images"))
    objects, notes = {index: [] for index in listed}, defaultdict(Counter)
    for item in fields.items("annotations"):
        image, category = _key(item["image_id"]), _key(item["category_id"])
        if image not in listed or category not in called:
            raise DataError(
                f"{item.where} is of image {item['image_id']!r} and category {item['category_id']!r}, an image or "
                "category that is not listed: correct or remove it"
            )
        if item.content.get("iscrowd") and item.number("iscrowd"):
            notes[image]["regions marked iscrowd, left out"] += 1
            continue
        x, y, width, height = item.number("bbox", 4)
        box, attributes = [x, y, x + width, y + height], item.content.get("attributes")
        told = _Fields(attributes if isinstance(attributes, dict) else {}, f"{item.where}: attributes")
        if turn := told.number("rotation") % 360 if told.content.get("rotation") else 0:
            box = around(box, turn)
            notes[image][AROUND] += 1
        objects[image].append((index_of(called[category], names, annotation_file), box))

    read, seen = [], {}
    for index, item in listed.items():
        name = same(posixpath.normpath(str(item["file_name"]).replace("\\", "/")))  # as Windows writes them, too
        stated = None
        if item.content.get("width") or item.content.get("height"):
            stated = int(item.number("width")), int(item.number("height"))
        if name not in by_path and not by_name[name.rsplit("/", 1)[-1]]:
            name = unquote(name)  # "plate%20no%201.png", as a browser writes it
        found = [by_path[name]] if name in by_path else by_name[name.rsplit("/", 1)[-1]]
        whole = [one for one in found if same(one.as_posix()).endswith(f"/{name}")]  # all of its path fits
        found = whole or found
        if len(found) > 1:
            raise DataError(f"{annotation_file}: {name} fits {found[0]} and {found[1]}: give its path in {images}")
        path = found[0] if found else images / name.lstrip("/")
        if path in seen:
            raise DataError(f"{annotation_file} lists {path} twice, as id {seen[path]} and {index}: remove one")
        seen[path] = index
        read.append(checked(path, annotation_file, objects[index], stated=stated, notes=notes[index]))
    return collected(names, read, annotation_file)
