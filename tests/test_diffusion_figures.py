"""Diffusion figures drawn from small tensors and records: what they show, not only that they run."""

import numpy as np
import pytest
import torch
from figure_helpers import drawn
from matplotlib.colors import to_hex

from defectlab.figures import diffusion as figures
from defectlab.networks.diffusion import noise_schedule
from defectlab.runs import Record

SIDE = 8


def record(folder, seed: int = 0, height: float = 0.5, epochs: int = 3) -> Record:
    arrays = {
        "timesteps": np.array([25, 500, 975]),
        "errors": np.array([0.8, height, 0.1]),
        "errors_train": np.array([0.7, height / 2, 0.1]),
        "samples": np.zeros((4, SIDE, SIDE), np.uint8),
    }
    np.savez_compressed(folder / f"run{seed}.npz", **arrays)
    loss = [height / (epoch + 1) for epoch in range(epochs)]
    return Record({"curve": {"loss": loss}}, folder / f"run{seed}.json")


def pictures(axes) -> list[np.ndarray]:
    return [np.asarray(axis.images[0].get_array()) for axis in axes if axis.images]


def texts(axes) -> list[str]:
    return [axis.get_title() or axis.get_xlabel() for axis in axes]


def says_nothing_yet(figure) -> bool:
    return "no finished run yet" in figure.texts[0].get_text()


def test_kept_maps_are_shown_as_they_are_kept(tmp_path):
    arrays = {
        "case_images": np.full((6, SIDE, SIDE), 10, np.uint8),
        "case_told": np.full((6, SIDE, SIDE), 20, np.uint8),
    }
    for level in range(2):
        kept = np.arange(6 * 3, dtype=np.uint8).reshape(6, 3, 1, 1) + 100 * (level + 1)
        arrays[f"case_features_{level}"] = np.broadcast_to(kept, (6, 3, SIDE >> level, SIDE >> level))
    np.savez_compressed(tmp_path / "run.npz", **arrays)
    figure = figures.kept_maps(Record({}, tmp_path / "run.json"), cases=3, channels=2)
    shown = [picture.flat[0] for picture in pictures(figure.axes)]
    assert shown == [10, 20, 100, 101, 200, 201, 10, 20, 106, 107, 206, 207, 10, 20, 112, 113, 212, 213]
    assert texts(figure.axes)[:6] == ["picture", "told", "level 0", "", "level 1", ""]
    assert {axis.images[0].get_clim() for axis in figure.axes} == {(0, 255)}


# --- Noise -----------------------------------------------------------------------------------------------------------


def test_schedule_draws_both_factors_and_points_at_timesteps():
    alpha_hat = noise_schedule(1000)
    (axis,) = figures.schedule(alpha_hat, (100, 250)).axes
    picture, noise, *marks = axis.lines
    np.testing.assert_allclose(picture.get_ydata() ** 2 + noise.get_ydata() ** 2, 1)
    assert picture.get_ydata()[100] == pytest.approx(alpha_hat[100].sqrt().item())
    assert [mark.get_xdata()[0] for mark in marks] == [100, 250]


def test_pictures_stand_in_lines_by_picture_and_columns_by_stage():
    clean = torch.linspace(-1, 1, 2 * SIDE * SIDE).view(2, 1, SIDE, SIDE)
    figure = figures.picture_columns({"clean": clean, "dark": clean - 1}, ["first", "second"])
    assert texts(figure.axes)[:2] == ["clean", "dark"]
    assert [figure.axes[i].get_ylabel() for i in (0, 2)] == ["first", "second"]
    first, first_dark, second, second_dark = pictures(figure.axes)
    assert first.min() == 0 and second.max() == 255 and first.max() < second.min()
    assert first_dark.max() == 0 and second_dark.max() <= 128  # beyond black is black


def test_colours_stay_colours():
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)
    found = figures.as_pictures(red)
    assert found.shape == (1, SIDE, SIDE, 3) and found[0, 0, 0].tolist() == [255, 0, 0]
    assert figures.as_pictures(red[:, :1]).shape == (1, SIDE, SIDE)


@pytest.mark.parametrize("columns", [{}, {"clean": torch.zeros(0, 1, SIDE, SIDE)}])
def test_no_pictures_no_grid(columns):
    assert says_nothing_yet(figures.picture_columns(columns))


# --- Training and samples --------------------------------------------------------------------------------------------


def test_losses_have_a_colour_a_row_and_a_line_a_seed(tmp_path):
    rows = {"ddpm": [record(tmp_path, 0), record(tmp_path, 1, 0.4)], "printed": [record(tmp_path, 2, 1.2)], "none": []}
    (axis,) = figures.noise_losses(rows).axes
    *lines, nothing = axis.lines
    assert [to_hex(line.get_color()) for line in lines] == [to_hex(c) for c in ("C0", "C0", "C1")]
    assert list(lines[1].get_xdata()) == [1, 2, 3] and lines[1].get_ydata()[0] == 0.4
    assert set(nothing.get_ydata()) == {1} and axis.get_yscale() == "log"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["ddpm", "printed"]
    assert says_nothing_yet(figures.noise_losses({"ddpm": []}))


def test_errors_are_those_of_test_and_training_pictures(tmp_path):
    (axis,) = figures.timestep_errors({"ddpm": record(tmp_path)}, marks=(100,)).axes
    on_test, on_training, nothing, mark = axis.lines
    np.testing.assert_allclose(on_test.get_ydata(), [0.8, 0.5, 0.1])
    np.testing.assert_allclose(on_training.get_ydata(), [0.7, 0.25, 0.1])
    assert on_test.get_color() == on_training.get_color() and "training" in on_training.get_label()
    assert set(nothing.get_ydata()) == {1} and mark.get_xdata()[0] == 100
    assert says_nothing_yet(figures.timestep_errors({}))


