"""Metrics of detection: average precision (COCO's), scores at a threshold from dev, and what a record keeps of a run.

Predictions and truths are lists with one dict a picture, in pixels of the original picture, on the CPU:
{"boxes": (n, 4) float32 xyxy, "scores": (n,) float32 in 0..1, "labels": (n,) int64}, truths without "scores".

The recorded numbers are torchmetrics' (`evaluate`). For the bootstrap over test pictures, `match` finds the true
positives once, and `average_precision` then weighs the pictures. Both follow the COCO evaluation (Lin et al.,
"Microsoft COCO", ECCV 2014, and https://cocodataset.org/#detection-eval): 101 recall levels, and at most 100
predictions a picture and class, at every IoU.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

Boxes = list[dict[str, Tensor]]

COCO_IOUS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # 0.50, 0.55 ... 0.95
METRIC_IOUS = {"map50": (0.5,), "map50_95": COCO_IOUS, "map33": (0.33,)}  # 0.33: DeepPCB's official protocol
MASK_IOUS = {"mask_map50": (0.5,), "mask_map50_95": COCO_IOUS}  # of masks, where a record has them
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100  # COCO's: a picture and class

PACKED_PREDICTIONS, PACKED_SCORE = 12_000, 0.01  # what `pack` keeps at most, and from which score on


def evaluate(
    predictions: Boxes, truths: Boxes, class_names: Sequence[str], threshold: float | None = None
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(metrics of the set, metrics of each class), in per cent.

    map50, map50_95 and map33 (IoU 0.33): average precision by torchmetrics' MeanAveragePrecision (faster-coco-eval)
    with its default of at most 100 predictions a picture and class; for the set the mean over the classes that occur
    in the truths, for a class its AP, NaN where it has no truth.

    f1_oracle: the best F1 over all thresholds on these very pictures. With `threshold`, chosen on dev:
    precision_dev, recall_dev and f1_dev of "score >= threshold". These count all boxes of all classes together (micro
    average), a prediction being right by the rule of `match` at IoU 0.5. Precision without any prediction and all of
    them without any truth are NaN.

    ValueError as in `match`; labels must lie within `class_names`.
    """
    matches = match(predictions, truths, (0.5,), len(class_names))
    per_class = _torchmetrics_precision(predictions, truths, class_names)
    metrics = {metric: _mean([values[metric] for values in per_class.values()]) for metric in METRIC_IOUS}
    metrics["f1_oracle"] = float(_f1_curve(matches).max(initial=0.0)) if matches.truths.sum() else math.nan
    if threshold is not None:
        kept = matches.scores >= threshold
        found, right, wanted = int(kept.sum()), int(matches.right[kept].sum()), int(matches.truths.sum())
        metrics["precision_dev"] = 100 * right / found if found and wanted else math.nan
        metrics["recall_dev"] = 100 * right / wanted if wanted else math.nan
        metrics["f1_dev"] = 200 * right / (found + wanted) if wanted else math.nan
    return metrics, per_class


def best_f1_threshold(predictions: Boxes, truths: Boxes, iou: float = 0.5) -> float:
    """The score from which on predictions are to be kept for the best F1 over all boxes: for dev, never for test.

    It is the score of a prediction, the highest of equally good ones; 1.0 where no prediction is right. ValueError
    where there is no truth box.
    """
    matches = match(predictions, truths, (iou,))
    if not matches.truths.sum():
        raise ValueError("no truth box to choose a score threshold by: give dev pictures that have defects")
    curve = _f1_curve(matches)
    return float(matches.scores[np.argmax(curve)]) if curve.max(initial=0.0) > 0 else 1.0


# --- Matching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matches:
    """Which of P predictions are right, in order of descending score over all pictures."""

    pictures: np.ndarray  # (P,) int64, index of the picture
    labels: np.ndarray  # (P,) int64
    scores: np.ndarray  # (P,) float
    right: np.ndarray  # (P, T) bool: a true positive at each IoU
    truths: np.ndarray  # (N, C) int64, truth boxes of each picture and class
    ious: tuple[float, ...]  # T


