"""The losses of both detector families, as pure functions and thin modules around them.

- Distribution focal loss: Li et al., "Generalized Focal Loss", NeurIPS 2020, arXiv 2006.04388, equation 6.
- Anchor-free (v8 generation): CIoU and distribution focal loss weighted by the task-aligned target scores, and binary
  cross-entropy; gains 7.5, 0.5, 1.5.
- Anchor-based (v5 generation): CIoU, objectness whose target is the predicted box's CIoU, binary cross-entropy.

Each returns named scalars: "loss" is minimised, the others are its terms before their gains. All terms are means, and
"loss" is not multiplied by the batch size (as in the two generations' first code), so a learning rate means the same at
every batch size. Everything is in float32 whatever autocast does (float64 stays float64). No shape depends on the
number of boxes in an image, so nothing waits for the device.
"""

from collections.abc import Mapping, Sequence

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
    split_anchors,
    split_maps,
)
from defectlab.networks.yolo.model import BINS, STRIDES, Detector
from defectlab.precision import at_least_float32


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Equation 6: cross-entropy with the two whole distances around the true one, weighted by nearness.

    logits (n, 4, bins), distances (n, 4) in strides, clamped to 0..bins - 1.01 -> (n,), the mean over the sides.
    """
    logits = at_least_float32(logits)
    distances = distances.to(logits.dtype).clamp(0, logits.shape[-1] - 1 - 0.01)
    below = distances.floor()
    cross_entropy = -logits.log_softmax(-1)
    near = cross_entropy.gather(-1, below.long()[..., None])[..., 0]  # (n, 4)
    far = cross_entropy.gather(-1, below.long()[..., None] + 1)[..., 0]
    return (near * (below + 1 - distances) + far * (distances - below)).mean(-1)


def weighted(gains: Mapping[str, float], terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """ "loss", the terms summed with their gains, and the terms."""
    return {"loss": sum(gain * terms[name] for name, gain in gains.items()), **terms}


def check_channels(raw: Sequence[Tensor], channels: int) -> None:
    if raw[0].shape[1] != channels:
        counts = f"maps have {raw[0].shape[1]} channels, the loss needs {channels}"
        raise ValueError(f"{counts}: build loss and detector with the same classes")


class AnchorFreeLoss(nn.Module):
    """The v8 generation's loss: 7.5 box + 0.5 cls + 1.5 dfl, see `terms`. `metric`: `topk`, `alpha`, `beta` of
    `task_aligned`, where they are not its own."""

    def __init__(self, classes: int, strides: Sequence[int] = STRIDES, bins: int = BINS, **metric: float):
        super().__init__()
        self.classes, self.strides, self.bins, self.metric = classes, tuple(strides), bins, metric
        self.gains = {"box": 7.5, "cls": 0.5, "dfl": 1.5}

    @torch.no_grad()
    def assigned(self, raw: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Assigned:
        """The task-aligned assignment of raw maps to boxes (B, M, 4) px and labels (B, M), -1 where padded."""
        check_channels(raw, 4 * self.bins + self.classes)
        predicted, scores = decode_anchor_free(raw, self.strides, self.bins)
        centres, _ = anchor_centres([m.shape[-2:] for m in raw], self.strides, raw[0].device)
        return task_aligned(scores, predicted, centres, boxes, labels, **self.metric)

    def forward(self, raw: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Maps (B, 4 * bins + classes, h, w), boxes (B, M, 4) px, labels (B, M) -> {"loss", "box", "cls", "dfl"}."""
        return self.terms(raw, self.assigned(raw, boxes, labels))

    def terms(self, raw: Sequence[Tensor], assigned: Assigned) -> dict[str, Tensor]:
        """As `forward`, under a given assignment, a constant.

        "box" sums 1 - CIoU and "dfl" the distribution focal loss over the foreground anchors, each times its target
        score; "cls" sums binary cross-entropy over all anchors and classes. All three are divided by the sum of the
        target scores, or by 1 where that is less (images without boxes are background throughout).
        """
        sides, classes = split_maps(raw, self.bins)  # (B, A, 4, bins), (B, A, C)
        targets = assigned.target_scores.to(classes.dtype)
        total = targets.sum().clamp(min=1)
        cls = functional.binary_cross_entropy_with_logits(classes, targets, reduction="sum") / total

        # A fixed number of anchors that includes all the foreground; the others have weight 0.
        chosen = assigned.foreground.to(torch.uint8).topk(assigned.most, dim=1, sorted=False).indices  # (B, P)
        image = torch.arange(len(chosen), device=chosen.device)[:, None]
        centres, sizes = anchor_centres([m.shape[-2:] for m in raw], self.strides, raw[0].device)
        centres, sizes = centres.to(sides.dtype)[chosen], sizes.to(sides.dtype)[chosen]  # (B, P, 2), (B, P)
        true_boxes, weight = assigned.boxes.to(sides.dtype)[image, chosen], targets[image, chosen].sum(-1)
        sides = sides[image, chosen]  # (B, P, 4, bins)

        boxes = boxes_from_distances(expected_distances(sides), centres, sizes)
        box = ((1 - box_iou_aligned(boxes, true_boxes, "ciou")) * weight).sum() / total
        distances = torch.cat([centres - true_boxes[..., :2], true_boxes[..., 2:] - centres], -1)
        distances = distances / sizes[..., None]  # (B, P, 4)
        dfl = distribution_focal_loss(sides.flatten(0, 1), distances.flatten(0, 1))
        dfl = (dfl * weight.flatten()).sum() / total
        return weighted(self.gains, {"box": box, "cls": cls, "dfl": dfl})


