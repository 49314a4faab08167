"""Anomaly detection without training, from the features that a frozen network gives for the good images.

- PatchCore: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, arXiv 2106.08265. A coreset
  of all good patches; a patch's score is its distance to the nearest one.
- PaDiM: Defard et al., "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization", ICPR
  2020 workshops, arXiv 2011.08785. A Gaussian per position, over random channels; the Mahalanobis distance.
- SPADE: Cohen and Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences", arXiv 2005.02357 (2020). The
  nearest good images; each pixel's distance to the nearest pixel in them, at any position.

Section and equation numbers are those of the method's own paper.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

PROJECTION = 128  # dimensions in which PatchCore's coreset is chosen (official code)
REGULARISER = 0.01  # PaDiM section IV-B: added to the covariance's diagonal
# PaDiM section IV-B: channels kept of 448 (ResNet-18) and of 1792 (WideResNet-50-2), by layer 1's width
CHANNELS = {64: 100, 256: 550}


# --- PatchCore --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchCoreSettings:
    """PatchCore at 1 % of the patches."""

    model: ClassVar[str] = "patchcore"
    version: ClassVar[int] = 1

    dataset: str = "magnetic_tile"
    teacher: str = "resnet18"  # ours: the same teacher for every row
    size: int = 256  # ours: the same input for every row (the paper crops 224 from 256)
    coreset: float = 0.01  # PatchCore table 1, its fastest setting
    precision: str = "bf16"  # of the cached teacher features


def patch_features(features: list[Tensor]) -> Tensor:
    """Section 3.1: layers 2 and 3, averaged over 3x3 neighbourhoods, side by side at layer 2's resolution.

    Three teacher maps -> (B, h, w, C2 + C3). The official code pools the channels to 1024; we keep them as they are.
    """
    pooled = [functional.avg_pool2d(f.float(), 3, 1, 1) for f in features[1:]]
    fine = pooled[0].shape[-2:]
    coarse = functional.interpolate(pooled[1], fine, mode="bilinear", align_corners=False)
    return torch.cat([pooled[0], coarse], 1).permute(0, 2, 3, 1)


def greedy_coreset(patches: Tensor, keep: int, seed: int) -> Tensor:
    """Section 3.2, algorithm 1: indices of `keep` patches, each the farthest from those chosen before it.

    patches (N, C) -> (keep,) int64. The projection to 128 dimensions and the first patch are random, by the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(patches.shape[1], PROJECTION, generator=generator) / PROJECTION**0.5
    points = patches @ projection.to(patches)
    squares = points.square().sum(1)
    chosen = torch.empty(keep, dtype=torch.long, device=patches.device)
    chosen[0] = int(torch.randint(len(points), (1,), generator=generator))
    nearest = torch.full_like(squares, torch.inf)
    for i in range(1, keep):
        last = chosen[i - 1]
        distance = torch.addmv(squares, points, points[last], alpha=-2).add_(squares[last])
        torch.minimum(nearest, distance, out=nearest)
        nearest[last] = -torch.inf  # never the same patch twice, whatever rounding does
        chosen[i] = nearest.argmax()
    return chosen


def nearest_distances(queries: Tensor, bank: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """(N, C), (M, C) -> distance to the nearest patch of the bank (N,) and its index (N,)."""
    squares = bank.square().sum(1)
    values, indices = [], []
    for part in queries.split(chunk):
        distance = torch.addmm(squares, part, bank.T, alpha=-2)
        best, index = distance.min(1)
        values.append((best + part.square().sum(1)).clamp(min=0).sqrt())
        indices.append(index)
    return torch.cat(values), torch.cat(indices)


def reweighted_score(patches: Tensor, distances: Tensor, indices: Tensor, bank: Tensor, neighbours: int = 9) -> Tensor:
    """Equations 6-7: the largest patch distance, lower where its nearest patch of the bank is in a dense part.

    patches (P, C), distances and indices (P,) of one image -> scalar.
    """
    worst = distances.argmax()
    if len(bank) < 2:
        return distances[worst]  # no neighbours to weigh by
    around = torch.cdist(bank[indices[worst]][None], bank)[0].topk(min(neighbours, len(bank)), largest=False).indices
    to_neighbours = torch.cdist(patches[worst][None], bank[around])[0]
    weight = 1 - functional.softmax(to_neighbours, 0)[0]  # the nearest of its own neighbours is the patch itself
    return weight * distances[worst]


# --- PaDiM ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaDiMSettings:
    """PaDiM with the random channels of its paper."""

    model: ClassVar[str] = "padim"
    version: ClassVar[int] = 1

    dataset: str = "mvtec_ad/metal_nut"
    teacher: str = "resnet18"  # section IV-B: R18-Rd100; WR50-Rd550 is the paper's best
    size: int = 224  # section IV-B crops 224 from 256; ours: the whole image, as for every row
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
    """Section III-B, equation 1: a Gaussian per position.

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


# --- SPADE ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SPADESettings:
    """SPADE's nearest neighbours on layers 1 to 3."""

    model: ClassVar[str] = "spade"
    version: ClassVar[int] = 1

    dataset: str = "mvtec_ad/metal_nut"
    teacher: str = "resnet18"  # ours: the same teacher for every row; section 4 has WideResNet-50-2
    size: int = 224  # section 4 crops 224 from 256; ours: the whole image, as for every row
    neighbours: int = 50  # section 4: K
    precision: str = "bf16"  # of the cached teacher features


def descriptors(features: list[Tensor]) -> Tensor:
    """One vector per image, (N, C3) float32: layer 3, pooled (ours; section 3.1 pools layer 4, which is not kept)."""
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


def pixel_distances(queries: Tensor, good: Tensor, nearest: Tensor) -> Tensor:
    """Section 3.3 with kappa = 1: distance of each pixel to the nearest pixel of the image's nearest good images.

    (M, h, w, C), (N, h, w, C), (M, K) -> (M, h, w).
    """
    found = [
        nearest_distances(query.flatten(0, 1), good[chosen].flatten(0, 2))[0].view(query.shape[:2])
        for query, chosen in zip(queries, nearest, strict=True)
    ]
    return torch.stack(found)