def match(predictions: Boxes, truths: Boxes, ious: Sequence[float], classes: int | None = None) -> Matches:
    """COCO's greedy matching: in a picture and class, by descending score, each prediction takes the free truth that
    overlaps it most, if by at least the IoU; the first 100 predictions of a picture and class count.

    `classes` is C, by default the highest label in use + 1. ValueError: lists of different length, NaN scores, boxes
    turned inside out, labels outside 0..C - 1.
    """
    classes = _check(predictions, truths, classes)
    parts, counts = [], np.zeros((len(truths), classes), dtype=np.int64)
    for picture, (predicted, truth) in enumerate(zip(predictions, truths, strict=True)):
        scores, labels = predicted["scores"].numpy(), predicted["labels"].numpy()  # (n,)
        true_labels = truth["labels"].numpy()  # (m,)
        counts[picture] = np.bincount(true_labels, minlength=classes)
        order = np.argsort(-scores, kind="stable")
        order = order[_rank_in_class(labels[order]) < MAX_DETECTIONS]
        overlap = box_iou(predicted["boxes"].double(), truth["boxes"].double()).numpy()[order]  # (n, m)
        overlap[labels[order][:, None] != true_labels] = -1.0
        parts.append((np.full(len(order), picture), labels[order], scores[order], take_truths(overlap, ious)))
    if not parts:
        raise ValueError("no pictures to match: the lists of predictions and truths are empty")
    pictures, labels, scores, right = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(-scores, kind="stable")
    return Matches(pictures[order], labels[order], scores[order], right[order], counts, tuple(ious))


def take_truths(overlap: np.ndarray, ious: Sequence[float]) -> np.ndarray:
    """The greedy matching of one picture: overlap (n, m) of predictions, by descending score, with truths, -1 where the
    classes differ -> (n, T) bool, whether a prediction takes a truth at each IoU."""
    levels = np.minimum(ious, 1 - 1e-10)  # as COCO has it: IoU 1 can be reached in spite of rounding
    right = np.zeros((len(overlap), len(levels)), dtype=bool)
    free = np.ones((len(levels), overlap.shape[1]), dtype=bool)
    for index in np.flatnonzero((overlap >= levels.min()).any(1)):
        candidates = np.where(free & (overlap[index] >= levels[:, None]), overlap[index], -1.0)  # (T, m)
        best = overlap.shape[1] - 1 - candidates[:, ::-1].argmax(1)  # of equal overlaps COCO takes the last
        hit = np.flatnonzero(candidates[np.arange(len(levels)), best] >= 0)
        right[index, hit] = True
        free[hit, best[hit]] = False
    return right


def average_precision(matches: Matches, weights: np.ndarray | None = None) -> np.ndarray:
    """AP in per cent of each class and IoU, shape (C, T); NaN for a class without truth.

    weights (N,): how often each picture is taken, not negative, 1 each by default. Integer weights give what repeated
    pictures give, without matching again (but for the order of equal scores, which COCO leaves to chance).
    """
    pictures, classes = matches.truths.shape
    weights = np.ones(pictures) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != (pictures,):
        raise ValueError(f"weights must have shape ({pictures},), got {weights.shape}")
    wanted = weights @ matches.truths  # (C,)
    result = np.full((classes, len(matches.ious)), math.nan)
    for label in np.flatnonzero(wanted > 0):
        chosen = matches.labels == label
        weight = weights[matches.pictures[chosen]]
        found = np.cumsum(weight)
        for level, right in enumerate(matches.right[chosen].T):
            true = np.cumsum(weight * right)
            precision = np.divide(true, found, out=np.zeros_like(true), where=found > 0)
            envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)  # 0 where recall is not reached
            result[label, level] = 100 * envelope[np.searchsorted(true / wanted[label], RECALLS)].mean()
    return result


