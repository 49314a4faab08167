"""Tables and verdicts: the printed number, the recorded ones, and this run's, side by side.

Printed numbers and claims are data (`results/papers/<study>/*.csv`, `claims.toml`); recorded ones are read from
`results/runs`, this machine's from `runs/<profile>`. The rules are those of `defectlab.stats`.
"""

import csv
import hashlib
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from defectlab import runs, stats
from defectlab.batch import fingerprints_here
from defectlab.data.store import project_root
from defectlab.metrics import metrics_from_histograms
from defectlab.runs import Record
from defectlab.studies import study

METRIC_NAMES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
    "image_f1_dev": "image F1, dev threshold",
    "image_f1_oracle": "image F1 (oracle threshold)",
    "pixel_f1_oracle": "pixel F1 (oracle threshold)",
}
BOOTSTRAP_REPEATS = 300
BOOTSTRAPPED = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")  # what a record's arrays can give again
NEAR_100 = 98.0  # per cent: from here on seeds say less than images


@dataclass(frozen=True)
class Shelf:
    """The records that a table may show: the committed ones of one profile, and this machine's of its own."""

    profile: str  # of this machine's runs
    recorded_profile: str  # of the committed records: the same, or in smoke the best there is
    recorded: list[Record]
    here: list[Record]

    def of(self, module: Any, key: str) -> tuple[list[Record], list[Record]]:
        """(recorded, this machine's) records of the row `key` of a study's module; this machine's are those made from
        the data and weights that lie here now."""
        recorded = runs.find(self.recorded, module.ROWS[self.recorded_profile][key], self.recorded_profile)
        settings = module.ROWS[self.profile][key]
        prints = fingerprints_here(module, settings) if self.here else None
        here = [r for r in self.here if prints in (None, r.fingerprints)]
        return recorded, runs.find(here, settings, self.profile)


def shelf(profile: str, rows: dict[str, dict[str, Any]] | None = None) -> Shelf:
    """Read the records once for all tables of a page. In smoke the recorded column shows `paper` records where the
    study `rows` has any, else `quick` ones: one profile a table."""
    recorded = runs.read_records(runs.recorded_dir())
    shown = profile
    if runs.check_profile(profile) == "smoke":
        ids = {runs.row_identity(s, "paper") for s in (rows or {}).get("paper", {}).values()}
        shown = "paper" if any(r.row in ids for r in recorded) else "quick"
    recorded = [r for r in recorded if r.profile == shown]
    return Shelf(profile, shown, recorded, runs.read_records(runs.runs_dir(profile)))


# --- Printed numbers beside ours -------------------------------------------------------------------------------------


def printed_table(study_name: str, table: str) -> list[dict[str, str]]:
    """The rows of `results/papers/<study>/<table>.csv`; ValueError where there is no such table."""
    path = project_root() / "results" / "papers" / study_name / f"{table}.csv"
    if not path.exists():
        names = ", ".join(sorted(p.stem for p in path.parent.glob("*.csv"))) or "none"
        raise ValueError(f"{study_name} has no table {table!r}: there is {names}")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def show(values: list[float]) -> str:
    """'87.3 [85.1, 89.5] n=3': mean over seeds, 95 % interval, number of seeds; one seed has no interval."""
    values = [v for v in values if not math.isnan(v)]
    if not values:
        return "–"
    found = stats.mean_interval(values)
    if found.n == 1:
        return f"{found.mean:.1f} n=1"
    return f"{found.mean:.1f} [{found.low:.1f}, {found.high:.1f}] n={found.n}"


def show_records(records: list[Record], metric: str) -> str:
    """`show`; near 100 the interval is the bootstrap over test images, marked ‡, since Student's would pass 100."""
    values = [r.metrics[metric] for r in records]
    if not values or metric not in BOOTSTRAPPED or not np.mean(values) >= NEAR_100:
        return show(values)
    found = bootstrap_level(records, metric)
    return f"{found.mean:.1f} [{found.low:.1f}, {found.high:.1f}]‡ n={len(values)}"


def judge_printed(line: dict[str, str], records: list[Record], profile: str) -> str:
    """The verdict on one printed level: why it cannot be judged, or agrees / above / below."""
    if not line["value"] or not line["key"]:  # nothing printed, or another's number, shown for comparison only
        return ""
    if line["not_comparable"]:
        return f"cannot be judged ({line['not_comparable']})"
    reason = stats.verdict_allowed(len(records), profile) if records else "not run yet"
    if reason:
        return reason
    metric = line["metric"]
    interval = stats.mean_interval([r.metrics[metric] for r in records])
    if interval.mean >= NEAR_100 and metric in BOOTSTRAPPED:
        interval = bootstrap_level(records, metric)
    return stats.judge_level(interval, float(line["value"]))


