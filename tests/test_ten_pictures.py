"""Ten pictures: sets of one class an image, generators by hand and in turns, what a classifier learns from, rows."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from toy_diffusion import TOY
from toy_runs import one_sitting, quiet

from defectlab.data.detection import DetectionSplit, detection_fingerprint
from defectlab.data.pictures import PictureData, PictureSplit, _of_one_class, load_pictures, pictures_fingerprint
from defectlab.metrics.windows import class_accuracy
from defectlab.networks import diffusion
from defectlab.networks.conv4 import Conv4
from defectlab.networks.diffusion import DiffusionSettings, build_unet, noise_loss, noise_schedule, sample_ddim
from defectlab.networks.generators import GAN, LATENT, GANSettings, folded, gradient_penalty, sample_gan, unfolded
from defectlab.runs import OutOfTime
from defectlab.studies import ten_pictures as study
from defectlab.training import ten_pictures
from defectlab.training.diffusion import train_ddpm
from defectlab.training.ten_pictures import Learnt, TenPicturesSettings, copied, drawn, run_ten_pictures, train_gan
from defectlab.verdicts.measured import bootstrap_level, image_statistic, over_images

DCGAN = GANSettings(width=4, draws=16, batch=4, epochs=2)
WGAN = replace(DCGAN, penalty=10.0, critic_steps=2, draws=24)
DDPM = replace(TOY, size=8, channels=(8, 8, 8), epochs=2, flips=False)
KINDS = pytest.mark.parametrize("generator", [DCGAN, WGAN, DDPM], ids=["dcgan", "wgan_gp", "ddpm"])
SMALL = TenPicturesSettings(dataset="toy", size=16, each=6, made=12, width=8, draws=64, epochs=1, precision="fp32")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stripes(each: int, seed: int, size: int = 16) -> PictureSplit:
    """Stripes across (class 0) and down (class 1), anywhere, on noise."""
    random, place = np.random.default_rng(seed), np.arange(size)
    across = [np.sin(2 * np.pi * (place / 4 + random.random()))[:, None] for _ in range(2 * each)]
    noise = random.normal(0, 0.5, (2 * each, size, size))
    images = np.stack([noise[i] + (x.T if i >= each else x) for i, x in enumerate(across)])
    pixels = torch.from_numpy((128 + 30 * images).clip(0, 255)).to(torch.uint8)[:, None]
    return PictureSplit(pixels, torch.arange(2).repeat_interleave(each), tuple(f"{seed} {i}" for i in range(2 * each)))


@pytest.fixture(scope="module")
def data() -> PictureData:
    parts = stripes(9, 0), stripes(5, 1), stripes(30, 2)
    return PictureData("toy", "toy", ("across", "down"), *parts, fingerprint="toy")


def flat(values: list[int], labels: list[int] | None = None, size: int = 16) -> Learnt:
    """Images of one value each; the label is 1 from 128 on where none are given."""
    pixels = torch.tensor(values, dtype=torch.uint8)
    return Learnt(
        pixels[:, None, None, None].expand(-1, 1, size, size).clone(),
        (pixels >= 128).long() if labels is None else torch.tensor(labels),
    )


# --- Sets ------------------------------------------------------------------------------------------------------------


def test_images_with_boxes_of_several_classes_or_of_none_are_left_out() -> None:
    labels = torch.tensor([[1, 1, -1], [0, 1, -1], [2, -1, -1], [-1, -1, -1], [1, 2, 1], [0, 0, 0]])
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None]
    found = _of_one_class(DetectionSplit(images, torch.zeros(6, 3, 4), labels, list("abcdef"), *[torch.ones(6)] * 3))
    assert found.names == ("a", "c", "f") and len(found) == 3
    assert found.labels.tolist() == [1, 2, 0] and found.images.flatten().tolist() == [0, 2, 5]


@pytest.mark.parametrize(("name", "classes"), [("synthetic_steel", 6), ("synthetic_cell", 2)])
def test_synthetic_sets(name: str, classes: int, synthetic: Path) -> None:
    found = load_pictures(name, 32, root=synthetic)
    assert len(found.class_names) == classes and found.fingerprint == pictures_fingerprint(name, synthetic)
    for part in (found.train, found.dev, found.test):
        assert part.images.shape == (len(part), 1, 32, 32) and part.images.dtype == torch.uint8
        assert set(part.labels.tolist()) == set(range(classes)) and len(set(part.names)) == len(part)
    if name == "synthetic_steel":  # another rule, another set
        assert found.fingerprint != detection_fingerprint(name, synthetic)


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "counts"), [("neu_det", (1208, 134, 335)), ("elpv", (1832, 180, 612))])
def test_real_sets(name: str, counts: tuple[int, ...], real_set) -> None:
    found = load_pictures(name, 16, root=real_set(name))
    assert tuple(map(len, (found.train, found.dev, found.test))) == counts


def test_as_many_of_each_class_are_drawn_by_the_seed() -> None:
    split = PictureSplit(torch.zeros(30, 1, 1, 1), torch.arange(30) % 3, tuple(map(str, range(30))))
    places = drawn(split, 4, 0, 3)
    assert split.labels[places].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(places.unique()) == 12
    assert torch.equal(places, drawn(split, 4, 0, 3))
    assert len({tuple(drawn(split, 4, seed, 3).tolist()) for seed in range(5)}) == 5
    assert drawn(split, 0, 0, 3).tolist() == list(range(30)) == sorted(drawn(split, 10, 0, 3).tolist())
    with pytest.raises(ValueError, match="class 0 has 10 images to learn from: 11 cannot be drawn"):
        drawn(split, 11, 0, 3)


def test_a_batch_has_rare_classes_as_often_and_each_image_of_a_class_alike() -> None:
    learnt = flat([0] * 100, [1] * 90 + [0] * 2 + [1] * 8)
    counts = learnt.draw(20_000, seeded()).bincount(minlength=100)
    rare, often = counts[90:92], counts[learnt.labels == 1]
    assert abs(rare - 5000).max() < 250 and 60 < often.min() <= often.max() < 150  # 102 each; places beyond: none
    assert torch.equal(learnt.draw(9, seeded(1)), learnt.draw(9, seeded(1)))


# --- GANs ------------------------------------------------------------------------------------------------------------


class Squares(nn.Module):
    """A critic whose gradient is the image itself for class 0, three times it for class 1."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).square().sum(1, keepdim=True) / 2 * torch.tensor([1.0, 3.0])


