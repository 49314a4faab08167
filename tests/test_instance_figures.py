"""Figures of instances drawn from small records and splits: what they show, not only that they run."""

import numpy as np
import pytest
import torch
from figure_helpers import drawn, rectangles
from matplotlib.colors import to_rgb

from defectlab.data.instances import load_instances
from defectlab.figures import instances as figures
from defectlab.figures.detection import CLASS_COLOURS
from defectlab.metrics.detection import pack
from defectlab.runs import Record

CLASSES = ("inclusion", "patches", "scratches")
TRUTHS = [
    {"boxes": torch.tensor([[0.0, 0, 40, 40], [60, 60, 100, 80]]), "labels": torch.tensor([0, 2])},
    {"boxes": torch.tensor([[20.0, 40, 80, 90]]), "labels": torch.tensor([1])},
]
PREDICTIONS = [  # right, and below the threshold; a false alarm and right
    {
        "boxes": torch.tensor([[0.0, 0, 40, 38], [60, 60, 100, 80]]),
        "scores": torch.tensor([0.9, 0.25]),
        "labels": torch.tensor([0, 2]),
    },
    {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 40, 80, 90]]),
        "scores": torch.tensor([0.75, 0.5]),
        "labels": torch.tensor([0, 1]),
    },
]


@pytest.fixture
def record(tmp_path):
    """Two pictures of 100 px, kept at 50 px with an offset of 2, 4: the truth covers 20 x 20 px, of which half was
    found as the same class; in the other nothing is marked."""
    arrays = pack(PREDICTIONS, TRUTHS, ["test/a_1.jpg", "test/b_2.jpg"], CLASSES)
    true, found = np.zeros((2, 2, 56, 56), dtype=np.uint8)
    true[0, 4:24, 2:22] = 1
    found[0, 4:24, 2:12] = 1
    arrays |= {
        "case_index": np.array([1, 0]),
        "case_why": np.array(["false alarm at 0.75", "1 of 2 missed"]),
        "case_images": np.full((2, 56, 56), 90, dtype=np.uint8),
        "case_scale": np.array([0.5, 0.5], dtype=np.float32),
        "case_offset": np.array([[2.0, 4.0]] * 2, dtype=np.float32),
        "case_true": true[::-1],
        "case_found": found[::-1],
    }
    np.savez_compressed(tmp_path / "run.npz", **arrays)
    return Record({"dev": {"threshold": 0.5}}, tmp_path / "run.json")


def test_painted_mixes_the_colour_of_the_class_and_leaves_the_rest():
    picture = np.array([[100, 100, 0]], dtype=np.uint8)
    result = figures.painted(picture, np.array([[0, 2, 3]], dtype=np.uint8), strength=0.25)
    assert result.dtype == np.uint8 and result[0, 0].tolist() == [100] * 3
    for column, ground, label in ((1, 100, 1), (2, 0, 2)):
        colour = 255 * np.array(to_rgb(CLASS_COLOURS[label]))
        np.testing.assert_allclose(result[0, column], 0.75 * ground + 0.25 * colour, atol=0.51)
    coloured = np.repeat(picture[..., None], 3, -1)
    assert (figures.painted(coloured, np.array([[0, 2, 3]]), 0.25) == result).all()


def test_class_map_reads_padding_and_background_as_background():
    numbers = torch.tensor([[0, 1, 2], [3, 2, 0]], dtype=torch.uint8)
    assert figures.class_map(numbers, torch.tensor([2, 0, -1])).tolist() == [[0, 3, 1], [0, 1, 0]]


def test_a_split_is_shown_with_its_instances(tmp_path):
    data = load_instances("synthetic_steel_masks", 48, root=tmp_path)
    shown = figures.from_split(data.test, [0, 5])
    for one, index in zip(shown, (0, 5), strict=True):
        count = int((data.test.labels[index] >= 0).sum())
        assert one.picture.shape == one.classes.shape == (48, 48) and len(one.boxes["labels"]) == count > 0
        assert set(np.unique(one.classes)) == {0} | {int(label) + 1 for label in one.boxes["labels"]}
    figure = figures.overlaid(shown, ["a", "b"], data.class_names, columns=2, captions=["c", "d"])
    axes = drawn(figure)
    assert [len(rectangles(axis)) for axis in axes] == [len(one.boxes["labels"]) for one in shown]
    assert [axis.get_xlabel() for axis in axes] == ["c", "d"]
    assert [text.get_text() for text in figure.legends[0].texts] == list(CLASSES)


