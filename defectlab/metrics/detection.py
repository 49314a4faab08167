"""Metrics of detection: average precision (COCO's), scores at a threshold from dev, and what a record keeps of a run.

Predictions and ground truth are lists with one dict per image, in pixels of the original image, on the CPU:
{"boxes": (n, 4) float32 xyxy, "scores": (n,) float32 in 0..1, "labels": (n,) int64}, ground truth without "scores".

The recorded numbers are torchmetrics' (`evaluate`). For the bootstrap over test images, `match` finds the true
positives once, and `average_precision` then weighs the images. Both follow the COCO evaluation (Lin et al.,
"Microsoft COCO", ECCV 2014, and https://cocodataset.org/#detection-eval): 101 recall levels, and at most 100
predictions per image and class, at every IoU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, nms

from defectlab.metrics import ranking

Boxes = list[dict[str, Tensor]]

COCO_IOUS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # 0.50, 0.55 ... 0.95
METRIC_IOUS = {"map50": (0.5,), "map50_95": COCO_IOUS, "map33": (0.33,)}  # 0.33: DeepPCB's official protocol
MASK_IOUS = {"mask_map50": (0.5,), "mask_map50_95": COCO_IOUS}  # of masks, where a record has them
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100  # COCO's: per image and class
PACKED_PREDICTIONS, PACKED_SCORE = 12_000, 0.01  # what `pack` keeps at most, and from which score on


def evaluate(
    predictions: Boxes, ground_truth: Boxes, class_names: Sequence[str], threshold: float | None = None
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(metrics of the set, metrics of each class), in per cent.

    map50, map50_95 and map33 (IoU 0.33): average precision by torchmetrics' MeanAveragePrecision (faster-coco-eval)
    with its default of at most 100 predictions per image and class; for the set the mean over the classes that occur
    in the ground truth, for a class its AP, NaN where it has no ground truth.

    f1_oracle: the best F1 over all thresholds on these very images. With `threshold`, chosen on dev: precision_dev,
    recall_dev and f1_dev of "score >= threshold". These count all boxes of all classes together (micro average), a
    prediction being right by the rule of `match` at IoU 0.5. Precision without any prediction and all of them without
    any ground truth are NaN.

    ValueError as in `match`; labels must lie within `class_names`.
    """
    matches = match(predictions, ground_truth, (0.5,), len(class_names))
    wanted = int(matches.ground_truth.sum())
    per_class = _torchmetrics_precision(predictions, ground_truth, class_names)
    metrics = {metric: _mean([values[metric] for values in per_class.values()]) for metric in METRIC_IOUS}
    curve = ranking.f1_curve(matches.scores, matches.right[:, 0], wanted)
    metrics["f1_oracle"] = float(curve.max(initial=0.0)) if wanted else math.nan
    if threshold is not None:
        kept = matches.scores >= threshold
        found, right = int(kept.sum()), int(matches.right[kept].sum())
        metrics["precision_dev"] = 100 * right / found if found and wanted else math.nan
        metrics["recall_dev"] = 100 * right / wanted if wanted else math.nan
        metrics["f1_dev"] = 200 * right / (found + wanted) if wanted else math.nan
    return metrics, per_class


def best_f1_threshold(predictions: Boxes, ground_truth: Boxes, iou: float = 0.5) -> float:
    """The score from which on predictions are to be kept for the best F1 over all boxes: for dev, never for test.

    It is the score of a prediction, the highest of equally good ones; 1.0 where no prediction is right. ValueError
    where there is no box in the ground truth.
    """
    matches = match(predictions, ground_truth, (iou,))
    wanted = int(matches.ground_truth.sum())
    if not wanted:
        raise ValueError("no ground truth to choose a score threshold by: give dev images that have defects")
    if not matches.right.any():
        return 1.0
    return float(matches.scores[ranking.f1_curve(matches.scores, matches.right[:, 0], wanted).argmax()])


