"""The blocks that the detectors are made of, and the fusing of batch norms into them for inference.

Published pieces: cross-stage partial networks (Wang et al. 2020, CSPNet) as C3 and C2f, spatial pyramid pooling (He et
al. 2015) in its sequential form, residual bottlenecks (He et al. 2016), SiLU (Elfwing et al. 2018).
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

BottleneckFactory = Callable[[int, bool, tuple[int, int], float], nn.Module]


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, SiLU; "same" padding at stride 1, halving at stride 2."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        padding: int | None = None,
        activation: type[nn.Module] = nn.SiLU,
    ):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        border = tuple(dilation * (side - 1) // 2 for side in sides) if padding is None else padding
        self.conv = nn.Conv2d(channels, out_channels, sides, stride, border, dilation, groups, bias=False)
        self.norm = norm(out_channels)
        self.act = activation(inplace=True) if activation is not nn.Identity else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def fuse(self) -> nn.Module:
        return nn.Sequential(fuse_conv_bn_eval(self.conv, self.norm), self.act)


def norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm as in both generations: eps 1e-3, statistics that follow slowly (momentum 0.03)."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)


class Bottleneck(nn.Module):
    """Two convolutions with a residual connection, expansion x channels wide in between."""

    def __init__(self, channels: int, shortcut: bool = True, kernels: tuple[int, int] = (3, 3), expansion: float = 1.0):
        super().__init__()
        hidden = int(channels * expansion)
        self.first = ConvBlock(channels, hidden, kernels[0])
        self.second = ConvBlock(hidden, channels, kernels[1])
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):
    """Cross-stage partial block of the anchor-free generation: half of the channels pass `depth` bottlenecks, and the
    outputs of all of them are concatenated with both halves."""

    def __init__(
        self, channels: int, out_channels: int, depth: int, shortcut: bool, bottleneck: BottleneckFactory = Bottleneck
    ):
        super().__init__()
        half = out_channels // 2
        self.enter = ConvBlock(channels, 2 * half)
        self.bottlenecks = nn.ModuleList(bottleneck(half, shortcut, (3, 3), 1.0) for _ in range(depth))
        self.leave = ConvBlock((2 + depth) * half, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))  # 2 x (B, C/2, H, W)
        for bottleneck in self.bottlenecks:
            parts.append(bottleneck(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class C3(nn.Module):
    """Cross-stage partial block of the anchor-based generation: 1x1 convolutions around a chain of bottlenecks."""

    def __init__(
        self, channels: int, out_channels: int, depth: int, shortcut: bool, bottleneck: BottleneckFactory = Bottleneck
    ):
        super().__init__()
        half = out_channels // 2
        self.enter = ConvBlock(channels, half)
        self.bypass = ConvBlock(channels, half)
        self.bottlenecks = nn.Sequential(*(bottleneck(half, shortcut, (1, 3), 1.0) for _ in range(depth)))
        self.leave = ConvBlock(2 * half, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.cat([self.bottlenecks(self.enter(x)), self.bypass(x)], 1))


class SPPF(nn.Module):
    """Spatial pyramid pooling, fast: a 5x5 max pooling applied three times has the windows 5, 9 and 13."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.enter = ConvBlock(channels, channels // 2)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.leave = ConvBlock(2 * channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.enter(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.leave(torch.cat(maps, 1))


class Concatenation(nn.Module):
    """How the neck joins two maps; papers put their fusion modules in its place."""

    def __init__(self, channels: tuple[int, int]):
        super().__init__()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second], 1)


def fused(model: nn.Module) -> nn.Module:
    """A copy for inference, in which each module with a method `fuse` is replaced by what `fuse` returns."""
    return _fuse(copy.deepcopy(model).eval())


def _fuse(module: nn.Module) -> nn.Module:
    if hasattr(type(module), "fuse"):  # a method: a submodule may be called `fuse`, too
        return module.fuse()
    for name, child in module.named_children():
        module._modules[name] = _fuse(child)
    return module
