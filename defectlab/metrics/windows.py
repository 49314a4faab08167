"""Metrics of classifiers: with two classes and one threshold, what is found and what reported falsely; with several,
how many are right."""

import numpy as np


def shares(scores: np.ndarray, labels: np.ndarray, threshold: float, weights: np.ndarray | None = None) -> dict:
    """ "found": the share of defective samples with score >= threshold, "false_alarms": that of the good ones, in per
    cent; NaN where there are none. scores, labels (n,), weights (n,) non-negative."""
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, float)
    reported, bad = np.asarray(scores) >= threshold, np.asarray(labels) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "found": float(100 * np.divide((weights * (reported & bad)).sum(), (weights * bad).sum())),
            "false_alarms": float(100 * np.divide((weights * (reported & ~bad)).sum(), (weights * ~bad).sum())),
        }


def balanced_accuracy(
    scores: np.ndarray, labels: np.ndarray, threshold: float, weights: np.ndarray | None = None
) -> float:
    """Mean of the share of defective samples found and of the share of good ones passed, in per cent: 50 is chance."""
    found = shares(scores, labels, threshold, weights)
    return (found["found"] + 100 - found["false_alarms"]) / 2


def best_balanced_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold of the highest balanced accuracy, midway to the next score below: used on dev, never on test.
    ValueError where a class is missing."""
    scores, bad = np.asarray(scores, float), np.asarray(labels) > 0
    if bad.all() or not bad.any():
        raise ValueError("a threshold needs good and defective samples")
    order = np.argsort(-scores, kind="stable")
    ranked, right = scores[order], bad[order]
    gain = np.cumsum(right) / right.sum() - np.cumsum(~right) / (~right).sum()
    gain[:-1][ranked[:-1] == ranked[1:]] = -1.0  # no threshold divides equal scores
    best = int(gain.argmax())
    return float((ranked[best] + ranked[best + 1]) / 2) if best + 1 < len(ranked) else float(ranked[best])


def class_accuracy(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Answered and true classes (n,), weights (n,) non-negative -> the mean over the classes of the share of each that
    is right, in per cent; NaN where a class has no weight."""
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, float)
    right, members = weights * (answers == labels), [labels == label for label in np.unique(labels)]
    with np.errstate(invalid="ignore"):
        return float(100 * np.mean([np.divide(right[own].sum(), weights[own].sum()) for own in members]))
