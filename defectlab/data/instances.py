"""Instances with masks: NEU-Seg and a synthetic set, whole, as tensors on one device.

A mask gives each pixel a class. An instance is a connected component (8 neighbours) of one class; components of fewer
than `SPECK` pixels are specks of the outlining and no instances. In NEU-Seg (masks of 200 x 200 px) these are 371 of
13,339 components (293 are single pixels) and 0.005 % of the marked area.

NEU-Seg as published tests on images of its own training part. By data_scripts/neu_seg.py its 4,470 images are
1,132 different ones, nearly all of them four times: by quarter turns, stored as JPEG anew. For 810 of the 840 test
images the training part holds the three other turns, for 570 of them with the very same mask. So "neu_seg" (ours)
takes every training image out that shows a test image: 1,180 of 3,630 remain, 295 images by four turns, one class
in each. "neu_seg_published" keeps them all, for comparison with papers. What is known and left: 240 test images were
joined from two others with a blended seam, and 15 of them repeat a fifth or more of a remaining training image (28 look
like one to `leaks.near_duplicates`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from defectlab.data.annotations import AnnotatedImage, Annotations
from defectlab.data.augment import Batch
from defectlab.data.detection import DetectionData, DetectionSplit, to_data
from defectlab.data.images import decode, in_threads, letterbox_maps
from defectlab.data.splits import PARTS, Plan, content_id, identity, locate, read_list, set_and_root, with_dev
from defectlab.data.synthetic import SYNTHETIC
from defectlab.data.synthetic.steel import MASKED_KINDS
from defectlab.files import DataError
from defectlab.geometry import enclose, warp_maps

CLASSES = MASKED_KINDS  # mask values 1, 2, 3; the names are those of the literature
SPECK = 16  # ours: px of the original; a smaller component is no instance
NEU_SEG, SYNTHETIC_MASKS = "neu_seg", "synthetic_steel_masks"
LABELS = {  # name: label in tables
    NEU_SEG: "NEU-Seg, test images out of training",
    "neu_seg_published": "NEU-Seg, as published",
    SYNTHETIC_MASKS: SYNTHETIC[SYNTHETIC_MASKS].label,
}
# sha256 of the decoded pixels of NEU-Seg, file after file by path: JPEG files can be stored anew without loss.
NEU_SEG_PIXELS = {
    "annotations": "f3dc746a54f21526074f75e7d09f10fa9a33e2eedf33c5f2111a23460aa9ad82",
    "images": "1ea6d82652da7115cd6fcb99599441fd1c777ba773c0b86165acabc626b3f3f6",
}
TURNS_LIST = Path(__file__).parent / "splits" / "neu_seg_turns.txt"
INSTANCES = "379610ebd6a97d37"  # digest of what `instances` and `letterbox_maps` give; see `splits.content_id`


@dataclass(frozen=True)
class InstanceSplit(DetectionSplit):
    """A detection split, its boxes tight around instances, and their masks as maps of numbers.

    Number k + 1 is box k of the image, 0 is background. `maps` are sampled to S x S at the pixels' centres (nearest),
    so a very small instance can be without a pixel there; `original_maps` never.
    """

    maps: Tensor  # (N, S, S) uint8, on the device
    original_maps: Tensor  # (N, H, W) uint8 on the CPU, at the size of the original

    def masks(self, index: int) -> Tensor:
        """(n, H, W) bool: the masks of image `index`, in the order of its boxes."""
        count = int((self.labels[index] >= 0).sum())
        return self.original_maps[index] == torch.arange(1, count + 1)[:, None, None]


@dataclass(frozen=True)
class InstanceData(DetectionData):
    train: InstanceSplit
    dev: InstanceSplit
    test: InstanceSplit


# ---------------------------------------------------------------------------------------------------------- instances


def instances(mask: np.ndarray, classes: int = len(CLASSES)) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Connected components of each class (8 neighbours) of at least `SPECK` pixels.

    mask (H, W) uint8, 0 background, 1..classes -> boxes (n, 4) float32 x1 y1 x2 y2 in pixels, tight; labels (n,) int64
    from 0; map (H, W) uint8 of the numbers 1..n; and how many specks were left out. Ordered by class, then by the first
    pixel, row by row. ValueError for a value above `classes` or more than 255 instances.
    """
    if mask.max(initial=0) > classes:
        raise ValueError(f"value {mask.max()} is none of 0 (background) to {classes}")
    boxes, labels, specks = [], [], 0
    numbers = np.zeros(mask.shape, np.uint8)
    for value in np.unique(mask[mask > 0]):
        parts, _ = ndimage.label(mask == value, np.ones((3, 3)))
        sizes = np.bincount(parts.ravel())
        for part, (rows, columns) in enumerate(ndimage.find_objects(parts), 1):
            if sizes[part] < SPECK:
                specks += 1
                continue
            if len(boxes) == 255:
                raise ValueError("there are more than 255 instances")
            boxes.append((columns.start, rows.start, columns.stop, rows.stop))
            labels.append(value - 1)
            numbers[rows, columns][parts[rows, columns] == part] = len(boxes)
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), numbers, specks


# ------------------------------------------------------------------------------------------------------------- splits


def _neu_seg_splits(dataset: str, held: Callable[[list[str]], list[str]] = list) -> tuple[list[str], ...]:
    """train, dev, test by the committed list; `held`: which of the names in a line are there."""
    strata, content, shown = {}, {}, set()
    for classes, *members in map(str.split, read_list(TURNS_LIST)):
        names = held([f"images/{member}.jpg" for member in members])
        strata |= dict.fromkeys(names, classes)
        content |= dict.fromkeys(names, members[0])
        if any(name.startswith("images/test/") for name in names):
            shown |= set(names)
    test = sorted(name for name in strata if name.startswith("images/test/"))
    out = shown if dataset == NEU_SEG else set(test)
    return with_dev({name: strata[name] for name in strata.keys() - out}, test, content)


