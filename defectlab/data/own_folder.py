"""A reader's own images with boxes (VOC, YOLO or COCO) as a detection set."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pooch

from defectlab.data.annotations import Annotations, read_coco, read_voc, read_yolo
from defectlab.data.detection import DetectionData, to_data
from defectlab.data.images import IMAGE_SUFFIXES, find_files
from defectlab.data.splits import PARTS, Plan, detection_identity, draw_split, with_dev
from defectlab.files import DataError

_ROLES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def _role(path: Path, folder: Path) -> str | None:
    """train, val or test, where a folder in the path (for a json, also a word of its name) says so."""
    words = [part.lower() for part in path.relative_to(folder).parent.parts]
    if path.suffix == ".json":
        words += re.split(r"[^a-z]+", path.stem.lower())
    return next((_ROLES[word] for word in words if word in _ROLES), None)


def _read_own(folder: Path, format: str) -> tuple[Annotations, dict[str, str | None]]:
    """The annotations of a folder, and the role of each image by its path in the folder."""
    if format in ("voc", "yolo"):
        annotations = (read_voc if format == "voc" else read_yolo)(folder)
        return annotations, {p.path.relative_to(folder).as_posix(): _role(p.path, folder) for p in annotations.images}
    if format != "coco":
        raise ValueError(f"format must be 'voc', 'yolo' or 'coco', got {format!r}")
    jsons = find_files(folder, {".json"})
    if not jsons:
        raise DataError(f"{folder} holds no json: give the folder that holds the COCO json and its images")
    jsons.sort(key=lambda path: _role(path, folder) != "train")  # the training json names the classes
    if len(jsons) > 1 and len({_role(path, folder) for path in jsons} - {None}) != len(jsons):
        raise DataError(
            f"{folder} holds {len(jsons)} json files: keep one, or one for each of train, val and test, named so"
        )
    class_names, images, roles = None, [], {}
    for path in jsons:
        role = _role(path, folder)
        places = [path.parent, folder / "images" / str(role), folder / str(role)]
        own = (p for p in places if p.is_dir() and any(f.suffix.lower() in IMAGE_SUFFIXES for f in p.iterdir()))
        annotations = read_coco(path, next(own, folder), class_names)
        class_names = annotations.class_names
        for image in annotations.images:
            name = image.path.relative_to(folder).as_posix()
            if name in roles:
                raise DataError(f"{path} lists {name}, which another json lists too: remove it from one")
            roles[name] = role
            images.append(image)
    return Annotations(class_names, tuple(images)), roles


def load_folder(path: Path, format: str, size: int, device="cpu", test_share: float = 0.2) -> DetectionData:
    """A reader's own images and boxes as a set; `report` of the result says what was found.

    `format` "voc", "yolo" or "coco": see `read_voc`, `read_yolo`, `read_coco`. For COCO a json, or one for each of
    train, val and test; the images beside their json, in images/train or train, or else anywhere below `path`.

    Folders named train, val (or valid) and test split the set, for COCO such a word in the json's name or folder. With
    train and one other, that other is the test split; with all three, val is dev. Without such names `test_share`
    (0 to 1) of the images is drawn for testing, stratified by the class that most boxes of an image have. Where no
    dev is given, it is a tenth of the training images. `size`: side of the square images in pixels. Raises
    DataError naming the file and the remedy, also where there are fewer than 10 images, or no box to train or to
    test on; ValueError for another format, a size below 1 or a share outside 0 to 1.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must lie between 0 and 1, got {test_share}")
    folder = Path(path)
    annotations, roles = _read_own(folder, format)
    if len(roles) < 10:
        raise DataError(f"{folder} gives {len(roles)} images: three splits need at least 10")
    by_name = {image.path.relative_to(folder).as_posix(): image for image in annotations.images}
    content = {name: pooch.file_hash(str(folder / name), "sha256") for name in by_name}
    strata = {
        name: str(np.bincount(image.labels).argmax()) if len(image.labels) else "none"
        for name, image in by_name.items()
    }
    found = set(roles.values())
    if "train" in found and found & {"val", "test"}:
        if None in found:
            name = next(name for name, role in roles.items() if role is None)
            raise DataError(f"{folder / name} lies in none of the folders train, val and test: move it into one")
        named = {role: sorted(name for name in roles if roles[name] == role) for role in found}
        lists = (named["train"], named["val"], named["test"]) if len(named) == 3 else None
        lists = lists or with_dev(strata, named.get("test") or named["val"], content)
    else:
        lists = with_dev(strata, draw_split(strata, test_share, "folder test", content), content)
    for part, names in zip(PARTS, lists, strict=True):
        if not names or (part != "dev" and not any(len(by_name[name].labels) for name in names)):
            raise DataError(f"{folder}: the {len(names)} {part} images have no box: annotate or add some")
    identity = hashlib.sha256(" ".join(annotations.class_names).encode())
    for name, image in sorted(by_name.items()):
        identity.update(f"{name} {content[name]}".encode() + image.boxes.tobytes() + image.labels.tobytes())
    fingerprint = detection_identity(identity.hexdigest(), lists)
    parts = dict(zip(PARTS, lists, strict=True))
    plan = Plan(folder, f"images of {folder.name}", "replace or remove this image", None, parts, fingerprint)
    return to_data(folder.name, plan, annotations, size, device)
