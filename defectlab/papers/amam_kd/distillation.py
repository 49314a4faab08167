"""Stage two: anomaly detection by knowledge distillation (section 3.2, and the ablations of 4.2.2).

Guo, Lv, Machines 13(8), 712 (2025), doi 10.3390/machines13080712. It is reverse distillation (RD4AD, CVPR 2022), which
the paper does not cite: a frozen teacher, an embedding of its three feature maps, a student that reconstructs them. The
score is in `weighting.py`.

Deviations and choices are marked "ours". The largest: Table 3 gives the teacher 16 x 16 x 2048 at 256 px, which no
layer of a WideResNet-50-2 has without dilation, and the loss uses three unnamed scales (here: layers 1 to 3). 14 x 14
tokens fit 224 px, the size used here. The printed loss does not contain the convolutions of the anomaly score; here
they are fitted to pasted defects after the training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from defectlab.networks.blocks import PreActivationBlock, pick
from defectlab.networks.reverse_distillation import (
    AnomalyMapper,
    MultiScaleFusion,
    RD4ADSettings,
    ResidualBlock,
    per_position_discrepancy,
    stage,
)
from defectlab.papers.amam_kd.weighting import KERNELS, MapWeighting, inverse_softplus
from defectlab.precision import at_least_float32

WIDTH, TOKENS = 512, 14  # Table 3: the embedding is 14 x 14 x 512


@dataclass(frozen=True)
class DistillationSettings(RD4ADSettings):
    """RD4AD's settings and what this paper adds to them. Sources as comments."""

    model: ClassVar[str] = "amam_kd"
    version: ClassVar[int] = 1

    dataset: str = "mvtec_ad/metal_nut"
    teacher: str = "resnet18"  # ours: the available weights; section 4.2: wide_resnet50_2, Table 8 has resnet18, too
    size: int = 224  # ours: section 3.2.1 has 14 x 14 tokens; at 256 px they are pooled
    epochs: int = 200  # ours: the paper is silent
    batch: int = 8  # section 4.1 has 8 for segmentation; ours here, chosen on dev
    learning_rate: float = 0.005  # section 4.2
    betas: tuple[float, float] = (0.5, 0.999)  # section 4.2
    schedule: str = "cosine"  # section 4.2
    flips: bool = True  # section 4.2: horizontal and vertical
    loss: str = "cosine"  # section 3.2.2; Table 10: "l1", "l2", "mse"
    fusion: bool = True  # section 3.2.1, MFF; the switches of Table 9
    vit: bool = True  # section 3.2.1
    residual: bool = True  # section 3.2.1
    student: str = "heterogeneous"  # section 3.2; 4.2.2: "homogeneous"
    weighting: str = "1x1"  # section 3.2.2; Table 11: "none", "3x3", "5x5"; "printed": trained with the loss as printed
    vit_depth: int = 1  # ours: the paper is silent; chosen on dev
    vit_heads: int = 8  # ours: the paper is silent; chosen on dev


# --- Section 3.2.1: feature aggregation and filtering ----------------------------------------------------------------


class ViTBlock(nn.Module):
    """ "Context-based analysis of multi-layer feature information": transformer layers on the positions of the map.

    Ours: norms before attention and MLP, a hidden width of twice the tokens', learned position embeddings, no dropout.
    """

    def __init__(self, tokens: int, depth: int, heads: int):
        super().__init__()
        self.position = nn.Parameter(torch.empty(1, tokens, WIDTH))
        nn.init.trunc_normal_(self.position, std=0.02)
        options = {"dropout": 0.0, "activation": functional.gelu, "batch_first": True, "norm_first": True}
        layers = [nn.TransformerEncoderLayer(WIDTH, heads, 2 * WIDTH, **options) for _ in range(depth)]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 512, g, g) -> the same shape; g x g is the number of tokens."""
        tokens = self.layers(rearrange(x, "b c h w -> b (h w) c") + self.position)
        return rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[-2]).contiguous(memory_format=torch.channels_last)


class FeatureAggregation(nn.Module):
    """Multi-scale fusion, ViT block and two residual modules; each can be left out (Table 9).

    Without the fusion the teacher's last map alone is read, through the 1x1 convolution (ours: "Pre" in Table 9).
    """

    def __init__(self, channels: tuple[int, int, int], settings: DistillationSettings):
        super().__init__()
        self.grid = min(TOKENS, settings.size // 16)
        self.fusion = MultiScaleFusion(channels) if settings.fusion else None
        width = (3 if settings.fusion else 1) * channels[2]
        compress = nn.Conv2d(width, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)
        self.compress = nn.Sequential(*compress)
        filters: list[nn.Module] = []
        if settings.vit:
            filters.append(ViTBlock(self.grid**2, settings.vit_depth, settings.vit_heads))
        if settings.residual:
            filters += [ResidualBlock(WIDTH, WIDTH, bottleneck=4) for _ in range(2)]  # ours: the kind of block
        self.filters = nn.Sequential(*filters)

    def forward(self, features: list[Tensor]) -> Tensor:
        """The teacher's three maps -> (B, 512, 14, 14), or less than 14 for images below 224 px."""
        x = self.compress(self.fusion(features) if self.fusion else features[2])
        if x.shape[-1] != self.grid:
            x = functional.adaptive_avg_pool2d(x, self.grid)  # ours: 16 x 16 at 256 px
        return self.filters(x)


