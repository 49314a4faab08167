"""`score` on a reader's own images: train on good ones, score others, go on; and what it says of what is off."""

import shutil
from functools import partialmethod
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from toy_commands import call, fails, read_csv, works

from defectlab.data.anomaly import from_good_folder
from defectlab.data.synthetic import tiles
from defectlab.data.synthetic.pasted import add_defect
from defectlab.own import saved, score
from defectlab.runs import Context

SMALL = ("--teacher", "resnet18_random", "--size", 64)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good` with 24 synthetic tiles to train on; `new` with two good ones and two with a fray."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("good", 24), ("new", 4)):
        (folder / name).mkdir()
        for index in range(count):
            tile = tiles.draw_tile(rng, 64, 48)
            if name == "new" and index >= 2:
                tile, _ = add_defect(tile, "fray", rng)
            Image.fromarray(tile).save(folder / name / f"tile{index:02d}.png")
    return folder


@pytest.mark.parametrize("method", ["patchcore", "rd4ad"])
def test_train_on_good_images_then_score_with_the_model(method: str, parts: Path, tmp_path: Path) -> None:
    first, second, model = tmp_path / "first", tmp_path / "second", tmp_path / "first" / f"{method}.safetensors"
    images, options = ("--images", parts / "new"), ("--method", method, "--epochs", 1, *SMALL)
    shown = works(*images, "--out", first, "--train-good", parts / "good", *options, command="score")
    assert f"learnt from 22 good images; saved {model}" in shown
    assert model.stat().st_mode & 0o777 == first.stat().st_mode & 0o666  # whoever may read the folder
    assert "4 images scored" in works(*images, "--out", second, "--model", model, command="score")
    lines, again = (read_csv(folder / "scores.csv") for folder in (first, second))
    assert lines == again and len({line["score"] for line in lines}) == 4
    assert [line["image"] for line in lines] == [f"tile{index:02d}.png" for index in range(4)]
    trained = saved.read(model, score.SETTINGS, score.REMEDY)
    assert (trained.settings.model, trained.settings.size, trained.settings.teacher) == (method, 64, "resnet18_random")
    assert all(int(line["anomalous"]) == (float(line["score"]) >= trained.threshold) for line in lines)
    for line in lines:
        one = np.load(second / f"{line['image']}_map.npy")
        assert (one.shape, one.dtype) == ((256, 256), np.float32)
        if method == "rd4ad":
            assert float(one.max()) == pytest.approx(float(line["score"]), abs=1e-5)
        with Image.open(second / f"{line['image']}_map.png") as overlay:
            assert (overlay.size, overlay.mode) == ((256, 256), "RGB")


def test_score_searches_as_detect_does_and_goes_on_over_broken_images(parts: Path, tmp_path: Path) -> None:
    """Subfolders count; hidden files, other kinds and earlier results do not; a broken image is named, exit code 1."""
    images = tmp_path / "images"
    shutil.copytree(parts / "new", images / "line 2")
    shutil.copy(parts / "good" / "tile00.png", images / "tile00.png")
    shutil.copy(images / "tile00.png", images / "._tile00.png")
    (images / "tile99.jpg").write_bytes(b"no image")
    (images / "notes.docx").write_text("x")
    command = ("--train-good", parts / "good", "--images", images, "--method", "patchcore", *SMALL)
    for out in (images / "first", images / "second", images / "second"):
        code, shown = call(*command, "--out", out, "--threshold", 0.1, command="score")
        assert code == 1 and " 5 at or above the threshold 0.1" in shown and "other kinds left out: .docx 1" in shown
        assert f"left out: {images / 'tile99.jpg'} cannot be decoded" in shown and "tile00.png and" in shown
        names = [line["image"] for line in read_csv(out / "scores.csv")]
        assert names == [*(f"line 2/tile{i:02d}.png" for i in range(4)), "tile00.png"]
        assert (out / "line 2" / "tile03.png_map.png").exists()
    assert f"already trained: {out / 'patchcore.safetensors'}" in shown
    for out in (images, tmp_path, parts / "good"):
        shown = fails(*command, "--out", out, command="score")
        assert f"--out {out} must be a folder of its own: it holds the images of" in shown


def test_training_goes_on_and_does_not_overwrite(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--images", parts / "new", "--train-good", parts / "good", "--method", "rd4ad", "--out", tmp_path, *SMALL)
    first, seconds = [], Context.every_seconds
    monkeypatch.setattr(Context, "__init__", partialmethod(Context.__init__, every_seconds=0.0, log=first.append))
    with monkeypatch.context() as patch:
        patch.setattr("defectlab.training.loop.extend", Mock(side_effect=[None, None, KeyboardInterrupt]))
        code, _ = call(*asked, "--epochs", 3, command="score")
    assert code == 130 and len(list(tmp_path.glob("checkpoint-*.safetensors"))) == 1 and seconds == 60
    works(*asked, "--epochs", 3, command="score")
    assert "  continues after epoch 2 of 3" in first and not list(tmp_path.glob("checkpoint-*"))
    assert "was trained with other images or settings" in fails(*asked, "--epochs", 4, command="score")


@pytest.mark.parametrize("name", ["test/dent/a.png", "ground_truth/a.png", "tile00_mask.png"])
def test_masks_and_test_images_are_no_good_images(parts: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(parts / "good", tmp_path / "good")
    (tmp_path / "good" / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(parts / "good" / "tile00.png", tmp_path / "good" / name)
    options = ("--images", parts / "new", "--train-good", tmp_path / "good", "--out", tmp_path / "out", *SMALL)
    assert f"{Path(name).name} looks like a test image or a mask" in fails(*options, command="score")


def test_no_copy_of_a_held_out_image_is_trained_on(parts: Path, tmp_path: Path) -> None:
    for copy in ("a", "b"):
        shutil.copytree(parts / "good", tmp_path / copy)
    data = from_good_folder(tmp_path, 64)
    train, dev = ({Path(name.split("+")[0]).name for name in part.names} for part in (data.train, data.dev))
    assert len(train) > 10 and not train & dev


@pytest.mark.parametrize("size", [100, 32, 48, 8192])
def test_sizes_that_score_cannot_use(parts: Path, tmp_path: Path, size: int) -> None:
    options = ("--images", tmp_path / "none", "--train-good", parts / "good", "--out", tmp_path / "out")
    shown = fails(*options, "--size", size, command="score")
    assert f"--size must be a multiple of 32 from 64 to 4096, got {size}" in shown


def test_images_that_cannot_be_scored(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, out = parts / "new", ("--out", tmp_path / "out")
    shown = fails("--images", new, "--train-good", new, *SMALL, *out, command="score")
    assert "holds 4 different images: training needs at least 20 good ones" in shown
    shown = fails("--images", tmp_path, "--train-good", parts / "good", *SMALL, *out, command="score")
    assert "holds no image (jpg, png" in shown
    monkeypatch.setenv("DEFECTLAB_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    shown = fails("--images", new, "--train-good", parts / "good", *out, "--size", 64, command="score")
    assert "no ImageNet weights for the teacher resnet18" in shown
