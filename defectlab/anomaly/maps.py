"""From discrepancies to anomaly maps and image scores (RD4AD, section 3.3)."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from defectlab.anomaly.reverse_distillation import per_position_discrepancy
from defectlab.train import full_float32

MAP_SIZE = 256  # pixel metrics are taken at 256x256 in every profile
SIGMA = 4.0  # of the Gaussian, in pixels at 256x256: the official code's value


def gaussian_smooth(maps: Tensor, sigma: float = SIGMA) -> Tensor:
    """(B, H, W) -> (B, H, W), a separable Gaussian cut at 4 sigma with mirrored borders, as scipy's default does."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    padded = _mirror(_mirror(maps, radius, -1), radius, -2)[:, None]
    with full_float32():
        return functional.conv2d(functional.conv2d(padded, kernel), kernel.transpose(-1, -2))[:, 0]


def _mirror(maps: Tensor, radius: int, axis: int) -> Tensor:
    """d c b a | a b c d | d c b a: the edge value is repeated, which torch's own 'reflect' does not do."""
    size = maps.shape[axis]
    first = maps.narrow(axis, 0, radius).flip(axis)
    last = maps.narrow(axis, size - radius, radius).flip(axis)
    return torch.cat([first, maps, last], dim=axis)


def upsample(maps: Tensor, size: int = MAP_SIZE) -> Tensor:
    """(B, h, w) -> (B, size, size), bilinear with aligned corners as in the official code."""
    return functional.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=True)[:, 0]


def anomaly_map(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    """Sum of the upsampled per-position discrepancies of all scales: (B, 256, 256), not yet smoothed."""
    return sum(upsample(per_position_discrepancy(t, s)) for t, s in zip(teacher, student, strict=True))


def image_scores(maps: Tensor) -> Tensor:
    """(N, H, W) -> (N,): the maximum of each map."""
    return maps.flatten(1).amax(1)


def best_f1_threshold(scores: Tensor, labels: Tensor) -> float:
    """The score threshold (score >= threshold is anomalous) of the highest F1: used on dev, never on test.

    Returns the midpoint between the last score inside and the next one outside, so that it carries over.
    """
    order = torch.argsort(scores, descending=True)
    ranked, hits = scores[order].double(), labels[order].double().cumsum(0)
    predicted = torch.arange(1, len(ranked) + 1, device=ranked.device)
    f1 = 2 * hits / (predicted + labels.sum())
    whole = torch.cat([ranked[1:] != ranked[:-1], ranked.new_ones(1).bool()])  # a threshold cannot divide a tie
    best = int(f1.where(whole, -1).argmax())
    below = ranked[best + 1] if best + 1 < len(ranked) else -math.inf
    return float((ranked[best] + below) / 2) if math.isfinite(below) else float(ranked[best])
