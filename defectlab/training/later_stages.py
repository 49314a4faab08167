"""The later stages of `training.stages`: which windows of a frame are looked at, and which boxes are pits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, pad
from torchvision.ops import box_iou

from defectlab.data.stages import PitData, PitSplit, crops, holding, padded, places, recut, window_labels
from defectlab.metrics.costs import flops, parameters
from defectlab.metrics.detection import Boxes, pack, unpack
from defectlab.metrics.per_image import recall_statistic
from defectlab.metrics.stages import at_false_boxes, best_scores, keeping
from defectlab.networks.stages import CropClassifier, RegionNet
from defectlab.networks.yolo.model import build_detector
from defectlab.precision import autocast, full_float32, precision_of, sent
from defectlab.runs import Context, OfAnother, Result, load_weights
from defectlab.training.detection import frozen
from defectlab.training.loop import train
from defectlab.training.results import rounded
from defectlab.training.segmentation import flip, lightened
from defectlab.training.stages import FrameDetectorSettings, detector_costs, finished, joined, judged, look, windows_of

NEAR = 0.3  # a box that overlaps no pit by this IoU is wrong
WRONG, RANDOM = 10, 20  # of a training frame, to learn "none" from: the surest wrong boxes, and random places; at most
LEAST = 32.0  # px: side of the smallest crop
GAIN = 0.3  # brightness of a training image: 1 ± GAIN
SHIFT, ZOOM = 0.05, 0.2  # a training crop is moved by ± SHIFT of its side, which is 1 ± ZOOM times as long
MARGIN = 1 + ZOOM + 2 * SHIFT + 0.02  # so much larger are the images that training crops are cut from
SOFT = 4.0  # a crop's score is sigmoid(logit / SOFT): so sure ones still differ when kept in 16 bits


class LaterStage(OfAnother):
    @property
    def split(self) -> str:
        return self.of.split


@dataclass(frozen=True)
class GatedSettings(LaterStage):
    """Two stages: windows are chosen, then the detector of another row looks at them. All is ours."""

    model: ClassVar[str] = "gated_detector"
    version: ClassVar[int] = 1

    of: FrameDetectorSettings  # with windows
    kept: float = 98.0  # per cent of the pits of dev that the region stage keeps
    epochs: int = 60
    batch: int = 8  # frames
    learning_rate: float = 0.002
    precision: str = "bf16"  # of the training, where the device is fast at it


@dataclass(frozen=True)
class ClassifiedSettings(LaterStage):
    """Three stages: the boxes of a two-stage row are classified, and those that are no pits left out. The others keep
    the detector's score: what is found if the classifier's replaces it or both are multiplied, is told beside it. All
    is ours."""

    model: ClassVar[str] = "classified_boxes"
    version: ClassVar[int] = 1

    of: GatedSettings
    kept: float = 98.0  # per cent of the pits of dev, by crops of their own boxes, that the class stage keeps
    crop: int = 64  # px a side
    context: float = 2.0  # side of a crop by the longer side of its box
    draws: int = 1024  # crops an epoch, every second one a pit
    epochs: int = 40
    batch: int = 32
    learning_rate: float = 0.002
    precision: str = "bf16"


def needs_of_stages(settings: Any, seed: int) -> list[tuple[Any, int]]:
    """For `Row.needs`: the rows whose networks a later stage looks through, all of the same seed."""
    return [(settings.of, seed), *needs_of_stages(settings.of, seed)] if hasattr(settings, "of") else []


# --- Two stages ------------------------------------------------------------------------------------------------------


def run_gated(settings: GatedSettings, seed: int, data: PitData, context: Context) -> Result:
    """One row and seed: the region network is trained here, the detector is that of the row `of`."""
    window, precision = settings.of.size, precision_of(settings, context.device)
    record = context.require(settings.of, seed)
    detector = frozen(record, build_detector(settings.of, len(data.class_names)), context.device)
    frames = padded(data.train.images, window)
    windows = places(frames, window)
    columns = int((windows[:, 1] == 0).sum())
    labels = sent(window_labels(data.train, windows).unflatten(1, (-1, columns)), frames.device)  # (N, rows, columns)
    torch.manual_seed(seed)
    region = RegionNet(window).to(context.device, memory_format=torch.channels_last)
    images = region.reduce(frames)

    def draw(indices: Tensor, generator: torch.Generator, epoch: int) -> tuple[Tensor, Tensor]:
        across, down = sent(torch.rand(2, len(indices), generator=generator) < 0.5, images.device)
        own, wanted = (flip(x[indices], across, down) for x in (images, labels))
        return lightened(own, generator, GAIN), wanted.flatten(1)

    step = partial(learning_step, region, precision)
    trained = train(region, draw, step, len(images), settings, seed, context)
    gate = region_stage(region, data, window, settings.kept)
    looked = {part: look(detector, getattr(data, part), window) for part in ("dev", "test")}
    result = judged({part: joined(looked[part], gate.kept[part]) for part in looked}, data, region)
    arrays, truth = result.predictions, data.test.ground_truth()
    last = at_false_boxes(unpack(arrays)[0], truth)
    alone = best_scores(joined(looked["test"]), truth).astype(np.float16)  # as the record has scores
    arrays |= gate.arrays | {"pit_part": alone > last}
    result.curve, result.precision, result.costs = trained.curve, precision, trained.costs
    result.dev |= {"region_threshold": gate.threshold}
    result.notes = {"of": record.key, "of_sha256": record.model_sha256}
    return finished(result, data.test, gated_costs(detector, region, images, window, gate.seen), gate.seen)


def learning_step(network: nn.Module, precision: str, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The `step` of `train` for both stages."""
    images, wanted = batch
    with autocast(images.device, precision):
        logits = network(images)
    return {"loss": binary_loss(logits, wanted)}


