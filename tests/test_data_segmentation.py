"""Stage one's data: the recipe for the nut, the splits and their leakage rule, masks, shares."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from defectlab.data import fetch as store
from defectlab.data import masks as segmentation
from defectlab.data.anomaly import load_anomaly
from defectlab.data.masks import METAL_NUT, SegmentationData, draw_parts, load_segmentation, nut_mask, subset
from defectlab.data.splits import PARTS, read_list
from defectlab.files import DataError

SIZE = 32


@pytest.fixture(scope="module")
def nuts(synthetic: Path) -> SegmentationData:
    return load_segmentation("synthetic_nut", "nut", "paper", SIZE, root=synthetic)


def load(root: Path, target: str, split: str) -> SegmentationData:
    return load_segmentation("synthetic_nut", target, split, SIZE, root=root)


def names_of(data: SegmentationData) -> list[set[str]]:
    return [set(getattr(data, part).names) for part in PARTS]


def pixels_of(path: Path, mode: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert(mode))


# --- The recipe ------------------------------------------------------------------------------------------------------


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_recipe_finds_every_synthetic_nut(synthetic: Path) -> None:
    folder = synthetic / "synthetic_nut"
    outlines = sorted((folder / "nut").rglob("*_mask.png"))
    assert len(outlines) == 54
    for path in outlines:
        image = folder / path.relative_to(folder / "nut").with_name(path.name.replace("_mask", ""))
        assert iou(nut_mask(pixels_of(image, "RGB")), pixels_of(path, "L") > 127) > 0.95, image


def washer(size: int) -> tuple[Image.Image, np.ndarray]:
    """A bright ring on a dark ground, and its mask."""
    image = Image.new("RGB", (size, size), (25, 25, 25))
    draw, unit = ImageDraw.Draw(image), size / 128
    draw.ellipse([20 * unit, 20 * unit, 108 * unit, 108 * unit], (110, 120, 110))
    draw.ellipse([50 * unit, 50 * unit, 78 * unit, 78 * unit], (25, 25, 25))
    return image, np.asarray(image)[..., 1] > 100


@pytest.mark.parametrize("size", [128, 512, 700])
def test_recipe_fills_marks_keeps_the_bore_and_drops_dust(size: int) -> None:
    image, outline = washer(size)
    draw, unit = ImageDraw.Draw(image), size / 128
    draw.ellipse([28 * unit, 60 * unit, 36 * unit, 68 * unit], (25, 25, 25))  # a black mark on the steel
    draw.line([60 * unit, 20 * unit, 60 * unit, 40 * unit], (25, 25, 25), max(1, round(unit)))  # a scratch from outside
    draw.ellipse([4 * unit, 4 * unit, 7 * unit, 7 * unit], (120, 120, 120))  # dust
    mask = nut_mask(np.asarray(image))
    assert mask.dtype == bool and mask.shape == (size, size)
    assert iou(mask, outline) > 0.97
    assert mask[round(34 * unit), round(60 * unit)]  # a narrow gap is closed
    assert not mask[size // 2, size // 2] and not mask[: size // 10, : size // 10].any()


def test_recipe_keeps_dim_lobes_but_no_dim_rim() -> None:
    image, outline = washer(256)
    draw = ImageDraw.Draw(image)
    draw.rectangle([100, 16, 160, 44], (45, 45, 45))  # a lobe out of the light, half as far from the ground as Otsu's
    with_lobe = np.asarray(image)[..., 1] > 30
    assert with_lobe.sum() > outline.sum() + 500
    assert iou(nut_mask(np.asarray(image)), with_lobe) > 0.97
    image, outline = washer(256)
    ImageDraw.Draw(image).ellipse([39, 39, 217, 217], outline=(45, 45, 45), width=2)
    assert iou(nut_mask(np.asarray(image)), outline) > 0.97


def test_recipe_on_a_nut_cut_by_the_border() -> None:
    """The ground above is parted from the ground below, and neither is the bore."""
    image = np.full((128, 128, 3), 25, np.uint8)
    image[40:90] = 120
    image[50:70, 50:70] = 25
    mask = nut_mask(image)
    assert iou(mask, image[..., 0] > 100) > 0.98 and mask[42:88, [0, -1]].all()


def test_recipe_refuses_a_flat_image() -> None:
    noise = np.random.default_rng(0).integers(90, 110, (64, 64, 3), np.uint8)
    for image in (noise, np.full_like(noise, 128)):
        with pytest.raises(ValueError, match="the image has no foreground"):
            nut_mask(image)


# --- Contents --------------------------------------------------------------------------------------------------------


def test_synthetic_set(nuts: SegmentationData) -> None:
    assert (nuts.name, nuts.label, nuts.target) == ("synthetic_nut", "synthetic nuts", "nut")
    assert nuts.type_names == ("good", "bent", "color", "flip", "scratch")
    assert [len(getattr(nuts, part)) for part in PARTS] == [44, 5, 5]
    for part in PARTS:
        split = getattr(nuts, part)
        assert split.images.shape == (len(split), 3, SIZE, SIZE) and split.images.dtype == torch.uint8
        assert split.masks.shape == (len(split), SIZE, SIZE) and split.masks.dtype == torch.uint8
        assert split.masks.max() == 1 and split.types.dtype == torch.uint8
        kinds = [nuts.type_names[t] for t in split.types.tolist()]
        assert kinds == [name.split("/")[1] for name in split.names]
        shares = split.masks.float().mean((1, 2))
        assert (shares > 0.2).all() and (shares < 0.5).all()


def test_masks_lie_on_their_images(nuts: SegmentationData) -> None:
    grey = nuts.train.images.float().mean(1)
    on = nuts.train.masks == 1
    assert (grey[on].mean() > 2.5 * grey[~on].mean()).item()
    turned = nuts.train.masks.flip(0) == 1
    assert grey[on].mean() > grey[turned].mean() + 5


def test_defect_target(synthetic: Path) -> None:
    data = load(synthetic, "defect", "paper")
    for part in PARTS:
        split = getattr(data, part)
        assert torch.equal(split.masks.flatten(1).any(1), split.types > 0), part
    index = data.train.names.index(next(name for name in data.train.names if "/bent/" in name))
    stem = data.train.names[index].removeprefix("test/")
    native = pixels_of(synthetic / "synthetic_nut/ground_truth" / f"{stem}_mask.png", "L") > 127
    small = torch.nn.functional.interpolate(torch.from_numpy(native)[None, None].byte(), SIZE, mode="nearest-exact")
    assert torch.equal(data.train.masks[index], small[0, 0])


# --- Splits and leakage ----------------------------------------------------------------------------------------------


def test_paper_parts_are_disjoint_and_whole(nuts: SegmentationData, synthetic: Path) -> None:
    train, dev, test = names_of(nuts)
    assert not (train & dev or train & test or dev & test)
    folder = synthetic / "synthetic_nut"
    files = [*folder.glob("train/*/*"), *folder.glob("test/*/*")]
    assert train | dev | test == {path.relative_to(folder).with_suffix("").as_posix() for path in files}


def test_good_split_learns_from_no_defect_and_no_test_image(synthetic: Path) -> None:
    data, anomaly = load(synthetic, "nut", "good"), load_anomaly("synthetic_nut", SIZE, root=synthetic)
    train, dev, test = names_of(data)
    assert all(name.startswith("train/good/") for name in train | dev) and not train & dev
    assert not data.train.types.any() and not data.dev.types.any()
    assert test == {name.removesuffix(".png") for name in anomaly.test.names} and not test & (train | dev)
    held_out = {name.removesuffix(".png") for name in anomaly.dev.names if "+" not in name}
    assert dev == held_out and len(dev) == 2
    assert train == {name.removesuffix(".png") for name in anomaly.train.names}


def test_parts_by_hand() -> None:
    """335 images as in the set: sizes, proportions, equal images on one side, no dependence on the files' order."""
    counts = {"good": 242, "bent": 25, "color": 22, "flip": 23, "scratch": 23}
    types = {f"{kind}/{i:03}": kind for kind, count in counts.items() for i in range(count)}
    content = {name: f"{name[:-3]}{int(name[-3:]) // 2}" for name in types}  # pairs of equal images
    twins = draw_parts(types, content)
    assert {len({twins[name] for name in types if content[name] == one}) for one in content.values()} == {1}
    parts = draw_parts(types, {name: name for name in types})
    assert Counter(parts.values()) == {"train": 268, "dev": 33, "test": 34}
    for kind, count in counts.items():
        for part, share in (("train", 0.8), ("dev", 0.1), ("test", 0.1)):
            assert abs(sum(parts[n] == part for n in types if types[n] == kind) - share * count) < 2, (kind, part)
    assert parts == draw_parts(dict(reversed(types.items())), {name: name for name in types})


