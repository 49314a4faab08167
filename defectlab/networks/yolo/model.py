"""One detector, two generations: anchor-free ("v8") and anchor-based ("v5"), written from their published descriptions.

Both are a backbone that halves five times, spatial pyramid pooling, a path aggregation neck (Liu et al. 2018, PANet)
over strides 8, 16, 32, and a head on each of the three maps.

- "v8": C2f blocks; decoupled head without anchors: a distribution over 16 distances for each side of the box
  (generalised focal loss, Li et al. 2020) and a logit per class.
- "v5": C3 blocks; one 1x1 convolution per level predicts three anchors: offset, size, objectness, a logit per class.

A scale multiplies depth and width. Papers replace two parts, given as factories: `fuse`, which joins two maps in the
neck, and `bottleneck`, the residual block inside C2f and C3.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from defectlab.networks.yolo.blocks import C3, SPPF, Bottleneck, BottleneckFactory, C2f, Concatenation, ConvBlock
from defectlab.networks.yolo.settings import DetectorSettings

STRIDES = (8, 16, 32)
BINS = 16  # of the distribution over distances, v8
# Anchors of the v5 generation, width and height in pixels of a 640 px input, found by k-means on COCO.
ANCHORS = (((10, 13), (16, 30), (33, 23)), ((30, 61), (62, 45), (59, 119)), ((116, 90), (156, 198), (373, 326)))


class Scale(NamedTuple):
    depth: float  # multiplies the number of bottlenecks
    width: float  # multiplies the channels
    most_channels: int  # before the multiplication


SMALL_SCALES = {
    "t": Scale(0.33, 0.125, 1024),  # ours: for tests and synthetic data
    "n": Scale(0.33, 0.25, 1024),
    "s": Scale(0.33, 0.50, 1024),
}
SCALES = {
    "v8": SMALL_SCALES | {"m": Scale(0.67, 0.75, 768), "l": Scale(1.0, 1.0, 512), "x": Scale(1.0, 1.25, 512)},
    "v5": SMALL_SCALES | {"m": Scale(0.67, 0.75, 1024), "l": Scale(1.0, 1.0, 1024)},
}
STAGE_DEPTHS = {"v8": (3, 6, 6, 3), "v5": (3, 6, 9, 3)}
Fuse = Callable[[tuple[int, int]], nn.Module]


class Backbone(nn.Module):
    """Images (B, 3, S, S) -> maps at strides 8, 16, 32."""

    def __init__(self, family: str, widths: list[int], depths: list[int], bottleneck: BottleneckFactory):
        super().__init__()
        block = C2f if family == "v8" else C3
        stem = ConvBlock(3, widths[0], 3, 2) if family == "v8" else ConvBlock(3, widths[0], 6, 2, padding=2)
        stages = [
            nn.Sequential(ConvBlock(a, b, 3, 2), block(b, b, depth, True, bottleneck))
            for a, b, depth in zip(widths, widths[1:], depths, strict=False)
        ]
        self.to_stride_4 = nn.Sequential(stem, stages[0])
        self.to_stride_8, self.to_stride_16 = stages[1], stages[2]
        self.to_stride_32 = nn.Sequential(stages[3], SPPF(widths[4], widths[4]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        third = self.to_stride_8(self.to_stride_4(images))
        fourth = self.to_stride_16(third)
        return third, fourth, self.to_stride_32(fourth)


class Neck(nn.Module):
    """Path aggregation: from stride 32 down to 8, then up again to 32; `fuse` joins two maps at four places.

    The lateral 1x1 convolutions are `shrink_*`, the downsampling ones `halve_*`, as in saved weights.
    """

    def __init__(self, family: str, widths: list[int], depth: int, fuse: Fuse, bottleneck: BottleneckFactory):
        super().__init__()
        third, fourth, fifth = widths[2:]
        block = C2f if family == "v8" else C3
        if family == "v8":
            self.shrink_fifth, self.shrink_fourth = nn.Identity(), nn.Identity()
            down5, down4 = fifth, fourth
        else:  # v5 narrows a map before it is upsampled
            self.shrink_fifth, self.shrink_fourth = ConvBlock(fifth, fourth), ConvBlock(fourth, third)
            down5, down4 = fourth, third
        self.fuse_down_fourth = fuse((down5, fourth))
        self.down_fourth = block(down5 + fourth, fourth, depth, False, bottleneck)
        self.fuse_down_third = fuse((down4, third))
        self.down_third = block(down4 + third, third, depth, False, bottleneck)
        self.halve_third = ConvBlock(third, third, 3, 2)
        self.fuse_up_fourth = fuse((third, down4))
        self.up_fourth = block(third + down4, fourth, depth, False, bottleneck)
        self.halve_fourth = ConvBlock(fourth, fourth, 3, 2)
        self.fuse_up_fifth = fuse((fourth, down5))
        self.up_fifth = block(fourth + down5, fifth, depth, False, bottleneck)

    def forward(self, maps: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        third, fourth, fifth = maps
        top = self.shrink_fifth(fifth)
        middle = self.shrink_fourth(self.down_fourth(self.fuse_down_fourth(upsample(top, fourth), fourth)))
        third = self.down_third(self.fuse_down_third(upsample(middle, third), third))
        fourth = self.up_fourth(self.fuse_up_fourth(self.halve_third(third), middle))
        fifth = self.up_fifth(self.fuse_up_fifth(self.halve_fourth(fourth), top))
        return [third, fourth, fifth]


def upsample(x: Tensor, like: Tensor) -> Tensor:
    return interpolate(x, like.shape[-2:], mode="nearest")


class AnchorFreeHead(nn.Module):
    """Two branches per level: 4 x 16 bins of distance, and a logit per class -> (B, 64 + classes, h, w) each."""

    def __init__(self, widths: list[int], classes: int):
        super().__init__()
        box_width = max(16, widths[0] // 4, 4 * BINS)
        class_width = max(widths[0], min(classes, 100))

        def branch(width: int, hidden: int, out: int) -> nn.Sequential:
            return nn.Sequential(ConvBlock(width, hidden, 3), ConvBlock(hidden, hidden, 3), nn.Conv2d(hidden, out, 1))

        self.boxes = nn.ModuleList(branch(w, box_width, 4 * BINS) for w in widths)
        self.classes = nn.ModuleList(branch(w, class_width, classes) for w in widths)
        # At the start: short distances, and about five objects in a 640 px image.
        for box, cls, stride in zip(self.boxes, self.classes, STRIDES, strict=True):
            nn.init.constant_(box[-1].bias, 1.0)
            nn.init.constant_(cls[-1].bias, math.log(5 / classes / (640 / stride) ** 2))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [torch.cat([b(x), c(x)], 1) for x, b, c in zip(maps, self.boxes, self.classes, strict=True)]


class AnchorBasedHead(nn.Module):
    """One 1x1 convolution per level -> (B, 3 * (5 + classes), h, w): x, y, w, h, objectness, classes per anchor."""

    def __init__(self, widths: list[int], classes: int):
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(w, 3 * (5 + classes), 1) for w in widths)
        for level, stride in zip(self.levels, STRIDES, strict=True):  # about eight objects in a 640 px image
            bias = level.bias.data.view(3, 5 + classes)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / max(classes - 0.99, 0.01))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


class Detector(nn.Module):
    """Images (B, 3, S, S) in 0..1, S divisible by 32 -> raw maps at strides 8, 16, 32 (see the two heads).

    ValueError for an unknown family or scale, or an image whose sides are not divisible by 32.

    Args:
        family: "v8" (anchor-free) or "v5" (anchor-based); `scale`: one of `SCALES[family]`.
        fuse: (channels, channels) -> module of two maps, with as many channels as both together.
        bottleneck: (channels, shortcut, kernels, expansion) -> residual block of as many channels.
        anchors: v5 only, (3, 3, 2): level, anchor, (width, height) in pixels of the input; None: those of COCO.
    """

    strides = STRIDES

    def __init__(
        self,
        family: str,
        scale: str,
        classes: int,
        fuse: Fuse = Concatenation,
        bottleneck: BottleneckFactory = Bottleneck,
        anchors: Tensor | None = None,
    ):
        super().__init__()
        if scale not in SCALES.get(family, {}):
            known = "; ".join(f"{f}: {', '.join(s)}" for f, s in SCALES.items())
            raise ValueError(f"unknown detector {family!r}, scale {scale!r}: use one of {known}")
        depth, width, most = SCALES[family][scale]
        widths = [math.ceil(min(c, most) * width / 8) * 8 for c in (64, 128, 256, 512, 1024)]  # multiples of 8
        depths = [max(round(d * depth), 1) for d in STAGE_DEPTHS[family]]
        self.family, self.scale, self.class_count = family, scale, classes
        self.widths = widths[2:]  # of the three maps that the neck gives
        self.backbone = Backbone(family, widths, depths, bottleneck)
        self.neck = Neck(family, widths, depths[0], fuse, bottleneck)
        self.head = (AnchorFreeHead if family == "v8" else AnchorBasedHead)(self.widths, classes)
        if family == "v5":
            anchors = torch.tensor(ANCHORS, dtype=torch.float32) if anchors is None else anchors
            self.register_buffer("anchors", anchors.float())

    def features(self, images: Tensor) -> list[Tensor]:
        """The three maps that the head sees: (B, widths[k], S / stride, S / stride)."""
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"images of {height}x{width} px: a detector needs sides divisible by 32")
        return self.neck(self.backbone(images))

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.head(self.features(images))


def build_detector(settings: DetectorSettings, classes: int, anchors: Tensor | None = None, **parts: Any) -> Detector:
    """A fresh detector of `settings` (family, scale, size); `parts`: `fuse` and `bottleneck` of `Detector`.

    anchors (v5 only): (3, 3, 2) widths and heights in px of the input, by default COCO's scaled to it.
    """
    if settings.family == "v5" and anchors is None:
        anchors = torch.tensor(ANCHORS, dtype=torch.float32) * (settings.size / 640)
    return Detector(settings.family, settings.scale, classes, anchors=anchors, **parts)
