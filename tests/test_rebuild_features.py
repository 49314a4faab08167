"""SimpleNet and EfficientAD: each piece against an independent one, what is learnt, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import hinge_loss
from torch import Tensor
from torchvision.transforms.v2 import functional as tv
from toy_anomaly import fit

from defectlab.files import WeightsError
from defectlab.networks.efficientnet import Lite0
from defectlab.networks.feature_baselines import patch_features
from defectlab.networks.rebuild.base import Normal
from defectlab.networks.rebuild.efficientad import (
    Autoencoder,
    EfficientAD,
    EfficientADSettings,
    augment,
    hard_feature_loss,
)
from defectlab.networks.rebuild.efficientad_teacher import (
    PDN,
    EfficientADTeacher,
    EfficientADTeacherSettings,
    lite0_features,
    to_pixels,
)
from defectlab.networks.rebuild.simplenet import SimpleNet, SimpleNetSettings, truncated_l1

SIMPLE = SimpleNetSettings(
    teacher="resnet18_random", size=64, hidden=128, noise=0.3, positions=0, batch=4, learning_rate=0.002
)
TEACHER = EfficientADTeacherSettings(size=64, width=0.0625, pretrained=False, patch=64, batch=2, precision="fp32")
STUDENT = EfficientADSettings(size=64, width=0.0625, batch=2, learning_rate=0.003, precision="fp32")
FOREIGN = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloth(count: int, seed: int, defect: bool = False) -> Tensor:
    """Grey stripes of 8 px with noise, (count, 3, 64, 64) uint8; a defect is a bright blob of 12 px around (40, 24)."""
    generator = seeded(seed)
    phases = torch.rand(count, 1, 1, 1, generator=generator)
    images = 110 + 30 * torch.sin(2 * torch.pi * (torch.arange(64) / 8 + phases))
    images = images + torch.randn(count, 1, 64, 64, generator=generator)
    if defect:
        images[:, :, 34:46, 18:30] = 220
    return images.clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def train(network: Normal, images: Tensor, steps: int, seed: int = 0, foreign: Tensor | None = None) -> list[float]:
    """As the loop does it; the losses of all steps."""
    with torch.no_grad():
        prepared = network.prepare(images)
        network.begin(prepared, foreign)
    network.train()
    losses = fit(network, prepared, steps, network.settings.learning_rate, seeded(seed))
    network.eval()
    with torch.no_grad():
        network.end(prepared)
    return losses


@torch.no_grad()
def ask(network: Normal, images: Tensor) -> tuple[Tensor, Tensor]:
    prepared = network.prepare(images)
    maps = network.maps(prepared)
    assert maps.shape == (len(images), 256, 256) and maps.dtype == torch.float32
    return maps, network.scores(prepared, maps)


# --- SimpleNet --------------------------------------------------------------------------------------------------------


def test_truncated_l1_is_the_hinge_loss_of_scikit_learn() -> None:
    good, noisy = torch.randn(2, 40, dtype=torch.float64, generator=seeded())
    scores, signs = torch.cat([good, noisy]).numpy(), np.repeat([1, -1], 40)
    expected = hinge_loss(signs, scores / 0.3) * 2 * 0.3  # its margin is 1, its mean is over both
    assert float(truncated_l1(good, noisy, 0.3)) == pytest.approx(expected)
    pair = (good.requires_grad_(), noisy.requires_grad_())
    assert torch.autograd.gradcheck(lambda g, n: truncated_l1(g, n, 0.5), pair)


def test_simplenet_keeps_patch_features_in_half_precision() -> None:
    network, images = SimpleNet(SIMPLE), cloth(2, 0)
    prepared = network.prepare(images)
    assert prepared.shape == (2, 8, 8, 128 + 256) and prepared.dtype == torch.float16
    torch.testing.assert_close(prepared.float(), patch_features(network.teacher(images)), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="must be uint8"):
        network.prepare(images.float())
    with pytest.raises(WeightsError, match="unknown teacher 'resnet9'"):
        SimpleNet(replace(SIMPLE, teacher="resnet9"))


def test_simplenet_finds_a_feature_with_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of good images span 6 of 384 dimensions; in one place of an image, noise leaves them."""
    basis = 0.1 * torch.randn(6, 384, generator=seeded(11))
    good, unseen = (torch.randn(16, 8, 8, 6, generator=seeded(s)) @ basis for s in (0, 1))
    bad = unseen.clone()
    bad[:, 5, 2] += SIMPLE.noise * torch.randn(16, 384, generator=seeded(2))
    monkeypatch.setattr(SimpleNet, "prepare", lambda network, features: features.half())
    torch.manual_seed(0)
    network = SimpleNet(SIMPLE)
    train(network, good, 100)
    (maps, scores), (_, usual) = ask(network, bad), ask(network, unseen)
    assert scores.min() > usual.max()
    for place in maps.flatten(1).argmax(1).tolist():
        assert (place // 256, place % 256) == pytest.approx((5 * 255 / 7, 2 * 255 / 7), abs=8)


def test_a_step_of_simplenet_sees_the_positions_asked_for_and_its_generator_alone() -> None:
    seen = {}
    for positions in (0, 5):
        torch.manual_seed(0)
        network = SimpleNet(replace(SIMPLE, positions=positions))
        network.adaptor.register_forward_hook(lambda m, i, o, p=positions: seen.update({p: len(i[0])}))
        prepared = network.prepare(cloth(3, 0))
        first = network.loss(prepared, seeded(4))["loss"].item()
        torch.manual_seed(7)  # the global generator plays no part
        assert network.loss(prepared, seeded(4))["loss"].item() == first != network.loss(prepared, seeded(5))["loss"]
    assert seen == {0: 3 * 64, 5: 3 * 5}


# --- EfficientAD: the teacher -----------------------------------------------------------------------------------------


def test_an_output_of_the_pdn_sees_33_px_around_its_place() -> None:
    network = PDN(0.0625, 4)
    images = torch.rand(1, 3, 96, 64, generator=seeded(), requires_grad=True)
    features = network(images)
    assert features.shape == (1, 4, 16, 8)
    features[0, :, 5, 2].square().sum().backward()
    rows, columns = images.grad[0].abs().amax(0).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 52, 8, 40)  # 4 i to 4 i + 32


