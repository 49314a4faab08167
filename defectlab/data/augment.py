"""Augmentation for detection, batched: mosaic, affine, flips, colour. And images corrupted as in a factory.

A whole batch is made by one bilinear sampling pass. The four source images of a mosaic lie side by side in an atlas of
2S x 2S pixels; the mosaic's canvas is that atlas shifted by whole pixels and cut to 2S x 2S, so output pixel ->
canvas -> atlas is one affine map per image. An image without mosaic fills the first quarter of its atlas.

Coordinates are continuous: pixel (row i, column j) covers [j, j + 1] x [i, i + 1] and has its centre at
(j + 0.5, i + 0.5); boxes and matrices use the same coordinates, so an S x S image spans 0..S.

Source of the mosaic: Bochkovskiy et al. 2020 (arXiv:2004.10934).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, interpolate, pad

from defectlab.data.images import GROUND
from defectlab.geometry import _grid, enclose
from defectlab.precision import full_float32, sent

MIN_SIDE = 2.0  # px: boxes that are narrower or lower after clipping are dropped
MAX_ASPECT = 100.0  # longer side over shorter side, above which a box is dropped
MIN_AREA = 0.10  # of the area before clipping that has to remain
# Uniform random numbers for one image. The reserved ones belonged to shear and mixup, which no study uses: they keep
# their places, since what a seed gives depends on the order and count of all.
# fmt: off
_NUMBERS = {
    "mosaic": 1, "partners": 3, "centre": 2, "angle": 1, "scale": 1, "reserved for shear": 2, "translate": 2,
    "flips": 2, "hue": 1, "saturation": 1, "brightness": 1, "contrast": 1, "reserved for mixup": 65,
}
# fmt: on


@dataclass(frozen=True)
class Augmentation:
    """Settings of `augment`; a field out of its range raises ValueError."""

    mosaic: float = 1.0  # probability, 0..1, of a mosaic of 2 x 2 images
    degrees: float = 0.0  # rotation by an angle in ± degrees, 0..180
    translate: float = 0.1  # shift by ± this fraction of the side S, 0..1, in x and in y
    scale: float = 0.5  # scale factor in 1 ± scale, 0 <= scale < 1
    flip_left_right: float = 0.5  # probability, 0..1
    flip_up_down: float = 0.0  # probability, 0..1
    hue: float = 0.015  # turn about the grey axis by ± this fraction of a full turn, 0..0.5; colour images only
    saturation: float = 0.7  # gain in 1 ± saturation, 0..1; colour images only
    brightness: float = 0.4  # gain in 1 ± brightness, 0..1
    contrast: float = 0.0  # gain about the image's mean in 1 ± contrast, 0..1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            limit = {"degrees": 180.0, "hue": 0.5}.get(name, 1.0)
            is_open = name == "scale"  # at the limit itself the affine map could be singular
            if not 0 <= value <= limit or (is_open and value == limit):
                raise ValueError(f"{name} = {value}: choose 0 <= {name} {'<' if is_open else '<='} {limit:g}")


@dataclass(frozen=True)
class Batch:
    """B augmented images of S x S pixels. Tile k of a mosaic is top left, top right, bottom left, bottom right."""

    images: Tensor  # float32 (B, 3, S, S), 0..1; grey images are expanded, so their three channels share memory
    boxes: Tensor  # float32 (B, M', 4) xyxy in pixels, zeros where padded
    labels: Tensor  # int64 (B, M'), -1 where padded; real boxes come first
    matrices: Tensor  # float32 (B, 4, 3, 3): pixel (x, y, 1) of source tile k -> pixel of the output
    sources: Tensor  # int64 (B, 4): the index in the split of tile k; four times the same without mosaic


def augment(
    split_images: Tensor,
    split_boxes: Tensor,
    split_labels: Tensor,
    indices: Tensor,
    settings: Augmentation,
    generator: torch.Generator,
) -> Batch:
    """The images `indices` (B,) of a split, augmented, on the split's device.

    `split_images` is uint8 (N, C, S, S) with C = 1 or 3, `split_boxes` float32 (N, M, 4) xyxy in pixels, `split_labels`
    int64 (N, M) with -1 where padded. The three partners of a mosaic are drawn from the whole split (with replacement).

    A box becomes the box that encloses its four moved corners, clipped to what is visible of its tile and to the
    output. It is dropped if then a side is below MIN_SIDE, its aspect ratio above MAX_ASPECT, or less than MIN_AREA of
    its area is left. M' is the largest count of boxes in the batch, at least 1.

    All random choices and the boxes are worked out on the CPU, where `generator` lives, and go over in one transfer: a
    seed draws the same batch on every device. Raises ValueError for images that are not square or not uint8, and for a
    generator that is not on the CPU.
    """
    count, (split_size, channels, height, size) = len(indices), split_images.shape
    if split_images.dtype != torch.uint8 or height != size or channels not in (1, 3):
        raise ValueError(
            f"split_images is {split_images.dtype} {tuple(split_images.shape)}: give uint8 (N, 1 or 3, S, S)"
        )
    if generator.device.type != "cpu":
        raise ValueError(f"generator is on {generator.device}: give a CPU generator, it serves every device")
    drawn = _draw(settings, count, split_size, size, generator)
    mosaic, partners, indices = drawn.pop("mosaic"), drawn.pop("partners").long(), indices.cpu()
    partners = torch.where(mosaic[:, None], partners, indices[:, None])  # (B, 3)
    drawn["sources"] = sources = torch.cat([indices[:, None], partners], 1)  # (B, 4)
    boxes, labels = split_boxes.cpu()[sources], split_labels.cpu()[sources]  # (B, 4, M, 4), (B, 4, M)
    drawn["boxes"], drawn["labels"] = _boxes(drawn, boxes, labels, mosaic, size)

    drawn = _to_device(drawn, split_images.device)
    sources = drawn["sources"].long()
    images = _sample(split_images[sources], drawn["visible"], drawn["theta"])  # (B, C, S, S), 0 = ground
    images = _colour(images, drawn, settings)
    return Batch(images.expand(-1, 3, -1, -1), drawn["boxes"], drawn["labels"].long(), drawn["matrices"], sources)


def plain(split_images: Tensor, indices: Tensor) -> Tensor:
    """Images `indices` (B,) of uint8 (N, C, S, S) as they are: float32 (B, 3, S, S) in 0..1."""
    return (split_images[indices.to(split_images.device)] / 255).expand(-1, 3, -1, -1)


# ------------------------------------------------------------------------------------------------------------ drawing


def _draw(
    settings: Augmentation, count: int, split_size: int, size: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """All random choices of a batch, as small tensors (B, ...) on the CPU, float64 but for `mosaic`.

    The same numbers are drawn whatever the settings: switching one augmentation off leaves the others as they were.
    """
    drawn = torch.rand(count, sum(_NUMBERS.values()), dtype=torch.float64, generator=generator)
    uniform = dict(zip(_NUMBERS, drawn.split(list(_NUMBERS.values()), 1), strict=True))  # name: (B, numbers)
    signed = {name: 2 * numbers - 1 for name, numbers in uniform.items()}
    mosaic = uniform["mosaic"] < settings.mosaic  # (B, 1)

    # Mosaic: the four images touch in `centre` of the 2S x 2S canvas, a whole pixel from S // 2 to S // 2 + S.
    centre = size // 2 + _integer(uniform["centre"], size + 1)  # (B, 2)
    extent = size * (1 + mosaic.double())  # (B, 1), side of the canvas
    origin = torch.where(mosaic, centre - size, 0.0)  # (B, 2), where the atlas begins on the canvas
    visible = torch.cat([(-origin).clamp(min=0), (extent - origin).clamp(max=2 * size)], 1)  # (B, 4) xyxy in the atlas
    corners = size * torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    offsets = torch.where(mosaic[..., None], corners, 0.0)  # (B, 4, 2), where tile k begins in the atlas

    # Rotation and scale about the canvas's centre, which comes to the output's centre plus a translation.
    angle = math.radians(settings.degrees) * signed["angle"][:, 0]
    factor = 1 + settings.scale * signed["scale"]  # (B, 1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    linear = (factor * turn).view(count, 2, 2)
    shift = size * (0.5 + settings.translate * signed["translate"]) - linear.sum(2) * extent / 2  # (B, 2)
    chances = torch.tensor([settings.flip_left_right, settings.flip_up_down], dtype=torch.float64)
    flipped = (uniform["flips"] < chances).double()  # (B, 2)
    sign = 1 - 2 * flipped
    linear, shift = sign[..., None] * linear, sign * shift + size * flipped  # x -> S - x where flipped
    bottom = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).expand(count, 1, 3)

    def from_position(begin: Tensor) -> Tensor:
        """(B, 3, 3): pixels of something that begins at `begin` (B, 2) on the canvas -> pixels of the output."""
        moved = linear @ begin[..., None] + shift[..., None]
        return torch.cat([torch.cat([linear, moved], 2), bottom], 1)

    matrices = torch.stack([from_position(origin + offsets[:, k]) for k in range(4)], 1)  # (B, 4, 3, 3)
    theta = _scale_shift(1 / size, -1) @ torch.linalg.inv(from_position(origin)) @ _scale_shift(size / 2, size / 2)

    # Saturation scales, and hue turns, the part of a colour that is at right angles to the grey axis.
    saturation = (1 + settings.saturation * signed["saturation"])[..., None]
    hue = (2 * math.pi * settings.hue * signed["hue"])[..., None]  # (B, 1, 1)
    grey = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)
    colour = grey + saturation * (hue.cos() * (torch.eye(3, dtype=torch.float64) - grey) + hue.sin() * cross)
    return {
        "mosaic": mosaic[:, 0],
        "partners": _integer(uniform["partners"], split_size),
        "visible": visible,
        "offsets": offsets,
        "matrices": matrices,
        "theta": theta[:, :2],
        "brightness": 1 + settings.brightness * signed["brightness"][:, 0],
        "contrast": 1 + settings.contrast * signed["contrast"][:, 0],
        "colour": colour,
    }


def _integer(uniform: Tensor, limit: int) -> Tensor:
    """Numbers in 0..1 to whole numbers 0..limit - 1 (the clamp: a product may be rounded up to the limit)."""
    return (uniform * limit).floor().clamp(max=limit - 1)


def _scale_shift(scale: float, shift: float) -> Tensor:
    """float64 (3, 3): x -> scale * x + shift in both coordinates."""
    return torch.tensor([[scale, 0, shift], [0, scale, shift], [0, 0, 1]], dtype=torch.float64)


def _to_device(drawn: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same tensors (B, ...) as float32 on the device, brought over in a single transfer."""
    flat = [tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in drawn.values()]
    moved = sent(torch.cat([tensor.float() for tensor in flat], 1), device)
    parts = moved.split([tensor.shape[1] for tensor in flat], 1)
    return {name: part.reshape(tensor.shape) for (name, tensor), part in zip(drawn.items(), parts, strict=True)}


