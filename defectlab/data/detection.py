"""The detection sets, whole, as tensors on one device: NEU-DET, DeepPCB and the synthetic ones.

`test` is the official split where there is one. `dev`, where design choices are made, is a tenth of the training
images. Images that are byte for byte the same stand on one side.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from defectlab.data.annotations import DUPLICATES, AnnotatedImage, Annotations, read_deep_pcb, read_voc
from defectlab.data.images import check_size, decode, in_threads, letterbox
from defectlab.data.splits import (
    PARTS,
    SAMPLE,
    Named,
    Plan,
    detection_identity,
    draw_split,
    last_fifth,
    locate,
    number_of,
    read_list,
    set_and_root,
    with_dev,
)
from defectlab.data.synthetic import SYNTHETIC
from defectlab.data.synthetic.boards import BOARD_KINDS
from defectlab.data.synthetic.steel import STEEL_KINDS
from defectlab.files import DataError

NEU_CLASSES = STEEL_KINDS
DEEP_PCB_CLASSES = BOARD_KINDS  # types 1 to 6 of its txt files
NEU_TEST_LIST = Path(__file__).parent / "splits" / "neu_det_test.txt"


@dataclass(frozen=True)
class DetectionSplit(Named):
    """N images, each scaled to fit S x S pixels and centred on grey 114, with their boxes."""

    images: Tensor  # (N, C, S, S) uint8; C = 1 where every image of the set is grey (R = G = B), else 3
    boxes: Tensor  # (N, M, 4) float32, x1 y1 x2 y2 in pixels of the S x S image, zeros where padded
    labels: Tensor  # (N, M) int64, index into DetectionData.class_names, -1 where padded; M >= 1, most boxes in one
    names: list[str]  # N, the image's path in the set
    sizes: Tensor  # (N, 2) int64 on the CPU, height and width of the original
    scale: Tensor  # (N,) float32 on the CPU: scaled = original * scale + offset
    offset: Tensor  # (N, 2) float32 on the CPU, x and y in pixels of the S x S image

    def ground_truth(self) -> list[dict[str, Tensor]]:
        """Per image {"boxes": (n, 4) float32 x1 y1 x2 y2 in pixels of the original, "labels": (n,) int64}, CPU."""
        boxes, labels = self.boxes.cpu().double(), self.labels.cpu()
        original = (boxes - self.offset.repeat(1, 2)[:, None]) / self.scale[:, None, None].double()  # (N, M, 4)
        limits = self.sizes.flip(1).repeat(1, 2)[:, None]  # (N, 1, 4): width, height, width, height
        original = original.clamp(min=0).minimum(limits).float()
        return [
            {"boxes": box[label >= 0], "labels": label[label >= 0]} for box, label in zip(original, labels, strict=True)
        ]


@dataclass(frozen=True)
class DetectionData:
    """A set as the notebooks use it. `report`: what the reader found, as printed."""

    name: str  # as given to load_detection
    label: str  # as printed in tables
    class_names: tuple[str, ...]
    train: DetectionSplit
    dev: DetectionSplit
    test: DetectionSplit
    fingerprint: str = ""  # see `detection_fingerprint`
    report: str = ""


# ---------------------------------------------------------------------------------------------------------------- sets


def _steel_list(plan: Plan, strata: Mapping[str, str]) -> list[str]:
    return plan.held([f"IMAGES/{line}" for line in read_list(NEU_TEST_LIST)], strata)


def _board_lists(plan: Plan, strata: Mapping[str, str]) -> list[str]:
    """DeepPCB's own: a line of its lists says `group/board/NUMBER.jpg ...`, the file is NUMBER_test.jpg."""
    test, training = (
        ["PCBData/" + line.split()[0].removesuffix(".jpg") + "_test.jpg" for line in read_list(plan.folder / name)]
        for name in ("PCBData/test.txt", "PCBData/trainval.txt")
    )
    if odd := sorted({*test, *training} ^ strata.keys()):
        raise DataError(f"{plan.folder} and its lists differ in {odd[0]}: delete {plan.folder}, then {plan.remedy}")
    return test


@dataclass(frozen=True)
class _Set:
    """A named set: how it lies in its folder, and which images are for testing."""

    folder: str  # below the data root
    label: str  # as printed in tables
    class_names: tuple[str, ...]
    strata: str  # matches its images; group 1 is the stratum
    read: Callable[[Path, Sequence[str]], Annotations]
    test: Callable[[Plan, Mapping[str, str]], list[str]]  # (plan, image -> stratum) -> images
    planes: str = "colour"  # what an image is read as, see `_read_image`


