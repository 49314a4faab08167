"""The synthetic sets: published layouts, the same bytes for one seed, masks and boxes that say where the defect is.

That the default sets are those of before is checked by their content (test_data_fingerprints.py).
"""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, label

from defectlab.data.annotations import read_deep_pcb, read_voc
from defectlab.data.synthetic.boards import ADDS_COPPER, BOARD_KINDS, board_pair, write_board
from defectlab.data.synthetic.pasted import KINDS, add_defect
from defectlab.data.synthetic.steel import STEEL_KINDS, VISIBLE, steel_image, write_steel
from defectlab.data.synthetic.tiles import draw_tile, write_magnetic_tile, write_mvtec

MEDIAN_AREA = {"blowhole": 0.0014, "crack": 0.0031, "break": 0.013, "fray": 0.16, "uneven": 0.24}
COUNTS = {"Free": 3, "Blowhole": 2, "Break": 2, "Crack": 2, "Fray": 2, "Uneven": 3}
# What a kind does to the number of pieces of copper and of bare ground around it.
PIECES = {"open": (1, -1), "short": (-1, 1), "mousebite": (0, 0), "spur": (0, 0), "copper": (1, 0), "pin-hole": (0, 1)}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def grey(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L", path
        return np.array(image)


def assert_exact(different: np.ndarray, boxes: list, inside_only: np.ndarray | None = None) -> None:
    """Each box is the smallest around the True pixels of `different` (H, W) in it; no True pixel lies outside all."""
    height, width = different.shape
    covered = np.zeros(different.shape, bool)
    for x1, y1, x2, y2 in boxes:
        assert 1 <= x1 < x2 <= width and 1 <= y1 < y2 <= height
        part = different[y1:y2, x1:x2]
        assert all(side.any() for side in (part[0], part[-1], part[:, 0], part[:, -1]))
        assert not covered[y1:y2, x1:x2].any(), "boxes do not overlap"
        covered[y1:y2, x1:x2] = True
    assert not (different if inside_only is None else inside_only)[~covered].any()


@pytest.mark.parametrize(
    "write",
    [
        lambda folder, seed: write_magnetic_tile(folder, seed, COUNTS),
        lambda folder, seed: write_mvtec(folder, seed=seed, size=64, train=4, test=3),
        lambda folder, seed: write_steel(folder, 2, seed=seed),
        lambda folder, seed: write_board(folder, 2, seed=seed),
    ],
)
def test_same_seed_same_bytes(write, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / name, seed)
    first, again, other = (folder_bytes(tmp_path / name) for name in "abc")
    assert first and first == again and first != other
    assert not {content for path, content in first.items() if path.endswith(".jpg")} & set(other.values())


# --- Defects on tiles ------------------------------------------------------------------------------------------------


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
def test_defect_is_visible_on_any_tile(kind):
    """Tiles that `draw_tile` never makes: flat, nearly black, nearly white, a ramp, pure noise."""
    tiles = [np.full((32, 64), level, np.uint8) for level in (128, 0, 255)]
    tiles.append(np.linspace(0, 255, 37 * 211).reshape(37, 211).astype(np.uint8))
    tiles.append(np.random.default_rng(0).integers(0, 256, (103, 33), dtype=np.uint8))
    for number, tile in enumerate(tiles):
        for seed in range(10):
            image, mask = add_defect(tile, kind, np.random.default_rng(seed))
            assert 6 <= mask.sum() < mask.size / 2
            assert np.abs(image.astype(int) - tile)[mask].mean() > 2, (number, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_areas_and_shapes_are_those_of_the_kind(kind):
    """Areas as in the real set; a crack is thin, the large kinds touch the border."""
    tile, shares = np.full((240, 300), 100, np.uint8), []
    for seed in range(41):
        mask = add_defect(tile, kind, np.random.default_rng(seed))[1]
        shares.append(mask.mean())
        if kind == "crack":
            assert not (~binary_dilation(~mask, iterations=3)).any(), seed
        if kind in ("break", "fray", "uneven"):
            assert any(side.any() for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1])), seed
    assert MEDIAN_AREA[kind] / 1.6 < np.median(shares) < MEDIAN_AREA[kind] * 1.6


