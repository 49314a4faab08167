"""The detection sets as tensors: letterbox, splits, the sets' layouts on small synthetic copies."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defectlab.data import annotations, detection
from defectlab.data import fetch as store
from defectlab.data.detection import DetectionData, detection_fingerprint, load_detection, load_images
from defectlab.data.images import letterbox
from defectlab.data.splits import draw_split, read_list
from defectlab.data.synthetic.boards import write_board
from defectlab.data.synthetic.steel import write_steel
from defectlab.files import DataError

SIZE = 64


def manifest(folder: Path) -> None:
    (folder / store.MANIFEST).unlink(missing_ok=True)
    store.write_manifest(folder, "a synthetic copy", "a test")


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with small synthetic copies of the sets in the real layouts."""
    root = tmp_path_factory.mktemp("data")
    write_steel(root / "neu_det", count=10, size=100)
    shutil.copy(root / "neu_det/IMAGES/patches_1.jpg", root / "neu_det/IMAGES/patches_5.jpg")
    write_board(root / "deep_pcb", count=15, size=160)
    for name in ("neu_det", "deep_pcb"):
        manifest(root / name)
    return root


def check_form(data: DetectionData, size: int = SIZE) -> None:
    for split in (data.train, data.dev, data.test):
        n, most = len(split), split.boxes.shape[1]
        assert n > 0 and split.images.dtype == torch.uint8
        assert split.images.shape == (n, data.train.images.shape[1], size, size)
        assert split.boxes.shape == (n, most, 4) and split.boxes.dtype == torch.float32
        assert split.labels.shape == (n, most) and split.labels.dtype == torch.int64
        assert split.sizes.shape == (n, 2) and split.sizes.dtype == torch.int64
        assert split.scale.shape == (n,) and split.offset.shape == (n, 2)
        assert split.scale.dtype == split.offset.dtype == torch.float32
        present = split.labels >= 0
        assert (split.labels[present] < len(data.class_names)).all() and (split.boxes[~present] == 0).all()
        assert (split.labels[~present] == -1).all() and present.sum(1).max() == most
        x1, y1, x2, y2 = split.boxes[present].unbind(1)
        assert (x1 >= 0).all() and (x1 < x2).all() and (x2 <= size).all()
        assert (y1 >= 0).all() and (y1 < y2).all() and (y2 <= size).all()
        for true, (height, width) in zip(split.ground_truth(), split.sizes.tolist(), strict=True):
            assert len(true["boxes"]) == len(true["labels"]) and true["boxes"].dtype == torch.float32
            assert (true["boxes"] >= 0).all() and (true["boxes"] <= torch.tensor([width, height] * 2)).all()
    names = [set(split.names) for split in (data.train, data.dev, data.test)]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])


@pytest.mark.parametrize(("width", "height"), [(40, 20), (21, 40), (40, 40), (11, 7)])
@pytest.mark.parametrize("colour", [False, True])
def test_letterbox_moves_pixels_as_it_says(width: int, height: int, colour: bool) -> None:
    """A bright rectangle lies where scale and offset put its corners."""
    image = Image.new("RGB" if colour else "L", (width, height))
    image.paste((200, 100, 50) if colour else 200, (2, 1, width - 3, height - 2))
    pixels, scale, (left, top) = letterbox(image, 320)
    assert pixels.shape == (3 if colour else 1, 320, 320) and scale == 320 / max(width, height)
    rows, columns = (np.flatnonzero((np.abs(pixels[0].astype(int) - 200) < 30).any(axis)) for axis in (1, 0))
    expected = np.array([2 * scale + left, 1 * scale + top, (width - 3) * scale + left, (height - 2) * scale + top])
    got = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.abs(got - expected).max() <= scale / 2 + 1  # the edge is a ramp of one source pixel
    ground = [pixels[:, 0, 0].tolist(), pixels[:, -1, -1].tolist()]
    assert ground == ([[0] * len(pixels)] * 2 if width == height else [[114] * len(pixels)] * 2)
    assert min(left, top) >= 0 and abs(left + width * scale / 2 - 160) <= scale / 2 + 1e-9


def test_letterbox_is_antialiased_and_sees_grey() -> None:
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    pixels, scale, offset = letterbox(Image.fromarray(checks).convert("RGB"), 32)
    assert pixels.shape == (1, 32, 32) and scale == 1 / 8 and offset == (0, 0)
    assert np.abs(pixels.astype(int) - 127).max() < 8


