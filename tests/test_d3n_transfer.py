"""D3N's power transfer (equations 6 and 7) against cases worked by hand and finite differences."""

import math
from functools import partial

import pytest
import torch
from scipy.special import expit as sigmoid
from torch.autograd import gradcheck
from torchvision.ops import complete_box_iou_loss

from defectlab.networks.yolo import assignment
from defectlab.networks.yolo.losses import AnchorBasedLoss
from defectlab.papers.d3n.transfer import PowerTransfer, box_distance, logit_distance, object_scaled_terms

STRIDES = (8, 16, 32)
ANCHORS = torch.tensor([[[6.0, 8], [12, 10]], [[20.0, 22], [34, 18]], [[48.0, 40], [60, 70]]])
CLASSES = 3
TERMS = ("distill_obj", "distill_cls", "distill_box")
terms_of = partial(object_scaled_terms, anchors=ANCHORS, strides=STRIDES)
readings = pytest.mark.parametrize(
    "reading", [{"distance": distance, "box": box} for distance in ("l2", "bce") for box in ("ciou", "l2")], ids=str
)


def maps(seed, size=64, batch=2, scale=2.0, **options):
    """Raw maps of two anchors and three classes: (B, 16, h, w) at strides 8, 16 and 32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, ANCHORS.shape[1] * (5 + CLASSES), size // s, size // s) for s in STRIDES]
    return [(scale * torch.randn(shape, generator=generator)).to(**options) for shape in shapes]


def with_channel(raw, channel, value):
    """The maps with one of the 5 + C values of every anchor set to `value`."""
    changed = [m.clone() for m in raw]
    for m in changed:
        m.unflatten(1, (ANCHORS.shape[1], -1))[:, :, channel] = value
    return changed


def test_box_distances_by_hand():
    student, teacher = torch.tensor([10.0, 20, 50, 60]), torch.tensor([18.0, 20, 50, 52])
    l2 = box_distance(student, teacher, 80, 160, "l2")
    assert l2.item() == pytest.approx((8 / 80) ** 2 + (8 / 160) ** 2)
    ciou = box_distance(student, teacher, 80, 160)
    assert ciou.item() == pytest.approx(complete_box_iou_loss(student, teacher).item(), abs=1e-5)


@readings
def test_single_cell_by_hand(reading):
    """One image, one level of one cell, one anchor of 8 x 8 px, two classes: o_T is weight and its own divisor."""
    teacher = torch.tensor([0.0, 0, 0, 0, 1.0, 2.0, -2.0])  # the box of zeros: (0, 0, 8, 8) px
    student = torch.tensor([0.0, 0, math.log(3), 0, -1.0, 1.0, 0.0])  # width (2 * 0.75)^2 * 8 = 18 px
    raw, anchors = [[values.view(1, 7, 1, 1)] for values in (student, teacher)], torch.tensor([[[8.0, 8.0]]])
    got = object_scaled_terms(*raw, anchors, (8,), (4.0,), temperature=2.0, **reading)

    def distance(z_t, z_s):
        if reading["distance"] == "l2":
            return 4 * (sigmoid(z_t / 2) - sigmoid(z_s / 2)) ** 2
        return -sigmoid(z_t) * math.log(sigmoid(z_s)) - (1 - sigmoid(z_t)) * math.log(1 - sigmoid(z_s))

    if reading["box"] == "l2":  # both ends are off by 5 of 8 px
        box = 2 * (5 / 8) ** 2
    else:
        box = complete_box_iou_loss(torch.tensor([-5.0, 0, 13, 8]), torch.tensor([0.0, 0, 8, 8])).item()
    assert got["distill_obj"].item() == pytest.approx(4 * distance(1, -1), rel=1e-5)
    assert got["distill_cls"].item() == pytest.approx((distance(2, 1) + distance(-2, 0)) / 2, rel=1e-5)
    assert got["distill_box"].item() == pytest.approx(box, rel=1e-5)


def test_places_weigh_by_the_teachers_objectness():
    """Loops over images, levels, anchors and cells."""
    student, teacher = maps(1), maps(2)
    got = terms_of(student, teacher)
    total = cls = box = obj = 0.0
    for s, t, anchors, stride, weight in zip(student, teacher, ANCHORS, STRIDES, (4.0, 1.0, 0.4), strict=True):
        batch, _, height, width = s.shape
        places = [(b, k, r, c) for b in range(batch) for k in range(2) for r in range(height) for c in range(width)]
        for b, k, row, column in places:
            found, wanted = (m.view(batch, 2, 8, height, width)[b, k, :, row, column] for m in (s, t))
            boxes = []
            for values in (found, wanted):
                x, y, w, h = (2 * values[:4].sigmoid()).tolist()
                x, y = (x - 0.5 + column) * stride, (y - 0.5 + row) * stride
                w, h = w * w * float(anchors[k, 0]), h * h * float(anchors[k, 1])
                boxes.append(torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2]))
            objectness = wanted[4].sigmoid()
            total += objectness
            cls += objectness * logit_distance(found[5:], wanted[5:]).mean()
            box += objectness * complete_box_iou_loss(*boxes)
            obj += weight / len(places) * logit_distance(found[4], wanted[4])
    expected = {"distill_obj": obj, "distill_cls": cls / total, "distill_box": box / total}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-4, rtol=1e-4)


def test_the_detectors_balance_of_levels_counts():
    """Only one level's objectness differs: its balance times one distance, whatever the number of its places."""
    own = AnchorBasedLoss(CLASSES, ANCHORS, balance=(1.0, 2.0, 3.0))
    teacher = with_channel(maps(5), 4, 0.0)
    for level, weight in enumerate((1.0, 2.0, 3.0)):
        student = [with_channel(teacher, 4, 1.0)[i] if i == level else m for i, m in enumerate(teacher)]
        got = PowerTransfer(own, temperature=1.0)(student, teacher, torch.zeros(2, 1, 4), torch.full((2, 1), -1))
        assert got["distill_obj"].item() == pytest.approx(weight * (sigmoid(1) - 0.5) ** 2, rel=1e-5)


