"""EfficientAD: Batzner, Heckler, König, "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level
Latencies", WACV 2024, arXiv 2303.14535; its small variant, EfficientAD-S.

A small teacher describes patches of 33 x 33 px (`efficientad_teacher`). A student of the same form learns its features
on good images, from the hardest ones alone, with a penalty on foreign images. An autoencoder with a narrow bottleneck
learns them, too, for what no small patch shows, such as a missing part. Two anomaly maps, student against teacher and
student against autoencoder, are brought to a common scale and averaged.

The sections are from memory, not checked. Ours: the teacher (see there) and the widths; the penalty is on images of the
other data sets (the paper: ImageNet), which can share flat areas with the good ones; the scale of the maps is that of
training images (the paper: of held-out good ones, which are dev's here). No dropout in the decoder, no weight decay.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import rgb_to_grayscale

from defectlab.networks.rebuild.base import Normal, to_unit
from defectlab.networks.rebuild.efficientad_teacher import (
    PDN,
    EfficientADTeacherSettings,
    mean_and_deviation,
    normalised,
    some,
    to_pixels,
)
from defectlab.precision import sent

TEACHER = EfficientADTeacherSettings()


@dataclass(frozen=True)
class EfficientADSettings:
    """EfficientAD-S, on whole images."""

    model: ClassVar[str] = "efficientad"
    version: ClassVar[int] = 1

    dataset: str = "aitex"
    teacher: EfficientADTeacherSettings = TEACHER  # the row that it learns from, of the same width
    size: int = 256  # section 4
    width: float = 0.25  # of all layers; the paper: 1.0
    hard: float = 0.999  # section 3.2: p_hard
    draws: int = 256
    epochs: int = 5  # appendix: 70,000 steps
    batch: int = 2  # appendix: 1
    learning_rate: float = 0.001  # appendix: 0.0001, divided by 10 for the last 5 %
    precision: str = "bf16"  # where the device is fast at it


# --- Section 3.2: the loss of the student -----------------------------------------------------------------------------


def hard_feature_loss(teacher: Tensor, student: Tensor, hard: float) -> Tensor:
    """Mean of the squared differences above their `hard` quantile, in each image: 2 x (B, C, h, w) -> scalar."""
    squares = (teacher - student).square().flatten(1)
    return squares.topk(max(1, round((1 - hard) * squares.shape[1])), sorted=False).values.mean()


# --- Section 3.3: the autoencoder -------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """Images (B, 3, side, side) in 0..1 -> features (B, outputs, side/4 - 8, side/4 - 8), at the places of the PDN.

    The bottleneck is one vector of 64 values for the whole image.
    """

    def __init__(self, width: float, outputs: int, side: int):
        super().__init__()
        narrow, wide = int(32 * width), int(64 * width)
        layers: list[nn.Module] = []
        for before, after in pairwise((3, narrow, narrow, wide, wide, wide)):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(wide, 64, side // 32))
        self.up = nn.ModuleList(nn.Conv2d(before, wide, 4, 1, 2) for before in (64, *[wide] * 5))  # each adds 1 px
        # at 256 px, as in the appendix: 3, 8, 15, 32, 63, 127
        self.sizes = [max(1, side // part - odd) for part, odd in ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1))]
        self.places = side // 4 - 8
        self.last = nn.Sequential(nn.Conv2d(wide, wide, 3, 1, 1), nn.ReLU(), nn.Conv2d(wide, outputs, 3, 1, 1))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        x = self.encoder(normalised(images))
        for size, conv in zip(self.sizes, self.up, strict=True):
            x = F.relu(conv(F.interpolate(x, (size, size), mode="bilinear", align_corners=False)))
        x = F.interpolate(x, (self.places, self.places), mode="bilinear", align_corners=False)
        return self.last(x).float()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Another brightness, contrast or saturation, by a factor of 0.8 to 1.2, for each image (B, 3, H, W) in 0..1."""
    kinds = sent(torch.randint(3, (len(images), 1, 1, 1), generator=generator), images.device)
    factors = sent(0.8 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator), images.device)
    grey = rgb_to_grayscale(images)
    other = torch.where(kinds == 0, 0.0, torch.where(kinds == 1, grey.mean((2, 3), keepdim=True), grey))
    return (other + factors * (images - other)).clamp(0, 1)


