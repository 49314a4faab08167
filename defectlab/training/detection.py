"""From a trained detector to a result: prediction, evaluation, the telling cases; and the way from settings to both."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from defectlab.data.augment import plain
from defectlab.data.boxes import DetectionData, DetectionSplit
from defectlab.metrics.costs import model_costs
from defectlab.metrics.detection import Boxes, best_f1_threshold, evaluate, examples, pack
from defectlab.networks.yolo.assignment import kmeans_anchors
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.decode import decode, select
from defectlab.networks.yolo.losses import detection_loss
from defectlab.networks.yolo.model import Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.precision import full_float32, precision_of
from defectlab.runs import Context, Record, Result, load_weights
from defectlab.training.detector import Loss, train_detector

CASE_SIDE = 112  # pixels a side of the pictures that a record keeps
Build = Callable[..., Detector]  # (settings, classes, anchors) -> detector
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
    model = fused(detector).to(memory_format=torch.channels_last)
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


def fresh(build: Build, settings: DetectorSettings, data: DetectionData) -> Detector:
    """A detector that is not trained, for the classes of `data`; v5 anchors are COCO's, or those of its boxes."""
    anchors = None
    if settings.family == "v5" and settings.anchors == "kmeans":
        boxes = data.train.boxes[data.train.labels >= 0].cpu()
        anchors = kmeans_anchors(boxes[:, 2:] - boxes[:, :2], 9, torch.Generator().manual_seed(0)).view(3, 3, 2)
    return build(settings, len(data.class_names), anchors)


def train_and_evaluate(
    settings: DetectorSettings,
    seed: int,
    data: DetectionData,
    context: Context,
    build: Build = build_detector,
    make_loss: Callable[[Detector], tuple[Loss, nn.Module | None]] | None = None,
) -> Result:
    """Train a detector and evaluate the moving average of its last epoch, once.

    Args:
        build: (settings, classes, anchors) -> detector.
        make_loss: detector -> (loss of `train_detector`, its further weights or None); None: the detector's own loss.
    """
    torch.manual_seed(seed)
    detector = fresh(build, settings, data).to(context.device, memory_format=torch.channels_last)
    if make_loss is None:
        criterion = detection_loss(detector, settings.size)
        loss, extra = (lambda batch: criterion(detector(batch.images), batch.boxes, batch.labels)), None
    else:
        loss, extra = make_loss(detector)
    probe = probe_on(data.dev, data.class_names)
    average, trained = train_detector(detector, loss, data.train, settings, seed, context, extra, probe)
    result = evaluate_detector(average, data)
    result.curve = trained.curve
    result.precision = precision_of(settings, context.device)
    result.costs |= deployed_costs(average, settings.size, context.device)
    result.costs |= trained.costs
    return result


def run_detector(settings: DetectorSettings, seed: int, data: DetectionData, context: Context) -> Result:
    """One row and seed of a plain detector."""
    return train_and_evaluate(settings, seed, data, context)


def deployed_costs(detector: Detector, size: int, device: str | torch.device) -> dict[str, float]:
    """Costs as deployed, fused: parameters and GFLOPs at 640 px, latency at `size` in fp32."""
    model = fused(detector).to(device, memory_format=torch.channels_last)
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
    chosen = examples(predictions, truths)
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
