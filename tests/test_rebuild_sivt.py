"""SIVT: features on one grid, attention beside induction tokens, two decoders of one size, and what they learn."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from toy_anomaly import fit

from defectlab.metrics.costs import flops, parameters
from defectlab.networks.rebuild.sivt import (
    SIVT,
    Descriptors,
    InductionAttention,
    SIVTSettings,
    build_decoder,
    jittered,
    reconstruction_loss,
)

SETTINGS = SIVTSettings(size=64, pretrained=False, dim=32, depth=1, batch=16)


def textures(count: int, seed: int, size: int = 64) -> torch.Tensor:
    """uint8 (count, 3, size, size): grey stripes at odd phases, with noise."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.28 * torch.rand(count, 1, 1, generator=generator)
    stripes = 128 + 50 * torch.sin(torch.arange(size) * 0.8 + phase) + torch.zeros(count, size, 1)
    noisy = stripes + 6 * torch.randn(count, size, size, generator=generator)
    return noisy.clamp(0, 255).to(torch.uint8)[:, None].repeat(1, 3, 1, 1)


def trained(settings: SIVTSettings, prepared: torch.Tensor, steps: int, seed: int = 0) -> SIVT:
    torch.manual_seed(seed)
    network = SIVT(settings)
    network.begin(prepared)
    fit(network, prepared, steps, 0.003, torch.Generator().manual_seed(seed))
    return network.eval()


# --- Features ---------------------------------------------------------------------------------------------------------


def test_descriptors_are_lite0s_maps_on_one_grid() -> None:
    images, backbone = textures(2, 0, 128), Descriptors((4, 8, 16, 32), pretrained=False)
    features = backbone(images)
    assert features.shape == (2, 24 + 40 + 112 + 320, 8, 8) and features.dtype == torch.float32
    net = backbone.lite0.net
    x, by_stride = net.bn1(net.conv_stem(images.float() / 127.5 - 1)), {}
    for stage in net.blocks:
        x = stage(x)
        by_stride[128 // x.shape[-1]] = x  # the last map of its stride
    coarse = nn.Upsample(scale_factor=2, mode="bilinear")(by_stride[32])
    parts = [nn.AvgPool2d(4)(by_stride[4]), nn.AvgPool2d(2)(by_stride[8]), by_stride[16], coarse]
    for found, expected in zip(features.split([24, 40, 112, 320], 1), parts, strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert torch.equal(Descriptors((8, 16), pretrained=False)(images), features[:, 24:176])


def test_jitter_is_as_strong_as_the_norm_says() -> None:
    features = torch.randn(4, 100, 16, 16) * torch.linspace(0.1, 10, 16)
    noise = jittered(features, 20.0, torch.Generator().manual_seed(0)) - features
    wanted = 20 * features.norm(dim=1).mean((0, 1)) / 100
    assert torch.allclose(noise.std((0, 1, 2)), wanted, rtol=0.05)
    assert torch.equal(jittered(features, 0.0, torch.Generator()), features)


# --- Decoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 5])
def test_attention_is_that_of_torch_with_the_tokens_as_keys_and_values(tokens: int) -> None:
    own, torchs = InductionAttention(16, 4, tokens), nn.MultiheadAttention(16, 4, batch_first=True)
    torchs.load_state_dict(
        {
            "in_proj_weight": torch.cat([own.query.weight, own.key_value.weight]),
            "in_proj_bias": torch.cat([own.query.bias, own.key_value.bias]),
            "out_proj.weight": own.out.weight,
            "out_proj.bias": own.out.bias,
        }
    )
    x, image = torch.randn(2, 9, 16), torch.randn(2, 7, 16)
    seen = torch.cat([image, own.tokens.expand(2, -1, -1)], 1)
    assert torch.allclose(own(x, image), torchs(x, seen, seen, need_weights=False)[0], atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"strides": (4, 8, 16, 32)}, {"dim": 64, "depth": 4, "induction": 0}, {"size": 128, "dim": 256}]
)
def test_both_decoders_have_as_many_parameters(changes: dict) -> None:
    settings = replace(SIVTSettings(), **changes)
    channels, grid = 176 + 320 * (32 in settings.strides), settings.size // 16
    features, counts = torch.randn(1, channels, grid, grid), []
    for name in ("transformer", "conv"):
        decoder = build_decoder(replace(settings, decoder=name), channels).eval()
        assert decoder(features).shape == features.shape
        counts.append((parameters(decoder), flops(decoder, features)))
    (of_transformer, more), (of_convolutions, fewer) = counts
    assert of_convolutions == pytest.approx(of_transformer, rel=0.03) and more > fewer