def binary_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross-entropy of logits with `wanted`, both of one shape: 0 or 1, -1 where it does not count."""
    used = wanted >= 0
    each = binary_cross_entropy_with_logits(logits.float(), wanted.clamp(min=0), reduction="none")
    return (each * used).sum() / used.sum().clamp(min=1)


@dataclass(frozen=True)
class Gate:
    threshold: float  # logit, from dev
    kept: dict[str, Tensor]  # of "dev" and "test": (N, P) bool, the windows that are looked at
    seen: float  # windows of a test image, on average
    arrays: dict[str, np.ndarray]


@torch.no_grad()
def region_stage(region: nn.Module, data: PitData, window: int, share: float) -> Gate:
    """Which windows are kept: by the highest threshold that keeps `share` per cent of the pits of dev. A pit is kept
    where one of the windows that show it best is kept.

    arrays: pit_region (n,) bool; window_places (P, 4), window_kept (N, P) bool and window_logits (N, P) float16 of the
    test images.
    """
    logits, best, windows = {}, {}, windows_of(data.test, window)
    for part in ("dev", "test"):
        split = getattr(data, part)
        with full_float32():
            reduced = region.reduce(padded(split.images, window))
            found = [region(chunk).float() for chunk in reduced.split(32)]
        logits[part] = torch.cat(found).cpu()  # (N, P)
        scored = zip(split.boxes, logits[part], strict=True)
        best[part] = torch.cat([row.masked_fill(~holding(own, windows), -torch.inf).amax(1) for own, row in scored])
    threshold = keeping(best["dev"].numpy(), share)
    kept = {part: values >= threshold for part, values in logits.items()}
    arrays = {
        "pit_region": (best["test"] >= threshold).numpy(),
        "window_places": windows.numpy().astype(np.int16),
        "window_kept": kept["test"].numpy(),
        "window_logits": logits["test"].numpy().astype(np.float16),
    }
    return Gate(threshold, kept, float(kept["test"].sum(1).float().mean()), arrays)


def gated_costs(
    detector: nn.Module, region: nn.Module, images: Tensor, window: int, seen: float, boxes: float = 0.0,
    classifier: nn.Module | None = None, crop: int = 1,
) -> dict[str, float]:  # fmt: skip
    """`detector_costs`, with the parameters and operations of the other stages; `boxes`: classified of an image."""
    found = detector_costs(detector, window, seen)
    more = [(region, images[:1], 1.0)]
    if classifier is not None:
        more.append((classifier, torch.zeros(1, 3, crop, crop, dtype=torch.uint8, device=images.device), boxes))
    found["gflops_image"] = round(found["gflops_image"] + sum(flops(n.eval(), x) * t / 1e9 for n, x, t in more), 3)
    found["parameters_m"] = round(found["parameters_m"] + sum(parameters(network) for network, _, _ in more) / 1e6, 4)
    return found


# --- Three stages ----------------------------------------------------------------------------------------------------


def run_classified(settings: ClassifiedSettings, seed: int, data: PitData, context: Context) -> Result:
    """One row and seed: the classifier is trained here, the other two stages are those of the row `of`."""
    gated, window, precision = settings.of, settings.of.of.size, precision_of(settings, context.device)
    records = [context.require(of, seed) for of in (gated, gated.of)]
    region = RegionNet(window).to(context.device).eval()
    load_weights(records[0], region)
    detector = frozen(records[1], build_detector(gated.of, len(data.class_names)), context.device)
    crop = partial(crops, size=settings.crop, context=settings.context, least=LEAST)
    wide = partial(crops, size=round(settings.crop * MARGIN), context=settings.context * MARGIN, least=LEAST * MARGIN)
    kinds = examples_to_learn(detector, data.train, window)
    others, pits = (all_crops(wide, data.train.images, kind) for kind in kinds)
    torch.manual_seed(seed)
    classifier = CropClassifier().to(context.device, memory_format=torch.channels_last)

    def draw(indices: Tensor, generator: torch.Generator, epoch: int) -> tuple[Tensor, Tensor]:
        count, device = len(indices), pits.device
        half = count // 2
        numbers = ((pits, half), (others, count - half))
        drawn = [kind[sent(torch.randint(len(kind), (n,), generator=generator), device)] for kind, n in numbers]
        squares = sent(drawn_squares(count, pits.shape[-1], generator), device)
        across, down = sent(torch.rand(2, count, generator=generator) < 0.5, device)
        cuts = flip(recut(torch.cat(drawn), squares, settings.crop), across, down)
        return lightened(cuts, generator, GAIN), (torch.arange(count, device=device) < half).float()

    step = partial(learning_step, classifier, precision)
    trained = train(classifier, draw, step, settings.draws, settings, seed, context)

    gate = region_stage(region, data, window, gated.kept)
    looked = {part: look(detector, getattr(data, part), window) for part in ("dev", "test")}
    of_pits = {part: pit_scores(classifier, getattr(data, part), crop) for part in looked}
    threshold = keeping(of_pits["dev"], settings.kept)
    passed = {part: joined(looked[part], gate.kept[part]) for part in looked}
    seen = {part: class_scores(classifier, getattr(data, part), boxes, crop) for part, boxes in passed.items()}
    result = judged({part: chosen(passed[part], seen[part], threshold) for part in passed}, data, classifier)
    arrays, truth = result.predictions, data.test.ground_truth()
    last = at_false_boxes(unpack(arrays)[0], truth)
    alone = best_scores(joined(looked["test"]), truth).astype(np.float16)  # as the record has scores
    arrays |= gate.arrays | {"pit_part": alone > last, "pit_class": of_pits["test"] >= threshold}
    for name, both in (("multiplied", torch.mul), ("replaced", lambda before, after: after)):
        other = [one | {"scores": both(one["scores"], s)} for one, s in zip(passed["test"], seen["test"], strict=True)]
        recall = recall_statistic(pack(other, truth, data.test.names, data.class_names))(None)
        result.metrics |= rounded({f"recall_{name}": recall})
    boxes = sum(map(len, seen["test"])) / len(data.test)
    result.metrics["boxes_seen"] = round(boxes, 4)
    result.curve, result.precision, result.costs = trained.curve, precision, trained.costs
    result.dev |= {"region_threshold": gate.threshold, "class_threshold": threshold}
    for name, record in zip(("of", "detector"), records, strict=True):
        result.notes |= {name: record.key, f"{name}_sha256": record.model_sha256}
    frames = region.reduce(padded(data.test.images[:1], window))
    costs = gated_costs(detector, region, frames, window, gate.seen, boxes, classifier, settings.crop)
    return finished(result, data.test, costs, gate.seen)


@torch.no_grad()
def class_scores(classifier: nn.Module, split: PitSplit, boxes: Boxes, crop: Callable[..., Tensor]) -> list[Tensor]:
    """(n,) on the CPU for the boxes of each frame: sigmoid(logit / `SOFT`) of their crops."""
    result, device = [], split.images.device
    for index, one in enumerate(boxes):
        scores = one["boxes"].new_zeros(0)
        if len(one["boxes"]):
            frames = torch.full((len(one["boxes"]),), index, device=device)
            with full_float32():
                scores = (classifier(crop(split.images, frames, one["boxes"].to(device))).float() / SOFT).sigmoid()
        result.append(scores.cpu())
    return result


def pit_scores(classifier: nn.Module, split: PitSplit, crop: Callable[..., Tensor]) -> np.ndarray:
    """`class_scores` of the pits' own boxes, image after image."""
    return torch.cat(class_scores(classifier, split, split.ground_truth(), crop)).numpy()