@readings
@pytest.mark.parametrize("background", [-50.0, -math.inf])
def test_nothing_is_learned_where_the_teacher_sees_background(reading, background):
    """Left half background: boxes and classes of the student may be anything there; objectness is still learned."""
    student, teacher = maps(6), maps(7)

    def left(m):
        return m.unflatten(1, (2, -1))[..., : m.shape[-1] // 2]  # (B, K, 5 + C, h, w / 2)

    for m in teacher:
        left(m)[:, :, 4] = background
    before = terms_of(student, teacher, **reading)
    changed = [m.clone() for m in student]
    for m in changed:
        left(m)[:, :, :4] += 3.0
        left(m)[:, :, 5:] -= 3.0
        m.requires_grad_()
    after = terms_of(changed, teacher, **reading)
    for name in TERMS:
        torch.testing.assert_close(after[name], before[name])
    sum(after.values()).backward()
    for m in changed:
        outside, objectness = left(m.grad)[:, :, [0, 1, 2, 3, 5, 6, 7]], left(m.grad)[:, :, 4]
        assert outside.abs().max() == 0 if background == -math.inf else outside.abs().max() < 1e-15
        inside = m.grad.unflatten(1, (2, -1))[..., m.shape[-1] // 2 :]
        assert (objectness.abs() > 0).all() and (inside[:, :, 5:].abs() > 0).all()


@readings
def test_a_teacher_that_sees_no_object_at_all(reading):
    student = [m.requires_grad_() for m in maps(8)]
    terms = terms_of(student, with_channel(maps(9), 4, -math.inf), **reading)
    assert terms["distill_cls"] == terms["distill_box"] == 0
    assert terms["distill_obj"] > 0 and terms["distill_obj"].isfinite()
    sum(terms.values()).backward()
    assert all(m.grad.isfinite().all() for m in student)


@readings
def test_gradients(reading, monkeypatch):
    """With one anchor; the weight of CIoU's shape term is a constant for the gradient."""
    options = {"size": 32, "batch": 1, "scale": 1.0, "dtype": torch.float64}
    student, teacher = ([m[:, :8].contiguous() for m in maps(seed, **options)] for seed in (10, 11))
    kept = []

    def constant(values):
        kept.append(kept[0] if kept else values.detach().clone())
        return kept[0]

    monkeypatch.setattr(assignment, "constant", constant)

    def compute(*raw):
        return tuple(object_scaled_terms(raw, teacher, ANCHORS[:, 1:], STRIDES, **reading).values())

    assert gradcheck(compute, [m.requires_grad_() for m in student])
    assert bool(kept) == (reading["box"] == "ciou")


@readings
def test_the_teacher_is_a_constant(reading):
    student, teacher = maps(12), [m.requires_grad_() for m in maps(13)]
    assert not any(v.requires_grad for v in terms_of(student, teacher).values())
    student = [m.requires_grad_() for m in student]
    sum(terms_of(student, teacher, **reading).values()).backward()
    assert all(m.grad is None for m in teacher) and all(m.grad.abs().max() > 0 for m in student)


@readings
def test_float32_under_autocast(reading):
    student, teacher = ([m.bfloat16() for m in maps(seed)] for seed in (14, 15))
    exact = terms_of([m.float() for m in student], [m.float() for m in teacher], **reading)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = terms_of(student, teacher, **reading)
    for name in TERMS:
        assert lowered[name].dtype == torch.float32 and torch.equal(lowered[name], exact[name])


def test_nothing_waits_for_the_device():
    """On the meta device there are no values: a number read back would raise."""
    student, teacher = ([m.to("meta") for m in maps(seed)] for seed in (16, 17))
    transfer = PowerTransfer(AnchorBasedLoss(CLASSES, ANCHORS)).to("meta")
    boxes, labels = torch.zeros(2, 3, 4, device="meta"), torch.zeros(2, 3, dtype=torch.long, device="meta")
    for m in student:
        m.requires_grad_()
    transfer(student, teacher, boxes, labels)["loss"].backward()


BOXES = torch.tensor([[[4.0, 6, 20, 22], [30, 20, 60, 58]], [[10.0, 10, 40, 30], [0, 0, 0, 0]]])
LABELS = torch.tensor([[0, 2], [1, -1]])


@readings
def test_weight_zero_is_the_detectors_own_loss(reading):
    own = AnchorBasedLoss(CLASSES, ANCHORS, size=64)
    student, teacher = [m.requires_grad_() for m in maps(18)], maps(19)
    plain = own(student, BOXES, LABELS)
    got = PowerTransfer(own, 0.0, **reading)(student, teacher, BOXES, LABELS)
    assert {name: got[name].item() for name in plain} == {name: value.item() for name, value in plain.items()}
    slopes = [torch.autograd.grad(terms["loss"], student) for terms in (plain, got)]
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))


