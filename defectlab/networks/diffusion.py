"""Denoising diffusion: the noise schedule, the network that predicts the noise, samples, and features of its decoder.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239. Noise is added to an image x_0 in `steps`
steps, q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (their eq. 2). With alpha_hat_t the product of
(1 - beta_s) over s up to t, this gives x_t directly:

    x_t = sqrt(alpha_hat_t) x_0 + sqrt(1 - alpha_hat_t) noise,  noise ~ N(0, I)                    (their eq. 4)

A U-Net learns to predict the noise from x_t and t (their eq. 14), which gives the mean of the reverse step
p_theta(x_{t-1} | x_t) (their eqs. 1 and 11). alpha_hat is D3N's name of their alpha_bar. Timesteps count from 0 here:
alpha_hat[0] holds one factor.

Features: Baranchuk et al. 2022, "Label-Efficient Semantic Segmentation with Diffusion Models", arXiv 2112.03126. An
image gets the noise of a small timestep, and the decoder's intermediate maps are kept. They found the middle blocks at
small timesteps the most informative, and resized all maps to one scale; here each map keeps its own.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import UNet2DModel

FIRST_BETA, LAST_BETA = 1e-4, 0.02  # Ho et al. section 4: linear in between
TIMESTEPS = (100, 150, 250)  # of the features; D3N (arXiv 2408.13845) section III-B
# ours: D3N is silent. The mean keeps the channels of a block (512 at the coarsest level, what D3N's compressor takes)
# and a third of the size of a concatenation
COMBINE = "mean"


@dataclass(frozen=True)
class DiffusionSettings:
    """A diffusion model and its recipe. Defaults are those of D3N (arXiv 2408.13845) where it states them."""

    model: ClassVar[str] = "ddpm"
    version: ClassVar[int] = 1

    dataset: str = "neu_det"
    size: int = 64  # px per side; D3N section IV-A
    channels: tuple[int, int, int] = (128, 256, 512)  # per level, finest first; ours: D3N has 512 channels to compress
    layers: int = 2  # residual blocks per level of the encoder, one more in the decoder; ours: Ho et al. appendix B
    attention: tuple[bool, bool, bool] = (False, False, True)  # per level; ours: at 16x16 alone, Ho et al. appendix B
    steps: int = 1000  # D3N section IV-A
    learning_rate: float = 5e-6  # D3N section IV-A: Adam, a cosine from 5e-6 ...
    final_rate: float = 0.01  # ... to 5e-8, this part of the first
    batch: int = 2  # D3N section IV-A
    # ours: D3N is silent. Adam moves a weight by at most about the rate per step: the rates of 200 epochs (129,600
    # steps with 1,296 images) sum to 0.3, and a weight of the coarsest level starts at 0.015 at most
    epochs: int = 200
    average: float = 0.9999  # EMA of the weights, what is used afterwards; ours: Ho et al. appendix B
    average_ramp: float = 2000.0  # steps: the EMA starts short; ours
    flips: bool = True  # both ways with probability 1/2; ours: steel and boards have no preferred orientation
    precision: str = "bf16"  # where the device is fast at it, else fp32


# --- Noise ------------------------------------------------------------------------------------------------------------


def noise_schedule(steps: int) -> Tensor:
    """alpha_hat (steps,) float64, falling: the part of the signal's power that is left at each timestep."""
    betas = torch.linspace(FIRST_BETA, LAST_BETA, steps, dtype=torch.float64)
    return (1 - betas).cumprod(0)


def q_sample(clean: Tensor, timesteps: Tensor, noise: Tensor, alpha_hat: Tensor) -> Tensor:
    """Images with the noise of their timesteps, Ho et al. eq. 4: clean (B, C, H, W) in -1..1, timesteps (B,) int64 from
    0, noise (B, C, H, W) standard normal, alpha_hat of `noise_schedule` on the same device."""
    left = rearrange(alpha_hat[timesteps], "b -> b 1 1 1")
    return left.sqrt().to(clean.dtype) * clean + (1 - left).sqrt().to(clean.dtype) * noise


def noise_loss(
    unet: nn.Module, clean: Tensor, timesteps: Tensor, noise: Tensor, alpha_hat: Tensor, labels: Tensor | None = None
) -> dict[str, Tensor]:
    """{"loss"}: mean squared error of the predicted noise (1 where it predicts none), Ho et al. eq. 14. Arguments as of
    `q_sample`; labels (B,) int64 of a network with classes."""
    predicted = unet(
        q_sample(clean, timesteps, noise, alpha_hat), timesteps, *class_arguments(labels)
    ).sample  # (B, C, H, W)
    return {"loss": functional.mse_loss(predicted.to(noise.dtype), noise)}


def class_arguments(labels: Tensor | None) -> tuple[Tensor, ...]:
    """What a network gets beside images and timesteps: nothing, or the classes."""
    return () if labels is None else (labels,)


# --- Network ----------------------------------------------------------------------------------------------------------


