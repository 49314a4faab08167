"""Tables and verdicts: the printed number, the recorded ones, and this run's, side by side.

Printed numbers and claims are data (`results/papers/<study>/*.csv`, `claims.toml`); recorded ones are read from
`results/runs`, this machine's from `runs/<profile>`. The rules are those of `verdicts.stats`.
"""

import csv
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from defectlab import runs
from defectlab.figures.forest import Line
from defectlab.files import project_root
from defectlab.runs import Record
from defectlab.studies import Study, study
from defectlab.verdicts import claims, stats
from defectlab.verdicts.measured import (
    BOOTSTRAPPED,
    COSTS,
    EPISODES,
    METRIC_NAMES,
    Timing,
    bootstrap_level,
    is_timed,
    timings,
    value_of,
    within,
    written,
)

BEST_FIRST = ("paper", "quick")  # the profiles of committed records
THIS_RUN = "this run"  # how tables call this machine's
NEAR_100 = 98.0  # per cent: from here on the interval is that over images, narrower and below 100
NOTE = (
    "Mean over seeds with its 95 % interval over seeds, cut at 0 and 100 %; ‡ near 100: over test images. "
    "n: seeds; a number without n is of one. Costs on which all seeds agree have no interval."
)


@dataclass(frozen=True)
class RecordStore:
    """The records that tables may show, read once for all tables of a page."""

    profile: str  # of this machine's runs
    recorded: list[Record]
    here: list[Record]
    _prints: dict[Any, dict[str, str] | None] = field(default_factory=dict, repr=False)  # settings -> fingerprints
    _judged: dict[str, list[claims.Judged]] = field(default_factory=dict, repr=False)  # study -> its claims

    def recorded_of(self, study: Study, name: str) -> tuple[list[Record], str]:
        """The committed records of a row at the best profile that it has, paper before quick, and that profile."""
        for profile in BEST_FIRST:
            row = study.rows[profile].get(name)
            found = runs.find(self.recorded, row.settings, profile) if row else []
            if found:
                return found, profile
        return [], self.shown_profile

    @property
    def shown_profile(self) -> str:
        """The profile named for a row without a record: this machine's own, in smoke and recorded quick."""
        return self.profile if self.shows_here else "quick"

    @property
    def shows_here(self) -> bool:
        """Whether this machine's runs are results: on synthetic data they are none."""
        return self.profile in BEST_FIRST

    def here_of(self, study: Study, name: str) -> list[Record]:
        """This machine's runs of a row, made from the data and weights that lie here now."""
        row = study.rows[self.profile].get(name)
        if row is None or not self.here or not self.shows_here:
            return []
        if row.settings not in self._prints:
            self._prints[row.settings] = row.fingerprints_here()
        prints = self._prints[row.settings]
        return runs.find([r for r in self.here if prints in (None, r.fingerprints)], row.settings, self.profile)


def record_store(profile: str) -> RecordStore:
    here = runs.read_records(runs.runs_dir(profile)) if profile in BEST_FIRST else []
    return RecordStore(profile, runs.read_records(runs.recorded_dir()), here)


# --- Printed numbers beside recorded ones ----------------------------------------------------------------------------


def printed_table(study_name: str, table: str) -> list[dict[str, str]]:
    """The rows of `results/papers/<study>/<table>.csv`; ValueError where there is no such table."""
    path = project_root() / "results" / "papers" / study_name / f"{table}.csv"
    if not path.exists():
        names = ", ".join(sorted(p.stem for p in path.parent.glob("*.csv"))) or "none"
        raise ValueError(f"{study_name} has no table {table!r}: there is {names}")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def show(values: list[float], metric: str = "") -> str:
    """'87.3 [85.1, 89.5] n=3': mean over seeds, 95 % interval, number of seeds; '87.3' alone is one seed's. A cost on
    which all seeds agree has no interval. `metric` decides the digits and where an interval ends."""
    values = [v for v in values if not math.isnan(v)]
    if not values:
        return "–"
    found = stats.mean_interval(values)
    low, high = within(metric, found.low, found.high)
    number = written(found.mean, metric)
    if found.n == 1:
        return number
    if metric in COSTS and len(set(values)) == 1:
        return f"{number} n={found.n}"
    return f"{number} [{written(low, metric)}, {written(high, metric)}] n={found.n}"


