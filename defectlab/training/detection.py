"""From a trained detector to a result: prediction, evaluation, the telling cases; and the way from settings to both."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from defectlab.data.augment import plain
from defectlab.data.boxes import DetectionData
from defectlab.data.boxes import DetectionSplit
from defectlab.metrics.costs import model_costs
from defectlab.metrics.detection import Boxes
from defectlab.metrics.detection import best_f1_threshold
from defectlab.metrics.detection import evaluate
from defectlab.metrics.detection import pack
from defectlab.metrics.detection import telling_cases
from defectlab.networks.yolo.blocks import folded
from defectlab.networks.yolo.decode import decode
from defectlab.networks.yolo.decode import select
from defectlab.networks.yolo.losses import detection_loss
from defectlab.networks.yolo.model import Detector
from defectlab.networks.yolo.model import build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.precision import full_float32
from defectlab.precision import precision_of
from defectlab.runs import Record
from defectlab.runs import Result
from defectlab.runs import Session
from defectlab.runs import load_weights
from defectlab.training.detector import train_detector
from torch import Tensor
from torch import nn
from torch.nn.functional import interpolate
from typing import Any
import numpy as np
import torch


CASE_SIDE = 112  # pixels a side of the pictures that a record keeps
COST_SIZE = 640  # px: GFLOPs are stated for this input, whatever the training used


@torch.inference_mode()
def predict(
    detector: Detector,
    split: DetectionSplit,
    images: Tensor | None = None,
    batch: int = 32,
    features: Sequence[Tensor] = (),
    **options: Any,
) -> Boxes:
    """Detections of every picture of a split, boxes in pixels of the original pictures, in float32.

    Args:
        features: of each picture, (N, ...), which the detector is given after the pictures.
        images: uint8 (N, C, S, S) to look at in place of the split's own (blurred or noisy ones, of the same geometry).
        options: `confidence`, `iou`, `most` of `decode.select`.
    """
    images = split.images if images is None else images
    model = folded(detector).to(memory_format=torch.channels_last)
    found: Boxes = []
    for chunk in torch.arange(len(images), device=images.device).split(batch):
        pictures = plain(images, chunk).contiguous(memory_format=torch.channels_last)
        with full_float32():
            boxes, scores = decode(detector, model(pictures, *(x[chunk] for x in features)))
        own = chunk.cpu()
        places = {"scale": split.scale[own], "offset": split.offset[own], "sizes": split.sizes[own]}
        found += select(boxes, scores, images.shape[-1], **places, **options)
    return found


def probe_on(
    split: DetectionSplit,
    class_names: tuple[str, ...],
    find: Callable[[nn.Module, DetectionSplit], Boxes] = predict,
) -> Callable[[nn.Module], dict[str, float]]:
    """For a training's curve: mAP on dev, of what `find` gives."""
    truths = split.truths()

    def probe(detector: nn.Module) -> dict[str, float]:
        metrics, _ = evaluate(find(detector, split), truths, class_names)
        return {"dev_map50": metrics["map50"], "dev_map50_95": metrics["map50_95"]}

    return probe


def train_and_evaluate(
    settings: DetectorSettings,
    seed: int,
    data: DetectionData,
    device: str | torch.device,
    session: Session,
    build: Callable[[DetectorSettings, DetectionData], Detector] = build_detector,
    make_loss: Callable[..., tuple[Callable, nn.Module | None]] | None = None,
) -> Result:
    """Train a detector and evaluate the moving average of its last epoch, once.

    Args:
        build: (settings, data) -> detector.
        make_loss: (settings, data, detector, device) -> (loss of `train_detector`, its further weights or None);
            None: the detector's own loss.
    """
    torch.manual_seed(seed)
    detector = build(settings, data).to(device, memory_format=torch.channels_last)
    if make_loss is None:
        criterion = detection_loss(detector, settings.size)
        loss, extra = (lambda batch: criterion(detector(batch.images), batch.boxes, batch.labels)), None
    else:
        loss, extra = make_loss(settings, data, detector, device)
    probe = probe_on(data.dev, data.class_names)
    average, trained = train_detector(detector, loss, data.train, settings, seed, session, extra, probe)
    result = evaluate_detector(average, data)
    result.curve = trained.curve
    result.precision = precision_of(settings, device)
    result.costs |= deployed_costs(average, settings.size, device)
    result.costs |= trained.costs
    return result


