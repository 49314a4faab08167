"""YOLO-DCF: dual distillation and context-aware fusion for defect detection. A RECONSTRUCTION.

Xing, Yang, "YOLO-DCF: dual distillation and context-aware fusion for defect detection", Scientific Reports 16, 15897
(2026), doi 10.1038/s41598-026-46602-x. Only a plain-language summary could be read: no formula, no setting and no
number of the paper is known here. It names, for "a popular real-time detector family", in the order of this file:

- a *context-guided fusion module* that "first looks along horizontal and vertical directions" and "then blends fine
  local details with this wider view";
- a *multiscale residual block* whose "parallel paths ... focus on dense local textures, medium-sized shapes, and larger
  structures, while a reconfiguration step later folds these paths into a simpler form";
- a *dual distillation* in which "a stronger version of the same network guides a lighter one" by "the spatial
  relationships between blocks and the emphasis within each channel".

All else is ours and marked so, with the published work that it follows. `YOLODCF`: images -> boxes.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from defectlab.networks.blocks import pick
from defectlab.networks.yolo.blocks import Bottleneck, Concatenation, ConvBlock, norm
from defectlab.networks.yolo.decode import DefectFinder
from defectlab.networks.yolo.losses import detection_loss
from defectlab.networks.yolo.model import Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.precision import float32_on_cpu


@dataclass(frozen=True)
class Settings(DetectorSettings):
    """The baseline's settings and what YOLO-DCF adds. Sources as comments."""

    model: ClassVar[str] = "yolo_dcf"
    version: ClassVar[int] = DetectorSettings.version  # plus one where a change of ours alters results

    fusion: str = "context_guided"  # summary; "concat", and "se" or "cbam" at the same four places
    block: str = "multi_scale"  # summary; "plain": the baseline's bottleneck
    teacher_scale: str = ""  # summary: "a stronger version of the same network"; "": no distillation
    teacher_seed: int = 0  # ours: one teacher for all seeds of a student
    relation: float = 0.0  # weight of the block-relation loss
    channel: float = 0.0  # weight of the channel loss
    temperature: float = 1.0  # ours: of the distribution over channels
    grid: int = 8  # ours: blocks per side (fewer on maps that are smaller)


# --- Context-guided fusion: "looks along horizontal and vertical directions", then "blends fine local details" -------


