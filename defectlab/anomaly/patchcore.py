"""PatchCore: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, arXiv 2106.08265.

The strong plain baseline: nothing is trained. The patches of all good images are remembered, thinned to a coreset, and
a test patch is as anomalous as it is far from the nearest one remembered.
"""

import torch
from torch import Tensor
from torch.nn import functional

PROJECTION = 128  # dimensions in which the coreset is chosen (official code)


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

    Distances are taken after a random projection to 128 dimensions, seeded; the first patch is drawn at random.
    patches (N, C) -> (keep,) int64.
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
    """(N, C), (M, C) -> distance to the nearest remembered patch (N,) and its index (N,)."""
    squares = bank.square().sum(1)
    values, indices = [], []
    for part in queries.split(chunk):
        distance = torch.addmm(squares, part, bank.T, alpha=-2)
        best, index = distance.min(1)
        values.append((best + part.square().sum(1)).clamp(min=0).sqrt())
        indices.append(index)
    return torch.cat(values), torch.cat(indices)


def reweighted_score(patches: Tensor, distances: Tensor, indices: Tensor, bank: Tensor, neighbours: int = 9) -> Tensor:
    """Equations 6-7: the largest patch distance, lower where its nearest memory lies in a dense part of the bank.

    patches (P, C), distances and indices (P,) of one image -> scalar.
    """
    worst = distances.argmax()
    if len(bank) < 2:
        return distances[worst]  # no neighbours to weigh by
    around = torch.cdist(bank[indices[worst]][None], bank)[0].topk(min(neighbours, len(bank)), largest=False).indices
    to_neighbours = torch.cdist(patches[worst][None], bank[around])[0]
    weight = 1 - functional.softmax(to_neighbours, 0)[0]  # the nearest of its own neighbours is the patch itself
    return weight * distances[worst]
