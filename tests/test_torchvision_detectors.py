"""torchvision's detectors as rows: boxes there and back, one training from end to end."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import faster_rcnn, fcos, retinanet, ssd
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.vgg import make_layers
from toy_detection import CLASSES, toy_data, toy_split
from toy_runs import quiet

from defectlab.data.augment import Batch, plain
from defectlab.data.detection import DetectionData
from defectlab.metrics.detection import unpack
from defectlab.networks.torchvision_detectors import LEAST_SSD_SIZE, RATES, TorchvisionSettings, build_torchvision
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.runs import OutOfTime
from defectlab.training import torchvision_detectors
from defectlab.training.recipe import augmentation_of
from defectlab.training.torchvision_detectors import predict_torchvision, run_torchvision, to_targets, torchvision_loss

TOY = TorchvisionSettings(dataset="toy", size=64, epochs=3, batch=4, learning_rate=0.1)


@pytest.fixture
def small_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same detectors on thin backbones, so that a forward pass takes a fraction of a second."""
    for module in (faster_rcnn, retinanet, fcos):
        monkeypatch.setattr(
            module, "resnet50", lambda weights, progress, **options: ResNet(Bottleneck, [1, 1, 1, 1], **options)
        )
    thin = [8, 8, "M", 8, 8, "M", 8, 8, 8, "M", 8, 8, 512, "M", 8, 8, 512, "M"]
    monkeypatch.setattr(ssd, "vgg16", lambda weights, progress: SimpleNamespace(features=make_layers(thin)))


