"""PaDiM: the channels drawn, the Gaussian of each position, the distance, and a whole run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_anomaly import fake_split

from defectlab.data.anomaly import AnomalyData
from defectlab.networks import feature_baselines as padim
from defectlab.networks.feature_baselines import PaDiMSettings, draw_channels, embedding, fit_gaussians, mahalanobis
from defectlab.networks.resnet import WeightsError
from defectlab.runs import Session
from defectlab.studies import reverse_distillation as baselines
from defectlab.training import anomaly as distil


def samples(positions: int, count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(positions, count, width, generator=torch.Generator().manual_seed(seed))


# --- Channels and embedding ------------------------------------------------------------------------------------------


def test_channels_are_drawn_without_repetition_and_by_the_seed() -> None:
    first = draw_channels(448, 100, 0)
    assert first.shape == (100,)
    assert len(set(first.tolist())) == 100
    assert 0 <= int(first.min()) < int(first.max()) < 448
    torch.manual_seed(7)  # the global generator plays no part
    assert torch.equal(draw_channels(448, 100, 0), first)
    assert not torch.equal(draw_channels(448, 100, 1), first)
    with pytest.raises(ValueError, match="449 channels cannot be drawn from 448"):
        draw_channels(448, 449, 0)


def test_embedding_holds_the_drawn_channels_of_each_layer_at_the_finest_resolution() -> None:
    features = [torch.rand(2, 3, 8, 8), torch.rand(2, 4, 4, 4), torch.rand(2, 5, 2, 2)]
    embedded = embedding(features, torch.tensor([1, 2, 3, 6, 11]))  # 2 of layer 1, 2 of layer 2, the last of layer 3
    assert embedded.shape == (64, 2, 5)
    row, column = 5, 2
    expected = [
        features[0][1, 1, row, column],
        features[0][1, 2, row, column],
        features[1][1, 0, row // 2, column // 2],
        features[1][1, 3, row // 2, column // 2],
        features[2][1, 4, row // 4, column // 4],
    ]
    assert embedded[8 * row + column, 1].tolist() == pytest.approx([float(x) for x in expected])


def test_embedding_of_bf16_features_is_float32() -> None:
    assert embedding([torch.rand(1, 2, s, s).bfloat16() for s in (8, 4, 2)], torch.arange(6)).dtype == torch.float32


# --- Gaussians and distances -----------------------------------------------------------------------------------------


def test_gaussians_and_distances_are_numpys() -> None:
    train, test = samples(3, 12, 5), samples(3, 4, 5, seed=1)
    mean, factor = fit_gaussians(train)
    distances = mahalanobis(test, mean, factor)
    assert distances.shape == (3, 4)
    for position in range(3):
        points = train[position].double().numpy()
        covariance = np.cov(points, rowvar=False) + 0.01 * np.eye(5)
        for image in range(4):
            off = test[position, image].double().numpy() - points.mean(0)
            expected = np.sqrt(off @ np.linalg.inv(covariance) @ off)
            assert float(distances[position, image]) == pytest.approx(expected, rel=1e-4)


def test_distance_by_hand() -> None:
    train = torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]])  # variance 2 along the first axis, none along the second
    distances = mahalanobis(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]), *fit_gaussians(train))
    assert distances[0].tolist() == pytest.approx([(1 / 2.01) ** 0.5, (1 / 0.01) ** 0.5, 0.0])


def test_fewer_images_than_channels_still_have_a_gaussian() -> None:
    train = samples(2, 5, 40)
    distances = mahalanobis(train, *fit_gaussians(train))
    assert torch.isfinite(distances).all()
    with pytest.raises(ValueError, match="at least 2 good images, got 1"):
        fit_gaussians(train[:, :1])


# --- A whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake_data() -> AnomalyData:
    splits = fake_split(12, 0, 1), fake_split(2, 2, 2), fake_split(3, 3, 3)
    return AnomalyData("fake", "fake", ("good", "square"), *splits, "fake padim")


def test_run_finds_the_square_and_the_seed_draws_the_channels(
    fake_data: AnomalyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil._features.clear()
    settings = PaDiMSettings(teacher="resnet18_random", size=64, precision="fp32")

    def run(seed: int):
        return baselines.run_row(settings, seed, fake_data, "cpu", Session(say=lambda line: None))

    first, other = run(0), run(1)
    assert first.metrics["pixel_auroc"] > 95
    assert first.metrics["image_auroc"] == 100
    assert (first.predictions["scores"] != other.predictions["scores"]).all()
    assert first.costs["gaussians"] == 16 * 16
    assert not first.model
    monkeypatch.setattr(padim, "POSITIONS", 100)  # the last chunk is smaller
    assert np.allclose(run(0).predictions["scores"], first.predictions["scores"], rtol=1e-4)


def test_unknown_teacher_is_an_error(fake_data: AnomalyData) -> None:
    with pytest.raises(WeightsError, match="unknown teacher 'resnet9'"):
        baselines.run_row(replace(PaDiMSettings(), teacher="resnet9"), 0, fake_data, "cpu", Session())
