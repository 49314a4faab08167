"""Pits found in one, two or three stages: region (which windows may hold a pit), part (its box), class (is it one).

After the staged inspection of overhead lines (a detector locates parts, a second one finds fasteners in them, a third
network classifies their crops; a paper of 2017, as a survey of 2026 tells it: "the miss rates stacked up"). Its data
are not at hand; all here is ours. What the stages are: a small network scores all windows of the reduced frame; a
detector looks at the windows that are left, at full resolution; a small network classifies crops of its boxes.

Region and class have thresholds that keep 98 % of the pits of dev. All rows rank boxes by the detector's score; its
threshold is set so that at most 0.1 false boxes an image are left (an oracle, as in `metrics.per_image`): rows are
compared at equal false alarms, and what a stage takes away in false boxes the detector may use to find more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.ops import nms

from defectlab.data.frames import position_of
from defectlab.data.stages import PitData, PitSplit, cut, padded, places, reduced, training_windows
from defectlab.metrics.costs import flops
from defectlab.metrics.detection import Boxes, best_f1_threshold, evaluate, pack, unpack
from defectlab.metrics.stages import at_false_boxes, best_scores, recalls
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.decode import decode, select
from defectlab.networks.yolo.losses import detection_loss
from defectlab.networks.yolo.model import build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.precision import full_float32, precision_of
from defectlab.runs import Context, Result
from defectlab.training.detection import deployed_costs, predict, probe_on, result_of
from defectlab.training.recipe import train_detector
from defectlab.training.results import rounded, shrunk

JOIN = 0.5  # of two boxes with a larger IoU the surer one stays; ours, for whole frames, too
EDGE = 4  # px: a box that comes as near to an edge inside the frame is left to the next window, which shows it whole
MOST = 50  # boxes of a window, at most
FRAME_MOST = 300  # and of a frame
EVERY = 4  # for the curve on dev each fourth of its windows is enough
WIDTH, CASES, CROPS, CROP_SIDE = 480, 8, 12, 128  # examples: px of a frame, how many; of pits that were missed


@dataclass(frozen=True)
class FrameDetectorSettings(DetectorSettings):
    """One stage: a detector of whole frames, each reduced to `size` px; or of all windows of a frame, `size` px at
    full resolution ("zoom")."""

    model: ClassVar[str] = "frame_detector"
    version: ClassVar[int] = 1

    dataset: str = "bsdata"
    split: str = "zones"
    windows: bool = False


# --- Looking through windows -----------------------------------------------------------------------------------------


@torch.inference_mode()
def look(detector: nn.Module, split: PitSplit, window: int, batch: int = 32) -> Boxes:
    """What a detector finds in every window: of each frame {"boxes" (n, 4) px of the frame, "scores", "labels",
    "windows" (n,) int64}, on the CPU. Boxes at an edge of a window inside the frame are left out."""
    images = padded(split.images, window)
    windows, model = places(images, window), fused(detector).to(memory_format=torch.channels_last)
    pairs = torch.cartesian_prod(torch.arange(len(split)), torch.arange(len(windows)))
    found: Boxes = []
    for chunk in pairs.split(batch):
        pixels = cut(images, chunk[:, 0], windows[chunk[:, 1], :2], window).float() / 255
        with full_float32():
            boxes, scores = decode(detector, model(pixels.contiguous(memory_format=torch.channels_last)))
        found += select(boxes, scores, window, iou=JOIN, most=MOST)
    height, width = split.images.shape[-2:]
    whole = torch.tensor([0, 0, width, height])
    inside = windows * torch.tensor([1, 1, -1, -1]) > whole * torch.tensor([1, 1, -1, -1])  # (P, 4): which edges are
    frames: Boxes = []
    for start in range(0, len(found), len(windows)):
        parts = []
        for number, one in enumerate(found[start : start + len(windows)]):
            near = torch.cat([one["boxes"][:, :2] < EDGE, one["boxes"][:, 2:] > window - EDGE], 1)  # (n, 4)
            moved = (one["boxes"] + windows[number, :2].repeat(2)).minimum(whole[2:].repeat(2))
            free = ~(near & inside[number]).any(1) & (moved[:, 2:] > moved[:, :2]).all(1)  # not in what was padded
            own = one | {"boxes": moved, "windows": torch.full_like(one["labels"], number)}
            parts.append({name: values[free] for name, values in own.items()})
        frames.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return frames


def joined(found: Boxes, kept: Tensor | None = None) -> Boxes:
    """Boxes of `look`, of the windows `kept` (N, P) bool alone, by default of all, suppressed over the frame."""
    result = []
    for index, one in enumerate(found):
        if kept is not None:
            of_kept = kept[index, one["windows"]]
            one = {name: values[of_kept] for name, values in one.items()}
        chosen = nms(one["boxes"], one["scores"], JOIN)[:FRAME_MOST]
        result.append({name: one[name][chosen] for name in ("boxes", "scores", "labels")})
    return result


# --- One stage -------------------------------------------------------------------------------------------------------


def run_frame_detector(settings: FrameDetectorSettings, seed: int, data: PitData, context: Context) -> Result:
    """One row and seed, on whole frames or on windows."""
    if settings.windows:
        learnt, watched = training_windows(data.train, settings.size), training_windows(data.dev, settings.size, EVERY)
    else:
        learnt, watched = reduced(data.train, settings.size), reduced(data.dev, settings.size)
    torch.manual_seed(seed)
    detector = build_detector(settings, len(data.class_names))
    detector = detector.to(context.device, memory_format=torch.channels_last)
    criterion = detection_loss(detector, settings.size)

    def loss(batch):
        return criterion(detector(batch.images), batch.boxes, batch.labels)

    probe = probe_on(watched, data.class_names)
    average, trained = train_detector(detector, loss, learnt, settings, seed, context, probe=probe)
    found = {}
    for part, split in (("dev", data.dev), ("test", data.test)):
        if settings.windows:
            found[part] = joined(look(average, split, settings.size))
        else:
            found[part] = predict(average, watched if part == "dev" else reduced(split, settings.size), iou=JOIN)
    result = judged(found, data, average)
    result.curve, result.precision = trained.curve, precision_of(settings, context.device)
    result.costs = trained.costs
    seen = len(windows_of(data.test, settings.size)) if settings.windows else 1
    return finished(result, data.test, detector_costs(average, settings.size, seen), seen)


def windows_of(split: PitSplit, window: int) -> Tensor:
    """`places` of the frames once they are padded."""
    return places(padded(split.images[:1], window), window)


def detector_costs(detector: nn.Module, size: int, windows: float) -> dict[str, float]:
    """Those of any detector, and "gflops_image": what an image needs of which so many windows are looked at."""
    example = torch.zeros(1, 3, size, size, device=next(detector.parameters()).device)
    each = flops(fused(detector), example.contiguous(memory_format=torch.channels_last)) / 1e9
    return deployed_costs(detector, size) | {"gflops_image": round(windows * each, 3)}


def judged(found: Mapping[str, Boxes], data: PitData, network: nn.Module) -> Result:
    """The result of the boxes found in "dev" and "test", without curve and costs; with each test pit's index of its
    image, side and whether it is found at 0.1 false boxes an image."""
    truth = {part: getattr(data, part).ground_truth() for part in ("dev", "test")}
    threshold = best_f1_threshold(found["dev"], truth["dev"])
    dev, test = (evaluate(found[part], truth[part], data.class_names, threshold) for part in ("dev", "test"))
    arrays = pack(found["test"], truth["test"], data.test.names, data.class_names)
    kept = unpack(arrays)[0]
    boxes = torch.cat(data.test.boxes)
    arrays |= {
        "pit_total": best_scores(kept, truth["test"]) > at_false_boxes(kept, truth["test"]),
        "pit_image": np.repeat(np.arange(len(data.test)), [len(own) for own in data.test.boxes]),
        "pit_side": (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt().numpy(),
    }
    return result_of(test, dev[0], threshold, arrays, network)


def finished(result: Result, test: PitSplit, costs: dict[str, float], windows: float) -> Result:
    """With its recalls, costs and examples."""
    result.metrics |= rounded(recalls(result.predictions) | {"windows_seen": windows})
    result.costs = costs | result.costs
    result.predictions |= examples(test, result.predictions)
    return result


def examples(test: PitSplit, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In grey, uint8: of each camera position the frame with most missed pits and the last frame, case_index (K,) and
    case_images (K, h, w); pits at full resolution that all stages together or one alone missed, crop_pit (J,), index in
    the arrays pit_*, and crop_images (J, side, side), each in the middle."""
    missed = np.bincount(arrays["pit_image"], ~arrays["pit_total"], len(test))
    chosen: list[int] = []
    positions = np.array([position_of(name) for name in test.names])
    for position in np.unique(positions):
        own = np.flatnonzero(positions == position)
        chosen += dict.fromkeys((int(own[missed[own].argmax()]), int(own[-1])))
    chosen = chosen[:CASES]
    grey = test.images[torch.tensor(chosen, device=test.images.device)].float().mean(1, keepdim=True)
    width = min(WIDTH, grey.shape[-1])
    small = shrunk(grey, (grey.shape[-2] * width // grey.shape[-1], width))

    found = [arrays[name] for name in ("pit_region", "pit_part", "pit_class", "pit_total") if name in arrays]
    lost = np.flatnonzero(~np.all(found, axis=0))
    lost = lost[np.linspace(0, len(lost) - 1, min(CROPS, len(lost))).round().astype(int)]
    half, cuts = CROP_SIDE // 2, [np.zeros((0, CROP_SIDE, CROP_SIDE), np.uint8)]
    boxes = torch.cat(test.boxes)
    for pit in lost.tolist():
        frame = test.images[arrays["pit_image"][pit], None].float().mean(1, keepdim=True)
        x, y = ((boxes[pit, :2] + boxes[pit, 2:]) / 2).long().tolist()
        around = pad(frame, (half,) * 4, mode="replicate")[..., y : y + CROP_SIDE, x : x + CROP_SIDE]
        cuts.append(shrunk(around, CROP_SIDE))
    return {"case_index": np.array(chosen), "case_images": small, "crop_pit": lost, "crop_images": np.concatenate(cuts)}
