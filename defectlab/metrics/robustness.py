"""Robustness of a detector: mAP50 under corruptions of growing strength, and what a record keeps of each condition."""

from collections.abc import Callable, Sequence

import numpy as np

from defectlab.metrics.detection import Boxes, Matches, average_precision, match

KINDS = ("blur", "noise")
KEPT = 2000  # predictions of a class in one condition that a record keeps at most


def summary(kind: str, values: Sequence[float]) -> dict[str, float]:
    """mAP50 of the clean images and at each strength -> their mean over the strengths, and what that keeps."""
    corrupted = sum(values[1:]) / len(values[1:])
    return {f"map50_{kind}": corrupted, f"kept_{kind}": 100 * corrupted / values[0] if values[0] else float("nan")}


def pack_matches(condition: str, predictions: Boxes, ground_truth: Boxes, classes: int) -> dict[str, np.ndarray]:
    """What a bootstrap over images needs of one condition: of each class its predictions from the highest score down,
    in which image, right or wrong at IoU 0.5. False alarms below a class's last hit are left out: they change
    nothing. Where a class has more than `KEPT`, its AP is up to 0.2 points too low."""
    found = match(predictions, ground_truth, (0.5,), classes)
    kept = []
    for label in range(classes):
        chosen = np.flatnonzero(found.labels == label)
        hits = np.flatnonzero(found.right[chosen, 0])
        kept.append(chosen[: min(hits[-1] + 1 if len(hits) else 0, KEPT)])
    chosen = np.concatenate(kept)
    return {
        f"{condition}_pictures": found.images[chosen].astype(np.uint16),
        f"{condition}_right": np.packbits(found.right[chosen, 0]),
        f"{condition}_counts": np.array([len(of_class) for of_class in kept]),
    }


def unpack_matches(arrays: dict[str, np.ndarray], condition: str) -> Matches:
    """The other half: scores are ranks, since only their order within a class counts."""
    images, bits, counts = (arrays[f"{condition}_{name}"] for name in ("pictures", "right", "counts"))
    taken = np.unpackbits(bits, count=len(images)).astype(int)[:, None] - 1  # which one is not recorded
    labels = np.repeat(np.arange(len(counts)), counts)
    scores = np.concatenate([np.arange(n, 0, -1.0) for n in counts])
    return Matches(images.astype(np.int64), labels, scores, taken, arrays["truths"].astype(np.int64), (0.5,))


def robustness_statistic(arrays: dict[str, np.ndarray], metric: str) -> Callable[[np.ndarray], float]:
    """(weight of each image (N,)) -> "map50_blur", "kept_blur", "map50_noise" or "kept_noise", from a record."""
    kind = metric.rpartition("_")[2]
    if kind not in KINDS:
        raise ValueError(f"no robustness metric is called {metric!r}: use map50_ or kept_ with {' or '.join(KINDS)}")
    steps = sorted(int(name.split("_")[1]) for name in arrays if name.startswith(kind) and name.endswith("_right"))
    found = [unpack_matches(arrays, "clean"), *(unpack_matches(arrays, f"{kind}_{step}") for step in steps)]

    def value(weights: np.ndarray) -> float:
        return summary(kind, [float(np.nanmean(average_precision(m, weights))) for m in found])[metric]

    return value
