"""The hybrid detector of D3N (section III-C, Fig. 4) and its student (section III-D, Fig. 7).

Yu, "D3N: Bring the Power of Diffusion Model to Defect Detection", arXiv 2408.13845. The hybrid reads a picture and its
latents: the frozen compressor maps them back to features, a noise filter and the dynamic cross-fusion join them with
the three maps of the backbone, and the detector goes on as it was. The student is the plain detector.

Features belong to the plain picture, so a mosaic, which mixes four, would part features and pixels. Hybrid, student and
their baseline share a recipe of flips and scale, whose matrix moves the features, too (ours: the paper is silent).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from defectlab.costs import flops, parameters
from defectlab.data.augment import Batch, warp
from defectlab.data.detection import DetectionData
from defectlab.data.instances import InstanceData, move_instances
from defectlab.data.store import DataError
from defectlab.detector.blocks import folded
from defectlab.detector.detect import (
    COST_SIZE,
    build_detector,
    deployed_costs,
    detection_loss,
    evaluate_detector,
    frozen,
    predict,
    probe_on,
)
from defectlab.detector.instances import (
    InstanceMaps,
    add_masks,
    build_instance_detector,
    evaluate_instances,
)
from defectlab.detector.losses import AnchorBasedLoss
from defectlab.detector.model import Detector
from defectlab.detector.training import DetectorSettings, train_detector
from defectlab.papers.d3n.compression import Compressor, build_compressor
from defectlab.papers.d3n.fusion import CrossModelFusion
from defectlab.papers.d3n.preparation import Prepared, feature_shapes, prepare
from defectlab.papers.d3n.transfer import PowerTransfer
from defectlab.runs import Result
from defectlab.train import Session, precision_of


@dataclass(frozen=True)
class HybridSettings(DetectorSettings):
    """The detector's settings and what section III-C adds. Sources as comments."""

    model: ClassVar[str] = "d3n_hybrid"
    version: ClassVar[int] = DetectorSettings.version  # plus one for each change of ours to results

    compression: Any = None  # CompressionSettings, which name the diffusion model
    fuse: str = "dynamic"  # Table II: "concat", "sum", "weighted_sum"
    noise_filter: bool = True  # Table III
    dual: bool = True  # Table I: self-attention in both branches
    weighted: bool = True  # Table I: learned weights of the branches
    residual: bool = True  # Table I: the detector's features once more
    norm: bool = True  # Table I: features of the diffusion model normalised before cross-attention
    printed_scale: bool = False  # equation 5 as printed, against as usually meant
    positional: str = "none"  # section IV-B.2: encodings worsen


@dataclass(frozen=True)
class InstanceSettings(DetectorSettings):
    """The detector with masks, on a set that has them."""

    model: ClassVar[str] = "instance_detector"
    version: ClassVar[int] = DetectorSettings.version


@dataclass(frozen=True)
class StudentSettings(DetectorSettings):
    """The detector's settings and what section III-D adds."""

    model: ClassVar[str] = "d3n_student"
    version: ClassVar[int] = DetectorSettings.version

    teacher: Any = None  # HybridSettings
    teacher_seed: int | None = None  # ours: None, the student's own, so that its spread is the teacher's, too
    transfer: float = 1.0  # ours: lambda of equation 7 is not stated
    distance: str = "l2"  # section IV-A; "bce": equation 7 with the detector's own losses
    temperature: float = 20.0  # section IV-A
    box: str = "ciou"  # equation 7: the detector's own; "l2": of coordinates relative to the picture


SWITCHES = ("fuse", "noise_filter", "dual", "weighted", "residual", "norm", "printed_scale", "positional")


class HybridDetector(nn.Module):
    """Pictures (B, 3, S, S) in 0..1 and latents (B, C_k / 8, H_k, W_k), finest first -> the detector's raw maps.

    The latents are those of the plain pictures; `matrices` (B, 3, 3), where given, are what the augmentation did to
    them. The decoded features are moved, not the latents: a decoder's kernels have sides, and latents of zero, as would
    stand outside a picture, do not decode to anything neutral. Outside stands 0, no difference from the mean features.
    """

    def __init__(self, detector: Detector, compressor: Compressor, fusion: CrossModelFusion):
        super().__init__()
        self.detector, self.fusion, self.compressor = detector, fusion, compressor
        self.family, self.class_count = detector.family, detector.class_count

    @property
    def anchors(self) -> Tensor:
        return self.detector.anchors

    def forward(self, images: Tensor, *latents: Tensor, matrices: Tensor | None = None) -> list[Tensor]:
        maps = self.detector.backbone(images)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            features = self.compressor.decode(latents)  # feature mapping, by fixed parameters (Fig. 5)
            if matrices is not None:
                features = [warp(level, matrices, images.shape[-1]) for level in features]
        return self.detector.head(self.detector.neck(tuple(self.fusion(maps, features))))


