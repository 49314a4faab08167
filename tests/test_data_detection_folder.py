"""A reader's own folder of images and boxes: its layouts, its splits, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defectlab.data.detection import NEU_CLASSES, DetectionData
from defectlab.data.own_folder import load_folder
from defectlab.data.synthetic.steel import write_steel
from defectlab.files import DataError

SIZE = 64


def own_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 40), dtype=np.uint8)).save(path)


def own_yolo(folder: Path, parts: dict[str, int]) -> Path:
    for part, count in parts.items():
        for i in range(count):
            own_image(folder / "images" / part / f"{i}.png", 100 * len(part) + i)
            label = folder / "labels" / part / f"{i}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(f"{i % 2} 0.5 0.5 0.5 0.5\n" * (1 + (i == 0)))
    (folder / "classes.txt").write_text("dent\nscratch\n")
    return folder


def lengths(data: DetectionData) -> list[int]:
    return [len(split) for split in (data.train, data.dev, data.test)]


def test_own_folder_without_split(tmp_path: Path) -> None:
    data = load_folder(own_yolo(tmp_path / "mine", {"": 40}), "yolo", SIZE, test_share=0.25)
    assert lengths(data) == [27, 3, 10] and data.class_names == ("dent", "scratch")
    assert data.test.labels.flatten().bincount().tolist() == [5, 5]
    assert data.name == "mine" and "duplicate boxes dropped: 1" in data.report
    assert "dent: " in data.report and "images: 27 / 3 / 10 (train / dev / test)" in data.report
    assert data.test.boxes[0].tolist() == [[16, 24, 48, 40]]  # 40 x 20 pixels scaled by 1.6, 16 above
    assert data.test.ground_truth()[0]["boxes"].tolist() == [[10, 5, 30, 15]]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"train": 20, "val": 6}, [18, 2, 6]),
        ({"train": 20, "test": 6}, [18, 2, 6]),
        ({"train": 20, "valid": 4, "test": 6}, [20, 4, 6]),
        ({"train": 20}, [14, 2, 4]),
    ],
)
def test_own_split_is_honoured(tmp_path: Path, parts: dict[str, int], expected: list[int]) -> None:
    data = load_folder(own_yolo(tmp_path, parts), "yolo", SIZE)
    assert lengths(data) == expected
    if len(parts) > 1:
        assert {name.split("/")[1] for name in data.test.names} == {list(parts)[-1]}
        assert {name.split("/")[1] for name in data.train.names} == {"train"}


def test_own_voc_and_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "steel"
    write_steel(folder, count=10, size=100)
    data = load_folder(folder, "voc", SIZE)
    assert lengths(data) == [43, 5, 12] and data.class_names == NEU_CLASSES
    assert load_folder(folder, "voc", SIZE).fingerprint == data.fingerprint
    changed = folder / "ANNOTATIONS" / "patches_1.xml"
    changed.write_text(changed.read_text().replace("<name>patches</name>", "<name>inclusion</name>", 1))
    assert load_folder(folder, "voc", SIZE).fingerprint != data.fingerprint


def own_coco(folder: Path, path: Path, names: list[str], first: int) -> None:
    images = [{"id": i, "file_name": name, "width": 40, "height": 20} for i, name in enumerate(names)]
    boxes = [{"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [1, 2, 3, 4]} for i in range(len(images))]
    categories = [{"id": 1, "name": "dent"}, {"id": 2, "name": "scratch"}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    for i, name in enumerate(names):
        own_image(folder / name, first + i)


def test_own_coco(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(12)]
    one = tmp_path / "one"
    own_coco(one / "images", one / "boxes.json", names, 0)
    assert lengths(load_folder(one, "coco", SIZE)) == [9, 1, 2]
    two = tmp_path / "two"  # one json a split, the same names in both
    own_coco(two / "images" / "train", two / "annotations" / "instances_train.json", names, 0)
    own_coco(two / "images" / "val", two / "annotations" / "instances_val.json", names[:4], 50)
    data = load_folder(two, "coco", SIZE)
    assert lengths(data) == [11, 1, 4] and data.test.names == [f"images/val/{name}" for name in names[:4]]
    three = tmp_path / "three"  # the json beside its images
    for first, part in enumerate(("train", "valid", "test")):
        own_coco(three / part, three / part / "_annotations.coco.json", names, 100 * first)
    assert lengths(load_folder(three, "coco", SIZE)) == [12, 12, 12]
    shutil.copy(three / "train" / "_annotations.coco.json", three / "train" / "more.json")
    with pytest.raises(DataError, match="holds 4 json files: keep one"):
        load_folder(three, "coco", SIZE)


def test_own_folder_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be"):
        load_folder(tmp_path, "txt", SIZE)
    with pytest.raises(ValueError, match="test_share must lie between 0 and 1"):
        load_folder(tmp_path, "voc", SIZE, test_share=1)
    with pytest.raises(DataError, match="holds no json"):
        load_folder(tmp_path, "coco", SIZE)
    with pytest.raises(DataError, match="gives 9 images: three splits need at least 10"):
        load_folder(own_yolo(tmp_path / "few", {"": 9}), "yolo", SIZE)
    with pytest.raises(DataError, match="lies in none of the folders train, val and test"):
        load_folder(own_yolo(tmp_path / "mixed", {"train": 8, "val": 4, "odd": 1}), "yolo", SIZE)
    bare = own_yolo(tmp_path / "bare", {"train": 8, "test": 4})
    shutil.rmtree(bare / "labels" / "test")
    with pytest.raises(DataError, match="the 4 test images have no box"):
        load_folder(bare, "yolo", SIZE)


# --- The reader's own split ------------------------------------------------------------------------------------------


def moved(folder: Path, parts: dict[str, int], layout: str) -> Path:
    """`own_yolo` with its parts as folders `images/<part>` ("ours") or `<part>/images` ("theirs")."""
    own_yolo(folder, parts)
    if layout == "theirs":
        for part in parts:
            for kind in ("images", "labels"):
                (folder / part).mkdir(exist_ok=True)
                (folder / kind / part).rename(folder / part / kind)
    return folder


@pytest.mark.parametrize(
    ("layout", "yaml", "expected"),
    [
        ("ours", "path: .\ntrain: images/a\nval: images/b\ntest: images/c", [20, 5, 6]),
        ("ours", "train: images/a\nval: images/b", [18, 2, 5]),  # c is in neither
        ("ours", "path: /somebody/else\ntrain: [images/a, images/b]\ntest: images/c", [23, 2, 6]),
        ("theirs", "train: ../a/images\nval: ../b/images\ntest: ../c/images", [20, 5, 6]),
        ("ours", "train: images/a\nval: images/c\ntest: images/none", [18, 2, 6]),  # test is not there
    ],
)
def test_data_yaml_says_what_is_tested(tmp_path: Path, layout: str, yaml: str, expected: list[int]) -> None:
    folder = moved(tmp_path, {"a": 20, "b": 5, "c": 6}, layout)
    (folder / "data.yaml").write_text(f"{yaml}\nnames: [dent, scratch]")
    data = load_folder(folder, "yolo", SIZE)
    assert lengths(data) == expected
    assert "by data.yaml" in data.report
    if sum(expected) < 31:
        assert f"images that data.yaml{' (of which test' if 'none' in yaml else ''}" in data.report
        assert "left out: " in data.report


def test_a_data_yaml_names_images_that_are_links(tmp_path: Path) -> None:
    folder = own_yolo(tmp_path / "set", {"a": 20, "b": 5})
    for image in (folder / "images").rglob("*.png"):
        image.symlink_to(image.rename(tmp_path / f"{image.parent.name}_{image.name}"))
    (folder / "data.yaml").write_text("train: images/a\ntest: images/b\nnames: [dent, scratch]")
    assert lengths(load_folder(folder, "yolo", SIZE)) == [18, 2, 5]


def test_lists_of_images(tmp_path: Path) -> None:
    folder = own_yolo(tmp_path, {"": 30})
    (folder / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [dent, scratch]")
    (folder / "train.txt").write_text("".join(f"./images/{i}.png\n" for i in range(20)))
    (folder / "val.txt").write_text("".join(f"images/{i}.png\n" for i in range(20, 30)))
    data = load_folder(folder, "yolo", SIZE)
    assert lengths(data) == [18, 2, 10] and data.test.names == [f"images/{i}.png" for i in range(20, 30)]
    (folder / "val.txt").write_text("images/19.png\nimages/20.png\n")
    with pytest.raises(DataError, match=r"19\.png is in train and in val of data\.yaml: leave it in one"):
        load_folder(folder, "yolo", SIZE)
    (folder / "val.txt").write_text("images/99.png\n")
    with pytest.raises(DataError, match=r"val\.txt lists images/99\.png, which is no image of"):
        load_folder(folder, "yolo", SIZE)
    (folder / "data.yaml").write_text("train: gone\nval: val.txt\nnames: [dent, scratch]")
    with pytest.raises(DataError, match=r"data\.yaml names gone for train, where there is no image: correct it"):
        load_folder(folder, "yolo", SIZE)


def test_image_sets_of_voc(tmp_path: Path) -> None:
    write_steel(tmp_path / "steel", count=10, size=100)
    stems = sorted(path.stem for path in (tmp_path / "steel").rglob("*.jpg"))
    lists = tmp_path / "steel" / "ImageSets" / "Main"
    another = tmp_path / "steel" / "of_2012" / "ImageSets" / "Main"
    for folder, some in ((lists, stems[2::2]), (another, stems[:1])):  # both count
        folder.mkdir(parents=True)
        (folder / "trainval.txt").write_text("\n".join(some))
    (lists / "test.txt").write_text("\n".join(f"{stem}  1" for stem in stems[1::2]))
    (lists / "patches_train.txt").write_text("not of the kind")
    data = load_folder(tmp_path / "steel", "voc", SIZE)
    assert sorted(Path(name).stem for name in data.test.names) == stems[1::2]
    assert "train and test (test) by ImageSets/Main/test.txt, of_2012/ImageSets/Main/trainval.txt" in data.report
    assert len(data.train) + len(data.dev) == len(stems[::2])
    (lists / "test.txt").write_text("nothing_1")
    with pytest.raises(DataError, match=r"test\.txt lists nothing_1, of which there is no image"):
        load_folder(tmp_path / "steel", "voc", SIZE)


@pytest.mark.parametrize(
    "words", [("train2017", "val2017"), ("Training", "Validation"), ("images_train", "images-test")]
)
def test_words_of_folders_and_what_the_report_says(tmp_path: Path, words: tuple[str, str]) -> None:
    data = load_folder(own_yolo(tmp_path / "mine", {words[0]: 20, words[1]: 6}), "yolo", SIZE)
    assert lengths(data) == [18, 2, 6] and "by names of the folders; dev is a tenth of train" in data.report
    drawn = load_folder(own_yolo(tmp_path / "plain", {"": 20}), "yolo", SIZE)
    assert "split: drawn, 20% for testing: no folder or list names train and test" in drawn.report


def test_the_report_names_leaks_and_classes_that_look_alike(tmp_path: Path) -> None:
    folder = own_yolo(tmp_path, {"train": 20, "test": 6})
    assert "leak" not in load_folder(folder, "yolo", SIZE).report
    shutil.copy(folder / "images" / "train" / "3.png", folder / "images" / "test" / "0.png")
    (folder / "classes.txt").write_text("dent\nDent")
    (folder / "images" / "notes.doc").write_text("x")
    report = load_folder(folder, "yolo", SIZE).report
    assert "leak: 1 images stand in two parts, such as images/train/3.png and images/test/0.png" in report
    assert "warning: dent, Dent differ in case only, is it one class?" in report
    assert "1 files of other kinds left out: .doc 1" in report


def test_the_report_names_test_images_that_look_like_training_images(tmp_path: Path) -> None:
    """Byte for byte the same is a leak; turned, or stored anew, it may be one."""
    folder = own_yolo(tmp_path, {"train": 20, "test": 6})
    image = Image.open(folder / "images" / "train" / "3.png")
    image.rotate(180).save(folder / "images" / "test" / "0.png")
    image.save(folder / "images" / "test" / "1.png", compress_level=0)
    shutil.copy(folder / "images" / "train" / "4.png", folder / "images" / "test" / "2.png")
    report = load_folder(folder, "yolo", SIZE).report
    assert "leak: 1 images stand in two parts" in report
    assert "leak?: 2 test images look like a training image, such as images/test/" in report
    assert report.count("images/train/3.png (similarity 1.00") == 1


def test_lists_at_the_root_and_folders_of_a_single_json_split_the_set(tmp_path: Path) -> None:
    folder = own_yolo(tmp_path / "darknet", {"": 30})
    (folder / "train.txt").write_text("".join(f"images/{i}.png\n" for i in range(20)))
    (folder / "test.txt").write_text("".join(f"images/{i}.png\n" for i in range(20, 30)))
    data = load_folder(folder, "yolo", SIZE)
    assert lengths(data) == [18, 2, 10] and "by test.txt, train.txt" in data.report
    names = [f"{part}/{i}.png" for part, count in (("train", 12), ("test", 5)) for i in range(count)]
    own_coco(tmp_path / "one" / "images", tmp_path / "one" / "all.json", names, 0)
    own_image(tmp_path / "one" / "images" / "spare.png", 99)
    data = load_folder(tmp_path / "one", "coco", SIZE)
    assert lengths(data) == [11, 1, 5] and all("/test/" in name for name in data.test.names)
    assert "images that no json lists, left out: 1" in data.report


def test_a_data_yaml_in_a_subfolder_splits_the_set(tmp_path: Path) -> None:
    folder = moved(tmp_path / "export", {"a": 20, "b": 6}, "theirs")
    (folder / "classes.txt").rename(tmp_path / "classes.txt")
    (folder / "data.yaml").write_text("train: ../a/images\nval: ../b/images\nnames: [dent, scratch]")
    data = load_folder(tmp_path, "yolo", SIZE)
    assert lengths(data) == [18, 2, 6] and "by export/data.yaml" in data.report


def test_folders_named_after_what_is_shown_do_not_split_the_set(tmp_path: Path) -> None:
    data = load_folder(own_yolo(tmp_path, {"train_wheels": 10, "bogie": 8, "test_bench": 4}), "yolo", SIZE)
    assert "split: drawn" in data.report
    (tmp_path / "classes.txt").write_text("dent\nd\u0435nt")  # a Cyrillic letter
    assert "mixes letters of several scripts" in load_folder(tmp_path, "yolo", SIZE).report
