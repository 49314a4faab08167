"""The L2 and SSIM autoencoders and GANomaly: structural similarity, networks, who learns from which loss, and what."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from toy_anomaly import fit

from defectlab.networks.rebuild.autoencoder import (
    Autoencoder,
    AutoencoderSettings,
    dissimilarity,
    squared_error,
    ssim_map,
)
from defectlab.networks.rebuild.base import Normal
from defectlab.networks.rebuild.ganomaly import GANomaly, GANomalySettings, discriminator_loss, squared

SMALL = AutoencoderSettings(size=48, patch=32, stride=16, latent=16, draws=8)
SMALL_GAN = GANomalySettings(size=48, patch=32, stride=16, width=8, latent=16, draws=8)


def stripes(count: int, size: int = 48, seed: int = 0) -> Tensor:
    """uint8 (count, 3, size, size): upright stripes with a period of 32 px, at any phase, in some noise."""
    generator = torch.Generator().manual_seed(seed)
    phase = 32 * torch.rand(count, 1, 1, 1, generator=generator)
    wave = 127 + 60 * torch.sin((torch.arange(size) + phase) * 2 * torch.pi / 32)
    noise = 4 * torch.randn(count, 3, size, size, generator=generator)
    return (wave + noise).clamp(0, 255).to(torch.uint8)


def defective(count: int) -> Tensor:
    """The same stripes, with a bright square of 12 px where two windows overlap."""
    images = stripes(count, seed=1)
    images[:, :, 18:30, 18:30] = 250
    return images


def train(method: type[Normal], settings, steps: int, learning_rate: float) -> tuple[Normal, list[float]]:
    torch.manual_seed(0)
    network, generator = method(settings), torch.Generator().manual_seed(0)
    losses = fit(network, stripes(32), steps, learning_rate, generator)
    return network.eval(), losses


# --- Structural similarity --------------------------------------------------------------------------------------------


def test_ssim_is_scikit_images_also_at_the_borders() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 24, 40, generator=generator)
    b = (a + 0.3 * torch.rand(a.shape, generator=generator)).clamp(0, 1)
    recipe = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0, "full": True}
    for x, y, found in zip(a.numpy(), b.numpy(), ssim_map(a, b).numpy(), strict=True):
        _, expected = structural_similarity(x, y, channel_axis=0, **recipe)
        np.testing.assert_allclose(found, expected.mean(0), atol=1e-5)


def test_ssim_is_taken_in_float32_whatever_autocast_says() -> None:
    a, b = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        within = ssim_map(a, b)
    assert within.dtype == torch.float32 and torch.equal(within, ssim_map(a, b))
    assert torch.allclose(ssim_map(a, a), torch.ones(1, 16, 16))


@pytest.mark.parametrize("loss", [squared_error, dissimilarity, squared])
def test_gradients_of_the_reconstruction(loss) -> None:
    images, rebuilt = torch.rand(2, 2, 2, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: loss(images, x), rebuilt.requires_grad_())


# --- Autoencoder ------------------------------------------------------------------------------------------------------


def test_the_network_is_that_of_table_1() -> None:
    network = Autoencoder(AutoencoderSettings())
    sides, x = [], torch.zeros(1, 3, 128, 128)
    for layer in network.encoder:
        x = layer(x)
        if isinstance(layer, torch.nn.Conv2d):
            sides.append((x.shape[1], x.shape[-1]))
    middle = [(32, 64), (32, 32), (32, 32), (64, 16), (64, 16), (128, 8), (64, 8), (32, 8)]
    assert sides == [*middle, (100, 1)]
    widths = [layer.in_channels for layer in network.decoder if isinstance(layer, torch.nn.ConvTranspose2d)]
    assert widths == [100, 32, 64, 128, 64, 64, 32, 32, 32]
    assert network.decoder(x).shape == (1, 3, 128, 128)


@pytest.mark.parametrize("loss", ["l2", "ssim"])
def test_an_autoencoder_learns_stripes_and_stumbles_over_a_square(loss: str) -> None:
    network, losses = train(Autoencoder, replace(SMALL, loss=loss), 150, 0.001)
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    with torch.no_grad():
        good, bad = (network.maps(images) for images in (stripes(8, seed=2), defective(8)))
        assert bad.shape == (8, 256, 256) and bad.dtype == torch.float32
        assert network.scores(None, bad).min() > network.scores(None, good).max()
    square = bad[:, 110:146, 110:146].mean()  # 18 to 30 px of 48 are 96 to 160 of 256; its inside
    assert square > 2 * bad[:, :64].mean()


# --- GANomaly ---------------------------------------------------------------------------------------------------------


def test_each_side_learns_from_its_own_loss_alone() -> None:
    torch.manual_seed(0)
    network = GANomaly(SMALL_GAN)
    terms = network.loss(stripes(4), torch.Generator().manual_seed(0))
    adversary = [*network.features.parameters(), *network.classifier.parameters()]
    generator = [*network.encoder.parameters(), *network.decoder.parameters(), *network.again.parameters()]

    def gradients(name: str, parameters: list) -> list:
        return torch.autograd.grad(terms[name], parameters, retain_graph=True, allow_unused=True)

    for all_, own in zip(gradients("loss", adversary), gradients("discriminator", adversary), strict=True):
        assert torch.equal(all_, own) and own.abs().max() > 0
    assert all(x is None for x in gradients("discriminator", generator))
    for name in ("adversarial", "contextual", "encoder"):
        assert all(x is None for x in gradients(name, adversary))
        assert gradients(name, [network.decoder[0].weight])[0].abs().max() > 0
    weights = dict(zip(("adversarial", "contextual", "encoder", "discriminator"), (1, 50, 1, 1), strict=True))
    assert terms["loss"].item() == pytest.approx(sum(w * terms[name].item() for name, w in weights.items()), rel=1e-5)


def test_the_discriminators_loss_is_binary_cross_entropy() -> None:
    real, fake = torch.randn(2, 6, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1.0] * 6 + [0.0] * 6, dtype=torch.float64)
    expected = torch.nn.BCELoss()(torch.cat([real, fake]).flatten().sigmoid(), labels)
    assert discriminator_loss(real, fake).item() == pytest.approx(expected.item())
    assert torch.autograd.gradcheck(discriminator_loss, (real.requires_grad_(), fake.requires_grad_()))


def test_ganomaly_learns_stripes_and_judges_by_the_worst_window() -> None:
    network, losses = train(GANomaly, SMALL_GAN, 100, 0.002)
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    good, bad = stripes(8, seed=2), defective(8)
    with torch.no_grad():
        maps, scores = network.maps(bad), network.scores(bad, None)
        assert maps.shape == (8, 256, 256) and maps[:, 110:146, 110:146].mean() > 2 * maps[:, :64].mean()
        assert scores.min() > network.scores(good, None).max()
        windows = [bad[:, :, y : y + 32, x : x + 32] for y in (0, 16) for x in (0, 16)]
        each = torch.stack([network.scores(window, None) for window in windows])
    assert scores.shape == (8,) and torch.allclose(scores, each.amax(0), rtol=1e-4) and (each[0] < scores).any()


@pytest.mark.parametrize(("patch", "sides"), [(32, [16, 8, 4]), (64, [32, 16, 8, 4])])
def test_networks_of_ganomaly_halve_down_to_four_pixels(patch: int, sides: list[int]) -> None:
    network, x, found = GANomaly(replace(SMALL_GAN, size=64, patch=patch)).eval(), torch.zeros(1, 3, patch, patch), []
    for layer in network.features:
        x = layer(x)
        found += [x.shape[-1]] if isinstance(layer, torch.nn.Conv2d) else []
    assert found == sides and x.shape[1] == 8 * patch // 8
    latent = network.encoder(torch.zeros(1, 3, patch, patch))
    assert latent.shape == (1, 16, 1, 1) and network.decoder(latent).shape == (1, 3, patch, patch)


# --- Both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "settings"), [(Autoencoder, SMALL), (GANomaly, SMALL_GAN)])
def test_a_seed_gives_the_same_loss(method, settings) -> None:
    def loss(seed: int) -> float:
        torch.manual_seed(0)
        return method(settings).loss(stripes(4), torch.Generator().manual_seed(seed))["loss"].item()

    assert loss(0) == loss(0) != loss(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Autoencoder(replace(SMALL, loss="l1")), "unknown loss 'l1'"),
        (lambda: Autoencoder(replace(SMALL, patch=40)), "multiple of 16"),
        (lambda: Autoencoder(replace(SMALL, patch=64)), "up to 48, got 64"),
        (lambda: Autoencoder(SMALL).maps(stripes(1).float()), "must be uint8"),
        (lambda: GANomaly(replace(SMALL_GAN, patch=48)), "8, 16, 32"),
        (lambda: GANomaly(SMALL_GAN).maps(stripes(1).float()), "must be uint8"),
        (lambda: GANomaly(replace(SMALL_GAN, patch=64)).loss(stripes(1), torch.Generator()), "do not fit"),
    ],
)
def test_what_cannot_be_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