def test_targets_by_hand() -> None:
    boxes = torch.tensor([[[1.0, 2, 3, 4], [5, 6, 7, 8]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    first, second = to_targets(boxes, torch.tensor([[0, 5], [-1, -1]]))
    assert first["boxes"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]] and first["labels"].tolist() == [1, 6]
    assert second["boxes"].shape == (0, 4) and second["labels"].shape == (0,)


class SameInAllImages(nn.Module):
    """A detector that finds the same in every image."""

    def __init__(self, boxes: list[list[float]], labels: list[int]):
        super().__init__()
        self.boxes, self.labels, self.seen = torch.tensor(boxes), torch.tensor(labels), []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        self.seen += images
        scores = torch.linspace(0.9, 0.1, len(self.labels))
        return [{"boxes": self.boxes, "labels": self.labels, "scores": scores} for _ in images]


def test_predictions_come_back_to_the_original_images() -> None:
    split = toy_split(3, 0, 64)
    split = replace(
        split,
        scale=torch.tensor([1.0, 2.0, 0.5]),
        offset=torch.tensor([[0.0, 0.0], [4.0, 8.0], [0.0, 16.0]]),
        sizes=torch.tensor([[64, 64], [20, 25], [64, 128]]),
    )
    model = SameInAllImages([[10.0, 20, 30, 60], [0, 0, 5, 5], [-5, 2, 70, 40]], [2, 0, 1])
    same, enlarged, shrunk = predict_torchvision(model, split, batch=2)
    assert [p["labels"].tolist() for p in (same, enlarged, shrunk)] == [[1, 0]] * 3  # background is left out
    torch.testing.assert_close(same["scores"], torch.tensor([0.9, 0.1]))
    assert same["boxes"].tolist() == [[10, 20, 30, 60], [0, 2, 64, 40]]
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
    labels[1] = -1  # augmentation may leave an image without a box
    batch = Batch(plain(split.images, torch.arange(2)), split.boxes, labels, torch.eye(3), torch.zeros(2, 4))
    with torch.no_grad():
        scalars = torchvision_loss(model.train())(batch)
    assert next(iter(scalars)) == "loss" and len(scalars) >= 3
    assert all(value.isfinite() for value in scalars.values())
    torch.testing.assert_close(scalars["loss"], sum(value for name, value in scalars.items() if name != "loss"))
    for found in predict_torchvision(model.eval(), split):
        assert 0 < len(found["boxes"]) <= 300 and set(found["labels"].tolist()) <= {0, 1}
        assert found["boxes"].min() >= 0 and found["boxes"].max() <= size and found["scores"].min() >= 0.001


def test_the_recipe() -> None:
    recipe = TorchvisionSettings(architecture="retinanet").recipe
    assert (recipe.learning_rate, recipe.momentum, recipe.weight_decay, recipe.optimizer) == (0.01, 0.9, 0.0001, "sgd")
    assert (recipe.size, recipe.epochs, recipe.batch, recipe.precision) == (512, 100, 16, "fp32")
    drawn = augmentation_of(recipe)
    assert (drawn.mosaic, drawn.flip_left_right, drawn.flip_up_down, drawn.scale) == (0, 0.5, 0.5, 0.5)
    changed = TorchvisionSettings(architecture="ssd", learning_rate=0.5, flip_up_down=0.0, epochs=7).recipe
    assert (changed.learning_rate, augmentation_of(changed).flip_up_down, changed.epochs) == (0.5, 0.0, 7)


def test_the_recipe_can_be_that_of_the_yolo_detectors() -> None:
    """So that only the head differs; what belongs to the network alone is no part of the recipe."""
    wanted = DetectorSettings(size=224, epochs=30, batch=16, optimizer="adamw", learning_rate=0.001, precision="fp32")
    shared = {"momentum": 0.937, "weight_decay": 0.0005, "mosaic": 1.0, "flip_up_down": 0.0, "learning_rate": 0.001}
    own = {"size": 224, "epochs": 30, "optimizer": "adamw", "backbone": "v8n", "anchors": "kmeans", "hard_examples": 8}
    assert TorchvisionSettings(**shared, **own).recipe == wanted


class Oracle(nn.Module):
    """Knows the boxes of plain images; what it learns is how many boxes an augmented image has."""

    def __init__(self, data: DetectionData):
        super().__init__()
        self.count = nn.Parameter(torch.zeros(()))
        self.answers = []
        for split in (data.dev, data.test):
            targets = to_targets(split.boxes, split.labels)
            self.answers += list(zip(plain(split.images, torch.arange(len(split))), targets, strict=True))

    def answer(self, image: Tensor) -> dict[str, Tensor]:
        known = [target for known, target in self.answers if torch.equal(known, image)]
        target = known[0] if known else {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        return target | {"scores": torch.full((len(target["labels"]),), 0.75)}

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if not self.training:
            return [self.answer(image) for image in images]
        off = torch.stack([self.count - len(target["labels"]) for target in targets])
        return {"square": off.square().mean(), "absolute": off.abs().mean()}


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> DetectionData:
    """The toy set, on which `run_torchvision` now trains the oracle."""
    data = toy_data()
    monkeypatch.setattr(torchvision_detectors, "build_torchvision", lambda settings, classes, anchors: Oracle(data))
    return data


def test_an_oracle_gets_everything_right(oracle: DetectionData) -> None:
    result = run_torchvision(TOY, 0, oracle, quiet())
    assert {result.metrics[name] for name in ("map50", "map50_95", "map33", "precision_dev", "recall_dev")} == {100.0}
    assert set(result.per_class) == set(CLASSES) and result.per_class["ellipse"]["map50"] == 100.0
    assert result.dev["threshold"] == 0.75 and result.dev["map50"] == 100.0
    assert set(result.curve) == {"loss", "square", "absolute", "probe_epoch", "dev_map50", "dev_map50_95"}
    for loss, square, absolute in zip(*(result.curve[name] for name in ("loss", "square", "absolute")), strict=True):
        assert loss == pytest.approx(square + absolute, abs=1e-5)
    assert result.curve["loss"][-1] < result.curve["loss"][0] and result.curve["dev_map50"] == [100.0] * 3
    predictions, ground_truth, names, class_names = unpack(result.predictions)
    assert names == oracle.test.names and class_names == CLASSES
    assert all(torch.equal(p["labels"], t["labels"]) for p, t in zip(predictions, ground_truth, strict=True))
    assert len(result.predictions["case_index"]) == len(result.predictions["case_images"]) > 0
    assert result.model.keys() == {"count"} and result.precision == "fp32"


def test_an_interrupted_training_goes_on(oracle: DetectionData, tmp_path: Path) -> None:
    whole = run_torchvision(TOY, 0, oracle, quiet())
    path = tmp_path / "half.safetensors"
    for _ in range(TOY.epochs - 1):
        with pytest.raises(OutOfTime):
            run_torchvision(TOY, 0, oracle, quiet(checkpoint=path, deadline=time.monotonic() - 1))
    parts = run_torchvision(TOY, 0, oracle, quiet(checkpoint=path))
    assert torch.equal(whole.model["count"], parts.model["count"]) and whole.curve == parts.curve
    other = run_torchvision(TOY, 1, oracle, quiet())
    assert other.curve["loss"] != whole.curve["loss"]


def test_one_architecture_from_end_to_end(small_backbones: None) -> None:
    data = toy_data(counts=(4, 2, 2))
    result = run_torchvision(replace(TOY, architecture="fcos", epochs=1, batch=2), 0, data, quiet())
    assert set(result.curve) >= {"loss", "classification", "bbox_regression", "bbox_ctrness", "dev_map50"}
    assert 0 <= result.metrics["map50"] <= 100 and set(result.per_class) == set(CLASSES)
    assert 5 < result.costs["parameters_m"] < 30 and result.costs["gflops"] > 1
    assert result.costs["train_images_per_second"] > 0
    assert "head.classification_head.cls_logits.weight" in result.model
    assert result.notes == {"costs": "at 64 px, not fused, with decoding and suppression"}
