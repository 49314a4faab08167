"""The synthetic sets: published layouts, reproducible bytes, and masks that say where the defect is."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation

from defectlab.data.synthetic.pasted import KINDS, add_defect
from defectlab.data.synthetic.tiles import draw_tile, write_magnetic_tile, write_mvtec

MEDIAN_AREA = {"blowhole": 0.0014, "crack": 0.0031, "break": 0.013, "fray": 0.16, "uneven": 0.24}
SMALL_COUNTS = {"Free": 3, "Blowhole": 2, "Break": 2, "Crack": 2, "Fray": 2, "Uneven": 3}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def grey(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L", path
        return np.array(image)


def other_tile(name: str) -> np.ndarray:
    """Tiles that `draw_tile` never makes: flat, nearly black, nearly white, a ramp, pure noise."""
    ramp = np.linspace(0, 255, 37 * 211).reshape(37, 211).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (103, 33), dtype=np.uint8)
    flat = {"flat": 128, "black": 0, "white": 255}
    return {"ramp": ramp, "noise": noise}[name] if name not in flat else np.full((32, 64), flat[name], np.uint8)


@pytest.mark.parametrize("shape", [(32, 32), (64, 150), (160, 48)])
def test_tile_is_seeded_and_textured_along_the_columns(shape):
    tile = draw_tile(np.random.default_rng(5), *shape)
    assert tile.shape == shape and tile.dtype == np.uint8
    np.testing.assert_array_equal(tile, draw_tile(np.random.default_rng(5), *shape))
    assert not np.array_equal(tile, draw_tile(np.random.default_rng(6), *shape))
    inner = tile[4:-4, 4:-4].astype(float)  # polishing lines: grey changes faster across them than along them
    assert np.abs(np.diff(inner, axis=1)).mean() > 1.2 * np.abs(np.diff(inner, axis=0)).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(32, 32), (32, 400), (131, 33), (120, 180)])
def test_defect_changes_the_image_inside_its_mask_only(kind, shape):
    for seed in range(12):
        rng = np.random.default_rng([seed, *shape])
        tile = draw_tile(rng, *shape)
        before = tile.copy()
        image, mask = add_defect(tile, kind, rng)
        np.testing.assert_array_equal(tile, before)
        assert image.shape == mask.shape == shape and image.dtype == np.uint8 and mask.dtype == bool
        assert 6 <= mask.sum() < mask.size / 2
        change = np.abs(image.astype(int) - tile)
        assert change[mask].mean() > 4, (seed, "the defect is visible")
        assert change[~binary_dilation(mask, iterations=2)].max(initial=0) == 0
        outline = binary_dilation(mask, iterations=2) & ~mask
        assert change[outline].mean() < 0.5 * change[mask].mean()
        assert np.isin(image[mask], (0, 255)).mean() < 0.2, (seed, "the defect is not saturated")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["flat", "black", "white", "ramp", "noise"])
def test_defect_is_visible_on_any_tile(kind, name):
    tile = other_tile(name)
    for seed in range(10):
        image, mask = add_defect(tile, kind, np.random.default_rng(seed))
        assert 6 <= mask.sum() < mask.size / 2
        assert np.abs(image.astype(int) - tile)[mask].mean() > 2, seed


@pytest.mark.parametrize("kind", KINDS)
def test_defect_areas_are_those_of_the_real_set(kind):
    tile = np.full((240, 300), 100, np.uint8)
    shares = [add_defect(tile, kind, np.random.default_rng(seed))[1].mean() for seed in range(41)]
    assert MEDIAN_AREA[kind] / 1.6 < np.median(shares) < MEDIAN_AREA[kind] * 1.6


def test_shapes_are_those_of_their_kind():
    tile = np.full((200, 240), 100, np.uint8)
    for seed in range(20):
        masks = {kind: add_defect(tile, kind, np.random.default_rng(seed))[1] for kind in KINDS}
        thick = ~binary_dilation(~masks["crack"], iterations=3)
        assert not thick.any(), (seed, "a crack is thin")
        for kind in ("break", "fray", "uneven"):
            border = np.concatenate([masks[kind][edge] for edge in (0, -1)] + [masks[kind][:, e] for e in (0, -1)])
            assert border.any(), (seed, kind, "touches the border")
        assert masks["uneven"][[0, -1]].mean(axis=1).max() == 1, (seed, "uneven covers one end of the tile")


def test_contrast_follows_the_grey_spread_of_the_tile():
    tile = draw_tile(np.random.default_rng(0), 120, 160)
    dull = (100 + (tile.astype(float) - tile.mean()) * 0.4).astype(np.uint8)
    strong, weak = (
        np.mean(
            [
                np.abs(image.astype(int) - source)[mask].mean()
                for image, mask in (add_defect(source, "uneven", np.random.default_rng(s)) for s in range(8))
            ]
        )
        for source in (tile, dull)
    )
    assert 0.25 < weak / strong < 0.7


def test_wrong_input_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="use one of blowhole, break, crack, fray, uneven"):
        add_defect(np.zeros((64, 64), np.uint8), "dent", rng)
    with pytest.raises(ValueError, match="grey uint8"):
        add_defect(np.zeros((64, 64, 3), np.uint8), "crack", rng)
    with pytest.raises(ValueError, match="grey uint8"):
        add_defect(np.zeros((64, 64)), "crack", rng)
    with pytest.raises(ValueError, match="at least 32"):
        add_defect(np.zeros((64, 31), np.uint8), "crack", rng)
    with pytest.raises(ValueError, match="at least 32"):
        draw_tile(rng, 20, 90)


def test_magnetic_tile_layout(tmp_path):
    write_magnetic_tile(tmp_path, seed=3)  # the default counts; about a second
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "MT_Blowhole", "MT_Break", "MT_Crack", "MT_Fray", "MT_Free", "MT_Uneven",
    ]  # fmt: skip
    empty, soft, ids, ratios = {}, 0, [], []
    for folder in tmp_path.iterdir():
        images = sorted((folder / "Imgs").glob("*.jpg"))
        masks = sorted((folder / "Imgs").glob("*.png"))
        assert [p.stem for p in images] == [p.stem for p in masks]
        assert len(images) == (60 if folder.name == "MT_Free" else 6)
        empty[folder.name] = 0
        for image_path, mask_path in zip(images, masks, strict=True):
            ids.append(re.fullmatch(r"exp[0-6]_num_(\d+)", image_path.stem)[1])
            image, mask = grey(image_path), grey(mask_path)
            assert image.shape == mask.shape and 89 <= image.shape[0] <= 160 and 44 <= image.shape[1] <= 250
            ratios.append(image.shape[1] / image.shape[0])
            empty[folder.name] += not (mask > 127).any()
            soft += ((mask > 0) & (mask < 255)).any()
            if folder.name == "MT_Free":
                assert not mask.any()
    assert empty == {"MT_Free": 60, "MT_Uneven": 1} | {f"MT_{t}": 0 for t in ("Blowhole", "Break", "Crack", "Fray")}
    assert 5 <= soft <= 25
    assert len(set(ids)) == len(ids) == 90
    assert min(ratios) < 0.6 and max(ratios) > 1.8


def test_magnetic_tile_is_reproducible(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_magnetic_tile(tmp_path / name, seed=seed, counts=SMALL_COUNTS)
    first, again, other = (folder_bytes(tmp_path / name) for name in "abc")
    assert len(first) == 2 * sum(SMALL_COUNTS.values())
    assert first == again
    assert not set(first.values()) & {v for k, v in other.items() if k.endswith(".jpg")}


def test_magnetic_tile_counts(tmp_path):
    write_magnetic_tile(tmp_path, counts={"Crack": 1, "Uneven": 1})
    files = list(tmp_path.rglob("*.png"))
    assert sorted(p.parent.parent.name for p in files) == ["MT_Crack", "MT_Uneven"]
    assert all((grey(p) > 127).any() for p in files)  # a single Uneven keeps its mask
    with pytest.raises(ValueError, match=r"'crack'.*Blowhole"):
        write_magnetic_tile(tmp_path, counts={"crack": 1})


def test_mvtec_layout_and_reproducibility(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_mvtec(tmp_path / name, seed=seed, size=64, train=4, test=3)
    root = tmp_path / "a" / "metal_nut"
    assert [p.name for p in sorted((root / "train" / "good").iterdir())] == [f"{i:03d}.png" for i in range(4)]
    assert sorted(p.name for p in (root / "test").iterdir()) == ["bent", "color", "flip", "good", "scratch"]
    assert sorted(p.name for p in (root / "ground_truth").iterdir()) == ["bent", "color", "flip", "scratch"]
    for kind in ("bent", "color", "flip", "scratch"):
        for path in sorted((root / "test" / kind).iterdir()):
            mask = grey(root / "ground_truth" / kind / f"{path.stem}_mask.png")
            with Image.open(path) as image:
                assert image.mode == "RGB" and image.size == (64, 64) == mask.shape
            assert set(np.unique(mask)) == {0, 255}
            assert (mask > 0).mean() > 0.2 if kind == "flip" else (mask > 0).mean() < 0.15
    first, again, other = (folder_bytes(tmp_path / name) for name in "abc")
    assert first == again and first != other
