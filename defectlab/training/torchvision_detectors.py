"""The detectors of `networks/torchvision_detectors` as rows beside this project's: its images, augmentation, schedule,
moving average, evaluation and costs, their losses, decoding and suppression."""

import torch
from torch import Tensor, nn

from defectlab.data.augment import Batch, plain
from defectlab.data.detection import DetectionData, DetectionSplit
from defectlab.metrics.costs import model_costs
from defectlab.metrics.detection import Boxes
from defectlab.networks.torchvision_detectors import RATIOS, SIDES, TorchvisionSettings, build_torchvision
from defectlab.networks.yolo.assignment import kmeans_anchors
from defectlab.precision import full_float32
from defectlab.runs import Context, Result
from defectlab.training.detection import evaluate_found, probe_on, train_and_evaluate
from defectlab.training.recipe import Loss


def to_targets(boxes: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """Padded boxes (B, M, 4) and labels (B, M), -1 where padded, real ones first -> torchvision's targets: per image
    {"boxes": (n, 4), "labels": (n,)}, labels from 1 on, since 0 is the background."""
    counts = (labels >= 0).sum(1).tolist()  # one synchronisation per batch
    return [{"boxes": b[:n], "labels": k[:n] + 1} for b, k, n in zip(boxes, labels, counts, strict=True)]


def torchvision_loss(model: nn.Module) -> Loss:
    """The library's own losses, named as there, and "loss", their sum.

    Faster R-CNN draws its proposals by torch's global generator, so a training of it that was interrupted does not end
    as one that was not, to the last digit.
    """

    def loss(batch: Batch) -> dict[str, Tensor]:
        parts = model(list(batch.images), to_targets(batch.boxes, batch.labels))
        return {"loss": sum(parts.values()), **parts}

    return loss


@torch.inference_mode()
def predict_torchvision(model: nn.Module, split: DetectionSplit, batch: int = 16) -> Boxes:
    """Detections of every image of a split by a model in eval mode, boxes in pixels of the original images, fp32.

    Suppression is the library's, with each architecture's own IoU.
    """
    found: Boxes = []
    for chunk in torch.arange(len(split.images), device=split.images.device).split(batch):
        with full_float32():
            raw = model(list(plain(split.images, chunk)))
        for index, image in zip(chunk.tolist(), raw, strict=True):
            image = {name: values.cpu() for name, values in image.items()}
            real = image["labels"] > 0  # RetinaNet and FCOS have an output for the background, too
            boxes = (image["boxes"][real] - split.offset[index].repeat(2)) / split.scale[index]  # (n, 4)
            limits = split.sizes[index].flip(0).repeat(2).to(boxes)  # width, height, width, height
            boxes = boxes.clamp(min=0).minimum(limits)
            found.append({"boxes": boxes, "scores": image["scores"][real], "labels": image["labels"][real] - 1})
    return found


def trained_anchors(settings: TorchvisionSettings, data: DetectionData) -> Tensor | None:
    """(levels, 6, 2) px: k-means of the training boxes where the settings say so, the smallest on the finest level; of
    the same number per level as the default. DataError where there are too few different boxes."""
    if settings.anchors != "kmeans":
        return None
    boxes, levels = data.train.boxes[data.train.labels >= 0].cpu(), len(settings.strides)
    count = levels * SIDES * len(RATIOS)
    return kmeans_anchors(boxes[:, 2:] - boxes[:, :2], count, torch.Generator().manual_seed(0)).view(levels, -1, 2)


def run_torchvision(settings: TorchvisionSettings, seed: int, data: DetectionData, context: Context) -> Result:
    """Train one of torchvision's detectors and evaluate the moving average of its last epoch, once.

    Costs are those at `settings.size`, not fused; unlike this project's they hold decoding and suppression, and
    Faster R-CNN's GFLOPs the proposals that one image of noise gives. Anchors by k-means are kept beside the
    predictions: "anchors" (levels, 6, 2) float32, widths and heights in px of the input.
    """
    torch.manual_seed(seed)
    anchors = trained_anchors(settings, data)
    model = build_torchvision(settings, len(data.class_names), anchors)
    model = model.to(context.device, memory_format=torch.channels_last)

    def evaluation(average: nn.Module, data: DetectionData) -> Result:
        found = {part: predict_torchvision(average, getattr(data, part)) for part in ("dev", "test")}
        return evaluate_found(found, data, average)

    loss, probe = torchvision_loss(model), probe_on(data.dev, data.class_names, predict_torchvision)
    result = train_and_evaluate(
        model, loss, settings.recipe, seed, data, context, probe=probe, evaluation=evaluation, costs=model_costs
    )
    if anchors is not None:
        result.predictions["anchors"] = anchors.numpy()
    result.notes = {"costs": f"at {settings.size} px, not fused, with decoding and suppression"}
    return result
