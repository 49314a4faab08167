"""Denoising diffusion: the noise schedule, the network that predicts the noise, its training, samples, its error.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239. A picture x_0 loses its signal over
`steps` steps of

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                                       (their eq. 2)

so that, with alpha_hat_t the product of (1 - beta_s) over s up to t, any step is reached at once:

    x_t = sqrt(alpha_hat_t) x_0 + sqrt(1 - alpha_hat_t) noise,  noise ~ N(0, I)                    (their eq. 4)

A U-Net learns to tell the noise from x_t and t (their eq. 14), which gives the mean of the way back, q(x_{t-1} | x_t)
(their eqs. 3 and 11). Timesteps count from 0 here: alpha_hat[0] holds one factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from defectlab.costs import parameters
from defectlab.data.detection_tensors import DetectionData
from defectlab.runs import Record, Result, load_weights
from defectlab.train import MovingAverage, Session, Trained, autocast, precision_of, train

if TYPE_CHECKING:  # diffusers takes seconds to import: where it is needed, not for every table that names a row
    from diffusers import UNet2DModel

FIRST_BETA, LAST_BETA = 1e-4, 0.02  # Ho et al. section 4: linear in between
# of a finished network: the error at so many timesteps, on so many pictures of a split (a hundred settle it, and the
# whole set would take a CPU longer than other rows train), and so many drawn pictures in its record
ERROR_TIMESTEPS, ERROR_PICTURES, SAMPLES, CASES = 20, 120, 16, 6


@dataclass(frozen=True)
class DiffusionSettings:
    """A diffusion model and its recipe. Defaults are those of D3N (arXiv 2408.13845) where it states them."""

    model: ClassVar[str] = "ddpm"
    version: ClassVar[int] = 1

    dataset: str = "neu_det"
    size: int = 64  # px a side; D3N section IV-A
    channels: tuple[int, int, int] = (128, 256, 512)  # a level, finest first; ours: D3N has 512 channels to compress
    layers: int = 2  # residual blocks a level on the way down, one more on the way up; ours: Ho et al. appendix B
    attention: tuple[bool, bool, bool] = (False, False, True)  # a level; ours: at 16x16 alone, as Ho et al. appendix B
    steps: int = 1000  # D3N section IV-A
    learning_rate: float = 5e-6  # D3N section IV-A: Adam, a cosine from 5e-6 ...
    final_rate: float = 0.01  # ... to 5e-8, this part of the first
    batch: int = 2  # D3N section IV-A
    # ours: D3N is silent. Adam moves a weight by at most about the rate in a step, so too few steps at 5e-6 learn
    # nothing: 200 epochs of 1,296 pictures are 129,600 steps, whose rates sum to 0.3, where a weight of the coarsest
    # level starts at 0.015 at most
    epochs: int = 200
    average: float = 0.9999  # EMA of the weights, what is used afterwards; ours: Ho et al. appendix B
    average_ramp: float = 2000.0  # steps: the EMA starts short; ours
    flips: bool = True  # of each training picture, both ways with probability 1/2; ours: steel and boards have no up
    precision: str = "bf16"  # where the device is fast at it, else fp32


# --- Noise ------------------------------------------------------------------------------------------------------------


def noise_schedule(steps: int) -> Tensor:
    """alpha_hat (steps,) float64, falling: the part of the signal's power that is left at each timestep."""
    betas = torch.linspace(FIRST_BETA, LAST_BETA, steps, dtype=torch.float64)
    return (1 - betas).cumprod(0)


def q_sample(clean: Tensor, timesteps: Tensor, noise: Tensor, alpha_hat: Tensor) -> Tensor:
    """Pictures with the noise of their timesteps, Ho et al. eq. 4.

    Args:
        clean: (B, C, H, W), -1 to 1. timesteps: (B,) int64, from 0. noise: (B, C, H, W), standard normal.
        alpha_hat: of `noise_schedule`, on the device of the others.
    """
    left = rearrange(alpha_hat[timesteps], "b -> b 1 1 1")
    return left.sqrt().to(clean.dtype) * clean + (1 - left).sqrt().to(clean.dtype) * noise


def noise_loss(
    unet: nn.Module, clean: Tensor, timesteps: Tensor, noise: Tensor, alpha_hat: Tensor
) -> dict[str, Tensor]:
    """{"loss"}: mean squared error of the predicted noise, Ho et al. eq. 14. Arguments as of `q_sample`.

    Predicting no noise at all costs 1.
    """
    predicted = unet(q_sample(clean, timesteps, noise, alpha_hat), timesteps).sample  # (B, C, H, W)
    return {"loss": functional.mse_loss(predicted.to(noise.dtype), noise)}


