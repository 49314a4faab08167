"""The detection sets, whole, as tensors on one device: NEU-DET, DeepPCB, PKU-Market-PCB, and the drawn stand-ins.

Every set has three splits. `test` is the official one where there is one. `dev`, where design choices are made, is a
tenth of the training pictures. Splits depend on the names of the files alone, never on a seed of a run, and pictures
that are byte for byte the same stand on one side.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch

from defectlab.data import store
from defectlab.data.annotations import PICTURES, Annotations, find_files, read_coco, read_deep_pcb, read_voc, read_yolo
from defectlab.data.detection_tensors import DetectionData, DetectionSplit, to_data
from defectlab.data.store import DataError

__all__ = (
    "DetectionData",
    "DetectionSplit",
    "detection_fingerprint",
    "draw_split",
    "draw_test",
    "ensure_synthetic",
    "load_detection",
    "load_folder",
)
NEU_CLASSES = ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")
DEEP_PCB_CLASSES = ("open", "short", "mousebite", "spur", "copper", "pin-hole")  # types 1 to 6 of its txt files
PKU_CLASSES = ("missing_hole", "mouse_bite", "open_circuit", "short", "spur", "spurious_copper")
NEU_TEST_LIST = Path(__file__).parent / "splits" / "neu_det_test.txt"
SPLIT_VERSION = 1  # raise when `draw_split` or a reader changes what a set gives: it enters the fingerprint


# ------------------------------------------------------------------------------------------------------------- splits


def draw_split(strata: Mapping[str, str], share: float, purpose: str, content: Mapping[str, str]) -> list[str]:
    """Draw `share` of the names, sorted: the same part of each stratum, as nearly as whole pictures allow.

    `strata`: name to stratum. `content`: name to a hash of its bytes; names of one content are drawn together or not
    at all. Within a stratum the order is that of the sha256 of "purpose name", so the draw depends on no library's
    random numbers. A group of one content is passed over where it would exceed the share.
    """
    groups = defaultdict(list)
    for name in sorted(strata):
        groups[content[name]].append(name)
    by_stratum = defaultdict(list)
    for names in groups.values():
        by_stratum[strata[names[0]]].append(names)

    def order(names: list[str]) -> str:
        return hashlib.sha256(f"{purpose} {names[0]}".encode()).hexdigest()

    ranked = []  # (position in its stratum as a part of 1, tie breaker, names)
    for members in by_stratum.values():
        members.sort(key=order)
        ranked += [((i + 0.5) / len(members), order(names), names) for i, names in enumerate(members)]
    wanted = min(max(1, round(share * len(strata))), len(strata) - 1)
    drawn: list[str] = []
    for _, _, names in sorted(ranked):
        if len(drawn) + len(names) <= wanted:
            drawn += names
    return sorted(drawn)


def _number(path: str) -> int:
    return int(re.search(r"(\d+)\.\w+$", path)[1])


def _last_fifth(strata: Mapping[str, str]) -> list[str]:
    """The highest numbers of each class, a fifth of them (at least one)."""
    by_class = defaultdict(list)
    for path, stratum in strata.items():
        by_class[stratum].append(path)
    return [p for paths in by_class.values() for p in sorted(paths, key=_number)[-max(1, round(len(paths) / 5)) :]]


def _board_list(folder: Path, name: str, remedy: str) -> list[str]:
    """Pictures of a list of DeepPCB: its lines say `group/board/NUMBER.jpg ...`, the files are NUMBER_test.jpg."""
    try:
        lines = (folder / "PCBData" / name).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{folder / 'PCBData' / name} cannot be read ({error}): {remedy}") from error
    return ["PCBData/" + line.split()[0].removesuffix(".jpg") + "_test.jpg" for line in lines if line.strip()]


# --------------------------------------------------------------------------------------------------------------- sets


@dataclass(frozen=True)
class _Set:
    """A named set and how it lies in its folder; `strata` matches its pictures, group 1 is the stratum."""

    folder: str  # below the data root
    label: str  # as printed in tables
    class_names: tuple[str, ...]
    strata: str
    read: Callable[[Path, Sequence[str]], Annotations]
    grey: bool = False  # read colour as grey


def _steel(folder: str, label: str) -> _Set:
    return _Set(folder, label, NEU_CLASSES, r"IMAGES/(.+)_\d+\.jpg", read_voc)


def _board(folder: str, label: str) -> _Set:
    """Grey, because one inspected picture of DeepPCB (44000020, in the test list) has its boxes painted in colour."""
    strata = r"PCBData/(group\d+)/\d+/\d+_test\.jpg"
    return _Set(folder, label, DEEP_PCB_CLASSES, strata, read_deep_pcb, grey=True)


SYNTHETIC = {"synthetic_steel": "synthetic steel", "synthetic_board": "synthetic boards"}  # name: label in tables
_SETS = {
    "neu_det": _steel("neu_det", "NEU-DET"),
    "neu_det_index": _steel("neu_det", "NEU-DET, index split"),
    "deep_pcb": _board("deep_pcb", "DeepPCB"),
    "pku_pcb": _Set("pku_pcb", "PKU-Market-PCB", PKU_CLASSES, r"images/(\w+)/[^/]+\.jpg", read_voc),
    "synthetic_steel": _steel("synthetic_steel", SYNTHETIC["synthetic_steel"]),
    "synthetic_board": _board("synthetic_board", SYNTHETIC["synthetic_board"]),
}


def ensure_synthetic(root: Path, name: str) -> store.Manifest:
    """Draw the stand-in "synthetic_steel" or "synthetic_board" into `root / name` unless this version is there."""
    from defectlab.data import synthetic_detection  # here, because drawing needs scipy and reading does not

    draw = {
        "synthetic_steel": synthetic_detection.write_steel,
        "synthetic_board": synthetic_detection.write_board,
    }[name]
    files = sorted(Path(synthetic_detection.__file__).parent.glob("synthetic*.py"))  # they share pieces
    drawing = b"".join(path.read_bytes() for path in files)
    code = hashlib.sha256(drawing).hexdigest()
    source = f"defectlab.data.synthetic_detection, seed 0, code {code[:12]}"
    return store.ensure_drawn(root / name, SYNTHETIC[name], source, draw)


@dataclass(frozen=True)
class _Plan:
    """A set before any picture is read: where it lies, its lists of names, and the fingerprint of both."""

    folder: Path
    label: str
    remedy: str
    splits: tuple[list[str], list[str], list[str]]  # train, dev, test
    fingerprint: str


def with_dev(
    strata: Mapping[str, str], test: Sequence[str], content: Mapping[str, str]
) -> tuple[list[str], list[str], list[str]]:
    """train, dev, test: all that is not in `test` is for training, a tenth of that is held out."""
    chosen = set(test)
    rest = {name: stratum for name, stratum in strata.items() if name not in chosen}
    dev = draw_split(rest, 0.1, "dev", content)
    return sorted(rest.keys() - set(dev)), dev, sorted(chosen)


def _identity(content: str, splits: Sequence[Sequence[str]]) -> str:
    identity = hashlib.sha256(f"{content} detection {SPLIT_VERSION}\n".encode())
    for names in splits:
        identity.update("".join(f"{name}\n" for name in names).encode() + b"\n")
    return identity.hexdigest()


def draw_test(dataset: str, strata: Mapping[str, str], content: Mapping[str, str]) -> list[str]:
    """Our test split of "neu_det" or "pku_pcb": a fifth, stratified by the class in the file's path."""
    return draw_split(strata, 0.2, f"{dataset} test", content)