def test_the_loss_of_a_critic_by_hand() -> None:
    assert float(gradient_penalty(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))) == 8  # (5 - 1)² and (1 - 1)²
    slopes = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=seeded(), requires_grad=True)
    assert torch.autograd.gradcheck(gradient_penalty, slopes)
    real, fake = (torch.full((2, 1, 8, 8), value) for value in (0.5, -0.25))  # of lengths 4 and 2
    labels, mix = torch.tensor([0, 1]), torch.tensor([1.0, 0.0])[:, None, None, None]  # looked at: real, then fake
    for settings, expected in ((WGAN, 4 - 16 + 10 * (3**2 + 5**2) / 2), (DCGAN, None)):
        gan = GAN(settings, 2, 8)
        gan.critic = Squares()
        on_real, on_fake = torch.tensor([8.0, 24.0]), torch.tensor([2.0, 6.0])
        assert torch.equal(gan.judged(real, labels), on_real) and torch.equal(gan.judged(fake, labels), on_fake)
        if expected is None:
            expected = float(-on_real.sigmoid().log().mean() - (1 - on_fake.sigmoid()).log().mean())
        assert gan.critic_loss(real, fake, labels, mix).item() == pytest.approx(expected, rel=1e-4)


def test_the_penalty_passes_its_gradient_on_to_the_critic() -> None:
    torch.manual_seed(0)
    gan = GAN(WGAN, 2, 16).double()
    inputs = torch.rand(4, 1, 16, 16).double(), torch.rand(4, 1, 16, 16).double(), torch.tensor([0, 1, 1, 0])
    mix, weights = torch.rand(4, 1, 1, 1).double(), list(gan.critic.parameters())
    slopes = torch.autograd.grad(gan.critic_loss(*inputs, mix), weights)
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for weight, slope in zip(weights, slopes, strict=True):
                weight += sign * 1e-8 * slope
        values.append(gan.critic_loss(*inputs, mix).item())
    assert (values[0] - values[1]) / 2e-8 == pytest.approx(sum(float(s.square().sum()) for s in slopes), rel=1e-4)