def results_table(
    study_name: str, table: str, profile: str, metrics: list[str] | None = None, books: Shelf | None = None
) -> pd.DataFrame:
    """One row a row of the paper's table; for each metric the columns paper | recorded | this run | verdict.

    The verdict column is there for metrics of which a number was printed for a row that is run here. Rows without any
    number say why in the last column. In smoke this machine's column is headed "synthetic".
    """
    lines = printed_table(study_name, table)
    module = study(study_name)
    books = books or shelf(profile, module.ROWS)
    metrics = metrics or list(dict.fromkeys(line["metric"] for line in lines))
    printed = {line["metric"] for line in lines if line["value"] and line["key"]}
    here_name = "synthetic" if profile == "smoke" else "this run"
    content: dict[str, dict[tuple[str, str], str]] = {}
    for line in lines:
        metric = line["metric"]
        if metric not in metrics:
            continue
        cells = content.setdefault(line["row"], {})
        recorded, here = books.of(module, line["key"]) if line["key"] else ([], [])
        title = METRIC_NAMES[metric]
        cells[title, "paper"] = line["value"] or "–"
        cells[title, f"recorded ({books.recorded_profile})"] = show_records(recorded, metric)
        cells[title, here_name] = show_records(here, metric)
        if metric in printed:
            cells[title, "verdict"] = judge_printed(line, recorded, books.recorded_profile)
        cells["", "note"] = "" if recorded else ("not run yet" if line["key"] else line["status"])
    frame = pd.DataFrame.from_dict(content, orient="index")
    frame.index.name = "row"
    notes = [c for c in frame.columns if c == ("", "note")]
    frame = frame[[c for c in frame.columns if c not in notes] + notes]
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    return frame


def per_class_table(study_name: str, keys: list[str], metric: str, profile: str) -> pd.DataFrame:
    """Mean over seeds of one metric for each defect type, recorded runs: a row for each of `keys`, a column a type."""
    module = study(study_name)
    books = shelf(profile, module.ROWS)
    content = {}
    for key in keys:
        found, _ = books.of(module, key)
        if found:
            content[key] = {t: show([r.per_class[t][metric] for r in found]) for t in found[0].per_class}
            content[key]["all"] = show([r.metrics[metric] for r in found])
    return pd.DataFrame.from_dict(content, orient="index")


# --- Claims ----------------------------------------------------------------------------------------------------------


def claims_of(study_name: str) -> list[dict[str, Any]]:
    path = project_root() / "results" / "papers" / study_name / "claims.toml"
    return tomllib.loads(path.read_text())["claim"] if path.exists() else []


def claim_value(claim: dict[str, Any], record: Record) -> float:
    """What a claim compares, of one record: the metric, or (kind "order") its mean over the claim's defect types
    less its mean over all types, so that the difference of two rows is the extra gain at those types."""
    if claim["kind"] != "order":
        return record.metrics[claim["metric"]]
    values = {t: m[claim["metric"]] for t, m in record.per_class.items()}
    missing = set(claim["types"]) - set(values)
    if missing:
        raise ValueError(f"claim {claim['id']!r} names defect types that {record.key} lacks: {sorted(missing)}")
    return float(np.mean([values[t] for t in claim["types"]]) - np.mean(list(values.values())))


def _image_statistic(record: Record, metric: str, types: list[str] | None = None) -> Callable[[np.ndarray], float]:
    """(weight of each test image) -> the metric; with `types`, of those types against all normals, averaged."""
    arrays = record.arrays
    if metric in ("image_auroc", "image_ap"):
        measure = stats.auroc if metric == "image_auroc" else stats.average_precision
        whole = partial(measure, arrays["scores"], arrays["labels"])
    else:
        histogram = {k.removeprefix("histogram_"): v for k, v in arrays.items() if k.startswith("histogram_")}

        def whole(weights: np.ndarray) -> float:
            return metrics_from_histograms(histogram, weights)[metric]

    if types is None:
        return whole
    names = arrays["type_names"].tolist()
    members = [np.isin(arrays["types"], [0, names.index(t)]) for t in types]
    return lambda weights: float(np.mean([whole(weights * chosen) for chosen in members]))


