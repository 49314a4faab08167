"""Number formats: where bf16 pays, and where a computation has to stay in float32; and the way to the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 pays here: on GPUs with bf16 units, and on CPUs with AVX-512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8  # before, bf16 is emulated
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def precision_of(settings: Any, device: str | torch.device) -> str:
    """The precision a run really uses: "bf16" where settings ask for it and the device is fast at it, else "fp32", or
    "tf32" where the device rounds what float32 convolutions multiply to that (outside `full_float32`)."""
    device = torch.device(device)
    if settings.precision == "bf16" and fast_bf16(device):
        return "bf16"
    rounds = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return "tf32" if rounds and torch.backends.cudnn.allow_tf32 else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def full_float32():
    """A context in which float32 convolutions are just that: on a GPU cuDNN would round their inputs to TF32.

    What else cuDNN is set to (autotuning, determinism) stays as it is.
    """
    cudnn = torch.backends.cudnn
    return cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, allow_tf32=False)


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 as float32; float32 and float64 (gradient checks) as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def float32_on_cpu(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, on CPUs in float32 whatever autocast says: for dilated depthwise convolutions.

    There the bf16 gradient of such a convolution's weight holds memory that nobody wrote as soon as the map is 32
    pixels wide and the dilation along its height is above 1 (torch 2.11, seen as NaN and 1e36).
    """
    if x.device.type != "cpu":
        return function(x)
    with torch.autocast("cpu", enabled=False):
        return function(at_least_float32(x))


def sent(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, on the training device; the host does not wait for the copy."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


def check_uint8(images: Tensor) -> None:
    """ValueError for images that are not uint8: a network that divides by 255 itself would see floats as black."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, 0 to 255, got {images.dtype}")
