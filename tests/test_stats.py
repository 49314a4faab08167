"""Intervals and tests against scipy and scikit-learn; each verdict by a hand-worked case."""

import math
from unittest.mock import Mock

import numpy as np
import pytest
from scipy import stats as distributions
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from defectlab.metrics.ranking import auroc, average_precision, f1_max, overlap
from defectlab.verdicts.stats import (
    Difference,
    Interval,
    holm,
    judge_gain,
    judge_level,
    judge_reconstruction,
    mean_interval,
    paired_bootstrap,
    pooled_difference,
    verdict_allowed,
)


def interval(low, high):
    return Interval((low + high) / 2, low, high, 5)


# --- Between seeds ---------------------------------------------------------------------------------------------------


def test_mean_interval():
    values = [96.1, 97.0, 95.4, 96.6]
    result = mean_interval(values)
    low, high = distributions.t.interval(0.95, 3, np.mean(values), distributions.sem(values))
    assert (result.low, result.high) == pytest.approx((low, high))
    assert (result.mean, result.n) == (pytest.approx(96.275), 4)
    # By hand: 1, 2, 3 has s = 1, and the 97.5 % point of t with 2 degrees of freedom is 4.3027.
    assert mean_interval([1, 2, 3]).high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)


def test_one_seed_has_no_interval():
    result = mean_interval([90.0])
    assert (result.mean, result.n) == (90.0, 1)
    assert all(math.isnan(value) for value in (result.low, result.high, mean_interval([90.0, math.nan]).low))
    with pytest.raises(ValueError, match="values is empty"):
        mean_interval([])


def test_pooled_difference_of_two_rows_is_the_t_test():
    a, b = [3.1, 4.0, 3.6], [2.0, 2.9, 2.2, 3.0]
    result = pooled_difference(a, b, [a, b])
    expected = distributions.ttest_ind(a, b, equal_var=True)
    low, high = expected.confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((low, high))
    assert result.p == pytest.approx(expected.pvalue)
    assert (result.mean, result.df) == (pytest.approx(np.mean(a) - np.mean(b)), 5)


def test_pooled_difference_over_a_table():
    # Rows with squared deviations 2, 2, 8 and 0 and 2 + 2 + 2 + 0 degrees of freedom: variance 12 / 6 = 2.
    a, b = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    result = pooled_difference(a, b, [a, b, [0.0, 2.0, 4.0], [7.0], []])
    half = 2.446912 * math.sqrt(2 * (1 / 3 + 1 / 3))  # t with 6 degrees of freedom
    assert result.df == 6
    assert (result.low, result.high) == pytest.approx((-3 - half, -3 + half), abs=1e-5)
    # Rows with one seed borrow the spread of the others.
    assert pooled_difference([2.0], [1.0], [[2.0], [1.0], a]).high == pytest.approx(
        1 + 4.302653 * math.sqrt(2), abs=1e-5
    )


def test_pooled_difference_without_spread():
    single = pooled_difference([2.0], [1.5], [[2.0], [1.5]])
    assert (single.mean, single.df) == (0.5, 0)
    assert all(math.isnan(value) for value in (single.low, single.high, single.p))
    equal, two = [1.0, 1.0], [2.0, 2.0]
    assert pooled_difference(equal, equal, [equal, equal]) == Difference(0.0, 0.0, 0.0, 1.0, 2)
    assert pooled_difference(two, equal, [equal, two]) == Difference(1.0, 1.0, 1.0, 0.0, 2)
    assert math.isnan(pooled_difference([1.0, math.nan], equal, [[1.0, math.nan], equal]).p)
    with pytest.raises(ValueError, match="b is empty"):
        pooled_difference(equal, [], [equal])


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04; the last is raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == pytest.approx([0.2])
    assert holm([]).shape == (0,)
    for broken in ([0.1, math.nan], [1.2], [-0.1]):
        with pytest.raises(ValueError, match="p values"):
            holm(broken)


# --- Scores ----------------------------------------------------------------------------------------------------------


