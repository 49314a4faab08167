"""BSDRD: binary struct and detail reverse distillation for magnetic tiles. A RECONSTRUCTION.

Tang, Zhang, Liu, "A novel dual-student reverse knowledge distillation method for magnetic tile defect detection",
Scientific Reports 15, 27117 (2025), doi 10.1038/s41598-025-12339-2. Only the abstract and the caption of figure 1 could
be read: no formula, no setting and no number of the paper is known here. They name, in the order of this file:

- a *struct student* that "dynamically fuses and compresses multi-scale features" of one frozen teacher;
- a *detail student* that "applies wavelet transform to decompose high-level features into low-frequency and
  high-frequency components";
- a "multi-dimensional feature gated fusion loss (MD-GFLoss)".

All else is ours and marked so; a setting switches between two plausible readings. `BSDRD`: images -> anomaly maps.
"""

from dataclasses import dataclass
from typing import ClassVar

import pywt
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from defectlab.networks.blocks import pick
from defectlab.networks.reverse_distillation import (
    LOSSES,
    AnomalyMapper,
    MultiScaleFusion,
    RD4ADSettings,
    ReverseDistillation,
    downsample_to,
    per_position_discrepancy,
    stage,
    upsample,
)
from defectlab.precision import at_least_float32


@dataclass(frozen=True)
class Settings(RD4ADSettings):
    """RD4AD's settings and what BSDRD adds."""

    model: ClassVar[str] = "bsdrd"
    version: ClassVar[int] = 1

    loss: str = "md_gf"  # abstract; "per_pixel" or "whole_map" for the ablation
    students: tuple[str, ...] = ("struct", "detail")  # abstract
    fusion: str = "sum"  # ours, chosen on dev: how the two students' maps become one
    high_level: str = "layer3"  # ours; "layer2+3" is the other reading of "high-level features"
    wavelet: str = "haar"  # ours; "db2", or "none": space-to-depth of the same shape and size
    wavelet_levels: int = 1  # ours
    low_channels: int = 64  # ours, chosen on dev: width of the low band's embedding
    high_channels: int = 16  # ours, chosen on dev: width of the high bands' embedding
    gate: str = "learned"  # ours; "focus" and "equal" are the other readings of "gated"
    gate_barrier: float = 1.0  # ours: strength of the term that keeps every gate open


# --- Struct student: "dynamically fuses and compresses multi-scale features" (abstract) ------------------------------


