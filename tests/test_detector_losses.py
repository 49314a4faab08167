"""Assignment and losses of the detectors against cases worked by hand, slow versions and finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torchvision.ops import box_iou, complete_box_iou_loss

from defectlab.files import DataError
from defectlab.networks.yolo import assignment, losses
from defectlab.networks.yolo.assignment import box_iou_aligned, kmeans_anchors, match_anchors, task_aligned
from defectlab.networks.yolo.decode import anchor_centres
from defectlab.networks.yolo.losses import AnchorBasedLoss, AnchorFreeLoss, distribution_focal_loss

STRIDES = (8, 16, 32)
ANCHORS = torch.tensor(
    [[[6.0, 8], [12, 10], [9, 20]], [[20.0, 22], [34, 18], [22, 44]], [[48.0, 40], [60, 70], [100, 90]]]
)


def random_boxes(*shape, size=64.0, smallest=4.0, dtype=torch.float32):
    corner = torch.rand(*shape, 2, dtype=dtype) * size * 0.6
    return torch.cat([corner, corner + smallest + torch.rand(*shape, 2, dtype=dtype) * size * 0.3], -1)


def random_ground_truth(batch, most, classes, size):
    """Padded boxes and labels, 0..most of them in each image; what stands in the padding must not matter."""
    boxes, labels = random_boxes(batch, most, size=size), torch.randint(0, classes, (batch, most))
    labels[torch.arange(most) >= torch.randint(0, most + 1, (batch, 1))] = -1
    return boxes, labels


def random_maps(batch, channels, size, **options):
    return [torch.randn(batch, channels, size // s, size // s, **options) for s in STRIDES]


def slow_ciou(a, b):
    return 1 - complete_box_iou_loss(a[None], b[None])[0]


def hold_constants(monkeypatch):
    """From the first call on, stop-gradient terms keep their values; returns what starts a pass over them again."""
    kept, position = [], [0]

    def constant(values):
        if position[0] == len(kept):
            kept.append(values.detach().clone())
        position[0] += 1
        return kept[position[0] - 1]

    monkeypatch.setattr(assignment, "constant", constant)
    monkeypatch.setattr(losses, "constant", constant)
    return lambda: position.__setitem__(0, 0)


def test_overlaps_agree_with_torchvision():
    torch.manual_seed(0)
    a, b = random_boxes(500, dtype=torch.float64), random_boxes(500, dtype=torch.float64)
    torch.testing.assert_close(box_iou_aligned(a, b), box_iou(a, b).diagonal(), atol=1e-7, rtol=0)
    torch.testing.assert_close(box_iou_aligned(a, b, "ciou"), 1 - complete_box_iou_loss(a, b), atol=1e-6, rtol=0)
    torch.testing.assert_close(box_iou_aligned(a[:, None], b[None]), box_iou(a, b), atol=1e-7, rtol=0)
    torch.testing.assert_close(box_iou_aligned(a, a, "ciou"), torch.ones(500).double(), atol=1e-7, rtol=0)


def test_overlap_gradients(monkeypatch):
    """Also equal to torchvision's, where the weight of the shape term is a constant, too."""
    torch.manual_seed(1)
    a, b = random_boxes(8, dtype=torch.float64).requires_grad_(), random_boxes(8, dtype=torch.float64)
    (got,) = torch.autograd.grad(box_iou_aligned(a, b, "ciou").sum(), a)
    (expected,) = torch.autograd.grad(-complete_box_iou_loss(a, b).sum(), a)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    restart = hold_constants(monkeypatch)
    assert gradcheck(lambda x: (restart(), box_iou_aligned(x, b, "ciou"))[1], a)
    monkeypatch.undo()
    empty = torch.tensor([[3.0, 3, 3, 3], [0, 0, 0, 8], [0, 0, 8, 0], [1, 1, 5, 5]], requires_grad=True)
    box_iou_aligned(empty, torch.zeros(4, 4), "ciou").sum().backward()
    assert empty.grad.isfinite().all()


