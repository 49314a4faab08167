"""What a network costs: parameters, FLOPs, size, latency; one function for all models, all counted alike."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from defectlab.precision import autocast, full_float32


def parameters(model: nn.Module) -> int:
    """Exact number of weights and biases, frozen ones too (batch norm's running statistics are none of them)."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def flops(model: Callable[..., Any], *inputs: Any) -> int:
    """2 x multiply-accumulates of convolutions and matrix products in one forward pass."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter sees neither this path of attention nor a fused one
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(call: Callable[[], object], device: torch.device, repeats: int = 10, warm_up: int = 3) -> float:
    """Median seconds of a call, after a warm-up; waits for the device each time."""
    times = []
    for index in range(warm_up + repeats):
        started = time.perf_counter()
        call()
        synchronise(device)
        if index >= warm_up:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


@torch.inference_mode()
def inference_seconds(model: nn.Module, images: Tensor, precision: str = "fp32", repeats: int = 10) -> float:
    """Median seconds of one forward pass of `images` (B, 3, S, S) at "fp32" or "bf16" (autocast)."""
    with full_float32(), autocast(images.device, precision):
        return seconds_per_call(lambda: model(images), images.device, repeats)


def model_costs(
    model: nn.Module,
    size: int,
    device: torch.device | str,
    flops_size: int | None = None,
    batches: bool = True,
) -> dict[str, float]:
    """Costs of a detector or another network of square RGB images, `size` px a side; the model as it is (fuse it
    before, if it is deployed fused). The modes of its parts are left as they were.

    -> parameters_m (millions), gflops (1e9, 2 x MACs, one image, of `flops_size` px where that is given), size_mb (MB
    of fp16 weights), latency_ms (one image), and with `batches` images_per_second_32 (a batch of 32).
    """
    device = torch.device(device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()

    def noise(count: int) -> Tensor:
        return torch.rand(count, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    one = noise(1)
    counted = one if flops_size is None else torch.zeros(1, 3, flops_size, flops_size, device=device)
    result = {
        "parameters_m": round(parameters(model) / 1e6, 4),
        "gflops": round(flops(model, counted) / 1e9, 3),
        "size_mb": round(parameters(model) * 2 / 1e6, 2),
        "latency_ms": round(1000 * inference_seconds(model, one), 2),
    }
    if batches:
        result["images_per_second_32"] = round(32 / inference_seconds(model, noise(32), repeats=3), 1)
    for module, mode in modes:
        module.training = mode
    return result
