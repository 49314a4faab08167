"""The losses of both detector families, as pure functions and thin modules around them.

- Distribution focal loss: Li et al., "Generalized Focal Loss", NeurIPS 2020, arXiv 2006.04388, equation 6.
- Anchor-free (v8 generation): CIoU and distribution focal loss weighted by the task-aligned target scores, and binary
  cross-entropy; gains 7.5, 0.5, 1.5.
- Anchor-based (v5 generation): CIoU, objectness whose target is the CIoU reached, and binary cross-entropy.

Each returns named scalars: "loss" is minimised, the others are its terms before their gains. All terms are means, and
"loss" is not multiplied by the batch size as in the two generations' first code, so a learning rate means the same at
every batch size. Everything is computed in float32 whatever autocast does (float64 stays float64), and no shape
depends on the number of truths in a picture, so nothing waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from defectlab.networks.yolo.assignment import Assigned, Matched, box_iou_aligned, constant, match_anchors, task_aligned
from defectlab.networks.yolo.decode import (
    anchor_centres,
    anchored_boxes,
    boxes_from_distances,
    decode_anchor_free,
    expected_distances,
    split_maps,
)
from defectlab.networks.yolo.model import Detector
from defectlab.precision import at_least_float32


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Equation 6: cross-entropy with the two whole distances around the true one, weighted by nearness.

    logits (n, 4, bins), distances (n, 4) in strides, clamped to 0..bins - 1.01 -> (n,), the mean over the sides.
    """
    logits = at_least_float32(logits)
    distances = distances.to(logits.dtype).clamp(0, logits.shape[-1] - 1 - 0.01)
    below = distances.floor()
    surprise = -logits.log_softmax(-1)
    near = surprise.gather(-1, below.long()[..., None])[..., 0]  # (n, 4)
    far = surprise.gather(-1, below.long()[..., None] + 1)[..., 0]
    return (near * (below + 1 - distances) + far * (distances - below)).mean(-1)


def anchor_free_terms(
    raw: Sequence[Tensor], assigned: Assigned, strides: Sequence[int] = (8, 16, 32), bins: int = 16
) -> dict[str, Tensor]:
    """The terms "box", "cls" and "dfl" of raw maps (B, 4 * bins + C, h, w) under a given assignment, a constant.

    "box" sums 1 - CIoU and "dfl" the distribution focal loss over the foreground anchors, each times its target score;
    "cls" sums binary cross-entropy over all anchors and classes. All three are divided by the sum of the target
    scores, or by 1 where that is less (images without truths are background throughout).
    """
    sides, classes = split_maps(raw, bins)  # (B, A, 4, bins), (B, A, C)
    targets = assigned.target_scores.to(classes.dtype)
    total = targets.sum().clamp(min=1)
    cls = functional.binary_cross_entropy_with_logits(classes, targets, reduction="sum") / total

    # A fixed number of anchors that holds all the foreground; the rest weigh nothing.
    chosen = assigned.foreground.to(torch.uint8).topk(assigned.most, dim=1, sorted=False).indices  # (B, P)
    image = torch.arange(len(chosen), device=chosen.device)[:, None]
    centres, sizes = anchor_centres([m.shape[-2:] for m in raw], strides, raw[0].device)
    centres, sizes = centres.to(sides.dtype)[chosen], sizes.to(sides.dtype)[chosen]  # (B, P, 2), (B, P)
    truths, weight = assigned.boxes.to(sides.dtype)[image, chosen], targets[image, chosen].sum(-1)
    sides = sides[image, chosen]  # (B, P, 4, bins)

    boxes = boxes_from_distances(expected_distances(sides), centres, sizes)
    box = ((1 - box_iou_aligned(boxes, truths, "ciou")) * weight).sum() / total
    distances = torch.cat([centres - truths[..., :2], truths[..., 2:] - centres], -1) / sizes[..., None]  # (B, P, 4)
    dfl = distribution_focal_loss(sides.flatten(0, 1), distances.flatten(0, 1))
    dfl = (dfl * weight.flatten()).sum() / total
    return {"box": box, "cls": cls, "dfl": dfl}


