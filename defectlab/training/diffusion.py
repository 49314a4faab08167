"""Denoising diffusion trained (Ho et al. 2020, arXiv 2006.11239); error, samples and features of its record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from defectlab.data.detection import DetectionData
from defectlab.metrics.costs import parameters
from defectlab.networks import diffusion
from defectlab.networks.diffusion import DiffusionSettings, as_inputs, build_unet, check_size, noise_schedule
from defectlab.precision import autocast, precision_of, sent
from defectlab.runs import Context, Record, Result
from defectlab.training.detection import frozen
from defectlab.training.loop import MovingAverage, Trained, adam, rate_per_epoch, train
from defectlab.training.results import rounded
from defectlab.training.segmentation import flip

if TYPE_CHECKING:  # diffusers takes seconds to import: where it is needed, not for every table that names a row
    from diffusers import UNet2DModel

# of a finished network: timesteps and images of a split on which the error is measured (100 images give a stable mean;
# the whole set would take a CPU longer than other rows train), and samples and examples in its record
ERROR_TIMESTEPS, ERROR_IMAGES, SAMPLES, EXAMPLES = 20, 120, 16, 6


def random_flips(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each of (B, C, H, W) flipped upside down or left to right or both or not, with equal probability."""
    down, across = sent(torch.rand(2, len(images), generator=generator) < 0.5, images.device)
    return flip(images, across, down)


