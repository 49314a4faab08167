"""Intervals, tests and verdicts: how a measured number is compared with a printed one.

Pure functions of numbers: metrics in per cent, differences in points, intervals of 95 %. Two kinds of spread are kept
apart: between seeds (`mean_interval`, `pooled_difference`) and between test images (`paired_bootstrap`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as distributions

from defectlab.metrics.ranking import as_vector

CONFIDENCE = 0.95
MIN_SEEDS = 3
NO_VERDICT = {"smoke": "no verdict: synthetic data"}


@dataclass(frozen=True)
class Interval:
    """A point estimate and its two-sided interval; `n` counts the values (seeds or images) it rests on."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """mean(a) − mean(b), its interval, the two-sided p value of "no difference", and its degrees of freedom."""

    mean: float
    low: float
    high: float
    p: float
    df: int


# --- Between seeds ---------------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of the values of independent seeds with Student's t interval (n − 1 degrees of freedom).

    One value has no spread: low and high are NaN. No value at all is a ValueError.
    """
    values = as_vector(values, "values")
    mean, n = float(values.mean()), values.size
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = _t_quantile(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def pooled_difference(a: Sequence[float], b: Sequence[float], groups: Sequence[Sequence[float]]) -> Difference:
    """Unpaired difference mean(a) − mean(b), with one residual spread for the whole table.

    `groups` holds the seed values of every row of the table, those of a and b among them. The residual variance is
    pooled over all rows, taken to spread alike (one-way analysis of variance), df = Σ(n − 1); with groups = [a, b] it
    is Student's two-sample t test. df = 0 (one seed everywhere) gives a NaN interval and p; no residual spread at all
    an interval of width zero, p = 0 for a difference and 1 for none. An empty a or b is a ValueError.
    """
    a, b = as_vector(a, "a"), as_vector(b, "b")
    rows = [np.asarray(row, dtype=np.float64) for row in groups if len(row) > 0]
    difference = float(a.mean() - b.mean())
    df = sum(row.size - 1 for row in rows)
    if df == 0:
        return Difference(difference, math.nan, math.nan, math.nan, 0)
    variance = sum(float(((row - row.mean()) ** 2).sum()) for row in rows) / df
    error = math.sqrt(variance * (1 / a.size + 1 / b.size))
    if error == 0:
        return Difference(difference, difference, difference, float(difference == 0), df)
    half = _t_quantile(df) * error
    p = 2 * float(distributions.t.sf(abs(difference) / error, df))
    return Difference(difference, difference - half, difference + half, p, df)


def _t_quantile(df: int) -> float:
    return float(distributions.t.ppf((1 + CONFIDENCE) / 2, df))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p values (Holm, 1979), in the order given; reject where they are ≤ the level.

    A p value outside [0, 1] or NaN is a ValueError: a claim without a test must be left out before.
    """
    p = np.asarray(p_values, dtype=np.float64).reshape(-1)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p values must lie in [0, 1], got {p.tolist()}: leave out claims without a test")
    order = np.argsort(p, kind="stable")
    stepped = p[order] * np.arange(p.size, 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted


# --- Between images --------------------------------------------------------------------------------------------------


def paired_bootstrap(
    statistic: Callable[[np.ndarray], float],
    n_images: int,
    strata: Sequence | np.ndarray | None = None,
    repeats: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of `statistic` under resampling of the test images with replacement.

    statistic(weights) gets the integer multiplicity of each image, shape (n_images,), summing to n_images; that of two
    models is the difference of their metrics under the same weights, hence paired. The number of images of each of
    `strata` (n_images,), such as defect types, stays fixed. `mean` of the result is the statistic on the real set.
    Repeats in which the statistic is NaN (a class was not drawn) are left out; if all are, low and high are NaN.
    """
    if n_images < 1 or repeats < 1:
        raise ValueError(f"a bootstrap needs images and repeats, got n_images={n_images}, repeats={repeats}")
    strata = np.zeros(n_images, dtype=np.int64) if strata is None else np.asarray(strata)
    if strata.shape != (n_images,):
        raise ValueError(f"strata must have shape ({n_images},), got {strata.shape}")
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    generator = np.random.default_rng(seed)
    sampled = np.empty(repeats)
    for repeat in range(repeats):
        weights = np.zeros(n_images, dtype=np.int64)
        for index in members:
            drawn = generator.integers(index.size, size=index.size)
            weights[index] = np.bincount(drawn, minlength=index.size)
        sampled[repeat] = statistic(weights)
    value = float(statistic(np.ones(n_images, dtype=np.int64)))
    sampled = sampled[~np.isnan(sampled)]
    if sampled.size == 0:
        return Interval(value, math.nan, math.nan, n_images)
    low, high = np.quantile(sampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high), n_images)