def scored_images(seed=0, count=200, levels=None):
    generator = np.random.default_rng(seed)
    labels = generator.random(count) < 0.6
    scores = generator.normal(size=count) + labels
    weights = generator.integers(0, 4, count)
    return (np.round(scores * levels) / levels if levels else scores), labels, weights


@pytest.mark.parametrize("levels", [None, 1])
def test_weighted_metrics_are_those_of_repeated_samples(levels):
    scores, labels, weights = scored_images(levels=levels)
    repeated = np.repeat(labels, weights), np.repeat(scores, weights)
    for metric, reference in ((auroc, roc_auc_score), (average_precision, average_precision_score)):
        assert metric(scores, labels) == pytest.approx(100 * reference(labels, scores))
        assert metric(scores, labels, weights) == pytest.approx(100 * reference(*repeated))
    precision, recall, _ = precision_recall_curve(*repeated)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert f1_max(scores, labels, weights) == pytest.approx(100 * best)


@pytest.mark.parametrize("metric", [auroc, average_precision, f1_max])
def test_metrics_of_one_class_are_nan(metric):
    assert math.isnan(metric([0.1, 0.2], [1, 1]))
    assert math.isnan(metric([0.1, 0.2], [0, 1], [1, 0]))
    for arguments, why in (
        (([0.1, math.nan], [0, 1]), "NaN"),
        (([0.1, 0.2], [0, 1], [1]), "weights"),
        (([0.1, 0.2], [0, 1, 1]), "vectors"),
    ):
        with pytest.raises(ValueError, match=why):
            metric(*arguments)


def test_overlap_by_hand():
    # Four bins of width 1 from 0 to 4: p = 2/4, 1/4, 1/4, 0 and q = 0, 1/5, 2/5, 2/5, so 0 + 1/5 + 1/4 + 0.
    a, b = [0, 0.5, 1.5, 2.5], [1.2, 2.2, 2.4, 3.5, 4]
    assert overlap(a, b, bins=4) == pytest.approx(0.45)
    assert overlap(b, a, bins=4) == pytest.approx(0.45)
    assert overlap(100 * np.array(a) - 7, 100 * np.array(b) - 7, bins=4) == pytest.approx(0.45)
    assert overlap(a, b, bins=1) == 1.0
    assert overlap([0.0, 0.1], [0.9, 1.0]) == 0.0
    assert overlap([0.0, 1.0, 0.0, 1.0], [1.0, 0.0]) == 1.0
    assert overlap([5.0, 5.0], [5.0]) == 1.0  # no range at all


def test_overlap_of_small_samples_of_one_distribution():
    generator = np.random.default_rng(0)  # the docstring's 0.73
    few = [overlap(generator.normal(size=22), generator.normal(size=93)) for _ in range(200)]
    assert np.mean(few) == pytest.approx(0.73, abs=0.02)


@pytest.mark.parametrize(
    ("a", "b", "bins", "named"), [([], [1.0], 3, "a is empty"), ([1.0], [math.nan], 3, "finite"), ([1], [2], 0, "bins")]
)
def test_overlap_names_what_is_wrong(a, b, bins, named):
    with pytest.raises(ValueError, match=named):
        overlap(a, b, bins)


# --- Between images --------------------------------------------------------------------------------------------------


def test_bootstrap_covers():
    """Of 200 samples of 40, the 95 % interval holds the true mean 0 in about 188."""
    hits = 0
    for trial, values in enumerate(np.random.default_rng(4).normal(size=(200, 40))):
        result = paired_bootstrap(lambda weights, v=values: float(weights @ v / 40), 40, repeats=200, seed=trial)
        hits += result.low <= 0 <= result.high
    assert 176 <= hits <= 199


def test_strata_keep_their_sizes():
    statistic = Mock(return_value=0.0)
    paired_bootstrap(statistic, 8, np.array(["good"] * 3 + ["scratch"] * 5), repeats=30)
    seen = np.array([call.args[0] for call in statistic.call_args_list])
    assert (seen[:, :3].sum(1) == 3).all() and (seen[:, 3:].sum(1) == 5).all()
    assert np.issubdtype(seen.dtype, np.integer) and seen.std() > 0


