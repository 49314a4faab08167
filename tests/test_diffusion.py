"""Diffusion: training and resuming, the error of the noise, whole runs."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toy_detection import equal, toy_data
from toy_diffusion import TOY, KnowsImage, random_images, toy_unet
from toy_runs import one_sitting, quiet

from defectlab.data.detection import load_detection
from defectlab.networks.diffusion import as_inputs, decoder_features
from defectlab.runs import Context, OutOfTime, Record
from defectlab.training.diffusion import (
    error_per_timestep,
    load_ddpm,
    middles,
    random_flips,
    run_ddpm,
    spread,
    train_ddpm,
)
from defectlab.training.loop import MovingAverage

SPLITS = ("train", "dev", "test")

# --- Training ---------------------------------------------------------------------------------------------------------


def fit(seed: int = 0, context: Context | None = None, **options):
    return train_ddpm(random_images(9), replace(TOY, **options), seed, context or quiet())


def test_flips_are_of_each_image_and_of_all_four_kinds() -> None:
    image = torch.arange(4.0).reshape(1, 1, 2, 2)
    flipped = random_flips(image.repeat(64, 1, 1, 1), torch.Generator().manual_seed(0))
    kinds = {tuple(x.flatten().tolist()) for x in flipped}
    assert kinds == {(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)}


def test_training_is_decided_by_its_seed_and_learns() -> None:
    unet, trained = fit()
    assert equal(unet, fit()[0])
    other, trained_other = fit(seed=1)
    assert trained.curve != trained_other.curve
    assert list(trained.curve) == ["loss"]
    assert trained.curve["loss"][-1] < 0.9 * trained.curve["loss"][0]
    for network in (other, fit(flips=False)[0], fit(final_rate=1.0)[0]):
        assert not equal(unet, network)


def test_the_average_of_all_steps_is_kept_and_counts_the_untrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    averages, update = [], MovingAverage.update

    def watched(average: MovingAverage, step: int) -> None:
        averages.append((average, step))
        update(average, step)

    monkeypatch.setattr(MovingAverage, "update", watched)
    unet, _ = fit(epochs=2, average=0.9)
    assert [step for _, step in averages] == [1, 2, 3, 4]  # 9 images in batches of 4, the single last one dropped
    (average,) = {average for average, _ in averages}
    assert (average.decay, average.ramp, average.counted) == (0.9, TOY.average_ramp, 1)
    assert equal(unet, average.model) and not equal(unet, average.network)
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())


def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, trained = fit()
    checkpoint = tmp_path / "ddpm.safetensors"
    for _ in range(2):
        with pytest.raises(OutOfTime):
            fit(context=one_sitting(checkpoint))
    resumed, trained_again = fit(context=quiet(checkpoint=checkpoint))
    assert equal(resumed, whole)
    assert trained_again.curve == trained.curve


def test_images_of_another_size_are_refused() -> None:
    images, said = random_images(4, size=32), r"16 x 16 px images, got .*32.*load them at 16"
    with pytest.raises(ValueError, match=said):
        train_ddpm(images, TOY, 0, quiet())
    with pytest.raises(ValueError, match=said):
        error_per_timestep(toy_unet(), images, [5], 0)


# --- What it has learnt -----------------------------------------------------------------------------------------------


def test_the_error_is_1_for_an_answer_of_nothing_and_0_for_the_noise() -> None:
    clean = random_images(1)
    images, timesteps = clean.repeat(6, 1, 1, 1), [10, 500, 990]
    known = as_inputs(clean)
    assert torch.all(error_per_timestep(KnowsImage(known), images, timesteps, 0) < 1e-4)
    nothing = error_per_timestep(KnowsImage(known, wrong=-1.0), images, timesteps, 0)
    assert torch.allclose(nothing, torch.ones(3, dtype=torch.float64), atol=0.1)
    assert not torch.equal(nothing, error_per_timestep(KnowsImage(known, wrong=-1.0), images, timesteps, 1))


def test_the_error_does_not_depend_on_the_batch() -> None:
    unet, images = toy_unet(), random_images(5)
    whole = error_per_timestep(unet, images, [3, 700], seed=0)
    assert torch.equal(error_per_timestep(unet, images, [3, 700], seed=0), whole)
    assert torch.allclose(error_per_timestep(unet, images, [3, 700], seed=0, batch=2), whole, rtol=1e-4)
    assert whole.dtype == torch.float64


def test_what_is_measured_is_spread_over_timesteps_and_images() -> None:
    assert middles(1000, 20) == list(range(25, 1000, 50))
    assert middles(10, 5) == [1, 3, 5, 7, 9]
    images = torch.arange(10)[:, None]
    assert spread(images, 4).flatten().tolist() == [0, 3, 6, 9]
    assert torch.equal(spread(images, 12), images)


def test_a_run_and_its_network_loaded_again(tmp_path: Path) -> None:
    data = toy_data(16)
    result = run_ddpm(TOY, 0, data, quiet())
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
    save_file({k: v.contiguous() for k, v in result.model.items()}, path.with_suffix(".safetensors"), {"key": "ddpm"})
    sha256 = hashlib.sha256(path.with_suffix(".safetensors").read_bytes()).hexdigest()
    record = Record({"key": "ddpm", "model_sha256": sha256}, path)
    unet = load_ddpm(record, TOY, 1, "cpu")
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())
    again = error_per_timestep(unet, data.test.images, middles(1000, 20), seed=0)
    assert torch.allclose(again.float(), torch.from_numpy(arrays["errors"]), rtol=1e-4)
    with pytest.raises(ValueError, match="does not fit this network"):
        load_ddpm(record, replace(TOY, layers=2), 1, "cpu")


def test_a_run_on_images_with_colours() -> None:
    data = toy_data(16, counts=(4, 2, 2))
    parts = {p: replace(getattr(data, p), images=getattr(data, p).images.repeat(1, 3, 1, 1)) for p in SPLITS}
    result = run_ddpm(replace(TOY, epochs=1), 0, replace(data, **parts), quiet())
    assert result.predictions["samples"].shape == (16, 16, 16, 3)
    assert result.predictions["case_told"].shape == result.predictions["case_images"].shape == (2, 16, 16, 3)


@pytest.mark.real_data
def test_steel_as_the_model_sees_it(real_set: Callable[..., Path]) -> None:
    data = load_detection("neu_det", 64, root=real_set("neu_det"))
    assert data.train.images.shape[1:] == (1, 64, 64)
    settings = replace(TOY, size=64, epochs=1)
    unet, _ = train_ddpm(data.train.images[:8], settings, 0, quiet())
    features = decoder_features(unet, data.test.images[:2])
    assert [f.shape[-1] for f in features] == [64, 32, 16]
