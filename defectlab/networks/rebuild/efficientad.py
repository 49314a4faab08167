"""EfficientAD: Batzner, Heckler, König, "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies",
WACV 2024, arXiv 2303.14535; its small variant, EfficientAD-S.

A small teacher describes patches of 33 x 33 px; a student of the same form learns its features on good images, with the
loss of the hardest features only and a penalty on foreign images. An autoencoder with a narrow bottleneck learns them,
too, for what no small patch shows, such as a missing part. Two anomaly maps, student against teacher and student against
autoencoder, are brought to a common scale and averaged. The authors gave no code; sections are from memory: not checked.

Ours: the teacher is distilled from EfficientNet-Lite0 on the training images of all data sets (the paper: from
WideResNet-101 on ImageNet). Networks are narrower, and learn from crops; the autoencoder sees windows of that size, too
(the paper: whole images). The penalty is on images of the other data sets (the paper: ImageNet), and the scale of the
maps is that of training images (the paper: of held-out good ones). No dropout in the decoder, no weight decay.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize, rgb_to_grayscale

from defectlab.networks.rebuild.base import Normal, crops, to_unit
from defectlab.networks.rebuild.efficientad_teacher import PDN, mean_and_deviation, some, to_pixels
from defectlab.networks.resnet import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class EfficientADSettings:
    """EfficientAD-S."""

    model: ClassVar[str] = "efficientad"
    version: ClassVar[int] = 1

    dataset: str = "aitex"
    size: int = 256  # section 4
    width: float = 0.25  # of all layers, that of the teacher's row; the paper: 1.0
    hard: float = 0.999  # section 3.2: p_hard
    patch: int = 128  # ours: px a side of crops and of the autoencoder's windows; the paper: 256, whole images
    draws: int = 512
    epochs: int = 4  # appendix: 70,000 steps
    batch: int = 4  # appendix: 1
    learning_rate: float = 0.001  # appendix: 0.0001, divided by 10 for the last 5 %
    precision: str = "bf16"  # where the device is fast at it


# --- Section 3.2: the loss of the student ----------------------------------------------------------------------------


def hard_feature_loss(teacher: Tensor, student: Tensor, hard: float) -> Tensor:
    """Mean of the squared differences above their `hard` quantile, in each image: 2 x (B, C, h, w) -> scalar."""
    squares = (teacher - student).square().flatten(1)
    return squares.topk(max(1, round((1 - hard) * squares.shape[1])), sorted=False).values.mean()


# --- Section 3.3: the autoencoder ------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """Table 7: images (B, 3, side, side) in 0..1 -> features (B, outputs, side/4 - 8, side/4 - 8).

    The bottleneck is one vector of 64 values for the whole image.
    """

    def __init__(self, width: float, outputs: int, side: int):
        super().__init__()
        narrow, wide = int(32 * width), int(64 * width)
        widths = (3, narrow, narrow, wide, wide, wide)
        down = [[nn.Conv2d(a, b, 4, 2, 1), nn.ReLU()] for a, b in zip(widths, widths[1:], strict=False)]
        self.encoder = nn.Sequential(*sum(down, []), nn.Conv2d(wide, 64, side // 32))
        self.up = nn.ModuleList(nn.Conv2d(before, wide, 4, 1, 2) for before in (64, *[wide] * 5))  # each adds 1 px
        self.sizes = [max(1, side // part - odd) for part, odd in ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1))]
        self.last = nn.Sequential(nn.Conv2d(wide, wide, 3, 1, 1), nn.ReLU(), nn.Conv2d(wide, outputs, 3, 1, 1))
        self.cells = side // 4 - 8
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        x = normalize(images, IMAGENET_MEAN, IMAGENET_STD).contiguous(memory_format=torch.channels_last)
        x = self.encoder(x)
        for size, conv in zip(self.sizes, self.up, strict=True):
            x = F.relu(conv(F.interpolate(x, (size, size), mode="bilinear", align_corners=False)))
        x = F.interpolate(x, (self.cells, self.cells), mode="bilinear", align_corners=False)
        return self.last(x).float()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Another brightness, contrast or saturation, by a factor of 0.8 to 1.2, for each image (B, 3, H, W) in 0..1."""
    kinds = torch.randint(3, (len(images), 1, 1, 1), generator=generator).to(images.device)
    factors = (0.8 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator)).to(images.device)
    grey = rgb_to_grayscale(images)
    other = torch.where(kinds == 0, 0.0, torch.where(kinds == 1, grey.mean((2, 3), keepdim=True), grey))
    return (other + factors * (images - other)).clamp(0, 1)


# --- The method ------------------------------------------------------------------------------------------------------