# --- Matching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matches:
    """Which of P predictions are right, in order of descending score over all images."""

    images: np.ndarray  # (P,) int64, index of the image
    labels: np.ndarray  # (P,) int64
    scores: np.ndarray  # (P,) float
    taken: np.ndarray  # (P, T) int64: the ground-truth box of its image that it takes at each IoU, -1: none
    ground_truth: np.ndarray  # (N, C) int64, boxes of each image and class
    ious: tuple[float, ...]  # T

    @cached_property
    def right(self) -> np.ndarray:
        """(P, T) bool: a true positive at each IoU."""
        return self.taken >= 0


def match(predictions: Boxes, ground_truth: Boxes, ious: Sequence[float], classes: int | None = None) -> Matches:
    """COCO's greedy matching: in an image and class, by descending score, each prediction takes the free ground-truth
    box that overlaps it most, if by at least the IoU; the first 100 predictions per image and class count.

    `classes` is C, by default the highest label in use + 1. ValueError: lists of different length or empty, NaN
    scores, boxes turned inside out, labels outside 0..C - 1.
    """
    classes = _check(predictions, ground_truth, classes)
    parts = []
    for image, (predicted, truth) in enumerate(zip(predictions, ground_truth, strict=True)):
        scores, labels = predicted["scores"].numpy(), predicted["labels"].numpy()  # (n,)
        order = np.argsort(-scores, kind="stable")
        order = order[_rank_in_class(labels[order]) < MAX_DETECTIONS]
        overlap = box_iou(predicted["boxes"].double(), truth["boxes"].double()).numpy()[order]  # (n, m)
        overlap[labels[order][:, None] != truth["labels"].numpy()] = -1.0
        parts.append((np.full(len(order), image), labels[order], scores[order], greedy_match(overlap, ious)))
    if not parts:
        raise ValueError("no images to match: the lists of predictions and ground truth are empty")
    return _ranked(*(np.concatenate(column) for column in zip(*parts, strict=True)), ground_truth, classes, ious)


def greedy_match(overlap: np.ndarray, ious: Sequence[float]) -> np.ndarray:
    """The greedy matching of one image: overlap (n, m) of predictions, by descending score, with ground truth, -1 where
    the classes differ -> (n, T) int64, the ground-truth box that a prediction takes at each IoU, -1 for none."""
    levels = np.minimum(ious, 1 - 1e-10)  # as COCO has it: IoU 1 can be reached in spite of rounding
    taken = np.full((len(overlap), len(levels)), -1)
    free = np.ones((len(levels), overlap.shape[1]), dtype=bool)
    for index in np.flatnonzero((overlap >= levels.min()).any(1)):
        candidates = np.where(free & (overlap[index] >= levels[:, None]), overlap[index], -1.0)  # (T, m)
        best = overlap.shape[1] - 1 - candidates[:, ::-1].argmax(1)  # of equal overlaps COCO takes the last
        hit = np.flatnonzero(candidates[np.arange(len(levels)), best] >= 0)
        taken[index, hit] = best[hit]
        free[hit, best[hit]] = False
    return taken


def average_precision(matches: Matches, weights: np.ndarray | None = None) -> np.ndarray:
    """AP in per cent of each class and IoU, shape (C, T); NaN for a class without ground truth.

    weights (N,): how often each image is taken, not negative, 1 each by default. Integer weights give what repeated
    images give, without matching again (but for the order of equal scores, which COCO leaves to chance).
    """
    images, classes = matches.ground_truth.shape
    weights = np.ones(images) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != (images,):
        raise ValueError(f"weights must have shape ({images},), got {weights.shape}")
    wanted = weights @ matches.ground_truth  # (C,)
    result = np.full((classes, len(matches.ious)), math.nan)
    for label in np.flatnonzero(wanted > 0):
        chosen = matches.labels == label
        weight = weights[matches.images[chosen]]
        found = np.cumsum(weight)
        for level, right in enumerate(matches.right[chosen].T):
            true = np.cumsum(weight * right)
            precision = np.divide(true, found, out=np.zeros_like(true), where=found > 0)
            envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)  # 0 beyond the highest recall
            result[label, level] = 100 * envelope[np.searchsorted(true / wanted[label], RECALLS)].mean()
    return result


