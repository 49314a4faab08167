"""Decoding, suppression and the inverse letterbox against boxes worked by hand and a slow suppression."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import batched_nms

from defectlab.networks.yolo import decode
from defectlab.networks.yolo.decode import DefectFinder, decode_anchor_based, decode_anchor_free, select
from defectlab.networks.yolo.model import Detector


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


def one(boxes, scores, **options):
    """`select` for a single image of 100 px."""
    (found,) = select(torch.tensor([boxes]), torch.tensor([scores]), 100, **options)
    return found


NEAR = [[10.0, 10, 50, 50], [12.0, 10, 52, 50], [60.0, 60, 90, 90]]  # the first two overlap by 38 / 42


@pytest.mark.parametrize(
    ("scores", "options", "kept", "labels"),
    [
        ([[0.6, 0.0], [0.9, 0.0], [0.3, 0.0]], {}, [1, 2], [0, 0]),
        ([[0.6, 0.0], [0.0, 0.9], [0.3, 0.0]], {}, [1, 0, 2], [1, 0, 0]),  # across classes none is suppressed
        ([[0.6, 0.0], [0.9, 0.0], [0.3, 0.0]], {"iou": 0.91}, [1, 0, 2], [0, 0, 0]),
        ([[0.6, 0.2], [0.0, 0.0], [0.0, 0.7]], {"confidence": 0.2}, [2, 0], [1, 0]),  # above the threshold
        ([[0.6, 0.3], [0.0, 0.0], [0.0, 0.0]], {"confidence": 0.2}, [0, 0], [0, 1]),  # one anchor, several classes
        ([[0.6, 0.0], [0.9, 0.0], [0.3, 0.0]], {"most": 1}, [1], [0]),
    ],
)
def test_suppression_by_hand(scores, options, kept, labels):
    found = one(NEAR, scores, **options)
    assert found["boxes"].tolist() == [NEAR[index] for index in kept]
    assert found["labels"].tolist() == labels
    assert found["scores"].tolist() == pytest.approx([scores[i][c] for i, c in zip(kept, labels, strict=True)])


def test_candidates_are_the_best(monkeypatch):
    monkeypatch.setattr(decode, "CANDIDATES", 4)
    found = one([[10.0 * k, 0, 10 * k + 5, 5] for k in range(9)], [[0.1 * k + 0.05] for k in range(9)])
    assert found["scores"].tolist() == pytest.approx([0.85, 0.75, 0.65, 0.55])


def random_pairs(*shape):
    """Boxes (*shape, 4) that overlap, in whole pixels, and scores (*shape, 3) with many ties."""
    torch.manual_seed(0)
    corner = (torch.rand(*shape, 2) * 60).round()
    boxes = torch.cat([corner, corner + 10 + (torch.rand(*shape, 2) * 30).round()], -1)
    return boxes, (torch.rand(*shape, 3) * 20).round() / 20


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
    assert select(boxes[:0], scores[:0], 100) == []


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


def test_boxes_return_to_the_pixels_of_the_image_and_are_clipped():
    """An image of 200 x 120 px (width x height) halved into 100 px has a border of 20 px above and below."""
    boxes = torch.tensor([[[10.0, 30, 40, 70], [-5, 10, 50, 95], [60, 20, 105, 60]], [[10.0, 30, 40, 70]] * 3])
    scores = torch.tensor([[[0.9], [0.8], [0.7]], [[0.9], [0.0], [0.0]]])
    scale, offset = torch.tensor([0.5, 2.0]), torch.tensor([[0.0, 20], [30, 0]])
    sizes = torch.tensor([[120, 200], [50, 20]])
    first, second = select(boxes, scores, 100, scale=scale, offset=offset, sizes=sizes)
    assert first["boxes"].tolist() == [[20, 20, 80, 100], [0, 0, 100, 120], [120, 0, 200, 80]]
    assert second["boxes"].tolist() == [[0, 15, 5, 35]]  # -10 is clipped to 0
    assert one([[-3.0, 5, 130, 140]], [[0.9]])["boxes"].tolist() == [[0, 5, 100, 100]]


def select_with(box, score):
    return select(torch.tensor([[*NEAR[:2], box]]), torch.tensor([[[0.5], [score], [0.5]]]), 100)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: decode_anchor_free([torch.zeros(1, 64, 1, 1)], (8,)), "64 channels hold no class"),
        (lambda: select_with([torch.nan, 0, 1, 1], 0.5), "not finite"),
        (lambda: select_with([0, 0, torch.inf, 1], 0.5), "not finite"),
        (lambda: select_with([0, 0, 1, 1], torch.nan), "not finite"),
        (lambda: select_with([0, 0, 1, 1], torch.inf), "not finite"),
    ],
)
def test_refusals(use, message):
    with pytest.raises(ValueError, match=message):
        use()


@pytest.mark.parametrize("family", ["v8", "v5"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_to_boxes_by_a_detector(family, channels):
    torch.manual_seed(0)
    detector = Detector(family, "t", 2)
    images = torch.randint(0, 256, (3, channels, 64, 64), dtype=torch.uint8)
    found = DefectFinder(detector)(images, confidence=0.0, most=5)
    assert detector.training  # what is asked stays as it was
    with torch.no_grad():
        raw = detector.eval()((images / 255).expand(-1, 3, -1, -1))
    expected = select(*decode.decode(detector, raw), 64, confidence=0.0, most=5)
    for one_found, wanted in zip(found, expected, strict=True):
        assert len(one_found["boxes"]) == 5 and (one_found["boxes"] >= 0).all() and (one_found["boxes"] <= 64).all()
        torch.testing.assert_close(one_found["scores"], wanted["scores"], rtol=1e-3, atol=1e-6)
