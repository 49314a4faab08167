"""The table of detector speeds: plausible numbers, and that each is what its heading says."""

from types import SimpleNamespace

import pytest
import torch

from defectlab import bench as command
from defectlab import bench_detectors as bench
from defectlab.__main__ import main
from defectlab.bench_detectors import Speed, measure, random_split, table
from defectlab.networks.yolo.model import build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.papers import yolo_dcf

ROWS = {
    "v8t": (DetectorSettings(scale="t", optimizer="adamw"), build_detector),
    "dcf t": (yolo_dcf.Settings(scale="t", family="v5"), yolo_dcf.build),
}
SMALL = {"repeats": 3, "batch": 2, "inference_batch": 2}


@pytest.mark.parametrize("name", list(ROWS))
def test_plausible_numbers(name: str) -> None:
    speed = measure(name, ROWS[name], 64, "cpu", **SMALL)
    assert (speed.name, speed.size) == (name, 64)
    assert 0 < speed.batch_share < 1
    assert min(speed.train, speed.single, speed.single_fused, speed.many, speed.many_fused) > 0
    assert speed.train < speed.many  # a step is more than a forward pass
    assert 0.2 < speed.parameters_m < 2
    assert speed.memory_mb > 50
    assert speed.precision in ("fp32", "bf16")


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that gives each kind of call a time of its own: units, and which number is which."""
    seen = []

    def timed(network, images, precision, repeats):
        is_folded = not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
        seen.append((is_folded, tuple(images.shape), precision))
        return 0.25 if is_folded else 0.5

    def per_call(call, device, repeats, warm_up):
        call()
        return 0.5  # of making a batch

    def train(detector, loss, split, settings, seed, context):
        return detector, SimpleNamespace(images_per_second=2.0)

    monkeypatch.setattr(bench, "train_detector", train)
    monkeypatch.setattr(bench, "seconds_per_call", per_call)
    monkeypatch.setattr(bench, "inference_seconds", timed)
    speed = measure("v8t", ROWS["v8t"], 64, "cpu", batch=4, inference_batch=8)
    assert (speed.train, speed.batch_share) == (2.0, 0.25)
    assert (speed.single, speed.single_fused, speed.many, speed.many_fused) == (500.0, 250.0, 16.0, 32.0)
    assert sorted(seen) == [(kind, (count, 3, 64, 64), "fp32") for kind in (False, True) for count in (1, 8)]


def test_random_pictures_have_boxes_inside() -> None:
    split = random_split(3, 64, "cpu")
    assert split.images.shape == (3, 1, 64, 64) and split.images.dtype == torch.uint8
    assert (split.boxes[..., 2:] - split.boxes[..., :2] >= 0.1 * 64 - 1e-3).all()
    assert split.boxes.min() >= 0 and split.boxes.max() <= 64
    assert split.labels.min() >= 0 and split.labels.max() < bench.CLASSES


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints a line a detector and size, in the order of the sizes."""

    def fake(name, row, size, device, repeats, batch, inference_batch):
        return Speed(name, size, 3.01, "bf16", 12.0, 0.034, 50.0, 40.0, 30.0, 33.0, 812.0)

    monkeypatch.setattr(bench, "measure", fake)
    assert main(["bench", "--part", "detector", "--sizes", "320,64", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "training" in lines[1] and "images/s" in lines[2]
    assert [line[:10].strip() for line in lines[3:9]] == ["v8n", "v5n", "yolo_dcf n"] * 2
    numbers = [line[10:].split() for line in lines[3:9]]
    assert [row[0] for row in numbers] == ["320"] * 3 + ["64"] * 3
    assert numbers[0][1:] == ["3.01", "12.0", "3.4", "50.0", "40.0", "30.0", "33.0", "812"]
    assert len({len(line) for line in lines[1:9]}) == 1  # columns stand under their headings
    assert "batch 16, bf16" in lines[9] and lines[9].endswith("memory: peak of the process so far")


def test_detectors_of_the_command() -> None:
    assert list(command.DETECTORS) == ["v8n", "v5n", "yolo_dcf n"]
    families = [(settings.family, settings.scale) for settings, _ in command.DETECTORS.values()]
    assert families == [("v8", "n"), ("v5", "n"), ("v8", "n")]


@pytest.mark.parametrize(("sizes", "message"), [("100", "multiples of 32, got 100"), ("", "multiples of 32, got none")])
def test_sizes_that_no_detector_takes(sizes: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--part", "detector", "--sizes", sizes, "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="multiples of 32"):
        next(table(ROWS, [0], "cpu"))
