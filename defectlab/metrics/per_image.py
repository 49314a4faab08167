"""What an inspector counts: boxes too many for an object, objects found at so many false boxes an image (a point of the
FROC curve: recall at a number of false positives per image, FPPI)."""

import math
from collections.abc import Callable

import numpy as np
from torchvision.ops import box_area, box_iou

from defectlab.metrics.detection import Boxes, match, unpack

SURE = 0.25  # a score from which on boxes are shown
FALSE_BOXES = 0.1  # of an image, on average
THIRDS = ("small", "middle", "large")  # of the ground-truth boxes of a test set, by area


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


def recall_statistic(arrays: dict[str, np.ndarray], third: str | None = None) -> Callable[[np.ndarray | None], float]:
    """(weight of each image, None: 1 each) -> share of the ground-truth boxes that are found (IoU 0.5, right class), in
    per cent, at the lowest score that leaves at most `FALSE_BOXES` false boxes an image; from what `pack` gave.

    third: one of `THIRDS`, by the area of all ground-truth boxes, whatever the weights: only its boxes are to be found,
    at the same score as all. Boxes of one area are in one third, the smaller one. NaN where no box is to be found;
    ValueError for another third.
    """
    if third not in (None, *THIRDS):
        raise ValueError(f"unknown third {third!r}: use {', '.join(THIRDS)} or None")
    predictions, ground_truth, _, class_names = unpack(arrays)
    matches = match(predictions, ground_truth, (0.5,), len(class_names))
    right, wanted = matches.right[:, 0], matches.ground_truth.sum(1)
    counted = right
    if third is not None:
        areas = [box_area(truth["boxes"].double()).numpy() for truth in ground_truth]
        edges, number = third_edges(np.concatenate(areas)), THIRDS.index(third)
        inside = [np.searchsorted(edges, of_image) == number for of_image in areas]
        wanted = np.array([of_image.sum() for of_image in inside])
        found = zip(matches.images, matches.taken[:, 0], right, strict=True)
        counted = np.array([is_right and inside[image][taken] for image, taken, is_right in found], dtype=bool)

    def recall(weights: np.ndarray | None) -> float:
        weights = np.ones(len(wanted)) if weights is None else weights
        of_box = weights[matches.images]
        too_many = np.cumsum(of_box * ~right) > FALSE_BOXES * weights.sum() + 1e-9
        kept = matches.scores > (matches.scores[too_many.argmax()] if too_many.any() else -1.0)  # none of equal ones
        total = float(weights @ wanted)
        return 100 * float(of_box[kept & counted].sum()) / total if total else math.nan

    return recall


def third_edges(areas: np.ndarray) -> np.ndarray:
    """(2,) the largest area of the smaller third of n areas, and of the middle third; empty where there is none."""
    count = len(areas)
    return np.sort(areas)[[math.ceil(count / 3) - 1, math.ceil(2 * count / 3) - 1]] if count else areas
