"""The synthetic sets with boxes: published layouts, reproducible bytes, boxes exactly around what differs."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import label

from defectlab.data.annotations import read_deep_pcb, read_voc
from defectlab.data.synthetic.boards import BOARD_KINDS, board_pair, write_board
from defectlab.data.synthetic.steel import STEEL_KINDS, VISIBLE, steel_image, write_steel

# What a kind does to the number of pieces of copper and of bare ground around it.
PIECES = {"open": (1, -1), "short": (-1, 1), "mousebite": (0, 0), "spur": (0, 0), "copper": (1, 0), "pin-hole": (0, 1)}
ADDS_COPPER = {"short", "spur", "copper"}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_exact(different: np.ndarray, boxes: list, inside_only: np.ndarray | None = None) -> None:
    """Each box is the smallest around the True pixels of `different` (H, W) in it; no True pixel lies outside all."""
    height, width = different.shape
    covered = np.zeros(different.shape, bool)
    for x1, y1, x2, y2 in boxes:
        assert 1 <= x1 < x2 <= width and 1 <= y1 < y2 <= height
        part = different[y1:y2, x1:x2]
        for side in (part[0], part[-1], part[:, 0], part[:, -1]):
            assert side.any()
        assert not covered[y1:y2, x1:x2].any(), "boxes do not overlap"
        covered[y1:y2, x1:x2] = True
    assert not (different if inside_only is None else inside_only)[~covered].any()


def voc_boxes(path: Path) -> list[tuple[str, list[int]]]:
    corners = ("xmin", "ymin", "xmax", "ymax")
    objects = ElementTree.parse(path).getroot().iter("object")
    return [(o.findtext("name"), [int(o.findtext(f"bndbox/{c}")) for c in corners]) for o in objects]


def grey(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L", path
        return np.array(image)


@pytest.mark.parametrize("write", [write_steel, write_board])
def test_same_seed_same_bytes(write, tmp_path):
    for folder, count, seed in (("a", 2, 3), ("b", 2, 3), ("c", 2, 4), ("d", 1, 3)):
        write(tmp_path / folder, count=count, seed=seed)
    a, b, c, d = (folder_bytes(tmp_path / folder) for folder in "abcd")
    assert a == b
    images = {name for name in a if name.endswith(".jpg")}
    assert images and images <= set(c) and not any(a[name] == c[name] for name in images)
    assert {n for n in d if n.endswith(".jpg")} < images
    assert all(a[name] == content for name, content in d.items() if not name.endswith(("trainval.txt", "test.txt")))


# ------------------------------------------------------------ steel


@pytest.mark.parametrize("kind", STEEL_KINDS)
@pytest.mark.parametrize("size", [100, 200])
def test_steel_boxes_enclose_what_differs(kind, size):
    unit, counts = size / 200, set()
    for seed in range(12):
        clean, image, objects = steel_image(np.random.default_rng(seed), kind, size)
        assert clean.shape == image.shape == (size, size) and image.dtype == np.uint8
        change = np.abs(image.astype(int) - clean)
        assert_exact(change > VISIBLE, [box for _, box in objects], inside_only=change > 0)
        assert objects[0][0] == kind
        for _, (x1, y1, x2, y2) in objects:
            assert min(x2 - x1, y2 - y1) >= 8 * unit and max(x2 - x1, y2 - y1) <= 151 * unit
            # seen, not only measured: the strongest fiftieth of its pixels
            assert np.percentile(change[y1:y2, x1:x2], 98) > 20
        counts.add(len(objects))
    assert counts <= {1, 2, 3, 4} and len(counts) > 1


def test_scratches_are_bright_and_the_other_kinds_dark():
    for kind in STEEL_KINDS:
        moved = []
        for seed in range(8):
            clean, image, objects = steel_image(np.random.default_rng(seed), kind, 200)
            change = image.astype(float) - clean
            moved += [change[y1:y2, x1:x2].mean() for name, (x1, y1, x2, y2) in objects if name == kind]
        assert all(np.array(moved) > 0) if kind == "scratches" else all(np.array(moved) < 0), (kind, moved)


def test_steel_layout_and_counts(tmp_path):
    write_steel(tmp_path, count=10)
    stems = {f"{kind}_{number}" for kind in STEEL_KINDS for number in range(1, 11)}
    assert set(folder_bytes(tmp_path)) == {f"IMAGES/{s}.jpg" for s in stems} | {f"ANNOTATIONS/{s}.xml" for s in stems}
    foreign = 0
    for stem in stems:
        with Image.open(tmp_path / "IMAGES" / f"{stem}.jpg") as image:
            assert image.mode == "RGB" and image.size == (200, 200)
            red, green, blue = np.moveaxis(np.array(image), 2, 0)
        assert (red == green).all() and (red == blue).all()
        root = ElementTree.parse(tmp_path / "ANNOTATIONS" / f"{stem}.xml").getroot()
        assert root.findtext("filename") == f"{stem}.jpg"
        assert [int(root.findtext(f"size/{side}")) for side in ("width", "height", "depth")] == [200, 200, 1]
        names = {name for name, _ in voc_boxes(tmp_path / "ANNOTATIONS" / f"{stem}.xml")}
        foreign += names != {stem.rpartition("_")[0]}
    assert 1 <= foreign <= 15
    read = read_voc(tmp_path, STEEL_KINDS)
    assert len(read.images) == 60 and read.duplicates == 0
    labels = np.concatenate([image.labels for image in read.images])
    assert np.bincount(labels, minlength=6).min() >= 10


def test_steel_file_holds_the_drawing_and_its_boxes(tmp_path):
    write_steel(tmp_path, count=1, seed=7)
    for k, kind in enumerate(STEEL_KINDS):
        _, image, objects = steel_image(np.random.default_rng([7, k, 1]), kind, 200)
        with Image.open(tmp_path / "IMAGES" / f"{kind}_1.jpg") as stored:
            assert np.abs(np.array(stored.convert("L"), int) - image).mean() < 3
        assert voc_boxes(tmp_path / "ANNOTATIONS" / f"{kind}_1.xml") == [(name, list(box)) for name, box in objects]


# ------------------------------------------------------------ boards


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


def test_board_layout_and_files(tmp_path):
    write_board(tmp_path, count=23, size=320)
    root = tmp_path / "PCBData"
    lists = [(root / name).read_text().splitlines() for name in ("trainval.txt", "test.txt")]
    assert [len(lines) for lines in lists] == [18, 5]
    files, kinds = {"trainval.txt", "test.txt"}, []
    for i, line in enumerate(lists[0] + lists[1]):
        assert re.fullmatch(r"group(\d{5})/\1/(\1\d{3})\.jpg group\1/\1_not/\2\.txt", line), line
        image, boxes = line.split()
        pair = [image.replace(".jpg", f"_{part}.jpg") for part in ("temp", "test")]
        files |= {boxes, *pair}
        stored = [grey(root / name) for name in pair]
        drawn = board_pair(np.random.default_rng([0, i]), 320)
        for board, copper in zip(stored, drawn[:2], strict=True):
            assert board.shape == (320, 320)
            np.testing.assert_array_equal(board < 128, copper)  # the threshold undoes the JPEG noise
            assert np.minimum(board, 255 - board).mean() < 3
        rows = np.loadtxt(root / boxes, dtype=int, ndmin=2)
        assert_exact((stored[0] < 128) != (stored[1] < 128), rows[:, :4].tolist())
        assert [(BOARD_KINDS[row[4] - 1], tuple(row[:4])) for row in rows.tolist()] == drawn[2]
        kinds += rows[:, 4].tolist()
    assert set(folder_bytes(root)) == files
    assert set(kinds) == {1, 2, 3, 4, 5, 6}
    assert np.bincount(kinds)[1:].min() > 0.5 * len(kinds) / 6, "no kind is rare"
    read = read_deep_pcb(tmp_path, BOARD_KINDS)
    assert len(read.images) == 23 and sum(len(p.boxes) for p in read.images) == len(kinds)


def test_sizes_too_small_are_refused(tmp_path):
    with pytest.raises(ValueError, match="size=100 or more"):
        write_steel(tmp_path, size=99)
    with pytest.raises(ValueError, match="size=160 or more"):
        write_board(tmp_path, size=159)
    assert not folder_bytes(tmp_path)
