"""D3N's compression: the VAE and its loss, PCA against scikit-learn, standardisation, fitting, what is lost."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.decomposition import IncrementalPCA
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.distributions import Normal, kl_divergence
from toy_detection import equal
from toy_runs import one_sitting, quiet

from defectlab.papers.d3n import resvae as compression
from defectlab.papers.d3n.resvae import CompressionSettings, Level, PCALevel, ResVAE, build_compressor, vae_loss
from defectlab.runs import OutOfTime
from defectlab.training import d3n_features as training
from defectlab.training.d3n_features import channel_vectors, fit_compressor, reconstruction_error

SMALL = CompressionSettings(epochs=2, batch=8, precision="fp32")
QUIET = quiet()
REDUCTIONS = ("sum", "mean", "mixed")


def toy(images: int, channels: int, side: int, rank: int, seed: int, noise: float = 0.05) -> Tensor:
    """Correlated features fp16: `rank` blurred random maps, mixed into channels of unlike scale and offset."""
    shared, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    sources = torch.randn(images, rank, side + 2, side + 2, generator=own)
    sources = 3 * nn.functional.avg_pool2d(sources, 3, 1)
    mixed = torch.einsum("cr,nrhw->nchw", torch.randn(channels, rank, generator=shared), sources)
    mixed += noise * torch.randn(mixed.shape, generator=own)
    scale = torch.logspace(-1, 1, channels).view(1, -1, 1, 1)
    return (scale * mixed + 5).half()


def features(images: int = 16, seed: int = 0, noise: float = 0.05) -> list[Tensor]:
    """Two levels of rank 2 and 3: (N, 8, 8, 8) and (N, 16, 4, 4)."""
    return [toy(images, 8, 8, 2, seed, noise), toy(images, 16, 4, 3, seed, noise)]


@pytest.mark.parametrize(("channels", "latent"), [(512, 64), (24, 3), (8, 8)])  # the first: section IV-A
def test_it_compresses_channels_and_keeps_the_resolution(channels: int, latent: int) -> None:
    net, x = ResVAE(channels, latent), torch.randn(2, channels, 3, 2)
    reconstruction, mean, log_variance = net(x)
    assert mean.shape == log_variance.shape == net.encode(x).shape == (2, latent, 3, 2)
    assert reconstruction.shape == net.decode(mean).shape == x.shape
    net.encoder[-1].bias.data[latent:] = 1e6
    assert net.posterior(x)[1].exp().isfinite().all()  # the logarithm of the variance has a bound


def test_it_decodes_a_sample_in_training_and_the_mean_in_evaluation() -> None:
    torch.manual_seed(0)
    net, x = ResVAE(8, 2), torch.randn(4, 8, 4, 4)
    one, again, other = (net(x, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    net.eval()
    reconstruction, mean, log_variance = net(x)
    assert torch.equal(reconstruction, net.decode(mean))
    assert torch.equal(mean, net.encode(x))
    assert torch.equal(log_variance, net.posterior(x)[1])


def test_samples_have_the_posteriors_mean_and_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = ResVAE(8, 1).train()
    constant = torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 4.0).log()
    monkeypatch.setattr(net, "posterior", lambda x: constant)
    monkeypatch.setattr(net, "decode", lambda z: z)
    z = net(torch.empty(0))[0]
    assert z.mean().item() == pytest.approx(3, abs=0.05)
    assert z.std().item() == pytest.approx(2, abs=0.05)


def test_the_decoder_is_local_so_padding_far_away_changes_nothing() -> None:
    torch.manual_seed(0)
    net = ResVAE(8, 2).eval()
    z = torch.randn(1, 2, 16, 16)
    padded = z.clone()
    padded[..., 12:] = 0
    changed = (net.decode(z) - net.decode(padded)).abs().amax((0, 1, 2)) > 0  # (W,)
    assert changed.tolist() == [False] * 8 + [True] * 8  # four convolutions of 3 x 3 reach four pixels


@pytest.mark.parametrize(("reduction", "wanted"), [("sum", 64 * 4 + 3 * 8 * 0.5), ("mean", 4 + 1.5), ("mixed", 4 + 12)])
@pytest.mark.parametrize("images", [1, 5])
def test_reductions_by_hand(reduction: str, wanted: float, images: int) -> None:
    """Errors of 2 at 64 values per image, 8 latents N(1, 1) whose KL is 1/2, weight 3; the batch does not matter."""
    target, mean = torch.zeros(images, 16, 2, 2), torch.ones(images, 2, 2, 2)
    found = vae_loss(target + 2, target, mean, torch.zeros_like(mean), 3.0, reduction)
    assert {name: v.item() for name, v in found.items()} == pytest.approx({"loss": wanted, "mse": 4.0, "kl": 0.5})


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients(reduction: str) -> None:
    torch.manual_seed(0)
    reconstruction, target = torch.randn(2, 2, 4, 2, 2, dtype=torch.float64)
    mean, log_variance = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (reconstruction, mean, log_variance)]
    assert gradcheck(lambda r, m, v: vae_loss(r, target, m, v, 0.7, reduction)["loss"], inputs)


def test_pca_is_scikit_learns() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(60, 4) @ torch.randn(4, 6) + torch.arange(6)
    level = PCALevel(6, 3)
    level.fit(vectors.split(20))
    wanted = IncrementalPCA(3, batch_size=20).fit(vectors.double().numpy())
    x = torch.randn(2, 6, 3, 5)
    rows = x.movedim(1, -1).reshape(-1, 6).double().numpy()  # (B H W, C)
    z = level.encode(x)
    assert np.allclose(z.movedim(1, -1).reshape(-1, 3), wanted.transform(rows), atol=1e-5)
    back = wanted.inverse_transform(wanted.transform(rows))
    assert np.allclose(level.decode(z).movedim(1, -1).reshape(-1, 6), back, atol=1e-5)


@pytest.mark.parametrize(("method", "tolerance"), [("pca", 1e-3), ("none", 1e-4)])
def test_pca_with_all_components_and_none_lose_nothing(method: str, tolerance: float) -> None:
    kept, trained = fit_compressor(replace(SMALL, method=method, ratio=1), features(), 0, QUIET)
    assert trained is None
    latents = kept.encode(features())
    for z, decoded, x in zip(latents, kept.decode(latents), features(), strict=True):
        assert decoded.dtype == torch.float32  # differences from the mean map, in the features' units
        torch.testing.assert_close(decoded, x.float() - x.float().mean(0), rtol=1e-4, atol=tolerance)
        assert method == "pca" or torch.equal(decoded, z)  # none only centres features
    found = reconstruction_error(kept, features(seed=1))
    assert found["unexplained"] < 1e-3  # latents are rounded to fp16
    assert found["compression_ratio"] == 1.0 and "kl" not in found


def test_pca_with_fewer_components_than_the_rank_loses_much() -> None:
    for ratio, least, most in ((4, 0, 0.01), (8, 1, 100)):  # 2 and 4 latents, 1 and 2
        fitted, _ = fit_compressor(replace(SMALL, method="pca", ratio=ratio), features(noise=0.0), 0, QUIET)
        assert least <= reconstruction_error(fitted, features(seed=1, noise=0.0))["unexplained"] < most


def test_pca_of_many_pixels_sees_a_seeded_draw_without_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PCA_VECTORS", 50)
    monkeypatch.setattr(training, "PCA_CHUNK", 20)
    x = torch.arange(3 * 2 * 4 * 5).view(3, 2, 4, 5).half()  # 60 different vectors
    level = Level(None, (2, 4, 5))
    chunks = list(channel_vectors(level, x, seed=3))
    assert [len(c) for c in chunks] == [17, 17, 16]
    drawn, everything = torch.cat(chunks), x.movedim(1, -1).reshape(-1, 2).float()
    assert {tuple(v) for v in drawn.tolist()} < {tuple(v) for v in everything.tolist()}
    assert len(drawn.unique(dim=0)) == 50
    assert torch.equal(drawn, torch.cat(list(channel_vectors(level, x, seed=3))))
    assert not torch.equal(drawn, torch.cat(list(channel_vectors(level, x, seed=4))))


def test_standardisation_gives_mean_0_per_place_and_variance_1_per_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "CHUNK", 5)
    shared = 3 * torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(1))  # the same map in all images
    x = (features()[0].float() + shared).half()
    x[:, 3] = 2.5  # does not vary: only centred
    level = Level(None, (8, 8, 8))
    level.fit_standardisation(x)
    torch.testing.assert_close(level.mean, x.float().mean(0), rtol=1e-5, atol=1e-4)
    y = level.standardise(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(8, 8, 8), rtol=0, atol=1e-4)
    variance = torch.tensor([0.0 if channel == 3 else 1.0 for channel in range(8)])
    torch.testing.assert_close(y.square().mean((0, 2, 3)), variance, rtol=0, atol=1e-3)


def test_it_stays_frozen_inside_a_network_that_trains() -> None:
    compressor, _ = fit_compressor(SMALL, features(), 0, QUIET)
    hybrid = nn.ModuleDict({"compressor": compressor, "detector": nn.Conv2d(8, 1, 1)}).train()
    assert hybrid["detector"].training
    assert not any(m.training for m in compressor.modules())
    before = {k: v.clone() for k, v in compressor.state_dict().items()}
    maps = compressor.decode(compressor.encode(features()))
    assert not maps[0].requires_grad
    assert all(torch.equal(v, before[k]) for k, v in compressor.state_dict().items())


@pytest.mark.parametrize("method", ["resvae", "pca", "none"])
def test_weights_can_be_kept_in_safetensors(method: str, tmp_path: Path) -> None:
    settings = replace(SMALL, method=method)
    compressor, _ = fit_compressor(settings, features(), 0, QUIET)
    save_file({k: v.contiguous() for k, v in compressor.state_dict().items()}, tmp_path / "c.safetensors")
    loaded = build_compressor(settings, ((8, 8, 8), (16, 4, 4)))
    loaded.load_state_dict(load_file(tmp_path / "c.safetensors"))
    latents, expected = loaded.encode(features()), compressor.encode(features())
    assert [m.shape for m in loaded.decode(latents)] == [x.shape for x in features()]
    for a, b, channels in zip(latents, expected, (8, 16) if method == "none" else (1, 2), strict=True):
        assert a.shape[1] == channels and torch.allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="zip"):
        loaded.encode(features()[:1])


def broken(value: float) -> list[Tensor]:
    found = features()
    found[1][0, 0, 0, 0] = value
    return found


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"method": "svd"}, features(), "unknown method 'svd': use one of resvae, pca, none"),
        ({"ratio": 3}, features(), r"ratio 3 does not divide the channels \[8, 16\]"),
        ({"ratio": 0}, features(), "ratio 0 does not divide"),
        ({"reduction": "avg"}, features(), "unknown reduction 'avg': use one of sum, mean, mixed"),
        ({"method": "resvae"}, broken(float("nan")), "NaN or infinite"),
        ({"method": "pca"}, broken(float("inf")), "NaN or infinite"),
    ],
)
def test_bad_settings_and_features_are_refused(changes: dict, given: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_compressor(replace(SMALL, **changes), given, 0, QUIET)


def test_the_posterior_collapses_with_a_mean_of_errors_beside_a_sum_of_kl() -> None:
    """ResVAEs of one level of rank 2 with 8 channels to 2, an equal training for each reduction; on new features."""
    settings = CompressionSettings(ratio=4, epochs=24, batch=32, learning_rate=1e-2, precision="fp32")
    train, test = [toy(64, 8, 6, 2, seed=0)], [toy(32, 8, 6, 2, seed=1)]
    fitted = {r: fit_compressor(replace(settings, reduction=r), train, 0, QUIET)[0] for r in REDUCTIONS}
    found = {reduction: reconstruction_error(compressor, test) for reduction, compressor in fitted.items()}
    assert found["sum"]["unexplained"] < 20 < 90 < found["mixed"]["unexplained"]
    assert found["sum"]["kl"] > found["mean"]["kl"] > found["mixed"]["kl"]
    assert found["mixed"]["kl"] < 0.01
    assert found["mixed"]["latent_std"] < 0.2 < found["sum"]["latent_std"]


def test_the_curve_has_both_terms_of_every_level_and_falls() -> None:
    _, trained = fit_compressor(replace(SMALL, epochs=8), features(32), 0, QUIET)
    assert set(trained.curve) == {"loss", "mse_level_0", "mse_level_1", "kl_level_0", "kl_level_1"}
    assert trained.curve["loss"][-1] < trained.curve["loss"][0]
    last = {name: values[-1] for name, values in trained.curve.items()}
    bound = 512 * last["mse_level_0"] + 64 * last["kl_level_0"] + 256 * last["mse_level_1"] + 32 * last["kl_level_1"]
    assert last["loss"] == pytest.approx(bound, rel=1e-4)


def test_a_seed_fixes_the_weights_and_seeds_differ() -> None:
    a, b, c = (fit_compressor(SMALL, features(), seed, QUIET)[0].encode(features())[0] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c, atol=1e-3)


def test_an_interrupted_training_takes_the_same_course(tmp_path: Path) -> None:
    settings = replace(SMALL, epochs=3)
    whole, _ = fit_compressor(settings, features(), 0, QUIET)
    for _ in range(2):
        torch.manual_seed(9)  # the global generator does not matter
        with pytest.raises(OutOfTime):
            fit_compressor(settings, features(), 0, one_sitting(tmp_path / "c"))
    parts, _ = fit_compressor(settings, features(), 0, one_sitting(tmp_path / "c"))
    assert equal(whole, parts)


def test_reconstruction_error_is_what_one_pass_over_everything_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHUNK", 5)
    compressor, _ = fit_compressor(SMALL, features(), 0, QUIET)
    x = features(seed=1)
    lost, kl, std = [], [], []
    for level, one in zip(compressor.levels, x, strict=True):
        target = (one.float() - level.mean) / level.deviation
        mean, log_variance = level.codec.posterior(target)
        error = level.codec.decode(mean.half().float()) - target
        lost.append(100 * (error.square().sum() / target.square().sum()).item())
        kl.append(kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean().item())
        std.append(mean.std(correction=0).item())
    expected = {"unexplained": np.mean(lost), "kl": np.mean(kl), "latent_std": np.mean(std), "compression_ratio": 8.0}
    expected |= {f"unexplained_level_{k}": value for k, value in enumerate(lost)}
    assert reconstruction_error(compressor, x) == pytest.approx(expected, rel=5e-3)
