"""Reverse distillation (RD4AD): Deng and Li, "Anomaly Detection via Reverse Distillation from One-Class
Embedding", CVPR 2022, arXiv 2201.10703: section 3.2 (bottleneck), section 3.1 (decoder), equations 1-2 (loss) and 3
(map and score).

The student never sees the image. It reads the teacher's three feature maps through a narrow one-class embedding and
reconstructs them, coarse to fine. It is trained on good parts only, so what it fails to reconstruct is the anomaly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2.functional import pad

from defectlab.networks.blocks import pick
from defectlab.networks.resnet import load_teacher
from defectlab.precision import at_least_float32, check_uint8, full_float32

MAP_SIZE = 256  # pixel metrics are taken at 256x256 in every profile
SIGMA = 4.0  # of the Gaussian, in pixels at 256x256: the official code's value


@dataclass(frozen=True)
class RD4ADSettings:
    """RD4AD. Defaults are the paper profile's; they are frozen, since records are keyed by what differs from them."""

    model: ClassVar[str] = "rd4ad"
    version: ClassVar[int] = 1

    dataset: str = "magnetic_tile"
    teacher: str = "resnet18"  # ours: BSDRD is silent; RD4AD's headline is wide_resnet50_2
    size: int = 256  # RD4AD section 4.1: plain resize, no crop
    epochs: int = 200  # official RD4AD code
    batch: int = 16  # RD4AD section 4.1
    learning_rate: float = 0.005  # RD4AD section 4.1, no schedule
    betas: tuple[float, float] = (0.5, 0.999)  # RD4AD section 4.1
    loss: str = "whole_map"  # official RD4AD code; the paper's formula is "per_pixel"
    schedule: str = "constant"  # RD4AD section 4.1
    flips: bool = False  # RD4AD section 4.1: no augmentation
    precision: str = "bf16"  # ours: where the device is fast at it, else fp32


