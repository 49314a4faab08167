"""Diffusion: the schedule against the equations and diffusers, training and resuming, samples, errors, features."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from toy_detection import equal, toy_data

from defectlab.data.detection import load_detection
from defectlab.networks.diffusion import (
    DiffusionSettings,
    as_inputs,
    build_unet,
    decoder_channels,
    decoder_features,
    level_outputs,
    noise_loss,
    noise_schedule,
    q_sample,
    sample_ddim,
)
from defectlab.precision import autocast
from defectlab.runs import OutOfTime, Record, Session, changed
from defectlab.training import diffusion as ddpm
from defectlab.training.diffusion import (
    error_per_timestep,
    load_ddpm,
    middles,
    random_flips,
    run_ddpm,
    spread,
    train_ddpm,
)
from defectlab.training.loop import schedule_factor

SPLITS = ("train", "dev", "test")
TOY = DiffusionSettings(
    dataset="toy", size=16, channels=(8, 16, 24), layers=1, epochs=4, batch=4, learning_rate=2e-3, average_ramp=3.0,
    precision="fp32",
)  # fmt: skip


def pictures(count: int, colours: int = 1, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, colours, size, size), generator=generator, dtype=torch.uint8)


def toy_unet(colours: int = 1, **options):
    torch.manual_seed(0)
    return build_unet(replace(TOY, **options), colours).eval().requires_grad_(False)


class Knows(nn.Module):
    """A noise predictor for one picture (1, C, S, S), which it knows; `wrong` of the noise is added to its answer."""

    def __init__(self, clean: Tensor, steps: int = 1000, wrong: float = 0.0):
        super().__init__()
        self.clean, self.alpha_hat, self.wrong = clean, noise_schedule(steps).float(), wrong
        self.config = SimpleNamespace(
            sample_size=clean.shape[-1], in_channels=clean.shape[1], num_train_timesteps=steps
        )

    def forward(self, noisy: Tensor, timesteps: Tensor) -> SimpleNamespace:
        left = self.alpha_hat[timesteps].reshape(-1, 1, 1, 1)
        noise = (noisy - left.sqrt() * self.clean) / (1 - left).sqrt()
        return SimpleNamespace(sample=noise * (1 + self.wrong))


# --- Noise ------------------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_product_of_what_each_step_leaves() -> None:
    alpha_hat = noise_schedule(1000)
    assert alpha_hat.dtype == torch.float64
    betas = [1e-4 + (0.02 - 1e-4) * step / 999 for step in range(1000)]
    for timestep in (0, 1, 100, 250, 999):
        product = math.prod(1 - beta for beta in betas[: timestep + 1])
        assert alpha_hat[timestep].item() == pytest.approx(product, rel=1e-12)
    assert torch.allclose(alpha_hat.float(), DDPMScheduler(beta_schedule="linear").alphas_cumprod, rtol=1e-4, atol=0)


def test_many_small_steps_have_the_mean_and_variance_of_the_jump() -> None:
    """Eq. 1 iterated: the mean is scaled by sqrt(1 - beta), the variance by 1 - beta, and beta is added to it."""
    alpha_hat, mean, variance = noise_schedule(1000), 1.0, 0.0
    for timestep, beta in enumerate(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert alpha_hat[timestep].sqrt().item() == pytest.approx(mean, rel=1e-11)
        assert 1 - alpha_hat[timestep].item() == pytest.approx(variance, rel=1e-11)


def test_noised_pictures_by_hand_and_as_diffusers_has_them() -> None:
    alpha_hat = torch.tensor([1.0, 0.64, 0.0], dtype=torch.float64)
    clean, noise = torch.full((3, 2, 4, 4), 0.5), torch.full((3, 2, 4, 4), 2.0)
    noisy = q_sample(clean, torch.tensor([0, 1, 2]), noise, alpha_hat)
    assert noisy.dtype == torch.float32
    for picture, value in zip(noisy, (0.5, 0.8 * 0.5 + 0.6 * 2, 2.0), strict=True):
        assert torch.allclose(picture, torch.full((2, 4, 4), value))

    clean, noise, timesteps = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([0, 100, 250, 999])
    theirs = DDPMScheduler(beta_schedule="linear").add_noise(clean, noise, timesteps)
    assert torch.allclose(q_sample(clean, timesteps, noise, noise_schedule(1000)), theirs, atol=1e-5)


def test_the_loss_is_the_squared_error_of_the_noise() -> None:
    clean, timesteps = torch.rand(2, 1, 8, 8), torch.tensor([200, 900])
    noise = torch.randn(2, 1, 8, 8)
    loss = partial(noise_loss, clean=clean, timesteps=timesteps, noise=noise, alpha_hat=noise_schedule(1000))
    assert loss(Knows(clean))["loss"] < 1e-9
    assert loss(Knows(clean, wrong=0.5))["loss"].item() == pytest.approx(0.25 * noise.square().mean().item(), rel=1e-4)


def test_the_gradient_of_the_loss() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 1, 3, padding=1).double()
    clean, noise = torch.rand(2, 1, 4, 4, dtype=torch.float64), torch.randn(2, 1, 4, 4, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        def unet(noisy: Tensor, timesteps: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.tanh(nn.functional.conv2d(noisy, weight, padding=1)))

        return noise_loss(unet, clean, torch.tensor([10, 700]), noise, noise_schedule(1000))["loss"]

    assert torch.autograd.gradcheck(loss, layer.weight.detach().requires_grad_())


# --- Network ----------------------------------------------------------------------------------------------------------


def test_the_network_keeps_the_shape_and_attends_where_it_is_told() -> None:
    unet = toy_unet(colours=3)
    assert unet(torch.rand(2, 3, 16, 16), torch.tensor([0, 999])).sample.shape == (2, 3, 16, 16)
    attends = ["Attn" in type(block).__name__ for block in unet.down_blocks]
    assert attends == [False, False, True] == ["Attn" in type(block).__name__ for block in unet.up_blocks][::-1]
    assert unet.config.num_train_timesteps == 1000

    without = toy_unet(attention=(False, False, False))
    assert not any("attentions" in name for name, _ in without.named_parameters())
    norms = [m for m in unet.modules() if isinstance(m, nn.GroupNorm)]
    assert all(norm.num_channels // norm.num_groups >= 4 for norm in norms)


def test_the_default_recipe_and_its_key() -> None:
    paper = DiffusionSettings()
    assert changed(paper) == {}
    assert paper.learning_rate * paper.final_rate == pytest.approx(5e-8)
    with torch.device("meta"):
        unet = build_unet(paper, 1)
    assert sum(p.numel() for p in unet.parameters()) == 62_820_609
    assert unet.conv_norm_out.num_groups == 32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"channels": (8, 16)}, "give three each"), ({"channels": (8, 16, 30)}, "fours"), ({"size": 18}, "multiple of 4")],
)
def test_impossible_networks_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_unet(replace(TOY, **wrong), 1)


# --- Training ---------------------------------------------------------------------------------------------------------


def fit(seed: int = 0, session: Session | None = None, **options):
    return train_ddpm(pictures(9), replace(TOY, **options), seed, session or Session(say=lambda line: None))


def test_flips_are_of_each_picture_and_of_all_four_kinds() -> None:
    picture = torch.arange(4.0).reshape(1, 1, 2, 2)
    flipped = random_flips(picture.repeat(64, 1, 1, 1), torch.Generator().manual_seed(0))
    kinds = {tuple(x.flatten().tolist()) for x in flipped}
    assert kinds == {(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)}


def test_training_is_decided_by_its_seed_and_learns() -> None:
    unet, trained = fit()
    assert equal(unet, fit()[0])
    other, trained_other = fit(seed=1)
    assert not equal(unet, other)
    assert trained.curve != trained_other.curve
    assert list(trained.curve) == ["loss"]
    assert trained.curve["loss"][-1] < 0.9 * trained.curve["loss"][0]
    assert not equal(unet, fit(flips=False)[0])


def test_the_average_follows_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed from the weights that each step left; the ramp starts with the untrained weights."""
    seen: list[Tensor] = []
    follow = ddpm.Averaging.follow

    def watch(parts: ddpm.Averaging) -> None:
        seen.append(parts.network.conv_in.weight.detach().clone())
        follow(parts)

    monkeypatch.setattr(ddpm.Averaging, "follow", watch)
    unet, _ = fit(epochs=2, average=0.9)
    assert len(seen) == 2 * 2 + 1  # 9 pictures in batches of 4, the single last one dropped; and once at the end
    expected = seen[0].clone()
    for step, weight in enumerate(seen):
        decay = 0.9 * (1 - math.exp(-(step + 1) / 3.0))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(unet.conv_in.weight, expected, atol=1e-6)
    assert not torch.allclose(seen[-1], expected, atol=1e-6)
    assert not any(p.requires_grad for p in unet.parameters())
    assert not unet.training


