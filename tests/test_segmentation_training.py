"""Training of segmentation networks: loss, flips, steps, what a result holds, weights of finished runs."""

import hashlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn
from toy_runs import one_sitting, quiet

from defectlab.data.masks import SegmentationData, SegmentationSplit, load_segmentation
from defectlab.networks.segmentation import SegmentationSettings, Segmenter, segmentation_loss
from defectlab.runs import NPZ_LIMIT, Context, OutOfTime, Record
from defectlab.training.detection import frozen
from defectlab.training.loop import epoch_order
from defectlab.training.segmentation import (
    draw_flipped,
    epochs_of,
    examples,
    flip,
    run_segmentation,
    segment,
    steps_per_epoch,
)

SMALL = SegmentationSettings(size=32, epochs=6, batch=4, learning_rate=0.02, precision="fp32")


def nuts(count: int, seed: int, size: int = 32, empty: int = 0) -> SegmentationSplit:
    """A bright square on a dark ground; the first `empty` images are ground alone."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    for i in range(empty, count):
        top, left = torch.randint(2, size // 2, (2,), generator=generator).tolist()
        masks[i, top : top + size // 3, left : left + size // 4] = 1
    images += 150 * masks[:, None]
    types = torch.tensor([i % 2 for i in range(count)], dtype=torch.uint8)
    return SegmentationSplit(images, masks, types, tuple(f"{seed}/{i:03d}.png" for i in range(count)))


def data(size: int = 32) -> SegmentationData:
    parts = nuts(20, 0, size), nuts(4, 1, size), nuts(14, 2, size, empty=5)
    return SegmentationData("squares", "squares", "nut", ("good", "bent"), *parts, "f")


def build(settings: SegmentationSettings) -> Segmenter:
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 1, 1)
    return Segmenter(nn.Sequential(*layers))


def run(settings: SegmentationSettings = SMALL, seed: int = 0, context: Context | None = None):
    return run_segmentation(settings, seed, data(), context or quiet(), build)


# --- Loss ------------------------------------------------------------------------------------------------------------


def test_loss_by_hand() -> None:
    logits, masks = torch.tensor([[[0.0, 2.0], [2.0, -1.0]]]), torch.tensor([[[1, 1], [0, 0]]], dtype=torch.uint8)
    wanted = (math.log(2) + math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2)) + math.log(1 + math.exp(-1))) / 4
    assert segmentation_loss(logits, masks)["loss"].item() == pytest.approx(wanted)


def test_loss_is_computed_in_float32_at_least() -> None:
    masks = torch.randint(0, 2, (2, 3, 3))
    assert segmentation_loss(torch.ones(2, 3, 3, dtype=torch.bfloat16), masks)["loss"].dtype == torch.float32
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, masks)["loss"], logits)


# --- Flips -----------------------------------------------------------------------------------------------------------


def test_flip_decides_for_each_image() -> None:
    x = torch.tensor([[1, 2], [3, 4]]).expand(4, 2, 2)
    across, down = torch.tensor([False, True, False, True]), torch.tensor([False, False, True, True])
    expected = [[[1, 2], [3, 4]], [[2, 1], [4, 3]], [[3, 4], [1, 2]], [[4, 3], [2, 1]]]
    assert flip(x, across, down).tolist() == expected
    assert flip(x[:, None].expand(4, 3, 2, 2), across, down)[:, 2].tolist() == expected


def test_images_and_masks_are_flipped_alike_and_each_image_in_its_own_way() -> None:
    split = nuts(200, 0, 12)
    indices = torch.arange(199, -1, -1)
    state = torch.get_rng_state()
    images, masks = draw_flipped(split, indices, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)  # what is drawn is drawn by the generator alone
    assert images.dtype == torch.uint8
    assert torch.equal(images[:, 0] >= 150, masks == 1)
    originals = split.images[indices]
    ways = [originals, originals.flip(-1), originals.flip(-2), originals.flip((-1, -2))]
    counts = [sum(torch.equal(a, b) for a, b in zip(images, way, strict=True)) for way in ways]
    assert sum(counts) == 200
    assert all(25 < count < 75 for count in counts)  # 50 each, standard deviation 6
    again, _ = draw_flipped(split, indices, torch.Generator().manual_seed(5))
    other, _ = draw_flipped(split, indices, torch.Generator().manual_seed(6))
    assert torch.equal(images, again)
    assert not torch.equal(images, other)


# --- Steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "batch"), [(268, 8), (27, 8), (54, 8), (17, 8), (16, 8), (3, 8)])
def test_steps_are_those_that_training_takes(images: int, batch: int) -> None:
    assert steps_per_epoch(images, batch) == len(epoch_order(images, batch, 0, 0, torch.device("cpu")))


def test_equal_steps_scale_the_epochs() -> None:
    paper = SegmentationSettings()
    assert epochs_of(paper, 268, 27) == 400
    equal = replace(paper, equal_steps=True)
    assert epochs_of(equal, 268, 27) == 3400  # 34 steps in place of 4
    assert epochs_of(equal, 268, 54) == 1943
    assert abs(1943 * 7 - 400 * 34) < 7  # to the nearest epoch
    assert epochs_of(equal, 268, 268) == 400


# --- A run -----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_keeps_what_a_record_needs() -> None:
    result, test = run(), data().test
    assert result.metrics["iou"] > 95 and result.dev["iou"] > 95
    assert set(result.per_class) == {"good", "bent"}
    assert 0.05 <= result.dev["threshold"] <= 0.95
    assert {name: len(values) for name, values in result.curve.items()} == {"loss": 6}
    assert result.precision == "fp32"
    assert result.costs["parameters_m"] == pytest.approx((3 * 8 * 9 + 8 + 16 + 8 + 1) / 1e6, abs=1e-4)
    assert {"gflops", "size_mb", "train_seconds", "train_images_per_second"} <= set(result.costs)
    assert result.notes == {"train_images": "20", "epochs": "6"}
    arrays = result.predictions
    assert arrays["names"].tolist() == list(test.names)
    assert arrays["image_tp"].shape == arrays["types"].shape == (14,)
    json.dumps([result.metrics, result.per_class, result.dev], allow_nan=False)
    network = build(SMALL)  # the result follows from the weights, and from the threshold of dev
    network.load_state_dict(result.model)
    found, truth = segment(network.eval(), test.images) > result.dev["threshold"], test.masks == 1
    iou = (found & truth).sum() / (found | truth).sum()
    assert result.metrics["iou"] == pytest.approx(100 * iou.item(), abs=1e-3)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_seeds_are_seen_to_matter() -> None:
    first, again, other = run(seed=0), run(seed=0), run(seed=1)
    assert same(first.model, again.model)
    assert first.metrics == again.metrics
    assert not torch.equal(first.model["network.0.weight"], other.model["network.0.weight"])


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """Its dropout, too."""
    whole, checkpoint = run(), tmp_path / "row.safetensors"
    with pytest.raises(OutOfTime):
        run(context=one_sitting(checkpoint))
    assert same(run(context=quiet(checkpoint=checkpoint)).model, whole.model)


def test_a_share_trains_on_fewer_images_for_as_many_steps_if_asked() -> None:
    few = run(replace(SMALL, share=0.5))
    assert few.notes == {"train_images": "10", "epochs": "6"}
    as_long = run(replace(SMALL, share=0.5, equal_steps=True))
    assert as_long.notes == {"train_images": "10", "epochs": "10"}  # 6 x 5 steps in epochs of 3
    assert few.metrics.keys() == as_long.metrics.keys()
    assert len(few.predictions["names"]) == 14


def test_segment_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    network, images = build(SMALL).eval(), nuts(5, 3).images
    whole = segment(network, images)
    assert (whole.shape, whole.dtype) == ((5, 32, 32), torch.float32)
    assert 0 < whole.min() < whole.max() < 1
    torch.testing.assert_close(segment(network, images, batch=2), whole)


# --- Examples --------------------------------------------------------------------------------------------------------


def counted(truth: list[int], hit: list[int], wrong: list[int]) -> dict[str, np.ndarray]:
    truth, hit, wrong = (np.array(x) for x in (truth, hit, wrong))
    return {"tp": hit, "fn": truth - hit, "fp": wrong, "nonempty": truth > 0}


def test_examples_are_the_worst_the_best_and_the_false_alarms() -> None:
    hits = [90, 10, 50, 20, 80, 30, 70, 40, 60, 85]
    images = counted([100] * 10 + [0] * 5, hits + [0] * 5, [0] * 10 + [0, 3, 900, 2, 1])
    found = examples(nuts(15, 0), torch.rand(15, 32, 32), images)
    assert found["case_index"].tolist() == [1, 3, 5, 7, 12, 2, 8, 11, 6, 4, 9, 0]
    whys = ["lowest IoU"] * 4 + ["most wrong pixels of the others"] * 4 + ["highest IoU"] * 4
    assert found["case_why"].tolist() == whys
    assert found["case_images"].shape == (12, 32, 32, 3)
    assert found["case_masks"].shape == found["case_probabilities"].shape == (12, 32, 32)
    assert found["case_masks"].max() == 1
    few = examples(nuts(5, 0), torch.rand(5, 32, 32), {name: values[:5] for name, values in images.items()})
    assert sorted(few["case_index"].tolist()) == [0, 1, 2, 3, 4]  # each once


@pytest.mark.real_data
def test_a_record_on_real_nuts_is_small_enough(real_set) -> None:
    root = real_set("mvtec_ad/metal_nut")
    real = load_segmentation("mvtec_ad/metal_nut", "defect", "paper", 128, root=root)
    settings = replace(SMALL, target="defect", size=128, share=0.1, epochs=1)
    result = run_segmentation(settings, 0, real, quiet(), build)
    assert len(result.predictions["names"]) == 34
    file = io.BytesIO()
    np.savez_compressed(file, **result.predictions)
    assert file.tell() < 0.9 * NPZ_LIMIT


# --- Weights of a finished run ---------------------------------------------------------------------------------------


def test_weights_of_a_run_come_back_or_the_file_is_named(tmp_path: Path) -> None:
    network = build(SMALL)
    whole = save(network.state_dict(), {"key": "row"})
    record = Record({"key": "row", "model_sha256": hashlib.sha256(whole).hexdigest()}, tmp_path / "row.json")
    with pytest.raises(ValueError, match=r"row\.safetensors is missing .*run that row again"):
        frozen(record, build(SMALL), "cpu")
    (tmp_path / "row.safetensors").write_bytes(whole)
    loaded = frozen(record, build(SMALL), "cpu")
    images = nuts(2, 0).images
    assert torch.equal(segment(loaded, images), segment(network.eval(), images))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    foreign = save(network.state_dict(), {"key": "another row"})  # of the same form
    for content in (save({"other": torch.zeros(1)}, {"key": "row"}), b"no tensors", foreign):
        (tmp_path / "row.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"row\.safetensors does not fit this network .*delete .*row\.json"):
            frozen(record, build(SMALL), "cpu")