# --- Residual blocks, mirrored from the teacher -----------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def downsample_to(inputs: int, outputs: int, steps: int) -> nn.Sequential:
    """`steps` stride-2 3x3 convolutions, each with norm and ReLU: how a fine scale is brought to the coarsest."""
    layers: list[nn.Module] = []
    for step in range(steps):
        width = outputs // 2 ** (steps - 1 - step)
        layers += [conv(inputs, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        inputs = width
    return nn.Sequential(*layers)


class ResidualBlock(nn.Module):
    """A ResNet block that keeps, halves (`scale="down"`) or doubles (`scale="up"`) the resolution.

    Doubling uses a 2x2 transposed convolution where the encoder's block has its stride. `bottleneck` is 0 for the 3-3
    block of ResNet-18, else the 1-3-1 block's ratio of output width to inner width (ResNet-50: 4, WideResNet-50-2: 2).
    """

    def __init__(self, inputs: int, outputs: int, scale: str = "same", bottleneck: int = 0):
        super().__init__()
        width = outputs // bottleneck if bottleneck else outputs
        before = [conv(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)] if bottleneck else []

        def scaled(inputs: int, outputs: int, kernel: int) -> nn.Module:
            if scale == "up":
                return nn.ConvTranspose2d(inputs, outputs, 2, 2, bias=False)
            return conv(inputs, outputs, kernel, 2 if scale == "down" else 1)

        middle = scaled(width if bottleneck else inputs, width, 3)
        last = conv(width, outputs, 1 if bottleneck else 3)
        self.residual = nn.Sequential(
            *before, middle, nn.BatchNorm2d(width), nn.ReLU(inplace=True), last, nn.BatchNorm2d(outputs)
        )
        plain = scale == "same" and inputs == outputs
        self.shortcut = nn.Identity() if plain else nn.Sequential(scaled(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.residual(x))


def stage(inputs: int, outputs: int, scale: str, blocks: int, bottleneck: int) -> nn.Sequential:
    first = ResidualBlock(inputs, outputs, scale, bottleneck)
    rest = [ResidualBlock(outputs, outputs, "same", bottleneck) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


# --- Section 3.2: the bottleneck --------------------------------------------------------------------------------------


class MultiScaleFusion(nn.Module):
    """MFF (section 3.2): every scale is brought to the coarsest one and the three are concatenated."""

    def __init__(self, channels: tuple[int, int, int]):
        super().__init__()
        first, second, last = channels
        self.align = nn.ModuleList([downsample_to(first, last, 2), downsample_to(second, last, 1), nn.Identity()])

    def forward(self, features: list[Tensor]) -> Tensor:
        """[(B, C1, 4h, 4w), (B, C2, 2h, 2w), (B, C3, h, w)] -> (B, 3 C3, h, w)."""
        return torch.cat([align(f) for align, f in zip(self.align, features, strict=True)], dim=1)


class OneClassEmbedding(nn.Sequential):
    """OCE (section 3.2): a stride-2 residual stage, a fourth after the teacher's three.

    (B, C, h, w) -> (B, 2 C3, h/2, w/2).
    """

    def __init__(self, inputs: int, outputs: int, bottleneck: int):
        super().__init__(*stage(inputs, outputs, "down", 3 if bottleneck else 2, bottleneck))


# --- Section 3.1: the decoder -----------------------------------------------------------------------------------------


class ReverseDecoder(nn.Module):
    """The teacher's mirror (section 3.1): three up-sampling stages, coarse to fine."""

    def __init__(self, channels: tuple[int, int, int], bottleneck: int):
        super().__init__()
        widths = [2 * channels[2], channels[2], channels[1], channels[0]]
        depths = (3, 4, 6) if bottleneck else (2, 2, 2)
        self.stages = nn.ModuleList(
            stage(a, b, "up", depth, bottleneck) for a, b, depth in zip(widths, widths[1:], depths, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 2 C3, h/2, w/2) -> the teacher's three shapes, fine to coarse as the teacher gives them."""
        outputs = []
        for up in self.stages:
            x = up(x)
            outputs.append(x)
        return outputs[::-1]


class ReverseDistillation(nn.Module):
    """RD4AD's student: multi-scale fusion, one-class embedding, reverse decoder."""

    def __init__(
        self, channels: tuple[int, int, int], bottleneck: int, fusion: type[MultiScaleFusion] = MultiScaleFusion
    ):
        super().__init__()
        self.fusion = fusion(channels)
        self.embedding = OneClassEmbedding(3 * channels[2], 2 * channels[2], bottleneck)
        self.decoder = ReverseDecoder(channels, bottleneck)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Teacher features -> their reconstruction, the same three shapes."""
        return self.decoder(self.embedding(self.fusion(features)))


def initialise(network: nn.Module) -> None:
    """Kaiming-normal convolutions (fan out, ReLU), in place; the official code does so for all but the transposed ones.

    PyTorch's default weights are about 2.5 times smaller. A norm follows every convolution, so that the first steps of
    a short training would then be too large (numbers in `results/tried.md`).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# --- Equations 1 and 2: the loss --------------------------------------------------------------------------------------


def per_position_discrepancy(teacher: Tensor, student: Tensor) -> Tensor:
    """Equation 1: 1 - cosine over the channels at each position: 2 x (B, C, H, W) -> (B, H, W), in 0..2.

    A position where a side is all zero has no direction and counts as 1.
    """
    return 1 - functional.cosine_similarity(at_least_float32(teacher), at_least_float32(student), dim=1)


def per_pixel_loss(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    """The paper's loss (equations 1-2): `per_position_discrepancy`, averaged over positions, summed over scales."""
    return sum(per_position_discrepancy(t, s).mean() for t, s in zip(teacher, student, strict=True))


def whole_map_loss(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    """The loss of the authors' code: each map is flattened to one vector per image before the cosine.

    Not the paper's formula: positions with large features weigh more here.
    """
    flat = ([at_least_float32(f).flatten(1) for f in pair] for pair in zip(teacher, student, strict=True))
    return sum((1 - functional.cosine_similarity(t, s, dim=1)).mean() for t, s in flat)


LOSSES = {"per_pixel": per_pixel_loss, "whole_map": whole_map_loss}


# --- Equation 3: the anomaly map, and the score -----------------------------------------------------------------------


def gaussian_smooth(maps: Tensor, sigma: float = SIGMA) -> Tensor:
    """(B, H, W) -> (B, H, W), a separable Gaussian cut at 4 sigma with mirrored borders, as scipy's default does."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    padded = pad(maps, [radius], padding_mode="symmetric")[:, None]  # repeats the edge, torch's own "reflect" does not
    with full_float32():
        return functional.conv2d(functional.conv2d(padded, kernel), kernel.transpose(-1, -2))[:, 0]


def upsample(maps: Tensor, size: int = MAP_SIZE) -> Tensor:
    """(B, h, w) -> (B, size, size), bilinear with aligned corners as in the official code."""
    return functional.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=True)[:, 0]


def anomaly_map(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    """Sum of the upsampled per-position discrepancies of all scales: (B, 256, 256), not yet smoothed."""
    return sum(upsample(per_position_discrepancy(t, s)) for t, s in zip(teacher, student, strict=True))


def image_scores(maps: Tensor) -> Tensor:
    """(N, H, W) -> (N,): the maximum of each map."""
    return maps.flatten(1).amax(1)


# --- The method as studies and readers use it -------------------------------------------------------------------------


def build(settings: RD4ADSettings, channels: tuple[int, int, int], bottleneck: int) -> ReverseDistillation:
    return ReverseDistillation(channels, bottleneck)


def make_loss(settings: RD4ADSettings) -> Callable[[list[Tensor], list[Tensor]], dict[str, Tensor]]:
    """One of `LOSSES` as (teacher, student) -> named scalars."""
    loss = pick(LOSSES, settings.loss, "loss")
    return lambda teacher, student: {"loss": loss(teacher, student)}


def to_maps(settings: RD4ADSettings, teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    return anomaly_map(teacher, student)


class AnomalyMapper(nn.Module):
    """Images -> anomaly maps, by a frozen teacher and a network that reconstructs its features; in eval mode.

    `network` has fresh weights. WeightsError where the teacher's are missing.

    Args:
        build: (settings, the teacher's channels, its bottleneck) -> network.
        to_maps: (settings, teacher features, the network's output for them) -> maps (B, 256, 256), not smoothed.
    """

    def __init__(self, settings: Any, build: Callable[..., nn.Module], to_maps: Callable[..., Tensor]):
        super().__init__()
        self.teacher = load_teacher(settings.teacher)
        self.network = build(settings, self.teacher.channels, self.teacher.bottleneck)
        initialise(self.network)
        self.to_maps = partial(to_maps, settings)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) -> smoothed maps (B, 256, 256), in float32; the score is `image_scores` of them."""
        check_uint8(images)
        with full_float32():
            features = self.teacher(images)
            return gaussian_smooth(self.to_maps(features, self.network(features)))


class RD4AD(AnomalyMapper):
    """The whole method: `RD4AD(RD4ADSettings())(images)`."""

    def __init__(self, settings: RD4ADSettings):
        super().__init__(settings, build, to_maps)
