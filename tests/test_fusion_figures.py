"""Figures of the fusion, drawn from small curves, filters and records: what they show, not only that they run."""

import numpy as np
import pytest
import torch
from figure_helpers import rectangles
from matplotlib.colors import to_hex

from defectlab.figures import fusion as figures
from defectlab.figures import INK
from defectlab.metrics.detection import pack
from defectlab.papers.d3n.fusion import NoiseFilter
from defectlab.runs import Record

CURVE = {
    "loss": [3.0, 2.0, 1.0, 0.5],
    "probe_epoch": [2, 4],
    "dev_map50": [10.0, 20.0],
    "weight_ddpm": [0.3, 0.2],
    "weight_det": [0.3, 0.5],
    "weight_cross": [0.4, 0.3],
    "weight_residual": [1.2, 2.5],
}
TWO = {"probe_epoch": [1], "weight_ddpm": [0.25], "weight_det": [0.75]}


def of_curve(curve):
    return Record({"curve": curve}, None)


def lines(axis, colour):
    return [np.asarray(line.get_ydata()).tolist() for line in axis.lines if to_hex(line.get_color()) == colour]


# --- Shares ----------------------------------------------------------------------------------------------------------


def test_shares_start_equal_and_the_residual_at_one():
    found = figures.shares(CURVE)
    assert found["epoch"].tolist() == [0, 2, 4]
    assert found["det"].tolist() == pytest.approx([1 / 3, 0.3, 0.5])
    assert found["residual"].tolist() == [1, 1.2, 2.5]
    assert figures.shares(TWO)["ddpm"].tolist() == [0.5, 0.25]
    assert set(figures.shares(TWO)) == {"det", "ddpm", "epoch"}


def test_a_row_without_weights_is_refused():
    with pytest.raises(ValueError, match="learns no weights"):
        figures.shares({"probe_epoch": [1], "dev_map50": [3.0]})


def test_how_often_a_branch_is_the_highest():
    assert figures.times_highest(CURVE) == (1, 2)
    assert figures.times_highest(CURVE, "cross") == (1, 2)
    assert figures.times_highest(TWO) == (1, 1)
    assert figures.times_highest(TWO | {"weight_ddpm": [0.75]}) == (0, 1), "equal is not highest"


def test_share_curves_show_all_three_then_pairs_then_the_residual():
    everything, ddpm, cross, residual = figures.share_curves([of_curve(CURVE), of_curve(CURVE)]).axes
    assert len(lines(everything, figures.COLOURS["det"])) == 2, "a line a seed"
    assert lines(everything, figures.COLOURS["det"])[0] == pytest.approx([1 / 3, 0.3, 0.5])
    assert lines(ddpm, figures.COLOURS["det"])[0] == pytest.approx([0.5, 0.5, 0.5 / 0.7])
    assert lines(ddpm, figures.COLOURS["ddpm"])[0] == pytest.approx([0.5, 0.5, 0.2 / 0.7])
    assert lines(cross, figures.COLOURS["cross"])[0] == pytest.approx([0.5, 4 / 7, 3 / 8])
    assert lines(residual, INK)[0] == [1, 1.2, 2.5]
    assert residual.get_ylim()[1] > 2.5 and everything.get_ylim()[1] > 0.5
    assert [axis.get_title() for axis in (everything, ddpm)] == ["(a) all branches", "(b) Det and DDPM"]


def test_what_hardly_moved_looks_so():
    """A hundredth of a share does not fill the panel."""
    axis = figures.share_curves([of_curve({"probe_epoch": [1], "weight_ddpm": [0.49], "weight_det": [0.51]})]).axes[0]
    assert axis.get_ylim() == pytest.approx((0.4, 0.6))


def test_share_curves_of_two_branches_have_one_panel():
    figure = figures.share_curves([of_curve(TWO)])
    assert len(figure.axes) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["detector (Det)", "DDPM"]


@pytest.mark.parametrize("draw", [figures.share_curves, figures.filter_panels, figures.same_pictures])
def test_nothing_finished_is_said(draw):
    assert "no finished run yet" in draw({}).texts[0].get_text()


# --- Filter ----------------------------------------------------------------------------------------------------------


def test_a_fresh_filter_changes_nothing():
    look = figures.look_through(NoiseFilter(), torch.randn(2, 3, 6, 8))
    assert look.attention.tolist() == np.ones((6, 8)).tolist()
    np.testing.assert_allclose(look.before, look.after, rtol=1e-4)


def test_look_through_gives_the_weight_that_acts_on_a_wave():
    torch.manual_seed(0)
    noise_filter = NoiseFilter()
    torch.nn.init.normal_(noise_filter.place.weight)
    maps = torch.zeros(1, 1, 8, 8)
    maps[0, 0] = torch.cos(2 * torch.pi * (torch.arange(8)[:, None] + 2 * torch.arange(8)) / 8)  # one wave: (1, 2)
    look = figures.look_through(noise_filter, maps)
    assert look.before[1, 2] == pytest.approx(look.before[7, 6], rel=1e-4)
    assert look.attention[1, 2] == pytest.approx(look.attention[7, 6], rel=1e-5), "the wave and its mirror image"
    assert look.after[1, 2] / look.before[1, 2] == pytest.approx(look.attention[1, 2], rel=1e-4)