# ----------------------------------------------------------------------------------------------------------- images


def _sample(tiles: Tensor, visible: Tensor, theta: Tensor) -> Tensor:
    """uint8 tiles (B, 4, C, S, S) -> (B, C, S, S), levels above ground, of the part `visible` (B, 4) of the atlas."""
    count, _, channels, size, _ = tiles.shape
    atlas = tiles.new_empty(count, channels, 2, size, 2, size, dtype=torch.float32)
    atlas.permute(0, 2, 4, 1, 3, 5).copy_(tiles.view(count, 2, 2, channels, size, size))
    atlas = atlas.view(count, channels, 2 * size, 2 * size)
    # Levels are counted from the ground, so that what is not visible and what grid_sample pads are both zero.
    position = torch.arange(2 * size, device=tiles.device)
    rows = (position >= visible[:, 1, None]) & (position < visible[:, 3, None])  # (B, 2S)
    columns = (position >= visible[:, 0, None]) & (position < visible[:, 2, None])
    atlas.sub_(GROUND).mul_(rows[:, None, :, None]).mul_(columns[:, None, None, :])
    return grid_sample(atlas, _grid(theta, size, size), mode="bilinear", padding_mode="zeros", align_corners=False)


def _colour(levels: Tensor, drawn: dict[str, Tensor], settings: Augmentation) -> Tensor:
    """Levels above ground (B, C, S, S) -> (B, C, S, S) in 0..1 with the drawn colour, written over the input."""
    brightness, contrast = drawn["brightness"], drawn["contrast"]
    gain, offset = brightness * contrast / 255, brightness * GROUND / 255  # (B,)
    if settings.contrast > 0:
        offset = offset + (1 - contrast) * brightness * levels.mean((1, 2, 3)) / 255
    if levels.shape[1] == 3 and (settings.hue > 0 or settings.saturation > 0):
        levels = (drawn["colour"] @ levels.flatten(2)).view_as(levels)
    return levels.mul_(gain[:, None, None, None]).add_(offset[:, None, None, None]).clamp_(0, 1)