def build_hybrid(settings: HybridSettings, data: DetectionData, compressor: Compressor) -> HybridDetector:
    """A fresh hybrid around a trained compressor; with masks where the set has them."""
    detector = task_of(data).build(settings, data)
    chosen = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name in SWITCHES}
    channels = [shape[0] for shape in feature_shapes(settings.compression)]
    fusion = CrossModelFusion(detector.widths, channels, **chosen)
    return HybridDetector(detector, compressor, fusion)


class Task(NamedTuple):
    """What a set asks of a detector: boxes alone, or boxes and masks (Table IV)."""

    build: Callable[[DetectorSettings, DetectionData], Detector]
    raw: Callable[[Any], list[Tensor]]  # the detector's output -> its raw maps of boxes
    whole: Callable[..., dict[str, Tensor]]  # (terms of boxes, loss, output, batch) -> all terms
    evaluate: Callable[..., Result]  # (model, data, features of "dev" and "test")


def task_of(data: DetectionData) -> Task:
    """By the kind of the set."""
    if not isinstance(data, InstanceData):
        return Task(build_detector, lambda output: output, lambda terms, *_: terms, evaluate_detector)

    def whole(terms: dict[str, Tensor], criterion: AnchorBasedLoss, output: InstanceMaps, batch: Batch) -> dict:
        maps = move_instances(data.train, batch)
        return add_masks(terms, criterion, output, batch.boxes, batch.labels, maps)

    # masks are learnt from the truth alone (ours: equations 6 and 7 name boxes, objectness and classes)
    return Task(build_instance_detector, lambda output: output.raw, whole, evaluate_instances)


def dev_probe(data: DetectionData, features: Sequence[Tensor] = ()) -> Callable[[Any], dict[str, float]]:
    """mAP of boxes on dev, for the curve; nothing for sets with masks, whose evaluation takes long."""
    if isinstance(data, InstanceData):
        return lambda average: {}
    return probe_on(data.dev, data.class_names, partial(predict, features=features))


def check_recipe(settings: DetectorSettings) -> None:
    """ValueError where the recipe mixes pictures, whose features could not follow."""
    if settings.mosaic or settings.mixup:
        raise ValueError(
            f"mosaic {settings.mosaic}, mixup {settings.mixup}: a row that reads features of whole pictures needs both "
            f"at 0"
        )


def with_latents(hybrid: HybridDetector, latents: list[Tensor]) -> Callable[[Batch], Any]:
    """The hybrid on an augmented batch: it is given the latents of the batch's pictures, and how these were moved."""

    def on_batch(batch: Batch) -> Any:
        index = batch.sources[:, 0]
        return hybrid(batch.images, *(level[index] for level in latents), matrices=batch.matrices[:, 0])

    return on_batch


def run_hybrid(
    settings: HybridSettings, seed: int, data: DetectionData, small: DetectionData, device: str, session: Session
) -> Result:
    """One row and seed of Tables I to III. `small`: the same set at the diffusion model's size.

    The curve holds the shares of Fig. 11 ("weight_det", ...) beside dev's mAP. Costs are those of all that a test
    picture needs, the diffusion model included.
    """
    check_recipe(settings)
    prepared = prepare(settings.compression, small, device, session)
    torch.manual_seed(seed)
    hybrid = build_hybrid(settings, data, prepared.compressor).to(device, memory_format=torch.channels_last)
    task, criterion = task_of(data), detection_loss(hybrid.detector, settings.size)
    forward = with_latents(hybrid, prepared.latents)

    def loss(batch: Batch) -> dict[str, Tensor]:
        output = forward(batch)
        terms = criterion(task.raw(output), batch.boxes, batch.labels)
        return task.whole(terms, criterion, output, batch)

    dev = dev_probe(data, prepared.unseen["dev"])

    def probe(average: HybridDetector) -> dict[str, float]:
        return dev(average) | {f"weight_{k}": v for k, v in average.fusion.mean_weights().items()}

    average, trained = train_detector(hybrid, loss, data.train, settings, seed, session, probe=probe)
    result = task.evaluate(average, data, prepared.unseen)
    result.curve, result.notes = trained.curve, prepared.notes
    result.precision = precision_of(settings, device)
    result.costs = whole_costs(average, prepared, small) | trained.costs
    return result


