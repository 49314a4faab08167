"""Corrupted images: strokes measured by their moments, noise by its deviation, and what must stay as it was."""

import math

import pytest
import torch
from test_augment import seeded
from torch import Tensor
from toy_diffusion import random_images

from defectlab.data.augment import corrupt, gaussian_noise, line_kernel, motion_blur, resized


def moments(weights: Tensor) -> tuple[Tensor, float, float, float]:
    """Centre (x, y), direction in 0..pi, and the variances along and across of a map of weights (H, W)."""
    weights = weights.double() / weights.double().sum()
    y, x = (torch.arange(side, dtype=torch.float64) for side in weights.shape)
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # (H W, 2)
    centre = weights.flatten() @ places
    values, axes = torch.linalg.eigh((places - centre).T @ ((places - centre) * weights.flatten()[:, None]))
    return centre, math.atan2(axes[1, 1], axes[0, 1]) % math.pi, float(values[1]), float(values[0])


def turned(first: float, second: float) -> float:
    """The angle between two directions, 0..pi / 2."""
    difference = abs(first - second) % math.pi
    return min(difference, math.pi - difference)


@pytest.mark.parametrize("angle", [0.0, math.pi / 6, math.pi / 4, math.pi / 2, 2.5])
@pytest.mark.parametrize("length", [3, 6, 15])
def test_a_stroke_has_its_sum_length_and_direction(length: int, angle: float) -> None:
    """A uniform stroke of length l has variance l^2 / 12; sharing a point among four pixels adds up to 1/4 each way."""
    kernel = line_kernel(length, angle, 17)
    assert kernel.shape == (17, 17) and kernel.min() >= 0
    torch.testing.assert_close(kernel.sum(), torch.tensor(1.0))
    torch.testing.assert_close(kernel, kernel.flip(0, 1), atol=1e-5, rtol=0)
    centre, direction, along, across = moments(kernel)
    torch.testing.assert_close(centre, torch.tensor([8.0, 8.0], dtype=torch.float64), atol=1e-4, rtol=0)
    assert turned(direction, angle) < math.radians(2)
    assert (length - 1) ** 2 / 12 <= along <= 1.03 * (length - 1) ** 2 / 12 + 0.25 and across <= 0.25


def test_a_stroke_by_hand() -> None:
    """Each pixel inside gets the same, those at the ends half of it: they are half covered."""
    horizontal, vertical = (line_kernel(7, angle, 9) for angle in (0, math.pi / 2))
    assert (horizontal > 1e-4).nonzero().tolist() == [[4, column] for column in range(1, 8)]
    torch.testing.assert_close(horizontal[4, 1:8], torch.tensor([0.5, 1, 1, 1, 1, 1, 0.5]) / 6, atol=0.01, rtol=0)
    torch.testing.assert_close(vertical, horizontal.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [2, 9])
def test_blur_of_a_constant_is_constant(length: int) -> None:
    images = torch.tensor([0, 77, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 20, 24)
    assert torch.equal(motion_blur(images, length, seeded(0)), images)


def test_blur_draws_a_point_out_along_its_own_angle() -> None:
    images = torch.zeros(6, 1, 31, 31, dtype=torch.uint8)
    images[:, :, 15, 15] = 255
    blurred = motion_blur(images, 9, seeded(3))
    angles = (torch.rand(6, generator=seeded(3)) * math.pi).tolist()
    assert max(angles) - min(angles) > 1
    for image, angle in zip(blurred[:, 0], angles, strict=True):
        assert abs(int(image.sum()) - 255) < 20  # rounding to grey levels
        centre, direction, along, across = moments(image)
        assert (centre - 15).abs().max() < 0.1 and turned(direction, angle) < math.radians(4)
        assert 8**2 / 12 * 0.9 < along < 8**2 / 12 * 1.15 + 0.25 and across < 0.3


def test_channels_are_blurred_alike_and_images_apart() -> None:
    grey = random_images(1, size=32).expand(2, 3, -1, -1)
    blurred = motion_blur(grey, 9, seeded(0))
    assert torch.equal(blurred[:, 0], blurred[:, 1]) and torch.equal(blurred[:, 0], blurred[:, 2])
    assert not torch.equal(blurred[0], blurred[1])
    assert torch.equal(motion_blur(grey[:1], 9, seeded(0))[0], blurred[0])


@pytest.mark.parametrize("deviation", [5, 20])
def test_noise_has_its_deviation_and_no_mean(deviation: int) -> None:
    images = torch.full((4, 1, 200, 200), 128, dtype=torch.uint8)
    noise = gaussian_noise(images, deviation, seeded(0)).double() - 128
    assert abs(float(noise.mean())) < 0.2 and abs(float(noise.std()) / deviation - 1) < 0.02
    for level in (1, 2):  # normal: between whole grey levels, as the noise is rounded
        expected = math.erf((level * deviation + 0.5) / deviation / math.sqrt(2))
        assert abs(float((noise.abs() <= level * deviation).double().mean()) - expected) < 0.01
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.03  # other noise in every image


def test_noise_stays_within_the_grey_levels() -> None:
    for level in (0, 255):
        images = torch.full((1, 3, 50, 50), level, dtype=torch.uint8)
        distance = (gaussian_noise(images, 30, seeded(0)).double() - level).abs()
        assert 0.4 < float((distance == 0).double().mean()) < 0.6  # half would leave the range and is clipped
        assert 10 < float(distance.mean()) < 14  # 30 / sqrt(2 pi) = 12


@pytest.mark.parametrize("kind", ["blur", "noise"])
def test_the_generator_decides_and_no_image_is_corrupted_as_another(kind: str) -> None:
    images = random_images(1, colours=3, size=32).expand(4, -1, -1, -1)
    before = images.clone()
    first, again, other = (corrupt(images, kind, 9, seeded(seed), batch=2) for seed in (1, 1, 2))
    assert first.shape == images.shape and first.dtype == torch.uint8
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(images, before)
    assert len({image.numpy().tobytes() for image in (*first, before[0])}) == 5
    assert torch.equal(corrupt(images, kind, 0, seeded(0)), images)


@pytest.mark.parametrize("strength", [0, 5])
def test_unknown_kind(strength: int) -> None:
    with pytest.raises(ValueError, match="unknown kind of corruption 'rain': use blur or noise"):
        corrupt(random_images(1), "rain", strength, seeded(0))


@pytest.mark.parametrize("size", [13, 32, 50])
def test_resized_keeps_constants_and_levels(size: int) -> None:
    levels = torch.tensor([0, 100, 255], dtype=torch.uint8)[:, None, None, None]
    changed = resized(levels.expand(3, 2, 32, 32), size, batch=2)
    assert torch.equal(changed, levels.expand(3, 2, size, size)) and changed.dtype == torch.uint8
    images = random_images(3, size=32)
    assert torch.equal(resized(images, 32), images)


def test_resized_shrinks_without_aliasing_and_enlarges_in_place() -> None:
    checks = (torch.arange(32) % 2 * 255).byte().expand(1, 1, 32, 32)
    inside = resized(checks, 8)[..., 1:-1]  # four columns, two of each, and half of the next ones
    assert (inside.int() - 127).abs().max() <= 2
    halves = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    halves[..., 4:] = 200
    assert resized(halves, 16)[0, 0, 0].tolist() == [0] * 7 + [50, 150] + [200] * 7