def test_contrast_follows_the_grey_spread_of_the_tile():
    tile = draw_tile(np.random.default_rng(0), 120, 160)
    dull = (100 + (tile.astype(float) - tile.mean()) * 0.4).astype(np.uint8)

    def contrast(source):
        pairs = [add_defect(source, "uneven", np.random.default_rng(seed)) for seed in range(8)]
        return np.mean([np.abs(image.astype(int) - source)[mask].mean() for image, mask in pairs])

    assert 0.25 < contrast(dull) / contrast(tile) < 0.7


def test_wrong_input_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    for image, kind, message in (
        (np.zeros((64, 64), np.uint8), "dent", "use one of blowhole, break, crack, fray, uneven"),
        (np.zeros((64, 64, 3), np.uint8), "crack", "grey uint8"),
        (np.zeros((64, 64)), "crack", "grey uint8"),
        (np.zeros((64, 31), np.uint8), "crack", "at least 32"),
    ):
        with pytest.raises(ValueError, match=message):
            add_defect(image, kind, rng)
    with pytest.raises(ValueError, match="at least 32"):
        draw_tile(rng, 20, 90)
    with pytest.raises(ValueError, match=r"'crack'.*Blowhole"):
        write_magnetic_tile(tmp_path, counts={"crack": 1})
    with pytest.raises(ValueError, match="size=100 or more"):
        write_steel(tmp_path, size=99)
    with pytest.raises(ValueError, match="size=160 or more"):
        write_board(tmp_path, size=159)
    assert not folder_bytes(tmp_path)


# --- Tiles and nuts --------------------------------------------------------------------------------------------------


def test_magnetic_tile_layout(synthetic):
    empty, soft, ids, ratios = {}, 0, [], []
    for folder in sorted((synthetic / "synthetic_tile").glob("MT_*")):
        images, masks = (sorted((folder / "Imgs").glob(pattern)) for pattern in ("*.jpg", "*.png"))
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
            assert folder.name != "MT_Free" or not mask.any()
    assert empty == {"MT_Free": 60, "MT_Uneven": 1} | {f"MT_{t}": 0 for t in ("Blowhole", "Break", "Crack", "Fray")}
    assert 5 <= soft <= 25 and len(set(ids)) == len(ids) == 90
    assert min(ratios) < 0.6 and max(ratios) > 1.8


def test_mvtec_layout(synthetic):
    root, kinds = synthetic / "synthetic_nut", ["bent", "color", "flip", "scratch"]
    assert [p.name for p in sorted((root / "train" / "good").iterdir())] == [f"{i:03d}.png" for i in range(24)]
    assert sorted(p.name for p in (root / "test").iterdir()) == sorted([*kinds, "good"])
    assert sorted(p.name for p in (root / "ground_truth").iterdir()) == kinds
    for path in (path for kind in kinds for path in sorted((root / "test" / kind).iterdir())):
        mask = grey(root / "ground_truth" / path.parent.name / f"{path.stem}_mask.png")
        with Image.open(path) as image:
            assert image.mode == "RGB" and image.size == (128, 128) == mask.shape
        assert set(np.unique(mask)) == {0, 255}
        assert (mask > 0).mean() > 0.2 if path.parent.name == "flip" else (mask > 0).mean() < 0.15


# --- Steel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STEEL_KINDS)
@pytest.mark.parametrize("size", [100, 200])
def test_steel_boxes_enclose_what_differs(kind, size):
    """And scratches are bright, the other kinds dark."""
    unit, counts = size / 200, set()
    for seed in range(12):
        clean, image, objects = steel_image(np.random.default_rng(seed), kind, size)
        assert clean.shape == image.shape == (size, size) and image.dtype == np.uint8
        change = image.astype(int) - clean
        assert_exact(np.abs(change) > VISIBLE, [box for _, box in objects], inside_only=change != 0)
        assert objects[0][0] == kind
        for name, (x1, y1, x2, y2) in objects:
            assert min(x2 - x1, y2 - y1) >= 8 * unit and max(x2 - x1, y2 - y1) <= 151 * unit
            window = change[y1:y2, x1:x2]
            assert np.percentile(np.abs(window), 98) > 20  # seen, not only measured: the strongest fiftieth of it
            assert (window.mean() > 0) == (name == "scratches")
        counts.add(len(objects))
    assert counts <= {1, 2, 3, 4} and len(counts) > 1