def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, trained = fit()
    checkpoint = tmp_path / "ddpm.safetensors"
    for _ in range(2):
        with pytest.raises(OutOfTime):
            fit(session=Session(checkpoint=checkpoint, deadline=time.monotonic() - 1, say=lambda line: None))
    resumed, trained_again = fit(session=Session(checkpoint=checkpoint, say=lambda line: None))
    assert equal(resumed, whole)
    assert trained_again.curve == trained.curve


def test_the_cosine_can_end_above_nothing() -> None:
    assert schedule_factor("cosine", 0, 4, 0.01) == 1.0
    assert schedule_factor("cosine", 2, 4, 0.01) == pytest.approx(0.505)
    assert schedule_factor("cosine", 4, 4, 0.01) == pytest.approx(0.01)
    assert [schedule_factor("cosine", e, 7) for e in range(7)] == [
        0.5 * (1 + math.cos(math.pi * e / 7)) for e in range(7)
    ]
    assert not equal(fit()[0], fit(final_rate=1.0)[0])  # it reaches the optimiser


def test_pictures_of_another_size_are_refused() -> None:
    for call in (
        lambda: train_ddpm(pictures(4, size=32), TOY, 0, Session()),
        lambda: error_per_timestep(toy_unet(), pictures(4, size=32), [5], 0),
        lambda: decoder_features(toy_unet(), pictures(4, size=32)),
    ):
        with pytest.raises(ValueError, match=r"16 x 16 px pictures, got .*32.*load them at 16"):
            call()


