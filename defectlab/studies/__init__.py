"""The studies by name: the one place that knows which modules there are."""

from defectlab.runs import check_profile
from types import ModuleType
from typing import Any
import importlib


STUDIES = {
    "reverse_distillation": "defectlab.studies.reverse_distillation",
    "bsdrd": "defectlab.papers.bsdrd",
    "detector": "defectlab.studies.detector",
    "yolo_dcf": "defectlab.papers.yolo_dcf",
    "d3n": "defectlab.studies.d3n",
    "amam_kd": "defectlab.studies.amam_kd",
}


def study(name: str) -> ModuleType:
    """The module of a study.

    It has `TITLE`, `TABLES`, `SETTINGS`, `ROWS`, `PRIMARY` rows, `planned_seeds`, `load`, `fingerprints`, `run_row`.
    It may have `METRICS` (groups, the headline first) and `OPTIONAL` rows: left out where their data or weights lack.
    """
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}: use one of {', '.join(STUDIES)}")
    return importlib.import_module(STUDIES[name])


def pick_rows(name: str, profile: str, wanted: list[str] | None = None) -> dict[str, Any]:
    """Row name -> settings, in the study's order; every row where `wanted` is None."""
    rows = study(name).ROWS[check_profile(profile)]
    unknown = [row for row in wanted or [] if row not in rows]
    if unknown:
        raise ValueError(f"unknown row {unknown[0]!r} of {name}: use some of {', '.join(rows)}")
    return dict(rows) if wanted is None else {row: rows[row] for row in wanted}
