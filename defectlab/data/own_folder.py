"""A reader's own folder: images with boxes (VOC, YOLO or COCO) as a detection set, or images alone."""

from __future__ import annotations

import errno
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pooch
from PIL import Image
from torch import Tensor

from defectlab.data.annotations import Annotations, read_text, read_voc, same
from defectlab.data.coco import read_coco
from defectlab.data.detection import DetectionData, to_data
from defectlab.data.images import IMAGE_SUFFIXES, decode, find_files, find_images, in_threads, others, plain
from defectlab.data.leaks import near_duplicates
from defectlab.data.splits import PARTS, Plan, detection_identity, draw_split, with_dev
from defectlab.data.yolo import read_yolo, yolo_yamls
from defectlab.files import DataError

_ROLES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_ROLES |= {"testing": "test"}
_NEUTRAL = {"", "image", "images", "img", "imgs", "jpegimages", "label", "labels"} | {"annotations", "set", "data"}
_KNOWN = IMAGE_SUFFIXES | {".xml", ".txt", ".json", ".yaml", ".yml"}


# ---------------------------------------------------------------------------------------------------- whose test split


def _role(path: Path, folder: Path) -> str | None:
    """train, val or test, where a folder in the path says so (`train2017`, `images_test`; not `test_bench`), for a json
    also a word of its name."""
    parts = path.relative_to(folder)
    for part in parts.parent.parts:
        words = set(re.split(r"[^a-z]+", part.lower())) - _NEUTRAL
        if len(words) == 1 and (role := _ROLES.get(*words)):
            return role
    words = re.split(r"[^a-z]+", parts.stem.lower()) if path.suffix.lower() == ".json" else []
    return next((_ROLES[word] for word in words if word in _ROLES), None)


def _voc_lists(folder: Path, known: set[str]) -> dict[str, tuple[Path, set[str]]]:
    """Role -> (a list, stems), from all ImageSets/Main; trainval only where train is not beside it. `known`: the stems
    of the images; a line that is none has a second word, as in the lists of one class."""
    found: dict[str, tuple[Path, set[str]]] = {}
    for path in find_files(folder, {".txt"}):
        role = "train" if path.stem == "trainval" else _ROLES.get(path.stem)
        once = path.stem != "trainval" or not path.with_name("train.txt").exists()
        if path.parts[-3:-1] == ("ImageSets", "Main") and role and once:
            lines = {same(line.strip()) for line in read_text(path).splitlines() if line.strip()}
            stems = {line if line in known else line.split()[0] for line in lines}
            found[role] = path, stems | found.get(role, (path, set()))[1]
    return found


def _named_images(entry: str, bases: Sequence[Path], by_place: Mapping[Path, str]) -> set[str] | None:
    """The images, by name, that an entry of a data.yaml means: a folder or a list; None where it is not there.

    `bases`: what it may be relative to. `by_place`: resolved path of an image -> its name.
    """

    def places(path: str) -> list[Path]:  # of a link where it lies, not where it leads
        inside = re.sub(r"^(\.{1,2}/)+", "", path.replace("\\", "/"))  # "../train/images" of a set that was moved
        return [p.parent.resolve() / p.name for base in bases for p in (base / path, base / inside)]

    place = next((place for place in places(entry) if place.exists()), None)
    if place is None:
        return None
    if place.is_dir():
        return {name for path, name in by_place.items() if path.is_relative_to(place.resolve())}
    bases, found = [place.parent, *bases], set()
    for line in filter(None, map(str.strip, read_text(place).splitlines())):
        name = next((by_place[path] for path in places(line) if path in by_place), None)
        if name is None:
            raise DataError(f"{place} lists {line}, which is no image of the set: correct or remove it")
        found.add(name)
    return found


def _yolo_lists(folder: Path, names: Iterable[str]) -> tuple[dict[str, set[str]], str]:
    """Role -> images by name, from the data.yaml of a set in the layout of YOLO, else from lists at its root, as
    darknet has them; and what to say of it."""
    found, why, by_place = {}, "", {(folder / name).parent.resolve() / Path(name).name: name for name in names}
    for path, content in yolo_yamls(folder).items():
        entries = {role: content[role] for role in ("train", "val", "test") if content.get(role)}
        if "train" not in entries or len(entries) < 2:
            continue
        if found:
            raise DataError(f"{folder} has two yaml files that split it, {why} and {path.name}: keep one")
        why = path.relative_to(folder).as_posix()
        bases = (path.parent / str(content.get("path") or ""), path.parent)
        for role, listed in entries.items():
            listed = [str(one) for one in (listed if isinstance(listed, list) else [listed])]
            parts = [_named_images(entry, bases, by_place) for entry in listed]
            if all(parts):
                found[role] = set().union(*parts)
            elif role == "train":
                raise DataError(f"{path} names {', '.join(listed)} for train, where there is no image: correct it")
            else:
                why += f" (of which {role}: {', '.join(listed)} is not there)"
    lists = {_ROLES[path.stem]: path for path in folder.glob("*.txt") if path.stem in _ROLES}
    if not found and "train" in lists and len(lists) > 1:
        found = {role: _named_images(path.name, [folder], by_place) for role, path in lists.items()}
        why = ", ".join(sorted(path.name for path in lists.values()))
    return found, why


