"""Pictures and masks for stage one of the two-stage paper (Machines 2025, 13, 712, section 4.1): nut or defect.

The paper segments "the regions of the nuts", outlined by hand and not released, with numbers that look like small
targets. So both are here: "nut" by the recipe of `foreground`, "defect" by MVTec's own masks.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from defectlab.data import fetch as store
from defectlab.data.anomaly import SYNTHETIC_NUT, Plan, Sample, plan_of
from defectlab.data.foreground import RECIPE_VERSION, nut_mask
from defectlab.data.images import decode, resize_mask, to_square
from defectlab.data.splits import draw_split
from defectlab.files import DataError

METAL_NUT = "mvtec_ad/metal_nut"
PAPER_LIST = Path(__file__).parent / "splits" / "metal_nut_segmentation.txt"
TARGETS, SPLITS, PARTS = ("nut", "defect"), ("paper", "good"), ("train", "dev", "test")
LIST_HEADER = """\
# The 335 pictures of MVTec AD metal_nut as 268 train, 33 dev and 34 test, the sizes of Machines 2025, 13, 712,
# section 4.1, which gives no list: this one is ours. Drawn by defectlab.data.segmentation.draw_parts, stratified by
# type, in the order of the sha256 of "segmentation test NAME" and "segmentation dev NAME". A test draws it again.
"""


@dataclass(frozen=True)
class SegmentationSplit:
    """N pictures and their masks, as tensors on one device.

    `images` are resized as in `anomaly.AnomalySplit`; masks are made at the pictures' own size and then resized
    (nearest-exact). `names` are the files' paths in the set without the suffix, which the reduced copy of metal_nut has
    changed.
    """

    images: Tensor  # (N, 3, size, size) uint8
    masks: Tensor  # (N, size, size) uint8, 1 = target
    types: Tensor  # (N,) uint8, index into SegmentationData.type_names, 0 = "good"
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class SegmentationData:
    """A set, split three ways. `fingerprint` is what `segmentation_fingerprint` gives."""

    name: str  # as given to load_segmentation
    label: str  # as printed in tables
    target: str  # "nut" or "defect"
    type_names: tuple[str, ...]  # "good" first
    train: SegmentationSplit
    dev: SegmentationSplit
    test: SegmentationSplit
    fingerprint: str


# --- Splits ----------------------------------------------------------------------------------------------------------


def draw_parts(types: Mapping[str, str], content: Mapping[str, str]) -> dict[str, str]:
    """Name -> "train", "dev" or "test", 80/10/10 in the proportions of the types (see `detection.draw_split`).

    `types`: name to type. `content`: name to a hash of the picture's bytes; equal pictures get the same part.
    """
    test = set(draw_split(types, 0.1, "segmentation test", content))
    rest = {name: kind for name, kind in types.items() if name not in test}
    dev = set(draw_split(rest, 1 / 9, "segmentation dev", content))
    return {name: "test" if name in test else "dev" if name in dev else "train" for name in sorted(types)}


def list_of_parts(parts: Mapping[str, str]) -> str:
    """The content of PAPER_LIST: "name part" a line."""
    return LIST_HEADER + "".join(f"{name} {part}\n" for name, part in sorted(parts.items()))


def _read_list(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split() for line in lines if not line.startswith("#"))


def _name(sample: Sample) -> str:
    return PurePosixPath(sample.path).with_suffix("").as_posix()


def _split(dataset: str, target: str, split: str, root: Path | None) -> tuple[Plan, dict[str, list[Sample]], str]:
    """The set, its samples by part, and the fingerprint; no picture is read."""
    if dataset not in (METAL_NUT, SYNTHETIC_NUT):
        raise DataError(f"there is no segmentation set {dataset!r}: choose {METAL_NUT} or {SYNTHETIC_NUT}")
    for name, value, choices in (("target", target, TARGETS), ("split", split, SPLITS)):
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")
    if (target, split) == ("defect", "good"):
        raise ValueError("good pictures have no defect to learn from: use target nut, or split paper")

    plan = plan_of(dataset, root)
    manifest = store.read_manifest(plan.folder, plan.remedy)
    held_out = [sample for sample in plan.dev if sample.pasted is None]
    if split == "good":  # ours, for the two stages: nothing of the anomaly test set, and no defect, is ever learnt from
        by_part = dict(zip(PARTS, (plan.train, held_out, plan.test), strict=True))
    else:
        samples = {_name(sample): sample for sample in sorted([*plan.train, *held_out, *plan.test], key=_name)}
        if dataset == METAL_NUT:
            parts = _read_list(PAPER_LIST)
        else:
            types = {name: sample.type for name, sample in samples.items()}
            parts = draw_parts(types, {name: manifest.files[sample.path][1] for name, sample in samples.items()})
        if odd := sorted(parts.keys() ^ samples.keys()):
            raise DataError(
                f"{plan.folder} and {PAPER_LIST.name} differ in {odd[0]}: delete {plan.folder}, then {plan.remedy}"
            )
        by_part = {part: [sample for name, sample in samples.items() if parts[name] == part] for part in PARTS}

    masks = f"nut {RECIPE_VERSION}" if target == "nut" else "defect"
    identity = hashlib.sha256(f"{manifest.fingerprint} {masks}\n".encode())
    for part in PARTS:
        identity.update("".join(f"{sample.path}\n" for sample in by_part[part]).encode() + b"\n")
    return plan, by_part, identity.hexdigest()


def subset(split: SegmentationSplit, share: float, seed: int) -> SegmentationSplit:
    """A share of the pictures (paper section 4.1.2, Table 6: "randomly constructed"), drawn by the seed.

    Ours: in the proportions of the types, and for one seed a smaller share lies in a larger one. 0 < share <= 1;
    ValueError for another share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    if share == 1:
        return split
    types = dict(zip(split.names, map(str, split.types.tolist()), strict=True))
    drawn = set(draw_split(types, share, f"subset {seed}", content={name: name for name in types}))
    chosen = [index for index, name in enumerate(split.names) if name in drawn]
    index = torch.tensor(chosen, device=split.images.device)
    names = tuple(split.names[i] for i in chosen)
    return SegmentationSplit(split.images[index], split.masks[index], split.types[index], names)


