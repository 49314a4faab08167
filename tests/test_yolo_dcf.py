"""YOLO-DCF's parts: fusion and its reach, fusing of the multi-scale block, both distillation losses by hand."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from toy_detection import lively, relative, toy_data

from defectlab.data.augment import Augmentation, augment
from defectlab.metrics.costs import parameters
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.model import Detector, build_detector
from defectlab.papers.yolo_dcf import (
    BLOCKS,
    FUSIONS,
    YOLODCF,
    CBAMFusion,
    ContextGuidedFusion,
    DistilledLoss,
    DualDistillation,
    MultiScaleResidualBlock,
    Settings,
    SqueezeExcitationFusion,
    block_relation_loss,
    block_relations,
    build,
    channel_emphasis,
    channel_loss,
)

TINY = Settings(dataset="toy", scale="t", size=64, precision="fp32")


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize(("channels", "shape"), [((16, 8), (3, 5)), ((4, 4), (1, 1))])
def test_every_fusion_stands_at_the_same_place(name: str, channels: tuple[int, int], shape: tuple[int, int]) -> None:
    fusion = FUSIONS[name](channels)
    first, second = (maps(2, c, *shape, seed=c).requires_grad_() for c in channels)
    fused = fusion(first, second)
    assert fused.shape == (2, sum(channels), *shape)
    fused.square().sum().backward()
    assert float(first.grad.abs().sum()) > 0 and float(second.grad.abs().sum()) > 0
    if shape != (1, 1):  # a norm over two values forgets almost all of them
        assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in fusion.parameters())


def test_the_gate_decides_between_context_around_one_and_detail() -> None:
    fusion = lively(ContextGuidedFusion((4, 8)))
    first, second = 5 * maps(2, 4, 6, 6), 5 * maps(2, 8, 6, 6, seed=1)
    x = torch.cat([first, second], 1)
    attention = fusion.context(x)
    assert attention.shape == x.shape
    assert 0 <= attention.min() < 0.95 and 1.05 < attention.max() <= 2
    with torch.no_grad():
        for bias, expected in ((60.0, attention * x), (-60.0, x + fusion.detail(x))):
            fusion.gate[-1].weight.zero_(), fusion.gate[-1].bias.fill_(bias)
            torch.testing.assert_close(fusion(first, second), expected)
        for values in (*fusion.horizontal.parameters(), *fusion.vertical.parameters()):
            values.zero_()
    assert torch.equal(fusion.context(x), torch.ones_like(x))


def test_context_reaches_along_rows_and_columns() -> None:
    """Means along a row and a column carry a change 25 pixels far, where a 3x3 convolution sees nothing of it."""
    fusion = lively(ContextGuidedFusion((8, 8)))
    first, second = maps(1, 8, 32, 32), maps(1, 8, 32, 32, seed=1)
    changed = first.clone()
    changed[..., 16, 28] += 20
    with torch.no_grad():
        difference = (fusion(changed, second) - fusion(first, second))[0].abs().amax(0)  # (H, W)
        detail = fusion.detail(torch.cat([changed - first, torch.zeros_like(second)], 1))
        detail = (detail - fusion.detail(torch.zeros(1, 16, 32, 32)))[0].abs().amax(0)
    assert difference[16, 3] > 1e-3 and difference[2, 28] > 1e-3  # the same row, the same column
    assert difference[:10, :22].max() < 1e-5  # a strip of 11 reaches 5 px beside them, no farther
    assert detail[16, 28] > 1e-3 and detail[16, 3] == 0 and detail[2, 28] == 0


def test_squeeze_and_excitation_by_hand() -> None:
    fusion = SqueezeExcitationFusion((6, 10))
    first, second = maps(2, 6, 4, 5), maps(2, 10, 4, 5, seed=1)
    x = torch.cat([first, second], 1)
    enter, _, leave = fusion.gate
    hidden = (x.mean((2, 3)) @ enter.weight[:, :, 0, 0].T + enter.bias).relu()
    gate = (hidden @ leave.weight[:, :, 0, 0].T + leave.bias).sigmoid()
    torch.testing.assert_close(fusion(first, second), x * gate[:, :, None, None])
    with torch.no_grad():
        leave.weight.zero_(), leave.bias.zero_()
    torch.testing.assert_close(fusion(first, second), x / 2)


def test_cbam_by_hand() -> None:
    fusion = CBAMFusion((6, 10))
    first, second = maps(2, 6, 9, 9), maps(2, 10, 9, 9, seed=1)
    x = torch.cat([first, second], 1)
    with torch.no_grad():
        fusion.gate[-1].weight.zero_(), fusion.gate[-1].bias.zero_()
        fusion.place.weight.zero_(), fusion.place.bias.zero_()
        torch.testing.assert_close(fusion(first, second), x / 4)  # one half by channel, one half by place
        fusion.place.weight[0, :, 3, 3] = torch.tensor([1.0, 2.0])  # mean plus twice the maximum, of halved channels
        expected = x / 2 * (x.mean(1, keepdim=True) / 2 + x.amax(1, keepdim=True)).sigmoid()
        torch.testing.assert_close(fusion(first, second), expected)
        fusion.place.weight.zero_(), fusion.gate[-1].bias.fill_(1.0)  # added for mean and for maximum
        torch.testing.assert_close(fusion(first, second), x / 2 * torch.tensor(2.0).sigmoid())


def test_the_paths_of_the_block_see_3_5_and_7_pixels() -> None:
    block = lively(MultiScaleResidualBlock(4, False))
    point = torch.zeros(1, 4, 15, 15)
    point[..., 7, 7] = 1
    with torch.no_grad():
        for path, reach in ((block.dense, 1), (block.medium, 2), (block.large, 3)):
            seen = (path(point) - path(torch.zeros_like(point)))[0].abs().amax(0) > 1e-6
            rows, columns = seen.nonzero().unbind(1)
            assert (rows.min(), rows.max(), columns.min(), columns.max()) == (7 - reach, 7 + reach) * 2
            assert int(seen.sum()) == 9


def test_gradients_under_bf16_are_those_of_float32() -> None:
    """On maps of 56 px a CPU's bf16 gradient of a dilated depthwise convolution can be anything at all."""
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        block = MultiScaleResidualBlock(8)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = block(maps(2, 8, 56, 56).contiguous(memory_format=torch.channels_last))
        (y.float() * maps(2, 8, 56, 56, seed=1)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in block.parameters()]))
    wanted, found = gradients
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("family", ["v8", "v5"])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["64", "32"])
def test_whole_networks_are_fused(family: str, fusion: str, dtype: torch.dtype, limit: float) -> None:
    blocks = {"fuse": FUSIONS[fusion], "bottleneck": BLOCKS["multi_scale"]}
    detector = lively(Detector(family, "t", 2, **blocks)).to(dtype)
    small = fused(detector)
    images = maps(1, 3, 64, 64, dtype=dtype).sigmoid()
    with torch.no_grad():
        assert relative(small(images), detector(images)) < limit
    modules = list(small.modules())
    assert not any(isinstance(module, (nn.BatchNorm2d, MultiScaleResidualBlock)) for module in modules)
    assert all(module.dilation == (1, 1) for module in modules if isinstance(module, nn.Conv2d))
    assert any(isinstance(module, nn.BatchNorm2d) for module in detector.modules())


