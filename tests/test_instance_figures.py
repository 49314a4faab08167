"""What figures of instances and grids of images show, drawn from small splits and records."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from figure_helpers import drawn, rectangles
from matplotlib.colors import to_hex, to_rgb

from defectlab import figures
from defectlab.data.instances import load_instances
from defectlab.figures import instances
from defectlab.figures.detection import CLASS_COLOURS
from defectlab.runs import Record
from defectlab.verdicts.tables import RecordStore

CLASSES = ("inclusion", "patches", "scratches")


# --- Instances -------------------------------------------------------------------------------------------------------


def test_painted_mixes_the_colour_of_the_class_and_leaves_the_rest():
    image = np.array([[100, 100, 0]], dtype=np.uint8)
    result = instances.painted(image, np.array([[0, 2, 3]], dtype=np.uint8), strength=0.25)
    assert result.dtype == np.uint8 and result[0, 0].tolist() == [100] * 3
    for column, ground, label in ((1, 100, 1), (2, 0, 2)):
        colour = 255 * np.array(to_rgb(CLASS_COLOURS[label]))
        np.testing.assert_allclose(result[0, column], 0.75 * ground + 0.25 * colour, atol=0.51)
    coloured = np.repeat(image[..., None], 3, -1)
    assert (instances.painted(coloured, np.array([[0, 2, 3]]), 0.25) == result).all()


def test_class_map_reads_padding_and_background_as_background():
    numbers = torch.tensor([[0, 1, 2], [3, 2, 0]], dtype=torch.uint8)
    assert instances.class_map(numbers, torch.tensor([2, 0, -1])).tolist() == [[0, 3, 1], [0, 1, 0]]


def test_a_split_is_shown_with_its_instances(tmp_path):
    data = load_instances("synthetic_steel_masks", 48, root=tmp_path)
    shown = instances.from_split(data.test, [0, 5])
    for one, index in zip(shown, (0, 5), strict=True):
        count = int((data.test.labels[index] >= 0).sum())
        assert one.image.shape == one.classes.shape == (48, 48) and len(one.boxes["labels"]) == count > 0
        assert set(np.unique(one.classes)) == {0} | {int(label) + 1 for label in one.boxes["labels"]}
    figure = instances.overlaid(shown, ["a", "b"], data.class_names, columns=2, captions=["c", "d"])
    axes = drawn(figure)
    assert [len(rectangles(axis)) for axis in axes] == [len(one.boxes["labels"]) for one in shown]
    assert [axis.get_xlabel() for axis in axes] == ["c", "d"]
    assert [text.get_text() for text in figure.legends[0].texts] == list(CLASSES)


def test_scores_of_predictions_stand_at_their_boxes_the_highest_drawn_last():
    boxes = {"boxes": torch.tensor([[0.0, 4, 9, 9], [2, 8, 9, 15]]), "labels": torch.tensor([0, 2])}
    blank = np.zeros((16, 16), np.uint8)
    one = instances.Shown(blank, blank, boxes | {"scores": torch.tensor([0.9, 0.5])})
    (axis,) = drawn(instances.overlaid([one], ["a"], CLASSES, 1))
    assert [text.get_text() for text in axis.texts] == ["0.50", "0.90"]
    assert [to_hex(box.get_edgecolor()) for box in rectangles(axis)] == [CLASS_COLOURS[2], CLASS_COLOURS[0]]


# --- Grids -----------------------------------------------------------------------------------------------------------


def test_a_grid_has_titles_labels_captions_and_empty_places():
    dark, light = np.zeros((4, 4), np.uint8), np.full((4, 4), 9, np.uint8)
    figure = figures.image_grid(
        [[dark, light], [light, None]], ["a", "b"], ["first", "second"], [["1", "2"], ["3", ""]]
    )
    axes = drawn(figure)
    assert [len(axis.images) for axis in axes] == [1, 1, 1, 0]
    assert [axis.get_title() for axis in axes] == ["a", "b", "", ""]
    assert [axis.get_ylabel() for axis in axes] == ["first", "", "second", ""]
    assert [axis.get_xlabel() for axis in axes] == ["1", "2", "3", ""]
    assert axes[0].images[0].get_clim() == (0, 255)


def test_without_limits_each_line_has_one_scale():
    maps = [[np.array([[0.0, 1]]), np.array([[-3.0, 2]])], [np.ones((1, 2)), np.zeros((1, 2))]]
    limits = [axis.images[0].get_clim() for axis in drawn(figures.image_grid(maps, limits=None))]
    assert limits[0] == limits[1] == pytest.approx((-2.91, 1.97)) and limits[2] == limits[3] == (0, 1)


def test_outlines_follow_the_masks_and_empty_masks_have_none():
    image, mask = np.zeros((8, 8), np.uint8), np.zeros((8, 8))
    mask[2:5, 3:6] = 1
    outlines = {figures.MASK: [[mask, mask * 0, None]], figures.OTHER: [[None, None, mask.T]]}
    first, second, third = drawn(figures.image_grid([[image] * 3], outlines=outlines))
    assert not second.collections
    for axis, colour, bounds in (
        (first, figures.MASK, [2.5, 1.5, 5.5, 4.5]),
        (third, figures.OTHER, [1.5, 2.5, 4.5, 5.5]),
    ):
        (outline,) = axis.collections
        corners = np.concatenate([path.vertices for path in outline.get_paths()])
        assert to_hex(outline.get_edgecolor()[0]) == colour
        assert [*corners.min(0), *corners.max(0)] == pytest.approx(bounds)


# --- Which records are shown -----------------------------------------------------------------------------------------


def records_of(profile: str, **rows: tuple[int, int]) -> SimpleNamespace:
    """A store of a profile: row -> (committed records, this machine's)."""

    def some(count: int, profile: str) -> list[Record]:
        return [Record({"profile": profile, "data_label": "NEU-DET", "seed": seed}, None) for seed in range(count)]

    return SimpleNamespace(
        profile=profile,
        shows_here=RecordStore(profile, [], []).shows_here,
        recorded_of=lambda study, name: (some(rows[name][0], "quick"), "quick"),
        here_of=lambda study, name: some(rows[name][1], profile),
    )


@pytest.mark.parametrize(
    ("store", "shown", "said"),
    [
        (records_of("smoke", a=(2, 1), b=(0, 1)), {"a": 2}, "shown: a: recorded (quick), NEU-DET"),
        (records_of("recorded", a=(3, 1), b=(1, 0)), {"a": 3, "b": 1}, "shown: a, b: recorded (quick), NEU-DET"),
        (records_of("smoke", a=(0, 1), b=(0, 1)), {}, "shown: not run yet"),
        (records_of("quick", a=(2, 1), b=(2, 0)), {"a": 1}, "shown: a: this run, NEU-DET"),
        (records_of("quick", a=(2, 0), b=(2, 0)), {}, "shown: not run yet"),
    ],
)
def test_figures_show_one_source_and_say_which(capsys, store, shown, said):
    found = figures.records_to_show(store, None, "a", "b")
    assert {name: len(records) for name, records in found.items()} == shown
    assert capsys.readouterr().out.strip() == said


def test_both_sides_are_named():
    sides = figures.both_sides(records_of("smoke", a=(2, 1)), None, "a")
    assert {side: len(records) for side, records in sides.items()} == {"recorded (quick)": 2}
    assert list(figures.both_sides(records_of("paper", a=(1, 1)), None, "a")) == ["recorded (quick)", "this run"]
