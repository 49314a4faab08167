"""The readers of VOC xml, YOLO txt, COCO json and DeepPCB txt: one form, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
from toy_annotations import NAMES, TRUTH, changed, save, write_coco, write_voc, write_yolo, xml

from defectlab.data.annotations import DUPLICATES, Annotations, read_deep_pcb, read_voc
from defectlab.data.coco import read_coco
from defectlab.data.yolo import read_yolo
from defectlab.files import DataError


def read(kind: str, folder: Path) -> Annotations:
    if kind == "voc":
        return read_voc(write_voc(folder))
    if kind == "yolo":
        return read_yolo(write_yolo(folder))
    return read_coco(write_coco(folder), folder / "images")


@pytest.mark.parametrize("kind", ["voc", "yolo", "coco"])
def test_three_formats_one_form(kind: str, tmp_path: Path) -> None:
    found = read(kind, tmp_path)
    assert found.class_names == NAMES and found.notes[DUPLICATES] == 1
    assert [image.path.stem for image in found.images] == ["none", "one", "two"]
    none, one, two = found.images
    assert none.boxes.shape == (0, 4) and none.labels.shape == (0,)
    assert (one.width, one.height) == (40, 20)
    assert one.boxes.dtype == np.float32 and one.labels.dtype == np.int64
    np.testing.assert_allclose(one.boxes, [[4, 2, 20, 10]], rtol=1e-6)
    np.testing.assert_allclose(two.boxes, [[0, 0, 40, 20], [8, 4, 12, 8]], rtol=1e-6)
    assert one.labels.tolist() == [1] and two.labels.tolist() == [0, 0] and two.notes[DUPLICATES] == 1


def test_same_box_of_two_classes_is_no_duplicate(tmp_path: Path) -> None:
    found = read_voc(write_voc(tmp_path, {"a": [("dent", (1, 1, 5, 5)), ("scratch", (1, 1, 5, 5))]}))
    assert found.notes[DUPLICATES] == 0 and found.images[0].labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("box", "expected"),
    [((-1, 0, 5, 5), (0, 0, 5, 5)), ((2, 3, 41, 21), (2, 3, 40, 20)), ((-1.5, 0, 5, 5), None), ((1, 1, 5, 22), None)],
)
def test_a_box_up_to_one_pixel_outside_is_clipped(tmp_path: Path, box: tuple, expected: tuple | None) -> None:
    write_voc(tmp_path, {"a": [("dent", (1, 1, 3, 3)), ("dent", box)]})
    if expected is None:
        with pytest.raises(DataError, match=r"a\.xml: box 2 .* lies outside a\.png with its 40 x 20 pixels: correct"):
            read_voc(tmp_path)
    else:
        assert read_voc(tmp_path).images[0].boxes[1].tolist() == list(expected)


@pytest.mark.parametrize("box", [(5, 1, 5, 4), (6, 1, 5, 4), (1, 4, 3, 4), (40, 1, 41, 4)])
def test_a_box_without_area_is_refused(tmp_path: Path, box: tuple) -> None:
    write_voc(tmp_path, {"a": [("dent", box)]})
    with pytest.raises(DataError, match=r"a\.xml: box 1 .* has no area"):
        read_voc(tmp_path)


@pytest.mark.parametrize(
    "text", ["<annotation", xml([("dent", ("x", 1, 2, 3))]), "<a><object/></a>", xml([("dent", ("nan", 1, 2, 3))])]
)
def test_unreadable_xml(tmp_path: Path, text: str) -> None:
    write_voc(tmp_path)
    (tmp_path / "boxes" / "one.xml").write_text(text)
    with pytest.raises(DataError, match=r"one\.xml"):
        read_voc(tmp_path)


def test_voc_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        read_voc(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no image"):
        read_voc(tmp_path)
    write_voc(tmp_path)
    with pytest.raises(DataError, match=r"two\.xml names the class 'dent': correct it, or add it to scratch"):
        read_voc(tmp_path, ("scratch",))
    one = tmp_path / "boxes" / "one.xml"
    one.write_text(xml(TRUTH["one"], (20, 40)))
    with pytest.raises(DataError, match=r"one\.xml says 20 x 40 pixels, its image .*one\.png has 40 x 20"):
        read_voc(tmp_path)
    one.unlink()
    with pytest.raises(DataError, match=r"one\.png has no xml"):
        read_voc(tmp_path)
    one.write_text(xml(TRUTH["one"]))
    (tmp_path / "images" / "one.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"one\.png cannot be decoded"):
        read_voc(tmp_path)
    (tmp_path / "images" / "one.png").unlink()
    with pytest.raises(DataError, match=r"one\.xml has 0 images"):
        read_voc(tmp_path)


def test_voc_pairs_by_folder_where_names_repeat(tmp_path: Path) -> None:
    for part, x in (("a", 1), ("b", 2)):
        save(tmp_path / part / "x.png")
        (tmp_path / part / "x.xml").write_text(xml([("dent", (x, 1, 9, 9))], (0, 0)))  # no size stated
    assert [image.boxes[0, 0] for image in read_voc(tmp_path).images] == [1, 2]
    (tmp_path / "b" / "x.xml").rename(tmp_path / "x.xml")
    with pytest.raises(DataError, match=r"x\.xml has 2 images"):
        read_voc(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", r"one\.txt, line 1 has class 2, there are 2 names"),
        ("-1 0.5 0.5 0.1 0.1", "class -1"),
        ("0 0.5 0.5 0.1", r"one\.txt, line 1 is not `class x y width height`"),
        ("0 0.5 0.5 0.1 0.1 0.9 0.9 0.9", "is not `class"),
        ("0.5 0.5 0.5 0.1 0.1", "is not `class"),
        ("dent 0.5 0.5 0.1 0.1", "is not `class"),
        ("0 20 10 4 4", "lies outside"),
        ("0 0.5 0.5 0 0.1", "has no area"),
        ("0 nan 0.5 0.1 0.1", "lies outside"),
    ],
)
def test_yolo_lines(tmp_path: Path, line: str, message: str) -> None:
    write_yolo(tmp_path)
    (tmp_path / "labels" / "one.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_yolo(tmp_path)


@pytest.mark.parametrize("names", ["names: [dent, scratch]", "names: {0: dent, 1: scratch}"])
def test_yolo_names_from_yaml(tmp_path: Path, names: str) -> None:
    write_yolo(tmp_path)
    (tmp_path / "classes.txt").rename(tmp_path / "labels" / "classes.txt")  # where some programs put it
    assert read_yolo(tmp_path).class_names == NAMES
    (tmp_path / "labels" / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"neither classes\.txt nor data\.yaml"):
        read_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(names)
    assert read_yolo(tmp_path).class_names == NAMES
    (tmp_path / "data.yaml").write_text("nc: 2")
    with pytest.raises(DataError, match=r"data\.yaml gives no class names"):
        read_yolo(tmp_path)


def test_yolo_files(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "labels" / "stray.txt").write_text("")
    with pytest.raises(DataError, match=r"stray\.txt has no image"):
        read_yolo(tmp_path)
    for path in (tmp_path / "labels").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="txt files below `labels`"):
        read_yolo(tmp_path)
    (tmp_path / "labels" / "one.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(DataError, match=r"one\.txt cannot be read"):
        read_yolo(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "is no COCO json"),
        (changed("annotations", category_id=99), "category that is not listed"),
        (changed("annotations", image_id=99), "image or category that is not listed"),
        (changed("annotations", bbox=[1, 2, 3]), r"annotations\[0\]: `bbox` is \[1, 2, 3\], not 4 numbers"),
        (changed("annotations", bbox=None), r"annotations\[0\] has no `bbox`"),
        (changed("annotations", bbox=[1, 2, 3, 0]), "has no area"),
        (changed("annotations", bbox=[39, 2, 3, 4]), "lies outside"),
        (changed("images", file_name="gone.png"), r"gone\.png is missing"),
        (changed("images", file_name="two.png"), "twice"),
        (changed("images", width=41), "says 41 x 20 pixels"),
    ],
)
def test_coco_refusals(tmp_path: Path, content: dict, message: str) -> None:
    path = write_coco(tmp_path, content)
    with pytest.raises(DataError, match=message):
        read_coco(path, tmp_path / "images")


def test_coco_files(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    assert len(read_coco(path, tmp_path).images) == 3  # found below, by the name alone
    save(tmp_path / "other" / "one.png")
    with pytest.raises(DataError, match=r"one\.png fits .*images.* and .*other"):
        read_coco(path, tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"boxes\.json is no COCO json"):
        read_coco(path, tmp_path)


def test_deep_pcb(tmp_path: Path) -> None:
    folder = tmp_path / "PCBData" / "group1"
    save(folder / "1" / "001_test.jpg")
    save(folder / "1" / "001_temp.jpg")
    (folder / "1_not").mkdir()
    source = folder / "1_not" / "001.txt"
    source.write_text("1 2 11 12 1\n3 4 13 14 2\n")
    (image,) = read_deep_pcb(tmp_path, NAMES).images
    assert image.labels.tolist() == [0, 1] and image.boxes[1].tolist() == [3, 4, 13, 14]
    for line in ("1 2 11 12 3", "1 2 11 12 0", "1 2 11 1", "1 2 11 12 x"):
        source.write_text(line)
        with pytest.raises(DataError, match=r"001\.txt has the line"):
            read_deep_pcb(tmp_path, NAMES)
    source.unlink()
    with pytest.raises(DataError, match=r"001\.txt is missing"):
        read_deep_pcb(tmp_path, NAMES)
