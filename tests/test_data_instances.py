"""Masks as instances: the component rule, maps and boxes, splits without leaks, and what follows an augmentation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defectlab.data import fetch as store
from defectlab.data import instances
from defectlab.data.augment import Augmentation, augment
from defectlab.data.images import letterbox_maps
from defectlab.data.instances import SPECK, instance_fingerprint, load_instances, move_instances
from defectlab.data.splits import read_list
from defectlab.files import DataError
from defectlab.geometry import warp_maps

SYNTHETIC, SIZE = "synthetic_steel_masks", 64


@pytest.fixture(scope="module")
def data(synthetic: Path) -> instances.InstanceData:
    return load_instances(SYNTHETIC, SIZE, root=synthetic)


# ---------------------------------------------------------------------------------------------------------- instances


def test_components_by_class_without_specks():
    mask = np.zeros((40, 50), np.uint8)
    mask[30:34, 40:44] = 1  # 16 px: just enough
    mask[2:5, 2:7] = 1  # 15 px: a speck
    mask[10:14, 10:14] = mask[14:18, 14:18] = 2  # they touch at a corner: one
    mask[10:14, 14:18] = 3  # another class between them: an instance of its own
    boxes, labels, numbers, specks = instances.instances(mask)
    assert boxes.tolist() == [[40, 30, 44, 34], [10, 10, 18, 18], [14, 10, 18, 14]] and boxes.dtype == np.float32
    assert labels.tolist() == [0, 1, 2] and specks == 1
    assert (numbers == np.where(mask == 1, 1, mask) * (mask > 0) * ~((mask == 1) & (np.arange(50) < 10))).all()
    assert numbers.dtype == np.uint8 and SPECK == 16


def test_an_empty_mask_and_bad_masks():
    boxes, labels, numbers, specks = instances.instances(np.zeros((9, 9), np.uint8))
    assert boxes.shape == (0, 4) and labels.shape == (0,) and not numbers.any() and specks == 0
    with pytest.raises(ValueError, match="value 7 is none of 0"):
        instances.instances(np.full((9, 9), 7, np.uint8))
    crowded = np.zeros((80, 100), np.uint8)
    crowded.reshape(16, 5, 20, 5)[:, :4, :, :4] = 1  # 320 squares of 16 px
    with pytest.raises(ValueError, match="more than 255"):
        instances.instances(crowded)


def test_boxes_are_tight_around_the_masks(data):
    for split in (data.train, data.dev, data.test):
        for index, true in enumerate(split.ground_truth()):
            masks = split.masks(index)
            assert len(masks) == len(true["labels"]) > 0 and (masks.sum(0) <= 1).all()
            for mask, box in zip(masks, true["boxes"], strict=True):
                rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
                tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert box.tolist() == pytest.approx([float(v) for v in tight], abs=1e-3)


def test_resized_maps_lie_in_their_boxes(data):
    split = data.train
    assert split.maps.shape == (len(split), SIZE, SIZE) and split.maps.dtype == torch.uint8
    centres = torch.arange(SIZE) + 0.5
    for numbers, boxes, labels in zip(split.maps, split.boxes, split.labels, strict=True):
        count = int((labels >= 0).sum())
        assert set(numbers.unique().tolist()) <= set(range(count + 1))
        for number, (x1, y1, x2, y2) in enumerate(boxes[:count].tolist(), 1):
            rows, columns = (numbers == number).nonzero().unbind(1)
            assert len(rows)
            assert x1 < centres[columns.min()] and centres[columns.max()] < x2
            assert y1 < centres[rows.min()] and centres[rows.max()] < y2
            # and reach to within a pixel of the input and one of the original
            assert columns.min() - x1 < 1 + SIZE / 100 and x2 - columns.max() - 1 < 1 + SIZE / 100


def test_wide_maps_are_letterboxed():
    maps = torch.zeros(1, 2, 4, dtype=torch.uint8)
    maps[0, 1, 3] = 5
    assert letterbox_maps(maps, 8)[0].nonzero().tolist() == [[4, 6], [4, 7], [5, 6], [5, 7]]


# ----------------------------------------------------------------------------------------------------- whole sets


def test_synthetic_masks(data, synthetic):
    parts = [set(split.names) for split in (data.train, data.dev, data.test)]
    assert [len(part) for part in parts] == [32, 4, 12] and len(set.union(*parts)) == 48
    assert all(name.startswith("images/test/") for name in parts[2])
    assert data.train.images.shape == (32, 1, SIZE, SIZE) and data.class_names == instances.CLASSES
    assert data.fingerprint == instance_fingerprint(SYNTHETIC, synthetic) and "specks left out" in data.report
    for label in range(3):
        assert all((split.labels == label).any() for split in (data.train, data.test))
    again = load_instances(SYNTHETIC, SIZE, root=synthetic)
    assert torch.equal(again.train.maps, data.train.maps) and again.train.names == data.train.names


# ------------------------------------------------------------------------------------------------------ NEU-Seg's turns


def test_turned_images_are_found(script):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 25, 25)).repeat(4, 1).repeat(4, 2)
    noisy = (np.rot90(images[1], 3) + random.normal(0, 3, (100, 100))).clip(0, 255)
    stack = np.stack([*images, np.rot90(images[0]), noisy, images[2][::-1]]).astype(np.uint8)
    groups = script("neu_seg").turn_groups(stack)
    assert groups[3] == groups[0] and groups[4] == groups[1]
    assert len(set(groups.tolist())) == 4  # a mirrored image is another one


def test_another_archive_is_refused(script, tmp_path):
    for group, suffix in (("images", "jpg"), ("annotations", "png")):
        for part in ("training", "test"):
            (tmp_path / group / part).mkdir(parents=True)
            Image.new("L", (200, 200)).save(tmp_path / group / part / f"000001.{suffix}")
    with pytest.raises(DataError, match="should have 3630 training images"):
        script("neu_seg")._check(tmp_path)


@pytest.mark.parametrize(("dataset", "train", "dev"), [("neu_seg", 1064, 116), ("neu_seg_published", 3268, 362)])
def test_neu_seg_lists(dataset, train, dev):
    """From the committed list alone: all turns of an image on one side."""
    parts = dict(zip(("train", "dev", "test"), instances._neu_seg_splits(dataset), strict=True))
    assert {part: len(names) for part, names in parts.items()} == {"train": train, "dev": dev, "test": 840}
    where = {name: part for part, names in parts.items() for name in names}
    sides = [
        {where[f"images/{name}.jpg"] for name in line.split()[1:] if f"images/{name}.jpg" in where}
        for line in read_list(instances.TURNS_LIST)
    ]
    assert not any({"train", "dev"} <= side for side in sides)
    mixed = sum("test" in side and len(side) > 1 for side in sides)
    assert mixed == (0 if dataset == "neu_seg" else 807)


@pytest.fixture(scope="module")
def seg_root(real_set) -> Path:
    return real_set("neu_seg")


@pytest.mark.real_data
def test_neu_seg(seg_root):
    """What the docstrings say of it; no training image is a test image to the last bit, either."""
    data = load_instances("neu_seg", SIZE, root=seg_root)
    assert (len(data.train), len(data.dev), len(data.test)) == (1064, 116, 840) and data.train.images.shape[1] == 1
    counts = [sum(int((getattr(data, part).labels == k).sum()) for part in ("train", "dev")) for k in range(3)]
    assert counts == [696, 948, 792]
    assert [int((data.test.labels == label).sum()) for label in range(3)] == [1076, 727, 894]
    manifest = store.quick_check(seg_root / "neu_seg", "")
    hashes = [{manifest.files[name][1] for name in split.names} for split in (data.train, data.dev, data.test)]
    assert not (hashes[0] & hashes[1] or hashes[0] & hashes[2] or hashes[1] & hashes[2])
    assert all(split.masks(index).any((1, 2)).all() for split in (data.test,) for index in range(len(split)))


@pytest.mark.real_data
def test_neu_seg_list_is_what_the_images_give(seg_root, script):
    assert script("neu_seg").list_of_turns(seg_root / "neu_seg") == instances.TURNS_LIST.read_text()


# ------------------------------------------------------------------------------------------------------- augmentation


def test_flips_move_maps_by_whole_pixels():
    maps = torch.arange(1, 37, dtype=torch.uint8).view(1, 6, 6).repeat(3, 1, 1)
    flip_x = torch.tensor([[-1.0, 0, 6], [0, 1, 0], [0, 0, 1]])
    flip_y = torch.tensor([[1.0, 0, 0], [0, -1, 6], [0, 0, 1]])
    shift = torch.tensor([[1.0, 0, 2], [0, 1, -1], [0, 0, 1]])  # two to the right, one up
    moved = warp_maps(maps, torch.stack([flip_x, flip_y, shift]), 6)
    assert moved.dtype == torch.uint8
    assert torch.equal(moved[0], maps[0].flip(1)) and torch.equal(moved[1], maps[0].flip(0))
    assert torch.equal(moved[2, :5, 2:], maps[0, 1:, :4])
    assert not moved[2, 5].any() and not moved[2, :, :2].any()


def test_instances_follow_their_boxes_through_an_augmentation(data):
    """After zoom, shift and flips each box of the batch still encloses its own instance, and dropped ones are gone."""
    settings = Augmentation(mosaic=0.0, flip_up_down=0.5, scale=0.5, translate=0.2)
    split, generator = data.train, torch.Generator().manual_seed(3)
    checked, dropped = 0, 0
    for _ in range(3):
        batch = augment(split.images, split.boxes, split.labels, torch.arange(len(split)), settings, generator)
        maps = move_instances(split, batch)
        assert maps.shape == (len(split), SIZE, SIZE) and maps.dtype == torch.int64
        plain = warp_maps(split.maps, batch.matrices[:, 0], SIZE)
        for image in range(len(split)):
            boxes = batch.boxes[image][batch.labels[image] >= 0]
            assert int(maps[image].max()) <= len(boxes)
            dropped += int((split.labels[image] >= 0).sum()) - len(boxes)
            for number, (x1, y1, x2, y2) in enumerate(boxes.tolist(), 1):
                rows, columns = (maps[image] == number).nonzero().unbind(1)
                if len(rows) < 9:
                    continue
                checked += 1
                # maps were sampled at the size of the input: half a pixel beyond the box, zoomed by at most 1.5
                assert columns.min() + 0.5 > x1 - 0.76 and columns.max() + 0.5 < x2 + 0.76
                assert rows.min() + 0.5 > y1 - 0.76 and rows.max() + 0.5 < y2 + 0.76
                old = plain[image][rows, columns].unique()  # one instance of the split, of the same class
                assert len(old) == 1
                assert split.labels[image, int(old) - 1] == batch.labels[image, number - 1]
    assert checked > 100 and dropped > 0


def test_of_two_instances_the_kept_one_has_the_number(data):
    """Box 0 leaves the image: box 1 is the batch's first, and the map says 1 where the map of the split said 2."""
    maps = torch.zeros(1, 8, 8, dtype=torch.uint8)
    maps[0, :, 0:3], maps[0, :, 5:8] = 1, 2
    boxes = torch.tensor([[[0.0, 0, 3, 8], [5, 0, 8, 8]]])
    split = replace(data.train, maps=maps, boxes=boxes, labels=torch.tensor([[1, 1]]))
    images, generator = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.Generator().manual_seed(0)
    still = Augmentation(mosaic=0, translate=0, scale=0, flip_left_right=0)
    batch = augment(images, boxes, split.labels, torch.tensor([0]), still, generator)
    assert torch.equal(move_instances(split, batch), maps.long())
    matrices = batch.matrices.clone()
    matrices[:, :, 0, 2] -= 4
    left = replace(batch, matrices=matrices, boxes=torch.tensor([[[1.0, 0, 4, 8]]]), labels=torch.tensor([[1]]))
    expected = torch.zeros(1, 8, 8, dtype=torch.int64)
    expected[0, :, 1:4] = 1
    assert torch.equal(move_instances(split, left), expected)


def test_of_two_instances_with_one_box_the_class_decides(data):
    """A ring of one class around a square of another, cut to the same box by the image's edges."""
    maps = torch.ones(1, 8, 8, dtype=torch.uint8)
    maps[0, 2:6, 2:6] = 2
    boxes = torch.tensor([[[0.0, 0, 8, 8], [2, 2, 6, 6]]])
    split = replace(data.train, maps=maps, boxes=boxes, labels=torch.tensor([[0, 2]]))
    images, generator = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.Generator().manual_seed(0)
    still = Augmentation(mosaic=0, translate=0, scale=0, flip_left_right=0)
    batch = augment(images, boxes, split.labels, torch.tensor([0]), still, generator)
    whole = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 8]]])
    enlarged = batch.matrices.clone()
    enlarged[:, :, :2] = torch.tensor([[4.0, 0, -12], [0, 4, -12]])
    zoomed = replace(batch, matrices=enlarged, boxes=whole, labels=split.labels)
    assert (move_instances(split, zoomed) == 2).all()
