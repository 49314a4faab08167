"""Few-shot classification in episodes: a network meets classes that it has never seen, with a few images of each.

- Prototypical networks: Snell, Swersky, Zemel, NeurIPS 2017, arXiv 1703.05175, section 2.2, equations 1 and 2.
- ANIL: Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse?", ICLR 2020, arXiv 1909.09157, section 4: MAML
  whose inner loop adapts the linear head alone. Here with the full gradient: for a linear head the inner gradient is a
  formula, and autograd goes through it.
- A cosine classifier of all training classes, after Baseline++ of Chen et al., "A Closer Look at Few-shot
  Classification", ICLR 2019, arXiv 1904.04232, section 3.2. In an episode: the nearest class mean by cosine (the paper
  trains another cosine classifier on the support images).
- Frozen features of EfficientNet-Lite0 (ImageNet), nearest class mean by cosine: nothing is trained on defects.

Deviations: see the fields of the settings, and `Conv4`. An episode has `ways` classes, `shots` support images and
`queries` images to classify of each.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defectlab.networks.conv4 import Conv4
from defectlab.networks.efficientnet import Lite0
from defectlab.precision import check_uint8

# Learning rate of Adam: the best on dev of two or three that were tried, with tiles left out; 0.001 in the papers.
RATES = {"protonet": 0.001, "anil": 0.003, "cosine": 0.003, "frozen": 0.001}  # "frozen": without effect
METHODS = tuple(RATES)
TRANSFER_SIDE = 224  # px: what Lite0 was trained at


@dataclass(frozen=True)
class EpisodeSettings:
    """A method, the domain that it is tested on, and its recipe."""

    model: ClassVar[str] = "episodes"
    version: ClassVar[int] = 1

    dataset: str = "three_domains"
    method: str = "protonet"  # one of METHODS
    left_out: str = "tiles"  # or "steel", "boards": tested on; trained on the two others
    size: int = 64  # px a side; ours (84 in the papers)
    width: int = 32  # channels of Conv4; MAML and ANIL on mini-ImageNet, 64 in Snell et al. and Chen et al.
    ways: int = 5  # the papers' test; ours in training too (Snell et al. train with more ways)
    shots: int = 5  # the papers; one-shot episodes are answered by the same network
    queries: int = 8  # of each class; ours (15 in Snell et al.): the rarest class has 32 images
    epochs: int = 20  # ours
    episodes: int = 30  # an epoch, one a step; ours. "cosine" sees batches of as many images
    learning_rate: float = 0.001  # of Adam, see RATES; falls along half a cosine, ours
    inner_rate: float = 0.3  # "anil": of the head, by dev; with the 0.01 of MAML dev stayed at chance
    inner_steps: int = 5  # "anil": in training and test (MAML: 5 and 10)
    scale: float = 2.0  # "cosine": of the similarities before the softmax (Chen et al.'s code); 10 was worse on dev
    test_episodes: int = 600  # Snell et al., Chen et al.
    pretrained: bool = True  # "frozen"; False: random weights, for smoke
    precision: str = "bf16"  # of the training, where the device is fast at it

    @property
    def batch(self) -> int:
        """Images a step: those of an episode."""
        return self.ways * (self.shots + self.queries)


# --- Scores of the classes of an episode: support (..., W, S, D), queries (..., N, D) -> (..., N, W) ------------------


def prototype_scores(support: Tensor, queries: Tensor) -> Tensor:
    """Minus the squared Euclidean distance to the mean of each class (Snell et al., equations 1 and 2)."""
    return -(queries.unsqueeze(-2) - support.mean(-2).unsqueeze(-3)).square().sum(-1)


def cosine_scores(support: Tensor, queries: Tensor) -> Tensor:
    """Cosine to the mean direction of each class."""
    means = F.normalize(support, dim=-1).mean(-2)
    return F.normalize(queries, dim=-1) @ F.normalize(means, dim=-1).mT


def adapted_scores(support: Tensor, queries: Tensor, weight: Tensor, bias: Tensor, rate: float, steps: int) -> Tensor:
    """Logits of the head, weight (W, D) and bias (W,), after `steps` of gradient descent on the mean cross-entropy of
    the support images. Differentiable to any order in all tensors (Raghu et al., section 4)."""
    ways, shots = support.shape[-3:-1]
    images = support.flatten(-3, -2)  # (..., W * S, D)
    wanted = torch.eye(ways, dtype=support.dtype, device=support.device).repeat_interleave(shots, 0)
    bias = bias.unsqueeze(-2)  # (..., 1, W)
    for _ in range(steps):
        slope = ((images @ weight.mT + bias).softmax(-1) - wanted) / (ways * shots)  # of the loss by the logits
        weight = weight - rate * slope.mT @ images
        bias = bias - rate * slope.sum(-2, keepdim=True)
    return queries @ weight.mT + bias


def classification_loss(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Scores (N, W), labels (N,) int64 -> "loss", the mean cross-entropy of their softmax, and "accuracy", 0 to 1."""
    return {"loss": F.cross_entropy(scores, labels), "accuracy": (scores.argmax(1) == labels).float().mean()}


# --- Networks --------------------------------------------------------------------------------------------------------


class FrozenFeatures(nn.Module):
    """uint8 images (B, 1, S, S) -> (B, 1280) float32: brought to 224 px (bilinear), the last map of Lite0, mean over
    its places."""

    width = 1280

    def __init__(self, pretrained: bool = True):
        super().__init__()
        self.backbone = Lite0(pretrained)

    def forward(self, images: Tensor) -> Tensor:
        check_uint8(images)
        large = F.interpolate(images.float(), (TRANSFER_SIDE, TRANSFER_SIDE), mode="bilinear", align_corners=False)
        return self.backbone(large.round().to(torch.uint8).expand(-1, 3, -1, -1)).mean((2, 3))


class EpisodeNetwork(nn.Module):
    """uint8 images (B, 1, S, S) -> features (B, D); `scores` are those of the method. `classes`: of the training, which
    "cosine" has weights for. ValueError for an unknown method."""

    def __init__(self, settings: EpisodeSettings, classes: int):
        super().__init__()
        if settings.method not in METHODS:
            raise ValueError(f"unknown method {settings.method!r}: use one of {', '.join(METHODS)}")
        self.settings = settings
        frozen = settings.method == "frozen"
        self.body = FrozenFeatures(settings.pretrained) if frozen else Conv4(settings.width)
        if settings.method == "anil":
            self.head = nn.Linear(self.body.width, settings.ways)
        if settings.method == "cosine":
            self.directions = nn.Parameter(torch.randn(classes, self.body.width))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)

    def scores(self, support: Tensor, queries: Tensor) -> Tensor:
        """Support (..., W, S, D), queries (..., N, D) -> (..., N, W)."""
        if self.settings.method == "protonet":
            return prototype_scores(support, queries)
        if self.settings.method == "anil":
            own = self.settings
            return adapted_scores(support, queries, self.head.weight, self.head.bias, own.inner_rate, own.inner_steps)
        return cosine_scores(support, queries)

    def class_scores(self, features: Tensor) -> Tensor:
        """ "cosine": features (B, D) -> (B, classes of the training)."""
        return self.settings.scale * F.normalize(features, dim=1) @ F.normalize(self.directions, dim=1).mT