def show_records(records: list[Record], metric: str, kind: str | None = None) -> str:
    """`show`, of one defect type where `kind` is given; near 100 the interval is the bootstrap over test images, marked
    ‡, since Student's would pass 100."""
    values = [value_of(r, metric) if kind is None else r.per_class[kind].get(metric, math.nan) for r in records]
    unknown = metric not in BOOTSTRAPPED or (kind is not None and metric in EPISODES)  # kept of whole episodes alone
    if not values or unknown or not np.mean(values) >= NEAR_100:
        return show(values, metric)
    found = bootstrap_level(records, metric, kind)
    seeds = f" n={len(values)}" if len(values) > 1 else ""
    return f"{found.mean:.1f} [{found.low:.1f}, {found.high:.1f}]‡{seeds}"


def judge_printed(line: dict[str, str], records: list[Record], profile: str) -> str:
    """The verdict on one printed level: why it cannot be judged, or agrees / above / below.

    A cost that is not timed follows from the model alone: it needs no seeds, and agrees when it rounds to the printed
    number.
    """
    if not line["value"] or not line["key"]:  # nothing printed, or another's number, shown for comparison only
        return ""
    if line["not_comparable"]:
        return f"cannot be judged ({line['not_comparable']})"
    if not records:
        return "not run yet"
    metric, printed = line["metric"], line["value"]
    if is_timed(metric):
        return "cannot be judged (timed on another device)"
    values = [value_of(r, metric) for r in records]
    if not np.isfinite(values).all():
        return "cannot be judged (the records lack it)"
    cost = COSTS.get(metric)
    if not cost and profile == "quick":
        return "cannot be judged (quick profile)"
    if not cost and (reason := stats.verdict_allowed(len(records), profile)):
        return reason
    interval = stats.mean_interval(values)
    if cost:
        half = 0.5 / 10 ** len(printed.partition(".")[2])  # what rounding to the printed digits hides
        interval = stats.Interval(interval.mean, interval.mean - half, interval.mean + half, interval.n)
    elif interval.mean >= NEAR_100 and metric in BOOTSTRAPPED:
        interval = bootstrap_level(records, metric)
    return stats.judge_level(interval, float(printed))


def results_table(
    study_name: str, table: str, profile: str, metrics: list[str] | None = None, store: RecordStore | None = None
) -> pd.DataFrame:
    """One row for each row of the paper's table; for each metric the columns paper | recorded | verdict, in quick and
    paper with this run's before the verdict.

    "recorded" shows the best profile that a row has, which the column "profile" names. The verdict column is there for
    metrics of which a number was printed for a row that is run here. The last column says why a row has no number, on
    what its speed was measured, and which network is recorded where it is not the printed one. Where the table has
    none of `metrics` (default: all of its own), the frame is empty.
    A printed table with columns of its own (data sets) keeps them, and has these four as lines: see `_by_column`.
    """
    lines = printed_table(study_name, table)
    of = study(study_name)
    store = store or record_store(profile)
    metrics = metrics or list(dict.fromkeys(line["metric"] for line in lines))
    lines = [line for line in lines if line["metric"] in metrics]
    if not lines:
        return pd.DataFrame()
    if any(line["column"] != "all" for line in lines):
        return _by_column(lines, of, store)
    judged = {line["metric"] for line in lines if line["value"] and line["key"]}
    timed = timings(study_name)
    content: dict[str, dict[tuple[str, str], str]] = {}
    notes: dict[str, dict[str, None]] = {}  # row -> each note once, in order
    for line in lines:
        metric, title = line["metric"], METRIC_NAMES[line["metric"]]
        cells = content.setdefault(line["row"], {})
        recorded, at = store.recorded_of(of, line["key"])
        cells[title, "paper"] = line["value"] or "–"
        timing = timed.get(line["key"]) if is_timed(metric) else None
        cells[title, "recorded"] = timing.shown(metric) if timing else show_records(recorded, metric)
        if store.shows_here:
            cells[title, THIS_RUN] = show_records(store.here_of(of, line["key"]), metric)
        if metric in judged:
            cells[title, "verdict"] = judge_printed(line, recorded, at)
        cells["", "profile"] = at if recorded else cells.get(("", "profile"), "–")
        notes.setdefault(line["row"], {}).update(dict.fromkeys(_notes(line, recorded, of, at, timing)))
        cells["", "note"] = "; ".join(notes[line["row"]])
    frame = pd.DataFrame.from_dict(content, orient="index").fillna("–")  # rows need not have a line for every metric
    frame.index.name = "row"
    titles = [*(METRIC_NAMES[m] for m in metrics), ""]
    frame = frame[sorted(frame.columns, key=lambda column: titles.index(column[0]))]
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    return frame


