"""The weighting of stage two's maps: a convolution of each, fitted to pasted defects."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from defectlab.metrics.ranking import auroc
from defectlab.networks.reverse_distillation import gaussian_smooth, upsample
from defectlab.papers.amam_kd.weighting import MapWeighting, fit_weighting, tap_maps


def random_maps(count: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, s, s, generator=generator) for s in (16, 8, 4)]


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_weighting_starts_as_the_plain_sum(kernel: int) -> None:
    maps = random_maps()
    torch.testing.assert_close(MapWeighting(kernel)(maps), sum(upsample(m) for m in maps), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_weighting_is_a_convolution_of_each_map_and_what_each_tap_sees_adds_up_to_it(kernel: int) -> None:
    weighting, maps = MapWeighting(kernel), random_maps()
    weighting.kernels.copy_(torch.rand(3, kernel, kernel, generator=torch.Generator().manual_seed(1)))
    expected = 0
    for one, taps in zip(maps, weighting.kernels, strict=True):
        padded = functional.pad(one[:, None], (kernel // 2,) * 4, mode="replicate")
        convolved = functional.conv2d(padded, taps[None, None])
        expected += functional.interpolate(convolved, (256, 256), mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(weighting(maps), expected, rtol=1e-4, atol=1e-5)
    taps = torch.cat([tap_maps(m, kernel) for m in maps])  # (3 k k, N, 128, 128)
    added = (weighting.kernels.flatten()[:, None, None, None] * taps).sum(0)
    torch.testing.assert_close(added, gaussian_smooth(weighting(maps))[..., ::2, ::2], rtol=1e-4, atol=1e-5)


def defects_seen_by_layer_2() -> tuple[list[Tensor], Tensor]:
    """Six maps with noise in every layer and, in the last three, a square that layer 2 alone sees; its masks."""
    maps, masks = random_maps(6), torch.zeros(6, 256, 256, dtype=torch.uint8)
    maps[1][3:, 2:4, 2:4] += 1
    masks[3:, 64:128, 64:128] = 1
    return maps, masks


@pytest.mark.parametrize("kernel", [1, 3])
def test_fitted_weighting_listens_to_the_layer_that_sees_the_defects(kernel: int) -> None:
    maps, masks = defects_seen_by_layer_2()
    weighting = fit_weighting(maps, masks, kernel)
    first, second, third = weighting.kernels.sum((1, 2)).tolist()
    assert weighting.kernels.shape == (3, kernel, kernel)
    assert second > 2 * max(first, third)
    assert first + second + third == pytest.approx(3, rel=1e-4)
    assert float(weighting.kernels.min()) > 0
    assert torch.equal(fit_weighting(maps, masks, kernel).kernels, weighting.kernels)

    fitted, plain = (
        auroc(gaussian_smooth(w(maps)).flatten(), masks.flatten()) for w in (weighting, MapWeighting(kernel))
    )
    assert fitted > plain + 0.01


def test_a_large_defect_does_not_outvote_a_small_one() -> None:
    maps, masks = random_maps(4), torch.zeros(4, 256, 256, dtype=torch.uint8)
    maps[2][2, :, :2] += 1  # layer 3 sees half of an image ...
    masks[2, :, :128] = 1
    maps[0][3, 4:6, 4:6] += 1  # ... and layer 1 a spot of another
    masks[3, 64:96, 64:96] = 1
    weights = fit_weighting(maps, masks, 1).kernels.flatten().tolist()
    assert weights[0] > weights[1]  # what nobody needs
    assert weights[2] > weights[1]
    assert weights[0] > 0.3


def test_weighting_cannot_be_fitted_without_defects() -> None:
    with pytest.raises(ValueError, match="the masks have only one of them"):
        fit_weighting(random_maps(), torch.zeros(4, 256, 256, dtype=torch.uint8), 1)
