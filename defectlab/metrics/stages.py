"""An inspection in stages: what each stage finds alone, what all find together, and whether misses multiply.

If stages missed defects independently of each other, all together would find the product of what each finds alone. If
all miss the same difficult ones, together they find more. A stage is asked about every defect, whatever the others
say of it, at the threshold that it has in the whole.
"""

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor
from torchvision.ops import box_iou

from defectlab.metrics.detection import Boxes, match
from defectlab.metrics.per_image import FALSE_BOXES, third_edges

STAGES = ("region", "part", "class")


def at_false_boxes(predictions: Boxes, ground_truth: Boxes, rate: float = FALSE_BOXES) -> float:
    """The score above which boxes are kept so that at most `rate` false ones an image remain: that of the first box too
    many, 0.0 where there is none. Chosen on the images that it is used on: an oracle, as `recall_statistic` has it."""
    matches = match(predictions, ground_truth, (0.5,))
    too_many = np.cumsum(~matches.right[:, 0]) > rate * len(ground_truth) + 1e-9
    return float(matches.scores[too_many.argmax()]) if too_many.any() else 0.0


def best_scores(predictions: Boxes, ground_truth: Boxes, iou: float = 0.5) -> np.ndarray:
    """(n,) the highest score of a box that overlaps each ground-truth box by at least the IoU, image after image; 0
    where none does."""
    found = [np.zeros(0, np.float32)]
    for predicted, truth in zip(predictions, ground_truth, strict=True):
        overlap: Tensor = box_iou(truth["boxes"].double(), predicted["boxes"].double())  # (m, n)
        found.append(((overlap >= iou) * predicted["scores"]).numpy().max(1, initial=0.0))
    return np.concatenate(found)


def keeping(scores: np.ndarray, share: float) -> float:
    """The highest threshold by which "score >= threshold" keeps at least `share` per cent of the (n,) scores.
    ValueError where there are none."""
    if not len(scores):
        raise ValueError("a threshold that keeps a share of the defects needs defects: dev has none")
    lost = math.floor(len(scores) * (100 - share) / 100 + 1e-9)
    return float(np.sort(scores)[min(lost, len(scores) - 1)])


# --- Of a record's arrays: pit_<stage> and pit_total (n,) bool, pit_image (n,), pit_side (n,) px ----------------------


def recalls(arrays: dict[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, float]:
    """In per cent of the defects: recall_<stage> of each stage alone, their product, recall_joint (each stage alone
    finds it), recall_total (found by all together), beyond_product = total - product. Without stages the total alone.

    weights (n,) of the defects, 1 each by default. NaN without defects.
    """
    weights = np.ones(len(arrays["pit_total"])) if weights is None else weights
    total = float(weights.sum())

    def share(found: np.ndarray) -> float:
        return 100 * float(weights @ found) / total if total else math.nan

    stages = [name for name in STAGES if f"pit_{name}" in arrays]
    values = {f"recall_{name}": share(arrays[f"pit_{name}"]) for name in stages}
    whole = {"recall_total": share(arrays["pit_total"])}
    if not stages:
        return whole
    product = 100 * math.prod(value / 100 for value in values.values())
    joint = share(np.all([arrays[f"pit_{name}"] for name in stages], axis=0))
    beyond = whole["recall_total"] - product
    return values | {"recall_product": product, "recall_joint": joint} | whole | {"beyond_product": beyond}


def product_statistic(
    arrays: dict[str, np.ndarray], metric: str = "beyond_product"
) -> Callable[[np.ndarray | None], float]:
    """(weight of each image, None: 1 each) -> a value of `recalls`; the thresholds stay as they are."""
    return lambda weights: recalls(arrays, None if weights is None else weights[arrays["pit_image"]])[metric]


def by_size(arrays: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """`recalls` of the smallest third of the defects, the middle and the largest one, with "pits", how many these are,
    and "from" and "to", the sides sqrt(width * height) of the smallest and the largest, px. Equal sides stay together.
    """
    side = arrays["pit_side"]
    group = np.searchsorted(third_edges(side), side)
    found = []
    for number in np.unique(group):
        own = group == number
        sizes = {"pits": int(own.sum()), "from": float(side[own].min()), "to": float(side[own].max())}
        found.append(sizes | recalls(arrays, own.astype(float)))
    return found
