"""What the phantom promises. Run by `test_phantom.py` in a process of its own, since `install` is for good."""

import copy

import numpy as np
import phantom
import pytest
import torch
from torch import nn

from defectlab.precision import sent

phantom.install(2)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.arange(6.0, device="cuda").view(2, 3)


def test_a_tensor_says_where_it_is(x: torch.Tensor) -> None:
    assert x.is_cuda and x.device == torch.device("cuda", 0) and torch.cuda.is_available()
    for made in (x + 1, x[0], x.T, torch.zeros_like(x), x.new_ones(2), x.sum(), x.to(torch.float64), x.detach()):
        assert made.device == x.device
    assert x.to("cuda") is x and x.cpu().device.type == "cpu" and torch.equal(x.cpu(), torch.arange(6.0).view(2, 3))
    assert nn.functional.pad(x[None, None], (1, 1, 1, 1), mode="circular").device == x.device
    assert torch.arange(2).to(x).device == x.device and torch.ones(1).cuda(1).device.index == 1


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x + torch.ones(3),
        lambda x: x @ torch.ones(3, 1),
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
        lambda x: torch.ones(2)[x[0].long()],
        lambda x: x + x.to("cuda:1"),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: torch.rand(3, device="cuda", generator=torch.Generator()),
        lambda x: torch.rand(3, generator=torch.Generator(device="cuda")),
        lambda x: torch.zeros(1, device="cuda:2"),
        lambda x: nn.Linear(3, 1)(x),
    ],
)
def test_what_cuda_forbids(x: torch.Tensor, forbidden) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        forbidden(x)


def test_what_cuda_allows(x: torch.Tensor) -> None:
    assert (x * torch.tensor(2.0)).device == x[torch.tensor([0])].device == torch.where(x > 1, x, 0.0).device
    host = torch.zeros(2, 3)
    host[0] = x[1]
    host.copy_(x)
    assert torch.equal(host, x.cpu())


def test_training(x: torch.Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(inplace=True), nn.Conv2d(8, 1, 1))
    before = [id(p) for p in network.parameters()]
    network.to("cuda", memory_format=torch.channels_last)
    assert [id(p) for p in network.parameters()] == before and all(p.is_cuda for p in network.parameters())
    optimizer = torch.optim.AdamW(network.parameters(), 0.01, fused=True)
    images = torch.rand(4, 3, 8, 8).to("cuda").contiguous(memory_format=torch.channels_last)
    losses = []
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16):
            found = network(images)
        assert found.dtype == torch.bfloat16
        loss = found.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and network[0].weight.grad.is_cuda
    copied = copy.deepcopy(network)
    copied.load_state_dict({name: value.cpu() for name, value in network.state_dict().items()})
    assert torch.equal(copied[0].weight, network[0].weight) and copied[0].weight.is_cuda
    assert not copied.cpu()[0].weight.is_cuda


def test_waits_are_noted(x: torch.Tensor) -> None:
    phantom.WAITS.clear()
    assert sent(torch.ones(2), x.device).is_cuda and not phantom.WAITS
    x.sum().item()
    x[x > 1]
    torch.ones(2).to("cuda")
    x[0, 0] = 3.0
    assert sorted(what for what, *_ in phantom.WAITS) == ["boolean mask", "host to device", "item"]
