"""D3N's cross-model fusion: the noise filter, attention as printed and as meant, every fusion of Tables I to III."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from defectlab.papers.d3n import D3N, StudentSettings
from defectlab.papers.d3n.fusion import (
    CrossModelFusion,
    DynamicCrossFusion,
    LevelFusion,
    MultiHeadAttention,
    NoiseFilter,
    WeightedSum,
    attention,
    pixel_norm,
    resized,
    wrapped,
)

NOTHING = {"dual": False, "weighted": False, "residual": False, "norm": False}
ROWS = {
    "table 1, cross": NOTHING,
    "table 1, dual": NOTHING | {"dual": True},
    "table 1, dual weighted": NOTHING | {"dual": True, "weighted": True},
    "table 1, weighted residual": NOTHING | {"weighted": True, "residual": True},
    "table 1, dual weighted residual": {"norm": False},
    "table 1, all": {},
    "table 2, concat": {"fuse": "concat"},
    "table 2, sum": {"fuse": "sum"},
    "table 2, weighted sum": {"fuse": "weighted_sum"},
    "table 3, plain": {"fuse": "sum", "noise_filter": False},
    "text, positional": {"positional": "sine"},
    "text, printed scale": {"printed_scale": True},
}

ALL = ["ddpm", "det", "cross", "residual"]
LEARNED = {
    **{row: [] for row in ("table 1, cross", "table 1, dual", "table 2, concat", "table 2, sum", "table 3, plain")},
    "table 1, dual weighted": ["ddpm", "det", "cross"],
    "table 2, weighted sum": ["ddpm", "det"],
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def shaken(module: nn.Module) -> nn.Module:
    """Every weight moved a little, so that nothing stands at a value of its initialisation."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("size", [(8, 8), (5, 6), (2, 2), (1, 3)])
def test_filter_starts_as_the_identity_and_returns_real_maps(size: tuple[int, int]) -> None:
    y = torch.randn(2, 3, *size)
    noise_filter = NoiseFilter()
    torch.testing.assert_close(noise_filter(y), y, atol=1e-6, rtol=1e-5)
    changed = shaken(noise_filter)(y)
    assert changed.shape == y.shape and changed.dtype == torch.float32
    assert (changed - y).abs().max() > 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert noise_filter(y.bfloat16()).dtype == torch.float32