def statistic(
    arrays: dict[str, np.ndarray], metric: str, classes: Sequence[str] | None = None
) -> Callable[[np.ndarray], float]:
    """(weight of each picture, shape (N,)) -> an average precision in per cent, from what `pack` gave: "map50",
    "map50_95" or "map33", and where masks were packed "mask_map50" and "mask_map50_95".

    The mean of the AP of the named classes, by default of all that have truths in the chosen pictures; NaN where none
    has. ValueError for another metric or a class that the arrays lack.
    """
    predictions, truths, _, class_names = unpack(arrays)
    if metric not in METRIC_IOUS | MASK_IOUS:
        raise ValueError(f"no average precision is called {metric!r}: use {', '.join(METRIC_IOUS | MASK_IOUS)}")
    unknown = set(classes or ()) - set(class_names)
    if unknown:
        raise ValueError(f"no class {sorted(unknown)} in these arrays, which have {', '.join(class_names)}")
    chosen = [class_names.index(name) for name in classes or class_names]
    if metric in METRIC_IOUS:
        matches = match(predictions, truths, METRIC_IOUS[metric], len(class_names))
    else:
        matches = _packed_masks(arrays, predictions, truths, MASK_IOUS[metric], len(class_names))
    return lambda weights: _mean(average_precision(matches, weights)[chosen].mean(1))


def _packed_masks(
    arrays: dict[str, np.ndarray], predictions: Boxes, truths: Boxes, ious: Sequence[float], classes: int
) -> Matches:
    """As `match`, of masks, which are matched already."""
    scores, labels = (torch.cat([p[name] for p in predictions]).numpy() for name in ("scores", "labels"))
    pictures = np.repeat(np.arange(len(predictions)), [len(p["scores"]) for p in predictions])
    bits = [COCO_IOUS.index(iou) for iou in ious]
    right = (arrays["mask_right"][:, None] >> np.array(bits, dtype=np.uint16)) & 1 > 0  # (P, T)
    counts = np.stack([np.bincount(t["labels"].numpy(), minlength=classes) for t in truths])
    order = np.argsort(-scores, kind="stable")
    return Matches(pictures[order], labels[order], scores[order], right[order], counts, tuple(ious))