# --- The method -------------------------------------------------------------------------------------------------------


class EfficientAD(Normal):
    """`take_teacher` comes before `begin`. ValueError for images whose side is no multiple of 32 px, or below 64."""

    foreign = True

    def __init__(self, settings: EfficientADSettings):
        super().__init__()
        if settings.size % 32 or settings.size < 64:
            raise ValueError(f"EfficientAD needs images of 64, 96, 128 ... px a side, got {settings.size}")
        self.settings, self.channels = settings, int(384 * settings.width)
        self.teacher = PDN(settings.width, self.channels).requires_grad_(False)
        self.student = PDN(settings.width, 2 * self.channels)  # half for the teacher, half for the autoencoder
        self.autoencoder = Autoencoder(settings.width, self.channels, settings.size)
        self.register_buffer("taken", torch.tensor(False))
        self.register_buffer("mean", torch.zeros(1, self.channels, 1, 1))
        self.register_buffer("deviation", torch.ones(1, self.channels, 1, 1))
        self.register_buffer("quantiles", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))  # of both maps
        self.register_buffer("others", None, persistent=False)

    def take_teacher(self, state: dict[str, Tensor]) -> None:
        """`state`: that of an `EfficientADTeacher`. ValueError where its PDN is another one."""
        try:
            self.teacher.load_state_dict({k.removeprefix("pdn."): v for k, v in state.items() if k.startswith("pdn.")})
        except RuntimeError as error:
            raise ValueError(f"this is no teacher of width {self.settings.width}: {error}") from error
        self.taken.fill_(True)

    @torch.no_grad()
    def begin(self, prepared: Tensor, foreign: Tensor | None = None) -> None:
        """Section 3.2: each channel of the teacher is normalised by its mean and deviation on good images."""
        if not self.taken:
            raise RuntimeError("EfficientAD has no teacher yet: hand it one with take_teacher")
        if foreign is None or not len(foreign):
            raise ValueError("EfficientAD needs images of other sets")
        self.others = foreign
        features = [self.teacher(to_unit(part)) for part in some(prepared).split(8)]
        self.mean, self.deviation = mean_and_deviation(torch.cat(features))

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """The teacher's normalised features."""
        return (self.teacher(images) - self.mean) / self.deviation

    def loss(self, prepared: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Appendix, algorithm 1; as many foreign images as good ones."""
        images = to_unit(prepared)
        chosen = sent(torch.randint(len(self.others), (len(images),), generator=generator), self.others.device)
        foreign = to_unit(self.others[chosen]).to(images.device)
        changed = augment(images, generator)

        target, target_changed = self.target(torch.cat([images, changed])).chunk(2)
        own, other, from_changed = self.student(torch.cat([images, foreign, changed])).chunk(3)
        rebuilt = self.autoencoder(changed)
        terms = {
            "hard": hard_feature_loss(target, own[:, : self.channels], self.settings.hard),
            "penalty": other[:, : self.channels].square().mean(),
            "autoencoder": F.mse_loss(rebuilt, target_changed),
            "student_autoencoder": F.mse_loss(from_changed[:, self.channels :], rebuilt),
        }
        return {"loss": sum(terms.values()), **terms}

    def two_maps(self, prepared: Tensor) -> Tensor:
        """Student against teacher, and against autoencoder, at the PDN's places: (B, 2, S/4 - 8, S/4 - 8)."""
        images = to_unit(prepared)
        targets = torch.stack([self.target(images), self.autoencoder(images)], 1)  # (B, 2, C, h, w)
        return (targets - self.student(images).unflatten(1, (2, -1))).square().mean(2)

    @torch.no_grad()
    def end(self, prepared: Tensor) -> None:
        """Section 3.4: the quantiles 0.9 and 0.995 of both maps, which become 0 and 0.1."""
        both = torch.cat([self.two_maps(part) for part in some(prepared).split(8)]).transpose(0, 1).flatten(1)
        self.quantiles = torch.quantile(both, torch.tensor([0.9, 0.995], device=both.device), dim=1).T.contiguous()

    def maps(self, prepared: Tensor) -> Tensor:
        low, high = self.quantiles.view(2, 2, 1, 1).unbind(1)  # (2, 1, 1) each
        return to_pixels((0.1 * (self.two_maps(prepared) - low) / (high - low).clamp(min=1e-12)).mean(1))