def build_unet(settings: DiffusionSettings, colours: int, classes: int | None = None) -> UNet2DModel:
    """A U-Net of three levels, images (B, colours, size, size) and timesteps (B,) -> .sample of the same shape; with
    `classes` it takes labels (B,), too, whose learnt vectors are added to those of the timesteps.

    ValueError for channels, attention or a size that do not fit.
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
        add_attention=settings.attention[-1],  # between encoder and decoder, at the coarsest level
        attention_head_dim=None,  # one head, as Ho et al.
        norm_num_groups=math.gcd(32, *(c // 4 for c in settings.channels)),  # of 4 channels or more
        num_train_timesteps=settings.steps,
        num_class_embeds=classes,
    )


def as_inputs(images: Tensor) -> Tensor:
    """uint8 images -> float32, -1 to 1, the range that the noise is meant for."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """The other way: -1..1 -> 0..255."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_size(images: Tensor, size: int) -> None:
    if images.shape[-2:] != (size, size):
        raise ValueError(
            f"the diffusion model is one of {size} x {size} px images, got {tuple(images.shape)}: load them at {size}"
        )


# --- What it has learnt -----------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_ddim(
    unet: UNet2DModel,
    count: int,
    seed: int,
    inference_steps: int = 50,
    device: str | torch.device = "cpu",
    labels: Tensor | None = None,
) -> Tensor:
    """Images from noise by DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 with sigma 0; the predicted
    x_0 is clipped to -1..1 at each step, as diffusers does by default), uint8 (count, C, S, S);
    labels (count,) int64 of a network with classes, on the device.

    The first noise is drawn on the CPU from the seed. The caller's autocast sets the precision.
    """
    from diffusers import DDIMScheduler

    config = unet.config
    spacing = "trailing"  # it starts at the last timestep
    scheduler = DDIMScheduler(config.num_train_timesteps, FIRST_BETA, LAST_BETA, "linear", timestep_spacing=spacing)
    scheduler.set_timesteps(inference_steps)
    shape = (count, config.in_channels, config.sample_size, config.sample_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    for timestep in scheduler.timesteps:
        noise = unet(images, timestep, *class_arguments(labels)).sample.float()
        images = scheduler.step(noise, timestep, images).prev_sample
    return to_uint8(images)


# --- Features ---------------------------------------------------------------------------------------------------------


def level_outputs(unet: UNet2DModel) -> list[nn.Module]:
    """The last module of each level of the decoder before the map is scaled up, finest level first.

    Ours: D3N is silent on which blocks. The last block of a level has all its skip connections as input.
    """
    return [(getattr(block, "attentions", None) or block.resnets)[-1] for block in reversed(unet.up_blocks)]


@torch.no_grad()
def decoder_features(
    unet: UNet2DModel,
    images: Tensor,
    timesteps: tuple[int, ...] = TIMESTEPS,
    noise_seed: int = 0,
    combine: str = COMBINE,
    alpha_hat: Tensor | None = None,
) -> list[Tensor]:
    """Decoder features of uint8 images (B, C, S, S): float32 maps (B, K, h, w), finest first, h = w = S, S/2, S/4.

    Each timestep has one noise map, drawn from `noise_seed` and the same for every image, so that an image's features
    depend on the image alone. The caller's autocast sets the precision.

    combine: of the timesteps' maps, "mean" (K = the level's channels) or "concat" (K = channels x timesteps).
    alpha_hat: of `noise_schedule`, on the images' device; None: computed here. ValueError for another `combine`, a
    timestep that the model does not have, images of another size.
    """
    steps = unet.config.num_train_timesteps
    check_size(images, unet.config.sample_size)
    if combine not in ("mean", "concat"):
        raise ValueError(f"unknown combine {combine!r}: use mean or concat")
    if not timesteps or not all(0 <= t < steps for t in timesteps):
        raise ValueError(f"timesteps {timesteps}: give some of 0 to {steps - 1}")
    if alpha_hat is None:
        alpha_hat = noise_schedule(steps).to(images.device)
    noise = torch.randn((len(timesteps), *images.shape[1:]), generator=torch.Generator().manual_seed(noise_seed))
    clean, levels = as_inputs(images), level_outputs(unet)
    found: list[list[Tensor]] = [[] for _ in levels]  # per level: a map (B, K, h, w) per timestep
    with contextlib.ExitStack() as hooks:
        for level, maps in zip(levels, found, strict=True):
            handle = level.register_forward_hook(lambda module, inputs, output, maps=maps: maps.append(output.float()))
            hooks.callback(handle.remove)
        for timestep, shared in zip(timesteps, noise.to(images.device), strict=True):
            at = torch.full((len(images),), timestep, device=images.device)
            unet(q_sample(clean, at, shared.expand_as(clean), alpha_hat), at)
    if combine == "concat":
        return [torch.cat(maps, dim=1) for maps in found]
    return [torch.stack(maps).mean(0) for maps in found]
