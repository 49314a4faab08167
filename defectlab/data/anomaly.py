"""Readers of the anomaly sets: magnetic tiles, MVTec AD, and the drawn stand-in, all in the same form.

Training images are normal; the test set has normal and anomalous images with masks. A tenth of the training images is
held out as `dev`, where design choices are made, with a defect pasted on a copy of each (`synthetic.add_defect`).
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from defectlab.data import fetch as store
from defectlab.data.images import MASK_SIZE, decode, resize_mask, to_square
from defectlab.data.splits import _shuffled
from defectlab.files import DataError, data_dir

MAGNETIC_TILE = "magnetic_tile"
SYNTHETIC_TILE, SYNTHETIC_NUT = "synthetic_tile", "synthetic_nut"
SYNTHETIC = {SYNTHETIC_TILE: "synthetic tiles", SYNTHETIC_NUT: "synthetic nuts"}  # name: label in tables
TILE_TYPES = ("blowhole", "break", "crack", "fray", "uneven")
TILE_TRAIN_LIST = Path(__file__).parent / "splits" / "magnetic_tile_train_761.txt"
# fmt: off
MVTEC_CATEGORIES = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut",
    "pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper",
)
# fmt: on
DEV_VERSION = 1  # raise when `add_defect` or the choice of dev images changes: it enters the fingerprint
_PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class AnomalySplit:
    """N images and their truth, as tensors on one device.

    `images` are resized without regard to their aspect ratio (antialiased, bilinear); grey images fill all three
    channels. A mask pixel is 1 where the mask file has more than 127, taken at native size and then resized
    (nearest-exact). `has_mask` is False for an anomalous image whose mask is empty: it counts in image metrics and is
    left out of pixel metrics. `names` are the files' paths in the set; a pasted defect adds "+type".
    """

    images: Tensor  # (N, 3, size, size) uint8
    masks: Tensor  # (N, 256, 256) uint8, 1 = defect
    labels: Tensor  # (N,) uint8, 1 = anomalous
    types: Tensor  # (N,) uint8, index into AnomalyData.type_names, 0 = "good"
    has_mask: Tensor  # (N,) bool
    names: tuple[str, ...]
    original_sizes: tuple[tuple[int, int], ...]  # (H, W) in pixels

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class AnomalyData:
    """A set as the notebooks use it. `train` is normal only, `dev` half normal and half pasted defects.

    `fingerprint` is the sha256 over the content of the set, the three lists of names and DEV_VERSION. `derived` holds
    what is computed from the images once, such as a teacher's features; a copy with other images starts without.
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
    """A picture that has not been read yet."""

    path: str  # relative to the set's folder
    type: str = "good"
    mask: str | None = None  # None for a normal image
    pasted: int | None = None  # a defect is drawn onto the image with this seed

    @property
    def name(self) -> str:
        return self.path if self.pasted is None else f"{self.path}+{self.type}"


def _paste_defect(image: Image.Image, kind: str, seed: int) -> tuple[Image.Image, np.ndarray]:
    """The image with a defect drawn on it and its mask (H, W) bool; a colour image gets the change of its grey."""
    from defectlab.data.synthetic.pasted import add_defect  # here, because the drawing needs scipy and reading does not

    grey = np.asarray(image.convert("L"))
    changed, mask = add_defect(grey, kind, np.random.default_rng(seed))
    if image.mode == "L":
        return Image.fromarray(changed), mask
    change = (changed.astype(np.int16) - grey)[..., None]
    return Image.fromarray((np.asarray(image) + change).clip(0, 255).astype(np.uint8)), mask


