"""The rows of D3N (notebooks 30 to 34): Tables I to VI of the paper. "student" is the whole method.

Yu, "D3N: Bring the Power of Diffusion Model to Defect Detection", arXiv 2408.13845.
"""

from dataclasses import replace
from typing import Any

from defectlab.data.detection import DetectionData
from defectlab.data.instances import LABELS as MASKED
from defectlab.data.instances import instance_fingerprint, load_instances
from defectlab.data.splits import SAMPLE
from defectlab.networks.diffusion import DiffusionSettings
from defectlab.networks.torchvision_detectors import TorchvisionSettings
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.papers.d3n.hybrid import HybridSettings, InstanceSettings, StudentSettings
from defectlab.papers.d3n.resvae import CompressionSettings
from defectlab.studies import detector as baselines
from defectlab.studies.study import FEW, MORE, ONCE, PAPER_ONLY, Row, Study, kept, rows_by_kind
from defectlab.training.cost_rows import CostSettings, NoData, run_costs
from defectlab.training.d3n import run_hybrid, run_student, run_with_masks
from defectlab.training.d3n_features import run_compression
from defectlab.training.detection import run_detector
from defectlab.training.diffusion import run_ddpm
from defectlab.training.torchvision_detectors import run_torchvision

# --- Settings of the three profiles ----------------------------------------------------------------------------------

DIFFUSION = {
    "smoke": {
        "size": 32,
        "channels": (8, 16, 24),
        "layers": 1,
        "epochs": 2,
        "batch": 8,
        "learning_rate": 1e-3,
        "average": 0.9,
    },
    # ours: a batch of 2 at 5e-6 learns nothing in the hours that a CPU has
    "quick": {"channels": (32, 64, 128), "layers": 1, "epochs": 60, "batch": 16, "learning_rate": 5e-4},
    # ours: at the paper's batch of 2 a GPU idles (`ddpm_printed` has its batch and rate)
    "paper": {"epochs": 400, "batch": 64, "learning_rate": 2e-4},
}
# ours: fewer epochs; 2000 are printed
COMPRESSION = {
    "smoke": {"epochs": 2, "batch": 16},
    "quick": {"epochs": 20, "learning_rate": 3e-3},
    "paper": {"epochs": 200},
}
SHARED = {"family": "v5", "mosaic": 0.0, "close_mosaic": 0}  # flips and scale: features follow them
DETECTOR = {
    "smoke": {**baselines.SMOKE, "close_mosaic": 0, "dataset": "synthetic_steel"},
    "quick": {"scale": "n", "size": 192, "epochs": 40, "batch": 16, **baselines.ADAMW},
    # section IV-A, but for AdamW at 0.001, which is ours
    "paper": {"scale": "s", "size": 512, "epochs": 100, "batch": 16, **baselines.ADAMW},
}
SETTINGS = {
    profile: DetectorSettings(**{**DETECTOR[profile], **SHARED, "flip_up_down": 0.5}) for profile in DETECTOR
}  # ours: rolled steel has no preferred orientation


# --- Rows of the tables ----------------------------------------------------------------------------------------------


def stages(profile: str, dataset: str) -> dict[str, Any]:
    """The diffusion model of a set and both compressors of its features."""
    diffusion = DiffusionSettings(dataset=dataset, **DIFFUSION[profile])
    resvae = CompressionSettings(dataset=dataset, ddpm=diffusion, **COMPRESSION[profile])
    printed = replace(diffusion, batch=2, learning_rate=5e-6, epochs=min(diffusion.epochs, 200))  # section IV-A
    return {"ddpm": diffusion, "ddpm_printed": printed, "resvae": resvae, "pca": replace(resvae, method="pca")}


def hybrid_of(detector: DetectorSettings, compression: CompressionSettings, **switches: Any) -> HybridSettings:
    """The hybrid around a detector: the same recipe."""
    return HybridSettings(**vars(detector), compression=compression, **switches)


def student_of(hybrid: HybridSettings, **changes: Any) -> StudentSettings:
    """The student of a hybrid: the same detector and recipe."""
    own = {name: getattr(hybrid, name) for name in vars(DetectorSettings())}
    return StudentSettings(**(own | changes), teacher=hybrid)


