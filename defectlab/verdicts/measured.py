"""What records say: the names and units of metrics and costs, a record's value, its interval over test images.

Metrics are in per cent, but for those of `UNITS`. Costs (`COSTS`) have units of their own and stand in a record's
`costs`, not in its `metrics`; those that are timed stand in `results/costs`, where one process timed all networks of a
study in turns (`defectlab.bench`): what runs that were made at different times took is not compared.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from defectlab.files import project_root
from defectlab.metrics import detection, segmentation
from defectlab.metrics.anomaly import metrics_from_histograms
from defectlab.metrics.per_image import THIRDS, recall_statistic
from defectlab.metrics.ranking import auroc, average_precision
from defectlab.metrics.robustness import robustness_statistic
from defectlab.metrics.stages import product_statistic
from defectlab.metrics.thresholds import f1_regret, missed_at, normal_threshold
from defectlab.metrics.windows import balanced_accuracy, class_accuracy
from defectlab.runs import Record
from defectlab.verdicts import stats

METRIC_NAMES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
    "image_f1_dev": "image F1, dev threshold",
    "image_f1_oracle": "image F1 (oracle threshold)",
    "f1_regret": "image F1 lost to the best threshold",
    "missed_at_5": "defective missed at 5 % false alarms",
    "pixel_f1_oracle": "pixel F1 (oracle threshold)",
    "map50": "mAP50",
    "map50_95": "mAP50:95",
    "map33": "mAP33 (IoU 0.33)",
    "located50": "AP50, types ignored",
    "recall_at_01": "recall at 0.1 false boxes an image",
    "duplicates": "boxes too many per object found, score 0.25",
    "duplicates_all": "boxes too many per object found, any score",
    "candidates": "boxes before suppression, score 0.25",
    "candidates_all": "boxes before suppression, score 0.001",
    "precision_dev": "precision, dev threshold",
    "recall_dev": "recall, dev threshold",
    "f1_dev": "F1, dev threshold",
    "f1_oracle": "F1 (oracle threshold)",
    "balanced_accuracy": "balanced accuracy, dev threshold",
    "window_balanced_accuracy": "balanced accuracy of windows",
    "found": "defective found",
    "false_alarms": "good reported",
    "found_small": "smallest third of defects found",
    "map50_blur": "mAP50 under blur",
    "map50_noise": "mAP50 under noise",
    "kept_blur": "mAP50 kept under blur",
    "kept_noise": "mAP50 kept under noise",
    "miou": "mIoU",
    "iou": "IoU of the foreground",
    "iou_no_depth": "IoU, depth lost",
    "iou_shift_4": "IoU, depth 4 px off",
    "iou_shift_8": "IoU, depth 8 px off",
    "iou_shift_16": "IoU, depth 16 px off",
    "dice": "Dice",
    "accuracy": "pixel accuracy",
    "mae": "MAE",
    "weighted_f": "weighted F",
    "s_measure": "S-measure",
    "e_measure": "mean E-measure",
    "dice_nonempty": "mean Dice of non-empty images",
    "crop_share": "crop's share of the image",
    "noise_error": "noise error (% of its power)",
    "unexplained": "fraction of variance unexplained",
    "kl": "KL (nats per latent value)",
    "compression_ratio": "compression ratio",
    "class_accuracy": "accuracy, mean of the classes",
    "copies": "made images that copy a given one",
    "copies_held_out": "held-out images taken for copies",
    "episode_accuracy": "accuracy, 5 images a class",
    "episode_accuracy_1": "accuracy, 1 image a class",
    "recall_region": "pits found, region stage alone",
    "recall_part": "pits found, part stage alone",
    "recall_class": "pits found, class stage alone",
    "recall_product": "product of the stages' recalls",
    "beyond_product": "all together less the product",
    "windows_seen": "windows looked at, of an image",
    "iou_first": "IoU of the first network",
    "windows": "windows",
    "parameters_m": "parameters (M)",
    "gflops": "GFLOPs",
    "gflops_image": "GFLOPs of a frame",
    "size_mb": "size (MB, fp16)",
    "latency_ms": "latency (ms, batch 1)",
    "fps": "FPS (batch 1)",
}
METRIC_NAMES |= {f"recall_{third}_third": f"recall, {third} third" for third in THIRDS}
METRIC_NAMES |= {f"{m}_nonempty": f"{METRIC_NAMES[m]} of non-empty images" for m in segmentation.OF_IMAGES}
METRIC_NAMES |= {f"{m}_crop": f"{METRIC_NAMES[m]}, crop only" for m in ("image_auroc", "pixel_auroc", "aupro")}
SHOTS = (1, 2, 4, 8, 16)  # good images, in the names of metrics
METRIC_NAMES |= {
    f"{m}_{k}": f"{METRIC_NAMES[m]}, {k} good" for m in ("image_auroc", "pixel_auroc", "aupro") for k in SHOTS
}
METRIC_NAMES |= {f"mask_{m}": f"mask {METRIC_NAMES[m]}" for m in ("map50", "map50_95", "precision_dev", "recall_dev")}


class Cost(NamedTuple):
    """How a cost is written. Costs that are not `timed` follow from the model alone: every seed gives the same."""

    unit: str
    digits: int  # after the point
    timed: bool = False  # then no record has it, but the timings of the study


COSTS = {
    "windows": Cost("windows", 0),
    "parameters_m": Cost("M", 2),
    "gflops": Cost("GFLOPs", 1),
    "gflops_image": Cost("GFLOPs", 1),
    "size_mb": Cost("MB", 1),
    "latency_ms": Cost("ms", 2, timed=True),
    "fps": Cost("images/s", 2, timed=True),
}
BOOTSTRAP_REPEATS = 300
DETECTION = (*detection.METRIC_IOUS, *detection.MASK_IOUS)
ROBUSTNESS = ("map50_blur", "kept_blur", "map50_noise", "kept_noise")
ANOMALY = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")
BALANCED = "balanced_accuracy"
# No record has these among its metrics: they follow from its scores, or from its boxes. The threshold is the one that
# this share of good images passes, of the held-out ones for the first, of those of the test for the second.
DERIVED, PASSED = {"f1_regret": "dev_scores", "missed_at_5": "dev_scores"}, 0.05
OF_THIRD = {f"recall_{third}_third": third for third in THIRDS}
DERIVED |= dict.fromkeys(("located50", "recall_at_01", *OF_THIRD), "prediction_boxes")
EPISODES = {"episode_accuracy": "accuracies", "episode_accuracy_1": "accuracies_1"}  # a record's array, by episode
STAGES = ("recall_region", "recall_part", "recall_class", "recall_product", "beyond_product")
FEW_NORMALS = {f"image_auroc_{k}": f"scores_{k}" for k in SHOTS}
BOOTSTRAPPED = (
    *ANOMALY,
    *EPISODES,
    *FEW_NORMALS,
    *STAGES,
    "class_accuracy",
    *DERIVED,
    BALANCED,
    *DETECTION,
    *ROBUSTNESS,
    *segmentation.METRICS,
)  # a record's arrays give these again
UNITS = {"kl": "nats", "compression_ratio": "ratio"}  # of the metrics that are not in per cent
UNITS |= dict.fromkeys(("duplicates", "duplicates_all", "candidates", "candidates_all"), "boxes")
UNITS |= {"beyond_product": "points", "windows_seen": "windows"}
BEYOND_100 = ("kept_blur", "kept_noise", "noise_error", "unexplained")  # per cent of what can be exceeded


def is_timed(metric: str) -> bool:
    return metric in COSTS and COSTS[metric].timed


_COMPUTED: dict[tuple[Path, str], float] = {}  # tables, claims and findings ask for the same value


def value_of(record: Record, metric: str) -> float:
    """A metric in per cent, or a cost in its unit; NaN where the record has none."""
    if metric in DERIVED:
        if (asked := (record.path, metric)) not in _COMPUTED:
            arrays = record.arrays
            _COMPUTED[asked] = float(_derived(arrays, metric)(None)) if DERIVED[metric] in arrays else math.nan
        return _COMPUTED[asked]
    return math.nan if is_timed(metric) else (record.costs if metric in COSTS else record.metrics).get(metric, math.nan)


class Timing(NamedTuple):
    """What `defectlab.bench` found of the network of a row, on a device."""

    latency_ms: float
    ratio: tuple[float, float, float]  # to the study's first network: median and quartiles over rounds
    first: str  # that network's row
    device: str

    def value(self, metric: str) -> float:
        return self.latency_ms if metric == "latency_ms" else 1000 / self.latency_ms

    @property
    def seconds(self) -> float:
        return self.latency_ms / 1000

    def shown(self, metric: str) -> str:
        """'74.46 (×1.22)': also how many times the time of the first network, where that is another."""
        of_first = "" if self.ratio[1:] == (1.0, 1.0) or metric == "fps" else f" (×{self.ratio[0]:.2f})"
        return written(self.value(metric), metric) + of_first


def timings(study_name: str) -> dict[str, Timing]:
    """Row -> its timing, of a GPU where the study has such, else of a CPU; {} where nothing was timed."""
    folder = project_root() / "results" / "costs"
    path = next((p for d in ("cuda", "cpu") if (p := folder / f"{study_name}-{d}.json").is_file()), None)
    made = json.loads(path.read_text(encoding="utf-8")) if path else {"networks": {}}
    return {
        row: Timing(of["latency_ms"], tuple(of["ratio"]), made["first"], made["device"])
        for row, of in made["networks"].items()
    }


def written(value: float, metric: str) -> str:
    """A value with the digits that its metric or cost is shown with, a timed one with three in all; without unit."""
    digits = COSTS[metric].digits if metric in COSTS else 1
    if is_timed(metric) and 0 < value < math.inf:
        digits = min(max(2 - math.floor(math.log10(value)), 0), digits)
    return f"{value:z,.{digits}f}"  # z: no "-0.0"


def within(metric: str, low: float, high: float, differences: int = 0) -> tuple[float, float]:
    """An interval cut where the metric ends: a level in per cent at 0 and 100, a difference of two such at -100 and
    100, a difference of `differences` = 2 differences at -200 and 200. A cost or a count has no end but 0."""
    if metric not in METRIC_NAMES or metric in COSTS or metric in UNITS:
        counted = metric in COSTS or UNITS.get(metric, "points") != "points"
        return max(low, 0.0) if counted and not differences else low, high
    most = math.inf if metric in BEYOND_100 else 100.0 * max(differences, 1)
    return max(low, -most if differences else 0.0), min(high, most)


# --- Bootstrap over test images --------------------------------------------------------------------------------------


def image_statistic(record: Record, metric: str, types: list[str] | None = None) -> Callable[[np.ndarray], float]:
    """(weight of each test image, shape (N,)) -> one of `BOOTSTRAPPED` in per cent, from the record's arrays.

    With `types`: the mean over these defect types, each against all normals (anomaly), its AP (detection), or its
    images alone (segmentation).
    """
    arrays = record.arrays
    if metric in DETECTION:
        return detection.statistic(arrays, metric, types)
    if metric in ROBUSTNESS:
        return robustness_statistic(arrays, metric)
    if metric in segmentation.METRICS:
        whole, always = segmentation.statistic(arrays, metric), []
    elif metric in ("image_auroc", "image_ap"):
        measure = auroc if metric == "image_auroc" else average_precision
        whole, always = partial(measure, arrays["scores"], arrays["labels"]), [0]
    elif metric in FEW_NORMALS:
        whole, always = partial(auroc, arrays[FEW_NORMALS[metric]], arrays["labels"]), [0]
    elif metric in STAGES:
        return product_statistic(arrays, metric)
    elif metric in EPISODES:
        return partial(np.average, arrays[EPISODES[metric]], None)
    elif metric == "class_accuracy":
        answers, labels = arrays["answers"], arrays["labels"]
        own = np.ones(len(labels), bool)
        if types is not None:
            own = np.isin(labels, [arrays["class_names"].tolist().index(t) for t in types])
        return lambda weights: class_accuracy(answers[own], labels[own], weights[own])
    elif metric in DERIVED:
        whole, always = _derived(arrays, metric), [0]
    elif metric == BALANCED:
        whole, always = partial(balanced_accuracy, arrays["scores"], arrays["labels"], record.dev["threshold"]), [0]
    else:
        histogram = {k.removeprefix("histogram_"): v for k, v in arrays.items() if k.startswith("histogram_")}
        whole, always = lambda weights: metrics_from_histograms(histogram, weights)[metric], [0]
    if types is None:
        return whole
    names = arrays["type_names"].tolist()
    members = [np.isin(arrays["types"], [names.index(t), *always]) for t in types]  # type 0: the normal images
    return lambda weights: float(np.mean([whole(weights * chosen) for chosen in members]))


def _derived(arrays: dict[str, np.ndarray], metric: str) -> Callable[[np.ndarray | None], float]:
    """(weight of each test image, None: 1 each) -> one of `DERIVED` in per cent."""
    if metric == "located50":
        return detection.located_statistic(arrays)
    if metric == "recall_at_01" or metric in OF_THIRD:
        return recall_statistic(arrays, OF_THIRD.get(metric))
    scores, labels = arrays["scores"], arrays["labels"]
    if metric == "missed_at_5":
        return lambda weights: missed_at(scores, labels, PASSED, weights)
    threshold = normal_threshold(arrays["dev_scores"][arrays["dev_labels"] == 0], 1 - PASSED)
    return lambda weights: f1_regret(scores, labels, threshold, weights)


def over_images(statistic: Callable[[np.ndarray], float], arrays: dict[str, np.ndarray]) -> stats.Interval:
    """Bootstrap over the test images of a record's arrays, or its episodes; where images have types (anomaly), in their
    proportions."""
    count = len(arrays["accuracies" if "accuracies" in arrays else "names"])
    return stats.paired_bootstrap(statistic, count, arrays.get("types"), BOOTSTRAP_REPEATS)


def bootstrap_level(records: list[Record], metric: str, kind: str | None = None) -> stats.Interval:
    """Bootstrap over test images of the mean over seeds of one metric; of one defect type where `kind` is given."""
    of_seed = [image_statistic(r, metric, None if kind is None else [kind]) for r in records]
    found = over_images(lambda weights: float(np.mean([f(weights) for f in of_seed])), records[0].arrays)
    exact = [value_of(r, metric) if kind is None else r.per_class[kind][metric] for r in records]
    moved = stats.centred(found, float(np.mean(exact)))
    return stats.Interval(moved.mean, *within(metric, moved.low, moved.high), moved.n)
