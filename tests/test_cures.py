"""Fluttering cloth, a second sensor, a template: what is done to images, the networks, their rows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import quiet, runs_of

from defectlab.data.anomaly import AnomalyData, load_anomaly
from defectlab.data.detection import DetectionData, load_detection
from defectlab.data.frames import FrameData, load_frames
from defectlab.metrics.detection import located_statistic
from defectlab.networks.second_sensor import INPUTS, SensorNet, SensorSettings, levelled, standardised
from defectlab.studies import cures as study
from defectlab.training.flutter import fluttered, in_motion, middle, run_flutter
from defectlab.training.second_sensor import (
    LateSettings,
    ThresholdSettings,
    drawn,
    run_late,
    run_sensor,
    run_threshold,
    shifted,
)
from defectlab.training.template import DifferenceSettings, regions, run_difference, widened

SMALL = study.SENSOR["smoke"]


# --- Flutter ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cloth(synthetic: Path) -> AnomalyData:
    return load_anomaly("synthetic_fabric", 128, root=synthetic)


def test_image_and_mask_move_together() -> None:
    images = torch.full((6, 3, 64, 64), 40, dtype=torch.uint8)
    masks = torch.zeros(6, 128, 128, dtype=torch.uint8)
    images[:, :, 12:24, 36:48], masks[:, 24:48, 72:96] = 220, 1
    moved, marked = fluttered(images, masks, torch.Generator().manual_seed(0))
    bright = torch.nn.functional.interpolate((moved[:, :1] > 130).float(), (128, 128))[:, 0] > 0
    both, either = ((bright & (marked > 0)).sum(), (bright | (marked > 0)).sum())
    assert both / either > 0.8 and not torch.equal(marked[0], marked[1])
    assert moved.dtype == marked.dtype == torch.uint8 and moved.float().mean() == pytest.approx(46.3, abs=2)
    again = fluttered(images, masks, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again[0]) and torch.equal(marked, again[1])


def test_nothing_from_beyond_the_edge_is_in_the_middle(cloth: AnomalyData) -> None:
    """White tiles with a black rim, which would be mirrored into the image: in the middle nothing of it is seen."""
    split = cloth.train
    images = torch.full((len(split), 3, 256, 256), 255, dtype=torch.uint8)
    images[..., :1, :] = images[..., -1:, :] = images[..., :1] = images[..., -1:] = 0
    moved, _ = fluttered(images, split.masks, torch.Generator().manual_seed(5))
    assert moved.amin() < 128 and middle(replace(split, images=moved), 192).images.amin() > 250


def test_what_flutters_is_what_the_row_says(cloth: AnomalyData) -> None:
    base = study.FLUTTER["smoke"]
    plain, moved = (in_motion(cloth, replace(base, fluttering=f), 0) for f in (False, True))
    assert plain.test.images.shape[-1] == 96 and plain.test.names == moved.test.names
    assert torch.equal(moved.train.images, plain.train.images) and torch.equal(moved.dev.images, plain.dev.images)
    assert not torch.equal(moved.test.images, plain.test.images) and plain.test.has_mask.all()
    assert 0 < len(plain.test) <= len(cloth.test) and plain.test.labels.unique().tolist() == [0, 1]
    other = in_motion(cloth, replace(base, augmented=True), 7)
    assert torch.equal(other.test.images, moved.test.images)  # whatever the seed
    count = len(plain.train)
    assert len(other.train) == 3 * count and torch.equal(other.train.images[:count], plain.train.images)
    assert other.train.labels.sum() == 0


def test_a_flutter_row_counts_at_the_threshold_of_flat_cloth(cloth: AnomalyData) -> None:
    result = run_flutter(study.FLUTTER["smoke"], 0, cloth, quiet())
    arrays, threshold = result.predictions, result.dev["threshold_flat"]
    good = arrays["dev_scores"][arrays["dev_labels"] == 0]
    assert (good >= threshold).sum() == 1  # of few held-out ones, the highest
    false = 100 * np.mean(arrays["scores"][arrays["labels"] == 0] >= threshold)
    assert result.metrics["false_alarms"] == pytest.approx(false, abs=1e-3)
    assert 0 <= result.metrics["found_small"] <= 100


# --- A second sensor -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def road(synthetic: Path) -> FrameData:
    return load_frames("synthetic_road", "session_2", root=synthetic)


def test_the_synthetic_road_deceives_the_camera_and_not_the_depth(road: FrameData) -> None:
    assert [len(getattr(road, part)) for part in ("train", "dev", "test")] == [25, 3, 27]
    assert road.test.images.shape == (27, 3, 64, 96) and road.test.depth.max() <= 1023
    assert (road.test.masks.amax((1, 2)) == 1).all() and (road.test.depth == 0).any()
    grey, depth = (
        run_threshold(ThresholdSettings("synthetic_road", inputs=inputs), 0, road, quiet()).metrics["iou"]
        for inputs in ("grey", "depth")
    )
    assert depth > 50 > grey + 15


def test_depth_is_levelled_and_unknown_places_are_road() -> None:
    depth = torch.full((3, 1, 4, 6), 500, dtype=torch.int16)
    depth[0, 0, 1, 1], depth[0, 0, 2, 2], depth[2] = 420, 0, 0
    found = levelled(depth)
    assert found[0, 0, 1, 1] == -2 and found[0, 0, 2, 2] == found[0, 0, 0, 0] == 0
    assert (found[1:] == 0).all()  # also where nothing is known
    assert levelled(torch.tensor([[[[1, 500, 500, 1000]]]])).flatten().tolist() == [-3, 0, 0, 3]
    image = standardised(torch.randint(0, 99, (2, 3, 32, 32), dtype=torch.uint8))
    assert image[0].mean().abs() < 1e-5 and image[1].std() == pytest.approx(1, abs=1e-3)


def test_shifted_depth() -> None:
    depth = torch.arange(1, 9).view(1, 1, 1, 8)
    assert shifted(depth, 3).flatten().tolist() == [0, 0, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("inputs", INPUTS)
def test_what_a_network_sees(inputs: str) -> None:
    torch.manual_seed(0)
    network = SensorNet(replace(SMALL, inputs=inputs)).eval()
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    depth = torch.randint(400, 700, (2, 1, 32, 48), dtype=torch.int16)
    with torch.no_grad():
        plain, no_depth = network(images, depth), network(images, torch.zeros_like(depth))
        other_colour = network(images.flip(-1), depth)
    assert plain.shape == (2, 32, 48)
    assert torch.equal(plain, no_depth) == (inputs in ("grey", "rgb"))
    assert torch.equal(plain, other_colour) == (inputs == "depth")


def test_a_network_learns_without_a_sensor_only_if_it_is_told_to(road: FrameData) -> None:
    """In training with dropout each image lacks its depth or its colour, or neither, by its draw."""
    network = SensorNet(replace(SMALL, inputs="dropout", missing=0.5)).eval()
    images, depth = road.train.images[:8], road.train.depth[:8]
    with torch.no_grad():
        whole, without, blind = (
            network(images, depth),
            network(images, torch.zeros_like(depth)),
            network(torch.full_like(images, 9), depth),
        )
        dropped = network(images, depth, torch.Generator().manual_seed(1))
    for one, *choices in zip(dropped, without, blind, strict=True):
        assert sum(torch.allclose(one, choice, atol=1e-5) for choice in choices) == 1
    assert torch.equal(network(images, depth), whole)
    with pytest.raises(ValueError, match="unknown inputs 'lidar'"):
        SensorNet(replace(SMALL, inputs="lidar"))


def test_frames_are_drawn_with_their_masks(road: FrameData) -> None:
    images, depth, masks = drawn(road.train, 16, torch.Generator().manual_seed(0))
    assert images.shape == (16, 3, 64, 96) and images.dtype == torch.uint8
    known = (depth[:, 0] > 0) & (masks > 0)
    road_too = (depth[:, 0] > 0) & (masks == 0)
    assert depth[:, 0][known].float().mean() < depth[:, 0][road_too].float().mean() - 20
    again = drawn(road.train, 16, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip((images, depth, masks), again, strict=True))


def test_depth_is_learnt_and_its_loss_is_seen(road: FrameData) -> None:
    settings = replace(SMALL, inputs="depth", draws=64, epochs=4, learning_rate=0.01)
    result = run_sensor(settings, 0, road, quiet())
    assert result.metrics["iou"] > 50 > result.metrics["iou_no_depth"]
    assert result.metrics["iou"] > result.metrics["iou_shift_8"] > result.metrics["iou_shift_16"]
    assert set(result.per_class) == {"dataset1", "dataset3"} and result.curve["loss"][0] > result.curve["loss"][-1]
    arrays = result.predictions
    counts = [arrays[f"image_{name}"].sum() for name in ("tp", "fp", "fn")]
    assert result.metrics["iou"] == pytest.approx(100 * counts[0] / sum(counts), abs=1e-3)
    assert arrays["case_images"].shape == (8, 64 * 160 // 96, 160, 3) and arrays["case_maps"].shape[0] == 8


def test_late_fusion_is_the_mean_of_two_finished_networks(road: FrameData, root: Path) -> None:
    of = {
        name: replace(SMALL, inputs=inputs, draws=48, learning_rate=0.01)
        for name, inputs in (("colour", "rgb"), ("depth", "depth"))
    }
    kinds = {SensorSettings: run_sensor, LateSettings: run_late}
    record = runs_of(lambda settings: kinds[type(settings)], lambda *_: road)(LateSettings(**of))
    assert record.notes["colour"].startswith("second_sensor-synthetic_road-smoke-s0")
    assert record.metrics["iou_no_depth"] != record.metrics["iou"] and not record.curve


def test_rows_of_cures() -> None:
    assert len({tuple(study.STUDY.rows[profile]) for profile in ("smoke", "quick", "paper")}) == 1
    rows = study.sensor_rows("quick")
    assert rows["net_late"].settings.depth == rows["net_depth"].settings
    assert rows["net_early"].settings.split == "session_2" != rows["net_early_other"].settings.split
    assert SensorSettings() == rows["net_early"].settings
    rows = study.board_rows("quick")
    assert rows["board_alone"].settings == replace(rows["board_template"].settings, dataset="deep_pcb", colours=True)


# --- A template ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def boards(synthetic: Path) -> DetectionData:
    return load_detection("synthetic_board_pair", 640, root=synthetic)


def test_what_differs_from_the_template_is_found_without_learning(boards: DetectionData) -> None:
    result = run_difference(DifferenceSettings("synthetic_board_pair"), 0, boards, quiet())
    assert result.notes["margin"] == "0 px" and not result.curve  # these boxes are exact
    assert result.metrics["f1_dev"] > 90 and result.metrics["recall_dev"] > 90
    assert located_statistic(result.predictions)(None) > 90
    assert "map50" not in result.metrics  # it names no type
    blind = replace(boards, test=replace(boards.test, images=0 * boards.test.images))
    assert run_difference(DifferenceSettings("synthetic_board_pair"), 0, blind, quiet()).metrics["recall_dev"] == 0


def test_regions_of_a_difference() -> None:
    plane = np.zeros((40, 40), np.uint8)
    plane[4:10, 6:12], plane[4:10, 15:20], plane[30, :], plane[20:30, 30:40] = 255, 200, 255, 127
    boxes, areas = regions(plane, 128, opening=3, closing=0)
    assert boxes.tolist() == [[6, 4, 12, 10], [15, 4, 20, 10]] and areas.tolist() == [36, 30]
    boxes, areas = regions(plane, 128, opening=3, closing=5)  # 3 px apart: one defect
    assert boxes.tolist() == [[6, 4, 20, 10]] and areas.tolist() == [84]
    assert len(regions(plane, 128, opening=1, closing=0)[0]) == 3 and regions(0 * plane, 128, 3, 9)[0].shape == (0, 4)
    (wide,) = widened([(torch.tensor([[2.0, 4, 30, 39]]), torch.ones(1))], torch.tensor([[40, 36]]), 3)
    assert wide["boxes"].tolist() == [[0, 1, 33, 40]]
