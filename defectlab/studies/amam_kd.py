"""The two-stage paper: small-sample segmentation (AMAM), then anomaly detection by knowledge distillation.

Guo and Lv, "A Two-Stage Deep-Learning Framework for Industrial Anomaly Detection: Integrating Small-Sample Semantic
Segmentation and Knowledge Distillation", Machines 13(8), 712 (2025), doi 10.3390/machines13080712. In the paper's
order: `segmentation` (section 3.1), `distillation` and `weighting` (section 3.2), `two_stage` (section 4.3); and what
its tables add up to (`arithmetic`). Here: the three profiles, the rows of all tables, and how a row is run.
"""

from dataclasses import replace
from defectlab.batch import fingerprints_here
from defectlab.data.anomaly import MVTEC_CATEGORIES
from defectlab.data.masks import SegmentationData
from defectlab.data.masks import load_segmentation
from defectlab.data.masks import segmentation_fingerprint
from defectlab.networks.feature_baselines import PaDiMSettings
from defectlab.networks.feature_baselines import PatchCoreSettings
from defectlab.networks.feature_baselines import SPADESettings
from defectlab.networks.reverse_distillation import RD4ADSettings
from defectlab.networks.segmentation import COMPARATORS
from defectlab.networks.segmentation import SegmentationSettings
from defectlab.papers.amam_kd import segmentation
from defectlab.papers.amam_kd.distillation import DistillationSettings
from defectlab.papers.amam_kd.segmentation import Settings
from defectlab.papers.amam_kd.two_stage import TwoStageSettings
from defectlab.runs import Result
from defectlab.runs import Session
from defectlab.studies import reverse_distillation as baselines
from defectlab.training.amam_kd import run_distillation
from defectlab.training.amam_kd import run_two_stage
from defectlab.training.segmentation import run_segmentation
from functools import lru_cache
from typing import Any


TITLE = "AMAM + KD (Machines 2025): segmentation, distillation, and both in two stages on MVTec metal_nut"
TARGETS = ("nut", "defect")  # what was segmented is not clear (notebook 40): both
SHARES = {"10": 0.1, "20": 0.2, "50": 0.5}  # Table 6

# --- Settings of the three profiles ----------------------------------------------------------------------------------

NUT = "mvtec_ad/metal_nut"
SMOKE_NUT = {"dataset": baselines.SMOKE_DATA[NUT]}
SEGMENTATION = {
    "smoke": {**SMOKE_NUT, "encoder": "resnet18_random", "size": 64, "epochs": 2},
    "quick": {"size": 128, "epochs": 60},
    "paper": {},
}
DETECTION = {
    "smoke": {"teacher": "resnet18_random", "size": 112, "epochs": 2, "batch": 8},
    "quick": {"epochs": 20},
    "paper": {},
}
TWO_STAGE = {"smoke": {"source": 128}, "quick": {}, "paper": {}}
SETTINGS = {profile: DistillationSettings(**DETECTION[profile]) for profile in DETECTION}


# --- Rows of the tables ----------------------------------------------------------------------------------------------


def segmentation_rows(profile: str, target: str) -> dict[str, SegmentationSettings]:
    """Tables 2, 4, 5 and 6 on one target."""
    common = {"target": target, **SEGMENTATION[profile]}
    full = Settings(**common)
    gates = replace(full, amam=False)
    found = {
        "amam": full,
        "amam_table1": replace(full, layout="table1"),
        "amam_self": replace(full, attention="self"),
        # Table 2
        "dilation_2_4_6_8": replace(full, dilations=(2, 4, 6, 8)),
        "dilation_6_10_14_18": replace(full, dilations=(6, 10, 14, 18)),
        "dilation_8_12_16_20": replace(full, dilations=(8, 12, 16, 20)),
        # Table 5
        "baseline": replace(gates, decoder=False, skips="none"),
        "decoder": replace(gates, skips="none"),
        "skips": replace(gates, skips="plain"),
        "all_gates": replace(gates, skips="all_gates"),
        "gates": gates,
        # Table 4
        **{name: SegmentationSettings(network=name, **common) for name in COMPARATORS},
    }
    for percent, share in SHARES.items():  # Table 6
        for name, settings in (("gates", gates), ("amam", full)):
            found[f"{name}_{percent}"] = replace(settings, share=share)
            found[f"{name}_{percent}_steps"] = replace(settings, share=share, equal_steps=True)
    return {f"{name}_{target}": settings for name, settings in found.items()}


