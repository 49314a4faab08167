"""Diffusion networks: the schedule against the equations and diffusers, samples, features of the decoder."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from toy_diffusion import TOY, KnowsImage, random_images, toy_unet

from defectlab.networks import diffusion
from defectlab.networks.diffusion import DiffusionSettings, build_unet, decoder_features, noise_schedule, sample_ddim
from defectlab.precision import autocast
from defectlab.runs import changed


def test_the_schedule_is_diffusers_in_float64() -> None:
    alpha_hat = noise_schedule(1000)
    assert alpha_hat.dtype == torch.float64
    torch.testing.assert_close(alpha_hat, (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
    theirs = DDPMScheduler(beta_schedule="linear").alphas_cumprod
    torch.testing.assert_close(alpha_hat.float(), theirs, rtol=1e-4, atol=0)


def test_noised_images_are_diffusers() -> None:
    clean, noise, timesteps = torch.rand(4, 2, 8, 8), torch.randn(4, 2, 8, 8), torch.tensor([0, 100, 250, 999])
    noisy = diffusion.q_sample(clean, timesteps, noise, noise_schedule(1000))
    assert noisy.dtype == torch.float32
    theirs = DDPMScheduler(beta_schedule="linear").add_noise(clean, noise, timesteps)
    torch.testing.assert_close(noisy, theirs, rtol=0, atol=1e-5)


def test_the_loss_is_the_squared_error_of_the_noise() -> None:
    clean, timesteps = torch.rand(2, 1, 8, 8), torch.tensor([200, 900])
    noise, alpha_hat = torch.randn(2, 1, 8, 8), noise_schedule(1000)
    loss_of = partial(diffusion.noise_loss, clean=clean, timesteps=timesteps, noise=noise, alpha_hat=alpha_hat)
    assert loss_of(KnowsImage(clean))["loss"] < 1e-9
    half_off = loss_of(KnowsImage(clean, wrong=0.5))["loss"]
    assert half_off.item() == pytest.approx(0.25 * noise.square().mean().item(), rel=1e-4)


def test_the_gradient_of_the_loss() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 1, 3, padding=1).double()
    clean, noise = torch.rand(2, 1, 4, 4, dtype=torch.float64), torch.randn(2, 1, 4, 4, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        def unet(noisy: Tensor, timesteps: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.tanh(nn.functional.conv2d(noisy, weight, padding=1)))

        return diffusion.noise_loss(unet, clean, torch.tensor([10, 700]), noise, noise_schedule(1000))["loss"]

    assert torch.autograd.gradcheck(loss, layer.weight.detach().requires_grad_())


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


@pytest.mark.parametrize("colours", [1, 3])
def test_ddim_finds_the_image_that_the_predictor_knows(colours: int) -> None:
    clean = random_images(1, colours)
    samples = sample_ddim(KnowsImage(diffusion.as_inputs(clean)), 2, seed=0, inference_steps=10)
    assert samples.dtype == torch.uint8
    assert torch.equal(samples, clean.repeat(2, 1, 1, 1))


def test_samples_depend_on_their_seed() -> None:
    first = sample_ddim(toy_unet(), 2, seed=0, inference_steps=3)
    assert torch.equal(first, sample_ddim(toy_unet(), 2, seed=0, inference_steps=3))
    assert not torch.equal(first, sample_ddim(toy_unet(), 2, seed=1, inference_steps=3))
    assert not torch.equal(first[0], first[1])


def test_features_are_the_levels_finest_first() -> None:
    features = decoder_features(toy_unet(), random_images(2))
    assert [tuple(f.shape) for f in features] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 24, 4, 4)]
    assert tuple(f.shape[1] for f in features) == TOY.channels
    assert all(not f.requires_grad and not f.is_inference() for f in features)  # so that others can train on them
    with autocast(torch.device("cpu"), "bf16"):
        halves = decoder_features(toy_unet(), random_images(2))
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
    features = decoder_features(unet, random_images(2), timesteps=(100,))
    for level, name in zip(features, ("finest", "middle", "coarsest"), strict=True):
        assert torch.equal(level, given[name])


def test_features_of_an_image_do_not_depend_on_its_batch() -> None:
    unet, images = toy_unet(), random_images(4)
    together, alone = decoder_features(unet, images), decoder_features(unet, images[2:3])
    assert all(torch.allclose(t[2:3], a, atol=1e-5) for t, a in zip(together, alone, strict=True))


def test_timesteps_are_averaged_or_put_side_by_side() -> None:
    unet, images = toy_unet(), random_images(2)
    mean, side = (decoder_features(unet, images, (100, 250), combine=combine) for combine in ("mean", "concat"))
    for m, s in zip(mean, side, strict=True):
        assert torch.allclose(m, (s[:, : m.shape[1]] + s[:, m.shape[1] :]) / 2, atol=1e-6)
        assert not torch.allclose(s[:, : m.shape[1]], s[:, m.shape[1] :], atol=1e-3)
    first = decoder_features(unet, images, (100,))
    assert all(torch.allclose(f, s[:, : f.shape[1]], atol=1e-6) for f, s in zip(first, side, strict=True))


def test_noise_of_features_comes_from_its_seed_and_the_schedule() -> None:
    unet, images = toy_unet(), random_images(2)
    first = decoder_features(unet, images)[0]
    assert torch.equal(decoder_features(unet, images, alpha_hat=noise_schedule(1000))[0], first)
    assert not torch.equal(decoder_features(unet, images, noise_seed=1)[0], first)
    without = decoder_features(unet, images, alpha_hat=torch.ones(1000, dtype=torch.float64))[0]  # no noise at all
    assert not torch.equal(without, first)


def test_hooks_are_removed_even_on_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = toy_unet()
    decoder_features(unet, random_images(1))

    def breaks(sample: Tensor) -> Tensor:
        assert all(level._forward_hooks for level in diffusion.level_outputs(unet)), "the hooks are in place"
        raise RuntimeError("broken network")

    monkeypatch.setattr(unet.conv_in, "forward", breaks)
    with pytest.raises(RuntimeError, match="broken network"):
        decoder_features(unet, random_images(1))
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (16, {"combine": "sum"}, "unknown combine 'sum': use mean or concat"),
        *((16, {"timesteps": wrong}, "give some of 0 to 999") for wrong in ((), (100, 1000), (-1,))),
        (32, {}, r"16 x 16 px images, got .*32.*load them at 16"),
    ],
)
def test_bad_requests_for_features_are_refused(size: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_features(toy_unet(), random_images(1, size=size), **options)
