"""The plain detectors that every detection paper here is measured against, as rows (notebook 02)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from defectlab.data.detection import detection_fingerprint, load_detection
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.studies.study import FEW, MORE, Row, Study, kept
from defectlab.training.detection import run_detector

# What a profile changes; "smoke" has synthetic data.
SMOKE_DATA = {"neu_det": "synthetic_steel", "neu_det_index": "synthetic_steel", "deep_pcb": "synthetic_board"}
# ours: the first that was tried, see results/tried.md; shared by YOLO-DCF, D3N and the command `detect`
ADAMW = {"optimizer": "adamw", "learning_rate": 0.001}
QUICK = {"size": 224, "epochs": 30, "batch": 16, **ADAMW}
PAPER = {**ADAMW, "learning_rate": 0.002}  # ours: twice the rate for four times the batch; not tried yet
SMOKE = {**QUICK, "scale": "t", "size": 96, "epochs": 2, "close_mosaic": 1, "warm_up": 0.5, "average_ramp": 20.0}
SETTINGS = {
    "smoke": DetectorSettings(dataset="synthetic_steel", **SMOKE),
    "quick": DetectorSettings(**QUICK),
    "paper": DetectorSettings(**PAPER),
}


# --- What a row of this kind is computed from ------------------------------------------------------------------------


def on(dataset: str, profile: str) -> str:
    """The name of a data set at a profile."""
    return SMOKE_DATA[dataset] if profile == "smoke" else dataset


load = kept(load_detection, "dataset", "size")


def fingerprints(settings: Any) -> dict[str, str]:
    """Of the data; every weight here is random at first."""
    return {"data": detection_fingerprint(settings.dataset), "weights": "random"}


def row(settings: Any, run: Callable = run_detector, **options: Any) -> Row:
    """A row on images with boxes."""
    return Row(settings, run, load, fingerprints, **options)


# --- Rows ------------------------------------------------------------------------------------------------------------


def rows(profile: str) -> dict[str, Row]:
    base, few = SETTINGS[profile], {"seeds": FEW[profile]}
    small = base.scale if profile == "smoke" else "s"
    return {
        "v8n": row(base, seeds=MORE[profile], primary=True),
        "v8n_index_split": row(replace(base, dataset=on("neu_det_index", profile)), **few, primary=True),
        "v5n": row(replace(base, family="v5"), **few, primary=True),
        "v8s": row(replace(base, scale=small), **few),
    }


METRICS = (
    ("map50", "map50_95", "map33"),
    ("precision_dev", "recall_dev", "f1_dev", "f1_oracle"),
    ("parameters_m", "gflops", "size_mb", "latency_ms"),
)
STUDY = Study(
    "YOLO from scratch: anchor-free (v8) and anchor-based (v5) detectors",
    {profile: rows(profile) for profile in SETTINGS},
    {"neu_det": "Detectors from scratch on NEU-DET, beside published numbers"},
    METRICS,
)
