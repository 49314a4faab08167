"""Grad-CAM++ of a detector against the paper's equation written out with autograd, and what it must leave alone."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from toy_detection import equal, toy_split

from defectlab.figures.grad_cam import heat_maps, points_into
from defectlab.networks.yolo.decode import decode
from defectlab.networks.yolo.model import Detector


@pytest.fixture(params=["v5", "v8"])
def detector(request):
    """Fresh weights, but normalised as after some training: a fresh network's maps are nearly flat."""
    torch.manual_seed(0)
    network = Detector(request.param, "t", 2)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(8, 3, 64, 64))
        for level in network.head.modules():
            if isinstance(level, torch.nn.Conv2d) and level.kernel_size == (1, 1):
                level.weight *= 5  # scores that differ from place to place
    return network.eval()


@pytest.fixture
def images():
    return toy_split(3, 1, 64).images


def unit(heat):
    """(N, h, w) -> each map from 0 to 1, as the package scales them."""
    heat = heat - heat.amin((1, 2), keepdim=True)
    return heat / (heat.amax((1, 2), keepdim=True) + 1e-7)


def by_hand(detector, images, label):
    """Equations 10 and 19 of the paper on the neck's three maps, their scaled and enlarged means."""
    pictures = (images / 255).expand(-1, 3, -1, -1)
    maps = detector.neck(detector.backbone(pictures))
    _, scores = decode(detector, detector.head(maps))
    s = scores[..., label].sum(1).log()
    found = []
    for layer, gradient in zip(maps, torch.autograd.grad(s.sum(), maps), strict=True):
        sums = layer.sum((2, 3), keepdim=True)
        alpha = gradient**2 / (2 * gradient**2 + sums * gradient**3 + 1e-6)
        weights = (alpha * gradient.relu()).sum((2, 3), keepdim=True)
        heat = (weights * layer).sum(1).relu().detach()
        size = images.shape[-2:]
        found.append(interpolate(unit(heat)[:, None], size, mode="bilinear", align_corners=False)[:, 0])
    return unit(torch.stack(found).mean(0)).numpy(), s.exp().detach().numpy()


def test_it_is_the_equation_of_the_paper(detector, images):
    for label in (0, 1):
        heat, evidence = heat_maps(detector, images, label)
        expected, sums = by_hand(detector, images, label)
        assert heat.shape == (3, 64, 64) and heat.dtype == np.float32
        np.testing.assert_allclose(heat, expected, atol=2e-3)
        np.testing.assert_allclose(evidence, sums, rtol=1e-4)


def test_a_heat_map_goes_from_0_to_1(detector, images):
    heat, evidence = heat_maps(detector, images, 0)
    assert np.isfinite(heat).all() and (evidence >= 0).all()
    np.testing.assert_allclose(heat.min((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(heat.max((1, 2)), 1, atol=1e-3)


def test_classes_have_maps_of_their_own(detector, images):
    first, second = heat_maps(detector, images, 0)[0], heat_maps(detector, images, 1)[0]
    assert np.abs(first - second).max() > 0.01


def test_a_picture_does_not_depend_on_its_batch(detector, images):
    together, sums = heat_maps(detector, images, 1, batch=3)
    alone, own = heat_maps(detector, images, 1, batch=1)
    np.testing.assert_allclose(together, alone, atol=1e-3)
    np.testing.assert_allclose(sums, own, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_the_detector_stays_as_it_is(detector, images, training):
    detector.train(training)
    before = copy.deepcopy(detector)
    with torch.no_grad():  # as in a notebook's cell
        heat_maps(detector, images, 0)
    assert equal(before, detector) and detector.training == training
    assert all(p.grad is None and p.requires_grad for p in detector.parameters())
    assert not any(module._forward_hooks for module in detector.modules())


def test_frozen_weights_are_no_hindrance(detector, images):
    expected, _ = heat_maps(detector, images, 0)
    np.testing.assert_array_equal(heat_maps(detector.requires_grad_(False), images, 0)[0], expected)


def test_colour_and_grey_pictures_give_the_same(detector, images):
    expected, _ = heat_maps(detector, images, 0)
    np.testing.assert_allclose(heat_maps(detector, images.expand(-1, 3, -1, -1), 0)[0], expected, atol=1e-5)


def test_what_is_refused(detector, images):
    with pytest.raises(ValueError, match="classes 0 to 1"):
        heat_maps(detector, images, 2)
    with pytest.raises(ValueError, match="divisible by 32"):
        heat_maps(detector, images[..., :40, :40], 0)


def test_pointing_game_by_hand():
    maps = np.zeros((3, 8, 8), np.float32)
    maps[:, 2, 5] = 1  # row 2, column 5: its middle is (5.5, 2.5)
    inside, outside = torch.tensor([[5.0, 2.0, 6.0, 3.0]]), torch.tensor([[2.0, 5.0, 3.0, 6.0]])
    assert points_into(maps, [inside, outside, torch.cat([outside, inside])]) == [True, False, True]
    assert points_into(maps[:1], [torch.zeros(0, 4)]) == [False]
