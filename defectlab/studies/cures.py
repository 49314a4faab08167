"""The field's history I (notebook 55): other light, fluttering cloth, a second sensor, and what may help."""

from dataclasses import replace
from typing import Any

from defectlab.data.frames import frames_fingerprint, load_frames
from defectlab.networks.second_sensor import INPUTS, SensorSettings
from defectlab.studies import detector
from defectlab.studies import reverse_distillation as baselines
from defectlab.studies.study import FEW, ONCE, Needs, Row, Study, kept
from defectlab.training.flutter import CLOTH, FlutterSettings, run_flutter
from defectlab.training.light import BRIGHT, DARK, LightSettings, run_light
from defectlab.training.second_sensor import LateSettings, ThresholdSettings, run_late, run_sensor, run_threshold
from defectlab.training.template import DifferenceSettings, run_difference

EVERY = (1, 2, 3, 4, 5, 6)  # exposures
CHANGES = {"to_bright": (DARK, BRIGHT), "to_dark": (BRIGHT, DARK)}  # light to learn from, light of the test
LIGHT = {"smoke": LightSettings(of=baselines.PATCHCORE["smoke"]), "quick": LightSettings(), "paper": LightSettings()}
FLUTTER = {
    "smoke": FlutterSettings(of=replace(CLOTH, dataset="synthetic_fabric", **baselines.SMALL), side=96),
    "quick": FlutterSettings(),
    "paper": FlutterSettings(),
}
SENSOR = {
    "smoke": SensorSettings(dataset="synthetic_road", widths=(4, 8), draws=8, epochs=1),
    "quick": SensorSettings(),
    "paper": SensorSettings(widths=(32, 64, 128, 256), epochs=200),
}
BOARD = {
    "smoke": detector.SETTINGS["smoke"],
    # chosen on dev, see results/tried.md
    "quick": replace(detector.SETTINGS["quick"], size=320, epochs=20, batch=8, mosaic=0.0, close_mosaic=0),
    "paper": detector.SETTINGS["paper"],
}
SPLITS = {"": "session_2", "_other": "session_1"}  # of the second sensor: what its rows' names end with


def fingerprints(settings: Any) -> dict[str, str]:
    return baselines.fingerprints(settings.of)


load_road = kept(load_frames, "dataset", "split")


def road_fingerprints(settings: Any) -> dict[str, str]:
    return {"data": frames_fingerprint(settings.dataset, settings.split), "weights": "random"}


def light_rows(profile: str) -> dict[str, Row]:
    def own(primary: bool = False, **changes: Any) -> Row:
        settings = replace(LIGHT[profile], **changes)
        return Row(settings, run_light, baselines.load, fingerprints, FEW[profile], primary)

    found = {}
    for name, (learns, tested) in CHANGES.items():
        change = {"learns": learns, "tested": tested}
        found |= {
            f"{name}_same": own(True, learns=tested, tested=tested),
            f"{name}_none": own(True, **change),
            f"{name}_jitter": own(cure="jitter", **change),
            f"{name}_normalise": own(cure="normalise", **change),
            f"{name}_all": own(True, learns=EVERY, tested=tested),
        }
    return found


def flutter_rows(profile: str) -> dict[str, Row]:
    def own(**changes: Any) -> Row:
        settings = replace(FLUTTER[profile], **changes)
        return Row(settings, run_flutter, baselines.load, fingerprints, FEW[profile], True)

    return {
        "flat": own(fluttering=False),
        "flutter": own(),
        "flutter_augmented": own(augmented=True),
        "flat_augmented": own(augmented=True, fluttering=False),
    }


def needs_of_late(settings: LateSettings, seed: int) -> list[tuple[Any, int]]:
    return [(settings.colour, seed), (settings.depth, seed)]


def sensor_rows(profile: str) -> dict[str, Row]:
    found = {}
    for end, split in SPLITS.items():
        base = replace(SENSOR[profile], split=split)
        networks = {name: replace(base, inputs=name) for name in INPUTS}

        def own(settings: Any, run: Any, seeds: int = FEW[profile], primary: bool = end == "", **needs: Needs) -> Row:
            return Row(settings, run, load_road, road_fingerprints, seeds, primary, **needs)

        for inputs in ("grey", "depth"):
            settings = ThresholdSettings(base.dataset, split, inputs)
            found[f"threshold_{inputs}{end}"] = own(settings, run_threshold, ONCE[profile])
        found |= {f"net_{name}{end}": own(settings, run_sensor) for name, settings in networks.items()}
        found[f"net_late{end}"] = own(LateSettings(networks["rgb"], networks["depth"]), run_late, needs=needs_of_late)
    return found


def board_rows(profile: str) -> dict[str, Row]:
    few, alone = FEW[profile], replace(BOARD[profile], dataset=detector.on("deep_pcb", profile))
    pair = f"{alone.dataset}_pair"
    return {
        "board_difference": detector.row(DifferenceSettings(pair), run_difference, seeds=ONCE[profile], primary=True),
        "board_alone": detector.row(alone, seeds=few, primary=True),
        "board_template": detector.row(replace(alone, dataset=pair, colours=False), seeds=few, primary=True),
    }


def rows(profile: str) -> dict[str, Row]:
    return light_rows(profile) | flutter_rows(profile) | sensor_rows(profile) | board_rows(profile)


BOXES = ("map50", "map50_95", "located50")
SHIFTED = ("iou", "iou_no_depth", "iou_shift_4", "iou_shift_8", "iou_shift_16")
STUDY = Study(
    "Which cure works? Other light, fluttering cloth, a second sensor",
    {profile: rows(profile) for profile in LIGHT},
    {
        "tiles": "PatchCore on magnetic tiles under another light than in training, no tile on two sides",
        "cloth": "PatchCore on AITEX fabric, flat or fluttering (a synthetic change), no strip on two sides",
        "road": "potholes by colour, depth or both, trained on one drive and tested on the others",
        "boards": "circuit boards alone, beside their template, and by what differs from it alone",
    },
    (*baselines.METRICS, ("found", "false_alarms", "found_small"), SHIFTED, BOXES),
)
