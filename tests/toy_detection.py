"""A toy set in memory, and its training in a line, for the tests of detectors."""

import numpy as np
import torch
from torch import Tensor, nn
from toy_runs import quiet

from defectlab.data.augment import Batch
from defectlab.data.detection import DetectionData, DetectionSplit
from defectlab.networks.yolo.losses import detection_loss
from defectlab.networks.yolo.model import Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.runs import Context
from defectlab.training.detection import fresh
from defectlab.training.loop import Trained
from defectlab.training.recipe import train_detector

CLASSES = ("rectangle", "ellipse")
SHORT = DetectorSettings(
    dataset="toy", scale="t", size=64, epochs=4, batch=4, warm_up=1.0, average_ramp=3.0, close_mosaic=1,
    precision="fp32",
)  # fmt: skip


def toy_split(count: int, seed: int, size: int) -> DetectionSplit:
    """Bright rectangles and dark ellipses, half sides 1/16 to 1/7 of the side, on noise: one to three, apart."""
    random = np.random.default_rng(seed)
    images = random.normal(110, 12, (count, 1, size, size))
    boxes, labels = np.zeros((count, 3, 4), np.float32), np.full((count, 3), -1)
    y, x = np.mgrid[:size, :size] + 0.5
    for image in range(count):
        for slot, quarter in enumerate(random.permutation(4)[: random.integers(1, 4)]):
            label, half = random.integers(2), random.integers(size // 16, size // 7 + 1, 2)
            middle = random.integers(half, size // 2 - half + 1) + size // 2 * np.array(divmod(quarter, 2))
            dx, dy = abs(x - middle[0]) / half[0], abs(y - middle[1]) / half[1]
            inside = np.maximum(dx, dy) < 1 if label == 0 else np.hypot(dx, dy) < 1
            images[image, 0][inside] += (70, -70)[label]
            boxes[image, slot] = *(middle - half), *(middle + half)
            labels[image, slot] = label
    return DetectionSplit(
        torch.from_numpy(images.round().clip(0, 255).astype(np.uint8)),
        torch.from_numpy(boxes),
        torch.from_numpy(labels),
        [f"{seed}/{image}" for image in range(count)],
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
    context: Context | None = None,
    initial: int | None = None,
    **options,
) -> tuple[Detector, Detector, Trained]:
    """A fresh detector trained on `data.train` -> it, its moving average, the curve. `initial`: seed of the weights."""
    torch.manual_seed(seed if initial is None else initial)
    detector = fresh(build_detector, settings, data).to(memory_format=torch.channels_last)
    criterion = detection_loss(detector, settings.size)

    def loss(batch: Batch) -> dict[str, Tensor]:
        return criterion(detector(batch.images), batch.boxes, batch.labels)

    average, trained = train_detector(detector, loss, data.train, settings, seed, context or quiet(), **options)
    return detector, average, trained


def equal(first: nn.Module, second: nn.Module) -> bool:
    """Whether all weights and buffers of two models are equal to the last bit."""
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lively(model: nn.Module) -> nn.Module:
    """`model` in eval mode with norms as after a training: other statistics, weights and biases in every channel."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.2, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                values.copy_(low + (high - low) * torch.rand(len(values), generator=generator))
    return model.eval()


def relative(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))
