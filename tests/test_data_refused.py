"""What the loaders of all sets refuse alike: unknown sets, sets that are not there, other words and sizes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from defectlab.data.anomaly import load_anomaly
from defectlab.data.detection import load_detection
from defectlab.data.instances import load_instances
from defectlab.data.masks import METAL_NUT, SegmentationData, load_segmentation
from defectlab.files import DataError


def load_nuts(name: str, size: int, **options) -> SegmentationData:
    return load_segmentation(name, "nut", "paper", size, **options)


REFUSED = [
    *(
        (load_anomaly, name, rf"there is no anomaly set '{name}': choose magnetic_tile, .*metal_nut")
        for name in ("magnetic_tiles", "mvtec_ad/teapot", "mvtec_ad", "../x")
    ),
    (load_detection, "neu", "there is no detection set 'neu': choose one of neu_det"),
    (load_nuts, "mvtec_ad/bottle", "no segmentation set 'mvtec_ad/bottle': choose mvtec_ad/metal_nut or synthetic"),
    (load_instances, "neu_det", "no set with masks called 'neu_det'"),
    # known, and not there
    (load_anomaly, "magnetic_tile", r"magnetic_tile does not exist: run `python data_scripts/magnetic_tile\.py`"),
    (load_anomaly, "mvtec_ad/pill", r"pill does not exist: run `python data_scripts/mvtec_ad\.py --category pill`"),
    (load_detection, "neu_det", r"does not exist: run `python data_scripts/neu_det\.py --archive FILE`"),
    (load_nuts, METAL_NUT, r"metal_nut does not exist: run `python data_scripts/mvtec_ad\.py --category"),
    (load_instances, "neu_seg", r"run `python data_scripts/neu_seg\.py --archive FILE`"),
]
SYNTHETIC = [
    (load_anomaly, "synthetic_tile"),
    (load_detection, "synthetic_board"),
    (load_nuts, "synthetic_nut"),
    (load_instances, "synthetic_steel_masks"),
]


@pytest.mark.parametrize(("load", "name", "message"), REFUSED)
def test_unknown_sets_and_sets_that_are_not_there(load: Callable, name: str, message: str, synthetic: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(name, 32, root=synthetic)


@pytest.mark.parametrize(("load", "name"), SYNTHETIC)
def test_a_size_below_one_pixel(load: Callable, name: str, synthetic: Path) -> None:
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        load(name, 0, root=synthetic)


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