# --- Loading ---------------------------------------------------------------------------------------------------------


def segmentation_fingerprint(dataset: str, target: str, split: str, root: Path | None = None) -> str:
    """sha256 over the set's content, the three lists, the target and the recipe's version; no picture is read.

    Arguments and errors as `load_segmentation`.
    """
    return _split(dataset, target, split, root)[2]


def load_segmentation(
    dataset: str, target: str, split: str, size: int, device="cpu", root: Path | None = None
) -> SegmentationData:
    """Read a set, whole, as tensors on `device`.

    `dataset`: "mvtec_ad/metal_nut" or "synthetic_nut" (drawn on first use). `target`: "nut", by `foreground.nut_mask`,
    or "defect", MVTec's masks, empty for good pictures. `split`: "paper", all pictures as 80/10/10 per cent (for
    metal_nut 268/33/34 as in section 4.1, by a list of ours), or "good", trained on the good training pictures less
    the tenth that is the normal half of `load_anomaly`'s dev, which is dev here, and tested on the whole test folder.
    `size`: side of pictures and masks in pixels. `root`: where data sets lie, by default `data_dir()`.

    Raises DataError naming the file and the remedy; ValueError for an unknown target or split, for target "defect" with
    split "good", and for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    plan, by_part, fingerprint = _split(dataset, target, split, root)
    type_names = tuple(name for name in plan.type_names if name != "pasted")
    parts = [_read_part(plan, by_part[part], target, type_names, size, device) for part in PARTS]
    return SegmentationData(dataset, plan.label, target, type_names, *parts, fingerprint)


def _read_part(
    plan: Plan, samples: list[Sample], target: str, type_names: tuple[str, ...], size: int, device
) -> SegmentationSplit:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding and most of the recipe leave the GIL
        read = list(pool.map(lambda sample: _read_sample(plan, sample, target, size), samples))
    images, masks = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*read, strict=True))
    types = torch.tensor([type_names.index(sample.type) for sample in samples], dtype=torch.uint8)
    names = tuple(_name(sample) for sample in samples)
    return SegmentationSplit(images.to(device), masks.to(device), types.to(device), names)


def _read_sample(plan: Plan, sample: Sample, target: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(3, size, size) uint8, (size, size) uint8."""
    path = plan.folder / sample.path
    image = decode(path, plan.remedy).convert("RGB")
    if target == "nut":
        try:
            mask = nut_mask(np.asarray(image))
        except ValueError as error:
            raise DataError(f"{path}: {error}: {plan.remedy}") from error
    elif sample.mask is None:
        mask = np.zeros((image.height, image.width), bool)
    else:
        grey = decode(plan.folder / sample.mask, plan.remedy).convert("L")
        if grey.size != image.size:
            raise DataError(f"{plan.folder / sample.mask} is not as large as its image {sample.path}: {plan.remedy}")
        mask = np.asarray(grey) > 127
    return to_square(image, size), resize_mask(mask, size)
