"""What an inspector counts: boxes too many for an object, objects found at so many false boxes an image."""

import math
from collections.abc import Callable

import numpy as np
from torchvision.ops import box_iou

from defectlab.metrics.detection import Boxes, match, unpack

SURE = 0.25  # a score from which on boxes are shown
FALSE_BOXES = 0.1  # of an image, on average


def duplicates(predictions: Boxes, ground_truth: Boxes, iou: float = 0.5) -> dict[str, float]:
    """How many boxes too many a found object has, on average: "duplicates" of boxes with a score of at least 0.25,
    "duplicates_all" of all that are given.

    A box counts for the ground-truth box of its class that it overlaps most, if by at least `iou`; an object is found
    where one counts for it. NaN where none is found. Predictions and ground truth as in `metrics.detection`.
    """
    extra, objects = np.zeros(2), np.zeros(2)
    for predicted, truth in zip(predictions, ground_truth, strict=True):
        overlap = box_iou(predicted["boxes"].double(), truth["boxes"].double()).numpy()  # (n, m)
        overlap[predicted["labels"].numpy()[:, None] != truth["labels"].numpy()] = -1.0
        if not overlap.size:
            continue
        near = overlap.max(1) >= iou
        for at, least in enumerate((SURE, 0.0)):
            kept = near & (predicted["scores"].numpy() >= least)
            count = np.bincount(overlap.argmax(1)[kept], minlength=overlap.shape[1])
            extra[at] += (count - 1).clip(min=0).sum()
            objects[at] += (count > 0).sum()
    values = np.divide(extra, objects, out=np.full(2, math.nan), where=objects > 0)
    return dict(zip(("duplicates", "duplicates_all"), values.tolist(), strict=True))


def recall_statistic(arrays: dict[str, np.ndarray]) -> Callable[[np.ndarray | None], float]:
    """(weight of each image, None: 1 each) -> share of the ground-truth boxes that are found (IoU 0.5, right class), in
    per cent, at the lowest score that leaves at most `FALSE_BOXES` false boxes an image; from what `pack` gave."""
    predictions, ground_truth, _, class_names = unpack(arrays)
    matches = match(predictions, ground_truth, (0.5,), len(class_names))
    right, wanted = matches.right[:, 0], matches.ground_truth.sum(1)

    def recall(weights: np.ndarray | None) -> float:
        weights = np.ones(len(wanted)) if weights is None else weights
        of_box = weights[matches.images]
        kept = np.cumsum(of_box * ~right) <= FALSE_BOXES * weights.sum() + 1e-9
        total = float(weights @ wanted)
        return 100 * float(of_box[kept & right].sum()) / total if total else math.nan

    return recall
