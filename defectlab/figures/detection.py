"""Figures of the detection notebooks: pictures with boxes, curves, confusion; drawn from records, without a GPU.

A record's arrays are those of `defectlab.detector.evaluation.pack`, with small pictures of its telling cases:
case_images (K, h, w) or (K, h, w, 3) uint8, case_index (K,) into the pictures, case_why (K,) str, and case_scale (K,),
case_offset (K, 2) x, y: pixel of the small picture = pixel of the original * scale + offset.
"""

from collections.abc import Mapping, Sequence
from itertools import count

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import box_iou

from defectlab.figures.anomaly import INK, nothing_yet
from defectlab.metrics.detection import (
    METRIC_IOUS,
    average_precision,
    confusion_matrix,
    match,
    precision_recall,
    unpack,
)
from defectlab.runs import Record

# A colour a class; Paul Tol's "bright", which colour-blind readers can tell apart. White is for the truth.
CLASS_COLOURS = ("#66ccee", "#ee6677", "#ccbb44", "#228833", "#4477aa", "#aa3377", "#ee8866", "#bbbbbb")
DARK = ("#228833", "#4477aa", "#aa3377")  # under white letters
AP_NAMES = {"map50": "AP at IoU 0.5", "map50_95": "AP at IoU 0.5:0.95", "map33": "AP at IoU 0.33"}
OUTLINE = [patheffects.withStroke(linewidth=2, foreground="black")]  # so that thin white shows on any ground
HALO = [patheffects.withStroke(linewidth=1.2, foreground="black")]  # the same for small letters

Boxes = Sequence[Mapping[str, Tensor]]
Rows = Mapping[str, Record | Sequence[Record]]  # name -> its record, or its records of several seeds


