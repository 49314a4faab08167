"""Convolutional autoencoders with an L2 or an SSIM loss: Bergmann, Löwe, Fauser, Sattlegger, Steger, "Improving
Unsupervised Defect Segmentation by Applying Structural Similarity to Autoencoders", VISAPP 2019, arXiv 1807.02011.

A network learns to squeeze good patches through a narrow bottleneck and to rebuild them; what it cannot rebuild is the
anomaly. The paper's point is how the two are compared: pixel by pixel (L2) every slightly shifted edge stands out, so
it compares small windows by their structural similarity instead, in training and in the map.

Here: the L2 and the SSIM autoencoder of the paper, not its variational and feature matching ones. Ours: three channels
instead of one grey, a patch of any multiple of 16 px, far fewer patches, a cosine schedule, and no weight decay (the
paper: 1e-5). The paper's text was not at hand: what is marked "not checked" is from memory.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from defectlab.networks.blocks import pick
from defectlab.networks.rebuild.base import Normal, at_map_size, crops, over_windows, to_unit
from defectlab.precision import at_least_float32, check_uint8, sent

# Table 1: output channels, kernel, stride; padding is 1. A patch of 128 px ends as 64, 32, 32, 16, 16, 8, 8, 8 px
LAYERS = ((32, 4, 2), (32, 4, 2), (32, 3, 1), (64, 4, 2), (64, 3, 1), (128, 4, 2), (64, 3, 1), (32, 3, 1))
REDUCTION = 16
SLOPE = 0.2  # table 1: of LeakyReLU
SIGMA, RADIUS = 1.5, 5  # Wang et al. 2004 (SSIM); section 4.2 has windows of 11 px, their weights were not checked
# Wang et al. 2004, for values in 0..1. The paper prints c1 = 0.01 and c2 = 0.03, with no square
C1, C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class AutoencoderSettings:
    """The texture model of the paper. Section numbers were not checked."""

    model: ClassVar[str] = "autoencoder"
    version: ClassVar[int] = 1

    dataset: str = "aitex"
    size: int = 256  # section 4.2: images are scaled to 256 px before patches are cropped
    loss: str = "ssim"  # or "l2"
    patch: int = 128  # px a side, section 4.2: random crops in training, windows at test
    stride: int = 64  # px between windows at test; ours, for speed: section 4.2 has 30
    latent: int = 100  # section 4.2: of textures; 500 for the nanofibres
    draws: int = 1024  # patches an epoch; ours, as the epochs: section 4.2 has 10 000 and 200
    epochs: int = 10
    batch: int = 8  # ours, for more steps: the paper's was not checked
    learning_rate: float = 0.001  # ours, for few steps: section 4.2 has 0.0002
    precision: str = "bf16"  # where the device is fast at it


# --- Section 3.1: the network -----------------------------------------------------------------------------------------


def encoder(patch: int, latent: int) -> nn.Sequential:
    """Table 1: (B, 3, patch, patch) -> (B, latent, 1, 1); no activation after the last layer."""
    layers: list[nn.Module] = []
    before = 3
    for width, kernel, stride in LAYERS:
        layers += [nn.Conv2d(before, width, kernel, stride, 1), nn.LeakyReLU(SLOPE)]
        before = width
    return nn.Sequential(*layers, nn.Conv2d(before, latent, patch // REDUCTION))


def decoder(patch: int, latent: int) -> nn.Sequential:
    """The encoder reversed, each of its convolutions transposed: (B, latent, 1, 1) -> (B, 3, patch, patch)."""
    widths = [3] + [width for width, _, _ in LAYERS]
    layers: list[nn.Module] = [nn.ConvTranspose2d(latent, widths[-1], patch // REDUCTION)]
    for i, (width, kernel, stride) in reversed(list(enumerate(LAYERS))):
        layers += [nn.LeakyReLU(SLOPE), nn.ConvTranspose2d(width, widths[i], kernel, stride, 1)]
    return nn.Sequential(*layers)


def initialise(layer: nn.Module) -> None:
    """He et al. 2015; ours: the paper is silent, and torch's own weights take four times as many steps."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, SLOPE)
    elif isinstance(layer, nn.ConvTranspose2d):  # torch names its fans the other way
        nn.init.kaiming_normal_(layer.weight, SLOPE, "fan_out")


