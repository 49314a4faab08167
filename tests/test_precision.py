"""Number formats: bf16 where the device has units for it, float32 that is float32, nothing else switched."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from defectlab.precision import at_least_float32, autocast, check_uint8, float32_on_cpu, full_float32, precision_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "low", "full"), [((9, 0), "bf16", "tf32"), ((8, 6), "bf16", "tf32"), ((7, 5), "fp32", "fp32")]
)
def test_a_gpu_says_what_it_computes_in(monkeypatch, capability: tuple[int, int], low: str, full: str) -> None:
    """One without bf16 units computes in fp32; one that has them rounds fp32 convolutions, unless told not to."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision_of(SimpleNamespace(precision="bf16"), "cuda") == low
    assert precision_of(SimpleNamespace(precision="fp32"), "cuda") == full
    with full_float32():
        assert precision_of(SimpleNamespace(precision="fp32"), "cuda") == "fp32"


@pytest.mark.parametrize(("avx", "amx"), [(False, False), (True, False), (False, True)])
def test_a_cpu_without_bf16_units_computes_in_fp32(monkeypatch: pytest.MonkeyPatch, avx: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert precision_of(SimpleNamespace(precision="bf16"), "cpu") == ("bf16" if avx or amx else "fp32")


def test_autocast_computes_in_bf16_only_when_asked() -> None:
    convolution, x = nn.Conv2d(2, 2, 1), torch.rand(1, 2, 2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(CPU, precision):
            assert convolution(x).dtype == dtype


@pytest.mark.parametrize("chosen", [True, False])
def test_full_float32_switches_tf32_alone(chosen: bool) -> None:
    cudnn = torch.backends.cudnn
    names = ("enabled", "benchmark", "deterministic", "benchmark_limit")
    with cudnn.flags(enabled=chosen, benchmark=chosen, benchmark_limit=7, deterministic=chosen, allow_tf32=True):
        before = [getattr(cudnn, name) for name in names]
        with full_float32():
            assert not cudnn.allow_tf32
            assert [getattr(cudnn, name) for name in names] == before
        assert cudnn.allow_tf32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_at_least_float32(dtype: torch.dtype) -> None:
    assert at_least_float32(torch.ones(1, dtype=dtype)).dtype == max(dtype, torch.float32, key=lambda d: d.itemsize)


def test_float32_on_cpu_whatever_autocast_says() -> None:
    convolution = nn.Conv2d(2, 2, 1)
    with autocast(CPU, "bf16"):
        assert float32_on_cpu(convolution, torch.rand(1, 2, 2, 2).bfloat16()).dtype == torch.float32
        assert convolution(torch.rand(1, 2, 2, 2)).dtype == torch.bfloat16  # autocast goes on afterwards


def test_float_images_are_refused_where_bytes_are_meant():
    check_uint8(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        check_uint8(torch.rand(1, 3, 8, 8))
