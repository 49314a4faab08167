"""Segmentation networks: the settings, the pretrained encoder that all share, the published comparators, the loss.

Networks of segmentation_models_pytorch, and Attention U-Net (Oktay et al. 2018, arXiv 1804.03999).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from defectlab.networks.resnet import IMAGENET_MEAN, IMAGENET_STD, base_name, load_teacher
from defectlab.precision import at_least_float32, float32_on_cpu

if TYPE_CHECKING:
    from segmentation_models_pytorch.encoders.resnet import ResNetEncoder

ENCODERS = ("resnet18", "resnet50")
OUTPUT_STRIDES = {"unet": 32, "unetpp": 32, "deeplabv3plus": 16, "pspnet": 8}  # of the library's networks' encoders
COMPARATORS = (*OUTPUT_STRIDES, "attention_unet")


@dataclass(frozen=True)
class SegmentationSettings:
    """A network and its recipe. Defaults are frozen, since records are keyed by what differs from them.

    "paper" is Guo and Lv, Machines 2025, 13, 712.
    """

    model: ClassVar[str] = "segmentation"
    version: ClassVar[int] = 1

    dataset: str = "mvtec_ad/metal_nut"  # paper section 4.1
    target: str = "nut"  # paper section 4.1 says so, its numbers fit "defect": both are run
    split: str = "paper"  # paper section 4.1: 268, 33, 34 images; "good": the good training images alone
    network: str = "unet"  # one of `COMPARATORS`
    encoder: str = "resnet18"  # ours: the available weights; paper section 3.1.1: ResNet-50
    size: int = 256  # paper Table 1, "for illustration"
    epochs: int = 400  # paper section 4.1
    batch: int = 8  # paper section 4.1
    learning_rate: float = 0.002  # paper section 4.1, cosine annealing
    betas: tuple[float, float] = (0.5, 0.999)  # paper section 4.1
    share: float = 1.0  # of the training images: paper Table 6
    equal_steps: bool = False  # ours: with a share, as many optimiser steps as with all images
    precision: str = "bf16"  # ours: where the device is fast at it, else fp32


# --- Encoder ----------------------------------------------------------------------------------------------------------


def load_encoder(name: str, output_stride: int = 32) -> ResNetEncoder:
    """A ResNet with the teacher's ImageNet weights in stem and layers 1-3; float images (B, 3, S, S) -> six maps: the
    image itself, then strides 2, 4, 8, 16, 32 (or less).

    Layer 4 starts at random, also where the weights file holds it. The pretrained norms are frozen, those of layer
    4 are ordinary ones. ValueError for an unknown encoder or output stride; errors of `load_teacher`.

    Args:
        name: "resnet18", "resnet50", or "<name>_random" (no weights, for smoke runs).
        output_stride: of the last map: 32, or 16 or 8 by dilation in place of the last one or two strides.
    """
    from segmentation_models_pytorch.encoders import get_encoder
    from timm.layers import freeze_batch_norm_2d

    architecture = base_name(name)
    if architecture not in ENCODERS:
        raise ValueError(f"no segmentation encoder {name!r}: use {', '.join(ENCODERS)}, or one of them with _random")
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output stride {output_stride} is not possible: use 8, 16 or 32")
    pretrained = load_teacher(name).requires_grad_(True)
    # weights with fused norms would give other features in train mode (see `Teacher`), and eight images are few
    freeze_batch_norm_2d(pretrained)
    encoder = get_encoder(architecture, weights=None, output_stride=output_stride)  # None: downloads nothing
    encoder.conv1, encoder.bn1 = pretrained.stem[:2]
    encoder.layer1, encoder.layer2, encoder.layer3 = pretrained.layer1, pretrained.layer2, pretrained.layer3
    if output_stride < 32:
        encoder.make_dilated(output_stride)  # once more: layer 3 is a new one
    return encoder


class Segmenter(nn.Module):
    """A network of normalised float images, from the uint8 images that the data sets hold."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) -> float32 with ImageNet's mean 0 and deviation 1, channels last in memory."""
        return ((images.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) -> foreground logits (B, S, S)."""
        return self.network(self.normalise(images))[:, 0]


# --- Comparators ------------------------------------------------------------------------------------------------------


class DilatedDepthwise(nn.Conv2d):
    """A depthwise convolution in float32 on CPUs, see `float32_on_cpu`."""

    def forward(self, x: Tensor) -> Tensor:
        return float32_on_cpu(super().forward, x)


def as_dilated_depthwise(old: nn.Conv2d) -> DilatedDepthwise:
    """The same convolution, same weights."""
    options = {"padding": old.padding, "dilation": old.dilation, "groups": old.groups, "bias": old.bias is not None}
    new = DilatedDepthwise(old.in_channels, old.out_channels, old.kernel_size, **options)
    new.load_state_dict(old.state_dict())
    return new


def build_comparator(name: str, encoder: str) -> nn.Module:
    """One of `COMPARATORS` on the encoder of this name: float images (B, 3, S, S) -> logits (B, 1, S, S).

    S is a multiple of the output stride. Raises ValueError for another name; errors of `load_encoder`.
    """
    import segmentation_models_pytorch as smp
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import SeparableConv2d

    if name == "attention_unet":
        return AttentionUNet(encoder)
    builders = {
        "unet": smp.Unet,
        "unetpp": smp.UnetPlusPlus,
        "deeplabv3plus": partial(smp.DeepLabV3Plus, encoder_output_stride=16),
        # all layers at stride 8, as published; the library's default stops after layer 2
        "pspnet": partial(smp.PSPNet, encoder_depth=5, upsampling=8, output_stride=8),
    }
    if name not in builders:
        raise ValueError(f"unknown network {name!r}: use one of {', '.join(COMPARATORS)}")
    pretrained = load_encoder(encoder, OUTPUT_STRIDES[name])
    network = builders[name](base_name(encoder), encoder_weights=None)
    network.encoder = pretrained
    for module in list(network.decoder.modules()):
        if isinstance(module, SeparableConv2d) and module[0].dilation != (1, 1):
            module[0] = as_dilated_depthwise(module[0])
    return network


class AttentionGate(nn.Module):
    """Additive attention gate (Oktay et al. 2018, section 2, equations 1-2): the coarser, decoded map weighs each place
    of the encoder's map."""

    def __init__(self, fine: int, coarse: int):
        super().__init__()
        hidden = max(fine // 2, 1)
        self.fine = nn.Conv2d(fine, hidden, 1, bias=False)
        self.coarse = nn.Conv2d(coarse, hidden, 1)
        self.score = nn.Conv2d(hidden, 1, 1)

    def coefficients(self, x: Tensor, gating: Tensor) -> Tensor:
        """Encoder map x (B, C, H, W), gating map (B, D, h, w), as large or smaller -> (B, 1, H, W), 0..1."""
        gate = self.coarse(gating)
        if gate.shape[-2:] != x.shape[-2:]:
            gate = interpolate(gate, x.shape[-2:], mode="bilinear")
        return self.score(torch.relu(self.fine(x) + gate)).sigmoid()

    def forward(self, x: Tensor, gating: Tensor) -> Tensor:
        """-> x, each place weighted: (B, C, H, W)."""
        return x * self.coefficients(x, gating)


class AttentionUNet(nn.Module):
    """Attention U-Net: the comparator "unet" with gates on its four skips."""

    def __init__(self, encoder: str):
        super().__init__()
        plain = build_comparator("unet", encoder)
        self.encoder, self.blocks, self.head = plain.encoder, plain.decoder.blocks, plain.segmentation_head
        skips = self.encoder.out_channels[-2:0:-1]  # strides 16, 8, 4, 2
        coarser = [self.encoder.out_channels[-1]] + [block.conv2[0].out_channels for block in self.blocks]
        self.gates = nn.ModuleList(AttentionGate(f, c) for f, c in zip(skips, coarser, strict=False))

    def forward(self, x: Tensor) -> Tensor:
        """Float images (B, 3, S, S) -> logits (B, 1, S, S)."""
        image, *skips, x = self.encoder(x)
        for gate, skip, block in zip(self.gates, skips[::-1], self.blocks, strict=False):
            x = block(x, *skip.shape[-2:], gate(skip, x))
        return self.head(self.blocks[-1](x, *image.shape[-2:]))


# --- Loss -------------------------------------------------------------------------------------------------------------


def segmentation_loss(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Binary cross-entropy, mean over pixels and images (paper section 4.1): 2 x (B, H, W), masks 0 or 1."""
    logits = at_least_float32(logits)
    return {"loss": binary_cross_entropy_with_logits(logits, masks.to(logits.dtype))}