def test_filter_without_high_frequencies_smooths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wave of one period and one of four, the highest that 8 px hold: the second goes, the first stays."""
    low = torch.cos(torch.arange(8) * 2 * torch.pi / 8).expand(1, 1, 8, 8)
    high = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    frequency = torch.fft.fftfreq(8).abs()
    keep = ((frequency[:, None] < 0.3) & (frequency < 0.3)).float()[None, None]
    noise_filter = NoiseFilter()
    monkeypatch.setattr(noise_filter, "attention", lambda spectrum: keep)
    torch.testing.assert_close(noise_filter(low + high), low, atol=1e-6, rtol=0)


def test_filter_looks_at_mean_and_maximum_of_the_channels_and_weighs_all_alike() -> None:
    """With a kernel of one tap: w = 2 sigmoid(3 mean + 5 max - 1) of log(1 + amplitude) at each frequency."""
    noise_filter = NoiseFilter(kernel=1)
    with torch.no_grad():
        noise_filter.place.weight.copy_(torch.tensor([3.0, 5.0])[None, :, None, None])
        noise_filter.place.bias.fill_(-1.0)
    spectrum = torch.tensor([0.0, 0.1j, 0.3])[None, :, None, None] * torch.ones(1, 3, 2, 2)
    seen = torch.tensor([0.0, 0.1, 0.3]).log1p()
    expected = 2 * (3 * seen.mean() + 5 * seen.max() - 1).sigmoid()
    torch.testing.assert_close(noise_filter.attention(spectrum), expected.expand(1, 1, 2, 2))


@pytest.mark.parametrize("border", [1, 3])  # also wider than the map
def test_a_spectrum_goes_on_periodically_on_all_sides(border: int) -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    sides = ((0, 0), (0, 0), (border, border), (border, border))
    assert wrapped(x, border).tolist() == np.pad(x.numpy(), sides, mode="wrap").tolist()


def test_attention_as_meant_and_as_printed() -> None:
    query, key, value = (torch.randn(2, 4, n, 9, dtype=torch.float64) for n in (5, 7, 7))
    product = query @ key.transpose(-1, -2)
    torch.testing.assert_close(attention(query, key, value), (product / 3).softmax(-1) @ value)
    torch.testing.assert_close(attention(query, key, value, printed=True), product.softmax(-1) / 3 @ value)


def test_multi_head_attention_agrees_with_pytorch() -> None:
    """torch.nn.MultiheadAttention with the same weights, on a map of 2 x 3 pixels that asks one of 4 x 2."""
    own = shaken(MultiHeadAttention(8))
    reference = nn.MultiheadAttention(8, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([own.query.weight, own.key.weight, own.value.weight]))
        reference.in_proj_bias.copy_(torch.cat([own.query.bias, torch.zeros(8), own.value.bias]))
        reference.out_proj.load_state_dict(own.output.state_dict())
    x, y = torch.randn(2, 8, 2, 3), torch.randn(2, 8, 4, 2)
    x_pixels, y_pixels = x.flatten(2).transpose(1, 2), y.flatten(2).transpose(1, 2)
    expected, _ = reference(x_pixels, y_pixels, y_pixels)
    torch.testing.assert_close(own(x, y), expected.transpose(1, 2).view(2, 8, 2, 3))
    torch.testing.assert_close(own(x), own(x, x))


def test_positions_tell_queries_and_keys_apart_and_not_values() -> None:
    x, y = torch.randn(1, 8, 3, 3), torch.randn(1, 8, 4, 4)
    shuffled = y.flatten(2)[..., torch.randperm(16)].view_as(y)
    plain, placed = MultiHeadAttention(8), MultiHeadAttention(8, positional="sine")
    plain.load_state_dict(placed.state_dict())
    torch.testing.assert_close(plain(x, shuffled), plain(x, y))
    assert (placed(x, shuffled) - placed(x, y)).abs().max() > 1e-3
    same = y[..., :1, :1].expand_as(y)  # all pixels answer alike
    torch.testing.assert_close(placed(x, same), plain(x, same))


def test_sinusoids_tell_rows_from_columns_of_maps_that_are_not_square() -> None:
    """Half the channels tell the column, half the row; the second row of two lies at 8 of 16."""
    placed = MultiHeadAttention(8, positional="sine").placed(torch.zeros(1, 8, 2, 3))[0].view(2, 3, 8)
    column, row = placed[..., :4], placed[..., 4:]
    assert torch.equal(column[0], column[1]) and torch.equal(row[:, 0], row[:, 2])
    assert len(placed.view(6, 8).unique(dim=0)) == 6
    angles = torch.tensor([8.0, 0.08])
    torch.testing.assert_close(row[1, 0], torch.cat([angles.sin(), angles.cos()]))


@pytest.mark.parametrize(("switches", "names"), [(ROWS[row], LEARNED.get(row, ALL)) for row in ROWS], ids=ROWS)
def test_every_row_keeps_the_shape_and_trains_all_its_weights(switches: dict, names: list[str]) -> None:
    """Its learned weights, by name, are those that it has."""
    fusion = shaken(LevelFusion(8, 12, **switches))
    assert list(CrossModelFusion((8, 8), (8, 8), **switches).mean_weights()) == names
    for side, native in ((4, 8), (8, 4), (6, 6)):
        fusion.zero_grad()
        x, y = torch.randn(2, 8, side, side, requires_grad=True), torch.randn(2, 12, native, native)
        fused = fusion(x, y)
        assert fused.shape == x.shape
        (fused * torch.randn_like(fused)).sum().backward()
        still = [name for name, p in fusion.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
        assert not still
        assert x.grad.abs().max() > 1e-6


@pytest.mark.parametrize("switches", ROWS.values(), ids=ROWS)
def test_every_row_runs_in_bf16(switches: dict) -> None:
    fusion = LevelFusion(8, 8, **switches).to(memory_format=torch.channels_last)
    x, y = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 8, 8)
    exact = fusion(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        fused = fusion(x.bfloat16().contiguous(memory_format=torch.channels_last), y.bfloat16())
    fused.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in fusion.parameters())
    assert (fused.float() - exact).abs().max() < 0.15


def test_rows_are_what_their_names_say() -> None:
    """Table I's rows from the same parts: X, Y, their self-attentions, the cross-attention."""
    x, y = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    whole = shaken(DynamicCrossFusion(8))
    det, ddpm = whole.refine_x(x), whole.refine_y(y)
    cross, cross_normed = whole.cross(x, y), whole.cross(x, pixel_norm(y))
    ws, kept = whole.shares.logits.softmax(0), whole.kept
    w_ddpm, w_det, w_cross = ws
    expected = {
        "table 1, cross": cross,
        "table 1, dual": ddpm + det + cross,
        "table 1, dual weighted": w_ddpm * ddpm + w_det * det + w_cross * cross,
        "table 1, weighted residual": w_ddpm * y + w_det * x + w_cross * cross + kept * x,
        "table 1, dual weighted residual": w_ddpm * ddpm + w_det * det + w_cross * cross + kept * x,
        "table 1, all": w_ddpm * ddpm + w_det * det + w_cross * cross_normed + kept * x,
    }
    for row, wanted in expected.items():
        fusion = DynamicCrossFusion(8, **ROWS[row])
        fusion.load_state_dict({k: v for k, v in whole.state_dict().items() if k in fusion.state_dict()})
        torch.testing.assert_close(fusion(x, y), wanted, msg=row)