def chosen(boxes: Boxes, scores: list[Tensor], threshold: float) -> Boxes:
    """The boxes of each frame whose own one of `scores` is at least the threshold."""
    kept = zip(boxes, (own >= threshold for own in scores), strict=True)
    return [{name: values[own] for name, values in one.items()} for one, own in kept]


def examples_to_learn(detector: nn.Module, split: PitSplit, window: int) -> tuple[Tensor, Tensor]:
    """What is no pit, and pits, of training frames, each (n, 5) float32 on the CPU: frame, x1, y1, x2, y2.

    No pits are the surest boxes of the detector that overlap no pit by an IoU of `NEAR` or more, and places as large as
    pits are, which touch none; where these lie is drawn once, for all seeds of a run.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = split.images.shape[-2:]
    all_boxes = torch.cat(split.boxes)
    pits, others = [], []
    for frame, (one, own) in enumerate(zip(joined(look(detector, split, window)), split.boxes, strict=True)):
        wrong = one["boxes"][(box_iou(one["boxes"], own) < NEAR).all(1)][:WRONG]
        sides = all_boxes[torch.randint(len(all_boxes), (RANDOM,), generator=generator)]
        sides = (sides[:, 2:] - sides[:, :2]).minimum(torch.tensor([width, height]))
        corner = torch.rand(RANDOM, 2, generator=generator) * (torch.tensor([width, height]) - sides)
        drawn = torch.cat([corner, corner + sides], 1)
        drawn = drawn[(box_iou(drawn, own) == 0).all(1)]
        for kind, boxes in ((pits, own), (others, torch.cat([wrong, drawn]))):
            kind.append(pad(boxes, (1, 0), value=float(frame)))
    return torch.cat(others), torch.cat(pits)


def all_crops(crop: Callable[..., Tensor], images: Tensor, chosen: Tensor, batch: int = 64) -> Tensor:
    """The crops of boxes (n, 5), frame and corners, as `examples_to_learn` has them."""
    parts = chosen.to(images.device).split(batch)
    return torch.cat([crop(images, part[:, 0].long(), part[:, 1:]) for part in parts])


def drawn_squares(count: int, side: int, generator: torch.Generator) -> Tensor:
    """(count, 4) squares in images of `side` px that are `MARGIN` times as wide as a crop: moved, larger or smaller."""
    signed = 2 * torch.rand(count, 3, generator=generator) - 1
    crop = side / MARGIN
    middle, half = side / 2 + SHIFT * crop * signed[:, :2], crop * (1 + ZOOM * signed[:, 2:]) / 2
    return torch.cat([middle - half, middle + half], 1)
