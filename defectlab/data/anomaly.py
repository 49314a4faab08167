"""The anomaly sets, whole, as tensors on one device: magnetic tiles, MVTec AD, AITEX, the synthetic ones, in one form.

Training images are normal; the test set has normal and anomalous images with masks. A tenth of the training images is
held out as `dev`, where design choices are made, with a defect pasted on a copy of each (`synthetic.pasted`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from defectlab.data.images import IMAGE_SUFFIXES, check_size, decode, find_images, in_threads, resize_mask, to_square
from defectlab.data.splits import (
    PARTS,
    Named,
    Plan,
    content_id,
    draw_split,
    folder_of,
    identity,
    locate,
    read_list,
    set_and_root,
    shuffled,
)
from defectlab.data.synthetic import SYNTHETIC
from defectlab.data.synthetic.pasted import KINDS, add_defect
from defectlab.data.tile_groups import tile_groups
from defectlab.files import DataError

MAGNETIC_TILE = "magnetic_tile"
SYNTHETIC_SETS = SYNTHETIC_TILE, SYNTHETIC_NUT, SYNTHETIC_FABRIC = "synthetic_tile", "synthetic_nut", "synthetic_fabric"
TILE_TYPES = KINDS
TILES_GROUPED = "magnetic_tile_grouped"
TILES = {MAGNETIC_TILE: "magnetic tiles", TILES_GROUPED: "magnetic tiles, grouped split"}  # name -> label
SPLITS = Path(__file__).parent / "splits"
TILE_TRAIN_LIST, GROUPED_TRAIN_LIST = SPLITS / "magnetic_tile_train_761.txt", SPLITS / "magnetic_tile_grouped.txt"
AITEX, AITEX_LIST = "aitex", SPLITS / "aitex.txt"  # below: sha256 of its decoded tiles and masks
AITEX_PIXELS = "17f74db94243dc371d8ce5073e95db15427e11db05d0de5ae186f079e293fcac"
# fmt: off
MVTEC_CATEGORIES = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut",
    "pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper",
)
# fmt: on
NOT_GOOD = {"test", "ground_truth", "mask", "masks", "label", "labels", "defect", "defects", "bad", "ng"}  # folders
PASTED_DEFECTS = "2f5ebef63256b8b1"  # digest of what `paste_defect` and `hold_out` give; see `splits.content_id`


@dataclass(frozen=True)
class AnomalySplit(Named):
    """N images and their masks, as tensors on one device, resized by `to_square` and `resize_mask`.

    A mask pixel is 1 where the mask file has more than 127. `has_mask` is False for an anomalous image whose mask is
    empty: it counts in image metrics and is left out of pixel metrics. `names` are the files' paths in the set; a
    pasted defect adds "+type".
    """

    images: Tensor  # (N, 3, size, size) uint8
    masks: Tensor  # (N, 256, 256) uint8, 1 = defect
    labels: Tensor  # (N,) uint8, 1 = anomalous
    types: Tensor  # (N,) uint8, index into AnomalyData.type_names, 0 = "good"
    has_mask: Tensor  # (N,) bool
    names: tuple[str, ...]
    original_sizes: tuple[tuple[int, int], ...]  # (H, W) in pixels


@dataclass(frozen=True)
class AnomalyData:
    """A set as the notebooks use it. `train` is normal only, `dev` half normal and half pasted defects.

    `derived` holds what is computed from the images once, such as a teacher's features; a copy with other images
    starts without.
    """

    name: str  # as given to load_anomaly
    label: str  # as printed in tables
    type_names: tuple[str, ...]  # "good" first
    train: AnomalySplit
    dev: AnomalySplit
    test: AnomalySplit
    fingerprint: str
    derived: dict = field(default_factory=dict, init=False, repr=False, compare=False)


@dataclass(frozen=True)
class Sample:
    """An image that has not been read yet."""

    path: str  # relative to the set's folder
    type: str = "good"
    mask: str | None = None  # None for a normal image
    pasted: int | None = None  # a defect is drawn onto the image with this seed

    @property
    def name(self) -> str:
        return self.path if self.pasted is None else f"{self.path}+{self.type}"


# ---------------------------------------------------------------------------------------------------------------- sets


def _tile_samples(files: list[str], plan: Plan, train_list: Path | None) -> tuple[list[Sample], list[Sample]]:
    """Train and test samples of the tile layout, MT_<Type>/Imgs/<name>.jpg with a mask <name>.png beside it."""
    normal = [path for path in files if path.startswith("MT_Free/") and path.endswith(".jpg")]
    if train_list is None:
        train = set(shuffled(normal, "train")[: round(0.8 * len(normal))])
    else:
        listed = [f"MT_Free/Imgs/{name}" for name in read_list(train_list)]
        train = set(plan.held(listed, normal))
        if unknown := sorted(train - set(normal)):
            raise DataError(
                f"{train_list.name} lists {unknown[0]}, which {plan.folder} does not hold: fetch the set again"
            )
    test = [Sample(path) for path in normal if path not in train]
    for kind in TILE_TYPES:
        images = [path for path in files if path.startswith(f"MT_{kind.capitalize()}/") and path.endswith(".jpg")]
        test += [Sample(path, kind, path.removesuffix(".jpg") + ".png") for path in images]
    return [Sample(path) for path in sorted(train)], test


def _mvtec_samples(files: list[str]) -> tuple[list[Sample], list[Sample]]:
    """Train and test samples of the MVTec AD layout: train/good, test/<type>, ground_truth/<type>/NNN_mask.png."""
    images = [path for path in files if Path(path).suffix.lower() in IMAGE_SUFFIXES]
    train = [Sample(path) for path in images if path.startswith("train/good/")]
    test = [Sample(path) for path in images if path.startswith("test/good/")]
    for path in images:
        part, kind = path.split("/")[:2]
        if part == "test" and kind != "good":
            test.append(Sample(path, kind, f"ground_truth/{kind}/{Path(path).stem}_mask.png"))
    return train, test


def hold_out(
    train: list[Sample], pasted_types: tuple[str, ...], groups: Mapping[str, object] | None = None
) -> tuple[list[Sample], list[Sample]]:
    """(train without them, dev): a tenth of the normal images, then a copy of each with a defect, types in turn.

    groups: path -> its group, of which no part is left in training.
    """
    paths = [sample.path for sample in train]
    if groups is None:
        chosen = set(shuffled(paths, "dev")[: max(1, round(len(train) / 10))])
    else:
        chosen = set(draw_split(dict.fromkeys(paths, "good"), 0.1, "dev", {path: str(groups[path]) for path in paths}))
    normal = [sample for sample in train if sample.path in chosen]
    pasted = [Sample(s.path, pasted_types[i % len(pasted_types)], pasted=i) for i, s in enumerate(normal)]
    return [sample for sample in train if sample.path not in chosen], normal + pasted


def plan_of(name: str, root: Path | None) -> Plan:
    """The samples of a set by part, and its fingerprint: no image is read. Errors as `load_anomaly`."""
    name, root = set_and_root(name, root)
    category = name.removeprefix("mvtec_ad/")
    if name in SYNTHETIC_SETS:
        plan = locate(name, SYNTHETIC[name].label, "", root)
    elif name in TILES:
        plan = locate(folder_of(name), TILES[name], "magnetic_tile.py", root)
    elif name != category and category in MVTEC_CATEGORIES:
        plan = locate(name, f"MVTec {category}", f"mvtec_ad.py --category {category}", root)
    elif name == AITEX:
        plan = locate(name, "AITEX fabric", "aitex.py --archive FILE", root)
    else:
        raise DataError(
            f"there is no anomaly set {name!r}: choose {', '.join((*TILES, AITEX, *SYNTHETIC_SETS))} or mvtec_ad/ "
            f"followed by one of {', '.join(MVTEC_CATEGORIES)}"
        )
    files = sorted(plan.manifest.files)
    groups, content = None, plan.manifest.fingerprint
    if name in (*TILES, SYNTHETIC_TILE):
        train_list = {MAGNETIC_TILE: TILE_TRAIN_LIST, TILES_GROUPED: GROUPED_TRAIN_LIST}.get(name)
        train, test = _tile_samples(files, plan, train_list)
        groups = tile_groups([sample.path for sample in train]) if name == TILES_GROUPED else None
        type_names, pasted_types = ("good", *TILE_TYPES), TILE_TYPES
    else:
        train, test = _mvtec_samples(files)
        kinds = sorted({sample.type for sample in test} - {"good"})
        type_names, pasted_types = ("good", *kinds, "pasted"), ("pasted",)
    if name == AITEX:
        groups = {sample.path: sample.path.rpartition("_")[0] for sample in train}  # the tiles of a strip
        content = content if plan.manifest.note else AITEX_PIXELS  # the bytes of a tile depend on who wrote the file
    if not train or not any(sample.mask for sample in test):
        raise DataError(f"{plan.folder} has no training or no anomalous test images: delete it, then {plan.remedy}")
    parts = (*hold_out(train, pasted_types, groups), test)
    fingerprint = _identity(content, parts)
    return replace(plan, parts=dict(zip(PARTS, parts, strict=True)), fingerprint=fingerprint, type_names=type_names)


def _identity(content: str, parts: Sequence[list[Sample]]) -> str:
    return identity(f"{content} dev {content_id(PASTED_DEFECTS)}", [[s.name for s in samples] for samples in parts])


def data_fingerprint(name: str, root: Path | None = None) -> str:
    """sha256 over the content of the set, the three lists of names and the pasted defects; no image is read."""
    return plan_of(name, root).fingerprint


# ------------------------------------------------------------------------------------------------------------- loading


def paste_defect(image: Image.Image, seed: int) -> tuple[Image.Image, np.ndarray]:
    """The image with a defect drawn on it and its mask (H, W) bool; a colour image gets the change of its grey."""
    grey = np.asarray(image.convert("L"))
    changed, mask = add_defect(grey, TILE_TYPES[seed % len(TILE_TYPES)], np.random.default_rng(seed))
    if image.mode == "L":
        return Image.fromarray(changed), mask
    change = (changed.astype(np.int16) - grey)[..., None]
    return Image.fromarray((np.asarray(image) + change).clip(0, 255).astype(np.uint8)), mask


def read_mask(folder: Path, sample: Sample, size: tuple[int, int], remedy: str) -> np.ndarray:
    """(H, W) bool, none for a normal image; DataError unless the mask has `size` (width, height) as its image."""
    if sample.mask is None:
        return np.zeros(size[::-1], bool)
    grey = decode(folder / sample.mask, remedy).convert("L")
    if grey.size != size:
        raise DataError(
            f"{folder / sample.mask} is {grey.width} x {grey.height} pixels, its image {sample.path} "
            f"{size[0]} x {size[1]}: {remedy}"
        )
    return np.asarray(grey) > 127


def _read_sample(sample: Sample, folder: Path, size: int, remedy: str) -> tuple[np.ndarray, np.ndarray, tuple]:
    """(3, size, size) uint8, (256, 256) uint8, and the native (H, W)."""
    image = decode(folder / sample.path, remedy)
    original = (image.height, image.width)
    if sample.pasted is None:
        mask = read_mask(folder, sample, image.size, remedy)
    else:
        try:
            image, mask = paste_defect(image, sample.pasted)
        except ValueError as error:
            raise DataError(f"{folder / sample.path} is too small for a pasted defect ({error}): {remedy}") from error
    return to_square(image, size), resize_mask(mask), original


def read_split(samples: list[Sample], plan: Plan, size: int, device) -> AnomalySplit:
    read = in_threads(partial(_read_sample, folder=plan.folder, size=size, remedy=plan.remedy), samples)
    images, masks, originals = zip(*read, strict=True)
    masks = torch.from_numpy(np.stack(masks))
    types = torch.tensor([plan.type_names.index(sample.type) for sample in samples], dtype=torch.uint8)
    labels = (types > 0).to(torch.uint8)
    tensors = (torch.from_numpy(np.stack(images)), masks, labels, types, (masks.amax((1, 2)) > 0) | (labels == 0))
    return AnomalySplit(*(t.to(device) for t in tensors), tuple(sample.name for sample in samples), originals)


def load_anomaly(name: str, size: int, device="cpu", root: Path | None = None) -> AnomalyData:
    """Read a set, whole, as tensors on `device`.

    `name`: "magnetic_tile", "magnetic_tile_grouped" (no tile on two sides), "mvtec_ad/<category>", "aitex" (no strip on
    two sides), "synthetic_tile", "synthetic_nut" or "synthetic_fabric"; "sample/" before the name of a real one: its
    committed sample.
    `size`: side of the images in pixels. `root`: where data sets lie, by default `data_dir()`. Magnetic tiles train on
    the 761 images of DifferNet (WACV 2021), or on 763 in whole groups, AITEX as splits/aitex.txt says, the synthetic
    ones on 80 % of the normal ones, MVTec AD as published.
    Raises DataError naming the file and the remedy; ValueError for a size below 1.
    """
    check_size(size)
    plan = plan_of(name, root)
    parts = {part: read_split(samples, plan, size, device) for part, samples in plan.parts.items()}
    return AnomalyData(name, plan.label, plan.type_names, **parts, fingerprint=plan.fingerprint)


# ---------------------------------------------------------------------------------------------------------- own images


def from_good_folder(folder: Path, size: int, device="cpu") -> AnomalyData:
    """A reader's own good images, anywhere below `folder`, as a set: nine tenths to train on, the rest as dev with
    pasted defects. Copies of images of dev are left out of training.

    The test split is the dev split: there is nothing else to test on. Needs 20 images; DataError otherwise.
    """
    folder = Path(folder)
    paths = find_images(folder)
    for path in paths:
        words = {part.lower() for part in path.relative_to(folder).parts[:-1]}
        if words & NOT_GOOD or re.search(r"[_-](mask|gt)$", path.stem.lower()):
            raise DataError(f"{path} looks like a test image or a mask: give the folder of the good images alone")
    content = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    if (different := len(set(content.values()))) < 20:
        raise DataError(f"{folder} holds {different} different images: training needs at least 20 good ones")
    train, dev = hold_out([Sample(path) for path in content], TILE_TYPES)
    held = {content[sample.path] for sample in dev}
    parts = [sample for sample in train if content[sample.path] not in held], dev
    plan = Plan(folder, f"images of {folder.name}", "replace this image", None, type_names=("good", *TILE_TYPES))
    train, dev = (read_split(samples, plan, size, device) for samples in parts)
    fingerprint = _identity(hashlib.sha256(repr(content).encode()).hexdigest(), parts)
    return AnomalyData(folder.resolve().name, plan.label, plan.type_names, train, dev, dev, fingerprint)