def test_fingerprint(nuts: SegmentationData, synthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        (target, split): segmentation.segmentation_fingerprint("synthetic_nut", target, split, synthetic)
        for target, split in (("nut", "paper"), ("nut", "good"), ("defect", "paper"))
    }
    assert found["nut", "paper"] == nuts.fingerprint and len(set(found.values())) == 3
    monkeypatch.setattr(segmentation, "decode", None)  # no image is read
    monkeypatch.setattr(segmentation, "NUT_MASKS", "0")  # concerns the nut's masks only
    again = segmentation.segmentation_fingerprint("synthetic_nut", "defect", "paper", synthetic)
    assert again == found["defect", "paper"]


# --- Shares ----------------------------------------------------------------------------------------------------------


def test_subset_of_the_papers_sizes(nuts: SegmentationData) -> None:
    """10, 20 and 50 % of 268 are 27, 54 and 134, each within the next, all in the proportions of the types."""
    counts = [192, 20, 18, 19, 19]
    types = torch.tensor([t for t, count in enumerate(counts) for _ in range(count)], dtype=torch.uint8)
    names = tuple(f"{i:03}" for i in range(268))
    marks = torch.arange(268)
    whole = replace(nuts.train, images=marks, masks=marks + 1000, types=types, names=names)
    parts = [subset(whole, share, seed=0) for share in (0.1, 0.2, 0.5)]
    assert [len(part) for part in parts] == [27, 54, 134]
    for share, small, large in zip((0.1, 0.2, 0.5), parts, [*parts[1:], whole], strict=True):
        assert set(small.names) < set(large.names)
        assert [names[i] for i in small.images.tolist()] == list(small.names)
        assert torch.equal(small.masks, small.images + 1000) and torch.equal(small.types, types[small.images])
        for t, count in enumerate(counts):
            assert abs((small.types == t).sum().item() - share * count) <= 1.01, (share, t)
    assert subset(whole, 1, seed=0) is whole
    assert subset(whole, 0.1, seed=0).names == parts[0].names != subset(whole, 0.1, seed=1).names


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_subset_refuses_what_is_no_share(nuts: SegmentationData, share: float) -> None:
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
        subset(nuts.train, share, 0)


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_list_and_set_that_do_not_fit(synthetic: Path, tmp_path: Path) -> None:
    """A set of another size than the published one, under the published one's name."""
    folder = tmp_path / METAL_NUT
    shutil.copytree(synthetic / "synthetic_nut", folder, ignore=shutil.ignore_patterns("manifest.json", "nut"))
    store.write_manifest(folder, "MVTec AD metal_nut", "a test")
    with pytest.raises(DataError, match=r"metal_nut_segmentation\.txt differ in test/bent/006: delete .*mvtec_ad\.py"):
        load_segmentation(METAL_NUT, "nut", "paper", SIZE, root=tmp_path)
    Image.new("RGB", (128, 128), (60, 60, 60)).save(folder / "train/good/003.png")
    (folder / "manifest.json").unlink()
    store.write_manifest(folder, "MVTec AD metal_nut", "a test")
    with pytest.raises(DataError, match=r"train/good/003\.png: the image has no foreground.*: run `python data"):
        load_segmentation(METAL_NUT, "nut", "good", SIZE, root=tmp_path)


