"""D3N's hybrid detector and its student, trained and evaluated (sections III-C and III-D)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from defectlab.data.augment import Batch
from defectlab.data.detection import DetectionData
from defectlab.data.instances import InstanceData, move_instances
from defectlab.files import DataError
from defectlab.metrics.costs import flops, parameters
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.losses import AnchorBasedLoss, detection_loss
from defectlab.networks.yolo.masks import InstanceMaps, add_masks, build_instance_detector
from defectlab.networks.yolo.model import Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.papers.d3n.hybrid import HybridDetector, HybridSettings, InstanceSettings, StudentSettings, build_hybrid
from defectlab.papers.d3n.resvae import build_compressor, feature_shapes
from defectlab.papers.d3n.transfer import PowerTransfer
from defectlab.runs import Context, Result
from defectlab.training import detection
from defectlab.training.d3n_features import Prepared, prepare
from defectlab.training.detection import COST_SIZE, Probe, evaluate_detector, fresh, probe_on, train_and_evaluate
from defectlab.training.instances import evaluate_instances
from defectlab.training.recipe import Loss


class Task(NamedTuple):
    """What a set asks of a detector: boxes alone, or boxes and masks (Table IV)."""

    build: Callable[[DetectorSettings, DetectionData], Detector]
    raw: Callable[[Any], list[Tensor]]  # the detector's output -> its raw maps of boxes
    whole: Callable[..., dict[str, Tensor]]  # (terms of boxes, loss, output, batch) -> all terms
    evaluate: Callable[..., Result]  # (model, data, features of "dev" and "test")


def task_of(data: DetectionData) -> Task:
    """By the kind of the set."""
    if not isinstance(data, InstanceData):
        return Task(partial(fresh, build_detector), lambda output: output, lambda terms, *_: terms, evaluate_detector)

    def whole(terms: dict[str, Tensor], criterion: AnchorBasedLoss, output: InstanceMaps, batch: Batch) -> dict:
        maps = move_instances(data.train, batch)
        return add_masks(terms, criterion, output, batch.boxes, batch.labels, maps)

    # masks are learnt from the ground truth alone (ours: equations 6 and 7 name boxes, objectness and classes)
    return Task(partial(fresh, build_instance_detector), lambda output: output.raw, whole, evaluate_instances)


def dev_probe(data: DetectionData, features: Sequence[Tensor] = ()) -> Probe:
    """mAP of boxes on dev, for the curve; nothing for sets with masks, whose evaluation takes long."""
    if isinstance(data, InstanceData):
        return lambda average: {}
    return probe_on(data.dev, data.class_names, partial(detection.predict, features=features))


def check_recipe(settings: DetectorSettings) -> None:
    """ValueError where the recipe mixes images, whose features could not follow."""
    if settings.mosaic:
        raise ValueError(f"mosaic {settings.mosaic}: a row that reads features of whole images needs it at 0")


def with_latents(hybrid: HybridDetector, latents: list[Tensor]) -> Callable[[Batch], Any]:
    """The hybrid on an augmented batch: it is given the latents of the batch's images, and how these were moved."""

    def on_batch(batch: Batch) -> Any:
        index = batch.sources[:, 0]
        return hybrid(batch.images, *(level[index] for level in latents), matrices=batch.matrices[:, 0])

    return on_batch


def start(task: Task, settings: DetectorSettings, seed: int, data: DetectionData, context: Context) -> Detector:
    torch.manual_seed(seed)
    return task.build(settings, data).to(context.device, memory_format=torch.channels_last)


def own_loss(task: Task, detector: Detector, settings: DetectorSettings, forward: Callable[[Batch], Any]) -> Loss:
    """The detector's loss, and that of its masks, of what `forward` makes of a batch."""
    criterion = detection_loss(detector, settings.size)

    def loss(batch: Batch) -> dict[str, Tensor]:
        output = forward(batch)
        terms = criterion(task.raw(output), batch.boxes, batch.labels)
        return task.whole(terms, criterion, output, batch)

    return loss


