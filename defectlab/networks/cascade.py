"""Two encoder-decoders in a row, the second to correct the first, and one of as many parameters beside them.

After Tao, Zhang, Ma, Liu and Xu, "Automatic Metallic Surface Defect Detection and Recognition with Convolutional Neural
Networks", Appl. Sci. 2018, 8(9), 1575: the cascaded autoencoder CASAE. At hand were its abstract and a reader's notes,
not its text. From these: two networks of one form, encoder, decoder and skips between them, some of the convolutions
atrous; the mask that the first predicts is what the second sees; cross-entropy that weighs the pixels of defects more.
Ours: the widths, batch norm, where the atrous convolutions stand and their rates, a sigmoid in place of a softmax of
two classes, both networks trained together, the weight, and a first guess of 1 % everywhere: pits are 0.4 % of the
pixels, and from a guess of 50 % a short training only learns that defects are rare. The paper's second part, which
names each defect's class, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from defectlab.networks.second_sensor import Decoder, Encoder, standardised
from defectlab.precision import at_least_float32, float32_on_cpu

NETWORKS = ("cascade", "single")
SECOND_SEES = ("mask", "mask_and_image")
PRIOR = 0.01  # probability of a defect that an untrained network gives (Lin et al., ICCV 2017, section 4.1)
RATES = (2, 4)  # of the atrous convolutions, at the coarsest map; ours


@dataclass(frozen=True)
class CascadeSettings:
    """A network and its recipe."""

    model: ClassVar[str] = "cascade"
    version: ClassVar[int] = 1

    dataset: str = "bsdata"  # one of `data.marked.SPLITS`; the paper's own images are not public
    split: str = "zones"  # one of those of the set
    size: int = 160  # px, height of the images: ours
    network: str = "cascade"  # one of `NETWORKS`
    second_sees: str = "mask"  # as in the paper; or "mask_and_image", ours
    widths: tuple[int, ...] = (8, 16, 32, 64)  # of each network of the cascade, at full size, at half ...: ours
    defect_weight: float = 4.0  # of a defect's pixel in the loss, another's is 1; the paper weighs, the number is ours
    epochs: int = 40  # ours, as all that follows
    batch: int = 4
    learning_rate: float = 0.002  # cosine
    share: float = 1.0  # of the labelled images
    equal_steps: bool = False  # with a share, as many optimiser steps as with all images
    precision: str = "bf16"


class EncoderDecoder(nn.Module):
    """(B, inputs, H, W) -> logits (B, H, W); H and W multiples of 2^(len(widths) - 1)."""

    def __init__(self, inputs: int, widths: tuple[int, ...]):
        super().__init__()
        self.encoder, self.decoder, width = Encoder(inputs, widths), Decoder(widths), widths[-1]
        layers: list[nn.Module] = []
        for rate in RATES:
            atrous = nn.Conv2d(width, width, 3, padding=rate, dilation=rate, bias=False)
            layers += [atrous, nn.BatchNorm2d(width), nn.ReLU()]
        self.atrous = nn.Sequential(*layers)
        nn.init.constant_(self.decoder.head.bias, -math.log(1 / PRIOR - 1))

    def forward(self, x: Tensor) -> Tensor:
        *skips, x = self.encoder(x)
        return self.decoder([*skips, float32_on_cpu(self.atrous, x)])  # in bf16 gradients of atrous ones came out NaN


class CascadeNet(nn.Module):
    """uint8 images (B, 3, H, W) -> logits of a defect: in training (B, stages, H, W), of each stage, so that each can
    be compared with the mask; else (B, H, W), of the last.

    ValueError for an unknown network, or for something else that the second may see.
    """

    def __init__(self, settings: CascadeSettings):
        super().__init__()
        for name, choices in (("network", NETWORKS), ("second_sees", SECOND_SEES)):
            if (value := getattr(settings, name)) not in choices:
                raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")
        self.with_image = settings.second_sees == "mask_and_image"
        inputs = (3, 4 if self.with_image else 1)
        widths = settings.widths
        if settings.network == "single":
            widths, inputs = equal_widths(widths, inputs), inputs[:1]
        self.stages = nn.ModuleList(EncoderDecoder(channels, widths) for channels in inputs)

    def logits(self, images: Tensor) -> list[Tensor]:
        """uint8 images (B, 3, H, W) -> logits (B, H, W) of each stage. A later stage's loss reaches an earlier one."""
        seen = image = standardised(images).contiguous(memory_format=torch.channels_last)
        found: list[Tensor] = []
        for stage in self.stages:
            found.append(stage(seen))
            mask = found[-1].sigmoid()[:, None]
            seen = torch.cat([mask, image], 1) if self.with_image else mask
        return found

    def forward(self, images: Tensor) -> Tensor:
        found = self.logits(images)
        return torch.stack(found, 1) if self.training else found[-1]


def equal_widths(widths: tuple[int, ...], inputs: tuple[int, ...]) -> tuple[int, ...]:
    """Widths of one network whose parameters are nearest to those of several of `widths`, with so many inputs each:
    all times one factor, rounded to even numbers."""

    def count(channels: int, of: tuple[int, ...]) -> int:
        with torch.device("meta"):  # counted, not made
            return sum(p.numel() for p in EncoderDecoder(channels, of).parameters())

    wanted = sum(count(channels, widths) for channels in inputs)
    # parameters grow nearly with the square of the widths
    factors = [math.sqrt(len(inputs)) * (1 + step / 200) for step in range(-20, 21)]
    candidates = dict.fromkeys(tuple(2 * round(width * factor / 2) for width in widths) for factor in factors)
    return min(candidates, key=lambda of: abs(count(inputs[0], of) - wanted))


def cascade_loss(logits: Tensor, masks: Tensor, defect_weight: float) -> dict[str, Tensor]:
    """Weighted binary cross-entropy of each stage: logits (B, stages, H, W), masks (B, H, W) 0 or 1.

    A pixel of a defect counts `defect_weight` times. Means over pixels and images; "loss" is the sum over the stages;
    of two stages, "first" and "last" are its parts.
    """
    logits = at_least_float32(logits)
    truth = masks[:, None].to(logits.dtype).expand_as(logits)
    pixels = binary_cross_entropy_with_logits(logits, truth, 1 + (defect_weight - 1) * truth, reduction="none")
    stages = pixels.mean((0, 2, 3))
    parts = {"first": stages[0], "last": stages[-1]} if len(stages) > 1 else {}
    return {"loss": stages.sum()} | parts
