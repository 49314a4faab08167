"""Cloth that flutters: PatchCore learns flat cloth, is tested on cloth that is turned, stretched and out of focus.

The cloth is real (AITEX), its movement is not: each image is warped by an affine map of its own and blurred, its mask
warped alike. So what is shown is what such a change does, not how a line's cloth moves. Of every image, flat or not,
the middle alone is seen, so that nothing comes from beyond the edge of the tile.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from defectlab.data.anomaly import AnomalyData, AnomalySplit
from defectlab.metrics.thresholds import normal_threshold
from defectlab.metrics.windows import shares
from defectlab.networks.feature_baselines import PatchCoreSettings
from defectlab.networks.reverse_distillation import gaussian_smooth
from defectlab.runs import Context, OfAnother, Result
from defectlab.training.feature_baselines import run_patchcore
from defectlab.training.light import chosen, with_copies
from defectlab.training.results import rounded

TURN, SHEAR, ZOOM = 6.0, 0.1, 0.1  # degrees, and parts of 1: at most so much either way, evenly; ours
BLUR = 1.5  # px: standard deviation of the Gaussian, at most, evenly; ours
PASSED = 0.05  # of the held-out good images of flat cloth, by the threshold
CLOTH = PatchCoreSettings(dataset="aitex")


@dataclass(frozen=True)
class FlutterSettings(OfAnother):
    """PatchCore that remembers flat cloth, or fluttering cloth beside it, and is tested on one of them."""

    model: ClassVar[str] = "flutter"
    version: ClassVar[int] = 1

    of: PatchCoreSettings = CLOTH
    augmented: bool = False  # training images also as fluttering cloth
    fluttering: bool = True  # the test images
    copies: int = 2  # of each training image, fluttering
    side: int = 192  # px of 256: the middle that is seen, the largest into which no edge comes


def fluttered(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, S, S), each turned, sheared, stretched and blurred by draws of its own, and masks (N, M, M)
    uint8 moved alike; what comes from beyond the edge is mirrored."""
    device = images.device
    turn, shear, across, down, blur = torch.rand(5, len(images), generator=generator).to(device)
    angle = torch.deg2rad((2 * turn - 1) * TURN)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    zoom = torch.stack([1 + ZOOM * (2 * across - 1), zero, zero, 1 + ZOOM * (2 * down - 1)], 1).view(-1, 2, 2)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    sheared = torch.stack([one, SHEAR * (2 * shear - 1), zero, one], 1).view(-1, 2, 2)
    affine = torch.cat([rotation @ sheared @ zoom, images.new_zeros(len(images), 2, 1, dtype=torch.float32)], 2)

    def moved(x: Tensor, mode: str) -> Tensor:
        grid = F.affine_grid(affine, [*x.shape], align_corners=False)
        return F.grid_sample(x, grid, mode, "reflection", align_corners=False)

    sharp = moved(images.float(), "bilinear")
    soft = [gaussian_smooth(image, max(BLUR * float(b), 0.1)) for image, b in zip(sharp, blur, strict=True)]
    marks = moved(masks[:, None].float(), "nearest")[:, 0]
    return torch.stack(soft).round().clamp(0, 255).to(torch.uint8), marks.to(masks.dtype)


def middle(split: AnomalySplit, side: int) -> AnomalySplit:
    """The middle of each image, `side` px, its mask again 256 x 256."""
    size, (full, _) = split.images.shape[-1], split.masks.shape[-2:]
    start, cut = (size - side) // 2, full * side // size
    first = (full - cut) // 2
    masks = split.masks[:, None, first : first + cut, first : first + cut].float()
    masks = F.interpolate(masks, (full, full), mode="nearest-exact")[:, 0].to(split.masks.dtype)
    images = split.images[..., start : start + side, start : start + side].contiguous()
    return replace(split, images=images, masks=masks, has_mask=(masks.amax((1, 2)) > 0) | (split.labels == 0))


def in_motion(data: AnomalyData, settings: FlutterSettings, seed: int) -> AnomalyData:
    """The set as a row sees it: defective tiles are those whose defect is in the middle of the flat tile. The test
    images flutter alike for every seed and row; dev is flat. A defect that leaves the middle counts at image level."""
    parts = {}
    for part in ("train", "dev", "test"):
        split = getattr(data, part)
        flat = middle(split, settings.side)
        kept = torch.nonzero(flat.has_mask).flatten().tolist()
        split, flat = chosen(split, kept), chosen(flat, kept)
        if part == "test" and settings.fluttering:
            images, masks = fluttered(split.images, split.masks, torch.Generator().manual_seed(0))
            flat = middle(replace(split, images=images, masks=masks), settings.side)
        if part == "train" and settings.augmented:
            generator = torch.Generator().manual_seed(seed)
            moved = [fluttered(split.images, split.masks, generator)[0] for _ in range(settings.copies)]
            copies = [middle(replace(split, images=images), settings.side).images for images in moved]
            flat = with_copies(flat, copies)
        parts[part] = flat
    return replace(data, **parts)


def run_flutter(settings: FlutterSettings, seed: int, data: AnomalyData, context: Context) -> Result:
    """One row and seed: also what the threshold that 5 % of the flat good images pass finds and reports falsely, and
    what it finds of the third of the defects that are smallest ("found_small")."""
    result = run_patchcore(settings.of, seed, in_motion(data, settings, seed), context)
    flat = in_motion(data, replace(settings, fluttering=False, augmented=False), seed).test
    arrays = result.predictions
    threshold = normal_threshold(arrays["dev_scores"][arrays["dev_labels"] == 0], 1 - PASSED)
    scores, labels = arrays["scores"], arrays["labels"]
    areas = flat.masks.sum((1, 2)).cpu().numpy()  # of flat cloth: the same images in every row
    marked = (labels > 0) & (areas > 0)
    small = marked & (areas <= sorted(areas[marked])[(marked.sum() - 1) // 3])
    more = shares(scores, labels, threshold) | {"found_small": shares(scores[small], labels[small], threshold)["found"]}
    result.metrics |= rounded(more)
    result.dev["threshold_flat"] = threshold
    return result
