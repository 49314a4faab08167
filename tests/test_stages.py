"""Inspection in stages: windows and crops by hand, recalls of stages by hand, and rows as they run."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import quiet, runs_of

from defectlab import runs
from defectlab.data.stages import (
    PitData,
    PitSplit,
    crops,
    cut,
    holding,
    load_pits,
    padded,
    pits_fingerprint,
    places,
    recut,
    reduced,
    shares,
    training_windows,
    window_labels,
)
from defectlab.files import DataError
from defectlab.metrics.per_image import recall_statistic
from defectlab.metrics.stages import at_false_boxes, best_scores, by_size, keeping, product_statistic, recalls
from defectlab.networks.stages import CropClassifier, RegionNet
from defectlab.runs import Record
from defectlab.training import stages
from defectlab.training.later_stages import (
    ClassifiedSettings,
    GatedSettings,
    all_crops,
    binary_loss,
    chosen,
    drawn_squares,
    examples_to_learn,
    needs_of_stages,
    run_classified,
    run_gated,
)
from defectlab.training.stages import FrameDetectorSettings, joined, look, run_frame_detector

WINDOW = 64
NO_BOX = torch.zeros(0, 4)


def pit_split(count: int, seed: int, height: int = 120, width: int = 160) -> PitSplit:
    """Grey frames with one or two dark squares of 8 to 24 px; the first frame has none."""
    random = np.random.default_rng(seed)
    images = random.normal(150, 8, (count, 3, height, width)).clip(0, 255).astype(np.uint8)
    boxes = [NO_BOX]
    for image in images[1:]:
        own = []
        for half in range(random.integers(1, 3)):  # one in each half of the frame
            side = int(random.integers(8, 25))
            x = int(random.integers(half * width // 2, (half + 1) * width // 2 - side))
            y = int(random.integers(0, height - side))
            image[:, y : y + side, x : x + side] = 20
            own.append((x, y, x + side, y + side))
        boxes.append(torch.tensor(own, dtype=torch.float32))
    names = tuple(f"01_{seed}_{560000 + 1000 * (n // 3)}_000_{n}" for n in range(count))
    return PitSplit(torch.from_numpy(images), tuple(boxes), names)


def pit_data(counts: tuple[int, int, int] = (9, 5, 6)) -> PitData:
    parts = (pit_split(count, seed) for seed, count in enumerate(counts))
    return PitData("toy", "toy frames", ("pit",), *parts, fingerprint="")


# --- Windows and crops -----------------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    images = padded(torch.arange(120 * 160).remainder(251).byte().view(1, 1, 120, 160).expand(2, 3, -1, -1), WINDOW)
    assert images.shape == (2, 3, 128, 160) and torch.equal(images[:, :, 127], images[:, :, 119])
    windows = places(images, WINDOW)
    assert windows.tolist()[:5] == [[x, 0, x + 64, 64] for x in (0, 32, 64, 96)] + [[0, 32, 64, 96]]
    assert len(windows) == 4 * 3
    found = cut(images, torch.tensor([0, 1]), windows[[0, 6], :2], WINDOW)
    assert torch.equal(found[1], images[1, :, 32:96, 64:128]) and torch.equal(found[0], images[0, :, :64, :64])
    assert padded(images, WINDOW) is images
    assert padded(images[..., :40, :40], WINDOW).shape[-2:] == (64, 64)


def test_what_a_window_shows_of_a_pit() -> None:
    windows = torch.tensor([[0, 0, 64, 64], [32, 0, 96, 64], [64, 0, 128, 64]])
    boxes = torch.tensor([[54.0, 0, 74, 10], [0, 0, 10, 10], [0, 0, 128, 10]])
    wanted = torch.tensor([[0.5, 1, 0.5], [1, 0, 0], [0.5, 0.5, 0.5]])
    assert torch.allclose(shares(boxes, windows), wanted)
    assert holding(boxes, windows).tolist() == [[False, True, False], [True, False, False], [True] * 3]
    split = PitSplit(torch.zeros(2, 3, 64, 128), (torch.tensor([[58.0, 0, 78, 10]]), NO_BOX), ("a", "b"))
    assert window_labels(split, windows).tolist() == [[-1, 1, 1], [0, 0, 0]]  # three tenths are no example of anything


def test_training_windows_have_the_part_of_a_pit_that_they_show() -> None:
    split = pit_split(6, 0)
    found = training_windows(split, WINDOW)
    labels = window_labels(split, places(padded(split.images, WINDOW), WINDOW))
    with_pit = int((labels == 1).sum())
    assert with_pit <= len(found) <= 2 * with_pit and found.images.shape[1:] == (3, WINDOW, WINDOW)
    for image, boxes, own in zip(found.images, found.boxes, found.labels, strict=True):
        seen = int((own >= 0).sum())
        dark = image[0] < 80
        inside = torch.zeros_like(dark)
        for x1, y1, x2, y2 in boxes[:seen].int().tolist():
            assert 0 <= x1 < x2 <= WINDOW and 0 <= y1 < y2 <= WINDOW
            inside[y1:y2, x1:x2] = True
        assert dark.sum() == (dark & inside).sum() if seen else not dark.any()
    assert len(training_windows(split, WINDOW, 4)) == -(-len(found) // 4)


def test_whole_frames_keep_their_boxes() -> None:
    split = pit_split(3, 1)
    small = reduced(split, 96)
    assert small.images.shape == (3, 3, 96, 96)
    for one, own in zip(small.ground_truth(), split.boxes, strict=True):
        assert torch.allclose(one["boxes"], own, atol=1e-3)


def test_crops_by_hand() -> None:
    images = torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
    images[1, :, 10:20, 10:20] = 200
    box = torch.tensor([[10.0, 10, 20, 20]])
    found = crops(images, torch.tensor([1]), box, 16, 2.0, 4.0)  # 20 px as 16: the pit is its middle half
    assert found.dtype == torch.uint8 and (found[0, :, 5:11, 5:11] == 200).all() and not found[0, :, :3].any()
    assert not crops(images, torch.tensor([0]), box, 16, 2.0, 4.0).any()
    least = crops(images, torch.tensor([1]), box, 40, 1.0, 40.0)  # at least 40 px
    assert float(least[0, 0].sum()) / 200 == pytest.approx(100, abs=2)
    again = recut(images[1:], torch.tensor([[5.0, 5, 25, 25]]), 16)
    assert torch.equal(again, found)


def test_drawn_squares_stay_within_the_margin() -> None:
    squares = drawn_squares(500, 85, torch.Generator().manual_seed(0))
    sides = squares[:, 2:] - squares[:, :2]
    assert squares.min() >= 0 and squares.max() <= 85 and torch.allclose(sides[:, 0], sides[:, 1])
    assert sides.min() < 0.85 * 64 and sides.max() > 1.15 * 64


def test_pits_of_a_set(tmp_path: Path) -> None:
    data = load_pits("synthetic_screw", root=tmp_path)
    assert data.fingerprint == pits_fingerprint("synthetic_screw", root=tmp_path) and data.class_names == ("pit",)
    for split in (data.train, data.dev, data.test):
        assert len(split) == len(split.boxes) == len(split.images) and all(map(len, split.boxes))
    with pytest.raises(DataError, match="there is no set"):
        load_pits("synthetic_screw", "official", root=tmp_path)


# --- Recalls ---------------------------------------------------------------------------------------------------------


def boxes_of(*scored: tuple[float, float]) -> dict[str, torch.Tensor]:
    """10 px wide boxes at (x, score)."""
    x = torch.tensor([x for x, _ in scored])[:, None]
    return {
        "boxes": torch.cat([x, torch.zeros_like(x), x + 10, torch.full_like(x, 10.0)], 1),
        "scores": torch.tensor([score for _, score in scored]),
        "labels": torch.zeros(len(scored), dtype=torch.int64),
    }


def truth_of(*x: float) -> dict[str, torch.Tensor]:
    return {name: values for name, values in boxes_of(*((one, 1.0) for one in x)).items() if name != "scores"}


def test_a_threshold_for_false_boxes_by_hand() -> None:
    truth = [truth_of(0, 100), truth_of(50)]
    found = [boxes_of((0, 0.9), (200, 0.8), (101, 0.6)), boxes_of((300, 0.7), (50, 0.5))]
    assert at_false_boxes(found, truth, 0.5) == pytest.approx(0.7)  # one false box in two images is allowed
    assert at_false_boxes(found, truth, 0.1) == pytest.approx(0.8) and at_false_boxes(found, truth, 1.0) == 0.0
    assert best_scores(found, truth).tolist() == pytest.approx([0.9, 0.6, 0.5])
    assert best_scores([boxes_of((6, 0.9))], [truth_of(0)]).tolist() == [0.0]  # an IoU of a quarter


def test_keeping_a_share() -> None:
    scores = np.arange(100.0)
    assert keeping(scores, 98) == 2.0 and (scores >= keeping(scores, 98)).sum() == 98
    assert keeping(scores[:74], 98) == 1.0 and keeping(scores, 100) == 0.0
    with pytest.raises(ValueError, match="dev has none"):
        keeping(scores[:0], 98)


ARRAYS = {
    "pit_region": np.array([1, 1, 1, 0, 1, 1, 1, 0], bool),
    "pit_part": np.array([1, 1, 0, 0, 1, 1, 1, 0], bool),
    "pit_class": np.array([1, 1, 1, 1, 1, 1, 0, 0], bool),
    "pit_total": np.array([1, 1, 0, 0, 1, 1, 0, 0], bool),
    "pit_image": np.array([0, 0, 0, 1, 1, 2, 2, 2]),
    "pit_side": np.array([9.0, 8, 1, 1, 5, 6, 5, 2]),
}


def test_recalls_by_hand() -> None:
    found = recalls(ARRAYS)
    assert found["recall_region"] == 75 and found["recall_part"] == 62.5 and found["recall_class"] == 75
    assert found["recall_product"] == pytest.approx(100 * 0.75 * 0.625 * 0.75)
    assert found["recall_total"] == found["recall_joint"] == 50
    assert found["beyond_product"] == pytest.approx(50 - 35.15625)
    without = {name: values for name, values in ARRAYS.items() if name in ("pit_total", "pit_image", "pit_side")}
    assert recalls(without) == {"recall_total": 50}
    two = {name: values for name, values in ARRAYS.items() if name != "pit_class"}
    assert recalls(two)["recall_product"] == pytest.approx(100 * 0.75 * 0.625)


def test_images_are_weighed() -> None:
    beyond = product_statistic(ARRAYS)
    assert beyond(None) == beyond(np.ones(3)) == recalls(ARRAYS)["beyond_product"]
    twice = {name: np.concatenate([values, values[ARRAYS["pit_image"] == 2]]) for name, values in ARRAYS.items()}
    assert beyond(np.array([1.0, 1, 2])) == pytest.approx(recalls(twice)["beyond_product"])
    assert product_statistic(ARRAYS, "recall_total")(np.array([1.0, 0, 0])) == pytest.approx(200 / 3)
    assert math.isnan(beyond(np.zeros(3)))


def test_independent_misses_multiply() -> None:
    random = np.random.default_rng(0)
    alone = {f"pit_{name}": random.random(40_000) < 0.8 for name in ("region", "part", "class")}
    total = np.all(list(alone.values()), axis=0)
    assert recalls(alone | {"pit_total": total})["beyond_product"] == pytest.approx(0, abs=1)


def test_by_size_by_hand() -> None:
    found = by_size(ARRAYS)
    assert [one["pits"] for one in found] == [3, 3, 2]
    assert [(one["from"], one["to"]) for one in found] == [(1, 2), (5, 6), (8, 9)]
    assert [one["recall_total"] for one in found] == pytest.approx([0, 200 / 3, 100])
    assert found[0]["recall_product"] == 0 and found[1]["recall_class"] == pytest.approx(200 / 3)
    assert len(by_size(ARRAYS | {"pit_side": np.full(8, 7.0)})) == 1  # equal sides stay together


# --- Networks --------------------------------------------------------------------------------------------------------


def test_a_region_network_has_a_logit_for_each_window() -> None:
    region = RegionNet(128).eval()
    frames = padded(torch.randint(0, 256, (2, 3, 200, 300), dtype=torch.uint8), 128)
    logits = region(region.reduce(frames))
    assert logits.shape == (2, len(places(frames, 128)))
    with torch.no_grad():
        region.cells[-1].weight.zero_()
        frames[:, :, :, :] = 0
        assert torch.allclose(region(region.reduce(frames)), torch.tensor(-2.0))
    for size in (32, 100):
        with pytest.raises(ValueError, match="multiple of 64"):
            RegionNet(size)
    with pytest.raises(ValueError, match="uint8"):
        CropClassifier()(torch.zeros(2, 3, 64, 64))


def test_what_does_not_count_has_no_gradient() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = binary_loss(logits, torch.tensor([[1.0, -1.0, 0.0]]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(1 + math.e)) / 2, rel=1e-6)
    loss.backward()
    assert logits.grad[0, 1] == 0 and logits.grad[0, 0] < 0 < logits.grad[0, 2]


# --- Looking through windows -----------------------------------------------------------------------------------------


def a_perfect_detector(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """One box around all that is dark in a window; where nothing is, one of a low score in its middle."""

    def decode(_: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        boxes, scores = [], []
        for dark in pixels[:, 0] < 0.3:
            y, x = dark.nonzero().unbind(1)
            edges = (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else (20, 20, 30, 30)
            boxes.append([[float(edge) for edge in edges]])
            scores.append([[0.9 if len(x) else 0.1]])
        return torch.tensor(boxes), torch.tensor(scores)

    monkeypatch.setattr(stages, "decode", decode)
    return torch.nn.Identity()


def test_boxes_come_back_to_where_the_pits_are(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.full((2, 3, 120, 160), 200, dtype=torch.uint8)
    pits = torch.tensor([[30.0, 100, 50, 120], [140, 2, 160, 12]])  # at the lower edge of the frame, at the right one
    for frame, (x1, y1, x2, y2) in enumerate(pits.int().tolist()):
        images[frame, :, y1:y2, x1:x2] = 0
    split = PitSplit(images, (pits[:1], pits[1:]), ("a", "b"))
    looked = look(a_perfect_detector(monkeypatch), split, WINDOW, batch=5)
    found = joined(looked)
    for one, pit in zip(found, pits, strict=True):
        sure = one["scores"] > 0.5
        assert torch.equal(one["boxes"][sure], pit[None])  # once, whole, whatever windows cut it
    nothing = joined(looked, torch.zeros(2, 12, dtype=torch.bool))
    assert [len(one["scores"]) for one in nothing] == [0, 0]
    kept = torch.zeros(2, 12, dtype=torch.bool)
    kept[:, 0] = True  # the window in the upper left corner sees neither pit
    assert all((one["scores"] < 0.5).all() and len(one["scores"]) == 1 for one in joined(looked, kept))


def test_what_a_classifier_learns_from(monkeypatch: pytest.MonkeyPatch) -> None:
    split = pit_split(5, 3)
    others, pits = examples_to_learn(a_perfect_detector(monkeypatch), split, WINDOW)
    assert len(pits) == sum(map(len, split.boxes)) and torch.equal(pits[:, 1:], torch.cat(split.boxes))
    for frame, *box in others.tolist():
        own = split.boxes[int(frame)]
        assert not len(own) or shares(own, torch.tensor([box])).max() < 0.8
    assert torch.equal(others, examples_to_learn(torch.nn.Identity(), split, WINDOW)[0])
    cuts = all_crops(lambda *given: crops(*given, 16, 1.0, 4.0), split.images, pits, batch=2)
    assert cuts.shape == (len(pits), 3, 16, 16) and (cuts[:, :, 4:12, 4:12] < 60).all()


# --- Rows ------------------------------------------------------------------------------------------------------------

SHORT = FrameDetectorSettings(
    dataset="toy", scale="t", size=96, epochs=1, batch=4, optimizer="adamw", warm_up=1.0, average_ramp=3.0,
    close_mosaic=0, precision="fp32",
)  # fmt: skip
ZOOM = replace(SHORT, size=WINDOW, windows=True)
TWO = GatedSettings(ZOOM, epochs=2, precision="fp32")
THREE = ClassifiedSettings(TWO, epochs=2, draws=16, batch=8, precision="fp32")
RUNS = {FrameDetectorSettings: run_frame_detector, GatedSettings: run_gated, ClassifiedSettings: run_classified}


@pytest.fixture
def run_row(root: Path) -> Callable[..., Record]:
    data = pit_data()
    return runs_of(lambda settings: RUNS[type(settings)], lambda settings, device: data)


def test_rows_of_one_two_and_three_stages(run_row: Callable[..., Record]) -> None:
    whole, zoom, two, three = (run_row(settings, 1) for settings in (SHORT, ZOOM, TWO, THREE))
    pits = sum(map(len, pit_data().test.boxes))
    for record, stages_of in ((whole, ()), (zoom, ()), (two, ("region", "part")), (three, ("region", "part", "class"))):
        arrays = record.arrays
        flags = {f"pit_{name}" for name in (*stages_of, "total")}
        assert flags == {name for name in arrays if name.startswith("pit_") and arrays[name].dtype == bool}
        assert all(len(arrays[name]) == pits for name in (*flags, "pit_image", "pit_side"))
        again = recalls(arrays)
        assert again == pytest.approx({name: record.metrics[name] for name in again}, abs=1e-3)
        assert record.metrics["recall_total"] <= recall_statistic(arrays)(None) + 1e-6
        assert arrays["case_images"].shape == (len(arrays["case_index"]), 120, 160)
        assert len(arrays["crop_images"]) == len(arrays["crop_pit"]) <= stages.CROPS
    assert (whole.metrics["windows_seen"], zoom.metrics["windows_seen"]) == (1, 12)
    assert two.metrics["windows_seen"] == pytest.approx(two.arrays["window_kept"].sum(1).mean(), abs=1e-3)
    for name in ("window_kept", "window_logits", "pit_region"):  # one seed, one gate
        assert np.array_equal(two.arrays[name], three.arrays[name])
    assert two.notes["of"] == zoom.key and (three.notes["of"], three.notes["detector"]) == (two.key, zoom.key)
    assert three.costs["parameters_m"] > two.costs["parameters_m"] > zoom.costs["parameters_m"]
    assert zoom.costs["gflops_image"] > 0


def test_equal_seeds_and_a_training_that_goes_on(run_row: Callable[..., Record], root: Path) -> None:
    zoom, data = run_row(ZOOM, 0), pit_data()

    def run(seed: int, **options: object) -> runs.Result:
        return run_gated(TWO, seed, data, quiet(require=lambda *_: zoom, **options))

    first, other = run(0), run(2)
    assert not np.array_equal(first.predictions["window_logits"], other.predictions["window_logits"])
    path = root / "gate.ckpt"
    with pytest.raises(runs.OutOfTime):
        run(0, checkpoint=path, deadline=0.0)
    resumed = run(0, checkpoint=path)
    assert np.array_equal(first.predictions["window_logits"], resumed.predictions["window_logits"])
    assert first.metrics == resumed.metrics and first.curve == resumed.curve


def test_what_later_stages_need() -> None:
    assert needs_of_stages(THREE, 5) == [(TWO, 5), (ZOOM, 5)] and needs_of_stages(TWO, 5) == [(ZOOM, 5)]
    assert (THREE.dataset, THREE.split, THREE.size) == ("toy", "zones", WINDOW)


def test_boxes_that_are_no_pits_are_left_out() -> None:
    found = chosen(
        [boxes_of((0, 0.9), (20, 0.5)), boxes_of((5, 0.3))], [torch.tensor([0.1, 0.7]), torch.tensor([0.6])], 0.6
    )
    assert [one["scores"].tolist() for one in found] == [[pytest.approx(0.5)], [pytest.approx(0.3)]]
