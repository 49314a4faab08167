"""Stage one: segmentation by a U-shaped network with an adaptive multi-scale attention module (section 3.1).

Guo, Lv, Machines 13(8), 712 (2025), doi 10.3390/machines13080712: Table 1, Figures 1 to 3, and the recipe of section
4.1. No code and no nut masks were published. Deviations and readings:

- ResNet-18 in place of ResNet-50 by default; its layer 4 starts at random (`load_encoder`).
- The text (dilation, output stride 16) and Table 1 (strides 2, 4, 8, 16 with 64, 128, 256, 512 channels) describe two
  encoders. Both are here: `layout`. Table 1 is a ResNet-18 or 34 without stem max-pool; no ResNet-50 has its channels.
- The formula of AMAM multiplies F_in and the sigmoid map as matrices; here element by element, as a gate does. The
  text names self-attention instead: `attention="self"`.
- Where the text is silent (widths of AMAM's paths, order of a depthwise separable convolution, where skips join, the
  convolutions of a decoder layer), the choice is marked "ours".
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.ops import Conv2dNormActivation

from defectlab.networks.segmentation import (
    AttentionGate,
    DilatedDepthwise,
    SegmentationSettings,
    Segmenter,
    build_comparator,
    load_encoder,
)


@dataclass(frozen=True)
class Settings(SegmentationSettings):
    """The common recipe and what the paper's network adds; the defaults are its full model."""

    model: ClassVar[str] = "amam_segmentation"
    version: ClassVar[int] = 1

    network: str = "amam"
    layout: str = "text"  # paper section 3.1.1: dilated, output stride 16; or "table1"
    dilations: tuple[int, ...] = (4, 8, 12, 16)  # paper section 3.1.2, Table 2
    decoder: bool = True  # paper Table 5; False: a 1x1 head on the last map
    skips: str = "gates"  # paper section 3.1.3; "none", "plain" or "all_gates" in Table 5
    amam: bool = True  # paper Tables 5 and 6
    attention: str = "gate"  # paper section 3.1.2, formula; or "self", its text


# --- 3.1.2 Adaptive multi-scale attention module ---------------------------------------------------------------------

WIDEST = 512  # paper Table 1: channels of AMAM; ours: wider encoders are reduced to it


class SeparableDilation(nn.Sequential):
    """One ReLU(BN(Conv)) of F2..F5: a dilated 3x1 or 1x3 convolution, depthwise separable: depthwise, then 1x1, one
    norm and ReLU at the end (ours; the paper names no order)."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], dilation: int):
        padding = tuple(dilation * (k // 2) for k in kernel)
        super().__init__(
            DilatedDepthwise(inputs, inputs, kernel, padding=padding, dilation=dilation, groups=inputs, bias=False),
            Conv2dNormActivation(inputs, outputs, 1),
        )


class AMAM(nn.Module):
    """Adaptive multi-scale attention module (section 3.1.2, Figure 2 and the formulas F1..F6, F_out).

    Six paths over the same map: a 1x1 convolution; factorised 3x3 convolutions (3x1, then 1x3) at four dilations;
    global average pooling; each a quarter as wide as the input (ours). Their concatenation passes a 3x3 convolution,
    also depthwise separable ("standard convolutions are replaced"), whose sigmoid gates the module's input. With
    attention "self" one multi-head self-attention of the fused map is added to the input instead.
    """

    def __init__(self, channels: int, dilations: tuple[int, ...] = (4, 8, 12, 16), attention: str = "gate"):
        super().__init__()
        if attention not in ("gate", "self"):
            raise ValueError(f"unknown attention {attention!r}: use gate or self")
        width = channels // 4
        self.point = Conv2dNormActivation(channels, width, 1)  # F1
        self.dilated = nn.ModuleList(  # F2..F5
            nn.Sequential(SeparableDilation(channels, width, (3, 1), d), SeparableDilation(width, width, (1, 3), d))
            for d in dilations
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), Conv2dNormActivation(channels, width, 1))  # F6
        paths = width * (len(dilations) + 2)
        self.fuse = nn.Sequential(
            nn.Conv2d(paths, paths, 3, padding=1, groups=paths, bias=False), nn.Conv2d(paths, channels, 1)
        )
        self.attention = nn.MultiheadAttention(channels, 8, batch_first=True) if attention == "self" else None

    def fused(self, x: Tensor) -> Tensor:
        """Conv3x3 of F1 to F6 concatenated, of which the sigmoid is taken: (B, C, H, W)."""
        paths = [self.point(x), *(path(x) for path in self.dilated), self.pooled(x).expand(-1, -1, *x.shape[-2:])]
        return self.fuse(torch.cat(paths, 1))

    def forward(self, x: Tensor) -> Tensor:
        """F_in (B, C, H, W) -> F_out of the same shape."""
        fused = self.fused(x)
        if self.attention is None:
            return x * fused.sigmoid()
        tokens = fused.flatten(2).transpose(1, 2)  # (B, H W, C)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[-2:])


# --- 3.1.3 Gate attention module -------------------------------------------------------------------------------------


class GateAttention(AttentionGate):
    """Figure 3: "coarse-scale features" gate the skip's "fine-scale features", with a ReLU inside. Without a formula in
    the paper, it is Attention U-Net's gate (ours)."""