def test_radial_mean_of_the_frequency_itself():
    rows, columns = np.fft.fftfreq(8), np.fft.fftfreq(12)
    radius = np.hypot(rows[:, None], columns)
    frequency, mean = figures.radial_mean(radius)
    assert frequency.tolist() == [0, 0.125, 0.25, 0.375, 0.5]
    assert mean[0] == 0
    np.testing.assert_allclose(mean, frequency, atol=0.5 / 8)


def test_radial_mean_leaves_the_corners_out():
    plane = np.zeros((8, 8))
    plane[4, 4] = 1e6  # both at 0.5: at 0.71 together
    assert figures.radial_mean(plane)[1].max() == 0


def test_filter_panels_put_the_zero_frequency_in_the_middle():
    plane = np.ones((8, 8))
    lifted = plane.copy()
    lifted[0, 0] = 1.5
    looks = {"P3": figures.FilterLook(plane, lifted, 2 * plane), "P4": figures.FilterLook(plane, plane, plane)}
    figure = figures.filter_panels(looks)
    amplitude, weight, by_frequency = figure.axes[:3]
    assert amplitude.get_ylabel() == "P3\namplitude"
    assert amplitude.lines[1].get_ydata().tolist() == [2.0] * 5
    image = weight.images[0]
    row, column = np.argwhere(np.asarray(image.get_array()) == 1.5)[0]
    left, right, bottom, top = image.get_extent()
    assert left + (column + 0.5) * (right - left) / 8 == pytest.approx(0)
    assert bottom + (row + 0.5) * (top - bottom) / 8 == pytest.approx(0)
    assert image.get_clim() == (0.5, 1.5)
    assert by_frequency.lines[0].get_ydata().tolist() == [1.5, 1, 1, 1, 1]


# --- The same pictures -----------------------------------------------------------------------------------------------

TRUTHS = [
    {"boxes": torch.tensor([[10.0, 10, 50, 50], [100, 100, 160, 180]]), "labels": torch.tensor([0, 1])},
    {"boxes": torch.tensor([[20.0, 40, 80, 90]]), "labels": torch.tensor([1])},
]


def record(folder, name, scores, names=("a", "b")):
    """Finds the truths with these scores: two in the first picture, one in the second."""
    predictions = [
        {"boxes": truth["boxes"], "labels": truth["labels"], "scores": torch.tensor(of_picture)}
        for truth, of_picture in zip(TRUTHS, scores, strict=True)
    ]
    arrays = pack(predictions, TRUTHS, names, ("crazing", "patches"))
    arrays |= {
        "case_index": np.array([1, 0]),
        "case_why": np.array(["found", "1 of 2 missed"]),
        "case_images": np.stack([np.full((100, 100), grey, np.uint8) for grey in (90, 30)]),
        "case_scale": np.array([0.5, 0.5], dtype=np.float32),
        "case_offset": np.array([[0.0, 0.0], [7.0, 3.0]], dtype=np.float32),
    }
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    return Record({}, folder / f"{name}.json")


def test_same_pictures_show_what_each_record_found_there(tmp_path):
    records = {
        "hybrid": record(tmp_path, "hybrid", [[0.9, 0.1], [0.8]]),
        "baseline": record(tmp_path, "baseline", [[0.9, 0.7], [0.1]]),
    }
    axes = figures.same_pictures(records, count=2).axes
    assert [axis.get_title() for axis in axes] == [
        "hybrid: 1 of 1\n0 false",
        "hybrid: 1 of 2\n0 false",
        "baseline: 0 of 1\n0 false",
        "baseline: 2 of 2\n0 false",
    ]
    assert [int(axis.images[0].get_array()[0, 0]) for axis in axes] == [90, 30, 90, 30]
    corners = {tuple(np.round(patch.get_xy(), 1)) for patch in rectangles(axes[3])}
    assert corners == {(12.0, 8.0), (57.0, 53.0)}, "0.5 x + 7, 0.5 y + 3, of truths and predictions"


def test_fewer_cases_do_not_get_larger_pictures(tmp_path):
    records = {"hybrid": record(tmp_path, "hybrid", [[0.9, 0.1], [0.8]])}
    assert figures.same_pictures(records, count=6, width=9.0).get_size_inches()[0] == pytest.approx(3.0)


def test_false_boxes_are_counted():
    found = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([0]), "scores": torch.tensor([0.9])}
    assert figures._counted(found, TRUTHS[1], 2, 0.25) == "0 of 1\n1 false"
    assert figures._counted(found, TRUTHS[1], 2, 0.95) == "0 of 1\n0 false"


def test_same_pictures_of_other_test_pictures_are_refused(tmp_path):
    records = {"a": record(tmp_path, "a", [[0.9, 0.1], [0.8]]), "b": record(tmp_path, "b", [[0.9, 0.1], [0.8]], "xy")}
    with pytest.raises(ValueError, match="b was tested on other pictures"):
        figures.same_pictures(records)