def test_build_gives_the_parts_that_the_settings_name() -> None:
    whole = build(TINY, 2)
    assert isinstance(whole.neck.fuse_up_fifth, ContextGuidedFusion)
    assert sum(isinstance(module, ContextGuidedFusion) for module in whole.modules()) == 4
    assert sum(isinstance(module, MultiScaleResidualBlock) for module in whole.modules()) == 10
    plain = build(replace(TINY, fusion="concat", block="plain"), 2)
    assert parameters(plain) == parameters(build_detector(TINY, 2)) < parameters(whole)


def test_images_become_boxes() -> None:
    images = toy_data(64, (2, 2, 2)).test.images
    found = YOLODCF(TINY, classes=2)(images, confidence=0.0, most=7)
    assert [(f["boxes"].shape, f["scores"].shape, f["labels"].shape) for f in found] == [((7, 4), (7,), (7,))] * 2
    assert all(f["boxes"].min() >= 0 and f["boxes"].max() <= 64 and f["labels"].max() < 2 for f in found)


def test_block_relations_by_hand() -> None:
    vectors = torch.tensor([[1.0, 0], [0, 3], [2, 2], [-1, 0]])  # of the places (0, 0), (0, 1), (1, 0), (1, 1)
    features = vectors.T.reshape(1, 2, 2, 2)
    h = 0.5**0.5
    expected = torch.tensor([[[1, 0, h, -1], [0, 1, h, 0], [h, h, 1, -h], [-1, 0, -h, 1]]])
    torch.testing.assert_close(block_relations(features, 2), expected)
    torch.testing.assert_close(block_relations(features, 8), expected)  # no more blocks than places
    larger = features.repeat_interleave(3, 2).repeat_interleave(3, 3)  # the mean of a block counts
    torch.testing.assert_close(block_relations(larger, 2), expected)
    torch.testing.assert_close(block_relations(features, 1), torch.ones(1, 1, 1))