# --- What it has learnt -----------------------------------------------------------------------------------------------


def test_the_error_is_1_for_an_answer_of_nothing_and_0_for_the_noise() -> None:
    clean = pictures(1)
    images, timesteps = clean.repeat(6, 1, 1, 1), [10, 500, 990]
    known = as_inputs(clean)
    assert torch.all(error_per_timestep(Knows(known), images, timesteps, 0) < 1e-4)
    nothing = error_per_timestep(Knows(known, wrong=-1.0), images, timesteps, 0)
    assert torch.allclose(nothing, torch.ones(3, dtype=torch.float64), atol=0.1)
    assert not torch.equal(nothing, error_per_timestep(Knows(known, wrong=-1.0), images, timesteps, 1))


def test_the_error_does_not_depend_on_the_batch() -> None:
    unet, images = toy_unet(), pictures(5)
    whole = error_per_timestep(unet, images, [3, 700], seed=0)
    assert torch.equal(error_per_timestep(unet, images, [3, 700], seed=0), whole)
    assert torch.allclose(error_per_timestep(unet, images, [3, 700], seed=0, batch=2), whole, rtol=1e-4)
    assert whole.dtype == torch.float64


def test_middles_of_equal_parts() -> None:
    assert middles(1000, 20) == list(range(25, 1000, 50))
    assert middles(10, 5) == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("colours", [1, 3])
def test_ddim_finds_the_picture_that_the_predictor_knows(colours: int) -> None:
    clean = pictures(1, colours)
    samples = sample_ddim(Knows(as_inputs(clean)), 2, seed=0, inference_steps=10)
    assert samples.dtype == torch.uint8
    assert torch.equal(samples, clean.repeat(2, 1, 1, 1))


