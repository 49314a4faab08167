"""A detector without suppression: YOLOv10's second head, which learns one box for each object.

Wang et al., "YOLOv10: Real-Time End-to-End Object Detection", NeurIPS 2024, arXiv 2405.14458, section 3.1. Two heads
look at the same maps. One learns from many anchors for each object, as before; the other from a single anchor. At
inference the second one answers alone, and its boxes are taken as they are. Both choose their anchors by one metric,
score^alpha * iou^beta. With the same exponents the second one's anchor is the first one's best, as long as both give
the same scores and boxes: they are "consistent". The paper's other parts (a lighter classification head, blocks,
attention) are not here.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from defectlab.networks.yolo.losses import AnchorFreeLoss
from defectlab.networks.yolo.model import STRIDES, Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings

HEADS = ("both", "one")


@dataclass(frozen=True)
class OneToOneSettings(DetectorSettings):
    """A v8 detector whose boxes are not suppressed."""

    model: ClassVar[str] = "one_to_one"
    version: ClassVar[int] = 1

    heads: str = "both"  # "both" are trained, or "one": the one-to-one head alone
    alpha: float = 0.5  # of the one-to-one head's metric; paper section 3.1: as the other's, YOLOv8's 0.5 and 6
    beta: float = 6.0
    detached: bool = True  # authors' code: the one-to-one head's gradient ends at the maps; the paper does not say it


class TwoHeads(Detector):
    """A v8 detector with a second head, `one`, which starts as a copy of the first.

    While it trains it gives six maps, those of the first head, then those of the second; else the second's three.
    """

    def __init__(self, scale: str, classes: int, detached: bool = True):
        super().__init__("v8", scale, classes)
        self.one = copy.deepcopy(self.head)
        self.detached = detached

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.features(images)
        one = self.one([x.detach() for x in maps] if self.detached else maps)
        return [*self.head(maps), *one] if self.training else one

    def many(self) -> Detector:
        """The same network with the first head in place of the second, whose boxes must be suppressed."""
        plain = Detector("v8", self.scale, self.class_count)
        weights = {name: value for name, value in self.state_dict().items() if not name.startswith("one.")}
        plain.load_state_dict(weights)
        return plain.to(next(self.parameters()).device).train(self.training)


def build(settings: OneToOneSettings, classes: int, anchors: Any = None) -> Detector:
    """A fresh detector; `anchors`, which v8 has none of, are for the signature. ValueError for another family."""
    if settings.family != "v8" or settings.heads not in HEADS:
        raise ValueError(f"family {settings.family!r}, heads {settings.heads!r}: use v8, and {' or '.join(HEADS)}")
    if settings.heads == "one":
        return build_detector(settings, classes)
    return TwoHeads(settings.scale, classes, settings.detached)


class OneToOneLoss(nn.Module):
    """The v8 generation's loss of the one-to-one head, and of the other where there is one, added with equal weight.

    Called with a training network's maps: (raw maps, boxes (B, M, 4) px, labels (B, M)) -> named scalars, those of the
    one-to-one head as "one_box", "one_cls", "one_dfl".
    """

    def __init__(self, settings: OneToOneSettings, classes: int):
        super().__init__()
        self.one = AnchorFreeLoss(classes, topk=1, alpha=settings.alpha, beta=settings.beta)
        self.many = AnchorFreeLoss(classes) if settings.heads == "both" else None

    def forward(self, raw: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = self.one(raw[-len(STRIDES) :], boxes, labels)
        terms = {f"one_{name}": value for name, value in found.items() if name != "loss"}
        if self.many is None:
            return {"loss": found["loss"], **terms}
        many = self.many(raw[: len(STRIDES)], boxes, labels)
        return many | terms | {"loss": many["loss"] + found["loss"]}
