"""PaDiM: Defard et al., "PaDiM: a Patch Distribution Modeling Framework", ICPR 2020 workshops, arXiv 2011.08785.

Nothing is trained. Every position of the feature map has a Gaussian of its own over the good images, of a few teacher
channels drawn at random, and a position of a test image is as anomalous as its Mahalanobis distance is large.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from defectlab.anomaly.distil import cached_features, evaluate
from defectlab.anomaly.maps import gaussian_smooth, upsample
from defectlab.data.anomaly import AnomalyData
from defectlab.runs import Result
from defectlab.train import Session, full_float32, precision_of

REGULARISER = 0.01  # section IV-B: added to the covariance's diagonal
CHANNELS = {
    64: 100,
    256: 550,
}  # section IV-B: kept of 448 (ResNet-18) and of 1792 (WideResNet-50-2), by layer 1's width
POSITIONS = 256  # whose Gaussians are held at once


@dataclass(frozen=True)
class PaDiMSettings:
    """PaDiM with the random channels of its paper."""

    model: ClassVar[str] = "padim"
    version: ClassVar[int] = 1

    dataset: str = "mvtec_ad/metal_nut"
    teacher: str = "resnet18"  # section IV-B: R18-Rd100; WR50-Rd550 is the paper's best
    size: int = 224  # section IV-B crops 224 from 256; ours: the whole picture, as for every row
    precision: str = "bf16"  # of the cached teacher features


def draw_channels(total: int, keep: int, seed: int) -> Tensor:
    """Section III-A: `keep` of `total` channels, at random and without repetition: (keep,) int64, sorted."""
    if not 1 <= keep <= total:
        raise ValueError(f"{keep} channels cannot be drawn from {total}")
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:keep].sort().values


def embedding(features: list[Tensor], channels: Tensor) -> Tensor:
    """Section III-A: the three layers side by side at the finest resolution, of them these channels.

    [(N, C, h, w)] -> (h w, N, d) float32, position first; coarse layers are repeated (nearest), as in the figure.
    """
    fine = features[0].shape[-2:]
    parts, start = [], 0
    for layer in features:
        own = channels[(channels >= start) & (channels < start + layer.shape[1])] - start
        start += layer.shape[1]
        chosen = layer[:, own.to(layer.device)].float()
        parts.append(functional.interpolate(chosen, fine, mode="nearest"))
    return torch.cat(parts, 1).flatten(2).permute(2, 0, 1).contiguous()


def fit_gaussians(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Section III-B, equation 1: a Gaussian a position.

    (P, N, d), N > 1 -> (mean (P, 1, d), lower Cholesky factor of the covariance with its regulariser (P, d, d)).
    """
    count = samples.shape[1]
    if count < 2:
        raise ValueError(f"a Gaussian needs at least 2 good images, got {count}")
    mean = samples.mean(1, keepdim=True)
    centred = samples - mean
    covariance = centred.mT @ centred / (count - 1)
    covariance.diagonal(dim1=-2, dim2=-1).add_(REGULARISER)
    return mean, torch.linalg.cholesky(covariance)


def mahalanobis(samples: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Section III-C, equation 2: (P, N, d) and the Gaussians of the P positions -> distances (P, N)."""
    whitened = torch.linalg.solve_triangular(factor, (samples - mean).mT, upper=False)  # (P, d, N)
    return whitened.square().sum(1).sqrt()


@torch.inference_mode()
def run_padim(settings: PaDiMSettings, seed: int, data: AnomalyData, device: str, session: Session) -> Result:
    """Fit on the good images, score dev and test; the seed draws the channels.

    The Gaussians are not kept with the run: 125 MB with a ResNet-18, seconds to fit again.
    """
    features = {part: cached_features(data, part, settings, device) for part in ("train", "dev", "test")}
    widths = [layer.shape[1] for layer in features["train"]]
    channels = draw_channels(sum(widths), CHANNELS[widths[0]], seed)
    embedded = {part: embedding(layers, channels) for part, layers in features.items()}
    height, width = features["train"][0].shape[-2:]
    distances: dict[str, list[Tensor]] = {"dev": [], "test": []}
    with full_float32():
        for start in range(0, height * width, POSITIONS):
            mean, factor = fit_gaussians(embedded["train"][start : start + POSITIONS])
            for part, found in distances.items():
                found.append(mahalanobis(embedded[part][start : start + POSITIONS], mean, factor))
    session.say(f"  {height * width} Gaussians of {len(channels)} channels fitted to {len(data.train)} images")
    maps = {
        part: gaussian_smooth(upsample(torch.cat(found).T.unflatten(1, (height, width))))
        for part, found in distances.items()
    }
    result = evaluate(data, maps["dev"], maps["test"])
    result.precision = precision_of(settings, device)
    result.costs = {"parameters": 0, "gaussians": height * width}
    return result
