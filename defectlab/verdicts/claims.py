"""Claims and their verdicts: what a paper's sentences say, as comparisons that recorded runs can test.

Claims are data (`results/papers/<study>/claims.toml`). Four kinds:

- "gain": metric of row `a` less that of row `b`, in points;
- "order": the gain at some defect `types` minus the mean gain over all types: a difference of differences;
- "level": metric of row `a` is `at_most` or `at_least` a number, by its interval over test images;
- "bound": a cost of `a`, or its ratio to that of `b`, is `at_most` or `at_least` a number; of a timed cost on the
  device on which the study's networks were timed in turns.
"""

import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from defectlab.files import project_root
from defectlab.runs import Record
from defectlab.verdicts import stats
from defectlab.verdicts.measured import (
    BOOTSTRAPPED,
    COSTS,
    METRIC_NAMES,
    UNITS,
    Timing,
    bootstrap_level,
    image_statistic,
    is_timed,
    over_images,
    value_of,
    written,
)

Claim = dict[str, Any]
NOT_PRIMARY = "not primary: interval only"
Found = Mapping[str, Mapping[str, list[Record]]]  # profile -> row -> its records, the best profile first


@dataclass(frozen=True)
class Judged:
    """One claim, measured, and what follows.

    A gain or order has `difference` over seeds and, where there is a bootstrap, `images` over test images; a bound has
    `value`, and of a timed cost its `device`; a level `value`, `images`, by which it is judged, and beside it `seeds`.
    """

    claim: Claim
    n: int
    verdict: str
    profile: str = ""  # of the records
    difference: stats.Difference | None = None
    images: stats.Interval | None = None
    value: float | None = None
    seeds: stats.Interval | None = None
    device: str = ""


def claims_of(study_name: str) -> list[Claim]:
    path = project_root() / "results" / "papers" / study_name / "claims.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))["claim"] if path.exists() else []


def claim_value(claim: Claim, record: Record) -> float:
    """What a claim compares, of one record: the metric, or (kind "order") its mean over the claim's defect types less
    its mean over all types, so that the difference of two rows is the extra gain at those types."""
    if claim["kind"] != "order":
        return value_of(record, claim["metric"])
    missing = set(claim["types"]) - set(record.per_class)
    if missing:
        raise ValueError(f"claim {claim['id']!r} names defect types that {record.key} lacks: {sorted(missing)}")
    values = {t: m.get(claim["metric"], math.nan) for t, m in record.per_class.items()}
    return float(np.mean([values[t] for t in claim["types"]]) - np.mean(list(values.values())))


def _claim_statistic(claim: Claim, record: Record):
    """`claim_value` of one record as a function of the weight of each test image."""
    if claim["kind"] != "order":
        return image_statistic(record, claim["metric"])
    chosen = image_statistic(record, claim["metric"], claim["types"])
    every = image_statistic(record, claim["metric"], list(record.per_class))
    return lambda weights: chosen(weights) - every(weights)


_BOOTSTRAPPED: dict[tuple[str, ...], stats.Interval] = {}  # a notebook asks for the same claim several times


def bootstrap_difference(a: list[Record], b: list[Record], claim: Claim) -> stats.Interval | None:
    """Paired bootstrap over test images of mean(a) - mean(b); None for a metric that arrays do not give again."""
    if claim["metric"] not in BOOTSTRAPPED:
        return None
    asked = (str(claim), *(str(r.path) for r in a), "against", *(str(r.path) for r in b))
    if asked in _BOOTSTRAPPED:
        return _BOOTSTRAPPED[asked]
    first = a[0].arrays
    if any(list(r.arrays["names"]) != list(first["names"]) for r in [*a, *b]):
        raise ValueError(f"claim {claim['id']!r}: the records were not tested on the same images")
    of_a, of_b = ([_claim_statistic(claim, r) for r in side] for side in (a, b))

    def difference(weights: np.ndarray) -> float:
        return float(np.mean([f(weights) for f in of_a]) - np.mean([f(weights) for f in of_b]))

    exact = np.mean([claim_value(claim, r) for r in a]) - np.mean([claim_value(claim, r) for r in b])
    _BOOTSTRAPPED[asked] = stats.centred(over_images(difference, first), float(exact))
    return _BOOTSTRAPPED[asked]


