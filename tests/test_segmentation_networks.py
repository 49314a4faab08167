"""The encoder that all segmentation networks share, and the published networks on it."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from toy_diffusion import random_images

from defectlab.networks import segmentation
from defectlab.networks.resnet import load_teacher
from defectlab.networks.segmentation import COMPARATORS, DilatedDepthwise, Segmenter, build_comparator, load_encoder

ENCODER = "resnet18_random"
SIZE = 64
IMAGES = random_images(2, colours=3, size=SIZE)


def norms(module: nn.Module, kind: type) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, kind)]


@pytest.mark.parametrize(("output_stride", "sides"), [(32, (4, 2)), (16, (4, 4)), (8, (8, 8))])
def test_encoder_gives_six_maps_and_dilates_in_place_of_strides(output_stride: int, sides: tuple[int, int]) -> None:
    encoder = load_encoder(ENCODER, output_stride)
    maps = encoder(torch.rand(1, 3, SIZE, SIZE))
    assert [m.shape[1] for m in maps] == encoder.out_channels == [3, 64, 64, 128, 256, 512]
    assert [m.shape[-1] for m in maps] == [64, 32, 16, 8, *sides]
    assert encoder.layer4[1].conv1.dilation == (32 // output_stride,) * 2
    assert encoder.layer3[1].conv1.dilation == (max(16 // output_stride, 1),) * 2


def test_encoder_is_the_teacher_in_train_mode_too_and_layer_4_has_ordinary_norms() -> None:
    segmenter = Segmenter(load_encoder(ENCODER)).train()
    found = segmenter.network(segmenter.normalise(IMAGES))[2:5]
    for mine, teachers in zip(found, load_teacher(ENCODER)(IMAGES), strict=True):
        torch.testing.assert_close(mine, teachers, rtol=1e-4, atol=1e-5)
    encoder = segmenter.network
    assert all(name.startswith("layer4") for name in norms(encoder, nn.BatchNorm2d))
    assert len(norms(encoder, nn.BatchNorm2d)) == 5
    assert len(norms(encoder, FrozenBatchNorm2d)) == 15
    assert all(p.requires_grad for p in encoder.parameters())
    assert {"conv1.weight", "layer3.1.conv2.weight", "layer4.0.bn1.weight"} <= dict(encoder.named_parameters()).keys()


def test_only_layer_4_depends_on_the_seed() -> None:
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(load_encoder(ENCODER).state_dict())
    differ = {k.split(".")[0] for k in states[0] if not torch.equal(states[0][k], states[1][k])}
    assert differ == {"layer4"}


def test_dilated_depthwise_gradient_is_right_under_bf16_autocast() -> None:
    """40 px wide: there torch's own bf16 gradient is garbage on CPUs with fast bf16."""
    torch.manual_seed(0)
    convolution = DilatedDepthwise(8, 8, (3, 1), padding=(4, 0), dilation=4, groups=8, bias=False)
    x, upstream = torch.randn(2, 8, 40, 40).bfloat16(), torch.randn(2, 8, 40, 40)
    gradients = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = convolution(x if enabled else x.float())
        assert y.dtype == torch.float32
        gradients += torch.autograd.grad(y, convolution.weight, upstream)
    torch.testing.assert_close(*gradients)


def test_deeplab_keeps_its_function_when_its_dilated_convolutions_are_replaced() -> None:
    found = [m for m in build_comparator("deeplabv3plus", ENCODER).modules() if isinstance(m, DilatedDepthwise)]
    assert [m.dilation for m in found] == [(12, 12), (24, 24), (36, 36)]
    old = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=True)
    x = torch.randn(1, 4, 9, 9)
    torch.testing.assert_close(segmentation.as_dilated_depthwise(old)(x), old(x))


@pytest.mark.parametrize("name", COMPARATORS)
def test_comparators_segment_and_learn_in_every_part(name: str) -> None:
    torch.manual_seed(0)
    segmenter = Segmenter(build_comparator(name, ENCODER)).train()
    logits = segmenter(IMAGES)
    assert logits.shape == (2, SIZE, SIZE)
    assert segmenter.normalise(IMAGES).is_contiguous(memory_format=torch.channels_last)
    logits.square().mean().backward()
    without = [n for n, p in segmenter.named_parameters() if p.grad is None]
    assert without == []
    assert not [n for n in norms(segmenter.network.encoder, nn.BatchNorm2d) if not n.startswith("layer4")]
    teacher = load_teacher(ENCODER)
    assert torch.equal(segmenter.network.encoder.conv1.weight, teacher.stem[0].weight)


def test_pspnet_reads_layer_4_at_stride_8() -> None:
    network = build_comparator("pspnet", ENCODER)
    assert network.encoder(torch.rand(1, 3, SIZE, SIZE))[-1].shape == (1, 512, 8, 8)
    assert network.decoder.psp.blocks[0].pool[1][0].in_channels == 512


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_comparator("fcn", ENCODER), "unknown network 'fcn': use one of unet, unetpp"),
        (lambda: load_encoder("wide_resnet50_2_random"), "encoder 'wide_resnet50_2_random': use resnet18"),
        (lambda: load_encoder(ENCODER, 4), "output stride 4 is not possible"),
    ],
)
def test_what_is_unknown_is_named(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_attention_gate_by_hand() -> None:
    gate = segmentation.AttentionGate(2, 1)  # one hidden channel
    with torch.no_grad():
        gate.fine.weight.copy_(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1))
        gate.coarse.weight.fill_(3.0)
        gate.coarse.bias.fill_(-1.0)
        gate.score.weight.fill_(0.5)
        gate.score.bias.fill_(0.25)
    x = torch.tensor([[1.0, -1.0], [0.5, -2.0]]).view(1, 2, 1, 2)  # two places
    gating = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    # place 0: relu(1 + 2*0.5 + 3*1 - 1) = 4 -> 0.5*4 + 0.25 = 2.25; place 1: relu(-1 - 4 - 1) = 0 -> 0.25
    wanted = torch.tensor([2.25, 0.25]).sigmoid().view(1, 1, 1, 2)
    torch.testing.assert_close(gate.coefficients(x, gating), wanted)
    torch.testing.assert_close(gate(x, gating), x * wanted)
    fine = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    flat = gating[..., :1]
    torch.testing.assert_close(gate(fine, flat), gate(fine, flat.expand(-1, -1, 2, 4)))  # the coarse map is brought up


def test_attention_unet_with_open_gates_is_the_unet() -> None:
    network = segmentation.AttentionUNet(ENCODER).eval()
    assert [g.fine.in_channels for g in network.gates] == [256, 128, 64, 64]
    assert [g.coarse.in_channels for g in network.gates] == [512, 256, 128, 64]
    plain = build_comparator("unet", ENCODER).eval()
    plain.encoder, plain.segmentation_head = network.encoder, network.head
    plain.decoder.blocks = network.blocks
    x = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert not torch.allclose(network(x), plain(x), atol=1e-3)
        for gate in network.gates:
            gate.score.weight.zero_()
            gate.score.bias.fill_(40.0)
        torch.testing.assert_close(network(x), plain(x))
