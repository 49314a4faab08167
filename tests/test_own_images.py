"""`detect` on a reader's own images: train, go on, find, export; and what it says of what is off."""

import json
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_commands import call, fails, read_csv, works

from defectlab.data.detection import NEU_CLASSES
from defectlab.data.own_folder import load_folder
from defectlab.figures.own import DEJAVU, cases, draw
from defectlab.own import detect as detect_command
from defectlab.own.detect import listed, read_detector
from defectlab.papers import yolo_dcf
from defectlab.training.detection import predict

SIZE, WIDTH, HEIGHT = 64, 80, 50
NAMES = ("dent", "deep scratch")


def draw_folder(folder: Path, parts: dict[str, int]) -> Path:
    """Grey noise with a dark square or a bright bar, in the YOLO layout."""
    rng = np.random.default_rng(0)
    for part, count in parts.items():
        images, labels = folder / "images" / part, folder / "labels" / part
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(count):
            image, kind = rng.integers(100, 140, (HEIGHT, WIDTH), dtype=np.uint8), index % 2
            width, height = ((20, 20), (40, 8))[kind]
            x, y = int(rng.integers(0, WIDTH - width)), int(rng.integers(0, HEIGHT - height))
            image[y : y + height, x : x + width] = (20, 240)[kind]
            Image.fromarray(image).save(images / f"{index:02d}.png")
            line = f"{kind} {(x + width / 2) / WIDTH} {(y + height / 2) / HEIGHT} {width / WIDTH} {height / HEIGHT}"
            (labels / f"{index:02d}.txt").write_text(line)
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return folder


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


class Own(NamedTuple):
    images: Path
    out: Path
    command: tuple[object, ...]
    first: str  # printed by the call that ran out of time
    left: list[str]  # files after it
    second: str  # printed by the same command without a limit


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    """Trained in two calls on 16 images: 2 epochs at 64 px."""
    root = tmp_path_factory.mktemp("own")
    images, out = draw_folder(root / "parts", {"": 16}), root / "result"
    command = ("--data", images, "--format", "yolo", "--size", SIZE, "--epochs", 2, "--scale", "t", "--batch", 6)
    command += ("--out", out)
    first = works(*command, "--minutes", 1e-9)
    left = [path.name for path in out.glob("[!.]*")]
    return Own(images, out, command, first, left, works(*command))


@pytest.fixture(scope="module")
def sure(own: Own) -> Path:
    """The same model made to see things: logits of the classes raised, every side of a box about one stride from its
    cell's centre, so that boxes are small and many; the threshold is 0.6."""
    path = own.out.parent / "sure.safetensors"
    tensors = load_file(own.out / "detector.safetensors")
    for name, values in tensors.items():
        if name.startswith("head.classes.") and name.endswith("2.bias"):
            values += 6
        if name.startswith("head.boxes.") and name.endswith("2.bias"):
            values.view(4, 16)[:, 1] += 8
    save_file(tensors, path, header_of(own.out / "detector.safetensors") | {"dev": json.dumps({"threshold": 0.6})})
    return path


def test_training_stops_in_time_and_goes_on(own: Own) -> None:
    assert "images: 12 / 1 / 3 (train / dev / test)" in own.first
    assert "time budget used up after epoch 1 of 2; run again to go on" in own.first
    assert len(own.left) == 1 and own.left[0].startswith("checkpoint-")
    assert "continues after epoch 1 of 2" in own.second
    assert f"saved {own.out / 'detector.safetensors'}" in own.second
    files = sorted(path.name for path in own.out.glob("[!.]*"))
    assert files == ["cases.png", "detector.safetensors", "metrics.json", "predictions.json"]