def test_sums_of_table_two() -> None:
    x, y = torch.randn(2, 4, 3, 3), torch.randn(2, 6, 3, 3)
    plain = LevelFusion(4, 6, fuse="sum", noise_filter=False)
    assert isinstance(LevelFusion(4, 6, fuse="sum").filter, NoiseFilter) and not list(plain.filter.parameters())
    torch.testing.assert_close(plain(x, y) - x, plain.project(y))
    nn.init.zeros_(plain.project.conv.weight)
    torch.testing.assert_close(plain(x, y), x)
    weighted = WeightedSum()
    with torch.no_grad():
        weighted.logits.copy_(torch.tensor([0.0, 3.0]).log1p())  # 1 : 4
    torch.testing.assert_close(weighted(x, 2 * x), (0.2 * 2 + 0.8) * x)
    assert weighted.weights() == pytest.approx({"ddpm": 0.2, "det": 0.8})


def test_norm_takes_out_the_scale_of_the_other_models_features() -> None:
    x, y = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    normed, plain = DynamicCrossFusion(8, **NOTHING | {"norm": True}), DynamicCrossFusion(8, **NOTHING)
    torch.testing.assert_close(normed(x, 100 * y), normed(x, y), atol=1e-3, rtol=1e-3)
    assert (plain(x, 100 * y) - plain(x, y)).abs().max() > 1
    torch.testing.assert_close(pixel_norm(y), nn.functional.layer_norm(y.movedim(1, 3), (8,)).movedim(3, 1))


def test_positions_reach_the_self_attention_alone_and_the_printed_scale_both() -> None:
    x, y = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)

    def change(**switch) -> float:
        """Largest change of the output when one switch is set and the weights stay."""
        base = {k: v for k, v in switch.items() if k == "dual"}
        plain, other = DynamicCrossFusion(8, **base), DynamicCrossFusion(8, **switch)
        other.load_state_dict(plain.state_dict())
        return (other(x, y) - plain(x, y)).abs().max().item()

    assert change(positional="sine") > 1e-3
    assert change(positional="sine", dual=False) == 0
    assert change(printed_scale=True) > 1e-3
    assert change(printed_scale=True, dual=False) > 1e-3


def test_features_are_shrunk_without_aliasing_and_left_alone_at_their_own_size() -> None:
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(6, 6)[None, None]
    assert resized(checkers, (4, 4)).abs().max() < 0.1  # every third pixel of 12 would be 1 or -1
    y = torch.randn(1, 2, 4, 4)
    assert torch.equal(resized(y, (4, 4)), y)
    half = resized(y.bfloat16(), (2, 2))  # which PyTorch cannot shrink in bf16 on a CPU
    assert half.dtype == torch.float32 and half.shape == (1, 2, 2, 2)


def test_all_levels_and_their_weights() -> None:
    fusion = CrossModelFusion((8, 12, 16), (4, 8, 12))
    maps = [torch.randn(2, c, s, s) for c, s in ((8, 8), (12, 4), (16, 2))]
    features = [torch.randn(2, c, s, s) for c, s in ((4, 16), (8, 8), (12, 4))]
    assert [fused.shape for fused in fusion(maps, features)] == [x.shape for x in maps]
    start = {"ddpm": 1 / 3, "det": 1 / 3, "cross": 1 / 3, "residual": 1.0}
    assert fusion.mean_weights() == pytest.approx(start)
    shaken(fusion)
    for level in (*fusion.weights(), fusion.mean_weights()):
        assert list(level) == list(start) and level != pytest.approx(start)
        assert level["ddpm"] + level["det"] + level["cross"] == pytest.approx(1)
    assert fusion.mean_weights()["det"] == pytest.approx(sum(level["det"] for level in fusion.weights()) / 3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LevelFusion(8, 8, fuse="product"), "dynamic, concat, sum, weighted_sum"),
        (lambda: LevelFusion(8, 8, positional="rotary"), "none, sine"),
        (lambda: LevelFusion(10, 8), "10 channels .* 4 heads"),
        (lambda: MultiHeadAttention(6, heads=2, positional="sine"), "divisible by 4"),
        (lambda: CrossModelFusion((8, 8, 8), (8, 8)), "3 maps of the detector, 2 of the DDPM"),
    ],
)
def test_bad_switches_are_refused(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_images_become_boxes_by_the_deployed_student() -> None:
    d3n = D3N(StudentSettings(family="v5", scale="t", size=64), classes=3)
    found = d3n(torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8), confidence=0.0)
    assert len(found) == 2
    for image in found:
        assert image["boxes"].shape == (len(image["scores"]), 4) and len(image["labels"]) == len(image["scores"]) > 0
        assert image["boxes"].min() >= 0 and image["boxes"].max() <= 64


def test_importing_the_papers_is_quick() -> None:
    """What takes seconds to import waits until it is used."""
    papers = ", ".join(f"defectlab.papers.{name}" for name in ("d3n", "amam_kd", "bsdrd", "yolo_dcf"))
    heavy = ("diffusers", "segmentation_models_pytorch", "sklearn", "torchmetrics", "onnx", "matplotlib", "pandas")
    code = f"import sys, {papers}; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
