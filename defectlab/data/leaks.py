"""Leak check: images of one set that show the same as an image of another, also turned, mirrored or lit otherwise.

An image becomes a map of 32 x 32: what is left of it after its slow change of light, each place divided by its own
contrast. So a bright scratch weighs no more than the ground around it, and exposure weighs nothing. The maps are
whitened over both sets and all turns: what the images of a set have in common (the outline of one part, brushed lines)
weighs little, what is an image's own weighs much. Similarity is the cosine of two such maps, less what the image's
neighbours in the set have anyway.

Not found: shifts by 2 % of the side, turns by 5 degrees, crops by 3 % at each side, negatives, strong noise (sd 20 of
255); of copies in part only some; a part that a twentieth of the set shows (10 images at least), as the frames of a
film do, unless they are exact. Found, and perhaps no leak: two parts that look the same, as boards of one design, or
two of one kind in the very same pose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, normalize

# All of these are ours, chosen on magnetic tiles, NEU-DET, NEU-Seg, DeepPCB and metal_nut.
SIDE = 32  # of a map
WINDOW = 5  # places over which light and contrast are measured
GROUND = 0.3  # of the image's contrast: what is added to the contrast of each place, so that noise stays small
SHRINK = 0.3  # of the mean variance: what is added to each variance before whitening
FEWEST = 0.35  # no pair below this counts, however few images there are to measure chance on
MOST = 0.95  # every pair above this counts
ROLLS = ((16, 16), (11, 21))  # rows and columns: a map rolled so is of the same kind, and no copy of any image
TURNS = tuple(
    "mirrored" * mirrored + ", " * (mirrored and angle > 0) + f"turned by {angle} degrees" * (angle > 0) or "unturned"
    for mirrored in (False, True)
    for angle in (0, 90, 180, 270)
)


@dataclass(frozen=True)
class Pair:
    """`second` shows what `first` shows after `turn`: mirrored left to right, then turned counter-clockwise."""

    first: int  # index of the image
    second: int
    similarity: float  # 1: the same; about 0: any two images of the sets
    turn: str  # one of TURNS


def _maps(images: Tensor) -> Tensor:
    """(N, C, S, S) uint8 -> (N, 32, 32), of mean 0 and length 1."""
    small = torch.cat([adaptive_avg_pool2d(part.float().mean(1, keepdim=True), SIDE) for part in images.split(256)])

    def near(values: Tensor) -> Tensor:
        return avg_pool2d(values, WINDOW, 1, WINDOW // 2, count_include_pad=False)

    fine = small - near(small)
    contrast = near(fine.square()).sqrt()
    fine = (fine / (contrast + GROUND * contrast.square().mean((1, 2, 3), keepdim=True).sqrt() + 0.5)).flatten(1)
    return normalize(fine - fine.mean(1, keepdim=True)).view(-1, SIDE, SIDE)


def _turned(maps: Tensor) -> list[Tensor]:
    """The maps in the order of TURNS, each (N, 1024)."""
    return [m.rot90(quarter, (1, 2)).flatten(1) for m in (maps, maps.flip(2)) for quarter in range(4)]


def _whiten(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (1024,) and whitening matrix (1024, 1024) over the maps and all their turns, so no turn changes them."""
    turned = torch.cat(_turned(maps[:: -(-len(maps) // 1000)]))
    mean = turned.mean(0)
    variance, axes = torch.linalg.eigh((turned - mean).T @ (turned - mean) / len(turned))
    shrink = SHRINK * (1 + 100 / len(maps))  # few images say little of what they have in common
    return mean, axes * (variance.clamp(min=0) + shrink * variance.mean() + 1e-9).rsqrt()


def _compare(first: Tensor, second: Tensor) -> tuple[list[tuple[float, int, int, int]], float]:
    """(similarity, index, index, number of the turn) of each pair from `FEWEST` on, and the threshold."""
    if not (len(first) and len(second)):
        raise ValueError(f"both sets need an image, got {len(first)} and {len(second)}")
    first, second = _maps(first), _maps(second)
    mean, matrix = _whiten(torch.cat([first, second]))

    def scaled(maps: Tensor) -> Tensor:
        centred = maps.flatten(1) - mean
        return (centred / (centred @ matrix).norm(dim=1, keepdim=True).clamp(min=1e-9)).view_as(maps)

    decoys = [scaled(first.roll(roll, (1, 2))) for roll in ROLLS]
    first, second = scaled(first), scaled(second).flatten(1) @ matrix @ matrix.T
    # an image that is as near to a twentieth of the others shows a kind of part, not one part
    rank = min(len(first), max(10, len(first) // 20))
    found, threshold = [], FEWEST
    for start in range(0, len(second), 512):
        wanted = second[start : start + 512].T  # a product with it is a cosine of whitened maps
        best, turn = torch.stack([turned @ wanted for turned in _turned(first)]).max(0)  # (N, up to 512)
        usual = best.topk(rank, 0).values[-1].clamp(0, MOST)
        chance = [(turned @ wanted).abs().amax(0) for decoy in decoys for turned in _turned(decoy)]
        threshold = max(threshold, ((torch.stack(chance).amax(0) - usual) / (1 - usual)).max().item())
        similarity = (best - usual) / (1 - usual)
        at = (similarity >= FEWEST).nonzero(as_tuple=True)
        values = (similarity[at], at[0], at[1] + start, turn[at])
        found += zip(*(value.tolist() for value in values), strict=True)
    return found, min(threshold, MOST)


def compared(first: Tensor, second: Tensor) -> tuple[list[Pair], float]:
    """The pairs of `near_duplicates`, and the similarity from which a pair counts: the highest of any image to the
    other set's images rolled by half or a third, or to their negatives, which are no copies; `FEWEST` to `MOST`."""
    found, threshold = _compare(first, second)
    kept = sorted((pair for pair in found if pair[0] >= threshold), reverse=True)
    return [Pair(i, j, similarity, TURNS[turn]) for similarity, i, j, turn in kept], threshold


def near_duplicates(first: Tensor, second: Tensor) -> list[Pair]:
    """The pairs of an image of `first` and one of `second` that are more alike than chance makes any, best first.

    first (N, C, H, W), second (M, C, H, W): uint8 images as the loaders hold them; `first` is the larger set, as a rule
    the training images. ValueError where one is empty.
    """
    return compared(first, second)[0]
