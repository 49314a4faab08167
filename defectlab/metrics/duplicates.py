"""How often a detector finds the same object: what non-maximum suppression is there to prevent."""

import math

import numpy as np
from torchvision.ops import box_iou

from defectlab.metrics.detection import Boxes

SURE = 0.25  # a score from which on boxes are shown


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
