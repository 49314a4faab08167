"""Solar cells: labels with probabilities, a split by blocks of numbers, one by hash, and that no module is known."""

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defectlab.data import cards, cells, fetch
from defectlab.data.cells import CLASSES, KINDS, cells_fingerprint, load_cells
from defectlab.data.splits import PARTS
from defectlab.files import DataError

GIVEN = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")
SIDE = 12  # px; ELPV: 300


def lines(count: int = 40) -> list[str]:
    """All pairs of a probability and a kind, in turns."""
    return [f"images/cell{n:04}.png  {GIVEN[n % 4]:<18}  {KINDS[n // 4 % 2]}" for n in range(1, count + 1)]


def archive(path: Path, labels: list[str], images: int = 40, side: int = SIDE) -> Path:
    """A wheel as the authors', with images of random pixels."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as wheel:
        for number in range(1, images + 1):
            file = io.BytesIO()
            Image.fromarray(rng.integers(256, size=(side, side), dtype=np.uint8)).save(file, "png")
            wheel.writestr(f"elpv_dataset/data/images/cell{number:04}.png", file.getvalue())
        wheel.writestr("elpv_dataset/data/labels.csv", "\n".join(labels) + "\n")
        wheel.writestr("elpv_dataset/utils.py", "not of the set")
    return path


@pytest.fixture
def elpv(script, monkeypatch: pytest.MonkeyPatch):
    """The script, for 40 images of 12 px."""
    module = script("elpv")
    monkeypatch.setattr(module, "COUNT", 40)
    monkeypatch.setattr(module, "SIDE", SIDE)
    monkeypatch.setattr(module, "main", fetch.script(replace(module.DATASET, fingerprint=None), None))
    return module


@pytest.fixture
def root(elpv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cells, "DEV", ((1, 3),))
    monkeypatch.setattr(cells, "TEST", ((11, 15), (31, 36)))
    wheel = archive(tmp_path / "elpv.whl", lines())
    assert elpv.main(["--archive", str(wheel), "--data-dir", str(tmp_path / "data")]) == 0
    return tmp_path / "data"


def test_cells_come_with_probability_label_and_kind(root: Path) -> None:
    data = load_cells("elpv", 8, "drawn", root=root)
    assert [len(getattr(data, part)) for part in PARTS] == [27, 3, 10] and data.test.images.shape == (10, 1, 8, 8)
    for split in (getattr(data, part) for part in PARTS):
        numbers = torch.tensor([int(name.removeprefix("cell")) for name in split.names])
        assert torch.allclose(split.probability, numbers % 4 / 3) and split.images.dtype == torch.uint8
        assert torch.equal(split.labels, (numbers % 4 >= 2).long()) and torch.equal(split.kind, numbers // 4 % 2)
    assert {(kind, label) for kind, label in zip(data.test.kind.tolist(), data.test.labels.tolist(), strict=True)} == {
        (kind, label) for kind in range(2) for label in range(2)
    }
    assert len({name for part in PARTS for name in getattr(data, part).names}) == 40
    blocks = load_cells("elpv", 8, root=root)
    assert blocks.dev.names == ("cell0001", "cell0002", "cell0003")
    assert [int(name[4:]) for name in blocks.test.names] == [*range(11, 16), *range(31, 37)]
    assert set(blocks.train.names).isdisjoint({*blocks.dev.names, *blocks.test.names}) and len(blocks.train) == 26
    assert data.fingerprint == cells_fingerprint("elpv", "drawn", root) != blocks.fingerprint
    assert blocks.fingerprint == cells_fingerprint("elpv", root=root)
    whole = load_cells("elpv", SIDE, root=root).train
    stored = np.array(Image.open(root / f"elpv/images/{whole.names[3]}.png"))
    assert torch.equal(whole.images[3, 0], torch.from_numpy(stored))


def test_the_script_takes_no_other_content(elpv, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = {
        "40 images and a label of each, not 40 and 39, 39 of them in both: fetch": archive(tmp_path / "1", lines(39)),
        "not 39 and 40, 39 of them in both: fetch the archive again": archive(tmp_path / "2", lines(), 39),
        "images/cell0001.png has (9, 9) pixels, not (12, 12)": archive(tmp_path / "3", lines(), side=9),
    }
    for message, path in faults.items():
        assert elpv.main(["--archive", str(path), "--data-dir", str(tmp_path / "data")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "data/elpv").exists()


def test_odd_labels_and_requests_are_named(root: Path) -> None:
    def relabelled(labels: list[str]) -> None:
        (root / "elpv/labels.csv").write_text("\n".join(labels))
        fetch.write_manifest(root / "elpv", "ELPV", "a test")

    for name, split in (("cells", "blocks"), ("elpv", "modules")):
        with pytest.raises(DataError, match="choose elpv, sample/elpv or synthetic_cell, split blocks or drawn"):
            load_cells(name, split=split, root=root)
    odd = {
        r"line 2: 'images/cell0002.png  0\.5  poly' is no image, probability": "images/cell0002.png  0.5  poly",
        r"labels\.csv, line 2: .* is a second label: run `python data_scripts/elpv\.py --archive FILE`": lines()[0],
        r"cell0002\.png has no line in labels\.csv": "images/cell0041.png  0.0  poly",
    }
    for message, line in odd.items():
        relabelled([lines()[0], line, *lines()[2:]])
        with pytest.raises(DataError, match=message):
            load_cells("elpv", root=root)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        load_cells("elpv", 0, root=root)


def test_the_card_says_that_modules_are_not_known() -> None:
    card = cards.card("elpv")
    for leaks, seen, of in ((card["leaks"], 0, 612), (card["drawn"], 432, 656)):
        assert "any split may have cells of one module on both sides" in leaks["rule"]
        assert leaks["seen"] == sum(leaks[name]["seen"] for name in CLASSES) == seen and leaks["of"] == of


def test_the_sample_has_each_label_and_a_pair() -> None:
    data = load_cells("sample/elpv", 64)
    given = [value for part in PARTS for value in getattr(data, part).probability.tolist()]
    assert {round(value, 2) for value in given} == {0, 0.33, 0.67, 1} and "sample of 10 images" in data.label
    names = {name for part in PARTS for name in getattr(data, part).names}
    assert [pair for pair in cards.card("elpv")["drawn"]["pairs"] if {*pair[:2]} <= names]


@pytest.mark.parametrize("split", ["blocks", "drawn"])
def test_synthetic_cells_show_what_their_label_says(split: str, synthetic: Path) -> None:
    data = load_cells("synthetic_cell", 100, split, root=synthetic)
    assert data.label == "synthetic solar cells" and data.train.images.shape[1:] == (1, 100, 100)
    for part in PARTS:
        found = getattr(data, part)
        assert set(found.kind.tolist()) == {0, 1} and set(found.labels.tolist()) == {0, 1}, part
    parts = [getattr(data, part) for part in PARTS]
    images, labels = torch.cat([p.images for p in parts])[:, 0], torch.cat([p.labels for p in parts])
    dark = torch.stack([(image < image.float().median() - 35).float().mean() for image in images])
    assert dark[labels == 1].median() > 2 * dark[labels == 0].median()


@pytest.mark.real_data
def test_real_cells(real_set) -> None:
    root = real_set("elpv")
    data, sample = load_cells("elpv", 32, root=root), load_cells("sample/elpv", 32)
    defective = {part: (len(getattr(data, part)), int(getattr(data, part).labels.sum())) for part in PARTS}
    assert defective == {"train": (1832, 408), "dev": (180, 78), "test": (612, 335)}
    assert torch.cat([getattr(data, part).kind for part in PARTS]).bincount().tolist() == [1074, 1550]
    assert all(set(getattr(sample, part).names) <= set(getattr(data, part).names) for part in PARTS)
    assert data.fingerprint.startswith("bb4d280ba51e")