def test_samples_depend_on_their_seed() -> None:
    first = sample_ddim(toy_unet(), 2, seed=0, inference_steps=3)
    assert torch.equal(first, sample_ddim(toy_unet(), 2, seed=0, inference_steps=3))
    assert not torch.equal(first, sample_ddim(toy_unet(), 2, seed=1, inference_steps=3))
    assert not torch.equal(first[0], first[1])


def test_a_run_and_its_network_loaded_again(tmp_path: Path) -> None:
    data = toy_data(16)
    result = run_ddpm(TOY, 0, data, "cpu", Session(say=lambda line: None))
    arrays = result.predictions
    assert result.metrics["noise_error"] == pytest.approx(100 * arrays["errors"].mean(), abs=1e-3)
    assert result.dev["noise_error"] != result.metrics["noise_error"]
    assert arrays["timesteps"].tolist() == list(range(25, 1000, 50))
    assert arrays["errors"].shape == arrays["errors_train"].shape == (20,)
    assert (arrays["samples"].shape, arrays["samples"].dtype.name) == ((16, 16, 16), "uint8")
    assert {"parameters_m", "train_seconds", "train_images_per_second"} == result.costs.keys()
    assert torch.equal(torch.from_numpy(arrays["case_images"]), data.test.images[:, 0])  # all four
    assert arrays["case_told"].shape == (4, 16, 16)
    for level in range(3):
        maps = arrays[f"case_features_{level}"]
        assert (maps.shape, maps.dtype.name) == ((4, 3, 16 >> level, 16 >> level), "uint8")
        assert (maps.min(), maps.max()) == (0, 255)

    path = tmp_path / "ddpm.json"
    path.write_text(json.dumps({"key": "ddpm"}))
    save_file({k: v.contiguous() for k, v in result.model.items()}, path.with_suffix(".safetensors"))
    unet = load_ddpm(Record({}, path), TOY, 1, "cpu")
    assert not unet.training
    assert not any(p.requires_grad for p in unet.parameters())
    again = error_per_timestep(unet, data.test.images, middles(1000, 20), seed=0)
    assert torch.allclose(again.float(), torch.from_numpy(arrays["errors"]), rtol=1e-4)
    with pytest.raises(ValueError, match="does not fit this network"):
        load_ddpm(Record({}, path), replace(TOY, layers=2), 1, "cpu")


def test_a_run_on_pictures_with_colours() -> None:
    data = toy_data(16, counts=(4, 2, 2))
    parts = {p: replace(getattr(data, p), images=getattr(data, p).images.repeat(1, 3, 1, 1)) for p in SPLITS}
    result = run_ddpm(replace(TOY, epochs=1), 0, replace(data, **parts), "cpu", Session(say=lambda line: None))
    assert result.predictions["samples"].shape == (16, 16, 16, 3)
    assert result.predictions["case_told"].shape == result.predictions["case_images"].shape == (2, 16, 16, 3)


def test_pictures_that_are_measured_are_spread_over_the_set() -> None:
    images = torch.arange(10)[:, None]
    assert spread(images, 4).flatten().tolist() == [0, 3, 6, 9]
    assert torch.equal(spread(images, 12), images)


# --- Features ---------------------------------------------------------------------------------------------------------


def test_features_are_the_levels_finest_first() -> None:
    features = decoder_features(toy_unet(), pictures(2))
    assert [tuple(f.shape) for f in features] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 24, 4, 4)]
    assert tuple(f.shape[1] for f in features) == decoder_channels(TOY)
    assert all(not f.requires_grad and not f.is_inference() for f in features)  # so that others can train on them
    with autocast(torch.device("cpu"), "bf16"):
        halves = decoder_features(toy_unet(), pictures(2))
    assert all(f.dtype == h.dtype == torch.float32 for f, h in zip(features, halves, strict=True))


