"""Boxes around the nut, cutting them out, pasting maps back; images to maps; a run of both stages."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from toy_runs import quiet

from defectlab.data.anomaly import AnomalyData, AnomalySplit
from defectlab.data.masks import PAPER_LIST
from defectlab.papers.amam_kd import DistillationSettings, TwoStage, TwoStageSettings, segmentation
from defectlab.papers.amam_kd.two_stage import cut, paste_back, square_boxes
from defectlab.runs import Result
from defectlab.training import amam_kd as training
from defectlab.training.amam_kd import cut_split, outside, run_distillation, run_two_stage


def rectangle(top: int, left: int, bottom: int, right: int, side: int = 100) -> torch.Tensor:
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[0, top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "margin", "expected"),
    [
        (rectangle(20, 30, 60, 50), 0.0, [0.2, 0.2, 0.6, 0.6]),  # 40 high, 20 wide: a square of 40 around (40, 40)
        (rectangle(40, 40, 60, 60), 0.1, [0.38, 0.38, 0.62, 0.62]),  # the margin on each side
        (rectangle(0, 70, 40, 100), 0.0, [0.6, 0.0, 1.0, 0.4]),  # moved inside, of the same size
        (rectangle(50, 50, 80, 80) | rectangle(0, 0, 5, 5), 0.0, [0.5, 0.5, 0.8, 0.8]),  # the largest component
        (rectangle(0, 0, 0, 0), 0.05, [0.0, 0.0, 1.0, 1.0]),  # nothing found
        (rectangle(1, 0, 99, 40), 0.05, [0.0, 0.0, 1.0, 1.0]),  # the square does not fit
    ],
)
def test_the_box_is_a_square_around_the_largest_component(mask: Tensor, margin: float, expected: list[float]) -> None:
    assert square_boxes(mask, margin)[0].tolist() == pytest.approx(expected)


def test_cutting_takes_the_pixels_of_the_box() -> None:
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    found = cut(images, torch.tensor([[0.25, 0.5, 0.75, 1.0]]), 4, InterpolationMode.NEAREST_EXACT)
    assert torch.equal(found, images[:, :, 4:8, 2:6])


def test_a_pasted_map_lies_where_it_was_cut() -> None:
    box = torch.tensor([[0.25, 0.5, 0.75, 1.0]], dtype=torch.float64)  # columns 64..192, rows 128..256 of 256
    whole = torch.rand(1, 256, 256, generator=torch.Generator().manual_seed(0))
    pasted = paste_back(whole[:, 128:, 64:192], box, fill=-1.0)
    torch.testing.assert_close(pasted[:, 128:, 64:192], whole[:, 128:, 64:192], rtol=0, atol=1e-5)
    assert (pasted[:, :128] == -1).all() and (pasted[:, :, :64] == -1).all() and (pasted[:, :, 192:] == -1).all()
    uncut = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(paste_back(whole, uncut, -1.0), whole, rtol=0, atol=1e-5)
    ramp = torch.linspace(0, 1, 64).expand(1, 64, 64)  # of another size: interpolated
    row = paste_back(ramp, torch.tensor([[0.0, 0.0, 0.5, 0.5]]), 0.0)[0, 0, :128]
    assert row[0] < 0.01 and row[-1] > 0.99 and (row[1:] >= row[:-1]).all()


def split_of_two() -> AnomalySplit:
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    masks = torch.zeros(2, 256, 256, dtype=torch.uint8)
    masks[0, 100:120, 100:120] = 1  # inside the box
    masks[1, :10, :10] = 1  # outside
    labels = torch.ones(2, dtype=torch.uint8)
    return AnomalySplit(images, masks, labels, labels, torch.tensor([True, True]), ("a", "b"), ((64, 64),) * 2)


BOXES = torch.tensor([[0.25, 0.25, 0.75, 0.75]], dtype=torch.float64).expand(2, 4)


def test_a_cut_split_keeps_masks_with_their_images() -> None:
    cropped = cut_split(split_of_two(), BOXES, 32)
    assert cropped.images.shape == (2, 3, 32, 32)
    assert cropped.masks.shape == (2, 256, 256)
    assert cropped.masks[0, 72:112, 72:112].all() and cropped.masks[0].sum() == 40 * 40  # twice as large
    assert cropped.has_mask.tolist() == [True, False]
    normal = replace(split_of_two(), labels=torch.zeros(2, dtype=torch.uint8))
    assert cut_split(normal, BOXES, 32).has_mask.tolist() == [True, True]  # normals have none, and count


def test_the_share_of_defect_pixels_cut_off() -> None:
    assert outside(split_of_two().masks, BOXES) == pytest.approx(100 / 500)


DETECTOR = DistillationSettings(teacher="resnet18_random", size=64, epochs=1, batch=4, vit_depth=1, precision="fp32")
SEGMENTER = segmentation.Settings(encoder="resnet18_random", size=32, precision="fp32")
SETTINGS = TwoStageSettings(SEGMENTER, DETECTOR, source=64)


def nuts(good: int, bad: int, seed: int) -> AnomalySplit:
    """Images of 64 px: a grey square of 32 px on black. A bad one has a white spot of 4 px in the square's middle,
    the last bad one in the image's upper left corner, where no square reaches."""
    generator = torch.Generator().manual_seed(seed)
    count = good + bad
    images = torch.zeros(count, 3, 64, 64, dtype=torch.uint8)
    masks = torch.zeros(count, 256, 256, dtype=torch.uint8)
    for i in range(count):
        top, left = (8 + 2 * torch.randint(0, 8, (2,), generator=generator)).tolist()
        images[i, :, top : top + 32, left : left + 32] = torch.randint(
            90, 130, (32, 32), dtype=torch.uint8, generator=generator
        )
        if i >= good:
            y, x = (0, 0) if bad and i == count - 1 else (top + 14, left + 14)
            images[i, :, y : y + 4, x : x + 4] = 255
            masks[i, 4 * y : 4 * y + 16, 4 * x : 4 * x + 16] = 1
    labels = (torch.arange(count) >= good).to(torch.uint8)
    has_mask = torch.ones(count, dtype=torch.bool)
    return AnomalySplit(images, masks, labels, labels, has_mask, tuple(map(str, range(count))), ((64, 64),) * count)