def _listed_split(folder: Path, format: str, names: Iterable[str]) -> tuple[dict[str, str | None], str] | None:
    """Name -> role, and the lists that say so, where the folder has some; None where it has none."""
    if format == "voc":
        by_stem = {name: same(Path(name).stem) for name in names}
        lists = _voc_lists(folder, set(by_stem.values()))
        for path, stems in lists.values():
            if missing := sorted(stems - set(by_stem.values())):
                raise DataError(f"{path} lists {missing[0]}, of which there is no image: correct or remove it")
        chosen = {role: {name for name in names if by_stem[name] in stems} for role, (_, stems) in lists.items()}
        why = ", ".join(path.relative_to(folder).as_posix() for path, _ in lists.values())
    elif format == "yolo":
        chosen, why = _yolo_lists(folder, names)
    else:
        return None
    if "train" not in chosen or len(chosen) < 2:
        return None
    roles: dict[str, str | None] = {}
    for role, members in chosen.items():
        for name in sorted(members):
            if name in roles:
                raise DataError(f"{folder / name} is in {roles[name]} and in {role} of {why}: leave it in one")
            roles[name] = role
    return roles, why


# ------------------------------------------------------------------------------------------------------------- reading


def _read_coco_jsons(folder: Path) -> tuple[Annotations, dict[str, str | None]]:
    """The annotations of all json files, and the role of each image by its path in the folder."""
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
        called = [*re.findall(r"[a-z]+[0-9]+", path.stem.lower()), str(role)]  # train2017, train
        places = [path.parent, *(place / word for word in called for place in (folder / "images", folder))]
        own = (p for p in places if p.is_dir() and any(f.suffix.lower() in IMAGE_SUFFIXES for f in p.iterdir()))
        annotations = read_coco(path, next(own, folder), class_names)
        class_names = annotations.class_names
        for image in annotations.images:
            name = image.path.relative_to(folder).as_posix()
            if name in roles:
                raise DataError(f"{path} lists {name}, which another json lists too: remove it from one")
            roles[name] = role or _role(image.path, folder)
            images.append(image)
    left_out = Counter({"images that no json lists, left out": max(0, len(find_images(folder)) - len(images))})
    return Annotations(class_names, tuple(images), left_out), roles


def _read_own(folder: Path, format: str) -> tuple[Annotations, dict[str, str | None], str]:
    """The annotations of a folder, the role of each image by its path in the folder, and what says so."""
    if format not in ("voc", "yolo", "coco"):
        raise ValueError(f"format must be 'voc', 'yolo' or 'coco', got {format!r}")
    if format == "coco":
        return *_read_coco_jsons(folder), "names of the json files or folders"
    annotations = (read_voc if format == "voc" else read_yolo)(folder)
    names = [image.path.relative_to(folder).as_posix() for image in annotations.images]
    listed = _listed_split(folder, format, names)
    if listed is None:
        return annotations, {name: _role(folder / name, folder) for name in names}, "names of the folders"
    roles, why = listed
    kept = tuple(i for i, name in zip(annotations.images, names, strict=True) if name in roles)
    left_out = Counter({f"images that {why} does not list, left out": len(names) - len(kept)})
    notes = annotations.of_the_set + left_out
    return replace(annotations, images=kept, of_the_set=notes), roles, why


def _split(
    folder: Path,
    roles: Mapping[str, str | None],
    why: str,
    strata: Mapping[str, str],
    content: Mapping[str, str],
    test_share: float,
) -> tuple[tuple[list[str], ...], str]:
    """(train, dev, test), and one sentence on where they come from. `why`: what gave the roles."""
    found = set(roles.values())
    if not ("train" in found and found & {"val", "test"}):
        drawn = draw_split(strata, test_share, "folder test", content)
        reason = "no folder or list names train and test"
        return with_dev(strata, drawn, content), f"drawn, {test_share:.0%} for testing: {reason}"
    if None in found:
        name = next(name for name, role in roles.items() if role is None)
        raise DataError(f"{folder / name} lies in none of the folders train, val and test: move it into one")
    named = {role: sorted(name for name in roles if roles[name] == role) for role in found}
    if len(named) == 3:
        return (named["train"], named["val"], named["test"]), f"train, val (dev) and test by {why}"
    test = "test" if "test" in named else "val"
    return with_dev(strata, named[test], content), f"train and test ({test}) by {why}; dev is a tenth of train"


def _leaks(lists: Iterable[Iterable[str]], content: Mapping[str, str]) -> list[str]:
    """A line where images of dev or test are byte for byte images of another part."""
    by_content = defaultdict(list)
    for part, names in zip(PARTS, lists, strict=True):
        for name in names:
            by_content[content[name]].append((part, name))
    shared = [where for where in by_content.values() if len({part for part, _ in where}) > 1]
    if not shared:
        return []
    (_, first), (_, second), *_ = shared[0]
    return [f"leak: {len(shared)} images stand in two parts, such as {first} and {second}: test numbers flatter"]


