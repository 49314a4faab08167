"""MSCDAE: Mei, Wang, Wen, "Automatic Fabric Defect Detection with a Multi-Scale Convolutional Denoising Autoencoder
Network Model", Sensors 18(4), 1064, 2018. No arXiv number, no code of the authors.

A denoising autoencoder for each level of a Gaussian pyramid learns patches of good fabric; what it cannot reconstruct
is a defect. The abstract was read: patches, pyramid, residuals segmented on each level and then fused. The rest of what
is told of the paper (salt-and-pepper noise, threshold, AND, OR) is from memory, not checked.

Ours: AUROC needs continuous maps, so that the threshold mean + gamma * deviation becomes a normalised residual, AND a
minimum, OR a maximum. The networks are fully convolutional and reconstruct a whole image in one pass, where the paper
reconstructs overlapping patches. Under autocast the coarser levels are rounded to bf16 in training (by 0.2 grey levels
in the mean), not in the evaluation. The light is left as it is, where the paper evens it out first (not checked).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defectlab.networks.rebuild.base import Normal, at_map_size, crops, to_unit
from defectlab.networks.reverse_distillation import gaussian_smooth
from defectlab.precision import at_least_float32, sent


@dataclass(frozen=True)
class MSCDAESettings:
    """MSCDAE. "Ours" is what is chosen here: the paper's own value was not checked."""

    model: ClassVar[str] = "mscdae"
    version: ClassVar[int] = 1

    dataset: str = "aitex"
    size: int = 256
    levels: int = 3  # the paper's number, not checked
    patch: int = 32  # ours: px a side, the same on every level
    patches: int = 4  # ours: of each image drawn, on every level
    noise: float = 0.1  # ours: share of the pixels that turn black or white; 0: a plain autoencoder
    widths: tuple[int, ...] = (32, 64)  # ours: channels of the encoder, each halves the resolution
    code: int = 4  # ours: channels of the bottleneck; with two widths, 4 numbers stand for 4 x 4 pixels
    sigma: float = 2.0  # ours: px of its level, of the Gaussian that smooths a residual; the paper has patch residuals
    draws: int = 256  # ours: images an epoch
    epochs: int = 30  # ours
    batch: int = 4  # ours
    learning_rate: float = 0.003  # ours
    precision: str = "bf16"  # where the device is fast at it


# --- The Gaussian pyramid ---------------------------------------------------------------------------------------------


def reduce_by_two(images: Tensor) -> Tensor:
    """Burt and Adelson 1983: a binomial blur, mirrored at the borders, and every second pixel: (B, C, H, W) ->
    (B, C, H/2, W/2)."""
    kernel = sent(torch.tensor([1, 4, 6, 4, 1], dtype=images.dtype) / 16, images.device)
    channels = images.shape[1]
    across = kernel.view(1, 1, 1, 5).expand(channels, -1, -1, -1)
    blurred = F.conv2d(F.pad(images, (2, 2, 2, 2), "reflect"), across, stride=(1, 2), groups=channels)
    return F.conv2d(blurred, across.mT, stride=(2, 1), groups=channels)


def gaussian_pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """(B, C, H, W) -> `levels` images, finest first; the first is the image itself."""
    pyramid = [images]
    for _ in range(levels - 1):
        pyramid.append(reduce_by_two(pyramid[-1]))
    return pyramid


# --- The denoising autoencoder of a level -----------------------------------------------------------------------------


