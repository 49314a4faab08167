"""What a detector costs, as a row that needs no data: parameters, FLOPs and size follow from the network."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from defectlab.metrics.costs import model_costs
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.decode import best, decode, suppress
from defectlab.networks.yolo.model import Detector
from defectlab.runs import Context, Result


@dataclass(frozen=True)
class CostSettings:
    """A detector as it is published: for the 80 classes of COCO, on images of 640 px."""

    model: ClassVar[str] = "detector_costs"
    version: ClassVar[int] = 1

    dataset: str = "none"
    family: str = "v5"  # "v5" anchor-based, "v8" anchor-free
    scale: str = "s"
    size: int = 640  # px a side, of FLOPs
    classes: int = 80


@dataclass(frozen=True)
class AnswerCostSettings(CostSettings):
    """The way of an image of NEU-DET from pixels to boxes: network, decoding, and what is done with the boxes."""

    model: ClassVar[str] = "answer_costs"
    version: ClassVar[int] = 1

    family: str = "v8"
    scale: str = "n"
    size: int = 224
    classes: int = 6
    suppressed: int = 0  # boxes above the score threshold, which NMS compares; 0: no NMS, the 300 best are taken


class Answered(nn.Module):
    """Images (1, 3, S, S) in 0..1 -> boxes, scores and labels of one head, with or without NMS.

    Random weights give scores that no trained head gives, so NMS is handed drawn boxes, as many as a trained head
    gives. They hardly overlap: nearly all stay, the worst case of its time. ValueError for more boxes than the head
    has pairs of cell and class.
    """

    def __init__(self, settings: AnswerCostSettings):
        super().__init__()
        self.settings = settings
        self.network = fused(Detector(settings.family, settings.scale, settings.classes))
        _, scores = decode(self.network, self.network(torch.zeros(1, 3, settings.size, settings.size)))
        if settings.suppressed > scores.numel():
            raise ValueError(f"{settings.suppressed} boxes: the head has {scores.numel()} pairs of cell and class")
        generator = torch.Generator().manual_seed(0)
        places = 0.9 * settings.size * torch.rand(1, scores.shape[1], 2, generator=generator)
        sides = 0.05 * settings.size * (0.5 + torch.rand(places.shape, generator=generator))
        self.register_buffer("boxes", torch.cat([places, places + sides], -1))
        above = torch.arange(scores[0].numel()) < settings.suppressed
        order = torch.randperm(len(above), generator=generator)
        self.register_buffer("scores", (0.5 * above[order]).reshape(scores.shape))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores = decode(self.network, self.network(images))
        if not self.settings.suppressed:
            return best(boxes, scores)
        (kept,) = suppress(self.boxes, self.scores, confidence=0.001, iou=0.7, most=300)
        return self.boxes[0, kept.anchors], kept.scores, kept.labels


@dataclass(frozen=True)
class NoData:
    """Stands where a row's data would."""

    label: str = "none (no data needed)"


def run_costs(settings: CostSettings, seed: int, data: NoData, context: Context) -> Result:
    """`model_costs` of an untrained detector as deployed (fused, before decoding and suppression); no metrics.

    ValueError for an unknown detector or a size that is not divisible by 32.
    """
    torch.manual_seed(0)
    detector = fused(Detector(settings.family, settings.scale, settings.classes))
    return Result({}, {}, {}, {}, {}, {}, model_costs(detector.to(context.device), settings.size), "fp32")
