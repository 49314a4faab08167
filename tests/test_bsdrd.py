"""BSDRD: the wavelet against PyWavelets, the two students, the gated loss that cannot switch a term off, the maps."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import pywt
import torch
from torch import Tensor
from torch.autograd import gradcheck
from toy_anomaly import CHANNELS, check_seeds, fake_data, feature_maps, learning
from toy_runs import quiet

from defectlab.networks.reverse_distillation import gaussian_smooth
from defectlab.papers import bsdrd
from defectlab.papers.bsdrd import MDGFLoss, Settings, TwoStudents, Wavelet, dimension_discrepancies, gated_fusion
from defectlab.studies.bsdrd import run_bsdrd

NARROW = Settings(low_channels=8, high_channels=4)


@pytest.mark.parametrize("name", ["haar", "db2", "db4", "none"])
@pytest.mark.parametrize("shape", [(16, 16), (8, 12)])
def test_wavelet_equals_pywavelets_band_by_band_and_is_inverted_perfectly(name: str, shape: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    wavelet = Wavelet(name)
    bands = wavelet(x)
    assert bands.shape == (2, 4, 3, shape[0] // 2, shape[1] // 2)
    if name != "none":
        approximation, details = pywt.dwt2(x.double().numpy(), name, mode="periodization")
        for index, expected in enumerate((approximation, *details)):  # horizontal, vertical, diagonal
            torch.testing.assert_close(bands[:, index].double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(wavelet.inverse(bands), x, rtol=0, atol=1e-5)
    bands = torch.randn(2, 4, 3, 4, 8)
    torch.testing.assert_close(wavelet(wavelet.inverse(bands)), bands, rtol=0, atol=1e-5)
    assert not wavelet.state_dict()  # nothing to learn, nothing to save
    assert gradcheck(wavelet, x[:1, :1, :4, :4].double().requires_grad_())


def test_none_is_space_to_depth() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    bands = Wavelet("none")(x)
    expected = [x[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
    assert torch.equal(bands, torch.stack(expected, 1))


def test_dynamic_fusion_weights_sum_to_one_and_depend_on_the_input() -> None:
    torch.manual_seed(0)
    fusion = bsdrd.DynamicFusion(CHANNELS).eval()
    fused, weights = fusion(feature_maps(seed=0))
    assert fused.shape == (2, 3 * 32, 4, 4)
    assert weights.shape == (2, 3, 32)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 32))
    _, others = fusion([5 * f for f in feature_maps(seed=1)])
    assert not torch.allclose(weights, others, atol=1e-3)
    aligned = torch.stack([a(f) for a, f in zip(fusion.align, feature_maps(seed=0), strict=True)], 1)
    for scale in range(3):  # scale after scale, side by side, at weight 1 where all three are equal
        part = fused[:, 32 * scale : 32 * (scale + 1)]
        torch.testing.assert_close(part, 3 * weights[:, scale, :, None, None] * aligned[:, scale])


VARIANTS = {
    "struct": {"students": ("struct",)},
    "detail": {"students": ("detail",)},
    "both": {},
    "layer2+3": {"high_level": "layer2+3"},
    "two levels": {"wavelet_levels": 2},
    "db2": {"wavelet": "db2"},
    "none": {"wavelet": "none"},
}


@pytest.mark.parametrize("bottleneck", [0, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_students_give_the_teachers_shapes_and_every_weight_learns(variant: str, bottleneck: int) -> None:
    torch.manual_seed(0)
    settings, maps = replace(NARROW, **VARIANTS[variant]), feature_maps()
    network, loss = TwoStudents(CHANNELS, bottleneck, settings), MDGFLoss(len(settings.students), settings)
    outputs = network(maps)
    assert [[m.shape for m in student] for student in outputs] == [[m.shape for m in maps]] * len(settings.students)
    moved, weights = learning([network, loss], lambda: loss(maps, network(maps))["loss"])
    assert moved == weights


def test_students_share_nothing() -> None:
    torch.manual_seed(0)
    network, maps = TwoStudents(CHANNELS, 0, NARROW), feature_maps()
    struct, _ = network(maps)
    sum(m.sum() for m in struct).backward()
    assert all(p.grad is not None for p in network.students["struct"].parameters())
    assert all(p.grad is None for p in network.students["detail"].parameters())


def test_control_without_wavelet_has_equal_size() -> None:
    students = [bsdrd.DetailStudent(CHANNELS, 0, replace(NARROW, wavelet=name)) for name in ("haar", "none", "db2")]
    assert len({sum(p.numel() for p in student.parameters()) for student in students}) == 1


def test_detail_student_reads_layer_3_alone_or_layers_2_and_3() -> None:
    torch.manual_seed(0)
    changed = feature_maps(seed=9)
    for high_level, reads_second in (("layer3", False), ("layer2+3", True)):
        student = bsdrd.DetailStudent(CHANNELS, 0, replace(NARROW, high_level=high_level)).eval()
        first, second, third = feature_maps()
        output = student([first, second, third])[0]
        assert torch.equal(student([changed[0], second, third])[0], output)  # layer 1 never
        assert torch.equal(student([first, changed[1], third])[0], output) is not reads_second
        assert not torch.equal(student([first, second, changed[2]])[0], output)


def test_discrepancies_by_hand() -> None:
    """Of two images; in the second nothing differs. A channel in which the teacher is silent is left out."""
    teacher = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).view(1, 2, 1, 2)  # positions (3, 4) and (0, 1)
    student = torch.tensor([[3.0, 1.0], [4.0, 0.0]]).view(1, 2, 1, 2)  # positions (3, 4) and (1, 0)
    channels = [1 - 3 / 10**0.5, 1 - 4 / 17**0.5]  # (3, 0) with (3, 1); (4, 1) with (4, 0)
    expected = [0.5 / 2, sum(channels) / 4, (1 - 25 / 26) / 2]
    found = dimension_discrepancies(torch.cat([teacher, teacher]), torch.cat([student, teacher]))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert dimension_discrepancies(student, -2 * student).tolist() == pytest.approx([2.0] * 3)
    silent = torch.cat([teacher, torch.zeros_like(teacher)], 1)
    assert dimension_discrepancies(silent, silent).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert float(dimension_discrepancies(torch.zeros_like(teacher), student)[1]) == 0  # no division by zero


def test_gradients_of_discrepancies_and_fusion() -> None:
    torch.manual_seed(0)
    teacher, student = torch.rand(2, 2, 3, 2, 2, dtype=torch.float64) + 0.2
    teacher[0, 1] = 0
    assert gradcheck(partial(dimension_discrepancies, teacher), student.requires_grad_())
    found = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    for gate in ("learned", "equal"):
        logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=gate == "learned")
        assert gradcheck(lambda d, x, gate=gate: gated_fusion(d, x, gate, 0.7)[0], (found, logits))


def test_fusion_by_hand() -> None:
    found = torch.tensor([[0.2, 0.4, 0.9], [1.0, 1.0, 1.0]])
    loss, gates = gated_fusion(found, torch.zeros(2, 3), "learned", 1.0)
    assert float(loss) == pytest.approx(0.5 + 1.0)  # open gates pay no penalty
    torch.testing.assert_close(gates, torch.full((2, 3), 1 / 3))
    equal, _ = gated_fusion(found, torch.randn(2, 3), "equal", 1.0)
    assert float(equal) == pytest.approx(1.5)
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    loss, _ = gated_fusion(found[:1], logits, "learned", 0.6)
    penalty = -0.2 * float(torch.tensor([1.5, 0.75, 0.75]).log().sum())
    assert float(loss) == pytest.approx(0.1 + 0.1 + 0.225 + penalty)


def best_gates(found: tuple[float, float, float], barrier: float) -> Tensor:
    """Where many gradient steps on the logits alone lead; the discrepancies stay as they are."""
    fixed = torch.tensor([found], dtype=torch.float64)
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(1000):
        optimizer.zero_grad()
        loss, gates = gated_fusion(fixed, logits, "learned", barrier)
        loss.backward()
        optimizer.step()
    return gates.detach()[0]


@pytest.mark.parametrize("found", [(0.0, 2.0, 2.0), (0.01, 1.0, 1.9), (0.0, 0.0, 2.0)])
@pytest.mark.parametrize("barrier", [1.0, 0.2])
def test_gate_cannot_win_by_switching_a_term_off(found: tuple[float, float, float], barrier: float) -> None:
    bound = barrier / (3 * (2 + barrier))
    gates = best_gates(found, barrier)
    assert float(gates.min()) >= bound
    assert float(gates[2]) < 1 / 3  # the gates did move: towards the small terms
    assert float(best_gates(found, 0.0).min()) < bound / 10  # without the barrier the gate closes


def test_focus_leads_with_the_largest_term_and_its_gate_learns_nothing() -> None:
    found = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.2, 0.1]], requires_grad=True)
    logits = torch.zeros(2, 3, requires_grad=True)
    loss, gates = gated_fusion(found, logits, "focus", 1.0)
    assert gates.argmax(1).tolist() == [1, 0]
    assert float(gates.amax(1).min()) > 0.5
    torch.testing.assert_close(gates, (5 * found.detach()).softmax(1))
    assert not gates.requires_grad
    loss.backward()
    torch.testing.assert_close(found.grad, gates)  # the gates are constants of the gradient
    assert logits.grad is None


def test_loss_names_its_scalars_and_sums_over_scales_and_students() -> None:
    maps = feature_maps()
    others = [feature_maps(seed=1), feature_maps(seed=2)]
    scalars = MDGFLoss(2, replace(NARROW, gate="equal"))(maps, others)
    assert list(scalars) == ["loss", "position", "channel", "map"]
    each = torch.stack([dimension_discrepancies(t, s) for other in others for t, s in zip(maps, other, strict=True)])
    torch.testing.assert_close(scalars["loss"], each.mean(1).sum())
    torch.testing.assert_close(torch.stack(list(scalars.values())[1:]), each.mean(0))
    learned = [MDGFLoss(2, replace(NARROW, gate=gate)).logits.requires_grad for gate in ("learned", "focus", "equal")]
    assert learned == [True, False, False]


def flat_student(apart: tuple[int, int, int]) -> list[Tensor]:
    """Maps that lie 0, 1 or 2 from those of (0, 0, 0) at every position, one number per scale."""
    units = {0: (1.0, 0.0), 1: (0.0, 1.0), 2: (-1.0, 0.0)}
    return [torch.tensor(units[d]).view(1, 2, 1, 1).expand(1, 2, s, s) for d, s in zip(apart, (8, 4, 2), strict=True)]


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [
        ("sum", (2.0 + 1 + 0) + (1 + 2 + 1)),
        ("max", 4.0),  # of 3 and 4: the larger sum, not the sum of the larger
        ("product", 2**0.5 + 2**0.5 + (1e-6 * 1) ** 0.5),
    ],
)
def test_maps_by_hand(fusion: str, expected: float) -> None:
    settings, teacher = replace(NARROW, fusion=fusion), flat_student((0, 0, 0))
    both = bsdrd.to_maps(settings, teacher, [flat_student((2, 1, 0)), flat_student((1, 2, 1))])
    torch.testing.assert_close(both, torch.full((1, 256, 256), expected), rtol=1e-5, atol=1e-5)
    one = bsdrd.to_maps(settings, teacher, [flat_student((2, 1, 1))])  # needs no fusion
    torch.testing.assert_close(one, torch.full((1, 256, 256), 4.0))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: Wavelet("bior2.2"), r"'bior2\.2' is not orthogonal: use haar"),
        (lambda: Wavelet("nonsense"), "nonsense"),
        (lambda: gated_fusion(torch.rand(1, 3), torch.zeros(1, 3), "no", 1.0), "'no': use learned, focus or equal"),
        (lambda: bsdrd.to_maps(replace(NARROW, fusion="no"), [], [[], []]), "fusion 'no': use sum, max or product"),
        (lambda: bsdrd.make_loss(replace(NARROW, loss="no")), "unknown loss 'no': use one of md_gf, "),
        (lambda: bsdrd.build(replace(NARROW, high_level="no"), (8, 8, 8), 8), "'no': use one of layer3"),
    ],
)
def test_what_does_not_exist_is_named(use: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use()


SMALL = replace(NARROW, teacher="resnet18_random", size=64, epochs=1, batch=4, precision="fp32")


def test_images_become_smoothed_maps_of_both_students() -> None:
    method, images = bsdrd.BSDRD(SMALL), fake_data().test.images
    maps = method(images)
    assert maps.shape == (6, 256, 256) and maps.dtype == torch.float32
    with torch.no_grad():
        features = method.teacher(images)
        expected = gaussian_smooth(bsdrd.to_maps(SMALL, features, method.network(features)))
    torch.testing.assert_close(maps, expected)


def test_a_run_gives_the_maps_of_its_model_again_with_its_seed_and_others_with_another() -> None:
    first, again, other = (run_bsdrd(SMALL, seed, fake_data(), quiet()) for seed in (0, 0, 1))
    check_seeds(first, again, other)
    assert set(first.per_class) == {"square"} and len(first.curve["loss"]) == 1
    method = bsdrd.BSDRD(SMALL)
    method.network.load_state_dict(first.model)
    scores = method(fake_data().test.images).amax((1, 2))
    assert scores.tolist() == pytest.approx(first.predictions["scores"].tolist(), abs=1e-4)
