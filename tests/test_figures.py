"""What all figures share, and those of anomaly maps: long tables of records, curves, colour and grey, no runs yet."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from figure_helpers import drawn
from matplotlib.colors import to_rgb

from defectlab import figures
from defectlab.data.anomaly import AnomalyData, AnomalySplit
from defectlab.figures import anomaly, detection, instances
from defectlab.figures.forest import Line, forest

RED, GREY = (200, 20, 30), (90, 90, 90)


def coloured(colour, count: int, side: int) -> torch.Tensor:
    """Images (count, 3, side, side) uint8 of one colour."""
    return torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(count, 3, side, side)


def shown(axis) -> np.ndarray:
    """What a panel shows, as it was given to it."""
    return np.asarray(axis.images[0].get_array())


OF_ROWS = (
    figures.training_curves, anomaly.score_histograms, detection.precision_recall_curves, detection.per_class_bars,
)  # fmt: skip
OF_ONE = (anomaly.examples, detection.examples, detection.confusion)
OF_IMAGES = (detection.boxed, figures.image_grid, lambda shown: instances.overlaid(shown, [], ()))


@pytest.mark.parametrize(
    ("draw", "nothing"), [*product(OF_ROWS, ({}, {"row": []})), *product(OF_ONE, [None]), *product(OF_IMAGES, [[]])]
)
def test_no_finished_run_is_said_and_not_an_error(draw, nothing) -> None:
    assert "no finished run yet" in draw(nothing).texts[0].get_text()


# --- Records ---------------------------------------------------------------------------------------------------------


def record(seed=0, curve=None, **metrics) -> SimpleNamespace:
    per_class = {"crack": {"map50": 10.0 + seed}}
    return SimpleNamespace(seed=seed, curve=curve or {}, metrics=metrics, per_class=per_class)


def test_frame_has_a_line_for_each_row_seed_type_and_metric() -> None:
    table = figures.frame({"plain": [record(0, map50=50.0), record(1, map50=60.0)], "empty": []})
    assert table[table["type"] == "all"].groupby("row")["value"].mean().to_dict() == {"plain": 55.0}
    assert table[table["type"] == "crack"][["seed", "value"]].to_numpy().tolist() == [[0, 10.0], [1, 11.0]]


PROBED = {"loss": [4.0, 2.0, 1.0], "box": [2.0, 1.0, 1.0], "probe_epoch": [1, 3], "dev_map50": [10.0, 60.0]}
OTHER = {"loss": [8.0, 4.0, 2.0], "class": [2.0, 1.0, 0.5], "weight_ddpm": [0.5, 0.6], "probe_epoch": [1, 3]}


def test_training_curves_have_a_panel_for_each_scalar_and_one_for_dev() -> None:
    records = {"plain": [record(curve=PROBED)], "fused": [record(curve=OTHER)]}
    axes = drawn(figures.training_curves(records, columns=4))
    lines = {axis.get_title(): [line.get_ydata().tolist() for line in axis.lines] for axis in axes}
    assert lines == {
        "loss": [[4.0, 2.0, 1.0], [8.0, 4.0, 2.0]],
        "box": [[2.0, 1.0, 1.0]],
        "class": [[2.0, 1.0, 0.5]],
        "mAP50 of dev / %": [[10.0, 60.0]],
    }
    assert [axis.lines[0].get_xdata().tolist() for axis in (axes[0], axes[-1])] == [[1, 2, 3], [1, 3]]
    assert axes[2].lines[0].get_color() == "C1", "a row keeps its colour where the other has no such scalar"


def test_losses_of_different_height_begin_at_one() -> None:
    records = {"plain": [record(curve=PROBED), record(1, curve=PROBED)], "fused": [record(curve=OTHER)]}
    (axis,) = drawn(figures.training_curves(records, ["loss"], first_is_one=True))
    assert [line.get_ydata().tolist() for line in axis.lines] == [[1, 0.5, 0.25]] * 3
    assert "epoch 1" in axis.get_title()


@pytest.mark.parametrize("scalars", ["a", "ab", "abcdef"])
def test_the_legend_of_many_rows_lies_inside_the_figure(scalars: str) -> None:
    curve = {name: [2.0, 1.0] for name in scalars}
    figure = figures.training_curves({f"context-guided fusion {k}": [record(curve=curve)] for k in range(5)})
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == 5
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height


def test_a_graph_keeps_the_colours_of_thin_lines() -> None:
    rows = {f"row {k}": [record(k, curve={name: list(range(k, 20)) for name in "abcdef"})] for k in range(5)}
    image = np.asarray(figures.graph(figures.training_curves(rows)).convert("RGB"), int)
    for k in range(5):
        wanted = 255 * np.array(to_rgb(f"C{k}"))
        assert np.abs(image - wanted).sum(-1).min() < 20, f"C{k} is gone"


# --- Images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("colours", "shape"), [((RED, RED), (16, 16, 3)), ((GREY, GREY), (16, 16)), ((GREY, RED), (16, 16, 3))]
)
def test_thumbnails_keep_colour_where_there_is_some(colours, shape) -> None:
    small = figures.thumbnails(torch.cat([coloured(colour, 1, 64) for colour in colours]), 16)
    assert (small.shape, small.dtype) == ((2, *shape), np.uint8)
    for image, colour in zip(small, colours, strict=True):
        assert image[0, 0].tolist() == (list(colour) if len(shape) == 3 else colour[0])


def test_gallery_has_a_place_for_each_image_and_outlines_masks() -> None:
    images = [np.zeros((8, 8), np.uint8), np.zeros((16, 8, 3), np.uint8)]
    first, second, empty = drawn(figures.gallery(images, ["a", "b"], 3, [None, np.eye(16, 8)]))
    assert [axis.get_title() for axis in (first, second, empty)] == ["a", "b", ""]
    assert [len(axis.collections) for axis in (first, second)] == [0, 1]
    assert not empty.axison and not empty.images


@pytest.mark.parametrize(("colour", "shape"), [(RED, (256, 256, 3)), (GREY, (256, 256))])
def test_samples_show_images_as_the_network_sees_them(colour, shape) -> None:
    images, types = coloured(colour, 3, 32), torch.arange(3, dtype=torch.uint8)
    masks, labels = torch.zeros(3, 256, 256, dtype=torch.uint8), types.clamp(max=1)
    split = AnomalySplit(images, masks, labels, types, labels == 0, ("0", "1", "2"), ((32, 32),) * 3)
    data = AnomalyData("toy", "toy", ("good", "bent", "color"), split, split, split, "")
    figure = anomaly.samples(data, "test", anomaly.one_of_each(data), columns=3)
    assert [axis.get_title() for axis in figure.axes] == ["good", "bent", "color"]
    assert shown(figure.axes[0]).shape == shape


# --- What an anomaly record keeps ------------------------------------------------------------------------------------


def record_with(images: np.ndarray, good: int = 0) -> SimpleNamespace:
    """As much of a record as figures read, of up to four defects; the masks of all but the last in a line are empty."""
    count, side = images.shape[:2]
    masks = np.zeros((count, side, side), np.uint8)
    masks[-1, 2:5, 2:5] = 1
    arrays = {
        "case_index": np.concatenate([np.arange(count)[::-1], count + np.arange(good), np.arange(count)[::-1]]),
        "case_images": np.concatenate([images, *[images[:1]] * good, images]),
        "case_maps": np.full((2 * count + good, side, side), 128, np.uint8),
        "case_masks": np.concatenate([masks, np.zeros((good, side, side), np.uint8), masks]),
        "types": np.array([1] * count + [0] * good),
        "type_names": np.array(["good", "scratch"]),
        "scores": np.linspace(0, 1, count + good),
        "labels": np.array([1] * count + [0] * good),
    }
    return SimpleNamespace(arrays=arrays, dev={"threshold": 0.7}, seed=2)


def test_examples_show_the_colour_of_coloured_sets() -> None:
    images = np.broadcast_to(np.array(RED, np.uint8), (3, 72, 72, 3))
    axes = drawn(anomaly.examples(record_with(images)))
    above, below = axes[:3], axes[4:7]  # four places in a line
    assert all(shown(axis).shape == (72, 72, 3) and tuple(shown(axis)[0, 0]) == RED for axis in above)
    assert all(shown(axis).shape == (72, 72) for axis in below)
    assert above[0].get_title() == "scratch, score 1.00", "titles follow case_index"
    assert [len(axis.collections) for axis in above] == [0, 0, 1], "the outline of the mask"


def test_lines_of_few_examples_hold_what_their_labels_say() -> None:
    axes = drawn(anomaly.examples(record_with(np.zeros((2, 96, 96), np.uint8), good=3)))
    lines = [[axis.get_title().partition(",")[0] for axis in axes[at : at + 4]] for at in (0, 8, 16)]
    assert [[title for title in line if title] for line in lines] == [["scratch"] * 2, ["good"] * 3, ["scratch"] * 2]


def test_examples_of_grey_sets_stay_grey() -> None:
    images = np.arange(2 * 96 * 96, dtype=np.uint32).reshape(2, 96, 96).astype(np.uint8)
    first = anomaly.examples(record_with(images)).axes[0]
    assert np.array_equal(shown(first), images[0])
    assert first.images[0].get_cmap().name == "gray"
    assert first.images[0].get_clim() == (0, 255), "not stretched from image to image"


@pytest.mark.parametrize(("names", "side"), [("ab", 256), ("ax", 96)])
def test_examples_are_shown_from_the_set_where_it_is_the_records(names, side) -> None:
    record = record_with(np.zeros((2, 96, 96), np.uint8))
    record.arrays["names"] = np.array(["a", "b"])
    types = torch.arange(2, dtype=torch.uint8)
    masks = torch.zeros(2, 256, 256, dtype=torch.uint8)
    split = AnomalySplit(coloured(GREY, 2, 64), masks, types, types, types == 0, tuple(names), ((64, 64),) * 2)
    data = AnomalyData("toy", "toy", ("good", "scratch"), split, split, split, "")
    assert shown(anomaly.examples(record, data).axes[0]).shape == (side, side)
    assert "no finished run" in anomaly.examples(None, data).texts[0].get_text()


def test_histograms_count_every_test_image_and_mark_the_threshold() -> None:
    found = record_with(np.zeros((5, 8, 8), np.uint8))
    (axis,) = drawn(anomaly.score_histograms({"bsdrd": [found], "empty": []}))
    assert axis.get_title() == "bsdrd, seed 2"
    assert sum(bar.get_height() for bar in axis.patches) == 5
    assert axis.lines[0].get_xdata() == [0.7, 0.7]


def test_a_forest_plot_shows_every_printed_gain_and_an_arrow_where_an_interval_goes_on():
    lines = [Line(f"claim {i}", 1.0, 0.5, 1.5, True, None) for i in range(8)]
    lines += [Line("long", 0.0, -18.0, 18.0, True, None), Line("printed", -1.0, -1.5, -0.5, False, 4.0)]
    figure = forest(lines)
    (axis,) = figure.axes
    low, high = axis.get_xlim()
    assert 4.0 < high < 18.0 and low == -high
    drawn = [line.get_marker() for line in axis.lines]
    assert drawn.count("<") == drawn.count(">") == 1 and drawn.count("|") == 1 and drawn.count("o") == len(lines)
    assert axis.get_yticklabels()[0].get_text() == "printed"  # from top to bottom