def test_channel_emphasis_by_hand() -> None:
    """Mean absolute activations 1, 2, 3 have mean 2 and deviation 1."""
    features = torch.tensor([1.0, -2, 3])[None, :, None, None] * torch.tensor([[0.5, -1.5], [1.0, 1.0]])
    expected = torch.tensor([[-1.0, 0, 1]])
    torch.testing.assert_close(channel_emphasis(features, 1.0), expected.log_softmax(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(channel_emphasis(features, 0.25), (4 * expected).log_softmax(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(channel_emphasis(-30 * features, 1.0), expected.log_softmax(1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_channel_loss_by_hand(temperature: float) -> None:
    student, teacher = maps(4, 5, 3, 3), maps(4, 5, 3, 3, seed=1)
    p, q = (channel_emphasis(m, temperature) for m in (teacher, student))
    expected = (p.exp() * (p - q)).sum(1).mean() * temperature**2
    torch.testing.assert_close(channel_loss(student, teacher, temperature), expected)
    assert float(channel_loss(student, student.clone(), temperature)) == pytest.approx(0, abs=1e-7)
    assert expected > 0.01


def test_block_relation_loss_by_hand() -> None:
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 4, 4, seed=1)
    expected = (block_relations(student, 2) - block_relations(teacher, 2)).square().mean()
    torch.testing.assert_close(block_relation_loss(student, teacher, 2), expected)
    same = block_relation_loss(student, torch.cat([student, student], 1), 2)  # the same relations
    assert float(same) < 1e-12 < 0.01 < expected


@pytest.mark.parametrize("loss", [partial(channel_loss, temperature=2.0), partial(block_relation_loss, grid=3)])
def test_gradients_also_of_a_dead_map(loss: Callable) -> None:
    x, y = (maps(2, 5, 3, 3, seed=seed).double().requires_grad_() for seed in (0, 1))
    assert gradcheck(loss, (x, y))
    dead = torch.zeros(1, 4, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(dead, maps(1, 4, 3, 3)), dead)
    assert bool(gradient.isfinite().all())


WEIGHTS = {"relation": {"relation": 20.0}, "channel": {"channel": 0.5}, "both": {"relation": 20.0, "channel": 0.5}}
STUDENT, TEACHER = [4, 6, 8], [8, 12, 16]


@pytest.mark.parametrize("weights", [*WEIGHTS.values(), {}], ids=[*WEIGHTS, "none"])
def test_dual_distillation_gives_the_weighted_terms(weights: dict[str, float]) -> None:
    dual = DualDistillation(STUDENT, TEACHER, Settings(**weights, temperature=2.0, grid=4))
    student, teacher = (
        [maps(2, width, side, side, seed=seed) for width, side in zip(widths, (8, 4, 2), strict=True)]
        for seed, widths in enumerate((STUDENT, TEACHER))
    )
    adapted = [adapter(m) for adapter, m in zip(dual.adapters, student, strict=True)]

    def mean(loss: Callable, maps: list[Tensor], option: float) -> Tensor:
        return sum(loss(a, b, option) for a, b in zip(maps, teacher, strict=True)) / 3

    expected = {"relation": 20 * mean(block_relation_loss, student, 4), "channel": 0.5 * mean(channel_loss, adapted, 2)}
    terms = dual(student, teacher)
    assert set(terms) == set(weights)
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_the_student_learns_and_the_teacher_does_not(weights: dict[str, float]) -> None:
    data = toy_data(64, (2, 2, 2))
    settings = replace(TINY, **weights)
    student, teacher = build(settings, 2), build(settings, 2).eval().requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    loss = DistilledLoss(settings, student, teacher)
    split = data.train
    recipe, generator = Augmentation(mosaic=0.0), torch.Generator().manual_seed(0)
    batch = augment(split.images, split.boxes, split.labels, torch.arange(len(split)), recipe, generator)
    scalars = loss(student, teacher, batch.images, batch.boxes, batch.labels)
    assert set(scalars) == {"loss", "box", "cls", "dfl", *weights}
    own = 7.5 * scalars["box"] + 0.5 * scalars["cls"] + 1.5 * scalars["dfl"]
    torch.testing.assert_close(scalars["loss"], own + sum(scalars[name] for name in weights))

    distilled = sum(scalars[name] for name in weights)
    scalars["loss"].backward(retain_graph=True)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    adapting = [p.grad is not None and float(p.grad.abs().sum()) > 0 for p in loss.dual.parameters()]
    assert adapting == ["channel" in weights] * len(adapting)
    gradients = torch.autograd.grad(distilled, list(student.neck.parameters()), allow_unused=True)
    assert any(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gradients)