def detection_rows(profile: str) -> dict[str, Any]:
    """Tables 7 to 11 and the experiments in the text; beyond Table 7 on metal_nut alone."""
    base = SETTINGS[profile]
    plain = {name: getattr(base, name) for name in ("teacher", "size")}
    found: dict[str, Any] = {}
    for category in MVTEC_CATEGORIES:  # Table 7
        on = {"dataset": f"mvtec_ad/{category}"} | (SMOKE_NUT if (profile, category) == ("smoke", "metal_nut") else {})
        found[f"kd_{category}"] = replace(base, **on)
        found[f"padim_{category}"] = PaDiMSettings(**on, **plain)
        found[f"spade_{category}"] = SPADESettings(**on, **plain)
        found[f"patchcore_{category}"] = PatchCoreSettings(**on, **plain)
    full = found["kd_metal_nut"]
    return found | {
        "rd4ad_metal_nut": RD4ADSettings(dataset=full.dataset, epochs=full.epochs, **plain),
        # Table 8
        "kd_resnet50": replace(full, teacher="resnet50"),
        "kd_wide_resnet50_2": replace(full, teacher="wide_resnet50_2"),
        # Table 9
        "kd_pre": replace(full, fusion=False, vit=False, residual=False),
        "kd_res": replace(full, fusion=False, vit=False),
        "kd_mff_res": replace(full, vit=False),
        # Table 10
        "kd_l1": replace(full, loss="l1"),
        "kd_l2": replace(full, loss="l2"),
        "kd_mse": replace(full, loss="mse"),
        # Table 11
        "kd_no_weighting": replace(full, weighting="none"),
        "kd_weighting_3": replace(full, weighting="3x3"),
        "kd_weighting_5": replace(full, weighting="5x5"),
        "kd_weighting_printed": replace(full, weighting="printed"),
        # section 4.2.2, and audit points 27 and 29
        "kd_homogeneous": replace(full, student="homogeneous"),
        "kd_no_flips": replace(full, flips=False),
        "kd_256": replace(full, size={"smoke": 128}.get(profile, 256)),
    }


def rows(profile: str) -> dict[str, Any]:
    """Every row of notebooks 40 to 42 at one profile; "kd_metal_nut" is the one stage, "two_stage" the two."""
    found = {}
    for target in TARGETS:
        found |= segmentation_rows(profile, target)
    longer = {"epochs": 8} if profile == "smoke" else {}  # after two epochs no nut is found, and nothing is cut
    found["nut_from_good"] = replace(found["amam_nut"], split="good", **longer)
    found |= detection_rows(profile)
    two = TwoStageSettings(segmenter=found["nut_from_good"], detector=found["kd_metal_nut"], **TWO_STAGE[profile])
    return found | {"two_stage": two, "two_stage_paper_split": replace(two, segmenter=found["amam_nut"])}


