"""The baselines that anomaly papers here are measured against: RD4AD and PatchCore, as rows; PaDiM and SPADE."""

from dataclasses import replace
from defectlab.data.anomaly import AnomalyData
from defectlab.data.anomaly import data_fingerprint
from defectlab.data.anomaly import load_anomaly
from defectlab.networks import resnet as teachers
from defectlab.networks.feature_baselines import PaDiMSettings
from defectlab.networks.feature_baselines import PatchCoreSettings
from defectlab.networks.feature_baselines import SPADESettings
from defectlab.networks.reverse_distillation import RD4ADSettings
from defectlab.runs import Result
from defectlab.runs import Session
from defectlab.training.anomaly import build
from defectlab.training.anomaly import distil
from defectlab.training.anomaly import make_loss
from defectlab.training.anomaly import to_maps
from defectlab.training.feature_baselines import run_padim
from defectlab.training.feature_baselines import run_patchcore
from defectlab.training.feature_baselines import run_spade
from functools import lru_cache
from typing import Any


TITLE = "Reverse distillation (CVPR 2022) and PatchCore (CVPR 2022): the baselines"


# What a profile changes; "smoke" draws its data and asks for a random teacher by name.
SMOKE_DATA = {"magnetic_tile": "synthetic_tile", "mvtec_ad/metal_nut": "synthetic_nut"}
SMALL = {"size": 128, "teacher": "resnet18_random"}
SETTINGS = {
    "smoke": RD4ADSettings(dataset="synthetic_tile", epochs=2, batch=8, **SMALL),
    "quick": RD4ADSettings(epochs=10),
    "paper": RD4ADSettings(),
}
PATCHCORE = {
    "smoke": PatchCoreSettings(dataset="synthetic_tile", **SMALL),
    "quick": PatchCoreSettings(),
    "paper": PatchCoreSettings(),
}


def rows(profile: str) -> dict[str, Any]:
    """The rows of notebook 03 at one profile."""
    base, plain = SETTINGS[profile], PATCHCORE[profile]
    nut = SMOKE_DATA["mvtec_ad/metal_nut"] if profile == "smoke" else "mvtec_ad/metal_nut"
    return {
        "rd4ad": base,
        "rd4ad_per_pixel": replace(base, loss="per_pixel"),
        "patchcore": plain,
        "rd4ad_metal_nut": replace(base, dataset=nut),
        "patchcore_metal_nut": replace(plain, dataset=nut),
    }


ROWS = {profile: rows(profile) for profile in SETTINGS}
PRIMARY = ("rd4ad", "patchcore", "rd4ad_metal_nut", "patchcore_metal_nut")
TABLES = {
    "magnetic_tile": "RD4AD and PatchCore on magnetic tiles",
    "metal_nut": "RD4AD and PatchCore on MVTec metal_nut (reduced copy), beside published values",
}


def planned_seeds(row: str, profile: str) -> int:
    """How many seeds a row gets: most for "rd4ad", on which papers rest their primary claims."""
    if row == "rd4ad":
        return {"smoke": 1, "quick": 3, "paper": 5}[profile]
    return {"smoke": 1, "quick": 1, "paper": 3}[profile]


def load(settings: Any, device: str) -> AnomalyData:
    return _load(settings.dataset, settings.size, str(device))


@lru_cache(maxsize=1)
def _load(dataset: str, size: int, device: str) -> AnomalyData:
    return load_anomaly(dataset, size, device)


@lru_cache(maxsize=4)
def weights_fingerprint(teacher: str) -> str:
    return teachers.fingerprint(teachers.load_teacher(teacher))


def fingerprints(settings: Any) -> dict[str, str]:
    return {"data": data_fingerprint(settings.dataset), "weights": weights_fingerprint(settings.teacher)}


def run_row(settings: Any, seed: int, data: AnomalyData, device: str, session: Session) -> Result:
    """One row and seed: RD4AD, PatchCore, PaDiM or SPADE, by the kind of its settings."""
    for kind, run in ((PatchCoreSettings, run_patchcore), (PaDiMSettings, run_padim), (SPADESettings, run_spade)):
        if isinstance(settings, kind):
            return run(settings, seed, data, device, session)
    return distil(settings, seed, data, device, session, build, make_loss, to_maps)