def test_what_training_writes(own: Own) -> None:
    metrics = json.loads((own.out / "metrics.json").read_text())
    assert metrics["settings"]["size"] == SIZE and metrics["settings"]["optimizer"] == "adamw"
    assert metrics["images"] == {"train": 12, "dev": 1, "test": 3}
    assert set(metrics["per_class"]) == set(NAMES)
    assert {"map50", "map50_95", "recall_dev"} <= set(metrics["metrics"])
    assert all(0 <= value <= 100 for value in metrics["metrics"].values())
    assert len(metrics["curve"]["loss"]) == 2 and metrics["costs"]["parameters_m"] > 0

    data = load_folder(own.images, "yolo", SIZE)
    predictions = json.loads((own.out / "predictions.json").read_text())
    assert predictions["class_names"] == list(NAMES)
    listed_images = [(p["file"], p["width"], p["height"]) for p in predictions["images"]]
    assert listed_images == [(name, WIDTH, HEIGHT) for name in data.test.names]
    detector, names, model = read_detector(own.out / "detector.safetensors", "cpu")
    assert names == NAMES and model.threshold == metrics["dev"]["threshold"]
    assert (model.settings.family, model.settings.scale, model.settings.size) == ("v8", "t", SIZE)
    assert predictions == json.loads(json.dumps(listed(predict(detector, data.test), data.test, NAMES)))
    with Image.open(own.out / "cases.png") as page:
        assert page.format == "PNG" and page.width > 1000


def test_listed_predictions(own: Own) -> None:
    test = load_folder(own.images, "yolo", SIZE).test
    boxes = torch.tensor([[1.0, 2.0, 30.126, 40.0], [5.0, 6.0, 7.0, 8.0], [0.0, 0.0, 1.0, 1.0]])
    found = {"boxes": boxes, "scores": torch.tensor([0.75, 0.01, 0.0099]), "labels": torch.tensor([1, 0, 0])}
    none = {name: values[:0] for name, values in found.items()}
    first, second, _ = listed([found, none, none], test, NAMES)["images"]
    assert first["boxes"] == [[1, 2, 30.13, 40], [5, 6, 7, 8]]
    assert first["scores"] == [0.75, 0.01] and first["classes"] == ["deep scratch", "dent"]
    empty = {"boxes": [], "scores": [], "classes": []}
    assert second == {"file": test.names[1], "width": WIDTH, "height": HEIGHT} | empty


def test_a_finished_training_is_not_repeated_and_another_does_not_overwrite_it(own: Own) -> None:
    before = (own.out / "detector.safetensors").read_bytes()
    shown = works(*own.command)
    assert f"already trained: {own.out / 'detector.safetensors'}" in shown and "epoch" not in shown
    for other in (("--epochs", 3), ("--seed", 1)):
        code, shown = call(*own.command, *other)
        assert code == 1 and "was trained with other images or settings: give another --out" in shown
    assert (own.out / "detector.safetensors").read_bytes() == before


def test_anchor_based_with_onnx_then_find(own: Own, tmp_path: Path) -> None:
    out = tmp_path / "v5"
    shown = works(*own.command[:-1], out, "--family", "v5", "--epochs", 1, "--onnx")
    assert (out / "detector.onnx").stat().st_size > 100_000
    assert f"saved {out / 'detector.onnx'}: differs from torch by at most" in shown
    shown = works("--model", out / "detector.safetensors", "--images", own.images, "--out", tmp_path / "found")
    assert "16 images, " in shown
    assert read_detector(out / "detector.safetensors", "cpu")[-1].settings.family == "v5"


def assert_lines_are(lines: list[dict[str, str]], expected: dict[str, dict[str, Tensor]], least: float) -> None:
    """The csv holds just the detections with score >= `least`, image by image."""
    for name, found in expected.items():
        mine = [line for line in lines if line["file"] == name]
        kept = found["scores"] >= least
        assert [line["class"] for line in mine] == [NAMES[label] for label in found["labels"][kept]]
        boxes = [[float(line[side]) for side in ("x1", "y1", "x2", "y2")] for line in mine]
        np.testing.assert_allclose(np.array(boxes).reshape(-1, 4), found["boxes"][kept], atol=0.02)
        np.testing.assert_allclose([float(line["score"]) for line in mine], found["scores"][kept], atol=1e-4)


