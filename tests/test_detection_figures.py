"""Detection figures drawn from small records, and Grad-CAM++ against the paper's equation written out with autograd."""

import copy
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from figure_helpers import drawn, rectangles
from matplotlib.colors import to_hex
from torch.nn.functional import interpolate
from toy_detection import equal, toy_split

from defectlab.figures import detection as figures
from defectlab.metrics.detection import pack
from defectlab.networks.yolo.decode import decode
from defectlab.networks.yolo.model import Detector
from defectlab.runs import Record

CLASSES = ("crazing", "patches")


def listed(*entries):
    """(box, label) or (box, label, score) of one image -> what metrics and figures read."""
    columns = [torch.tensor(column) for column in zip(*entries, strict=True)]
    named = dict(zip(("boxes", "labels", "scores"), columns, strict=False))
    return named | {"boxes": named["boxes"].float()}


GROUND_TRUTH = [
    listed(([10, 10, 50, 50], 0), ([100, 100, 160, 180], 1)),
    listed(([20, 40, 80, 90], 1)),
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]
PREDICTIONS = [  # right, and below any threshold; right, and a false alarm; a false alarm
    listed(([12, 10, 50, 50], 0, 0.9), ([100, 100, 160, 180], 1, 0.1)),
    listed(([20, 40, 80, 90], 1, 0.8), ([150, 10, 190, 60], 0, 0.7)),
    listed(([5, 150, 60, 190], 0, 0.6)),
]
IMAGES = [np.full((200, 200), 90, dtype=np.uint8), np.full((200, 200, 3), 120, dtype=np.uint8)]


def record(folder, seed=0, lift=0.0):
    arrays = pack(PREDICTIONS, GROUND_TRUTH, ["group1/a", "group1/b", "group1/c"], CLASSES)
    arrays |= {
        "case_index": np.array([1, 0]),
        "case_why": np.array(["false alarm at 0.70", "1 of 2 missed"]),
        "case_images": np.stack([IMAGES[0][:100, :100]] * 2),
        "case_scale": np.array([0.5, 0.25], dtype=np.float32),
        "case_offset": np.array([[0.0, 0.0], [7.0, 3.0]], dtype=np.float32),
    }
    path = folder / f"run{seed}.npz"
    np.savez_compressed(path, key=path.stem, **arrays)
    per_class = {"crazing": {"map50": 40.0 + lift, "map50_95": 20.0}, "patches": {"map50": 90.0 + lift}}
    content = {"seed": seed, "metrics": {}, "per_class": per_class, "dev": {"threshold": 0.5}}
    return Record(content, path.with_suffix(".json"))


@pytest.fixture
def of_seeds(tmp_path):
    return [record(tmp_path, 0), record(tmp_path, 1, lift=4.0)]


def sides(patch):
    (x, y), width, height = patch.get_xy(), patch.get_width(), patch.get_height()
    return pytest.approx((x, y, x + width, y + height), abs=0.02)


def texts(axis):
    return [text.get_text() for text in axis.texts]


# --- Boxes -----------------------------------------------------------------------------------------------------------


def test_boxed_shows_ground_truth_and_the_predictions_above_the_threshold():
    figure = figures.boxed(IMAGES, GROUND_TRUTH[:2], PREDICTIONS[:2], ["first", "second"], CLASSES, columns=3)
    first, second, empty = drawn(figure)
    assert [axis.get_title() for axis in (first, second, empty)] == ["first", "second", ""]
    assert len(empty.images) == 0
    boxes = rectangles(first)
    assert [to_hex(patch.get_edgecolor()) for patch in boxes] == ["#ffffff", "#ffffff", figures.CLASS_COLOURS[0]]
    assert sides(boxes[0]) == (10, 10, 50, 50)
    assert sides(boxes[2]) == (12, 10, 50, 50)
    assert texts(first) == ["patches", "crazing 0.90"]  # what was missed has its name
    assert texts(second) == ["crazing 0.70", "patches 0.80"]  # the highest score last, on top
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ground truth", "crazing", "patches"]


