"""Speed of detectors on a device: steps of training, and inference fused and not, at several picture sizes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from defectlab.data.augment import augment
from defectlab.data.detection import DetectionData, DetectionSplit
from defectlab.metrics.costs import inference_seconds, parameters, seconds_per_call
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.losses import detection_loss
from defectlab.networks.yolo.model import Detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.precision import precision_of
from defectlab.provenance import peak_memory_mb
from defectlab.runs import Context
from defectlab.training.detection import fresh
from defectlab.training.detector import augmentation_of, train_detector

CLASSES, BOXES = 6, 4  # as NEU-DET has them: classes, boxes a picture
Row = tuple[DetectorSettings, Callable[[DetectorSettings, DetectionData], Detector]]


@dataclass(frozen=True)
class Speed:
    """One detector at one picture size."""

    name: str
    size: int  # px a side
    parameters_m: float  # millions, not fused
    precision: str  # of training; inference is fp32
    train: float  # images/s of whole training steps
    batch_share: float  # 0..1: of such a step, what drawing and augmenting its batch takes
    single: float  # ms a picture at batch 1
    single_fused: float
    many: float  # images/s at batch `inference_batch`
    many_fused: float
    memory_mb: float  # highest so far: of this row on a GPU, of the whole process on a CPU


def random_split(count: int, size: int, device: str) -> DetectionSplit:
    """Grey noise with boxes: speed does not depend on what pictures show, but on how many boxes they have."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, size, size), generator=generator, dtype=torch.uint8)
    corners = torch.rand(count, BOXES, 2, generator=generator) * 0.6 * size
    extents = (0.1 + 0.3 * torch.rand(count, BOXES, 2, generator=generator)) * size
    labels = torch.randint(0, CLASSES, (count, BOXES), generator=generator)
    return DetectionSplit(
        images.to(device),
        torch.cat([corners, corners + extents], -1).to(device),  # (N, M, 4)
        labels.to(device),
        [f"{index}.png" for index in range(count)],
        torch.full((count, 2), size),
        torch.ones(count),
        torch.zeros(count, 2),
    )


def measure(
    name: str, row: Row, size: int, device: str, repeats: int = 3, batch: int = 16, inference_batch: int = 32
) -> Speed:
    """Speed of one detector. A training step is that of `train_detector`: augmentation with mosaic, forward, loss,
    backward, clipping, optimiser, moving average; over `repeats` epochs of two steps, after one to warm up. The other
    speeds are medians over `repeats`."""
    where = torch.device(device)
    settings = replace(row[0], size=size, batch=batch, precision=precision_of(row[0], where))
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    torch.manual_seed(0)
    split = random_split(2 * batch, size, device)  # two steps an epoch
    data = SimpleNamespace(class_names=tuple(f"class {index}" for index in range(CLASSES)), train=split)
    detector = fresh(row[1], settings, data).to(where, memory_format=torch.channels_last)
    criterion = detection_loss(detector, size)
    generator, indices = torch.Generator().manual_seed(0), torch.arange(batch, device=where)

    def loss(drawn):
        return criterion(detector(drawn.images), drawn.boxes, drawn.labels)

    def images_per_second(epochs: int) -> float:
        context = Context(device=device, log=lambda line: None)
        return train_detector(detector, loss, split, replace(settings, epochs=epochs), 0, context)[1].images_per_second

    def make_batch():
        augment(split.images, split.boxes, split.labels, indices, augmentation_of(settings), generator)

    images_per_second(1)  # to warm up
    step = batch / images_per_second(repeats)  # seconds
    making = seconds_per_call(make_batch, where, repeats, 1)
    times = {}
    model = detector.eval()
    for kind, network in (("plain", model), ("fused", fused(model).to(memory_format=torch.channels_last))):
        for count in (1, inference_batch):
            images = torch.rand(count, 3, size, size, device=where).contiguous(memory_format=torch.channels_last)
            times[kind, count] = inference_seconds(network, images, "fp32", repeats)
    return Speed(
        name,
        size,
        parameters(detector) / 1e6,
        settings.precision,
        batch / step,
        min(making / step, 1.0),  # each is measured on its own
        1000 * times["plain", 1],
        1000 * times["fused", 1],
        inference_batch / times["plain", inference_batch],
        inference_batch / times["fused", inference_batch],
        peak_memory_mb(where),
    )


def table(
    rows: Mapping[str, Row],
    sizes: Sequence[int],
    device: str,
    repeats: int = 3,
    batch: int = 16,
    inference_batch: int = 32,
) -> Iterator[str]:
    """The lines of the table, each as soon as it is measured. ValueError for a size that is not a multiple of 32."""
    wrong = [size for size in sizes if size < 32 or size % 32]
    if wrong or not sizes:
        raise ValueError(f"picture sizes must be multiples of 32, got {','.join(map(str, wrong)) or 'none'}")
    many = f"batch {inference_batch}"
    columns = "{:10} {:>4} {:>7}  {:>8} {:>7}  {:>8} {:>8}  {:>8} {:>8}  {:>8}"
    yield columns.format(
        "detector", "px", "weights", "training", "batches", "batch 1", "fused", many, "fused", "memory"
    )
    yield columns.format("", "", "M", "images/s", "% time", "ms", "ms", "images/s", "images/s", "MB")
    precision = ""
    for size in sizes:
        for name, row in rows.items():
            s = measure(name, row, size, device, repeats, batch, inference_batch)
            precision = s.precision
            yield (
                f"{s.name:10} {s.size:4} {s.parameters_m:7.2f}  {s.train:8.1f} {100 * s.batch_share:7.1f}  "
                f"{s.single:8.1f} {s.single_fused:8.1f}  {s.many:8.1f} {s.many_fused:8.1f}  {s.memory_mb:8.0f}"
            )
    yield (
        f"training: batch {batch}, {precision}, with augmentation and moving average; "
        "inference: fp32, without decoding and suppression; memory: peak "
        + ("of the row" if device.startswith("cuda") else "of the process so far")
    )
