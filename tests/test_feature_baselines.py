"""PatchCore, PaDiM and SPADE: each step against a slow or written-out version, and whole runs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_anomaly import fake_data
from toy_runs import quiet

from defectlab.files import WeightsError
from defectlab.networks import feature_baselines as baselines
from defectlab.networks.feature_baselines import PaDiMSettings, PatchCoreSettings, SPADESettings, nearest_distances
from defectlab.training.feature_baselines import run_padim, run_patchcore, run_spade


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of two images: three layers with 2, 3 and 4 channels."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, c, s, s, generator=generator).to(dtype) for c, s in ((2, 8), (3, 4), (4, 2))]


@pytest.mark.parametrize(
    "seen", [baselines.patch_features, baselines.pyramid, lambda layers: baselines.embedding(layers, torch.arange(9))]
)
def test_bf16_features_become_float32(seen) -> None:
    assert seen(features(torch.bfloat16)).dtype == torch.float32


def test_patch_features_are_layers_2_and_3_at_the_resolution_of_2() -> None:
    layers = features()
    patches = baselines.patch_features(layers)
    assert patches.shape == (2, 4, 4, 3 + 4)
    torch.testing.assert_close(patches[1, 2, 1, :3], layers[1][1, :, 1:4, 0:3].mean((1, 2)))  # 3x3 around (2, 1)
    assert torch.equal(patches, baselines.patch_features([layers[0] + 1, *layers[1:]]))  # layer 1 is not used


def slow_coreset(patches: Tensor, keep: int, seed: int) -> list[int]:
    """Algorithm 1 word by word, in float64: the farthest point from all chosen ones, one distance at a time."""
    generator = torch.Generator().manual_seed(seed)
    width = baselines.PROJECTION
    projection = torch.randn(patches.shape[1], width, generator=generator) / width**0.5
    projected = patches.double() @ projection.double()
    chosen = [int(torch.randint(len(patches), (1,), generator=generator))]
    while len(chosen) < keep:
        to_chosen = [min(float(torch.dist(p, projected[c])) for c in chosen) for p in projected]
        chosen.append(max(range(len(patches)), key=to_chosen.__getitem__))
    return chosen


@pytest.mark.parametrize("seed", [0, 1])
def test_coreset_equals_the_slow_one_and_never_repeats(seed: int) -> None:
    patches = normal(40, 12, seed=seed)
    assert baselines.greedy_coreset(patches, 10, seed).tolist() == slow_coreset(patches, 10, seed)
    copies = patches[:3].repeat(10, 1)  # all distances become 0
    assert sorted(baselines.greedy_coreset(copies, 30, seed).tolist()) == list(range(30))


@pytest.mark.parametrize("chunk", [4096, 7])
def test_nearest_distances_are_cdists(chunk: int) -> None:
    queries, bank = normal(50, 16, seed=1), normal(23, 16, seed=2)
    expected, index = torch.cdist(queries.double(), bank.double()).min(1)
    distances, indices = nearest_distances(queries, bank, chunk)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(indices, index)
    own = nearest_distances(10 * queries, 10 * queries, chunk)[0]
    assert 0 <= float(own.min()) <= float(own.max()) < 0.1  # of norms around 40: rounded squares, and no NaN


def formula(patches: Tensor, bank: Tensor, neighbours: int) -> float:
    """Equations 6-7: s* and w = 1 - exp(d*) / sum over the neighbours of m*, itself among them, of exp(d)."""
    distances = torch.cdist(patches.double(), bank.double())
    test_patch = int(distances.min(1).values.argmax())
    memory = int(distances[test_patch].argmin())
    star = float(distances[test_patch, memory])
    around = torch.cdist(bank[memory][None].double(), bank.double())[0].argsort()[:neighbours].tolist()
    assert around[0] == memory
    weight = 1 - math.exp(star) / sum(math.exp(float(distances[test_patch, m])) for m in around)
    return weight * star


@pytest.mark.parametrize(("size", "neighbours"), [(30, 9), (30, 3), (5, 9)])  # the last: fewer memories than asked for
def test_reweighted_score_is_the_formula(size: int, neighbours: int) -> None:
    for seed in range(5):
        patches, bank = normal(12, 8, seed=seed), normal(size, 8, seed=100 + seed)
        found = baselines.reweighted_score(patches, *nearest_distances(patches, bank), bank, neighbours)
        assert float(found) == pytest.approx(formula(patches, bank, min(neighbours, size)), rel=1e-4)


def test_reweighted_score_of_equal_memories_and_of_a_single_one() -> None:
    """The weight is that of m* whichever of two equal memories counts as the nearest of its own neighbours. With one
    memory the formula's weight would be 1 - exp(d)/exp(d) = 0 for every image: the distance stands."""
    patch = torch.tensor([[0.0, 3.0]])
    bank = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, -1.0], [7.0, 0.0]])
    found = float(baselines.reweighted_score(patch, *nearest_distances(patch, bank), bank))
    assert found == pytest.approx(float(3 * (1 - torch.cdist(patch, bank)[0].softmax(0)[0])), rel=1e-5)
    assert float(baselines.reweighted_score(patch, *nearest_distances(patch, bank[:1]), bank[:1])) == pytest.approx(3)


def test_channels_are_drawn_without_repetition_and_by_the_seed() -> None:
    first = baselines.draw_channels(448, 100, 0)
    assert first.shape == (100,)
    assert len(set(first.tolist())) == 100
    assert 0 <= int(first.min()) < int(first.max()) < 448
    torch.manual_seed(7)  # the global generator plays no part
    assert torch.equal(baselines.draw_channels(448, 100, 0), first)
    assert not torch.equal(baselines.draw_channels(448, 100, 1), first)
    with pytest.raises(ValueError, match="449 channels cannot be drawn from 448"):
        baselines.draw_channels(448, 449, 0)