def _plan(dataset: str, root: Path | None) -> Plan:
    dataset, root = set_and_root(dataset, root)
    if dataset not in LABELS:
        raise DataError(f"there is no set with masks called {dataset!r}: choose one of {', '.join(LABELS)}")
    folder = NEU_SEG if dataset.startswith(NEU_SEG) else dataset
    plan = locate(folder, LABELS[dataset], f"{folder}.py --archive FILE", root)
    files, content = plan.manifest.files, plan.manifest.fingerprint
    if folder == NEU_SEG:
        parts = _neu_seg_splits(dataset, partial(plan.held, present=files))
        content = f"{sorted(NEU_SEG_PIXELS.items())} {content if plan.manifest.note else ''}"  # another copy's bytes
    else:
        names = [path for path in files if path.startswith("images/")]
        test = sorted(name for name in names if name.startswith("images/test/"))
        strata = {name: Path(name).stem.rpartition("_")[0] for name in names}
        parts = with_dev(strata, test, {name: files[name][1] for name in names})
    if missing := sorted({name for names in parts for name in names} - files.keys()):
        raise DataError(f"{plan.folder / missing[0]} is missing: {plan.remedy}")
    fingerprint = identity(f"{content} instances {content_id(INSTANCES)}", parts)
    return replace(plan, parts=dict(zip(PARTS, parts, strict=True)), fingerprint=fingerprint)


def instance_fingerprint(dataset: str, root: Path | None = None) -> str:
    """sha256 over the content of a set, its three lists and the rule of instances; no image is read."""
    return _plan(dataset, root).fingerprint


# ------------------------------------------------------------------------------------------------------------ loading


def _read_mask(name: str, plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """What `instances` gives for the mask of an image of the set."""
    path = plan.folder / name.replace("images/", "annotations/").replace(".jpg", ".png")
    try:
        return instances(np.asarray(decode(path, plan.remedy).convert("L")))
    except ValueError as error:
        raise DataError(f"{path}: {error}: {plan.remedy}") from error


def load_instances(dataset: str, size: int, device="cpu", root: Path | None = None) -> InstanceData:
    """Read a set, whole, as tensors on `device`.

    `dataset`: "neu_seg" (the official test part; ours: its images taken out of the training part, see above),
    "neu_seg_published" (both parts as published), "sample/" and one of these (the committed sample), or
    "synthetic_steel_masks". `dev` is a tenth of the training images, all turns of an image on one side. `size`, `root`
    and errors as `detection.load_detection`.
    """
    plan = _plan(dataset, root)
    names = [name for part in plan.parts.values() for name in part]
    read = dict(zip(names, in_threads(partial(_read_mask, plan=plan), names), strict=True))
    shapes = {numbers.shape for _, _, numbers, _ in read.values()}
    if len(shapes) > 1:
        raise DataError(f"{plan.folder} holds masks of different sizes {sorted(shapes)}: {plan.remedy}")
    height, width = shapes.pop()
    images = tuple(
        AnnotatedImage(plan.folder / name, width, height, boxes, labels) for name, (boxes, labels, _, _) in read.items()
    )
    data = to_data(dataset, plan, Annotations(CLASSES, images), size, device, planes="grey")
    report = f"{data.report}\nspecks left out (under {SPECK} px): {sum(specks for *_, specks in read.values())}"
    splits = {part: _with_maps(getattr(data, part), read, size) for part in PARTS}
    return InstanceData(**vars(data) | splits | {"report": report})


def _with_maps(split: DetectionSplit, read: Mapping[str, tuple], size: int) -> InstanceSplit:
    original = torch.from_numpy(np.stack([read[name][2] for name in split.names]))  # (N, H, W)
    maps = letterbox_maps(original, size).to(split.images.device)
    return InstanceSplit(**vars(split), maps=maps, original_maps=original)


def move_instances(split: InstanceSplit, batch: Batch) -> Tensor:
    """(B, S, S) int64: the split's instances as they lie in an augmented batch; k + 1 is where box k of the batch is.

    A box of the batch is recognised as the moved box of its class that it equals, so of two that are clipped to the
    very same box both get the first one's number. For batches of whole images: no mosaic.
    """
    index, matrices, size = batch.sources[:, 0], batch.matrices[:, 0], split.maps.shape[-1]
    labels = split.labels[index]  # (B, N)
    moved = enclose(split.boxes[index], matrices).clamp(0, size)  # (B, N, 4)
    distance = (batch.boxes[:, :, None] - moved[:, None]).abs().amax(-1)  # (B, T, N)
    own = distance.masked_fill(batch.labels[:, :, None] != labels[:, None], torch.inf).argmin(-1)  # (B, T)

    numbers = torch.arange(1, own.shape[1] + 1, device=own.device).expand_as(own)
    present = batch.labels >= 0
    renumbered = own.new_zeros(len(own), labels.shape[1] + 1)  # old number -> new number, 0 for what was dropped
    renumbered.scatter_reduce_(1, torch.where(present, own + 1, 0), numbers * present, "amax")
    renumbered[:, 0] = 0
    maps = warp_maps(split.maps[index], matrices, size)
    return renumbered.gather(1, maps.flatten(1).long()).view(maps.shape)