ROWS = {profile: rows(profile) for profile in SETTINGS}
OPTIONAL = (  # their data or weights are not everywhere
    *(f"{name}_{c}" for name in ("kd", "padim", "spade", "patchcore") for c in MVTEC_CATEGORIES if c != "metal_nut"),
    *("kd_resnet50", "kd_wide_resnet50_2"),
)
PRIMARY = (
    *("kd_metal_nut", "two_stage", "amam_10_nut", "gates_10_nut", "amam_10_defect", "gates_10_defect"),
    *("amam_nut", "amam_defect", "unet_nut", "unet_defect"),
    *("rd4ad_metal_nut", "patchcore_metal_nut", "padim_metal_nut"),
)
QUICK = (*PRIMARY, "nut_from_good")  # the networks of stage one that quick trains
TABLES = {
    "table2": "Table 2: dilation rates",
    "table4": "Table 4: segmentation networks",
    "table5": "Table 5: parts of the segmentation network",
    "table6": "Table 6: fewer training images",
    "table7": "Table 7: anomaly localisation on MVTec AD",
    "table8": "Table 8: teachers",
    "table9": "Table 9: feature aggregation and filtering",
    "table10": "Table 10: losses",
    "table11": "Table 11: weighting of the maps",
    "text": "Experiments in the text",
}
METRICS = (
    ("miou", "image_auroc", "pixel_auroc"),
    ("iou", "dice", "accuracy"),
    ("mae", "weighted_f"),
    ("s_measure", "e_measure"),
    ("dice_nonempty", "weighted_f_nonempty"),
    ("s_measure_nonempty", "e_measure_nonempty"),
    ("image_ap", "pixel_ap", "aupro"),
    ("image_auroc_crop", "pixel_auroc_crop", "aupro_crop", "crop_share"),
    ("parameters_m", "gflops", "latency_ms"),
)


def planned_seeds(row: str, profile: str) -> int:
    """How many seeds a row gets: five in the paper profile for the primary claims; in quick none for the ablations of
    stage one, since each would take as long as the network itself (all of them: a night)."""
    if row in ("kd_metal_nut", "two_stage"):
        return {"smoke": 1, "quick": 3, "paper": 5}[profile]
    if row.startswith(("amam_10_", "gates_10_")) and "_steps_" not in row:
        return {"smoke": 1, "quick": 3, "paper": 5}[profile]
    if profile == "quick" and isinstance(ROWS["quick"][row], SegmentationSettings) and row not in QUICK:
        return 0
    return {"smoke": 1, "quick": 1, "paper": 3}[profile]


def present(profile: str) -> list[str]:
    """The MVTec categories that can be run here; in smoke the drawn nut alone."""
    if profile == "smoke":
        return ["metal_nut"]
    return [c for c in MVTEC_CATEGORIES if fingerprints_here(baselines, ROWS[profile][f"patchcore_{c}"])]


# --- Data, fingerprints, one run -------------------------------------------------------------------------------------


def load(settings: Any, device: str) -> Any:
    """AnomalyData, or SegmentationData for the rows of stage one."""
    if isinstance(settings, SegmentationSettings):
        return _load_masks(settings.dataset, settings.target, settings.split, settings.size, str(device))
    return baselines.load(settings, device)


@lru_cache(maxsize=2)  # both targets
def _load_masks(dataset: str, target: str, split: str, size: int, device: str) -> SegmentationData:
    return load_segmentation(dataset, target, split, size, device)


def fingerprints(settings: Any) -> dict[str, str]:
    if isinstance(settings, SegmentationSettings):
        masks = segmentation_fingerprint(settings.dataset, settings.target, settings.split)
        return {"data": masks, "weights": baselines.weights_fingerprint(settings.encoder)}
    if isinstance(settings, TwoStageSettings):
        return baselines.fingerprints(settings) | {"masks": fingerprints(settings.segmenter)["data"]}
    return baselines.fingerprints(settings)


def run_row(settings: Any, seed: int, data: Any, device: str, session: Session) -> Result:
    """One row and seed, by the kind of its settings."""
    if isinstance(settings, TwoStageSettings):
        return run_two_stage(settings, seed, data, device, session)
    if isinstance(settings, SegmentationSettings):
        return run_segmentation(settings, seed, data, device, session, segmentation.build)
    if isinstance(settings, DistillationSettings):
        return run_distillation(settings, seed, data, device, session)
    return baselines.run_row(settings, seed, data, device, session)