def _plan(dataset: str, root: Path | None) -> _Plan:
    if dataset not in _SETS:
        raise DataError(f"there is no detection set {dataset!r}: choose one of {', '.join(_SETS)}")
    root = store.data_dir() if root is None else Path(root)
    chosen = _SETS[dataset]
    folder, label = root / chosen.folder, chosen.label
    if dataset in SYNTHETIC:
        manifest, remedy = ensure_synthetic(root, dataset), f"delete {folder} and load it again"
    else:
        remedy = f"run `python data_scripts/{chosen.folder}.py`"
        manifest = store.quick_check(folder, remedy)
    if manifest.note:
        label += f" ({manifest.note} copy)"

    matches = {path: re.fullmatch(chosen.strata, path) for path in manifest.files}
    strata = {path: match[1] for path, match in matches.items() if match}
    content = {path: sha256 for path, (_, sha256) in manifest.files.items()}
    if dataset == "neu_det":
        lines = NEU_TEST_LIST.read_text(encoding="utf-8").splitlines()
        test = [f"IMAGES/{line}" for line in lines if line and not line.startswith("#")]
    elif dataset == "neu_det_index":
        test = [path for path in strata if _number(path) > 240]
    elif dataset == "synthetic_steel":
        test = _last_fifth(strata)
    elif dataset == "pku_pcb":
        test = draw_test(dataset, strata, content)
    else:
        test = _board_list(folder, "test.txt", remedy)
        listed = set(test) | set(_board_list(folder, "trainval.txt", remedy))
        if listed != strata.keys():
            odd = sorted(listed ^ strata.keys())[0]
            raise DataError(f"{folder} and its lists differ in {odd}: delete {folder}, then {remedy}")
    unknown = sorted(set(test) - strata.keys())
    if unknown:
        raise DataError(f"the test list of {dataset} names {unknown[0]}, which {folder} does not hold: {remedy}")
    splits = with_dev(strata, test, content)
    return _Plan(folder, label, remedy, splits, _identity(manifest.fingerprint, splits))


