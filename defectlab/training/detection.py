"""From a trained detector to a result: prediction, evaluation, examples; and the way from settings to both."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defectlab.data.augment import plain
from defectlab.data.detection import DetectionData, DetectionSplit
from defectlab.metrics.costs import model_costs
from defectlab.metrics.detection import Boxes, best_f1_threshold, evaluate, examples, pack
from defectlab.networks.blocks import pick
from defectlab.networks.yolo.assignment import kmeans_anchors
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.decode import decode, select
from defectlab.networks.yolo.losses import detection_loss
from defectlab.networks.yolo.model import Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.precision import full_float32, precision_of
from defectlab.runs import Context, Record, Result, load_weights
from defectlab.training.recipe import Loss, train_detector
from defectlab.training.results import example_side, rounded, shrunk

COST_SIZE = 640  # px: GFLOPs are stated for this input, whatever the training used
Build = Callable[..., Detector]  # (settings, classes, anchors) -> detector
Probe = Callable[[nn.Module], dict[str, float]]


# --- Prediction and evaluation ---------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    detector: Detector,
    split: DetectionSplit,
    images: Tensor | None = None,
    batch: int = 32,
    features: Sequence[Tensor] = (),
    **options: Any,
) -> Boxes:
    """Detections of every image of a split, boxes in pixels of the original images, in float32.

    Args:
        features: of each image, (N, ...), which the detector is given after the images.
        images: uint8 (N, C, S, S) to look at in place of the split's own (blurred or noisy ones, of the same geometry).
        options: `confidence`, `iou`, `most` of `decode.select`.
    """
    images = split.images if images is None else images
    model = fused(detector).to(memory_format=torch.channels_last)
    found: Boxes = []
    for chunk in torch.arange(len(images), device=images.device).split(batch):
        inputs = plain(images, chunk).contiguous(memory_format=torch.channels_last)
        with full_float32():
            boxes, scores = decode(detector, model(inputs, *(x[chunk] for x in features)))
        own = chunk.cpu()
        places = {"scale": split.scale[own], "offset": split.offset[own], "sizes": split.sizes[own]}
        found += select(boxes, scores, images.shape[-1], **places, **options)
    return found


def probe_on(
    split: DetectionSplit, class_names: tuple[str, ...], find: Callable[[nn.Module, DetectionSplit], Boxes] = predict
) -> Probe:
    """For a training's curve: mAP on dev, of what `find` gives."""
    ground_truth = split.ground_truth()

    def probe(detector: nn.Module) -> dict[str, float]:
        metrics, _ = evaluate(find(detector, split), ground_truth, class_names)
        return {"dev_map50": metrics["map50"], "dev_map50_95": metrics["map50_95"]}

    return probe


def evaluate_detector(
    detector: Detector, data: DetectionData, features: Mapping[str, Sequence[Tensor]] | None = None
) -> Result:
    """`evaluate_found` of what `predict` finds. `features` of "dev" and "test": as there."""
    given = features or {}
    found = {part: predict(detector, getattr(data, part), features=given.get(part, ())) for part in ("dev", "test")}
    return evaluate_found(found, data, detector)


def evaluate_found(found: Mapping[str, Boxes], data: DetectionData, detector: nn.Module) -> Result:
    """The result of what `detector` found in "dev" and "test", boxes in pixels of the originals; no curve, no costs.
    The score threshold of precision and recall comes from dev."""
    ground_truth = {part: getattr(data, part).ground_truth() for part in ("dev", "test")}
    threshold = best_f1_threshold(found["dev"], ground_truth["dev"])
    dev, test = (evaluate(found[part], ground_truth[part], data.class_names, threshold) for part in ("dev", "test"))
    arrays = pack(found["test"], ground_truth["test"], data.test.names, data.class_names)
    arrays |= example_arrays(data.test, found["test"], ground_truth["test"])
    return result_of(test, dev[0], threshold, arrays, detector)


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


def example_arrays(split: DetectionSplit, predictions: Boxes, ground_truth: Boxes) -> dict[str, np.ndarray]:
    """A dozen small examples as the network saw them: case_images (K, side, side) or (K, side, side, 3) uint8,
    case_index, case_why; case_scale and case_offset map boxes of the original onto them."""
    chosen = examples(predictions, ground_truth)
    index = torch.tensor([i for i, _ in chosen], dtype=torch.long)
    images = split.images[index.to(split.images.device)]
    side = example_side(images)
    factor = side / images.shape[-1]
    return {
        "case_index": index.numpy(),
        "case_why": np.array([why for _, why in chosen]),
        "case_images": shrunk(images, side),
        "case_scale": (split.scale[index] * factor).numpy(),
        "case_offset": (split.offset[index] * factor).numpy(),
    }


def deployed_costs(detector: Detector, size: int) -> dict[str, float]:
    """Costs as deployed, fused, with GFLOPs at 640 px, whatever the `size` of the row."""
    return model_costs(fused(detector), size, flops_size=COST_SIZE)


# --- Runs ------------------------------------------------------------------------------------------------------------


def fresh(build: Build, settings: DetectorSettings, data: DetectionData) -> Detector:
    """A detector that is not trained, for the classes of `data`; v5 anchors are COCO's, or those of its boxes."""
    anchors = None
    fitted = pick({"coco": False, "kmeans": True}, settings.anchors, "anchors")
    if settings.family == "v5" and fitted:
        boxes = data.train.boxes[data.train.labels >= 0].cpu()
        anchors = kmeans_anchors(boxes[:, 2:] - boxes[:, :2], 9, torch.Generator().manual_seed(0)).view(3, 3, 2)
    return build(settings, len(data.class_names), anchors)


def frozen(record: Record, network: nn.Module, device: str | torch.device) -> Any:
    """`network` with the weights of a run, for inference only. Errors of `runs.load_weights`."""
    load_weights(record, network)
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def train_and_evaluate(
    detector: nn.Module,
    loss: Loss,
    settings: DetectorSettings,
    seed: int,
    data: DetectionData,
    context: Context,
    extra: nn.Module | None = None,
    probe: Probe | None = None,
    evaluation: Callable[[nn.Module, DetectionData], Result] = evaluate_detector,
    costs: Callable[[nn.Module, int], dict[str, float]] = deployed_costs,
) -> Result:
    """Train a detector and evaluate the moving average of its last epoch, once.

    loss, extra: as in `train_detector`. probe: None: mAP on dev. evaluation: -> result without curve and costs.
    costs: (network, size) -> costs.
    """
    probe = probe or probe_on(data.dev, data.class_names)
    average, trained = train_detector(detector, loss, data.train, settings, seed, context, extra, probe)
    result = evaluation(average, data)
    result.curve = trained.curve
    result.precision = precision_of(settings, context.device)
    result.costs = costs(average, settings.size) | trained.costs
    return result


def run_detector(
    settings: DetectorSettings, seed: int, data: DetectionData, context: Context, build: Build = build_detector
) -> Result:
    """One row and seed of a detector that learns from boxes alone."""
    torch.manual_seed(seed)
    detector = fresh(build, settings, data).to(context.device, memory_format=torch.channels_last)
    criterion = detection_loss(detector, settings.size)

    def loss(batch):
        return criterion(detector(batch.images), batch.boxes, batch.labels)

    return train_and_evaluate(detector, loss, settings, seed, data, context)