def test_boxed_gives_ground_truth_alone_the_colour_of_its_class():
    for tags, names in ((True, ["crazing", "patches"]), (False, [])):
        figure = figures.boxed(IMAGES[:1], GROUND_TRUTH[:1], class_names=CLASSES, columns=1, tags=tags)
        (axis,) = drawn(figure)
        colours = [to_hex(patch.get_edgecolor()) for patch in rectangles(axis)]
        assert colours == [figures.CLASS_COLOURS[1], figures.CLASS_COLOURS[0]]
        assert sorted(texts(axis)) == names
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(CLASSES)
    (axis,) = drawn(figures.boxed(IMAGES[:1], columns=1))
    assert (len(axis.images), len(axis.patches)) == (1, 0)


def test_tags_stay_within_the_image():
    near_edges = [listed(([170, 0, 199, 30], 1, 0.9), ([0, 170, 20, 199], 0, 0.8))]
    figure = figures.boxed(IMAGES[:1], predictions=near_edges, class_names=CLASSES, columns=1, width=3)
    (axis,) = drawn(figure)
    frame = axis.get_window_extent()
    for text in axis.texts:
        place = text.get_window_extent()
        assert frame.x0 <= place.x0 + 1 and place.x1 <= frame.x1 + 1
        assert frame.y0 <= place.y0 + 1 and place.y1 <= frame.y1 + 1


def test_examples_are_drawn_in_pixels_of_the_small_image(tmp_path):
    first, second = drawn(figures.examples(record(tmp_path), columns=2))
    assert [axis.get_title() for axis in (first, second)] == ["b\nfalse alarm at 0.70", "a\n1 of 2 missed"]
    assert sides(rectangles(first)[0]) == (10, 20, 40, 45)
    truth, _, prediction = rectangles(second)  # * 0.25, then 7 to the right and 3 down
    assert sides(truth) == (9.5, 5.5, 19.5, 15.5)
    assert sides(prediction) == (10, 5.5, 19.5, 15.5)


def test_images_as_seen_come_with_their_boxes_alone():
    split = toy_split(3, 1, 64)
    seen, ground_truth = figures.as_seen(split, [2, 0])
    there = split.labels[2] >= 0
    assert seen[0].shape == (64, 64) and np.array_equal(seen[0], split.images[2, 0])
    assert torch.equal(ground_truth[0]["boxes"], split.boxes[2][there])
    assert len(ground_truth[0]["labels"]) == there.sum()


# --- Curves and counts -----------------------------------------------------------------------------------------------


def test_precision_recall_has_a_panel_for_each_class_and_a_line_for_each_row(of_seeds):
    for one in of_seeds:  # as read from a file: names in another order than the labels
        one.content["per_class"] = dict(reversed(one.per_class.items()))
    figure = figures.precision_recall_curves({"plain": of_seeds[:1], "fused": of_seeds[1:]})
    axes = drawn(figure)
    assert [axis.get_title() for axis in axes] == list(CLASSES)
    assert [len(axis.lines) for axis in axes] == [2, 2]
    # crazing: right at 0.9, then two false alarms; patches: both found, at full precision.
    assert axes[0].lines[0].get_xdata() == pytest.approx([1, 1, 1])
    assert axes[0].lines[0].get_ydata() == pytest.approx([1, 1 / 2, 1 / 3])
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["plain  100.0", "fused  100.0"]
    strict = drawn(figures.precision_recall_curves({"plain": of_seeds}, iou=0.97))  # the crazing box is 2 px too narrow
    assert strict[0].get_legend().get_texts()[0].get_text() == "plain  0.0"


