"""A small U-Net that sees colour, depth, or both: where the two are brought together, and what keeps it alive if one
fails.

The network: Ronneberger et al., "U-Net", MICCAI 2015, arXiv 1505.04597, with batch norm and padding. Gates per place,
one sensor weighed against the other: Arevalo et al., "Gated Multimodal Units", 2017, arXiv 1702.01992, here on maps.
Modality dropout: Neverova et al., "ModDrop", TPAMI 2016, arXiv 1501.00102.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defectlab.networks.blocks import two_convolutions
from defectlab.precision import sent

INPUTS = ("grey", "rgb", "depth", "early", "gated", "dropout")
SPREAD = 40.0  # steps of disparity that stand for 1; ours: a pothole is 20 to 100 deep
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class SensorSettings:
    """A U-Net and its recipe. All is ours."""

    model: ClassVar[str] = "second_sensor"
    version: ClassVar[int] = 1

    dataset: str = "road_depth"
    split: str = "session_2"  # that the training sees; the others are tested on
    inputs: str = "early"  # one of `INPUTS`; "dropout": early, but now and then one sensor is missing in training
    widths: tuple[int, ...] = (8, 16, 32, 64)  # channels at full size, at half, at a quarter ...
    missing: float = 0.25  # of "dropout": chance that an image lacks its depth, and that it lacks its colour
    draws: int = 64  # images an epoch, with repetition
    epochs: int = 20
    batch: int = 4
    learning_rate: float = 0.002  # cosine
    precision: str = "bf16"


class Encoder(nn.Module):
    """(B, C, H, W) -> maps at full size, half, a quarter ..., H and W multiples of 2^(len(widths) - 1)."""

    def __init__(self, inputs: int, widths: tuple[int, ...]):
        super().__init__()
        self.blocks = nn.ModuleList(two_convolutions(a, b) for a, b in zip((inputs, *widths), widths, strict=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for i, one in enumerate(self.blocks):
            x = one(F.max_pool2d(x, 2) if i else x)
            found.append(x)
        return found


class Decoder(nn.Module):
    """Maps of an encoder -> logits (B, H, W)."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.blocks = nn.ModuleList(
            two_convolutions(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        *skips, x = maps
        for one, skip in zip(self.blocks, skips[::-1], strict=True):
            x = one(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return self.head(x)[:, 0]


class Gate(nn.Module):
    """Two maps (B, C, H, W) -> their mean, weighed at each place by what both show."""

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Conv2d(2 * width, 1, 1)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        weight = self.score(torch.cat([one, other], 1)).sigmoid()  # (B, 1, H, W)
        return weight * one + (1 - weight) * other


class SensorNet(nn.Module):
    """Colour uint8 (B, 3, H, W) and depth int16 (B, 1, H, W) -> logits (B, H, W). ValueError for unknown inputs."""

    def __init__(self, settings: SensorSettings):
        super().__init__()
        self.inputs, self.missing = settings.inputs, settings.missing
        if self.inputs not in INPUTS:
            raise ValueError(f"unknown inputs {self.inputs!r}: use one of {', '.join(INPUTS)}")
        channels = {"grey": 1, "rgb": 3, "depth": 1, "gated": 3}.get(self.inputs, 4)
        self.encoder = Encoder(channels, settings.widths)
        if self.inputs == "gated":
            self.of_depth = Encoder(1, settings.widths)
            self.gates = nn.ModuleList(map(Gate, settings.widths))
        self.decoder = Decoder(settings.widths)

    def forward(self, images: Tensor, depth: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`generator`: decides, in training with dropout, which sensor an image lacks."""
        colour, deep = standardised(images), levelled(depth)
        if self.inputs == "dropout" and generator is not None:
            chance = sent(torch.rand(len(images), 1, 1, 1, generator=generator), images.device)
            deep = deep * (chance >= self.missing)
            colour = colour * (chance < 1 - self.missing)
        if self.inputs == "gated":
            maps = [
                gate(a, b) for gate, a, b in zip(self.gates, self.encoder(colour), self.of_depth(deep), strict=True)
            ]
        else:
            seen = {"grey": _grey(colour), "rgb": colour, "depth": deep}.get(self.inputs)
            maps = self.encoder(torch.cat([colour, deep], 1) if seen is None else seen)
        return self.decoder(maps)


def _grey(colour: Tensor) -> Tensor:
    weights = sent(torch.tensor(GREY, dtype=colour.dtype).view(3, 1, 1), colour.device)
    return (colour * weights).sum(1, keepdim=True)


def standardised(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> mean 0 and deviation 1 in each image."""
    x = images.float()
    mean, spread = (f(dim=(1, 2, 3), keepdim=True) for f in (x.mean, x.std))
    return (x - mean) / spread.clamp(min=1.0)


def levelled(depth: Tensor) -> Tensor:
    """Disparity (B, 1, H, W), 0 where unknown -> height over the image's median, in units of `SPREAD`, at most 3 either
    way; unknown places, and images without any, are 0, as the road is."""
    x = depth.float()
    known = x > 0
    flat = x.masked_fill(~known, torch.nan).flatten(1)
    median = flat.nanmedian(1).values.nan_to_num().view(-1, 1, 1, 1)
    return torch.where(known, (x - median) / SPREAD, 0.0).clamp(-3, 3)
