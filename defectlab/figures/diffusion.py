"""Figures of the diffusion notebooks: noising and denoising, samples, error by timestep, feature maps, compression.

All are drawn from tensors, or from a record of `defectlab.diffusion.ddpm`, whose curve has "loss" and whose arrays are
timesteps (T,), errors and errors_train (T,) and samples (N, S, S) or (N, S, S, 3) uint8.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from torch import Tensor

from defectlab.figures.anomaly import INK, nothing_yet, picture_axes
from defectlab.runs import Record

MARK = "#bbbbbb"


# --- Noise -----------------------------------------------------------------------------------------------------------


def schedule(alpha_hat: Tensor, marks: Sequence[int] = (), width: float = 5.0) -> Figure:
    """What is left of the picture and how much noise there is at each timestep, as factors of equation 2; `marks` are
    timesteps to point at."""
    figure, axis = plt.subplots(figsize=(width, 2.4))
    axis.plot(alpha_hat.sqrt(), label="picture, $\\sqrt{\\hat\\alpha_t}$")
    axis.plot((1 - alpha_hat).sqrt(), label="noise, $\\sqrt{1 - \\hat\\alpha_t}$")
    _mark(axis, marks)
    axis.set(xlabel="timestep t", ylabel="factor", xlim=(0, len(alpha_hat) - 1), ylim=(0, 1.02))
    axis.legend(frameon=False, loc="center right")
    return figure


def picture_columns(columns: Mapping[str, Tensor], titles: Sequence[str] = (), width: float = 9.0) -> Figure:
    """A line a picture, a column a stage, such as its noise at several timesteps.

    `columns`: title -> (K, C, H, W), -1 black to 1 white (values beyond are cut), C = 1 or 3. `titles`: of the lines.
    """
    if not columns or not len(next(iter(columns.values()))):
        return nothing_yet()
    count = len(next(iter(columns.values())))
    figure, axes = picture_axes(count, len(columns), width / len(columns), above=0.3)
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(name, fontsize=8)
        for axis, picture in zip(axes[:, column], as_pictures(pictures), strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
    for axis, title in zip(axes[:, 0], titles, strict=False):
        axis.set_ylabel(title, fontsize=7)
    return figure


def as_pictures(values: Tensor) -> np.ndarray:
    """(K, C, H, W), -1 to 1 -> uint8 (K, H, W) where C is 1, else (K, H, W, C)."""
    pictures = ((values.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1).numpy()
    return pictures[..., 0] if pictures.shape[-1] == 1 else pictures


# --- Training --------------------------------------------------------------------------------------------------------


def noise_losses(records: Mapping[str, Sequence[Record]], width: float = 5.0) -> Figure:
    """Training loss (mean squared error of the predicted noise) an epoch, a colour a row, a line a seed; dashed what it
    costs to predict no noise at all."""
    records = {name: found for name, found in records.items() if found}
    if not records:
        return nothing_yet()
    figure, axis = plt.subplots(figsize=(width, 2.4))
    for colour, (name, found) in enumerate(records.items()):
        for index, record in enumerate(found):
            loss = record.curve["loss"]
            look = {"color": f"C{colour}", "marker": "." if len(loss) <= 10 else None}
            axis.plot(range(1, len(loss) + 1), loss, label=None if index else name, **look)
    axis.axhline(1, color=INK, linestyle="--", linewidth=0.8)
    axis.set(xlabel="epoch", ylabel="error of the noise")
    axis.xaxis.get_major_locator().set_params(integer=True)
    _logarithmic(axis)
    axis.legend(frameon=False)
    return figure


def timestep_errors(records: Mapping[str, Record], marks: Sequence[int] = (), width: float = 5.0) -> Figure:
    """Share of the noise's power that is mispredicted, by timestep: test pictures (line) and training pictures (dots),
    a colour a row; 1, dashed, is as good as predicting no noise at all."""
    if not records:
        return nothing_yet()
    figure, axis = plt.subplots(figsize=(width, 2.6))
    for colour, (name, record) in enumerate(records.items()):
        arrays = record.arrays
        axis.plot(arrays["timesteps"], arrays["errors"], color=f"C{colour}", label=f"{name}, test pictures")
        label = f"{name}, training pictures"
        axis.plot(arrays["timesteps"], arrays["errors_train"], ".", color=f"C{colour}", label=label)
    axis.axhline(1, color=INK, linestyle="--", linewidth=0.8)
    _mark(axis, marks)
    axis.set(xlabel="timestep t", ylabel="error of the noise")
    _logarithmic(axis)
    axis.legend(frameon=False, fontsize=8)
    return figure


def nearest(samples: np.ndarray, pictures: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample (N, S, S[, 3]) uint8 the nearest of (M, C, S, S) uint8 and of their mirror images (both ways and
    turned by 180 degrees): index (N,), and the root mean squared difference in grey levels (N,)."""
    flat = torch.as_tensor(samples).float()
    flat = (flat if flat.ndim == 3 else flat.movedim(-1, 1)).flatten(1)
    distances = [
        torch.cdist(flat, pictures.flip(axes).float().cpu().flatten(1)) for axes in ((), (-1,), (-2,), (-2, -1))
    ]
    best, index = torch.stack(distances).amin(0).min(1)
    return index.numpy(), (best / flat.shape[1] ** 0.5).numpy()


