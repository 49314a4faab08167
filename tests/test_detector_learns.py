"""From a data set to predictions: the detector that fits the data, boxes in the original's pixels, a toy set learnt."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from toy_detection import CLASSES, SHORT, fit, toy_data, toy_split

from defectlab.metrics.detection import evaluate
from defectlab.networks.yolo.assignment import kmeans_anchors
from defectlab.networks.yolo.model import ANCHORS, Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.training.detection import fresh, predict

# --- Building, predicting --------------------------------------------------------------------------------------------


def test_anchors_from_coco_or_from_the_training_boxes() -> None:
    data = toy_data(96, (24, 2, 2))
    settings = replace(SHORT, family="v5", size=96)
    coco = fresh(build_detector, settings, data).anchors
    torch.testing.assert_close(coco, torch.tensor(ANCHORS, dtype=torch.float32) * 96 / 640)
    found = fresh(build_detector, replace(settings, anchors="kmeans"), data).anchors
    boxes = data.train.boxes[data.train.labels >= 0]
    sizes = boxes[:, 2:] - boxes[:, :2]
    assert torch.equal(found.view(9, 2), kmeans_anchors(sizes, 9, torch.Generator().manual_seed(0)))
    areas = found.prod(-1).flatten()
    assert torch.equal(areas, areas.sort().values)
    assert sizes.min() <= found.min() and found.max() <= sizes.max()  # none of the padding
    assert fresh(build_detector, replace(settings, family="v8"), data).class_count == 2


class Certain(nn.Module):
    """Says of every image: class 1, a box of (12, 20, 44, 36) px, and one that leaves the image."""

    family, class_count = "v8", 2

    def forward(self, images: Tensor) -> list[Tensor]:
        assert not self.training
        raw = [images.new_zeros(len(images), 64 + 2, 64 // s, 64 // s) for s in (8, 16, 32)]
        for level in raw:
            level[:, 64:] = -20.0
        # Stride 8, distances in strides of left, top, right, bottom from the cell's middle at (8 column + 4, 8 row + 4)
        for (row, column), distances, logit in (((3, 3), (2, 1, 2, 1), 3.0), ((1, 7), (1, 2, 5, 3), 1.0)):
            for side, distance in enumerate(distances):
                raw[0][:, 16 * side + distance, row, column] = 50.0
            raw[0][:, 65, row, column] = logit
        return raw


def test_predictions_are_in_pixels_of_images_that_are_not_square() -> None:
    """An image of 100 x 50 px scaled by 0.64 to 64 x 32 px, 16 px from above; and one of 32 x 64 px, 16 from left."""
    split = toy_split(2, 0, 64)
    sizes, offset = torch.tensor([[50, 100], [64, 32]]), torch.tensor([[0.0, 16.0], [16.0, 0.0]])
    split = replace(split, sizes=sizes, scale=torch.tensor([0.64, 1.0]), offset=offset)
    wide, high = predict(Certain(), split, confidence=0.3)
    scores = torch.tensor([3.0, 1.0]).sigmoid()
    for found in (wide, high):
        assert found["labels"].tolist() == [1, 1]
        torch.testing.assert_close(found["scores"], scores)
    # The second box is (52, -4, 100, 36) px of the input.
    torch.testing.assert_close(wide["boxes"], torch.tensor([[18.75, 6.25, 68.75, 31.25], [81.25, 0, 100, 31.25]]))
    torch.testing.assert_close(high["boxes"], torch.tensor([[0.0, 20, 28, 36], [32, 0, 32, 36]]))
    assert [len(found["labels"]) for found in predict(Certain(), split, confidence=0.8)] == [1, 1]


def test_predictions_do_not_depend_on_the_batch_and_follow_other_images() -> None:
    torch.manual_seed(0)
    detector, split = Detector("v8", "t", 2), toy_split(5, 0, 64)
    together, apart = (predict(detector, split, batch=batch, confidence=1e-5) for batch in (5, 2))
    assert len(together) == len(apart) == 5
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-7)
    turned = predict(detector, split, split.images.flip(0), confidence=1e-5)
    torch.testing.assert_close(turned[0]["scores"], together[4]["scores"], rtol=1e-4, atol=1e-7)
    assert detector.training  # what is looked through is a copy


# --- A toy set, learnt from scratch ----------------------------------------------------------------------------------

TOY = DetectorSettings(
    dataset="toy", scale="t", size=96, epochs=40, batch=8, optimizer="adamw", learning_rate=0.005, warm_up=1.0,
    average=0.98, average_ramp=20.0, mosaic=0.5, close_mosaic=20, zoom=0.2, precision="fp32",
)  # fmt: skip


# mAP50 of seeds 0 to 4, measured once on one thread of a CPU:
#   v8: 100.0, 100.0, 100.0, 100.0, 100.0
#   v5: 97.9, 93.4, 98.4, 98.7, 96.9
# An untrained detector has below 1. The limits lie below the worst seed, as other processors sum in another order.
@pytest.mark.parametrize(("family", "anchors", "limit"), [("v8", "coco", 95.0), ("v5", "kmeans", 85.0)])
def test_toy_set_is_learnt_from_scratch(family: str, anchors: str, limit: float) -> None:
    data = toy_data(96, (64, 2, 48))
    _, average, trained = fit(replace(TOY, family=family, anchors=anchors), data)
    metrics, per_class = evaluate(predict(average, data.test), data.test.ground_truth(), CLASSES)
    assert metrics["map50"] > limit
    assert min(values["map50"] for values in per_class.values()) > limit - 10
    assert trained.curve["loss"][-1] < 0.5 * trained.curve["loss"][0]
