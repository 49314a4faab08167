"""Figures of the detection notebooks: images with boxes, curves, confusion, heat maps.

A record's arrays are those of `defectlab.metrics.detection.pack`, with small images of its examples: case_images
(K, h, w) or (K, h, w, 3) uint8, case_index (K,) into the test images, case_why (K,) str, and case_scale (K,),
case_offset (K, 2) x, y: pixel of the small image = pixel of the original * scale + offset.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor, nn
from torchvision.ops import box_iou

from defectlab.data.augment import plain
from defectlab.data.detection import DetectionSplit
from defectlab.figures import Rows, frame, legend_above, nothing_yet, panels
from defectlab.metrics import detection as metrics
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.decode import decode
from defectlab.networks.yolo.model import Detector
from defectlab.precision import full_float32
from defectlab.runs import Record

# One colour per class; Paul Tol's "bright", which colour-blind readers can tell apart. White is for the ground truth.
CLASS_COLOURS = ("#66ccee", "#ee6677", "#ccbb44", "#228833", "#4477aa", "#aa3377", "#ee8866", "#bbbbbb")
DARK = ("#228833", "#4477aa", "#aa3377")  # under white letters
AP_NAMES = {"map50": "AP at IoU 0.5", "map50_95": "AP at IoU 0.5:0.95", "map33": "AP at IoU 0.33"}
OUTLINE = [patheffects.withStroke(linewidth=2, foreground="black")]  # so that thin white shows on any ground
HALO = [patheffects.withStroke(linewidth=1.2, foreground="black")]  # the same for small letters

Boxes = Sequence[Mapping[str, Tensor]]

# --- Images with boxes -----------------------------------------------------------------------------------------------


def as_seen(split: DetectionSplit, indices: Sequence[int]) -> tuple[list[np.ndarray], list[dict[str, Tensor]]]:
    """Images of a split as the network sees them, uint8 (S, S) or (S, S, 3), and their boxes in pixels of these."""
    images = [split.images[i].movedim(0, -1).squeeze(-1).cpu().numpy() for i in indices]
    there = [(i, split.labels[i] >= 0) for i in indices]
    return images, [{"boxes": split.boxes[i][k].cpu(), "labels": split.labels[i][k].cpu()} for i, k in there]


def boxed(
    images: Sequence[np.ndarray],
    ground_truth: Boxes | None = None,
    predictions: Boxes | None = None,
    titles: Sequence[str] | None = None,
    class_names: Sequence[str] = (),
    columns: int = 4,
    width: float = 9.0,
    threshold: float = 0.25,
    tags: bool = True,
) -> Figure:
    """Images, uint8 (H, W) or (H, W, 3), with their boxes in pixels of the image.

    Ground truth is thin and white; where no shown prediction of its class overlaps it by IoU 0.5 stands its class.
    Predictions with score >= `threshold` have the colour of their class, and with `tags` its name and the score. Where
    only ground truth is given, it has colour and name instead.
    """
    if not len(images):
        return nothing_yet()
    tallest = max(image.shape[0] / image.shape[1] for image in images)
    cell = (width / columns, width / columns * tallest + (0.3 if titles else 0.05))
    figure, axes = panels(len(images), columns, cell, below=0.3)
    names = dict(enumerate(class_names))
    both = ground_truth is not None and predictions is not None
    coloured = ground_truth if predictions is None else predictions
    shown: set[int] = set()
    for index, (image, axis) in enumerate(zip(images, axes, strict=True)):
        axis.axis("off")
        edges = (0, image.shape[1], image.shape[0], 0)  # pixel 0 covers 0 to 1, as boxes count
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, extent=edges)
        axis.set_title(titles[index] if titles else "", fontsize=8)
        if both:
            _draw_ground_truth(axis, ground_truth[index], predictions[index], names, threshold)
        if coloured is not None:
            shown |= draw_boxes(axis, coloured[index], names if tags else None, threshold)
    handles = [Line2D([], [], color=class_colour(label), label=names.get(label, label)) for label in sorted(shown)]
    if both:
        handles.insert(0, Line2D([], [], color="white", linewidth=0.8, path_effects=OUTLINE, label="ground truth"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    return figure


def examples(record: Record | None, columns: int = 4, width: float = 9.0, threshold: float = 0.25) -> Figure:
    """The images that a record keeps: what was missed, the most confident false alarms, and the best.

    0.25 is the threshold at which they were chosen.
    """
    if record is None:
        return nothing_yet()
    arrays = record.arrays
    predictions, ground_truth, names, class_names = metrics.unpack(arrays)
    chosen = arrays["case_index"].tolist()
    scales, offsets = (torch.from_numpy(arrays[f"case_{name}"]).float() for name in ("scale", "offset"))

    def in_small(whole: Boxes) -> list[dict[str, Tensor]]:
        places = zip(chosen, scales, offsets.repeat(1, 2), strict=True)
        return [whole[index] | {"boxes": whole[index]["boxes"] * scale + offset} for index, scale, offset in places]

    why = zip(chosen, arrays["case_why"].tolist(), strict=True)
    titles = [f"{names[index].rsplit('/', 1)[-1]}\n{reason}" for index, reason in why]
    images = list(arrays["case_images"])
    return boxed(images, in_small(ground_truth), in_small(predictions), titles, class_names, columns, width, threshold)


def class_colour(label: int) -> str:
    return CLASS_COLOURS[label % len(CLASS_COLOURS)]


def _outline(axis: Axes, box: Sequence[float], **look) -> None:
    x1, y1, x2, y2 = box
    axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **look))


def _draw_ground_truth(
    axis: Axes, truth: Mapping[str, Tensor], found: Mapping[str, Tensor], names: Mapping[int, str], threshold: float
) -> None:
    near = (box_iou(truth["boxes"], found["boxes"]) >= 0.5) & (found["scores"] >= threshold)  # (n, predictions)
    hit = (near & (truth["labels"][:, None] == found["labels"])).any(1)
    for box, label, is_hit in zip(truth["boxes"].tolist(), truth["labels"].tolist(), hit.tolist(), strict=True):
        _outline(axis, box, edgecolor="white", linewidth=0.8, path_effects=OUTLINE)
        if not is_hit:
            look = {"va": "bottom", "fontsize": 6, "color": "white", "path_effects": HALO, "clip_on": True}
            axis.text(box[0], box[3], names.get(label, label), **look)


def draw_boxes(
    axis: Axes, found: Mapping[str, Tensor], names: Mapping[int, str] | None, threshold: float = 0.0
) -> set[int]:
    """Boxes in the colours of their classes, with tags (name and score) where there are names, which may be empty; ->
    the classes that occur. Predictions come with the highest score first, and that lies on top."""
    right, top = axis.get_xlim()[1], axis.get_ylim()[1]
    scores = found["scores"].tolist() if "scores" in found else [None] * len(found["labels"])
    entries = zip(found["boxes"].tolist(), found["labels"].tolist(), scores, strict=True)
    entries = [entry for entry in entries if entry[2] is None or entry[2] >= threshold]
    for box, label, score in reversed(entries):
        colour = class_colour(label)
        _outline(axis, box, edgecolor=colour, linewidth=1.3)
        tag = "" if names is None else f"{names.get(label, label)}" + ("" if score is None else f" {score:.2f}")
        if not tag:
            continue
        at_right = box[0] > 0.5 * right  # such a tag ends with its box, and does not run out of the image
        place = {"ha": "right", "x": box[2]} if at_right else {"ha": "left", "x": box[0]}
        place |= {"y": box[1], "va": "top" if box[1] - top < 0.08 * right else "bottom"}
        ground = {"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
        ink = "white" if colour in DARK else "black"
        axis.text(s=tag.strip(), fontsize=6, color=ink, clip_on=True, bbox=ground, **place)
    return {label for _, label, _ in entries}


# --- Curves and counts, from records ---------------------------------------------------------------------------------


def precision_recall_curves(records: Rows, iou: float = 0.5) -> Figure:
    """Precision against recall on the test images: one panel per class, one line per row (its first seed) with its
    AP in the legend."""
    shown = {name: found[0] for name, found in records.items() if found}
    if not shown:
        return nothing_yet()
    class_names = metrics.unpack(next(iter(shown.values())).arrays)[3]  # in the order of the labels
    figure, axes = panels(len(class_names), min(3, len(class_names)), (3, 2.5), sharex=True, sharey=True)
    for name, record in shown.items():
        predictions, ground_truth, _, _ = metrics.unpack(record.arrays)
        matches = metrics.match(predictions, ground_truth, (iou,), len(class_names))
        for label, (axis, ap) in enumerate(zip(axes, metrics.average_precision(matches)[:, 0], strict=True)):
            recall, precision, _ = metrics.precision_recall(matches, label)
            axis.plot(recall, precision, linewidth=1.2, label=f"{name}  {ap:.1f}")
    for axis, name in zip(axes, class_names, strict=True):
        axis.set(title=name, xlim=(0, 1.02), ylim=(0, 1.04))
        axis.legend(loc="lower left", frameon=False, fontsize=7, title="AP", title_fontsize=7, alignment="left")
    figure.supxlabel("recall", size=9)
    figure.supylabel(f"precision at IoU {iou:g}", size=9)
    return figure


def confusion(record: Record | None, threshold: float | None = None) -> Figure:
    """Counts of true class against predicted class on the test images; predicted as background: missed defects, true
    background: false alarms. `threshold` is by default the one from dev."""
    if record is None:
        return nothing_yet()
    threshold = record.dev["threshold"] if threshold is None else threshold
    predictions, ground_truth, _, class_names = metrics.unpack(record.arrays)
    matrix = metrics.confusion_matrix(predictions, ground_truth, len(class_names), threshold)
    figure, axis = plt.subplots(figsize=(1.9 + 0.5 * len(matrix), 1.5 + 0.42 * len(matrix)))
    display = ConfusionMatrixDisplay(matrix, display_labels=[*class_names, "background"])
    display.plot(ax=axis, cmap="Blues", colorbar=False, xticks_rotation=45, text_kw={"fontsize": 8})
    axis.set(xlabel="predicted", ylabel="ground truth", title=f"score ≥ {threshold:.2f}, IoU ≥ 0.5")
    return figure


def per_class_bars(records: Rows, metric: str = "map50") -> Figure:
    """AP of each class ("map50", "map50_95" or "map33"), one bar per row: its mean over seeds, with a line from the
    lowest seed to the highest."""
    if metric not in AP_NAMES:
        raise ValueError(f"no average precision is called {metric!r}: use {', '.join(AP_NAMES)}")
    table = frame(records)
    table = table[(table["metric"] == metric) & (table["type"] != "all")]
    if table.empty:
        return nothing_yet()
    found = table.groupby(["type", "row"], sort=False)["value"].agg(["mean", "min", "max"]).unstack(sort=False)
    means = found["mean"]  # one line per class, one column per row
    spread = np.stack([(means - found["min"]).T, (found["max"] - means).T], 1)  # (rows, 2, classes)
    figure, axis = plt.subplots(figsize=(max(4.5, 1.45 * len(means)), 2.8))
    means.plot.bar(ax=axis, yerr=spread, rot=0, width=0.8, alpha=0.75, legend=False)
    axis.set(xlabel="", ylabel=f"{AP_NAMES[metric]} / %", ylim=(0, 100))
    legend_above(figure, axis.get_legend_handles_labels()[0])
    return figure


# --- Where a detector looks ------------------------------------------------------------------------------------------


class ClassEvidence(nn.Module):
    """Images (B, 3, S, S) in 0..1 -> S of each class (B, C): the logarithm of Y, the sum of the class's scores
    (objectness times class probability; a probability alone in "v8") over all boxes, before suppression."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        _, scores = decode(self.detector, self.detector(images))  # (B, A, C)
        return scores.sum(1).clamp(min=1e-12).log()


