"""Blocks that several networks are made of, and how a setting picks one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def pick(choices: Mapping[str, Any], name: str, what: str) -> Any:
    """What a setting names; ValueError, which lists the choices, for another name."""
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}: use one of {', '.join(choices)}")
    return choices[name]


class PreActivationBlock(nn.Module):
    """A residual block with norm and ReLU before its convolutions and none after the sum (He et al., ECCV 2016).

    The shortcut is the identity where `project` is False (None: where the widths agree), else a 1x1 convolution.
    """

    def __init__(self, inputs: int, outputs: int, project: bool | None = None):
        super().__init__()

        def half(width: int) -> tuple[nn.Module, ...]:
            return nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, outputs, 3, padding=1, bias=False)

        self.residual = nn.Sequential(*half(inputs), *half(outputs))
        project = inputs != outputs if project is None else project
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        return self.shortcut(x) + self.residual(x)


def two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, each with batch norm and ReLU: the block of a U-Net (Ronneberger et al., MICCAI 2015)."""
    layers: list[nn.Module] = []
    for before in (inputs, outputs):
        layers += [nn.Conv2d(before, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