# --- Section 3.2: the student ----------------------------------------------------------------------------------------


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of `like`."""
    size = like.shape[-2:]
    return x if x.shape[-2:] == size else functional.interpolate(x, size, mode="bilinear", align_corners=False)


class HeterogeneousStudent(nn.Module):
    """ "Custom multi-level residual network" (section 3.2); the paper describes it no further.

    Ours, unlike any of the teachers: one pre-activation block per level, bilinear upsampling between the levels, at
    most 256 channels wide, and a linear 1x1 convolution to the teacher's channels at each level.
    """

    def __init__(self, channels: tuple[int, int, int], _: int):
        super().__init__()
        widths = [WIDTH, *(min(c, 256) for c in reversed(channels))]
        self.levels = nn.ModuleList(PreActivationBlock(a, b, project=True) for a, b in pairwise(widths))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, outputs, 1))
            for width, outputs in zip(widths[1:], reversed(channels), strict=True)
        )

    def forward(self, x: Tensor, features: list[Tensor]) -> list[Tensor]:
        """The embedding (B, 512, g, g) -> three maps of the shapes of `features`, whose values are not read."""
        outputs = []
        for level, head, feature in zip(self.levels, self.heads, reversed(features), strict=True):
            x = level(resize(x, feature))
            outputs.append(head(x))
        return outputs[::-1]


class HomogeneousStudent(nn.Module):
    """Section 4.2.2: the teacher's own blocks and depths in opposite order; up by transposed convolutions, as RD4AD."""

    def __init__(self, channels: tuple[int, int, int], bottleneck: int):
        super().__init__()
        first, second, third = channels
        depths = (6, 4, 3) if bottleneck else (2, 2, 2)
        plan = ((WIDTH, third, "same"), (third, second, "up"), (second, first, "up"))
        self.stages = nn.ModuleList(stage(*s, depth, bottleneck) for s, depth in zip(plan, depths, strict=True))

    def forward(self, x: Tensor, features: list[Tensor]) -> list[Tensor]:
        x = resize(x, features[2])
        outputs = []
        for layer in self.stages:
            x = layer(x)
            outputs.append(x)
        return outputs[::-1]


# --- Section 3.2.2: loss ---------------------------------------------------------------------------------------------


def discrepancies(teacher: list[Tensor], student: list[Tensor]) -> list[Tensor]:
    """M^k: 1 - cosine over the channels at each position: three maps (B, h, w), in 0..2."""
    return [per_position_discrepancy(t, s) for t, s in zip(teacher, student, strict=True)]


def mse(teacher: Tensor, student: Tensor) -> Tensor:
    return functional.mse_loss(at_least_float32(student), at_least_float32(teacher))


def l2(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared Euclidean distance over the channels, averaged over the positions: C times `mse`."""
    return teacher.shape[1] * mse(teacher, student)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # Table 10: one scale's term, 2 x (B, C, h, w) -> scalar
    "cosine": lambda teacher, student: per_position_discrepancy(teacher, student).mean(),  # the paper's
    "l1": lambda teacher, student: functional.l1_loss(at_least_float32(student), at_least_float32(teacher)),
    "l2": l2,
    "mse": mse,
}


class DistillationLoss(nn.Module):
    """Sum over the three scales. With `weighting="printed"` the score's three 1x1 weights are part of it and trained.

    Only so does the printed loss train "an adaptive weight for training purposes". On normal images it is smallest
    where all weights are zero; they are kept positive (ours).
    """

    def __init__(self, settings: DistillationSettings):
        super().__init__()
        self.term = pick(LOSSES, settings.loss, "loss")
        self.printed = settings.weighting == "printed"
        if self.printed:
            self.raw = nn.Parameter(inverse_softplus(torch.ones(3)))

    def weights(self) -> Tensor:
        """(3,), positive: of layers 1, 2 and 3."""
        return functional.softplus(self.raw)

    def forward(self, teacher: list[Tensor], student: list[Tensor]) -> dict[str, Tensor]:
        """-> "loss", then the term of each layer and, where they learn, its weight: scalars."""
        terms = torch.stack([self.term(t, s) for t, s in zip(teacher, student, strict=True)])
        scalars = {f"layer{k}": term for k, term in enumerate(terms.detach(), 1)}
        if not self.printed:
            return {"loss": terms.sum()} | scalars
        weights = self.weights()
        scalars |= {f"weight{k}": weight for k, weight in enumerate(weights.detach(), 1)}
        return {"loss": (weights * terms).sum()} | scalars


# --- Figure 4: the network, and the whole of stage two ---------------------------------------------------------------


class DistillationNetwork(nn.Module):
    """Figure 4 without the teacher: feature aggregation, student, and the weighting of the anomaly maps."""

    def __init__(self, channels: tuple[int, int, int], bottleneck: int, settings: DistillationSettings):
        super().__init__()
        if settings.size % 16:
            raise ValueError(f"size must be a multiple of 16 pixels, got {settings.size}")
        students = {"heterogeneous": HeterogeneousStudent, "homogeneous": HomogeneousStudent}
        self.aggregation = FeatureAggregation(channels, settings)
        self.student = pick(students, settings.student, "student")(channels, bottleneck)
        self.weighting = MapWeighting(pick(KERNELS, settings.weighting, "weighting"))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The teacher's three maps -> their reconstructions, of the same shapes."""
        return self.student(self.aggregation(features), features)


def build(settings: DistillationSettings, channels: tuple[int, int, int], bottleneck: int) -> DistillationNetwork:
    return DistillationNetwork(channels, bottleneck, settings)


def to_maps(network: DistillationNetwork, teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    """AL of a batch, (B, 256, 256), not smoothed. M^k is the cosine's for every loss (ours)."""
    return network.weighting(discrepancies(teacher, student))


class KnowledgeDistillation(AnomalyMapper):
    """The whole of stage two: `KnowledgeDistillation(DistillationSettings())(images)`, images of the settings' size."""

    def __init__(self, settings: DistillationSettings):
        super().__init__(settings, build, to_maps)
        self.to_maps = partial(to_maps, self.network)  # its weighting is part of the network
