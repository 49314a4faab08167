"""The detection sets, whole, as tensors on one device: NEU-DET, DeepPCB, PKU-Market-PCB, and the drawn stand-ins.

Every set has three splits. `test` is the official one where there is one. `dev`, where design choices are made, is a
tenth of the training pictures. Splits depend on the names of the files alone, never on a seed of a run, and pictures
that are byte for byte the same stand on one side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from defectlab.data import fetch as store
from defectlab.data.annotations import Annotations, read_deep_pcb, read_voc
from defectlab.data.boxes import DetectionData, to_data
from defectlab.data.splits import _last_fifth, _number, draw_split, split_identity, with_dev
from defectlab.files import DataError, data_dir

NEU_CLASSES = ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")
DEEP_PCB_CLASSES = ("open", "short", "mousebite", "spur", "copper", "pin-hole")  # types 1 to 6 of its txt files
PKU_CLASSES = ("missing_hole", "mouse_bite", "open_circuit", "short", "spur", "spurious_copper")
NEU_TEST_LIST = Path(__file__).parent / "splits" / "neu_det_test.txt"


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
    from defectlab.data.synthetic import (
        steel as synthetic_detection,  # here, because drawing needs scipy and reading does not
    )

    draw = {
        "synthetic_steel": synthetic_detection.write_steel,
        "synthetic_board": synthetic_detection.write_board,
    }[name]
    code = store.code_digest(Path(synthetic_detection.__file__).parent)
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


def draw_test(dataset: str, strata: Mapping[str, str], content: Mapping[str, str]) -> list[str]:
    """Our test split of "neu_det" or "pku_pcb": a fifth, stratified by the class in the file's path."""
    return draw_split(strata, 0.2, f"{dataset} test", content)


def _plan(dataset: str, root: Path | None) -> _Plan:
    if dataset not in _SETS:
        raise DataError(f"there is no detection set {dataset!r}: choose one of {', '.join(_SETS)}")
    root = data_dir() if root is None else Path(root)
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
    return _Plan(folder, label, remedy, splits, split_identity(manifest.fingerprint, splits))


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
