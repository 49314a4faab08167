"""The readers of VOC xml, YOLO txt, COCO json and DeepPCB txt: one form, what is refused by name, what odd is read."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from toy_annotations import NAMES, READ, TRUTH, WRITE, changed, coco, save, write_coco, write_voc, write_yolo, xml

from defectlab.data.annotations import DUPLICATES, read_deep_pcb, read_voc
from defectlab.data.coco import read_coco
from defectlab.data.images import decode
from defectlab.data.yolo import read_yolo
from defectlab.files import DataError


@pytest.mark.parametrize("kind", READ)
def test_three_formats_one_form(kind: str, tmp_path: Path) -> None:
    WRITE[kind](tmp_path)
    found = READ[kind](tmp_path)
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


@pytest.mark.parametrize(("box", "clipped"), [((-1, 0, 5, 5), [0, 0, 5, 5]), ((2, 3, 41, 21), [2, 3, 40, 20])])
def test_a_box_up_to_one_pixel_outside_is_clipped(tmp_path: Path, box: tuple, clipped: list[int]) -> None:
    write_voc(tmp_path, {"a": [("dent", (1, 1, 3, 3)), ("dent", box)]})
    assert read_voc(tmp_path).images[0].boxes[1].tolist() == clipped


@pytest.mark.parametrize(
    ("box", "message"),
    [
        *((box, r"lies outside a\.png with its 40 x 20 pixels: correct") for box in ((-1.5, 0, 5, 5), (1, 1, 5, 22))),
        *((box, "has no area") for box in ((5, 1, 5, 4), (6, 1, 5, 4), (1, 4, 3, 4), (40, 1, 41, 4))),
    ],
)
def test_a_box_far_outside_or_without_area_is_refused(tmp_path: Path, box: tuple, message: str) -> None:
    write_voc(tmp_path, {"a": [("dent", (1, 1, 3, 3)), ("dent", box)]})
    with pytest.raises(DataError, match=rf"a\.xml: box 2 .* {message}"):
        read_voc(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation", ""),
        ("<a><object/></a>", ".*its root is <a>"),
        *((xml([("dent", (x, 1, 2, 3))]), "") for x in ("x", "nan")),
        ("<annotation><object><robndbox/></object></annotation>", ".*object 1 has no bndbox: is it a polygon or a"),
        (xml([("", (1, 1, 9, 9))]), " has a class with an empty name"),
        (xml(TRUTH["one"], (20, 40)), r" says 20 x 40 pixels, its image .*one\.png has 40 x 20"),
        (xml([]).replace("wrong", r"C:\photos\two.png"), r" says that it is of .*two\.png, its name says .*one\.png"),
    ],
)
def test_an_xml_that_is_refused_is_named(tmp_path: Path, text: str, message: str) -> None:
    write_voc(tmp_path)
    (tmp_path / "boxes" / "one.xml").write_text(text)
    with pytest.raises(DataError, match=rf"one\.xml{message}"):
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels/one.txt", "2 0.5 0.5 0.1 0.1\n", r"one\.txt, line 1 has class 2, there are 2 names"),
        ("labels/one.txt", "-1 0.5 0.5 0.1 0.1\n", "class -1"),
        ("labels/one.txt", "0 0.5 0.5 0.1\n", r"one\.txt, line 1 is not `class x y width height`"),
        ("labels/one.txt", "0 0.5 0.5 0.1 0.1 0.9 0.9 0.9\n", "is not `class"),
        ("labels/one.txt", "0.5 0.5 0.5 0.1 0.1\n", "is not `class"),
        ("labels/one.txt", "dent 0.5 0.5 0.1 0.1\n", "is not `class"),
        ("labels/one.txt", "0 20 10 4 4\n", "lies outside"),
        ("labels/one.txt", "0 0.5 0.5 0 0.1\n", "has no area"),
        ("labels/one.txt", "0 nan 0.5 0.1 0.1\n", "lies outside"),
        ("labels/one.txt", b"\xff\xfe\xfd", r"one\.txt cannot be read"),
        ("labels/stray.txt", "", r"stray\.txt has no image"),
        ("images/one.bmp", "", r"labels/one\.txt has two images, .*one\.bmp and .*one\.png: keep one"),
        ("data.yaml", "names: [scratch, dent]", r"classes\.txt names the classes .*data\.yaml \('scratch', 'dent'\)"),
        ("data.yaml", "names: [dent, scratch]\nnc: 3", r"data\.yaml says nc: 3 and names 2 classes"),
        ("labels/a/classes.txt", "scratch\ndent", r"classes\.txt names the classes .*a/classes\.txt \('scratch'"),
        ("classes.txt", "dent\n\nscratch\n", r"classes\.txt, line 2 names no class, so all later names would move"),
        ("classes.txt", "# classes\ndent\nscratch\n", r"classes\.txt, line 1 names no class"),
        ("data.yaml", "names: [dent", r"data\.yaml is no yaml"),
        ("classes.txt", "dent\n dent \n", r"classes\.txt gives the class name 'dent' twice"),
    ],
)
def test_yolo_refusals(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    """A line, a file too many, and what contradicts another file."""
    write_yolo(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_yolo(tmp_path)


def test_yolo_without_any_txt(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"none": []})
    with pytest.raises(DataError, match="txt files below `labels`"):
        read_yolo(tmp_path)


def double(part: str, **values) -> dict:
    content = coco()
    content[part].append(content[part][0] | values)
    return content


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
        (double("images", file_name="new.png"), r"images\[3\]: the id 7 stands twice, for .*one\.png.* and .*new\.png"),
        (double("images", id="7"), "the id 7 stands twice"),
        (double("categories", name="spot"), "categories.*the id 12 stands twice, for .*scratch.* and .*spot"),
        (double("categories", id=5), "gives the class name 'scratch' twice"),
        (changed("categories", name=" "), "has a class with an empty name: name it"),
        (double("images", id=99), r"lists .*one\.png twice, as id 7 and 99: remove one"),
    ],
)
def test_coco_refusals(tmp_path: Path, content: dict, message: str) -> None:
    path = write_coco(tmp_path, content=content)
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


# --- As people have them: read all the same, and noted ---------------------------------------------------------------


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_boxes_of_the_stored_pixels_are_turned_with_the_image(tmp_path: Path, kind: str, orientation: int) -> None:
    """Where the stated size is that of the stored pixels, so are the boxes: they lie on the defect either way."""
    stored = np.zeros((20, 40, 3), np.uint8)
    stored[3:8, 10:31] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    WRITE[kind](tmp_path, {"a": [("dent", (10, 3, 31, 8))]})
    path = tmp_path / "images" / "a.png"
    Image.fromarray(stored).save(path, exif=exif)
    (image,) = READ[kind](tmp_path).images
    assert (image.width, image.height) == (20, 40)
    x1, y1, x2, y2 = image.boxes[0].astype(int)
    upright = np.asarray(decode(path).convert("L"))
    assert upright[y1:y2, x1:x2].min() == 255 and (upright == 255).sum() == (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize("kind", READ)
def test_boxes_that_are_all_under_a_pixel_are_refused_and_single_ones_counted(tmp_path: Path, kind: str) -> None:
    boxes = [("dent", (0.1, 0.1, 0.4, 0.6)), ("dent", (0.3, 0.2, 0.9, 0.8))]
    WRITE[kind](tmp_path, {"one": boxes})
    with pytest.raises(DataError, match="all 2 boxes are smaller than one pixel, they look like parts of the width"):
        READ[kind](tmp_path)
    WRITE[kind](tmp_path, {"one": [*boxes, ("dent", (2, 2, 9, 9))]})
    assert READ[kind](tmp_path).notes["boxes smaller than one pixel, kept"] == 2


def test_marked_objects_are_kept_or_left_out_and_counted(tmp_path: Path) -> None:
    write_voc(tmp_path)
    path = tmp_path / "boxes" / "one.xml"
    path.write_text(path.read_text().replace("<bndbox>", "<difficult>1</difficult><truncated>1</truncated><bndbox>"))
    found = read_voc(tmp_path)
    assert found.notes["boxes marked difficult, kept"] == found.notes["boxes marked truncated, kept"] == 1
    assert found.notes["boxes marked occluded, kept"] == 0 and len(found.images[1].boxes) == 1
    found = read_coco(write_coco(tmp_path, content=changed("annotations", iscrowd=1)), tmp_path / "images")
    assert found.notes["regions marked iscrowd, left out"] == 1 and len(found.images[1].boxes) == 0
    found = read_coco(write_coco(tmp_path, content=changed("annotations", iscrowd="0")), tmp_path / "images")
    assert len(found.images[1].boxes) == 1


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


@pytest.mark.parametrize("kind", READ)
def test_names_in_two_unicode_forms_are_one(tmp_path: Path, kind: str) -> None:
    """A Mac writes the letter and its dots apart."""
    apart, one = "Pru\u0308fling", "Pr\u00fcfling"
    WRITE[kind](tmp_path, {one: TRUTH["one"]})
    (tmp_path / "images" / f"{one}.png").rename(tmp_path / "images" / f"{apart}.png")
    assert [len(image.boxes) for image in READ[kind](tmp_path).images] == [1]


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_around_a_turned_box_the_upright_one_is_taken(tmp_path: Path, kind: str) -> None:
    """As one annotation program writes it: the box before turning, and by how many degrees."""
    truth = {"a": [("dent", (10, 8, 30, 12))]}
    if kind == "voc":
        turn = "<attributes><attribute><name>rotation</name><value>90.0</value></attribute></attributes></object>"
        path = write_voc(tmp_path, truth) / "boxes" / "a.xml"
        path.write_text(path.read_text().replace("</object>", turn))
    else:
        content = coco(truth)
        content["annotations"][0]["attributes"] = {"rotation": 90.0}
        write_coco(tmp_path, truth, content)
    found = READ[kind](tmp_path)
    np.testing.assert_allclose(found.images[0].boxes, [[18, 0, 22, 20]], atol=1e-4)
    assert found.notes["turned boxes, the upright box around each taken"] == 1


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
    content = coco({"no 1": TRUTH["one"]})
    content["images"][0]["file_name"] = "no%201.png"
    content["annotations"][0]["image_id"] = 7.0
    path = write_coco(tmp_path, {"no 1": TRUTH["one"]}, content)
    assert [len(image.boxes) for image in read_coco(path, tmp_path).images] == [1]
