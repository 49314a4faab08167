"""Training a detector on device-resident data: augmentation, optimiser and schedule of its recipe."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from defectlab.data.augment import Augmentation, Batch, augment
from defectlab.data.detection import DetectionSplit
from defectlab.networks.yolo.model import Detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.precision import autocast, precision_of
from defectlab.runs import Context
from defectlab.training.loop import MovingAverage, Trained, train

# an augmented batch, its images channels-last -> named scalars, of which "loss" is minimised
Loss = Callable[[Batch], dict[str, Tensor]]


def augmentation_of(settings: DetectorSettings) -> Augmentation:
    shared = {name: getattr(settings, name) for name in ("mosaic", "degrees", "translate", "flip_up_down")}
    changes = {} if settings.colours else {"hue": 0.0, "saturation": 0.0}
    return Augmentation(**shared, scale=settings.zoom, **changes)


def make_optimizer(parts: nn.Module, settings: DetectorSettings) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW; weight decay on the weights of convolutions and linear layers alone."""
    weights = [p for p in parts.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, settings.learning_rate, settings.momentum, nesterov=True, fused=True)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, settings.learning_rate, (settings.momentum, 0.999), fused=True)
    raise ValueError(f"unknown optimizer {settings.optimizer!r}: use sgd or adamw")


def learning_rate(step: int, steps_per_epoch: int, settings: DetectorSettings) -> float:
    """Rate of a step: linear warm-up from 0, then cosine or linear down to `final_rate` of the first."""
    progress = min(step / max(1, settings.epochs * steps_per_epoch), 1.0)
    if settings.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    elif settings.schedule == "linear":
        left = 1 - progress
    else:
        raise ValueError(f"unknown schedule {settings.schedule!r}: use cosine or linear")
    warm = min(1.0, (step + 1) / max(1.0, settings.warm_up * steps_per_epoch))
    return settings.learning_rate * warm * (settings.final_rate + (1 - settings.final_rate) * left)


def compile_of(settings: DetectorSettings, device: torch.device) -> str:
    """What the settings say, on a GPU; "" elsewhere: on a CPU compiling takes minutes and does not pay."""
    return settings.compile if device.type == "cuda" else ""


def compile_parts(network: nn.Module, how: str) -> None:
    """Have torch compile backbone, neck and heads of each detector in `network`, at their first call: "inductor" fuses
    operations, "graphs" launches each part's kernels at once, as a CUDA graph, too. Weights and their names stay; what
    is computed differs in rounding. ValueError for another `how`."""
    modes = {"inductor": "default", "graphs": "reduce-overhead"}
    if how not in modes:
        raise ValueError(f"unknown compile {how!r}: use {', '.join(modes)} or nothing")
    for detector in [m for m in network.modules() if isinstance(m, Detector)]:
        for part in detector.children():
            part.compile(mode=modes[how], dynamic=False)  # an epoch's last batch, which is smaller, has its own code


def train_detector(
    detector: nn.Module,
    loss: Loss,
    split: DetectionSplit,
    settings: DetectorSettings,
    seed: int,
    context: Context,
    extra: nn.Module | None = None,
    probe: Callable[[nn.Module], dict[str, float]] | None = None,
) -> tuple[nn.Module, Trained]:
    """Train `detector` through `loss`, which runs it. -> (its moving average, curve and speed).

    On a GPU its parts are compiled as the settings say; the moving average is not.

    Args:
        extra: further weights that the loss trains and that are not saved (adapters of a distillation).
        probe: asked for scalars of the moving average, as in `train`, which has the errors, too.
    """
    average = MovingAverage(detector, settings.average, settings.average_ramp)
    parts = nn.ModuleList([detector, *([extra] if extra is not None else [])])
    whole = augmentation_of(settings)
    closed = replace(whole, mosaic=0.0)
    device = split.images.device
    if compiled := compile_of(settings, device):
        compile_parts(detector, compiled)
    boxes, labels = split.boxes.cpu(), split.labels.cpu()  # so that no step waits for the device

    def draw(indices: Tensor, generator: torch.Generator, epoch: int) -> Batch:
        recipe = closed if epoch >= settings.epochs - settings.close_mosaic else whole
        batch = augment(split.images, boxes, labels, indices, recipe, generator)
        return replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))

    def step(batch: Batch) -> dict[str, Tensor]:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(device, precision_of(settings, device)):
            return loss(batch)

    optimizer = make_optimizer(parts, settings)
    rate = partial(learning_rate, settings=settings)
    options = {"stream": 50_000 if settings.separate_streams else 0, "indices_on": torch.device("cpu")}
    options |= {"clip": settings.clip, "average": average, "probe": probe and (lambda: probe(average.model))}
    trained = train(parts, draw, step, len(split.images), settings, seed, context, optimizer, rate, **options)
    return average.model, trained