def test_pairing_removes_what_two_models_share():
    scores, labels, _ = scored_images()
    better = scores + 0.1 * labels
    single = paired_bootstrap(lambda w: auroc(better, labels, w), 200, labels, repeats=300)
    paired = paired_bootstrap(lambda w: auroc(better, labels, w) - auroc(scores, labels, w), 200, labels, repeats=300)
    assert paired.low > 0
    assert paired.high - paired.low < (single.high - single.low) / 3


def test_bootstrap_edges():
    undefined = paired_bootstrap(lambda weights: math.nan, 4, repeats=5)
    assert all(math.isnan(value) for value in (undefined.mean, undefined.low, undefined.high))
    # Without strata, two images of two classes often lack one: those repeats are left out.
    two = paired_bootstrap(lambda w: auroc([0.1, 0.9], [0, 1], w), 2, repeats=50)
    assert (two.mean, two.low, two.high) == (100, 100, 100)
    with pytest.raises(ValueError, match="n_images=0"):
        paired_bootstrap(lambda weights: 0.0, 0)
    with pytest.raises(ValueError, match="strata must have shape"):
        paired_bootstrap(lambda weights: 0.0, 3, [0, 1])


# --- Verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(97, 99, "agrees"), (98, 99, "agrees"), (97, 98, "agrees"), (98.1, 99, "above"), (96, 97.9, "below")],
)
def test_level(low, high, verdict):
    assert judge_level(interval(low, high), 98) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict", "corrected"),  # corrected: where it does not survive the correction
    [
        (0.5, 2.5, "reproduced", "undecided"),
        (0.5, 2.0, "reproduced", "undecided"),  # touching g contains it
        (2.0, 3.0, "reproduced", "undecided"),
        (0.5, 1.5, "direction only", "no gain seen"),
        (2.1, 3.0, "larger than printed", "undecided"),
        (-1.0, 2.5, "undecided", "undecided"),
        (0.0, 2.5, "undecided", "undecided"),  # touching 0 contains it
        (-1.0, 1.0, "no gain seen", "no gain seen"),
        (-1.0, 0.0, "no gain seen", "no gain seen"),
        (-2.0, -0.1, "opposite", "no gain seen"),
    ],
)
def test_gain(low, high, verdict, corrected):
    assert judge_gain(interval(low, high), 2.0) == verdict
    assert judge_gain(Difference((low + high) / 2, low, high, 0.01, 8), 2.0, adjusted_p=0.05) == verdict
    assert judge_gain(interval(low, high), 2.0, adjusted_p=0.051) == corrected


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 2, "supports"), (0, 2, "no evidence"), (-1, 0, "no evidence"), (-2, -0.1, "contradicts")],
)
def test_reconstruction(low, high, verdict):
    assert judge_reconstruction(interval(low, high)) == verdict
    assert judge_reconstruction(interval(low, high), adjusted_p=0.2) == "no evidence"


@pytest.mark.parametrize("printed", [0.0, -1.0, math.nan])
def test_meaningless_verdicts_are_errors(printed):
    with pytest.raises(ValueError, match="printed gain must be positive"):
        judge_gain(interval(1, 2), printed)
    for judge in (judge_gain, judge_level):
        with pytest.raises(ValueError, match="needs more seeds"):
            judge(mean_interval([1.0]), 1.0)


@pytest.mark.parametrize(
    ("n", "profile", "why"),
    [
        (1, "paper", "one seed: no verdict"),
        (1, "quick", "one seed: no verdict"),  # one rule, whatever the profile
        (2, "paper", "2 seeds: no verdict"),
        (3, "paper", None),
        (2, "quick", "2 seeds: no verdict"),
        (3, "quick", None),
        (1, "smoke", "no verdict: synthetic data"),
    ],
)
def test_who_gets_a_verdict(n, profile, why):
    assert verdict_allowed(n, profile) == why