class AnchorBasedLoss(nn.Module):
    """The v5 generation's loss: 0.05 box + 1.0 obj + 0.5 cls, see `forward`.

    As in that generation, the gains are for 80 classes at 640 px: the class gain is scaled by classes / 80 and the
    objectness gain by (size / 640)^2, with `size` the side of the input in px. `anchors` (levels, K, 2): widths and
    heights in px; `balance` weighs the levels' objectness.
    """

    strides = STRIDES

    def __init__(self, classes: int, anchors: Tensor, balance: Sequence[float] = (4.0, 1.0, 0.4), size: int = 640):
        super().__init__()
        self.classes, self.balance = classes, tuple(balance)
        self.gains = {"box": 0.05, "obj": (size / 640) ** 2, "cls": 0.5 * classes / 80}
        self.register_buffer("anchors", anchors.detach().clone().float(), persistent=False)

    def matched(self, raw: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> list[Matched]:
        """The positives of boxes (B, M, 4) px and labels (B, M), -1 where padded; raw maps give only their sizes."""
        check_channels(raw, self.anchors.shape[1] * (5 + self.classes))
        return match_anchors(boxes, labels, self.anchors, self.strides, [m.shape[-2:] for m in raw])

    def forward(self, raw: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Maps (B, K * (5 + classes), h, w), boxes (B, M, 4) px, labels (B, M) -> {"loss", "box", "obj", "cls"}.

        Each term is the sum over the levels. "box" is the mean of 1 - CIoU and "cls" the mean binary cross-entropy over
        the level's positives (0 where it has none); "obj" is the mean binary cross-entropy over all cells and anchors,
        times the level's balance. Its target is the CIoU of the predicted box, clamped at 0 and a constant, the largest
        where a cell's anchor is matched several times.
        """
        matched = self.matched(raw, boxes, labels)
        levels = zip(raw, matched, self.anchors, self.strides, self.balance, strict=True)
        box = obj = cls = raw[0].new_zeros((), dtype=at_least_float32(raw[0][:0]).dtype)
        for level, match, shapes, stride, weight in levels:
            values = split_anchors(level, len(shapes))  # (B, K, h, w, 5 + C)
            predicted = values[match.image, match.anchor, match.row, match.column]  # (n, 5 + C)
            valid = match.valid.to(predicted.dtype)
            positives = valid.sum().clamp(min=1)

            cells = torch.stack([match.column, match.row], -1)
            found = anchored_boxes(predicted[:, :4], cells, shapes.to(predicted)[match.anchor], stride)
            iou = box_iou_aligned(found, match.boxes.to(found.dtype), "ciou")
            box = box + ((1 - iou) * valid).sum() / positives

            _, count, height, width = values.shape[:4]
            cell = ((match.image * count + match.anchor) * height + match.row) * width + match.column
            objectness = values[..., 4].flatten()
            iou = constant(iou.clamp(min=0) * valid)
            target = torch.zeros_like(objectness).scatter_reduce(0, cell, iou, "amax")
            obj = obj + functional.binary_cross_entropy_with_logits(objectness, target) * weight

            logits = predicted[:, 5:]
            target = functional.one_hot(match.labels, logits.shape[1]).to(logits.dtype)
            cross_entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
            cls = cls + (cross_entropy * valid).sum() / positives
        return weighted(self.gains, {"box": box, "obj": obj, "cls": cls})


def detection_loss(detector: Detector, size: int) -> nn.Module:
    """The loss of the detector's generation: (raw maps, boxes, labels) -> named scalars."""
    if detector.family == "v8":
        return AnchorFreeLoss(detector.class_count)
    return AnchorBasedLoss(detector.class_count, detector.anchors, size=size)
