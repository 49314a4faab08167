"""The baselines that anomaly papers here are measured against, as rows: RD4AD and PatchCore (notebook 03)."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from defectlab.data.anomaly import data_fingerprint, load_anomaly
from defectlab.networks.feature_baselines import PatchCoreSettings
from defectlab.networks.resnet import fingerprint, load_teacher
from defectlab.networks.reverse_distillation import RD4ADSettings
from defectlab.studies.study import FEW, MORE, Row, Study, kept
from defectlab.training.anomaly import run_rd4ad
from defectlab.training.feature_baselines import run_patchcore

NUT = "mvtec_ad/metal_nut"
SMOKE_DATA = {"magnetic_tile": "synthetic_tile", NUT: "synthetic_nut"}
SMALL = {"size": 128, "teacher": "resnet18_random"}  # smoke: a random teacher has to be asked for by name
RD4AD = {
    "smoke": RD4ADSettings(dataset="synthetic_tile", epochs=2, batch=8, **SMALL),
    "quick": RD4ADSettings(epochs=10),
    "paper": RD4ADSettings(),
}
PATCHCORE = {
    "smoke": PatchCoreSettings(dataset="synthetic_tile", **SMALL),
    "quick": PatchCoreSettings(),
    "paper": PatchCoreSettings(),
}


# --- What a row of this kind is computed from ------------------------------------------------------------------------


load = kept(load_anomaly, "dataset", "size", sets=1)


@lru_cache(maxsize=4)
def weights_fingerprint(teacher: str) -> str:
    return fingerprint(load_teacher(teacher))


def fingerprints(settings: Any) -> dict[str, str]:
    return {"data": data_fingerprint(settings.dataset), "weights": weights_fingerprint(settings.teacher)}


def row(settings: Any, run: Callable, **options: Any) -> Row:
    """A row on images of an anomaly set and the features of a teacher."""
    return Row(settings, run, load, fingerprints, **options)


# --- Rows ------------------------------------------------------------------------------------------------------------


def rows(profile: str) -> dict[str, Row]:
    base, plain = RD4AD[profile], PATCHCORE[profile]
    nut = {"dataset": SMOKE_DATA[NUT] if profile == "smoke" else NUT}
    few = {"seeds": FEW[profile]}
    return {
        "rd4ad": row(base, run_rd4ad, seeds=MORE[profile], primary=True),
        "rd4ad_per_pixel": row(replace(base, loss="per_pixel"), run_rd4ad, **few),
        "patchcore": row(plain, run_patchcore, **few, primary=True),
        "rd4ad_metal_nut": row(replace(base, **nut), run_rd4ad, **few, primary=True),
        "patchcore_metal_nut": row(replace(plain, **nut), run_patchcore, **few, primary=True),
    }


METRICS = (
    ("image_auroc", "pixel_auroc", "aupro"),
    ("image_ap", "pixel_ap", "image_f1_dev", "image_f1_oracle", "pixel_f1_oracle"),
)
STUDY = Study(
    "Reverse distillation (CVPR 2022) and PatchCore (CVPR 2022): the baselines",
    {profile: rows(profile) for profile in RD4AD},
    {
        "magnetic_tile": "RD4AD and PatchCore on magnetic tiles",
        "metal_nut": "RD4AD and PatchCore on MVTec metal_nut (reduced copy), beside published values",
    },
    METRICS,
)
