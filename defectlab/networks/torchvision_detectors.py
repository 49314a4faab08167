"""The field's older detectors, all torchvision's: Faster R-CNN, RetinaNet, SSD and FCOS.

Ren et al., "Faster R-CNN", NeurIPS 2015; Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; Liu et al.,
"SSD", ECCV 2016; Tian et al., "FCOS", ICCV 2019. Networks, assignment, losses, decoding and suppression are the
library's. On their published backbones they are meant for a GPU.

On this project's small backbone (ours: `backbone="v8n"`) the four differ by their heads alone, and one CPU thread can
train them. Each gets the same feature pyramid (Lin et al., CVPR 2017), SSD too, which had none.

Three means against tiny defects, for Faster R-CNN on the small backbone, as the abstract of TDD-net names them (Ding et
al., CAAI Transactions on Intelligence Technology 4(2), 2019; its text was not at hand, so all numbers are ours):
anchors by k-means, a stronger use of low levels (here: a level of stride 4), and online hard example mining.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torchvision.models import detection
from torchvision.models.detection import anchor_utils, faster_rcnn, fcos, retinanet, roi_heads, ssd
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from defectlab.networks.resnet import IMAGENET_MEAN, IMAGENET_STD
from defectlab.networks.yolo.model import SCALES, STRIDES, Detector
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

# The small backbone. Ours: everything narrow enough for one CPU thread; in brackets, what is published.
SMALL = tuple(f"v8{scale}" for scale in SCALES["v8"])
PYRAMID = 64  # channels (256)
BOX_HEAD = 128  # units of each of the two layers that look at a region (1024)
REGIONS = {"rpn_pre_nms_top_n": 500, "rpn_post_nms_top_n": 200}  # of a level, of an image (2000 and 1000 or 2000)
SAMPLED = 64  # anchors and regions of an image that a stage learns from, as few images have many defects (256, 512)
COCO_SIZE, COCO_SIDES = 800, (32, 512)  # px: the images that published anchors are for, and their sides
SIDES, RATIOS = 2, (0.5, 1.0, 2.0)  # anchors per place: sides of a level, heights by widths


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
    backbone: str = "resnet50"  # as published (SSD: VGG-16); ours: one of `SMALL`, from random weights, too
    optimizer: str = "sgd"  # all four papers; or "adamw", momentum being its first beta
    mosaic: float = 0.0  # probability; ours
    close_mosaic: int = 10  # last epochs without mosaic; ours: as the YOLO detectors
    average_ramp: float = 2000.0  # steps; ours: as the YOLO detectors
    anchors: str = "default"  # or "kmeans" on the training boxes: TDD-net, abstract
    stride_4: bool = False  # one more level of the pyramid; ours for TDD-net's "low-level structural information"
    hard_examples: int = 0  # regions of an image that count, those with the highest loss; 0: a random sample

    @property
    def recipe(self) -> DetectorSettings:
        """What the shared training loop reads: flips and scale, and no mosaic by default (ours).

        In fp32, since torchvision gives anchors the dtype of the maps, and bf16 resolves 512 px in steps of 2 px.
        """
        own = ("architecture", "learning_rate", "backbone", "anchors", "stride_4", "hard_examples")
        shared = {k: v for k, v in vars(self).items() if k not in own}
        rate = RATES[self.architecture] if self.learning_rate is None else self.learning_rate
        return DetectorSettings(**shared, learning_rate=rate, precision="fp32")

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the levels of the small backbone's pyramid, in px."""
        return (4, *STRIDES) if self.stride_4 else STRIDES


def build_torchvision(settings: TorchvisionSettings, classes: int, anchors: Tensor | None = None) -> nn.Module:
    """A fresh detector of `classes` defect types, its class 0 being the background; it resizes no image.

    All layers are trained, from random weights, and batch norms are ordinary ones. ValueError for an unknown
    architecture, backbone or kind of anchors, for means that a detector cannot have, or a size too small for SSD.

    anchors: (levels, 6, 2) widths and heights in px for Faster R-CNN and RetinaNet on the small backbone, None: those
    of `spread_anchors`; needed where the settings say "kmeans".
    """
    architecture = settings.architecture
    if architecture not in RATES:
        raise ValueError(f"unknown architecture {architecture!r}: use one of {', '.join(RATES)}")
    if settings.backbone not in ("resnet50", *SMALL):
        raise ValueError(f"unknown backbone {settings.backbone!r}: use resnet50 or one of {', '.join(SMALL)}")
    if settings.anchors not in ("default", "kmeans"):
        raise ValueError(f"unknown anchors {settings.anchors!r}: use default or kmeans")
    means = settings.anchors == "kmeans" or settings.stride_4 or settings.hard_examples
    if means and (architecture != "faster_rcnn" or settings.backbone == "resnet50"):
        raise ValueError("kmeans, stride_4 and hard_examples are for faster_rcnn on a small backbone: leave them out")
    if settings.backbone in SMALL:
        return _small(settings, classes, anchors)
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


