"""Metrics of binary segmentation: over the data set from counted pixels, and means over the images.

What the two-stage paper (Machines 2025, 13, 712, Table 4) names without defining: MAE, mDic, mIoU, weighted F,
S-measure, mean E-measure. The last three and MAE by pysodmetrics; tests hold the counted ones against torchmetrics.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

COUNTS = ("tp", "fp", "fn", "tn")
OF_COUNTS: dict[str, Callable[..., float]] = {
    "miou": lambda tp, fp, fn, tn: (_ratio(tp, tp + fp + fn) + _ratio(tn, tn + fp + fn)) / 2,
    "iou": lambda tp, fp, fn, tn: _ratio(tp, tp + fp + fn),
    "dice": lambda tp, fp, fn, tn: _ratio(2 * tp, 2 * tp + fp + fn),
    "accuracy": lambda tp, fp, fn, tn: _ratio(tp + tn, tp + fp + fn + tn),
}
OF_IMAGES = ("mae", "weighted_f", "s_measure", "e_measure")
NONEMPTY = tuple(f"{name}_nonempty" for name in ("dice", *OF_IMAGES))
METRICS = (*OF_COUNTS, *OF_IMAGES, *NONEMPTY)
THRESHOLDS = [step / 20 for step in range(1, 20)]


@dataclass(frozen=True)
class SegmentationMetrics:
    """Metrics in per cent, NaN where undefined.

    `overall` has all of `METRICS`; `per_class` the same for the images of each type alone, "good" among them. `images`
    are arrays (N,) from which `statistic` gives them again: tp, fp, fn, tn (int64, pixels), mae, weighted_f, s_measure,
    e_measure (float64, per cent) and nonempty (bool: the ground truth has foreground).
    """

    overall: dict[str, float]
    per_class: dict[str, dict[str, float]]
    images: dict[str, np.ndarray]


def segmentation_metrics(
    probabilities: Tensor, masks: Tensor, types: Sequence[int], type_names: Sequence[str], threshold: float
) -> SegmentationMetrics:
    """Metrics of a test set.

    probabilities (N, H, W) float in 0..1 and masks (N, H, W), not 0 = foreground, on one device; types (N,) index into
    `type_names`. Foreground is found where the probability is above `threshold`. In per cent:

    miou, iou, dice, accuracy: from the pixels of all images together; iou and dice of the foreground, miou the mean of
      the IoU of foreground and of background. The first three are NaN where nothing is and nothing is found.
    mae, weighted_f, s_measure, e_measure: means over the images, of the probabilities as they are (not stretched to
      0..1). For an empty mask pysodmetrics gives a weighted F of 0 whatever was found, an S-measure of 1 − the mean
      probability, and an E-measure of the share of pixels below the threshold. e_measure is the mean over the 256
      thresholds 0/255 .. 255/255; at the first, all pixels are foreground: a perfect map gets 99.7, with an empty
      mask 99.6, not 100.
    dice_nonempty (the mean over images of their Dice), mae_nonempty ...: means over the images with foreground.

    ValueError: shapes that contradict each other, probabilities outside 0..1 or NaN.
    """
    if probabilities.ndim != 3 or probabilities.shape != masks.shape or len(types) != len(masks):
        shapes = f"{tuple(probabilities.shape)}, {tuple(masks.shape)} and {len(types)} types"
        raise ValueError(f"probabilities and masks must both be (N, H, W), with N types; got {shapes}")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities must lie in 0..1: give the sigmoid of the logits; NaN: it has diverged")
    images = _of_each_image(probabilities.detach().float(), masks != 0, threshold)
    types = np.asarray(torch.as_tensor(types).cpu())
    per_class = {type_names[t]: _all_metrics(images, (types == t).astype(float)) for t in np.unique(types)}
    return SegmentationMetrics(_all_metrics(images, np.ones(len(types))), per_class, images)


def best_threshold(probabilities: Tensor, masks: Tensor) -> float:
    """The threshold among 0.05, 0.10 .. 0.95 of the highest foreground IoU over the set (that is: over dev).

    Arguments as in `segmentation_metrics`. Among equals the one nearest to 0.5; 0.5 where no image has foreground.
    """
    probabilities, masks = probabilities.float(), masks != 0
    if not masks.any():
        return 0.5

    def iou(threshold: float) -> float:
        found = probabilities > threshold
        return _ratio(int((found & masks).sum()), int((found | masks).sum()))

    return max(THRESHOLDS, key=lambda threshold: (iou(threshold), -abs(threshold - 0.5)))


def statistic(arrays: dict[str, np.ndarray], metric: str) -> Callable[[np.ndarray], float]:
    """(weight of each image, shape (N,)) -> one of `METRICS` in per cent, from a record's arrays.

    `arrays` holds `SegmentationMetrics.images` under names that begin with "image_". ValueError for another metric.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown segmentation metric {metric!r}: use one of {', '.join(METRICS)}")
    images = {name: arrays[f"image_{name}"] for name in (*COUNTS, *OF_IMAGES, "nonempty")}
    return partial(_metric, images, metric)


def _of_each_image(probabilities: Tensor, masks: Tensor, threshold: float) -> dict[str, np.ndarray]:
    from py_sod_metrics import MAE, Emeasure, Smeasure, WeightedFmeasure  # no other study needs it

    found, truth = (x.flatten(1).cpu().numpy() for x in (probabilities > threshold, masks > 0))  # (N, pixels) bool
    tp, fp, fn, tn = (np.sum(x, 1) for x in (found & truth, found & ~truth, ~found & truth, ~found & ~truth))
    mae, weighted_f, s_measure, e_measure = measures = MAE(), WeightedFmeasure(), Smeasure(), Emeasure()
    for one, mask in zip(probabilities.double().cpu().numpy(), masks.cpu().numpy(), strict=True):
        for measure in measures:
            measure.step(one, mask, normalize=False)
    means = {
        "mae": mae.maes,
        "weighted_f": weighted_f.weighted_fms,
        "s_measure": s_measure.sms,
        "e_measure": [curve.mean() for curve in e_measure.changeable_ems],
    }
    counts = {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
    return counts | {name: 100 * np.array(values, float) for name, values in means.items()} | {"nonempty": tp + fn > 0}


def _all_metrics(images: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
    return {metric: _metric(images, metric, weights) for metric in METRICS}


def _metric(images: dict[str, np.ndarray], metric: str, weights: np.ndarray) -> float:
    if metric in OF_COUNTS:
        return 100 * OF_COUNTS[metric](*(float(weights @ images[name]) for name in COUNTS))
    name = metric.removesuffix("_nonempty")
    if name != metric:
        weights = weights * images["nonempty"]
    if name == "dice":
        wrong = images["fp"] + images["fn"]
        values = 200 * images["tp"] / np.maximum(2 * images["tp"] + wrong, 1)
    else:
        values = images[name]
    return _ratio(float(weights @ values), float(weights.sum()))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
