"""A toy set drawn in memory, its training in a line and a study's runs on it, for the tests of detectors."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from defectlab import runs
from defectlab.data.augment import Batch
from defectlab.data.boxes import DetectionData, DetectionSplit
from defectlab.networks.yolo.losses import detection_loss
from defectlab.networks.yolo.model import Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.runs import Session
from defectlab.training.detector import train_detector
from defectlab.training.loop import Trained

CLASSES = ("rectangle", "ellipse")
SHORT = DetectorSettings(
    dataset="toy",
    scale="t",
    size=64,
    epochs=4,
    batch=4,
    warm_up=1.0,
    average_ramp=3.0,
    close_mosaic=1,
    precision="fp32",
)


def toy_split(count: int, seed: int, size: int) -> DetectionSplit:
    """Bright rectangles and dark ellipses, half sides 1/16 to 1/7 of the side, on noise: one to three, apart."""
    random = np.random.default_rng(seed)
    images = random.normal(110, 12, (count, 1, size, size))
    boxes, labels = np.zeros((count, 3, 4), np.float32), np.full((count, 3), -1)
    y, x = np.mgrid[:size, :size] + 0.5
    for picture in range(count):
        for slot, quarter in enumerate(random.permutation(4)[: random.integers(1, 4)]):
            label, half = random.integers(2), random.integers(size // 16, size // 7 + 1, 2)
            middle = random.integers(half, size // 2 - half + 1) + size // 2 * np.array(divmod(quarter, 2))
            dx, dy = abs(x - middle[0]) / half[0], abs(y - middle[1]) / half[1]
            inside = np.maximum(dx, dy) < 1 if label == 0 else np.hypot(dx, dy) < 1
            images[picture, 0][inside] += (70, -70)[label]
            boxes[picture, slot] = *(middle - half), *(middle + half)
            labels[picture, slot] = label
    return DetectionSplit(
        torch.from_numpy(images.round().clip(0, 255).astype(np.uint8)),
        torch.from_numpy(boxes),
        torch.from_numpy(labels),
        [f"{seed}/{picture}" for picture in range(count)],
        torch.full((count, 2), size),
        torch.ones(count),
        torch.zeros(count, 2),
    )


def toy_data(size: int = 64, counts: tuple[int, int, int] = (8, 4, 4)) -> DetectionData:
    return DetectionData("toy", "toy set", CLASSES, *(toy_split(n, seed, size) for seed, n in enumerate(counts)))


def fit(
    settings: DetectorSettings,
    data: DetectionData,
    seed: int = 0,
    session: Session | None = None,
    initial: int | None = None,
    **options,
) -> tuple[Detector, Detector, Trained]:
    """A fresh detector trained on `data.train` -> it, its moving average, the curve. `initial`: seed of the weights."""
    torch.manual_seed(seed if initial is None else initial)
    detector = build_detector(settings, data).to(memory_format=torch.channels_last)
    criterion = detection_loss(detector, settings.size)
    session = session or Session(say=lambda line: None)

    def loss(batch: Batch) -> dict[str, Tensor]:
        return criterion(detector(batch.images), batch.boxes, batch.labels)

    average, trained = train_detector(detector, loss, data.train, settings, seed, session, **options)
    return detector, average, trained


def equal(first: nn.Module, second: nn.Module) -> bool:
    """Whether all weights and buffers of two models are equal to the last bit."""
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def runs_of(
    run_row: Callable[..., runs.Result], load: Callable[[object, str], DetectionData]
) -> Callable[..., runs.Record]:
    """run(settings, seed) -> record of a study's row on toy data, silent, in the smoke profile on the CPU."""
    study = SimpleNamespace(
        load=load, fingerprints=lambda settings: {"data": "toy", "weights": "random"}, run_row=run_row
    )
    return lambda settings, seed=0: runs.run(study, settings, seed, "smoke", "cpu", Session(say=lambda line: None))


def recorded(project: Path) -> dict[str, dict]:
    """What the records of a project's smoke runs hold, by their keys."""
    return {path.stem: json.loads(path.read_text()) for path in (project / "runs" / "smoke").glob("*.json")}
