"""TODO networks.torchvision_detectors."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torchvision.models import ResNet50_Weights
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn_v2,
    fcos_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
    ssd300_vgg16,
)
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from defectlab.files import WeightsError
from defectlab.networks.resnet import IMAGENET_MEAN, IMAGENET_STD
from defectlab.networks.yolo.settings import DetectorSettings

# Ours: the rates of the papers, all but SSD's stated for 16 pictures a step (SSD: 32); none was tried here.
RATES = {
    "faster_rcnn": 0.02,  # Lin et al., "Feature Pyramid Networks", CVPR 2017, section 5
    "retinanet": 0.01,  # Lin et al. 2017, section 4.1
    "ssd": 0.001,  # Liu et al. 2016, section 3.1
    "fcos": 0.01,  # Tian et al. 2019, section 4
}
LEAST_SCORE, MOST_BOXES = 0.001, 300  # as for our own detectors: average precision counts the tail, too
LEAST_SSD_SIZE = 268  # px: below that the last of SSD's six maps would be empty


@dataclass(frozen=True)
class TorchvisionSettings:
    """One of torchvision's detectors and its recipe. Defaults are frozen, since records are keyed by differences."""

    model: ClassVar[str] = "torchvision_detector"
    version: ClassVar[int] = 1

    dataset: str = "neu_det"
    architecture: str = "faster_rcnn"  # "retinanet", "ssd", "fcos"
    initialisation: str = "scratch"  # ours: as our own detectors; "imagenet": a pretrained ResNet-50, not for "ssd"
    size: int = 512  # px a side
    epochs: int = 100
    batch: int = 16
    learning_rate: float | None = None  # None: the one of `RATES`
    momentum: float = 0.9  # all four papers
    weight_decay: float = 0.0001  # as published for all but SSD, which has 0.0005
    warm_up: float = 3.0  # epochs; ours: as our own detectors
    flip_up_down: float = 0.5  # probability; ours: rolled steel has no up

    @property
    def recipe(self) -> DetectorSettings:
        """What the shared training loop reads: flips and scale, no mosaic (ours: our baselines' other recipe).

        In fp32, since torchvision gives anchors the dtype of the maps, and bf16 resolves 512 px in steps of 2 px.
        """
        return DetectorSettings(
            dataset=self.dataset,
            size=self.size,
            epochs=self.epochs,
            batch=self.batch,
            optimizer="sgd",
            learning_rate=RATES[self.architecture] if self.learning_rate is None else self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            warm_up=self.warm_up,
            mosaic=0.0,
            flip_up_down=self.flip_up_down,
            precision="fp32",
        )


# --- Network ---------------------------------------------------------------------------------------------------------


def build_torchvision(settings: TorchvisionSettings, classes: int) -> nn.Module:
    """A fresh detector of `classes` defect types, its class 0 being the background; nothing in it resizes a picture.

    All layers are trained and batch norms are ordinary ones, also around pretrained weights (torchvision would freeze
    them; ours: then both initialisations are the same network).

    Raises:
        ValueError: an unknown architecture or initialisation, "imagenet" for SSD, or a size too small for SSD.
        WeightsError: ImageNet weights that are neither here nor to be fetched.
    """
    architecture = settings.architecture
    if architecture not in RATES:
        raise ValueError(f"unknown architecture {architecture!r}: use one of {', '.join(RATES)}")
    allowed = ("scratch",) if architecture == "ssd" else ("scratch", "imagenet")
    if settings.initialisation not in allowed:
        raise ValueError(f"{architecture} cannot start from {settings.initialisation!r}: use {' or '.join(allowed)}")
    network = {"weights": None, "weights_backbone": None, "num_classes": classes + 1}  # None: downloads nothing
    if architecture == "ssd":
        return _ssd(settings.size, network)
    sizes = {"min_size": settings.size, "max_size": settings.size}
    limits = {"score_thresh": LEAST_SCORE, "detections_per_img": MOST_BOXES}
    if architecture == "faster_rcnn":
        limits = {f"box_{name}": value for name, value in limits.items()}
        model = fasterrcnn_resnet50_fpn_v2(**network, **sizes, **limits)
    elif architecture == "retinanet":
        model = retinanet_resnet50_fpn_v2(**network, **sizes, **limits)
    else:
        model = fcos_resnet50_fpn(**network, **sizes, **limits)
    if settings.initialisation == "imagenet":
        model.backbone.body.load_state_dict(_imagenet_resnet50())
    return model


def _ssd(size: int, network: dict) -> nn.Module:
    """SSD300's network on pictures of `size` px: default boxes follow the maps' own grids, since SSD300's steps fit
    300 px only, and pictures are normalised as for the others (its own scaling to ±128 is that of one file of
    pretrained weights)."""
    if size < LEAST_SSD_SIZE:
        raise ValueError(f"pictures of {size} px are too small for SSD: use {LEAST_SSD_SIZE} px or more")
    model = ssd300_vgg16(**network, score_thresh=LEAST_SCORE, detections_per_img=MOST_BOXES)
    model.anchor_generator.steps = None
    model.transform = GeneralizedRCNNTransform(
        size, size, list(IMAGENET_MEAN), list(IMAGENET_STD), size_divisible=1, fixed_size=(size, size)
    )
    return model


def _imagenet_resnet50() -> dict[str, Tensor]:
    """torchvision's ResNet-50 without its classifier, from its cache or fetched once; no pickled code is run."""
    weights = ResNet50_Weights.IMAGENET1K_V1
    try:
        state = weights.get_state_dict(check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"no ImageNet weights ({error}): let torchvision fetch {weights.url} once, or use initialisation scratch"
        ) from error
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


# --- Training --------------------------------------------------------------------------------------------------------