# -------------------------------------------------------------------------------------------------------------- boxes


def _move_boxes(boxes: Tensor, matrices: Tensor, visible: Tensor, offsets: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Boxes (B, 4, M, 4) in pixels of their tiles -> clipped boxes in pixels of the output, and bool (B, 4, M).

    The part of a tile that the canvas shows is a box, too, in the tile's own pixels: the first cut is made there.
    """
    limits = (visible[:, None] - offsets.repeat(1, 1, 2)).clamp(0, size)[:, :, None]  # (B, 4, 1, 4) xyxy
    low, high = limits[..., :2].repeat(1, 1, 1, 2), limits[..., 2:].repeat(1, 1, 1, 2)
    cut = boxes.maximum(low).minimum(high)  # (B, 4, M, 4)
    whole, clipped = enclose(boxes, matrices), enclose(cut, matrices).clamp(0, size)
    sides = clipped[..., 2:] - clipped[..., :2]
    keep = (
        (cut[..., 2:] > cut[..., :2]).all(-1)  # a box without width would get one by rotation
        & (sides.amin(-1) >= MIN_SIDE)
        & (sides.amax(-1) <= MAX_ASPECT * sides.amin(-1))
        & (sides.prod(-1) >= MIN_AREA * (whole[..., 2:] - whole[..., :2]).prod(-1))
    )
    return clipped, keep


def _boxes(drawn: dict[str, Tensor], boxes: Tensor, labels: Tensor, mosaic: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Boxes (B, 4, M, 4) and labels (B, 4, M) of the tiles -> those that are kept, in their order: (B, M', 4), (B, M').

    Padded at the end with zeros and the label -1.
    """
    matrices, visible, offsets = (drawn[name].float() for name in ("matrices", "visible", "offsets"))
    boxes, keep = _move_boxes(boxes, matrices, visible, offsets, size)
    used = mosaic[:, None] | (torch.arange(4) == 0)  # (B, 4): without mosaic the first tile only
    keep &= (labels >= 0) & used[..., None]
    boxes, labels, keep = boxes.flatten(1, 2), labels.flatten(1, 2), keep.flatten(1, 2)  # (B, 4 M, ...)
    order = keep.long().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(keep.sum(1).max()))]
    boxes, labels = boxes.masked_fill(~keep[..., None], 0), labels.masked_fill(~keep, -1)
    return boxes.gather(1, order[..., None].expand(-1, -1, 4)), labels.gather(1, order)