def test_boxes_of_a_case_lie_on_its_small_picture_and_weak_ones_are_left_out(record):
    (first_true, first_found), (second_true, second_found) = figures.from_record(record)
    assert first_true.boxes["boxes"].tolist() == [[12, 24, 42, 49]] and "scores" not in first_true.boxes
    assert first_found.boxes["scores"].tolist() == [0.75, 0.5]  # 0.5 is the threshold itself
    assert len(second_true.boxes["labels"]) == 2 and second_found.boxes["labels"].tolist() == [0]


def test_truth_beside_prediction(record):
    axes = drawn(figures.truth_and_prediction(record, pairs=2))
    assert [axis.get_title() for axis in axes] == ["b_2", "predicted", "a_1", "predicted"]
    captions = ["false alarm at 0.75", "nothing found", "1 of 2 missed", "pixels: IoU 0.50"]
    assert [axis.get_xlabel() for axis in axes] == captions
    assert [len(rectangles(axis)) for axis in axes] == [1, 2, 2, 1]
    assert [text.get_text() for text in axes[1].texts] == ["0.50", "0.75"]  # the surest is drawn last


def test_the_first_cases_of_each_kind(record, tmp_path):
    why = ["3 of 3 missed", "1 of 2 missed", "false alarm at 0.75", "false alarm at 0.60", "all 2 found", "found"]
    arrays = {k: np.resize(v, (6, *v.shape[1:])) if k.startswith("case") else v for k, v in record.arrays.items()}
    np.savez_compressed(tmp_path / "run.npz", **(arrays | {"case_why": np.array(why)}))
    axes = drawn(figures.truth_and_prediction(record, each=1))
    assert [axis.get_xlabel() for axis in axes[::2]] == [why[0], why[2], why[4]]
    assert len(drawn(figures.truth_and_prediction(record, each=2))) == 12


def test_pixel_iou_counts_the_same_class_alone():
    truth, found = np.array([[1, 1, 2, 0]]), np.array([[1, 2, 2, 3]])
    assert figures.pixel_iou(truth, found) == 0.5
    assert np.isnan(figures.pixel_iou(truth * 0, found * 0))


def test_assembled_masks_are_the_sum_cut_to_the_box():
    prototypes = torch.zeros(3, 4, 4)
    prototypes[0, :, :2], prototypes[1, :, 2:], prototypes[2] = 4.0, 4.0, 1e-3
    weights = torch.tensor([[0.5, -0.5, 0.1]])
    box = torch.tensor([[0.0, 1, 4, 3]])
    axes = drawn(figures.assembled(prototypes, weights, box, ["one"], most=2))
    assert [axis.get_title() for axis in axes] == ["+0.50 × P1", "−0.50 × P2", "sum of all", "sigmoid", "mask"]
    mask = np.asarray(axes[-1].images[0].get_array())
    assert mask.tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert axes[0].get_ylabel() == "one"
    picture = np.zeros((16, 16), dtype=np.uint8)
    assert len(drawn(figures.assembled(prototypes, weights, box, ["one"], picture, most=9))) == 1 + 3 + 3


def test_threshold_curves_and_their_dots(record):
    precision, recall = drawn(figures.threshold_curves({"row": record}))
    line, dot = precision.lines
    np.testing.assert_allclose(line.get_xdata(), [0.9, 0.75, 0.5, 0.25], atol=1e-3)
    np.testing.assert_allclose(line.get_ydata(), [100, 50, 200 / 3, 75])
    assert dot.get_xdata() == [0.5] and dot.get_ydata() == pytest.approx([200 / 3])
    np.testing.assert_allclose(recall.lines[0].get_ydata(), [100 / 3, 100 / 3, 200 / 3, 100])


def test_nothing_yet_and_nothing_found(record, tmp_path):
    for empty in (figures.truth_and_prediction(None), figures.overlaid([], [], CLASSES), figures.threshold_curves({})):
        assert "no finished run" in empty.texts[0].get_text()
    nothing = [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}] * 2
    np.savez_compressed(tmp_path / "run.npz", **(record.arrays | pack(nothing, TRUTHS, ["a", "b"], CLASSES)))
    record = Record({"dev": {"threshold": 1.0}}, tmp_path / "run.json")
    assert "predicts" in figures.threshold_curves({"row": record}).texts[0].get_text()
    assert [len(rectangles(axis)) for axis in drawn(figures.truth_and_prediction(record))[:4]] == [1, 0, 2, 0]
