"""What the loaders of all sets refuse alike: unknown sets, sets that are not there, other words and sizes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from defectlab.data.anomaly import load_anomaly
from defectlab.data.detection import load_detection
from defectlab.data.instances import load_instances
from defectlab.data.masks import METAL_NUT, load_segmentation
from defectlab.files import DataError

UNKNOWN = [
    *(
        (load_anomaly, (name,), rf"there is no anomaly set '{name}': choose magnetic_tile, .*metal_nut")
        for name in ("magnetic_tiles", "mvtec_ad/teapot", "mvtec_ad", "../x")
    ),
    (load_detection, ("neu",), "there is no detection set 'neu': choose one of neu_det"),
    (
        load_segmentation,
        ("mvtec_ad/bottle", "nut", "paper"),
        "no segmentation set 'mvtec_ad/bottle': choose mvtec_ad/metal_nut or synthetic",
    ),
    (load_instances, ("neu_det",), "no set with masks called 'neu_det'"),
]
NOT_THERE = [
    (load_anomaly, ("magnetic_tile",), r"magnetic_tile does not exist: run `python data_scripts/magnetic_tile\.py`"),
    (
        load_anomaly,
        ("mvtec_ad/bottle",),
        r"bottle does not exist: run `python data_scripts/mvtec_ad\.py --category bottle`",
    ),
    (load_detection, ("neu_det",), r"does not exist: run `python data_scripts/neu_det\.py`"),
    (
        load_segmentation,
        (METAL_NUT, "nut", "paper"),
        r"metal_nut does not exist: run `python data_scripts/mvtec_ad\.py --category",
    ),
    (load_instances, ("neu_seg",), r"run `python data_scripts/neu_seg\.py`"),
]
SYNTHETIC = [
    (load_anomaly, ("synthetic_tile",)),
    (load_detection, ("synthetic_board",)),
    (load_segmentation, ("synthetic_nut", "nut", "paper")),
    (load_instances, ("synthetic_steel_masks",)),
]


@pytest.mark.parametrize(("load", "arguments", "message"), UNKNOWN + NOT_THERE)
def test_unknown_sets_and_sets_that_are_not_there(load: Callable, arguments, message: str, synthetic: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(*arguments, 32, root=synthetic)


@pytest.mark.parametrize(("load", "arguments"), SYNTHETIC)
def test_a_size_below_one_pixel(load: Callable, arguments: tuple[str, ...], synthetic: Path) -> None:
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        load(*arguments, 0, root=synthetic)


@pytest.mark.parametrize(
    ("target", "split", "message"),
    [
        ("bore", "paper", "unknown target 'bore': use one of nut, defect"),
        ("nut", "random", "unknown split 'random': use one of paper, good"),
        ("defect", "good", "good images have no defect to learn from"),
    ],
)
def test_words_of_a_segmentation(target: str, split: str, message: str, synthetic: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_segmentation("synthetic_nut", target, split, 32, root=synthetic)
