"""Thresholds on image scores, against counting: what they report of the good images, and what they miss."""

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score

from defectlab.metrics.thresholds import f1_at, f1_regret, missed_at, normal_threshold


@pytest.fixture(params=range(6))
def drawn(request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties, labels, multiplicities."""
    rng = np.random.default_rng(request.param)
    labels = rng.integers(0, 2, 40)
    return rng.integers(0, 15, 40) + 4.0 * labels, labels, rng.integers(0, 4, 40)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.95, 1.0])
def test_the_threshold_is_the_lowest_score_with_few_enough_above(quantile: float) -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 10, 20, 101):
        for scores in (rng.normal(size=count), rng.integers(0, 4, count)):
            few = [s for s in scores if (scores > s).sum() <= (1 - quantile) * (count - 1) + 1e-9]
            assert normal_threshold(scores, quantile) == min(few)


def test_f1_and_regret_against_scikit_learn(drawn) -> None:
    scores, labels, weights = drawn
    by_threshold = {t: 100 * f1_score(labels, scores >= t, sample_weight=weights) for t in np.unique(scores)}
    best = max(by_threshold.values())
    for threshold, f1 in by_threshold.items():
        assert f1_at(scores, labels, threshold, weights) == pytest.approx(f1)
        assert f1_regret(scores, labels, threshold, weights) == pytest.approx(best - f1)
    many = np.repeat(np.arange(40), weights)
    assert f1_regret(scores[many], labels[many], 9.0) == pytest.approx(f1_regret(scores, labels, 9.0, weights))
    assert f1_regret(scores, labels, 99.0, weights) == pytest.approx(best)  # reports none


@pytest.mark.parametrize("false_alarms", [0.0, 0.05, 0.29, 0.5, 1.0])
def test_missed_against_all_thresholds(drawn, false_alarms: float) -> None:
    scores, labels, weights = drawn
    many = np.repeat(np.arange(40), weights)
    good, bad = (scores[many][labels[many] == label] for label in (0, 1))
    lowest = min(t for t in [*np.unique(scores), np.inf] if (good >= t).sum() <= false_alarms * len(good) + 1e-9)
    expected = 100 * (bad < lowest).mean()
    assert missed_at(scores, labels, false_alarms, weights) == pytest.approx(expected)
    assert missed_at(scores[many], labels[many], false_alarms) == pytest.approx(expected)


def test_missed_by_hand() -> None:
    scores, labels = np.array([9.0, 8, 8, 7, 1]), np.array([1, 1, 0, 1, 0])
    assert missed_at(scores, labels, 0.0) == pytest.approx(200 / 3)  # 8 cannot be divided
    assert missed_at(scores, labels, 0.5) == 0
    assert missed_at(-scores, labels, 0.0) == 100  # the highest score is a good image's
    hundred = np.r_[np.arange(100.0), 71]  # 29 of the good ones have 71 or more
    assert missed_at(hundred, np.r_[np.zeros(100), 1], 0.29) == 0  # though 0.29 * 100 is a little below 29


def test_where_a_class_or_all_scores_are_missing() -> None:
    scores = np.arange(3.0)
    for labels in (np.zeros(3), np.ones(3)):
        assert math.isnan(f1_regret(scores, labels, 1.0)) and math.isnan(missed_at(scores, labels, 0.1))
    assert math.isnan(missed_at(scores, np.array([0, 1, 1]), 0.1, np.array([0, 1, 1])))  # a class of weight 0
    with pytest.raises(ValueError, match="needs the scores"):
        normal_threshold(np.array([]), 0.9)