def _claim_statistic(claim: dict[str, Any], record: Record) -> Callable[[np.ndarray], float]:
    """`claim_value` of one record as a function of the weight of each test image."""
    if claim["kind"] != "order":
        return _image_statistic(record, claim["metric"])
    chosen = _image_statistic(record, claim["metric"], claim["types"])
    every = _image_statistic(record, claim["metric"], list(record.per_class))
    return lambda weights: chosen(weights) - every(weights)


def bootstrap_level(records: list[Record], metric: str) -> stats.Interval:
    """Bootstrap over test images of the mean over seeds of one metric, types kept in proportion."""
    of_seed = [_image_statistic(r, metric) for r in records]
    types = records[0].arrays["types"]
    found = stats.paired_bootstrap(
        lambda weights: float(np.mean([f(weights) for f in of_seed])), len(types), types, BOOTSTRAP_REPEATS
    )
    mean = float(np.mean([r.metrics[metric] for r in records]))  # the exact one: histograms round
    return stats.Interval(mean, min(found.low, mean), max(found.high, mean), found.n)


def bootstrap_difference(a: list[Record], b: list[Record], claim: dict[str, Any]) -> stats.Interval:
    """Paired bootstrap over test images of mean(a) - mean(b), types kept in proportion."""
    first = a[0].arrays
    if any(list(r.arrays["names"]) != list(first["names"]) for r in [*a, *b]):
        raise ValueError(f"claim {claim['id']!r}: the records were not tested on the same images")
    of_a, of_b = ([_claim_statistic(claim, r) for r in side] for side in (a, b))

    def difference(weights: np.ndarray) -> float:
        return float(np.mean([f(weights) for f in of_a]) - np.mean([f(weights) for f in of_b]))

    return stats.paired_bootstrap(difference, len(first["names"]), first["types"], BOOTSTRAP_REPEATS)


@dataclass(frozen=True)
class Judged:
    """One claim, measured: `difference` over seeds, `images` the bootstrap over test images, and what follows."""

    claim: dict[str, Any]
    n: int
    difference: stats.Difference | None
    images: stats.Interval | None
    verdict: str


def judge_claims(study_name: str, books: Shelf) -> list[Judged]:
    """Every claim of a study, from the recorded runs. Quick runs get a direction, no verdict.

    The spread over seeds is pooled over all trained rows of the study on the claim's data and weights (PatchCore has
    hardly any spread, and would make the others' look smaller than it is).
    """
    module = study(study_name)
    found = {key: books.of(module, key)[0] for key in module.ROWS[books.recorded_profile]}
    measured: list[Judged] = []
    for claim in claims_of(study_name):
        a, b = found[claim["a"]], found[claim["b"]]
        n = min(len(a), len(b))
        if not n:
            lacking = [k for k in (claim["a"], claim["b"]) if not found[k]]
            measured.append(Judged(claim, n, None, None, f"not run yet: {', '.join(lacking)}"))
            continue
        prints = a[0].fingerprints
        if b[0].fingerprints != prints:
            measured.append(Judged(claim, n, None, None, "cannot be judged (records differ in data or weights)"))
            continue
        value = partial(claim_value, claim)
        trained = [rows for rows in found.values() if rows and rows[0].curve and rows[0].fingerprints == prints]
        groups = [[value(r) for r in rows] for rows in trained]
        difference = stats.pooled_difference([value(r) for r in a], [value(r) for r in b], groups)
        measured.append(Judged(claim, n, difference, bootstrap_difference(a, b, claim), ""))
    return _with_verdicts(measured, books.recorded_profile)


def _with_verdicts(measured: list[Judged], profile: str) -> list[Judged]:
    primary = [
        m.difference.p for m in measured if m.difference and m.claim["primary"] and not math.isnan(m.difference.p)
    ]
    corrected = iter(stats.holm(primary) if primary else [])
    result = []
    for m in measured:
        if m.difference is None:
            result.append(m)
            continue
        adjusted = None
        if m.claim["primary"] and not math.isnan(m.difference.p):
            adjusted = float(next(corrected))
        reason = stats.verdict_allowed(m.n, profile)
        if reason:
            verdict = f"{stats.direction(m.difference)}  ({reason})"
        elif not m.claim["primary"]:
            verdict = f"{stats.direction(m.difference)}  (not primary: interval only)"
        elif "printed" in m.claim:
            verdict = stats.judge_gain(m.difference, m.claim["printed"], adjusted)
        else:
            verdict = stats.judge_reconstruction(m.difference, adjusted)
        result.append(Judged(m.claim, m.n, m.difference, m.images, verdict))
    return result


