"""Figures of the segmentation notebooks: outlines, telling cases, networks side by side, smaller training sets.

A record's arrays are those of `defectlab.segmentation.training`: of each test image the pixels counted, image_tp,
image_fp, image_fn and image_tn, and whether its truth has foreground, image_nonempty; of a dozen telling ones a small
picture: case_index (K,) into the test images, case_why (K,), case_images (K, side, side, 3), case_masks (K, side, side)
0 or 1, case_probabilities (K, side, side) 0..255.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from defectlab.data.masks import SegmentationData, SegmentationSplit
from defectlab.figures.anomaly import INK, nothing_yet, picture_axes
from defectlab.networks.segmentation import Segmenter
from defectlab.runs import Record
from defectlab.training.segmentation import segment

MASK, OTHER = "#ff5566", "#ffd84d"  # outlines: both are seen on steel, on the dark ground, and beside each other


class Case(NamedTuple):
    """A test image as a figure shows it."""

    picture: np.ndarray  # (H, W, 3) uint8
    truth: np.ndarray  # (H, W) 0 or 1
    probability: np.ndarray  # (H, W) 0..255


# --- Masks on pictures -----------------------------------------------------------------------------------------------


def outlined(
    pictures: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    titles: Sequence[str],
    others: Sequence[np.ndarray] | None = None,
    names: tuple[str, str] = ("mask", "other mask"),
    columns: int = 6,
    width: float = 9.0,
) -> Figure:
    """Pictures (H, W, 3) uint8 with the outline of a mask (H, W) in red, and of another one, below it, in yellow.

    `names` are those of the two in the legend, which is drawn where there are `others`.
    """
    if not len(pictures):
        return nothing_yet()
    rows, cell = -(-len(pictures) // columns), width / columns
    figure, axes = picture_axes(rows, columns, cell, above=0.18 * rows + 0.25 * (others is not None))
    for index, (picture, mask, title) in enumerate(zip(pictures, masks, titles, strict=True)):
        axis = axes.flat[index]
        axis.imshow(picture, vmin=0, vmax=255)
        axis.set_title(title, fontsize=8)
        if others is not None:
            _outline(axis, others[index], OTHER, 2.2)
        _outline(axis, mask, MASK, 1)
    if others is not None:
        handles = [Line2D([], [], color=c, label=name) for c, name in zip((MASK, OTHER), names, strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def contact_sheet(
    data: SegmentationData,
    part: str = "train",
    each: int = 2,
    columns: int = 6,
    width: float = 9.0,
    other: SegmentationData | None = None,
) -> Figure:
    """Of each type the first `each` pictures of a part, with the outline of the target: for judging masks by eye.

    `other`: the same set with another target, outlined in yellow. ValueError where its pictures are not the same.
    """
    split = getattr(data, part)
    if other is not None and getattr(other, part).names != split.names:
        raise ValueError(f"{other.label} ({other.target}) has other pictures in {part} than {data.label}")
    types = split.types.tolist()
    chosen = [[i for i, t in enumerate(types) if t == kind][:each] for kind in range(len(data.type_names))]
    indices = [index for of_kind in chosen for index in of_kind]
    titles = [f"{data.type_names[types[i]]} {split.names[i].rsplit('/', 1)[-1]}" for i in indices]
    others = None if other is None else masks_of(getattr(other, part), indices)
    names = (data.target, "" if other is None else other.target)
    return outlined(pictures_of(split, indices), masks_of(split, indices), titles, others, names, columns, width)


def pictures_of(split: SegmentationSplit, indices: Sequence[int]) -> list[np.ndarray]:
    """The pictures at these indices, (H, W, 3) uint8."""
    return list(split.images[list(indices)].movedim(1, -1).cpu().numpy())


def masks_of(split: SegmentationSplit, indices: Sequence[int]) -> list[np.ndarray]:
    """The masks at these indices, (H, W) uint8."""
    return list(split.masks[list(indices)].cpu().numpy())


# --- What a network found --------------------------------------------------------------------------------------------


def kept_cases(record: Record) -> dict[int, Case]:
    """The dozen telling cases that a record keeps: index of the test image -> its small pictures."""
    arrays = record.arrays
    parts = (arrays[f"case_{name}"] for name in ("images", "masks", "probabilities"))
    return {int(index): Case(*case) for index, *case in zip(arrays["case_index"], *parts, strict=True)}


@torch.inference_mode()
def computed_cases(network: Segmenter, split: SegmentationSplit, indices: Sequence[int]) -> dict[int, Case]:
    """The same in full size, by a trained network, for any images of a split."""
    chosen = list(indices)
    found = (255 * segment(network, split.images[chosen])).round().byte().cpu().numpy()
    parts = zip(pictures_of(split, chosen), masks_of(split, chosen), found, strict=True)
    return {index: Case(*case) for index, case in zip(chosen, parts, strict=True)}


def image_scores(record: Record) -> np.ndarray:
    """IoU of the foreground of each test image in per cent, (N,); NaN where the truth is empty."""
    arrays = record.arrays
    tp, either = arrays["image_tp"], arrays["image_tp"] + arrays["image_fp"] + arrays["image_fn"]
    return np.where(arrays["image_nonempty"], 100 * tp / np.maximum(either, 1), math.nan)


def cases(record: Record | None, each: int = 4, width: float = 9.0) -> Figure:
    """The telling cases of a record, of each reason the first `each`: above the picture, the truth outlined in red;
    below the probability, 0 black to 1 white, what the threshold from dev finds outlined in yellow; under it the IoU,
    or what is wrong in an image whose truth is empty."""
    if record is None:
        return nothing_yet()
    arrays, kept = record.arrays, kept_cases(record)
    reasons = arrays["case_why"].tolist()
    chosen = [i for i, why in enumerate(reasons) if reasons[:i].count(why) < each]
    cell = width / max(len(chosen), 3 * each)
    figure, axes = picture_axes(2, len(chosen), cell, above=0.55)
    figure.suptitle(" ", size=8)  # keeps the place for the reasons
    for column, position in enumerate(chosen):
        (above, below), why = axes[:, column], reasons[position]
        index = int(arrays["case_index"][position])
        above.imshow(kept[index].picture)
        _outline(above, kept[index].truth, MASK, 1)
        below.imshow(kept[index].probability, cmap="gray", vmin=0, vmax=255)
        _outline(below, kept[index].probability > 255 * record.dev["threshold"], OTHER, 0.8)
        above.set_title(_kind(arrays, index), fontsize=7)
        _caption(below, _score(arrays, index))
        if reasons.index(why) == position:  # above the first of its kind, beyond its own width if need be
            place = (0, 1 + 0.25 / cell)  # inches above the picture
            above.text(*place, f"{why}:", transform=above.transAxes, fontsize=7, color=INK).set_in_layout(False)
    return figure


def shown_images(records: Mapping[str, Record], count: int = 5, kept: bool = True) -> list[int]:
    """Which test images to show side by side: with `kept` those that the most records hold, else any; of each type
    first the one of the lowest mean IoU."""
    if not records:
        return []
    scores = np.stack([image_scores(record) for record in records.values()]).mean(0)
    types = next(iter(records.values())).arrays["types"].tolist()
    holders = [set(kept_cases(record)) for record in records.values()] if kept else []
    lacking = {index: sum(index not in held for held in holders) for index in range(len(types))}
    order = sorted(lacking, key=lambda i: (lacking[i], np.nan_to_num(scores[i], nan=math.inf)))
    turn: dict[int, int] = {}  # how often the image's type has been met before
    met: dict[int, int] = {}
    for index in order:
        turn[index] = met[types[index]] = met.get(types[index], -1) + 1
    return sorted(order, key=lambda i: (lacking[i], turn[i]))[:count]


def side_by_side(
    records: Mapping[str, Record], found: Mapping[str, Mapping[int, Case]], indices: Sequence[int], width: float = 9.0
) -> Figure:
    """The same test images by several networks, as in Figure 6 of Machines 2025, 13, 712: a line an image, a column a
    network. Left the picture, then each network's probability (0 black, 1 white), the truth outlined in red, below it
    the IoU of the image or what is wrong in it. An image that a record does not hold is left out there.

    `found`: name of the network -> its cases, as `kept_cases` or `computed_cases` give them.
    """
    if not records or not len(indices):
        return nothing_yet()
    columns, cell = 1 + len(records), width / max(1 + len(records), 7)
    figure, axes = picture_axes(len(indices), columns, cell, above=0.16 * len(indices) + 0.2)
    arrays = {name: record.arrays for name, record in records.items()}
    for axis, name in zip(axes[0], ("picture", *records), strict=True):
        axis.set_title(name, fontsize=7)
    for line, index in zip(axes, indices, strict=True):
        for case in [cases[index] for cases in found.values() if index in cases][:1]:
            line[0].imshow(case.picture)
            _outline(line[0], case.truth, MASK, 0.8)
        _caption(line[0], _kind(next(iter(arrays.values())), index))
        for axis, name in zip(line[1:], records, strict=True):
            _caption(axis, _score(arrays[name], index))
            if index not in found[name]:
                axis.text(0.5, 0.5, "not kept", ha="center", va="center", fontsize=7, transform=axis.transAxes)
                continue
            axis.imshow(found[name][index].probability, cmap="gray", vmin=0, vmax=255)
            _outline(axis, found[name][index].truth, MASK, 0.8)
    return figure


# --- Smaller training sets -------------------------------------------------------------------------------------------


def reduction_curves(
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]], ylabel: str, width: float = 8.0
) -> Figure:
    """A metric against the share of the training images (per cent, logarithmic): a panel a title, a line a network
    through its means over seeds, a dot a seed. panels: title -> network -> share -> values of the seeds."""
    panels = {t: {n: {s: v for s, v in p.items() if len(v)} for n, p in lines.items()} for t, lines in panels.items()}
    panels = {title: lines for title, lines in panels.items() if any(lines.values())}
    if not panels:
        return nothing_yet()
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 2.6), sharey=True, squeeze=False)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    shares = sorted({share for lines in panels.values() for points in lines.values() for share in points})
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            colour = f"C{names.index(name)}"
            axis.plot(sorted(points), [np.mean(points[s]) for s in sorted(points)], color=colour, linewidth=1.2)
            for share, values in points.items():
                axis.plot([share] * len(values), values, ".", color=colour, markersize=5)
        axis.set(title=title, xlabel="training images / %", xscale="log", xlim=(0.8 * shares[0], 1.25 * shares[-1]))
        axis.set_xticks(shares, [f"{share:g}" for share in shares])
        axis.set_xticks([], minor=True)
    axes[0, 0].set_ylabel(ylabel)
    handles = [Line2D([], [], color=f"C{i}", marker=".", label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


# --- Helpers ---------------------------------------------------------------------------------------------------------


def _outline(axis: Axes, mask: np.ndarray, colour: str, line: float) -> None:
    if mask.any() and not mask.all():  # contour warns where there is none
        axis.contour(np.asarray(mask, float), [0.5], colors=colour, linewidths=line)


def _caption(axis: Axes, text: str) -> None:
    axis.set_xlabel(text, fontsize=7, labelpad=2)


def _kind(arrays: Mapping[str, np.ndarray], index: int) -> str:
    return str(arrays["type_names"][arrays["types"][index]])


def _score(arrays: Mapping[str, np.ndarray], index: int) -> str:
    tp, fp, fn, tn = (int(arrays[f"image_{name}"][index]) for name in ("tp", "fp", "fn", "tn"))
    if arrays["image_nonempty"][index]:
        return f"IoU {100 * tp / (tp + fp + fn):.1f}"
    wrong = 100 * fp / (fp + tn)
    return f"wrong {wrong:.{0 if wrong >= 10 else 1}f} %"
