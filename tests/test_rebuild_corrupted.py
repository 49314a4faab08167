"""MSCDAE: pyramid, noise, fusion, and what the autoencoders of the levels learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d

from defectlab.networks.rebuild.mscdae import MSCDAE, MSCDAESettings, fuse, gaussian_pyramid, salt_and_pepper

SMALL = MSCDAESettings(size=64, patch=16, widths=(8, 16), code=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloth(count: int) -> torch.Tensor:
    """uint8 (count, 3, 64, 64): threads of 8 px at a phase of their own, and a little noise."""
    rng = np.random.default_rng(0)
    wave = np.sin(np.arange(64) / 8 * 2 * np.pi + rng.uniform(0, 6, (count, 1, 1, 1)))
    grey = 110 + 40 * wave * np.ones((64, 1)) + rng.normal(0, 3, (count, 1, 64, 64))
    return torch.from_numpy(grey.clip(0, 255).astype(np.uint8)).expand(-1, 3, -1, -1).contiguous()


def trained(settings: MSCDAESettings, images: torch.Tensor, steps: int, seed: int = 0) -> tuple[MSCDAE, list[float]]:
    torch.manual_seed(seed)
    method, generator, losses = MSCDAE(settings), seeded(seed), []
    method.begin(images)
    optimizer = torch.optim.Adam(method.parameters(), 0.005)
    for _ in range(steps):
        loss = method.loss(images[torch.randint(len(images), (4,), generator=generator)], generator)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    method.eval()
    with torch.no_grad():
        method.end(images)
    return method, losses


def test_the_pyramid_is_scipys() -> None:
    images = torch.rand(2, 3, 32, 48, generator=seeded(), dtype=torch.float64)
    fine, half, quarter = gaussian_pyramid(images, 3)
    expected = images.numpy()
    for level in (half, quarter):
        for axis in (2, 3):
            expected = convolve1d(expected, np.array([1, 4, 6, 4, 1]) / 16, axis, mode="mirror")
        expected = expected[:, :, ::2, ::2]
        assert np.allclose(level, expected)
    assert torch.equal(fine, images) and quarter.shape == (2, 3, 8, 12)


def test_noise_is_salt_and_pepper_in_all_channels() -> None:
    images = torch.full((4, 3, 64, 64), 0.5)
    noisy = salt_and_pepper(images, 0.2, seeded())
    assert (noisy == noisy[:, :1]).all()
    assert (noisy == 0).float().mean() == pytest.approx(0.1, abs=0.01)
    assert (noisy == 1).float().mean() == pytest.approx(0.1, abs=0.01)
    assert (noisy == 0.5).float().mean() == pytest.approx(0.8, abs=0.02)
    assert torch.equal(noisy, salt_and_pepper(images, 0.2, seeded()))
    assert torch.equal(images, salt_and_pepper(images, 0.0, seeded()))


def test_fusion_is_the_or_of_ands_at_any_threshold() -> None:
    maps = torch.randn(2, 3, 20, 20, generator=seeded())
    for threshold in (-1.0, 0.0, 1.0):
        first, second, third = (maps > threshold).unbind(1)
        assert torch.equal(fuse(maps) > threshold, (first & second) | (second & third))


def test_a_blob_stands_out_after_training_and_each_level_can_be_looked_at() -> None:
    images = cloth(16)
    method, losses = trained(SMALL, images, 300)
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    bad = images[:4].clone()
    bad[:, :, 24:40, 24:40] = 250
    with torch.no_grad():
        levels, good, merged = method.level_maps(bad), method.maps(images), method.maps(bad)
        assert levels.shape == (4, 3, 256, 256) and merged.shape == (4, 256, 256)
        assert method.scores(bad, merged).min() > method.scores(images, good).max()
        assert merged[:, 100:156, 100:156].mean() > merged[:, :60].mean() + 2
        assert torch.equal(merged, fuse(levels))
        for level in (1, 2, 3):
            method.level = level
            assert torch.equal(method.maps(bad), levels[:, level - 1])


def test_residuals_of_the_training_have_mean_0_and_deviation_1() -> None:
    images = cloth(6)
    method, _ = trained(SMALL, images, 2)
    with torch.no_grad():
        levels = [torch.cat(r).double() for r in zip(*map(method.residuals, images.split(4)), strict=True)]
    for residuals, mean, deviation in zip(levels, method.mean, method.deviation, strict=True):
        normal = (residuals - mean) / deviation
        assert float(normal.mean()) == pytest.approx(0, abs=1e-3)
        assert float(normal.std()) == pytest.approx(1, abs=1e-2)


def test_a_seed_gives_the_same_network_and_a_saved_one_the_same_maps() -> None:
    images = cloth(8)
    (first, losses), (_, again), (_, other) = (trained(SMALL, images, 3, seed) for seed in (0, 0, 1))
    assert losses == again != other
    copy = MSCDAE(SMALL).eval()
    copy.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(copy.maps(images), first.maps(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": 1}, "1 level is too few"),
        ({"size": 72}, "a size must be a multiple of 16"),
        ({"patch": 18}, "a patch of 4"),
        ({"patch": 32}, "do not fit into the coarsest level, of 16 px"),
    ],
)
def test_what_cannot_be_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MSCDAE(replace(SMALL, **change))
