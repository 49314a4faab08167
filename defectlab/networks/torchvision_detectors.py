"""The field's older detectors, all torchvision's: Faster R-CNN, RetinaNet, SSD and FCOS.

Ren et al., "Faster R-CNN", NeurIPS 2015; Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; Liu et al.,
"SSD", ECCV 2016; Tian et al., "FCOS", ICCV 2019. Networks, assignment, losses, decoding and suppression are the
library's. Meant for a GPU.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torchvision.models import detection
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from defectlab.networks.resnet import IMAGENET_MEAN, IMAGENET_STD
from defectlab.networks.yolo.settings import DetectorSettings

# Ours: the rates of the papers, all but SSD's stated for 16 images per step (SSD: 32); none was tried here.
RATES = {
    "faster_rcnn": 0.02,  # Lin et al., "Feature Pyramid Networks", CVPR 2017, section 5
    "retinanet": 0.01,  # Lin et al. 2017, section 4.1
    "ssd": 0.001,  # Liu et al. 2016, section 3.1
    "fcos": 0.01,  # Tian et al. 2019, section 4
}
LEAST_SCORE, MOST_BOXES = 0.001, 300  # as for the YOLO detectors: average precision counts the tail, too
LEAST_SSD_SIZE = 268  # px: below that the last of SSD's six maps would be empty


@dataclass(frozen=True)
class TorchvisionSettings:
    """One of torchvision's detectors and its recipe. Defaults are frozen, since records are keyed by differences."""

    model: ClassVar[str] = "torchvision_detector"
    version: ClassVar[int] = 1

    dataset: str = "neu_det"
    architecture: str = "faster_rcnn"  # "retinanet", "ssd", "fcos"
    size: int = 512  # px per side
    epochs: int = 100
    batch: int = 16
    learning_rate: float | None = None  # None: the one of `RATES`
    momentum: float = 0.9  # all four papers
    weight_decay: float = 0.0001  # as published for all but SSD, which has 0.0005
    warm_up: float = 3.0  # epochs; ours: as the YOLO detectors
    flip_up_down: float = 0.5  # probability; ours: rolled steel has no preferred orientation

    @property
    def recipe(self) -> DetectorSettings:
        """What the shared training loop reads: flips and scale, no mosaic (ours).

        In fp32, since torchvision gives anchors the dtype of the maps, and bf16 resolves 512 px in steps of 2 px.
        """
        shared = {k: v for k, v in vars(self).items() if k not in ("architecture", "learning_rate")}
        rate = RATES[self.architecture] if self.learning_rate is None else self.learning_rate
        return DetectorSettings(**shared, learning_rate=rate, optimizer="sgd", mosaic=0.0, precision="fp32")


def build_torchvision(settings: TorchvisionSettings, classes: int) -> nn.Module:
    """A fresh detector of `classes` defect types, its class 0 being the background; it resizes no image.

    All layers are trained, from random weights, and batch norms are ordinary ones. ValueError for an unknown
    architecture, or a size too small for SSD.
    """
    architecture = settings.architecture
    if architecture not in RATES:
        raise ValueError(f"unknown architecture {architecture!r}: use one of {', '.join(RATES)}")
    network = {"weights": None, "weights_backbone": None, "num_classes": classes + 1}  # None: downloads nothing
    if architecture == "ssd":
        return _ssd(settings.size, network)
    sizes = {"min_size": settings.size, "max_size": settings.size}
    limits = {"score_thresh": LEAST_SCORE, "detections_per_img": MOST_BOXES}
    if architecture == "faster_rcnn":
        limits = {f"box_{name}": value for name, value in limits.items()}
        return detection.fasterrcnn_resnet50_fpn_v2(**network, **sizes, **limits)
    build = detection.retinanet_resnet50_fpn_v2 if architecture == "retinanet" else detection.fcos_resnet50_fpn
    return build(**network, **sizes, **limits)


def _ssd(size: int, network: dict) -> nn.Module:
    """SSD300's network on images of `size` px: default boxes follow the maps' own grids, since SSD300's steps fit 300
    px only, and images are normalised as for the others (its own scaling to ±128 is that of one weights file)."""
    if size < LEAST_SSD_SIZE:
        raise ValueError(f"images of {size} px are too small for SSD: use {LEAST_SSD_SIZE} px or more")
    model = detection.ssd300_vgg16(**network, score_thresh=LEAST_SCORE, detections_per_img=MOST_BOXES)
    model.anchor_generator.steps = None
    mean, std = list(IMAGENET_MEAN), list(IMAGENET_STD)
    model.transform = GeneralizedRCNNTransform(size, size, mean, std, size_divisible=1, fixed_size=(size, size))
    return model
