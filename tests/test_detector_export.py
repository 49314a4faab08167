"""The ONNX file of a detector: the same boxes and scores as torch, whatever the family and the modules."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from toy_detection import lively

from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.decode import decode, select
from defectlab.networks.yolo.model import Detector, build_detector
from defectlab.networks.yolo.one_to_one import TwoHeads
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.own import export
from defectlab.own.export import to_onnx
from defectlab.papers import yolo_dcf

SIZE, CLASSES = 96, 2
DETECTORS = {
    "v8": lambda: build_detector(DetectorSettings(size=SIZE, scale="t"), CLASSES),
    "v5": lambda: build_detector(DetectorSettings(size=SIZE, scale="t", family="v5"), CLASSES),
    "yolo_dcf": lambda: yolo_dcf.build(yolo_dcf.Settings(size=SIZE, scale="t"), CLASSES),
}


def stirred(name: str) -> Detector:
    """A detector with norms that are not at their start, so that fusing them is more than nothing."""
    torch.manual_seed(0)
    return lively(DETECTORS[name]())


@pytest.mark.parametrize("name", list(DETECTORS))
def test_exported_detector_equals_torch(name: str, tmp_path: Path) -> None:
    detector, path = stirred(name), tmp_path / "new" / "detector.onnx"
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    difference = to_onnx(detector, path, SIZE)
    assert 0 <= difference["boxes"] < 1e-3
    assert 0 <= difference["scores"] < 1e-5
    assert [file.name for file in path.parent.iterdir()] == ["detector.onnx"]  # weights inside, nothing left aside
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())

    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert (images.name, images.shape, images.type) == ("images", ["batch", 3, SIZE, SIZE], "tensor(float)")
    noise = torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))  # another batch than checked
    boxes, scores = session.run(["boxes", "scores"], {"images": noise.numpy()})
    anchors = sum((SIZE // stride) ** 2 for stride in (8, 16, 32)) * (3 if name == "v5" else 1)
    assert boxes.shape == (5, anchors, 4) and scores.shape == (5, anchors, 2)
    with torch.no_grad():
        wanted = decode(detector, detector(noise))  # not fused
    np.testing.assert_allclose(boxes, wanted[0], atol=1e-3)
    np.testing.assert_allclose(scores, wanted[1], atol=1e-5)


def test_a_detector_without_suppression_is_exported_to_its_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector, path = lively(TwoHeads("t", CLASSES)), tmp_path / "detector.onnx"
    for branch in detector.one.classes:
        torch.nn.init.normal_(branch[-1].weight, std=0.2)  # so that scores differ
        torch.nn.init.zeros_(branch[-1].bias)
    difference = to_onnx(detector, path, SIZE)
    assert 0 <= difference["boxes"] < 1e-3 and 0 <= difference["scores"] < 1e-5
    noise = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    boxes, scores, labels = session.run(["boxes", "scores", "labels"], {"images": noise.numpy()})
    with torch.no_grad():
        wanted = select(*decode(detector, detector(noise)), SIZE, confidence=0.0, iou=1.0)
    for image, found in enumerate(wanted):
        assert len(found["scores"]) == scores.shape[1] == 300
        np.testing.assert_allclose(scores[image], found["scores"], atol=1e-5)
        sure = export.clear(torch.from_numpy(scores))[image].numpy()
        assert sure.sum() > 30
        np.testing.assert_array_equal(labels[image][sure], found["labels"][sure])
        np.testing.assert_allclose(boxes[image][sure].clip(0, SIZE), found["boxes"][sure], atol=1e-3)


def test_the_difference_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime whose boxes are off by half a pixel and whose scores by 0.25 is found out."""

    class Off:
        def __init__(self, path: Path, providers: list[str]) -> None:
            assert path.is_file()

        def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            with torch.no_grad():
                boxes, scores = decode(model, model(torch.from_numpy(feeds["images"])))
            return [(boxes + 0.5).numpy(), (scores - 0.25).numpy()]

    detector = stirred("v8")
    model = fused(detector)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Off)
    monkeypatch.setattr(torch.onnx, "export", lambda model, inputs, path, **options: Path(path).write_bytes(b"onnx"))
    difference = to_onnx(detector, tmp_path / "detector.onnx", SIZE)
    assert difference["boxes"] == pytest.approx(0.5, abs=1e-3)
    assert difference["scores"] == pytest.approx(0.25, abs=1e-5)


def test_size_that_no_detector_takes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="100x100 px: a detector needs sides divisible by 32"):
        to_onnx(stirred("v8"), tmp_path / "detector.onnx", 100)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else there(name))
    with pytest.raises(ValueError, match="needs onnxruntime: python -m pip install onnxruntime"):
        to_onnx(stirred("v8"), tmp_path / "detector.onnx", SIZE)
    assert list(tmp_path.iterdir()) == []