# --- The real set ----------------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_real_list_is_drawn_again(real_set) -> None:
    plan = segmentation._plan(METAL_NUT, "nut", "paper", real_set(METAL_NUT))
    samples = {segmentation._name(s): s for part in plan.parts.values() for s in part}
    parts = draw_parts(*segmentation._types_and_content(plan, samples))
    assert read_list(segmentation.PAPER_LIST) == [f"{name} {part}" for name, part in sorted(parts.items())]


@pytest.mark.real_data
def test_real_defects(real_set) -> None:
    data = load_segmentation(METAL_NUT, "defect", "paper", 128, root=real_set(METAL_NUT))
    assert [len(getattr(data, part)) for part in PARTS] == [268, 33, 34]
    for part in PARTS:  # no defect gets lost in the resize
        split = getattr(data, part)
        assert torch.equal(split.masks.flatten(1).any(1), split.types > 0), part
    assert data.test.types.bincount().tolist() == [25, 3, 2, 2, 2]


@pytest.mark.real_data
def test_real_nuts_against_mvtecs_own_outlines(real_set) -> None:
    """MVTec outlines flipped nuts, whole, and bent lobes: what the docstring of the recipe says."""
    folder = real_set(METAL_NUT) / METAL_NUT
    found, lost = [], []
    for path in sorted(folder.glob("ground_truth/*/*_mask.png")):
        image = next((folder / "test" / path.parent.name).glob(path.name.replace("_mask.png", ".*")))
        mask, outline = nut_mask(pixels_of(image, "RGB")), pixels_of(path, "L") > 127
        if path.parent.name == "flip":
            found.append(iou(mask, outline))
        else:
            lost.append((outline & ~mask).sum() / (outline | mask).sum())
    assert len(found) == 23 and min(found) > 0.96 and np.mean(found) > 0.97
    assert len(lost) == 70 and max(lost) < 0.02 and (np.array(lost) > 0.01).sum() <= 8
