"""Images with one class each, as tensors on one device: steel (NEU-DET, six classes) and solar cells (ELPV, two).

An image of steel has the class of its boxes; where these are of several classes, it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from defectlab.data import cells
from defectlab.data.cells import cells_fingerprint, load_cells
from defectlab.data.detection import DetectionSplit, detection_fingerprint, load_detection
from defectlab.data.splits import SAMPLE, Named, identity

STEEL = ("neu_det", "synthetic_steel")
RULE = "one class an image"  # of a fingerprint


@dataclass(frozen=True)
class PictureSplit(Named):
    images: Tensor  # (N, 1, S, S) uint8
    labels: Tensor  # (N,) int64, index in the class names
    names: tuple[str, ...]


@dataclass(frozen=True)
class PictureData:
    name: str  # as given to load_pictures
    label: str  # as printed in tables
    class_names: tuple[str, ...]
    train: PictureSplit
    dev: PictureSplit
    test: PictureSplit
    fingerprint: str


def is_steel(name: str) -> bool:
    return name.removeprefix(SAMPLE) in STEEL


def pictures_fingerprint(name: str, root: Path | None = None) -> str:
    """sha256 over the content of the set, its split and the rule of the classes; no image is read."""
    if is_steel(name):
        return identity(RULE, [[detection_fingerprint(name, root)]])
    return cells_fingerprint(name, root=root)


def load_pictures(name: str, size: int, device="cpu", root: Path | None = None) -> PictureData:
    """Read a set, whole, as grey images of `size` x `size` px on `device`.

    `name`: "neu_det", "elpv" (split in blocks), "synthetic_steel" or "synthetic_cell"; "sample/" before the name of a
    real one: its committed sample. Raises DataError naming the file and the remedy, ValueError for a size below 1.
    """
    if not is_steel(name):
        data = load_cells(name, size, device=device, root=root)
        parts = (PictureSplit(part.images, part.labels, part.names) for part in (data.train, data.dev, data.test))
        return PictureData(name, data.label, cells.CLASSES, *parts, fingerprint=data.fingerprint)
    found = load_detection(name, size, device, root)
    parts = (_of_one_class(part) for part in (found.train, found.dev, found.test))
    return PictureData(name, found.label, found.class_names, *parts, fingerprint=pictures_fingerprint(name, root))


def _of_one_class(split: DetectionSplit) -> PictureSplit:
    """The images whose boxes have all the same class."""
    there = split.labels >= 0
    highest = split.labels.amax(1)
    lowest = torch.where(there, split.labels, highest[:, None]).amin(1)
    kept = (there.any(1) & (lowest == highest)).nonzero()[:, 0]
    return PictureSplit(split.images[kept], highest[kept], tuple(split.names[i] for i in kept.tolist()))
