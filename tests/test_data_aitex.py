"""AITEX: tiles cut from strips or pieces, the split that keeps a strip (and perhaps a roll) on one side."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import archive_of

from defectlab.data.anomaly import AITEX_LIST, load_anomaly
from defectlab.data.images import save_image
from defectlab.data.splits import read_list

LISTED = "0001_002_00 3261 test 010\n0007_002_00 100 train 001\n0002_000_05 700 train 000\n"


@pytest.fixture
def aitex(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script, for three strips."""
    module = script("aitex")
    (tmp_path / "list.txt").write_text(LISTED)
    for name, value in {"AITEX_LIST": tmp_path / "list.txt", "WHOLE": ("0001_002_00", "0002_000_05")}.items():
        monkeypatch.setattr(module, name, value)
    return module


def archive(folder: Path, pieces: bool) -> Path:
    """The three strips as published, or their pieces of 768 px; the mask of one is two files."""
    for line in LISTED.splitlines():
        name, left, _, marks = line.split()
        strip = np.random.default_rng(int(left)).integers(256, size=(256, 4096), dtype=np.uint8)
        cut = slice(int(left), int(left) + 768) if pieces else slice(None)
        where = "NODefect_images/cloth" if "_000_" in name else "Defect_images"
        save_image(folder / where / f"{name}.png", strip[:, cut])
        for part in range(2 if "1" in marks else 0):
            mask = np.zeros_like(strip)
            mask[9 + 5 * part, int(left) + 256 * marks.index("1") + 3] = 200
            save_image(folder / f"Mask_images/{name}_mask{part + 1}.png", mask[:, cut])
        if pieces:
            save_image(folder / "whole_strips" / where / f"{name}.png", strip)
            save_image(folder / f"whole_strips/Mask_images/{name}_mask.png", np.zeros_like(strip))
    return folder


def test_strips_and_pieces_give_the_same_tiles(aitex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [archive(tmp_path / str(pieces), pieces) for pieces in (False, True)]
    monkeypatch.setattr(aitex, "AITEX_PIXELS", "")
    for folder in folders:
        with pytest.raises(aitex.DataError, match="are not those of AITEX as published"):
            aitex._cut(folder)
    assert aitex.pixels(folders[0]) == aitex.pixels(folders[1])
    found = {path.relative_to(folders[0]).as_posix() for path in folders[0].rglob("*.png")}
    masks = {"ground_truth/broken_end/0001_002_00_1_mask.png", "ground_truth/broken_end/0007_002_00_2_mask.png"}
    marked = {"test/broken_end/0001_002_00_1.png", "train/broken_end/0007_002_00_2.png"}
    good = {f"train/good/0002_000_05_{k}.png" for k in range(3)}
    assert masks | marked | good < found and sum("unmarked/" in path for path in found) == 4
    assert (aitex.decode(folders[0] / "whole_strips/0001_002_00.png").size) == (4096, 256)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("Defect_images/0007_002_00.png", "lacks the strip 0007_002_00"),
        ("Mask_images/0001_002_00_mask*.png", "0001_002_00 of the archive has no mask"),
    ],
)
def test_another_archive_is_refused(lost: str, message: str, aitex, tmp_path: Path) -> None:
    folder = archive(tmp_path / "set", pieces=True)
    for path in folder.glob(lost):
        path.unlink()
    with pytest.raises(aitex.DataError, match=message):
        aitex._cut(folder)


@pytest.mark.real_data
def test_the_list_is_made_again_from_the_archive(script, tmp_path: Path) -> None:
    shutil.unpack_archive(archive_of("aitex"), tmp_path)
    assert script("aitex").list_of_strips(tmp_path / "AITEX_768") == AITEX_LIST.read_text()


def test_the_list_is_drawn_again_and_no_roll_is_on_two_sides(script) -> None:
    parts = {strip: part for strip, _, part, _ in map(str.split, read_list(AITEX_LIST))}
    module = script("aitex")
    assert sorted(module.drawn_for_test(parts)) == sorted(strip for strip, part in parts.items() if part == "test")
    defective = sorted(strip for strip in parts if module.kind(strip) != "good")
    for one, two in pairwise(defective):
        if one[5:] == two[5:] and int(two[:4]) - int(one[:4]) == 1:
            assert parts[one] == parts[two], (one, two)


@pytest.mark.real_data
def test_aitex(real_set) -> None:
    data = load_anomaly("aitex", 256, root=real_set("aitex"))
    assert (len(data.train), len(data.dev), len(data.test)) == (267, 54, 126 + 75)
    strips = [{Path(name).stem[:11] for name in split.names} for split in (data.train, data.dev, data.test)]
    assert not (strips[0] & strips[1] or strips[0] & strips[2] or strips[1] & strips[2])
    assert data.test.has_mask.all() and set(data.test.original_sizes) == {(256, 256)}