def sample_sheet(
    samples: np.ndarray,
    others: np.ndarray | None = None,
    titles: Sequence[str] = (),
    columns: int = 8,
    width: float = 9.0,
) -> Figure:
    """Drawn pictures (N, S, S[, 3]) uint8 in lines of `columns`; below each line, where there are `others` (of the
    same shape), those, with `titles` under them."""
    if not len(samples):
        return nothing_yet()
    each = 1 if others is None else 2
    lines = -(-len(samples) // columns)
    figure, axes = picture_axes(each * lines, columns, width / columns, above=0.18 * lines * bool(len(titles)))
    for index, sample in enumerate(samples):
        line, column = each * (index // columns), index % columns
        axes[line, column].imshow(sample, cmap="gray", vmin=0, vmax=255)
        if others is not None:
            axes[line + 1, column].imshow(others[index], cmap="gray", vmin=0, vmax=255)
        if len(titles):
            axes[line + each - 1, column].set_xlabel(titles[index], fontsize=7, labelpad=2)
    if others is not None:
        for line in range(0, each * lines, each):
            axes[line, 0].set_ylabel("drawn", fontsize=7)
            axes[line + 1, 0].set_ylabel("nearest", fontsize=7)
    return figure


# --- Features --------------------------------------------------------------------------------------------------------


def feature_maps(
    groups: Mapping[str, Sequence[Tensor]],
    picture: np.ndarray | None = None,
    channels: int = 3,
    width: float = 9.0,
) -> Figure:
    """A line a level, finest first; of each group (a timestep, or their mean) some channels, the same in all groups.

    `groups`: title -> a map (C_k, H_k, W_k) a level. The channels are evenly spaced, not chosen by their look. A
    channel has one grey scale in all groups, cut at the 1st and 99th percentile. `picture`: uint8 (H, W) or (H, W, 3),
    shown on the left.
    """
    if not groups:
        return nothing_yet()
    first = next(iter(groups.values()))
    shown = [np.linspace(0, len(level) - 1, min(channels, len(level))).round().astype(int) for level in first]
    left, many = int(picture is not None), max(map(len, shown))
    count = left + many * len(groups)
    figure, axes = picture_axes(len(first), count, width / count, above=0.25 + 0.15 * len(first))
    if picture is not None:
        axes[0, 0].imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes[0, 0].set_title("picture", fontsize=8)
    for group, name in enumerate(groups):
        axes[0, left + group * many + many // 2].set_title(name, fontsize=8)
    for line, of_level in enumerate(shown):
        for place, channel in enumerate(of_level):
            maps = np.stack([levels[line][channel].float().cpu().numpy() for levels in groups.values()])
            low, high = np.percentile(maps, (1, 99))
            for axis, values in zip(axes[line, left + place :: many], maps, strict=True):
                axis.imshow(values, "gray", vmin=low, vmax=high)
                axis.set_xlabel(f"{channel}", fontsize=6, labelpad=1)
    return figure


def kept_maps(record: Record, cases: int = 3, channels: int = 2, width: float = 7.5) -> Figure:
    """What a record keeps of test pictures (`telling_maps`), a line each: the picture, what one step from the last
    timestep makes of it, and of each level, finest first, some channels, whose grey scale is one for all pictures."""
    arrays = record.arrays
    columns = [("picture", arrays["case_images"]), ("told", arrays["case_told"])]
    for level, name in enumerate(sorted(name for name in arrays if name.startswith("case_features_"))):
        for channel in range(min(channels, arrays[name].shape[1])):
            columns.append(("" if channel else f"level {level}", arrays[name][:, channel]))
    cases = min(cases, len(arrays["case_images"]))
    figure, axes = picture_axes(cases, len(columns), width / len(columns), above=0.3)
    for column, (title, pictures) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=8)
        for axis, picture in zip(axes[:, column], pictures[:: len(pictures) // cases], strict=False):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
    return figure


def map_lines(lines: Mapping[str, Mapping[str, Tensor]], width: float = 7.0) -> Figure:
    """A line a case, a column a map (H, W); one grey scale a line, from its smallest to its largest value.
    The maps of a line have one size; names that are the first line's are not repeated."""
    if not lines:
        return nothing_yet()
    columns = max(map(len, lines.values()))
    figure, axes = picture_axes(len(lines), columns, width / max(columns, 4), above=0.25)
    for line, (title, maps) in zip(axes, lines.items(), strict=True):
        values = np.stack([m.float().cpu().numpy() for m in maps.values()])
        for axis, name, shown in zip(line, maps, values, strict=False):
            axis.imshow(shown, "gray", vmin=values.min(), vmax=values.max())
            if line[0] is axes[0, 0] or list(maps) != list(next(iter(lines.values()))):
                axis.set_title(name, fontsize=8)
        line[0].set_ylabel(title, fontsize=8)
    return figure


def compression_curves(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    names: Mapping[str, str] | None = None,
    width: float = 8.0,
    xlabel: str = "epoch",
) -> Figure:
    """Scalars of several trainings, logarithmic: a panel a scalar, a line a training.

    `curves`: training -> scalar -> a value an epoch. `names`: scalar -> how the axis is labelled, in the order of the
    panels (default: the scalars of the first training).
    """
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return nothing_yet()
    names = names or {scalar: scalar for scalar in next(iter(curves.values()))}
    figure, axes = plt.subplots(1, len(names), figsize=(width, 2.4), squeeze=False)
    for axis, (scalar, label) in zip(axes[0], names.items(), strict=True):
        for name, curve in curves.items():
            axis.plot(range(1, len(curve[scalar]) + 1), curve[scalar], label=name)
        axis.set(xlabel=xlabel, ylabel=label)
        _logarithmic(axis)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


# --- Helpers ---------------------------------------------------------------------------------------------------------


def _mark(axis: Axes, timesteps: Sequence[int]) -> None:
    for timestep in timesteps:
        axis.axvline(timestep, color=MARK, linewidth=0.8, zorder=0)


def _logarithmic(axis: Axes) -> None:
    """The y axis, with plain numbers, as many between the decades as there is room for."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    digits = "123456789" if high < 4 * low else "1235" if high < 20 * low else "1"
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in digits else "")