def test_draw_split_is_stratified_and_keeps_twins_together() -> None:
    strata = {f"{kind}{i:03}": kind for kind, count in (("a", 100), ("b", 50), ("c", 10)) for i in range(count)}
    content = {name: name for name in strata} | {"a001": "twin", "a002": "twin", "b003": "other", "c004": "other"}
    for purpose in map(str, range(20)):
        chosen = draw_split(strata, 0.2, purpose, content)
        counts = [sum(name.startswith(kind) for name in chosen) for kind in "abc"]
        assert len(chosen) == 32 and abs(np.array(counts) - (20, 10, 2)).max() <= 2, counts
        assert ("a001" in chosen) == ("a002" in chosen) and ("b003" in chosen) == ("c004" in chosen)
    assert chosen == sorted(chosen) == draw_split(dict(reversed(strata.items())), 0.2, "19", content)
    assert chosen != draw_split(strata, 0.2, "another", content)


def test_draw_split_of_few() -> None:
    names = {"x": "x", "y": "y"}
    assert len(draw_split(names, 0.01, "", names)) == 1 == len(draw_split(names, 0.99, "", names))
    assert draw_split(names, 0.5, "", {"x": "same", "y": "same"}) == []


def test_committed_list() -> None:
    names = read_list(detection.NEU_TEST_LIST)
    assert len(names) == len(set(names)) == 360
    for kind in detection.NEU_CLASSES:
        numbers = [int(name[len(kind) + 1 : -4]) for name in names if name.startswith(f"{kind}_")]
        assert len(numbers) == 60 and min(numbers) >= 1 and max(numbers) <= 300
    assert ("patches_101.jpg" in names) == ("patches_105.jpg" in names)


