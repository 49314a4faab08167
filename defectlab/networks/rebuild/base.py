"""What the methods that learn good images alone share: how they are trained and evaluated, crops, maps of windows.

A method's module has its settings, its networks and losses in its paper's order, and a subclass of `Normal`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defectlab.networks.reverse_distillation import MAP_SIZE, image_scores


class Normal(nn.Module):
    """A method that learns what is normal. The training calls, in this order: `prepare` of its images; `begin`; `loss`
    of each batch; `end`; then, of dev and test, `prepare`, `maps` and `scores`, in eval mode and without gradients."""

    foreign = False  # whether `begin` needs images of other sets

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) -> what of them is kept: what a frozen part makes of them, or themselves."""
        return images

    def begin(self, prepared: Tensor, foreign: Tensor | None = None) -> None:
        """Before the training, with all of its images, prepared, and uint8 images (M, 3, S, S) of other sets."""

    def loss(self, prepared: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """A batch -> named scalars, of which "loss" is minimised; `generator` is on the CPU."""
        raise NotImplementedError

    def end(self, prepared: Tensor) -> None:
        """After the training, in eval mode and without gradients, with all of its images."""

    def maps(self, prepared: Tensor) -> Tensor:
        """A batch -> anomaly maps (B, 256, 256) float32, higher = more anomalous."""
        raise NotImplementedError

    def scores(self, prepared: Tensor, maps: Tensor) -> Tensor:
        """A batch and its maps -> a score for each image (B,): the maximum of its map."""
        return image_scores(maps)


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in 0..1."""
    return images.float() / 255


def crops(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A crop of `side` px of each image (B, C, H, W), at a place of its own; whole images where they have that size."""
    free = [length - side for length in images.shape[-2:]]
    if min(free) < 0:
        raise ValueError(f"crops of {side} px do not fit into images of {images.shape[-2]} x {images.shape[-1]} px")
    places = [torch.randint(most + 1, (len(images),), generator=generator).tolist() for most in free]
    cut = [image[:, y : y + side, x : x + side] for image, y, x in zip(images, *places, strict=True)]
    return torch.stack(cut)


def over_windows(images: Tensor, side: int, stride: int, of: Callable[[Tensor], Tensor], batch: int = 64) -> Tensor:
    """Maps of images (B, C, H, W), each pixel the mean over all windows of `side` px that hold it: (B, H, W).

    of: windows (n, C, side, side) -> maps (n, side, side). Windows stand every `stride` px and at the far edges.
    """
    height, width = images.shape[-2:]
    rows, columns = (sorted({*range(0, length - side, stride), length - side}) for length in (height, width))
    places = [(y, x) for y in rows for x in columns]
    total, times = images.new_zeros((len(images), height, width), dtype=torch.float32), images.new_zeros(height, width)
    times = times.float()
    for y, x in places:
        window = images[:, :, y : y + side, x : x + side]
        total[:, y : y + side, x : x + side] += torch.cat([of(part).float() for part in window.split(batch)])
        times[y : y + side, x : x + side] += 1
    return total / times


def at_map_size(maps: Tensor) -> Tensor:
    """(B, H, W) -> (B, 256, 256) float32, bilinear."""
    if maps.shape[-2:] == (MAP_SIZE, MAP_SIZE):
        return maps.float()
    return F.interpolate(maps[:, None].float(), (MAP_SIZE, MAP_SIZE), mode="bilinear", align_corners=False)[:, 0]
