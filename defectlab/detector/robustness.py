"""A trained detector looked at through spoilt pictures: motion blur and noise at five strengths each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from defectlab.data.corruption import resized, spoil
from defectlab.data.detection import DetectionData, load_detection
from defectlab.detector.detect import Predictions, frozen, predict, rounded
from defectlab.detector.evaluation import Matches, average_precision, evaluate, match
from defectlab.detector.model import Detector
from defectlab.detector.training import DetectorSettings
from defectlab.runs import Result
from defectlab.train import Session

KINDS = ("blur", "noise")
KEPT = 3000  # predictions of one condition that a record keeps, the best-scored
PLAIN = DetectorSettings()


@dataclass(frozen=True)
class RobustnessSettings:
    """The trained network of another row, looked at pictures that are blurred or noisy; nothing is trained."""

    model: ClassVar[str] = "robustness"
    version: ClassVar[int] = 1

    of: DetectorSettings = PLAIN  # the row whose network it is
    blur: tuple[int, ...] = (3, 6, 9, 12, 15)  # ours: px of the original picture; the angle differs by picture
    noise: tuple[int, ...] = (5, 10, 20, 30, 40)  # ours: standard deviation in grey levels of 255

    @property
    def dataset(self) -> str:
        return self.of.dataset

    @property
    def size(self) -> int:
        return self.of.size


def run_robustness(
    settings: RobustnessSettings,
    seed: int,
    data: DetectionData,
    device: str | torch.device,
    session: Session,
    build: Callable[[DetectorSettings, DetectionData], Detector],
) -> Result:
    """mAP50 at each strength of blur and of noise; strength 0 is the clean picture.

    The pictures are spoilt at their own size, as in a camera, and then brought to the network's; every row and seed
    sees the same ones. metrics: "map50_blur_0" .. "map50_blur_5", "map50_blur" (mean of 1 to 5), "kept_blur" (that
    mean in per cent of the clean value), and the same for noise.
    """
    record = session.need(settings.of, seed)
    detector = frozen(record, build(settings.of, data), device)
    split, truths = data.test, data.test.truths()
    native = load_detection(settings.dataset, int(split.sizes.max()), device).test.images
    metrics: dict[str, float] = {}
    arrays = {"names": np.array(split.names), "class_names": np.array(data.class_names)}
    for kind in KINDS:
        for step, strength in enumerate((0, *getattr(settings, kind))):
            generator = torch.Generator().manual_seed(step)
            found = predict(detector, split, resized(spoil(native, kind, strength, generator), settings.size))
            values, _ = evaluate(found, truths, data.class_names)
            metrics[f"map50_{kind}_{step}"] = values["map50"]
            arrays |= pack_matches(f"{kind}_{step}", found, truths, len(data.class_names))
            session.say(f"  {kind} {strength}: mAP50 {values['map50']:.1f}")
        metrics |= summary(kind, [metrics[f"map50_{kind}_{step}"] for step in range(len(getattr(settings, kind)) + 1)])
    notes = {"of": record.key, "of_sha256": record.model_sha256}
    return Result(rounded(metrics), {}, {}, {}, arrays, {}, {}, "fp32", notes=notes)


def summary(kind: str, values: Sequence[float]) -> dict[str, float]:
    """mAP50 of the clean pictures and at each strength -> their mean over the strengths, and what that keeps."""
    spoilt = sum(values[1:]) / len(values[1:])
    return {f"map50_{kind}": spoilt, f"kept_{kind}": 100 * spoilt / values[0] if values[0] else float("nan")}


def pack_matches(condition: str, predictions: Predictions, truths: Predictions, classes: int) -> dict[str, np.ndarray]:
    """What a bootstrap over pictures needs of one condition: its best predictions, right or wrong at IoU 0.5."""
    found = match(predictions, truths, (0.5,), classes)
    parts = {
        "pictures": found.pictures[:KEPT].astype(np.uint16),
        "labels": found.labels[:KEPT].astype(np.uint8),
        "scores": found.scores[:KEPT].astype(np.float16),
        "right": found.right[:KEPT],
        "truths": found.truths.astype(np.uint8),
    }
    return {f"{condition}_{name}": values for name, values in parts.items()}


def robustness_statistic(arrays: dict[str, np.ndarray], metric: str) -> Callable[[np.ndarray], float]:
    """(weight of each picture (N,)) -> "map50_blur", "kept_blur", "map50_noise" or "kept_noise", from a record."""
    kind = metric.rpartition("_")[2]
    if kind not in KINDS:
        raise ValueError(f"no robustness metric is called {metric!r}: use map50_ or kept_ with {' or '.join(KINDS)}")
    steps = sorted(int(name.split("_")[1]) for name in arrays if name.startswith(kind) and name.endswith("_right"))
    found = []
    for step in steps:
        part = {name: arrays[f"{kind}_{step}_{name}"] for name in ("pictures", "labels", "scores", "right", "truths")}
        found.append(Matches(**part, ious=(0.5,)))

    def value(weights: np.ndarray) -> float:
        return summary(kind, [float(np.nanmean(average_precision(m, weights))) for m in found])[metric]

    return value