def test_steel(copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tmp_path / "test.txt"
    names.write_text("# list\n" + "".join(f"{kind}_{i}.jpg\n" for kind in detection.NEU_CLASSES for i in (2, 3)))
    monkeypatch.setattr(detection, "NEU_TEST_LIST", names)
    data = load_detection("neu_det", SIZE, root=copies)
    check_form(data)
    assert (data.name, data.label, data.class_names) == ("neu_det", "NEU-DET", detection.NEU_CLASSES)
    assert [len(split) for split in (data.train, data.dev, data.test)] == [43, 5, 12]
    assert data.train.images.shape[1] == 1 and set(data.test.names) == {
        f"IMAGES/{n}" for n in names.read_text().split()[2:]
    }
    twins = {"IMAGES/patches_1.jpg", "IMAGES/patches_5.jpg"}
    assert len(twins & set(data.train.names)) in (0, 2)
    assert data.fingerprint == detection_fingerprint("neu_det", copies)
    again = load_detection("neu_det", SIZE, root=copies)
    assert torch.equal(again.train.images, data.train.images) and again.dev.names == data.dev.names
    written = annotations.read_voc(copies / "neu_det", detection.NEU_CLASSES).images
    true = dict(zip(data.test.names, data.test.ground_truth(), strict=True))
    for image in written:
        if (name := f"IMAGES/{image.path.name}") in true:  # ground_truth() gives back what the xml says
            np.testing.assert_allclose(true[name]["boxes"], image.boxes, atol=1e-4)
            assert true[name]["labels"].tolist() == image.labels.tolist()
    names.write_text("crazing_999.jpg\n")
    with pytest.raises(DataError, match=r"names IMAGES/crazing_999\.jpg, which .* does not hold: run `python"):
        load_detection("neu_det", SIZE, root=copies)


def test_index_split(copies: Path, tmp_path: Path) -> None:
    folder = tmp_path / "neu_det"
    shutil.copytree(copies / "neu_det", folder)
    for kind in detection.NEU_CLASSES:
        for part, suffix in (("IMAGES", "jpg"), ("ANNOTATIONS", "xml")):
            for number, new in ((9, 240), (10, 241)):
                (folder / part / f"{kind}_{number}.{suffix}").rename(folder / part / f"{kind}_{new}.{suffix}")
    manifest(folder)
    data = load_detection("neu_det_index", SIZE, root=tmp_path)
    assert data.test.names == [f"IMAGES/{kind}_241.jpg" for kind in detection.NEU_CLASSES]
    assert "index split" in data.label


def test_board(copies: Path, tmp_path: Path) -> None:
    data = load_detection("deep_pcb", SIZE, root=copies)
    check_form(data)
    assert data.class_names == detection.DEEP_PCB_CLASSES and data.train.images.shape[1] == 1
    assert [len(split) for split in (data.train, data.dev, data.test)] == [11, 1, 3]
    assert all(name.endswith("_test.jpg") for name in data.train.names)
    shutil.copytree(copies / "deep_pcb", tmp_path / "deep_pcb")
    lists = tmp_path / "deep_pcb" / "PCBData" / "trainval.txt"
    lists.write_text("".join(lists.read_text().splitlines(keepends=True)[1:]))
    manifest(tmp_path / "deep_pcb")
    with pytest.raises(DataError, match="its lists differ in PCBData/group10000/10000/10000000_test"):
        detection_fingerprint("deep_pcb", tmp_path)
    lists.unlink()
    manifest(tmp_path / "deep_pcb")
    with pytest.raises(DataError, match=r"trainval\.txt cannot be read .*: fetch the set again"):
        detection_fingerprint("deep_pcb", tmp_path)


def test_board_colour_is_read_as_grey(copies: Path, tmp_path: Path) -> None:
    shutil.copytree(copies / "deep_pcb", tmp_path / "deep_pcb")
    Image.new("RGB", (160, 160), (0, 255, 0)).save(next((tmp_path / "deep_pcb").rglob("*_test.jpg")))
    manifest(tmp_path / "deep_pcb")
    assert load_detection("deep_pcb", SIZE, root=tmp_path).test.images.shape[1] == 1


def test_board_beside_its_template(copies: Path, tmp_path: Path) -> None:
    alone, pair = (load_detection(name, SIZE, root=copies) for name in ("deep_pcb", "deep_pcb_pair"))
    assert pair.label == "DeepPCB with its templates" and pair.fingerprint == alone.fingerprint
    assert torch.equal(pair.test.boxes, alone.test.boxes) and pair.test.names == alone.test.names
    assert pair.test.images.shape[1] == 3 and torch.equal(pair.test.images[:, :1], alone.test.images)
    differs = pair.test.images[:, 2].float()
    for image, boxes in zip(differs, pair.test.ground_truth(), strict=True):
        x1, y1, x2, y2 = (boxes["boxes"][0] * SIZE / 160).round().int().tolist()
        assert image[y1:y2, x1:x2].mean() > 10 * image.mean()
    assert torch.equal(load_images("deep_pcb_pair", "dev", SIZE, root=copies), pair.dev.images)
    shutil.copytree(copies / "deep_pcb", tmp_path / "deep_pcb")
    template = next((tmp_path / "deep_pcb").rglob("*_temp.jpg"))
    Image.new("L", (150, 160)).save(template)
    manifest(tmp_path / "deep_pcb")
    with pytest.raises(DataError, match=r"its template differ in size, \(160, 160\) and \(150, 160\): run `python"):
        load_detection("deep_pcb_pair", SIZE, root=tmp_path)


@pytest.mark.parametrize(("name", "counts"), [("synthetic_steel", [86, 10, 24]), ("synthetic_board", [43, 5, 12])])
def test_synthetic(synthetic: Path, name: str, counts: list[int]) -> None:
    data = load_detection(name, SIZE, root=synthetic)
    check_form(data)
    assert [len(split) for split in (data.train, data.dev, data.test)] == counts
    assert data.label.startswith("synthetic") and data.train.images.shape[1] == 1
    assert detection_fingerprint(name, synthetic) == data.fingerprint
    if name == "synthetic_steel":
        assert {re.search(r"_(\d+)\.jpg", name)[1] for name in data.test.names} == {"17", "18", "19", "20"}


def test_images_of_one_part_alone(copies: Path, tmp_path: Path) -> None:
    """As those of the whole set, and no other part is read: its files may be anything."""
    shutil.copytree(copies / "deep_pcb", tmp_path / "deep_pcb")
    data = load_detection("deep_pcb", SIZE, root=tmp_path)
    for name in data.train.names + data.dev.names:
        (tmp_path / "deep_pcb" / name).write_bytes(bytes((tmp_path / "deep_pcb" / name).stat().st_size))
    assert torch.equal(load_images("deep_pcb", "test", SIZE, root=tmp_path), data.test.images)
    with pytest.raises(DataError, match=r"_test\.jpg ends in the middle.*: run `python data_scripts/deep_pcb\.py`"):
        load_images("deep_pcb", "train", SIZE, root=tmp_path)


def test_fingerprint_follows_content_and_lists(copies: Path, tmp_path: Path) -> None:
    shutil.copytree(copies / "deep_pcb", tmp_path / "deep_pcb")
    first = detection_fingerprint("deep_pcb", tmp_path)
    assert first == detection_fingerprint("deep_pcb", copies)
    boxes = next((tmp_path / "deep_pcb").rglob("*_not/*.txt"))
    boxes.write_text(boxes.read_text().replace("\n", " \n"))
    manifest(tmp_path / "deep_pcb")
    assert detection_fingerprint("deep_pcb", tmp_path) != first


@pytest.mark.parametrize("name", ["neu_det", "deep_pcb"])
def test_scripts_refuse_other_archives(name: str, copies: Path, tmp_path: Path, script, capsys) -> None:
    archive = shutil.make_archive(str(tmp_path / "few"), "zip", copies / name)
    assert script(name).main(["--archive", archive, "--data-dir", str(tmp_path / "data")]) == 1
    assert "should have" in capsys.readouterr().err
    assert not (tmp_path / "data" / name).exists()


def test_scripts_say_where_to_put_the_archive(tmp_path: Path, script, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("neu_det").main(["--data-dir", str(tmp_path)]) == 1
    assert "`python data_scripts/neu_det.py --archive FILE`" in capsys.readouterr().err
