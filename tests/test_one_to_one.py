"""One box for each object: two heads and where their gradients end, the single anchor, duplicates, rows as they run."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_detector_learns import TOY
from test_yolo_dcf_runs import differing
from toy_detection import SHORT, equal, lively, toy_data
from toy_runs import quiet, recorded, runs_of

from defectlab import runs
from defectlab.metrics.detection import pack
from defectlab.metrics.per_image import duplicates, recall_statistic
from defectlab.networks.yolo.decode import suppress
from defectlab.networks.yolo.losses import AnchorFreeLoss
from defectlab.networks.yolo.model import Detector
from defectlab.networks.yolo.one_to_one import OneToOneLoss, OneToOneSettings, build
from defectlab.runs import Record
from defectlab.studies import v8_v10
from defectlab.training.cost_rows import AnswerCostSettings, Answered
from defectlab.training.detection import run_detector
from defectlab.training.one_to_one import (
    NOTHING,
    OtherEndSettings,
    evaluated,
    run_one_to_one,
    run_other_end,
    unsuppressed,
)

BOTH = v8_v10.one_to_one(SHORT)


# --- Heads -----------------------------------------------------------------------------------------------------------


def test_two_heads_train_and_the_second_one_answers() -> None:
    torch.manual_seed(0)
    detector = build(BOTH, 2)
    images = torch.rand(2, 3, 64, 64)
    raw = detector.train()(images)
    assert [level.shape[-1] for level in raw] == [8, 4, 2, 8, 4, 2]
    for many, one in zip(raw[:3], raw[3:], strict=True):  # the second starts as a copy of the first
        assert torch.equal(many, one)
    torch.nn.init.normal_(detector.one.classes[0][-1].weight)
    answered, other = lively(detector)(images), detector.many()
    assert len(answered) == 3 and not other.training and type(other) is Detector
    assert not torch.equal(answered[0][:, 64:], other(images)[0][:, 64:])
    assert equal(other.head, detector.head) and equal(other.neck, detector.neck)


@pytest.mark.parametrize("detached", [True, False])
def test_where_the_gradient_of_the_second_head_ends(detached: bool) -> None:
    torch.manual_seed(0)
    detector = build(replace(BOTH, detached=detached), 2).train()
    sum(level.square().mean() for level in detector(torch.rand(2, 3, 64, 64))[3:]).backward()
    assert all(p.grad is not None for p in detector.one.parameters())
    assert all(p.grad is None for p in detector.head.parameters())
    shared = [*detector.backbone.parameters(), *detector.neck.parameters()]
    assert all((p.grad is None) is detached for p in shared)


def test_what_cannot_be_built() -> None:
    for changes in ({"family": "v5"}, {"heads": "two"}):
        with pytest.raises(ValueError, match="use v8, and both or one"):
            build(replace(BOTH, **changes), 2)
    assert type(build(replace(BOTH, heads="one"), 2)) is Detector


# --- Loss ------------------------------------------------------------------------------------------------------------

TRUE_BOXES = torch.tensor([[[4.0, 4, 40, 40], [30, 30, 60, 62]], [[10, 10, 50, 60], [0, 0, 0, 0]]])
LABELS = torch.tensor([[0, 1], [1, -1]])


def test_an_object_has_one_anchor_and_it_is_the_best_of_the_many() -> None:
    """The consistent metric of the paper: the second head's anchor is the one of the first's largest target."""
    torch.manual_seed(0)
    raw = lively(Detector("v8", "t", 2))(torch.rand(2, 3, 64, 64))
    many = AnchorFreeLoss(2).assigned(raw, TRUE_BOXES, LABELS)
    one = OneToOneLoss(BOTH, 2).one.assigned(raw, TRUE_BOXES, LABELS)
    assert one.foreground.sum(1).tolist() == [2, 1] and (many.foreground.sum(1) > 2 * one.foreground.sum(1)).all()
    assert not (one.foreground & ~many.foreground).any()
    for image, number in ((0, 0), (0, 1), (1, 0)):
        of_many = many.target_scores[image].sum(-1) * (many.foreground & (many.ground_truth == number))[image]
        of_one = one.target_scores[image].sum(-1) * (one.foreground & (one.ground_truth == number))[image]
        assert of_many.argmax() == of_one.argmax() and of_one.max() == pytest.approx(float(of_many.max()))


def test_other_exponents_choose_other_anchors() -> None:
    torch.manual_seed(1)
    sides = [torch.randn(1, 64 + 2, side, side) * 3 for side in (8, 4, 2)]
    box, label = torch.tensor([[[0.0, 0, 64, 64]]]), torch.tensor([[0]])
    chosen = {
        beta: int(
            OneToOneLoss(replace(BOTH, beta=beta), 2).one.assigned(sides, box, label).foreground[0].int().argmax()
        )
        for beta in (6.0, 0.01)
    }
    assert chosen[6.0] != chosen[0.01]
    best_score = torch.cat([level[0, 64].flatten() for level in sides]).argmax()
    assert chosen[0.01] == best_score  # then the score decides alone, for a box that overlaps


def test_the_loss_is_that_of_both_heads() -> None:
    torch.manual_seed(0)
    detector = build(BOTH, 2).train()
    raw = detector(torch.rand(2, 3, 64, 64))
    found = OneToOneLoss(BOTH, 2)(raw, TRUE_BOXES, LABELS)
    many = AnchorFreeLoss(2)(raw[:3], TRUE_BOXES, LABELS)
    one = AnchorFreeLoss(2, topk=1)(raw[3:], TRUE_BOXES, LABELS)
    assert found["loss"].item() == pytest.approx(many["loss"].item() + one["loss"].item(), rel=1e-6)
    assert found["box"].item() == many["box"].item() and found["one_box"].item() == one["box"].item()
    alone = OneToOneLoss(replace(BOTH, heads="one"), 2)(raw[3:], TRUE_BOXES, LABELS)
    assert set(alone) == {"loss", "one_box", "one_cls", "one_dfl"} and alone["loss"].item() == one["loss"].item()


# --- Boxes that are not suppressed -----------------------------------------------------------------------------------


def test_no_box_is_suppressed_not_even_a_copy() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9]]])
    scores = torch.tensor([[[0.9], [0.8], [0.7]]])
    kept = [len(suppress(boxes, scores, 0.001, iou, 300)[0].scores) for iou in (0.7, NOTHING)]
    assert kept == [1, 3]


def test_duplicates_by_hand() -> None:
    """Two objects: one has three boxes, one of a low score; one has none. A box of the wrong class counts for none."""
    truth = [{"boxes": torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]), "labels": torch.tensor([0, 1])}]
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 9, 10], [50, 50, 60, 60], [0, 0, 10, 3]])
    found = {"boxes": boxes, "scores": torch.tensor([0.9, 0.5, 0.1, 0.8, 0.9]), "labels": torch.tensor([0, 0, 0, 0, 0])}
    assert duplicates([found], truth) == {"duplicates": 1.0, "duplicates_all": 2.0}
    found["labels"][3] = 1  # then both objects are found, and the extra boxes are shared out
    assert duplicates([found], truth) == {"duplicates": 0.5, "duplicates_all": 1.0}
    nothing = {name: values[:0] for name, values in found.items()}
    assert all(math.isnan(value) for value in duplicates([nothing], truth).values())


def test_recall_at_a_tenth_of_a_false_box_by_hand() -> None:
    """Ten images, so one false box is allowed; three objects, found at 0.9, 0.7 and 0.5, false boxes at 0.8 and 0.6."""
    place = torch.tensor([[0.0, 0, 10, 10]])
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    truth = [{"boxes": place, "labels": torch.tensor([0])}] * 3 + [empty] * 7
    scores = [[0.9], [0.7], [0.5], [0.8], [0.6]] + [[]] * 5
    found = [
        {"boxes": place.repeat(len(s), 1), "scores": torch.tensor(s), "labels": torch.zeros(len(s), dtype=torch.long)}
        for s in scores
    ]
    recall = recall_statistic(pack(found, truth, [str(i) for i in range(10)], ("defect",)))
    assert recall(None) == pytest.approx(100 * 2 / 3)
    weights = np.ones(10)
    weights[3] = 2  # the first false box counts twice among eleven: only what is surer than it counts
    assert recall(weights) == pytest.approx(100 / 3)
    assert math.isnan(recall(np.array([0.0] * 3 + [1.0] * 7)))
    for at, score in ((0, 0.6), (1, 0.6)):  # as sure as the second false box, which no score keeps apart from it
        found[at] |= {"scores": torch.tensor([score])}
    assert recall_statistic(pack(found, truth, [str(i) for i in range(10)], ("defect",)))(None) == 0


# --- Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", runs.PROFILES)
def test_rows(profile: str) -> None:
    rows = {name: row.settings for name, row in v8_v10.STUDY.rows[profile].items()}
    on_each = ["many", "many_unsuppressed", "one", "both", "both_suppressed", "both_many"]
    attention = ["se", "cbam", "many_no_mosaic", "se_no_mosaic", "cbam_no_mosaic"]
    sizes = [f"{family}{scale}_{size}" for family, scale, size in v8_v10.SIZES + v8_v10.LARGE]
    of_sizes = [name for size in sizes for name in (size, f"cost_{size}")]
    on_both = [*on_each, "inconsistent", "attached", *attention, *(f"board_{name}" for name in on_each)]
    answers = ["cost_no_nms", "cost_nms_11", "cost_nms_440", "cost_nms_3000"]
    assert list(rows) == on_both + of_sizes + answers
    for size in sizes:
        cost, trained = rows[f"cost_{size}"], rows[size]
        assert {
            differ for differ in ("family", "scale", "size") if getattr(cost, differ) != getattr(trained, differ)
        } == set()
        assert differing(trained, rows["many"]) <= {"family", "scale", "size"}
    own = {"heads", "alpha", "beta", "detached"}
    for start in ("", "board_"):
        many, one, both = (rows[start + name] for name in ("many", "one", "both"))
        assert differing(many, both) == own and differing(one, both) == {"heads"}
        assert rows[f"{start}both_many"] == OtherEndSettings(both, "many", True)
        assert rows[f"{start}both_suppressed"] == OtherEndSettings(both, "one", True)
        assert rows[f"{start}many_unsuppressed"] == OtherEndSettings(many, "many", False)
    assert differing(rows["inconsistent"], rows["both"]) == {"beta"}
    assert differing(rows["attached"], rows["both"]) == {"detached"}
    of_paper = {"fusion", "block", "teacher_scale", "teacher_seed", "relation", "channel", "temperature", "grid"}
    for kind in ("se", "cbam"):
        assert rows[kind].fusion == kind and rows[kind].block == "plain"
        assert differing(rows[kind], rows["many"]) - of_paper <= {"epochs"} and rows[kind].epochs <= rows["many"].epochs
        assert differing(rows[kind], rows[f"{kind}_no_mosaic"]) == {"mosaic", "close_mosaic"}


def test_as_many_boxes_as_asked_enter_suppression() -> None:
    """What is timed: no more than 300 boxes leave, all that enter count, and without NMS the best 300 are taken."""
    image = torch.rand(1, 3, 64, 64)  # 84 cells, 504 pairs of cell and class
    for entering, leaving in ((0, 300), (5, 5), (504, 300)):
        answered = Answered(AnswerCostSettings(scale="t", size=64, suppressed=entering)).eval()
        with torch.inference_mode():
            boxes, scores, labels = answered(image)
        assert boxes.reshape(-1, 4).shape[0] == scores.numel() == labels.numel() <= leaving
        assert scores.numel() >= 0.9 * leaving or entering == 504  # the drawn boxes hardly overlap
        assert int((answered.scores > 0.001).sum()) == entering
    with pytest.raises(ValueError, match="505 boxes: the head has 504"):
        Answered(AnswerCostSettings(scale="t", size=64, suppressed=505))


RUNS = {OneToOneSettings: run_one_to_one, OtherEndSettings: run_other_end}


@pytest.fixture
def run_row(root: Path) -> Callable[..., Record]:
    data = toy_data()
    return runs_of(lambda settings: RUNS.get(type(settings), run_detector), lambda settings, device: data)


def test_another_end_is_of_the_network_that_was_trained(run_row: Callable[..., Record], root: Path) -> None:
    both = replace(BOTH, epochs=1, close_mosaic=0)
    record = run_row(OtherEndSettings(both, "many", True), 3)
    kept = recorded(root)
    assert {one["model"] for one in kept.values()} == {"one_to_one", "other_end"}
    trained = next(one for one in kept.values() if one["model"] == "one_to_one")
    assert trained["seed"] == 3 and record.notes["of"] == trained["key"]
    assert {"loss", "cls", "one_cls", "dev_map50"} <= trained["curve"].keys()
    again = run_row(OtherEndSettings(both, "one", False), 3)  # the head that answers, as its own row evaluates it
    assert again.metrics == trained["metrics"]
    assert len(recorded(root)) == 3


def test_a_toy_set_is_learnt_and_its_objects_have_one_box() -> None:
    """Seeds 0 to 2, measured once on one thread. Of the head that answers, not suppressed: mAP50 99.1, 98.7, 99.8,
    boxes too many at score 0.25: 0.26, 0.16, 0.13. Of the other head, not suppressed: 92.9, 91.4, 90.7 and 3.5, 3.6,
    3.6."""
    data, both = toy_data(96, (64, 2, 48)), v8_v10.one_to_one(TOY)
    result = run_one_to_one(both, 0, data, quiet())
    detector = build(both, 2)
    detector.load_state_dict(result.model)
    many = evaluated(detector.many().eval(), data, unsuppressed).metrics
    assert result.metrics["map50"] > max(95, many["map50"])
    assert result.metrics["duplicates"] < 1 < 2 < many["duplicates"]
    assert 1 < result.metrics["candidates"] < many["candidates"] < many["candidates_all"] <= 2 * 189  # 189 cells