def precision_recall(matches: Matches, label: int, iou_index: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(recall, precision, scores), each (p,), in 0..1: the raw curve of one class, a point a prediction, from the
    highest score down. Recall is NaN where the class has no truth."""
    chosen = matches.labels == label
    true = np.cumsum(matches.right[chosen, iou_index])
    wanted = matches.truths[:, label].sum() or math.nan
    return true / wanted, true / np.arange(1, len(true) + 1), matches.scores[chosen]


def confusion_matrix(predictions: Boxes, truths: Boxes, classes: int, threshold: float, iou: float = 0.5) -> np.ndarray:
    """Counts (C + 1, C + 1) int64: rows truth, columns prediction, the last of each background.

    So the last column holds missed truths and the last row false alarms. Predictions with score >= threshold are
    paired with truths whatever their class, each at most once, the pairs of largest IoU (>= `iou`) first, of equal
    ones that with the higher score.
    """
    _check(predictions, truths, classes)
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for predicted, truth in zip(predictions, truths, strict=True):
        kept = {name: values[predicted["scores"] >= threshold] for name, values in predicted.items()}
        labels, true_labels = kept["labels"].numpy(), truth["labels"].numpy()
        of_prediction, of_truth = _pairs(kept, truth, iou)
        np.add.at(matrix, (true_labels[of_truth], labels[of_prediction]), 1)
        np.add.at(matrix, (np.delete(true_labels, of_truth), classes), 1)
        np.add.at(matrix, (classes, np.delete(labels, of_prediction)), 1)
    return matrix


def telling_cases(predictions: Boxes, truths: Boxes, count: int = 4, threshold: float = 0.25) -> list[tuple[int, str]]:
    """(index of the picture, why) of up to 3 * `count` different pictures: those with most missed truths, those with
    the most confident false alarms, and the best ones.

    At "score >= threshold" and IoU 0.5, by the rule of `match`. The best have neither missed nor false boxes; the
    more defects in the picture, then the higher the lowest score, the better. Equal ones come by index.
    """
    matches = match(predictions, truths, (0.5,))
    kept, right = matches.scores >= threshold, matches.right[:, 0]
    size = len(truths)
    wanted = matches.truths.sum(1)
    missed = wanted - np.bincount(matches.pictures[kept & right], minlength=size)
    alarm, lowest = np.zeros(size), np.ones(size)
    np.maximum.at(alarm, matches.pictures[kept & ~right], matches.scores[kept & ~right])
    np.minimum.at(lowest, matches.pictures[kept], matches.scores[kept])

    chosen: dict[int, str] = {}

    def take(order: np.ndarray, allowed: np.ndarray, why: Callable[[int], str]) -> None:
        fresh = [int(i) for i in order if allowed[i] and int(i) not in chosen]
        chosen.update({i: why(i) for i in fresh[:count]})

    take(np.argsort(-missed, kind="stable"), missed > 0, lambda i: f"{missed[i]} of {wanted[i]} missed")
    take(np.argsort(-alarm, kind="stable"), alarm > 0, lambda i: f"false alarm at {alarm[i]:.2f}")
    flawless = (missed == 0) & (alarm == 0) & (wanted > 0)
    take(np.lexsort((-lowest, -wanted)), flawless, lambda i: f"all {wanted[i]} found" if wanted[i] > 1 else "found")
    return list(chosen.items())


# --- What a record keeps ---------------------------------------------------------------------------------------------


def pack(
    predictions: Boxes,
    truths: Boxes,
    names: Sequence[str],
    class_names: Sequence[str],
    right_masks: Sequence[Tensor] | None = None,
) -> dict[str, np.ndarray]:
    """Arrays for a record's .npz, small enough to commit, from which figures and bootstraps are made without data.

    Of the predictions the 12,000 with the highest scores of the whole set, those from 0.01 on. Boxes are in steps of
    1/65535 of the largest coordinate, so off by at most 0.007 px in pictures of 800 px (coordinates below 0 become
    0); scores are float16. Truths are whole.

    names (N,) str, class_names (C,) str, prediction_counts (N,) uint16 and prediction_boxes (P, 4) uint16,
    prediction_scores (P,) float16, prediction_labels (P,) uint8, picture after picture; box_step () float64, pixels
    per unit; truth_counts (N,), truth_boxes (M, 4) float32, truth_labels (M,). With `right_masks`, (n, T) bool a
    picture, whether a prediction's mask is right at each of `COCO_IOUS`: mask_right (P,) uint16, a bit an IoU.
    """
    _check(predictions, truths, len(class_names))
    if len(names) != len(truths):
        raise ValueError(f"{len(names)} names for {len(truths)} pictures: give one a picture")
    scores = torch.cat([p["scores"] for p in predictions])
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[torch.argsort(scores, descending=True, stable=True)[:PACKED_PREDICTIONS]] = True
    kept &= scores >= PACKED_SCORE
    counts = [int(part.sum()) for part in kept.split([len(p["scores"]) for p in predictions])]
    boxes = torch.cat([p["boxes"] for p in predictions])[kept].double().clamp(min=0).numpy()  # (P, 4)
    step = (boxes.max(initial=0.0) or 1.0) / 65535
    masks = {}
    if right_masks is not None:
        right = torch.cat(list(right_masks))[kept].numpy()
        masks["mask_right"] = (right << np.arange(len(COCO_IOUS))).sum(1).astype(np.uint16)
    return masks | {
        "names": np.array(names, dtype=str),
        "class_names": np.array(class_names, dtype=str),
        "prediction_counts": np.array(counts, dtype=np.uint16),
        "prediction_boxes": np.round(boxes / step).astype(np.uint16),
        "prediction_scores": scores[kept].numpy().astype(np.float16),
        "prediction_labels": torch.cat([p["labels"] for p in predictions])[kept].numpy().astype(np.uint8),
        "box_step": np.array(step),
        "truth_counts": np.array([len(t["labels"]) for t in truths], dtype=np.uint16),
        "truth_boxes": torch.cat([t["boxes"] for t in truths]).float().numpy(),
        "truth_labels": torch.cat([t["labels"] for t in truths]).numpy().astype(np.uint8),
    }


def unpack(arrays: dict[str, np.ndarray]) -> tuple[Boxes, Boxes, list[str], tuple[str, ...]]:
    """(predictions, truths, names, class_names) from the arrays that `pack` made."""

    def split(name: str, dtype: type) -> tuple[Tensor, ...]:
        counts = arrays[name.split("_")[0] + "_counts"].tolist()
        return torch.from_numpy(arrays[name].astype(dtype)).split(counts)

    boxes = (b.double().mul(float(arrays["box_step"])).float() for b in split("prediction_boxes", np.int64))
    scores, labels = split("prediction_scores", np.float32), split("prediction_labels", np.int64)
    predictions = [{"boxes": b, "scores": s, "labels": k} for b, s, k in zip(boxes, scores, labels, strict=True)]
    boxes, labels = split("truth_boxes", np.float32), split("truth_labels", np.int64)
    truths = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]
    return predictions, truths, arrays["names"].tolist(), tuple(arrays["class_names"].tolist())


# --- Helpers ---------------------------------------------------------------------------------------------------------


def _torchmetrics_precision(
    predictions: Boxes, truths: Boxes, class_names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The AP of each class in per cent, NaN without truth."""
    ious = [0.33, *COCO_IOUS]
    # The levels are given in double precision, as COCO's own code has them: torchmetrics' default float32 levels lie a
    # hair above some recalls that are then not reached.
    metric = MeanAveragePrecision(
        iou_thresholds=ious, rec_thresholds=RECALLS.tolist(), extended_summary=True, backend="faster_coco_eval"
    )
    metric.warn_on_many_detections = False
    metric.update(predictions, truths)
    result = metric.compute()
    present = torch.cat([truth["labels"] for truth in truths]).unique().tolist()
    per_class = {name: dict.fromkeys(METRIC_IOUS, math.nan) for name in class_names}
    classes = result["classes"].reshape(-1).tolist()
    for label in present:
        curves = result["precision"][:, :, classes.index(label), 0, -1].double()  # (T, 101): all areas, 100 predictions
        for name, levels in METRIC_IOUS.items():
            per_class[class_names[label]][name] = 100 * float(curves[[ious.index(level) for level in levels]].mean())
    return per_class


def _check(predictions: Boxes, truths: Boxes, classes: int | None) -> int:
    """The number of classes, once the lists are found to fit each other."""
    if len(predictions) != len(truths):
        raise ValueError(f"predictions of {len(predictions)} pictures and truths of {len(truths)}: give one a picture")
    labels = torch.cat([x["labels"] for x in [*predictions, *truths]] or [torch.zeros(0, dtype=torch.int64)])
    if any(torch.isnan(p["scores"]).any() for p in predictions):
        raise ValueError("scores contain NaN: the model that gave them has diverged")
    if any(not (x["boxes"][:, 2:] >= x["boxes"][:, :2]).all() for x in [*predictions, *truths]):
        raise ValueError("boxes must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, without NaN")  # COCO skips others
    lowest, highest = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    classes = highest + 1 if classes is None else classes
    if lowest < 0 or highest >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {lowest}..{highest}")
    return classes


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """(n,) how many before it have the same label."""
    order = np.argsort(labels, kind="stable")
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    return rank


def _pairs(predicted: dict[str, Tensor], truth: dict[str, Tensor], iou: float) -> tuple[list[int], list[int]]:
    """Indices of paired predictions and truths of a picture, the pairs of largest IoU first, whatever their class."""
    overlap = box_iou(predicted["boxes"].double(), truth["boxes"].double()).numpy()
    rows, columns = np.nonzero(overlap >= iou)
    order = np.lexsort((-predicted["scores"].numpy()[rows], -overlap[rows, columns]))
    of_prediction, of_truth = [], []
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in of_prediction and column not in of_truth:
            of_prediction.append(row)
            of_truth.append(column)
    return of_prediction, of_truth


def _f1_curve(matches: Matches) -> np.ndarray:
    """F1 in per cent (micro) of keeping predictions down to each; -1 inside a run of equal scores, kept as one."""
    true = np.cumsum(matches.right[:, 0])
    curve = 200 * true / (np.arange(1, len(true) + 1) + matches.truths.sum())
    curve[:-1][matches.scores[:-1] == matches.scores[1:]] = -1.0
    return curve


def _mean(values: Sequence[float]) -> float:
    """Mean of those that are not NaN; NaN where all are."""
    values = np.asarray(values)[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan
