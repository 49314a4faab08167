"""A trained detector on corrupted images: motion blur and noise at five strengths each."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from defectlab.data.augment import corrupt, resized
from defectlab.data.detection import DetectionData, load_images
from defectlab.metrics.detection import evaluate
from defectlab.metrics.robustness import KINDS, pack_matches, summary
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.runs import Context, OfAnother, Result
from defectlab.training.detection import Build, fresh, frozen, predict
from defectlab.training.results import rounded

PLAIN = DetectorSettings()


@dataclass(frozen=True)
class RobustnessSettings(OfAnother):
    """The trained network of another row, on images that are blurred or noisy; nothing is trained."""

    model: ClassVar[str] = "robustness"
    version: ClassVar[int] = 1

    of: DetectorSettings = PLAIN  # the row whose network it is
    blur: tuple[int, ...] = (3, 6, 9, 12, 15)  # ours: px of the original image; the angle differs by image
    noise: tuple[int, ...] = (5, 10, 20, 30, 40)  # ours: standard deviation in grey levels of 255


def run_robustness(
    settings: RobustnessSettings, seed: int, data: DetectionData, context: Context, build: Build
) -> Result:
    """mAP50 at each strength of blur and of noise; strength 0 is the clean image.

    The images are corrupted at their own size, as in a camera, and then brought to the network's; every row and seed
    sees the same ones. metrics: "map50_blur_0" .. "map50_blur_5", "map50_blur" (mean of 1 to 5), "kept_blur" (that
    mean in per cent of the clean value), and the same for noise.
    """
    record = context.require(settings.of, seed)
    detector = frozen(record, fresh(build, settings.of, data), context.device)
    split, ground_truth = data.test, data.test.ground_truth()
    native = load_images(settings.dataset, "test", int(split.sizes.max()), context.device)
    metrics: dict[str, float] = {}
    classes = len(data.class_names)
    counts = np.stack([np.bincount(t["labels"].numpy(), minlength=classes) for t in ground_truth]).astype(np.uint8)
    arrays = {"names": np.array(split.names), "class_names": np.array(data.class_names), "truths": counts}

    def look(condition: str, images: torch.Tensor) -> float:
        found = predict(detector, split, resized(images, settings.size))
        value = evaluate(found, ground_truth, data.class_names)[0]["map50"]
        arrays.update(pack_matches(condition, found, ground_truth, classes))
        context.log(f"  {condition}: mAP50 {value:.1f}")
        return value

    clean = look("clean", native)
    for kind in KINDS:
        values = [clean]
        for step, strength in enumerate(getattr(settings, kind), 1):
            generator = torch.Generator().manual_seed(step)
            values.append(look(f"{kind}_{step}", corrupt(native, kind, strength, generator)))
        metrics |= {f"map50_{kind}_{step}": value for step, value in enumerate(values)} | summary(kind, values)
    notes = {"of": record.key, "of_sha256": record.model_sha256}
    return Result(rounded(metrics), {}, {}, {}, arrays, {}, {}, "fp32", notes=notes)
