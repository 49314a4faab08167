"""Which anchors learn which ground-truth boxes: the assignment of both detector families, and dimension clusters.

- IoU and CIoU: Zheng et al., "Distance-IoU Loss", AAAI 2020, arXiv 1911.08287 (its complete form).
- Task-aligned: Feng et al., "TOOD", ICCV 2021, arXiv 2108.07755, section 3.2, with CIoU for IoU as anchor-free YOLOs.
- Shape matching with neighbour cells: the v5 generation of anchor-based YOLOs.
- Dimension clusters: Redmon and Farhadi, "YOLO9000", CVPR 2017, arXiv 1612.08242, section 2.

In the two assignments no shape depends on the number of boxes in an image, so nothing waits for the device.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from defectlab.files import DataError


class Assigned(NamedTuple):
    """What each of A anchors learns."""

    foreground: Tensor  # (B, A) bool
    ground_truth: Tensor  # (B, A) int64: its index into M; 0 where background
    target_scores: Tensor  # (B, A, C) float32 0..1, zero where background
    boxes: Tensor  # (B, A, 4) float32 xyxy px: its ground-truth box; without meaning where background
    most: int  # no image has more foreground anchors than this


class Matched(NamedTuple):
    """The candidates of one level, n = B * M * anchors * 3 cells; those that are not `valid` count for nothing."""

    valid: Tensor  # (n,) bool
    image: Tensor  # (n,) int64
    anchor: Tensor  # (n,) int64
    row: Tensor  # (n,) int64, within the map
    column: Tensor  # (n,) int64, within the map
    boxes: Tensor  # (n, 4) xyxy px
    labels: Tensor  # (n,) int64; 0 where the box is padding


def constant(values: Tensor) -> Tensor:
    """Stop-gradient; a gradient check replaces this function to hold such terms fixed."""
    return values.detach()


def box_iou_aligned(a: Tensor, b: Tensor, kind: str = "iou", eps: float = 1e-7) -> Tensor:
    """IoU (0..1) or CIoU (at most 1, may be negative) of boxes pair by pair; shapes broadcast.

    (..., 4), (..., 4) xyxy -> (...). CIoU = IoU - rho^2 / c^2 - alpha v; alpha is a constant for the gradient.
    """
    if kind not in ("iou", "ciou"):
        raise ValueError(f"kind must be 'iou' or 'ciou', not {kind!r}")
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    aw, ah, bw, bh = ax2 - ax1, ay2 - ay1, bx2 - bx1, by2 - by1
    inter = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    inter = inter * (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    iou = inter / (aw * ah + bw * bh - inter + eps)
    if kind == "iou":
        return iou
    width = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    height = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    centre = ((ax1 + ax2 - bx1 - bx2).square() + (ay1 + ay2 - by1 - by2).square()) / 4
    shape = 4 / math.pi**2 * (torch.atan(bw / (bh + eps)) - torch.atan(aw / (ah + eps))).square()
    alpha = constant(shape / (1 - iou + shape + eps))
    return iou - centre / (width.square() + height.square() + eps) - alpha * shape


@torch.no_grad()
def task_aligned(
    scores: Tensor,
    boxes: Tensor,
    centres: Tensor,
    true_boxes: Tensor,
    true_labels: Tensor,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assigned:
    """Each ground-truth box takes the `topk` anchors inside it whose score^alpha * iou^beta is largest (and positive).

    scores (B, A, C) 0..1, predicted boxes (B, A, 4) px, centres (A, 2) px, true_boxes (B, M, 4) px, true_labels (B, M)
    with -1 where padded, M at least 1. The iou is CIoU clamped at 0. An anchor taken by several boxes goes to the one
    with the largest iou. The target score is the metric, scaled so that the largest of a box's anchors equals the
    largest iou of that box's anchors. A box without a cell centre inside, or without overlap with the predictions of
    the anchors inside, gets no anchor in this step.
    """
    scores, boxes, true_boxes, centres = scores.float(), boxes.float(), true_boxes.float(), centres.float()
    count, anchors, _ = scores.shape
    labels = true_labels.clamp(min=0)

    low, high = true_boxes[:, :, None].split(2, -1)  # (B, M, 1, 2)
    x, y = centres.unbind(-1)
    inside = (x > low[..., 0]) & (x < high[..., 0]) & (y > low[..., 1]) & (y < high[..., 1])  # (B, M, A)
    inside &= (true_labels >= 0)[..., None]
    iou = box_iou_aligned(true_boxes[:, :, None], boxes[:, None], "ciou").clamp_(min=0)  # (B, M, A)
    image = torch.arange(count, device=scores.device)[:, None]
    metric = scores.transpose(1, 2)[image, labels].pow_(alpha)  # (B, M, A): of the box's own class
    metric *= iou.pow(beta)
    metric *= inside

    best, chosen = metric.topk(min(topk, anchors), dim=-1)  # (B, M, k)
    claimed = torch.zeros_like(inside).scatter_(-1, chosen, best > 0)
    ground_truth = torch.where(claimed, iou, -1.0).argmax(1)  # (B, A)
    foreground = claimed.any(1)

    metric = metric.gather(1, ground_truth[:, None])[:, 0] * foreground  # (B, A): with its own box only
    iou = iou.gather(1, ground_truth[:, None])[:, 0] * foreground
    none = torch.zeros_like(true_labels, dtype=metric.dtype)
    largest_metric = none.scatter_reduce(1, ground_truth, metric, "amax")  # (B, M)
    largest_iou = none.scatter_reduce(1, ground_truth, iou, "amax")
    score = metric / largest_metric.gather(1, ground_truth).clamp(min=torch.finfo(metric.dtype).tiny)
    score = score * largest_iou.gather(1, ground_truth)
    target_scores = torch.zeros_like(scores).scatter_(2, labels.gather(1, ground_truth)[..., None], score[..., None])
    most = min(anchors, topk * labels.shape[1])
    return Assigned(foreground, ground_truth, target_scores, true_boxes[image, ground_truth], most)


@torch.no_grad()
def match_anchors(
    true_boxes: Tensor,
    true_labels: Tensor,
    anchors: Tensor,
    strides: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    ratio: float = 4.0,
) -> list[Matched]:
    """A ground-truth box matches the anchors whose width and height differ from its own by a factor less than `ratio`,
    at the cell of its centre and the nearest neighbours to the left or right and above or below, within the map.

    true_boxes (B, M, 4) px, true_labels (B, M) with -1 where padded, anchors (levels, K, 2) width, height px, sizes
    (height, width) of each level's map. Returns one `Matched` per level.
    """
    count, most = true_labels.shape
    device = true_boxes.device
    centres, extents = (true_boxes[..., :2] + true_boxes[..., 2:]) / 2, true_boxes[..., 2:] - true_boxes[..., :2]
    matched = []
    for shapes, stride, (height, width) in zip(anchors, strides, sizes, strict=True):
        factor = extents[:, :, None] / shapes.to(extents)  # (B, M, K, 2)
        fits = (torch.maximum(factor, 1 / factor).amax(-1) < ratio) & (true_labels >= 0)[..., None]  # (B, M, K)

        x, y = (centres / stride).unbind(-1)  # (B, M) in cells
        column, row = x.floor().clamp(0, width - 1), y.floor().clamp(0, height - 1)
        beside = column + torch.where(x - column < 0.5, -1, 1)
        above = row + torch.where(y - row < 0.5, -1, 1)
        columns = torch.stack([column, beside, column], -1).long()  # (B, M, 3)
        rows = torch.stack([row, row, above], -1).long()
        within = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)

        full = (count, most, len(shapes), 3)
        valid = fits[..., None] & within[:, :, None]
        columns, rows = columns.clamp(0, width - 1), rows.clamp(0, height - 1)
        parts = (
            torch.arange(count, device=device).view(-1, 1, 1, 1),
            torch.arange(len(shapes), device=device).view(1, 1, -1, 1),
            rows[:, :, None],
            columns[:, :, None],
        )
        image, anchor, rows, columns = (part.expand(full).flatten() for part in parts)
        boxes = true_boxes[:, :, None, None].expand(*full, 4).reshape(-1, 4)
        labels = true_labels.clamp(min=0)[:, :, None, None].expand(full).flatten()
        matched.append(Matched(valid.flatten(), image, anchor, rows, columns, boxes, labels))
    return matched


def kmeans_anchors(sizes: Tensor, count: int = 9, generator: torch.Generator | None = None) -> Tensor:
    """Dimension clusters: k-means of widths and heights under the distance 1 - IoU of boxes with one centre.

    sizes (n, 2) in pixels -> (count, 2) float32 by ascending area, on the CPU. The first centres are drawn as in
    k-means++. DataError where there are fewer different sizes than anchors.
    """
    sizes = sizes.cpu().float()
    distinct = sizes.unique(dim=0)
    if len(distinct) < count:
        raise DataError(f"{len(distinct)} different box sizes cannot give {count} anchors; ask for fewer anchors")

    def distances(centres: Tensor) -> Tensor:  # (n, k)
        inter = torch.minimum(sizes[:, None], centres).prod(-1)
        return 1 - inter / (sizes.prod(-1)[:, None] + centres.prod(-1) - inter)

    centres = sizes[torch.randint(len(sizes), (1,), generator=generator)]
    while len(centres) < count:
        nearest = distances(centres).amin(1).clamp(min=0)
        centres = torch.cat([centres, sizes[torch.multinomial(nearest, 1, generator=generator)]])
    cluster = torch.full((len(sizes),), -1)
    for _ in range(300):  # it settles long before, but under this distance nothing proves it
        before, cluster = cluster, distances(centres).argmin(1)
        if torch.equal(before, cluster):
            break
        members = torch.nn.functional.one_hot(cluster, count).to(sizes)  # (n, k)
        means = members.T @ sizes / members.sum(0).clamp(min=1)[:, None]
        centres = torch.where(members.any(0)[:, None], means, centres)  # an empty cluster stays where it is
    return centres[centres.prod(-1).argsort()]
