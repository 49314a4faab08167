"""Maps and boxes moved by the matrix that moved their image."""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor
from torch.nn.functional import grid_sample


def warp(features: Tensor, matrices: Tensor, size: int, ground: float = 0.0) -> Tensor:
    """Maps (B, C, h, w) of S x S images moved as the images were: (B, C, h, w), bilinear, in the maps' dtype.

    `matrices` (B, 3, 3) map pixels of the S x S image to pixels of the output, `size` is S, and `ground` is the value
    outside the map. The maps may have any resolution, as long as they span the whole image.
    """
    back = torch.linalg.inv_ex(matrices.double()).inverse[:, :2]  # inv would synchronise; (B, 2, 3), output -> input
    linear, shift = back[..., :2], back[..., 2]
    shift = linear.sum(2) + 2 / size * shift - 1  # pixels 0..S -> -1..1 on both sides
    theta = torch.cat([linear, shift[..., None]], 2).float()
    height, width = features.shape[-2:]
    moved = grid_sample((features - ground).float(), _grid(theta, height, width), align_corners=False)
    return (moved + ground).to(features.dtype)


def _grid(theta: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w, 2) sampling positions for `theta` (B, 2, 3), output -> input, both in -1..1.

    Written with products and sums, as affine_grid's matrix product would lose a tenth of a pixel in TF32.
    """
    x = (2 * torch.arange(width, device=theta.device) + 1) / width - 1  # pixel centres
    y = (2 * torch.arange(height, device=theta.device) + 1) / height - 1
    theta = theta[:, :, :, None]  # (B, 2, 3, 1)
    along_x = theta[:, :, 0] * x  # (B, 2, w)
    along_y = theta[:, :, 1] * y + theta[:, :, 2]  # (B, 2, h)
    return (along_x[:, :, None] + along_y[..., None]).permute(0, 2, 3, 1)


def enclose(boxes: Tensor, matrices: Tensor) -> Tensor:
    """The boxes that enclose the four moved corners of boxes (..., M, 4): the centre moves, |A| gives the half sides.

    `matrices` (..., 3, 3) move all M boxes of their place.
    """
    linear, shift = matrices[..., None, :2, :2], matrices[..., None, :2, 2]  # (..., 1, 2, 2), (..., 1, 2)
    low, high = boxes[..., None, :2], boxes[..., None, 2:]  # (..., M, 1, 2)
    centre = (linear * (low + high) / 2).sum(-1) + shift
    half = (linear.abs() * (high - low) / 2).sum(-1)
    return torch.cat([centre - half, centre + half], -1)


def warp_maps(maps: Tensor, matrices: Tensor, size: int) -> Tensor:
    """Maps (B, S, S) of whole numbers moved as their images were, nearest, 0 outside: (B, S, S), dtype as given.

    `matrices` and `size` as in `warp`.
    """
    back = torch.linalg.inv_ex(matrices.double()).inverse  # output -> input
    centres = torch.arange(size, device=maps.device, dtype=torch.float64) + 0.5
    x, y = torch.meshgrid(centres, centres, indexing="xy")
    points = torch.stack([x, y, torch.ones_like(x)])  # (3, S, S)
    column, row = einsum(back[:, :2], points, "b i j, j h w -> i b h w").floor().long()
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    flat = row.clamp(0, size - 1) * size + column.clamp(0, size - 1)
    return maps.flatten(1).gather(1, flat.flatten(1)).view_as(maps) * inside
