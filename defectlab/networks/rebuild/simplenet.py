"""SimpleNet: Liu, Zhou, Xu, Wang, "SimpleNet: A Simple Network for Image Anomaly Detection and Localization", CVPR
2023, arXiv 2303.15140.

Frozen features of patches are adapted by one linear layer. The training makes anomalous features from the good ones by
adding Gaussian noise, and a small discriminator learns to tell the two apart. Where it finds a feature of an image
anomalous, there is the defect.

Ours: the backbone is ResNet-18 (the paper: WideResNet-50), its features are computed once, a step sees some random
positions of each image, and adaptor and discriminator share one learning rate without weight decay.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defectlab.networks.feature_baselines import patch_features
from defectlab.networks.rebuild.base import Normal
from defectlab.networks.resnet import load_teacher
from defectlab.networks.reverse_distillation import gaussian_smooth, upsample
from defectlab.precision import at_least_float32, check_uint8, sent


@dataclass(frozen=True)
class SimpleNetSettings:
    """SimpleNet. Section numbers are from memory of the paper: not checked."""

    model: ClassVar[str] = "simplenet"
    version: ClassVar[int] = 1

    dataset: str = "aitex"
    size: int = 256  # section 4.2: resized to 256, cropped to 224; official code: 329 and 288
    teacher: str = "resnet18"  # section 4.2: "wide_resnet50_2"
    hidden: int = 1024  # official code: width of the discriminator
    noise: float = 0.015  # section 4.2: standard deviation of the Gaussian noise
    margin: float = 0.5  # section 4.2: th+ and th-
    positions: int = 256  # random positions of each image in a step; 0: all, the paper
    draws: int = 1024  # ours: an epoch of the paper is each image once
    epochs: int = 12  # section 4.2: 160
    batch: int = 8  # official code; section 4.2: 4
    learning_rate: float = 0.0002  # section 4.2, of the discriminator; ours: of the adaptor, too (the paper: 0.0001)
    precision: str = "bf16"  # where the device is fast at it


# --- Section 3.4: the discriminator ----------------------------------------------------------------------------------


class Discriminator(nn.Sequential):
    """Features (N, C) -> how normal they look (N, 1), without bound."""

    def __init__(self, channels: int, hidden: int):
        last = nn.Linear(hidden, 1, bias=False)  # no bias: official code
        super().__init__(nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2), last)


# --- Section 3.5: the loss -------------------------------------------------------------------------------------------


def truncated_l1(good: Tensor, noisy: Tensor, margin: float) -> Tensor:
    """Equation 6: good features should score above `margin`, noisy ones below -`margin`: 2 x (N,) -> scalar."""
    return F.relu(margin - good).mean() + F.relu(margin + noisy).mean()


# --- The method ------------------------------------------------------------------------------------------------------


class SimpleNet(Normal):
    """WeightsError where the teacher's weights are missing."""

    def __init__(self, settings: SimpleNetSettings):
        super().__init__()
        self.settings = settings
        self.teacher = load_teacher(settings.teacher)
        channels = sum(self.teacher.channels[1:])
        self.adaptor = nn.Linear(channels, channels)
        self.discriminator = Discriminator(channels, settings.hidden)
        for layer in (self.adaptor, self.discriminator[0], self.discriminator[-1]):
            nn.init.xavier_normal_(layer.weight)  # official code

    def prepare(self, images: Tensor) -> Tensor:
        """Section 3.1: (B, 3, S, S) uint8 -> features of layers 2 and 3, (B, S/8, S/8, C) float16 to save memory."""
        check_uint8(images)
        return patch_features(self.teacher(images)).half()

    def loss(self, prepared: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Sections 3.2 to 3.5: adapted features against the same with noise."""
        features = prepared.flatten(1, 2)  # (B, P, C)
        if self.settings.positions:
            shape = len(features), self.settings.positions
            places = sent(torch.randint(features.shape[1], shape, generator=generator), features.device)
            features = features[torch.arange(len(features), device=features.device)[:, None], places]
        adapted = at_least_float32(self.adaptor(features.flatten(0, 1).float()))  # (N, C)
        noise = self.settings.noise * sent(torch.randn(adapted.shape, generator=generator), adapted.device)
        # together, so that batch norm sees one batch of both: official code
        good, noisy = self.discriminator(torch.cat([adapted, adapted + noise]))[:, 0].float().chunk(2)
        found = (good > 0).float().mean() / 2 + (noisy < 0).float().mean() / 2
        return {"loss": truncated_l1(good, noisy, self.settings.margin), "told_apart": found}

    def maps(self, prepared: Tensor) -> Tensor:
        """Section 3.6: -D at each position, upsampled and smoothed with sigma = 4: (B, 256, 256)."""
        scores = -self.discriminator(self.adaptor(prepared.flatten(0, 2).float())).float()
        return gaussian_smooth(upsample(scores.view(prepared.shape[:3])))
