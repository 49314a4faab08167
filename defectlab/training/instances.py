"""A detector with instance masks: its prediction and evaluation."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate

from defectlab.data.augment import plain
from defectlab.data.images import letterbox_maps
from defectlab.data.instances import InstanceData, InstanceSplit
from defectlab.metrics import detection
from defectlab.metrics.detection import COCO_IOUS, Boxes, best_f1_threshold, evaluate, greedy_match, pack
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.decode import decode_anchor_based, suppress
from defectlab.precision import full_float32
from defectlab.runs import Result
from defectlab.training.detection import example_arrays, result_of

MOST = 100  # detections of an image that get a mask, at most: as many as COCO counts
Instances = dict[str, Tensor]  # of an image: boxes (n, 4), labels (n,), masks (n, H, W) bool; scores (n,) if predicted


# --- Prediction ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict_instances(
    detector: nn.Module,
    split: InstanceSplit,
    latents: Sequence[Tensor] = (),
    indices: Sequence[int] | None = None,
    batch: int = 32,
    confidence: float = 0.001,
) -> Iterator[Instances]:
    """Image after image of a split: boxes by descending score and masks, in pixels of the originals, on the CPU.

    Args:
        latents: further inputs of the detector, one entry per image in each.
        indices: the images, by default all.
        confidence: as `decode.select`, whose boxes these are.

    Raises:
        ValueError: outputs that are not finite.
    """
    model = fused(detector).to(memory_format=torch.channels_last)
    indices = torch.tensor(range(len(split)) if indices is None else indices, device=split.images.device)
    for chunk in indices.split(batch):
        inputs = plain(split.images, chunk).contiguous(memory_format=torch.channels_last)
        with full_float32():
            output = model(inputs, *(level[chunk] for level in latents))
        boxes, scores = decode_anchor_based(output.raw, detector.anchors)  # (B, A, 4), (B, A, C)
        channels = output.prototypes.shape[1]
        vectors = [rearrange(x, "b (k m) h w -> b (k h w) m", m=channels) for x in output.coefficients]
        vectors = torch.cat(vectors, 1).tanh()  # (B, A, M), in the order of the boxes
        if not (vectors.isfinite().all() & output.prototypes.isfinite().all()):
            raise ValueError("predicted masks are not finite: the training diverged; lower its learning rate")
        kept = suppress(boxes, scores, confidence, 0.7, MOST)  # at the IoU of `select`
        for i, (index, (anchors, labels, values)) in enumerate(zip(chunk.tolist(), kept, strict=True)):
            probability = einsum(vectors[i, anchors], output.prototypes[i], "n m, m h w -> n h w").sigmoid()
            own, masks = _to_original(split, index, boxes[i, anchors], probability)
            yield {"boxes": own, "scores": values.cpu(), "labels": labels.cpu(), "masks": masks}


def _to_original(split: InstanceSplit, index: int, boxes: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) px of the input and probabilities (n, h, w) -> boxes px of the original, masks (n, H, W), CPU."""
    (height, width), scale = split.sizes[index].tolist(), split.scale[index]
    offset = split.offset[index]
    boxes = ((boxes.cpu() - offset.repeat(2)) / scale).clamp(min=0)
    boxes = boxes.minimum(torch.tensor([width, height, width, height]).to(boxes))
    side, (left, top) = max(height, width), (offset / scale).round().int().tolist()
    masks = probability.new_zeros((0, side, side))
    if len(probability):
        masks = interpolate(probability[:, None], (side, side), mode="bilinear")[:, 0]
    masks = (masks[:, top : top + height, left : left + width] > 0.5).cpu()
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)  # (n, 1) each
    return boxes, masks & ((y > y1) & (y < y2))[:, :, None] & ((x > x1) & (x < x2))[:, None]


# --- Evaluation ------------------------------------------------------------------------------------------------------


def instance_ground_truth(split: InstanceSplit, indices: Sequence[int] | None = None) -> Iterator[Instances]:
    """Image after image of a split, or those of `indices`: boxes, labels and masks in pixels of the originals."""
    boxes = split.ground_truth()
    for index in range(len(split)) if indices is None else indices:
        yield boxes[index] | {"masks": split.masks(index)}


def right_masks(predicted: Instances, truth: Instances, ious: Sequence[float] = (0.5,)) -> Tensor:
    """(n, T) bool: by descending score each prediction takes the free instance of its class that its mask
    overlaps most, if by at least the IoU; the rule of `metrics.detection.match`."""
    masks, true = predicted["masks"].flatten(1).float(), truth["masks"].flatten(1).float()
    both = masks @ true.T  # (n, m) pixels
    overlap = both.double() / (masks.sum(1)[:, None] + true.sum(1) - both).clamp(min=1)
    overlap = overlap.masked_fill(predicted["labels"][:, None] != truth["labels"], -1.0)
    order = predicted["scores"].argsort(descending=True, stable=True)
    right = torch.zeros(len(masks), len(ious), dtype=torch.bool)
    right[order] = torch.from_numpy(greedy_match(overlap[order].numpy(), ious) >= 0)
    return right