def statistic(
    arrays: dict[str, np.ndarray], metric: str, classes: Sequence[str] | None = None
) -> Callable[[np.ndarray], float]:
    """(weight of each image, shape (N,)) -> an average precision in per cent, from what `pack` gave: "map50",
    "map50_95" or "map33", and where masks were packed "mask_map50" and "mask_map50_95".

    The mean of the AP of the named classes, by default of all that have ground truth in the chosen images; NaN where
    none has. ValueError for another metric or a class that the arrays lack.
    """
    predictions, ground_truth, _, class_names = unpack(arrays)
    if metric not in METRIC_IOUS | MASK_IOUS:
        raise ValueError(f"no average precision is called {metric!r}: use {', '.join(METRIC_IOUS | MASK_IOUS)}")
    unknown = set(classes or ()) - set(class_names)
    if unknown:
        raise ValueError(f"no class {sorted(unknown)} in these arrays, which have {', '.join(class_names)}")
    chosen = [class_names.index(name) for name in classes or class_names]
    if metric in METRIC_IOUS:
        matches = match(predictions, ground_truth, METRIC_IOUS[metric], len(class_names))
    else:  # masks are matched already
        scores, labels = (torch.cat([p[name] for p in predictions]).numpy() for name in ("scores", "labels"))
        images = np.repeat(np.arange(len(predictions)), [len(p["scores"]) for p in predictions])
        bits = np.array([COCO_IOUS.index(iou) for iou in MASK_IOUS[metric]], dtype=np.uint16)
        right = (arrays["mask_right"][:, None] >> bits) & 1 > 0  # (P, T)
        taken = right.astype(int) - 1  # which one is not recorded
        matches = _ranked(images, labels, scores, taken, ground_truth, len(class_names), MASK_IOUS[metric])
    return lambda weights: _mean(average_precision(matches, weights)[chosen].mean(1))


def located_statistic(arrays: dict[str, np.ndarray]) -> Callable[[np.ndarray | None], float]:
    """(weight of each image, None: 1 each) -> AP at IoU 0.5 in per cent of boxes whose type is ignored, from what
    `pack` gave; of predictions that overlap by an IoU above 0.5 the one with the highest score counts."""
    predictions, ground_truth, _, _ = unpack(arrays)

    def of_one_type(boxes: dict[str, Tensor]) -> dict[str, Tensor]:
        return boxes | {"labels": torch.zeros_like(boxes["labels"])}

    surest = [{k: v[nms(p["boxes"], p["scores"], 0.5)] for k, v in p.items()} for p in predictions]
    matches = match([of_one_type(p) for p in surest], [of_one_type(t) for t in ground_truth], (0.5,), 1)
    return lambda weights: float(average_precision(matches, weights)[0, 0])