def test_what_the_teacher_learns_lies_where_the_pdn_looks() -> None:
    plain = torch.full((1, 3, 128, 128), 90, dtype=torch.uint8)
    lite0 = Lite0()  # its weights come with a package; random ones look to one side
    for y, x in ((64, 64), (60, 76)):
        blob = plain.clone()
        blob[:, :, y - 2 : y + 3, x - 2 : x + 3] = 200
        change = (lite0_features(lite0, blob, 96) - lite0_features(lite0, plain, 96)).square().sum((0, 1))
        assert change.shape == (24, 24)
        places = 4 * torch.arange(24) + 16
        centre = [float((change.sum(d) * places).sum() / change.sum()) for d in (1, 0)]
        assert centre == pytest.approx([y, x], abs=2.5)
    with pytest.raises(ValueError, match="must be uint8"):
        lite0_features(lite0, plain.float(), 96)


def test_a_map_lies_over_the_image() -> None:
    cells = torch.zeros(1, 56, 56)
    cells[0, 30, 10] = 1
    place = int(to_pixels(cells).argmax())
    assert abs(place // 256 - (4 * 30 + 16)) <= 3 and abs(place % 256 - (4 * 10 + 16)) <= 3
    edge = torch.arange(56.0).expand(1, 56, 56)
    assert to_pixels(edge)[0, :, 255].unique().item() == 55  # what lies beyond repeats the nearest


@pytest.fixture(scope="module")
def teacher() -> EfficientADTeacher:
    torch.manual_seed(0)
    network = EfficientADTeacher(TEACHER)
    losses = train(network, torch.cat([cloth(8, 0), FOREIGN]), 100)
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])
    return network


def test_the_teacher_is_its_pdn_alone(teacher: EfficientADTeacher) -> None:
    assert not any(p.requires_grad for p in teacher.lite0.parameters())
    maps, scores = ask(teacher, cloth(2, 3))
    assert maps.min() >= 0 and scores.tolist() == maps.flatten(1).amax(1).tolist()


# --- EfficientAD ------------------------------------------------------------------------------------------------------


def test_hard_feature_loss_is_the_mean_above_numpys_quantile() -> None:
    teacher_, student = torch.randn(2, 2, 5, 20, 10, dtype=torch.float64, generator=seeded())
    squares = (teacher_ - student).square().flatten(1).numpy()
    expected = np.mean([each[each >= np.quantile(each, 0.99)].mean() for each in squares])
    assert float(hard_feature_loss(teacher_, student, 0.99)) == pytest.approx(expected)
    assert float(hard_feature_loss(teacher_, student, 0.0)) == pytest.approx(squares.mean())
    small = student[:, :, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: hard_feature_loss(teacher_[:, :, :2, :2], s, 0.8), small)