def test_find_gives_what_metrics_saw(own: Own, sure: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test images among others, in several chunks, against the path by which the metrics are made."""
    monkeypatch.setattr(detect_command, "CHUNK", 7)
    data = load_folder(own.images, "yolo", SIZE)
    found = predict(read_detector(sure, "cpu")[0], data.test)
    expected = dict(zip(data.test.names, found, strict=True))
    scores = torch.cat([one["scores"] for one in found])
    higher = round(float(scores[scores >= 0.6].median()), 3)
    assert (scores < 0.6).any()

    out = tmp_path / "found"
    shown = works("--model", sure, "--images", own.images, "--out", out)
    lines = read_csv(out / "predictions.csv")
    assert f"16 images, {len(lines)} boxes with score >= 0.6000: {out}" in shown
    assert_lines_are(lines, expected, 0.6)
    works("--model", sure, "--images", own.images, "--out", out, "--confidence", higher)
    fewer = read_csv(out / "predictions.csv")
    assert_lines_are(fewer, expected, higher)
    assert 0 < len(fewer) < len(lines)
    assert {float(line["x1"]) for line in fewer} != {0.0}
    assert [path.name for path in out.glob("[!.]*")] == ["predictions.csv"]


def test_drawn_images(own: Own, sure: Path, tmp_path: Path) -> None:
    """The colour of a class stands where its box is; drawn images inside the folder are not looked at again."""
    images = tmp_path / "images"
    (images / "line").mkdir(parents=True)
    for name in ("a.png", "line/a.png"):
        shutil.copy(own.images / "images" / "00.png", images / name)
    for _ in range(2):
        assert works("--model", sure, "--images", images, "--out", images / "found", "--draw").startswith("2 images")
    folder = images / "found" / "drawn"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert names == ["a.png.png", "line/a.png.png"]
    with Image.open(folder / "a.png.png") as drawn:
        assert drawn.size == (WIDTH, HEIGHT)
        assert len({tuple(p) for p in np.asarray(drawn).reshape(-1, 3).tolist() if len(set(p)) > 1}) >= 1

    boxes = torch.tensor([[10.0, 12.0, 60.0, 40.0]])
    grey = Image.fromarray(np.full((HEIGHT, WIDTH), 128, np.uint8))
    pixels = np.asarray(draw(grey, boxes, torch.tensor([1]), [NAMES[1]], DEJAVU))
    assert pixels[26, 10].tolist() == pixels[40, 35].tolist() == [0xEE, 0x66, 0x77]
    assert pixels[45, 70].tolist() == [128, 128, 128] and np.ptp(np.asarray(grey)) == 0


def test_a_threshold_that_lets_nothing_through_is_explained(own: Own, sure: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    save_file(load_file(sure), path, header_of(sure) | {"dev": json.dumps({"threshold": 1.0})})
    shown = works("--model", path, "--images", own.images, "--out", tmp_path / "found")
    assert "no detection on dev was right, so its threshold is 1: give --confidence" in shown
    assert (tmp_path / "found" / "predictions.csv").read_text().split() == ["file,x1,y1,x2,y2,score,class"]


def test_detector_of_runs(own: Own, tmp_path: Path) -> None:
    """With the header that a run writes: no class names in it, and modules that a paper adds."""
    settings = yolo_dcf.Settings(dataset="synthetic_steel", scale="t", size=SIZE, fusion="context_guided")
    torch.manual_seed(0)
    detector = yolo_dcf.build(settings, len(NEU_CLASSES))
    header = {"key": "yolo_dcf-x", "settings": json.dumps(asdict(settings)), "model": "yolo_dcf"}
    path = tmp_path / "run.safetensors"
    save_file(detector.state_dict(), path, header | {"dev": json.dumps({"threshold": 0.25})})
    found, names, model = read_detector(path, "cpu")
    assert names == NEU_CLASSES and model.settings == settings
    assert isinstance(found.neck.fuse_up_fifth, yolo_dcf.ContextGuidedFusion)
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        for one, other in zip(found(images), detector.eval()(images), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    shown = works("--model", path, "--images", own.images, "--out", tmp_path / "found", "--confidence", 0)
    assert "16 images" in shown
    lines = read_csv(tmp_path / "found" / "predictions.csv")
    assert lines and {line["class"] for line in lines} <= set(NEU_CLASSES)


def test_a_broken_image_stops_no_other(own: Own, sure: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "found"
    shutil.copytree(own.images / "images", images)
    (images / "00 broken.png").write_bytes((images / "00.png").read_bytes()[:200])
    code, shown = call("--model", sure, "--images", images, "--out", out)
    assert code == 1 and "16 images, " in shown and f"left out: {images / '00 broken.png'} cannot be decoded" in shown
    assert len({line["file"] for line in read_csv(out / "predictions.csv")}) > 10


def test_a_model_is_kept_without_its_figure(own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect_command, "cases", Mock(side_effect=RuntimeError("no figure")))
    shown = works(*own.command[:-1], tmp_path / "out", "--epochs", 1)
    path = tmp_path / "out" / "cases.png"
    assert f"warning: {path} could not be drawn (RuntimeError: no figure)" in shown and not path.exists()
    assert read_detector(tmp_path / "out" / "detector.safetensors", "cpu")[1] == NAMES


@pytest.mark.parametrize("names", [("$a$ dent", "_spot"), ("царапина", "ρωγμή"), ("\U000f1234 dent", "spot")])
def test_names_in_any_script_are_drawn(own: Own, tmp_path: Path, names: tuple[str, str]) -> None:
    """As they are, or as numbers where no font has their letters (a private one, here); formulas are not typeset."""
    data = load_folder(own.images, "yolo", SIZE)
    data = replace(data, class_names=names, test=replace(data.test, names=["$x^.png", *data.test.names[1:]]))
    found = [t | {"scores": torch.ones(len(t["labels"]))} for t in data.test.ground_truth()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, numbers = cases(data, found, 0.5)
        figure.savefig(tmp_path / "cases.png")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    drawn = {names[0]: "#1"} if ord(names[0][0]) > 0xFFFF else {}
    assert legend == ["ground truth", *(f" {drawn.get(name, name)}" for name in names)]
    assert numbers == (f"in the figures: #1 = {names[0]} (no installed font has these letters)" if drawn else "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--data needs --format voc, yolo or coco"),
        (("--format", "yolo", "--size", 100), "--size must be a multiple of 32 from 32 to 4096, got 100"),
        (("--format", "yolo", "--batch", 1), "--batch must be at least 2, got 1"),
        (("--format", "yolo", "--family", "v5", "--scale", "x"), "--scale of v5 must be one of t, n, s, m, l: x"),
        (("--format", "voc"), "parts"),
        (("--format", "coco"), "holds no json"),
    ],
)
def test_options_that_do_not_fit(own: Own, tmp_path: Path, options: tuple, message: str) -> None:
    assert message in fails("--data", own.images, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_trained_on(tmp_path: Path) -> None:
    out = ("--format", "yolo", "--size", SIZE, "--out", tmp_path / "out")
    missing = tmp_path / "missing"
    assert f"{missing} " in fails("--data", missing, *out)
    bare = draw_folder(tmp_path / "bare", {"": 12})
    for path in (bare / "labels").iterdir():
        path.write_text("")
    assert "have no box: annotate or add some" in fails("--data", bare, *out)
    blind = draw_folder(tmp_path / "blind", {"train": 10, "val": 2, "test": 4})
    shutil.rmtree(blind / "labels" / "val")
    code, shown = call("--data", blind, *out)  # after a line on the images
    assert code == 1 and "none of the 2 dev images has a box, and the score threshold comes from them" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "remedy"), [("detect", "--data"), ("score", "--train-good")])
def test_files_that_are_no_model(own: Own, sure: Path, tmp_path: Path, command: str, remedy: str) -> None:
    text, foreign, cut, other = (tmp_path / f"{name}.safetensors" for name in ("text", "foreign", "cut", "other"))
    text.write_text("no model")
    save_file({"weight": torch.zeros(2)}, foreign)
    header = header_of(sure)
    anomaly = header | {"model": "patchcore", "settings": '{"teacher": "resnet18_random", "size": 64}'}
    save_file({"bank": torch.zeros(2)}, other, {"detect": anomaly, "score": header}[command])
    save_file({"weight": torch.zeros(2)}, cut, {"detect": header, "score": anomaly}[command])
    images = ("--images", own.images / "images", "--out", tmp_path / "out")
    for path in (text, foreign, other, tmp_path / "missing.safetensors", tmp_path):
        shown = fails("--model", path, *images, command=command)
        assert shown.startswith(f"error: {path} is no model that this program saved (") and remedy in shown
    shown = fails("--model", cut, *images, command=command)
    assert shown.startswith(f"error: {cut} does not hold the tensors that its settings call for")
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_looked_at(sure: Path, own: Own, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "--model needs --images" in fails("--model", sure, *out)
    assert "is not a folder" in fails("--model", sure, "--images", tmp_path / "none", *out)
    images = tmp_path / "images"
    images.mkdir()
    assert "holds no image (jpg, png" in fails("--model", sure, "--images", images, *out)
    (images / "broken.jpg").write_bytes(b"no image")
    shown = fails("--model", sure, "--images", own.images, "--confidence", 1.5, *out)
    assert "--confidence must lie between 0 and 1, got 1.5" in shown
    assert not (tmp_path / "out").exists()
