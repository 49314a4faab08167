"""torchvision's detectors: the networks as published, at any size that they can have."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_V2_Weights,
    FCOS_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_V2_Weights,
    SSD300_VGG16_Weights,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from defectlab.metrics.costs import parameters
from defectlab.networks.resnet import IMAGENET_MEAN, IMAGENET_STD
from defectlab.networks.torchvision_detectors import LEAST_SSD_SIZE, RATES, TorchvisionSettings, build_torchvision

PUBLISHED = {
    "faster_rcnn": FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    "retinanet": RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
    "ssd": SSD300_VGG16_Weights.COCO_V1,
    "fcos": FCOS_ResNet50_FPN_Weights.COCO_V1,
}


@pytest.mark.parametrize("architecture", list(RATES))
def test_networks_are_the_published_ones_and_train_whole(architecture: str) -> None:
    with torch.device("meta"):
        model = build_torchvision(TorchvisionSettings(architecture=architecture), 90)
    of_norms = 53_120 if architecture == "fcos" else 0  # the published one has its ResNet's norms frozen, as buffers
    assert parameters(model) == PUBLISHED[architecture].meta["num_params"] + of_norms
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) is (architecture != "ssd")
    kept = model.roi_heads if architecture == "faster_rcnn" else model
    assert (kept.score_thresh, kept.detections_per_img) == (0.001, 300)
    images = torch.rand(2, 3, 512, 512)
    seen, _ = model.transform(list(images))  # normalised, and neither resized nor padded
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(seen.tensors, (images - mean) / std)


def test_default_boxes_of_ssd_follow_the_maps() -> None:
    with torch.device("meta"):
        model = build_torchvision(TorchvisionSettings(architecture="ssd"), 6)
        maps = list(model.backbone(torch.zeros(1, 3, 512, 512)).values())
    sides = [m.shape[-1] for m in maps]
    assert sides == [64, 32, 16, 8, 6, 4]
    maps = [torch.zeros(m.shape) for m in maps]
    boxes = model.anchor_generator(ImageList(torch.zeros(1, 3, 512, 512), [(512, 512)]), maps)[0]  # (A, 4)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    counts = [4 * 64**2, 6 * 32**2, 6 * 16**2, 6 * 8**2, 4 * 6**2, 4 * 4**2]
    for side, of_map in zip(sides, centres.split(counts), strict=True):
        expected = (torch.arange(side) + 0.5) * 512 / side
        for axis in (0, 1):
            found = of_map[:, axis].mul(100).round().unique() / 100
            torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_the_least_size_of_ssd() -> None:
    with torch.device("meta"):
        model = build_torchvision(TorchvisionSettings(architecture="ssd", size=LEAST_SSD_SIZE), 6)
        assert all(m.numel() for m in model.backbone(torch.zeros(1, 3, LEAST_SSD_SIZE, LEAST_SSD_SIZE)).values())
        with pytest.raises(RuntimeError):
            model.backbone(torch.zeros(1, 3, LEAST_SSD_SIZE - 1, LEAST_SSD_SIZE - 1))
    with pytest.raises(ValueError, match="images of 267 px are too small for SSD: use 268 px or more"):
        build_torchvision(TorchvisionSettings(architecture="ssd", size=267), 6)


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'detr': use one of faster_rcnn, retinanet, ssd, fcos"):
        build_torchvision(TorchvisionSettings(architecture="detr"), 6)
