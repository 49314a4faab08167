"""Figures of a batch that ran out of minutes, of grey and of coloured pictures, and of maps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from defectlab.data.anomaly import AnomalyData, AnomalySplit
from defectlab.figures import anomaly as figures

RED, GREY = (200, 20, 30), (90, 90, 90)


@pytest.mark.parametrize(
    "draw",
    [figures.loss_curves, figures.score_histograms, lambda records: figures.dimension_curves(records, ("map",))],
)
def test_no_finished_run_is_said_and_not_an_error(draw) -> None:
    figure = draw({})
    assert "no finished run yet" in figure.texts[0].get_text()


def shown(axis) -> np.ndarray:
    """What a panel shows, as it was given to it."""
    return np.asarray(axis.images[0].get_array())


# --- Colour ----------------------------------------------------------------------------------------------------------


def record_of_cases(images: np.ndarray) -> SimpleNamespace:
    """As much of a record as `cases` reads; the masks of all but the last are empty."""
    count, side = images.shape[:2]
    masks = np.zeros((count, side, side), np.uint8)
    masks[-1, 2:5, 2:5] = 1
    arrays = {
        "case_index": np.arange(count)[::-1],
        "case_images": images,
        "case_maps": np.full((count, side, side), 128, np.uint8),
        "case_masks": masks,
        "types": np.array([0] * (count - 1) + [1]),
        "type_names": np.array(["good", "scratch"]),
        "scores": np.linspace(0, 1, count),
    }
    return SimpleNamespace(arrays=arrays)


def test_cases_show_the_colour_of_coloured_sets() -> None:
    images = np.broadcast_to(np.array(RED, np.uint8), (3, 72, 72, 3))
    figure = figures.cases(record_of_cases(images))
    above, below = figure.axes[:3], figure.axes[3:]
    assert all(shown(axis).shape == (72, 72, 3) and tuple(shown(axis)[0, 0]) == RED for axis in above)
    assert all(shown(axis).shape == (72, 72) for axis in below)
    assert above[0].get_title() == "scratch\n1.00", "titles follow case_index"


def test_cases_of_grey_sets_stay_grey() -> None:
    images = np.arange(2 * 96 * 96, dtype=np.uint32).reshape(2, 96, 96).astype(np.uint8)
    figure = figures.cases(record_of_cases(images))
    assert np.array_equal(shown(figure.axes[0]), images[0])
    assert figure.axes[0].images[0].get_cmap().name == "gray"
    assert figure.axes[0].images[0].get_clim() == (0, 255), "not stretched from case to case"


@pytest.mark.parametrize(("colour", "shape"), [(RED, (16, 16, 3)), (GREY, (16, 16))])
def test_thumbnails_keep_colour_where_there_is_some(colour, shape) -> None:
    images = torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 64, 64)
    small = figures.thumbnails(images, 16)
    assert small.shape == (2, *shape)
    assert small.dtype == np.uint8
    assert np.array_equal(
        np.broadcast_to(small[..., None] if small.ndim == 3 else small, (2, 16, 16, 3))[0, 0, 0], colour
    )


def test_one_coloured_picture_among_grey_ones_keeps_its_colour() -> None:
    images = torch.full((2, 3, 32, 32), 90, dtype=torch.uint8)
    images[1, 0] = 200
    assert tuple(figures.thumbnails(images, 8)[1, 0, 0]) == (200, 90, 90)


def split_of(images: torch.Tensor) -> AnomalySplit:
    count = len(images)
    types = torch.arange(count, dtype=torch.uint8)
    masks = torch.zeros(count, 256, 256, dtype=torch.uint8)
    labels = types.clamp(max=1)
    return AnomalySplit(images, masks, labels, types, labels == 0, tuple(map(str, range(count))), ((32, 32),) * count)


@pytest.mark.parametrize(("colour", "shape"), [(RED, (128, 128, 3)), (GREY, (128, 128))])
def test_samples_show_pictures_as_the_network_sees_them(colour, shape) -> None:
    split = split_of(torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(3, 3, 32, 32))
    data = AnomalyData("drawn", "drawn", ("good", "bent", "color"), split, split, split, "")
    figure = figures.samples(data, "test", figures.one_of_each(data), columns=3)
    assert [axis.get_title() for axis in figure.axes] == ["good", "bent", "color"]
    assert shown(figure.axes[0]).shape == shape


# --- Maps and curves -------------------------------------------------------------------------------------------------


def test_map_rows_have_one_scale_a_column_from_zero() -> None:
    pictures = [np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)]
    masks = [np.zeros((32, 32)), np.eye(32)]
    maps = {"M1": np.array([[[0.1]], [[0.4]]]), "AL": np.array([[[2.0]], [[1.0]]])}
    figure = figures.map_rows(pictures, masks, maps, ["good", "bent"])
    axes = np.array(figure.axes).reshape(2, 3)
    assert [axes[line, 0].get_ylabel() for line in (0, 1)] == ["good", "bent"]
    assert [axis.images[0].get_clim() for axis in axes[:, 1]] == [(0, 0.4)] * 2
    assert [axis.images[0].get_clim() for axis in axes[:, 2]] == [(0, 2)] * 2
    assert axes[0, 1].get_title() == "M1, 0 to 0.4"
    assert shown(axes[1, 2]).item() == 1


def test_curves_begin_at_epoch_one_and_name_their_axis() -> None:
    record = SimpleNamespace(curve={"weight1": [1.0, 0.9, 0.8]})
    figure = figures.dimension_curves({"a": record}, ("weight1",), "weight")
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [1, 2, 3]
    assert figure.axes[0].get_ylabel() == "weight"
