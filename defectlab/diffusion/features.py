"""What the decoder of a diffusion model makes of a picture: feature maps at three scales.

Baranchuk et al. 2022, "Label-Efficient Semantic Segmentation with Diffusion Models", arXiv 2112.03126 (DDPM-Seg): a
picture gets the noise of a small timestep, and what the noise predictor's decoder computes on the way to its answer is
kept. They found the middle blocks of the decoder at small timesteps the most telling, and resized all maps to one
scale; here they stay at their own.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from defectlab.diffusion.ddpm import DiffusionSettings, as_inputs, check_size, noise_schedule, q_sample

if TYPE_CHECKING:
    from diffusers import UNet2DModel

TIMESTEPS = (100, 150, 250)  # D3N (arXiv 2408.13845) section III-B
# ours: D3N is silent. The mean keeps the channels of a block (512 at the coarsest level, what D3N's compressor takes)
# and a third of the size of a concatenation
COMBINE = "mean"


def decoder_channels(settings: DiffusionSettings) -> tuple[int, int, int]:
    """Channels of the maps of one timestep, finest first."""
    return settings.channels


def level_outputs(unet: UNet2DModel) -> list[nn.Module]:
    """The last module of each level of the decoder before the map is scaled up, finest level first.

    Ours: D3N is silent on which blocks. The last block of a level has seen all of its skip connections; one a level
    gives each scale of a detector its map.
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
    """Decoder features of uint8 pictures (B, C, S, S): float32 maps (B, K, h, w), finest first, h = w = S, S/2, S/4.

    Each timestep has one noise map, drawn from `noise_seed` and the same for every picture, so that a picture's
    features depend on the picture alone. The computation is in the precision of the caller's autocast.

    Args:
        combine: of the timesteps' maps, "mean" (K = the level's channels) or "concat" (K = channels x timesteps).
        alpha_hat: of `noise_schedule`, on the pictures' device; None: computed here.

    Raises:
        ValueError: another `combine`, a timestep that the model does not have, pictures of another size.
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
    found: list[list[Tensor]] = [[] for _ in levels]  # a level: a map (B, K, h, w) a timestep
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


@torch.no_grad()
def telling_maps(unet: UNet2DModel, images: Tensor, channels: int = 3) -> dict[str, np.ndarray]:
    """What a record keeps of a few uint8 pictures (B, C, S, S), all uint8: case_images and case_told (B, S, S) or with
    colours (B, S, S, 3), the picture and what one step from the last of `TIMESTEPS` makes of it; case_features_k
    (B, channels, h, w), some channels of level k, darkest to brightest over the pictures.
    """
    alpha_hat, last = noise_schedule(unet.config.num_train_timesteps).to(images.device), TIMESTEPS[-1]
    at = torch.full((len(images),), last, device=images.device)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    noisy = q_sample(as_inputs(images), at, noise, alpha_hat)
    left = alpha_hat[last].float()
    told = (noisy - (1 - left).sqrt() * unet(noisy, at).sample.float()) / left.sqrt()  # x_0 of eq. 2
    found = {"case_images": images, "case_told": ((told + 1) * 127.5).round().clamp(0, 255)}
    for level, maps in enumerate(decoder_features(unet, images, alpha_hat=alpha_hat)):
        chosen = maps[:, torch.linspace(0, maps.shape[1] - 1, channels).round().long()]  # (B, channels, h, w)
        low, high = chosen.amin((0, 2, 3), keepdim=True), chosen.amax((0, 2, 3), keepdim=True)
        found[f"case_features_{level}"] = (255 * (chosen - low) / (high - low).clamp(min=1e-9)).round()
    arrays = {name: values.to(torch.uint8).cpu().numpy() for name, values in found.items()}
    for name in ("case_images", "case_told"):
        arrays[name] = arrays[name][:, 0] if images.shape[1] == 1 else arrays[name].transpose(0, 2, 3, 1)
    return arrays
