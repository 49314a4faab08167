"""SPADE: the nearest good images, the nearest pixel in them, and a whole run."""

import pytest
import torch
from torch import Tensor
from toy_anomaly import fake_split

from defectlab.data.anomaly import AnomalyData
from defectlab.networks.feature_baselines import SPADESettings, descriptors, nearest_images, pixel_distances, pyramid
from defectlab.runs import Session
from defectlab.studies import reverse_distillation as baselines
from defectlab.training import anomaly as distil


def features(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, c, s, s, generator=generator) for c, s in ((2, 8), (3, 4), (4, 2))]


def test_descriptors_pool_layer_3_alone() -> None:
    maps = features(2)
    found = descriptors(maps)
    assert found.shape == (2, 4)
    assert float(found[1, 2]) == pytest.approx(float(maps[2][1, 2].mean()))
    assert torch.equal(descriptors([maps[0] + 1, maps[1] + 1, maps[2]]), found)


def test_pyramid_holds_all_layers_at_the_resolution_of_2() -> None:
    maps = features(2)
    found = pyramid([m.bfloat16() for m in maps])
    assert found.shape == (2, 4, 4, 9)
    assert found.dtype == torch.float32
    found = pyramid(maps)
    torch.testing.assert_close(found[1, 3, 1, :2], maps[0][1, :, 6:8, 2:4].mean((1, 2)))  # the four pixels of layer 1
    torch.testing.assert_close(found[1, 3, 1, 2:5], maps[1][1, :, 3, 1])
    torch.testing.assert_close(found[1, 0, 0, 5:], maps[2][1, :, 0, 0])  # a corner is not mixed with its neighbours


def test_nearest_images_by_hand() -> None:
    good = torch.tensor([[0.0], [1.0], [10.0]])
    distances, indices = nearest_images(torch.tensor([[0.0], [9.0]]), good, 2)
    assert indices.tolist() == [[0, 1], [2, 1]]
    assert distances.tolist() == pytest.approx([(0 + 1) / 2, (1 + 64) / 2])
    fewer, all_of_them = nearest_images(torch.tensor([[0.0]]), good, 50)
    assert sorted(all_of_them[0].tolist()) == [0, 1, 2]
    assert float(fewer) == pytest.approx((0 + 1 + 100) / 3)


def test_pixel_distances_equal_the_slow_ones_and_look_only_into_the_nearest_images() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, good = torch.rand(2, 3, 4, 5, generator=generator), torch.rand(6, 3, 4, 5, generator=generator)
    nearest = torch.tensor([[0, 4], [5, 2]])
    found = pixel_distances(queries, good, nearest)
    assert found.shape == (2, 3, 4)
    for image in range(2):
        gallery = good[nearest[image]].reshape(-1, 5).double()
        expected = torch.cdist(queries[image].reshape(-1, 5).double(), gallery).amin(1).view(3, 4)
        torch.testing.assert_close(found[image].double(), expected, rtol=1e-3, atol=1e-4)
    moved = pixel_distances(good[[4]].roll(2, 2), good, nearest[:1])  # a pixel may lie anywhere in them
    assert float(moved.max()) < 1e-2


def test_run_finds_the_square_and_needs_no_seed() -> None:
    splits = fake_split(12, 0, 1), fake_split(2, 2, 2), fake_split(3, 3, 3)
    data = AnomalyData("fake", "fake", ("good", "square"), *splits, "fake spade")
    distil._features.clear()
    settings = SPADESettings(teacher="resnet18_random", size=64, neighbours=4, precision="fp32")
    first, other = (baselines.run_row(settings, seed, data, "cpu", Session(say=lambda line: None)) for seed in (0, 1))
    assert first.metrics["pixel_auroc"] > 95
    assert first.metrics["image_auroc"] == 100
    assert first.metrics == other.metrics
    assert first.costs["remembered_images"] == 12