# --- Section 3.2: how an image and its reconstruction differ ----------------------------------------------------------


def squared_error(images: Tensor, rebuilt: Tensor) -> Tensor:
    """Equations 1-2: (B, C, H, W) twice -> (B, H, W), mean over channels."""
    return (at_least_float32(images) - at_least_float32(rebuilt)).square().mean(1)


def gaussian_matrix(length: int) -> Tensor:
    """(length, length) float64: row i holds the weights of the pixels around i, mirrored at the borders as scipy does.

    Two products of matrices filter faster on CPUs than convolutions of one channel do, their gradients above all.
    """
    steps = torch.arange(-RADIUS, RADIUS + 1)
    weights = torch.exp(-(steps.double() ** 2) / (2 * SIGMA**2))
    places = torch.arange(length)[:, None] + steps
    places = torch.where(places < 0, -1 - places, places)
    places = torch.where(places >= length, 2 * length - 1 - places, places)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).repeat(length, 1))


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Equation 8: structural similarity of images (B, C, H, W) in 0..1 in a Gaussian window of 11 px around each
    pixel, mean over channels: (B, H, W) in -1..1, 1 where they agree. Never in bf16: variances are small differences.
    """
    a, b = at_least_float32(a), at_least_float32(b)
    with torch.autocast(a.device.type, enabled=False):
        down, across = (sent(gaussian_matrix(length).to(a.dtype), a.device) for length in a.shape[-2:])
        mean_a, mean_b, squares, product = down @ torch.stack([a, b, a**2 + b**2, a * b]) @ across.mT
    square_means, mean_product = mean_a**2 + mean_b**2, mean_a * mean_b
    luminance = (2 * mean_product + C1) / (square_means + C1)
    contrast_structure = (2 * (product - mean_product) + C2) / (squares - square_means + C2)
    return (luminance * contrast_structure).mean(1)


def dissimilarity(images: Tensor, rebuilt: Tensor) -> Tensor:
    """1 - SSIM: (B, C, H, W) in 0..1 twice -> (B, H, W) in 0..2."""
    return 1 - ssim_map(images, rebuilt)


ERRORS = {"l2": squared_error, "ssim": dissimilarity}


# --- The method -------------------------------------------------------------------------------------------------------


class Autoencoder(Normal):
    """ValueError for an unknown loss, and for patches that the network cannot halve four times or images lack."""

    def __init__(self, settings: AutoencoderSettings):
        super().__init__()
        if settings.patch % REDUCTION or not 0 < settings.patch <= settings.size:
            raise ValueError(
                f"patches must be a multiple of {REDUCTION} px up to {settings.size}, got {settings.patch}"
            )
        self.settings = settings
        self.error = pick(ERRORS, settings.loss, "loss")
        self.encoder = encoder(settings.patch, settings.latent)
        self.decoder = decoder(settings.patch, settings.latent)
        self.apply(initialise)
        nn.init.constant_(self.decoder[-1].bias, 0.5)  # ours: from below 0 SSIM's gradient leads away, to SSIM 0
        self.to(memory_format=torch.channels_last)  # a third faster on CPUs with bf16

    def forward(self, patches: Tensor) -> Tensor:
        """(B, 3, patch, patch) in 0..1 -> their reconstruction, of the same shape and not limited to 0..1."""
        return self.decoder(self.encoder(patches))

    def loss(self, prepared: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        check_uint8(prepared)
        patches = to_unit(crops(prepared, self.settings.patch, generator))
        return {"loss": self.error(patches, self(patches)).mean()}

    def maps(self, prepared: Tensor) -> Tensor:
        """Section 4.2: the error in overlapping windows, averaged."""
        check_uint8(prepared)

        def of(windows: Tensor) -> Tensor:
            return self.error(windows, self(windows))

        return at_map_size(over_windows(to_unit(prepared), self.settings.patch, self.settings.stride, of))