def boxed(
    pictures: Sequence[np.ndarray],
    truths: Boxes | None = None,
    predictions: Boxes | None = None,
    titles: Sequence[str] | None = None,
    class_names: Sequence[str] = (),
    columns: int = 4,
    width: float = 9.0,
    threshold: float = 0.25,
) -> Figure:
    """Pictures, uint8 (H, W) or (H, W, 3), with their boxes in pixels of the picture.

    Truths are thin and white; in those that no shown prediction of their class overlaps by IoU 0.5 stands their
    class. Predictions with score >= `threshold` have the colour of their class, and a tag with its name and the score.
    Where only truths are given, these have colour and name instead. `class_names` is for the tags and the legend.
    """
    if not len(pictures):
        return nothing_yet()
    rows = -(-len(pictures) // columns)
    tallest = max(picture.shape[0] / picture.shape[1] for picture in pictures)
    height = rows * (width / columns * tallest + (0.3 if titles else 0.05)) + 0.3
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    shown: set[int] = set()
    for index, (picture, axis) in enumerate(zip(pictures, axes.flat, strict=False)):
        edges = (0, picture.shape[1], picture.shape[0], 0)  # pixel 0 covers 0 to 1, as boxes count
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=edges)
        if titles is not None:
            axis.set_title(titles[index], fontsize=8)
        if truths is not None and predictions is not None:
            _draw_truths(axis, truths[index], predictions[index], class_names, threshold)
        named = predictions if predictions is not None else truths
        if named is not None:
            shown |= _draw_named(axis, named[index], class_names, threshold)
    handles = [Line2D([], [], color=_colour(label), label=_class_name(class_names, label)) for label in sorted(shown)]
    if truths is not None and predictions is not None:
        handles.insert(0, Line2D([], [], color="white", linewidth=0.8, path_effects=OUTLINE, label="truth"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    return figure


def worst_cases(record: Record | None, columns: int = 4, width: float = 9.0, threshold: float = 0.25) -> Figure:
    """The telling cases of a record: what was missed, the most confident false alarms, and the best.

    0.25 is the threshold at which they were chosen.
    """
    if record is None:
        return nothing_yet()
    arrays = record.arrays
    predictions, truths, names, class_names = unpack(arrays)
    chosen = arrays["case_index"].tolist()
    offsets = arrays.get("case_offset", np.zeros((len(chosen), 2)))

    def in_small(whole: Boxes) -> list[dict[str, Tensor]]:
        places = zip(chosen, arrays["case_scale"].tolist(), offsets.tolist(), strict=True)
        return [
            {**whole[index], "boxes": whole[index]["boxes"] * scale + whole[index]["boxes"].new_tensor([x, y, x, y])}
            for index, scale, (x, y) in places
        ]

    why = arrays["case_why"].tolist()
    titles = [f"{names[index].rsplit('/', 1)[-1]}\n{reason}" for index, reason in zip(chosen, why, strict=True)]
    pictures = list(arrays["case_images"])
    return boxed(pictures, in_small(truths), in_small(predictions), titles, class_names, columns, width, threshold)


def precision_recall_curves(records: Mapping[str, Record], iou: float = 0.5, columns: int = 3) -> Figure:
    """Precision against recall on the test pictures, a panel a class, a line a record, its AP in the legend."""
    if not records:
        return nothing_yet()
    found = {}
    for name, record in records.items():
        predictions, truths, _, class_names = unpack(record.arrays)
        matches = match(predictions, truths, (iou,), len(class_names))
        found[name] = matches, average_precision(matches)[:, 0]
    columns = min(columns, len(class_names))
    rows = -(-len(class_names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3 * columns, 2.5 * rows), squeeze=False, sharex=True, sharey=True
    )
    for label, axis in enumerate(axes.flat):
        if label >= len(class_names):
            axis.axis("off")
            continue
        for colour, (name, (matches, ap)) in enumerate(found.items()):
            recall, precision, _ = precision_recall(matches, label)
            axis.plot(recall, precision, color=f"C{colour}", linewidth=1.2, label=f"{name}  {ap[label]:.1f}")
        axis.set(title=class_names[label], xlim=(0, 1.02), ylim=(0, 1.04))
        axis.legend(loc="lower left", frameon=False, fontsize=7, title="AP", title_fontsize=7, alignment="left")
    figure.supxlabel("recall", size=9)
    figure.supylabel(f"precision at IoU {iou:g}", size=9)
    return figure


def confusion(record: Record | None, threshold: float | None = None, iou: float = 0.5) -> Figure:
    """Counts of true class against predicted class on the test pictures, shaded by their share of the row.

    The last column holds missed defects, the last row false alarms. `threshold` is by default the one from dev.
    """
    if record is None:
        return nothing_yet()
    threshold = record.dev["threshold"] if threshold is None else threshold
    predictions, truths, _, class_names = unpack(record.arrays)
    matrix = confusion_matrix(predictions, truths, len(class_names), threshold, iou)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = len(matrix)
    figure, axis = plt.subplots(figsize=(1.6 + 0.55 * size, 1.3 + 0.42 * size))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(matrix.shape):
        if matrix[row, column]:
            ink = "white" if share[row, column] > 0.6 else INK
            axis.text(column, row, str(matrix[row, column]), ha="center", va="center", color=ink, fontsize=8)
    for line in (axis.axhline, axis.axvline):  # apart from the classes: background is none of them
        line(size - 1.5, color=INK, linewidth=0.8)
    axis.set_xticks(range(size), [*class_names, "missed"], rotation=35, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(size), [*class_names, "false alarm"])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set(xlabel="predicted", ylabel="truth", title=f"score ≥ {threshold:.2f}, IoU ≥ {iou:g}")
    return figure


def per_class_bars(records: Rows, metric: str = "map50") -> Figure:
    """AP of each class ("map50", "map50_95" or "map33"), a bar a row: its mean over seeds, with a dot a seed."""
    if metric not in METRIC_IOUS:
        raise ValueError(f"no average precision is called {metric!r}: use {', '.join(METRIC_IOUS)}")
    if not records:
        return nothing_yet()
    of_row = {name: _seeds(found) for name, found in records.items()}
    class_names = list(next(iter(of_row.values()))[0].per_class)
    figure, axis = plt.subplots(figsize=(max(4.5, 1.45 * len(class_names)), 2.8))
    thickness = 0.8 / len(of_row)
    for row, (name, found) in enumerate(of_row.items()):
        values = np.array([[record.per_class[c][metric] for c in class_names] for record in found])  # (seeds, C)
        places = np.arange(len(class_names)) - 0.4 + thickness * (row + 0.5)
        axis.bar(places, values.mean(0), 0.92 * thickness, color=f"C{row}", alpha=0.75, label=name)
        if len(found) > 1:
            axis.plot(np.tile(places, len(found)), values.reshape(-1), ".", color=INK, markersize=3)
    axis.set_xticks(range(len(class_names)), class_names)
    axis.set(ylabel=f"{AP_NAMES[metric]} / %", ylim=(0, 100))
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def training_curves(records: Rows, columns: int = 3) -> Figure:
    """Each named scalar of the loss an epoch, a panel a scalar, a line a seed, a colour a row; where the curve has it,
    mAP50 of dev in the last panel."""
    if not records:
        return nothing_yet()
    of_row = {name: _seeds(found) for name, found in records.items()}
    curves = [record.curve for found in of_row.values() for record in found]
    probed = any("dev_map50" in curve for curve in curves)
    probes = ("dev_", "probe_", "weight_")  # one value a probe, not an epoch
    scalars = [s for s in dict.fromkeys(s for curve in curves for s in curve) if not s.startswith(probes)]
    panels = scalars + ["dev_map50"] * probed
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.1 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, scalar in zip(axes.flat, panels, strict=False):
        for colour, found in enumerate(of_row.values()):
            for curve in (record.curve for record in found if scalar in record.curve):
                of_dev = scalar == "dev_map50"
                epochs = curve["probe_epoch"] if of_dev else range(1, len(curve[scalar]) + 1)
                axis.plot(
                    epochs, curve[scalar], marker="." if of_dev else None, color=f"C{colour}", alpha=0.7, linewidth=1
                )
        axis.set(title="mAP50 of dev / %" if scalar == "dev_map50" else scalar, xlabel="epoch")
        axis.set_ylim(0, 100 if scalar == "dev_map50" else None)
    handles = [Line2D([], [], color=f"C{colour}", label=name) for colour, name in zip(count(), of_row, strict=False)]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def robustness_curves(records: Rows, strengths: Mapping[str, Sequence[float]] | None = None) -> Figure:
    """mAP50 on test pictures that are blurred (left) or noisy (right), from clean on: a line a row, the mean of its
    seeds, a dot a seed, and a band from the lowest seed to the highest.

    Reads map50_blur_0, map50_blur_1 ... and map50_noise_0 ... of the records' metrics; 0 is clean. `strengths` may name
    the strength at each step, as {"blur": (0, 3, ...), "noise": (0, 5, ...)}.
    """
    if not records:
        return nothing_yet()
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.9), sharey=True)
    for axis, (kind, title) in zip(axes, (("blur", "motion blur"), ("noise", "noise")), strict=True):
        for colour, (name, found) in enumerate(records.items()):
            seeds = _seeds(found)
            steps = sum(key.startswith(f"map50_{kind}_") for key in seeds[0].metrics)
            values = np.array([[r.metrics[f"map50_{kind}_{step}"] for step in range(steps)] for r in seeds])
            places = range(steps) if strengths is None else strengths[kind]  # values: (seeds, steps)
            axis.fill_between(places, values.min(0), values.max(0), color=f"C{colour}", alpha=0.2, linewidth=0)
            axis.plot(places, values.mean(0), color=f"C{colour}", label=name)
            axis.plot(np.tile(places, len(seeds)), values.reshape(-1), ".", color=f"C{colour}", markersize=4)
        axis.set(title=title, xlabel="step (0: clean)" if strengths is None else "strength (0: clean)", ylim=(0, 100))
    axes[0].set_ylabel("mAP50 / %")
    axes[0].legend(frameon=False, loc="lower left")
    return figure


