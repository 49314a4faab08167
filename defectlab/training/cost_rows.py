"""What a detector costs, as a row that needs no data: parameters, FLOPs and size follow from the network."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from defectlab.metrics.costs import model_costs
from defectlab.networks.yolo.blocks import fused
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
