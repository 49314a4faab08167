"""The studies by name, one module each: `study("bsdrd")` is `defectlab.studies.bsdrd.STUDY`."""

import importlib

from defectlab.studies.study import Row, Study

__all__ = ["STUDIES", "Row", "Study", "study"]

STUDIES = (
    "reverse_distillation",
    "bsdrd",
    "detector",
    "yolo_dcf",
    "d3n",
    "amam_kd",
    "windows",
    "rebuild",
    "cures",
    "stages",
    "v8_v10",
    "ten_pictures",
)


def study(name: str) -> Study:
    """ValueError for an unknown name. Only the named study's module is imported."""
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}: use one of {', '.join(STUDIES)}")
    return importlib.import_module(f"defectlab.studies.{name}").STUDY
