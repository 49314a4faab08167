"""A vision transformer that rebuilds the features of a frozen CNN, one model for many kinds of parts: Yao et al.,
"Generalizable Industrial Visual Anomaly Detection with Self-Induction Vision Transformer", 2022, arXiv 2211.12311.

Only the abstract was at hand: a transformer rebuilds the features of a pretrained CNN with auxiliary induction tokens,
so as not to learn the identity, and the residual shows the anomaly. The rest is a reconstruction, ours:

- Features: EfficientNet-Lite0's maps of three strides on one grid, standardised by channel.
- The induction tokens are learnt keys and values beside those of the image: what all good images have in common.
- Each position is rebuilt from a learnt query: where blocks added to the image's tokens, they copied defects as well.
  Queries and jitter are as in You et al., UniAD, NeurIPS 2022, arXiv 2206.03687 (from memory, not checked).
- A convolutional autoencoder of as many parameters, with the same features and jitter, is the counterpart.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defectlab.networks.efficientnet import Lite0
from defectlab.networks.rebuild.base import Normal
from defectlab.networks.reverse_distillation import gaussian_smooth, per_position_discrepancy, upsample
from defectlab.precision import at_least_float32, check_uint8, full_float32, sent

CHANNELS = {4: 24, 8: 40, 16: 112, 32: 320}  # of Lite0's maps, by their stride
CELL = 16  # px a side of a position of the grid


@dataclass(frozen=True)
class SIVTSettings:
    """A decoder and its recipe; ours where nothing else is said."""

    model: ClassVar[str] = "sivt"
    version: ClassVar[int] = 1

    dataset: str = "pooled"  # abstract: one model for many kinds of parts
    size: int = 256
    pretrained: bool = True  # abstract; False: random weights, for smoke
    strides: tuple[int, ...] = (4, 8, 16)  # of the maps used, fine to coarse; 32 may be added
    decoder: str = "transformer"  # or "conv"
    dim: int = 128  # of the transformer's tokens; the convolutions are as wide as its parameters allow
    depth: int = 2  # blocks of the transformer; UniAD has 4 and 4
    heads: int = 4
    induction: int = 16  # induction tokens of each block
    jitter: float = 20.0  # UniAD's alpha: noise of alpha |f| / C in each channel
    cosine: float = 1.0  # weight of 1 - cosine beside the squared error
    draws: int = 512
    epochs: int = 20
    batch: int = 8
    learning_rate: float = 0.001
    precision: str = "bf16"  # where the device is fast at it


# --- Features of a pretrained CNN -------------------------------------------------------------------------------------


class Descriptors(nn.Module):
    """Lite0's maps of some strides, frozen, on one grid: cells of fine maps are averaged, coarse maps are bilinear."""

    def __init__(self, strides: tuple[int, ...], pretrained: bool = True):
        super().__init__()
        if not strides or not set(strides) <= CHANNELS.keys() or sorted(set(strides)) != list(strides):
            raise ValueError(f"strides must be some of {tuple(CHANNELS)}, fine to coarse, got {strides}")
        self.lite0 = Lite0(pretrained).to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.stages = [list(CHANNELS).index(stride) + 1 for stride in strides]  # timm's number 0 has stride 2
        self.channels = sum(CHANNELS[stride] for stride in strides)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) -> (B, C, S/16, S/16) float32."""
        check_uint8(images)
        pixels = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with full_float32():
            maps = self.lite0.net.forward_intermediates(pixels, self.stages, stop_early=True, intermediates_only=True)
        grid = tuple(side // CELL for side in images.shape[-2:])
        if self.stages[-1] == len(CHANNELS):
            maps[-1] = F.interpolate(maps[-1], grid, mode="bilinear")
        return torch.cat([F.adaptive_avg_pool2d(features, grid) for features in maps], 1).contiguous()


def jittered(features: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """(B, C, h, w) plus Gaussian noise, of a deviation of strength / C times the norm of the position."""
    noise = sent(torch.randn(features.shape, generator=generator).to(features.dtype), features.device)
    return features + noise * features.norm(dim=1, keepdim=True) * strength / features.shape[1]


# --- The self-induction vision transformer ----------------------------------------------------------------------------


class InductionAttention(nn.Module):
    """Attention from queries (B, L, D) to the image's tokens (B, M, D) and to K learnt ones: (B, L, D)."""

    def __init__(self, dim: int, heads: int, tokens: int):
        super().__init__()
        self.heads = heads
        self.tokens = nn.Parameter(torch.randn(tokens, dim))  # as large as the normalised tokens beside them
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        seen = torch.cat([image, self.tokens.to(image).expand(len(image), -1, -1)], 1)
        parts = (self.query(x), *self.key_value(seen).chunk(2, -1))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm: attention to the image, then a perceptron four times as wide, both added to the queries."""

    def __init__(self, dim: int, heads: int, tokens: int):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), InductionAttention(dim, heads, tokens)
        self.mix = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), image)
        return x + self.mix(x)


class TransformerDecoder(nn.Module):
    """(B, C, g, g) -> (B, C, g, g), each position rebuilt from all positions and from the induction tokens."""

    def __init__(self, settings: SIVTSettings, channels: int):
        super().__init__()
        dim, grid = settings.dim, settings.size // CELL
        self.embed, self.norm = nn.Linear(channels, dim), nn.LayerNorm(dim)
        self.positions, self.queries = (nn.Parameter(0.02 * torch.randn(grid * grid, dim)) for _ in range(2))
        self.blocks = nn.ModuleList(Block(dim, settings.heads, settings.induction) for _ in range(settings.depth))
        self.restore = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels))

    def forward(self, features: Tensor) -> Tensor:
        image = self.norm(self.embed(features.flatten(2).transpose(1, 2)) + self.positions)
        x = self.queries.repeat(len(features), 1, 1)  # no view: FlopCounterMode refuses one of a parameter
        for block in self.blocks:
            x = block(x, image)
        return self.restore(x).transpose(1, 2).unflatten(2, features.shape[-2:])


class ConvDecoder(nn.Sequential):
    """The counterpart: (B, C, g, g) to a bottleneck of g/4 x g/4 positions and back, `width` channels throughout."""

    def __init__(self, channels: int, width: int):
        down = (nn.Conv2d(channels, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1))
        up = (nn.ConvTranspose2d(width, width, 4, 2, 1) for _ in range(2))
        steps = (nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU()) for layer in (*down, *up))
        super().__init__(*steps, nn.Conv2d(width, channels, 3, padding=1))


def build_decoder(settings: SIVTSettings, channels: int) -> nn.Module:
    """Either decoder, of about equally many parameters. ValueError for an unknown one, or a size that does not fit."""
    if settings.decoder not in ("transformer", "conv") or settings.size % (4 * CELL):
        raise ValueError(f"{settings.decoder!r} must be transformer or conv, {settings.size} px a multiple of 64")
    if settings.decoder == "transformer":
        return TransformerDecoder(settings, channels)
    with torch.device("meta"):
        wanted = sum(p.numel() for p in TransformerDecoder(settings, channels).parameters())
    linear = 18 * channels + 12  # the convolutions of width w have 41 w^2 + (18 C + 12) w + C parameters
    return ConvDecoder(channels, round(((linear**2 + 164 * (wanted - channels)) ** 0.5 - linear) / 82))


# --- Loss, map, and the method as it is trained -----------------------------------------------------------------------


def reconstruction_loss(features: Tensor, rebuilt: Tensor, cosine: float) -> Tensor:
    """Mean squared error + `cosine` times the mean over the positions of 1 - cosine: 2 x (B, C, h, w) -> scalar."""
    features, rebuilt = at_least_float32(features), at_least_float32(rebuilt)
    return F.mse_loss(rebuilt, features) + cosine * per_position_discrepancy(features, rebuilt).mean()


class SIVT(Normal):
    """`backbone`: uint8 images (B, 3, S, S) -> features (B, C, S/16, S/16); `decoder`: standardised -> rebuilt ones."""

    def __init__(self, settings: SIVTSettings):
        super().__init__()
        self.settings = settings
        self.backbone = Descriptors(settings.strides, settings.pretrained)
        self.decoder = build_decoder(settings, self.backbone.channels)
        self.register_buffer("mean", torch.zeros(1, self.backbone.channels, 1, 1))
        self.register_buffer("deviation", torch.ones(1, self.backbone.channels, 1, 1))

    def prepare(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def begin(self, prepared: Tensor, foreign: Tensor | None = None) -> None:
        deviation, mean = torch.std_mean(prepared, (0, 2, 3), correction=0, keepdim=True)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=1e-6))

    def standardised(self, prepared: Tensor) -> Tensor:
        return (prepared - self.mean) / self.deviation

    def loss(self, prepared: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        features = self.standardised(prepared)
        rebuilt = self.decoder(jittered(features, self.settings.jitter, generator))
        return {"loss": reconstruction_loss(features, rebuilt, self.settings.cosine)}

    def maps(self, prepared: Tensor) -> Tensor:
        """Mean squared difference of features and reconstruction at each position, upsampled and smoothed."""
        features = self.standardised(prepared)
        return gaussian_smooth(upsample((features - self.decoder(features).float()).square().mean(1)))
