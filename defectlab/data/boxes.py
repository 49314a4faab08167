"""Pictures with boxes as tensors on one device: what every detection set becomes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from defectlab.data.annotations import Annotations, Picture, decode
from defectlab.data.images import letterbox


@dataclass(frozen=True)
class DetectionSplit:
    """N pictures, each scaled to fit S x S pixels and centred on grey 114, with their boxes."""

    images: Tensor  # (N, C, S, S) uint8; C = 1 where every picture of the set is grey (R = G = B), else 3
    boxes: Tensor  # (N, M, 4) float32, x1 y1 x2 y2 in pixels of the S x S picture, zeros where padded
    labels: Tensor  # (N, M) int64, index into DetectionData.class_names, -1 where padded; M >= 1, most boxes in one
    names: list[str]  # N, the picture's path in the set
    sizes: Tensor  # (N, 2) int64 on the CPU, height and width of the original
    scale: Tensor  # (N,) float32 on the CPU: scaled = original * scale + offset
    offset: Tensor  # (N, 2) float32 on the CPU, x and y in pixels of the S x S picture

    def __len__(self) -> int:
        return len(self.names)

    def truths(self) -> list[dict[str, Tensor]]:
        """A picture's {"boxes": (n, 4) float32 x1 y1 x2 y2 in pixels of the original, "labels": (n,) int64}, CPU."""
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


def _load_splits(
    groups: Sequence[Sequence[Picture]], folder: Path, size: int, device, remedy: str, grey: bool
) -> list[DetectionSplit]:
    def read(picture: Picture) -> tuple[np.ndarray, float, tuple[float, float]]:
        image = decode(picture.path, remedy)
        return letterbox(image.convert("L") if grey else image, size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # PIL decodes and resizes outside the GIL
        read_groups = [list(pool.map(read, pictures)) for pictures in groups]
    channels = max(pixels.shape[0] for group in read_groups for pixels, _, _ in group)
    splits = []
    for pictures, group in zip(groups, read_groups, strict=True):
        images = np.empty((len(pictures), channels, size, size), np.uint8)
        most = max(1, *(len(picture.labels) for picture in pictures))
        boxes = np.zeros((len(pictures), most, 4))
        labels = np.full((len(pictures), most), -1)
        for index, (picture, (pixels, scale, offset)) in enumerate(zip(pictures, group, strict=True)):
            images[index] = pixels  # a grey picture fills all channels
            count = len(picture.labels)
            boxes[index, :count] = picture.boxes * scale + np.tile(offset, 2)
            labels[index, :count] = picture.labels
        splits.append(
            DetectionSplit(
                torch.from_numpy(images).to(device),
                torch.from_numpy(boxes).float().to(device),
                torch.from_numpy(labels).to(device),
                [picture.path.relative_to(folder).as_posix() for picture in pictures],
                torch.tensor([(picture.height, picture.width) for picture in pictures]),
                torch.tensor([scale for _, scale, _ in group]),
                torch.tensor([offset for _, _, offset in group]),
            )
        )
    return splits


def _describe(annotations: Annotations, groups: Sequence[Sequence[Picture]]) -> str:
    """Counts of what was found: pictures, boxes of each class in train / dev / test, dropped duplicates."""
    counts = [Counter(int(label) for picture in group for label in picture.labels) for group in groups]
    lines = [f"pictures: {' / '.join(str(len(group)) for group in groups)} (train / dev / test)"]
    for index, name in enumerate(annotations.class_names):
        lines.append(f"{name}: {' / '.join(str(count[index]) for count in counts)} boxes")
    empty = sum(not len(picture.labels) for group in groups for picture in group)
    lines += [f"pictures without an object: {empty}", f"duplicate boxes dropped: {annotations.duplicates}"]
    return "\n".join(lines)


def to_data(
    annotations: Annotations,
    lists: Sequence[Sequence[str]],
    folder: Path,
    size: int,
    device="cpu",
    remedy: str = "replace or remove this picture",
    grey: bool = False,
    **fields: str,
) -> DetectionData:
    """Decode the pictures that `lists` (train, dev, test) name by their paths in `folder`.

    `size`: side of the square pictures in pixels. `grey`: read colour as grey. `fields`: the name, label and
    fingerprint of the result. Raises DataError, ending in `remedy`, where a picture cannot be decoded; ValueError for a
    size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    by_name = {picture.path.relative_to(folder).as_posix(): picture for picture in annotations.pictures}
    groups = [[by_name[name] for name in names] for names in lists]
    train, dev, test = _load_splits(groups, folder, size, device, remedy, grey)
    report = _describe(annotations, groups)
    return DetectionData(class_names=annotations.class_names, train=train, dev=dev, test=test, report=report, **fields)
