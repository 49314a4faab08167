"""The real tiles, nuts, steel and boards, unpacked by the project's own scripts (see the fixture `real_set`)."""

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defectlab.data import annotations, detection
from defectlab.data import fetch as store
from defectlab.data.anomaly import AnomalyData, load_anomaly
from defectlab.data.detection import DetectionData, draw_test, load_detection
from defectlab.data.splits import read_list

pytestmark = pytest.mark.real_data
EMPTY = {"exp3_num_45042", "exp4_num_45057", "exp4_num_124690", "exp4_num_352527"}


@pytest.mark.parametrize("name", ["magnetic_tile", "neu_det", "deep_pcb"])
def test_verify(name: str, real_set, script, capsys: pytest.CaptureFixture[str]) -> None:
    assert script(name).main(["--verify", "--data-dir", str(real_set(name))]) == 0
    out = capsys.readouterr().out
    assert "every file verified" in out and (name != "magnetic_tile" or "2688 files" in out)


@pytest.mark.parametrize("changed", [False, True])
def test_another_layout_of_the_same_files(changed: bool, real_set, script, tmp_path: Path, capsys) -> None:
    """Folders and backslashes as in copies of NEU-DET: what they hold decides."""
    with zipfile.ZipFile(tmp_path / "copy.zip", "w") as archive:
        for path in sorted((real_set("neu_det") / "neu_det").glob("*/*")):
            kind, _, number = path.stem.rpartition("_")
            folder = f"images/{kind}" if path.suffix == ".jpg" else "annotations"
            part = "train" if int(number) <= 240 else "validation"
            content = path.read_bytes() + b" " * (changed and path.name == "crazing_1.xml")
            archive.writestr(f"NEU-DET/{part}/{folder}/{path.name}".replace("/", "\\"), content)
    arguments = ["--archive", str(tmp_path / "copy.zip"), "--data-dir", str(tmp_path / "data")]
    assert script("neu_det").main(arguments) == changed
    captured = capsys.readouterr()
    assert "does not hold NEU-DET as published" in captured.err if changed else "3600 files" in captured.out


@pytest.fixture(scope="module")
def tiles(real_set) -> AnomalyData:
    return load_anomaly("magnetic_tile", 64, root=real_set("magnetic_tile"))


def test_tile_counts(tiles: AnomalyData) -> None:
    assert (len(tiles.train), len(tiles.dev), len(tiles.test)) == (685, 2 * 76, 191 + 392)
    assert tiles.test.types.bincount().tolist() == [191, 115, 85, 57, 32, 103]
    assert tiles.dev.labels.sum() == 76 and tiles.train.labels.sum() == 0
    train, dev, test = (set(split.names) for split in (tiles.train, tiles.dev, tiles.test))
    assert not (train & dev or train & test or dev & test)
    assert len(train | dev | test) == 685 + 152 + 583


def test_tile_masks(tiles: AnomalyData, real_set) -> None:
    test = tiles.test
    without = {Path(name).stem for name, has in zip(test.names, test.has_mask, strict=True) if not has}
    assert without == EMPTY
    labels = {Path(name).stem: int(label) for name, label in zip(test.names, test.labels, strict=True)}
    assert all(labels[stem] == 1 for stem in EMPTY)
    for index in test.labels.nonzero().flatten().tolist():  # no defect gets lost in the resize
        mask = Image.open((real_set("magnetic_tile") / "magnetic_tile" / test.names[index]).with_suffix(".png"))
        assert (np.asarray(mask) > 127).any() == bool(test.masks[index].any()), test.names[index]


def test_tile_shapes(tiles: AnomalyData) -> None:
    sizes = np.array(tiles.train.original_sizes + tiles.test.original_sizes)
    ratio = sizes[:, 1] / sizes[:, 0]
    assert 0.3 < ratio.min() < 0.4 and 2.6 < ratio.max() < 2.8
    assert (sizes[:, 1].min(), sizes[:, 1].max()) == (103, 632)
    assert (sizes[:, 0].min(), sizes[:, 0].max()) == (222, 403)


def test_metal_nut(real_set, script, capsys: pytest.CaptureFixture[str]) -> None:
    root = real_set("mvtec_ad/metal_nut")
    assert script("mvtec_ad").main(["--category", "metal_nut", "--verify", "--data-dir", str(root)]) == 0
    reduced = "(reduced)" in capsys.readouterr().out
    data = load_anomaly("mvtec_ad/metal_nut", 64, root=root)
    assert (len(data.train), len(data.dev), len(data.test)) == (198, 2 * 22, 115)
    assert data.type_names == ("good", "bent", "color", "flip", "scratch", "pasted")
    assert data.test.types.bincount().tolist() == [22, 25, 22, 23, 23]
    assert data.test.has_mask.all() and data.dev.has_mask.all()
    assert reduced == ("reduced" in data.label) == (data.train.original_sizes[0] == (512, 512))


