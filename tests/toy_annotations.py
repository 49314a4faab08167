"""Three small images with their boxes, in the formats of annotation software."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from defectlab.data.annotations import read_voc
from defectlab.data.coco import read_coco
from defectlab.data.yolo import read_yolo

NAMES = ("dent", "scratch")
# width 40, height 20; the second box of "two" stands twice
TRUTH = {
    "one": [("scratch", (4, 2, 20, 10))],
    "two": [("dent", (0, 0, 40, 20)), *[("dent", (8, 4, 12, 8))] * 2],
    "none": [],
}


def save(path: Path, width: int = 40, height: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (width, height), 90).save(path)
    return path


def xml(objects: Sequence[tuple[str, Sequence]], size: tuple[int, int] = (40, 20)) -> str:
    items = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        "</bndbox></object>"
        for name, (x1, y1, x2, y2) in objects
    )
    size_tag = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation><filename>wrong</filename>{size_tag}{items}</annotation>"


def write_voc(folder: Path, truth: dict = TRUTH) -> Path:
    for stem, objects in truth.items():
        save(folder / "images" / f"{stem}.png")
        (folder / "boxes").mkdir(exist_ok=True)
        (folder / "boxes" / f"{stem}.xml").write_text(xml(objects))
    return folder


def write_yolo(folder: Path, truth: dict = TRUTH) -> Path:
    for stem, objects in truth.items():
        save(folder / "images" / f"{stem}.png")
        (folder / "labels").mkdir(exist_ok=True)
        lines = [
            f"{NAMES.index(name)} {(x1 + x2) / 80} {(y1 + y2) / 40} {(x2 - x1) / 40} {(y2 - y1) / 20}\n"
            for name, (x1, y1, x2, y2) in objects
        ]
        if lines:  # an image without txt has no object
            (folder / "labels" / f"{stem}.txt").write_text("".join(lines))
    (folder / "classes.txt").write_text("dent\nscratch\n")
    return folder


def coco(truth: dict = TRUTH) -> dict:
    images = [{"id": 7 + i, "file_name": f"{stem}.png", "width": 40, "height": 20} for i, stem in enumerate(truth)]
    boxes = [
        {"id": 0, "image_id": 7 + i, "category_id": {"dent": 3, "scratch": 12}[name], "bbox": [x, y, x2 - x, y2 - y]}
        for i, objects in enumerate(truth.values())
        for name, (x, y, x2, y2) in objects
    ]
    categories = [{"id": 12, "name": "scratch"}, {"id": 3, "name": "dent"}]
    return {"images": images, "annotations": boxes, "categories": categories}


def write_coco(folder: Path, truth: dict = TRUTH, content: dict | None = None) -> Path:
    for stem in truth:
        save(folder / "images" / f"{stem}.png")
    path = folder / "boxes.json"
    path.write_text(json.dumps(content or coco(truth)))
    return path


WRITE = {"voc": write_voc, "yolo": write_yolo, "coco": write_coco}
READ = {"voc": read_voc, "yolo": read_yolo, "coco": lambda folder: read_coco(folder / "boxes.json", folder / "images")}


def changed(part: str, **values) -> dict:
    content = coco()
    content[part][0] |= values
    return content