def data() -> AnomalyData:
    return AnomalyData("nuts", "nuts", ("good", "spot"), nuts(8, 0, 0), nuts(3, 3, 1), nuts(4, 3, 2), "two stages")


class Brightness(nn.Module):
    """In place of a segmenter: what is brighter than `level` is nut."""

    def __init__(self, level: float):
        super().__init__()
        self.level = level

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(1) - self.level


def test_images_become_maps_of_the_whole_images_by_the_crop_of_the_nut() -> None:
    both, images = TwoStage(SETTINGS, fill=-1.0), nuts(0, 3, 0).images
    assert both(images).shape == (3, 256, 256)
    both.segmenter = Brightness(45)
    boxes = both.boxes(images)
    assert (boxes[:, 2] - boxes[:, 0]).tolist() == pytest.approx([0.55] * 3)  # 16 of 32 px, and 5 % on each side
    expected = paste_back(both.detector(cut(images, boxes, 64, InterpolationMode.BILINEAR)), boxes, -1.0)
    torch.testing.assert_close(both(images), expected)
    assert (both(images) == -1).float().mean().item() == pytest.approx(1 - 0.55**2, abs=0.01)


def run_with(level: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Result, list[tuple[Any, int]]]:
    """The result with this segmenter, and the rows that were asked for before."""
    required = []

    def require(settings: Any, seed: int) -> SimpleNamespace:
        required.append((settings, seed))
        return SimpleNamespace(key="stage one", model_sha256="0123", dev={"threshold": 0.5})

    monkeypatch.setattr(training, "frozen", lambda *_: Brightness(level))
    return run_two_stage(SETTINGS, 3, data(), quiet(require=require)), required


def test_without_a_nut_two_stages_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = run_with(300, monkeypatch)
    alone = run_distillation(DETECTOR, 3, data(), quiet())
    assert result.notes["boxes"].startswith("21 of 21 ")  # 8 + 6 + 7
    assert result.metrics["crop_share"] == 100
    for metric, value in alone.metrics.items():
        assert result.metrics[metric] == pytest.approx(value, abs=0.05), metric
    for metric in ("image_auroc", "pixel_auroc", "aupro"):
        assert result.metrics[f"{metric}_crop"] == pytest.approx(result.metrics[metric], abs=0.05)
    assert result.predictions["scores"] == pytest.approx(alone.predictions["scores"], abs=1e-4)


def test_a_run_cuts_the_nut_says_what_it_cut_off_and_calls_that_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = {}, training.result_of

    def keep(student: Any, data: AnomalyData, dev_maps: Tensor, test_maps: Tensor) -> Result:
        seen["maps"] = dev_maps, test_maps
        return original(student, data, dev_maps, test_maps)

    monkeypatch.setattr(training, "result_of", keep)
    result, required = run_with(45, monkeypatch)
    assert required == [(SETTINGS.segmenter, 3)]  # stage one first, with the same seed
    assert result.metrics["crop_share"] == pytest.approx(100 * 0.55**2)
    assert result.notes["boxes"].startswith("0 of 21 ")
    assert result.notes["outside"].startswith("33.333 %")  # one spot of three
    assert (result.notes["segmenter"], result.notes["segmenter_sha256"]) == ("stage one", "0123")
    assert {"image_auroc", "pixel_auroc", "aupro", "image_auroc_crop", "pixel_auroc_crop"} <= result.metrics.keys()
    assert result.predictions["scores"].shape == (7,)
    TwoStage(SETTINGS).detector.network.load_state_dict(result.model)  # the segmenter has a record of its own

    dev, test = seen["maps"]
    assert test.shape == (7, 256, 256)
    assert (test == dev.min()).float().mean(dim=(1, 2)).tolist() == pytest.approx([1 - 0.55**2] * 7, abs=0.01)
    assert (test[-1, :16, :16] == dev.min()).all()  # a defect there cannot be found
    assert result.metrics["pixel_auroc"] < 100


def test_a_list_of_the_papers_sizes_has_most_test_images_in_its_training_part() -> None:
    lines = [line.split() for line in PAPER_LIST.read_text().splitlines() if not line.startswith("#")]
    tested = [part for name, part in lines if name.startswith("test/")]
    assert (len(lines), len(tested)) == (335, 115)
    assert tested.count("train") >= len(tested) - 33 - 34  # whatever the list
    assert tested.count("train") == 94