def class_counts(data: DetectionData, *parts: str) -> list[int]:
    labels = [
        label for part in parts for true in getattr(data, part).ground_truth() for label in true["labels"].tolist()
    ]
    return np.bincount(labels, minlength=len(data.class_names)).tolist()


def check_splits(data: DetectionData, counts: list[int]) -> None:
    splits = (data.train, data.dev, data.test)
    assert [len(split) for split in splits] == counts
    assert len({name for split in splits for name in split.names}) == sum(counts)
    for split in splits:
        assert split.images.shape[1] == 1
        for true, (height, width) in zip(split.ground_truth(), split.sizes.tolist(), strict=True):
            x1, y1, x2, y2 = true["boxes"].unbind(1)
            assert len(x1) and (x1 >= 0).all() and (x1 < x2).all() and (x2 <= width).all()
            assert (y1 >= 0).all() and (y1 < y2).all() and (y2 <= height).all()


@pytest.mark.parametrize("name", ["neu_det", "neu_det_index"])
def test_neu_splits(real_set, name: str) -> None:
    data = load_detection(name, 64, root=real_set("neu_det"))
    check_splits(data, [1296, 144, 360])
    # 4,189 boxes are published; one of crazing, inclusion and patches each stands twice in one file
    assert class_counts(data, "train", "dev", "test") == [689 - 1, 1011 - 1, 881 - 1, 432, 628, 548]
    assert "duplicate boxes dropped: 3" in data.report
    for split, each in ((data.train, 216), (data.dev, 24), (data.test, 60)):
        for kind in data.class_names:
            assert abs(sum(Path(image).name.startswith(f"{kind}_") for image in split.names) - each) <= 1
    twins = {"IMAGES/patches_101.jpg", "IMAGES/patches_105.jpg"}
    assert any(twins <= set(split.names) for split in (data.train, data.dev, data.test))
    if name == "neu_det_index":
        numbers = [int(re.search(r"_(\d+)\.jpg", image)[1]) for image in data.test.names]
        assert min(numbers) == 241 and max(numbers) == 300


def test_neu_list_is_what_draw_test_gives(real_set) -> None:
    manifest = store.quick_check(real_set("neu_det") / "neu_det", "")
    content = {path: sha256 for path, (_, sha256) in manifest.files.items() if path.startswith("IMAGES/")}
    repeated = [path for path in content if list(content.values()).count(content[path]) > 1]
    assert repeated == ["IMAGES/patches_101.jpg", "IMAGES/patches_105.jpg"]
    strata = {path: Path(path).name.rpartition("_")[0] for path in content}
    assert sorted(f"IMAGES/{name}" for name in read_list(detection.NEU_TEST_LIST)) == draw_test(strata, content)


def test_neu_defects_of_the_set(real_set) -> None:
    """What data_scripts/neu_det.py and annotations.py say of the files."""
    folder = real_set("neu_det") / "neu_det"
    texts = [path.read_text(encoding="utf-8") for path in sorted((folder / "ANNOTATIONS").glob("*.xml"))]
    assert sum("<filename>" in text and ".jpg</filename>" not in text for text in texts) == 174
    coordinates = np.array([int(v) for text in texts for v in re.findall(r"<[xy]m(?:in|ax)>(\d+)<", text)])
    assert len(coordinates) == 4 * 4189 and coordinates.min() == 1 and coordinates.max() == 200
    assert ((coordinates == 1).sum(), (coordinates == 200).sum()) == (1500, 575)
    images = annotations.read_voc(folder, detection.NEU_CLASSES).images
    others = [
        image
        for image in images
        if {detection.NEU_CLASSES[label] for label in image.labels} != {image.path.stem.rpartition("_")[0]}
    ]
    assert len(others) == 123


def test_deep_pcb(real_set) -> None:
    data = load_detection("deep_pcb", 64, root=real_set("deep_pcb"))
    check_splits(data, [900, 100, 500])
    assert class_counts(data, "train", "dev") == [1283, 1028, 1379, 1142, 1010, 1031]  # 6,873
    assert class_counts(data, "test") == [659, 478, 586, 483, 464, 470]  # 3,140
    assert "duplicate boxes dropped: 0" in data.report
    painted = "PCBData/group44000/44000/44000020_test.jpg"
    assert painted in data.test.names
    red, green, _ = Image.open(real_set("deep_pcb") / "deep_pcb" / painted).split()
    assert np.abs(np.asarray(red, int) - np.asarray(green, int)).max() > 100