# --- On the small backbone -------------------------------------------------------------------------------------------


class SmallPyramid(nn.Module):
    """This project's v8 backbone and a feature pyramid with batch norms: images (B, 3, S, S), S divisible by 32 ->
    {"0": (B, 64, S / stride, S / stride), "1": ...}, the finest level first."""

    out_channels = PYRAMID

    def __init__(self, scale: str, stride_4: bool):
        super().__init__()
        detector = Detector("v8", scale, 1)
        third, fourth, fifth = detector.widths
        widths = [third // 2, third, fourth, fifth] if stride_4 else [third, fourth, fifth]
        self.stride_4, self.backbone = stride_4, detector.backbone
        self.pyramid = FeaturePyramidNetwork(widths, PYRAMID, norm_layer=nn.BatchNorm2d)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        second = self.backbone.to_stride_4(images)
        third = self.backbone.to_stride_8(second)
        fourth = self.backbone.to_stride_16(third)
        maps = [second, third, fourth, self.backbone.to_stride_32(fourth)]
        return self.pyramid({str(level): x for level, x in enumerate(maps if self.stride_4 else maps[1:])})


def sides_of(size: int, levels: int) -> Tensor:
    """(levels, 2) px: the sides of default anchors, in equal steps of ratio. Published ones, 32 to 512 px, are for
    images of 800 px; the smallest and the largest here are those, shrunk with the images (ours)."""
    low, high = (math.log(side * size / COCO_SIZE) for side in COCO_SIDES)
    return torch.linspace(low, high, levels * SIDES).exp().view(levels, SIDES)


def spread_anchors(size: int, levels: int) -> Tensor:
    """(levels, 6, 2) widths and heights in px: the sides of `sides_of` in the three published shapes, of equal area."""
    ratios = torch.tensor(RATIOS).sqrt()
    shapes = torch.stack([1 / ratios, ratios], 1)  # (3, 2), each of area 1
    return (sides_of(size, levels)[:, :, None, None] * shapes).flatten(1, 2)


class Anchors(anchor_utils.AnchorGenerator):
    """Anchors of given widths and heights (levels, A, 2) in px, which torchvision's own would round to even numbers."""

    def __init__(self, shapes: Tensor):
        levels, count, _ = shapes.shape
        super().__init__(((1,) * count,) * levels, ((1.0,),) * levels)
        self.cell_anchors = [torch.cat([-level, level], 1) / 2 for level in shapes]


def _small(settings: TorchvisionSettings, classes: int, anchors: Tensor | None) -> nn.Module:
    """torchvision's heads, with its thresholds of IoU, on a `SmallPyramid`. The heads of RetinaNet and FCOS have group
    norms, as theirs of the library's second version; SSD's default boxes have the sides of the others' anchors."""
    size, strides = settings.size, settings.strides
    levels = len(strides)
    if anchors is None:
        if settings.anchors == "kmeans":
            raise ValueError("anchors by k-means depend on the training boxes: give them")
        anchors = spread_anchors(size, levels)
    body = SmallPyramid(settings.backbone.removeprefix("v8"), settings.stride_4)
    limits = {"score_thresh": LEAST_SCORE, "detections_per_img": MOST_BOXES}
    if settings.architecture == "faster_rcnn":
        return _small_faster_rcnn(settings, classes, body, anchors)
    if settings.architecture == "ssd":
        scales = (sides_of(size, levels)[:, 0] / size).tolist()
        boxes = anchor_utils.DefaultBoxGenerator([[2, 3]] * levels, scales=[*scales, scales[-1] ** 2 / scales[-2]])
        head = ssd.SSDHead([PYRAMID] * levels, boxes.num_anchors_per_location(), classes + 1)
        return ssd.SSD(body, boxes, (size, size), classes + 1, head=head, **limits)
    limits |= {"min_size": size, "max_size": size}
    if settings.architecture == "fcos":  # its ranges of distances go with the strides: 4 to 8 of them
        own = Anchors(torch.tensor(strides, dtype=torch.float32).view(-1, 1, 1).expand(-1, 1, 2))
        return fcos.FCOS(body, classes + 1, anchor_generator=own, **limits)
    head = retinanet.RetinaNetHead(PYRAMID, anchors.shape[1], classes + 1, lambda width: nn.GroupNorm(32, width))
    return retinanet.RetinaNet(body, classes + 1, anchor_generator=Anchors(anchors), head=head, **limits)


def _small_faster_rcnn(settings: TorchvisionSettings, classes: int, body: nn.Module, anchors: Tensor) -> nn.Module:
    levels, size = len(settings.strides), settings.size
    pool = MultiScaleRoIAlign(
        [str(level) for level in range(levels)],
        output_size=7,
        sampling_ratio=2,
        canonical_scale=round(224 * size / COCO_SIZE),  # a region of 224 px in 800 belongs to stride 16 (Lin et al.)
    )
    box_head = faster_rcnn.TwoMLPHead(PYRAMID * 7**2, BOX_HEAD)
    predictor = faster_rcnn.FastRCNNPredictor(BOX_HEAD, classes + 1)
    regions = {f"{name}_{phase}": most for name, most in REGIONS.items() for phase in ("train", "test")}
    model = faster_rcnn.FasterRCNN(
        body, None, size, size, rpn_anchor_generator=Anchors(anchors), box_roi_pool=pool, box_head=box_head,
        box_predictor=predictor, box_score_thresh=LEAST_SCORE, box_detections_per_img=MOST_BOXES,
        rpn_batch_size_per_image=SAMPLED, box_batch_size_per_image=SAMPLED, **regions,
    )  # fmt: skip
    if settings.hard_examples:
        model.roi_heads = HardExampleHeads(model.roi_heads, settings.hard_examples)
    return model


# --- Hard examples ---------------------------------------------------------------------------------------------------


def hardest_loss(
    logits: Tensor, regression: Tensor, labels: list[Tensor], targets: list[Tensor], most: int
) -> tuple[Tensor, Tensor]:
    """(classification loss, box loss), means over the `most` regions of each image whose sum of both is highest.

    Online hard example mining: Shrivastava et al., CVPR 2016, section 4. Where all regions count, it is torchvision's
    `fastrcnn_loss`. logits (R, 1 + C) and regression (R, (1 + C) * 4): of the regions of all images. labels (r,), 0
    being background, and targets (r, 4), encoded boxes: of each image.
    """
    counts = [len(of_image) for of_image in labels]
    labels, targets = torch.cat(labels), torch.cat(targets)
    classification = cross_entropy(logits, labels, reduction="none")  # (R,)
    own = regression.unflatten(1, (-1, 4))[torch.arange(len(labels), device=labels.device), labels]  # (R, 4)
    box = smooth_l1_loss(own, targets, beta=1 / 9, reduction="none").sum(1)
    box = torch.where(labels > 0, box, 0.0)  # targets of an image without boxes are infinite
    kept, start = [], 0
    for of_image in (classification + box).detach().split(counts):
        kept.append(start + of_image.topk(min(most, len(of_image))).indices)
        start += len(of_image)
    kept = torch.cat(kept)
    return classification[kept].mean(), box[kept].mean()


class HardExampleHeads(roi_heads.RoIHeads):
    """torchvision's second stage, which looks at all proposals of an image and learns from the `most` hardest.

    The paper takes no sample before, and suppresses regions that overlap each other by an IoU above 0.7, as the
    proposals are already.
    """

    def __init__(self, heads: roi_heads.RoIHeads, most: int):
        every = REGIONS["rpn_post_nms_top_n"] + 1000  # the true boxes are proposals, too
        parts = heads.box_roi_pool, heads.box_head, heads.box_predictor
        super().__init__(*parts, 0.5, 0.5, every, 1.0, None, heads.score_thresh, heads.nms_thresh, MOST_BOXES)
        self.most = most

    def forward(self, features, proposals, image_shapes, targets=None):
        """As `RoIHeads.forward`."""
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, regression = self.box_predictor(self.box_head(pooled))
        classification, box = hardest_loss(logits, regression, labels, wanted, self.most)
        return [], {"loss_classifier": classification, "loss_box_reg": box}