def _notes(line: dict[str, str], recorded: list[Record], of: Study, profile: str, timing: Timing | None) -> list[str]:
    if not recorded and line["key"]:
        return ["not run yet" if of.rows[profile][line["key"]].seeds else f"not run: time (not part of {profile})"]
    if not recorded:
        return [line["status"]]
    notes = [network] if (network := _other_network(of, line["key"], profile)) else []
    return [*notes, f"timed in turns, × of {timing.first}, on {timing.device}"] if timing else notes


def _other_network(of: Study, name: str, profile: str) -> str:
    """'recorded: YOLOv5n, 192 px' where a profile has a smaller network or smaller images than the paper's rows."""
    here, paper = (of.rows[p][name].settings for p in (profile, "paper"))
    differs = [n for n in ("family", "scale", "size") if getattr(here, n, None) != getattr(paper, n, None)]
    if not differs:
        return ""
    network = "" if differs == ["size"] else f"YOLO{here.family}{here.scale}, "
    return f"recorded: {network}{here.size} px"


def _by_column(lines: list[dict[str, str]], of: Study, store: RecordStore) -> pd.DataFrame:
    """A table with a column for each data set: for each method a line of what was printed, one of what is
    recorded, one of this machine's runs where there are any; the last column says what follows for recorded ones."""
    columns = list(dict.fromkeys(line["column"] for line in lines))
    content: dict[str, dict[str, str]] = {}
    for method in dict.fromkeys(line["row"] for line in lines):
        of_method = {line["column"]: line for line in lines if line["row"] == method}
        metric = next(iter(of_method.values()))["metric"]  # a method that was added may have another
        found = {c: store.recorded_of(of, x["key"]) for c, x in of_method.items()}
        found = {c: (records, at) for c, (records, at) in found.items() if records}
        here = {c: store.here_of(of, x["key"]) for c, x in of_method.items()}
        content[f"{method}: paper"] = {c: x["value"] or "–" for c, x in of_method.items()}
        if found:
            profiles = ", ".join(sorted({at for _, at in found.values()}))
            content[f"{method}: recorded ({profiles})"] = {c: show_records(r, metric) for c, (r, _) in found.items()}
        if any(here.values()):
            content[f"{method}: {THIS_RUN}"] = {c: show_records(r, metric) for c, r in here.items()}
        content[next(reversed(content))]["verdict"] = _column_verdict(of_method, found)
    frame = pd.DataFrame.from_dict(content, orient="index")
    frame = frame.reindex(columns=[*columns, "verdict"]).fillna("–")
    frame.index.name = METRIC_NAMES[lines[0]["metric"]]
    return frame


def _column_verdict(lines: dict[str, dict[str, str]], found: dict[str, tuple[list[Record], str]]) -> str:
    """What follows for one method of `_by_column`: column -> its printed line, column -> its records and profile."""
    runnable = [c for c, line in lines.items() if line["key"]]
    if not runnable:
        return next(iter(lines.values()))["status"]
    if not found:
        return "not run yet"
    verdicts = {c: judge_printed(lines[c], recorded, at) for c, (recorded, at) in found.items()}
    said = [f"{c}: {verdict}" for c, verdict in verdicts.items() if verdict]
    if any(line["value"] and not line["key"] for line in lines.values()):  # printed means over data sets
        where = f"{len(verdicts)} of {len(runnable)} data sets" if len(runnable) > 1 else f"{runnable[0]} alone"
        said.append(f"means: cannot be judged ({where})")
    return "; ".join(said)


def per_class_table(study_name: str, keys: list[str], metric: str, profile: str) -> pd.DataFrame:
    """Mean over seeds of one metric for each defect type, recorded runs: a line for each of `keys`, a column for each
    type."""
    of, store, content = study(study_name), record_store(profile), {}
    for key in keys:
        found, _ = store.recorded_of(of, key)
        if found:
            content[key] = {kind: show_records(found, metric, kind) for kind in found[0].per_class}
            content[key]["all"] = show_records(found, metric)
    return pd.DataFrame.from_dict(content, orient="index")


# --- Claims ----------------------------------------------------------------------------------------------------------


