"""The rows of the two-stage paper (notebooks 40 to 43). "kd_metal_nut" is the one stage, "two_stage" the two.

Guo and Lv, "A Two-Stage Deep-Learning Framework for Industrial Anomaly Detection: Integrating Small-Sample Semantic
Segmentation and Knowledge Distillation", Machines 13(8), 712 (2025), doi 10.3390/machines13080712.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from defectlab.data.anomaly import MVTEC_CATEGORIES
from defectlab.data.masks import load_segmentation, segmentation_fingerprint
from defectlab.networks.feature_baselines import PaDiMSettings, PatchCoreSettings, SPADESettings
from defectlab.networks.reverse_distillation import RD4ADSettings
from defectlab.networks.segmentation import COMPARATORS, SegmentationSettings
from defectlab.papers.amam_kd import segmentation
from defectlab.papers.amam_kd.distillation import DistillationSettings
from defectlab.papers.amam_kd.segmentation import Settings
from defectlab.papers.amam_kd.two_stage import TwoStageSettings
from defectlab.studies import reverse_distillation as baselines
from defectlab.studies.study import FEW, MORE, PAPER_ONLY, Row, Study, kept, rows_by_kind
from defectlab.training.amam_kd import run_distillation, run_two_stage
from defectlab.training.anomaly import run_rd4ad
from defectlab.training.feature_baselines import run_padim, run_patchcore, run_spade
from defectlab.training.segmentation import run_segmentation

TARGETS = ("nut", "defect")  # what was segmented is not clear (notebook 43): both
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
RD4AD = {"smoke": {"size": 128}, "quick": {}, "paper": {}}  # its bottleneck halves five times, which 112 px do not
TWO_STAGE = {"smoke": {"source": 128}, "quick": {}, "paper": {}}
SETTINGS = {profile: DistillationSettings(**DETECTION[profile]) for profile in DETECTION}


# --- Rows of the tables ----------------------------------------------------------------------------------------------


def segmentation_settings(profile: str, target: str) -> dict[str, SegmentationSettings]:
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


def detection_settings(profile: str) -> dict[str, Any]:
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
        "rd4ad_metal_nut": RD4ADSettings(dataset=full.dataset, epochs=full.epochs, **plain | RD4AD[profile]),
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
        # section 4.2.2; and what notebook 41 asks: without flips, and at 256 px
        "kd_homogeneous": replace(full, student="homogeneous"),
        "kd_no_flips": replace(full, flips=False),
        "kd_256": replace(full, size={"smoke": 128}.get(profile, 256)),
    }


def settings_of(profile: str) -> dict[str, Any]:
    """Row name -> settings."""
    found = {}
    for target in TARGETS:
        found |= segmentation_settings(profile, target)
    longer = {"epochs": 8} if profile == "smoke" else {}  # after two epochs no nut is found, and nothing is cut
    found["nut_from_good"] = replace(found["amam_nut"], split="good", **longer)
    found |= detection_settings(profile)
    two = TwoStageSettings(segmenter=found["nut_from_good"], detector=found["kd_metal_nut"], **TWO_STAGE[profile])
    return found | {"two_stage": two, "two_stage_paper_split": replace(two, segmenter=found["amam_nut"])}


# --- What a row is computed from, and how ----------------------------------------------------------------------------


load_masks = kept(load_segmentation, "dataset", "target", "split", "size")  # both targets stay


def fingerprints_of_masks(settings: SegmentationSettings) -> dict[str, str]:
    masks = segmentation_fingerprint(settings.dataset, settings.target, settings.split)
    return {"data": masks, "weights": baselines.weights_fingerprint(settings.encoder)}


def fingerprints_of_both(settings: TwoStageSettings) -> dict[str, str]:
    return baselines.fingerprints(settings) | {"masks": fingerprints_of_masks(settings.segmenter)["data"]}


run_stage_one = partial(run_segmentation, build=segmentation.build)
KINDS = {  # of settings: how such a row is run, loaded and fingerprinted, and what it needs
    Settings: (run_stage_one, load_masks, fingerprints_of_masks),
    SegmentationSettings: (run_stage_one, load_masks, fingerprints_of_masks),
    DistillationSettings: (run_distillation, baselines.load, baselines.fingerprints),
    TwoStageSettings: (
        run_two_stage,
        baselines.load,
        fingerprints_of_both,
        lambda settings, seed: [(settings.segmenter, seed)],
    ),
    RD4ADSettings: (run_rd4ad, baselines.load, baselines.fingerprints),
    PatchCoreSettings: (run_patchcore, baselines.load, baselines.fingerprints),
    PaDiMSettings: (run_padim, baselines.load, baselines.fingerprints),
    SPADESettings: (run_spade, baselines.load, baselines.fingerprints),
}
OPTIONAL = (  # their data or weights are not everywhere
    *(f"{name}_{c}" for name in ("kd", "padim", "spade", "patchcore") for c in MVTEC_CATEGORIES if c != "metal_nut"),
    *("kd_resnet50", "kd_wide_resnet50_2"),
)
PRIMARY = (
    *("kd_metal_nut", "two_stage", "amam_10_nut", "gates_10_nut", "amam_10_defect", "gates_10_defect"),
    *("amam_nut", "amam_defect", "unet_nut", "unet_defect"),
    *("rd4ad_metal_nut", "patchcore_metal_nut", "padim_metal_nut"),
)
IN_QUICK = (*PRIMARY, "nut_from_good")  # the networks of stage one that quick trains: all of them would take a night
COMPARED = ("kd_metal_nut", "two_stage", "amam_10_nut", "gates_10_nut", "amam_10_defect", "gates_10_defect")


def seeds_of(name: str, settings: Any) -> dict[str, int]:
    """Profile -> how many seeds: most for what the primary claims compare."""
    if name in COMPARED:
        return MORE
    return PAPER_ONLY if isinstance(settings, SegmentationSettings) and name not in IN_QUICK else FEW


def rows(profile: str) -> dict[str, Row]:
    return rows_by_kind(settings_of(profile), KINDS, lambda *of: seeds_of(*of)[profile], PRIMARY, OPTIONAL)


STUDY = Study(
    "AMAM + KD (Machines 2025): segmentation, distillation, and both in two stages on MVTec metal_nut",
    {profile: rows(profile) for profile in SETTINGS},
    {
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
    },
    (
        ("miou", "image_auroc", "pixel_auroc"),
        ("iou", "dice", "accuracy"),
        ("mae", "weighted_f"),
        ("s_measure", "e_measure"),
        ("dice_nonempty", "weighted_f_nonempty"),
        ("s_measure_nonempty", "e_measure_nonempty"),
        ("image_ap", "pixel_ap", "aupro"),
        ("image_auroc_crop", "pixel_auroc_crop", "aupro_crop", "crop_share"),
        ("parameters_m", "gflops", "latency_ms"),
    ),
)


def present(profile: str) -> list[str]:
    """The MVTec categories that can be run here; in smoke the synthetic nut alone."""
    if profile == "smoke":
        return ["metal_nut"]
    rows_here = STUDY.rows[profile]
    return [c for c in MVTEC_CATEGORIES if rows_here[f"patchcore_{c}"].fingerprints_here()]
