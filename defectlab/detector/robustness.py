"""A trained detector looked at through spoilt pictures: motion blur and noise at five strengths each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from defectlab.data.corruption import resized, spoil
from defectlab.data.detection import DetectionData, load_detection
from defectlab.detector.detect import frozen, predict, rounded
from defectlab.detector.evaluation import Boxes, Matches, average_precision, evaluate, match
from defectlab.detector.model import Detector
from defectlab.detector.training import DetectorSettings
from defectlab.runs import Result
from defectlab.train import Session

KINDS = ("blur", "noise")
KEPT = 2000  # predictions of a class in one condition that a record keeps at most
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
    classes = len(data.class_names)
    counts = np.stack([np.bincount(t["labels"].numpy(), minlength=classes) for t in truths]).astype(np.uint8)
    arrays = {"names": np.array(split.names), "class_names": np.array(data.class_names), "truths": counts}

    def look(condition: str, images: torch.Tensor) -> float:
        found = predict(detector, split, resized(images, settings.size))
        value = evaluate(found, truths, data.class_names)[0]["map50"]
        arrays.update(pack_matches(condition, found, truths, classes))
        session.say(f"  {condition}: mAP50 {value:.1f}")
        return value

    clean = look("clean", native)
    for kind in KINDS:
        values = [clean]
        for step, strength in enumerate(getattr(settings, kind), 1):
            generator = torch.Generator().manual_seed(step)
            values.append(look(f"{kind}_{step}", spoil(native, kind, strength, generator)))
        metrics |= {f"map50_{kind}_{step}": value for step, value in enumerate(values)} | summary(kind, values)
    notes = {"of": record.key, "of_sha256": record.model_sha256}
    return Result(rounded(metrics), {}, {}, {}, arrays, {}, {}, "fp32", notes=notes)


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
