"""Figures of instances: boxes and coloured masks, truth beside prediction, and how a mask is put together.

A record's arrays are those of `defectlab.detector.instances.evaluate_instances`: of a dozen telling test pictures
case_images (K, side, side) uint8, and case_true and case_found (K, side, side) uint8, 1 + class of a pixel, 0 for
background, what was found at the score threshold from dev. Colours are those of `defectlab.detection_figures`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import einsum
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from defectlab.data.instances import InstanceSplit
from defectlab.figures.anomaly import INK, nothing_yet, picture_axes
from defectlab.figures.detection import CLASS_COLOURS
from defectlab.metrics.detection import match, unpack
from defectlab.runs import Record

STRENGTH = 0.4  # of a mask's colour over the picture: defects stay visible below it


class Shown(NamedTuple):
    """A picture with what stands on it."""

    picture: np.ndarray  # (S, S) or (S, S, 3) uint8
    classes: np.ndarray  # (S, S) uint8: 1 + class of a pixel, 0 for background
    boxes: Mapping[str, Tensor]  # boxes (n, 4) xyxy px of the picture, labels (n,); scores (n,) if predicted


# --- What to show ----------------------------------------------------------------------------------------------------


def painted(picture: np.ndarray, classes: np.ndarray, strength: float = STRENGTH) -> np.ndarray:
    """A picture (H, W) or (H, W, 3) uint8 with the pixels of `classes` (H, W) above 0 in the colours of their class:
    (H, W, 3) uint8, of whose colour `strength`, 0..1, is the mask's."""
    ground = np.repeat(picture[..., None], 3, -1) if picture.ndim == 2 else picture
    palette = np.array([to_rgb(colour) for colour in CLASS_COLOURS]) * 255
    colours = palette[(classes.astype(int) - 1) % len(palette)]
    share = strength * (classes > 0)[..., None]
    return (ground * (1 - share) + colours * share).round().astype(np.uint8)


def class_map(numbers: Tensor, labels: Tensor) -> np.ndarray:
    """Numbers of instances (S, S), k + 1 for label k of (n,), 0 background -> (S, S) uint8, 1 + class of a pixel."""
    table = torch.cat([labels.new_zeros(1), labels.clamp(min=-1) + 1])
    return table[numbers.long()].byte().cpu().numpy()


def from_split(split: InstanceSplit, indices: Sequence[int]) -> list[Shown]:
    """Pictures of a split with their true boxes and masks, as the network sees them."""
    shown = []
    for index in indices:
        real = split.labels[index] >= 0
        picture = split.images[index].movedim(0, -1).cpu().numpy()  # (S, S, C)
        boxes = {"boxes": split.boxes[index][real].cpu(), "labels": split.labels[index][real].cpu()}
        classes = class_map(split.maps[index].cpu(), boxes["labels"])
        shown.append(Shown(picture[..., 0] if picture.shape[-1] == 1 else picture, classes, boxes))
    return shown


def from_record(record: Record) -> list[tuple[Shown, Shown]]:
    """(truth, prediction) of each telling case; predicted boxes are those from the threshold of dev on."""
    arrays = record.arrays
    predictions, truths, _, _ = unpack(arrays)
    threshold = np.float16(record.dev["threshold"])  # as coarse as the scores that are kept
    pairs = []
    for case, index in enumerate(arrays["case_index"].tolist()):
        sides = []
        for whole, classes in ((truths[index], "case_true"), (predictions[index], "case_found")):
            x, y = arrays["case_offset"][case].tolist()
            moved = whole["boxes"] * float(arrays["case_scale"][case]) + torch.tensor([x, y, x, y])
            kept = whole["scores"] >= threshold if "scores" in whole else slice(None)
            boxes = {**whole, "boxes": moved}
            boxes = {name: values[kept] for name, values in boxes.items()}
            sides.append(Shown(arrays["case_images"][case], arrays[classes][case], boxes))
        pairs.append(tuple(sides))
    return pairs


def pixel_iou(truth: np.ndarray, found: np.ndarray) -> float:
    """Overlap of two class maps (H, W), 0..1: pixels with the same class in both, of those that either one marks; NaN
    where neither marks any."""
    either = int(((truth > 0) | (found > 0)).sum())
    return int(((truth == found) & (truth > 0)).sum()) / either if either else float("nan")


