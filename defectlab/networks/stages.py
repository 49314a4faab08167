"""Small networks of an inspection in stages: which windows of a frame may hold a defect, and whether a crop is one.

Both are ours. The staged systems of the literature (locate the part, find the fastener in it, classify the crop) have
large detectors at each stage; what is asked here is how misses of stages add up, and small ones show that as well.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from defectlab.networks.yolo.blocks import ConvBlock
from defectlab.precision import check_uint8

SIDE = 64  # px of a window as the region network sees it
CELL = 16  # px of a cell there


def encoder(widths: tuple[int, ...]) -> nn.Sequential:
    """Images (B, 3, H, W) -> maps (B, widths[-1], H / 2^n, W / 2^n)."""
    return nn.Sequential(*(ConvBlock(a, b, 3, 2) for a, b in zip((3, *widths), widths, strict=False)))


class RegionNet(nn.Module):
    """Reduced uint8 frames (B, 3, h, w), multiples of 32 px -> logits (B, P) of their windows, row by row, half a
    window apart.

    `reduce` gives the frames: there a window has 64 px. Each cell of 16 px gets a logit; a window's is the highest of
    its 4 x 4 cells. ValueError for a window that is no multiple of 64 px, or floats.
    """

    def __init__(self, window: int, widths: tuple[int, ...] = (16, 32, 48, 64)):
        super().__init__()
        if window < SIDE or window % SIDE:
            raise ValueError(f"a window of {window} px: the region network needs a multiple of {SIDE}")
        self.factor = window // SIDE
        self.encoder = encoder(widths)
        self.cells = nn.Sequential(ConvBlock(widths[-1], widths[-1], 3), nn.Conv2d(widths[-1], 1, 1))
        nn.init.constant_(self.cells[-1].bias, -2.0)  # at the start most cells hold nothing

    def reduce(self, frames: Tensor, batch: int = 8) -> Tensor:
        """uint8 (N, 3, H, W) -> (N, 3, H / factor, W / factor), means over areas."""
        return torch.cat([avg_pool2d(part.float(), self.factor).round().byte() for part in frames.split(batch)])

    def forward(self, frames: Tensor) -> Tensor:
        check_uint8(frames)
        x = (frames.float() / 255).contiguous(memory_format=torch.channels_last)
        logits = self.cells(self.encoder(x))  # (B, 1, h / 16, w / 16)
        cells = SIDE // CELL  # of a window's side
        return max_pool2d(logits, cells, cells // 2).flatten(1)


class CropClassifier(nn.Module):
    """uint8 crops (B, 3, S, S) -> logits (B,) of "a pit". ValueError for floats."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 64)):
        super().__init__()
        self.encoder = encoder(widths)
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, crops: Tensor) -> Tensor:
        check_uint8(crops)
        x = (crops.float() / 255).contiguous(memory_format=torch.channels_last)
        return self.head(self.encoder(x).mean((2, 3)))[:, 0]
