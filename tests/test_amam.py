"""Stage one of the two-stage paper: AMAM, gates, layouts."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from defectlab.networks.segmentation import AttentionUNet, SegmentationSettings
from defectlab.papers.amam_kd import segmentation
from defectlab.papers.amam_kd.segmentation import AMAM, SeparableDilation, Settings, UShapedNetwork, build

SMALL = Settings(encoder="resnet18_random")

TABLE_1 = {  # as printed, for 256 x 256 x 3: height, width, channels of each output
    "encoder 1": (128, 128, 64),
    "encoder 2": (64, 64, 128),
    "encoder 3": (32, 32, 256),
    "encoder 4": (16, 16, 512),
    "amam": (16, 16, 512),
    "decoder 1": (32, 32, 256),
    "decoder 2": (64, 64, 128),
    "decoder 3": (128, 128, 64),
    "decoder 4": (256, 256, 3),
    "output": (256, 256, 1),
}


@torch.no_grad()
def shapes(settings: Settings, size: int) -> dict[str, tuple[int, int, int]]:
    maps = UShapedNetwork(settings).eval().maps(torch.zeros(1, 3, size, size))
    return {name: (*m.shape[2:], m.shape[1]) for name, m in maps.items()}


def test_layout_table1_is_table_1_line_by_line() -> None:
    assert list(shapes(replace(SMALL, layout="table1"), 256).items()) == list(TABLE_1.items())


def test_layout_text_has_output_stride_16_and_four_skips() -> None:
    found = shapes(SMALL, 64)
    assert [found[f"encoder {i}"] for i in range(1, 6)] == [
        (32, 32, 64), (16, 16, 64), (8, 8, 128), (4, 4, 256), (4, 4, 512),
    ]  # fmt: skip
    assert [found[f"decoder {i}"][0] for i in range(1, 5)] == [8, 16, 32, 64]
    assert found["amam"] == (4, 4, 512)
    assert found["output"] == (64, 64, 1)


@pytest.mark.parametrize(
    ("skips", "gates", "convolutions", "inputs"),
    [
        ("none", 0, 0, [512, 256, 128, 64]),
        ("plain", 0, 0, [512 + 256, 256 + 128, 128 + 64, 64 + 64]),
        ("all_gates", 4, 0, [512 + 256, 256 + 128, 128 + 64, 64 + 64]),
        ("gates", 3, 1, [512 + 256, 256 + 128, 128 + 64, 64 + 64]),
    ],
)
def test_skips_of_table_5(skips: str, gates: int, convolutions: int, inputs: list[int]) -> None:
    network = UShapedNetwork(replace(SMALL, skips=skips, amam=False))
    assert sum(isinstance(m, segmentation.GateAttention) for m in network.modules()) == gates
    assert sum(isinstance(m, segmentation.LowestSkip) for m in network.modules()) == convolutions
    assert not any(isinstance(m, AMAM) for m in network.modules())
    assert [layer.before[0].in_channels for layer in network.decoder] == inputs
    if skips == "gates":
        assert isinstance(network.decoder[0].skip, segmentation.LowestSkip)  # the lowest
        assert [layer.skip.coarse.in_channels for layer in network.decoder[1:]] == [256, 128, 64]


@pytest.mark.parametrize(
    ("wrong", "size", "message"),
    [
        ({"layout": "table3"}, 64, "unknown layout 'table3': use one of text, table1"),
        ({"skips": "some"}, 64, "unknown skips 'some': use one of none, plain, all_gates, gates"),
        ({"decoder": False}, 64, "skips 'gates' need a decoder"),
        ({"attention": "cross"}, 64, "unknown attention 'cross'"),
        ({}, 40, "images of 40 x 40 px do not halve four times: use a multiple of 16"),
    ],
)
def test_impossible_settings_are_named(wrong: dict, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes(replace(SMALL, **wrong), size)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "self", "skips": "all_gates"},
        {"layout": "table1", "dilations": (2, 4)},
        {"layout": "table1", "encoder": "resnet50_random"},  # four times as wide as Table 1
        {"decoder": False, "skips": "none", "amam": False},  # the baseline of Table 5
    ],
)
def test_every_weight_learns(changes: dict) -> None:
    torch.manual_seed(0)
    segmenter = build(replace(SMALL, **changes)).train()
    assert isinstance(segmenter.network, UShapedNetwork)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    logits = segmenter(images)
    assert logits.shape == (2, 32, 32)
    logits.square().mean().backward()
    assert [n for n, p in segmenter.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_build_follows_the_settings() -> None:
    other = SegmentationSettings(network="attention_unet", encoder="resnet18_random")
    assert isinstance(build(other).network, AttentionUNet)


def test_amam_gates_its_input_element_by_element() -> None:
    module, x = AMAM(16).eval(), torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        nn.init.zeros_(module.fuse[1].weight)
        module.fuse[1].bias.copy_(torch.linspace(-2, 2, 16))
    torch.testing.assert_close(module(x), x * torch.linspace(-2, 2, 16).sigmoid().view(1, 16, 1, 1))


def test_self_attention_adds_to_the_input_and_looks_everywhere() -> None:
    torch.manual_seed(0)
    module, x = AMAM(16, dilations=(2,), attention="self").eval(), torch.randn(1, 16, 6, 6)
    with torch.no_grad():
        changed = x.clone()
        changed[..., 0, 0] += 1
        assert ((module(x) - x)[..., 5, 5] - (module(changed) - changed)[..., 5, 5]).abs().max() > 1e-6
        nn.init.zeros_(module.attention.out_proj.weight)
        torch.testing.assert_close(module(x), x)


def test_self_attention_gives_each_place_its_own_token_back() -> None:
    """Attention knows no places: with all paths pointwise, transposing the map transposes the result."""
    torch.manual_seed(0)
    module, x = AMAM(16, dilations=(), attention="self").eval(), torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        module.fuse[0].weight[..., [0, 0, 2, 2], [0, 2, 0, 2]] = 0  # a 3x3 kernel that is its own transpose
        module.fuse[0].weight[..., [0, 1, 1, 2], [1, 0, 2, 1]] = 0
        torch.testing.assert_close(module(x.mT), module(x).mT)


def test_factorised_dilation_sees_the_nine_taps_of_a_dilated_3x3() -> None:
    torch.manual_seed(0)
    path = nn.Sequential(SeparableDilation(3, 3, (3, 1), 2), SeparableDilation(3, 3, (1, 3), 2)).eval()
    for module in path.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.weight, 0.1, 1)  # positive, so that no ReLU hides a tap
    x = torch.ones(1, 3, 7, 7, requires_grad=True)
    path(x)[0, :, 3, 3].sum().backward()
    seen = {tuple(place) for place in x.grad.abs().sum((0, 1)).nonzero().tolist()}
    assert seen == {(3 + a, 3 + b) for a in (-2, 0, 2) for b in (-2, 0, 2)}