# --- Figures ---------------------------------------------------------------------------------------------------------


def overlaid(
    shown: Sequence[Shown],
    titles: Sequence[str],
    class_names: Sequence[str],
    columns: int = 6,
    width: float = 9.0,
    captions: Sequence[str] | None = None,
) -> Figure:
    """Pictures in a grid, masks and boxes in the colours of their classes, which the legend names; a predicted box has
    its score. `captions` stand below the pictures."""
    if not shown:
        return nothing_yet()
    rows, cell = -(-len(shown) // columns), width / columns
    lines = max(title.count("\n") + 1 for title in titles)
    above = rows * (0.15 * lines + 0.05 + 0.17 * (captions is not None)) + 0.4
    figure, axes = picture_axes(rows, columns, cell, above)
    for index, (axis, one, title) in enumerate(zip(axes.flat, shown, titles, strict=False)):
        _draw(axis, one)
        axis.set_title(title, fontsize=7)
        if captions is not None:
            axis.set_xlabel(captions[index], fontsize=7, labelpad=2)
    handles = [Patch(color=_colour(label), label=name) for label, name in enumerate(class_names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    return figure


def truth_and_prediction(record: Record | None, pairs: int = 3, width: float = 9.0, each: int = 4) -> Figure:
    """The telling cases of a record, `pairs` in a line, each the truth beside what was found at the threshold from dev:
    the first `each` of those with missed objects, with false alarms, and of the best. Below, why a case is shown (at
    score 0.25, see `telling_cases`) and the overlap of the marked pixels."""
    if record is None:
        return nothing_yet()
    shown, titles, captions = [], [], []
    _, _, names, class_names = unpack(record.arrays)
    why = record.arrays["case_why"].tolist()
    chosen = record.arrays["case_index"].tolist()
    kinds = ["missed" if reason.endswith("missed") else reason.startswith("false alarm") for reason in why]
    for case, (index, reason, (truth, found)) in enumerate(zip(chosen, why, from_record(record), strict=True)):
        if kinds[:case].count(kinds[case]) >= each:
            continue
        shown += [truth, found]
        titles += [names[index].rsplit("/", 1)[-1].partition(".")[0], "predicted"]
        overlap = pixel_iou(truth.classes, found.classes)
        captions += [reason, f"pixels: IoU {overlap:.2f}" if found.classes.any() else "nothing found"]
    return overlaid(shown, titles, class_names, 2 * pairs, width, captions)


def assembled(
    prototypes: Tensor,
    weights: Tensor,
    boxes: Tensor,
    names: Sequence[str],
    picture: np.ndarray | None = None,
    most: int = 4,
    width: float = 9.0,
) -> Figure:
    """How masks come about, a line an instance: the `most` prototypes of the largest share times their weights, the sum
    of all, its sigmoid with the box, and what is left above 0.5 within the box.

    prototypes (M, h, w), weights (n, M) in -1..1, boxes (n, 4) xyxy in cells of the prototypes, names (n,) of the
    instances; `picture` (S, S) or (S, S, 3) uint8 comes first where given. Products and sum share a scale, blue below
    0 and red above, for each line.
    """
    first = int(picture is not None)
    shares = einsum(weights, prototypes, "n m, m h w -> n m h w")
    most = min(most, len(prototypes))
    columns, lines = first + most + 3, len(weights)
    figure, axes = picture_axes(lines, columns, width / columns, above=0.2 * lines)
    extent = (0, prototypes.shape[2], prototypes.shape[1], 0)  # as boxes count
    for line, share, weight, box, name in zip(axes, shares, weights, boxes, names, strict=True):
        strongest = share.abs().mean((1, 2)).topk(most).indices.sort().values.tolist()
        logits = share.sum(0)
        limit = float(torch.cat([share[strongest], logits[None]]).abs().max()) or 1.0
        if picture is not None:
            line[0].imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent)
            line[0].set_title("picture", fontsize=7)
        panels = [(f"{float(weight[k]):+.2f} × P{k + 1}", share[k]) for k in strongest] + [("sum of all", logits)]
        for axis, (title, values) in zip(line[first:], panels, strict=False):
            axis.imshow(values.cpu().numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
            axis.set_title(title.replace("-", "−"), fontsize=7)
        probability = logits.sigmoid().cpu().numpy()
        mask = (probability > 0.5) & _inside(box, probability.shape)
        for axis, title, values in zip(line[-2:], ("sigmoid", "mask"), (probability, mask), strict=True):
            axis.imshow(values, cmap="gray", vmin=0, vmax=1, extent=extent)
            axis.set_title(title, fontsize=7)
            axis.add_patch(_rectangle(box.tolist(), CLASS_COLOURS[1]))
        line[0].set_ylabel(name, fontsize=8, color=INK)
    return figure


def threshold_curves(records: Mapping[str, Record], width: float = 7.0) -> Figure:
    """Precision (left) and recall (right) of the boxes at IoU 0.5, all classes together, against the score from which
    on predictions are kept: a line a row, a dot at its threshold from dev. Rows that predict nothing are left out."""
    if not records:
        return nothing_yet()
    records = {name: record for name, record in records.items() if record.arrays["prediction_counts"].any()}
    if not records:
        figure = nothing_yet()
        figure.texts[0].set_text("no run predicts anything here yet")
        return figure
    figure, axes = plt.subplots(1, 2, figsize=(width, 2.6), sharex=True, sharey=True)
    for colour, (name, record) in enumerate(records.items()):
        predictions, truths, _, class_names = unpack(record.arrays)
        matches = match(predictions, truths, (0.5,), len(class_names))  # by descending score
        right = np.cumsum(matches.right[:, 0])
        kept = np.arange(1, len(right) + 1)
        both = (100 * right / kept, 100 * right / matches.truths.sum())
        at = np.searchsorted(-matches.scores, -float(np.float16(record.dev["threshold"])), side="right") - 1
        for axis, values in zip(axes, both, strict=True):
            axis.plot(matches.scores, values, color=f"C{colour}", linewidth=1.2, label=name)
            if at >= 0:
                axis.plot(matches.scores[at], values[at], "o", color=f"C{colour}", markersize=5)
    for axis, title in zip(axes, ("precision", "recall"), strict=True):
        axis.set(title=title, xlabel="score from which on boxes are kept", xlim=(0, 1), ylim=(0, 102))
    axes[0].set_ylabel("per cent")
    axes[0].legend(frameon=False)
    return figure


# --- Helpers ---------------------------------------------------------------------------------------------------------


def _colour(label: int) -> str:
    return CLASS_COLOURS[label % len(CLASS_COLOURS)]


def _rectangle(box: Sequence[float], colour: str) -> Rectangle:
    x1, y1, x2, y2 = box
    return Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.1)


def _inside(box: Tensor, shape: tuple[int, int]) -> np.ndarray:
    """(h, w) bool: cells whose centre lies in the box."""
    y, x = np.arange(shape[0])[:, None] + 0.5, np.arange(shape[1]) + 0.5
    x1, y1, x2, y2 = box.tolist()
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)


def _draw(axis: Axes, one: Shown) -> None:
    height, width = one.picture.shape[:2]
    axis.imshow(painted(one.picture, one.classes), extent=(0, width, height, 0))
    scores = one.boxes["scores"].tolist() if "scores" in one.boxes else [None] * len(one.boxes["labels"])
    entries = zip(one.boxes["boxes"].tolist(), one.boxes["labels"].tolist(), scores, strict=True)
    for box, label, score in reversed(list(entries)):  # the surest on top
        axis.add_patch(_rectangle(box, _colour(label)))
        if score is not None:
            above = "bottom" if box[1] > 0.08 * height else "top"  # off the mask where there is room
            place = {"ha": "left", "va": above, "fontsize": 5, "clip_on": True}
            look = {"facecolor": _colour(label), "edgecolor": "none", "pad": 0.3, "alpha": 0.85}
            axis.text(max(box[0], 0), max(box[1], 0), f"{score:.2f}", color="black", bbox=look, **place)
    axis.set(xlim=(0, width), ylim=(height, 0))