def precision_recall(matches: Matches, label: int, iou_index: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(recall, precision, scores), each (p,), in 0..1: the raw curve of one class, a point for each prediction, from
    the highest score down. Recall is NaN where the class has no ground truth."""
    chosen = matches.labels == label
    true = np.cumsum(matches.right[chosen, iou_index])
    wanted = matches.ground_truth[:, label].sum() or math.nan
    return true / wanted, true / np.arange(1, len(true) + 1), matches.scores[chosen]


def confusion_matrix(
    predictions: Boxes, ground_truth: Boxes, classes: int, threshold: float, iou: float = 0.5
) -> np.ndarray:
    """Counts (C + 1, C + 1) int64: rows ground truth, columns prediction, the last of each background.

    So the last column holds missed boxes and the last row false alarms. Predictions with score >= threshold are paired
    with ground truth whatever its class, each at most once, the pairs of largest IoU (>= `iou`) first, of equal ones
    that with the higher score.
    """
    _check(predictions, ground_truth, classes)
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for predicted, truth in zip(predictions, ground_truth, strict=True):
        kept = predicted["scores"] >= threshold
        scores, labels = predicted["scores"][kept].numpy(), predicted["labels"][kept].numpy()
        true_labels = truth["labels"].numpy()
        overlap = box_iou(predicted["boxes"][kept].double(), truth["boxes"].double()).numpy()
        rows, columns = np.nonzero(overlap >= iou)
        of_prediction, of_truth = [], []
        for pair in np.lexsort((-scores[rows], -overlap[rows, columns])):
            if rows[pair] not in of_prediction and columns[pair] not in of_truth:
                of_prediction.append(rows[pair])
                of_truth.append(columns[pair])
        np.add.at(matrix, (true_labels[of_truth], labels[of_prediction]), 1)
        np.add.at(matrix, (np.delete(true_labels, of_truth), classes), 1)
        np.add.at(matrix, (classes, np.delete(labels, of_prediction)), 1)
    return matrix


def examples(predictions: Boxes, ground_truth: Boxes, count: int = 4, threshold: float = 0.25) -> list[tuple[int, str]]:
    """(index of the image, why) of up to 3 * `count` different images: those with most missed boxes, those with the
    most confident false alarms, and the best ones.

    At "score >= threshold" and IoU 0.5, by the rule of `match`. The best have neither missed nor false boxes; the more
    defects in the image, then the higher the lowest score, the better. Equal ones come by index.
    """
    matches = match(predictions, ground_truth, (0.5,))
    kept, right = matches.scores >= threshold, matches.right[:, 0]
    wanted = matches.ground_truth.sum(1)
    missed = wanted - np.bincount(matches.images[kept & right], minlength=len(wanted))
    alarm, lowest = np.zeros(len(wanted)), np.ones(len(wanted))
    np.maximum.at(alarm, matches.images[kept & ~right], matches.scores[kept & ~right])
    np.minimum.at(lowest, matches.images[kept], matches.scores[kept])
    flawless = (missed == 0) & (alarm == 0) & (wanted > 0)

    chosen: dict[int, str] = {}
    for order, allowed, why in (
        (np.argsort(-missed, kind="stable"), missed > 0, lambda i: f"{missed[i]} of {wanted[i]} missed"),
        (np.argsort(-alarm, kind="stable"), alarm > 0, lambda i: f"false alarm at {alarm[i]:.2f}"),
        (np.lexsort((-lowest, -wanted)), flawless, lambda i: f"all {wanted[i]} found" if wanted[i] > 1 else "found"),
    ):
        fresh = [int(i) for i in order if allowed[i] and int(i) not in chosen]
        chosen.update({i: why(i) for i in fresh[:count]})
    return list(chosen.items())


# --- What a record keeps ---------------------------------------------------------------------------------------------


def pack(
    predictions: Boxes,
    ground_truth: Boxes,
    names: Sequence[str],
    class_names: Sequence[str],
    right_masks: Sequence[Tensor] | None = None,
) -> dict[str, np.ndarray]:
    """Arrays for a record's .npz, small enough to commit, from which figures and bootstraps are made without data.

    Of the predictions the 12,000 with the highest scores of the whole set, those from 0.01 on. Boxes are in steps of
    1/65535 of the largest coordinate, so off by at most 0.007 px in images of 800 px (coordinates below 0 become 0);
    scores are float16. Ground truth is whole.

    names (N,) str, class_names (C,) str, prediction_counts (N,) uint16 and prediction_boxes (P, 4) uint16,
    prediction_scores (P,) float16, prediction_labels (P,) uint8, image after image; box_step () float64, pixels per
    unit; truth_counts (N,), truth_boxes (M, 4) float32, truth_labels (M,). With `right_masks`, (n, T) bool for each
    image, whether a prediction's mask is right at each of `COCO_IOUS`: mask_right (P,) uint16, a bit for each IoU.
    """
    _check(predictions, ground_truth, len(class_names))
    if len(names) != len(ground_truth):
        raise ValueError(f"{len(names)} names for {len(ground_truth)} images: give one for each")
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
        "truth_counts": np.array([len(t["labels"]) for t in ground_truth], dtype=np.uint16),
        "truth_boxes": torch.cat([t["boxes"] for t in ground_truth]).float().numpy(),
        "truth_labels": torch.cat([t["labels"] for t in ground_truth]).numpy().astype(np.uint8),
    }


def unpack(arrays: dict[str, np.ndarray]) -> tuple[Boxes, Boxes, list[str], tuple[str, ...]]:
    """(predictions, ground truth, names, class_names) from the arrays that `pack` made."""

    def split(name: str, dtype: type) -> tuple[Tensor, ...]:
        counts = arrays[name.split("_")[0] + "_counts"].tolist()
        return torch.from_numpy(arrays[name].astype(dtype)).split(counts)

    boxes = (b.double().mul(float(arrays["box_step"])).float() for b in split("prediction_boxes", np.int64))
    scores, labels = split("prediction_scores", np.float32), split("prediction_labels", np.int64)
    predictions = [{"boxes": b, "scores": s, "labels": k} for b, s, k in zip(boxes, scores, labels, strict=True)]
    boxes, labels = split("truth_boxes", np.float32), split("truth_labels", np.int64)
    ground_truth = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]
    return predictions, ground_truth, arrays["names"].tolist(), tuple(arrays["class_names"].tolist())


# --- Helpers ---------------------------------------------------------------------------------------------------------


def _torchmetrics_precision(
    predictions: Boxes, ground_truth: Boxes, class_names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The AP of each class in per cent, NaN without ground truth."""
    ious = [0.33, *COCO_IOUS]
    metric = coco_metric("bbox", ious)
    metric.update(predictions, ground_truth)
    per_class = {name: dict.fromkeys(METRIC_IOUS, math.nan) for name in class_names}
    for label, curves in precision_of_classes(metric, ground_truth):
        for name, levels in METRIC_IOUS.items():
            per_class[class_names[label]][name] = 100 * float(curves[[ious.index(level) for level in levels]].mean())
    return per_class


def coco_metric(kind: str, ious: Sequence[float]) -> nn.Module:
    """torchmetrics' MeanAveragePrecision (faster-coco-eval) of boxes, "bbox", or masks, "segm"."""
    from torchmetrics.detection import MeanAveragePrecision  # takes seconds to import

    # The levels are given in double precision, as COCO's own code has them: torchmetrics' default float32 levels lie a
    # hair above some recalls that are then not reached.
    options = {"rec_thresholds": RECALLS.tolist(), "extended_summary": True, "backend": "faster_coco_eval"}
    metric = MeanAveragePrecision(iou_type=kind, iou_thresholds=list(ious), **options)
    metric.warn_on_many_detections = False
    return metric


def precision_of_classes(metric: nn.Module, ground_truth: Boxes) -> Iterator[tuple[int, Tensor]]:
    """Each class with ground truth, and its precision (T, 101) at the IoUs of a `coco_metric` and the recall levels."""
    result = metric.compute()
    classes = result["classes"].reshape(-1).tolist()
    for label in torch.cat([truth["labels"] for truth in ground_truth]).unique().tolist():
        yield label, result["precision"][:, :, classes.index(label), 0, -1].double()  # all areas, 100 predictions


def _check(predictions: Boxes, ground_truth: Boxes, classes: int | None) -> int:
    """The number of classes, once the lists are found to fit each other."""
    if len(predictions) != len(ground_truth):
        counts = f"predictions of {len(predictions)} images and ground truth of {len(ground_truth)}"
        raise ValueError(f"{counts}: give one of each per image")
    labels = torch.cat([x["labels"] for x in [*predictions, *ground_truth]] or [torch.zeros(0, dtype=torch.int64)])
    if any(torch.isnan(p["scores"]).any() for p in predictions):
        raise ValueError("scores contain NaN: the model that gave them has diverged")
    if any(not (x["boxes"][:, 2:] >= x["boxes"][:, :2]).all() for x in [*predictions, *ground_truth]):
        raise ValueError("boxes must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, without NaN")  # COCO skips others
    lowest, highest = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    classes = highest + 1 if classes is None else classes
    if lowest < 0 or highest >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {lowest}..{highest}")
    return classes


def _ranked(images, labels, scores, taken, ground_truth: Boxes, classes: int, ious: Sequence[float]) -> Matches:
    counts = np.stack([np.bincount(truth["labels"].numpy(), minlength=classes) for truth in ground_truth])
    order = np.argsort(-scores, kind="stable")
    return Matches(images[order], labels[order], scores[order], taken[order], counts, tuple(ious))


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """(n,) how many before it have the same label."""
    order = np.argsort(labels, kind="stable")
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    return rank


def _mean(values: Sequence[float]) -> float:
    """Mean of those that are not NaN; NaN where all are."""
    values = np.asarray(values)[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan
