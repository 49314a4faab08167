"""PatchCore: what is remembered, how far a patch is from it, and the image score."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from defectlab.networks.feature_baselines import (
    PROJECTION,
    greedy_coreset,
    nearest_distances,
    patch_features,
    reweighted_score,
)


def points(count: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


# --- Patches ---------------------------------------------------------------------------------------------------------


def test_patch_features_are_layers_2_and_3_at_the_resolution_of_2() -> None:
    features = [torch.rand(2, 4, 16, 16), torch.rand(2, 6, 8, 8), torch.rand(2, 10, 4, 4)]
    patches = patch_features(features)
    assert patches.shape == (2, 8, 8, 16)
    here = features[1][1, :, 2:5, 4:7].mean((1, 2))  # the 3x3 neighbourhood of (3, 5)
    torch.testing.assert_close(patches[1, 3, 5, :6], here)
    assert torch.equal(patches, patch_features([features[0] + 1, *features[1:]]))  # layer 1 is not used


def test_patch_features_of_bf16_features_are_float32() -> None:
    features = [torch.rand(1, 2, s, s).bfloat16() for s in (8, 4, 2)]
    assert patch_features(features).dtype == torch.float32


# --- Coreset ---------------------------------------------------------------------------------------------------------


def slow_coreset(patches: Tensor, keep: int, seed: int) -> list[int]:
    """Algorithm 1 word by word, in float64: the farthest point from all chosen ones, one distance at a time."""
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(patches.shape[1], PROJECTION, generator=generator) / PROJECTION**0.5
    projected = patches.double() @ projection.double()
    chosen = [int(torch.randint(len(patches), (1,), generator=generator))]
    while len(chosen) < keep:
        to_chosen = [min(float(torch.dist(p, projected[c])) for c in chosen) for p in projected]
        chosen.append(max(range(len(patches)), key=to_chosen.__getitem__))
    return chosen


@pytest.mark.parametrize("seed", [0, 1])
def test_coreset_equals_the_slow_one(seed: int) -> None:
    patches = points(40, 12, seed)
    assert greedy_coreset(patches, 10, seed).tolist() == slow_coreset(patches, 10, seed)


def test_coreset_is_seeded() -> None:
    patches = points(200, 12)
    torch.manual_seed(1)
    first = greedy_coreset(patches, 20, 0)
    torch.manual_seed(2)  # the global generator plays no part
    assert torch.equal(greedy_coreset(patches, 20, 0), first)
    assert not torch.equal(greedy_coreset(patches, 20, 1), first)


def test_coreset_takes_one_of_each_cluster() -> None:
    centres = 100 * points(5, 12)
    patches = (centres[:, None] + 0.01 * points(5 * 20, 12, 1).view(5, 20, 12)).flatten(0, 1)
    assert sorted((greedy_coreset(patches, 5, 0) // 20).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("distinct", [30, 3, 1])
def test_coreset_never_repeats(distinct: int) -> None:
    patches = points(distinct, 6).repeat(30 // distinct, 1)  # copies: all distances become 0
    chosen = greedy_coreset(patches, 30, 0)
    assert sorted(chosen.tolist()) == list(range(30))


# --- Distances and scores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4096, 7])
def test_nearest_distances_are_cdists(chunk: int) -> None:
    queries, bank = points(50, 16, 1), points(23, 16, 2)
    expected, index = torch.cdist(queries.double(), bank.double()).min(1)
    distances, indices = nearest_distances(queries, bank, chunk)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(indices, index)


def test_distance_of_a_remembered_patch_is_zero_and_never_nan() -> None:
    bank = 10 * points(20, 64)
    distances, indices = nearest_distances(bank, bank)
    assert torch.equal(indices, torch.arange(20))
    assert float(distances.max()) < 0.1  # of norms around 80: rounding of squares near 6400
    assert float(distances.min()) >= 0


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
        patches, bank = points(12, 8, seed), points(size, 8, 100 + seed)
        found = reweighted_score(patches, *nearest_distances(patches, bank), bank, neighbours)
        assert float(found) == pytest.approx(formula(patches, bank, min(neighbours, size)), rel=1e-4)


def test_a_dense_memory_lowers_the_score() -> None:
    patch = torch.tensor([[0.0, 0.0]])
    lonely = torch.tensor([[2.0, 0.0], [50.0, 0.0], [0.0, 60.0]])
    dense = torch.tensor([[2.0, 0.0], [2.01, 0.0], [2.0, 0.01]])
    scores = [float(reweighted_score(patch, *nearest_distances(patch, bank), bank)) for bank in (lonely, dense)]
    assert scores[0] == pytest.approx(2.0, abs=1e-4)
    assert scores[1] == pytest.approx(2 * (1 - 1 / 3), abs=0.02)


def test_a_memory_that_is_there_twice_gives_the_weight_of_its_distance() -> None:
    """The weight is that of m* whichever of two equal memories counts as the nearest of its own neighbours."""
    patch = torch.tensor([[0.0, 3.0]])
    bank = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, -1.0], [7.0, 0.0]])
    found = float(reweighted_score(patch, *nearest_distances(patch, bank), bank))
    others = torch.cdist(patch, bank)[0]
    assert found == pytest.approx(float(3 * (1 - functional.softmax(others, 0)[0])), rel=1e-5)


def test_single_memory_is_not_weighed() -> None:
    """With one memory the formula's weight would be 1 - exp(d)/exp(d) = 0 for every image: the distance stands."""
    patch = torch.tensor([[1.0, 1.0]])
    bank = torch.zeros(1, 2)
    assert float(reweighted_score(patch, *nearest_distances(patch, bank), bank)) == pytest.approx(2**0.5)