def test_steel_layout_holds_the_drawing_and_its_boxes(synthetic):
    folder = synthetic / "synthetic_steel"
    read = read_voc(folder, STEEL_KINDS)
    stems = {f"{kind}_{number}" for kind in STEEL_KINDS for number in range(1, 21)}
    assert {image.path for image in read.images} == {folder / "IMAGES" / f"{stem}.jpg" for stem in stems}
    assert not read.notes.total() and len(list(folder.glob("ANNOTATIONS/*.xml"))) == 120
    foreign = 0
    for found in read.images:
        kind, _, number = found.path.stem.rpartition("_")
        _, image, objects = steel_image(np.random.default_rng([0, STEEL_KINDS.index(kind), int(number)]), kind, 200)
        with Image.open(found.path) as stored:
            assert stored.mode == "RGB" and stored.size == (200, 200)
            assert (np.abs(np.array(stored, int) - image[..., None]).mean((0, 1)) < 3).all()
        assert [(STEEL_KINDS[k], tuple(b)) for k, b in zip(found.labels, found.boxes, strict=True)] == objects
        foreign += {name for name, _ in objects} != {kind}
    assert 1 <= foreign <= 30


# --- Boards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [160, 320, 640])
def test_board_defects_are_of_their_kind_and_boxes_exact(size):
    unit, seen = size / 320, set()
    for seed in range(12):
        template, copper, objects = board_pair(np.random.default_rng(seed), size)
        assert template.shape == copper.shape == (size, size) and template.dtype == copper.dtype == bool
        assert 0.1 < template.mean() < 0.7 and 3 <= len(objects) <= 10
        assert_exact(template != copper, [box for _, box in objects])
        for kind, (x1, y1, x2, y2) in objects:
            assert 12 * unit <= max(x2 - x1, y2 - y1) <= 40 * unit and min(x2 - x1, y2 - y1) >= 6 * unit
            around = np.s_[y1 - 2 : y2 + 2, x1 - 2 : x2 + 2]
            before, after = ([label(m)[1] for m in (b[around], ~b[around])] for b in (template, copper))
            assert tuple(np.subtract(after, before)) == PIECES[kind], (seed, kind)
            assert (copper & ~template)[around].any() == (kind in ADDS_COPPER)
            assert (template & ~copper)[around].any() == (kind not in ADDS_COPPER)
            seen.add(kind)
    assert seen == set(BOARD_KINDS)


def test_board_layout_holds_the_drawing_and_its_boxes(tmp_path):
    write_board(tmp_path, count=23, size=320)
    root = tmp_path / "PCBData"
    lists = [(root / name).read_text().splitlines() for name in ("trainval.txt", "test.txt")]
    assert [len(lines) for lines in lists] == [18, 5]
    files, labels = {"trainval.txt", "test.txt"}, []
    read = read_deep_pcb(tmp_path, BOARD_KINDS).images
    for i, (line, found) in enumerate(zip(lists[0] + lists[1], read, strict=True)):
        assert re.fullmatch(r"group(\d{5})/\1/(\1\d{3})\.jpg group\1/\1_not/\2\.txt", line), line
        image, boxes = line.split()
        pair = [image.replace(".jpg", f"_{part}.jpg") for part in ("temp", "test")]
        files |= {boxes, *pair}
        *drawn, objects = board_pair(np.random.default_rng([0, i]), 320)
        for board, copper in zip((grey(root / name) for name in pair), drawn, strict=True):
            np.testing.assert_array_equal(board < 128, copper)  # the threshold undoes the JPEG noise
            assert np.minimum(board, 255 - board).mean() < 3
        assert [(BOARD_KINDS[k], tuple(b)) for k, b in zip(found.labels, found.boxes, strict=True)] == objects
        labels += found.labels.tolist()
    assert set(folder_bytes(root)) == files
    assert np.bincount(labels, minlength=6).min() > 0.5 * len(labels) / 6, "no kind is rare"
