"""Masks on the detector: head, loss, prediction and evaluation, against cases worked by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from toy_runs import quiet

from defectlab.data.augment import Augmentation, augment, plain
from defectlab.data.instances import load_instances, move_instances
from defectlab.metrics.detection import match, pack, statistic
from defectlab.networks.yolo.assignment import Matched, match_anchors
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.decode import decode_anchor_based, select
from defectlab.networks.yolo.losses import AnchorBasedLoss, detection_loss
from defectlab.networks.yolo.masks import MASK_GAIN, InstanceMaps, add_masks, mask_terms, with_masks
from defectlab.networks.yolo.model import ANCHORS, Detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.training import instances
from defectlab.training.instances import (
    evaluate_instances,
    instance_ground_truth,
    instance_metrics,
    predict_instances,
    right_masks,
    score,
)
from defectlab.training.recipe import train_detector

SIZE = 64
CLASSES = ("inclusion", "patches", "scratches")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_instances("synthetic_steel_masks", SIZE, root=tmp_path_factory.mktemp("data"))


def fresh(seed: int = 0, prototypes: int = 8) -> Detector:
    torch.manual_seed(seed)
    return with_masks(Detector("v5", "t", 3, anchors=torch.tensor(ANCHORS) * (SIZE / 320)), prototypes)


# Head


def test_head_adds_masks_and_leaves_the_boxes():
    torch.manual_seed(0)
    detector = Detector("v5", "t", 3).eval()
    images = torch.rand(2, 3, SIZE, SIZE)
    before = detector(images)
    output = with_masks(detector, 8).eval()(images)
    assert all(torch.equal(a, b) for a, b in zip(before, output.raw, strict=True))
    assert [tuple(x.shape) for x in output.coefficients] == [(2, 24, 8, 8), (2, 24, 4, 4), (2, 24, 2, 2)]
    assert output.prototypes.shape == (2, 8, 16, 16) and (output.prototypes >= 0).all()
    lean = fused(detector)(images)
    torch.testing.assert_close(lean.prototypes, output.prototypes, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="use v5"):
        with_masks(Detector("v8", "t", 3))


# Loss


def one_level(valid: list[bool], boxes: torch.Tensor) -> Matched:
    """A candidate for each of (B, T) boxes: anchor 0 of cell (0, 0), all valid ones as given."""
    count, most = boxes.shape[:2]
    zeros = torch.zeros(count * most, dtype=torch.long)
    image = torch.arange(count).repeat_interleave(most)
    return Matched(torch.tensor(valid), image, zeros, zeros, zeros, boxes.flatten(0, 1), zeros)


def test_mask_term_by_hand():
    """One prototype of 2 x 2 cells of 4 px; the box covers the left column, the instance all of its upper cell and a
    quarter of its lower one. Coefficient atanh(0.5), prototype 2: logit 1 in all cells."""
    maps = torch.zeros(1, 8, 8, dtype=torch.long)
    maps[0, :4, :4] = 1
    maps[0, 4:6, :2] = 1
    boxes = torch.tensor([[[0.0, 0, 4, 6]]])
    coefficients = [torch.full((1, 1, 1, 1), math.atanh(0.5))]
    prototypes = torch.full((1, 1, 2, 2), 2.0)
    prototypes[..., 1] = 50.0  # outside of the box: counts for nothing
    mask = mask_terms(coefficients, prototypes, [one_level([True], boxes)], maps, boxes)["mask"]
    softplus = math.log(1 + math.e)
    assert mask.item() == pytest.approx(((softplus - 1) + (softplus - 0.25)) / 2, rel=1e-5)


def test_mask_term_is_a_mean_over_positives_and_zero_without():
    maps = torch.zeros(2, 8, 8, dtype=torch.long)
    maps[0, :, :4], maps[0, :, 4:], maps[1] = 1, 2, 1
    boxes = torch.tensor([[[0.0, 0, 4, 8], [4, 0, 8, 8]], [[0.0, 0, 8, 8], [0, 0, 0, 0]]])
    coefficients, prototypes = [torch.tensor([1.0, 1.0]).view(2, 1, 1, 1)], torch.rand(2, 1, 2, 2)
    prototypes[0, :, :, 1] = 9.0

    def term(*valid: int, **options) -> float:
        level = one_level([i in valid for i in range(4)], boxes)
        return float(mask_terms(coefficients, prototypes, [level], maps, boxes, **options)["mask"])

    each = [term(0), term(1), term(2)]
    assert len({round(value, 4) for value in each}) == 3
    assert term(0, 1, 2) == pytest.approx(sum(each) / 3, rel=1e-5)
    assert term(0, 1, 2, most=1) == pytest.approx((each[0] + each[2]) / 2, rel=1e-5)
    assert term() == 0


def test_every_box_is_served_before_any_twice():
    """Two candidates per box, as many positives as boxes: both boxes learn, whatever the order of candidates."""
    maps = torch.zeros(1, 8, 8, dtype=torch.long)
    maps[0, :, :4], maps[0, :, 4:] = 1, 2
    boxes = torch.tensor([[[0.0, 0, 4, 8], [4, 0, 8, 8]]])
    level = one_level([True, True], boxes)
    prototypes = torch.rand(1, 1, 2, 2).requires_grad_()
    both = mask_terms([torch.ones(1, 1, 1, 1)] * 2, prototypes, [level, level], maps, boxes, most=2)["mask"]
    both.backward()
    assert (prototypes.grad != 0).all()  # either column of cells belongs to one box


def test_candidates_stand_in_the_order_of_the_boxes():
    """What `mask_terms` relies on: candidate i of a level belongs to box i // (3 K) of all, image by image."""
    boxes = torch.rand(3, 4, 2) * 40
    boxes = torch.cat([boxes, boxes + 5 + torch.rand(3, 4, 2) * 20], -1)
    labels = torch.zeros(3, 4, dtype=torch.long)
    for level in match_anchors(boxes, labels, torch.tensor(ANCHORS), (8, 16, 32), [(8, 8), (4, 4), (2, 2)]):
        owner = torch.arange(len(level.valid)) // 9
        assert torch.equal(level.boxes, boxes.flatten(0, 1)[owner]) and torch.equal(level.image, owner // 4)


def test_gradcheck():
    torch.manual_seed(0)
    boxes = torch.tensor([[[1.0, 2, 30, 28], [4, 10, 12, 31]]], dtype=torch.float64)
    anchors = torch.tensor([[[10.0, 12], [20, 24]]], dtype=torch.float64)
    matched = match_anchors(boxes, torch.zeros(1, 2, dtype=torch.long), anchors, (8,), [(4, 4)])
    maps = torch.randint(0, 3, (1, 32, 32))
    coefficients = torch.randn(1, 2 * 3, 4, 4, dtype=torch.float64, requires_grad=True)
    prototypes = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda c, p: mask_terms([c], p, matched, maps, boxes)["mask"], (coefficients, prototypes)
    )
    with torch.autocast("cpu", torch.bfloat16):
        lowered = mask_terms([coefficients.float()], prototypes.float(), matched, maps, boxes.float())["mask"]
    exact = mask_terms([coefficients], prototypes, matched, maps, boxes)["mask"]
    assert lowered.dtype == torch.float32 and lowered.item() == pytest.approx(exact.item(), rel=1e-5)