class ContextGuidedFusion(nn.Module):
    """Joins two maps of the neck in place of their concatenation.

    Context: a vertical strip convolution of the row means plus a horizontal one of the column means gives an attention
    map (ours, after the rectangular self-calibration of CGRSeg, ECCV 2024; on vectors, as in coordinate attention, CVPR
    2021). Detail: a depthwise 3x3 convolution. A gate weighs context and detail for each channel and place.
    """

    def __init__(self, channels: tuple[int, int], strip: int = 11):
        super().__init__()
        both = sum(channels)
        hidden = max(both // 8, 16)
        self.horizontal = ConvBlock(both, both, (1, strip), groups=both, activation=nn.Identity)
        self.vertical = ConvBlock(both, both, (strip, 1), groups=both, activation=nn.Identity)
        self.detail = ConvBlock(both, both, 3, groups=both, activation=nn.Identity)
        self.gate = nn.Sequential(ConvBlock(both, hidden), nn.Conv2d(hidden, both, 1))

    def context(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> attention of the same shape, 0..2 with 1 as neutral."""
        down = self.vertical(x.mean(3, keepdim=True))  # (B, C, H, 1)
        along = self.horizontal(x.mean(2, keepdim=True))  # (B, C, 1, W)
        return 2 * (down + along).sigmoid()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        x = torch.cat([first, second], 1)  # (B, C1 + C2, H, W)
        near = x + self.detail(x)
        gate = self.gate(near).sigmoid()
        return near + gate * (self.context(x) * x - near)


class SqueezeExcitationFusion(nn.Module):
    """Concatenation and squeeze-and-excitation (Hu et al. 2018), the plain alternative at the same place."""

    def __init__(self, channels: tuple[int, int]):
        super().__init__()
        both = sum(channels)
        hidden = max(both // 16, 8)
        self.gate = nn.Sequential(nn.Conv2d(both, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, both, 1))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        x = torch.cat([first, second], 1)
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class CBAMFusion(SqueezeExcitationFusion):
    """Concatenation and the convolutional block attention module (Woo et al. 2018): channels first, then places."""

    def __init__(self, channels: tuple[int, int]):
        super().__init__(channels)
        self.place = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        x = torch.cat([first, second], 1)
        x = x * (self.gate(x.mean((2, 3), keepdim=True)) + self.gate(x.amax((2, 3), keepdim=True))).sigmoid()
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)  # (B, 2, H, W)
        return x * self.place(both).sigmoid()


FUSIONS = {
    "concat": Concatenation,
    "context_guided": ContextGuidedFusion,
    "se": SqueezeExcitationFusion,
    "cbam": CBAMFusion,
}


# --- Multi-scale residual block: parallel paths in training, fused into one for use --------------------------------


class MultiScaleResidualBlock(nn.Module):
    """The baseline's bottleneck with three parallel paths in place of its second convolution.

    Dense local texture: a 3x3 convolution. Medium and large structure: depthwise 3x3 convolutions with dilation 2 and
    3, 5 and 7 px wide (ours, after the dilated reparameterised block of UniRepLKNet, CVPR 2024). All paths are linear,
    each with a norm, so that their sum can be fused.
    """

    def __init__(self, channels: int, shortcut: bool = True, kernels: tuple[int, int] = (3, 3), expansion: float = 1.0):
        super().__init__()
        hidden = int(channels * expansion)
        self.first = ConvBlock(channels, hidden, kernels[0])
        self.dense = ConvBlock(hidden, channels, 3, activation=nn.Identity)
        self.medium = ConvBlock(channels, channels, 3, groups=channels, dilation=2, activation=nn.Identity)
        self.large = ConvBlock(channels, channels, 3, groups=channels, dilation=3, activation=nn.Identity)
        self.act = nn.SiLU()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.act(self.dense(h) + (float32_on_cpu(self.medium, h) + float32_on_cpu(self.large, h)))
        return x + y if self.shortcut else y

    def fuse(self) -> nn.Module:
        return FusedMultiScaleBlock(self)


class FusedMultiScaleBlock(nn.Module):
    """`MultiScaleResidualBlock` for inference: no norms, and one depthwise 7x7 kernel for the two dilated paths."""

    def __init__(self, block: MultiScaleResidualBlock):
        super().__init__()
        self.first = block.first.fuse()
        self.dense = block.dense.fuse()[0]
        medium, large = block.medium.fuse()[0], block.large.fuse()[0]
        channels = medium.out_channels
        self.wide = nn.Conv2d(channels, channels, 7, padding=3, groups=channels).to(medium.weight)
        with torch.no_grad():
            self.wide.weight.zero_()
            for path, step in ((medium, 2), (large, 3)):
                taps = slice(3 - step, 4 + step, step)
                self.wide.weight[..., taps, taps] += path.weight
            self.wide.bias.copy_(medium.bias + large.bias)
        self.shortcut = block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = functional.silu(self.dense(h) + self.wide(h))
        return x + y if self.shortcut else y


BLOCKS = {"plain": Bottleneck, "multi_scale": MultiScaleResidualBlock}


# --- Dual distillation: "spatial relationships between blocks" and "emphasis within each channel" --------------------


def block_relations(features: Tensor, grid: int) -> Tensor:
    """(B, C, H, W) -> cosine similarities (B, n, n), -1..1, between the mean features of n blocks, min(grid, H) down
    and min(grid, W) across."""
    height, width = (min(grid, side) for side in features.shape[-2:])
    blocks = functional.adaptive_avg_pool2d(features, (height, width))
    blocks = functional.normalize(rearrange(blocks, "b c h w -> b (h w) c"), dim=-1)
    return blocks @ blocks.transpose(1, 2)


def block_relation_loss(student: Tensor, teacher: Tensor, grid: int = 8) -> Tensor:
    """Mean squared difference of the relations of two maps of equal height and width; their channels may differ."""
    return functional.mse_loss(block_relations(student, grid), block_relations(teacher, grid))


def channel_emphasis(features: Tensor, temperature: float) -> Tensor:
    """(B, C, H, W) -> log of a distribution over the channels (B, C): mean absolute activation, standardised within
    the image (so that all networks have one scale of temperature), softmax at `temperature`."""
    activation = features.abs().mean((2, 3))
    centred = activation - activation.mean(1, keepdim=True)
    return functional.log_softmax(centred / (activation.std(1, keepdim=True) + 1e-6) / temperature, 1)


def channel_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the student's channel emphasis from the teacher's, times temperature squared
    (Hinton et al. 2015). Both maps have the same channels."""
    log_student, log_teacher = channel_emphasis(student, temperature), channel_emphasis(teacher, temperature)
    return functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


class DualDistillation(nn.Module):
    """Both losses, means over the neck's three levels; 1x1 adapters bring the student's channels to the teacher's."""

    def __init__(self, student_widths: list[int], teacher_widths: list[int], settings: Settings):
        super().__init__()
        self.settings = settings
        pairs = zip(student_widths, teacher_widths, strict=True)
        self.adapters = nn.ModuleList(nn.Sequential(nn.Conv2d(s, t, 1, bias=False), norm(t)) for s, t in pairs)

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> dict[str, Tensor]:
        """Neck maps of both -> the scalars whose weight is not zero, weighted: "relation", "channel"."""
        s, terms = self.settings, {}
        with torch.autocast(student[0].device.type, enabled=False):  # small differences of similarities need float32
            student, teacher = [f.float() for f in student], [f.float() for f in teacher]
            if s.relation:
                pairs = zip(student, teacher, strict=True)
                terms["relation"] = s.relation * sum(block_relation_loss(a, b, s.grid) for a, b in pairs) / 3
            if s.channel:
                adapted = [adapter(a) for adapter, a in zip(self.adapters, student, strict=True)]
                pairs = zip(adapted, teacher, strict=True)
                terms["channel"] = s.channel * sum(channel_loss(a, b, s.temperature) for a, b in pairs) / 3
        return terms


# --- Network and loss ------------------------------------------------------------------------------------------------


def build(settings: Settings, classes: int, anchors: Tensor | None = None) -> Detector:
    """The baseline with YOLO-DCF's fusion and block; arguments as `build_detector`."""
    parts = {"fuse": pick(FUSIONS, settings.fusion, "fusion"), "bottleneck": pick(BLOCKS, settings.block, "block")}
    return build_detector(settings, classes, anchors, **parts)


def teacher_settings(settings: Settings) -> Settings:
    """Settings of the teacher: the same recipe at the stronger scale, without distillation."""
    return replace(settings, scale=settings.teacher_scale, teacher_scale="", relation=0.0, channel=0.0)


class DistilledLoss(nn.Module):
    """The detector's own loss and the terms of the dual distillation from a frozen teacher."""

    def __init__(self, settings: Settings, student: Detector, teacher: Detector):
        super().__init__()
        self.criterion = detection_loss(student, settings.size)
        self.dual = DualDistillation(student.widths, teacher.widths, settings)

    def forward(
        self, student: Detector, teacher: Detector, images: Tensor, boxes: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """images (B, 3, S, S) in 0..1, boxes (B, M, 4) xyxy px, labels (B, M), -1 where padded -> named scalars."""
        maps = student.features(images)
        with torch.no_grad():
            taught = teacher.features(images)
        scalars = self.criterion(student.head(maps), boxes, labels)
        terms = self.dual(maps, taught)
        return scalars | terms | {"loss": scalars["loss"] + sum(terms.values())}


class YOLODCF(DefectFinder):
    """The whole method as deployed: `YOLODCF(Settings(), classes=6)(images)`; `detector` has fresh weights."""

    def __init__(self, settings: Settings, classes: int):
        super().__init__(build(settings, classes))
