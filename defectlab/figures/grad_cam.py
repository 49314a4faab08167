"""Where a detector looks: Grad-CAM++ by the package grad-cam.

Chattopadhay, Sarkar, Howlader, Balasubramanian, "Grad-CAM++", WACV 2018, arXiv 1710.11063. It was written for one score
a picture and one layer. A detector has a score for each box and class, and three maps; what stands for the score here
is ours: Y, the sum of a class's scores (objectness times class probability; a probability alone in "v8") over all boxes
of a picture, before suppression. The method takes Y = exp(S) and the derivatives of S, so S is the logarithm of Y. The
layers are the three maps that the neck gives, and the heat map is the mean of theirs.

A heat map is scaled by itself: 1 is the most that this class has in this picture, however little that is. So it says
where, and not how sure; `Y` goes with it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from pytorch_grad_cam import GradCAMPlusPlus
from torch import Tensor, nn

from defectlab.data.augment import plain
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.decode import decode
from defectlab.networks.yolo.model import Detector
from defectlab.precision import full_float32

LEAST = 1e-12  # a sum of scores below it counts as this much: it has a logarithm


class ClassEvidence(nn.Module):
    """Pictures (B, 3, S, S) in 0..1 -> S of each class (B, C), the one tensor that the package wants of a network."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    @property
    def layers(self) -> list[nn.Module]:
        neck = self.detector.neck
        return [neck.down_third, neck.up_fourth, neck.up_fifth]

    def forward(self, images: Tensor) -> Tensor:
        _, scores = decode(self.detector, self.detector(images))  # (B, A, C)
        return scores.sum(1).clamp(min=LEAST).log()


@torch.enable_grad()
def heat_maps(detector: Detector, images: Tensor, label: int, batch: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Grad-CAM++ of one class: images uint8 (N, C, S, S) -> heat maps (N, S, S) float32 in 0..1, and Y (N,).

    Y is the sum of the class's scores over all boxes of the picture, 0 or more. The detector stays as it is: what is
    looked at is a fused copy. ValueError for a label outside the detector's classes, and for sides that are not
    divisible by 32.
    """
    if not 0 <= label < detector.class_count:
        raise ValueError(f"class {label}: the detector has the classes 0 to {detector.class_count - 1}")
    evidence = ClassEvidence(fused(detector).requires_grad_(False)).eval()
    maps, sums = [], []
    with full_float32(), GradCAMPlusPlus(evidence, evidence.layers) as method:
        for chunk in torch.arange(len(images), device=images.device).split(batch):
            pictures = plain(images, chunk).contiguous().requires_grad_()  # no weight asks for gradients: they do
            maps.append(method(pictures, [lambda of_classes: of_classes[label]] * len(chunk)))
            sums.append(method.outputs[:, label].detach().exp().cpu().numpy())
    return np.concatenate(maps), np.concatenate(sums)


def points_into(maps: np.ndarray, boxes: Sequence[Tensor]) -> list[bool]:
    """Whether each map's hottest pixel lies in one of its picture's boxes (n, 4), xyxy in pixels of the map: the
    pointing game of Zhang et al., "Top-down neural attention by excitation backprop", ECCV 2016."""
    found = []
    for heat, truth in zip(maps, boxes, strict=True):
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        x1, y1, x2, y2 = truth.cpu().numpy().reshape(-1, 4).T
        inside = (x1 <= column + 0.5) & (column + 0.5 <= x2) & (y1 <= row + 0.5) & (row + 0.5 <= y2)
        found.append(bool(inside.any()))
    return found