class AnchorFreeLoss(nn.Module):
    """The v8 generation's loss: 7.5 box + 0.5 cls + 1.5 dfl, see `anchor_free_terms`."""

    def __init__(
        self,
        classes: int,
        strides: Sequence[int] = (8, 16, 32),
        bins: int = 16,
        box: float = 7.5,
        cls: float = 0.5,
        dfl: float = 1.5,
    ):
        super().__init__()
        self.classes, self.strides, self.bins = classes, tuple(strides), bins
        self.gains = {"box": box, "cls": cls, "dfl": dfl}

    @torch.no_grad()
    def assigned(self, raw: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Assigned:
        """The task-aligned assignment of raw maps to boxes (B, M, 4) px and labels (B, M), -1 where padded."""
        if raw[0].shape[1] != 4 * self.bins + self.classes:
            raise ValueError(
                f"maps have {raw[0].shape[1]} channels, but {self.classes} classes and 4 x {self.bins} bins need "
                f"{4 * self.bins + self.classes}; build loss and detector with the same classes"
            )
        predicted, scores = decode_anchor_free(raw, self.strides, self.bins)
        centres, _ = anchor_centres([m.shape[-2:] for m in raw], self.strides, raw[0].device)
        return task_aligned(scores, predicted, centres, boxes, labels)

    def forward(self, raw: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Maps (B, 4 * bins + classes, h, w), boxes (B, M, 4) px, labels (B, M) -> {"loss", "box", "cls", "dfl"}."""
        return self.terms(raw, self.assigned(raw, boxes, labels))

    def terms(self, raw: Sequence[Tensor], assigned: Assigned) -> dict[str, Tensor]:
        """As `forward`, under an assignment made before."""
        terms = anchor_free_terms(raw, assigned, self.strides, self.bins)
        return {"loss": sum(gain * terms[name] for name, gain in self.gains.items()), **terms}


def anchor_based_terms(
    raw: Sequence[Tensor],
    matched: Sequence[Matched],
    anchors: Tensor,
    strides: Sequence[int] = (8, 16, 32),
    balance: Sequence[float] = (4.0, 1.0, 0.4),
) -> dict[str, Tensor]:
    """The terms "box", "obj" and "cls" of raw maps (B, K * (5 + C), h, w), each the sum over the levels.

    "box" is the mean of 1 - CIoU and "cls" the mean binary cross-entropy over the level's positives (0 where it has
    none); "obj" is the mean binary cross-entropy over all cells and anchors, times the level's balance. Its target is
    the CIoU reached, clamped at 0 and a constant, the largest where a cell's anchor is matched several times.
    """
    box = obj = cls = raw[0].new_zeros((), dtype=at_least_float32(raw[0][:0]).dtype)
    for level, match, shapes, stride, weight in zip(raw, matched, anchors, strides, balance, strict=True):
        values = at_least_float32(level).unflatten(1, (len(shapes), -1)).permute(0, 1, 3, 4, 2)  # (B, K, h, w, 5 + C)
        predicted = values[match.image, match.anchor, match.row, match.column]  # (n, 5 + C)
        valid = match.valid.to(predicted.dtype)
        positives = valid.sum().clamp(min=1)

        cells = torch.stack([match.column, match.row], -1)
        boxes = anchored_boxes(predicted[:, :4], cells, shapes.to(predicted)[match.anchor], stride)
        overlap = box_iou_aligned(boxes, match.boxes.to(boxes.dtype), "ciou")
        box = box + ((1 - overlap) * valid).sum() / positives

        _, count, height, width = values.shape[:4]
        cell = ((match.image * count + match.anchor) * height + match.row) * width + match.column
        objectness = values[..., 4].flatten()
        reached = constant(overlap.clamp(min=0) * valid)
        target = torch.zeros_like(objectness).scatter_reduce(0, cell, reached, "amax")
        obj = obj + functional.binary_cross_entropy_with_logits(objectness, target) * weight

        logits = predicted[:, 5:]
        target = functional.one_hot(match.labels, logits.shape[1]).to(logits.dtype)
        surprise = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        cls = cls + (surprise * valid).sum() / positives
    return {"box": box, "obj": obj, "cls": cls}


class AnchorBasedLoss(nn.Module):
    """The v5 generation's loss: 0.05 box + 1.0 obj + 0.5 cls, see `anchor_based_terms`.

    The gains were tuned for 80 classes at 640 px. As in that generation, the class gain is scaled by classes / 80 and
    the objectness gain by (size / 640)^2, with `size` the side of the input in pixels. `anchors` (levels, K, 2) are
    widths and heights in pixels; a truth matches those within a factor `ratio` in both.
    """

    def __init__(
        self,
        classes: int,
        anchors: Tensor,
        strides: Sequence[int] = (8, 16, 32),
        box: float = 0.05,
        obj: float = 1.0,
        cls: float = 0.5,
        balance: Sequence[float] = (4.0, 1.0, 0.4),
        ratio: float = 4.0,
        size: int = 640,
    ):
        super().__init__()
        self.classes, self.strides, self.balance, self.ratio = classes, tuple(strides), tuple(balance), ratio
        self.gains = {"box": box, "obj": obj * (size / 640) ** 2, "cls": cls * classes / 80}
        self.register_buffer("anchors", anchors.detach().clone().float(), persistent=False)

    def matched(self, raw: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> list[Matched]:
        """The positives of boxes (B, M, 4) px and labels (B, M), -1 where padded; raw maps give only their sizes."""
        channels = self.anchors.shape[1] * (5 + self.classes)
        if raw[0].shape[1] != channels:
            raise ValueError(
                f"maps have {raw[0].shape[1]} channels, but {self.anchors.shape[1]} anchors and {self.classes} classes "
                f"need {channels}; build loss and detector with the same classes"
            )
        return match_anchors(boxes, labels, self.anchors, self.strides, [m.shape[-2:] for m in raw], self.ratio)

    def forward(self, raw: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Maps (B, K * (5 + classes), h, w), boxes (B, M, 4) px, labels (B, M) -> {"loss", "box", "obj", "cls"}."""
        terms = anchor_based_terms(raw, self.matched(raw, boxes, labels), self.anchors, self.strides, self.balance)
        return {"loss": sum(gain * terms[name] for name, gain in self.gains.items()), **terms}


def detection_loss(detector: Detector, size: int) -> nn.Module:
    """The loss of the detector's generation: (raw maps, boxes, labels) -> named scalars."""
    if detector.family == "v8":
        return AnchorFreeLoss(detector.class_count)
    return AnchorBasedLoss(detector.class_count, detector.anchors, size=size)