def settings_of(profile: str) -> dict[str, Any]:
    """Row name -> settings; "student" is the whole method, "baseline" its own baseline."""
    base = SETTINGS[profile]
    prepared = stages(profile, base.dataset)
    resvae = prepared["resvae"]
    whole = hybrid_of(base, resvae)
    sums = {"dual": False, "weighted": False, "residual": False, "norm": False}
    student = student_of(whole)
    found = prepared | {
        "baseline": base,
        "baseline_mosaic": replace(base, mosaic=1.0, close_mosaic=min(10, base.epochs // 4)),
        "hybrid": whole,
        "student": student,
        # Table I
        "fusion_cross": replace(whole, **sums),
        "fusion_dual": replace(whole, **(sums | {"dual": True})),
        "fusion_dual_weighted": replace(whole, residual=False, norm=False),
        "fusion_weighted_residual": replace(whole, dual=False, norm=False),
        "fusion_dual_weighted_residual": replace(whole, norm=False),
        # Table II
        "fusion_concat": replace(whole, fuse="concat"),
        "fusion_sum": replace(whole, fuse="sum"),
        "fusion_weighted_sum": replace(whole, fuse="weighted_sum"),
        # Table III
        "plain_pca": replace(whole, fuse="sum", noise_filter=False, compression=prepared["pca"]),
        "plain_resvae": replace(whole, fuse="sum", noise_filter=False),
        # section III-C, IV-B.2 and IV-A
        "fusion_printed_scale": replace(whole, printed_scale=True),
        "fusion_positional": replace(whole, positional="sine"),
        "student_bce": replace(student, distance="bce"),
    }
    longer = 3 * base.epochs
    found |= {"baseline_300": replace(base, epochs=longer), "student_300": replace(student, epochs=longer)}
    return found | board_settings(profile) | mask_settings(profile) | table6_settings(profile) | cost_settings(profile)


def board_settings(profile: str) -> dict[str, Any]:
    """The whole method on circuit boards: ours."""
    dataset = baselines.on("deep_pcb", profile)
    base = replace(SETTINGS[profile], dataset=dataset)
    prepared = stages(profile, dataset)
    hybrid = hybrid_of(base, prepared["resvae"])
    found = {"ddpm": prepared["ddpm"], "resvae": prepared["resvae"], "baseline": base, "hybrid": hybrid}
    return {f"pcb_{name}": row for name, row in (found | {"student": student_of(hybrid)}).items()}


def mask_settings(profile: str) -> dict[str, Any]:
    """Table IV: boxes and masks on NEU-Seg, and the baseline on that set's own split, which tests on turned images of
    its training part."""
    sets = {"smoke": ("synthetic_steel_masks",) * 2}.get(profile, ("neu_seg", "neu_seg_published"))
    base = replace(SETTINGS[profile], dataset=sets[0])
    prepared = stages(profile, sets[0])
    hybrid = hybrid_of(base, prepared["resvae"])
    baseline = InstanceSettings(**vars(base))
    return {
        "seg_ddpm": prepared["ddpm"],
        "seg_resvae": prepared["resvae"],
        "multitask_baseline": baseline,
        "multitask_hybrid": hybrid,
        "multitask_student": student_of(hybrid),
        "multitask_baseline_published": replace(baseline, dataset=sets[1]),
    }


def table6_settings(profile: str) -> dict[str, Any]:
    """Other detectors on NEU-DET, with the recipe of the baseline."""
    base = SETTINGS[profile]
    scales = {"v5": ("m", "l"), "v8": ("n", "s", "m", "l")}
    own = {
        f"{family}{scale}": replace(base, family=family, scale="t" if profile == "smoke" else scale)
        for family in scales
        for scale in scales[family]
    }
    common = {"dataset": base.dataset, "size": base.size, "epochs": base.epochs}
    others = ("faster_rcnn", "retinanet", "ssd", "fcos")
    return own | {name: TorchvisionSettings(architecture=name, **common) for name in others}


def cost_settings(profile: str) -> dict[str, CostSettings]:
    """Table V's costs, which need no data."""
    size = 96 if profile == "smoke" else 640
    models = (*(("v5", scale) for scale in "nsml"), *(("v8", scale) for scale in "nsml"))
    return {f"cost_{family}{scale}": CostSettings(family=family, scale=scale, size=size) for family, scale in models}


# --- What a row is computed from, and how ----------------------------------------------------------------------------


load_masks = kept(load_instances, "dataset", "size")


def load(settings: Any, device: str) -> DetectionData:
    """A set, or its committed sample, at the size that the row sees."""
    masked = settings.dataset.removeprefix(SAMPLE) in MASKED
    return (load_masks if masked else baselines.load)(settings, device)


def load_for_compression(settings: CompressionSettings, device: str) -> DetectionData:
    """A compressor sees what its diffusion model saw."""
    return load(settings.ddpm, device)


def fingerprints(settings: Any) -> dict[str, str]:
    """Of the data; every weight here is random at first."""
    if settings.dataset in MASKED:
        return {"data": instance_fingerprint(settings.dataset), "weights": "random"}
    return baselines.fingerprints(settings)


def needs_of_stages(settings: CompressionSettings) -> list[tuple[Any, int]]:
    return [(settings.ddpm, 0), (settings, 0)]  # ours: one run of each stage serves all seeds of what follows


def needs_of_student(settings: StudentSettings, seed: int) -> list[tuple[Any, int]]:
    teacher_seed = seed if settings.teacher_seed is None else settings.teacher_seed
    return [*needs_of_stages(settings.teacher.compression), (settings.teacher, teacher_seed)]


KINDS = {  # of settings: how such a row is run, loaded and fingerprinted, and what it needs
    DiffusionSettings: (run_ddpm, load, fingerprints),
    CompressionSettings: (
        run_compression,
        load_for_compression,
        fingerprints,
        lambda settings, seed: [(settings.ddpm, 0)],
    ),
    DetectorSettings: (run_detector, load, fingerprints),
    HybridSettings: (run_hybrid, load, fingerprints, lambda settings, seed: needs_of_stages(settings.compression)),
    StudentSettings: (run_student, load, fingerprints, needs_of_student),
    InstanceSettings: (run_with_masks, load, fingerprints),
    TorchvisionSettings: (run_torchvision, load, fingerprints),
    CostSettings: (
        run_costs,
        lambda settings, device: NoData(),
        lambda settings: {"data": "none", "weights": "random"},
    ),
}
STAGES = (DiffusionSettings, CompressionSettings, CostSettings)  # one run serves all seeds of what follows
PRIMARY = ("ddpm", "resvae", "baseline", "hybrid", "student")
IN_QUICK = (  # and not: three times the epochs, larger detectors, boards, masks
    *(*PRIMARY, "pca", "baseline_mosaic", "student_bce", "plain_pca", "plain_resvae"),
    *(f"fusion_{way}" for way in ("weighted_sum", "sum", "concat", "cross", "dual", "dual_weighted")),
    *(f"fusion_{way}" for way in ("weighted_residual", "dual_weighted_residual", "positional", "printed_scale")),
)
OPTIONAL = (*board_settings("paper"), *mask_settings("paper"))  # their data are not everywhere


def seeds_of(name: str, settings: Any) -> dict[str, int]:
    """Profile -> how many seeds: most for what the primary claims compare; a stage one."""
    in_quick = name in IN_QUICK or isinstance(settings, CostSettings)
    if isinstance(settings, STAGES):
        return ONCE if in_quick else ONCE | {"quick": 0}
    if isinstance(settings, TorchvisionSettings):  # SSD refuses small images, the others take hours on a CPU
        return {"smoke": 0, "quick": 0, "paper": 3}
    if name in ("baseline", "hybrid", "student"):
        return MORE
    return FEW if in_quick else PAPER_ONLY


def rows(profile: str) -> dict[str, Row]:
    return rows_by_kind(settings_of(profile), KINDS, lambda *of: seeds_of(*of)[profile], PRIMARY, OPTIONAL)


STUDY = Study(
    "D3N (arXiv 2408.13845): features of a diffusion model, fused into YOLOv5s and distilled back",
    {profile: rows(profile) for profile in SETTINGS},
    {
        "table1": "Table I: parts of the dynamic cross-fusion",
        "table2": "Table II: ways to fuse",
        "table3": "Table III: parts of the method",
        "table4": "Table IV: detection and segmentation on NEU-Seg",
        "table5": "Table V: costs, and Tianchi fabric as printed",
        "table6": "Table VI: detectors on NEU-DET",
        "table7": "Table VII: GC10-DET as printed",
        "text": "Experiments in the text, and ours",
    },
    (
        ("map50", "map50_95", "map33"),
        ("precision_dev", "recall_dev", "f1_dev", "f1_oracle"),
        ("mask_map50", "mask_map50_95", "mask_precision_dev", "mask_recall_dev"),
        ("parameters_m", "gflops", "size_mb", "latency_ms", "fps"),
        ("noise_error", "unexplained", "kl", "compression_ratio"),
    ),
)
