"""The plain detectors that every detection paper here is measured against, as rows."""

from dataclasses import replace
from defectlab.data.boxes import DetectionData
from defectlab.data.detection import detection_fingerprint
from defectlab.data.detection import load_detection
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.runs import Result
from defectlab.runs import Session
from defectlab.training.detection import train_and_evaluate
from functools import lru_cache


TITLE = "YOLO from scratch: anchor-free (v8) and anchor-based (v5) detectors"

# What a profile changes; "smoke" draws its data.
SMOKE_DATA = {"neu_det": "synthetic_steel", "neu_det_index": "synthetic_steel", "deep_pcb": "synthetic_board"}
ADAMW = {"optimizer": "adamw", "learning_rate": 0.001}  # ours: the first that was tried, see results/tried.md
QUICK = {"size": 224, "epochs": 30, "batch": 16, **ADAMW}
PAPER = {**ADAMW, "learning_rate": 0.002}  # ours: twice the rate for four times the batch; not tried yet
SMOKE = {**QUICK, "scale": "t", "size": 96, "epochs": 2, "close_mosaic": 1, "warm_up": 0.5, "average_ramp": 20.0}
SETTINGS = {
    "smoke": DetectorSettings(dataset="synthetic_steel", **SMOKE),
    "quick": DetectorSettings(**QUICK),
    "paper": DetectorSettings(**PAPER),
}


def on(dataset: str, profile: str) -> str:
    """The name of a data set at a profile."""
    return SMOKE_DATA[dataset] if profile == "smoke" else dataset


def rows(profile: str) -> dict[str, DetectorSettings]:
    """The rows of notebook 02 at one profile."""
    base = SETTINGS[profile]
    small = base.scale if profile == "smoke" else "s"
    return {
        "v8n": base,
        "v8n_index_split": replace(base, dataset=on("neu_det_index", profile)),
        "v5n": replace(base, family="v5"),
        "v8s": replace(base, scale=small),
    }


ROWS = {profile: rows(profile) for profile in SETTINGS}
PRIMARY = ("v8n", "v8n_index_split", "v5n")
METRICS = (
    ("map50", "map50_95", "map33"),
    ("precision_dev", "recall_dev", "f1_dev", "f1_oracle"),
    ("parameters_m", "gflops", "size_mb", "latency_ms", "images_per_second_32"),
)
TABLES = {"neu_det": "Detectors from scratch on NEU-DET, beside published numbers"}


def planned_seeds(row: str, profile: str) -> int:
    """How many seeds a row gets: most for "v8n", the baseline of the papers' primary claims."""
    if row == "v8n":
        return {"smoke": 1, "quick": 3, "paper": 5}[profile]
    return {"smoke": 1, "quick": 1, "paper": 3}[profile]


def load(settings: DetectorSettings, device: str) -> DetectionData:
    return _load(settings.dataset, settings.size, str(device))


@lru_cache(maxsize=2)
def _load(dataset: str, size: int, device: str) -> DetectionData:
    return load_detection(dataset, size, device)


def fingerprints(settings: DetectorSettings) -> dict[str, str]:
    """Of the data; every weight here starts from chance."""
    return {"data": detection_fingerprint(settings.dataset), "weights": "random"}


def run_row(settings: DetectorSettings, seed: int, data: DetectionData, device: str, session: Session) -> Result:
    return train_and_evaluate(settings, seed, data, device, session)