def detection_fingerprint(dataset: str, root: Path | None = None) -> str:
    """sha256 over the content of a set, its three lists of names and SPLIT_VERSION.

    Taken from the manifest and the lists: no picture is read. Errors as `load_detection`.
    """
    return _plan(dataset, root).fingerprint


# ------------------------------------------------------------------------------------------------------------- loading


def load_detection(dataset: str, size: int, device="cpu", root: Path | None = None) -> DetectionData:
    """Read a set, whole, as tensors on `device`.

    `dataset`: "neu_det" (our test split, a fifth: splits/neu_det_test.txt), "neu_det_index" (test = numbers 241-300
    of each class), "deep_pcb" (the official lists), "pku_pcb" (our split, drawn by name), "synthetic_steel" or
    "synthetic_board" (drawn on first use). `size`: side of the square pictures in pixels. `root`: where data sets lie,
    by default `data_dir()`. Raises DataError naming the file and the remedy; ValueError for a size below 1.
    """
    plan, chosen = _plan(dataset, root), _SETS[dataset]
    annotations = chosen.read(plan.folder, chosen.class_names)
    fields = {"name": dataset, "label": plan.label, "fingerprint": plan.fingerprint}
    return to_data(annotations, plan.splits, plan.folder, size, device, plan.remedy, chosen.grey, **fields)


# ---------------------------------------------------------------------------------------------- a reader's own folder


_ROLES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def _role(path: Path, folder: Path) -> str | None:
    """train, val or test, where a folder in the path (for a json, also a word of its name) says so."""
    words = [part.lower() for part in path.relative_to(folder).parent.parts]
    if path.suffix == ".json":
        words += re.split(r"[^a-z]+", path.stem.lower())
    return next((_ROLES[word] for word in words if word in _ROLES), None)


