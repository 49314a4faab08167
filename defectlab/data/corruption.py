"""Pictures spoilt as in a factory: motion blur and sensor noise, batched on the device."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from defectlab.precision import full_float32


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
    """Blur uint8 (N, C, H, W) along a stroke of `length` px, each picture in a direction of its own (drawn uniformly
    from `generator`, on the CPU). Length 1 or less: unchanged."""
    if length <= 1:
        return images
    count, channels, height, width = images.shape
    side = length + 1 - length % 2 + 2  # odd, with room for a stroke's soft end
    angles = (torch.rand(count, generator=generator) * math.pi).tolist()
    kernels = torch.stack([line_kernel(length, angle, side) for angle in angles]).to(images.device)
    padded = functional.pad(images.float(), (side // 2,) * 4, mode="reflect")
    strokes = kernels.repeat_interleave(channels, 0)[:, None]  # (N C, 1, side, side)
    with full_float32():  # the same pictures on every device
        flat = padded.view(1, count * channels, *padded.shape[-2:])
        blurred = functional.conv2d(flat, strokes, groups=count * channels)
    return blurred.view(count, channels, height, width).round().clamp(0, 255).byte()


def gaussian_noise(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Add normal noise of `deviation` grey levels (of 255) to uint8 (N, C, H, W), drawn on the CPU from `generator`."""
    noise = torch.randn(images.shape, generator=generator).to(images.device) * deviation
    return (images.float() + noise).round().clamp(0, 255).byte()


def spoil(images: Tensor, kind: str, strength: float, generator: torch.Generator, batch: int = 64) -> Tensor:
    """`kind` "blur" (strength: length in px) or "noise" (grey levels); strength 0 leaves the pictures as they are."""
    if kind not in SPOILERS:
        raise ValueError(f"unknown kind of corruption {kind!r}: use {' or '.join(SPOILERS)}")
    if strength == 0:
        return images
    return torch.cat([SPOILERS[kind](chunk, strength, generator) for chunk in images.split(batch)])


def resized(images: Tensor, size: int, batch: int = 64) -> Tensor:
    """uint8 (N, C, S, S) -> (N, C, size, size), bilinear, antialiased where it shrinks."""
    if images.shape[-1] == size:
        return images
    parts = [
        functional.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True)
        for chunk in images.split(batch)
    ]
    return torch.cat([part.round().clamp(0, 255).byte() for part in parts])


SPOILERS = {"blur": motion_blur, "noise": gaussian_noise}
