"""torchvision's detectors as rows: the networks as published, boxes there and back, one training from end to end."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import _api, resnet50
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_V2_Weights,
    FCOS_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_V2_Weights,
    SSD300_VGG16_Weights,
    faster_rcnn,
    fcos,
    retinanet,
    ssd,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.vgg import make_layers
from torchvision.ops import FrozenBatchNorm2d
from toy_detection import CLASSES, toy_data, toy_split

from defectlab.data.augment import Batch, plain
from defectlab.data.boxes import DetectionData
from defectlab.metrics import costs
from defectlab.metrics.costs import parameters
from defectlab.metrics.detection import unpack
from defectlab.networks.resnet import IMAGENET_MEAN, IMAGENET_STD, WeightsError
from defectlab.networks.torchvision_detectors import (
    LEAST_SSD_SIZE,
    RATES,
    TorchvisionSettings,
    build_torchvision,
    to_targets,
    torchvision_loss,
)
from defectlab.runs import OutOfTime, Session
from defectlab.training import torchvision_detectors
from defectlab.training.torchvision_detectors import predict_torchvision, run_torchvision

PUBLISHED = {
    "faster_rcnn": FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    "retinanet": RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
    "ssd": SSD300_VGG16_Weights.COCO_V1,
    "fcos": FCOS_ResNet50_FPN_Weights.COCO_V1,
}
TOY = TorchvisionSettings(dataset="toy", size=64, epochs=3, batch=4, learning_rate=0.1)


def quiet(path: Path | None = None, **options) -> Session:
    return Session(path, say=lambda line: None, **options)


@pytest.fixture
def small_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same detectors on thin backbones, so that a forward pass takes a fraction of a second."""
    for module in (faster_rcnn, retinanet, fcos):
        monkeypatch.setattr(
            module, "resnet50", lambda weights, progress, **options: ResNet(Bottleneck, [1, 1, 1, 1], **options)
        )
    thin = [8, 8, "M", 8, 8, "M", 8, 8, 8, "M", 8, 8, 512, "M", 8, 8, 512, "M"]
    monkeypatch.setattr(ssd, "vgg16", lambda weights, progress: SimpleNamespace(features=make_layers(thin)))


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is not measured: ten forward passes of 32 pictures take longer than all else."""
    monkeypatch.setattr(costs, "inference_seconds", lambda model, images, *options: 0.01 * len(images))


# --- Networks --------------------------------------------------------------------------------------------------------


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
    pictures = torch.rand(2, 3, 512, 512)
    seen, _ = model.transform(list(pictures))  # normalised, and neither resized nor padded
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(seen.tensors, (pictures - mean) / std)


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
    with pytest.raises(ValueError, match="pictures of 267 px are too small for SSD: use 268 px or more"):
        build_torchvision(TorchvisionSettings(architecture="ssd", size=267), 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "detr"}, "unknown architecture 'detr': use one of faster_rcnn, retinanet, ssd, fcos"),
        ({"initialisation": "coco"}, "faster_rcnn cannot start from 'coco': use scratch or imagenet"),
        ({"architecture": "ssd", "initialisation": "imagenet"}, "ssd cannot start from 'imagenet': use scratch"),
    ],
)
def test_settings_that_are_not_possible(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_torchvision(TorchvisionSettings(**changes), 6)


def test_imagenet_weights_are_read_without_pickled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained, asked = resnet50().state_dict(), []

    def fetched(url: str, **options) -> dict[str, Tensor]:
        asked.append(options)
        return pretrained

    monkeypatch.setattr(_api, "load_state_dict_from_url", fetched)
    settings = TorchvisionSettings(architecture="fcos", initialisation="imagenet", size=64)
    body = build_torchvision(settings, 2).backbone.body.state_dict()
    assert asked == [{"check_hash": True, "weights_only": True}]
    assert body.keys() == {name for name in pretrained if not name.startswith("fc.")}
    assert all(torch.equal(value, pretrained[name]) for name, value in body.items())


def test_imagenet_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, small_backbones: None) -> None:
    def offline(url: str, **options) -> None:
        raise URLError("no network")

    monkeypatch.setattr(_api, "load_state_dict_from_url", offline)
    with pytest.raises(WeightsError, match=r"no network.*fetch .*resnet50.*\.pth once, or use initialisation scratch"):
        build_torchvision(TorchvisionSettings(initialisation="imagenet", size=64), 2)


# --- Boxes there and back --------------------------------------------------------------------------------------------


def test_targets_by_hand() -> None:
    boxes = torch.tensor([[[1.0, 2, 3, 4], [5, 6, 7, 8]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    first, second = to_targets(boxes, torch.tensor([[0, 5], [-1, -1]]))
    assert first["boxes"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]] and first["labels"].tolist() == [1, 6]
    assert second["boxes"].shape == (0, 4) and second["labels"].shape == (0,)


class Told(nn.Module):
    """A detector that finds the same in every picture."""

    def __init__(self, boxes: list[list[float]], labels: list[int]):
        super().__init__()
        self.boxes, self.labels, self.seen = torch.tensor(boxes), torch.tensor(labels), []

    def forward(self, pictures: list[Tensor]) -> list[dict[str, Tensor]]:
        self.seen += pictures
        scores = torch.linspace(0.9, 0.1, len(self.labels))
        return [{"boxes": self.boxes, "labels": self.labels, "scores": scores} for _ in pictures]


def test_predictions_come_back_to_the_original_pictures() -> None:
    split = toy_split(3, 0, 64)
    split = replace(
        split,
        scale=torch.tensor([1.0, 2.0, 0.5]),
        offset=torch.tensor([[0.0, 0.0], [4.0, 8.0], [0.0, 16.0]]),
        sizes=torch.tensor([[64, 64], [20, 25], [64, 128]]),
    )
    model = Told([[10.0, 20, 30, 60], [0, 0, 5, 5], [-5, 2, 70, 40]], [2, 0, 1])
    plain_one, enlarged, shrunk = predict_torchvision(model, split, batch=2)
    assert [p["labels"].tolist() for p in (plain_one, enlarged, shrunk)] == [[1, 0]] * 3  # background is left out
    torch.testing.assert_close(plain_one["scores"], torch.tensor([0.9, 0.1]))
    assert plain_one["boxes"].tolist() == [[10, 20, 30, 60], [0, 2, 64, 40]]
    assert enlarged["boxes"].tolist() == [[3, 6, 13, 20], [0, 0, 25, 16]]  # less (4, 8), halved, within 25 x 20
    assert shrunk["boxes"].tolist() == [[20, 8, 60, 64], [0, 0, 128, 48]]  # less (0, 16), doubled, within 128 x 64
    assert torch.equal(torch.stack(model.seen), plain(split.images, torch.arange(3)))


@pytest.mark.parametrize("architecture", list(RATES))
def test_every_architecture_gives_losses_and_boxes(architecture: str, small_backbones: None) -> None:
    size = LEAST_SSD_SIZE if architecture == "ssd" else 64
    torch.manual_seed(0)
    model = build_torchvision(TorchvisionSettings(architecture=architecture, size=size), len(CLASSES))
    if architecture == "faster_rcnn":  # few proposals
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 8
        model.rpn._post_nms_top_n = {"training": 20, "testing": 20}
    split = toy_split(2, 0, size)
    labels = split.labels.clone()
    labels[1] = -1  # augmentation may leave a picture without a box
    batch = Batch(plain(split.images, torch.arange(2)), split.boxes, labels, torch.eye(3), torch.zeros(2, 4))
    with torch.no_grad():
        scalars = torchvision_loss(model.train())(batch)
    assert next(iter(scalars)) == "loss" and len(scalars) >= 3
    assert all(value.isfinite() for value in scalars.values())
    torch.testing.assert_close(scalars["loss"], sum(value for name, value in scalars.items() if name != "loss"))
    for found in predict_torchvision(model.eval(), split):
        assert 0 < len(found["boxes"]) <= 300 and set(found["labels"].tolist()) <= {0, 1}
        assert found["boxes"].min() >= 0 and found["boxes"].max() <= size and found["scores"].min() >= 0.001


# --- Training --------------------------------------------------------------------------------------------------------


def test_the_recipe() -> None:
    recipe = TorchvisionSettings(architecture="retinanet").recipe
    assert (recipe.learning_rate, recipe.momentum, recipe.weight_decay, recipe.optimizer) == (0.01, 0.9, 0.0001, "sgd")
    assert (recipe.size, recipe.epochs, recipe.batch, recipe.precision) == (512, 100, 16, "fp32")
    drawn = recipe.augmentation
    assert (drawn.mosaic, drawn.mixup, drawn.flip_left_right, drawn.flip_up_down, drawn.scale) == (0, 0, 0.5, 0.5, 0.5)
    changed = TorchvisionSettings(architecture="ssd", learning_rate=0.5, flip_up_down=0.0, epochs=7).recipe
    assert (changed.learning_rate, changed.augmentation.flip_up_down, changed.epochs) == (0.5, 0.0, 7)


class Oracle(nn.Module):
    """Knows the boxes of plain pictures; what it learns is how many boxes an augmented picture has."""

    def __init__(self, data: DetectionData):
        super().__init__()
        self.count = nn.Parameter(torch.zeros(()))
        self.answers = []
        for split in (data.dev, data.test):
            targets = to_targets(split.boxes, split.labels)
            self.answers += list(zip(plain(split.images, torch.arange(len(split))), targets, strict=True))

    def answer(self, picture: Tensor) -> dict[str, Tensor]:
        known = [target for known, target in self.answers if torch.equal(known, picture)]
        target = known[0] if known else {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        return target | {"scores": torch.full((len(target["labels"]),), 0.75)}

    def forward(
        self, pictures: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if not self.training:
            return [self.answer(picture) for picture in pictures]
        off = torch.stack([self.count - len(target["labels"]) for target in targets])
        return {"square": off.square().mean(), "absolute": off.abs().mean()}


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch, no_clock: None) -> DetectionData:
    """The toy set, on which `run_torchvision` now trains the oracle."""
    data = toy_data()
    monkeypatch.setattr(torchvision_detectors, "build_torchvision", lambda settings, classes: Oracle(data))
    return data


def test_an_oracle_gets_everything_right(oracle: DetectionData) -> None:
    result = run_torchvision(TOY, 0, oracle, "cpu", quiet())
    assert {result.metrics[name] for name in ("map50", "map50_95", "map33", "precision_dev", "recall_dev")} == {100.0}
    assert set(result.per_class) == set(CLASSES) and result.per_class["ellipse"]["map50"] == 100.0
    assert result.dev["threshold"] == 0.75 and result.dev["map50"] == 100.0
    assert set(result.curve) == {"loss", "square", "absolute", "probe_epoch", "dev_map50", "dev_map50_95"}
    for loss, square, absolute in zip(*(result.curve[name] for name in ("loss", "square", "absolute")), strict=True):
        assert loss == pytest.approx(square + absolute, abs=1e-5)
    assert result.curve["loss"][-1] < result.curve["loss"][0] and result.curve["dev_map50"] == [100.0] * 3
    predictions, truths, names, class_names = unpack(result.predictions)
    assert names == oracle.test.names and class_names == CLASSES
    assert all(torch.equal(p["labels"], t["labels"]) for p, t in zip(predictions, truths, strict=True))
    assert len(result.predictions["case_index"]) == len(result.predictions["case_images"]) > 0
    assert result.model.keys() == {"count"} and result.precision == "fp32"
    assert result.costs["latency_ms"] == 10.0 and result.costs["images_per_second_32"] == 100.0


def test_an_interrupted_training_goes_on(oracle: DetectionData, tmp_path: Path) -> None:
    whole = run_torchvision(TOY, 0, oracle, "cpu", quiet())
    path = tmp_path / "half.safetensors"
    for _ in range(TOY.epochs - 1):
        with pytest.raises(OutOfTime):
            run_torchvision(TOY, 0, oracle, "cpu", quiet(path, deadline=time.monotonic() - 1))
    parts = run_torchvision(TOY, 0, oracle, "cpu", quiet(path))
    assert torch.equal(whole.model["count"], parts.model["count"]) and whole.curve == parts.curve
    other = run_torchvision(TOY, 1, oracle, "cpu", quiet())
    assert other.curve["loss"] != whole.curve["loss"]


def test_one_architecture_from_end_to_end(small_backbones: None, no_clock: None) -> None:
    data = toy_data(counts=(4, 2, 2))
    result = run_torchvision(replace(TOY, architecture="fcos", epochs=1, batch=2), 0, data, "cpu", quiet())
    assert set(result.curve) >= {"loss", "classification", "bbox_regression", "bbox_ctrness", "dev_map50"}
    assert 0 <= result.metrics["map50"] <= 100 and set(result.per_class) == set(CLASSES)
    assert 5 < result.costs["parameters_m"] < 30 and result.costs["gflops"] > 1
    assert result.costs["train_images_per_second"] > 0
    assert "head.classification_head.cls_logits.weight" in result.model
    assert result.notes == {"costs": "at 64 px, not fused, with decoding and suppression"}