@pytest.mark.parametrize(("low", "between"), [(0.5, 3), (0.1, 2), (1e-4, 0)])
def test_a_logarithmic_axis_names_numbers_between_the_decades_where_there_is_room(low, between):
    (axis,) = drawn(figures.compression_curves({"a": {"kl": [0.9, low]}}))
    labels = [label.get_text() for label in axis.get_yticklabels(minor=True) if label.get_text()]
    assert len(labels) >= between and bool(labels) == bool(between)


@pytest.mark.parametrize("axes", [(), (1,), (2,), (1, 2)])
def test_nearest_finds_a_training_picture_and_its_mirror_images(axes):
    generator = torch.Generator().manual_seed(0)
    training = torch.randint(256, (5, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    samples = training[[3, 1], 0].flip(axes).numpy()
    samples[0] = np.where(samples[0] > 100, samples[0] - 2, samples[0] + 2)  # each value off by two
    index, distance = figures.nearest(samples, training)
    assert index.tolist() == [3, 1]
    np.testing.assert_allclose(distance, [2, 0], atol=0.02)


def test_nearest_of_coloured_samples():
    training = torch.randint(256, (4, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    index, distance = figures.nearest(training[[2]].movedim(1, -1).numpy(), training)
    assert index.tolist() == [2] and distance[0] == pytest.approx(0, abs=0.02)


def test_samples_stand_above_their_neighbours():
    samples = np.stack([np.full((SIDE, SIDE), value, np.uint8) for value in (10, 20, 30)])
    figure = figures.sample_sheet(samples, samples + 100, ["a", "b", "c"], columns=2)
    assert [int(picture[0, 0]) for picture in pictures(figure.axes)] == [10, 20, 110, 120, 30, 130]
    assert [axis.get_xlabel() for axis in figure.axes[2:4]] == ["a", "b"]
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["drawn", "nearest"] * 2
    alone = figures.sample_sheet(samples, columns=2)
    assert len(pictures(alone.axes)) == 3 and len(alone.axes) == 4
    assert says_nothing_yet(figures.sample_sheet(np.zeros((0, SIDE, SIDE), np.uint8)))


# --- Features --------------------------------------------------------------------------------------------------------


def levels(shift: float = 0.0) -> list[torch.Tensor]:
    """Two levels: 5 channels of 8 x 8, 3 of 4 x 4; channel c has the values c + shift and 100 more in its corner."""
    found = []
    for count, side in ((5, 8), (3, 4)):
        level = torch.arange(count).float()[:, None, None].repeat(1, side, side) + shift
        level[:, : side // 2, : side // 2] += 100
        found.append(level)
    return found


def test_features_show_the_same_channels_in_each_group_on_one_scale():
    picture = np.full((SIDE, SIDE), 7, np.uint8)
    figure = figures.feature_maps({"t = 100": levels(), "mean": levels(10)}, picture, channels=3)
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 1 + 2 * 2 * 3
    assert "t = 100" in texts(figure.axes) and "mean" in texts(figure.axes)
    first_line = shown[1:7]
    assert [axis.get_xlabel() for axis in first_line] == ["0", "2", "4"] * 2
    assert [float(axis.images[0].get_array().min()) for axis in first_line] == [0, 2, 4, 10, 12, 14]
    assert first_line[0].images[0].get_clim() == first_line[3].images[0].get_clim()
    assert first_line[0].images[0].get_clim() != first_line[1].images[0].get_clim()
    assert [axis.get_xlabel() for axis in shown[7:10]] == ["0", "1", "2"]
    assert says_nothing_yet(figures.feature_maps({}))


def test_fewer_channels_than_asked_for():
    figure = figures.feature_maps({"mean": levels()}, channels=4)
    assert [len(line) for line in ([a for a in figure.axes[i : i + 4] if a.images] for i in (0, 4))] == [4, 3]


def test_maps_of_a_line_share_a_scale():
    maps = {"true": torch.tensor([[0.0, 1]]), "moved": torch.tensor([[-3.0, 2]])}
    figure = figures.map_lines({"mirrored": maps, "smaller": {"true": torch.ones(1, 2), "moved": torch.zeros(1, 2)}})
    assert [axis.images[0].get_clim() for axis in figure.axes] == [(-3, 2), (-3, 2), (0, 1), (0, 1)]
    assert figure.axes[0].get_ylabel() == "mirrored"
    assert texts(figure.axes) == ["true", "moved", "", ""]
    others = figures.map_lines({"a": maps, "b": {"other": torch.ones(1, 2)}})
    assert texts(others.axes)[:3] == ["true", "moved", "other"]
    assert says_nothing_yet(figures.map_lines({}))


def test_compression_has_a_panel_a_scalar_and_a_line_a_training():
    curves = {"sum": {"mse": [1, 0.5], "kl": [0.1, 0.4]}, "mixed": {"mse": [1, 0.9], "kl": [0.1, 0.001]}, "none": {}}
    left, right = figures.compression_curves(curves, {"kl": "KL", "mse": "error"}).axes
    assert [left.get_ylabel(), right.get_ylabel()] == ["KL", "error"]
    assert [list(line.get_ydata()) for line in left.lines] == [[0.1, 0.4], [0.1, 0.001]]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["sum", "mixed"]
    assert len(figures.compression_curves(curves).axes) == 2  # both scalars, by their own names
    assert says_nothing_yet(figures.compression_curves({}))
