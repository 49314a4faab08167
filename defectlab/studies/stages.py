"""The field's history II (notebook 51): stages whose misses may add up, boxes by five heads, masks and their labels."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from defectlab.data.marked import load_marked, marked_fingerprint
from defectlab.data.stages import load_pits, pits_fingerprint
from defectlab.networks.cascade import CascadeSettings
from defectlab.networks.torchvision_detectors import TorchvisionSettings
from defectlab.studies import detector
from defectlab.studies.cures import BOARD
from defectlab.studies.study import FEW, Row, Study, kept
from defectlab.training.cascade import run_cascade
from defectlab.training.later_stages import (
    ClassifiedSettings,
    GatedSettings,
    needs_of_stages,
    run_classified,
    run_gated,
)
from defectlab.training.stages import FrameDetectorSettings, run_frame_detector
from defectlab.training.torchvision_detectors import run_torchvision

# --- Stages: pits of ball screws -------------------------------------------------------------------------------------

_SHAPE = {"mosaic": 0.0, "close_mosaic": 0, "flip_up_down": 0.5}  # pits are small enough without mosaic
PITS = {  # of the row with the fewest pixels
    "smoke": FrameDetectorSettings(dataset="synthetic_screw", **detector.SMOKE),
    "quick": FrameDetectorSettings(**{**detector.QUICK, "size": 320, "epochs": 55, "batch": 8, **_SHAPE}),
    "paper": FrameDetectorSettings(**detector.PAPER, size=320, epochs=400, batch=16, **_SHAPE),  # not tried
}
# Epochs by time: in quick each of these rows took 8 to 12 minutes of one CPU thread.
LARGE = {"smoke": {}, "quick": {"size": 640, "epochs": 16, "batch": 4}, "paper": {"size": 640, "epochs": 200}}
ZOOM = {"smoke": {"size": 64}, "quick": {"size": 256, "epochs": 11}, "paper": {"size": 256, "epochs": 100}}
REGION = {"smoke": {"epochs": 2}, "quick": {}, "paper": {"epochs": 200}}
CLASS = {"smoke": {"epochs": 2, "draws": 64}, "quick": {}, "paper": {"epochs": 100}}


pits = kept(load_pits, "dataset", "split", sets=1)


def pit_row(settings: Any, run: Callable, **options: Any) -> Row:
    """A row on pits of ball screws."""
    return Row(
        settings,
        run,
        pits,
        lambda of: {"data": pits_fingerprint(of.dataset, of.split), "weights": "random"},
        needs=needs_of_stages,
        **options,
    )


def stage_rows(profile: str) -> dict[str, Row]:
    """One, two and three stages, and what looking closer gives alone."""
    base, few = PITS[profile], {"seeds": FEW[profile]}
    zoom = replace(base, windows=True, **ZOOM[profile])
    two = GatedSettings(zoom, **REGION[profile])
    return {
        "one_320": pit_row(base, run_frame_detector, **few),
        "one_640": pit_row(replace(base, **LARGE[profile]), run_frame_detector, primary=True, **few),
        "zoom": pit_row(zoom, run_frame_detector, primary=True, **few),
        "two": pit_row(two, run_gated, **few),
        "three": pit_row(ClassifiedSettings(two, **CLASS[profile]), run_classified, primary=True, **few),
    }


# --- Boxes: five heads on one backbone, and three means against small defects -----------------------------------------

# Seconds of training for an image by those of v8n, medians on one CPU thread, taken in turns in one process (v8n in
# bf16, the others in fp32, as they are trained): epochs are as many as fit into the time of v8n.
TIMES = {"ssd": 1.05, "faster_rcnn": 1.83, "fcos": 2.43, "retinanet": 2.45}
MEANS = {"kmeans": {"anchors": "kmeans"}, "stride_4": {"stride_4": True}, "hard": {"hard_examples": 32}}
BOARD_TIMES = {"rcnn": 1.5, "kmeans": 1.5, "hard": 2.2, "stride_4": 2.5, "tiny": 3.4}
RECIPE = (
    "dataset", "size", "batch", "optimizer", "learning_rate", "momentum", "weight_decay", "warm_up", "mosaic",
    "close_mosaic", "average_ramp", "flip_up_down",
)  # fmt: skip


def like(plain: Any, times: float, **changes: Any) -> TorchvisionSettings:
    """Another head on the backbone of a plain detector, with its recipe, in its time."""
    recipe = {name: getattr(plain, name) for name in RECIPE}
    epochs = max(1, round(plain.epochs / times))
    return TorchvisionSettings(**recipe, backbone=f"v8{plain.scale}", epochs=epochs, **changes)


def box_rows(profile: str) -> dict[str, Row]:
    few, steel = {"seeds": FEW[profile]}, detector.SETTINGS[profile]
    board = replace(BOARD[profile], dataset=detector.on("deep_pcb", profile))
    found = {"v8n": detector.row(steel, primary=True, **few)}
    for name, times in TIMES.items():
        primary = name == "faster_rcnn"
        found[name] = detector.row(like(steel, times, architecture=name), run_torchvision, primary=primary, **few)
    changes = {"rcnn": {}} | MEANS | {"tiny": {key: value for of in MEANS.values() for key, value in of.items()}}
    found["board_v8n"] = detector.row(board, **few)
    for name, means in changes.items():
        primary = name in ("rcnn", "tiny")
        settings = like(board, BOARD_TIMES[name], **means)
        found[f"board_{name}"] = detector.row(settings, run_torchvision, primary=primary, **few)
    return found


# --- Masks: two networks in a row, fewer labels, a split that leaks ---------------------------------------------------

SHARES = (5, 10, 20, 50)  # per cent of the labelled images
_TINY = {"size": 64, "widths": (4, 8, 8), "epochs": 1}
MASKS = {  # settings of the cascade
    "smoke": {
        "pits": CascadeSettings(dataset="synthetic_screw", **_TINY),
        "steel": CascadeSettings(dataset="synthetic_steel_masks", split="apart", **_TINY),
    },
    "quick": {  # chosen by the time that they take
        "pits": CascadeSettings(size=120, epochs=30),
        "steel": CascadeSettings(dataset="neu_seg", split="apart", size=128, epochs=10),
    },
    "paper": {  # not tried
        "pits": CascadeSettings(size=480, widths=(16, 32, 64, 128), epochs=100),
        "steel": CascadeSettings(dataset="neu_seg", split="apart", size=200, widths=(16, 32, 64, 128), epochs=50),
    },
}


marked = kept(load_marked, "dataset", "split", "size")


def mask_row(settings: CascadeSettings, **options: Any) -> Row:
    return Row(
        settings,
        run_cascade,
        marked,
        lambda of: {"data": marked_fingerprint(of.dataset, of.split), "weights": "random"},
        **options,
    )


def mask_rows(profile: str) -> dict[str, Row]:
    few, found = {"seeds": FEW[profile]}, {}
    for name, both in MASKS[profile].items():
        one = replace(both, network="single")
        found[f"{name}_cascade"] = mask_row(both, primary=True, **few)
        found[f"{name}_single"] = mask_row(one, primary=True, **few)
        for share in SHARES:
            least = 20 if profile == "smoke" else 0  # less would be a single synthetic image
            fewer = replace(one, share=max(share, least) / 100, equal_steps=True)
            found[f"{name}_share_{share}"] = mask_row(fewer, **few)
    seen = replace(MASKS[profile]["pits"], second_sees="mask_and_image")
    found["pits_cascade_image"] = mask_row(seen, **few)
    for split in ("official", "zones_mixed"):
        leaks = replace(MASKS[profile]["pits"], network="single", split=split if profile != "smoke" else "zones_mixed")
        found[f"pits_{split.removeprefix('zones_')}"] = mask_row(leaks, **few)
    return found


def rows(profile: str) -> dict[str, Row]:
    return stage_rows(profile) | box_rows(profile) | mask_rows(profile)


STUDY = Study(
    "Stages, boxes, masks: do misses multiply?",
    {profile: rows(profile) for profile in PITS},
    {
        "stages": "pits of ball screws in one, two and three stages",
        "heads": "one backbone, five heads, equal training time: NEU-DET",
        "tiny": "three means against small defects, equal training time: DeepPCB",
        "masks": "two encoder-decoders in a row against one of as many parameters",
        "labels": "IoU by the share of labelled images",
        "leak": "pits: what a leaking split adds",
    },
    (
        *detector.METRICS,
        ("recall_at_01",),
        ("recall_region", "recall_part", "recall_class"),
        ("recall_product", "beyond_product"),
        ("windows_seen", "gflops_image"),
        ("recall_small_third", "recall_middle_third", "recall_large_third"),
        ("iou", "iou_first", "dice"),
    ),
)
