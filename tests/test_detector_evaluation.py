"""Detection metrics against torchmetrics, against hand-worked cases and against literally repeated images."""

import io
import math

import numpy as np
import pytest
import torch

from defectlab.metrics import detection
from defectlab.metrics.detection import COCO_IOUS, average_precision, evaluate, match, pack, statistic, unpack

CLASSES = ("crazing", "inclusion", "patches", "pitted_surface")


def scene(seed=0, images=30, size=200, most=100, classes=4, skill=0.8):
    """Ground truth, and predictions like a detector's: duplicates, other classes, many unsure false alarms."""
    generator = np.random.default_rng(seed)
    predictions, ground_truth = [], []
    for _ in range(images):
        count = generator.integers(0, 6)
        corner, extent = generator.uniform(0, 0.6, (count, 2)), generator.uniform(0.06, 0.4, (count, 2))
        boxes = np.round(size * np.concatenate([corner, corner + extent], 1))
        labels = generator.integers(0, classes, count)
        hits = np.repeat(generator.random(count) < skill, 2)  # each found defect twice: the second is a duplicate
        near = boxes.repeat(2, 0)[hits] + generator.normal(0, 0.02 * size, (hits.sum(), 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        near_labels = np.where(generator.random(hits.sum()) < 0.9, labels.repeat(2)[hits], 0)
        free = most - len(near)
        corner = generator.uniform(0, 0.7, (free, 2))
        far = size * np.concatenate([corner, corner + generator.uniform(0.05, 0.3, (free, 2))], 1)
        scores = np.concatenate([generator.beta(4, 2, len(near)), generator.beta(0.5, 12, free)])
        order = np.argsort(-scores)
        predictions.append(
            {
                "boxes": torch.from_numpy(np.concatenate([near, far])[order].clip(0, size)).float(),
                "scores": torch.from_numpy(scores[order]).float(),
                "labels": torch.from_numpy(np.concatenate([near_labels, generator.integers(0, classes, free)])[order]),
            }
        )
        ground_truth.append({"boxes": torch.from_numpy(boxes).float(), "labels": torch.from_numpy(labels)})
    return predictions, ground_truth


def image(*boxes):
    """(x1, label[, score]) -> boxes of 100 x 100 at (x1, 0)."""
    columns = {
        "boxes": torch.tensor([[b[0], 0, b[0] + 100, 100] for b in boxes], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([b[1] for b in boxes], dtype=torch.int64),
    }
    if boxes and len(boxes[0]) == 3:
        columns["scores"] = torch.tensor([b[2] for b in boxes], dtype=torch.float32)
    return columns


NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}

# Shifted by d, a box of 100 x 100 has IoU (100 - d) / (100 + d): 0.90 at 5, 0.67 at 20, 0.43 at 40.
HAND = (
    [
        image((5, 0, 0.9), (40, 0, 0.8), (600, 0, 0.7)),  # right, duplicate (wrong), right
        image((20, 1, 0.6), (300, 0, 0.5)),  # right up to 0.65, false alarm
        NOTHING,  # a missed defect
    ],
    [image((0, 0), (600, 0)), image((0, 1)), image((0, 0))],
)


# --- Average precision -----------------------------------------------------------------------------------------------


def test_average_precision_by_hand():
    found = average_precision(match(*HAND, (0.5, 0.7)))
    # Class 0: right, wrong, right, wrong, of 3. Precision 1 up to recall 1/3, then 2/3 up to recall 2/3, then 0.
    class_0 = 100 * (34 * 1 + 33 * 2 / 3) / 101  # recall levels 0..0.33 and 0.34..0.66
    assert found == pytest.approx(np.array([[class_0, class_0], [100.0, 0.0]]))


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_torchmetrics_and_the_mean_is_over_classes_with_boxes(seed):
    predictions, ground_truth = scene(seed)
    for truth in ground_truth:  # no box of the last class is left
        keep = truth["labels"] < 3
        truth["boxes"], truth["labels"] = truth["boxes"][keep], truth["labels"][keep]
    metrics, per_class = evaluate(predictions, ground_truth, CLASSES)  # torchmetrics'
    own = average_precision(match(predictions, ground_truth, (0.33, *COCO_IOUS)))
    for label, name in enumerate(CLASSES[:3]):
        expected = {"map33": own[label, 0], "map50": own[label, 1], "map50_95": own[label, 1:].mean()}
        assert per_class[name] == pytest.approx(expected, abs=1e-3)
    assert all(math.isnan(value) for value in per_class[CLASSES[3]].values())
    for name in ("map33", "map50", "map50_95"):
        assert metrics[name] == pytest.approx(np.mean([per_class[c][name] for c in CLASSES[:3]]))
    assert 20 < metrics["map50_95"] < metrics["map50"] < metrics["map33"] < 100
    assert set(metrics) == {"map50", "map50_95", "map33", "f1_oracle"}


def test_evaluate_of_perfect_absent_and_needless_predictions():
    _, ground_truth = scene(4, images=8)
    perfect = [truth | {"scores": torch.ones(len(truth["labels"]))} for truth in ground_truth]
    metrics, _ = evaluate(perfect, ground_truth, CLASSES, threshold=0.5)
    assert metrics == pytest.approx(dict.fromkeys(metrics, 100.0), abs=1e-4)
    none, _ = evaluate([NOTHING] * 8, ground_truth, CLASSES, threshold=0.5)
    assert math.isnan(none.pop("precision_dev"))
    assert none == dict.fromkeys(none, 0.0)
    no_truth, per_class = evaluate(perfect, [NOTHING] * 8, CLASSES, threshold=0.5)
    assert all(math.isnan(v) for values in (no_truth, *per_class.values()) for v in values.values())


def test_only_the_first_hundred_of_a_class_count():
    many = image(*[(1000 + 200 * i, 0, 0.9 - 0.001 * i) for i in range(100)], (0, 0, 0.1))
    ground_truth = [image((0, 0))]
    assert average_precision(match([many], ground_truth, (0.5,)))[0, 0] == 0
    assert evaluate([many], ground_truth, CLASSES)[0]["map50"] == 0
    fewer = {name: values[1:] for name, values in many.items()}
    assert average_precision(match([fewer], ground_truth, (0.5,)))[0, 0] == pytest.approx(1.0)  # precision 1/100
    assert evaluate([fewer], ground_truth, CLASSES)[0]["map50"] == pytest.approx(1.0)


def test_weights_are_repeated_images():
    predictions, ground_truth = scene(5)
    ious = (0.33, 0.5, 0.75)
    matches = match(predictions, ground_truth, ious)
    generator = np.random.default_rng(0)
    for _ in range(3):
        weights = np.bincount(generator.integers(30, size=30), minlength=30)
        index = np.repeat(np.arange(30), weights)
        repeated = match([predictions[i] for i in index], [ground_truth[i] for i in index], ious, classes=4)
        assert average_precision(matches, weights) == pytest.approx(average_precision(repeated), abs=1e-9, nan_ok=True)
    assert np.isnan(average_precision(matches, np.zeros(30))).all()
    with pytest.raises(ValueError, match="weights must have shape"):
        average_precision(matches, np.ones(29))


# --- Thresholds ------------------------------------------------------------------------------------------------------


def test_scores_at_a_threshold_by_hand():
    metrics, _ = evaluate(*HAND, ("a", "b"), threshold=0.7)  # 3 kept, 2 right, 4 to be found
    assert metrics["precision_dev"] == pytest.approx(200 / 3)
    assert metrics["recall_dev"] == pytest.approx(50.0)
    assert metrics["f1_dev"] == pytest.approx(400 / 7)
    assert metrics["f1_oracle"] == pytest.approx(100 * 6 / 8)  # from 0.6 on: 4 kept, 3 right
    assert detection.best_f1_threshold(*HAND) == pytest.approx(0.6)
    # At IoU 0.95 and from 0.7 on only the third prediction is right.
    assert detection.best_f1_threshold(*HAND, iou=0.95) == pytest.approx(0.7)
    tied, _ = evaluate([image((0, 0, 0.5), (600, 0, 0.5))], [image((0, 0))], ("a",))
    assert tied["f1_oracle"] == 100 * 2 / 3  # equal scores stay together: cut between them, F1 would be 100


def test_best_threshold_gives_the_oracle_score_and_beats_all_others():
    predictions, ground_truth = scene(6)
    metrics, _ = evaluate(predictions, ground_truth, CLASSES, detection.best_f1_threshold(predictions, ground_truth))
    assert metrics["f1_dev"] == pytest.approx(metrics["f1_oracle"])
    for other in np.linspace(0, 1, 40):
        kept = [{name: v[p["scores"] >= other] for name, v in p.items()} for p in predictions]
        found = match(kept, ground_truth, (0.5,), classes=4)
        f1 = 200 * found.right.sum() / (len(found.scores) + found.ground_truth.sum())
        assert f1 <= metrics["f1_oracle"] + 1e-9


def test_nothing_to_choose_a_threshold_by():
    _, ground_truth = scene(6, images=3)
    assert detection.best_f1_threshold([NOTHING] * 3, ground_truth) == 1.0
    with pytest.raises(ValueError, match="no ground truth to choose"):
        detection.best_f1_threshold([NOTHING], [NOTHING])


# --- Matching, curve, confusion --------------------------------------------------------------------------------------


def test_matching_is_greedy_by_score_then_by_overlap():
    # The sure prediction lies between both true boxes and takes the nearer; the second must do with what is left.
    ground_truth = [image((0, 0), (50, 0))]
    predictions = [image((20, 0, 0.9), (0, 0, 0.8), (50, 0, 0.7), (50, 1, 0.6))]
    found = match(predictions, ground_truth, (0.33, 0.5))
    assert found.right.tolist() == [[True, True], [True, False], [False, True], [False, False]]
    assert found.ground_truth.tolist() == [[2, 0]]


def test_precision_recall_by_hand():
    found = detection.precision_recall(match(*HAND, (0.33, 0.5)), label=0, iou_index=1)
    recall, precision, scores = [1 / 3, 1 / 3, 2 / 3, 2 / 3], [1, 1 / 2, 2 / 3, 1 / 2], [0.9, 0.8, 0.7, 0.5]
    np.testing.assert_allclose(found, [recall, precision, scores], rtol=1e-6)


def test_confusion_by_hand():
    ground_truth = [image((0, 0), (300, 1), (600, 1))]
    predictions = [image((0, 1, 0.9), (310, 1, 0.8), (300, 0, 0.7), (900, 0, 0.6), (600, 1, 0.2))]
    # First box found with the wrong class; the second by the nearer of two; the third only below the threshold.
    matrix = detection.confusion_matrix(predictions, ground_truth, classes=2, threshold=0.5)
    assert matrix.tolist() == [[0, 1, 0], [1, 0, 1], [1, 1, 0]]


def test_examples():
    ground_truth = [image((0, 0), (300, 0)), image((0, 0)), NOTHING, image((0, 0)), image((0, 0), (300, 1))]
    predictions = [
        NOTHING,
        image((0, 0, 0.9), (900, 0, 0.1)),
        image((0, 1, 0.8)),
        image((0, 0, 0.95), (600, 0, 0.6)),
        image((0, 0, 0.7), (300, 1, 0.5)),
    ]
    assert detection.examples(predictions, ground_truth, count=4) == [
        (0, "2 of 2 missed"),
        (2, "false alarm at 0.80"),
        (3, "false alarm at 0.60"),
        (4, "all 2 found"),
        (1, "found"),
    ]
    assert [i for i, _ in detection.examples(predictions, ground_truth, count=1)] == [0, 2, 4]
    cases = detection.examples(*scene(8))
    assert len({i for i, _ in cases}) == len(cases) >= 8


# --- What a record keeps ---------------------------------------------------------------------------------------------


LARGE = (*scene(9, images=360), [f"crazing_{i}" for i in range(360)])


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "run.npz"
    np.savez_compressed(path, **pack(*LARGE, CLASSES))
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def test_packed_boxes_give_the_same_metrics(arrays):
    predictions, ground_truth, names, class_names = unpack(arrays)
    assert (names, class_names) == (LARGE[2], CLASSES)
    for whole, back in zip(LARGE[1], ground_truth, strict=True):
        assert torch.equal(whole["boxes"], back["boxes"])
        assert torch.equal(whole["labels"], back["labels"])
    assert sum(len(p["scores"]) for p in predictions) == 12_000
    for whole, back in zip(LARGE[0], predictions, strict=True):
        kept = len(back["scores"])  # the surest of the image, in their order
        assert torch.equal(back["labels"], whole["labels"][:kept])
        assert torch.allclose(back["boxes"], whole["boxes"][:kept], atol=0.0017)  # 200 px / 65535 / 2
        assert torch.allclose(back["scores"], whole["scores"][:kept], atol=2.5e-4)
    before, _ = evaluate(LARGE[0], LARGE[1], CLASSES, threshold=0.3)
    after, _ = evaluate(predictions, ground_truth, CLASSES, threshold=0.3)
    assert after == pytest.approx(before, abs=0.3)


def test_packed_arrays_of_500_images_are_small():
    names = [f"group00041/{i:08d}" for i in range(500)]
    packed = io.BytesIO()
    np.savez_compressed(packed, **pack(*scene(10, images=500, size=640, classes=6), names, list("abcdef")))
    assert packed.tell() < 200_000


def test_packing_nothing():
    predictions, ground_truth, names, class_names = unpack(pack([NOTHING], [image((0, 1))], ["a"], ["x", "y"]))
    assert [len(p["boxes"]) for p in predictions] == [0]
    assert (ground_truth[0]["labels"].tolist(), names, class_names) == ([1], ["a"], ("x", "y"))


def test_statistic_is_the_metric_and_follows_the_weights(arrays):
    predictions, ground_truth, *_ = unpack(arrays)
    ones = np.ones(360, dtype=np.int64)
    metrics, per_class = evaluate(predictions, ground_truth, CLASSES)
    for metric in ("map50", "map50_95", "map33"):
        assert statistic(arrays, metric)(ones) == pytest.approx(metrics[metric], abs=1e-3)
    two = ("patches", "crazing")
    expected = np.mean([per_class[c]["map50"] for c in two])
    assert statistic(arrays, "map50", two)(ones) == pytest.approx(expected, abs=1e-3)
    half = np.r_[np.full(180, 2), np.zeros(180, dtype=np.int64)]
    alone, _ = evaluate(predictions[:180], ground_truth[:180], CLASSES)
    assert statistic(arrays, "map50")(half) == pytest.approx(alone["map50"], abs=0.1)  # float16 scores: ties
    assert math.isnan(statistic(arrays, "map50")(0 * ones))
    for wrong, why in ((("recall",), "no average precision is called 'recall'"), (("map50", ["spur"]), "no class")):
        with pytest.raises(ValueError, match=why):
            statistic(arrays, *wrong)


INSIDE_OUT = [{"boxes": torch.tensor([[5.0, 0, 3, 9]]), "labels": torch.zeros(1, dtype=torch.int64)}]
NO_SCORE = [{**image((0, 0)), "scores": torch.tensor([math.nan])}]


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: match([NOTHING], [NOTHING] * 2, (0.5,)), "predictions of 1 images and ground truth of 2"),
        (lambda: match([], [], (0.5,)), "no images"),
        (lambda: match([NOTHING], INSIDE_OUT, (0.5,)), "x1 <= x2"),
        (lambda: match(NO_SCORE, [image((0, 0))], (0.5,)), "NaN"),
        (lambda: evaluate([NOTHING], [image((0, 2))], ("a", "b")), r"labels must lie in 0\.\.1"),
        (lambda: pack([NOTHING], [NOTHING], ["a", "b"], CLASSES), "2 names for 1 images"),
    ],
)
def test_contradictions_are_named(call, why):
    with pytest.raises(ValueError, match=why):
        call()