# --- Network ----------------------------------------------------------------------------------------------------------


def build_unet(settings: DiffusionSettings, colours: int) -> UNet2DModel:
    """A U-Net of three levels, pictures (B, colours, size, size) and timesteps (B,) -> .sample of the same shape.

    Its `config` knows the size, the colours and the number of timesteps. Raises ValueError for channels or sizes that
    cannot be.
    """
    from diffusers import UNet2DModel

    if len(settings.channels) != 3 or len(settings.attention) != 3 or any(c % 4 for c in settings.channels):
        raise ValueError(
            f"channels {settings.channels} and attention {settings.attention}: give three each, channels in fours"
        )
    if settings.size % 4:
        raise ValueError(f"size {settings.size} cannot be halved twice: use a multiple of 4")
    blocks = ["Attn" * attends for attends in settings.attention]
    return UNet2DModel(
        sample_size=settings.size,
        in_channels=colours,
        out_channels=colours,
        block_out_channels=settings.channels,
        layers_per_block=settings.layers,
        down_block_types=tuple(f"{block}DownBlock2D" for block in blocks),
        up_block_types=tuple(f"{block}UpBlock2D" for block in reversed(blocks)),
        add_attention=settings.attention[-1],  # between the way down and the way up, at the coarsest level
        attention_head_dim=None,  # one head, as Ho et al.
        norm_num_groups=math.gcd(32, *(c // 4 for c in settings.channels)),  # of 4 channels or more
        num_train_timesteps=settings.steps,
    )


def as_inputs(images: Tensor) -> Tensor:
    """uint8 pictures -> float32, -1 to 1, the range that the noise is meant for."""
    return images.float() / 127.5 - 1


def check_size(images: Tensor, size: int) -> None:
    if images.shape[-2:] != (size, size):
        raise ValueError(
            f"the diffusion model is one of {size} x {size} px pictures, got {tuple(images.shape)}: load them at {size}"
        )


# --- Training ---------------------------------------------------------------------------------------------------------


class Averaging(nn.Module):
    """A network in training beside the moving average of its weights: both, and the count of steps, in a checkpoint."""

    def __init__(self, network: nn.Module, settings: DiffusionSettings):
        super().__init__()
        self.network = network
        self.moving = MovingAverage(network, settings.average, settings.average_ramp)
        self.average = self.moving.model
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # stays on the CPU: read in every step

    def follow(self) -> None:
        """Take in the weights that the last step left."""
        self.moving.update(self.network, int(self.steps))
        self.steps += 1


def random_flips(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each of (B, C, H, W) flipped upside down or left to right or both or not, with equal probability."""
    for axis in (-2, -1):
        flipped = (torch.rand(len(pictures), 1, 1, 1, generator=generator) < 0.5).to(pictures.device)
        pictures = torch.where(flipped, pictures.flip(axis), pictures)
    return pictures


def train_ddpm(images: Tensor, settings: DiffusionSettings, seed: int, session: Session) -> tuple[UNet2DModel, Trained]:
    """Train on uint8 pictures (N, C, size, size), on their device. -> (moving average of the U-Net, curve and speed).

    Timesteps, noise and flips of a step are drawn on the CPU from seed and epoch alone: the same on every device, and
    in a training that was interrupted. Raises ValueError for pictures of another size, and as `train`.
    """
    check_size(images, settings.size)
    device, precision = images.device, precision_of(settings, images.device)
    alpha_hat = noise_schedule(settings.steps).to(device)
    torch.manual_seed(seed)
    unet = build_unet(settings, images.shape[1]).to(device, memory_format=torch.channels_last)
    parts = Averaging(unet, settings)

    def draw(indices: Tensor, generator: torch.Generator) -> list[Tensor]:
        clean = as_inputs(images[indices])
        if settings.flips:
            clean = random_flips(clean, generator)
        timesteps = torch.randint(settings.steps, (len(indices),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        return [clean, timesteps.to(device), noise.to(device)]

    def step(batch: list[Tensor]) -> dict[str, Tensor]:
        parts.follow()
        with autocast(device, precision):
            return noise_loss(unet, *batch, alpha_hat)

    trained = train(
        parts,
        step,
        [images],
        epochs=settings.epochs,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        betas=(0.9, 0.999),  # Adam's usual ones
        seed=seed,
        session=session,
        schedule="cosine",
        draw=draw,
        final=settings.final_rate,
    )
    parts.follow()
    return parts.average, trained


# --- What it has learnt -----------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_ddim(
    unet: UNet2DModel, count: int, seed: int, inference_steps: int = 50, device: str | torch.device = "cpu"
) -> Tensor:
    """Pictures from noise by DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 with sigma 0), uint8 (count, C, S, S).

    The noise to start from is drawn on the CPU from the seed; the network computes in the caller's autocast.
    """
    from diffusers import DDIMScheduler

    config = unet.config
    scheduler = DDIMScheduler(
        config.num_train_timesteps, FIRST_BETA, LAST_BETA, "linear", timestep_spacing="trailing"
    )  # trailing: it starts at the last timestep, as training ends there
    scheduler.set_timesteps(inference_steps)
    shape = (count, config.in_channels, config.sample_size, config.sample_size)
    pictures = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    for timestep in scheduler.timesteps:
        noise = unet(pictures, timestep).sample.float()
        pictures = scheduler.step(noise, timestep, pictures).prev_sample
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def error_per_timestep(
    unet: UNet2DModel, images: Tensor, timesteps: Sequence[int], seed: int, batch: int = 64
) -> Tensor:
    """Mean squared error of the predicted noise at each timestep, (len(timesteps),) float64 on the CPU.

    1 is as bad as predicting nothing. Each of the uint8 pictures (N, C, S, S) has one noise map at all timesteps, drawn
    from the seed; the network computes in the caller's autocast. Raises ValueError for pictures of another size.
    """
    check_size(images, unet.config.sample_size)
    alpha_hat = noise_schedule(unet.config.num_train_timesteps).to(images.device)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros(len(timesteps), dtype=torch.float64)
    for pictures, drawn in zip(images.split(batch), noise.split(batch), strict=True):
        clean, drawn = as_inputs(pictures), drawn.to(images.device)
        for index, timestep in enumerate(timesteps):
            at = torch.full((len(clean),), int(timestep), device=images.device)
            total[index] += len(clean) * noise_loss(unet, clean, at, drawn, alpha_hat)["loss"].item()
    return total / len(images)


def middles(steps: int, count: int) -> list[int]:
    """The timesteps in the middles of `count` equal parts of 0 .. steps - 1: their mean is that of all timesteps."""
    return [(2 * part + 1) * steps // (2 * count) for part in range(count)]


def spread(images: Tensor, count: int) -> Tensor:
    """At most `count` of the pictures, evenly spaced: a set is sorted by name, which is by class in the steel sets."""
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().to(images.device)]


def run_ddpm(
    settings: DiffusionSettings, seed: int, data: DetectionData, device: str | torch.device, session: Session
) -> Result:
    """Train on the training pictures, measure on 120 of each split; no label is looked at.

    -> metrics and dev {"noise_error": per cent of the noise's power that is mispredicted, mean over 20 timesteps};
    predictions "timesteps" (20,), "errors" (20,) on test, "errors_train" on training pictures, "samples" uint8
    (16, S, S), with colours (16, S, S, 3), and `telling_maps` of six test pictures. Raises ValueError for pictures of
    another size, and as `train`.
    """
    from defectlab.diffusion.features import telling_maps  # that module builds on this one

    unet, trained = train_ddpm(data.train.images, settings, seed, session)
    precision, timesteps = precision_of(settings, device), middles(settings.steps, ERROR_TIMESTEPS)
    with autocast(torch.device(device), precision):
        errors = {
            part: error_per_timestep(unet, spread(getattr(data, part).images, ERROR_PICTURES), timesteps, seed)
            for part in ("train", "dev", "test")
        }
        samples = sample_ddim(unet, SAMPLES, seed, device=device)  # (16, C, S, S)
        kept = telling_maps(unet, spread(data.test.images, CASES))
    samples = samples[:, 0] if samples.shape[1] == 1 else rearrange(samples, "n c h w -> n h w c")
    return Result(
        metrics={"noise_error": round(100 * errors["test"].mean().item(), 4)},
        per_class={},
        dev={"noise_error": round(100 * errors["dev"].mean().item(), 4)},
        curve=trained.curve,
        predictions={
            "timesteps": torch.tensor(timesteps).numpy(),
            "errors": errors["test"].float().numpy(),
            "errors_train": errors["train"].float().numpy(),
            "samples": samples.cpu().numpy(),
            **kept,
        },
        model=unet.state_dict(),
        costs={"parameters_m": round(parameters(unet) / 1e6, 4)} | trained.costs,
        precision=precision,
    )


def load_ddpm(record: Record, settings: DiffusionSettings, colours: int, device: str | torch.device) -> UNet2DModel:
    """The averaged U-Net of a finished run, frozen. ValueError where its weights are missing or do not fit."""
    unet = build_unet(settings, colours)
    load_weights(record, unet)
    return unet.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
