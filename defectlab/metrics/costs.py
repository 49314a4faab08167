"""What a network costs: parameters, FLOPs, size; one function for all models, all counted alike."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


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


def model_costs(model: nn.Module, size: int, flops_size: int | None = None) -> dict[str, float]:
    """Costs of a detector or another network of square RGB images, `size` px a side; the model as it is (fuse it
    before, if it is deployed fused). The modes of its parts are left as they were. Latency is another matter: see
    `defectlab.bench`.

    -> parameters_m (millions), gflops (1e9, 2 x MACs, one image, of `flops_size` px where that is given), size_mb (MB
    of fp16 weights).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    side, device = flops_size or size, next(model.parameters()).device
    found = flops(model, torch.zeros(1, 3, side, side, device=device).contiguous(memory_format=torch.channels_last))
    for module, mode in modes:
        module.training = mode
    return {
        "parameters_m": round(parameters(model) / 1e6, 4),
        "gflops": round(found / 1e9, 3),
        "size_mb": round(parameters(model) * 2 / 1e6, 2),
    }
