"""DRAEM: noise, made-up defects, the focal loss, and what two small networks learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import label
from torchvision.ops import sigmoid_focal_loss

from defectlab.networks.rebuild.draem import (
    DRAEM,
    DRAEMSettings,
    EncoderDecoder,
    focal_loss,
    make_defects,
    perlin_masks,
    perlin_noise,
)

SMALL = DRAEMSettings(size=64, patch=64, rebuild_width=4, mark_width=4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_perlin_noise_is_zero_at_the_corners_of_its_cells_and_smooth_between() -> None:
    noise = perlin_noise(3, 65, 1, seeded())  # pixel centres: the middle one lies in the middle of the cell
    assert noise.shape == (3, 65, 65) and noise.abs().max() < 1
    fine = perlin_noise(1, 512, 4, seeded())[0]
    corners = fine[[0, 127, 128, 255, 256, 511]][:, [0, 127, 128, 255, 256, 511]]
    assert corners.abs().max() < 0.01 and fine.abs().max() > 0.31
    assert fine.diff(dim=0).abs().max() < 0.03 and fine.diff(dim=1).abs().max() < 0.03
    assert torch.equal(noise, perlin_noise(3, 65, 1, seeded())) and not torch.equal(noise[0], noise[1])


def test_masks_are_of_many_sizes() -> None:
    masks = perlin_masks(40, 64, (2, 32), seeded())
    assert masks.unique().tolist() == [0, 1]
    assert masks.mean((1, 2)).min() > 0.02 and masks.mean((1, 2)).max() < 0.6
    parts = [label(mask)[1] for mask in masks.numpy()]
    assert min(parts) <= 4 and max(parts) > 20


def test_a_defect_is_laid_over_where_the_mask_says_so() -> None:
    images, textures = torch.full((2, 3, 4, 4), 0.2), torch.full((2, 3, 4, 4), 1.0)
    masks = torch.zeros(2, 1, 4, 4)
    masks[0, 0, 1, 2] = 1
    found = make_defects(images, textures, masks, torch.tensor([0.25, 1.0]).view(2, 1, 1, 1))
    assert found[0, :, 1, 2] == pytest.approx([0.4] * 3) and torch.equal(found[1], images[1])
    found[0, :, 1, 2] = 0.2
    assert torch.equal(found, images)


def test_focal_loss_is_torchvisions_and_has_its_gradient() -> None:
    logits, masks = torch.randn(2, 5, 5, generator=seeded(), dtype=torch.float64), torch.zeros(2, 5, 5).double()
    masks[0, 1:3] = 1
    wanted = sigmoid_focal_loss(logits, masks, alpha=-1, gamma=2, reduction="mean")
    assert torch.allclose(focal_loss(logits, masks), wanted)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, masks), logits.requires_grad_())


def test_only_the_second_network_has_skips() -> None:
    torch.manual_seed(0)
    for skips in (True, False):
        network = EncoderDecoder(3, 2, 4, skips).eval()
        with torch.no_grad():
            assert network(torch.rand(1, 3, 32, 48)).shape == (1, 2, 32, 48)
        assert len(network.up) == 4 and network.down[-1][3].out_channels == 32
        assert (network.up[0][0].in_channels == 64) == skips


def test_half_of_the_images_stay_good() -> None:
    method = DRAEM(SMALL)
    images = torch.rand(64, 3, 64, 64, generator=seeded())
    method.begin(images, torch.randint(0, 256, (5, 3, 96, 96), dtype=torch.uint8, generator=seeded()))
    changed, masks = method.corrupted(images, seeded(1))
    touched = masks.flatten(1).amax(1) > 0
    assert 20 < touched.sum() < 44
    same = (changed == images).flatten(1).all(1)
    assert torch.equal(same, ~touched)
    assert torch.equal(changed, method.corrupted(images, seeded(1))[0])
    assert "textures" not in dict(method.named_buffers())
    assert (method.textures[:, 0] != method.textures[:, 1]).any()  # the images have colour
    method.begin(images[:, :1].expand(-1, 3, -1, -1), method.textures)
    assert torch.equal(method.textures[:, 0], method.textures[:, 1])


def test_it_learns_to_mark_a_blob_that_it_never_saw() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    wave = 128 + 40 * np.sin(np.arange(64) / 2.0)[None, None, None] + rng.normal(0, 4, (24, 1, 64, 64))
    images = torch.from_numpy(wave.clip(0, 255).astype(np.uint8)).expand(-1, 3, -1, -1).contiguous()
    foreign = torch.full((8, 3, 64, 64), 250, dtype=torch.uint8)  # smooth and bright
    method, generator = DRAEM(SMALL), seeded(2)
    method.begin(images, foreign)
    optimizer = torch.optim.Adam(method.parameters(), 0.003)
    losses = []
    for _ in range(80):
        terms = method.loss(images[torch.randint(24, (8,), generator=generator)], generator)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["loss"].detach()))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    bad = images[:4].clone()
    bad[:, :, 20:34, 30:44] = foreign[:4, :, 20:34, 30:44]
    with torch.no_grad():
        method.eval()
        maps = method.maps(bad)
        scores = method.scores(bad, maps), method.scores(images[:4], method.maps(images[:4]))
    assert maps.shape == (4, 256, 256) and maps.min() >= 0 and maps.max() <= 1
    assert maps[:, 90:126, 130:166].mean() > 2 * maps[:, :60].mean()
    assert scores[0].min() > scores[1].max()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="images of other data sets"):
        DRAEM(SMALL).begin(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiples of 16 px"):
        DRAEM(replace(SMALL, patch=60))
