"""Training and evaluation of segmentation networks: recipe, flips on the device, one evaluation of the last epoch."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from defectlab.data.masks import SegmentationData, SegmentationSplit, subset
from defectlab.metrics.costs import model_costs
from defectlab.metrics.segmentation import best_threshold, segmentation_metrics
from defectlab.networks.segmentation import SegmentationSettings, Segmenter, segmentation_loss
from defectlab.precision import autocast, full_float32, precision_of, sent
from defectlab.runs import Context, Result
from defectlab.training.loop import adam, rate_per_epoch, train
from defectlab.training.results import example_side, rounded, shrunk

EACH = 4  # examples of a kind


def flip(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Images or masks (B, ..., H, W), each mirrored left to right where `across` (B,), top to bottom where `down`."""
    shape = (-1, *[1] * (x.ndim - 1))
    x = torch.where(across.view(shape), x.flip(-1), x)
    return torch.where(down.view(shape), x.flip(-2), x)


def lightened(images: Tensor, generator: torch.Generator, most: float) -> Tensor:
    """uint8 images (B, C, H, W), each lighter or darker by up to the share `most`."""
    gain = sent(1 - most + 2 * most * torch.rand(len(images), 1, 1, 1, generator=generator), images.device)
    return (images.float() * gain).round().clamp(0, 255).to(torch.uint8)


def draw_flipped(split: SegmentationSplit, indices: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Images and masks at the indices, flipped at random in both directions (paper section 4.1).

    The decisions come from the CPU generator, so that every device sees the same images.
    """
    across, down = sent(torch.rand(2, len(indices), generator=generator) < 0.5, indices.device)
    return [flip(x[indices], across, down) for x in (split.images, split.masks)]


def steps_per_epoch(images: int, batch: int) -> int:
    """Optimiser steps that `train` takes per epoch: it drops a last batch of a single image."""
    full, rest = divmod(images, batch)
    return full + (rest > 1)


def epochs_of(settings: SegmentationSettings, images: int, kept: int) -> int:
    """Epochs on `kept` of all training images; with `equal_steps`, so many that the steps are as many as on all of them
    (to the nearest epoch)."""
    if not settings.equal_steps:
        return settings.epochs
    wanted = settings.epochs * steps_per_epoch(images, settings.batch)
    return round(wanted / max(1, steps_per_epoch(kept, settings.batch)))


@torch.inference_mode()
def segment(network: Callable[[Tensor], Tensor], images: Tensor, precision: str = "fp32", batch: int = 32) -> Tensor:
    """uint8 images (N, 3, S, S) -> foreground probabilities (N, S, S) float32, by a network in eval mode."""
    found = []
    for chunk in images.split(batch):
        with full_float32(), autocast(images.device, precision):
            logits = network(chunk)
        found.append(logits.float().sigmoid())
    return torch.cat(found)


def run_segmentation(
    settings: SegmentationSettings,
    seed: int,
    data: SegmentationData,
    context: Context,
    build: Callable[[SegmentationSettings], Segmenter],
) -> Result:
    """Train a network and evaluate its last epoch, once; the threshold comes from dev.

    Raises OutOfTime, NonFiniteLoss and ValueError of `train`, errors of `build`.
    """
    precision = precision_of(settings, context.device)
    torch.manual_seed(seed)
    network = build(settings).to(context.device, memory_format=torch.channels_last)
    split = subset(data.train, settings.share, seed)
    epochs = epochs_of(settings, len(data.train), len(split))

    def draw(indices: Tensor, generator: torch.Generator, epoch: int) -> tuple[int, list[Tensor]]:
        return int(torch.randint(2**31, (), generator=generator)), draw_flipped(split, indices, generator)

    def step(batch: tuple[int, list[Tensor]]) -> dict[str, Tensor]:
        dropout, (images, masks) = batch
        torch.manual_seed(dropout)  # `nn.Dropout` takes no generator: seeded per step, so that it can be resumed
        with autocast(images.device, precision):
            logits = network(images)
        return segmentation_loss(logits, masks)

    optimizer = adam(network, settings.learning_rate, settings.betas)
    rate = rate_per_epoch(settings.learning_rate, "cosine", epochs)
    trained = train(network, draw, step, len(split), replace(settings, epochs=epochs), seed, context, optimizer, rate)
    result = evaluate(network, data, precision)
    result.curve = trained.curve
    result.costs = model_costs(network, settings.size) | trained.costs
    result.notes = {"train_images": str(len(split)), "epochs": str(epochs)}
    return result


def evaluate(network: Segmenter, data: SegmentationData, precision: str) -> Result:
    """Metrics of test and dev at the threshold that is best on dev, arrays of the test images; no curve, no costs."""
    found = {part: segment(network, getattr(data, part).images, precision) for part in ("dev", "test")}
    threshold = best_threshold(found["dev"], data.dev.masks)
    measured = {}
    for part, probabilities in found.items():
        split = getattr(data, part)
        measured[part] = segmentation_metrics(probabilities, split.masks, split.types, data.type_names, threshold)
    test, predictions = measured["test"], record_arrays(data, measured["test"].images)
    predictions |= examples(data.test, found["test"], test.images)
    return Result(
        rounded(test.overall),
        {name: rounded(values) for name, values in test.per_class.items()},
        rounded(measured["dev"].overall) | {"threshold": threshold},
        {},
        predictions,
        network.state_dict(),
        {},
        precision,
    )


def record_arrays(data: SegmentationData, images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a record keeps of each test image: name, type, and what its metrics are made of, as image_<name>."""
    arrays = {
        "names": np.array(data.test.names),
        "types": data.test.types.cpu().numpy(),
        "type_names": np.array(data.type_names),
    }
    return arrays | {f"image_{name}": values for name, values in images.items()}


def examples(split: SegmentationSplit, probabilities: Tensor, images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A dozen small examples: of the images with foreground the four of the lowest and of the highest IoU, and of all
    others the four with most wrong pixels.

    -> case_index (K,), case_why (K,), case_images (K, h, w, 3), case_masks (K, h, w) 0 or 1, case_probabilities
    (K, h, w) 0..255, all uint8; h and w are `example_size`.
    """
    tp, wrong = images["tp"], images["fp"] + images["fn"]
    iou = tp / np.maximum(tp + wrong, 1)
    by_iou = [i for i in np.argsort(iou, kind="stable") if images["nonempty"][i]]
    worst, best = by_iou[:EACH], by_iou[EACH:][-EACH:]
    rest = [i for i in np.argsort(-wrong, kind="stable") if i not in {*worst, *best}][:EACH]
    why = ["lowest IoU"] * len(worst) + ["most wrong pixels of the others"] * len(rest) + ["highest IoU"] * len(best)
    chosen = torch.tensor([*worst, *rest, *best], dtype=torch.long)
    picked = chosen.to(split.images.device)
    images, masks = split.images[picked], split.masks[picked, None]
    size = example_size(images)
    return {
        "case_index": chosen.numpy(),
        "case_why": np.array(why),
        "case_images": shrunk(images, size),
        "case_masks": (shrunk(255 * masks, size) > 127).astype(np.uint8),
        "case_probabilities": shrunk(255 * probabilities[picked, None], size),
    }


def example_size(images: Tensor) -> tuple[int, int]:
    """Height and width of the examples that a record keeps of (K, C, H, W): of the images' shape, of the area that
    square ones get, never larger than the images."""
    height, width = images.shape[-2:]
    scale = min(example_side(images) / math.sqrt(height * width), 1)
    return round(height * scale), round(width * scale)
