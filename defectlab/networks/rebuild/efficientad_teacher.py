"""The teacher of EfficientAD (the paper of `efficientad`, section 3.1 and appendix; from memory, not checked): a small
network that describes patches of 33 x 33 px, distilled once from a large one.

Ours: the large network is EfficientNet-Lite0 (the paper: WideResNet-101), the images are the training images of all
data sets (the paper: ImageNet), the small one is narrower, starts from Kaiming's weights, and learns from crops.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defectlab.networks.efficientnet import Lite0
from defectlab.networks.feature_baselines import patch_features
from defectlab.networks.rebuild.base import Normal, at_map_size, crops, to_unit
from defectlab.networks.resnet import IMAGENET_MEAN, IMAGENET_STD
from defectlab.precision import check_uint8, sent

STATISTICS = 64  # ours: images of which means, deviations and quantiles are taken; the paper: all


@dataclass(frozen=True)
class EfficientADTeacherSettings:
    """The distillation of the teacher, once for all data sets."""

    model: ClassVar[str] = "efficientad_teacher"
    version: ClassVar[int] = 1

    dataset: str = "pooled"
    size: int = 256  # appendix: 256 for the PDN, 512 for the network that it learns from
    width: float = 0.25  # ours, of all layers; the paper: 1.0, that is 384 features
    pretrained: bool = True  # False: Lite0 with random weights, for smoke
    patch: int = 128  # ours: px a side of the crops, a multiple of 32; the paper: whole images
    draws: int = 1024
    epochs: int = 7  # appendix: 60,000 steps
    batch: int = 8  # appendix: 16
    learning_rate: float = 0.001  # appendix: 0.0001
    precision: str = "bf16"  # where the device is fast at it


# --- Section 3.1: the patch description network -----------------------------------------------------------------------


def normalised(images: Tensor) -> Tensor:
    """Images in 0..1 -> by ImageNet's mean and deviation, channels last in memory: twice as fast on a CPU."""
    values = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=images.dtype)[..., None, None]
    mean, deviation = sent(values, images.device)
    return ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)


class PDN(nn.Sequential):
    """PDN-S: images (B, 3, H, W) in 0..1 -> (B, outputs, H/4 - 8, W/4 - 8), sides a multiple of 4 px.

    Without padding: output i sees 33 px around pixel 4 i + 16 of the image.
    """

    def __init__(self, width: float, outputs: int):
        narrow, wide = int(128 * width), int(256 * width)
        super().__init__(
            *(nn.Conv2d(3, narrow, 4), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(narrow, wide, 4), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(wide, wide, 3), nn.ReLU()),
            nn.Conv2d(wide, outputs, 4),
        )
        for layer in self:
            if isinstance(layer, nn.Conv2d):  # ours: PyTorch's smaller weights learn more slowly
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(normalised(images)).float()


# --- Appendix: what it learns -----------------------------------------------------------------------------------------


@torch.no_grad()
def lite0_features(lite0: Lite0, images: Tensor, outputs: int) -> Tensor:
    """uint8 images (B, 3, H, W) -> (B, outputs, H/4 - 8, W/4 - 8), at the places of the PDN.

    As in the paper, the large network sees the image at twice the size, and its features are PatchCore's: two stages
    (of stride 8 and 16) side by side, whose neighbouring channels are averaged, or repeated, to `outputs`.
    """
    check_uint8(images)
    large = F.interpolate(images.float(), scale_factor=2, mode="bilinear", align_corners=False) / 127.5 - 1
    large = large.contiguous(memory_format=torch.channels_last)
    stages = lite0.net.forward_intermediates(large, indices=[1, 2, 3], intermediates_only=True, stop_early=True)
    features = F.adaptive_avg_pool1d(patch_features(stages).flatten(0, 1), outputs)  # (B h, w, outputs)
    features = features.unflatten(0, (len(images), -1)).permute(0, 3, 1, 2)
    rows, columns = (length // 4 - 8 for length in images.shape[-2:])
    return features[:, :, 3 : 3 + rows, 3 : 3 + columns]  # feature k is centred at pixel 4 k + 3: Lite0 pads one side


def some(images: Tensor) -> Tensor:
    """Up to 64 images, evenly spaced."""
    return images[torch.linspace(0, len(images) - 1, min(len(images), STATISTICS)).long()]


def mean_and_deviation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel: (B, C, h, w) -> 2 x (1, C, 1, 1); a channel without any deviation counts as 1."""
    deviation, mean = torch.std_mean(features, (0, 2, 3), keepdim=True)
    return mean, torch.where(deviation > 0, deviation, 1)


def to_pixels(cells: Tensor) -> Tensor:
    """A map at a PDN's places (B, h, w) -> (B, 256, 256); the outer 16 px, which have none, repeat the nearest."""
    return at_map_size(F.pad(cells[:, None], (4, 4, 4, 4), mode="replicate")[:, 0])


class EfficientADTeacher(Normal):
    """The PDN learns Lite0's features. Its maps are its distillation errors, evaluated as those of any row;
    no anomaly is read from them."""

    def __init__(self, settings: EfficientADTeacherSettings):
        super().__init__()
        self.settings, self.channels = settings, int(384 * settings.width)
        self.pdn = PDN(settings.width, self.channels)
        self.lite0 = Lite0(settings.pretrained).to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.zeros(1, self.channels, 1, 1))
        self.register_buffer("deviation", torch.ones(1, self.channels, 1, 1))

    def begin(self, prepared: Tensor, foreign: Tensor | None = None) -> None:
        features = [lite0_features(self.lite0, part, self.channels) for part in some(prepared).split(8)]
        self.mean, self.deviation = mean_and_deviation(torch.cat(features))

    def errors(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> squared errors of the normalised features (B, C, H/4 - 8, W/4 - 8)."""
        target = (lite0_features(self.lite0, images, self.channels) - self.mean) / self.deviation
        return (self.pdn(to_unit(images)) - target).square()

    def loss(self, prepared: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The mean squared error; the paper makes a tenth of the images grey, ours mostly are."""
        return {"loss": self.errors(crops(prepared, self.settings.patch, generator)).mean()}

    def maps(self, prepared: Tensor) -> Tensor:
        return to_pixels(self.errors(prepared).mean(1))
