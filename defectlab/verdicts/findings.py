"""What was found, in sentences: templates in `results/papers/<study>/findings.toml`, filled in from committed records.

A finding is a table `[[finding]]`:

- text: a sentence with the rows of the study as fields: `{rd4ad.image_auroc:.1f}` is a mean over seeds, and
  `{v8n[scratches].map50:.1f}` that of one defect type; `{cards[neu_seg][leaks]}` is an entry of a data card,
  `{timed[yolo_dcf].latency_ms:.0f}` what `defectlab bench` measured, `{claims[gain].high:+.1f}` the end of the interval
  over seeds of a claim's difference.
- when: the condition under which it may be said, an expression of the same names: `patchcore.aupro > rd4ad.aupro`.
- notebooks: numbers of the notebooks that begin with it, such as ["20"]. readme: true for those that README shows.

A sentence ends with the profile and the number of seeds of the rows of which it names more than counted costs; where
that differs, what rests on one seed has a mark. A sentence whose condition does not hold is not said; a test fails on
it, so that somebody looks.
"""

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from IPython.display import Markdown

from defectlab.data.cards import card
from defectlab.files import project_root
from defectlab.runs import RECORDED, Record
from defectlab.studies import study
from defectlab.verdicts.measured import COSTS, timings, value_of
from defectlab.verdicts.tables import RecordStore, judge_claims, record_store


@dataclass(frozen=True)
class Finding:
    """A sentence of a study, and whether its condition holds."""

    study: str
    text: str
    holds: bool
    notebooks: tuple[str, ...]
    readme: bool


ONE_SEED = "¹"  # behind a number of one seed, in a sentence with others of several


class Value(float):
    """A number of a sentence, written with a mark behind it."""

    mark = ""

    def __format__(self, form: str) -> str:
        return super().__format__(form) + self.mark


class RowValues:
    """A row's metrics as attributes, means over its seeds; by index those of one defect type. `lowest` and `highest`:
    the same with the extreme seed in place of the mean. `mark` stands behind each number in a sentence."""

    def __init__(self, name: str, records: list[Record], over: Callable = np.mean, mark: str = ""):
        self.name, self.records, self.over, self.mark = name, records, over, mark

    @property
    def lowest(self) -> "RowValues":
        return RowValues(self.name, self.records, min, self.mark)

    @property
    def highest(self) -> "RowValues":
        return RowValues(self.name, self.records, max, self.mark)

    def __getattr__(self, metric: str) -> float:
        return self._one(metric, [value_of(record, metric) for record in self._there()])

    def __getitem__(self, kind: str) -> Any:
        per_class = [record.per_class.get(kind, {}) for record in self._there()]
        names = set.intersection(*map(set, per_class))
        return type("OfOneType", (), {name: self._one(name, [values[name] for values in per_class]) for name in names})

    def _there(self) -> list[Record]:
        if not self.records:
            raise ValueError(f"row {self.name} has no record")
        return self.records

    def _one(self, metric: str, values: list[float]) -> float:
        if not np.isfinite(values).all():
            raise ValueError(f"the records of row {self.name} have no metric {metric!r}")
        value = Value(self.over(values))
        value.mark = self.mark
        return value


class Differences(dict):
    """Differences of the study's claims with their intervals over seeds, by id, judged when one is asked for."""

    def __init__(self, of: str, store: RecordStore):
        super().__init__()
        self.of = of, store

    def __missing__(self, claim: str) -> Any:
        self.update({judged.claim["id"]: judged.difference for judged in judge_claims(*self.of)})
        return self.get(claim)


class Cards(dict):
    """Data cards by the name of the set, read when they are asked for."""

    def __missing__(self, name: str) -> Mapping[str, Any]:
        return card(name)


def all_below(one: RowValues, other: RowValues, metric: str) -> bool:
    """Whether one row is below the other in every defect type."""
    kinds = other.records[0].per_class
    return all(getattr(one[kind], metric) < getattr(other[kind], metric) for kind in kinds)


def spread(row: RowValues, kind: str, metric: str) -> float:
    """Largest minus smallest value over the seeds of a row, of one defect type."""
    values = [record.per_class[kind][metric] for record in row.records]
    return max(values) - min(values)


FUNCTIONS = {one.__name__: one for one in (abs, min, max, all_below, spread)}  # what a condition may use


def findings(name: str, store: RecordStore | None = None) -> list[Finding]:
    """All findings of a study, in the file's order; none without a file. ValueError names the file where one names what
    is not there."""
    path = project_root() / "results" / "papers" / name / "findings.toml"
    if not path.is_file():
        return []
    listed = tomllib.loads(path.read_text(encoding="utf-8"))["finding"]
    of, store = study(name), store or record_store(RECORDED)
    rows = {row: RowValues(row, store.recorded_of(of, row)[0]) for row in of.rows[RECORDED]}
    others = {"cards": Cards(), "timed": timings(name), "claims": Differences(name, store)}
    found = []
    for number, one in enumerate(listed, 1):
        named = re.findall(r"{(\w+)(?:\[[\w-]+\])?\.(\w+)", one["text"])
        trained = dict.fromkeys(row for row, metric in named if metric not in COSTS)  # what is counted needs no run
        used = [rows[row] for row in trained if row in rows]
        mixed = len({len(row.records) for row in used}) > 1
        shown = {r.name: RowValues(r.name, r.records, mark=ONE_SEED * (mixed and len(r.records) == 1)) for r in used}
        try:
            holds = bool(eval(one["when"], {"__builtins__": FUNCTIONS}, rows | others))
            text = " ".join(one["text"].format(**rows | others | shown).split())
        except Exception as error:
            raise ValueError(f"{path}, finding {number}: {type(error).__name__}: {error}") from error
        found.append(Finding(name, text + _scale(used), holds, tuple(one["notebooks"]), one.get("readme", False)))
    return found


def _scale(rows: list[RowValues]) -> str:
    """' [quick, 3 seeds; ¹ one seed]': at what scale, and on how many seeds, the rows of a sentence were run."""
    if not rows:
        return ""
    profiles = " and ".join(sorted({record.profile for row in rows for record in row.records}))
    several = sorted({len(row.records) for row in rows})
    one = f"; {ONE_SEED} one seed" if len(several) > 1 and several[0] == 1 else ""
    several = several[1:] if one else several
    seeds = f"{several[0]} to {several[-1]}" if len(several) > 1 else str(several[0])
    return f" [{profiles}, {seeds} seed{'s' * (several[-1] > 1)}{one}]"


def said(name: str, notebook: str) -> Markdown:
    """The head of a notebook: what was found, a line each, and what all recorded rows of the study cost."""
    store = record_store(RECORDED)
    lines = [f"- {one.text}" for one in findings(name, store) if one.holds and notebook in one.notebooks]
    return Markdown("\n".join([*lines, "", cost(name, store)]))


def cost(name: str, store: RecordStore) -> str:
    of = study(name)
    used = {r.key: r for row in of.rows[RECORDED] for r in store.recorded_of(of, row)[0]}.values()
    hours = sum(record.seconds for record in used) / 3600
    devices = "; ".join(sorted({record.device for record in used})) or "none"
    profiles = " and ".join(sorted({record.profile for record in used})) or "no"
    return f"Cost: {len(used)} recorded {profiles} runs, {hours:.1f} hours on {devices}."