def test_augmentations_are_torchvisions() -> None:
    images = torch.rand(12, 3, 16, 16, generator=seeded())
    found, drawn = augment(images, seeded(3)), seeded(3)
    kinds = torch.randint(3, (12, 1, 1, 1), generator=drawn).flatten().tolist()
    factors = (0.8 + 0.4 * torch.rand(12, 1, 1, 1, generator=drawn)).flatten().tolist()
    assert set(kinds) == {0, 1, 2}
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for image, changed, kind, factor in zip(images, found, kinds, factors, strict=True):
        torch.testing.assert_close(changed, adjust[kind](image, factor), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", [64, 96, 256])
def test_the_autoencoder_sees_the_whole_image_through_64_values(side: int) -> None:
    torch.manual_seed(0)
    network = Autoencoder(0.25, 24, side)
    images = torch.rand(1, 3, side, side, generator=seeded(), requires_grad=True)
    features = network(images)
    assert features.shape == (1, 24, side // 4 - 8, side // 4 - 8)
    assert network.encoder(images).shape == (1, 64, 1, 1)
    features[0, :, 0, 0].sum().backward()
    assert (images.grad[0].abs().amax(0)[-8:, -8:] > 0).any()  # the far corner


@pytest.fixture(scope="module")
def trained(teacher: EfficientADTeacher) -> EfficientAD:
    torch.manual_seed(0)
    network = EfficientAD(STUDENT)
    network.take_teacher(teacher.state_dict())
    train(network, cloth(16, 0), 250, foreign=FOREIGN)
    return network


def test_efficientad_learns_good_images_and_finds_a_blob(teacher: EfficientADTeacher, trained: EfficientAD) -> None:
    torch.manual_seed(0)
    fresh = EfficientAD(STUDENT)
    fresh.take_teacher(teacher.state_dict())
    train(fresh, cloth(16, 0), 1, foreign=FOREIGN)
    with torch.no_grad():
        before, after = (network.two_maps(cloth(6, 1)).mean((0, 2, 3)) for network in (fresh, trained))
    assert (after < 0.75 * before).all()  # of both maps; 0.03 to 0.4 of it, by the seed
    (maps, bad), (_, good) = ask(trained, cloth(6, 2, defect=True)), ask(trained, cloth(6, 1))
    assert bad.min() > good.max()
    for place in maps.flatten(1).argmax(1).tolist():
        assert (place // 256, place % 256) == pytest.approx((160, 96), abs=40)


def test_efficientad_keeps_its_teacher_and_normalises_its_features(teacher, trained: EfficientAD) -> None:
    for own, taken in zip(trained.teacher.parameters(), teacher.pdn.parameters(), strict=True):
        assert torch.equal(own, taken)
    target = trained.target(cloth(16, 0).float() / 255)
    torch.testing.assert_close(target.mean((0, 2, 3)), torch.zeros(24), atol=1e-3, rtol=0)
    torch.testing.assert_close(target.std((0, 2, 3)), torch.ones(24), atol=1e-3, rtol=0)


def test_the_scale_of_the_maps_is_that_of_numpys_quantiles(trained: EfficientAD) -> None:
    with torch.no_grad():
        both = trained.two_maps(cloth(16, 0))
        assert both.shape == (16, 2, 8, 8)
        quantiles = [np.quantile(both[:, k].numpy(), (0.9, 0.995)) for k in range(2)]
        np.testing.assert_allclose(trained.quantiles, quantiles, rtol=1e-4)
        scaled = [0.1 * (both[:, k] - low) / (high - low) for k, (low, high) in enumerate(quantiles)]
        expected = to_pixels((scaled[0] / 2 + scaled[1] / 2).float())
        torch.testing.assert_close(trained.maps(cloth(16, 0)), expected, atol=1e-4, rtol=1e-3)


def test_a_saved_efficientad_gives_the_same_maps(trained: EfficientAD) -> None:
    again = EfficientAD(STUDENT).eval()
    again.load_state_dict(trained.state_dict())
    assert torch.equal(ask(again, cloth(2, 3))[0], ask(trained, cloth(2, 3))[0])
    assert not any("others" in name for name in trained.state_dict())


def test_a_step_of_efficientad_depends_on_its_generator_alone(trained: EfficientAD) -> None:
    first, again, other = (trained.loss(cloth(2, 0), seeded(s))["loss"].item() for s in (0, 0, 1))
    assert first == again != other


def test_what_cannot_be_is_refused(teacher: EfficientADTeacher) -> None:
    network, images = EfficientAD(STUDENT), cloth(2, 0)
    with pytest.raises(RuntimeError, match="no teacher yet"):
        network.begin(images, FOREIGN)
    with pytest.raises(ValueError, match=r"no teacher of width 0\.0625"):
        network.take_teacher(EfficientADTeacher(replace(TEACHER, width=0.125)).state_dict())
    with pytest.raises(ValueError, match="no teacher of width"):
        network.take_teacher({"other.weight": torch.zeros(1)})
    network.take_teacher(teacher.state_dict())
    with pytest.raises(ValueError, match="images of other sets"):
        network.begin(images)
    with pytest.raises(ValueError, match="got 72"):
        EfficientAD(replace(STUDENT, size=72))
