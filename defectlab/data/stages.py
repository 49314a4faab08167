"""Ball screws with pits for inspection in stages: whole frames, the windows they are looked at in, and crops of boxes.

The frames are those of `frames.load_frames` ("zones": no two parts of the split are nearer than 42 mm of the screw), a
pit is an instance of the mask. A window is a square of the frame at full resolution; windows overlap by half, so each
pit that is at most half a window wide lies whole in one of them. Frames are padded to a whole number of half windows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import roi_align

from defectlab.data.detection import DetectionSplit
from defectlab.data.frames import FrameSplit, frames_fingerprint, load_frames
from defectlab.data.images import in_threads, letterbox
from defectlab.data.instances import INSTANCES, instances
from defectlab.data.splits import PARTS, Named, content_id, identity

CLASS_NAMES = ("pit",)
HALF = 0.5  # share of a pit's box that a window has to show to have the pit; ours
RULE = "pits are instances of the mask"  # of a fingerprint


@dataclass(frozen=True)
class PitSplit(Named):
    """N frames of one size and the boxes of their pits."""

    images: Tensor  # (N, 3, H, W) uint8
    boxes: tuple[Tensor, ...]  # N of (n, 4) float32 on the CPU, x1 y1 x2 y2 in pixels of the frame; n may be 0
    names: tuple[str, ...]

    def ground_truth(self) -> list[dict[str, Tensor]]:
        """As `DetectionSplit.ground_truth`: {"boxes": (n, 4), "labels": (n,) int64, all 0} of each frame."""
        return [{"boxes": own, "labels": torch.zeros(len(own), dtype=torch.int64)} for own in self.boxes]


@dataclass(frozen=True)
class PitData:
    name: str  # as given to load_pits
    label: str  # as printed in tables
    class_names: tuple[str, ...]
    train: PitSplit
    dev: PitSplit
    test: PitSplit
    fingerprint: str


def pits_fingerprint(name: str, split: str = "zones", root: Path | None = None) -> str:
    """sha256 over the content of the set, its split and the rule of the boxes; no image is read."""
    return identity(RULE, [[frames_fingerprint(name, split, root), content_id(INSTANCES)]])


def load_pits(name: str, split: str = "zones", device="cpu", root: Path | None = None) -> PitData:
    """Read "bsdata" or "synthetic_screw" as `frames.load_frames`, which has the errors, with a box for each pit."""
    data = load_frames(name, split, device, root)
    parts = {part: _with_boxes(getattr(data, part)) for part in PARTS}
    return PitData(name, data.label, CLASS_NAMES, **parts, fingerprint=pits_fingerprint(name, split, root))


def _with_boxes(split: FrameSplit) -> PitSplit:
    found = in_threads(lambda mask: instances(mask, 1)[0], split.masks.cpu().numpy())
    return PitSplit(split.images, tuple(map(torch.from_numpy, found)), split.names)


# --- Whole frames ----------------------------------------------------------------------------------------------------


def reduced(split: PitSplit, size: int) -> DetectionSplit:
    """Whole frames, each scaled to fit `size` x `size` px by `images.letterbox`."""
    pixels = split.images.permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
    images, scale, offset = zip(*(letterbox(Image.fromarray(frame), size) for frame in pixels), strict=True)
    images = [np.broadcast_to(one, (3, size, size)) for one in images]  # a grey frame has one plane
    moved = [own * factor + torch.tensor(by * 2) for own, factor, by in zip(split.boxes, scale, offset, strict=True)]
    made = _to_split(torch.from_numpy(np.stack(images)).to(split.images.device), moved, list(split.names))
    sizes = torch.tensor(split.images.shape[-2:]).expand(len(split), 2)
    return replace(made, sizes=sizes, scale=torch.tensor(scale), offset=torch.tensor(offset))


def _to_split(images: Tensor, boxes: list[Tensor], names: list[str]) -> DetectionSplit:
    """Square images (N, 3, S, S) that are their own originals, with their boxes, N of (n, 4)."""
    most = max(1, *map(len, boxes))
    padded = torch.stack([pad(own, (0, 0, 0, most - len(own))) for own in boxes])  # (N, M, 4)
    labels = torch.stack([(torch.arange(most) < len(own)).long() - 1 for own in boxes])
    count, device = len(images), images.device
    sizes = torch.full((count, 2), images.shape[-1])
    return DetectionSplit(
        images, padded.to(device), labels.to(device), names, sizes, torch.ones(count), torch.zeros(count, 2)
    )


# --- Windows ---------------------------------------------------------------------------------------------------------


def padded(images: Tensor, window: int) -> Tensor:
    """Frames (N, 3, H, W) of a whole number of half windows, at least two, their right and lower edges repeated."""
    half = window // 2
    right, below = (max(window, -(-side // half) * half) - side for side in reversed(images.shape[-2:]))
    if not (right or below):
        return images
    return pad(images.float(), (0, right, 0, below), mode="replicate").to(images.dtype)


def places(images: Tensor, window: int) -> Tensor:
    """(P, 4) int64, x1 y1 x2 y2 of the windows of `padded` frames, row by row, half a window apart."""
    height, width = images.shape[-2:]
    y, x = (torch.arange(0, side - window + 1, window // 2) for side in (height, width))
    corners = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # (P, 2)
    return torch.cat([corners, corners + window], 1)


def shares(boxes: Tensor, windows: Tensor) -> Tensor:
    """(n, P) in 0..1: how much of the area of each box (n, 4) each window (P, 4) shows."""
    low = torch.maximum(boxes[:, None, :2], windows[None, :, :2].to(boxes))
    high = torch.minimum(boxes[:, None, 2:], windows[None, :, 2:].to(boxes))
    return (high - low).clamp(min=0).prod(-1) / (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None]


def holding(boxes: Tensor, windows: Tensor) -> Tensor:
    """(n, P) bool: the windows that show as much of a pit as any does: all of it, where it fits."""
    share = shares(boxes, windows)
    return share >= share.amax(1, keepdim=True) - 1e-6


def window_labels(split: PitSplit, windows: Tensor) -> Tensor:
    """(N, P) float32: 1 where a window shows half of a pit or more, 0 where it shows none, else -1: not used."""
    rows = []
    for own in split.boxes:
        most = shares(own, windows).amax(0) if len(own) else torch.zeros(len(windows))
        rows.append((most >= HALF).float() - ((most > 0) & (most < HALF)).float())
    return torch.stack(rows)


def cut(images: Tensor, frames: Tensor, corners: Tensor, window: int) -> Tensor:
    """(B, 3, window, window): of frame `frames` (B,) the window whose upper left corner is `corners` (B, 2), x y."""
    views = images.unfold(2, window, window // 2).unfold(
        3, window, window // 2
    )  # (N, 3, rows, columns, window, window)
    column, row = torch.div(corners, window // 2, rounding_mode="floor").to(images.device).unbind(1)
    return views[frames.to(images.device), :, row, column]


def training_windows(split: PitSplit, window: int, every: int = 1) -> DetectionSplit:
    """All windows that show half of a pit or more, with the visible part of its box, and as many that show none: these
    are drawn at random, the same for every seed of a run. With `every`, every so many of both."""
    images = padded(split.images, window)
    windows = places(images, window)
    labels = window_labels(split, windows)
    with_pit, empty = ((labels == value).nonzero() for value in (1, 0))  # (n, 2): frame, window
    drawn = torch.randperm(len(empty), generator=torch.Generator().manual_seed(0))[: len(with_pit)]
    chosen = torch.cat([with_pit, empty[drawn.sort().values]])[::every]
    boxes = []
    for frame, place in chosen.tolist():
        own, x1y1 = split.boxes[frame], windows[place, :2].repeat(2)
        seen = own[shares(own, windows[place, None])[:, 0] >= HALF] - x1y1
        boxes.append(seen.clamp(0, window))
    names = [f"{split.names[frame]}, window {place}" for frame, place in chosen.tolist()]
    return _to_split(cut(images, chosen[:, 0], windows[chosen[:, 1], :2], window), boxes, names)


# --- Crops -----------------------------------------------------------------------------------------------------------


def crops(images: Tensor, frames: Tensor, boxes: Tensor, size: int, context: float, least: float) -> Tensor:
    """uint8 (K, 3, size, size): squares around boxes (K, 4) of frames `frames` (K,), `context` times as wide as the
    box's longer side, at least `least` px; bilinear, black beside the frame. `frames` and `boxes` on the images'
    device."""
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = ((boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) * context).clamp(min=least) / 2
    squares = torch.cat([frames[:, None].to(middle), middle - half, middle + half], 1)
    used, index = frames.unique(return_inverse=True)  # of all frames only these become floats
    squares[:, 0] = index.to(squares)
    return roi_align(images[used].float(), squares, size, sampling_ratio=2, aligned=True).round().byte()


def recut(cuts: Tensor, squares: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, size, size): of each image (B, 3, S, S) its own square (B, 4), x1 y1 x2 y2 in pixels, bilinear."""
    numbered = torch.cat([torch.arange(len(cuts), device=cuts.device)[:, None].to(squares), squares], 1)
    return roi_align(cuts.float(), numbered, size, sampling_ratio=2, aligned=True).round().byte()
