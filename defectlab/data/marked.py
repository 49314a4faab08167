"""Images with a mask of what is defective, as segmentation networks take them: ball screws with pits, steel strip.

What the sets are and how they are split is told in `frames` (ball screws) and `instances` (NEU-Seg). Here a mask says
"defect or not", and all is reduced to one height. Two things count twice if one does not look:

- NEU-Seg's training images are each there in four quarter turns. Who labels one, has labelled all four. `labelled`
  therefore draws images with their turns.
- Frames of ball screws from one camera position show one pit many times, while it grows. Here a frame is a labelled
  image, as somebody has to outline it; new pits are much fewer than frames (14 positions in all).

"zones_mixed", ours, is "zones" with the one mistake that a random split makes: half of the test frames go to training,
for as many frames that leave it, and the other half is the test. So a network of "zones" and one of "zones_mixed" can
be compared on the very same test frames, after training on as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from defectlab.data import frames, instances
from defectlab.data.images import check_size
from defectlab.data.masks import SegmentationData, SegmentationSplit, chosen, subset
from defectlab.data.splits import PARTS, identity, read_list, set_and_root, shuffled
from defectlab.data.synthetic import SYNTHETIC
from defectlab.files import DataError

SPLITS = {  # set: its splits
    frames.BALL_SCREWS: ("zones", "official", "zones_mixed"),
    frames.SYNTHETIC_SCREW: ("zones", "zones_mixed"),
    instances.NEU_SEG: ("apart",),  # no test image in training, in whatever turn
    instances.SYNTHETIC_MASKS: ("apart",),
}
SCREWS = (frames.BALL_SCREWS, frames.SYNTHETIC_SCREW)
MULTIPLE = 8  # px: height and width must be a multiple, so that a network can halve them three times
RULES = "52a79dfed92e27ba"  # digest of what `reduced`, `mixed` and `types_of` give; tests/test_cascade.py holds it


@dataclass(frozen=True)
class MarkedData(SegmentationData):
    shown: tuple[str, ...] = ()  # of each training image, what it shows: the same for the turns of one image


def reduced(images: Tensor, masks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and masks (N, H, W), uint8, to a height of `size` px: means over areas; a pixel is marked
    where at least half of its area was, which keeps the marked area (marking all that is touched makes it larger: pits
    by 15 % at a third of the height).

    ValueError: larger than the images, or a height or width that is no multiple of 8.
    """
    height, width = images.shape[-2:]
    new = (size, width * size // height)
    if size > height or width * size % height or any(side % MULTIPLE for side in new):
        raise ValueError(f"size {size} is not possible: {height} x {width} px need multiples of {MULTIPLE}, not larger")
    if size == height:
        return images, masks
    small = torch.cat([interpolate(part.float(), new, mode="area").round().byte() for part in images.split(32)])
    shares = torch.cat([interpolate(part[:, None].float(), new, mode="area")[:, 0] for part in masks.split(32)])
    return small, (shares >= 0.5).to(torch.uint8)


def types_of(maps: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The class of most of an image's marked pixels, from 1, or 0 where none is marked: (N,) uint8.

    maps (N, H, W) uint8 numbers of instances, 0 background; labels (N, M) int64, those of instance k + 1 at k, from 0.
    """
    found = []
    for numbers, own in zip(maps, labels, strict=True):
        areas = numbers.flatten().bincount(minlength=len(own) + 1)[1:]  # of each instance
        of_class = torch.zeros(classes, dtype=areas.dtype).index_add_(0, own.clamp(min=0), areas)
        found.append(int(of_class.argmax()) + 1 if of_class.any() else 0)
    return torch.tensor(found, dtype=torch.uint8)


def mixed(train: list[str], test: list[str]) -> tuple[list[str], list[str]]:
    """Half of the test names go to training, and as many leave it: the new lists of names, by hash, sorted."""
    half = min(len(test), len(train)) // 2
    moved, out = shuffled(test, "mixed test")[:half], shuffled(train, "mixed train")[:half]
    return sorted({*train, *moved} - {*out}), sorted({*test} - {*moved})


def labelled(data: MarkedData, share: float, seed: int) -> SegmentationSplit:
    """A share (0 < share <= 1) of the training images, at least two, drawn by the seed; all turns of an image, or none.

    In the proportions of the types, and for one seed a smaller share lies in a larger one.
    """
    return subset(data.train, share, seed, data.shown, "labelled", least=2)  # batch norm needs two


# --- Loading ---------------------------------------------------------------------------------------------------------


def _check(dataset: str, split: str) -> str:
    """The set without "sample/"."""
    own = set_and_root(dataset, None)[0]
    if split not in SPLITS.get(own, ()):
        choices = "; ".join(f"{of}: {', '.join(splits)}" for of, splits in SPLITS.items())
        raise DataError(f"there is no set {dataset!r} with a split {split!r}: choose {choices}")
    return own


def marked_fingerprint(dataset: str, split: str, root: Path | None = None) -> str:
    """sha256 over the content of the set, its three lists, the split and the rules here; no image is read."""
    if _check(dataset, split) in SCREWS:
        content = frames.frames_fingerprint(dataset, split.removesuffix("_mixed"), root)
    else:
        content = instances.instance_fingerprint(dataset, root)
    return identity(f"{content} marked {RULES} {split}", ())


def load_marked(dataset: str, split: str, size: int, device="cpu", root: Path | None = None) -> MarkedData:
    """Read a set, whole, as tensors on `device`.

    `dataset` and `split`: one of `SPLITS`; "sample/" before a real one: its committed sample. `size`: height in px
    (ball screws: 480 x 1152 as they are, steel: 200 x 200). The type of an image is "pit" or the class of most of its
    marked pixels; "good" where none is marked. `root`: where data sets lie, by default `data_dir()`.

    Raises DataError naming the file and the remedy; ValueError for a size that is not possible.
    """
    check_size(size)
    own = _check(dataset, split)
    if own in SCREWS:
        data = frames.load_frames(dataset, split.removesuffix("_mixed"), root=root)
        type_names: tuple[str, ...] = ("good", "pit")
        types = {part: (getattr(data, part).masks.flatten(1) > 0).any(1).byte() for part in PARTS}
        masks = {part: getattr(data, part).masks for part in PARTS}
    else:
        side = 200 if own == instances.NEU_SEG else 128  # as they are
        data = instances.load_instances(dataset, side, root=root)
        type_names = ("good", *data.class_names)
        splits = {part: getattr(data, part) for part in PARTS}
        types = {part: types_of(one.original_maps, one.labels, len(data.class_names)) for part, one in splits.items()}
        masks = {part: (one.maps > 0).byte() for part, one in splits.items()}
    parts = {}
    for part in PARTS:
        images, marks = getattr(data, part).images, masks[part]
        if own in SYNTHETIC:  # smaller than the sizes of paper: each pixel becomes several
            times = -(-size // images.shape[-2])
            images, marks = (x.repeat_interleave(times, -1).repeat_interleave(times, -2) for x in (images, marks))
        images, marks = reduced(images, marks, size)
        images = images.expand(-1, 3, -1, -1)  # grey ones: three views of one plane, no copies
        tensors = (tensor.to(device) for tensor in (images, marks, types[part]))
        parts[part] = SegmentationSplit(*tensors, tuple(getattr(data, part).names))
    if split.endswith("_mixed"):
        parts |= _mix(parts["train"], parts["test"])
    fingerprint, shown = marked_fingerprint(dataset, split, root), parts["train"].names
    if own == instances.NEU_SEG:
        lines = map(str.split, read_list(instances.TURNS_LIST))
        first = {f"images/{member}.jpg": members[0] for _, *members in lines for member in members}
        shown = tuple(first[name] for name in shown)
    return MarkedData(dataset, data.label, "defect", type_names, **parts, fingerprint=fingerprint, shown=shown)


def _mix(train: SegmentationSplit, test: SegmentationSplit) -> dict[str, SegmentationSplit]:
    pairs = [(getattr(train, name), getattr(test, name)) for name in ("images", "masks", "types")]
    both = SegmentationSplit(*map(torch.cat, pairs), train.names + test.names)
    at = {name: index for index, name in enumerate(both.names)}
    lists = zip(("train", "test"), mixed(list(train.names), list(test.names)), strict=True)
    return {part: chosen(both, [at[name] for name in names]) for part, names in lists}
