"""The published networks that segmentation is compared with, all on the same encoder (`load_encoder`).

U-Net (Ronneberger et al., MICCAI 2015), U-Net++ (Zhou et al., TMI 2020), DeepLabV3+ (Chen et al., ECCV 2018) and PSPNet
(Zhao et al., CVPR 2017) are those of segmentation-models-pytorch; Attention U-Net (Oktay et al., MIDL 2018) is its
U-Net with gates on the skips.
"""

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.decoders.deeplabv3.decoder import SeparableConv2d
from torch import Tensor, nn
from torch.nn.functional import interpolate

from defectlab.anomaly.teacher import base_name
from defectlab.segmentation.encoder import DilatedDepthwise, load_encoder


class AttentionGate(nn.Module):
    """Additive attention gate (Oktay et al. 2018, section 2, equations 1-2).

    A place of the encoder's map passes as far as it agrees with what the coarser, decoded map says about it.
    """

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
    """Attention U-Net: the U-Net next to it in every part but the gates on its four skips."""

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


def deeplabv3plus(encoder: str) -> nn.Module:
    network = smp.DeepLabV3Plus(encoder, encoder_weights=None, encoder_output_stride=16)
    for module in list(network.decoder.modules()):
        if isinstance(module, SeparableConv2d) and module[0].dilation != (1, 1):
            module[0] = as_dilated_depthwise(module[0])
    return network


def as_dilated_depthwise(old: nn.Conv2d) -> DilatedDepthwise:
    """The same convolution, same weights; see `DilatedDepthwise`."""
    options = {"padding": old.padding, "dilation": old.dilation, "groups": old.groups, "bias": old.bias is not None}
    new = DilatedDepthwise(old.in_channels, old.out_channels, old.kernel_size, **options)
    new.load_state_dict(old.state_dict())
    return new


def pspnet(encoder: str) -> nn.Module:
    """With all layers at stride 8, as published; the library's default stops after layer 2."""
    return smp.PSPNet(encoder, encoder_weights=None, encoder_depth=5, upsampling=8, output_stride=8)


def unet(encoder: str) -> nn.Module:
    return smp.Unet(encoder, encoder_weights=None)


def unetplusplus(encoder: str) -> nn.Module:
    return smp.UnetPlusPlus(encoder, encoder_weights=None)


LIBRARY = {  # network, the output stride of its encoder
    "unet": (unet, 32),
    "unetpp": (unetplusplus, 32),
    "deeplabv3plus": (deeplabv3plus, 16),
    "pspnet": (pspnet, 8),
}
COMPARATORS = (*LIBRARY, "attention_unet")


def build_comparator(name: str, encoder: str) -> nn.Module:
    """One of `COMPARATORS` on the encoder of this name: float images (B, 3, S, S) -> logits (B, 1, S, S).

    S is a multiple of the output stride. Raises ValueError for another name; errors of `load_encoder`.
    """
    if name == "attention_unet":
        return AttentionUNet(encoder)
    if name not in LIBRARY:
        raise ValueError(f"unknown network {name!r}: use one of {', '.join(COMPARATORS)}")
    make, output_stride = LIBRARY[name]
    pretrained = load_encoder(encoder, output_stride)
    network = make(base_name(encoder))
    network.encoder = pretrained
    return network