def centred(found: Interval, exact: float) -> Interval:
    """The interval moved to the exact value: a record's arrays round, and keep only part of a detector's boxes."""
    return Interval(exact, found.low + exact - found.mean, found.high + exact - found.mean, found.n)


# --- Verdicts --------------------------------------------------------------------------------------------------------


def verdict_allowed(n: int, profile: str) -> str | None:
    """None if rows with (at least) n seeds of this profile may get a verdict, else the reason why not."""
    if n < MIN_SEEDS and profile != "smoke":
        return "one seed: no verdict" if n == 1 else f"{n} seeds: no verdict"
    return NO_VERDICT.get(profile)


def judge_level(interval: Interval, printed: float) -> str:
    """'agrees' if the interval contains the printed number (its ends included), else where the interval lies relative
    to it: 'above' or 'below'. NaN ends are a ValueError (ask `verdict_allowed` first)."""
    low, high = _ends(interval)
    return "above" if low > printed else "below" if high < printed else "agrees"


def judge_gain(interval: Interval | Difference, printed: float, adjusted_p: float | None = None) -> str:
    """Verdict on a printed gain g > 0 from the interval of the recorded one (better minus baseline).

    | interval          | contains g  | below g          | above g               |
    |-------------------|-------------|------------------|-----------------------|
    | above 0           | reproduced  | direction only   | larger than printed   |
    | contains 0        | undecided   | no gain seen     | (cannot be)           |
    | below 0           | (cannot be) | opposite         | (cannot be)           |

    An end that touches 0 or g counts as containing it. Where `adjusted_p`, the p value after `holm`, is above 0.05, the
    interval is widened to reach 0. A printed gain ≤ 0 is a ValueError: swap the two rows.
    """
    if not printed > 0:
        raise ValueError(f"a printed gain must be positive, got {printed}: swap the rows or use judge_level")
    low, high = _ends(interval, adjusted_p)
    if high < 0:
        return "opposite"
    if low > 0:
        if low > printed:
            return "larger than printed"
        return "direction only" if high < printed else "reproduced"
    return "undecided" if high >= printed else "no gain seen"


def judge_reconstruction(interval: Interval | Difference, adjusted_p: float | None = None) -> str:
    """'supports' if the whole interval is above 0, 'contradicts' if below, else 'no evidence' (touching 0 counts as
    containing it). For claims whose printed number is not at hand; `adjusted_p` as in `judge_gain`."""
    low, high = _ends(interval, adjusted_p)
    return "supports" if low > 0 else "contradicts" if high < 0 else "no evidence"


def _ends(interval: Interval | Difference, adjusted_p: float | None = None) -> tuple[float, float]:
    if not interval.low <= interval.high:  # also catches NaN
        raise ValueError(f"no verdict from ({interval.low}, {interval.high}): the interval needs more seeds")
    if adjusted_p is not None and adjusted_p > 0.05:
        return min(interval.low, 0.0), max(interval.high, 0.0)
    return interval.low, interval.high