class DynamicFusion(MultiScaleFusion):
    """RD4AD's fusion, with softmax weights over the three scales for each channel, computed from the pooled scales
    (ours: attention in the style of selective kernels)."""

    def __init__(self, channels: tuple[int, int, int]):
        super().__init__(channels)
        last = channels[-1]
        hidden = max(last // 8, 16)
        self.gate = nn.Sequential(nn.Linear(3 * last, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, 3 * last))

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Teacher features -> (weighted scales side by side (B, 3 C3, h, w), weights (B, 3, C3) that sum to 1).

        The scales are weighted times 3, so that equal weights are RD4AD's plain concatenation.
        """
        scales = torch.stack([a(f) for a, f in zip(self.align, features, strict=True)], 1)  # (B, 3, C3, h, w)
        pooled = rearrange(scales.mean((-1, -2)), "b s c -> b (s c)")
        weights = rearrange(self.gate(pooled), "b (s c) -> b s c", s=3).softmax(1)
        return rearrange(3 * weights[..., None, None] * scales, "b s c h w -> b (s c) h w"), weights


class StructStudent(ReverseDistillation):
    """RD4AD's student with the dynamic fusion; its one-class embedding is the compression."""

    def __init__(self, channels: tuple[int, int, int], bottleneck: int, settings: Settings):
        super().__init__(channels, bottleneck, DynamicFusion)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        fused, _ = self.fusion(features)
        return self.decoder(self.embedding(fused))


# --- Detail student: wavelet bands of the high-level features, processed apart ---------------------------------------


class Wavelet(nn.Module):
    """One level of the 2-D wavelet transform as a fixed depthwise convolution, and its exact inverse.

    Orthonormal filters with periodic borders (PyWavelets' mode "periodization"), so the inverse is the transpose.
    "none" is space-to-depth: four bands of the same shapes without frequency meaning, a control of equal size.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        if name == "none":
            bands = torch.eye(4).view(4, 1, 2, 2)
        else:
            wavelet = pywt.Wavelet(name)
            if not wavelet.orthogonal:
                raise ValueError(f"wavelet {name!r} is not orthogonal: use haar or a db wavelet")
            low, high = (torch.tensor(f[::-1]) for f in (wavelet.dec_lo, wavelet.dec_hi))
            pairs = [(low, low), (high, low), (low, high), (high, high)]  # PyWavelets' cA, cH, cV, cD
            bands = torch.stack([torch.outer(rows, columns) for rows, columns in pairs])[:, None]
        self.register_buffer("filters", bands.to(torch.float32), persistent=False)
        self.border = bands.shape[-1] // 2 - 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), H and W even -> (B, 4, C, H/2, W/2): approximation, horizontal, vertical, diagonal band."""
        channels, b = x.shape[1], self.border
        padded = functional.pad(x, (b, b, b, b), mode="circular") if b else x
        filters = self.filters.to(x.dtype).repeat(channels, 1, 1, 1)
        bands = functional.conv2d(padded, filters, stride=2, groups=channels)
        return rearrange(bands, "b (c k) h w -> b k c h w", k=4)

    def inverse(self, bands: Tensor) -> Tensor:
        """(B, 4, C, H/2, W/2) -> (B, C, H, W)."""
        channels, b = bands.shape[2], self.border
        filters = self.filters.to(bands.dtype).repeat(channels, 1, 1, 1)
        flat = rearrange(bands, "b k c h w -> b (c k) h w")
        x = functional.conv_transpose2d(flat, filters, stride=2, groups=channels)
        for axis in (-1, -2) if b else ():  # periodic: what is beyond a border is added at the opposite one
            left, x, right = x.split([b, x.shape[axis] - 2 * b, b], dim=axis)
            x = x.clone()
            x.narrow(axis, -b, b).add_(left)
            x.narrow(axis, 0, b).add_(right)
        return x


def squeeze(channels: int, width: int) -> nn.Sequential:
    """The bottleneck of a band: from `channels` to `width` and back, over 9x9 positions (four 3x3 convolutions)."""
    narrow, mix = stage(channels, width, "same", 1, 0), stage(width, width, "same", 1, 0)
    return nn.Sequential(*narrow, *mix, nn.Conv2d(width, channels, 1))


class DetailStudent(nn.Module):
    """Wavelet bands of the high-level features, each through a bottleneck of its own, and the inverse transform.

    With two levels the approximation is transformed again, and the low band's bottleneck is at the coarsest level.
    """

    def __init__(self, channels: tuple[int, int, int], bottleneck: int, settings: Settings):
        super().__init__()
        first, second, third = channels
        self.with_layer2 = pick({"layer3": False, "layer2+3": True}, settings.high_level, "high-level features")
        if self.with_layer2:
            self.bring_down = downsample_to(second, third, 1)
            self.merge = nn.Conv2d(2 * third, third, 1)
        self.wavelet = Wavelet(settings.wavelet)
        self.low = squeeze(third, settings.low_channels)
        self.high = nn.ModuleList(squeeze(3 * third, settings.high_channels) for _ in range(settings.wavelet_levels))
        self.refine = stage(third, third, "same", 2, bottleneck)
        self.up = nn.ModuleList([stage(third, second, "up", 2, bottleneck), stage(second, first, "up", 2, bottleneck)])

    def bands(self, x: Tensor, level: int) -> Tensor:
        """(B, C, H, W) -> the same shape after every band of this level and the coarser ones passed its bottleneck."""
        low, high = self.wavelet(x).split([1, 3], dim=1)
        low = self.bands(low[:, 0], level + 1) if level + 1 < len(self.high) else self.low(low[:, 0])
        high = self.high[level](rearrange(high, "b k c h w -> b (k c) h w"))
        return self.wavelet.inverse(torch.cat([low[:, None], rearrange(high, "b (k c) h w -> b k c h w", k=3)], 1))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The teacher's three maps -> their reconstructions, of the same shapes."""
        x = features[2]
        if self.with_layer2:
            x = self.merge(torch.cat([self.bring_down(features[1]), x], 1))
        third = self.refine(self.bands(x, 0))
        second = self.up[0](third)
        return [self.up[1](second), second, third]


STUDENTS = {"struct": StructStudent, "detail": DetailStudent}


class TwoStudents(nn.Module):
    """The students named in the settings, side by side; they share the teacher and nothing else."""

    def __init__(self, channels: tuple[int, int, int], bottleneck: int, settings: Settings):
        super().__init__()
        students = {name: pick(STUDENTS, name, "student")(channels, bottleneck, settings) for name in settings.students}
        self.students = nn.ModuleDict(students)

    def forward(self, features: list[Tensor]) -> list[list[Tensor]]:
        """The teacher's three maps -> for each student their reconstructions."""
        return [student(features) for student in self.students.values()]


# --- MD-GFLoss: gated fusion of discrepancies along several dimensions -----------------------------------------------

DIMENSIONS = ("position", "channel", "map")


def dimension_discrepancies(teacher: Tensor, student: Tensor) -> Tensor:
    """1 - cosine along three dimensions of 2 x (B, C, H, W): (3,), each in 0..2 (our reading of "multi-dimensional").

    Per position, per channel (without channels that are zero in the teacher: they have no direction), per whole map.
    """
    teacher, student = (at_least_float32(f).flatten(2) for f in (teacher, student))  # (B, C, H W)
    position = (1 - functional.cosine_similarity(teacher, student, dim=1)).mean()
    active = (teacher.norm(dim=2) > 1e-6).to(teacher.dtype)
    channel = (1 - functional.cosine_similarity(teacher, student, dim=2)) * active
    whole = (1 - functional.cosine_similarity(teacher.flatten(1), student.flatten(1), dim=1)).mean()
    return torch.stack([position, channel.sum() / active.sum().clamp(min=1), whole])


def gated_fusion(discrepancies: Tensor, logits: Tensor, gate: str, barrier: float) -> tuple[Tensor, Tensor]:
    """Fuse (S, 3) discrepancies by gates on the simplex: -> (loss summed over the S scales, gates (S, 3)).

    "learned": softmax(logits), trained with the student. The barrier -(barrier / 3) sum(log 3 g) keeps all gates open:
    with discrepancies in 0..2 the best gates obey g >= barrier / (3 (2 + barrier)).
    "focus": softmax(5 d) of the detached discrepancies: the largest term leads, nothing is learned. "equal": 1/3 each.
    """
    if gate == "learned":
        gates = logits.softmax(-1)
        return (gates * discrepancies).sum() - (barrier / 3) * torch.log(3 * gates).sum(), gates
    if gate not in ("focus", "equal"):
        raise ValueError(f"unknown gate {gate!r}: use learned, focus or equal")
    gates = (5 * discrepancies.detach()).softmax(-1) if gate == "focus" else torch.full_like(discrepancies, 1 / 3)
    return (gates * discrepancies).sum(), gates


class MDGFLoss(nn.Module):
    """MD-GFLoss over all scales of all students; its parameters are the gate logits of each student and scale."""

    def __init__(self, students: int, settings: Settings):
        super().__init__()
        self.kind, self.barrier = settings.gate, settings.gate_barrier
        self.logits = nn.Parameter(torch.zeros(students, 3, len(DIMENSIONS)), requires_grad=self.kind == "learned")

    def forward(self, teacher: list[Tensor], students: list[list[Tensor]]) -> dict[str, Tensor]:
        """-> "loss", then the mean discrepancy along each dimension: scalars."""
        pairs = [(t, s) for maps in students for t, s in zip(teacher, maps, strict=True)]
        # (students, scales, dimensions)
        found = torch.stack([dimension_discrepancies(t, s) for t, s in pairs]).unflatten(0, (len(students), -1))
        total, _ = gated_fusion(found.flatten(0, 1), self.logits.flatten(0, 1), self.kind, self.barrier)
        return {"loss": total} | dict(zip(DIMENSIONS, found.detach().mean((0, 1)), strict=True))


# --- Scoring ---------------------------------------------------------------------------------------------------------


def to_maps(settings: Settings, teacher: list[Tensor], students: list[list[Tensor]]) -> Tensor:
    """One anomaly map of all students: (B, 256, 256), not smoothed.

    `settings.fusion` (ours; the choice is made on dev): "sum" or "max" over the students of their summed maps;
    "product": the geometric mean over the students at each scale, high only where both fail.
    """
    pairs = [[(t, maps[i]) for maps in students] for i, t in enumerate(teacher)]
    # three times (students, B, 256, 256)
    scales = [torch.stack([upsample(per_position_discrepancy(t, s)) for t, s in scale]) for scale in pairs]
    if settings.fusion == "sum":
        return sum(scales).sum(0)
    if settings.fusion == "max":
        return sum(scales).amax(0)
    if settings.fusion == "product":
        return sum(m.clamp(min=1e-6).log().mean(0).exp() for m in scales)
    raise ValueError(f"unknown fusion {settings.fusion!r}: use sum, max or product")


# --- The whole method ------------------------------------------------------------------------------------------------


def build(settings: Settings, channels: tuple[int, int, int], bottleneck: int) -> TwoStudents:
    return TwoStudents(channels, bottleneck, settings)


def make_loss(settings: Settings):
    """MD-GFLoss, or one of RD4AD's two losses summed over the students: (teacher, students) -> named scalars."""
    if settings.loss == "md_gf":
        return MDGFLoss(len(settings.students), settings)
    plain = pick({"md_gf": None} | LOSSES, settings.loss, "loss")
    return lambda teacher, students: {"loss": sum(plain(teacher, maps) for maps in students)}


class BSDRD(AnomalyMapper):
    """The whole method: `BSDRD(Settings())(images)`."""

    def __init__(self, settings: Settings):
        super().__init__(settings, build, to_maps)