def whole_costs(hybrid: HybridDetector, prepared: Prepared, small: DetectionData) -> dict[str, float]:
    """Parameters (millions) and GFLOPs of all that one test picture needs: the diffusion model at each timestep, the
    compressor there and back, and the hybrid at 640 px, the size at which detectors are counted."""
    latents = [level[:1].float() for level in prepared.latents]
    features = prepared.compressor.decode(latents)
    picture = torch.zeros(1, 3, COST_SIZE, COST_SIZE, device=latents[0].device)
    extraction = flops(prepared.extract, small.train.images[:1]) + flops(prepared.compressor.encode, features)
    return {
        "parameters_m": round((parameters(hybrid) + parameters(prepared.extract.unet)) / 1e6, 4),
        "gflops": round((extraction + flops(folded(hybrid), picture, *latents)) / 1e9, 3),
    }


def load_hybrid(record: Any, settings: HybridSettings, data: DetectionData, device: str) -> HybridDetector:
    """The hybrid of a finished run, frozen; its weights hold the compressor's, too."""
    compressor = build_compressor(settings.compression, feature_shapes(settings.compression))
    return frozen(record, build_hybrid(settings, data, compressor), device)


def run_student(
    settings: StudentSettings, seed: int, data: DetectionData, small: DetectionData, device: str, session: Session
) -> Result:
    """One row and seed of Table VI: the plain detector, taught by its hybrid (equations 6 and 7)."""
    check_recipe(settings)
    record = session.need(settings.teacher, seed if settings.teacher_seed is None else settings.teacher_seed)
    prepared = prepare(settings.teacher.compression, small, device, session, parts=())
    if record.notes["compressor_sha256"] != prepared.notes["compressor_sha256"]:
        raise DataError(f"{record.path} was trained with another compressor than this machine's now: delete it")
    teacher = load_hybrid(record, settings.teacher, data, device)
    torch.manual_seed(seed)
    task = task_of(data)
    student = task.build(settings, data).to(device, memory_format=torch.channels_last)
    criterion = detection_loss(student, settings.size)
    transfer = PowerTransfer(criterion, settings.transfer, settings.distance, settings.temperature, settings.box)
    taught = with_latents(teacher, prepared.latents)

    def loss(batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            target = task.raw(taught(batch))
        output = student(batch.images)
        terms = transfer(task.raw(output), target, batch.boxes, batch.labels)
        return task.whole(terms, criterion, output, batch)

    result = train_deployed(task, student, loss, settings, seed, data, device, session)
    result.notes = {"teacher": record.key, "teacher_sha256": record.model_sha256} | prepared.notes
    return result


def run_with_masks(settings: InstanceSettings, seed: int, data: InstanceData, device: str, session: Session) -> Result:
    """The baseline of Table IV: the plain detector with masks."""
    torch.manual_seed(seed)
    task = task_of(data)
    detector = task.build(settings, data).to(device, memory_format=torch.channels_last)
    criterion = detection_loss(detector, settings.size)

    def loss(batch: Batch) -> dict[str, Tensor]:
        output = detector(batch.images)
        terms = criterion(task.raw(output), batch.boxes, batch.labels)
        return task.whole(terms, criterion, output, batch)

    return train_deployed(task, detector, loss, settings, seed, data, device, session)


def train_deployed(
    task: Task,
    detector: Detector,
    loss: Callable[[Batch], dict[str, Tensor]],
    settings: DetectorSettings,
    seed: int,
    data: DetectionData,
    device: str,
    session: Session,
) -> Result:
    """Train and evaluate a detector that reads pictures alone; its costs are those of the deployed network."""
    average, trained = train_detector(detector, loss, data.train, settings, seed, session, probe=dev_probe(data))
    result = task.evaluate(average, data)
    result.curve, result.precision = trained.curve, precision_of(settings, device)
    result.costs |= deployed_costs(average, settings.size, device)
    result.costs |= trained.costs
    return result
