"""Costs: FLOPs and parameters counted by hand."""

import pytest
import torch
from torch import nn

from defectlab.metrics.costs import flops, model_costs, parameters


def test_flops_of_attention_by_hand() -> None:
    """Fused attention and the transformer's fast path count like the matrix products that they are."""
    query = torch.randn(1, 4, 50, 16)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert flops(attention, query, query, query) == 2 * 2 * 4 * 50 * 50 * 16
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    by_hand = 2 * 50 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 2 * 50 * 50 * 64  # projections and MLP, then attention
    assert flops(layer, torch.randn(1, 50, 64)) == by_hand
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (1, 3, 8, 10), 2 * (3 * 9) * 8 * (4 * 5)),
        (nn.Conv2d(8, 8, (1, 5), padding=(0, 2), groups=8), (2, 8, 6, 7), 2 * 5 * 8 * (6 * 7) * 2),
        (nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False), (1, 4, 5, 5), 2 * (2 * 9) * 6 * 25),
        (nn.Linear(6, 4), (5, 6), 2 * 6 * 4 * 5),
    ],
    ids=["strided", "depthwise", "dilated groups", "linear"],
)
def test_flops_by_hand(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert flops(layer, torch.zeros(shape)) == expected
    assert flops(nn.Sequential(layer, nn.SiLU()), torch.zeros(shape)) == expected  # elementwise work is not counted


def test_flops_of_several_inputs_are_those_of_one_pass() -> None:
    class Product(nn.Module):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return first @ second

    assert flops(Product(), torch.zeros(3, 4), torch.zeros(4, 5)) == 2 * 3 * 4 * 5


@pytest.mark.parametrize("trained", [True, False])
def test_parameters_count_frozen_ones_and_no_running_statistics(trained: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).requires_grad_(trained)
    assert parameters(model) == 8 * 3 * 9 + 8 + 2 * 8


class Watched(nn.Module):
    """A convolution that notes its mode and the shape and memory format of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 500, 3, padding=1, bias=False)
        self.seen: set[tuple] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add((self.training, tuple(x.shape), x.is_contiguous(memory_format=torch.channels_last)))
        return self.conv(x)


@pytest.mark.parametrize("training", [True, False])
def test_model_costs(training: bool) -> None:
    model = Watched().train(training)
    costs = model_costs(model, 8)
    # 3 x 500 x 9 = 13,500 weights; 2 x 13,500 x 64 = 1.73 million operations; two bytes each
    assert costs == {"parameters_m": 0.0135, "gflops": 0.002, "size_mb": 0.03}
    assert model.training is training and model.conv.training is training
    assert model.seen == {(False, (1, 3, 8, 8), True)}