def test_confusion_counts_at_the_threshold_from_dev(of_seeds):
    (axis,) = drawn(figures.confusion(of_seeds[0]))
    assert axis.images[0].get_array().tolist() == [[1, 0, 0], [0, 1, 1], [2, 0, 0]]  # the last: background
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [*CLASSES, "background"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted", "ground truth")
    assert "0.50" in axis.get_title()
    (lower,) = drawn(figures.confusion(of_seeds[0], threshold=0.05))
    assert lower.images[0].get_array().tolist()[1] == [0, 2, 0]


def test_bars_are_means_over_seeds(of_seeds):
    figure = figures.per_class_bars({"plain": of_seeds[:1], "fused": of_seeds, "empty": []})
    (axis,) = drawn(figure)
    assert [bar.get_height() for bar in rectangles(axis)] == pytest.approx([40, 90, 42, 92])
    spans = [segment[:, 1].tolist() for lines in axis.collections for segment in lines.get_segments()]
    assert spans == [[40, 40], [90, 90], [40, 44], [90, 94]]  # from the lowest seed to the highest
    assert [tick.get_text() for tick in axis.get_xticklabels()] == list(CLASSES)
    assert "IoU 0.5" in axis.get_ylabel()
    with pytest.raises(ValueError, match="no average precision is called 'recall'"):
        figures.per_class_bars({"plain": of_seeds}, "recall")


# --- Where a detector looks ------------------------------------------------------------------------------------------


@pytest.fixture(params=["v5", "v8"])
def detector(request):
    """Fresh weights, but normalised as after some training: a fresh network's maps are nearly flat."""
    torch.manual_seed(0)
    network = Detector(request.param, "t", 2).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(8, 3, 64, 64))
        for level in network.head.modules():
            if isinstance(level, torch.nn.Conv2d) and level.kernel_size == (1, 1):
                level.weight *= 5  # scores that differ from place to place
    return network.eval()


@pytest.fixture
def images():
    return toy_split(3, 1, 64).images


def unit(heat):
    """(N, h, w) -> each map from 0 to 1, as the package scales them."""
    heat = heat - heat.amin((1, 2), keepdim=True)
    return heat / (heat.amax((1, 2), keepdim=True) + 1e-7)


def by_hand(detector, images, label):
    """Equations 10 and 19 of the paper on the neck's three maps, their scaled and enlarged means."""
    maps = detector.neck(detector.backbone((images / 255).expand(-1, 3, -1, -1)))
    _, scores = decode(detector, detector.head(maps))
    s = scores[..., label].sum(1).log()
    found = []
    for layer, gradient in zip(maps, torch.autograd.grad(s.sum(), maps), strict=True):
        sums = layer.sum((2, 3), keepdim=True)
        alpha = gradient**2 / (2 * gradient**2 + sums * gradient**3 + 1e-6)
        weights = (alpha * gradient.relu()).sum((2, 3), keepdim=True)
        heat = (weights * layer).sum(1).relu().detach()
        size = images.shape[-2:]
        found.append(interpolate(unit(heat)[:, None], size, mode="bilinear", align_corners=False)[:, 0])
    return unit(torch.stack(found).mean(0)).numpy(), s.exp().detach().numpy()


@pytest.mark.parametrize("label", [0, 1])
def test_it_is_the_equation_of_the_paper_scaled_from_0_to_1(detector, images, label):
    heat, evidence = figures.heat_maps(detector, images, label)
    expected, sums = by_hand(detector, images, label)
    assert heat.shape == (3, 64, 64) and heat.dtype == np.float32
    np.testing.assert_allclose(heat, expected, atol=2e-3)
    np.testing.assert_allclose(evidence, sums, rtol=1e-4)
    np.testing.assert_allclose(heat.min((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(heat.max((1, 2)), 1, atol=1e-3)


def test_the_map_does_not_depend_on_batch_frozen_weights_or_three_grey_channels(detector, images):
    together, sums = figures.heat_maps(detector, images, 1, batch=3)
    alone, own = figures.heat_maps(detector.requires_grad_(False), images.expand(-1, 3, -1, -1), 1, batch=1)
    np.testing.assert_allclose(together, alone, atol=1e-3)
    np.testing.assert_allclose(sums, own, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_the_detector_stays_as_it_is(detector, images, training):
    detector.train(training)
    before = copy.deepcopy(detector)
    with torch.no_grad():  # as in a notebook's cell
        figures.heat_maps(detector, images, 0)
    assert equal(before, detector) and detector.training == training
    assert all(p.grad is None and p.requires_grad for p in detector.parameters())
    assert not any(module._forward_hooks for module in detector.modules())


def test_what_is_refused(detector, images):
    with pytest.raises(ValueError, match="classes 0 to 1"):
        figures.heat_maps(detector, images, 2)
    with pytest.raises(ValueError, match="divisible by 32"):
        figures.heat_maps(detector, images[..., :40, :40], 0)


def test_an_index_error_is_not_swallowed(detector, images, monkeypatch):
    monkeypatch.setattr(figures, "decode", Mock(side_effect=IndexError("too many indices")))
    with pytest.raises(IndexError, match="too many indices"):
        figures.heat_maps(detector, images, 0)
