"""The two-stage paper's networks trained: the distillation (section 3.2), and both stages (section 4.3)."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms import v2

from defectlab.data.anomaly import AnomalyData, AnomalySplit
from defectlab.data.splits import PARTS
from defectlab.networks.reverse_distillation import MAP_SIZE
from defectlab.papers.amam_kd import distillation, segmentation
from defectlab.papers.amam_kd.distillation import DistillationNetwork, DistillationSettings, discrepancies, to_maps
from defectlab.papers.amam_kd.two_stage import TwoStageSettings, cut, paste_back, square_boxes
from defectlab.papers.amam_kd.weighting import KERNELS, fit_weighting
from defectlab.precision import precision_of
from defectlab.runs import Context, Record, Result
from defectlab.training import anomaly as distil
from defectlab.training.anomaly import evaluate, result_of
from defectlab.training.detection import frozen
from defectlab.training.segmentation import segment


def train_distillation(
    settings: DistillationSettings, seed: int, data: AnomalyData, context: Context
) -> distil.Student:
    """Train on `data.train`, then fit the weighting of the maps on `data.dev` (held-out normals and pasted defects).

    `data` may hold crops: it needs a fingerprint of its own, and masks (of dev) that are the crops'.
    """
    student = distil.train_student(settings, seed, data, context, distillation.build, distillation.DistillationLoss)
    network = student.network
    if settings.weighting == "printed":
        network.weighting.kernels.copy_(student.loss.weights().detach().view(3, 1, 1))
    elif settings.weighting != "none":
        dev = distil.teacher_features(data, "dev", settings)
        maps = zip(*distil.compare(network, dev, discrepancies, student.precision), strict=True)
        network.weighting = fit_weighting([torch.cat(m) for m in maps], data.dev.masks, KERNELS[settings.weighting])
    return student


def map_split(student: distil.Student, settings: DistillationSettings, data: AnomalyData, part: str) -> Tensor:
    """Smoothed AL (ours: the Gaussian of RD4AD) of "dev" or "test": (N, 256, 256)."""
    features = distil.teacher_features(data, part, settings)
    return distil.score_features(student.network, features, partial(to_maps, student.network), student.precision)


def weights_in_words(network: DistillationNetwork) -> str:
    """The sum of each layer's kernel: "layer 1: 0.41, layer 2: 1.2, layer 3: 1.39"."""
    return ", ".join(f"layer {k}: {w:.3g}" for k, w in enumerate(network.weighting.kernels.sum((1, 2)).tolist(), 1))


def run_distillation(settings: DistillationSettings, seed: int, data: AnomalyData, context: Context) -> Result:
    """One row and seed; AD, the image score, is the maximum of AL (section 3.2.2)."""
    student = train_distillation(settings, seed, data, context)
    maps = [map_split(student, settings, data, part) for part in ("dev", "test")]
    result = distil.result_of(student, data, *maps)
    result.notes = {"weighting": weights_in_words(student.network)}
    return result


def cut_split(split: AnomalySplit, boxes: Tensor, size: int) -> AnomalySplit:
    """Images and masks of a split, cut along `boxes`; an image whose defect lies outside its box has no mask."""
    masks = cut(split.masks[:, None], boxes, MAP_SIZE, v2.InterpolationMode.NEAREST_EXACT)[:, 0]
    return replace(
        split,
        images=cut(split.images, boxes, size, v2.InterpolationMode.BILINEAR),
        masks=masks,
        has_mask=masks.flatten(1).any(1) | (split.labels == 0),
    )


# --- One run ---------------------------------------------------------------------------------------------------------


def find_boxes(settings: TwoStageSettings, record: Record, split: AnomalySplit, device: str | torch.device) -> Tensor:
    """Boxes of a split's images by the segmenter whose run is `record`, at the threshold from its dev images."""
    segmenter = frozen(record, segmentation.build(settings.segmenter), device)
    size = settings.segmenter.size
    small = v2.functional.resize(split.images, [size, size], antialias=True)
    found = segment(segmenter, small, precision_of(settings.segmenter, device)) > record.dev["threshold"]
    return square_boxes(found, settings.margin)


def run_two_stage(settings: TwoStageSettings, seed: int, data: AnomalyData, context: Context) -> Result:
    """One row and seed: the usual metrics on whole images, those of the cut-outs as "..._crop", "crop_share"."""
    record = context.require(settings.segmenter, seed)
    boxes = {part: find_boxes(settings, record, getattr(data, part), context.device) for part in PARTS}
    crops = replace(
        data,
        fingerprint=f"{data.fingerprint}, cut by {record.model_sha256} with margin {settings.margin}",
        **{part: cut_split(getattr(data, part), boxes[part], settings.detector.size) for part in PARTS},
    )
    student = train_distillation(settings.detector, seed, crops, context)
    maps = {part: map_split(student, settings.detector, crops, part) for part in ("dev", "test")}
    fill = float(maps["dev"].min())  # what lies outside the box is called normal
    result = result_of(student, data, *(paste_back(maps[part], boxes[part], fill) for part in maps))
    alone = evaluate(crops, maps["dev"], maps["test"]).metrics
    result.metrics |= {f"{metric}_crop": alone[metric] for metric in ("image_auroc", "pixel_auroc", "aupro")}
    sides = boxes["test"][:, 2] - boxes["test"][:, 0]
    result.metrics["crop_share"] = round(100 * float(sides.square().mean()), 4)
    whole = sum(int((b[:, 2] - b[:, 0] == 1).sum()) for b in boxes.values())
    result.notes = {
        "segmenter": record.key,
        "segmenter_sha256": record.model_sha256,
        "weighting": weights_in_words(student.network),
        "boxes": f"{whole} of {sum(map(len, boxes.values()))} images were not cut (no nut found, or it fills them)",
        "outside": f"{100 * outside(data.test.masks, boxes['test']):.3f} % of the test set's defect pixels are cut off",
    }
    return result


def outside(masks: Tensor, boxes: Tensor) -> float:
    """The share of the defect pixels (N, 256, 256) that lie outside their image's box."""
    kept = paste_back(torch.ones_like(masks, dtype=torch.float32), boxes, 0.0) > 0
    return float((masks.bool() & ~kept).sum() / masks.sum())