# --- Helpers ---------------------------------------------------------------------------------------------------------


def _seeds(found: Record | Sequence[Record]) -> list[Record]:
    return [found] if isinstance(found, Record) else list(found)


def _colour(label: int) -> str:
    return CLASS_COLOURS[label % len(CLASS_COLOURS)]


def _class_name(class_names: Sequence[str], label: int) -> str:
    return class_names[label] if class_names else str(label)


def _rectangle(box: Sequence[float], colour: str, line: float, **options) -> Rectangle:
    x1, y1, x2, y2 = box
    return Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=line, **options)


def _draw_truths(
    axis: Axes, truth: Mapping[str, Tensor], found: Mapping[str, Tensor], class_names: Sequence[str], threshold: float
) -> None:
    near = (box_iou(truth["boxes"], found["boxes"]) >= 0.5) & (found["scores"] >= threshold)  # (truths, predictions)
    seen = (near & (truth["labels"][:, None] == found["labels"])).any(1)
    for box, label, was_seen in zip(truth["boxes"].tolist(), truth["labels"].tolist(), seen.tolist(), strict=True):
        axis.add_patch(_rectangle(box, "white", 0.8, path_effects=OUTLINE))
        if not was_seen:
            name = _class_name(class_names, label)
            axis.text(box[0], box[3], name, va="bottom", fontsize=6, color="white", path_effects=HALO, clip_on=True)


def _draw_named(axis: Axes, found: Mapping[str, Tensor], class_names: Sequence[str], threshold: float) -> set[int]:
    """Boxes in the colours of their classes, a tag at each; -> the classes that occur. The surest lie on top."""
    shown = set()
    right, top = axis.get_xlim()[1], axis.get_ylim()[1]
    scores = found["scores"].tolist() if "scores" in found else [None] * len(found["labels"])
    entries = list(zip(found["boxes"].tolist(), found["labels"].tolist(), scores, strict=True))
    for box, label, score in reversed(entries):
        if score is not None and score < threshold:
            continue
        shown.add(label)
        axis.add_patch(_rectangle(box, _colour(label), 1.3))
        tag = _class_name(class_names, label) + ("" if score is None else f" {score:.2f}")
        at_right = box[0] > 0.5 * right  # such a tag ends with its box, and does not run out of the picture
        inside = box[1] - top < 0.08 * right
        axis.text(
            box[2] if at_right else box[0],
            box[1],
            tag,
            ha="right" if at_right else "left",
            va="top" if inside else "bottom",
            fontsize=6,
            color="white" if _colour(label) in DARK else "black",
            clip_on=True,
            bbox={"facecolor": _colour(label), "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
        )
    return shown