@pytest.mark.parametrize("attention", [(False, False, True), (False, False, False)])
def test_features_are_what_goes_into_the_next_level(attention: tuple) -> None:
    """The input of each upsampler and, at the finest level, of the last normalisation."""
    unet, given = toy_unet(attention=attention), {}

    def keep(name: str) -> Callable:
        return lambda module, inputs: given.update({name: inputs[0]})

    unet.conv_norm_out.register_forward_pre_hook(keep("finest"))
    unet.up_blocks[1].upsamplers[0].register_forward_pre_hook(keep("middle"))
    unet.up_blocks[0].upsamplers[0].register_forward_pre_hook(keep("coarsest"))
    features = decoder_features(unet, pictures(2), timesteps=(100,))
    for level, name in zip(features, ("finest", "middle", "coarsest"), strict=True):
        assert torch.equal(level, given[name])


def test_features_of_a_picture_do_not_depend_on_its_batch_mates() -> None:
    unet, images = toy_unet(), pictures(4)
    together, alone = decoder_features(unet, images), decoder_features(unet, images[2:3])
    assert all(torch.allclose(t[2:3], a, atol=1e-5) for t, a in zip(together, alone, strict=True))
    twins = decoder_features(unet, images[:1].repeat(2, 1, 1, 1))
    assert all(torch.allclose(f[0], f[1], atol=1e-5) for f in twins)


def test_timesteps_are_averaged_or_put_side_by_side() -> None:
    unet, images = toy_unet(), pictures(2)
    mean, side = (decoder_features(unet, images, (100, 250), combine=combine) for combine in ("mean", "concat"))
    for m, s in zip(mean, side, strict=True):
        assert torch.allclose(m, (s[:, : m.shape[1]] + s[:, m.shape[1] :]) / 2, atol=1e-6)
        assert not torch.allclose(s[:, : m.shape[1]], s[:, m.shape[1] :], atol=1e-3)
    first = decoder_features(unet, images, (100,))
    assert all(torch.allclose(f, s[:, : f.shape[1]], atol=1e-6) for f, s in zip(first, side, strict=True))


def test_noise_of_features_comes_from_its_seed_and_the_schedule() -> None:
    unet, images = toy_unet(), pictures(2)
    first = decoder_features(unet, images)[0]
    assert torch.equal(decoder_features(unet, images, alpha_hat=noise_schedule(1000))[0], first)
    assert not torch.equal(decoder_features(unet, images, noise_seed=1)[0], first)
    without = decoder_features(unet, images, alpha_hat=torch.ones(1000, dtype=torch.float64))[0]  # no noise at all
    assert not torch.equal(without, first)


def test_hooks_are_removed_even_on_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = toy_unet()
    decoder_features(unet, pictures(1))

    def breaks(sample: Tensor) -> Tensor:
        assert all(level._forward_hooks for level in level_outputs(unet)), "the hooks are in place"
        raise RuntimeError("broken network")

    monkeypatch.setattr(unet.conv_in, "forward", breaks)
    with pytest.raises(RuntimeError, match="broken network"):
        decoder_features(unet, pictures(1))
    assert not any(module._forward_hooks for module in unet.modules())


def test_bad_requests_for_features_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown combine 'sum': use mean or concat"):
        decoder_features(toy_unet(), pictures(1), combine="sum")
    for timesteps in ((), (100, 1000), (-1,)):
        with pytest.raises(ValueError, match="give some of 0 to 999"):
            decoder_features(toy_unet(), pictures(1), timesteps)


@pytest.mark.real_data
def test_steel_as_the_model_sees_it(real_set: Callable[..., Path]) -> None:
    data = load_detection("neu_det", 64, root=real_set("neu_det", "neu_det", "NEU-DET.zip"))
    assert data.train.images.shape[1:] == (1, 64, 64)
    settings = replace(TOY, size=64, epochs=1)
    unet, _ = train_ddpm(data.train.images[:8], settings, 0, Session(say=lambda line: None))
    features = decoder_features(unet, data.test.images[:2])
    assert [f.shape[-1] for f in features] == [64, 32, 16]
