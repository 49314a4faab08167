"""The field's history as a survey tells it: every system with a row on real data and what came of it, or why not.

The survey: C. Lee, a practitioner's blog, 2026. `results/systems.csv` says which row stands for which system, and which
claim of its study judges a sentence on it.
"""

import csv

import pandas as pd

from defectlab.files import project_root
from defectlab.studies import study
from defectlab.verdicts import tables
from defectlab.verdicts.measured import METRIC_NAMES, is_timed, timings


def systems() -> list[dict[str, str]]:
    """The lines of `results/systems.csv`: when, system, study, row, metric, claim, notebook, reason."""
    with (project_root() / "results" / "systems.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def systems_table(store: tables.RecordStore) -> pd.DataFrame:
    """A line for each system: its number from the committed records, the outcome of the claim on it or a reason, the
    notebook."""
    judged = {
        (name, one.claim["id"]): one.verdict
        for name in {line["study"] for line in systems()} - {""}
        for one in tables.judge_claims(name, store)
    }
    lines = []
    for line in systems():
        outcome = judged.get((line["study"], line["claim"]), "no claim")
        lines.append(
            {
                "since": line["when"] or "–",
                "system": line["system"],
                "recorded": _recorded(line, store) if line["row"] else "–",
                "claim": line["claim"].replace("_", " ") or "–",
                "outcome": f"{outcome}; {line['reason']}"
                if line["row"] and line["reason"]
                else line["reason"] or outcome,
                "notebook": line["notebook"] or "–",
            }
        )
    return pd.DataFrame(lines)


def _recorded(line: dict[str, str], store: tables.RecordStore) -> str:
    """'mAP50 66.9 ± 0.8 (quick, NEU-DET)', or that nothing is recorded yet."""
    if is_timed(line["metric"]):
        timing = timings(line["study"]).get(line["row"])
        return f"{METRIC_NAMES[line['metric']]} {timing.shown(line['metric'])}" if timing else "not timed yet"
    records, profile = store.recorded_of(study(line["study"]), line["row"])
    if not records:
        return "not run yet"
    value = tables.show_records(records, line["metric"])
    return f"{METRIC_NAMES[line['metric']]} {value} ({profile}, {records[0].data_label})"
