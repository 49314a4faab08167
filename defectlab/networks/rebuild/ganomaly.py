"""GANomaly: Akcay, Atapour-Abarghouei, Breckon, "GANomaly: Semi-Supervised Anomaly Detection via Adversarial Training",
ACCV 2018, arXiv 1805.06725: networks, losses, score. Section numbers were not checked.

An image is encoded, decoded, and its reconstruction encoded again. The latent vectors of a good image and of its
reconstruction agree; where the decoder has not learnt to draw what the encoder saw, their distance is the score.

Ours: generator and discriminator learn in the same step and not in turns (neither is moved by the other's loss, and
Adam treats each parameter alone); the discriminator never starts anew (official code: when its loss vanishes); images
larger than a patch are judged by windows, by the worst of them; the map is |x - x'|, as later papers have it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from defectlab.networks.rebuild.base import Normal, at_map_size, crops, over_windows
from defectlab.precision import at_least_float32, check_uint8


@dataclass(frozen=True)
class GANomalySettings:
    """The official code's networks, half as wide, on patches of 64 px."""

    model: ClassVar[str] = "ganomaly"
    version: ClassVar[int] = 1

    dataset: str = "aitex"
    size: int = 256
    patch: int = 64  # px a side: 8, 16, 32, ...; the paper has 32 (CIFAR-10) and 64 (X-ray)
    stride: int = 32  # px between windows at test; ours
    width: int = 32  # channels of the first layer, doubled with each halving; official code: 64
    latent: int = 100  # official code
    weights: tuple[float, float, float] = (1.0, 50.0, 1.0)  # section 4: adversarial, contextual, encoder
    draws: int = 2048  # patches an epoch; ours, as the epochs: the official code has 15, of all images
    epochs: int = 10
    batch: int = 32  # official code: 64
    learning_rate: float = 0.0005  # ours, for few steps: section 4 has 0.0002, and 0.5 as Adam's first beta
    precision: str = "bf16"  # where the device is fast at it


# --- Section 3.2: networks, as in DCGAN -------------------------------------------------------------------------------


def halvings(patch: int) -> int:
    """How often a patch is halved until 4 px are left."""
    steps = (patch // 4).bit_length() - 1
    if steps < 1 or patch != 4 << steps:
        raise ValueError(f"patches must have 8, 16, 32, 64, ... px a side, got {patch}")
    return steps


def encoder(
    patch: int, width: int, outputs: int, colours: int = 3, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Sequential:
    """Images (B, colours, patch, patch) -> (B, outputs, 1, 1); before its last layer (B, width patch / 8, 4, 4)."""
    layers: list[nn.Module] = [nn.Conv2d(colours, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for _ in range(1, halvings(patch)):
        width *= 2
        layers += [nn.Conv2d(width // 2, width, 4, 2, 1, bias=False), norm(width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(width, outputs, 4, bias=False))


def decoder(patch: int, width: int, latent: int, colours: int = 3) -> nn.Sequential:
    """(B, latent, 1, 1) -> images (B, colours, patch, patch) in -1..1."""
    width *= patch // 8
    layers: list[nn.Module] = [nn.ConvTranspose2d(latent, width, 4, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(1, halvings(patch)):
        width //= 2
        layers += [nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, colours, 4, 2, 1, bias=False), nn.Tanh())


def initialise(layer: nn.Module) -> None:
    """DCGAN's random weights (official code)."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1, 0.02)


# --- Section 3.3: losses ----------------------------------------------------------------------------------------------


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean square: of features the adversarial loss, of latent vectors the encoder loss (official code; paper: L2)."""
    return F.mse_loss(at_least_float32(a), at_least_float32(b))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logits of images and of reconstructions -> binary cross-entropy, the mean of both halves."""
    return (F.softplus(-at_least_float32(real)).mean() + F.softplus(at_least_float32(fake)).mean()) / 2


# --- The method -------------------------------------------------------------------------------------------------------


class GANomaly(Normal):
    """ValueError for patches that are no power of two or, once images come, larger than they are."""

    def __init__(self, settings: GANomalySettings):
        super().__init__()
        self.settings = settings
        patch, width, latent = settings.patch, settings.width, settings.latent
        self.encoder, self.again = (encoder(patch, width, latent) for _ in range(2))
        self.decoder = decoder(patch, width, latent)
        *features, self.classifier = encoder(patch, width, 1)  # the discriminator
        self.features = nn.Sequential(*features)
        self.apply(initialise).to(memory_format=torch.channels_last)

    def loss(self, prepared: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        patches = to_signs(crops(prepared, self.settings.patch, generator))
        latent = self.encoder(patches)
        rebuilt = self.decoder(latent)
        real, fake = self.features(patches), self.features(rebuilt.detach())
        constant = {name: value.detach() for name, value in self.features.named_parameters()}
        matched = functional_call(self.features, constant, rebuilt)  # as `fake`, with the generator's gradient alone
        terms = {
            "adversarial": squared(matched, real.detach()),
            "contextual": F.l1_loss(at_least_float32(rebuilt), patches),
            "encoder": squared(self.again(rebuilt), latent),
        }
        loss = sum(weight * term for weight, term in zip(self.settings.weights, terms.values(), strict=True))
        terms["discriminator"] = discriminator_loss(self.classifier(real), self.classifier(fake))
        return {"loss": loss + terms["discriminator"], **terms}

    def maps(self, prepared: Tensor) -> Tensor:
        def of(windows: Tensor) -> Tensor:
            return (self.decoder(self.encoder(windows)).float() - windows).abs().mean(1)

        return at_map_size(over_windows(to_signs(prepared), self.settings.patch, self.settings.stride, of))

    def scores(self, prepared: Tensor, maps: Tensor) -> Tensor:
        """The largest latent distance of each image's windows (official code: mean square; the paper: L1)."""
        distances = []

        def of(windows: Tensor) -> Tensor:
            latent = self.encoder(windows)
            distances.append((self.again(self.decoder(latent)) - latent).float().square().mean((1, 2, 3)))
            return windows[:, 0]  # no map is needed

        over_windows(to_signs(prepared), self.settings.patch, self.settings.stride, of)
        return torch.cat(distances).view(-1, len(prepared)).amax(0)


def to_signs(images: Tensor) -> Tensor:
    """uint8 -> float32 in -1..1. ValueError for any other kind."""
    check_uint8(images)
    return images.float() / 127.5 - 1