class LowestSkip(nn.Module):
    """ "Only 1x1 convolution" on the lowest skip, to at most 256 channels (ours), without a gate."""

    def __init__(self, fine: int):
        super().__init__()
        self.outputs = min(fine, WIDEST // 2)
        self.convolution = Conv2dNormActivation(fine, self.outputs, 1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.convolution(x)


# --- 3.1.1 Architecture ----------------------------------------------------------------------------------------------

DECODER_WIDTHS = {  # of the four decoder layers
    "text": (256, 128, 64, 32),  # ours: Table 1's, but for the last, which the text does not give
    "table1": (256, 128, 64, 3),  # paper Table 1, its three channels before the output as printed
}
SKIPS = ("none", "plain", "all_gates", "gates")


class DecoderLayer(nn.Module):
    """Doubles the resolution, "Upsampling + Convolution" in Table 1: a 3x3 convolution, bilinear upsampling, another.

    Ours: the skip is concatenated at the input's resolution, so that each of the four layers has one (Table 5: "skip
    connections to the four convolutional layers in the decoder").
    """

    def __init__(self, inputs: int, fine: int, outputs: int, skips: str, lowest: bool):
        super().__init__()
        self.skip = None
        if skips == "gates" and lowest:
            self.skip = LowestSkip(fine)
            fine = self.skip.outputs
        elif skips in ("gates", "all_gates"):
            self.skip = GateAttention(fine, inputs)
        self.joins = skips != "none"
        self.before = Conv2dNormActivation(inputs + fine * self.joins, outputs, 3)
        self.after = Conv2dNormActivation(outputs, outputs, 3)

    def forward(self, x: Tensor, fine: Tensor) -> Tensor:
        """x (B, C, H, W) and the encoder's map (B, D, H, W) -> (B, C', 2 H, 2 W)."""
        if self.joins:
            x = torch.cat([x, self.skip(fine, x) if self.skip else fine], 1)
        return self.after(interpolate(self.before(x), scale_factor=2, mode="bilinear"))


class UShapedNetwork(nn.Module):
    """Figure 1: encoder, AMAM at the bottom, four decoder layers with skips, a 1x1 convolution.

    "text": skips from the stem (stride 2) and layers 1 to 3 (4, 8, 16), AMAM on layer 4 (16, by dilation).
    "table1": no max-pool after the stem; skips from layers 1 to 4 (strides 2, 4, 8, 16), AMAM on layer 4.
    Image sides are multiples of 16 px. Without decoder ("Baseline" of Table 5): the 1x1 convolution on the last map.
    """

    def __init__(self, settings: Settings):
        from segmentation_models_pytorch.base import initialization  # slow to import

        super().__init__()
        if settings.layout not in DECODER_WIDTHS:
            raise ValueError(f"unknown layout {settings.layout!r}: use one of {', '.join(DECODER_WIDTHS)}")
        if settings.skips not in SKIPS:
            raise ValueError(f"unknown skips {settings.skips!r}: use one of {', '.join(SKIPS)}")
        if not settings.decoder and settings.skips != "none":
            raise ValueError(f'skips {settings.skips!r} need a decoder: use "none" without one')
        by_table = settings.layout == "table1"
        self.encoder = load_encoder(settings.encoder, 32 if by_table else 16)
        if by_table:
            self.encoder.maxpool = nn.Identity()
        self.first = 2 if by_table else 1  # of the encoder's maps, that of the first skip
        channels = self.encoder.out_channels
        bottom = min(channels[-1], WIDEST)
        self.reduce = Conv2dNormActivation(channels[-1], bottom, 1) if channels[-1] > WIDEST else nn.Identity()
        self.amam = AMAM(bottom, settings.dilations, settings.attention) if settings.amam else nn.Identity()
        self.decoder, inputs = nn.ModuleList(), bottom
        if settings.decoder:
            fine = channels[self.first : self.first + 4][::-1]
            for level, outputs in enumerate(DECODER_WIDTHS[settings.layout]):
                self.decoder.append(DecoderLayer(inputs, fine[level], outputs, settings.skips, lowest=level == 0))
                inputs = outputs
        self.head = nn.Conv2d(inputs, 1, 1)
        for part in (self.reduce, self.amam, self.decoder):
            initialization.initialize_decoder(part)  # ours: as the comparators' decoders
        initialization.initialize_head(self.head)

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """Float images (B, 3, S, S) -> the output of every layer by name, in the order of Table 1: "encoder 1" ...,
        "amam", "decoder 1" ..., "output", the logits (B, 1, S, S)."""
        size = x.shape[-2:]
        if any(side % 16 for side in size):
            raise ValueError(f"images of {size[0]} x {size[1]} px do not halve four times: use a multiple of 16")
        encoded = self.encoder(x)[self.first :]
        found = {f"encoder {i}": m for i, m in enumerate(encoded, 1)}
        x = found["amam"] = self.amam(self.reduce(encoded[-1]))
        for i, layer in enumerate(self.decoder):
            x = found[f"decoder {i + 1}"] = layer(x, encoded[3 - i])
        logits = self.head(x)
        found["output"] = logits if self.decoder else interpolate(logits, size, mode="bilinear")
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)["output"]


def build(settings: SegmentationSettings) -> Segmenter:
    """uint8 images -> logits: the paper's network for `Settings`, else the comparator that the settings name."""
    if isinstance(settings, Settings):
        return Segmenter(UShapedNetwork(settings))
    return Segmenter(build_comparator(settings.network, settings.encoder))