def train_ddpm(
    images: Tensor,
    settings: DiffusionSettings,
    seed: int,
    context: Context,
    labels: Tensor | None = None,
    classes: int | None = None,
) -> tuple[UNet2DModel, Trained]:
    """Train on uint8 images (N, C, size, size), on their device. -> (moving average of the U-Net, curve and speed).

    labels (N,) int64 below `classes`: the network is told each image's class.

    Timesteps, noise and flips of a step are drawn on the CPU from seed and epoch alone: the same on every device, and
    in a training that was interrupted. Raises ValueError for images of another size, and as `train`.
    """
    check_size(images, settings.size)
    device, precision = images.device, precision_of(settings, images.device)
    alpha_hat = noise_schedule(settings.steps).to(device)
    torch.manual_seed(seed)
    unet = build_unet(settings, images.shape[1], classes).to(device, memory_format=torch.channels_last)
    average = MovingAverage(unet, settings.average, settings.average_ramp, counted=1)

    def draw(indices: Tensor, generator: torch.Generator, epoch: int) -> tuple[list[Tensor], Tensor | None]:
        clean = as_inputs(images[indices])
        if settings.flips:
            clean = random_flips(clean, generator)
        timesteps = torch.randint(settings.steps, (len(indices),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        return [clean, sent(timesteps, device), sent(noise, device)], None if labels is None else labels[indices]

    def step(batch: tuple[list[Tensor], Tensor | None]) -> dict[str, Tensor]:
        with autocast(device, precision):
            return diffusion.noise_loss(unet, *batch[0], alpha_hat, batch[1])

    optimizer = adam(unet, settings.learning_rate)
    rate = rate_per_epoch(settings.learning_rate, "cosine", settings.epochs, settings.final_rate)
    trained = train(unet, draw, step, len(images), settings, seed, context, optimizer, rate, average=average)
    return average.model, trained


@torch.no_grad()
def error_per_timestep(
    unet: UNet2DModel, images: Tensor, timesteps: Sequence[int], seed: int, batch: int = 64
) -> Tensor:
    """Mean squared error of the predicted noise at each timestep, (len(timesteps),) float64 on the CPU.

    1 is as bad as predicting nothing. Each of the uint8 images (N, C, S, S) has one noise map at all timesteps, drawn
    from the seed; the network computes in the caller's autocast. Raises ValueError for images of another size.
    """
    check_size(images, unet.config.sample_size)
    alpha_hat = noise_schedule(unet.config.num_train_timesteps).to(images.device)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros(len(timesteps), dtype=torch.float64)
    for some, drawn in zip(images.split(batch), noise.split(batch), strict=True):
        clean, drawn = as_inputs(some), drawn.to(images.device)
        for index, timestep in enumerate(timesteps):
            at = torch.full((len(clean),), int(timestep), device=images.device)
            total[index] += len(clean) * diffusion.noise_loss(unet, clean, at, drawn, alpha_hat)["loss"].item()
    return total / len(images)


def middles(steps: int, count: int) -> list[int]:
    """The timesteps in the middles of `count` equal parts of 0 .. steps - 1: their mean is that of all timesteps."""
    return [(2 * part + 1) * steps // (2 * count) for part in range(count)]


def spread(images: Tensor, count: int) -> Tensor:
    """At most `count` of the images, evenly spaced: a set is sorted by name, which is by class in the steel sets."""
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().to(images.device)]


def run_ddpm(settings: DiffusionSettings, seed: int, data: DetectionData, context: Context) -> Result:
    """Train on the training images, measure on 120 of each split; no label is looked at.

    -> metrics and dev {"noise_error": per cent of the noise's power that is mispredicted, mean over 20 timesteps};
    predictions "timesteps" (20,), "errors" (20,) on test, "errors_train" on training images, "samples" uint8
    (16, S, S), with colours (16, S, S, 3), and `examples` of six test images. Raises ValueError for images of
    another size, and as `train`.
    """
    unet, trained = train_ddpm(data.train.images, settings, seed, context)
    precision, timesteps = precision_of(settings, context.device), middles(settings.steps, ERROR_TIMESTEPS)
    with autocast(torch.device(context.device), precision):
        errors = {
            part: error_per_timestep(unet, spread(getattr(data, part).images, ERROR_IMAGES), timesteps, seed)
            for part in ("train", "dev", "test")
        }
        samples = diffusion.sample_ddim(unet, SAMPLES, seed, device=context.device)  # (16, C, S, S)
        kept = examples(unet, spread(data.test.images, EXAMPLES))
    return Result(
        metrics=rounded({"noise_error": 100 * errors["test"].mean().item()}),
        per_class={},
        dev=rounded({"noise_error": 100 * errors["dev"].mean().item()}),
        curve=trained.curve,
        predictions={
            "timesteps": np.array(timesteps),
            "errors": errors["test"].float().numpy(),
            "errors_train": errors["train"].float().numpy(),
            "samples": channels_last(samples).cpu().numpy(),
            **kept,
        },
        model=unet.state_dict(),
        costs={"parameters_m": round(parameters(unet) / 1e6, 4)} | trained.costs,
        precision=precision,
    )


def load_ddpm(record: Record, settings: DiffusionSettings, colours: int, device: str | torch.device) -> UNet2DModel:
    """The averaged U-Net of a finished run, frozen. ValueError where its weights are missing or do not fit."""
    return frozen(record, build_unet(settings, colours), device)


@torch.no_grad()
def examples(unet: UNet2DModel, images: Tensor, channels: int = 3) -> dict[str, np.ndarray]:
    """What a record keeps of a few uint8 images (B, C, S, S), all uint8: case_images and case_told (B, S, S) or with
    colours (B, S, S, 3), the image and the predicted x_0 at the last of `TIMESTEPS`; case_features_k (B, channels, h,
    w), some channels of level k, darkest to brightest over the images.
    """
    alpha_hat, last = noise_schedule(unet.config.num_train_timesteps).to(images.device), diffusion.TIMESTEPS[-1]
    at = torch.full((len(images),), last, device=images.device)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    noisy = diffusion.q_sample(as_inputs(images), at, noise, alpha_hat)
    left = alpha_hat[last].float()
    predicted_x0 = (noisy - (1 - left).sqrt() * unet(noisy, at).sample.float()) / left.sqrt()  # of eq. 4
    found = {
        "case_images": channels_last(images),
        "case_told": channels_last(((predicted_x0 + 1) * 127.5).round().clamp(0, 255)),
    }
    for level, maps in enumerate(diffusion.decoder_features(unet, images, alpha_hat=alpha_hat)):
        chosen = maps[:, torch.linspace(0, maps.shape[1] - 1, channels).round().long()]  # (B, channels, h, w)
        low, high = chosen.amin((0, 2, 3), keepdim=True), chosen.amax((0, 2, 3), keepdim=True)
        found[f"case_features_{level}"] = (255 * (chosen - low) / (high - low).clamp(min=1e-9)).round()
    return {name: values.to(torch.uint8).cpu().numpy() for name, values in found.items()}


def channels_last(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W), with colours (B, H, W, 3)."""
    return images[:, 0] if images.shape[1] == 1 else images.movedim(1, -1)