def claims_table(study_name: str, profile: str, books: Shelf | None = None) -> pd.DataFrame:
    """The study's claims with what the recorded runs say: difference, interval over seeds, over images, verdict."""
    books = books or shelf(profile, study(study_name).ROWS)
    lines = []
    for m in judge_claims(study_name, books):
        claim, d, images = m.claim, m.difference, m.images
        measured = METRIC_NAMES[claim["metric"]] + (f" at {', '.join(claim['types'])}" if "types" in claim else "")
        lines.append(
            {
                "claim": claim["id"].replace("_", " ") + (" (primary)" if claim["primary"] else ""),
                "compared": f"{claim['a']} − {claim['b']}, {measured}",
                "difference": "–" if d is None else f"{d.mean:+.1f}",
                "95 % over seeds": "–" if d is None or math.isnan(d.low) else f"[{d.low:+.1f}, {d.high:+.1f}]",
                "95 % over images": "–" if images is None else f"[{images.low:+.1f}, {images.high:+.1f}]",
                "n": m.n or "–",
                f"outcome ({books.recorded_profile})": m.verdict,
            }
        )
    return pd.DataFrame(lines)


def findings(study_name: str, profile: str) -> str:
    """What we found and what it cost, in sentences, from the committed records: for the head of a notebook."""
    module = study(study_name)
    books = shelf(profile, module.ROWS)
    lines = []
    for m in judge_claims(study_name, books):
        if m.claim["primary"]:
            measured = "not run yet"
            if m.difference:
                interval = (
                    "" if math.isnan(m.difference.low) else f" [{m.difference.low:+.1f}, {m.difference.high:+.1f}]"
                )
                measured = f"{m.difference.mean:+.1f}{interval} points with {m.n} seed(s): {m.verdict}"
            name = METRIC_NAMES[m.claim["metric"]]
            lines.append(
                f"{m.claim['id'].replace('_', ' ')}: {m.claim['a']} against {m.claim['b']}, {name}: {measured}"
            )
    used = {r.key: r for key in module.ROWS[books.recorded_profile] for r in books.of(module, key)[0]}
    hours = sum(r.seconds for r in used.values()) / 3600
    devices = "; ".join(sorted({r.device for r in used.values()})) or "none"
    lines.append(f"cost: {len(used)} recorded {books.recorded_profile} runs, {hours:.1f} hours on {devices}")
    return "\n".join(lines)


def agreement(study_name: str, key: str, metric: str, profile: str) -> str:
    """Whether this run agrees with the record: |difference| <= the larger of 2 seed spreads and 0.5 points."""
    module = study(study_name)
    recorded, here = shelf(profile, module.ROWS).of(module, key)
    if profile == "smoke" or not recorded or not here:
        return f"{key}: nothing to compare (this run: {len(here)}, recorded: {len(recorded)}, profile {profile})"
    old, new = ([r.metrics[metric] for r in side] for side in (recorded, here))
    spread = float(np.std(old, ddof=1)) if len(old) > 1 else 0.0
    allowed, gap = max(2 * spread, 0.5), abs(float(np.mean(new)) - float(np.mean(old)))
    word = "agrees" if gap <= allowed else "does NOT agree"
    return f"{key}: {METRIC_NAMES[metric]} {word} with the record: off by {gap:.2f}, allowed {allowed:.2f} points"


# --- HTML ------------------------------------------------------------------------------------------------------------


def styled(frame: pd.DataFrame) -> Any:
    """A table for notebooks and pages: left-aligned text, the synthetic column grey."""
    grey = [c for c in frame.columns if "synthetic" in (c if isinstance(c, tuple) else (c,))]
    look = [
        {"selector": "th, td", "props": "text-align: left; vertical-align: top; padding: 2px 10px; font-size: 13px"},
        {"selector": "thead th", "props": "border-bottom: 1px solid #888"},
    ]
    name = hashlib.sha256(frame.to_csv().encode()).hexdigest()[:8]  # the style's own, and the same in every run
    style = frame.style.set_table_styles(look).set_uuid(name)
    if grey:
        style = style.set_properties(subset=grey, **{"color": "#999"})
    return style.hide(axis="index") if isinstance(frame.index, pd.RangeIndex) else style
