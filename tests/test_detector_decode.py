"""Decoding, suppression and the inverse letterbox against boxes worked by hand and a slow suppression."""

import pytest
import torch
from torchvision.ops import box_iou

from defectlab.networks.yolo import decode
from defectlab.networks.yolo.decode import (
    anchor_centres,
    decode_anchor_based,
    decode_anchor_free,
    expected_distances,
    select,
)


def test_centres_go_level_by_level_and_row_by_row():
    centres, strides = anchor_centres([(2, 3), (1, 1)], (8, 16))
    assert centres.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8]]
    assert strides.tolist() == [8] * 6 + [16]


# From maps to boxes


def test_set_distributions_give_exact_boxes():
    """Level 2 of 16 px strides, cell at row 1, column 2, centre (40, 24): 1, 0.5, 2 and 3 strides to the sides."""
    raw = [torch.zeros(1, 4 * 5 + 2, 4, 6), torch.zeros(1, 4 * 5 + 2, 2, 3), torch.zeros(1, 4 * 5 + 2, 1, 1)]
    sides = torch.full((4, 5), -200.0)
    sides[0, 1] = sides[1, 0] = sides[1, 1] = sides[2, 2] = sides[3, 3] = 200.0
    raw[1][0, :20, 1, 2] = sides.flatten()
    raw[1][0, 21, 1, 2] = 2.0
    boxes, scores = decode_anchor_free(raw, bins=5)
    index = 24 + 1 * 3 + 2
    assert boxes.shape == (1, 31, 4)
    assert boxes[0, index].tolist() == [40 - 16, 24 - 8, 40 + 32, 24 + 48]
    assert scores[0, index].tolist() == pytest.approx([0.5, 1 / (1 + 2.718281828**-2)])
    assert boxes[0, 0].tolist() == [4 - 16, 4 - 16, 4 + 16, 4 + 16]  # equal logits: the middle, 2 strides
    assert scores[0, 0].tolist() == [0.5, 0.5]


def test_expected_distance_is_the_mean():
    share = torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(expected_distances(share.log().expand(4, 4)), torch.full((4,), 2.0))


