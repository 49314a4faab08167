"""Two networks in a row and one beside them; masks reduced and drawn by image; rows as they run."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import one_sitting, quiet

from defectlab.data import marked
from defectlab.data.frames import load_frames
from defectlab.data.instances import CLASSES
from defectlab.data.marked import (
    SPLITS,
    MarkedData,
    labelled,
    load_marked,
    marked_fingerprint,
    mixed,
    reduced,
    types_of,
)
from defectlab.data.masks import SegmentationSplit
from defectlab.files import DataError
from defectlab.metrics.segmentation import statistic
from defectlab.networks.cascade import NETWORKS, CascadeNet, CascadeSettings, cascade_loss, equal_widths
from defectlab.runs import NPZ_LIMIT, OutOfTime, Result
from defectlab.training.cascade import first_stage, iou, run_cascade
from defectlab.training.segmentation import example_size, segment

TOY = CascadeSettings(size=32, widths=(4, 8), epochs=3, batch=4, learning_rate=0.02, precision="fp32")


def part(count: int, seed: int, turns: int = 1) -> SegmentationSplit:
    """A bright block on a dark ground, 16 x 32 px."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, 3, 16, 32), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(count, 16, 32, dtype=torch.uint8)
    for i in range(count):
        top, left = torch.randint(0, 10, (2,), generator=generator).tolist()
        masks[i, top : top + 5, left : left + 9] = 1
    images += 150 * masks[:, None]
    types = torch.tensor([1 + i // turns % 2 for i in range(count)], dtype=torch.uint8)
    return SegmentationSplit(images, masks, types, tuple(f"{seed}/{i:02}" for i in range(count)))


def data(turns: int = 2) -> MarkedData:
    train, names = part(16, 0, turns), ("good", "hole", "line")
    shown = tuple(str(i // turns) for i in range(len(train)))
    return MarkedData("blocks", "blocks", "defect", names, train, part(4, 1), part(6, 2), "f", shown)


def run(settings: CascadeSettings = TOY, seed: int = 0, **options) -> Result:
    return run_cascade(settings, seed, data(), quiet(**options))


# --- Networks and loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_sees", ["mask", "mask_and_image"])
def test_one_network_has_as_many_parameters_as_two(second_sees: str) -> None:
    counts = [
        sum(p.numel() for p in CascadeNet(CascadeSettings(network=name, second_sees=second_sees)).parameters())
        for name in NETWORKS
    ]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)
    assert equal_widths((8, 16), (3,)) == (8, 16)


def test_each_stage_speaks_in_training_and_the_last_one_after() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 32), dtype=torch.uint8)
    for name, stages in (("cascade", 2), ("single", 1)):
        network = CascadeNet(replace(TOY, network=name)).train()
        assert network(images).shape == (2, stages, 16, 32)
        assert torch.equal(network.eval()(images), network.logits(images)[-1])


def test_the_second_network_sees_the_mask_alone_or_the_image_too() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 32), dtype=torch.uint8)
    for second_sees, blind in (("mask", True), ("mask_and_image", False)):
        network = CascadeNet(replace(TOY, second_sees=second_sees)).eval()
        torch.nn.init.zeros_(network.stages[0].decoder.head.weight)  # the same mask whatever the image
        first, last = network.logits(images)
        assert first.std() < 1e-5 and torch.allclose(last[0], last[1]) == blind


def test_the_second_loss_reaches_the_first_network() -> None:
    network = CascadeNet(TOY).train()
    logits = network(torch.randint(0, 256, (2, 3, 16, 32), dtype=torch.uint8))
    logits[:, 1].square().mean().backward()
    assert network.stages[0].encoder.blocks[0][0].weight.grad.abs().sum() > 0


def test_bf16_gradients_are_finite() -> None:
    """Those of atrous convolutions were not, at 12, 22, 46, 90 channels on maps of 20 x 48 (torch 2.11, CPU)."""
    torch.manual_seed(0)
    network = CascadeNet(CascadeSettings(network="single")).to(memory_format=torch.channels_last).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randint(0, 256, (2, 3, 160, 384), dtype=torch.uint8))
    cascade_loss(logits, torch.zeros(2, 160, 384), 4.0)["loss"].backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() < 1e3 for p in network.parameters())


def test_unknown_networks_are_refused() -> None:
    for change in ({"network": "three"}, {"second_sees": "nothing"}):
        with pytest.raises(ValueError, match="use one of"):
            CascadeNet(replace(TOY, **change))


