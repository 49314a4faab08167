"""SPADE: Cohen and Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences", arXiv 2005.02357 (2020).

Nothing is trained. An image is as anomalous as it is far from its nearest good images (section 3.2), a pixel as it is
far from the nearest pixel of these good images, wherever it lies in them (sections 3.3 and 3.4).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from defectlab.anomaly.distil import cached_features, evaluate
from defectlab.anomaly.maps import gaussian_smooth, upsample
from defectlab.anomaly.patchcore import nearest_distances
from defectlab.data.anomaly import AnomalyData
from defectlab.runs import Result
from defectlab.train import Session, precision_of


@dataclass(frozen=True)
class SPADESettings:
    """SPADE's nearest neighbours on layers 1 to 3."""

    model: ClassVar[str] = "spade"
    version: ClassVar[int] = 1

    dataset: str = "mvtec_ad/metal_nut"
    teacher: str = "resnet18"  # ours: the same teacher for every row; section 4 has WideResNet-50-2
    size: int = 224  # section 4 crops 224 from 256; ours: the whole picture, as for every row
    neighbours: int = 50  # section 4: K
    precision: str = "bf16"  # of the cached teacher features


def descriptors(features: list[Tensor]) -> Tensor:
    """One vector an image, (N, C3) float32: layer 3, pooled (ours; section 3.1 pools layer 4, which is not kept)."""
    return features[2].float().mean((2, 3))


def pyramid(features: list[Tensor]) -> Tensor:
    """Section 3.4: all three layers of a pixel side by side: (N, h, w, C1 + C2 + C3) float32.

    At layer 2's resolution (ours): at layer 1's, a search costs sixteen times as much.
    """
    first, second, third = (f.float() for f in features)
    fine = second.shape[-2:]
    first = functional.adaptive_avg_pool2d(first, fine)
    third = functional.interpolate(third, fine, mode="bilinear", align_corners=False)
    return torch.cat([first, second, third], 1).permute(0, 2, 3, 1)


def nearest_images(queries: Tensor, good: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Section 3.2, equation 2: (M, C), (N, C) -> mean squared distance to the K nearest (M,), their indices (M, K).

    K is `neighbours`, or N where there are fewer good images.
    """
    distances, indices = torch.cdist(queries, good).topk(min(neighbours, len(good)), largest=False)
    return distances.square().mean(1), indices


@torch.inference_mode()
def run_spade(settings: SPADESettings, seed: int, data: AnomalyData, device: str, session: Session) -> Result:
    """Score dev and test against the good images; nothing depends on the seed."""
    good = cached_features(data, "train", settings, device)
    described, pixels = descriptors(good), pyramid(good)
    maps, scores = {}, {}
    for part in ("dev", "test"):
        features = cached_features(data, part, settings, device)
        scores[part], nearest = nearest_images(descriptors(features), described, settings.neighbours)
        maps[part] = gaussian_smooth(upsample(pixel_distances(pyramid(features), pixels, nearest)))
    session.say(f"  {len(maps['dev']) + len(maps['test'])} images compared with {len(good[0])} good ones")
    result = evaluate(data, maps["dev"], maps["test"], scores["dev"], scores["test"])
    result.precision = precision_of(settings, device)
    result.costs = {"parameters": 0, "remembered_images": len(good[0])}
    return result


def pixel_distances(queries: Tensor, good: Tensor, nearest: Tensor) -> Tensor:
    """Section 3.3 with kappa = 1: distance of each pixel to the nearest pixel of the image's nearest good images.

    (M, h, w, C), (N, h, w, C), (M, K) -> (M, h, w).
    """
    found = [
        nearest_distances(query.flatten(0, 1), good[chosen].flatten(0, 2))[0].view(query.shape[:2])
        for query, chosen in zip(queries, nearest, strict=True)
    ]
    return torch.stack(found)
