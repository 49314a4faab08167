"""The rows of YOLO-DCF (notebooks 10 to 13). "yolo_dcf" is the whole method, "baseline" the plain detector."""

from dataclasses import replace
from functools import partial

from defectlab.networks.yolo.model import build_detector
from defectlab.papers.yolo_dcf import Settings, build, teacher_settings
from defectlab.studies import detector as baselines
from defectlab.studies.detector import row
from defectlab.studies.study import FEW, MORE, ONCE, Row, Study, needs_of
from defectlab.training.robustness import RobustnessSettings, run_robustness
from defectlab.training.yolo_dcf import run_yolo_dcf

DISTILLED = {"relation": 10.0, "channel": 1.0}  # ours: each term starts near a fifth of the detector's loss
PCB = {"smoke": {}, "quick": {"size": 256, "epochs": 20}, "paper": {}}
SETTINGS = {
    "smoke": Settings(dataset="synthetic_steel", **baselines.SMOKE),
    "quick": Settings(**baselines.QUICK),
    "paper": Settings(**baselines.PAPER),
}
STRONGER = {"smoke": "t", "quick": "s", "paper": "s"}  # scale of the teacher


def needs_of_teacher(settings: Settings, seed: int) -> list[tuple[Settings, int]]:
    return [(teacher_settings(settings), settings.teacher_seed)] if settings.teacher_scale else []


def rows(profile: str) -> dict[str, Row]:
    plain, base = baselines.SETTINGS[profile], SETTINGS[profile]
    whole = replace(base, teacher_scale=STRONGER[profile], **DISTILLED)
    board = {"dataset": baselines.on("deep_pcb", profile), **PCB[profile]}
    more, few, once = ({"seeds": seeds[profile]} for seeds in (MORE, FEW, ONCE))

    def own(settings: Settings, **options) -> Row:
        return row(settings, run_yolo_dcf, needs=needs_of_teacher, **options)

    steel = {
        "baseline": row(plain, **more, primary=True),
        "fusion": own(replace(base, block="plain"), **few),
        "block": own(replace(base, fusion="concat"), **few),
        "modules": own(base, **few),
        "relation": own(replace(whole, channel=0.0), **few),
        "channel": own(replace(whole, relation=0.0), **few),
        "yolo_dcf": own(whole, **more, primary=True),
        "teacher": own(teacher_settings(whole), **once),
        # plain attention (Hu et al. 2018, Woo et al. 2018), at the same four places
        "se": own(replace(base, fusion="se", block="plain"), **few),
        "cbam": own(replace(base, fusion="cbam", block="plain"), **few),
    }
    boards = {
        "pcb_baseline": row(replace(plain, **board), **few, primary=True),
        "pcb_modules": own(replace(base, **board), **few),
        "pcb_yolo_dcf": own(replace(whole, **board), **few, primary=True),
        "pcb_teacher": own(teacher_settings(replace(whole, **board)), **once),
    }
    looks = {"needs": needs_of}
    robustness = {
        "baseline_robustness": row(
            RobustnessSettings(of=plain), partial(run_robustness, build=build_detector), **looks, **more
        ),
        "yolo_dcf_robustness": row(RobustnessSettings(of=whole), partial(run_robustness, build=build), **looks, **more),
    }
    return steel | boards | robustness


STUDY = Study(
    "YOLO-DCF (Sci Rep 2026): context-guided fusion, multi-scale block, dual distillation",
    {profile: rows(profile) for profile in SETTINGS},
    {
        "neu_det": "YOLO-DCF, its parts and its teacher on NEU-DET",
        "ablation": "the same places filled with other attention",
        "deep_pcb": "YOLO-DCF on DeepPCB",
        "robustness": "under motion blur and noise",
    },
    (*baselines.METRICS, ("map50_blur", "kept_blur", "map50_noise", "kept_noise")),
)
