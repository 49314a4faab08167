"""Figures of the fusion of two networks' features: the shares of its branches over a training, what the noise filter
does to a spectrum, and what two detectors found in the same pictures.

A record's curve holds `probe_epoch` and, at each of these epochs, the mean over the levels of the learned weights:
weight_ddpm, weight_det and weight_cross, whose sum is one, and weight_residual (`defectlab.papers.d3n.fusion`).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from defectlab.figures import BAD, GOOD, INK, nothing_yet
from defectlab.figures.detection import boxed
from defectlab.metrics.detection import match, unpack
from defectlab.runs import Record

NAMES = {"det": "detector (Det)", "ddpm": "DDPM", "cross": "cross-attention (Cross)"}  # the figure's own in brackets
SHORT = {"det": "Det", "ddpm": "DDPM", "cross": "Cross"}
COLOURS = {"det": GOOD, "ddpm": BAD, "cross": "#228833"}

# --- Shares of the branches (Fig. 11 of D3N) -------------------------------------------------------------------------


def shares(curve: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """The learned weights of a record's curve by branch, "epoch" and, where there is one, "residual": (probes + 1,)
    each, from epoch 0 on, when the shares are equal and the residual has weight 1.

    ValueError where the curve has no shares.
    """
    branches = [name for name in NAMES if f"weight_{name}" in curve]
    if not branches:
        raise ValueError("this curve has no weight_det: the row learns no weights of branches")
    first = {name: 1 / len(branches) for name in branches} | {"epoch": 0.0}
    columns = {name: f"weight_{name}" for name in branches} | {"epoch": "probe_epoch"}
    if "weight_residual" in curve:
        first["residual"], columns["residual"] = 1.0, "weight_residual"
    return {name: np.array([first[name], *curve[column]], dtype=float) for name, column in columns.items()}


def times_highest(curve: Mapping[str, Sequence[float]], branch: str = "det") -> tuple[int, int]:
    """At how many probes of a training one branch has the highest share, and how many probes there are."""
    found = {name: values[1:] for name, values in shares(curve).items() if name in NAMES}
    others = np.max([values for name, values in found.items() if name != branch], axis=0)
    return int((found[branch] > others).sum()), len(others)


def share_curves(records: Sequence[Record]) -> Figure:
    """Fig. 11 of D3N, a line a seed: (a) the shares of all branches, then the detector's against each other one's,
    their sum one; last the residual's weight, which is no share and stands beside them."""
    if not records:
        return nothing_yet()
    found = [shares(record.curve) for record in records]
    branches = [name for name in NAMES if name in found[0]]
    groups = [branches]
    if len(branches) > 2:
        groups += [["det", other] for other in branches if other != "det"]
    extra = "residual" in found[0]
    count = len(groups) + extra
    figure, axes = plt.subplots(1, count, figsize=(2.35 * count + 0.4, 2.5), squeeze=False)
    for letter, axis, group in zip("abc", axes[0], groups, strict=False):
        for of_seed in found:
            total = sum(of_seed[name] for name in group)
            for name in group:
                _drawn(axis, of_seed["epoch"], of_seed[name] / total, COLOURS[name])
        _around(axis, 1 / len(group))
        title = "all branches" if group is branches else " and ".join(SHORT[name] for name in group)
        axis.set_title(f"({letter}) {title}")
    axes[0, 0].set_ylabel("share")
    if extra:
        for of_seed in found:
            _drawn(axes[0, -1], of_seed["epoch"], of_seed["residual"], INK)
        _around(axes[0, -1], 1.0)
        axes[0, -1].set_title("residual: its weight")
    handles = [plt.Line2D([], [], color=COLOURS[name], label=NAMES[name]) for name in branches]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _drawn(axis: Axes, epochs: np.ndarray, values: np.ndarray, colour: str) -> None:
    axis.plot(epochs, values, ".-", color=colour, alpha=0.8, linewidth=1.2)


def _around(axis: Axes, start: float) -> None:
    """The start as a dotted line in the middle; at least 0.1 up and down, so that what hardly moved looks so."""
    farthest = max(float(np.abs(line.get_ydata() - start).max()) for line in axis.lines)
    axis.axhline(start, color=INK, linestyle=":", linewidth=0.8)
    axis.set_ylim(start - max(0.1, 1.1 * farthest), start + max(0.1, 1.1 * farthest))
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)


# --- The noise filter ------------------------------------------------------------------------------------------------


class FilterLook(NamedTuple):
    """What a filter does to maps, in planes (H, W) of frequencies with the zero frequency in the corner."""

    before: np.ndarray  # amplitude of the spectrum, mean over pictures and channels
    attention: np.ndarray  # weight of each wave, 0..2, mean over pictures
    after: np.ndarray  # amplitude behind the filter