class Scored(NamedTuple):
    """What evaluation needs of the images of a split, without their masks."""

    found: Boxes
    ground_truth: Boxes
    right: list[Tensor]  # (n, T) bool per image, by `right_masks` at COCO's IoUs, the first 0.5
    per_class: dict[str, dict[str, float]]  # mask_map50 and mask_map50_95 in per cent of classes that have ground truth


def score(predictions: Iterable[Instances], ground_truth: Iterable[Instances], class_names: Sequence[str]) -> Scored:
    """Both streams are read once, so that the masks of one image at a time are in memory. Average precision is
    torchmetrics', as `evaluate` has it for boxes."""
    metric, scored = detection.coco_metric("segm", COCO_IOUS), Scored([], [], [], {})
    for predicted, truth in zip(predictions, ground_truth, strict=True):
        metric.update([_without(predicted, "boxes")], [_without(truth, "boxes")])
        scored.right.append(right_masks(predicted, truth, COCO_IOUS))
        scored.found.append(_without(predicted, "masks"))
        scored.ground_truth.append(_without(truth, "masks"))
    for label, curves in detection.precision_of_classes(metric, scored.ground_truth):
        means = {"mask_map50": 100 * float(curves[0].mean()), "mask_map50_95": 100 * float(curves.mean())}
        scored.per_class[class_names[label]] = means
    return scored


def instance_metrics(
    scored: Scored, class_names: Sequence[str], threshold: float
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(metrics of the set, metrics of each class), in per cent: `evaluate`'s for the boxes, and for the masks
    mask_map50, mask_map50_95, mask_precision_dev and mask_recall_dev (of "score >= threshold", all classes together).

    ValueError where there is no ground truth.
    """
    if not scored.per_class:
        raise ValueError("no ground truth to evaluate masks by: give images that have defects")
    metrics, per_class = evaluate(scored.found, scored.ground_truth, class_names, threshold)
    for name in ("mask_map50", "mask_map50_95"):
        metrics[name] = float(np.mean([values[name] for values in scored.per_class.values()]))
    kept = torch.cat([found["scores"] for found in scored.found]) >= threshold
    right = int((torch.cat(scored.right)[:, 0] & kept).sum())
    metrics["mask_precision_dev"] = 100 * right / int(kept.sum()) if kept.any() else np.nan
    metrics["mask_recall_dev"] = 100 * right / sum(len(truth["labels"]) for truth in scored.ground_truth)
    return metrics, {name: values | scored.per_class.get(name, {}) for name, values in per_class.items()}


def evaluate_instances(
    detector: nn.Module, data: InstanceData, latents: Mapping[str, Sequence[Tensor]] | None = None
) -> Result:
    """Metrics of the test set, boxes and masks; the score threshold is the one of the best F1 of boxes on dev.

    `latents`: further inputs for "dev" and "test". The arrays are those of a detector, and of its examples
    case_found and case_true (K, side, side) uint8: 1 + class of a pixel, 0 for background.
    """
    latents = latents or {"dev": (), "test": ()}
    dev, test = (
        score(predict_instances(detector, split, latents[part]), instance_ground_truth(split), data.class_names)
        for part, split in (("dev", data.dev), ("test", data.test))
    )
    threshold = best_f1_threshold(dev.found, dev.ground_truth)
    on_dev, _ = instance_metrics(dev, data.class_names, threshold)
    on_test = instance_metrics(test, data.class_names, threshold)
    arrays = pack(test.found, test.ground_truth, data.test.names, data.class_names, test.right)
    arrays |= example_arrays(data.test, test.found, test.ground_truth)
    chosen = arrays["case_index"].tolist()
    found = predict_instances(detector, data.test, latents["test"], chosen)
    side = arrays["case_images"].shape[1]
    arrays["case_found"] = _painted(found, side, threshold)
    arrays["case_true"] = _painted(instance_ground_truth(data.test, chosen), side)
    return result_of(on_test, on_dev, threshold, arrays, detector)


def _painted(images: Iterable[Instances], side: int, threshold: float = 0.0) -> np.ndarray:
    """(K, side, side) uint8: 1 + class of the best instance at each pixel, 0 where none scores `threshold` or more."""
    painted = []
    for instances in images:
        image = torch.zeros(instances["masks"].shape[1:], dtype=torch.uint8)
        for index in reversed(range(len(instances["labels"]))):  # the best one is painted last
            if "scores" not in instances or instances["scores"][index] >= threshold:
                image[instances["masks"][index]] = int(instances["labels"][index]) + 1
        painted.append(letterbox_maps(image[None], side)[0])
    return torch.stack(painted).numpy()


def _without(values: Instances, name: str) -> Instances:
    return {key: value for key, value in values.items() if key != name}
