"""TODO precision."""

from torch import Tensor
from typing import Any
import torch



def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 pays here: on a GPU, and on CPUs with AVX-512-BF16 or AMX."""
    if device.type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def full_float32():
    """A context in which float32 convolutions are just that: on a GPU cuDNN would round their inputs to TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def precision_of(settings: Any, device: str | torch.device) -> str:
    """The precision a run really uses: bf16 where settings ask for it and the device is fast at it, else fp32."""
    return "bf16" if settings.precision == "bf16" and fast_bf16(torch.device(device)) else "fp32"


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 as float32; float32 and float64 (gradient checks) as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