def _steel(folder: str, label: str, test: Callable) -> _Set:
    return _Set(folder, label, NEU_CLASSES, r"IMAGES/(.+)_\d+\.jpg", read_voc, test)


def _board(folder: str, label: str, planes: str = "grey") -> _Set:
    """Grey, because one inspected image of DeepPCB (44000020, in the test list) has its boxes painted in colour."""
    strata = r"PCBData/(group\d+)/\d+/\d+_test\.jpg"
    return _Set(folder, label, DEEP_PCB_CLASSES, strata, read_deep_pcb, _board_lists, planes)


_SETS = {
    "neu_det": _steel("neu_det", "NEU-DET", _steel_list),
    "neu_det_index": _steel("neu_det", "NEU-DET, index split", lambda _, of: [p for p in of if number_of(p) > 240]),
    "deep_pcb": _board("deep_pcb", "DeepPCB"),
    "deep_pcb_pair": _board("deep_pcb", "DeepPCB with its templates", "pair"),
    "synthetic_steel": _steel("synthetic_steel", SYNTHETIC["synthetic_steel"].label, lambda _, of: last_fifth(of)),
    "synthetic_board": _board("synthetic_board", SYNTHETIC["synthetic_board"].label),
    "synthetic_board_pair": _board("synthetic_board", SYNTHETIC["synthetic_board"].label + " with templates", "pair"),
}


def draw_test(strata: Mapping[str, str], content: Mapping[str, str]) -> list[str]:
    """Our test split of NEU-DET: a fifth, stratified by the class in the file's name."""
    return draw_split(strata, 0.2, "neu_det test", content)


def _plan(dataset: str, root: Path | None) -> Plan:
    dataset, root = set_and_root(dataset, root)
    if dataset not in _SETS:
        raise DataError(f"there is no detection set {dataset!r}: choose one of {', '.join(_SETS)}")
    chosen = _SETS[dataset]
    where = " --archive FILE" if chosen.folder == "neu_det" else ""  # no address that a script may fetch
    plan = locate(chosen.folder, chosen.label, f"{chosen.folder}.py{where}", root)
    files = plan.manifest.files
    matches = {path: re.fullmatch(chosen.strata, path) for path in files}
    strata = {path: match[1] for path, match in matches.items() if match}
    test = chosen.test(plan, strata)
    if unknown := sorted(set(test) - strata.keys()):
        raise DataError(
            f"the test list of {dataset} names {unknown[0]}, which {plan.folder} does not hold: {plan.remedy}"
        )
    parts = with_dev(strata, test, {path: sha256 for path, (_, sha256) in files.items()})
    fingerprint = detection_identity(plan.manifest.fingerprint, parts)
    return replace(plan, parts=dict(zip(PARTS, parts, strict=True)), fingerprint=fingerprint)


def detection_fingerprint(dataset: str, root: Path | None = None) -> str:
    """sha256 over the content of a set, its three lists of names and the rules of the split; no image is read."""
    return _plan(dataset, root).fingerprint


# ------------------------------------------------------------------------------------------------------------- loading


def load_detection(dataset: str, size: int, device="cpu", root: Path | None = None) -> DetectionData:
    """Read a set, whole, as tensors on `device`.

    `dataset`: "neu_det" (our test split, a fifth: splits/neu_det_test.txt), "neu_det_index" (test = numbers 241-300
    of each class), "deep_pcb" (the official lists), "synthetic_steel" or "synthetic_board"; "sample/" before the
    name of a real one: its committed sample; "_pair" after that of boards: three planes, the inspected image, its
    template and how much they differ. `size`: side of the square images in pixels. `root`: where data sets lie,
    by default `data_dir()`. Raises DataError naming the file and the remedy; ValueError for a size below 1.
    """
    plan, chosen = _plan(dataset, root), _SETS[dataset.removeprefix(SAMPLE)]
    annotations = chosen.read(plan.folder, chosen.class_names)
    return to_data(dataset, plan, annotations, size, device, chosen.planes)


def load_images(dataset: str, part: str, size: int, device="cpu", root: Path | None = None) -> Tensor:
    """The images of one part alone: as `load_detection`'s, in its order, without boxes."""
    check_size(size)
    plan, planes = _plan(dataset, root), _SETS[dataset.removeprefix(SAMPLE)].planes
    read = in_threads(partial(_read_image, size=size, remedy=plan.remedy, planes=planes), _paths(plan, part))
    return _stacked([pixels for pixels, _, _ in read], device)


def _paths(plan: Plan, part: str) -> list[Path]:
    return [plan.folder / name for name in plan.parts[part]]