@torch.no_grad()
def look_through(noise_filter: nn.Module, maps: Tensor) -> FilterLook:
    """A `NoiseFilter` on real maps (B, C, H, W). A frequency and its mirror image are one wave of a real map, so the
    weight that acts on it is their mean."""
    spectrum = torch.fft.fft2(maps.float(), norm="ortho")
    weight = noise_filter.attention(spectrum)[:, 0]  # (B, H, W)
    mirrored = weight.flip(1, 2).roll((1, 1), (1, 2))  # the weight at minus the frequency
    after = torch.fft.fft2(noise_filter(maps).float(), norm="ortho")
    planes = spectrum.abs().mean((0, 1)), ((weight + mirrored) / 2).mean(0), after.abs().mean((0, 1))
    return FilterLook(*(plane.cpu().numpy() for plane in planes))


def radial_mean(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A plane (H, W), zero frequency in the corner -> frequencies in cycles a pixel, 0 to 0.5, and the mean of the
    plane in a ring around each; the corners beyond 0.5 are left out."""
    rows, columns = (np.fft.fftfreq(side) for side in plane.shape)
    side = min(plane.shape)
    ring = np.round(np.hypot(rows[:, None], columns) * side).astype(int)
    count = side // 2 + 1
    inside = ring < count
    total = np.bincount(ring[inside], plane[inside], minlength=count)
    return np.arange(count) / side, total / np.bincount(ring[inside], minlength=count)


def filter_panels(looks: Mapping[str, FilterLook], width: float = 8.0) -> Figure:
    """A line a level: amplitudes before and behind the filter by frequency, its weight on each wave (zero frequency in
    the middle), and the mean of that weight by frequency."""
    if not looks:
        return nothing_yet()
    figure, axes = plt.subplots(len(looks), 3, figsize=(width, 1.75 * len(looks) + 0.2), squeeze=False)
    for (name, look), line in zip(looks.items(), axes, strict=True):
        for plane, colour, label in ((look.before, INK, "before"), (look.after, BAD, "behind")):
            line[0].plot(*radial_mean(plane), ".-", color=colour, linewidth=1.2, label=label)
        line[0].set(yscale="log", ylabel=f"{name}\namplitude")
        away = max(float(np.abs(look.attention - 1).max()), 0.01)  # of nothing learned, no colour
        shown = np.fft.fftshift(look.attention)
        # a frequency is the middle of its pixel; of an even number of them zero is not the one in the middle
        edges = [(index - side // 2 - 0.5) / side for side in shown.shape[::-1] for index in (0, side)]
        drawn = line[1].imshow(shown, "RdBu_r", vmin=1 - away, vmax=1 + away, extent=edges, origin="lower")
        figure.colorbar(drawn, ax=line[1], shrink=0.9)
        line[1].set(xticks=(-0.5, 0, 0.5), yticks=(-0.5, 0, 0.5))
        line[2].plot(*radial_mean(look.attention), ".-", color=INK, linewidth=1.2)
        line[2].axhline(1, color=INK, linestyle=":", linewidth=0.8)
        line[2].set_ylim(1 - 1.1 * away, 1 + 1.1 * away)
    for axis, title in zip(axes[0], ("amplitude of the maps", "weight of a wave", "weight by frequency"), strict=True):
        axis.set_title(title)
    for axis in (axes[-1, 0], axes[-1, 2]):
        axis.set_xlabel("cycles a pixel")
    axes[-1, 1].set_xlabel("cycles a pixel, along rows")
    axes[0, 0].legend(frameon=False)
    return figure


# --- Two detectors on the same pictures ------------------------------------------------------------------------------


def same_pictures(records: Mapping[str, Record], count: int = 6, width: float = 9.0, threshold: float = 0.25) -> Figure:
    """Telling cases of the first record, spread over its list (missed, false alarms, best); a line a record, each with
    how many of the defects there that one found at `threshold`, and its false boxes. `width` is that of `count` cases.

    ValueError where the records were not tested on the same pictures.
    """
    if not records:
        return nothing_yet()
    first, *_ = records.values()
    arrays = first.arrays
    chosen = np.unique(np.linspace(0, len(arrays["case_index"]) - 1, count).round().astype(int))
    places = arrays["case_index"][chosen].tolist()
    scale, offset = arrays["case_scale"][chosen].tolist(), arrays["case_offset"][chosen].tolist()

    def in_small(whole: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        moved = zip(places, scale, offset, strict=True)
        return [
            {**whole[place], "boxes": whole[place]["boxes"] * by + torch.tensor([x, y, x, y])}
            for place, by, (x, y) in moved
        ]

    truths, found, titles = [], [], []
    for name, record in records.items():
        predictions, own, names, class_names = unpack(record.arrays)
        if names != arrays["names"].tolist():
            raise ValueError(f"{name} was tested on other pictures")
        truths += in_small(own)
        found += in_small(predictions)
        titles += [f"{name}: {_counted(predictions[i], own[i], len(class_names), threshold)}" for i in places]
    pictures = [*arrays["case_images"][chosen]] * len(records)
    shrunk = width * len(places) / count  # of fewer cases not larger pictures
    return boxed(pictures, truths, found, titles, class_names, len(places), shrunk, threshold)


def _counted(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], classes: int, threshold: float) -> str:
    matches = match([found], [truth], (0.5,), classes)
    right = matches.right[matches.scores >= threshold, 0]
    return f"{int(right.sum())} of {len(truth['labels'])}\n{int((~right).sum())} false"