def test_the_loss_reaches_every_parameter(data):
    detector, split = fresh(), data.train
    criterion = AnchorBasedLoss(3, detector.anchors, size=SIZE)
    generator = torch.Generator().manual_seed(0)
    recipe = Augmentation(mosaic=0.0)
    batch = augment(split.images, split.boxes, split.labels, torch.arange(8), recipe, generator)
    output, maps = detector(batch.images), move_instances(split, batch)
    own = criterion(output.raw, batch.boxes, batch.labels)
    scalars = add_masks(dict(own), criterion, output, batch.boxes, batch.labels, maps)
    assert list(scalars) == ["loss", "box", "obj", "cls", "mask"]
    torch.testing.assert_close(scalars["loss"], own["loss"] + MASK_GAIN * scalars["mask"])
    scalars["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in detector.parameters())


# Prediction


def test_boxes_are_those_of_select(data):
    detector = fresh(1).eval()
    found = list(predict_instances(detector, data.dev, batch=len(data.dev)))
    with torch.inference_mode():  # to the last bit as predict_instances does it: scores of a fresh detector nearly tie
        images = plain(data.dev.images, torch.arange(len(data.dev))).contiguous(memory_format=torch.channels_last)
        output = fused(detector).to(memory_format=torch.channels_last)(images)
        boxes, scores = decode_anchor_based(output.raw, detector.anchors)
    split = data.dev
    places = {"scale": split.scale, "offset": split.offset, "sizes": split.sizes}
    for one, other in zip(found, select(boxes, scores, SIZE, most=instances.MOST, **places), strict=True):
        assert len(one["boxes"]) == 100 and one["masks"].shape == (100, 100, 100)
        for name in ("boxes", "scores"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-3)
        assert torch.equal(one["labels"], other["labels"])
    some = list(predict_instances(detector, data.dev, indices=[2]))
    assert len(some) == 1 and torch.equal(some[0]["labels"], found[2]["labels"])


class Fixed(nn.Module):
    """Gives the same output, whatever it sees."""

    def __init__(self, anchors: torch.Tensor, *output: torch.Tensor):
        super().__init__()
        self.output, self.anchors = InstanceMaps(*output), anchors

    def forward(self, images, *latents):
        return self.output


class Wide:
    """A split with an image of 50 x 100 px in 32 px: scale 0.32, 8 px of ground above and below it."""

    images = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    sizes, scale, offset = torch.tensor([[50, 100]]), torch.tensor([0.32]), torch.tensor([[0.0, 8.0]])

    def __len__(self) -> int:
        return 1


def test_a_mask_by_hand():
    """Anchor 1 of cell (1, 2) of the finest level: its box spans 12..28 x 10..14 px of the input, its coefficients
    take the second prototype, which lies right of x = 16 and below y = 12 px."""
    raw = [torch.full((1, 2 * 8, 32 // s, 32 // s), -20.0) for s in (8, 16, 32)]
    raw[0][0, 8:16, 1, 2] = torch.tensor([0.0, 0, 0, 0, 20, -20, 20, -20])  # centre (20, 12), size of the anchor
    coefficients = [torch.zeros(1, 2 * 2, 32 // s, 32 // s) for s in (8, 16, 32)]
    coefficients[0][0, 2:4, 1, 2] = torch.tensor([-9.0, 9.0])
    prototypes = torch.zeros(1, 2, 8, 8)
    prototypes[0, 0], prototypes[0, 1, 3:, 4:] = 5.0, 10.0
    anchors = torch.tensor([[[9.0, 9], [16, 4]]] * 3)
    split = Wide()
    detector = Fixed(anchors, raw, coefficients, prototypes)
    found = list(predict_instances(detector, split, confidence=0.1))
    assert len(found) == 1 and found[0]["labels"].tolist() == [1]
    x1, y1, x2, y2 = found[0]["boxes"][0].tolist()
    assert (x1, y1, x2, y2) == pytest.approx((12 / 0.32, 2 / 0.32, 28 / 0.32, 6 / 0.32))
    mask = found[0]["masks"][0]
    assert mask.shape == (50, 100)
    rows, columns = mask.nonzero().unbind(1)
    assert (columns.min(), columns.max(), rows.max()) == (50, 86, 18)  # 16 / 0.32 and the box's edges
    assert rows.min() in (12, 13)  # (12 - 8) / 0.32 is 12.5, the very centre of row 12
    none = list(predict_instances(detector, split, confidence=1.0))
    assert none[0]["masks"].shape == (0, 50, 100) and none[0]["boxes"].shape == (0, 4)
    with pytest.raises(ValueError, match="not finite"):
        list(predict_instances(Fixed(anchors, raw, coefficients, prototypes * torch.nan), split))


# Evaluation


def test_perfect_prediction_gives_100(data):
    ground_truth = list(instance_ground_truth(data.test))
    found = [one | {"scores": torch.linspace(0.9, 0.5, len(one["labels"]))} for one in ground_truth]
    scored = score(found, ground_truth, data.class_names)
    metrics, per_class = instance_metrics(scored, data.class_names, 0.1)
    of_boxes = ("map50", "map50_95", "precision_dev", "recall_dev")
    names = [name for box in of_boxes for name in (box, f"mask_{box}")]
    assert [metrics[name] for name in names] == pytest.approx([100] * 8)
    assert all(values["mask_map50_95"] == pytest.approx(100) for values in per_class.values())
    above = instance_metrics(scored, data.class_names, 0.95)[0]
    assert above["mask_recall_dev"] == 0 and math.isnan(above["mask_precision_dev"])


def test_right_boxes_with_wrong_masks(data):
    """The first image's masks are emptied: boxes stay perfect, masks lose just these."""
    ground_truth = list(instance_ground_truth(data.test))
    found = [one | {"scores": torch.ones(len(one["labels"]))} for one in ground_truth]
    found[0] = found[0] | {"masks": torch.zeros_like(found[0]["masks"])}
    total = sum(len(one["labels"]) for one in ground_truth)
    left = 100 * (total - len(ground_truth[0]["labels"])) / total
    metrics, _ = instance_metrics(score(found, ground_truth, CLASSES), CLASSES, 0.5)
    assert metrics["map50"] == pytest.approx(100) and metrics["precision_dev"] == 100
    assert metrics["mask_precision_dev"] == metrics["mask_recall_dev"] == pytest.approx(left)
    assert metrics["mask_map50"] < 99
    empty = [{name: values[:0] for name, values in one.items()} for one in ground_truth]
    with pytest.raises(ValueError, match="no ground truth"):
        instance_metrics(score(found, empty, CLASSES), CLASSES, 0.5)


def test_right_masks_follow_the_rule_of_boxes():
    """Masks that fill their boxes are matched as their boxes are."""
    generator = torch.Generator().manual_seed(0)

    def rectangles(count: int) -> dict[str, torch.Tensor]:
        low = torch.randint(0, 12, (count, 2), generator=generator)
        high = low + torch.randint(6, 12, (count, 2), generator=generator)
        boxes, side = torch.cat([low, high], 1).float(), torch.arange(24) + 0.5
        x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
        masks = ((side > y1) & (side < y2))[:, :, None] & ((side > x1) & (side < x2))[:, None]
        labels = torch.randint(0, 2, (count,), generator=generator)
        return {"boxes": boxes, "masks": masks, "labels": labels, "scores": torch.rand(count, generator=generator)}

    hits = 0
    for _ in range(20):
        predicted, truth = rectangles(12), rectangles(5)
        own = right_masks(predicted, truth)[:, 0]
        by_boxes = match([predicted], [truth], (0.5,), 2).right[:, 0]
        order = predicted["scores"].argsort(descending=True)
        assert own[order].tolist() == by_boxes.tolist()
        hits += int(own.sum())
    assert hits > 20
    assert right_masks(rectangles(3), rectangles(0)).tolist() == [[False]] * 3


def test_packed_masks_give_the_average_precision_again():
    """For the bootstrap: from the bits of a record, what torchmetrics gives from the masks."""
    generator = torch.Generator().manual_seed(1)
    side, found, ground_truth = 32, [], []
    for _ in range(24):
        masks = torch.rand(5, side // 8, side // 8, generator=generator) > 0.4
        masks = masks.repeat_interleave(8, 1).repeat_interleave(8, 2)
        masks[:, 0, 0] = True
        labels, scores = torch.arange(5) % 2, 0.02 + 0.9 * torch.rand(8, generator=generator)
        moved = torch.cat([masks.roll(int(torch.randint(0, 6, (), generator=generator)), 2), masks[:3].flip(1)])
        box = torch.tensor([0.0, 0.0, side, side])
        ground_truth.append({"boxes": box.repeat(5, 1), "labels": labels, "masks": masks})
        found.append({"boxes": box.repeat(8, 1), "labels": torch.cat([labels, labels[:3]]), "masks": moved})
        found[-1]["scores"] = scores.half().float()  # as a record holds them
    scored = score(found, ground_truth, CLASSES[:2])
    arrays = pack(scored.found, scored.ground_truth, [str(i) for i in range(24)], CLASSES[:2], scored.right)
    assert arrays["mask_right"].dtype == np.uint16
    weights = np.ones(24)
    for metric in ("mask_map50", "mask_map50_95"):
        for name, values in scored.per_class.items():
            assert 5 < values[metric] < 95
            assert statistic(arrays, metric, [name])(weights) == pytest.approx(values[metric], abs=1e-6)
    boxes = statistic(arrays, "map50")(weights)
    assert abs(boxes - statistic(arrays, "mask_map50")(weights)) > 5  # it is not the boxes that were measured
    assert statistic(arrays, "mask_map50")(np.eye(24)[0] + np.eye(24)[1]) != statistic(arrays, "mask_map50")(weights)


# All together


def test_it_learns_and_is_evaluated(data):
    settings = DetectorSettings(
        dataset="synthetic_steel_masks", family="v5", scale="t", size=SIZE, epochs=6, batch=8, optimizer="adamw",
        learning_rate=0.003, warm_up=1.0, average_ramp=5.0, mosaic=0.0, zoom=0.0, precision="fp32",
    )  # fmt: skip
    detector = fresh()
    criterion = detection_loss(detector, SIZE)

    def loss(batch):
        maps = move_instances(data.train, batch)
        output = detector(batch.images)
        terms = criterion(output.raw, batch.boxes, batch.labels)
        return add_masks(terms, criterion, output, batch.boxes, batch.labels, maps)

    average, trained = train_detector(detector, loss, data.train, settings, 0, quiet())
    assert trained.curve["mask"][-1] < trained.curve["mask"][0] < 0.8
    result = evaluate_instances(average, data)
    names = {"map50", "map50_95", "mask_map50", "mask_map50_95", "recall_dev", "mask_recall_dev"}
    assert names <= result.metrics.keys() and 0 <= result.dev["threshold"] <= 1
    assert (
        result.predictions["case_true"].shape
        == result.predictions["case_found"].shape
        == result.predictions["case_images"].shape
    )
    assert 0 < result.predictions["case_true"].max() <= 3
    assert result.predictions["case_true"].any((1, 2)).all()