def _read_image(path: Path, size: int, remedy: str, planes: str) -> tuple[np.ndarray, float, tuple[float, float]]:
    """`planes`: "colour"; "grey"; "pair": an inspected board, its template, and the difference of the two, in grey."""
    image = decode(path, remedy)
    if planes != "colour":
        image = image.convert("L")
    if planes == "pair":
        template = decode(path.with_name(path.name.replace("_test.", "_temp.")), remedy).convert("L")
        if template.size != image.size:
            raise DataError(f"{path} and its template differ in size, {image.size} and {template.size}: {remedy}")
        image = Image.merge("RGB", (image, template, ImageChops.difference(image, template)))
    return letterbox(image, size)


def _stacked(images: Sequence[np.ndarray], device, channels: int | None = None) -> Tensor:
    """(N, C, S, S) uint8; a grey image among colour ones fills all channels."""
    channels = channels or max(len(pixels) for pixels in images)
    full = [np.broadcast_to(pixels, (channels, *pixels.shape[1:])) for pixels in images]
    return torch.from_numpy(np.stack(full)).to(device)


def to_data(
    name: str, plan: Plan, annotations: Annotations, size: int, device="cpu", planes: str = "colour"
) -> DetectionData:
    """Decode the images that `plan.parts` names by their paths in `plan.folder`, and scale their boxes.

    `name`: of the result. Others, and errors, as `load_detection`. `planes`: what an image is read as.
    """
    check_size(size)
    by_path = {image.path: image for image in annotations.images}
    groups = {part: [by_path[path] for path in _paths(plan, part)] for part in PARTS}
    one = partial(_read_image, size=size, remedy=plan.remedy, planes=planes)
    read = {part: in_threads(one, _paths(plan, part)) for part in PARTS}
    channels = max(len(pixels) for part in PARTS for pixels, _, _ in read[part])
    splits = {part: _to_split(groups[part], read[part], plan.parts[part], channels, device) for part in PARTS}
    report = _describe(annotations, list(groups.values()))
    return DetectionData(
        name, plan.label, annotations.class_names, **splits, fingerprint=plan.fingerprint, report=report
    )


def _to_split(
    images: Sequence[AnnotatedImage], read: Sequence[tuple], names: Sequence[str], channels: int, device
) -> DetectionSplit:
    most = max(1, *(len(image.labels) for image in images))
    boxes, labels = np.zeros((len(images), most, 4)), np.full((len(images), most), -1)
    for index, (image, (_, scale, offset)) in enumerate(zip(images, read, strict=True)):
        count = len(image.labels)
        boxes[index, :count] = image.boxes * scale + np.tile(offset, 2)
        labels[index, :count] = image.labels
    return DetectionSplit(
        _stacked([pixels for pixels, _, _ in read], device, channels),
        torch.from_numpy(boxes).float().to(device),
        torch.from_numpy(labels).to(device),
        list(names),
        torch.tensor([(image.height, image.width) for image in images]),
        torch.tensor([scale for _, scale, _ in read]),
        torch.tensor([offset for _, _, offset in read]),
    )


def _script(letter: str) -> str:
    """LATIN, CYRILLIC, CJK, ...: the first word of a letter's name."""
    return unicodedata.name(letter, "?").split()[0]


def _describe(annotations: Annotations, groups: Sequence[Sequence[AnnotatedImage]]) -> str:
    """Counts of what was found: images, boxes of each class in train / dev / test, dropped duplicates."""
    counts = [Counter(int(label) for image in group for label in image.labels) for group in groups]
    lines = [f"images: {' / '.join(str(len(group)) for group in groups)} (train / dev / test)"]
    for index, name in enumerate(annotations.class_names):
        lines.append(f"{name}: {' / '.join(str(count[index]) for count in counts)} boxes")
    empty = sum(not len(image.labels) for group in groups for image in group)
    notes = {note: count for note, count in annotations.notes.items() if count or note == DUPLICATES}
    lines += [f"images without an object: {empty}", *(f"{note}: {count}" for note, count in notes.items())]
    by_lower = defaultdict(list)
    for name in annotations.class_names:
        by_lower[name.casefold()].append(name)
    alike = [", ".join(names) for names in by_lower.values() if len(names) > 1]
    lines += [f"warning: {names} differ in case only, is it one class?" for names in alike]
    mixed = [name for name in annotations.class_names if len({_script(c) for c in name if c.isalpha()}) > 1]
    lines += [f"warning: the class {name} mixes letters of several scripts, which may look alike" for name in mixed]
    return "\n".join(lines)
