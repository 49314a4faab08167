"""Compression of the diffusion model's features (section III-B): a residual VAE, and PCA of equal size.

Yu, arXiv 2408.13845: ResVAE, the settings of section IV-A, the PCA of Table III; `decode` is the feature mapping of
section III-C.

Each of the decoder's three maps has a codec of its own that keeps its resolution and divides its channels by 8. Ours:
features are standardised first, so that the squared error is in units of variance and all channels count alike. The
mean is per channel and position, over the training images: all images get the same noise, which causes most of the
variation of the finest map. This mean map is subtracted and not added back after decoding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from defectlab.networks.blocks import PreActivationBlock, pick
from defectlab.networks.diffusion import COMBINE, TIMESTEPS

CHUNK = 64  # images that are float32 at once outside of training
METHODS = ("resvae", "pca", "none")
Shape = tuple[int, int, int]  # channels, height, width of a map


@dataclass(frozen=True)
class CompressionSettings:
    """What is compressed, and how. Sources as comments."""

    model: ClassVar[str] = "d3n_compression"
    version: ClassVar[int] = 2

    dataset: str = "neu_det"
    ddpm: Any = None  # settings of the diffusion model whose features these are
    timesteps: tuple[int, ...] = TIMESTEPS
    combine: str = COMBINE
    method: str = "resvae"  # section III-B; Table III: "pca"; "none": the features, centred
    ratio: int = 8  # section IV-A: 512 channels to 64
    kl: float = 1.0  # section IV-A: "KL penalty scale"
    reduction: str = "sum"  # ours, the paper is silent: the evidence bound, and what loses least (`vae_loss`)
    epochs: int = 2000  # section IV-A
    batch: int = 64  # section IV-A
    learning_rate: float = 1e-3  # ours, constant: the paper is silent
    precision: str = "bf16"  # ours


# --- ResVAE ----------------------------------------------------------------------------------------------------------


class ResVAE(nn.Module):
    """A residual convolutional VAE of one map, at the map's own resolution (section III-B: ResNet's residual block is
    "employed as the basic module to speed up the training").

    Ours: two residual blocks on each side of the latents, half as wide as the map, and a 1x1 convolution next to the
    latents: 512, 256, 256, 64 means and 64 log-variances | 64, 256, 256, 512. The blocks are pre-activation ones: the
    VAE has a linear path from end to end, and no ReLU cuts the latents. Batch norm, once trained, is the same affine
    map at every pixel, so that the decoder stays local (a group norm's statistics are not).
    """

    def __init__(self, channels: int, latent: int):
        super().__init__()
        width = max(channels // 2, latent)
        self.encoder = nn.Sequential(
            PreActivationBlock(channels, width), PreActivationBlock(width, width), nn.Conv2d(width, 2 * latent, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, width, 1), PreActivationBlock(width, width), PreActivationBlock(width, channels)
        )

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> mean and log-variance of each latent value's Gaussian, both (B, latent, H, W)."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)  # as in latent diffusion's autoencoder: exp stays finite

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the posterior's mean (B, latent, H, W): what the repository stores."""
        return self.posterior(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """(B, latent, H, W) -> (B, C, H, W)."""
        return self.decoder(z)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> reconstruction (in training of a sample, in evaluation of the mean), mean, log-variance. The
        generator is on the device of `x`."""
        mean, log_variance = self.posterior(x)
        if not self.training:
            return self.decode(mean), mean, log_variance
        noise = torch.empty_like(mean).normal_(generator=generator)
        return self.decode(mean + (log_variance / 2).exp() * noise), mean, log_variance


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """From N(mean, exp(log_variance)) to N(0, 1), in nats, value by value: the inputs' shape."""
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2


def vae_loss(
    reconstruction: Tensor, target: Tensor, mean: Tensor, log_variance: Tensor, kl: float, reduction: str
) -> dict[str, Tensor]:
    """Section IV-A: MSE and KL divergence, the latter with weight `kl`; the paper does not say how they are reduced.

    reconstruction, target (B, C, H, W); mean, log_variance (B, latent, H, W) -> "loss", "mse" and "kl" (nats per latent
    value: kl_mean), scalars. An image has D values and L latent values, D / L = 8. "loss" is, by `reduction`:

        "sum":   D mse + kl L kl_mean   the negative evidence bound of the likelihood N(reconstruction, 1/2), per image
                                        and up to constants
        "mean":  mse + kl kl_mean       "sum" with an 8 times heavier KL
        "mixed": mse + kl L kl_mean     "sum" with a D times heavier KL, for which the posterior collapses

    ValueError for another reduction.
    """
    mse = functional.mse_loss(reconstruction, target)
    kl_mean = kl_divergence(mean, log_variance).mean()
    values, latents = target[0].numel(), mean[0].numel()
    weights = {"sum": (values, latents), "mean": (1, 1), "mixed": (1, latents)}
    mse_weight, kl_weight = pick(weights, reduction, "reduction")
    return {"loss": mse_weight * mse + kl * kl_weight * kl_mean, "mse": mse, "kl": kl_mean}


# --- PCA (Table III) -------------------------------------------------------------------------------------------------


class PCALevel(nn.Module):
    """Principal components "by channel" (section IV-B3): the same linear maps of channel vectors at every pixel."""

    def __init__(self, channels: int, latent: int):
        super().__init__()
        # parameters, though not learnt by gradients: they count as weights of the deployed network
        self.components = nn.Parameter(torch.eye(latent, channels), requires_grad=False)  # orthonormal rows
        self.mean = nn.Parameter(torch.zeros(channels), requires_grad=False)

    def fit(self, chunks: Iterable[Tensor]) -> None:
        """By scikit-learn's incremental PCA, on channel vectors that come as chunks (M, C), each with M >= latent."""
        from sklearn.decomposition import IncrementalPCA

        pca = IncrementalPCA(len(self.components))
        for chunk in chunks:
            pca.partial_fit(chunk.double().cpu().numpy())
        self.components.copy_(torch.from_numpy(pca.components_))
        self.mean.copy_(torch.from_numpy(pca.mean_))

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, latent, H, W)."""
        return torch.einsum("lc,bchw->blhw", self.components, x - self.mean.view(1, -1, 1, 1))

    def decode(self, z: Tensor) -> Tensor:
        """(B, latent, H, W) -> (B, C, H, W)."""
        return torch.einsum("lc,blhw->bchw", self.components, z) + self.mean.view(1, -1, 1, 1)


# --- All levels ------------------------------------------------------------------------------------------------------


class Level(nn.Module):
    """A codec (None: features are only centred) of standardised features; `shape` (C, H, W) is that of a map."""

    def __init__(self, codec: ResVAE | PCALevel | None, shape: Shape):
        super().__init__()
        self.codec = codec
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(shape[0], 1, 1))

    def fit_standardisation(self, x: Tensor) -> None:
        """From (N, C, H, W) of any float type: the mean of each channel and place, and each channel's deviation from
        it. A channel that does not vary is only centred."""
        mean = sum(part.double().sum(0) for part in x.split(CHUNK)) / len(x)
        squares = sum((part.double() - mean).square().sum((0, 2, 3)) for part in x.split(CHUNK))
        deviation = (squares[:, None, None] / (x.numel() / x.shape[1])).sqrt()
        if not deviation.isfinite().all():
            raise ValueError("the features hold NaN or infinite values (beyond fp16?): look at the diffusion model")
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 1e-6, deviation, 1))

    def standardise(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in the features' units -> float32, mean 0 at each place and variance 1 per channel."""
        return (x.float() - self.mean) / self.deviation

    def encode(self, x: Tensor) -> Tensor:
        return self.codec.encode(self.standardise(x)).float() if self.codec else x.float() - self.mean

    def decode(self, z: Tensor) -> Tensor:
        return self.codec.decode(z.float()).float() * self.deviation if self.codec else z.float()


class Compressor(nn.Module):
    """Features to latents (section III-B) and back ("feature mapping" by fixed parameters, section III-C); frozen and
    in evaluation mode, also inside a network that trains."""

    def __init__(self, levels: Iterable[Level]):
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Compressor":
        return super().train(False)

    def encode(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Per level a map (B, C_k, H_k, W_k) -> (B, C_k / ratio, H_k, W_k) float32."""
        return [level.encode(x) for level, x in zip(self.levels, maps, strict=True)]

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Per level (B, C_k, H_k, W_k) float32, differences from the mean map in the features' units."""
        return [level.decode(z) for level, z in zip(self.levels, latents, strict=True)]


def feature_shapes(settings: CompressionSettings) -> list[Shape]:
    """(C_k, H_k, W_k) of the features of one image, finest first."""
    times, side = len(settings.timesteps) if settings.combine == "concat" else 1, settings.ddpm.size
    return [(times * c, side >> k, side >> k) for k, c in enumerate(settings.ddpm.channels)]


def build_compressor(settings: CompressionSettings, shapes: Sequence[Shape]) -> Compressor:
    """Not fitted yet, for maps of these shapes. ValueError: unknown method, a ratio that does not divide channels."""
    if settings.method not in METHODS:
        raise ValueError(f"unknown method {settings.method!r}: use one of {', '.join(METHODS)}")
    if settings.method == "none":
        return Compressor(Level(None, shape) for shape in shapes)
    channels = [shape[0] for shape in shapes]
    if settings.ratio < 1 or any(width % settings.ratio for width in channels):
        raise ValueError(f"ratio {settings.ratio} does not divide the channels {channels}: use one that does")
    codec = ResVAE if settings.method == "resvae" else PCALevel
    return Compressor(Level(codec(shape[0], shape[0] // settings.ratio), shape) for shape in shapes)
