"""Classifiers of small windows, slid over a large image: one by one, or as the same network on the whole image.

Wang, Chen, Qiao, Snoussi, "A fast and robust convolutional neural network-based defect detection model in product
quality control", Int J Adv Manuf Technol 94, 3465-3471, 2018 (windows of 128 x 128 px on DAGM). The whole-image form:
Sermanet et al., "OverFeat", ICLR 2014; Long et al., "Fully Convolutional Networks", CVPR 2015.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defectlab.networks.efficientnet import Lite0
from defectlab.networks.resnet import load_teacher
from defectlab.precision import check_uint8

NETWORKS = ("cnn", "lite0", "resnet18", "contrast")


@dataclass(frozen=True)
class WindowSettings:
    """A classifier and its recipe. All is ours: the paper's text is not at hand."""

    model: ClassVar[str] = "windows"
    version: ClassVar[int] = 1

    dataset: str = "aitex"
    network: str = "cnn"  # "lite0", "resnet18": frozen, with a linear classifier; "contrast": nothing is learnt
    pretrained: bool = True  # False: random weights, for smoke
    form: str = "convolutional"  # at test, or "loop": window by window
    learnt: str = ""  # of a frozen network: the form in which its classifier learns, "": that of the test
    window: int = 128  # px a side
    stride: int = 32  # px between windows, at test
    margin: int = 16  # px at the edge of a window where a defect does not count
    draws: int = 2048  # windows an epoch, every second one with a defect
    epochs: int = 30  # of the small network; a frozen one sees its draws once
    batch: int = 64
    learning_rate: float = 0.001
    penalty: float = 1.0  # of the linear classifier: 1 / C in scikit-learn
    precision: str = "bf16"  # of the training, where the device is fast at it


class WindowNetwork(nn.Module):
    """uint8 images (B, 1, H, W) -> logits (B, h, w), one for each window whose upper left corner is a multiple of
    `step` px: h = (H - window) // step + 1. An image of one window gives (B, 1, 1)."""

    step: int

    def __init__(self, window: int):
        super().__init__()
        self.window = window

    def places(self, logits: Tensor, images: Tensor) -> Tensor:
        """The logits of whole windows."""
        h, w = ((side - self.window) // self.step + 1 for side in images.shape[-2:])
        return logits[:, :h, :w]


class SmallCNN(WindowNetwork):
    """Ours: eight convolutions without padding, so a score depends on its own window alone, wherever that lies.

    A window of 128 px ends as one value: 62, 60, 29, 27, 13, 11, 5, 1 px.
    """

    step = 16
    WIDTHS = ((16, 5, 2), (16, 3, 1), (32, 3, 2), (32, 3, 1), (48, 3, 2), (48, 3, 1), (64, 3, 2), (64, 5, 1))

    def __init__(self, window: int = 128):
        super().__init__(window)
        if window != 128:
            raise ValueError(f"the small network is made for windows of 128 px, got {window}")
        layers, before = [], 1
        for width, kernel, stride in self.WIDTHS:
            layers += [nn.Conv2d(before, width, kernel, stride, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(before, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        check_uint8(images)
        logits = self.classifier(self.features(images.float() / 127.5 - 1))[:, 0]
        return self.places(logits, images)


class Frozen(WindowNetwork):
    """A frozen ImageNet network, the mean of its last map over a window, and a linear classifier.

    "resnet18": layer 3 (stride 16), as in reverse distillation; "lite0": the last map (stride 32). Both pad their
    maps: a window of a whole image has true neighbours where a window cut out has zeros.
    """

    def __init__(self, network: str, window: int, pretrained: bool = True):
        super().__init__(window)
        teacher = "resnet18" if pretrained else "resnet18_random"
        self.backbone = Lite0(pretrained) if network == "lite0" else load_teacher(teacher)
        channels, self.step = (1280, 32) if network == "lite0" else (256, 16)
        if window % self.step:
            raise ValueError(f"windows of {network} must be a multiple of {self.step} px, got {window}")
        self.classifier = nn.Linear(channels, 1)

    def pooled(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) uint8 -> (B, channels, h, w), the features of each window."""
        check_uint8(images)
        found = self.backbone(images.expand(-1, 3, -1, -1))
        features = found[-1] if isinstance(found, list) else found
        return F.avg_pool2d(features, self.window // self.step, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.classifier(self.pooled(images).movedim(1, -1))[..., 0]
        return self.places(logits, images)


class Contrast(WindowNetwork):
    """Nothing is learnt: the standard deviation of the grey levels of a window, over 128. The floor."""

    step = 16

    def forward(self, images: Tensor) -> Tensor:
        check_uint8(images)
        grey = images.float() / 128
        mean, square = (F.avg_pool2d(x, self.window, self.step)[:, 0] for x in (grey, grey**2))
        return (square - mean**2).clamp(min=0).sqrt()


def build(settings: WindowSettings) -> WindowNetwork:
    """ValueError for an unknown network, WeightsError where its weights are not there."""
    if settings.network not in NETWORKS:
        raise ValueError(f"unknown network {settings.network!r}: use one of {', '.join(NETWORKS)}")
    if settings.network == "cnn":
        return SmallCNN(settings.window)
    if settings.network == "contrast":
        return Contrast(settings.window)
    return Frozen(settings.network, settings.window, settings.pretrained)


# --- The two forms ---------------------------------------------------------------------------------------------------


def count(side: int, window: int, stride: int) -> int:
    """Windows in a square image of `side` px."""
    return ((side - window) // stride + 1) ** 2


def by_loop(network: WindowNetwork, images: Tensor, stride: int, batch: int = 64) -> Tensor:
    """Logits (B, h, w) at every `stride` px: windows are cut out one by one, and classified `batch` at a time."""
    side = network.window
    windows = images.unfold(2, side, stride).unfold(3, side, stride)  # (B, 1, h, w, side, side)
    shape = (len(images), *windows.shape[2:4])
    each = (windows[b, :, i, j] for b in range(shape[0]) for i in range(shape[1]) for j in range(shape[2]))
    chunks, waiting = [], []
    for window in each:
        waiting.append(window)
        if len(waiting) == batch:
            chunks.append(network(torch.stack(waiting)))
            waiting = []
    if waiting:
        chunks.append(network(torch.stack(waiting)))
    return torch.cat(chunks).view(shape)


def convolutional(network: WindowNetwork, images: Tensor, stride: int) -> Tensor:
    """Logits (B, h, w) at every `stride` px, from one pass over the whole images. ValueError unless the network's own
    step divides the stride."""
    if stride % network.step:
        raise ValueError(f"a stride of {stride} px is no multiple of the network's {network.step} px")
    every = stride // network.step
    return network(images)[:, ::every, ::every]


FORMS = {"loop": by_loop, "convolutional": convolutional}


def to_pixels(logits: Tensor, window: int, stride: int, size: tuple[int, int]) -> Tensor:
    """(N, h, w) logits of windows -> (N, H, W): the mean over all windows that hold a pixel; where none does, that of
    the nearest pixel."""
    kernel = torch.ones(1, 1, window, window, device=logits.device)
    total, times = (F.conv_transpose2d(x[:, None], kernel, stride=stride) for x in (logits, torch.ones_like(logits)))
    missing = (0, max(size[1] - total.shape[-1], 0), 0, max(size[0] - total.shape[-2], 0))
    return F.pad(total / times, missing, "replicate")[:, 0, : size[0], : size[1]]
