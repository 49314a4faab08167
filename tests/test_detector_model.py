"""The detectors: sizes against the published ones, shapes, gradients, biases by hand, fusing."""

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from toy_detection import lively, relative

from defectlab.metrics.costs import flops, parameters
from defectlab.networks.yolo.blocks import C3, SPPF, Bottleneck, C2f, Concatenation, ConvBlock, fused
from defectlab.networks.yolo.losses import AnchorBasedLoss, AnchorFreeLoss
from defectlab.networks.yolo.model import ANCHORS, SCALES, STRIDES, Detector

CLASSES = 6
FAMILIES = tuple(SCALES)
PUBLISHED = {  # millions of parameters and GFLOPs of one 640 px image, 80 classes
    ("v8", "n"): (3.2, 8.7),
    ("v8", "s"): (11.2, 28.6),
    ("v8", "m"): (25.9, 78.9),
    ("v8", "l"): (43.7, 165.2),
    ("v8", "x"): (68.2, 257.8),
    ("v5", "n"): (1.9, 4.5),
    ("v5", "s"): (7.2, 16.5),
    ("v5", "m"): (21.2, 49.0),
    ("v5", "l"): (46.5, 109.1),
}


@cache
def tiny(family: str) -> Detector:
    torch.manual_seed(0)
    return Detector(family, "t", CLASSES)


def random_images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize(("family", "scale"), PUBLISHED, ids="".join)
def test_size_as_published(family: str, scale: str) -> None:
    with torch.device("meta"):  # shapes without numbers: nothing is computed
        detector = Detector(family, scale, 80)
        images = torch.empty(1, 3, 640, 640)
    millions, gflops = PUBLISHED[family, scale]
    assert parameters(detector) / 1e6 == pytest.approx(millions, rel=0.02)
    assert flops(detector, images) / 1e9 == pytest.approx(gflops, rel=0.02)


