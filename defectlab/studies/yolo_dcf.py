"""TODO studies.yolo_dcf."""

from dataclasses import replace
from defectlab.data.boxes import DetectionData
from defectlab.networks.yolo.model import build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.papers.yolo_dcf import Settings
from defectlab.papers.yolo_dcf import build
from defectlab.runs import Result
from defectlab.runs import Session
from defectlab.studies import detector as baselines
from defectlab.training.detection import frozen
from defectlab.training.detection import train_and_evaluate
from defectlab.training.robustness import RobustnessSettings
from defectlab.training.robustness import run_robustness
from defectlab.training.yolo_dcf import make_loss
from defectlab.training.yolo_dcf import teacher_settings
from functools import partial


TITLE = "YOLO-DCF (Sci Rep 2026): context-guided fusion, foldable block, dual distillation"


def run_row(settings, seed: int, data: DetectionData, device: str, session: Session) -> Result:
    """One row and seed. Plain detectors are computed under the same key as in notebook 02; a distilled student has
    its teacher trained first, if that has not been run here."""
    if isinstance(settings, RobustnessSettings):
        make = build if isinstance(settings.of, Settings) else build_detector
        return run_robustness(settings, seed, data, device, session, make)
    if not isinstance(settings, Settings):
        return baselines.run_row(settings, seed, data, device, session)
    if not settings.teacher_scale:
        return train_and_evaluate(settings, seed, data, device, session, build)
    own = teacher_settings(settings)
    record = session.need(own, settings.teacher_seed)
    teacher = frozen(record, build(own, data), device)
    result = train_and_evaluate(settings, seed, data, device, session, build, partial(make_loss, teacher=teacher))
    result.notes = {"teacher": record.key, "teacher_sha256": record.model_sha256}
    return result


# --- Settings of the three profiles, rows of the tables --------------------------------------------------------------

DISTILLED = {"relation": 10.0, "channel": 1.0}  # ours: each term starts near a fifth of the detector's loss
PCB = {"smoke": {}, "quick": {"size": 256, "epochs": 20}, "paper": {}}
SETTINGS = {
    "smoke": Settings(dataset="synthetic_steel", **baselines.SMOKE),
    "quick": Settings(**baselines.QUICK),
    "paper": Settings(**baselines.PAPER),
}


def rows(profile: str) -> dict[str, DetectorSettings | RobustnessSettings]:
    """Every row of notebooks 10 to 13 at one profile; "yolo_dcf" is the whole method."""
    plain, base = baselines.SETTINGS[profile], SETTINGS[profile]
    stronger = {"smoke": "t", "quick": "s", "paper": "s"}[profile]
    whole = replace(base, teacher_scale=stronger, **DISTILLED)
    board = {"dataset": baselines.on("deep_pcb", profile), **PCB[profile]}
    steel = {
        "baseline": plain,
        "fusion": replace(base, block="plain"),
        "block": replace(base, fusion="concat"),
        "modules": base,
        "relation": replace(whole, channel=0.0),
        "channel": replace(whole, relation=0.0),
        "yolo_dcf": whole,
        "teacher": teacher_settings(whole),
        # the field survey's advice, at the same four places
        "se": replace(base, fusion="se", block="plain"),
        "cbam": replace(base, fusion="cbam", block="plain"),
    }
    pcb = {
        "pcb_baseline": replace(plain, **board),
        "pcb_modules": replace(base, **board),
        "pcb_yolo_dcf": replace(whole, **board),
        "pcb_teacher": teacher_settings(replace(whole, **board)),
    }
    robustness = {f"{name}_robustness": RobustnessSettings(of=steel[name]) for name in ("baseline", "yolo_dcf")}
    return steel | pcb | robustness


ROWS = {profile: rows(profile) for profile in SETTINGS}
PRIMARY = ("baseline", "yolo_dcf", "pcb_baseline", "pcb_yolo_dcf")
METRICS = (*baselines.METRICS, ("map50_blur", "kept_blur", "map50_noise", "kept_noise"))
TABLES = {
    "neu_det": "YOLO-DCF, its parts and its teacher on NEU-DET",
    "ablation": "the same places filled with other attention",
    "deep_pcb": "YOLO-DCF on DeepPCB",
    "robustness": "under motion blur and noise",
}
load, fingerprints = baselines.load, baselines.fingerprints


def planned_seeds(row: str, profile: str) -> int:
    """How many seeds a row gets: the primary claims compare "yolo_dcf" with "baseline"."""
    if row in ("baseline", "yolo_dcf", "baseline_robustness", "yolo_dcf_robustness"):
        return {"smoke": 1, "quick": 3, "paper": 5}[profile]
    if row in ("teacher", "pcb_teacher"):
        return 1
    return {"smoke": 1, "quick": 1, "paper": 3}[profile]
