"""Segmentation figures drawn from small records and splits: what they show, not only that they run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from torch import Tensor, nn

from defectlab.data.masks import SegmentationData, SegmentationSplit
from defectlab.figures import segmentation as figures
from defectlab.metrics.segmentation import segmentation_metrics
from defectlab.networks.segmentation import Segmenter
from defectlab.runs import Record
from defectlab.training.segmentation import record_arrays, telling_cases

TYPES = ("good", "bent", "color")
SIZE = 16


def split_of(types: list[int], part: str) -> SegmentationSplit:
    """Of each image a dark ground; of those with a defect a bright square, two pixels wider with each image."""
    images = torch.full((len(types), 3, SIZE, SIZE), 30, dtype=torch.uint8)
    masks = torch.zeros(len(types), SIZE, SIZE, dtype=torch.uint8)
    for i, kind in enumerate(types):
        if kind:
            masks[i, 4:12, 2 : 6 + i] = 1
    images += 150 * masks[:, None]
    names = tuple(f"{part}/{TYPES[kind]}/{i:03d}" for i, kind in enumerate(types))
    return SegmentationSplit(images, masks, torch.tensor(types, dtype=torch.uint8), names)


@pytest.fixture
def data() -> SegmentationData:
    parts = split_of([0, 0, 0, 1, 1, 2], "train"), split_of([0, 1], "dev"), split_of([0, 1, 1, 2, 0, 2], "test")
    return SegmentationData("squares", "squares", "defect", TYPES, *parts, "f")


def record(folder, data: SegmentationData, name: str, shift: int) -> Record:
    """What a network finds that is right but for a shift to the right, and a spot in the last empty image."""
    found = 0.9 * data.test.masks.float().roll(shift, -1)
    found[4, :2, :2] = 0.8
    measured = segmentation_metrics(found, data.test.masks, data.test.types, data.type_names, 0.5)
    arrays = record_arrays(data, measured.images) | telling_cases(data.test, found, measured.images)
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    return Record({"dev": {"threshold": 0.5}}, folder / f"{name}.json")


@pytest.fixture
def records(tmp_path, data) -> dict[str, Record]:
    return {"sharp": record(tmp_path, data, "sharp", 0), "shifted": record(tmp_path, data, "shifted", 2)}


def lines(axis) -> list[tuple[str, tuple[float, ...]]]:
    """Colour and bounds (left, top, right, bottom) of each outline."""
    found = []
    for outline in axis.collections:
        corners = np.concatenate([path.vertices for path in outline.get_paths()])
        bounds = (*corners.min(0), *corners.max(0))
        found.append((to_hex(outline.get_edgecolor()[0]), pytest.approx(bounds)))
    return found


# --- Masks on pictures -----------------------------------------------------------------------------------------------


def test_contact_sheet_shows_the_first_of_each_type(data):
    axes = figures.contact_sheet(data, "train", each=2, columns=3).axes
    titles = [axis.get_title() for axis in axes]
    assert titles == ["good 000", "good 001", "bent 003", "bent 004", "color 005", ""]
    assert np.array_equal(axes[2].images[0].get_array(), data.train.images[3].movedim(0, -1))
    assert lines(axes[0]) == []  # no defect, no outline
    assert lines(axes[2]) == [(figures.MASK, (1.5, 3.5, 8.5, 11.5))]
    assert not axes[5].images


def test_second_target_is_outlined_in_yellow_below_the_first(data):
    moved = replace(data.train, masks=data.train.masks.roll(1, -2))
    figure = figures.contact_sheet(data, "train", each=1, columns=3, other=replace(data, target="nut", train=moved))
    assert [to_hex(line.get_color()) for line in figure.legends[0].get_lines()] == [figures.MASK, figures.OTHER]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["defect", "nut"]
    expected = [(figures.OTHER, (1.5, 4.5, 8.5, 12.5)), (figures.MASK, (1.5, 3.5, 8.5, 11.5))]
    assert lines(figure.axes[1]) == expected
    with pytest.raises(ValueError, match=r"squares \(nut\) has other pictures in dev than squares"):
        figures.contact_sheet(data, "dev", other=replace(data, target="nut", dev=data.test))


def test_no_pictures_is_said_and_not_an_error():
    assert "no finished run yet" in figures.outlined([], [], []).texts[0].get_text()


# --- What a network found --------------------------------------------------------------------------------------------


def test_scores_are_those_of_each_image(records):
    assert figures.image_scores(records["sharp"]) == pytest.approx([np.nan, 100, 100, 100, np.nan, 100], nan_ok=True)
    # squares of widths 5, 6, 7 and 9, two pixels to the right: 3 of 7, 4 of 8, 5 of 9, 7 of 11
    found = figures.image_scores(records["shifted"])
    assert found == pytest.approx([np.nan, 300 / 7, 50, 500 / 9, np.nan, 700 / 11], nan_ok=True)


def test_cases_have_reason_type_score_and_both_outlines(records):
    axes = figures.cases(records["shifted"], each=2).axes
    above, below = axes[:4], axes[4:]  # the two worst and two of the others; four defects leave none for the best
    assert [axis.get_title() for axis in above] == ["bent", "bent", "good", "good"]
    assert [axis.get_xlabel() for axis in below] == ["IoU 42.9", "IoU 50.0", "wrong 1.6 %", "wrong 0.0 %"]
    assert lines(above[0]) == [(figures.MASK, (1.5, 3.5, 6.5, 11.5))]
    assert [colour for colour, _ in lines(below[0])] == [figures.OTHER]
    assert lines(below[3]) == []  # nothing was found there
    reasons = [[text.get_text() for text in axis.texts] for axis in above]
    assert reasons == [["lowest IoU:"], [], ["most wrong pixels of the others:"], []]
    assert below[0].images[0].get_array().max() == round(0.9 * 255)


def test_shown_images_are_the_worst_of_each_type_first(records):
    assert figures.shown_images(records, 3, kept=False) == [1, 3, 0]
    assert figures.shown_images(records, 6, kept=False) == [1, 3, 0, 2, 5, 4]
    assert figures.shown_images({}, 3) == []


def test_images_that_more_records_hold_come_first(records, monkeypatch):
    held = {str(records["sharp"].path): [1, 4], str(records["shifted"].path): [1, 2, 4]}
    monkeypatch.setattr(figures, "kept_cases", lambda record: dict.fromkeys(held[str(record.path)]))
    assert figures.shown_images(records, 3) == [1, 4, 2]


def test_side_by_side_has_a_line_an_image_and_a_column_a_network(records):
    found = {name: figures.kept_cases(record) for name, record in records.items()}
    del found["sharp"][4]
    figure = figures.side_by_side(records, found, [1, 4])
    table = np.array(figure.axes).reshape(2, 3)
    assert [axis.get_title() for axis in table[0]] == ["picture", "sharp", "shifted"]
    assert [axis.get_xlabel() for axis in table[0]] == ["bent", "IoU 100.0", "IoU 42.9"]
    assert [axis.get_xlabel() for axis in table[1]] == ["good", "wrong 1.6 %", "wrong 1.6 %"]
    assert [text.get_text() for text in table[1, 1].texts] == ["not kept"] and not table[1, 1].images
    assert [lines(axis) for axis in table[0]] == 3 * [[(figures.MASK, (1.5, 3.5, 6.5, 11.5))]]
    assert np.array_equal(table[0, 2].images[0].get_array(), found["shifted"][1].probability)
    assert table[1, 0].images[0].get_array().shape == (SIZE, SIZE, 3)  # the record that holds it has the picture


def test_computed_cases_are_those_of_the_network(data):
    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 20 * x[:, :1]  # normalised: bright above 0, dark below

    found = figures.computed_cases(Segmenter(Bright()).eval(), data.test, [3, 0])
    assert list(found) == [3, 0]
    assert np.array_equal(found[3].truth, data.test.masks[3]) and found[3].picture.shape == (SIZE, SIZE, 3)
    assert np.array_equal(found[3].probability > 127, data.test.masks[3] > 0)
    assert found[0].probability.dtype == np.uint8 and found[0].probability.max() == 0


def test_no_record_is_said_and_not_an_error():
    for figure in (figures.cases(None), figures.side_by_side({}, {}, []), figures.reduction_curves({}, "mIoU")):
        assert "no finished run yet" in figure.texts[0].get_text()


# --- Smaller training sets -------------------------------------------------------------------------------------------


def test_reduction_has_means_as_lines_and_a_dot_a_seed():
    full = {"with": {10: [80.0, 84.0], 100: [95.0]}, "without": {10: [70.0], 100: []}}
    figure = figures.reduction_curves(
        {"paper": full, "none yet": {"with": {10: []}}, "ours": {"without": {50: [60.0]}}}, "mIoU"
    )
    first, second = figure.axes  # the panel without any value is left out
    assert [axis.get_title() for axis in figure.axes] == ["paper", "ours"]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in first.lines]
    for points in (([10, 100], [82.0, 95.0]), ([10, 10], [80.0, 84.0]), ([10], [70.0])):
        assert points in drawn
    assert first.get_ylabel() == "mIoU" and first.get_xscale() == "log"
    assert [tick.get_text() for tick in second.get_xticklabels()] == ["10", "50", "100"]
    assert {line.get_color() for line in second.lines} == {"C1"}  # a network keeps its colour
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["with", "without"]