def test_the_teacher_takes_the_detectors_gains():
    own = AnchorBasedLoss(CLASSES, ANCHORS, size=320)
    student, teacher = maps(20), maps(21)
    got = PowerTransfer(own, 0.5)(student, teacher, BOXES, LABELS)
    terms = terms_of(student, teacher)
    assert all(torch.equal(got[name], terms[name]) for name in TERMS)
    gains = {"box": 0.05, "obj": 0.25, "cls": 0.5 * CLASSES / 80}  # (320 / 640)^2
    taught = sum(gain * terms[f"distill_{name}"] for name, gain in gains.items())
    torch.testing.assert_close(got["loss"], own(student, BOXES, LABELS)["loss"] + 0.5 * taught)
    assert set(got) == {"loss", "box", "obj", "cls", *TERMS}


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (maps(23, size=128), {}, r"\(2, 16, 8, 8\).*\(2, 16, 16, 16\).*one scale"),
        (maps(23)[:2], {}, r"of the student .* of the teacher"),
        (maps(23), {"distance": "l1"}, "'l2' or 'bce', not 'l1'"),
        (maps(23), {"box": "giou"}, "'ciou' or 'l2', not 'giou'"),
        (maps(23), {"temperature": 0.0}, "above 0, not 0.0"),
    ],
)
def test_refusals(teacher, options, message):
    with pytest.raises(ValueError, match=message):
        terms_of(maps(23), teacher, **options)
