"""The floor under every method: the contrast of an image itself, from which nothing is learnt."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from defectlab.networks.rebuild.base import Normal, at_map_size


@dataclass(frozen=True)
class ContrastSettings:
    """All is ours."""

    model: ClassVar[str] = "contrast"
    version: ClassVar[int] = 1

    dataset: str = "aitex"
    size: int = 256
    window: int = 17  # px a side, odd
    precision: str = "fp32"


class Contrast(Normal):
    """The standard deviation of the grey levels around a pixel."""

    def __init__(self, settings: ContrastSettings):
        super().__init__()
        self.window = settings.window

    def maps(self, prepared: Tensor) -> Tensor:
        grey = prepared.float().mean(1, keepdim=True) / 255  # (B, 1, H, W)
        padded = F.pad(grey, [self.window // 2] * 4, mode="reflect")
        mean, square = (F.avg_pool2d(x, self.window, 1)[:, 0] for x in (padded, padded**2))
        return at_map_size((square - mean**2).clamp(min=0).sqrt())