def slow_task_aligned(scores, boxes, centres, true, labels, topk, alpha, beta):
    """The rule in plain loops, one image: (index of the true box or -1, target scores) of each anchor."""
    claims = {}  # anchor -> [(overlap, box, metric)]
    for m, label in enumerate(labels.tolist()):
        inside = []
        for a, (x, y) in enumerate(centres.tolist()):
            x1, y1, x2, y2 = true[m].tolist()
            overlap = max(float(slow_ciou(boxes[a], true[m])), 0.0) if label >= 0 else 0.0
            metric = float(scores[a, label]) ** alpha * overlap**beta
            if metric > 0 and x1 < x < x2 and y1 < y < y2:
                inside.append((metric, a, overlap))
        for metric, a, overlap in sorted(inside, reverse=True)[:topk]:
            claims.setdefault(a, []).append((overlap, m, metric))
    won = {a: max(entries) for a, entries in claims.items()}
    owner, target = torch.full((len(centres),), -1), torch.zeros_like(scores)
    for a, (_, m, metric) in won.items():
        mine = [entry for entry in won.values() if entry[1] == m]
        owner[a] = m
        target[a, labels[m]] = metric / max(entry[2] for entry in mine) * max(entry[0] for entry in mine)
    return owner, target


@pytest.mark.parametrize("topk, alpha, beta", [(10, 0.5, 6.0), (3, 1.0, 2.0)])
def test_task_aligned_agrees_with_plain_loops(topk, alpha, beta):
    torch.manual_seed(2)
    batch, classes, size = 3, 4, 96
    centres, _ = anchor_centres([(size // s, size // s) for s in STRIDES], STRIDES)
    true, labels = random_ground_truth(batch, 7, classes, size)
    boxes = torch.cat([centres, centres], -1) + torch.rand(batch, len(centres), 4) * 30 * torch.tensor([-1, -1, 1, 1])
    scores = torch.rand(batch, len(centres), classes)
    assigned = task_aligned(scores, boxes, centres, true, labels, topk, alpha, beta)
    contested = 0
    for i in range(batch):
        owner, target = slow_task_aligned(scores[i], boxes[i], centres, true[i], labels[i], topk, alpha, beta)
        foreground = owner >= 0
        contested += int(foreground.sum()) < topk * int((labels[i] >= 0).sum())
        assert torch.equal(assigned.foreground[i], foreground) and int(foreground.sum()) <= assigned.most
        assert torch.equal(assigned.ground_truth[i][foreground], owner[foreground])
        assert torch.equal(assigned.boxes[i][foreground], true[i][owner[foreground]])
        torch.testing.assert_close(assigned.target_scores[i], target, atol=1e-5, rtol=1e-4)
    assert contested  # else the comparison would not have reached the rule for shared anchors


@pytest.mark.parametrize("box, label", [((0.0, 0, 64, 64), -1), ((6.0, 6, 10, 10), 1)], ids=["padding", "tiny"])
def test_padding_and_tiny_boxes_get_no_anchor(box, label):
    centres, _ = anchor_centres([(8, 8)], [8])
    boxes, scores = torch.cat([centres - 6, centres + 6], -1)[None], torch.full((1, 64, 2), 0.5)
    assigned = task_aligned(scores, boxes, centres, torch.tensor([[box]]), torch.tensor([[label]]))
    assert not assigned.foreground.any() and not assigned.target_scores.any()


@pytest.mark.parametrize(
    "centre, cells",
    [
        ((10.3, 7.8), [(0, 0), (0, 1), (1, 1)]),  # (row, column): left of the middle, below it
        ((13.0, 19.0), [(1, 1), (2, 1), (2, 2)]),  # right and above
        ((1.0, 1.0), [(0, 0)]),  # both neighbours outside
        ((31.0, 18.0), [(1, 3), (2, 3)]),  # no column to the right
        ((32.0, 32.0), [(3, 3)]),  # on the very corner
    ],
)
def test_matched_cells_by_hand(centre, cells):
    x, y = centre
    box = torch.tensor([[[x - 8, y - 8, x + 8, y + 8]]])
    (match,) = match_anchors(box, torch.tensor([[2]]), torch.tensor([[[8.0, 8.0]]]), [8], [(4, 4)])
    kept = [part[match.valid].tolist() for part in (match.image, match.anchor, match.row, match.column)]
    assert sorted(zip(*kept, strict=True)) == [(0, 0, *cell) for cell in cells]
    assert set(match.labels[match.valid].tolist()) == {2}
    assert torch.equal(match.boxes[match.valid], box[0].expand(len(cells), 4))


def test_kmeans_finds_clusters():
    torch.manual_seed(3)
    means = torch.tensor([[10.0, 12], [60, 20], [80, 90]])
    sizes = torch.cat([mean + torch.rand(40, 2) - 0.5 for mean in means])[torch.randperm(120)]
    for seed in range(5):
        found = kmeans_anchors(sizes, 3, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(found, means, atol=0.2, rtol=0)


def test_distribution_focal_loss_by_hand():
    """Distance 2.3 is 0.7 of bin 2 and 0.3 of bin 3: with these logits the loss is their entropy, its slope nothing."""
    true = torch.tensor([0, 0, 0.7, 0.3, 0], dtype=torch.float64)
    logits = true.clamp(min=1e-12).log().expand(2, 4, 5).clone().requires_grad_()
    loss = distribution_focal_loss(logits, torch.full((2, 4), 2.3, dtype=torch.float64))
    entropy = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    torch.testing.assert_close(loss, torch.full((2,), entropy, dtype=torch.float64))
    loss.sum().backward()
    assert logits.grad.abs().max() < 1e-9


def test_distribution_focal_loss_clamps_and_differentiates():
    torch.manual_seed(4)
    logits = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    distances = torch.rand(3, 4, dtype=torch.float64) * 5
    assert gradcheck(lambda x: distribution_focal_loss(x, distances), logits)
    assert distribution_focal_loss(logits.bfloat16(), distances.bfloat16()).dtype == torch.float32
    for outside, end in ((-2.0, 0.0), (5.0, 4.99), (99.0, 4.99)):
        got, expected = (distribution_focal_loss(logits, torch.full_like(distances, d)) for d in (outside, end))
        torch.testing.assert_close(got, expected)


def slow_anchor_based(raw, boxes, labels, classes, anchors, balance=(4.0, 1.0, 0.4)):
    """Loops over levels, boxes, anchors and cells; returns box, obj, cls."""
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    box = obj = cls = 0.0
    for level, stride, shapes, weight in zip(raw, STRIDES, anchors, balance, strict=True):
        batch, _, height, width = level.shape
        values = level.view(batch, len(shapes), 5 + classes, height, width)
        target, box_terms, class_terms = torch.zeros(batch, len(shapes), height, width), [], []
        for i, m in (labels >= 0).nonzero().tolist():
            x1, y1, x2, y2 = boxes[i, m].tolist()
            x, y = (x1 + x2) / 2 / stride, (y1 + y2) / 2 / stride
            column, row = int(x), int(y)
            cells = [(row, column), (row, column + (1 if x % 1 >= 0.5 else -1))]
            cells.append((row + (1 if y % 1 >= 0.5 else -1), column))
            for a, (w, h) in enumerate(shapes.tolist()):
                if max((x2 - x1) / w, w / (x2 - x1), (y2 - y1) / h, h / (y2 - y1)) >= 4:
                    continue
                for r, c in cells:
                    if not (0 <= r < height and 0 <= c < width):
                        continue
                    p = values[i, a, :, r, c]
                    s = 2 * p[:4].sigmoid()
                    cx, cy = (s[0] - 0.5 + c) * stride, (s[1] - 0.5 + r) * stride
                    half = torch.stack([s[2] ** 2 * w, s[3] ** 2 * h]) / 2
                    centre = torch.stack([cx, cy])
                    overlap = slow_ciou(torch.cat([centre - half, centre + half]), boxes[i, m])
                    box_terms.append(1 - overlap)
                    wanted = torch.zeros(classes)
                    wanted[labels[i, m]] = 1
                    class_terms.append(bce(p[5:], wanted))
                    target[i, a, r, c] = torch.maximum(target[i, a, r, c], overlap)
        obj += weight * bce(values[:, :, 4], target)
        if box_terms:
            box, cls = box + torch.stack(box_terms).mean(), cls + torch.stack(class_terms).mean()
    return {"box": box, "obj": obj, "cls": cls}


def test_anchor_based_loss_agrees_with_plain_loops():
    torch.manual_seed(5)
    raw = random_maps(3, 3 * 7, 64)
    boxes, labels = random_ground_truth(3, 6, 2, 64)
    boxes[0, 1], labels[0, :2] = boxes[0, 0] + 0.5, 0  # two boxes on one cell and anchor: the better one counts
    loss = AnchorBasedLoss(2, ANCHORS, size=64)
    got = loss(raw, boxes, labels)
    expected = slow_anchor_based(raw, boxes, labels, 2, ANCHORS)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5)
    gains = {"box": 0.05, "obj": 0.01, "cls": 0.0125}  # (64 / 640)^2, 0.5 * 2 / 80
    torch.testing.assert_close(got["loss"], sum(gains[name] * expected[name] for name in gains), atol=1e-5, rtol=1e-5)


def test_objectness_does_not_move_boxes():
    torch.manual_seed(5)
    raw = random_maps(1, 3 * 7, 64, requires_grad=True)
    obj = AnchorBasedLoss(2, ANCHORS)(raw, random_boxes(1, 4), torch.zeros(1, 4, dtype=torch.long))["obj"]
    for gradient in torch.autograd.grad(obj, raw):
        moved = gradient.unflatten(1, (3, 7)).abs().amax((0, 1, 3, 4)) > 0
        assert moved.tolist() == [False] * 4 + [True] + [False] * 2


def test_anchor_free_terms_by_hand():
    """One cell, 16 bins of equal logits: a box of 7.5 strides to each side; the true one ends one stride below."""
    true = torch.tensor([-56.0, -56, 64, 12])
    ciou = float(slow_ciou(torch.tensor([-56.0, -56, 64, 64]), true))
    loss = AnchorFreeLoss(2, strides=(8,))
    got = loss([torch.zeros(1, 4 * 16 + 2, 1, 1)], true[None, None], torch.tensor([[1]]))
    expected = {"box": (1 - ciou) * ciou, "cls": 2 * math.log(2), "dfl": math.log(16) * ciou}  # target score: ciou
    expected["loss"] = 7.5 * expected["box"] + 0.5 * expected["cls"] + 1.5 * expected["dfl"]
    assert {name: float(value) for name, value in got.items()} == pytest.approx(expected, abs=1e-4)


def test_anchor_free_terms_are_means_over_target_scores():
    """The same images twice give the same loss, where the target scores sum to more than 1."""
    torch.manual_seed(6)
    raw, loss = random_maps(2, 4 * 16 + 3, 96), AnchorFreeLoss(3)
    boxes, labels = random_boxes(2, 5, size=96, smallest=60), torch.randint(0, 3, (2, 5))
    assert loss.assigned(raw, boxes, labels).target_scores.sum() > 1
    twice = loss([m.repeat(2, 1, 1, 1) for m in raw], boxes.repeat(2, 1, 1), labels.repeat(2, 1))
    torch.testing.assert_close(twice, loss(raw, boxes, labels), atol=0, rtol=1e-4)


def family(name, classes, size):
    """(loss, channels of its maps) of one family."""
    if name == "free":
        return AnchorFreeLoss(classes), 4 * 16 + classes
    return AnchorBasedLoss(classes, ANCHORS * size / 64, size=size), 3 * (5 + classes)


both = pytest.mark.parametrize("name", ["free", "based"])


@both
def test_gradients_of_the_complete_losses(name, monkeypatch):
    torch.manual_seed(7)
    boxes, labels = random_boxes(1, 2, size=32, smallest=12, dtype=torch.float64), torch.tensor([[1, 0]])
    if name == "free":
        raw = random_maps(1, 4 * 4 + 2, 32, dtype=torch.float64, requires_grad=True)
        loss = AnchorFreeLoss(2, bins=4)
        assigned = loss.assigned(raw, boxes, labels)
        assert assigned.target_scores.sum() > 0.01  # else the box terms would be nothing

        def compute(*maps):
            return loss.terms(maps, assigned)
    else:
        raw = random_maps(1, 7, 32, dtype=torch.float64, requires_grad=True)
        loss = AnchorBasedLoss(2, ANCHORS[:, 1:2], size=640)

        def compute(*maps):
            return loss(maps, boxes, labels)

    restart = hold_constants(monkeypatch)
    assert gradcheck(lambda *maps: (restart(), tuple(compute(*maps).values()))[1], raw)


@both
def test_images_without_boxes(name):
    torch.manual_seed(8)
    loss, channels = family(name, 2, 64)
    raw = random_maps(2, channels, 64, requires_grad=True)
    got = loss(raw, torch.zeros(2, 3, 4), torch.full((2, 3), -1))
    background = torch.nn.functional.softplus  # cross-entropy of a logit with target 0
    if name == "free":
        expected = {"box": 0, "cls": sum(background(m[:, 64:]).sum() for m in raw), "dfl": 0}
    else:
        levels = [background(m.unflatten(1, (3, 7))[:, :, 4]).mean() for m in raw]
        expected = {"box": 0, "obj": 4.0 * levels[0] + levels[1] + 0.4 * levels[2], "cls": 0}
    for key, value in expected.items():
        assert got[key].item() == pytest.approx(torch.as_tensor(value).item())
    got["loss"].backward()
    assert all(m.grad.isfinite().all() and m.grad.min() >= 0 for m in raw)


@both
def test_padding_and_the_order_of_boxes_change_nothing(name):
    torch.manual_seed(9)
    loss, channels = family(name, 3, 64)
    raw = random_maps(3, channels, 64)
    boxes, labels = random_ground_truth(3, 5, 3, 64)
    plain = loss(raw, boxes, labels)
    boxes = torch.cat([random_boxes(3, 4), boxes.flip(1)], 1)
    labels = torch.cat([torch.full((3, 4), -1), labels.flip(1)], 1)
    torch.testing.assert_close(loss(raw, boxes, labels), plain)


@both
def test_losses_are_float32_under_autocast(name):
    torch.manual_seed(10)
    loss, channels = family(name, 2, 64)
    raw = [m.bfloat16() for m in random_maps(2, channels, 64)]
    boxes, labels = random_boxes(2, 3), torch.tensor([[0, 1, -1], [1, -1, -1]])
    with torch.autocast("cpu", torch.bfloat16):
        lowered = loss(raw, boxes, labels)
    exact = loss([m.float() for m in raw], boxes, labels)
    torch.testing.assert_close(lowered, exact, rtol=0, atol=0)
    assert {value.dtype for value in lowered.values()} == {torch.float32}


@both
def test_nothing_waits_for_the_values_of_the_boxes(name):
    """On the meta device there are no values: a boolean index or a number read back would raise."""
    loss, channels = family(name, 2, 64)
    raw = random_maps(2, channels, 64, device="meta", requires_grad=True)
    boxes, labels = torch.zeros(2, 3, 4, device="meta"), torch.zeros(2, 3, dtype=torch.long, device="meta")
    got = loss.to("meta")(raw, boxes, labels)
    got["loss"].backward()
    assert got["loss"].shape == ()


def with_other_classes(name):
    loss, channels = family(name, 2, 64)
    return loss(random_maps(1, channels + 3, 64), torch.zeros(1, 1, 4), torch.tensor([[-1]]))


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda: box_iou_aligned(torch.ones(1, 4), torch.ones(1, 4), "giou"), "'giou'"),
        (lambda: kmeans_anchors(torch.tensor([[4.0, 4], [4, 4], [8, 8]]), 3), "2 different box sizes cannot give 3"),
        (lambda: with_other_classes("free"), "build loss and detector with the same classes"),
        (lambda: with_other_classes("based"), "build loss and detector with the same classes"),
    ],
)
def test_refusals(use, message):
    with pytest.raises((ValueError, DataError), match=message):
        use()