# --- Judging ---------------------------------------------------------------------------------------------------------


def judge(
    claims: list[Claim],
    found: Found,
    profile: str,
    unplanned: Collection[str] = (),
    timed: Mapping[str, Timing] = MappingProxyType({}),
) -> list[Judged]:
    """Every claim, from `found`, at the best profile that has records of all its rows.

    A claim that has no records says what `profile` lacks; `unplanned` are the rows that this one leaves out. `timed`:
    row -> its timing.
    """
    measured = []
    for claim in claims:
        sides = [claim["a"], claim["b"]] if "b" in claim else [claim["a"]]
        best = next((p for p, rows in found.items() if all(rows.get(side) for side in sides)), None)
        if best is None:
            lacking = [side for side in sides if not found[profile].get(side)]
            left_out = [side for side in lacking if side in unplanned]
            why = f"not run: time ({', '.join(left_out)}: not part of {profile})" if left_out else ""
            measured.append(Judged(claim, 0, why or f"not run yet: {', '.join(lacking)}"))
        elif claim["kind"] == "bound":
            measured.append(_bound(claim, [found[best][side] for side in sides], best, timed))
        elif claim["kind"] == "level":
            measured.append(_level(claim, found[best][claim["a"]], best))
        else:
            measured.append(_gain(claim, found[best], best))
    return _with_verdicts(measured)


def _gain(claim: Claim, found: Mapping[str, list[Record]], profile: str) -> Judged:
    """A gain or order without its verdict, or why it cannot be judged.

    The spread over seeds is pooled over the claim's two rows and all rows of the study trained by themselves on its
    data and weights (others, such as PatchCore, have hardly any spread, and would make it look smaller than it is).
    """
    a, b = found[claim["a"]], found[claim["b"]]
    n, prints = min(len(a), len(b)), a[0].fingerprints
    if not _alike(b[0].fingerprints, prints):
        return Judged(claim, n, "cannot be judged (records differ in data or weights)", profile)
    value = partial(claim_value, claim)
    of_a, of_b = ([value(r) for r in side] for side in (a, b))
    if not np.isfinite([*of_a, *of_b]).all():
        return Judged(claim, n, "cannot be judged (the records lack the metric)", profile)
    # a row on top of another one's network ("of") would count that network's luck twice
    trained = [r for r in found.values() if r and r[0].curve and "of" not in r[0].changed]
    trained = [rows for rows in trained if _alike(rows[0].fingerprints, prints)]
    pooled = {rows[0].key: rows for rows in [*trained, a, b]}.values()  # each once: two names may mean one row
    groups = [[v for v in map(value, rows) if not math.isnan(v)] for rows in pooled]
    difference = stats.pooled_difference(of_a, of_b, groups)
    return Judged(claim, n, "", profile, difference, bootstrap_difference(a, b, claim))


def _alike(a: dict[str, str], b: dict[str, str]) -> bool:
    """Whether fingerprints agree wherever both name a thing: a row may need more than another (the masks that its first
    stage learnt from), and is compared with it all the same."""
    return all(a[name] == b[name] for name in a.keys() & b.keys())


def _level(claim: Claim, records: list[Record], profile: str) -> Judged:
    """A level with its verdict: on which side of its limit its interval over test images lies (mean over seeds)."""
    if not np.isfinite([value_of(r, claim["metric"]) for r in records]).all():
        return Judged(claim, len(records), "cannot be judged (the records lack the metric)", profile)
    found = bootstrap_level(records, claim["metric"])
    verdict = stats.verdict_allowed(len(records), profile)
    if not verdict and not claim["primary"]:
        verdict = NOT_PRIMARY
    elif not verdict:
        side = stats.judge_level(found, _limit(claim)[1])
        wanted = "above" if "at_least" in claim else "below"
        verdict = {"agrees": "no evidence", wanted: "supports"}.get(side, "contradicts")
        verdict += ", at quick scale" if profile == "quick" else ""
    seeds = stats.mean_interval([value_of(r, claim["metric"]) for r in records])
    return Judged(claim, len(records), verdict, profile, images=found, value=found.mean, seeds=seeds)