def _read_sample(
    folder: Path, sample: Sample, size: int, remedy: str
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """(3, size, size) uint8, (256, 256) uint8, and the native (H, W)."""
    image = decode(folder / sample.path, remedy)
    original = (image.height, image.width)
    mask = np.zeros((1, 1), bool)
    if sample.pasted is not None:
        try:
            image, mask = _paste_defect(image, TILE_TYPES[sample.pasted % len(TILE_TYPES)], sample.pasted)
        except ValueError as error:
            raise DataError(f"{folder / sample.path} is too small for a pasted defect ({error}): {remedy}") from error
    elif sample.mask is not None:
        grey = np.asarray(decode(folder / sample.mask, remedy).convert("L"))
        if grey.shape != original:
            raise DataError(
                f"{folder / sample.mask} is {grey.shape[1]} x {grey.shape[0]} pixels, its image {sample.path} "
                f"{original[1]} x {original[0]}: {remedy}"
            )
        mask = grey > 127
    return to_square(image, size), resize_mask(mask), original


def _read_split(
    folder: Path, samples: list[Sample], type_names: tuple[str, ...], size: int, device, remedy: str
) -> AnomalySplit:
    images = np.empty((len(samples), 3, size, size), np.uint8)
    masks = np.empty((len(samples), MASK_SIZE, MASK_SIZE), np.uint8)
    originals = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # PIL decodes and resizes outside the GIL
        read = pool.map(lambda sample: _read_sample(folder, sample, size, remedy), samples)
        for index, (image, mask, original) in enumerate(read):
            images[index], masks[index] = image, mask
            originals.append(original)
    types = torch.tensor([type_names.index(sample.type) for sample in samples], dtype=torch.uint8)
    labels = (types > 0).to(torch.uint8)
    has_mask = torch.from_numpy(masks.any(axis=(1, 2))) | (labels == 0)
    tensors = (torch.from_numpy(images), torch.from_numpy(masks), labels, types, has_mask)
    names = tuple(sample.name for sample in samples)
    return AnomalySplit(*(tensor.to(device) for tensor in tensors), names, tuple(originals))


def _tile_samples(files: list[str], folder: Path, train_list: Path | None) -> tuple[list[Sample], list[Sample]]:
    """Train and test samples of the tile layout, MT_<Type>/Imgs/<name>.jpg with a mask <name>.png beside it."""
    normal = [path for path in files if path.startswith("MT_Free/") and path.endswith(".jpg")]
    if train_list is None:
        train = set(_shuffled(normal, "train")[: round(0.8 * len(normal))])
    else:
        listed = train_list.read_text(encoding="utf-8").split()
        train = {f"MT_Free/Imgs/{name}" for name in listed}
        unknown = sorted(train - set(normal))
        if unknown:
            raise DataError(f"{train_list.name} lists {unknown[0]}, which {folder} does not hold: fetch the set again")
    test = [Sample(path) for path in normal if path not in train]
    for kind in TILE_TYPES:
        images = [path for path in files if path.startswith(f"MT_{kind.capitalize()}/") and path.endswith(".jpg")]
        test += [Sample(path, kind, path.removesuffix(".jpg") + ".png") for path in images]
    return [Sample(path) for path in sorted(train)], test


def _mvtec_samples(files: list[str]) -> tuple[list[Sample], list[Sample]]:
    """Train and test samples of the MVTec AD layout: train/good, test/<type>, ground_truth/<type>/NNN_mask.png."""
    pictures = [path for path in files if Path(path).suffix.lower() in _PICTURES]
    train = [Sample(path) for path in pictures if path.startswith("train/good/")]
    test = [Sample(path) for path in pictures if path.startswith("test/good/")]
    for path in pictures:
        part, kind = path.split("/")[:2]
        if part == "test" and kind != "good":
            test.append(Sample(path, kind, f"ground_truth/{kind}/{Path(path).stem}_mask.png"))
    return train, test


def _hold_out(train: list[Sample], pasted_types: tuple[str, ...]) -> tuple[list[Sample], list[Sample]]:
    """(train without them, dev): a tenth of the normal images, then a copy of each with a defect, types in turn."""
    chosen = set(_shuffled([sample.path for sample in train], "dev")[: round(len(train) / 10)])
    normal = [sample for sample in train if sample.path in chosen]
    pasted = [
        Sample(sample.path, pasted_types[index % len(pasted_types)], pasted=index)
        for index, sample in enumerate(normal)
    ]
    return [sample for sample in train if sample.path not in chosen], normal + pasted


# ------------------------------------------------------------------------------------------------------------- loading


def ensure_synthetic(root: Path, name: str = SYNTHETIC_TILE) -> store.Manifest:
    """Draw a stand-in into `root / name` unless this version's drawing is already there."""
    from defectlab.data.synthetic import tiles as synthetic

    nut = partial(synthetic.write_mvtec, category=".")  # the set's folder is the category's
    draw = {SYNTHETIC_TILE: synthetic.write_magnetic_tile, SYNTHETIC_NUT: nut}[name]
    code = store.code_digest(Path(synthetic.__file__).parent)
    source = f"defectlab.data.synthetic, seed 0, code {code[:12]}"
    return store.ensure_drawn(root / name, SYNTHETIC[name], source, draw)


@dataclass(frozen=True)
class Plan:
    """A set before any picture is read: where it lies, its samples, and the fingerprint of both."""

    folder: Path
    label: str
    remedy: str
    type_names: tuple[str, ...]
    train: list[Sample]
    dev: list[Sample]
    test: list[Sample]
    fingerprint: str


def plan_of(name: str, root: Path | None) -> Plan:
    root = data_dir() if root is None else Path(root)
    folder = root / name
    if name in SYNTHETIC:
        manifest, remedy, label = ensure_synthetic(root, name), f"delete {folder} and load it again", SYNTHETIC[name]
    elif name == MAGNETIC_TILE:
        remedy = "run `python data_scripts/magnetic_tile.py`"
        manifest, label = store.quick_check(folder, remedy), "magnetic tiles"
    elif name.startswith("mvtec_ad/") and name.removeprefix("mvtec_ad/") in MVTEC_CATEGORIES:
        category = name.removeprefix("mvtec_ad/")
        remedy = f"run `python data_scripts/mvtec_ad.py --category {category}`"
        manifest, label = store.quick_check(folder, remedy), f"MVTec {category}"
    else:
        raise DataError(
            f"there is no anomaly set {name!r}: choose {MAGNETIC_TILE}, {', '.join(SYNTHETIC)} or mvtec_ad/ followed "
            f"by one of {', '.join(MVTEC_CATEGORIES)}"
        )
    if manifest.note:
        label += f" ({manifest.note} copy)"

    files = sorted(manifest.files)
    if name in (MAGNETIC_TILE, SYNTHETIC_TILE):
        train, test = _tile_samples(files, folder, TILE_TRAIN_LIST if name == MAGNETIC_TILE else None)
        type_names, pasted_types = ("good", *TILE_TYPES), TILE_TYPES
    else:
        train, test = _mvtec_samples(files)
        kinds = sorted({sample.type for sample in test} - {"good"})
        type_names, pasted_types = ("good", *kinds, "pasted"), ("pasted",)
    if not train or not any(sample.mask for sample in test):
        raise DataError(f"{folder} has no training or no anomalous test images: delete it, then {remedy}")
    train, dev = _hold_out(train, pasted_types)
    return Plan(
        folder, label, remedy, type_names, train, dev, test, _identity(manifest.fingerprint, (train, dev, test))
    )


def _identity(content: str, lists: tuple[list[Sample], ...]) -> str:
    identity = hashlib.sha256(f"{content} dev {DEV_VERSION}\n".encode())
    for samples in lists:
        identity.update("".join(f"{sample.name}\n" for sample in samples).encode() + b"\n")
    return identity.hexdigest()


def data_fingerprint(name: str, root: Path | None = None) -> str:
    """`AnomalyData.fingerprint` of a set, from its manifest alone: no picture is read. Errors as `load_anomaly`."""
    return plan_of(name, root).fingerprint


def load_anomaly(name: str, size: int, device="cpu", root: Path | None = None) -> AnomalyData:
    """Read a set, whole, as tensors on `device`.

    `name`: "magnetic_tile", "mvtec_ad/<category>", "synthetic_tile" or "synthetic_nut" (drawn on first use). `size`:
    side of the images in pixels. `root`: where data sets lie, by default `data_dir()`. The split depends on nothing
    but the set: magnetic tiles train on the 761 images of DifferNet (WACV 2021), the drawn ones on 80 % of the normal
    ones, MVTec AD as published. Raises DataError naming the file and the remedy; ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    plan = plan_of(name, root)
    splits = [
        _read_split(plan.folder, samples, plan.type_names, size, device, plan.remedy)
        for samples in (plan.train, plan.dev, plan.test)
    ]
    return AnomalyData(name, plan.label, plan.type_names, *splits, plan.fingerprint)


def from_good_folder(folder: Path, size: int, device="cpu") -> AnomalyData:
    """A reader's own good pictures as a set: nine tenths to train on, the rest as dev with pasted defects.

    The test split is the dev split: there is nothing else to test on. Needs 20 pictures; DataError otherwise.
    """
    folder = Path(folder)
    names = sorted(p.name for p in folder.glob("*") if p.suffix.lower() in _PICTURES)
    if len(names) < 20:
        raise DataError(
            f"{folder} holds {len(names)} pictures: training needs at least 20 good ones (jpg, png, bmp, tif)"
        )
    train, dev = _hold_out([Sample(name) for name in names], TILE_TYPES)
    type_names, remedy = ("good", *TILE_TYPES), "replace this picture"
    splits = [_read_split(folder, samples, type_names, size, device, remedy) for samples in (train, dev)]
    content = hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()
    identity = _identity(content, (train, dev))
    return AnomalyData(folder.name, f"pictures of {folder.name}", type_names, *splits, splits[1], identity)


def load_folder(folder: Path, size: int, device="cpu") -> tuple[Tensor, tuple[str, ...]]:
    """A reader's own pictures: ((N, 3, size, size) uint8, file names), resized as the sets are, sorted by name.

    Reads jpg, png, bmp and tif directly in `folder`; DataError if there is none or one cannot be decoded.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in _PICTURES)
    if not paths:
        raise DataError(f"{folder} holds no jpg, png, bmp or tif picture: give the folder that holds them")
    images = [to_square(decode(path, "replace or remove it"), size) for path in paths]
    return torch.from_numpy(np.stack(images)).to(device), tuple(path.name for path in paths)
