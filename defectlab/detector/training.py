"""Training a detector on device-resident data: recipe, schedule, moving average of the weights, the loop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from defectlab.data.augment import Augmentation, Batch, augment
from defectlab.data.detection import DetectionSplit
from defectlab.train import (
    MovingAverage,
    OutOfTime,
    Session,
    Trained,
    autocast,
    check_finite,
    epoch_order,
    precision_of,
    resume,
    save_checkpoint,
)

# an augmented batch, its images channels-last -> named scalars, of which "loss" is minimised
Loss = Callable[[Batch], dict[str, Tensor]]


@dataclass(frozen=True)
class DetectorSettings:
    """A detector and its recipe. Defaults are frozen, since records are keyed by what differs from them."""

    model: ClassVar[str] = "detector"
    version: ClassVar[int] = 1

    dataset: str = "neu_det"
    family: str = "v8"  # "v8" anchor-free, "v5" anchor-based
    scale: str = "n"
    size: int = 640  # px a side; the field's habit
    epochs: int = 300  # ours: the papers that state it lie between 100 and 300
    batch: int = 64  # ours: small networks leave a GPU idle at 16
    optimizer: str = "sgd"  # "sgd" (Nesterov) or "adamw", which all three profiles use
    learning_rate: float = 0.01  # the field's habit with SGD and losses summed over 64 pictures; ours are means
    final_rate: float = 0.01  # of the first, at the end of the schedule
    schedule: str = "cosine"  # or "linear"
    momentum: float = 0.937  # the field's habit; Adam's first beta, too
    weight_decay: float = 0.0005  # the field's habit; not on norms and biases
    warm_up: float = 3.0  # epochs
    average: float = 0.9999  # EMA of the weights, what is evaluated
    average_ramp: float = 2000.0  # steps: the EMA starts short
    clip: float = 10.0  # largest norm of the gradient
    mosaic: float = 1.0  # probability
    mixup: float = 0.0  # probability
    zoom: float = 0.5  # scale factor 1 ± zoom
    translate: float = 0.1  # of the side
    degrees: float = 0.0
    flip_up_down: float = 0.0  # probability
    close_mosaic: int = 10  # last epochs without mosaic and mixup
    anchors: str = "coco"  # v5 only: "coco" or "kmeans" on the training boxes
    precision: str = "bf16"  # where the device is fast at it, else fp32

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(
            mosaic=self.mosaic,
            mixup=self.mixup,
            degrees=self.degrees,
            translate=self.translate,
            scale=self.zoom,
            flip_up_down=self.flip_up_down,
        )


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


def learning_rate(step: int, steps_an_epoch: int, settings: DetectorSettings) -> float:
    """Rate of a step: linear warm-up from 0, then cosine or linear down to `final_rate` of the first."""
    progress = min(step / max(1, settings.epochs * steps_an_epoch), 1.0)
    if settings.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    elif settings.schedule == "linear":
        left = 1 - progress
    else:
        raise ValueError(f"unknown schedule {settings.schedule!r}: use cosine or linear")
    warm = min(1.0, (step + 1) / max(1.0, settings.warm_up * steps_an_epoch))
    return settings.learning_rate * warm * (settings.final_rate + (1 - settings.final_rate) * left)


def train_detector(
    detector: nn.Module,
    loss: Loss,
    split: DetectionSplit,
    settings: DetectorSettings,
    seed: int,
    session: Session,
    extra: nn.Module | None = None,
    probe: Callable[[nn.Module], dict[str, float]] | None = None,
) -> tuple[nn.Module, Trained]:
    """Train `detector` through `loss`, which runs it. -> (its moving average, curve and speed).

    Args:
        extra: further weights that the loss trains and nobody keeps (adapters of a distillation).
        probe: asked about ten times during the training, and at its end, for scalars of the moving average; they enter
            the curve, beside "probe_epoch".

    Raises:
        OutOfTime, NonFiniteLoss (names epoch and batch), ValueError (fewer than two pictures, a foreign checkpoint).
    """
    count = len(split.images)
    if count < 2:
        raise ValueError(f"training needs at least 2 pictures, got {count}")
    average = MovingAverage(detector, settings.average, settings.average_ramp)
    trained = nn.ModuleList([detector, *([extra] if extra is not None else [])])
    optimizer = make_optimizer(trained, settings)
    everything = nn.ModuleList([trained, average.model])  # what a checkpoint holds
    done, earlier, curve = resume(session, everything, optimizer, settings.epochs)
    started, seen, probing, every = time.monotonic(), 0, 0.0, max(1, settings.epochs // 10)
    for epoch in range(done, settings.epochs):
        scalars = train_epoch(trained, detector, average, loss, split, settings, seed, epoch, optimizer)
        seen += count
        for name, value in scalars.items():
            curve.setdefault(name, []).append(round(value, 6))
        last = epoch + 1 == settings.epochs
        if probe and ((epoch + 1) % every == 0 or last):
            began = time.monotonic()
            for name, value in {"probe_epoch": epoch + 1, **probe(average.model)}.items():
                curve.setdefault(name, []).append(round(value, 4))
            probing += time.monotonic() - began
        seconds = time.monotonic() - started - probing
        shown = "  ".join(f"{name} {value:.3f}" for name, value in scalars.items())
        session.say(f"  epoch {epoch + 1}/{settings.epochs}  {shown}  {seen / seconds:.1f} images/s")
        if session.checkpoint and not last and (session.out_of_time() or session.due()):
            save_checkpoint(session.checkpoint, everything, optimizer, epoch + 1, earlier + seconds, curve)
        if session.out_of_time() and not last:
            raise OutOfTime(f"time budget used up after epoch {epoch + 1} of {settings.epochs}; run again to go on")
    seconds = time.monotonic() - started - probing
    return average.model, Trained(curve, earlier + seconds, seen / seconds if seen else 0.0)


def train_epoch(
    trained: nn.Module,
    detector: nn.Module,
    average: MovingAverage,
    loss: Loss,
    split: DetectionSplit,
    settings: DetectorSettings,
    seed: int,
    epoch: int,
    optimizer: torch.optim.Optimizer,
) -> dict[str, float]:
    """One pass over the pictures; order and augmentation depend on (seed, epoch) alone, so that a resumed training
    takes the same course. -> the means of the loss's scalars."""
    device, count = split.images.device, len(split.images)
    trained.train()
    weights = [p for p in trained.parameters() if p.requires_grad]
    recipe = settings.augmentation
    if epoch >= settings.epochs - settings.close_mosaic:
        recipe = replace(recipe, mosaic=0.0, mixup=0.0)
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    batches = epoch_order(count, settings.batch, seed, epoch, device)
    logged = []
    for index, indices in enumerate(batches):
        step = epoch * len(batches) + index
        batch = augment(split.images, split.boxes, split.labels, indices, recipe, generator)
        with autocast(device, precision_of(settings, device)):
            pictures = batch.images.contiguous(memory_format=torch.channels_last)
            scalars = loss(replace(batch, images=pictures))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), settings)
        optimizer.zero_grad(set_to_none=True)
        scalars["loss"].backward()
        nn.utils.clip_grad_norm_(weights, settings.clip)
        optimizer.step()
        average.update(detector, step)
        logged.append(torch.stack([value.detach().float() for value in scalars.values()]))
    table = torch.stack(logged).cpu()  # once an epoch
    check_finite(table[:, list(scalars).index("loss")], epoch, len(logged))
    return dict(zip(scalars, table.mean(0).tolist(), strict=True))
