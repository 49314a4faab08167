"""The real NEU-DET and DeepPCB, unpacked by the project's own scripts (see the fixture `real_set`)."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defectlab.data import annotations, detection
from defectlab.data import fetch as store
from defectlab.data.detection import DetectionData, draw_test, load_detection

pytestmark = pytest.mark.real_data
SIZE = 64


@pytest.fixture(scope="module")
def neu_root(real_set) -> Path:
    return real_set("neu_det", "neu_det", "NEU-DET.zip")


@pytest.fixture(scope="module")
def pcb_root(real_set) -> Path:
    return real_set("deep_pcb", "deep_pcb", "DeepPCB.tar.xz")


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


@pytest.mark.parametrize(("name", "root"), [("neu_det", "neu_root"), ("deep_pcb", "pcb_root")])
def test_verify(name: str, root: str, request: pytest.FixtureRequest, script, capsys) -> None:
    assert script(name).main(["--verify", "--data-dir", str(request.getfixturevalue(root))]) == 0
    assert "every file verified" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["neu_det", "neu_det_index"])
def test_neu_splits(neu_root: Path, name: str) -> None:
    data = load_detection(name, SIZE, root=neu_root)
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


def test_neu_list_is_what_draw_test_gives(neu_root: Path) -> None:
    manifest = store.quick_check(neu_root / "neu_det", "")
    content = {path: sha256 for path, (_, sha256) in manifest.files.items() if path.startswith("IMAGES/")}
    repeated = [path for path in content if list(content.values()).count(content[path]) > 1]
    assert repeated == ["IMAGES/patches_101.jpg", "IMAGES/patches_105.jpg"]
    strata = {path: Path(path).name.rpartition("_")[0] for path in content}
    committed = [line for line in detection.NEU_TEST_LIST.read_text().splitlines() if not line.startswith("#")]
    assert sorted(f"IMAGES/{name}" for name in committed) == draw_test(strata, content)


def test_neu_defects_of_the_set(neu_root: Path) -> None:
    """What data_scripts/neu_det.py and annotations.py say of the files."""
    folder = neu_root / "neu_det"
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


def test_deep_pcb(pcb_root: Path) -> None:
    data = load_detection("deep_pcb", SIZE, root=pcb_root)
    check_splits(data, [900, 100, 500])
    assert class_counts(data, "train", "dev") == [1283, 1028, 1379, 1142, 1010, 1031]  # 6,873
    assert class_counts(data, "test") == [659, 478, 586, 483, 464, 470]  # 3,140
    assert "duplicate boxes dropped: 0" in data.report
    painted = "PCBData/group44000/44000/44000020_test.jpg"
    assert painted in data.test.names
    red, green, _ = Image.open(pcb_root / "deep_pcb" / painted).split()
    assert np.abs(np.asarray(red, int) - np.asarray(green, int)).max() > 100
