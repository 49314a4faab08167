"""Power transfer (section III-D): the hybrid teaches a plain detector of the same width and depth.

Yu, arXiv 2408.13845: equations 6 and 7, distance and temperature of section IV-A. The object scaling is that of Mehta
and Ozturk, "Object detection at 200 frames per second", ECCV Workshops 2018 (the paper's [32]).

Equation 6 adds three parts, equation 7 gives each as the detector's own loss against the ground truth plus lambda times
the same against the teacher. For classes and boxes the latter is scaled by o_T, the objectness that the teacher
predicts, so that they are not learned in the background.

Equation 7 and section IV-A do not agree. The equation has the losses of the detector (cross-entropies, an overlap of
boxes) and no temperature; the section says "logit distillation", "L2" and "the temperature coefficient is set to 20".
Both are here: `distance` is "l2" (section IV-A, our default) or "bce" (equation 7) for objectness and classes; `box` is
"ciou" (equation 7, our default) or "l2".
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from defectlab.networks.yolo.assignment import box_iou_aligned
from defectlab.networks.yolo.decode import decode_anchor_based, split_anchors
from defectlab.networks.yolo.losses import AnchorBasedLoss
from defectlab.precision import at_least_float32

LEAST_OBJECTNESS = 1e-6  # ours: least sum of o_T to divide by, so that a batch without any gives 0, not NaN


def logit_distance(student: Tensor, teacher: Tensor, distance: str = "l2", temperature: float = 20.0) -> Tensor:
    """How far the student's logits are from the teacher's, element by element; 0 or more, the shape of both.

    "l2": (sigmoid(z_T / T) - sigmoid(z_S / T))^2 T^2. Section IV-A names L2 and T = 20; that T softens sigmoids (YOLO's
    probabilities), and that T^2 keeps the gradient's size (Hinton et al. 2015), is ours. For |z| well below 4 T it is
    (z_T - z_S)^2 / 16, the squared difference of logits, to which 0.2 % and 0.01 % differ as much as 82 % and 18 %.
    "bce": equation 7, the cross-entropy with the teacher's probability as a soft target; no temperature. Where both
    agree, it is the entropy of the teacher and not 0.
    """
    if distance == "bce":
        return functional.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
    if distance != "l2":
        raise ValueError(f"distance must be 'l2' or 'bce', not {distance!r}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    return ((teacher / temperature).sigmoid() - (student / temperature).sigmoid()).square() * temperature**2


def box_distance(student: Tensor, teacher: Tensor, width: int, height: int, box: str = "ciou") -> Tensor:
    """How far the student's boxes are from the teacher's, pair by pair: (..., 4), (..., 4) xyxy in px -> (...).

    "ciou": 1 - CIoU, equation 7 with the detector's own loss. "l2": the squared distance of the four coordinates,
    relative to an image of `width` x `height` px (section III-D: "normalized coordinates").
    """
    if box == "ciou":
        return 1 - box_iou_aligned(student, teacher, "ciou")
    if box != "l2":
        raise ValueError(f"box must be 'ciou' or 'l2', not {box!r}")
    off = student - teacher
    return (off[..., 0::2] / width).square().sum(-1) + (off[..., 1::2] / height).square().sum(-1)


def object_scaled_terms(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    anchors: Tensor,
    strides: Sequence[int] = (8, 16, 32),
    balance: Sequence[float] = (4.0, 1.0, 0.4),
    *,
    distance: str = "l2",
    temperature: float = 20.0,
    box: str = "ciou",
) -> dict[str, Tensor]:
    """The parts of equation 7 against the teacher, without lambda: "distill_obj", "distill_cls", "distill_box".

    Both give raw maps (B, K * (5 + C), h, w), finest level first; anchors (levels, K, 2) are widths and heights in px.
    The teacher is a constant. As in the detector's loss, objectness is a mean over the places of each level times the
    level's balance, and classes are a mean over the classes. Ours: classes and boxes are means over the places of all
    levels and images, weighted by o_T. All in float32 whatever autocast does (float64 stays float64).

    ValueError where the maps of both differ in number or shape, and for an unknown distance.
    """
    shapes, others = [tuple(m.shape) for m in student], [tuple(m.shape) for m in teacher]
    if shapes != others:
        raise ValueError(f"maps of the student {shapes} and of the teacher {others} differ; build both at one scale")
    student = [at_least_float32(m) for m in student]
    teacher = [at_least_float32(m).detach().to(student[0].dtype) for m in teacher]
    found, target = per_place(student, anchors.shape[1]), per_place(teacher, anchors.shape[1])  # (B, A, 5 + C)
    objectness = target[..., 4].sigmoid()  # (B, A): o_T, 0..1

    def objectness_weighted_mean(distances: Tensor) -> Tensor:  # (B, A) -> scalar
        return (objectness * distances).sum() / objectness.sum().clamp(min=LEAST_OBJECTNESS)

    cls = logit_distance(found[..., 5:], target[..., 5:], distance, temperature).mean(-1)
    boxes, target_boxes = (decode_anchor_based(maps, anchors, strides)[0] for maps in (student, teacher))  # (B, A, 4)
    height, width = (side * strides[0] for side in shapes[0][-2:])

    obj = logit_distance(found[..., 4], target[..., 4], distance, temperature)
    levels = obj.split([anchors.shape[1] * h * w for *_, h, w in shapes], dim=1)
    return {
        "distill_obj": sum(weight * level.mean() for weight, level in zip(balance, levels, strict=True)),
        "distill_cls": objectness_weighted_mean(cls),
        "distill_box": objectness_weighted_mean(box_distance(boxes, target_boxes, width, height, box)),
    }


def per_place(raw: Sequence[Tensor], count: int) -> Tensor:
    """Maps (B, K * (5 + C), h, w) with K = count -> (B, A, 5 + C), places in the order of `decode_anchor_based`."""
    return torch.cat([split_anchors(m, count).flatten(1, 3) for m in raw], 1)


class PowerTransfer(nn.Module):
    """Equation 6: the student's whole loss, its own plus `weight` (lambda) times the parts against the teacher.

    These take the gains of the detector's own terms. At weight 0 the loss is exactly the detector's own. The default
    weight is ours: the paper states none. `reading`: `distance`, `temperature` and `box` of `object_scaled_terms`.
    """

    def __init__(self, detector_loss: AnchorBasedLoss, weight: float = 1.0, **reading: Any):
        super().__init__()
        self.detector_loss, self.weight, self.reading = detector_loss, weight, reading

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], boxes: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Raw maps of both for the same images, boxes (B, M, 4) px, labels (B, M), -1 where padded -> scalars.

        "loss" is minimised; "box", "obj", "cls" are the detector's own terms and "distill_box", "distill_obj",
        "distill_cls" those against the teacher, all before gains and weight.
        """
        own = self.detector_loss
        supervised = own(student, boxes, labels)
        taught = object_scaled_terms(student, teacher, own.anchors, own.strides, own.balance, **self.reading)
        distilled = sum(gain * taught[f"distill_{name}"] for name, gain in own.gains.items())
        return supervised | taught | {"loss": supervised["loss"] + self.weight * distilled}