def test_embedding_holds_the_drawn_channels_of_each_layer_at_the_finest_resolution() -> None:
    maps = features()
    embedded = baselines.embedding(maps, torch.tensor([1, 2, 4, 8]))  # of layers 1, 2, 2 and 3
    assert embedded.shape == (64, 2, 4)
    row, column = 5, 2
    places = (maps[0][1, 1], 1), (maps[1][1, 0], 2), (maps[1][1, 2], 2), (maps[2][1, 3], 4)
    assert embedded[8 * row + column, 1].tolist() == [float(m[row // step, column // step]) for m, step in places]


def test_gaussians_and_distances_are_numpys() -> None:
    train, test = normal(3, 12, 5), normal(3, 4, 5, seed=1)
    distances = baselines.mahalanobis(test, *baselines.fit_gaussians(train))
    assert distances.shape == (3, 4)
    for position in range(3):
        points = train[position].double().numpy()
        inverse = np.linalg.inv(np.cov(points, rowvar=False) + 0.01 * np.eye(5))
        off = test[position].double().numpy() - points.mean(0)
        np.testing.assert_allclose(distances[position], np.sqrt(((off @ inverse) * off).sum(1)), rtol=1e-4)
    few = normal(2, 5, 40)  # images fewer than channels
    assert torch.isfinite(baselines.mahalanobis(few, *baselines.fit_gaussians(few))).all()
    with pytest.raises(ValueError, match="at least 2 good images, got 1"):
        baselines.fit_gaussians(few[:, :1])


def test_spade_sees_layer_3_pooled_and_all_layers_at_the_resolution_of_2() -> None:
    maps = features()
    torch.testing.assert_close(baselines.descriptors(maps), maps[2].mean((2, 3)))
    found = baselines.pyramid(maps)
    assert found.shape == (2, 4, 4, 9)
    torch.testing.assert_close(found[1, 3, 1, :2], maps[0][1, :, 6:8, 2:4].mean((1, 2)))  # the four pixels of layer 1
    torch.testing.assert_close(found[1, 3, 1, 2:5], maps[1][1, :, 3, 1])
    torch.testing.assert_close(found[1, 0, 0, 5:], maps[2][1, :, 0, 0])  # a corner is not mixed with its neighbours


def test_nearest_images_by_hand() -> None:
    good = torch.tensor([[0.0], [1.0], [10.0]])
    distances, indices = baselines.nearest_images(torch.tensor([[0.0], [9.0]]), good, 2)
    assert indices.tolist() == [[0, 1], [2, 1]]
    assert distances.tolist() == pytest.approx([(0 + 1) / 2, (1 + 64) / 2])
    fewer, all_of_them = baselines.nearest_images(torch.tensor([[0.0]]), good, 50)
    assert sorted(all_of_them[0].tolist()) == [0, 1, 2]
    assert float(fewer) == pytest.approx((0 + 1 + 100) / 3)


def test_pixel_distances_equal_the_slow_ones_and_look_only_into_the_nearest_images() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, good = torch.rand(2, 3, 4, 5, generator=generator), torch.rand(6, 3, 4, 5, generator=generator)
    nearest = torch.tensor([[0, 4], [5, 2]])
    found = baselines.pixel_distances(queries, good, nearest)
    assert found.shape == (2, 3, 4)
    for image in range(2):
        gallery = good[nearest[image]].reshape(-1, 5).double()
        expected = torch.cdist(queries[image].reshape(-1, 5).double(), gallery).amin(1).view(3, 4)
        torch.testing.assert_close(found[image].double(), expected, rtol=1e-3, atol=1e-4)
    moved = baselines.pixel_distances(good[[4]].roll(2, 2), good, nearest[:1])  # a pixel may lie anywhere in them
    assert float(moved.max()) < 1e-2


SMALL = {"teacher": "resnet18_random", "size": 64, "precision": "fp32"}
RUNS = {
    "patchcore": (run_patchcore, PatchCoreSettings(coreset=0.05, **SMALL), {"remembered_patches": 38}),
    "padim": (run_padim, PaDiMSettings(**SMALL), {"gaussians": 256}),
    "spade": (run_spade, SPADESettings(neighbours=4, **SMALL), {"remembered_images": 12}),
}


@pytest.mark.parametrize("method", RUNS)
def test_run_finds_the_square(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (run, settings, costs), data = RUNS[method], fake_data(12)
    first, other = (run(settings, seed, data, quiet()) for seed in (0, 1))
    assert first.metrics["pixel_auroc"] > 95
    assert first.metrics["image_auroc"] == 100
    assert first.costs == {"parameters": 0} | costs
    assert set(first.model) == ({"bank"} if method == "patchcore" else set())
    same = (first.predictions["scores"] == other.predictions["scores"]).all()
    assert same == (method == "spade")  # the others draw channels or the coreset's first patch
    monkeypatch.setattr("defectlab.training.feature_baselines.POSITIONS", 100)  # the last chunk is smaller
    again = run(settings, 0, data, quiet()).predictions["scores"]
    assert np.allclose(again, first.predictions["scores"], rtol=1e-4)
    with pytest.raises(WeightsError, match="unknown teacher 'resnet9'"):
        run(replace(settings, teacher="resnet9"), 0, data, quiet())