def test_loss_by_hand() -> None:
    logits = torch.tensor([[[[0.0, 2.0]], [[-1.0, 0.0]]]])  # (1, 2 stages, 1, 2)
    found = cascade_loss(logits, torch.tensor([[[1, 0]]], dtype=torch.uint8), 3.0)
    first = (3 * math.log(2) + math.log(1 + math.exp(2))) / 2
    last = (3 * math.log(1 + math.exp(1)) + math.log(2)) / 2
    assert [found[name].item() for name in ("loss", "first", "last")] == pytest.approx([first + last, first, last])
    assert set(cascade_loss(logits[:, :1], torch.zeros(1, 1, 2), 3.0)) == {"loss"}


# --- Data ------------------------------------------------------------------------------------------------------------


def test_reduced_by_hand() -> None:
    masks = torch.zeros(1, 16, 32, dtype=torch.uint8)
    masks[0, 0, 0:2] = masks[0, 8, 8] = 1  # half of a pixel's area, and a quarter
    images = 200 * masks[:, None].expand(-1, 3, -1, -1)
    small, marks = reduced(images, masks, 8)
    assert small.shape == (1, 3, 8, 16) and small[0, :, 0, 0].tolist() == [100] * 3 and small[0, 0, 4, 4] == 50
    assert marks.sum() == 1 and marks[0, 0, 0] == 1
    assert reduced(images, masks, 16)[1] is masks
    for size in (12, 7, 24):
        with pytest.raises(ValueError, match="size"):
            reduced(images, masks, size)


def test_types_by_hand() -> None:
    maps = torch.tensor([[[1, 2, 2, 3]], [[0, 0, 0, 0]], [[1, 1, 0, 2]]], dtype=torch.uint8)
    labels = torch.tensor([[0, 2, 0], [-1, -1, -1], [1, 0, -1]])  # the first: two pixels of each of two classes
    assert types_of(maps, labels, 3).tolist() == [1, 0, 2]


def test_mixed_keeps_the_counts() -> None:
    train, test = [f"a{i}" for i in range(10)], [f"b{i}" for i in range(5)]
    new_train, new_test = mixed(train, test)
    assert len(new_train) == 10 and len(new_test) == 3 and not {*new_train} & {*new_test}
    assert len({*new_train} & {*test}) == 2 and {*new_test} < {*test}


def test_labels_are_drawn_by_image_with_all_its_turns() -> None:
    whole = data(turns=4)
    drawn = {share: labelled(whole, share, 0) for share in (0.25, 0.5, 1.0)}
    assert [len(split) for split in drawn.values()] == [4, 8, 16]
    assert len({int(name[2:]) // 4 for name in drawn[0.25].names}) == 1
    assert {*drawn[0.25].names} < {*drawn[0.5].names} and drawn[1.0] is whole.train
    assert sorted(drawn[0.5].types.tolist()) == [1] * 4 + [2] * 4
    assert len({labelled(whole, 0.25, seed).names for seed in range(8)}) > 1
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="share"):
            labelled(whole, share, 0)


def test_the_synthetic_sets(synthetic: Path) -> None:
    screws = load_marked("synthetic_screw", "zones", 64, root=synthetic)
    assert screws.train.images.shape == (20, 3, 64, 32) and screws.type_names == ("good", "pit")
    assert screws.train.types.tolist() == (screws.train.masks.flatten(1).sum(1) > 0).byte().tolist()
    assert screws.shown == screws.train.names == load_frames("synthetic_screw", "zones", root=synthetic).train.names
    other = load_marked("synthetic_screw", "zones_mixed", 64, root=synthetic)
    assert {*other.test.names} < {*screws.test.names} and len({*other.train.names} & {*screws.test.names}) == 7
    at = other.train.names.index(next(name for name in other.train.names if name in screws.test.names))
    same = screws.test.names.index(other.train.names[at])
    assert torch.equal(other.train.images[at], screws.test.images[same])
    steel = load_marked("synthetic_steel_masks", "apart", 64, root=synthetic)
    assert steel.train.images.shape[1:] == (3, 64, 64) and steel.type_names == ("good", *CLASSES)
    kinds = [name.split("/")[-1].rpartition("_")[0] for name in steel.test.names]
    assert [steel.type_names[t] for t in steel.test.types.tolist()] == kinds


def test_fingerprints(synthetic: Path) -> None:
    found = {
        marked_fingerprint(name, split, synthetic)
        for name, splits in SPLITS.items()
        if name.startswith("synthetic")
        for split in splits
    }
    assert len(found) == 3
    assert load_marked("synthetic_screw", "zones_mixed", 64, root=synthetic).fingerprint in found
    with pytest.raises(DataError, match="choose bsdata: zones"):
        marked_fingerprint("synthetic_screw", "official", synthetic)


def test_the_rules_are_those_that_fingerprints_name() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 1, 48, 96), dtype=torch.uint8, generator=rng)
    maps = torch.randint(0, 4, (2, 48, 96), dtype=torch.uint8, generator=rng)
    digest = hashlib.sha256()
    for x in (*reduced(images, (maps > 1).byte(), 16), types_of(maps, torch.tensor([[0, 1, 1], [2, 1, 0]]), 3)):
        digest.update(x.numpy().tobytes())
    digest.update(repr(mixed([f"a{i}" for i in range(9)], [f"b{i}" for i in range(9)])).encode())
    assert digest.hexdigest()[:16] == marked.RULES


