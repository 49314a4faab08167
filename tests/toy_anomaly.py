"""A toy set made in memory and a toy teacher's features, for the tests of anomaly detection."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from defectlab.data.anomaly import AnomalyData, AnomalySplit
from defectlab.networks.rebuild.base import Normal
from defectlab.runs import Result

CHANNELS = (8, 16, 32)  # of the toy teacher


def fake_split(good: int, bad: int, seed: int, size: int = 64) -> AnomalySplit:
    """Noise; a bad image has a bright square, and its mask says where."""
    generator = torch.Generator().manual_seed(seed)
    count = good + bad
    images = torch.randint(90, 130, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(count, 256, 256, dtype=torch.uint8)
    labels = (torch.arange(count) >= good).to(torch.uint8)
    images[good:, :, size // 4 : size // 2, size // 4 : size // 2] += 100
    masks[good:, 64:128, 64:128] = 1
    names = tuple(f"{seed}_{i}" for i in range(count))
    return AnomalySplit(images, masks, labels, labels, torch.ones(count).bool(), names, ((size, size),) * count)


def fake_data(train: int = 5) -> AnomalyData:
    """Good images to train on, four of dev, six to test."""
    splits = fake_split(train, 0, 1), fake_split(2, 2, 2), fake_split(3, 3, 3)
    return AnomalyData("fake", "fake", ("good", "square"), *splits, "fake")


def feature_maps(count: int = 2, coarsest: int = 4, seed: int = 0) -> list[Tensor]:
    """Random positive maps, as behind a ReLU: three scales, each half the size of the one before."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (4 * coarsest, 2 * coarsest, coarsest)
    return [torch.rand(count, c, s, s, generator=generator) for c, s in zip(CHANNELS, sizes, strict=True)]


def learning(modules: list[nn.Module], loss: Callable[[], Tensor]) -> tuple[set[str], set[str]]:
    """Names of the weights that had a gradient in one of two steps of Adam, and of all."""
    weights = dict(nn.ModuleList(modules).named_parameters())
    optimizer = torch.optim.Adam(weights.values(), 1e-3)
    moved = set()
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        moved |= {name for name, p in weights.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    return moved, set(weights)


def fit(network: Normal, images: Tensor, steps: int, learning_rate: float, generator: torch.Generator) -> list[float]:
    """The losses of steps of Adam, each on a batch drawn from the (prepared) images."""
    optimiser, losses = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], learning_rate), []
    for _ in range(steps):
        chosen = torch.randint(len(images), (network.settings.batch,), generator=generator)
        loss = network.loss(images[chosen], generator)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def check_seeds(first: Result, again: Result, other: Result) -> None:
    """One seed gave the same numbers twice, another seed gave others."""
    for part in ("metrics", "per_class", "dev", "curve", "notes"):
        assert getattr(first, part) == getattr(again, part), part
    assert all((first.predictions[k] == again.predictions[k]).all() for k in first.predictions)
    assert all(torch.equal(first.model[k], again.model[k]) for k in first.model)
    assert other.curve != first.curve
    assert (other.predictions["scores"] != first.predictions["scores"]).all()
    assert set(first.metrics) >= {"image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro", "image_f1_dev"}