def test_only_a_critic_without_penalty_sees_other_images_of_the_batch() -> None:
    images, labels = torch.rand(6, 1, 16, 16, generator=seeded()), torch.zeros(6, dtype=torch.long)
    for settings in (DCGAN, WGAN):
        gan = GAN(settings, 2, 16).train()
        same = torch.allclose(gan.judged(images, labels)[:2], gan.judged(images[:2], labels[:2]), atol=1e-5)
        assert same == bool(settings.penalty)


@pytest.mark.parametrize("settings", [DCGAN, WGAN], ids=["dcgan", "wgan_gp"])
def test_critic_and_generator_learn_in_turns(settings: GANSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, real = [], ten_pictures.train

    def watched(parts: GAN, draw, step, *rest):
        last: dict[str, Tensor] = {}

        def look() -> None:
            now = {of: nn.utils.parameters_to_vector(getattr(parts, of).parameters()) for of in ("critic", "generator")}
            moved.append([of for of in now if of in last and not torch.equal(now[of], last[of])])
            last.update({of: values.detach().clone() for of, values in now.items()})

        trained = real(parts, draw, lambda batch: look() or step(batch), *rest)
        look()
        return trained

    monkeypatch.setattr(ten_pictures, "train", watched)
    gan, trained = train_gan(settings, 0, flat([20, 30, 200, 210]), 2, quiet())
    turn = [["critic"]] * settings.critic_steps + [["generator"]]
    assert moved[1:] == turn * (settings.epochs * settings.draws // settings.batch // len(turn))
    assert not gan.training and set(trained.curve) == {"loss", "critic", "generator"}


def test_the_loss_of_the_generator_leaves_the_critic_alone() -> None:
    for settings in (DCGAN, WGAN):
        gan, labels = GAN(settings, 2, 16), torch.tensor([0, 1])
        gan.generator_loss(torch.randn(2, LATENT), labels).backward()
        assert all(weight.grad is None for weight in gan.critic.parameters())
        assert all(weight.grad.abs().sum() > 0 for weight in gan.generator.parameters())
        gan.eval()
        noise = torch.randn(2, LATENT)
        judged = gan.judged(gan(noise, labels), labels)
        expected = -judged if settings.penalty else -judged.sigmoid().log()
        assert gan.generator_loss(noise, labels).item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_a_gan_draws_the_class_that_it_is_told() -> None:
    """Dark pictures are of class 0, bright ones of class 1."""
    settings = GANSettings(width=8, draws=320, batch=16, epochs=12, learning_rate=0.001)
    gan, _ = train_gan(settings, 0, flat([20, 30, 40, 200, 210, 220]), 2, quiet())
    labels = torch.tensor([0, 1]).repeat(6)
    made = sample_gan(gan, labels, 0)
    assert made.shape == (12, 1, 16, 16) and made.dtype == torch.uint8
    bright = made.float().mean((1, 2, 3))
    assert bright[labels == 0].max() + 25 < bright[labels == 1].min()
    assert (made.int() - sample_gan(gan, labels, 0, batch=5).int()).abs().max() <= 1
    assert not torch.equal(made, sample_gan(gan, labels, 1))


def test_a_gan_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    few, half = flat([20, 30, 200, 210]), tmp_path / "half.safetensors"
    whole, _ = train_gan(WGAN, 0, few, 2, quiet())
    with pytest.raises(OutOfTime):
        train_gan(WGAN, 0, few, 2, one_sitting(half))
    rest, _ = train_gan(WGAN, 0, few, 2, quiet(checkpoint=half))
    assert all(torch.equal(value, rest.state_dict()[name]) for name, value in whole.state_dict().items())


# --- Diffusion, told the class ---------------------------------------------------------------------------------------


def test_folded_and_unfolded_are_inverse() -> None:
    images = torch.arange(2 * 36, dtype=torch.uint8).view(2, 1, 6, 6)
    assert folded(images).shape == (2, 4, 3, 3) and folded(images)[0, :, 0, 0].tolist() == [0, 1, 6, 7]
    assert torch.equal(unfolded(folded(images)), images)


def test_the_label_changes_the_noise_that_is_predicted() -> None:
    torch.manual_seed(0)
    unet, noisy, at = build_unet(DDPM, 4, 2).eval(), torch.randn(2, 4, 8, 8), torch.tensor([5, 5])
    zero, one, mixed = (unet(noisy, at, torch.tensor(labels)).sample for labels in ([0, 0], [1, 1], [0, 1]))
    assert (zero - one).abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(mixed, torch.stack([zero[0], one[1]]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="class_labels"):
        noise_loss(unet, noisy, at, noisy, noise_schedule(1000))


def test_a_diffusion_model_learns_from_each_image_with_its_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dark pictures are of class 0, bright ones of class 1."""
    real, few = noise_loss, flat([40] * 4 + [215] * 4)

    def watched(unet, clean, timesteps, noise, alpha_hat, labels):
        assert torch.equal(clean.mean((1, 2, 3)) > 0, labels == 1)
        return real(unet, clean, timesteps, noise, alpha_hat, labels)

    monkeypatch.setattr(diffusion, "noise_loss", watched)
    settings = replace(DDPM, channels=(8, 16, 16), batch=8, epochs=30, learning_rate=0.005, average=0.9)
    unet, trained = train_ddpm(folded(few.images), settings, 0, quiet(), few.labels, 2)
    assert trained.curve["loss"][-1] < 0.8 * trained.curve["loss"][0]
    clean, at = folded(few.images) / 127.5 - 1, torch.full((8,), 100)
    noise = torch.randn(clean.shape, generator=seeded())
    told, wrong = (
        float(real(unet, clean, at, noise, noise_schedule(1000), x)["loss"]) for x in (few.labels, 1 - few.labels)
    )
    assert told < 0.95 * wrong
    one, other = (sample_ddim(unet, 2, 0, 4, labels=torch.tensor(labels)) for labels in ([0, 0], [0, 1]))
    assert one.shape == (2, 4, 8, 8) and torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


@KINDS
def test_a_seed_makes_the_same_images(generator, data: PictureData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ten_pictures, "DDIM_STEPS", 4)
    few, settings = Learnt(data.train.images[::3], data.train.labels[::3]), replace(SMALL, generator=generator)
    (first, trained), (again, _), (other, _) = (
        ten_pictures.make_images(settings, seed, few, 2, quiet()) for seed in (0, 0, 1)
    )
    assert first.images.shape == (12, 1, 16, 16) and first.images.dtype == torch.uint8
    assert first.labels.tolist() == [0] * 6 + [1] * 6 and len(trained.curve["loss"]) == 2
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert len(first.images.flatten(1).unique(dim=0)) == 12


# --- Classifiers -----------------------------------------------------------------------------------------------------


def test_features_are_the_mean_over_all_places_of_four_blocks() -> None:
    network, images = Conv4(8).eval(), stripes(2, 0, 32).images
    found = network(images)
    assert found.shape == (4, 8) and found.dtype == torch.float32
    x = images.float() / 127.5 - 1
    for i in range(0, 16, 4):
        x = torch.nn.functional.max_pool2d(network.blocks[i + 1](network.blocks[i](x)).relu(), 2)
    assert x.shape == (4, 8, 2, 2) and torch.allclose(found, x.mean((2, 3)), atol=1e-5)
    with pytest.raises(ValueError, match="must be uint8"):
        network(images.float())


def test_crops_are_square_and_lie_inside() -> None:
    random = torch.randint(256, (5, 1, 16, 16), dtype=torch.uint8, generator=seeded())
    assert torch.equal(ten_pictures.cropped(random, 1.0, seeded()), random)
    ramp = (4 * torch.arange(64)).to(torch.uint8).expand(200, 1, 64, 64)
    across, down = ten_pictures.cropped(ramp, 0.5, seeded()), ten_pictures.cropped(ramp.mT, 0.5, seeded())
    assert across.dtype == torch.uint8 and (across.int().diff(dim=3) >= 1).all()  # mirrored nowhere
    assert (across == across[:, :, :1]).all() and (down == down[..., :1]).all()
    sides, heights = ((x[:, 0, -1, -1].int() - x[:, 0, 0, 0].int()) / 252 for x in (across, down))
    assert 0.49 < sides.min() < 0.55 and 0.95 < sides.max() <= 1 and (sides - heights).abs().max() < 0.02
    assert across.min() < 8 and across.max() > 244 and (across[:, 0, 0, 0] != down[:, 0, 0, 0]).float().mean() > 0.5


class Seen(Exception):
    """In place of a training: its arguments."""


def test_half_of_each_batch_is_made_by_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ten_pictures, "train", Mock(side_effect=Seen))
    real, made = flat([0, 1, 2, 10, 11, 12], [0, 0, 0, 1, 1, 1]), flat([100] * 20 + [110] * 20, [0] * 20 + [1] * 20)
    for pools, shares in (([real], (10, 0)), ([real, made], (5, 5))):
        with pytest.raises(Seen):
            ten_pictures.train_classifier(SMALL, 0, pools, 2, quiet())
        images, labels = ten_pictures.train.call_args.args[1](torch.arange(10), seeded(), 0)
        values = images[:, 0, 0, 0]
        assert ((values < 100).sum(), (values >= 100).sum()) == shares
        assert torch.equal(values % 100 >= 10, labels == 1)  # each with its own label


@pytest.mark.parametrize("changed", [{}, {"flips": True, "smallest": 0.8}, {"generator": DCGAN}])
def test_a_toy_set_is_learnt(changed: dict, data: PictureData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ten_pictures, "train_classifier", Mock(wraps=ten_pictures.train_classifier))
    settings = replace(SMALL, draws=960, epochs=3, learning_rate=0.005, **changed)
    first, again = (run_ten_pictures(settings, 0, data, quiet()) for _ in range(2))
    assert len(ten_pictures.train_classifier.call_args.args[2]) == 1 + ("generator" in changed)  # pools
    assert first.metrics == again.metrics and first.metrics["class_accuracy"] > 85
    assert all(torch.equal(value, again.model[name]) for name, value in first.model.items())
    arrays = first.predictions
    shares = [of["class_accuracy"] for of in first.per_class.values()]
    for expected in (class_accuracy(arrays["answers"], arrays["labels"]), np.mean(shares)):
        assert first.metrics["class_accuracy"] == pytest.approx(expected, abs=1e-3)
    expected = [data.train.names[i] for i in drawn(data.train, 6, 0, 2)]
    assert arrays["drawn"].tolist() == expected  # the same in all rows of a seed
    assert ({"copies", "copies_held_out"} <= first.metrics.keys()) == ("generator_loss" in first.curve) == (
        "case_nearest" in arrays) == ("generator" in changed)  # fmt: skip


def test_a_frozen_network_sees_no_made_image(data: PictureData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Pixels(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.flatten(1).float()

    monkeypatch.setattr(ten_pictures, "FrozenFeatures", lambda pretrained: Pixels())
    settings = replace(SMALL, network="lite0")
    with_made, without = (run_ten_pictures(replace(settings, generator=g), 0, data, quiet()) for g in (DCGAN, None))
    assert torch.equal(seen[0], data.train.images[drawn(data.train, 6, 0, 2)])
    assert np.array_equal(with_made.predictions["answers"], without.predictions["answers"])
    assert with_made.metrics["class_accuracy"] == without.metrics["class_accuracy"] and without.model == {}


def test_what_cannot_be_is_refused(data: PictureData) -> None:
    with pytest.raises(ValueError, match="unknown network 'vgg'"):
        run_ten_pictures(replace(SMALL, network="vgg"), 0, data, quiet())
    with pytest.raises(ValueError, match="class 0 has 9 images"):
        run_ten_pictures(replace(SMALL, each=10), 0, data, quiet())


def test_copies_are_what_the_leak_check_finds() -> None:
    def clouds(count: int, seed: int) -> Tensor:
        coarse = torch.rand(count, 1, 20, 20, generator=seeded(seed))
        return (255 * nn.functional.interpolate(coarse, (64, 64), mode="bilinear")).to(torch.uint8)

    labels = torch.arange(2).repeat_interleave(12)
    few, held_out = Learnt(clouds(24, 0), labels), PictureSplit(clouds(20, 2), labels[:20], ("",) * 20)
    order = torch.randperm(24, generator=seeded())
    shares, arrays = copied(few, Learnt(few.images[order], few.labels[order]), held_out, 2)
    assert shares == {"copies": 100, "copies_held_out": 0}
    assert arrays["case_labels"].tolist() == [0] * 6 + [1] * 6 and arrays["case_images"].shape == (12, 64, 64)
    assert np.array_equal(arrays["case_images"], arrays["case_nearest"])
    half = Learnt(torch.cat([few.images[::2], clouds(12, 1)]), labels)
    shares, arrays = copied(few, half, held_out, 2)
    assert shares["copies"] == 50 and np.array_equal(arrays["case_images"][:6], arrays["case_nearest"][:6])
    noise = Learnt(torch.randint(256, (24, 1, 64, 64), dtype=torch.uint8, generator=seeded()), labels)
    assert copied(few, noise, held_out, 2)[0]["copies"] == 0


def test_costs_are_those_of_the_generator_alone() -> None:
    settings = ten_pictures.GeneratorCostSettings(DCGAN, size=16, classes=2)
    weights = [(LATENT + 2) * 8 * 16 + 2 * 8, 8 * 4 * 16 + 2 * 4, 4 * 16]  # with the batch norms
    costs = ten_pictures.run_generator_costs(settings, 0, None, quiet()).costs
    assert costs["parameters_m"] == round(sum(weights) / 1e6, 4)


# --- What records say ------------------------------------------------------------------------------------------------


def test_class_accuracy_by_a_loop() -> None:
    random = np.random.default_rng(0)
    labels, answers, weights = random.integers(0, 3, 90), random.integers(0, 3, 90), random.integers(0, 4, 90)
    shares = []
    for label in range(3):
        own = [(w, a == label) for w, a, t in zip(weights, answers, labels, strict=True) if t == label]
        shares.append(sum(w for w, right in own if right) / sum(w for w, _ in own))
    assert class_accuracy(answers, labels, weights) == pytest.approx(100 * np.mean(shares))
    many = np.repeat(np.arange(90), weights)
    assert class_accuracy(answers[many], labels[many]) == pytest.approx(100 * np.mean(shares))
    assert class_accuracy(np.zeros(10), np.array([0] * 9 + [1])) == 50  # the larger class alone is chance
    assert np.isnan(class_accuracy(answers, labels, (labels > 0).astype(float)))


def record(arrays: dict, **metrics: float) -> SimpleNamespace:
    return SimpleNamespace(arrays=arrays, metrics=metrics, costs={}, dev={}, per_class={})


def test_intervals_come_from_the_arrays_of_a_record() -> None:
    random = np.random.default_rng(0)
    labels, weights = random.integers(0, 3, 60), random.integers(0, 3, 60)
    answers = np.where(random.random(60) < 0.7, labels, 0)
    pictures = record({"answers": answers, "labels": labels, "names": np.arange(60)}, class_accuracy=80.0)
    assert image_statistic(pictures, "class_accuracy")(weights) == class_accuracy(answers, labels, weights)
    pictures.arrays["class_names"] = np.array(["a", "b", "c"])  # "a" is never taken for another class
    assert image_statistic(pictures, "class_accuracy", ["a"])(weights) == 100
    assert image_statistic(pictures, "class_accuracy", ["b"])(weights) < 100
    accuracies = {"accuracies": random.uniform(50, 90, 60), "accuracies_1": random.uniform(20, 60, 60)}
    episodes = record(accuracies | {"case_index": np.arange(3)}, episode_accuracy=70.0)
    for metric, name in (("episode_accuracy", "accuracies"), ("episode_accuracy_1", "accuracies_1")):
        expected = (weights * accuracies[name]).sum() / weights.sum()
        assert image_statistic(episodes, metric)(weights) == pytest.approx(expected)
    assert over_images(image_statistic(episodes, "episode_accuracy"), accuracies).n == 60  # of episodes
    types, scores = random.integers(0, 3, 60), random.normal(size=(2, 60))
    arrays = {"labels": (types > 0).astype(int), "types": types, "names": np.arange(60)}
    normals = record(arrays | {"scores_1": scores[0], "scores_4": scores[1]}, image_auroc_4=50.0)
    normals.arrays["type_names"] = np.array(["good", "bent", "scratch"])
    for few, of in ((1, scores[0]), (4, scores[1])):
        whole = 100 * roc_auc_score(arrays["labels"], of, sample_weight=weights)
        assert image_statistic(normals, f"image_auroc_{few}")(weights) == pytest.approx(whole)
        bent = 100 * roc_auc_score(types[types < 2], of[types < 2])
        assert image_statistic(normals, f"image_auroc_{few}", ["bent"])(np.ones(60)) == pytest.approx(bent)
    for of, metric in ((pictures, "class_accuracy"), (episodes, "episode_accuracy"), (normals, "image_auroc_4")):
        found = bootstrap_level([of, of], metric)
        assert found.low < found.mean < found.high and found.mean == of.metrics[metric] and found.high - found.low < 40


# --- Rows ------------------------------------------------------------------------------------------------------------


def of_pictures(profile: str) -> dict[str, TenPicturesSettings]:
    rows = study.STUDY.rows[profile].items()
    return {name: row.settings for name, row in rows if isinstance(row.settings, TenPicturesSettings)}


def test_rows_of_pictures_are_a_fair_comparison() -> None:
    quick = study.STUDY.rows["quick"]
    assert list(quick) == list(study.STUDY.rows["smoke"]) == list(study.STUDY.rows["paper"])
    for profile in ("quick", "paper"):
        settings = of_pictures(profile)
        assert {study.STUDY.rows[profile][name].seeds for name in settings} == {5}
        assert {of.dataset for of in settings.values()} == {"neu_det", "elpv"}
        assert len({of.draws * of.epochs // of.batch for of in settings.values()}) == 1
        assert {of.each for name, of in settings.items() if not name.endswith("_all")} == {10}
        assert all(of.generator is None for of in settings.values() if of.network == "lite0")
        steps = {}
        for name, of in settings.items():
            made = of.generator
            if isinstance(made, DiffusionSettings):  # images of a set: 10 of each class
                images = 10 * (2 if of.dataset == "elpv" else 6)
                steps.setdefault("ddpm", set()).add(-(-images // made.batch) * made.epochs)
                assert made.size == of.size // 2 and not made.flips, name
            elif made:
                steps.setdefault(made.critic_steps, set()).add(made.epochs * made.draws // made.batch)
                assert made.draws % made.batch == 0 == made.draws // made.batch % (made.critic_steps + 1)  # whole turns
        assert len(steps) == 3 and all(len(of) == 1 for of in steps.values())


def test_smoke_needs_neither_real_data_nor_weights() -> None:
    for name, row in study.STUDY.rows["smoke"].items():
        assert row.settings.dataset.startswith("synthetic_") or row.settings.dataset == "none", name
        assert getattr(row.settings, "pretrained", False) is False, name
        assert getattr(row.settings, "teacher", "_random").endswith("_random"), name


@pytest.mark.parametrize("name", ["steel_wgan_gp", "cells_flips_and_crops"])
def test_a_row_of_smoke(name: str, synthetic: Path) -> None:
    settings = study.STUDY.rows["smoke"][name].settings
    pictures = load_pictures(settings.dataset, settings.size, root=synthetic)
    result = run_ten_pictures(settings, 0, pictures, quiet())
    assert 0 <= result.metrics["class_accuracy"] <= 100 and set(result.per_class) == set(pictures.class_names)
    assert result.predictions["answers"].shape == (len(pictures.test),)
    assert len(result.predictions["drawn"]) == 3 * len(pictures.class_names)
