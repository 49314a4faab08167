"""What all segmentation networks share: the pretrained encoder, and the way from uint8 images to logits."""

import torch
from segmentation_models_pytorch.encoders import get_encoder
from segmentation_models_pytorch.encoders.resnet import ResNetEncoder
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from defectlab.anomaly.teacher import IMAGENET_MEAN, IMAGENET_STD, base_name, load_teacher

ENCODERS = ("resnet18", "resnet50")


def load_encoder(name: str, output_stride: int = 32) -> ResNetEncoder:
    """A ResNet with the teacher's ImageNet weights in stem and layers 1-3; layer 4 starts at random.

    So it is for every network and every weights file, also one that holds layer 4: all are treated alike, and the file
    at hand has no layer 4. The pretrained norms are frozen (`freeze_norms`), those of layer 4 are ordinary ones.

    Args:
        name: "resnet18", "resnet50", or "<name>_random" (no weights, for smoke runs).
        output_stride: of the last map: 32, or 16 or 8 by dilation in place of the last one or two strides.

    Returns:
        Encoder of float images (B, 3, S, S): six maps, the image itself, then strides 2, 4, 8, 16, 32 (or less).

    Raises:
        ValueError: an unknown encoder or output stride. WeightsError: weights that are missing or do not fit.
    """
    architecture = base_name(name)
    if architecture not in ENCODERS:
        raise ValueError(f"no segmentation encoder {name!r}: use {', '.join(ENCODERS)}, or one of them with _random")
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output stride {output_stride} is not possible: use 8, 16 or 32")
    pretrained = load_teacher(name).requires_grad_(True)
    freeze_norms(pretrained)
    encoder = get_encoder(architecture, weights=None, output_stride=output_stride)  # None: downloads nothing
    encoder.conv1, encoder.bn1 = pretrained.stem[:2]
    encoder.layer1, encoder.layer2, encoder.layer3 = pretrained.layer1, pretrained.layer2, pretrained.layer3
    if output_stride < 32:
        encoder.make_dilated(output_stride)  # once more: layer 3 is a new one
    return encoder


def freeze_norms(module: nn.Module) -> None:
    """Turn every batch norm inside `module` into a fixed affine map, in place.

    Weights with folded norms (running mean 0 and variance 1 by construction, as in the file at hand) would compute
    something else in train mode, and eight images are few for statistics.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_norms(child)


class DilatedDepthwise(nn.Conv2d):
    """A depthwise convolution that computes in float32 on CPUs, whatever autocast says.

    There the bf16 gradient of the weight holds memory that nobody wrote as soon as the map is 32 pixels wide and the
    dilation along its height is above 1 (torch 2.11, seen as NaN and 1e36; narrower maps are right).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype))


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