def deployed_costs(detector: Detector, size: int, device: str | torch.device) -> dict[str, float]:
    """Costs as deployed, folded: parameters and GFLOPs at 640 px, latency at `size` in fp32."""
    model = folded(detector).to(device, memory_format=torch.channels_last)
    return model_costs(model, size, device, flops_size=COST_SIZE)


def evaluate_detector(
    detector: Detector, data: DetectionData, features: Mapping[str, Sequence[Tensor]] | None = None
) -> Result:
    """Metrics of the test set; the score threshold of precision and recall comes from dev. `features` of "dev" and
    "test": as in `predict`."""
    given = features or {}
    found = {part: predict(detector, getattr(data, part), features=given.get(part, ())) for part in ("dev", "test")}
    return evaluate_found(found, data, detector)


def evaluate_found(found: Mapping[str, Boxes], data: DetectionData, detector: nn.Module) -> Result:
    """The result of what `detector` found in "dev" and "test", boxes in pixels of the originals; no curve, no costs."""
    truths = {part: getattr(data, part).truths() for part in ("dev", "test")}
    threshold = best_f1_threshold(found["dev"], truths["dev"])
    dev, _ = evaluate(found["dev"], truths["dev"], data.class_names, threshold)
    metrics, per_class = evaluate(found["test"], truths["test"], data.class_names, threshold)
    arrays = pack(found["test"], truths["test"], data.test.names, data.class_names)
    arrays |= cases(data.test, found["test"], truths["test"])
    return result_of((metrics, per_class), dev, threshold, arrays, detector)


def result_of(
    test: tuple[dict[str, float], dict[str, dict[str, float]]],
    dev: dict[str, float],
    threshold: float,
    arrays: dict[str, np.ndarray],
    detector: nn.Module,
) -> Result:
    """Metrics of test (of the set, of each class) and of dev as a result without curve and costs."""
    metrics, per_class = test
    return Result(
        metrics=rounded(metrics),
        per_class={name: rounded(values) for name, values in per_class.items()},
        dev=rounded(dev) | {"threshold": threshold},
        curve={},
        predictions=arrays,
        model=detector.state_dict(),
        costs={},
        precision="fp32",
    )


def frozen(record: Record, detector: Detector, device: str | torch.device) -> Detector:
    """`detector` with the weights of a run, for inference only."""
    load_weights(record, detector)
    return detector.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Without NaN, which JSON does not know: a class without truth has no value."""
    return {key: round(value, 4) for key, value in values.items() if value == value}


def cases(split: DetectionSplit, predictions: Boxes, truths: Boxes) -> dict[str, np.ndarray]:
    """A dozen small pictures that tell most, as the network saw them: case_images (K, side, side) or
    (K, side, side, 3) uint8, case_index, case_why; case_scale and case_offset map boxes of the original onto them."""
    chosen = telling_cases(predictions, truths)
    index = torch.tensor([i for i, _ in chosen], dtype=torch.long)
    shrink = CASE_SIDE / split.images.shape[-1]
    pictures = interpolate(split.images[index.to(split.images.device)].float(), (CASE_SIDE, CASE_SIDE), mode="area")
    pictures = pictures.round().byte().cpu().movedim(1, -1).numpy()  # (K, side, side, C)
    return {
        "case_index": index.numpy(),
        "case_why": np.array([why for _, why in chosen]),
        "case_images": pictures[..., 0] if pictures.shape[-1] == 1 else pictures,
        "case_scale": (split.scale[index] * shrink).numpy(),
        "case_offset": (split.offset[index] * shrink).numpy(),
    }
