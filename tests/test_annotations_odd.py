"""Annotations as people have them: what is read all the same and noted, and what is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from toy_annotations import NAMES, TRUTH, changed, coco, save, write_coco, write_voc, write_yolo, xml

from defectlab.data.annotations import read_voc
from defectlab.data.coco import read_coco
from defectlab.data.images import decode
from defectlab.data.yolo import read_yolo
from defectlab.files import DataError


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_boxes_of_the_stored_pixels_are_turned_with_the_image(tmp_path: Path, kind: str, orientation: int) -> None:
    """Where the stated size is that of the stored pixels, so are the boxes: they lie on the defect either way."""
    stored = np.zeros((20, 40, 3), np.uint8)
    stored[3:8, 10:31] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    if kind == "voc":
        (tmp_path / "a.xml").write_text(xml([("dent", (10, 3, 31, 8))]))
        (image,) = read_voc(tmp_path).images
    else:
        content = coco({"a": [("dent", (10, 3, 31, 8))]})
        (tmp_path / "a.json").write_text(json.dumps(content))
        (image,) = read_coco(tmp_path / "a.json", tmp_path).images
    assert (image.width, image.height) == (20, 40)
    x1, y1, x2, y2 = image.boxes[0].astype(int)
    upright = np.asarray(decode(tmp_path / "a.png").convert("L"))
    assert upright[y1:y2, x1:x2].min() == 255 and (upright == 255).sum() == (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize("kind", ["voc", "yolo", "coco"])
def test_boxes_that_are_all_under_a_pixel_are_refused_and_single_ones_counted(tmp_path: Path, kind: str) -> None:
    boxes = [("dent", (0.1, 0.1, 0.4, 0.6)), ("dent", (0.3, 0.2, 0.9, 0.8))]
    write = {"voc": write_voc, "yolo": write_yolo, "coco": lambda folder, truth: write_coco(folder, coco(truth))}[kind]
    find = {"voc": read_voc, "yolo": read_yolo, "coco": lambda folder: read_coco(folder / "boxes.json", folder)}[kind]
    write(tmp_path, {"one": boxes})
    with pytest.raises(DataError, match="all 2 boxes are smaller than one pixel, they look like parts of the width"):
        find(tmp_path)
    write(tmp_path, {"one": [*boxes, ("dent", (2, 2, 9, 9))]})
    assert find(tmp_path).notes["boxes smaller than one pixel, kept"] == 2


def test_marked_objects_are_kept_or_left_out_and_counted(tmp_path: Path) -> None:
    write_voc(tmp_path)
    path = tmp_path / "boxes" / "one.xml"
    path.write_text(path.read_text().replace("<bndbox>", "<difficult>1</difficult><truncated>1</truncated><bndbox>"))
    found = read_voc(tmp_path)
    assert found.notes["boxes marked difficult, kept"] == found.notes["boxes marked truncated, kept"] == 1
    assert found.notes["boxes marked occluded, kept"] == 0 and len(found.images[1].boxes) == 1
    found = read_coco(write_coco(tmp_path, changed("annotations", iscrowd=1)), tmp_path / "images")
    assert found.notes["regions marked iscrowd, left out"] == 1 and len(found.images[1].boxes) == 0


def test_polygons_and_confidences_in_yolo_lines(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    path = tmp_path / "labels" / "one.txt"
    path.write_text("1.0 0.1 0.2 0.5 0.1 0.3 0.6\n0 0.5 0.5 0.5 0.5 0.87\n")
    found = read_yolo(tmp_path)
    one = found.images[1]
    np.testing.assert_allclose(one.boxes, [[4, 2, 20, 12], [10, 5, 30, 15]], rtol=1e-6)
    assert one.labels.tolist() == [1, 0]
    assert found.notes["polygons, their boxes taken"] == 1
    assert found.notes["confidences (a sixth column: predictions of a model?), ignored"] == 1
    assert found.notes["images without a txt, taken as free of defects"] == 1  # "none"
    save(tmp_path / "extra" / "x.png")
    assert read_yolo(tmp_path).notes["images outside of a folder `images`, left out"] == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"images/one.bmp": None}, r"labels/one\.txt has two images, .*one\.bmp and .*one\.png: keep one"),
        ({"data.yaml": "names: [scratch, dent]"}, r"classes\.txt names the classes .*data\.yaml \('scratch', 'dent'\)"),
        ({"data.yaml": "names: [dent, scratch]\nnc: 3"}, r"data\.yaml says nc: 3 and names 2 classes"),
        (
            {"labels/anna/classes.txt": "scratch\ndent"},
            r"classes\.txt names the classes .*anna/classes\.txt \('scratch'",
        ),
        ({"classes.txt": "dent\n\nscratch\n"}, r"classes\.txt, line 2 names no class, so all later names would move"),
        ({"classes.txt": "# classes\ndent\nscratch\n"}, r"classes\.txt, line 1 names no class"),
        ({"data.yaml": "names: [dent"}, r"data\.yaml is no yaml"),
        ({"classes.txt": "dent\n dent \n"}, r"classes\.txt gives the class name 'dent' twice"),
    ],
)
def test_what_stands_twice_or_contradicts_is_named(tmp_path: Path, files: dict, message: str) -> None:
    write_yolo(tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name) if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_yolo(tmp_path)


def double(part: str, **values) -> dict:
    content = coco()
    content[part].append(content[part][0] | values)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (double("images", file_name="new.png"), r"images\[3\]: the id 7 stands twice, for .*one\.png.* and .*new\.png"),
        (double("images", id="7"), "the id 7 stands twice"),
        (double("categories", name="spot"), "categories.*the id 12 stands twice, for .*scratch.* and .*spot"),
        (double("categories", id=5), "gives the class name 'scratch' twice"),
        (changed("categories", name=" "), "has a class with an empty name: name it"),
        (double("images", id=99), r"lists .*one\.png twice, as id 7 and 99: remove one"),
    ],
)
def test_ids_and_names_of_coco_stand_once(tmp_path: Path, content: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_coco(write_coco(tmp_path, content), tmp_path / "images")


def test_coco_of_other_writers(tmp_path: Path) -> None:
    """Ids as text, Windows paths, no sizes, a byte order mark."""
    content = coco()
    for image, path in zip(content["images"], ("one.png", r".\images\two.png", r"C:\my\none.png"), strict=True):
        image |= {"file_name": path, "id": str(image["id"])}
        del image["width"], image["height"]
    content["categories"][0]["name"] = " scratch "
    path = write_coco(tmp_path)
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    found = read_coco(path, tmp_path)
    assert found.class_names == NAMES and [len(image.boxes) for image in found.images] == [0, 1, 2]


@pytest.mark.parametrize("encoding", ["gb2312", "utf-16", "utf-8-sig", "latin-1"])
def test_voc_in_the_encoding_that_it_declares(tmp_path: Path, encoding: str) -> None:
    name = "Kratzer über" if encoding == "latin-1" else "划痕"
    write_voc(tmp_path, {"a": []})
    declared = encoding.removesuffix("-sig")
    text = f'<?xml version="1.0" encoding="{declared}"?>\n' + xml([(name, (1, 1, 9, 9))])
    (tmp_path / "boxes" / "a.xml").write_bytes(text.encode(encoding))
    assert read_voc(tmp_path).class_names == (name,)
    (tmp_path / "boxes" / "a.xml").write_text(xml([("", (1, 1, 9, 9))]))
    with pytest.raises(DataError, match=r"a\.xml has a class with an empty name"):
        read_voc(tmp_path)


@pytest.mark.parametrize("kind", ["voc", "yolo", "coco"])
def test_names_in_two_unicode_forms_are_one(tmp_path: Path, kind: str) -> None:
    """A Mac writes the letter and its dots apart."""
    apart, one = "Pru\u0308fling", "Pr\u00fcfling"
    content = coco({one: TRUTH["one"]})
    if kind == "voc":
        write_voc(tmp_path, {one: TRUTH["one"]})
    elif kind == "yolo":
        write_yolo(tmp_path, {one: TRUTH["one"]})
    save(tmp_path / "images" / "x.png").rename(tmp_path / "images" / f"{apart}.png")
    (tmp_path / "images" / f"{one}.png").unlink(missing_ok=True)
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    found = {
        "voc": read_voc,
        "yolo": read_yolo,
        "coco": lambda folder: read_coco(folder / "boxes.json", folder / "images"),
    }[kind](tmp_path)
    assert [len(image.boxes) for image in found.images] == [1]


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_around_a_turned_box_the_upright_one_is_taken(tmp_path: Path, kind: str) -> None:
    """As one annotation program writes it: the box before turning, and by how many degrees."""
    if kind == "voc":
        turn = "<attributes><attribute><name>rotation</name><value>90.0</value></attribute></attributes></object>"
        write_voc(tmp_path, {"a": [("dent", (10, 8, 30, 12))]})
        path = tmp_path / "boxes" / "a.xml"
        path.write_text(path.read_text().replace("</object>", turn))
        found = read_voc(tmp_path)
    else:
        content = coco({"one": [("dent", (10, 8, 30, 12))]})
        content["annotations"][0]["attributes"] = {"rotation": 90.0}
        found = read_coco(write_coco(tmp_path, content), tmp_path)
    np.testing.assert_allclose(found.images[0].boxes, [[18, 0, 22, 20]], atol=1e-4)
    assert found.notes["turned boxes, the upright box around each taken"] == 1


def test_an_xml_that_names_another_image_of_the_set_is_refused(tmp_path: Path) -> None:
    write_voc(tmp_path)
    path = tmp_path / "boxes" / "one.xml"
    path.write_text(path.read_text().replace("wrong", "C:\\photos\\two.png"))
    with pytest.raises(DataError, match=r"one\.xml says that it is of .*two\.png, its name says .*one\.png"):
        read_voc(tmp_path)
    path.write_text("<a><object><name>dent</name><robndbox/></object></a>")
    with pytest.raises(DataError, match=r"one\.xml .*object 1 has no bndbox: is it a polygon or a turned box"):
        read_voc(tmp_path)


def test_class_names_are_kept_as_written_and_compared_as_seen(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": [("O\u0308l", (1, 1, 9, 9)), ("\u00d6l\u200b", (1, 1, 5, 5))]})
    assert read_voc(tmp_path).class_names == ("\u00d6l",)
    write_yolo(tmp_path / "yolo")
    (tmp_path / "yolo" / "classes.txt").unlink()
    (tmp_path / "yolo" / "data.yaml").write_text("names: [no, 007]\nkpt_shape: [1, 2]")
    assert read_yolo(tmp_path / "yolo").class_names == ("no", "007")
    (tmp_path / "yolo" / "labels" / "one.txt").write_text("0 0.3 0.3 0.4 0.4 0.9 0.9")
    found = read_yolo(tmp_path / "yolo")
    np.testing.assert_allclose(found.images[1].boxes, [[4, 2, 20, 10]], rtol=1e-5)
    assert found.notes["keypoints behind the boxes, ignored"] == 1


def test_coco_with_ids_as_a_table_writes_them_and_names_as_a_browser_does(tmp_path: Path) -> None:
    content = coco({"one": TRUTH["one"]})
    content["images"][0]["file_name"] = "no%201.png"
    content["annotations"][0]["image_id"] = 7.0
    path = write_coco(tmp_path, content)
    save(tmp_path / "images" / "no 1.png")
    assert [len(image.boxes) for image in read_coco(path, tmp_path).images] == [1]