def _limit(claim: Claim) -> tuple[str, float]:
    """('at most', its limit) or ('at least', its limit)."""
    side = "at_most" if "at_most" in claim else "at_least"
    return side.replace("_", " "), claim[side]


def _bound(claim: Claim, sides: list[list[Record]], profile: str, timed: Mapping[str, Timing]) -> Judged:
    """A bound with its verdict. One run is enough: a cost that is not timed follows from the model alone."""
    n, metric, device = min(len(side) for side in sides), claim["metric"], ""
    means = [float(np.mean([value_of(r, metric) for r in side])) for side in sides]
    if is_timed(metric):
        of = [timed.get(claim[side]) for side in ("a", "b") if side in claim]
        if None in of:
            return Judged(claim, n, "not timed yet", profile)
        means, device = [one.value(metric) for one in of], of[0].device
    if not np.isfinite(means).all():
        return Judged(claim, n, "cannot be judged (the records lack the cost)", profile)
    value = means[0] / means[1] if "b" in claim else means[0]
    slack = 1e-9 * value  # a ratio of equal costs is 1, whatever the means of several seeds round to
    side, limit = _limit(claim)
    holds = value - slack <= limit if side == "at most" else value + slack >= limit
    return Judged(claim, n, "holds" if holds else "does not hold", profile, value=value, device=device)


def _with_verdicts(measured: list[Judged]) -> list[Judged]:
    def tested(m: Judged) -> bool:
        counts = m.difference is not None and m.claim["primary"] and not math.isnan(m.difference.p)
        return counts and stats.verdict_allowed(m.n, m.profile) is None

    corrected = iter(stats.holm([m.difference.p for m in measured if tested(m)]))
    result = []
    for m in measured:
        if m.difference is None:
            result.append(m)
            continue
        adjusted = float(next(corrected)) if tested(m) else None
        verdict = stats.verdict_allowed(m.n, m.profile)
        if not verdict and not m.claim["primary"]:
            verdict = NOT_PRIMARY
        elif not verdict and m.profile == "quick":  # a small experiment: the printed gain belongs to the paper's scale
            verdict = f"{stats.judge_reconstruction(m.difference, adjusted)}, at quick scale"
        elif not verdict and "printed" in m.claim:
            verdict = stats.judge_gain(m.difference, m.claim["printed"], adjusted)
        elif not verdict:
            verdict = stats.judge_reconstruction(m.difference, adjusted)
        result.append(replace(m, verdict=verdict))
    return result


# --- In words --------------------------------------------------------------------------------------------------------


def compared(judged: Judged) -> str:
    """'bsdrd − rd4ad, image AUROC', 'bsdrd − rd4ad, image AUROC: gain at crack minus mean gain' or 'small / large,
    parameters (M)'; of a timed cost with its device."""
    claim = judged.claim
    sign = " / " if claim["kind"] == "bound" else " − "
    rows = sign.join([claim["a"], claim["b"]] if "b" in claim else [claim["a"]])
    types = f": gain at {', '.join(claim['types'])} minus mean gain" if claim["kind"] == "order" else ""
    return f"{rows}, {METRIC_NAMES[claim['metric']]}{types}" + (f", on {judged.device}" if judged.device else "")


def signed(points: float) -> str:
    """'+0.4', '-1.2'; '0.0' for what rounds to it."""
    text = f"{points:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def measured_text(judged: Judged) -> str:
    """'+0.4' (points), '×1.12 (at most ×1.25)', '3.16 M (at most 3.5 M)' or '74.9 % (at least 80 %)'; '–' where nothing
    could be measured."""
    claim, metric = judged.claim, judged.claim["metric"]
    if judged.difference:
        return signed(judged.difference.mean)
    if judged.value is None:
        return "–"
    side, limit = _limit(claim)
    if "b" in claim:
        return f"×{judged.value:.2f} ({side} ×{limit:g})"
    shown, unit = written(judged.value, metric), COSTS[metric].unit if metric in COSTS else UNITS.get(metric, "%")
    return f"{shown} {unit} ({side} {limit:,g} {unit})"