def test_exact_number_of_parameters() -> None:
    with torch.device("meta"):
        assert parameters(Detector("v8", "n", 80)) == 3_157_184


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96)])
def test_shapes(family: str, height: int, width: int) -> None:
    detector = tiny(family).eval()
    images = random_images(2, 3, height, width)
    channels = 4 * 16 + CLASSES if family == "v8" else 3 * (5 + CLASSES)
    with torch.no_grad():
        raw, features = detector(images), detector.features(images)
    assert detector.strides == STRIDES == (8, 16, 32)
    assert [tuple(m.shape) for m in raw] == [(2, channels, height // s, width // s) for s in STRIDES]
    expected = [(2, w, height // s, width // s) for w, s in zip(detector.widths, STRIDES, strict=True)]
    assert [tuple(m.shape) for m in features] == expected
    for found, wanted in zip(detector.head(features), raw, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("family", "scale", "sides", "message"),
    [
        ("v8", "t", (64, 80), "images of 64x80 px: a detector needs sides divisible by 32"),
        ("v5", "t", (48, 48), "images of 48x48 px: a detector needs sides divisible by 32"),
        *(
            (*named, (64, 64), r"unknown detector .*use one of v8: t, n, s, m, l, x; v5: t, n, s, m, l$")
            for named in (("v7", "n"), ("v8", "q"), ("v5", "x"), ("", ""))
        ),
    ],
)
def test_refusals(family: str, scale: str, sides: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Detector(family, scale, CLASSES)(torch.zeros(1, 3, *sides))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_map_sees_every_other_stride(family: str) -> None:
    """The neck leads context down and detail up: each map depends on each of the backbone's three."""
    detector = lively(Detector(family, "t", CLASSES))
    maps = [m.detach().requires_grad_() for m in detector.backbone(random_images(1, 3, 64, 64))]
    for level in detector.neck(tuple(maps)):
        gradients = torch.autograd.grad(level.square().sum(), maps, retain_graph=True)
        assert all(float(gradient.abs().sum()) > 0 for gradient in gradients)


@pytest.mark.parametrize(("family", "kernels", "depth"), [("v8", (3, 3), 6), ("v5", (1, 3), 7)])
def test_fusion_and_block_are_used_at_every_place(family: str, kernels: tuple[int, int], depth: int) -> None:
    """Depths are a third of the published 3, 6, 6 (9), 3 in the backbone; four blocks without shortcut in the neck."""
    fusions, blocks = [], []

    class Fuse(Concatenation):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            fusions.append(arguments)

    class Block(Bottleneck):
        def __init__(self, channels: int, shortcut: bool, *arguments) -> None:
            super().__init__(channels, shortcut, *arguments)
            blocks.append((shortcut, arguments[0]))

    Detector(family, "n", CLASSES, fuse=Fuse, bottleneck=Block)
    assert len(fusions) == 4
    assert blocks == [(True, kernels)] * depth + [(False, kernels)] * 4


def test_pyramid_pooling_sees_5_9_and_13_pixels() -> None:
    block = SPPF(4, 6).eval()
    seen = []
    block.leave.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = random_images(1, 4, 20, 20)
    block(x)
    entered, *pooled = seen[0].chunk(4, 1)
    for maps, side in zip(pooled, (5, 9, 13), strict=True):
        assert torch.equal(maps, nn.functional.max_pool2d(entered, side, 1, side // 2))


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        *((block(12, 16, depth, True), (16, 12, 14)) for block in (C2f, C3) for depth in (1, 3)),
        *((ConvBlock(12, 5, kernel), (5, 12, 14)) for kernel in (1, 3, (1, 11))),
        (ConvBlock(12, 5, 3, dilation=3), (5, 12, 14)),
        (ConvBlock(12, 5, 3, 2), (5, 6, 7)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_blocks_keep_height_and_width_but_for_a_stride(block: nn.Module, shape: tuple[int, ...]) -> None:
    assert block(random_images(2, 12, 12, 14)).shape == (2, *shape)


def test_shortcut_adds_the_input() -> None:
    with_shortcut, without = Bottleneck(8, True).eval(), Bottleneck(8, False).eval()
    without.load_state_dict(with_shortcut.state_dict())
    x = random_images(1, 8, 5, 5)
    torch.testing.assert_close(with_shortcut(x) - without(x), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_gets_a_gradient_from_the_loss(family: str) -> None:
    torch.manual_seed(0)
    detector = Detector(family, "t", CLASSES)
    loss = AnchorFreeLoss(CLASSES) if family == "v8" else AnchorBasedLoss(CLASSES, detector.anchors)
    # The untrained anchor-free box has half sides of 7.5 strides: one true box of such a size for each level.
    boxes = torch.tensor([[[16.0, 16, 496, 496], [136, 136, 376, 376], [196, 196, 316, 316]]])
    loss(detector(random_images(1, 3, 512, 512)), boxes, torch.tensor([[0, 1, 2]]))["loss"].backward()
    without = [n for n, p in detector.named_parameters() if p.grad is None or not float(p.grad.abs().sum()) > 0]
    assert without == []
    assert all(bool(p.grad.isfinite().all()) for p in detector.parameters())


@pytest.mark.parametrize("classes", [1, 6])
def test_anchor_free_biases_by_hand(classes: int) -> None:
    head = Detector("v8", "t", classes).head
    for level, cells in enumerate((80 * 80, 40 * 40, 20 * 20)):  # of a 640 px image
        assert torch.equal(head.boxes[level][-1].bias, torch.ones(64))
        torch.testing.assert_close(head.classes[level][-1].bias.exp() * classes * cells, torch.full((classes,), 5.0))


@pytest.mark.parametrize(("classes", "odds"), [(1, 60.0), (2, 0.6 / 1.01), (6, 0.6 / 5.01)])
def test_anchor_based_biases_by_hand(classes: int, odds: float) -> None:
    """They are added to the random ones of a convolution, which lie within one over the root of its inputs."""
    detector = Detector("v5", "t", classes)
    for level, width, cells in zip(detector.head.levels, detector.widths, (6400, 1600, 400), strict=True):
        expected = torch.zeros(3, 5 + classes)
        expected[:, 4] = math.log(8 / cells)
        expected[:, 5:] = math.log(odds)
        rest = level.bias.detach().view(3, -1) - expected
        assert rest.abs().max() <= 1 / math.sqrt(width) + 1e-5
        assert rest.std() > 0


def test_anchors_are_those_given_or_of_coco_and_are_saved() -> None:
    assert torch.equal(Detector("v5", "t", 2).anchors, torch.tensor(ANCHORS).float())
    own = torch.arange(18.0).view(3, 3, 2) + 1
    detector = Detector("v5", "t", 2, anchors=own.double())
    assert torch.equal(detector.anchors, own) and detector.anchors.dtype == torch.float32
    assert torch.equal(detector.state_dict()["anchors"], own)
    assert not any("anchors" in name for name in tiny("v8").state_dict())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["64", "32"])
def test_fused_is_the_same_function_and_a_copy(family: str, dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    detector = lively(Detector(family, "t", CLASSES)).to(dtype)
    images = random_images(2, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        wanted = detector(images)
        before = {name: value.clone() for name, value in detector.train().state_dict().items()}
        small = fused(detector)
        assert relative(small(images), wanted) < limit
        for values in small.parameters():
            values.zero_()
    assert float(wanted[0].std()) > 1e-3
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    assert parameters(small) < parameters(detector)
    assert detector.training and not small.training
    after = detector.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
