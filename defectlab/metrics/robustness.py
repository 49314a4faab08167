"""TODO metrics.robustness."""

from collections.abc import Callable, Sequence

import numpy as np

from defectlab.metrics.detection import Boxes, Matches, average_precision, match

KINDS = ("blur", "noise")
KEPT = 2000  # predictions of a class in one condition that a record keeps at most


def summary(kind: str, values: Sequence[float]) -> dict[str, float]:
    """mAP50 of the clean pictures and at each strength -> their mean over the strengths, and what that keeps."""
    spoilt = sum(values[1:]) / len(values[1:])
    return {f"map50_{kind}": spoilt, f"kept_{kind}": 100 * spoilt / values[0] if values[0] else float("nan")}


def pack_matches(condition: str, predictions: Boxes, truths: Boxes, classes: int) -> dict[str, np.ndarray]:
    """What a bootstrap over pictures needs of one condition: class by class its predictions from the highest score
    down, which picture, right or wrong at IoU 0.5. False alarms below a class's last hit are left out: they change
    nothing."""
    found = match(predictions, truths, (0.5,), classes)
    pictures, right, counts = [], [], []
    for label in range(classes):
        chosen = np.flatnonzero(found.labels == label)
        hits = np.flatnonzero(found.right[chosen, 0])
        chosen = chosen[: min(hits[-1] + 1 if len(hits) else 0, KEPT)]
        pictures.append(found.pictures[chosen].astype(np.uint16))
        right.append(found.right[chosen, 0])
        counts.append(len(chosen))
    parts = {
        "pictures": np.concatenate(pictures),
        "right": np.packbits(np.concatenate(right)),
        "counts": np.array(counts),
    }
    return {f"{condition}_{name}": values for name, values in parts.items()}


def unpack_matches(arrays: dict[str, np.ndarray], condition: str) -> Matches:
    """The other half: scores are ranks, since only their order within a class counts."""
    pictures, bits, counts = (arrays[f"{condition}_{name}"] for name in ("pictures", "right", "counts"))
    right = np.unpackbits(bits, count=len(pictures)).astype(bool)[:, None]
    labels = np.repeat(np.arange(len(counts)), counts)
    scores = np.concatenate([np.arange(n, 0, -1.0) for n in counts])
    return Matches(pictures.astype(np.int64), labels, scores, right, arrays["truths"].astype(np.int64), (0.5,))


def robustness_statistic(arrays: dict[str, np.ndarray], metric: str) -> Callable[[np.ndarray], float]:
    """(weight of each picture (N,)) -> "map50_blur", "kept_blur", "map50_noise" or "kept_noise", from a record."""
    kind = metric.rpartition("_")[2]
    if kind not in KINDS:
        raise ValueError(f"no robustness metric is called {metric!r}: use map50_ or kept_ with {' or '.join(KINDS)}")
    steps = sorted(int(name.split("_")[1]) for name in arrays if name.startswith(kind) and name.endswith("_right"))
    found = [unpack_matches(arrays, "clean"), *(unpack_matches(arrays, f"{kind}_{step}") for step in steps)]

    def value(weights: np.ndarray) -> float:
        return summary(kind, [float(np.nanmean(average_precision(m, weights))) for m in found])[metric]

    return value