class EfficientAD(Normal):
    """`take_teacher` comes before `begin`. ValueError for patches that are no multiple of 32 px or do not divide the
    images."""

    foreign = True

    def __init__(self, settings: EfficientADSettings):
        super().__init__()
        if settings.patch % 32 or settings.size % settings.patch:
            raise ValueError(f"patches of {settings.patch} px: use a multiple of 32 that divides {settings.size}")
        self.settings, self.channels = settings, int(384 * settings.width)
        self.teacher = PDN(settings.width, self.channels).requires_grad_(False)
        self.student = PDN(settings.width, 2 * self.channels)  # half for the teacher, half for the autoencoder
        self.autoencoder = Autoencoder(settings.width, self.channels, settings.patch)
        self.register_buffer("taken", torch.tensor(False))
        self.register_buffer("mean", torch.zeros(1, self.channels, 1, 1))
        self.register_buffer("deviation", torch.ones(1, self.channels, 1, 1))
        self.register_buffer("scale", torch.tensor([[0.0, 0.1], [0.0, 0.1]]))  # quantiles of both maps
        self.register_buffer("others", None, persistent=False)

    def take_teacher(self, state: dict[str, Tensor]) -> None:
        """`state`: that of an `EfficientADTeacher`. ValueError where its PDN is another one."""
        try:
            self.teacher.load_state_dict({k.removeprefix("pdn."): v for k, v in state.items() if k.startswith("pdn.")})
        except RuntimeError as error:
            raise ValueError(f"this is no teacher of width {self.settings.width}: {error}") from error
        self.taken.fill_(True)

    def begin(self, prepared: Tensor, foreign: Tensor | None = None) -> None:
        """Section 3.2: each channel of the teacher is normalised by its mean and deviation on good images."""
        if not self.taken:
            raise RuntimeError("EfficientAD has no teacher yet: hand it one with take_teacher")
        if foreign is None:
            raise ValueError("EfficientAD needs images of other sets")
        self.others = foreign
        features = [self.teacher(to_unit(part)) for part in some(prepared).split(8)]
        self.mean, self.deviation = mean_and_deviation(torch.cat(features))

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """The teacher's normalised features."""
        return (self.teacher(images) - self.mean) / self.deviation

    def loss(self, prepared: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Appendix, algorithm 1."""
        side = self.settings.patch
        images = to_unit(crops(prepared, side, generator))
        chosen = torch.randint(len(self.others), (len(images),), generator=generator).to(self.others.device)
        foreign = to_unit(crops(self.others[chosen], side, generator)).to(images.device)
        changed = augment(images, generator)

        target, target_changed = self.target(torch.cat([images, changed])).chunk(2)
        own, other, from_changed = self.student(torch.cat([images, foreign, changed])).chunk(3)
        hard = hard_feature_loss(target, own[:, : self.channels], self.settings.hard)
        penalty = other[:, : self.channels].square().mean()
        rebuilt = self.autoencoder(changed)
        autoencoder = F.mse_loss(rebuilt, target_changed)
        follows = F.mse_loss(from_changed[:, self.channels :], rebuilt)
        terms = {"hard": hard, "penalty": penalty, "autoencoder": autoencoder, "student_autoencoder": follows}
        return {"loss": sum(terms.values()), **terms}

    def rebuilt(self, images: Tensor) -> Tensor:
        """The autoencoder's features of whole images, the mean over windows half a patch apart: (B, C, H/4 - 8, ...)."""
        side, cells = self.settings.patch, [length // 4 - 8 for length in images.shape[-2:]]
        windows = images.unfold(2, side, side // 2).unfold(3, side, side // 2).permute(0, 2, 3, 1, 4, 5)
        features = self.autoencoder(windows.flatten(0, 2))
        columns = features.reshape(len(images), -1, features[0].numel()).mT  # (B, C h w, windows)
        total, times = (F.fold(x, cells, side // 4 - 8, stride=side // 8) for x in (columns, torch.ones_like(columns)))
        return total / times

    def two_maps(self, images: Tensor) -> Tensor:
        """Student against teacher, and against autoencoder, at the PDN's places: (B, 2, H/4 - 8, W/4 - 8)."""
        images = to_unit(images)
        targets = torch.stack([self.target(images), self.rebuilt(images)], 1)  # (B, 2, C, h, w)
        return (targets - self.student(images).unflatten(1, (2, -1))).square().mean(2)

    def end(self, prepared: Tensor) -> None:
        """Section 3.4: the quantiles that become 0 and 0.1."""
        both = torch.cat([self.two_maps(part) for part in some(prepared).split(8)]).transpose(0, 1).flatten(1)
        self.scale = torch.quantile(both, torch.tensor([0.9, 0.995], device=both.device), dim=1).T.contiguous()

    def maps(self, prepared: Tensor) -> Tensor:
        low, high = self.scale.view(2, 2, 1, 1).unbind(1)  # (2, 1, 1): of both maps
        return to_pixels((0.1 * (self.two_maps(prepared) - low) / (high - low)).mean(1))