@torch.enable_grad()
def heat_maps(detector: Detector, images: Tensor, label: int, batch: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Grad-CAM++ of one class: images uint8 (N, C, S, S) -> heat maps (N, S, S) float32 in 0..1, and Y (N,), 0 or more.

    Chattopadhay, Sarkar, Howlader, Balasubramanian, "Grad-CAM++", WACV 2018, arXiv 1710.11063, by the package grad-cam.
    The method takes one score per image, Y = exp(S), and one layer; `ClassEvidence` as the score and the mean over the
    neck's three maps are this project's. A heat map is scaled by itself: 1 is the most that the class has in this
    image, however little that is, so it says where, not how sure; Y goes with it. The detector stays as it is: a fused
    copy is looked at. ValueError for a label outside its classes, and for sides that are not divisible by 32.
    """
    from pytorch_grad_cam import GradCAMPlusPlus  # slow to import

    if not 0 <= label < detector.class_count:
        raise ValueError(f"class {label}: the detector has the classes 0 to {detector.class_count - 1}")
    evidence = ClassEvidence(fused(detector).requires_grad_(False)).eval()
    neck = evidence.detector.neck
    method = GradCAMPlusPlus(evidence, [neck.down_third, neck.up_fourth, neck.up_fifth])  # its `with` hides IndexError
    maps, sums = [], []
    with full_float32():
        for chunk in torch.arange(len(images), device=images.device).split(batch):
            inputs = plain(images, chunk).contiguous().requires_grad_()  # no weight asks for gradients: they do
            maps.append(method(inputs, [lambda of_classes: of_classes[label]] * len(chunk)))
            sums.append(method.outputs[:, label].detach().exp().cpu().numpy())
    return np.concatenate(maps), np.concatenate(sums)
