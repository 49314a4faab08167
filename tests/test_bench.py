"""The table of speeds: plausible numbers, and that each is what its heading says."""

from types import SimpleNamespace

import pytest
import torch

from defectlab import bench
from defectlab.__main__ import main


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and small images, one of each kind of network."""
    monkeypatch.setattr(bench, "BATCH", 2)
    monkeypatch.setattr(bench, "IMAGES", 4)
    monkeypatch.setattr(bench, "DETECTORS", (("detector", "v8n"), ("yolo_dcf", "yolo_dcf")))
    monkeypatch.setattr(bench, "METHODS", {"rd4ad": bench.METHODS["rd4ad"]})


def test_the_table(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--sizes", "64,32", "--device", "cpu"]) == 0
    _, *lines, note = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1  # columns stand under their headings
    table = [(line[:16].strip(), line[16:].split()) for line in lines[2:]]
    forms = ("v8n", "v8n, fused", "yolo_dcf", "yolo_dcf, fused")
    detectors = [(name, size) for kind in (forms[:2], forms[2:]) for size in ("64", "32") for name in kind]
    assert [(name, row[0]) for name, row in table] == [*detectors, ("rd4ad", "256")]
    for name, (_, weights, *training, single, many, memory) in table:
        assert 1 < float(weights) < 20 and float(single) > 0 and float(many) > 0 and float(memory) > 50
        if "fused" in name:
            assert training == []
        else:
            precision, speed, share = training
            assert precision in ("fp32", "bf16") and float(speed) > 0 and 0 <= float(share) <= 100
    assert note == "inference in fp32; memory: peak of the process so far"


def test_what_is_timed(quick: None, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """With a clock that gives each kind of call a time of its own: units, and which number is which."""
    trained, seen = [], []

    def train_detector(network, loss, split, settings, seed, context):
        trained.append(settings.epochs)
        assert split.boxes.min() >= 0 and split.boxes.max() <= 64
        assert (split.boxes[..., 2:] - split.boxes[..., :2] > 0.29 * 64).all()
        return network, SimpleNamespace(images_per_second=12.0)

    def inference_seconds(network, images, precision, repeats):
        fused = not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
        seen.append((fused, tuple(images.shape), precision))
        return 0.25 if fused else 0.5

    monkeypatch.setattr(bench, "train_detector", train_detector)
    monkeypatch.setattr(bench, "inference_seconds", inference_seconds)
    monkeypatch.setattr(bench, "seconds_per_call", lambda call, device, repeats, warm_up: call() and 0.1)
    assert main(["bench", "--part", "detector", "--sizes", "64", "--device", "cpu"]) == 0
    plain, fused = (line[16:].split() for line in capsys.readouterr().out.splitlines()[3:5])
    assert plain[3:7] == ["12.0", "60.0", "500.0", "4.0"]  # 0.1 s of the 2 / 12 s that a step of two images takes
    assert fused[2:4] == ["250.0", "8.0"]
    assert trained == [1, 1] * 2  # a warm-up before each
    assert seen[:4] == [(form, (count, 3, 64, 64), "fp32") for form in (False, True) for count in (1, 2)]


def test_sizes_that_no_detector_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--part", "detector", "--sizes", "64,100", "--device", "cpu"]) == 1
    assert "multiples of 32, got 64,100" in capsys.readouterr().err