# ---------------------------------------------------------------------------------------------------------- corruption


def line_kernel(length: float, angle: float, side: int) -> Tensor:
    """(side, side) weights of a straight stroke through the middle, `length` px long at `angle` radians, sum 1."""
    steps = torch.linspace(-0.5, 0.5, 8 * side) * (length - 1)
    x, y = steps * math.cos(angle) + side // 2, steps * math.sin(angle) + side // 2
    kernel = torch.zeros(side, side)
    for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):  # a point falls on its four neighbours, nearer ones more
        column, row = x.floor().long() + dx, y.floor().long() + dy
        weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
        inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
        kernel.index_put_((row[inside], column[inside]), weight[inside], accumulate=True)
    return kernel / kernel.sum()


def motion_blur(images: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Blur uint8 (N, C, H, W) along a stroke of `length` px, each image in a direction of its own (drawn uniformly
    from `generator`, on the CPU). Length 1 or less: unchanged."""
    if length <= 1:
        return images
    count, channels, height, width = images.shape
    side = length + 1 - length % 2 + 2  # odd, with room for a stroke's soft end
    angles = (torch.rand(count, generator=generator) * math.pi).tolist()
    kernels = torch.stack([line_kernel(length, angle, side) for angle in angles]).to(images.device)
    padded = pad(images.float(), (side // 2,) * 4, mode="reflect")
    strokes = kernels.repeat_interleave(channels, 0)[:, None]  # (N C, 1, side, side)
    with full_float32():  # the same images on every device
        flat = padded.view(1, count * channels, *padded.shape[-2:])
        blurred = conv2d(flat, strokes, groups=count * channels)
    return blurred.view(count, channels, height, width).round().clamp(0, 255).byte()


def gaussian_noise(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Add normal noise of `deviation` grey levels (of 255) to uint8 (N, C, H, W), drawn on the CPU from `generator`."""
    noise = torch.randn(images.shape, generator=generator).to(images.device) * deviation
    return (images.float() + noise).round().clamp(0, 255).byte()


def corrupt(images: Tensor, kind: str, strength: float, generator: torch.Generator, batch: int = 64) -> Tensor:
    """`kind` "blur" (strength: length in px) or "noise" (grey levels); strength 0 leaves the images as they are."""
    if kind not in CORRUPTIONS:
        raise ValueError(f"unknown kind of corruption {kind!r}: use {' or '.join(CORRUPTIONS)}")
    if strength == 0:
        return images
    return torch.cat([CORRUPTIONS[kind](chunk, strength, generator) for chunk in images.split(batch)])


def resized(images: Tensor, size: int, batch: int = 64) -> Tensor:
    """uint8 (N, C, S, S) -> (N, C, size, size), bilinear, antialiased where it shrinks."""
    if images.shape[-1] == size:
        return images
    parts = [interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True) for chunk in images.split(batch)]
    return torch.cat([part.round().clamp(0, 255).byte() for part in parts])


CORRUPTIONS = {"blur": motion_blur, "noise": gaussian_noise}
