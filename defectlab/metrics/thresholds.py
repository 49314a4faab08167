"""What a threshold costs: chosen without defects, against the best one; and what is missed at a bearable alarm rate."""

import math

import numpy as np

from defectlab.metrics.ranking import f1_max


def normal_threshold(good_scores: np.ndarray, quantile: float) -> float:
    """The quantile of the scores (n,) of held-out good images, the higher of two neighbours: "score >= threshold"
    reports about 1 - quantile of such images. ValueError without scores."""
    if not len(good_scores):
        raise ValueError("a threshold needs the scores of held-out good images")
    return float(np.quantile(np.asarray(good_scores, float), quantile, method="higher"))


def f1_at(scores: np.ndarray, labels: np.ndarray, threshold: float, weights: np.ndarray | None = None) -> float:
    """F1 in per cent of "score >= threshold"; arguments as in `ranking.auroc`; NaN where nothing is defective."""
    bad, reported = np.asarray(labels) > 0, np.asarray(scores) >= threshold
    weights = np.ones(len(bad)) if weights is None else np.asarray(weights, float)
    if not (weights @ bad):
        return math.nan
    return float(200 * (weights @ (bad & reported)) / (weights @ bad + weights @ reported))


def f1_regret(scores: np.ndarray, labels: np.ndarray, threshold: float, weights: np.ndarray | None = None) -> float:
    """The best F1 over all thresholds (an oracle) less that at this one, in points."""
    return f1_max(scores, labels, weights) - f1_at(scores, labels, threshold, weights)


def missed_at(scores: np.ndarray, labels: np.ndarray, false_alarms: float, weights: np.ndarray | None = None) -> float:
    """Per cent of the defective images missed at the lowest threshold that reports at most this share of the good ones
    (an oracle: it looks at the test's good images); NaN where a class is missing. Arguments as in `ranking.auroc`."""
    scores, bad = np.asarray(scores, float), np.asarray(labels) > 0
    weights = np.ones(len(bad)) if weights is None else np.asarray(weights, float)
    if not (weights @ bad) or not (weights @ ~bad):
        return math.nan
    distinct, group = np.unique(-scores, return_inverse=True)  # the highest first; no threshold divides equal ones
    found, alarms = (np.cumsum(np.bincount(group, weights * of, len(distinct))) for of in (bad, ~bad))
    allowed = alarms <= false_alarms * (weights @ ~bad) + 1e-9
    return float(100 * (1 - (found[allowed].max() if allowed.any() else 0.0) / (weights @ bad)))
