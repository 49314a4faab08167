"""Detection figures drawn from small records: what they show, not only that they run."""

import numpy as np
import pytest
import torch
from figure_helpers import drawn, rectangles
from matplotlib.colors import to_hex

from defectlab.figures import detection as figures
from defectlab.metrics.detection import pack
from defectlab.runs import Record

CLASSES = ("crazing", "patches")
TRUTHS = [
    {"boxes": torch.tensor([[10.0, 10, 50, 50], [100, 100, 160, 180]]), "labels": torch.tensor([0, 1])},
    {"boxes": torch.tensor([[20.0, 40, 80, 90]]), "labels": torch.tensor([1])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]
PREDICTIONS = [  # right, and below any threshold; right, and a false alarm; a false alarm
    {
        "boxes": torch.tensor([[12.0, 10, 50, 50], [100, 100, 160, 180]]),
        "scores": torch.tensor([0.9, 0.1]),
        "labels": torch.tensor([0, 1]),
    },
    {
        "boxes": torch.tensor([[20.0, 40, 80, 90], [150, 10, 190, 60]]),
        "scores": torch.tensor([0.8, 0.7]),
        "labels": torch.tensor([1, 0]),
    },
    {"boxes": torch.tensor([[5.0, 150, 60, 190]]), "scores": torch.tensor([0.6]), "labels": torch.tensor([0])},
]
PICTURES = [np.full((200, 200), 90, dtype=np.uint8), np.full((200, 200, 3), 120, dtype=np.uint8)]


def record(folder, seed=0, lift=0.0, curve=None):
    arrays = pack(PREDICTIONS, TRUTHS, ["group1/a", "group1/b", "group1/c"], CLASSES)
    arrays |= {
        "case_index": np.array([1, 0]),
        "case_why": np.array(["false alarm at 0.70", "1 of 2 missed"]),
        "case_images": np.stack([PICTURES[0][:100, :100]] * 2),
        "case_scale": np.array([0.5, 0.25], dtype=np.float32),
        "case_offset": np.array([[0.0, 0.0], [7.0, 3.0]], dtype=np.float32),
    }
    path = folder / f"run{seed}.npz"
    np.savez_compressed(path, **arrays)
    metrics = {f"map50_blur_{step}": 80.0 + lift - 5 * step for step in range(4)}
    metrics |= {f"map50_noise_{step}": 80.0 + lift - 10 * step for step in range(3)}
    per_class = {"crazing": {"map50": 40.0 + lift, "map50_95": 20.0}, "patches": {"map50": 90.0 + lift}}
    content = {"metrics": metrics, "per_class": per_class, "curve": curve or {}, "dev": {"threshold": 0.5}}
    return Record(content, path.with_suffix(".json"))


@pytest.fixture
def of_seeds(tmp_path):
    return [record(tmp_path, 0), record(tmp_path, 1, lift=4.0)]


def sides(patch):
    (x, y), width, height = patch.get_xy(), patch.get_width(), patch.get_height()
    return pytest.approx((x, y, x + width, y + height), abs=0.02)


def texts(axis):
    return [text.get_text() for text in axis.texts]


# --- Boxes -----------------------------------------------------------------------------------------------------------


def test_boxed_shows_truths_and_the_predictions_above_the_threshold():
    figure = figures.boxed(PICTURES, TRUTHS[:2], PREDICTIONS[:2], ["first", "second"], CLASSES, columns=3)
    first, second, empty = drawn(figure)
    assert [axis.get_title() for axis in (first, second, empty)] == ["first", "second", ""]
    assert len(empty.images) == 0
    boxes = rectangles(first)
    assert [to_hex(patch.get_edgecolor()) for patch in boxes] == ["#ffffff", "#ffffff", figures.CLASS_COLOURS[0]]
    assert sides(boxes[0]) == (10, 10, 50, 50)
    assert sides(boxes[2]) == (12, 10, 50, 50)
    assert texts(first) == ["patches", "crazing 0.90"]  # the truth that was missed has its name
    assert texts(second) == ["crazing 0.70", "patches 0.80"]  # the surest last, on top
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["truth", "crazing", "patches"]


def test_boxed_gives_truths_alone_the_colour_of_their_class():
    figure = figures.boxed(PICTURES[:1], truths=TRUTHS[:1], class_names=CLASSES, columns=1)
    (axis,) = drawn(figure)
    assert [to_hex(patch.get_edgecolor()) for patch in rectangles(axis)] == [
        figures.CLASS_COLOURS[1],
        figures.CLASS_COLOURS[0],
    ]
    assert sorted(texts(axis)) == ["crazing", "patches"]


def test_boxed_pictures_without_boxes_or_without_pictures():
    (axis,) = drawn(figures.boxed(PICTURES[:1], columns=1))
    assert (len(axis.images), len(axis.patches)) == (1, 0)
    assert "no finished run yet" in figures.boxed([]).texts[0].get_text()


def test_tags_stay_within_the_picture():
    near_edges = [
        {
            "boxes": torch.tensor([[170.0, 0, 199, 30], [0, 170, 20, 199]]),
            "scores": torch.tensor([0.9, 0.8]),
            "labels": torch.tensor([1, 0]),
        }
    ]
    figure = figures.boxed(PICTURES[:1], predictions=near_edges, class_names=CLASSES, columns=1, width=3)
    (axis,) = drawn(figure)
    frame = axis.get_window_extent()
    for text in axis.texts:
        place = text.get_window_extent()
        assert frame.x0 <= place.x0 + 1 and place.x1 <= frame.x1 + 1
        assert frame.y0 <= place.y0 + 1 and place.y1 <= frame.y1 + 1


def test_worst_cases_are_drawn_in_pixels_of_the_small_picture(tmp_path):
    first, second = drawn(figures.worst_cases(record(tmp_path), columns=2))
    assert [axis.get_title() for axis in (first, second)] == ["b\nfalse alarm at 0.70", "a\n1 of 2 missed"]
    assert sides(rectangles(first)[0]) == (10, 20, 40, 45)
    truth, _, prediction = rectangles(second)  # * 0.25, then 7 to the right and 3 down
    assert sides(truth) == (9.5, 5.5, 19.5, 15.5)
    assert sides(prediction) == (10, 5.5, 19.5, 15.5)


# --- Curves and counts -----------------------------------------------------------------------------------------------


def test_precision_recall_has_a_panel_a_class_and_a_line_a_record(of_seeds):
    figure = figures.precision_recall_curves({"plain": of_seeds[0], "fused": of_seeds[1]})
    axes = drawn(figure)
    assert [axis.get_title() for axis in axes] == list(CLASSES)
    assert [len(axis.lines) for axis in axes] == [2, 2]
    # crazing: right at 0.9, then two false alarms; patches: both found, at full precision.
    assert axes[0].lines[0].get_xdata() == pytest.approx([1, 1, 1])
    assert axes[0].lines[0].get_ydata() == pytest.approx([1, 1 / 2, 1 / 3])
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["plain  100.0", "fused  100.0"]


def test_precision_recall_follows_the_iou(of_seeds):
    axes = drawn(figures.precision_recall_curves({"plain": of_seeds[0]}, iou=0.97))
    assert axes[0].get_legend().get_texts()[0].get_text() == "plain  0.0"  # the crazing box is 2 px too narrow


def test_confusion_counts_at_the_threshold_from_dev(of_seeds):
    (axis,) = drawn(figures.confusion(of_seeds[0]))
    cells = {tuple(int(v) for v in text.get_position()): text.get_text() for text in axis.texts}  # (column, row)
    assert cells == {(0, 0): "1", (1, 1): "1", (2, 1): "1", (0, 2): "2"}
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [*CLASSES, "false alarm"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == [*CLASSES, "missed"]
    assert axis.images[0].get_array()[1].tolist() == [0, 0.5, 0.5]
    assert "0.50" in axis.get_title()
    (lower,) = drawn(figures.confusion(of_seeds[0], threshold=0.05))
    assert (1, 1, "2") in {(*text.get_position(), text.get_text()) for text in lower.texts}


def test_bars_are_means_over_seeds(of_seeds):
    figure = figures.per_class_bars({"plain": of_seeds[0], "fused": of_seeds})
    (axis,) = drawn(figure)
    assert [bar.get_height() for bar in rectangles(axis)] == pytest.approx([40, 90, 42, 92])
    assert sorted(axis.lines[0].get_ydata()) == [40, 44, 90, 94]  # one dot a seed, only where there are several
    assert len(axis.lines) == 1
    assert [tick.get_text() for tick in axis.get_xticklabels()] == list(CLASSES)
    assert "IoU 0.5" in axis.get_ylabel()
    with pytest.raises(ValueError, match="no average precision is called 'recall'"):
        figures.per_class_bars({"plain": of_seeds}, "recall")


def test_training_curves_have_a_panel_a_scalar_and_one_for_dev(tmp_path):
    probed = {"loss": [3.0, 2.0, 1.5], "box": [2.0, 1.0, 1.0], "probe_epoch": [1, 3], "dev_map50": [10.0, 60.0]}
    other = {"loss": [4.0, 2.0, 1.0], "class": [2.0, 1.0, 0.5]}
    records = {"plain": [record(tmp_path, 0, curve=probed)], "fused": record(tmp_path, 1, curve=other)}
    axes = drawn(figures.training_curves(records, columns=4))
    lines = {axis.get_title(): [line.get_ydata().tolist() for line in axis.lines] for axis in axes}
    assert lines == {
        "loss": [[3.0, 2.0, 1.5], [4.0, 2.0, 1.0]],
        "box": [[2.0, 1.0, 1.0]],
        "class": [[2.0, 1.0, 0.5]],
        "mAP50 of dev / %": [[10.0, 60.0]],
    }
    assert axes[-1].lines[0].get_xdata().tolist() == [1, 3]
    assert axes[2].lines[0].get_color() == "C1"  # a row keeps its colour where the other has no such scalar


def test_robustness_shows_mean_dots_and_band(of_seeds):
    figure = figures.robustness_curves({"plain": of_seeds})
    blur, noise = drawn(figure)
    assert (blur.get_title(), noise.get_title()) == ("motion blur", "noise")
    mean, dots = blur.lines
    assert mean.get_ydata() == pytest.approx([82, 77, 72, 67])
    assert mean.get_xdata().tolist() == [0, 1, 2, 3]
    assert dots.get_ydata().tolist() == [80, 75, 70, 65, 84, 79, 74, 69]
    band = blur.collections[0].get_datalim(blur.transData)
    assert (band.y0, band.y1) == pytest.approx((65, 84))
    assert noise.lines[0].get_ydata() == pytest.approx([82, 72, 62])
    figure = figures.robustness_curves({"plain": of_seeds}, {"blur": (0, 3, 6, 9), "noise": (0, 5, 10)})
    assert figure.axes[1].lines[0].get_xdata().tolist() == [0, 5, 10]


@pytest.mark.parametrize("name", ["precision_recall_curves", "per_class_bars", "training_curves", "robustness_curves"])
def test_no_finished_run_is_said_and_not_an_error(name):
    assert "no finished run yet" in getattr(figures, name)({}).texts[0].get_text()


@pytest.mark.parametrize("draw", [figures.confusion, figures.worst_cases])
def test_no_record_is_said_and_not_an_error(draw):
    assert "no finished run yet" in draw(None).texts[0].get_text()