@pytest.mark.parametrize("family", ["free", "based"])
def test_lowered_maps_are_decoded_in_float32(family):
    def run(level):
        if family == "free":
            return decode_anchor_free([level], (8,))
        return decode_anchor_based([level], torch.tensor([[[8.0, 12]] * 5]), (8,))

    level = torch.randn(1, 65, 2, 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = run(level)
    for got, exact in zip(lowered, run(level.float()), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, exact)


def test_maps_without_classes_are_refused():
    with pytest.raises(ValueError, match="64 channels hold no class"):
        decode_anchor_free([torch.zeros(1, 64, 1, 1)], (8,))


def test_anchored_boxes_by_hand():
    """Zeros give the anchor in the middle of its cell; saturated sigmoids the farthest and largest box."""
    anchors = torch.tensor([[[4.0, 8], [16, 6]], [[20, 20], [30, 10]]])
    raw = [torch.zeros(2, 2 * 7, 2, 3), torch.zeros(2, 2 * 7, 1, 1)]
    raw[0][1, 7:14, 1, 2] = torch.tensor([50.0, -50, 50, 0, 50, 0, 50])  # anchor 1, row 1, column 2
    boxes, scores = decode_anchor_based(raw, anchors, (8, 16))
    assert boxes.shape == (2, 14, 4) and scores.shape == (2, 14, 2)
    assert boxes[0, 0].tolist() == [4 - 2, 4 - 4, 4 + 2, 4 + 4]
    assert boxes[0, 12].tolist() == [8 - 10, 8 - 10, 8 + 10, 8 + 10]
    assert boxes[0, 13].tolist() == [8 - 15, 8 - 5, 8 + 15, 8 + 5]
    assert scores[0].unique().tolist() == [0.25]
    x, y = (2 + 1.5) * 8, (1 - 0.5) * 8
    assert boxes[1, 11].tolist() == pytest.approx([x - 32, y - 3, x + 32, y + 3])
    assert scores[1, 11].tolist() == pytest.approx([0.5, 1.0])


# Suppression


def one(boxes, scores, **options):
    """`select` for a single picture of 100 px."""
    (found,) = select(torch.tensor([boxes]), torch.tensor([scores]), 100, **options)
    return found


NEAR = [[10.0, 10, 50, 50], [12.0, 10, 52, 50], [60.0, 60, 90, 90]]  # the first two overlap by 38 / 42


def test_suppression_is_within_a_class():
    found = one(NEAR, [[0.6, 0.0], [0.9, 0.0], [0.3, 0.0]])
    assert found["scores"].tolist() == pytest.approx([0.9, 0.3])
    assert found["boxes"].tolist() == [NEAR[1], NEAR[2]]
    across = one(NEAR, [[0.6, 0.0], [0.0, 0.9], [0.3, 0.0]])
    assert across["boxes"].tolist() == [NEAR[1], NEAR[0], NEAR[2]]
    assert across["labels"].tolist() == [1, 0, 0]
    loose = one(NEAR, [[0.6, 0.0], [0.9, 0.0], [0.3, 0.0]], iou=0.91)
    assert len(loose["boxes"]) == 3


def test_one_anchor_may_give_several_classes():
    found = one(NEAR[:1], [[0.6, 0.2, 0.7]], confidence=0.2)  # the threshold itself is not enough
    assert found["labels"].tolist() == [2, 0]
    assert found["boxes"].tolist() == [NEAR[0], NEAR[0]]


def test_limits_keep_the_best(monkeypatch):
    boxes = [[10.0 * k, 0, 10 * k + 5, 5] for k in range(9)]
    scores = [[0.1 * k + 0.05] for k in range(9)]
    assert one(boxes, scores, most=2)["scores"].tolist() == pytest.approx([0.85, 0.75])
    monkeypatch.setattr(decode, "CANDIDATES", 4)
    assert one(boxes, scores)["scores"].tolist() == pytest.approx([0.85, 0.75, 0.65, 0.55])


def slow_select(boxes, scores, confidence, iou):
    """Greedy suppression in plain loops, one picture: (score, label, anchor) of what stays."""
    pairs = [(float(scores[a, c]), c, a) for a in range(len(boxes)) for c in range(scores.shape[1])]
    kept = []
    for score, c, a in sorted(pairs, reverse=True):
        same = [boxes[other] for _, label, other in kept if label == c]
        if score > confidence and not any(box_iou(boxes[a][None], b[None]) > iou for b in same):
            kept.append((score, c, a))
    return kept


def test_select_agrees_with_plain_loops_in_any_batch():
    torch.manual_seed(0)
    corner = torch.rand(3, 40, 2) * 60
    boxes = torch.cat([corner, corner + 10 + torch.rand(3, 40, 2) * 30], -1)
    scores = torch.rand(3, 40, 3)
    found = select(boxes, scores, 100, confidence=0.3, iou=0.4)
    for i in range(3):
        expected = slow_select(boxes[i], scores[i], 0.3, 0.4)
        assert found[i]["scores"].tolist() == [score for score, _, _ in expected]
        assert found[i]["labels"].tolist() == [label for _, label, _ in expected]
        assert torch.equal(found[i]["boxes"], boxes[i, [anchor for _, _, anchor in expected]])
        (alone,) = select(boxes[i : i + 1], scores[i : i + 1], 100, confidence=0.3, iou=0.4)
        assert all(torch.equal(alone[key], found[i][key]) for key in alone)


def test_nothing_found_has_the_right_shapes():
    found = one(NEAR, [[0.0], [0.0], [0.0]])
    assert found["boxes"].shape == (0, 4) and found["scores"].shape == found["labels"].shape == (0,)
    assert [found[key].dtype for key in ("boxes", "scores", "labels")] == [torch.float32, torch.float32, torch.int64]
    assert select(torch.zeros(0, 5, 4), torch.zeros(0, 5, 2), 100) == []


def test_boxes_return_to_the_pictures_pixels_and_are_clipped():
    """A picture of 200 x 120 px (width x height) halved into 100 px has a border of 20 px above and below."""
    boxes = torch.tensor([[[10.0, 30, 40, 70], [-5, 10, 50, 95], [60, 20, 105, 60]], [[10.0, 30, 40, 70]] * 3])
    scores = torch.tensor([[[0.9], [0.8], [0.7]], [[0.9], [0.0], [0.0]]])
    letterbox = {
        "scale": torch.tensor([0.5, 2.0]),
        "offset": torch.tensor([[0.0, 20], [30, 0]]),
        "sizes": torch.tensor([[120, 200], [50, 20]]),
    }
    first, second = select(boxes, scores, 100, **letterbox)
    assert first["boxes"].tolist() == [[20, 20, 80, 100], [0, 0, 100, 120], [120, 0, 200, 80]]
    assert second["boxes"].tolist() == [[0, 15, 5, 35]]  # -10 is clipped to 0
    assert one([[-3.0, 5, 130, 140]], [[0.9]])["boxes"].tolist() == [[0, 5, 100, 100]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_an_error(value):
    boxes, scores = torch.tensor([NEAR]), torch.full((1, 3, 1), 0.5)
    for broken in (boxes, scores):
        broken[0, 1, 0] = value
        with pytest.raises(ValueError, match="not finite"):
            select(boxes, scores, 100)
        broken[0, 1, 0] = 0.5
