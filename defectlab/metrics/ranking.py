"""Metrics of scores that rank samples: AUROC, average precision, F1, and how far two distributions overlap."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def f1_curve(scores: np.ndarray, right: np.ndarray, wanted: int) -> np.ndarray:
    """F1 in per cent of keeping what is ranked down to each of n samples; −1 inside a run of equal scores, which no
    threshold divides. scores (n,) descending, right (n,) 0 or 1, wanted: how many there are to be found."""
    hits = np.cumsum(right)
    curve = 200 * hits / (np.arange(1, len(hits) + 1) + wanted)
    curve[:-1][scores[:-1] == scores[1:]] = -1.0
    return curve


def best_f1_threshold(scores: Tensor, labels: Tensor) -> float:
    """The score threshold (score >= threshold is anomalous) of the highest F1: used on dev, never on test.

    Returns the midpoint between the last score inside and the next one outside, so that it carries over.
    """
    order = torch.argsort(scores, descending=True)
    ranked, right = scores[order].double().cpu().numpy(), labels[order].cpu().numpy() > 0
    best = int(f1_curve(ranked, right, int(right.sum())).argmax())
    return float((ranked[best] + ranked[best + 1]) / 2) if best + 1 < len(ranked) else float(ranked[best])


def auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the ROC curve in per cent; ties count half, as in scikit-learn.

    scores (n,), labels (n,) with 1 = anomalous, weights (n,) non-negative, for example bootstrap multiplicities. NaN
    when a class is missing; NaN scores are a ValueError.
    """
    positive, negative = _by_score(scores, labels, weights)
    if positive.sum() == 0 or negative.sum() == 0:
        return math.nan
    below = negative.sum() - np.cumsum(negative) + negative / 2
    return float(100 * (positive @ below) / (positive.sum() * negative.sum()))


def average_precision(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Average precision in per cent, by scikit-learn's definition Σ (R_k − R_(k−1)) P_k; arguments as `auroc`."""
    positive, negative = _by_score(scores, labels, weights)
    if positive.sum() == 0 or negative.sum() == 0:
        return math.nan
    found = positive > 0  # the other thresholds add no recall
    true, false = np.cumsum(positive)[found], np.cumsum(negative)[found]
    return float(100 * (positive[found] @ (true / (true + false))) / positive.sum())


def f1_max(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Largest F1 over all thresholds in per cent (an oracle: it looks at the labels); arguments as `auroc`."""
    positive, negative = _by_score(scores, labels, weights)
    if positive.sum() == 0 or negative.sum() == 0:
        return math.nan
    true, false = np.cumsum(positive), np.cumsum(negative)
    return float(100 * np.max(2 * true / (true + false + positive.sum())))


def overlap(a: Sequence[float], b: Sequence[float], bins: int = 10) -> float:
    """The share, 0..1, that the score distributions of two samples have in common: Σ min(p_k, q_k).

    p and q are the histograms of a and b, each divided by its sum, on `bins` common bins of equal width from the
    smallest to the largest value of both. Small samples of one distribution share less than 1 (22 and 93 values in 10
    bins about 0.73, in 30 bins 0.54): compare equal sizes and bins only.

    An empty sample, a value that is not finite, or bins < 1 is a ValueError.
    """
    a, b = as_vector(a, "a"), as_vector(b, "b")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("scores must be finite: the model that gave them has diverged")
    edges = np.histogram_bin_edges(np.concatenate([a, b]), bins)
    p, q = (np.histogram(sample, edges)[0] / sample.size for sample in (a, b))
    return float(np.minimum(p, q).sum())


def as_vector(values: Sequence[float], name: str) -> np.ndarray:
    """(n,) float64; ValueError where it is empty."""
    values = np.asarray(values, dtype=np.float64).reshape(-1)
    if values.size == 0:
        raise ValueError(f"{name} is empty: give at least one value")
    return values


def _by_score(scores, labels, weights) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the positives and of the negatives at each distinct score, from the highest score down."""
    scores, positive = np.asarray(scores), np.asarray(labels) > 0
    if scores.ndim != 1 or scores.shape != positive.shape:
        raise ValueError(f"scores {scores.shape} and labels {positive.shape} must be vectors of one length")
    if np.isnan(scores).any():
        raise ValueError("scores contain NaN: the model that gave them has diverged")
    weights = np.ones(scores.size) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != scores.shape:
        raise ValueError(f"weights must have the shape of scores {scores.shape}, got {weights.shape}")
    distinct, group = np.unique(scores, return_inverse=True)
    found = np.bincount(group, weights * positive, distinct.size)
    false_alarms = np.bincount(group, weights * ~positive, distinct.size)
    return found[::-1], false_alarms[::-1]