def judge_claims(study_name: str, store: RecordStore) -> list[claims.Judged]:
    """Every claim of a study, from the recorded runs."""
    if study_name not in store._judged:
        rows, shown = study(study_name).rows, store.shown_profile
        found = {p: {n: runs.find(store.recorded, row.settings, p) for n, row in rows[p].items()} for p in BEST_FIRST}
        unplanned = [name for name, row in rows[shown].items() if not row.seeds]
        judged = claims.judge(claims.claims_of(study_name), found, shown, unplanned, timings(study_name))
        store._judged[study_name] = judged
    return store._judged[study_name]


def intervals(judged: claims.Judged) -> tuple[str, str]:
    """Over seeds and over test images; one seed has none over seeds (that of other rows would stand in its place)."""
    differences = {"order": 2, "gain": 1}.get(judged.claim["kind"], 0)

    def text(found: stats.Interval | stats.Difference | None) -> str:
        if found is None or math.isnan(found.low):
            return "–"
        ends = within(judged.claim["metric"], found.low, found.high, differences)
        return "[{}, {}]".format(*(claims.signed(end) if differences else f"{end:.1f}" for end in ends))

    return text((judged.difference or judged.seeds) if judged.n > 1 else None), text(judged.images)


def claims_table(study_name: str, profile: str, store: RecordStore | None = None) -> pd.DataFrame:
    """The study's claims with what the recorded runs say: difference (a bound or level: the value and its limit),
    interval over seeds, over images, verdict."""
    lines = []
    for judged in judge_claims(study_name, store or record_store(profile)):
        over_seeds, over_images = intervals(judged)
        lines.append(
            {
                "claim": judged.claim["id"].replace("_", " ") + (" (primary)" if judged.claim["primary"] else ""),
                "compared": claims.compared(judged),
                "difference": claims.measured_text(judged),
                "95 % over seeds": over_seeds,
                "95 % over images": over_images,
                "n": judged.n or "–",
                "profile": judged.profile or "–",
                "outcome": judged.verdict,
            }
        )
    return pd.DataFrame(lines)


def forest_lines(study_name: str, store: RecordStore) -> list[Line]:
    """The differences of a study's claims for `forest`: over seeds where there are several, else over test images."""
    lines = []
    for judged in judge_claims(study_name, store):
        found = judged.difference if judged.n > 1 else judged.images
        if judged.difference is None or found is None:
            continue
        label = f"{judged.claim['id'].replace('_', ' ')}: {claims.compared(judged).partition(', ')[2]}"
        differences = 2 if judged.claim["kind"] == "order" else 1
        low, high = within(judged.claim["metric"], found.low, found.high, differences)
        printed = judged.claim.get("printed")
        unsure = judged.verdict.startswith("no evidence")
        lines.append(Line(label, judged.difference.mean, low, high, judged.n > 1, printed, unsure))
    return lines


def agreement(study_name: str, key: str, metric: str, profile: str) -> str:
    """Whether this run agrees with the records of its profile: |difference| <= the larger of 2 seed spreads and 0.5
    points (a cost: 2 seed spreads alone). Empty where there is nothing to compare."""
    of, store = study(study_name), record_store(profile)
    recorded = runs.find(store.recorded, of.rows[profile][key].settings, profile)
    old, new = ([value_of(r, metric) for r in side] for side in (recorded, store.here_of(of, key)))
    if not old or not new or not np.isfinite([*old, *new]).all():
        return ""
    spread = float(np.std(old, ddof=1)) if len(old) > 1 else 0.0
    least, unit = (0.0, COSTS[metric].unit) if metric in COSTS else (0.5, "points")
    allowed, gap = max(2 * spread, least), abs(float(np.mean(new)) - float(np.mean(old)))
    word = "agrees" if gap <= allowed else "does NOT agree"
    return f"{key}: {METRIC_NAMES[metric]} {word} with the record: off by {gap:.2f}, allowed {allowed:.2f} {unit}"


# --- HTML ------------------------------------------------------------------------------------------------------------


class _Table(Styler):
    def __repr__(self) -> str:  # pandas writes an address, another one at each execution
        return f"a table of {len(self.data)} rows"


def styled(frame: pd.DataFrame) -> Styler:
    """A table for notebooks and pages: left-aligned text."""
    look = [
        {"selector": "th, td", "props": "text-align: left; vertical-align: top; padding: 2px 10px; font-size: 13px"},
        {"selector": "thead th", "props": "border-bottom: 1px solid #888"},
    ]
    name = hashlib.sha256(frame.to_csv().encode()).hexdigest()[:8]  # the style's own, and the same in every run
    style = _Table(frame).set_table_styles(look).set_uuid(name)
    return style.hide(axis="index") if isinstance(frame.index, pd.RangeIndex) else style