def salt_and_pepper(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W) in 0..1, of whose pixels this share is black or white, half of it each, in all channels."""
    chance = sent(torch.rand(len(images), 1, *images.shape[-2:], generator=generator), images.device)
    return torch.where(chance < share, (chance < share / 2).to(images), images)


class Autoencoder(nn.Sequential):
    """Images (B, 3, H, W) in 0..1 -> their reconstruction; H and W are multiples of 2^len(widths).

    Without batch norm (ours): its statistics would be those of corrupted images, the test has clean ones.
    """

    def __init__(self, widths: tuple[int, ...], code: int):
        down = [nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.1)) for a, b in pairwise((3, *widths))]
        up = [nn.Sequential(nn.LeakyReLU(0.1), nn.ConvTranspose2d(b, a, 4, 2, 1)) for a, b in pairwise((3, *widths))]
        last = widths[-1]
        super().__init__(*down, nn.Conv2d(last, code, 3, 1, 1), nn.Conv2d(code, last, 3, 1, 1), *up[::-1])


# --- Residuals, and the fusion of the levels --------------------------------------------------------------------------


def residual(images: Tensor, rebuilt: Tensor, sigma: float) -> Tensor:
    """2 x (B, C, H, W) -> |image - reconstruction|, mean over channels, smoothed: (B, H, W) float32."""
    return gaussian_smooth((images - rebuilt).abs().mean(1), sigma)


def fuse(maps: Tensor) -> Tensor:
    """(B, L, H, W) -> (B, H, W): neighbouring levels have to agree (AND: minimum), any such pair will do (OR: maximum).

    Ours: the continuous form. Thresholded at t, it is the OR of the pairs' ANDs of the maps thresholded at t.
    """
    return torch.minimum(maps[:, :-1], maps[:, 1:]).amax(1)


class MSCDAE(Normal):
    """`level`: None = all levels fused; 1, 2, 3: `maps` of this level alone, 1 = full resolution.

    ValueError for fewer than two levels, and where sizes cannot be halved as often as needed.
    """

    level: int | None = None

    def __init__(self, settings: MSCDAESettings):
        super().__init__()
        levels, step = settings.levels, 2 ** len(settings.widths)
        coarsest = settings.size // 2 ** (levels - 1)
        if levels < 2:
            raise ValueError(f"neighbouring levels are fused: {levels} level is too few")
        if settings.size % (2 ** (levels - 1) * step) or settings.patch % step:
            raise ValueError(
                f"images of {settings.size} px and patches of {settings.patch} px: "
                f"a size must be a multiple of {2 ** (levels - 1) * step}, a patch of {step}"
            )
        if settings.patch > coarsest:
            raise ValueError(f"patches of {settings.patch} px do not fit into the coarsest level, of {coarsest} px")
        self.settings = settings
        self.networks = nn.ModuleList(Autoencoder(settings.widths, settings.code) for _ in range(levels))
        self.register_buffer("centre", torch.zeros(levels))  # of the grey values of a level's training images
        self.register_buffer("scale", torch.ones(levels))
        self.register_buffer("mean", torch.zeros(levels))  # of a level's training residuals
        self.register_buffer("deviation", torch.ones(levels))

    def begin(self, prepared: Tensor, foreign: Tensor | None = None) -> None:
        """Ours: mean grey value and contrast of each level. Cloth of low contrast is learnt much faster so."""
        moments = [
            torch.stack([torch.stack([x.mean((1, 2, 3)), x.std((2, 3)).mean(1)]) for x in self.pyramid(images)])
            for images in prepared.split(self.settings.batch)
        ]
        mean, contrast = torch.cat(moments, -1).mean(-1).unbind(1)
        self.centre.copy_(mean)
        self.scale.copy_(contrast.clamp(min=1e-3))

    def pyramid(self, prepared: Tensor) -> list[Tensor]:
        return gaussian_pyramid(to_unit(prepared), self.settings.levels)

    def rebuild(self, level: int, images: Tensor) -> Tensor:
        """Images of a level, 0 = the finest, -> their reconstruction, both (B, 3, h, w) in 0..1."""
        centre, scale = self.centre[level], self.scale[level]
        return at_least_float32(self.networks[level]((images - centre) / scale)) * scale + centre

    def loss(self, prepared: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Mean squared error against the clean patches, mean over levels (ours; each level learns on its own)."""
        settings = self.settings
        errors = []
        for level, images in enumerate(self.pyramid(prepared)):
            clean = crops(images.repeat_interleave(settings.patches, 0), settings.patch, generator)
            rebuilt = self.rebuild(level, salt_and_pepper(clean, settings.noise, generator))
            errors.append(F.mse_loss(rebuilt, clean) / self.scale[level] ** 2)
        return {"loss": torch.stack(errors).mean()}

    def residuals(self, prepared: Tensor) -> list[Tensor]:
        """A batch -> the residual of each level at its own resolution, [(B, h, w)]."""
        levels = enumerate(self.pyramid(prepared))
        return [residual(images, self.rebuild(level, images), self.settings.sigma) for level, images in levels]

    def end(self, prepared: Tensor) -> None:
        """Mean and standard deviation of all training residuals of a level."""
        moments = [
            torch.stack([torch.stack([r.mean((1, 2)), r.square().mean((1, 2))]) for r in self.residuals(images)])
            for images in prepared.split(self.settings.batch)
        ]
        mean, square = torch.cat(moments, -1).double().mean(-1).unbind(1)
        self.mean.copy_(mean)
        self.deviation.copy_((square - mean**2).clamp(min=1e-12).sqrt())

    def level_maps(self, prepared: Tensor) -> Tensor:
        """A batch -> the residual of each level, in deviations from the mean of the training: (B, levels, 256, 256)."""
        levels = zip(self.residuals(prepared), self.mean, self.deviation, strict=True)
        return torch.stack([at_map_size((r - mean) / deviation) for r, mean, deviation in levels], 1)

    def maps(self, prepared: Tensor) -> Tensor:
        maps = self.level_maps(prepared)
        return fuse(maps) if self.level is None else maps[:, self.level - 1]