def test_gradients_of_the_loss() -> None:
    features, rebuilt = (torch.randn(2, 5, 3, 3, dtype=torch.double) for _ in range(2))
    assert gradcheck(lambda x: reconstruction_loss(features, x, 0.5), rebuilt.requires_grad_())
    assert reconstruction_loss(features, features, 1.0) == pytest.approx(0, abs=1e-6)
    squared = float((2 * features).square().mean())
    assert reconstruction_loss(features, -features, 3.0).item() == pytest.approx(squared + 3 * 2)  # 1 - cosine is 2


# --- The method -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared() -> torch.Tensor:
    return SIVT(SETTINGS).prepare(textures(48, 0))


@pytest.mark.parametrize("decoder", ["transformer", "conv"])
def test_a_blob_on_stripes_stands_out_after_training(decoder: str, prepared: torch.Tensor) -> None:
    bad, contrasts = textures(8, 1), []
    bad[:, :, 40:52, 8:20] = 250
    for steps in (0, 80):
        network = trained(replace(SETTINGS, decoder=decoder), prepared, steps)
        with torch.no_grad():
            of_good, of_bad = (network.prepare(images) for images in (textures(8, 1), bad))
            good_maps, maps = network.maps(of_good), network.maps(of_bad)
        inside, outside = maps[:, 160:208, 32:80], maps[:, :96, 160:]  # the map has 4 px for each of the image's
        contrasts.append(float(inside.mean() / outside.mean()))
    assert contrasts[1] > 1.5 * contrasts[0]
    assert network.scores(of_bad, maps).min() > network.scores(of_good, good_maps).max()
    assert maps.shape == (8, 256, 256) and maps.dtype == torch.float32


def test_standardised_features_and_what_a_saved_network_keeps(prepared: torch.Tensor) -> None:
    network = trained(SETTINGS, prepared, 1)
    deviation, mean = torch.std_mean(network.standardised(prepared), (0, 2, 3), correction=0)
    assert mean.abs().max() < 1e-3 and (deviation - 1).abs().max() < 1e-3
    other = SIVT(SETTINGS).eval()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.maps(prepared[:2]), network.maps(prepared[:2]))


def test_a_seed_gives_the_same_network(prepared: torch.Tensor) -> None:
    first, again, other = (trained(SETTINGS, prepared, 2, seed).maps(prepared[:2]) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_frozen_part_is_not_trained() -> None:
    network = SIVT(SETTINGS).train()
    assert not network.backbone.lite0.training and not any(p.requires_grad for p in network.backbone.parameters())
    features = network.prepare(textures(2, 0))
    network.loss(features, torch.Generator())["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in network.decoder.parameters())  # the induction tokens, too


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SIVT(replace(SETTINGS, decoder="linear")), "'linear' must be transformer or conv"),
        (lambda: SIVT(replace(SETTINGS, size=96)), "96 px a multiple of 64"),
        (lambda: Descriptors((2, 4), False), r"strides must be some of \(4, 8, 16, 32\)"),
        (lambda: Descriptors((8, 4), False), "fine to coarse"),
        (lambda: SIVT(SETTINGS).prepare(textures(1, 0).float()), "must be uint8"),
    ],
)
def test_what_cannot_be_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
