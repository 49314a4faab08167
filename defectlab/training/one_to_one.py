"""Detectors whose boxes are not suppressed: how they are trained, what is counted of them, and their other head."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from defectlab.data.detection import DetectionData, DetectionSplit
from defectlab.metrics.detection import Boxes
from defectlab.metrics.per_image import SURE, duplicates
from defectlab.networks.blocks import pick
from defectlab.networks.yolo.decode import CANDIDATES
from defectlab.networks.yolo.model import Detector, build_detector
from defectlab.networks.yolo.one_to_one import OneToOneLoss, OneToOneSettings, TwoHeads, build
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.runs import Context, OfAnother, Result
from defectlab.training.detection import (
    deployed_costs,
    evaluate_found,
    fresh,
    frozen,
    predict,
    probe_on,
    train_and_evaluate,
)
from defectlab.training.results import rounded

NOTHING = 1.0  # no two boxes have a larger IoU: nothing is suppressed
PLAIN, BOTH = DetectorSettings(), OneToOneSettings()
Find = Callable[[nn.Module, DetectionSplit], Boxes]
unsuppressed: Find = partial(predict, iou=NOTHING)


@dataclass(frozen=True)
class OtherEndSettings(OfAnother):
    """The trained network of another row, its boxes chosen in another way; nothing is trained."""

    model: ClassVar[str] = "other_end"
    version: ClassVar[int] = 1

    of: Any = BOTH  # the row whose network it is
    head: str = "many"  # or "one": of two heads
    suppressed: bool = True


def evaluated(detector: nn.Module, data: DetectionData, find: Find) -> Result:
    """`evaluate_found`, how often an object of the test images is found more than once (`duplicates`), and how many
    boxes an image has before any is suppressed."""
    found = {part: find(detector, getattr(data, part)) for part in ("dev", "test")}
    result = evaluate_found(found, data, detector)
    result.metrics |= rounded(duplicates(found["test"], data.test.ground_truth()))
    scores = [one["scores"] for one in predict(detector, data.test, iou=NOTHING, most=CANDIDATES)]
    counts = {"candidates": sum(int((s >= SURE).sum()) for s in scores), "candidates_all": sum(map(len, scores))}
    result.metrics |= rounded({name: count / len(scores) for name, count in counts.items()})
    return result


def run_one_to_one(settings: OneToOneSettings, seed: int, data: DetectionData, context: Context) -> Result:
    """One row and seed, evaluated without suppression."""
    torch.manual_seed(seed)
    detector = fresh(build, settings, data).to(context.device, memory_format=torch.channels_last)
    criterion = OneToOneLoss(settings, detector.class_count)

    def loss(batch):
        return criterion(detector(batch.images), batch.boxes, batch.labels)

    options = {"probe": probe_on(data.dev, data.class_names, unsuppressed)}
    options |= {"evaluation": partial(evaluated, find=unsuppressed)}
    return train_and_evaluate(detector, loss, settings, seed, data, context, **options)


def run_other_end(settings: OtherEndSettings, seed: int, data: DetectionData, context: Context) -> Result:
    """The network of another row and seed once more, with the other head or the other way to choose boxes."""
    record = context.require(settings.of, seed)
    make = build if isinstance(settings.of, OneToOneSettings) else build_detector
    detector: Detector = frozen(record, fresh(make, settings.of, data), context.device)
    many = pick({"many": True, "one": False}, settings.head, "head")
    if many and isinstance(detector, TwoHeads):
        detector = detector.many().to(memory_format=torch.channels_last)
    result = evaluated(detector, data, predict if settings.suppressed else unsuppressed)
    result.costs = deployed_costs(detector, settings.size)
    result.model = {}  # its row has it
    result.notes = {"of": record.key, "of_sha256": record.model_sha256}
    return result