def look_alikes(
    train: Sequence[str], seen: Tensor, test: Sequence[str], new: Tensor, content: Mapping[str, str] | None = None
) -> list[str]:
    """A line where test images, by name and pixels, are nearly training images; pairs of one `content` are `_leaks`."""
    named = [(train[pair.first], test[pair.second], pair) for pair in near_duplicates(seen, new)]
    named = [pair for pair in named if content is None or content[pair[0]] != content[pair[1]]]
    if not named:
        return []
    first, second, best = named[0]
    how = f"similarity {best.similarity:.2f}" + f", {best.turn}" * (best.turn != "unturned")
    count = len({second for _, second, _ in named})
    return [f"leak?: {count} test images look like a training image, such as {second} and {first} ({how})"]


def load_folder(path: Path, format: str, size: int, device="cpu", test_share: float = 0.2) -> DetectionData:
    """A reader's own images and boxes as a set; `report` of the result says what was found.

    `format` "voc", "yolo" or "coco": see `read_voc`, `read_yolo`, `read_coco`. For COCO a json, or one for each of
    train, val and test; the images beside their json, in images/train or train, or else anywhere below `path`.

    What the folder itself says of train, val and test splits the set: `train`, `val` and `test` of data.yaml (folders
    or lists), train.txt and test.txt beside it, ImageSets/Main of VOC, else words of folder names (train2017, valid),
    for COCO of the json's name. With train and one other, that is the test split; with all three, val is dev. Where
    nothing says so, `test_share` (0 to 1) of the images is drawn for testing, stratified by the class that most boxes
    of an image have. Where no dev is given, it is a tenth of training. Images in two parts, or nearly the same, are a
    line of the report. `size`: side of the square images in pixels.
    DataError naming the file and the remedy, also where there are fewer than 10 images, or no box to train or to test
    on; ValueError for another format, a size below 1 or a share outside 0 to 1.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must lie between 0 and 1, got {test_share}")
    folder = Path(path)
    annotations, roles, why = _read_own(folder, format)
    if len(roles) < 10:
        raise DataError(f"{folder} gives {len(roles)} images: three splits need at least 10")
    by_name = {image.path.relative_to(folder).as_posix(): image for image in annotations.images}
    content = {name: pooch.file_hash(str(folder / name), "sha256") for name in by_name}
    strata = {
        name: str(np.bincount(image.labels).argmax()) if len(image.labels) else "none"
        for name, image in by_name.items()
    }
    lists, origin = _split(folder, roles, why, strata, content, test_share)
    for part, names in zip(PARTS, lists, strict=True):
        if not names or (part != "dev" and not any(len(by_name[name].labels) for name in names)):
            raise DataError(f"{folder}: the {len(names)} {part} images have no box: annotate or add some")
    identity = hashlib.sha256(" ".join(annotations.class_names).encode())
    for name, image in sorted(by_name.items()):
        identity.update(f"{plain(name)} {content[name]}".encode() + image.boxes.tobytes() + image.labels.tobytes())
    fingerprint = detection_identity(identity.hexdigest(), lists)
    parts = dict(zip(PARTS, lists, strict=True))
    plan = Plan(folder, f"images of {folder.name}", "replace or remove this image", None, parts, fingerprint)
    data = to_data(folder.name, plan, annotations, size, device)
    alike = look_alikes(data.train.names, data.train.images, data.test.names, data.test.images, content)
    more = [f"split: {origin}", *_leaks(lists, content), *alike, *filter(None, [others(folder, _KNOWN)])]
    return replace(data, report="\n".join([data.report, *more]))


# -------------------------------------------------------------------------------------------------------- images alone


class Images:
    """The images of a reader's folder. `broken`: a sentence on each that could not be read, which stops no other."""

    def __init__(self, folder: Path):
        self.folder, self.paths, self.broken = folder, find_images(folder), []

    def chunks(self, count: int, use: Callable[[Image.Image], Any]) -> Iterator[tuple[list[str], list[Any]]]:
        """(paths in the folder, what `use` makes of the images), at most `count` at a time."""

        def read(path: Path) -> tuple[str, Any, str]:
            try:
                return path.relative_to(self.folder).as_posix(), use(decode(path)), ""
            except DataError as error:
                return "", None, str(error)

        for start in range(0, len(self.paths), count):
            found = in_threads(read, self.paths[start : start + count])
            self.broken += [why for _, _, why in found if why]
            if good := [(name, value) for name, value, why in found if not why]:
                names, values = zip(*good, strict=True)
                yield list(names), list(values)

    @contextmanager
    def writing(self, what: str, name: str) -> Iterator[None]:
        """What is written of an image; a name too long for a file is one of `broken`."""
        try:
            yield
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            self.broken.append(f"{what} of {plain(name)}: the name is too long for a file, rename the image")

    def close(self) -> int:
        """Say what was left out; -> the exit code, 1 where images could not be read."""
        if left_out := others(self.folder):
            print(left_out)
        for why in self.broken:
            print(f"left out: {why}")
        return int(bool(self.broken))
