"""torchvision's heads on this project's small backbone, three means against tiny defects, and recall by box size."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FrozenBatchNorm2d
from toy_detection import CLASSES, toy_data, toy_split
from toy_runs import quiet

from defectlab.data.augment import Batch, plain
from defectlab.data.detection import DetectionData
from defectlab.files import DataError
from defectlab.metrics.detection import match, pack, unpack
from defectlab.metrics.per_image import THIRDS, recall_statistic, third_edges
from defectlab.networks.torchvision_detectors import (
    RATES,
    Anchors,
    HardExampleHeads,
    SmallPyramid,
    TorchvisionSettings,
    build_torchvision,
    hardest_loss,
    sides_of,
    spread_anchors,
)
from defectlab.networks.yolo.model import Detector
from defectlab.training.torchvision_detectors import (
    predict_torchvision,
    run_torchvision,
    torchvision_loss,
    trained_anchors,
)

SMALL = TorchvisionSettings(
    dataset="toy", backbone="v8t", size=64, epochs=2, batch=4, optimizer="adamw", learning_rate=0.001, mosaic=1.0,
    close_mosaic=1, average_ramp=3.0,
)  # fmt: skip
TINY = replace(SMALL, anchors="kmeans", stride_4=True, hard_examples=16)


def batch_of(count: int) -> Batch:
    """Images of the toy set, the last one without a box."""
    split = toy_split(count, 0, 64)
    labels = split.labels.clone()
    labels[-1] = -1
    return Batch(plain(split.images, torch.arange(count)), split.boxes, labels, torch.eye(3), torch.zeros(count, 4))


# --- Networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["t", "n"])
def test_a_pyramid_on_the_detectors_own_backbone(scale: str) -> None:
    with torch.device("meta"):
        for stride_4, strides in ((False, (8, 16, 32)), (True, (4, 8, 16, 32))):
            body = SmallPyramid(scale, stride_4)
            maps = body(torch.zeros(2, 3, 96, 96))
            assert [tuple(x.shape) for x in maps.values()] == [(2, 64, 96 // s, 96 // s) for s in strides]
            assert list(maps) == [str(level) for level in range(len(strides))]
            wanted = Detector("v8", scale, 6).backbone.state_dict()
            assert {k: v.shape for k, v in body.backbone.state_dict().items()} == {
                k: v.shape for k, v in wanted.items()
            }


def test_the_pyramid_sees_what_the_backbone_gives() -> None:
    body, images = SmallPyramid("t", True).eval(), torch.rand(1, 3, 64, 64)
    seen = []
    body.pyramid.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    body(images)
    for own, wanted in zip(list(seen[0].values())[1:], body.backbone(images), strict=True):
        torch.testing.assert_close(own, wanted)


def test_default_anchors_by_hand() -> None:
    sides = sides_of(800, 3)  # six of them from 32 to 512: each 16^(1/5) of the one before
    torch.testing.assert_close(sides.flatten(), 32 * 16 ** (torch.arange(6) / 5))
    torch.testing.assert_close(sides_of(200, 4)[[0, 3], [0, 1]], torch.tensor([8.0, 128.0]))  # a quarter of COCO's
    anchors = spread_anchors(800, 3)
    assert anchors.shape == (3, 6, 2)
    torch.testing.assert_close(anchors.prod(-1), sides.square().repeat_interleave(3, 1))  # area
    torch.testing.assert_close(anchors[..., 1] / anchors[..., 0], torch.tensor([0.5, 1.0, 2.0]).repeat(3, 2))
    torch.testing.assert_close(anchors[0, 1], torch.tensor([32.0, 32.0]))


def test_anchors_lie_on_the_places_of_their_level() -> None:
    shapes = torch.tensor([[[3.0, 5.0], [4.0, 4.0]], [[9.0, 7.0], [8.0, 8.5]]])
    generator = Anchors(shapes)
    assert generator.num_anchors_per_location() == [2, 2]
    maps = [torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)]
    boxes = generator(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), maps)[0]
    assert boxes.shape == (2 * 64 + 2 * 16, 4)
    assert boxes[2].tolist() == [8 - 1.5, -2.5, 8 + 1.5, 2.5]  # second place of the first row, not rounded
    assert boxes[128 + 2 * 4 + 1].tolist() == [-4, 16 - 4.25, 4, 16 + 4.25]  # first place of the second row


@pytest.mark.parametrize("architecture", list(RATES))
def test_every_head_learns_on_the_small_backbone(architecture: str) -> None:
    torch.manual_seed(0)
    model = build_torchvision(replace(SMALL, architecture=architecture), len(CLASSES)).train()
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    batch = batch_of(2)
    scalars = torchvision_loss(model)(batch)
    assert all(value.isfinite() for value in scalars.values())
    scalars["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.backbone.backbone.parameters())
    for found in predict_torchvision(model.eval(), toy_split(2, 0, 64)):
        assert len(found["boxes"]) <= 300 and set(found["labels"].tolist()) <= {0, 1}
    seen, _ = model.transform(list(batch.images))
    assert seen.tensors.shape == (2, 3, 64, 64)  # neither resized nor padded


def test_default_boxes_of_ssd_have_the_sides_of_the_anchors() -> None:
    model = build_torchvision(replace(SMALL, architecture="ssd", size=224), 6)
    pairs = torch.stack(model.anchor_generator._wh_pairs) * 224  # (levels, 6, 2): two squares come first
    torch.testing.assert_close(pairs[:, :2, 0], sides_of(224, 3), atol=1e-3, rtol=0)
    assert pairs.shape == (3, 6, 2)


def test_numbers_of_faster_rcnn() -> None:
    model = build_torchvision(replace(TINY, anchors="default", hard_examples=0), 6)
    assert model.rpn._pre_nms_top_n == {"training": 500, "testing": 500}
    assert model.rpn._post_nms_top_n == {"training": 200, "testing": 200}
    assert {s.fg_bg_sampler.batch_size_per_image for s in (model.rpn, model.roi_heads)} == {64}
    assert model.roi_heads.box_roi_pool.featmap_names == ["0", "1", "2", "3"]
    assert model.roi_heads.box_head.fc6.out_features == 128
    assert model.rpn.head.cls_logits.out_channels == 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backbone": "v9"}, "unknown backbone 'v9': use resnet50 or one of v8t, v8n"),
        ({"anchors": "mine"}, "unknown anchors 'mine': use default or kmeans"),
        ({"anchors": "kmeans"}, "anchors by k-means depend on the training boxes: give them"),
        ({"backbone": "resnet50", "stride_4": True}, "are for faster_rcnn on a small backbone: leave them out"),
        ({"architecture": "fcos", "hard_examples": 8}, "are for faster_rcnn on a small backbone: leave them out"),
    ],
)
def test_what_cannot_be_built_is_named(changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_torchvision(replace(SMALL, **changes), 2)


# --- Hard examples ---------------------------------------------------------------------------------------------------


def test_the_hardest_regions_by_hand() -> None:
    """Two images of three and two regions, two classes; the two hardest of each count."""
    logits = torch.tensor([[0.0, 0], [2.0, 0], [0.0, 1], [0.0, 3], [0.0, 0]])
    labels = [torch.tensor([0, 0, 1]), torch.tensor([0, 1])]
    regression = torch.zeros(5, 8)
    regression[2, 4:] = torch.tensor([1.0, 0, 0, 0])  # off by 1 in its own class: 1 - 1/18
    regression[1, :] = 9.0  # background learns no box
    targets = [torch.zeros(3, 4), torch.zeros(2, 4)]
    of_each = [math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))]
    box = 1 - 1 / 18
    assert of_each[2] + box > of_each[0] > of_each[1]  # so the second region of the first image is left out
    classification, regressed = hardest_loss(logits, regression, labels, targets, 2)
    assert float(classification) == pytest.approx((of_each[0] + of_each[2] + of_each[3] + math.log(2)) / 4)
    assert float(regressed) == pytest.approx(box / 4)
    classification, regressed = hardest_loss(logits, regression, labels, targets, 1)
    assert float(classification) == pytest.approx((of_each[2] + of_each[3]) / 2)
    assert float(regressed) == pytest.approx(box / 2)


def test_all_regions_give_the_published_loss_and_few_give_few_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, regression = torch.randn(12, 4, generator=generator), torch.randn(12, 16, generator=generator)
    labels = [torch.randint(4, (n,), generator=generator) for n in (7, 5)]
    targets = [torch.randn(n, 4, generator=generator) for n in (7, 5)]
    wanted = fastrcnn_loss(logits, regression, labels, targets)
    for own, published in zip(hardest_loss(logits, regression, labels, targets, 100), wanted, strict=True):
        torch.testing.assert_close(own, published)
    logits.requires_grad_()
    sum(hardest_loss(logits, regression, labels, targets, 3)).backward()
    assert int((logits.grad.abs().sum(1) > 0).sum()) == 6


def test_hard_examples_are_looked_for_among_all_proposals() -> None:
    torch.manual_seed(0)
    model = build_torchvision(replace(SMALL, hard_examples=5), 2).train()
    heads = model.roi_heads
    assert isinstance(heads, HardExampleHeads)
    proposals = [torch.tensor([[0.0, 0, 9, 9]]).repeat(180, 1) + torch.arange(180)[:, None] / 9] * 2
    targets = [
        {"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    chosen, _, labels, _ = heads.select_training_samples(list(proposals), targets)
    assert [len(c) for c in chosen] == [181, 180]  # the true box is a proposal, too
    assert 0 < int((labels[0] == 1).sum()) < 181 and not labels[1].any()
    maps = {str(level): torch.rand(2, 64, side, side) for level, side in enumerate((8, 4, 2))}
    found, losses = heads(maps, list(proposals), [(64, 64)] * 2, targets)
    assert found == [] and set(losses) == {"loss_classifier", "loss_box_reg"}
    found, losses = heads.eval()(maps, list(proposals), [(64, 64)] * 2)
    assert len(found) == 2 and losses == {}


# --- Rows ------------------------------------------------------------------------------------------------------------


def with_many_sizes() -> DetectionData:
    """The toy set with thirty boxes of different sizes in training."""
    data = toy_data(counts=(10, 2, 2))
    generator = torch.Generator().manual_seed(1)
    sizes = 6 + 20 * torch.rand((*data.train.boxes.shape[:2], 2), generator=generator)
    boxes = torch.cat([data.train.boxes[..., :2], data.train.boxes[..., :2] + sizes], -1).clamp(max=64)
    return replace(data, train=replace(data.train, boxes=boxes, labels=torch.zeros_like(data.train.labels)))


def test_anchors_of_the_training_boxes() -> None:
    data = with_many_sizes()
    assert trained_anchors(SMALL, data) is None
    anchors = trained_anchors(replace(SMALL, anchors="kmeans"), data)
    assert anchors.shape == (3, 6, 2)  # as many as by default
    areas = anchors.prod(-1).flatten()
    assert (areas.diff() >= 0).all()  # the smallest on the finest level
    model = build_torchvision(replace(SMALL, anchors="kmeans"), 2, anchors)
    own = torch.stack(model.rpn.anchor_generator.cell_anchors)
    torch.testing.assert_close(own[..., 2:] - own[..., :2], anchors)
    few = replace(data.train, labels=data.train.labels.clone())
    few.labels[5:] = -1
    with pytest.raises(DataError, match="15 different box sizes cannot give 18 anchors"):
        trained_anchors(replace(SMALL, anchors="kmeans"), replace(data, train=few))


def test_all_three_means_from_end_to_end() -> None:
    data = with_many_sizes()
    first, again = (run_torchvision(TINY, 0, data, quiet()) for _ in range(2))
    assert {"loss", "loss_classifier", "loss_box_reg", "loss_objectness"} <= set(first.curve)
    assert first.predictions["anchors"].shape == (4, 6, 2)
    assert 0 < first.costs["parameters_m"] < 2 and first.precision == "fp32"
    assert first.curve == again.curve and all(torch.equal(v, again.model[k]) for k, v in first.model.items())


# --- By box size -----------------------------------------------------------------------------------------------------


def boxes_of(sides: list[float], scores: list[float] | None = None, label: int = 0) -> dict[str, torch.Tensor]:
    """Squares side by side from 0, 20, 40 ... on."""
    low = 20.0 * torch.arange(len(sides))[:, None] * torch.tensor([1.0, 0.0])
    found = {"boxes": torch.cat([low, low + torch.tensor(sides).view(-1, 1)], 1)}
    if scores is not None:
        found["scores"] = torch.tensor(scores)
    return found | {"labels": torch.full((len(sides),), label)}


def test_thirds_by_hand() -> None:
    assert third_edges(np.array([9.0, 1, 4, 16, 25, 36])).tolist() == [4, 16]
    assert third_edges(np.array([1.0, 2, 3, 4])).tolist() == [2, 3]
    assert third_edges(np.array([5.0, 5, 5, 9])).tolist() == [5, 5]  # of one area all belong to the smaller third
    assert third_edges(np.zeros(0)).shape == (0,)


def test_recall_by_box_size_by_hand() -> None:
    """Ten images, so one false box is allowed. Sides 2, 4, 6 in the first, 8, 10, 12 in the second image: two boxes a
    third. Found are 2, 6 and 10 at once, 12 only below the second false box."""
    truth = [boxes_of([2.0, 4, 6]), boxes_of([8.0, 10, 12])] + [boxes_of([])] * 8
    found = [boxes_of([2.0, 1, 6], [0.9, 0.8, 0.7]), boxes_of([1.0, 10, 12], [0.4, 0.6, 0.3])]
    found += [boxes_of([], [])] * 8
    arrays = pack(found, truth, [str(i) for i in range(10)], ("defect",))
    assert recall_statistic(arrays)(None) == pytest.approx(50)
    recall = {third: recall_statistic(arrays, third) for third in THIRDS}
    assert {third: value(None) for third, value in recall.items()} == pytest.approx(
        {"small": 50.0, "middle": 50.0, "large": 50.0}
    )
    weights = np.ones(10)
    weights[0], weights[9] = 0.0, 2.0  # without the first image: no small box, 8 is missed; now one false box is left
    assert math.isnan(recall["small"](weights))
    assert recall["middle"](weights) == 0 and recall["large"](weights) == 100
    with pytest.raises(ValueError, match="unknown third 'tiny': use small, middle, large or None"):
        recall_statistic(arrays, "tiny")


def test_a_box_takes_the_ground_truth_that_it_overlaps_most() -> None:
    """Two objects of one class lie in each other; the surer box takes the larger object, the other what is left."""
    truth = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [50, 0, 90, 40]]),
        "labels": torch.tensor([0, 0, 0]),
    }
    found = {
        "boxes": torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 10]]),
        "scores": torch.tensor([0.5, 0.9]),
        "labels": torch.tensor([0, 0]),
    }
    for kept, wanted in (([0, 1], (100.0, 100.0, 0.0)), ([0], (100.0, 0.0, 0.0)), ([1], (0.0, 100.0, 0.0))):
        arrays = pack([{k: v[kept] for k, v in found.items()}], [truth], ["0"], ("defect",))
        assert tuple(recall_statistic(arrays, third)(None) for third in THIRDS) == wanted


def test_thirds_make_up_the_whole() -> None:
    """On noise, with more predictions than count: boxes found in the three thirds are the boxes found."""
    generator = torch.Generator().manual_seed(0)

    def noise(count: int) -> dict[str, torch.Tensor]:
        low = 40 * torch.rand(count, 2, generator=generator)
        boxes = torch.cat([low, low + 10 + 20 * torch.rand(count, 2, generator=generator)], 1)
        return {"boxes": boxes, "labels": torch.randint(2, (count,), generator=generator)}

    truth = [noise(5) for _ in range(9)]
    found = [noise(260) | {"scores": 0.1 + 0.9 * torch.rand(260, generator=generator)} for _ in range(9)]
    for predicted, true in zip(found, truth, strict=True):  # some are exact and sure
        predicted["boxes"][:2], predicted["labels"][:2] = true["boxes"][:2], true["labels"][:2]
        predicted["scores"][:2] = 1.0
    arrays = pack(found, truth, [str(i) for i in range(9)], CLASSES)
    predictions, ground_truth, _, _ = unpack(arrays)
    matches = match(predictions, ground_truth, (0.5,), 2)
    assert len(matches.images) < 9 * 260 and matches.right.sum() > 18
    weights = np.arange(9.0)
    whole, parts = recall_statistic(arrays), [recall_statistic(arrays, third) for third in THIRDS]
    areas = [(t["boxes"][:, 2:] - t["boxes"][:, :2]).prod(1).double().numpy() for t in ground_truth]
    edges = third_edges(np.concatenate(areas))
    for given in (None, weights):
        w = np.ones(9) if given is None else given
        wanted = sum(np.bincount(np.searchsorted(edges, a), minlength=3) * x for a, x in zip(areas, w, strict=True))
        found_boxes = sum(part(given) * count for part, count in zip(parts, wanted, strict=True))
        assert found_boxes / wanted.sum() == pytest.approx(whole(given)) and 0 < whole(given) < 100


def test_an_image_without_boxes_has_infinite_targets_and_a_finite_loss() -> None:
    """torchvision encodes a true box of no size there: log 0."""
    logits, regression = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 12, requires_grad=True)
    targets = [torch.full((2, 4), -math.inf)]
    classification, box = hardest_loss(logits, regression, [torch.zeros(2, dtype=torch.int64)], targets, 2)
    (classification + box).backward()
    assert (float(box.detach()), float(regression.grad.abs().sum())) == (0.0, 0.0)
    assert float(classification.detach()) == pytest.approx(math.log(3)) and logits.grad.isfinite().all()