def _read_own(folder: Path, format: str) -> tuple[Annotations, dict[str, str | None]]:
    """The annotations of a folder, and the role of each picture by its path in the folder."""
    if format in ("voc", "yolo"):
        annotations = (read_voc if format == "voc" else read_yolo)(folder)
        return annotations, {p.path.relative_to(folder).as_posix(): _role(p.path, folder) for p in annotations.pictures}
    if format != "coco":
        raise ValueError(f"format must be 'voc', 'yolo' or 'coco', got {format!r}")
    jsons = find_files(folder, {".json"})
    if not jsons:
        raise DataError(f"{folder} holds no json: give the folder that holds the COCO json and its pictures")
    jsons.sort(key=lambda path: _role(path, folder) != "train")  # the training json names the classes
    if len(jsons) > 1 and len({_role(path, folder) for path in jsons} - {None}) != len(jsons):
        raise DataError(
            f"{folder} holds {len(jsons)} json files: keep one, or one for each of train, val and test, named so"
        )
    class_names, pictures, roles = None, [], {}
    for path in jsons:
        role = _role(path, folder)
        places = [path.parent, folder / "images" / str(role), folder / str(role)]
        own = (p for p in places if p.is_dir() and any(f.suffix.lower() in PICTURES for f in p.iterdir()))
        annotations = read_coco(path, next(own, folder), class_names)
        class_names = annotations.class_names
        for picture in annotations.pictures:
            name = picture.path.relative_to(folder).as_posix()
            if name in roles:
                raise DataError(f"{path} lists {name}, which another json lists too: remove it from one")
            roles[name] = role
            pictures.append(picture)
    return Annotations(class_names, tuple(pictures)), roles


def load_folder(path: Path, format: str, size: int, device="cpu", test_share: float = 0.2) -> DetectionData:
    """A reader's own pictures and boxes as a set; `report` of the result says what was found.

    `format` "voc": pictures, and an xml of the same name for each, anywhere below `path`. "yolo": pictures below
    `images`, txt files below `labels`, class names in classes.txt or data.yaml. "coco": a json, or one for each of
    train, val and test; the pictures beside their json, in images/train or train, or else anywhere below `path`. See
    `read_voc`, `read_yolo`, `read_coco`.

    Folders named train, val (or valid) and test split the set, for COCO such a word in the json's name or folder. With
    train and one other, that other is the test split; with all three, val is dev. Without such names `test_share`
    (0 to 1) of the pictures is drawn for testing, stratified by the class that most boxes of a picture have. Where no
    dev is given, it is a tenth of the training pictures. `size`: side of the square pictures in pixels. Raises
    DataError naming the file and the remedy, also where there are fewer than 10 pictures, or no box to train or to
    test on; ValueError for another format, a size below 1 or a share outside 0 to 1.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must lie between 0 and 1, got {test_share}")
    folder = Path(path)
    annotations, roles = _read_own(folder, format)
    if len(roles) < 10:
        raise DataError(f"{folder} gives {len(roles)} pictures: three splits need at least 10")
    by_name = {picture.path.relative_to(folder).as_posix(): picture for picture in annotations.pictures}
    content = {name: pooch.file_hash(str(folder / name), "sha256") for name in by_name}
    strata = {
        name: str(np.bincount(picture.labels).argmax()) if len(picture.labels) else "none"
        for name, picture in by_name.items()
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
    for part, names in zip(("train", "dev", "test"), lists, strict=True):
        if not names or (part != "dev" and not any(len(by_name[name].labels) for name in names)):
            raise DataError(f"{folder}: the {len(names)} {part} pictures have no box: annotate or add some")
    identity = hashlib.sha256(" ".join(annotations.class_names).encode())
    for name, picture in sorted(by_name.items()):
        identity.update(f"{name} {content[name]}".encode() + picture.boxes.tobytes() + picture.labels.tobytes())
    fields = {"name": folder.name, "label": f"pictures of {folder.name}"}
    fields["fingerprint"] = _identity(identity.hexdigest(), lists)
    return to_data(annotations, lists, folder, size, device, **fields)
