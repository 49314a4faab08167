"""Training a detector on device-resident data: recipe, schedule, moving average of the weights, the loop."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from defectlab.data.augment import Augmentation, Batch, augment
from defectlab.data.boxes import DetectionSplit
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.precision import autocast, precision_of
from defectlab.runs import Context
from defectlab.training.loop import (
    Checkpoints,
    MovingAverage,
    Trained,
    check_finite,
    epoch_order,
    resume,
    save_checkpoint,
)

# an augmented batch, its images channels-last -> named scalars, of which "loss" is minimised
Loss = Callable[[Batch], dict[str, Tensor]]


def augmentation_of(settings: DetectorSettings) -> Augmentation:
    return Augmentation(
        mosaic=settings.mosaic,
        mixup=settings.mixup,
        degrees=settings.degrees,
        translate=settings.translate,
        scale=settings.zoom,
        flip_up_down=settings.flip_up_down,
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
    context: Context,
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
    done, earlier, curve = resume(context, everything, optimizer, settings.epochs)
    checkpoints = Checkpoints(context)
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
        context.log(f"  epoch {epoch + 1}/{settings.epochs}  {shown}  {seen / seconds:.1f} images/s")
        spent = earlier + seconds
        checkpoints.after(
            epoch + 1,
            settings.epochs,
            lambda path: save_checkpoint(path, everything, optimizer, epoch + 1, spent, curve),  # noqa: B023
        )
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
    recipe = augmentation_of(settings)
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