# --- Rows ------------------------------------------------------------------------------------------------------------


def test_a_row_of_each_network() -> None:
    for name in NETWORKS:
        result = run(replace(TOY, network=name, epochs=8))
        assert result.metrics["iou"] > 50 and result.curve["loss"][-1] < result.curve["loss"][0]
        assert 100 * iou(*(torch.from_numpy(result.predictions[f"image_{c}"]) for c in ("tp", "fp", "fn"))) == (
            pytest.approx(result.metrics["iou"], abs=1e-3)
        )
        assert ("iou_first" in result.metrics) == ("threshold_first" in result.dev) == (name == "cascade")
        assert result.notes == {
            "train_images": "16",
            "labelled_images": "8",
            "marked_pixels": str(8 * 45),
            "epochs": "8",
        }
        assert sum(array.nbytes for array in result.predictions.values()) < NPZ_LIMIT


def test_the_first_stage_is_judged_by_its_own_threshold() -> None:
    result, toy = run(), data()
    network = CascadeNet(TOY)
    network.load_state_dict(result.model)
    network.to(memory_format=torch.channels_last).eval()
    said = first_stage(network, toy.test, "fp32") > result.dev["threshold_first"]
    wanted = float((said & (toy.test.masks > 0)).sum() / (said | (toy.test.masks > 0)).sum())
    assert result.metrics["iou_first"] == pytest.approx(100 * wanted, abs=1e-3)
    assert result.predictions["first_tp"].shape == (6,)
    assert not torch.equal(first_stage(network, toy.test, "fp32"), segment(network, toy.test.images))


def test_iou_by_hand() -> None:
    assert iou(torch.tensor([2, 1]), torch.tensor([1, 0]), torch.tensor([0, 2])) == pytest.approx(0.5)


def test_a_row_by_seeds_and_in_two_sittings(tmp_path: Path) -> None:
    one, same, other = run(), run(), run(seed=1)
    assert one.metrics == same.metrics and one.curve == same.curve and one.curve != other.curve
    checkpoint = tmp_path / "c.safetensors"
    for _ in range(TOY.epochs - 1):
        with pytest.raises(OutOfTime):
            run_cascade(TOY, 0, data(), one_sitting(checkpoint))
    resumed = run_cascade(TOY, 0, data(), one_sitting(checkpoint))
    assert resumed.metrics == one.metrics and resumed.curve == one.curve


def test_a_share_of_the_labels_gets_as_many_steps() -> None:
    result = run(replace(TOY, share=0.5, equal_steps=True))
    assert (result.notes["labelled_images"], result.notes["train_images"], result.notes["epochs"]) == ("4", "8", "6")


def test_metrics_of_chosen_test_images() -> None:
    """As for the frames that two splits share."""
    arrays = run().predictions
    chosen = np.isin(arrays["names"], arrays["names"][:2])
    tp, fp, fn = (arrays[f"image_{count}"][:2].sum() for count in ("tp", "fp", "fn"))
    assert statistic(arrays, "iou")(chosen.astype(float)) == pytest.approx(100 * tp / (tp + fp + fn))


def test_examples_keep_their_shape() -> None:
    assert example_size(torch.zeros(1, 3, 256, 256)) == (160, 160)
    assert example_size(torch.zeros(1, 3, 160, 384)) == (103, 248)
    assert example_size(torch.zeros(1, 3, 16, 32)) == (16, 32)


def test_synthetic_sets_come_in_the_sizes_of_paper(root: Path) -> None:
    whole, large = (load_marked("synthetic_screw", "zones", size).test for size in (128, 480))
    assert large.images.shape[-2:] == (480, 240) and whole.images.shape[-2:] == (128, 64)
    assert float(large.masks.float().mean()) == pytest.approx(float(whole.masks.float().mean()), rel=0.05)