def run_hybrid(settings: HybridSettings, seed: int, data: DetectionData, context: Context) -> Result:
    """One row and seed of Tables I to III.

    The curve holds the shares of Fig. 11 ("weight_det", ...) beside dev's mAP. Costs are those of all that a test
    image needs, the diffusion model included.
    """
    check_recipe(settings)
    small = context.load(settings.compression)  # the same set at the diffusion model's size
    prepared = prepare(settings.compression, small, context)
    torch.manual_seed(seed)
    task = task_of(data)
    hybrid = build_hybrid(settings, task.build(settings, data), prepared.compressor)
    hybrid.to(context.device, memory_format=torch.channels_last)
    loss = own_loss(task, hybrid.detector, settings, with_latents(hybrid, prepared.latents))
    dev = dev_probe(data, prepared.unseen["dev"])

    def probe(average: HybridDetector) -> dict[str, float]:
        return dev(average) | {f"weight_{k}": v for k, v in average.fusion.mean_weights().items()}

    def evaluation(average: HybridDetector, data: DetectionData) -> Result:
        return task.evaluate(average, data, prepared.unseen)

    def costs(average: HybridDetector, size: int) -> dict[str, float]:
        return whole_costs(average, prepared, small)

    result = train_and_evaluate(
        hybrid, loss, settings, seed, data, context, probe=probe, evaluation=evaluation, costs=costs
    )
    result.notes = prepared.notes
    return result


def whole_costs(hybrid: HybridDetector, prepared: Prepared, small: DetectionData) -> dict[str, float]:
    """Parameters (millions) and GFLOPs of all that one test image needs: the diffusion model at each timestep, the
    compressor there and back, and the hybrid at 640 px, the size at which detectors are counted."""
    latents = [level[:1].float() for level in prepared.latents]
    features = prepared.compressor.decode(latents)
    image = torch.zeros(1, 3, COST_SIZE, COST_SIZE, device=latents[0].device)
    extraction = flops(prepared.extract, small.train.images[:1]) + flops(prepared.compressor.encode, features)
    return {
        "parameters_m": round((parameters(hybrid) + parameters(prepared.extract.unet)) / 1e6, 4),
        "gflops": round((extraction + flops(fused(hybrid), image, *latents)) / 1e9, 3),
    }


def load_hybrid(record: Any, settings: HybridSettings, data: DetectionData, device: str) -> HybridDetector:
    """The hybrid of a finished run, frozen; its weights hold the compressor's, too."""
    compressor = build_compressor(settings.compression, feature_shapes(settings.compression))
    detector = task_of(data).build(settings, data)
    return detection.frozen(record, build_hybrid(settings, detector, compressor), device)


def run_student(settings: StudentSettings, seed: int, data: DetectionData, context: Context) -> Result:
    """One row and seed of Table VI: the plain detector, taught by its hybrid (equations 6 and 7)."""
    check_recipe(settings)
    record = context.require(settings.teacher, seed if settings.teacher_seed is None else settings.teacher_seed)
    prepared = prepare(settings.teacher.compression, context.load(settings.teacher.compression), context, parts=())
    if record.notes["compressor_sha256"] != prepared.notes["compressor_sha256"]:
        raise DataError(f"{record.path} was trained with another compressor than this machine's now: delete it")
    teacher = load_hybrid(record, settings.teacher, data, context.device)
    task = task_of(data)
    student = start(task, settings, seed, data, context)
    criterion = detection_loss(student, settings.size)
    reading = {name: getattr(settings, name) for name in ("distance", "temperature", "box")}
    transfer = PowerTransfer(criterion, settings.transfer, **reading)
    taught = with_latents(teacher, prepared.latents)

    def loss(batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            target = task.raw(taught(batch))
        output = student(batch.images)
        terms = transfer(task.raw(output), target, batch.boxes, batch.labels)
        return task.whole(terms, criterion, output, batch)

    result = train_and_evaluate(
        student, loss, settings, seed, data, context, probe=dev_probe(data), evaluation=task.evaluate
    )
    result.notes = {"teacher": record.key, "teacher_sha256": record.model_sha256} | prepared.notes
    return result


def run_with_masks(settings: InstanceSettings, seed: int, data: InstanceData, context: Context) -> Result:
    """The baseline of Table IV: the plain detector with masks."""
    task = task_of(data)
    detector = start(task, settings, seed, data, context)
    loss = own_loss(task, detector, settings, lambda batch: detector(batch.images))
    return train_and_evaluate(
        detector, loss, settings, seed, data, context, probe=dev_probe(data), evaluation=task.evaluate
    )
