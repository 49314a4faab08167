"""Instance masks on the anchor-based detector: prototypes and coefficients, and their loss.

Bolya, Zhou, Xiao, Lee, "YOLACT: Real-time Instance Segmentation", ICCV 2019, arXiv 1904.02689. An image gets M
prototype maps (section 3.1), each anchor M coefficients (section 3.2); a mask is sigmoid(prototypes x coefficients),
cropped to its box (section 3.3). What differs is marked "ours".
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from defectlab.networks.yolo.assignment import Matched
from defectlab.networks.yolo.blocks import ConvBlock
from defectlab.networks.yolo.losses import AnchorBasedLoss
from defectlab.networks.yolo.model import Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.precision import at_least_float32

PROTOTYPES = 32  # YOLACT section 6
MASK_GAIN = 0.05 * 6.125 / 1.5  # ours: YOLACT's weights of mask and box in their ratio, on this family's gain of boxes
POSITIVES = 100  # ours: most anchors of an image that learn a mask in a step


# --- Model -----------------------------------------------------------------------------------------------------------


class InstanceMaps(NamedTuple):
    """What the head gives; K anchors per cell, M prototypes."""

    raw: list[Tensor]  # (B, K * (5 + C), h, w) per level, as without masks
    coefficients: list[Tensor]  # (B, K * M, h, w) per level, before their tanh
    prototypes: Tensor  # (B, M, S / 4, S / 4), not negative


class InstanceHead(nn.Module):
    """An anchor-based head, with a 1x1 convolution per level for coefficients and prototypes from the finest map."""

    def __init__(self, boxes: nn.Module, widths: Sequence[int], anchors: int, prototypes: int = PROTOTYPES):
        super().__init__()
        fine = widths[0]  # ours: YOLACT's prototype branch has 256 channels and three convolutions before it upsamples
        self.boxes = boxes
        self.coefficients = nn.ModuleList(nn.Conv2d(width, anchors * prototypes, 1) for width in widths)
        self.before, self.after = ConvBlock(fine, fine, 3), ConvBlock(fine, fine, 3)
        self.prototypes = nn.Conv2d(fine, prototypes, 1)

    def forward(self, maps: list[Tensor]) -> InstanceMaps:
        detail = self.after(interpolate(self.before(maps[0]), scale_factor=2.0, mode="nearest"))
        coefficients = [level(x) for level, x in zip(self.coefficients, maps, strict=True)]
        return InstanceMaps(self.boxes(maps), coefficients, self.prototypes(detail).relu())


def with_masks(detector: Detector, prototypes: int = PROTOTYPES) -> Detector:
    """The same detector with an `InstanceHead` in place of its head: it gives `InstanceMaps`. ValueError for v8."""
    if detector.family != "v5":
        raise ValueError(f"masks are made on anchors, the detector is of family {detector.family!r}: use v5")
    detector.head = InstanceHead(detector.head, detector.widths, detector.anchors.shape[1], prototypes)
    return detector


def build_instance_detector(settings: DetectorSettings, classes: int, anchors: Tensor | None = None) -> Detector:
    """A fresh detector with masks; arguments as `build_detector`."""
    return with_masks(build_detector(settings, classes, anchors))


# --- Loss ------------------------------------------------------------------------------------------------------------


def mask_terms(
    coefficients: Sequence[Tensor],
    prototypes: Tensor,
    matched: Sequence[Matched],
    maps: Tensor,
    boxes: Tensor,
    most: int = POSITIVES,
) -> dict[str, Tensor]:
    """The term "mask": binary cross-entropy, its mean within the instance's box, then over positive anchors (or 0).

    coefficients (B, K * M, h, w) per level; prototypes (B, M, S / s, S / s), s whole; `matched` by `match_anchors` of
    boxes (B, T, 4) px; maps (B, S, S) of numbers, k + 1 where box k has its instance. The target of a cell is the part
    of it, 0..1, that the instance covers (ours: a threshold would lose a thin scratch). At most `most` positives of an
    image are used: the first of each instance, then the second of each, and so on (ours: nothing is random). In float32
    whatever autocast does (float64 stays).
    """
    count, channels, height, width = prototypes.shape
    instances, stride = boxes.shape[1], maps.shape[-1] // height
    vectors, valid = [], []
    for level, match in zip(coefficients, matched, strict=True):  # candidates go image by image, box by box
        values = at_least_float32(level).unflatten(1, (-1, channels))  # (B, K, M, h, w)
        found = values[match.image, match.anchor, :, match.row, match.column]  # (n, M)
        vectors.append(found.view(count, instances, -1, channels))
        valid.append(match.valid.view(count, instances, -1))
    vectors, valid = torch.cat(vectors, 2), torch.cat(valid, 2)  # (B, T, n, M), (B, T, n)
    each = valid.shape[2]
    turn = valid.cumsum(2) * instances + torch.arange(instances, device=valid.device)[:, None]
    turn = turn.masked_fill(~valid, (each + 1) * instances).flatten(1)
    chosen = turn.topk(min(most, instances * each), largest=False).indices  # (B, P)
    image, instance = torch.arange(count, device=chosen.device)[:, None], chosen // each
    used = valid.flatten(1)[image, chosen]

    cells = rearrange(maps, "b (h a) (w c) -> b 1 (a c) h w", a=stride, c=stride)
    numbers = torch.arange(1, instances + 1, device=maps.device).view(-1, 1, 1, 1)
    with torch.autocast(prototypes.device.type, enabled=False):
        weights = vectors.flatten(1, 2)[image, chosen].tanh()  # (B, P, M)
        logits = einsum(weights, at_least_float32(prototypes), "b p m, b m h w -> b p h w")
        target = (cells == numbers).sum(2, dtype=logits.dtype)[image, instance] / stride**2  # (B, P, h, w)
        low, high = (boxes[..., :2] / stride).floor(), (boxes[..., 2:] / stride).ceil()  # (B, T, 2), whole cells
        column, row = (torch.arange(side, device=boxes.device) for side in (width, height))
        across = (column >= low[..., :1]) & (column < high[..., :1])  # (B, T, w)
        down = (row >= low[..., 1:]) & (row < high[..., 1:])  # (B, T, h)
        crop = (down[..., None] & across[..., None, :])[image, instance]  # (B, P, h, w)
        cross_entropy = binary_cross_entropy_with_logits(logits, target, reduction="none") * crop
        mean = cross_entropy.sum((2, 3)) / crop.sum((2, 3)).clamp(min=1)  # (B, P)
        return {"mask": (mean * used).sum() / used.sum().clamp(min=1)}


def add_masks(
    terms: dict[str, Tensor],
    criterion: AnchorBasedLoss,
    output: InstanceMaps,
    boxes: Tensor,
    labels: Tensor,
    maps: Tensor,
) -> dict[str, Tensor]:
    """The detector's `terms` with "mask", and with MASK_GAIN times it in "loss"; `criterion` matches anchors to boxes.

    boxes (B, T, 4) px, labels (B, T) with -1 where padded, maps (B, S, S) as in `mask_terms`.
    """
    matched = criterion.matched(output.raw, boxes, labels)
    mask = mask_terms(output.coefficients, output.prototypes, matched, maps, boxes)
    return terms | mask | {"loss": terms["loss"] + MASK_GAIN * mask["mask"]}
