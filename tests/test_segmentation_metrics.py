"""Metrics of segmentation: by hand, against numpy and torchmetrics, and again from a record's arrays."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, BinaryJaccardIndex

from defectlab.metrics.segmentation import METRICS, OF_IMAGES, best_threshold, segmentation_metrics, statistic
from defectlab.verdicts.measured import image_statistic

TYPES = ("good", "bent", "flip")


def random_case(seed: int = 0, size: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six noisy maps, two of them with an empty mask."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(6, size, size, dtype=torch.uint8)
    for i in range(2, 6):
        masks[i, 3 : 6 + 2 * i, 5 : 8 + i] = 1
    noise = torch.rand(masks.shape, generator=generator)
    return (0.6 * masks + 0.55 * noise).clamp(0, 1), masks, torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.uint8)


def test_two_images_by_hand() -> None:
    """4 x 4: the first has 4 pixels of which 3 are found, and 1 more; the second is empty, and 2 are found."""
    masks, found = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    masks[0, 0] = 1
    found[0, 0, :3] = found[0, 1, 0] = found[1, 2, :2] = 0.75
    result = segmentation_metrics(found, masks, [1, 0], TYPES, 0.5)
    assert [result.images[k].tolist() for k in ("tp", "fp", "fn", "tn")] == [[3, 0], [1, 2], [1, 0], [11, 14]]
    assert result.images["nonempty"].tolist() == [True, False]
    expected = {
        "iou": 3 / 7,
        "miou": (3 / 7 + 25 / 29) / 2,
        "dice": 6 / 10,
        "accuracy": 28 / 32,
        "mae": ((3 * 0.25 + 1 + 0.75) / 16 + 2 * 0.75 / 16) / 2,
        "dice_nonempty": 6 / 8,
        "mae_nonempty": (3 * 0.25 + 1 + 0.75) / 16,
    }
    for metric, value in expected.items():
        assert result.overall[metric] == pytest.approx(100 * value), metric
    assert set(result.per_class) == {"good", "bent"}  # of the types that are there
    assert result.per_class["bent"]["iou"] == pytest.approx(100 * 3 / 5)
    assert result.per_class["good"]["iou"] == 0 and result.per_class["good"]["accuracy"] == pytest.approx(100 * 14 / 16)


def test_perfect_prediction() -> None:
    _, masks, types = random_case()
    overall = segmentation_metrics(masks[2:].float(), masks[2:], types[2:], TYPES, 0.5).overall
    best = dict.fromkeys(METRICS, 100.0) | {"mae": 0.0, "mae_nonempty": 0.0}
    pixels = masks[0].numel()
    best["e_measure"] = best["e_measure_nonempty"] = 100 * (255 + 0.25) / 256 * pixels / (pixels - 1)
    assert overall == pytest.approx(best)


def test_empty_masks() -> None:
    """What the docstring says of pysodmetrics, for a map of zeros and for one of 0.2."""
    maps = torch.stack([torch.zeros(8, 8), torch.full((8, 8), 0.2)])
    result = segmentation_metrics(maps, torch.zeros(2, 8, 8), [0, 0], TYPES, 0.5)
    assert result.images["weighted_f"].tolist() == [0, 0]
    assert result.images["s_measure"] == pytest.approx([100, 80])
    assert result.images["mae"] == pytest.approx([0, 20])
    below = np.array([255, 256 - 52]) / 256  # 0.2 is 51/255: the thresholds 0 to 51 let it through
    assert result.images["e_measure"] == pytest.approx(100 * below * 64 / 63)
    assert result.overall["accuracy"] == 100
    undefined = {name for name, value in result.overall.items() if math.isnan(value)}
    assert undefined == {"iou", "dice", "miou"} | {name for name in METRICS if name.endswith("_nonempty")}


def test_maps_are_not_stretched() -> None:
    """With min-max normalisation a faint map would be as good as a strong one."""
    _, masks, types = (part[2:] for part in random_case())
    faint, strong = (segmentation_metrics(k * masks.float(), masks, types, TYPES, 0.2).overall for k in (0.3, 0.9))
    assert faint["iou"] == strong["iou"] == 100
    for metric in ("weighted_f", "s_measure", "e_measure"):
        assert faint[metric] < strong[metric] - 10, metric


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_against_numpy_and_torchmetrics(threshold: float) -> None:
    maps, masks, types = random_case()
    overall = segmentation_metrics(maps, masks, types, TYPES, threshold).overall
    found, truth = maps.numpy() > threshold, masks.numpy() > 0
    iou, back = (((a & b).sum() / (a | b).sum()) for a, b in ((found, truth), (~found, ~truth)))
    assert overall["miou"] == pytest.approx(50 * (iou + back))
    for metric, library in (("iou", BinaryJaccardIndex), ("dice", BinaryF1Score), ("accuracy", BinaryAccuracy)):
        assert overall[metric] == pytest.approx(100 * library(threshold)(maps, masks).item(), abs=1e-3), metric
    assert overall["mae"] == pytest.approx(100 * np.abs(maps.numpy() - truth).mean(), abs=1e-4)
    each = [2 * (f & t).sum() / (f.sum() + t.sum()) for f, t in zip(found[2:], truth[2:], strict=True)]
    assert overall["dice_nonempty"] == pytest.approx(100 * np.mean(each))
    for metric in OF_IMAGES:
        assert overall[metric] != overall[f"{metric}_nonempty"]


def test_statistic_gives_overall_and_per_class_again_and_a_weight_of_two_is_the_image_twice() -> None:
    maps, masks, types = random_case()
    result = segmentation_metrics(maps, masks, types, TYPES, 0.5)
    twice = torch.tensor([0, 1, 3, 3, 5])
    doubled = segmentation_metrics(maps[twice], masks[twice], types[twice], TYPES, 0.5).overall
    bent, ones = (types == 1).numpy().astype(int), np.ones(6)
    arrays = {f"image_{name}": values for name, values in result.images.items()}
    record = SimpleNamespace(arrays=arrays | {"types": types.numpy(), "type_names": np.array(TYPES)})
    for metric in METRICS:
        of_record, of_type = statistic(arrays, metric), pytest.approx(result.per_class["bent"][metric])
        assert of_record(ones) == image_statistic(record, metric)(ones) == result.overall[metric], metric
        assert of_record(bent) == of_type == image_statistic(record, metric, ["bent"])(ones), metric
        assert of_record(np.array([1, 1, 0, 2, 0, 1])) == pytest.approx(doubled[metric]), metric
    assert result.overall["iou"] != result.per_class["bent"]["iou"]


def test_best_threshold() -> None:
    masks = torch.zeros(1, 4, 4)
    masks[0, :2] = 1
    maps = torch.full((1, 4, 4), 0.31)
    maps[0, :2] = 0.37  # only 0.35 parts them
    assert best_threshold(maps, masks) == 0.35
    assert best_threshold(masks, masks) == 0.5  # all part them: the middle one
    assert best_threshold(maps, torch.zeros(1, 4, 4)) == 0.5


def test_bad_input() -> None:
    maps, masks, types = random_case()
    with pytest.raises(ValueError, match=r"must both be \(N, H, W\).*\(6, 24, 24\), \(5, 24, 24\) and 6 types"):
        segmentation_metrics(maps, masks[:5], types, TYPES, 0.5)
    for wrong in (maps * 3, maps - 0.5, maps / 0):
        with pytest.raises(ValueError, match=r"must lie in 0\.\.1: give the sigmoid"):
            segmentation_metrics(wrong, masks, types, TYPES, 0.5)
    with pytest.raises(ValueError, match="unknown segmentation metric 'map50': use one of miou"):
        statistic({}, "map50")
