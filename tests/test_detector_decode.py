"""Decoding, suppression and the inverse letterbox against boxes worked by hand and a slow suppression."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import batched_nms, box_iou

from defectlab.networks.yolo import decode
from defectlab.networks.yolo.decode import (
    DefectFinder,
    anchor_centres,
    decode_anchor_based,
    decode_anchor_free,
    expected_distances,
    select,
)
from defectlab.networks.yolo.model import Detector


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
    """`select` for a single image of 100 px."""
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


def random_pairs(*shape):
    """Boxes (*shape, 4) that overlap, in whole pixels, and scores (*shape, 3) with many ties."""
    torch.manual_seed(0)
    corner = (torch.rand(*shape, 2) * 60).round()
    boxes = torch.cat([corner, corner + 10 + (torch.rand(*shape, 2) * 30).round()], -1)
    return boxes, (torch.rand(*shape, 3) * 20).round() / 20


def slow_select(boxes, scores, confidence, iou):
    """Greedy suppression in plain loops, one image: (score, label, anchor) of what stays."""
    pairs = [(float(scores[a, c]), c, a) for a in range(len(boxes)) for c in range(scores.shape[1])]
    kept = []
    for score, c, a in sorted(pairs, reverse=True):
        same = [boxes[other] for _, label, other in kept if label == c]
        if score > confidence and not any(box_iou(boxes[a][None], b[None]) > iou for b in same):
            kept.append((score, c, a))
    return kept


def test_select_agrees_with_plain_loops():
    boxes, scores = random_pairs(3, 40)
    scores = scores + torch.arange(120).view(3, 40, 1) * 1e-5 + torch.arange(3) * 1e-6  # no ties: their order is free
    for found, own, of_own in zip(select(boxes, scores, 100, confidence=0.31, iou=0.4123), boxes, scores, strict=True):
        expected = slow_select(own, of_own, 0.31, 0.4123)
        assert found["scores"].tolist() == [score for score, _, _ in expected]
        assert found["labels"].tolist() == [label for _, label, _ in expected]
        assert torch.equal(found["boxes"], own[[anchor for _, _, anchor in expected]])


def select_one(boxes, scores, confidence, iou, most, scale, offset, size):
    """Of one image, step by step: what `select` has to give, whatever the batch."""
    best, pairs = scores.flatten().topk(min(decode.CANDIDATES, scores.numel()))
    enough = best > confidence
    values, labels, candidates = best[enough], pairs[enough] % scores.shape[1], boxes[pairs[enough] // scores.shape[1]]
    kept = batched_nms(candidates, values, labels, iou)[:most]
    original = ((candidates[kept] - offset.repeat(2)) / scale).clamp(min=0)
    original = torch.minimum(original, size.flip(0).repeat(2).to(original))
    return {"boxes": original, "scores": values[kept], "labels": labels[kept]}


@pytest.mark.parametrize("anchors", [40, 1200])  # torchvision takes another way from 1000 boxes on
@pytest.mark.parametrize(("confidence", "iou", "most"), [(0.001, 0.7, 300), (0.3, 0.4, 300), (0.5, 0.6, 7)])
def test_an_image_is_the_same_in_any_batch(anchors, confidence, iou, most):
    """Ties, an image without any box, thresholds that scores are equal to."""
    boxes, scores = random_pairs(5, anchors)
    scores[1], scores[2] = 0, scores[2] * 0.7
    scale, offset = torch.tensor([1.0, 0.5, 2.0, 0.3, 1.7]), torch.arange(10.0).view(5, 2)
    sizes = torch.tensor([[90, 80], [100, 200], [30, 40], [300, 300], [20, 50]])
    limits = {"confidence": confidence, "iou": iou, "most": most}
    together = select(boxes, scores, 100, **limits, scale=scale, offset=offset, sizes=sizes)
    assert len(together[1]["scores"]) == 0 < len(together[2]["scores"]) <= most
    for i, found in enumerate(together):
        expected = select_one(boxes[i], scores[i], confidence, iou, most, scale[i], offset[i], sizes[i])
        for key, values in expected.items():
            assert torch.equal(found[key], values) and found[key].dtype == values.dtype


class Waits(TorchDispatchMode):
    """Counts the operations whose result's shape or number the host has to wait for, suppression itself apart."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += by_mask or name in ("nonzero", "masked_select", "_local_scalar_dense")
        return function(*args, **(kwargs or {}))


def test_the_host_does_not_wait_for_each_image():
    waits = []
    for count in (1, 8):
        boxes, scores = random_pairs(count, 40)
        with Waits() as mode:
            select(boxes, scores, 100)
        waits.append(mode.count)
    assert waits[0] == waits[1]


def test_nothing_found_has_the_right_shapes():
    found = one(NEAR, [[0.0], [0.0], [0.0]])
    assert found["boxes"].shape == (0, 4) and found["scores"].shape == found["labels"].shape == (0,)
    assert [found[key].dtype for key in ("boxes", "scores", "labels")] == [torch.float32, torch.float32, torch.int64]
    assert select(torch.zeros(0, 5, 4), torch.zeros(0, 5, 2), 100) == []


def test_boxes_return_to_the_pixels_of_the_image_and_are_clipped():
    """An image of 200 x 120 px (width x height) halved into 100 px has a border of 20 px above and below."""
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


@pytest.mark.parametrize("family", ["v8", "v5"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_to_boxes_by_a_detector(family, channels):
    torch.manual_seed(0)
    detector = Detector(family, "t", 2)
    images = torch.randint(0, 256, (3, channels, 64, 64), dtype=torch.uint8)
    found = DefectFinder(detector)(images, confidence=0.0, most=5)
    with torch.no_grad():
        raw = detector((images / 255).expand(-1, 3, -1, -1))
    expected = select(*decode.decode(detector, raw), 64, confidence=0.0, most=5)
    for one_found, wanted in zip(found, expected, strict=True):
        assert len(one_found["boxes"]) == 5 and (one_found["boxes"] >= 0).all() and (one_found["boxes"] <= 64).all()
        torch.testing.assert_close(one_found["scores"], wanted["scores"], rtol=1e-3, atol=1e-6)
