"""From raw maps to boxes: decoding of both detector families, non-maximum suppression, inverse letterbox.

Anchor-free (v8 generation): each side's distance is the mean of a distribution over whole strides, Li et al.,
"Generalized Focal Loss", NeurIPS 2020, arXiv 2006.04388, section 3. Anchor-based (v5 generation): offsets to the cell
and factors of an anchor, both through sigmoids. All is computed in at least float32, whatever autocast does.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.model import BINS, STRIDES, Detector
from defectlab.precision import at_least_float32, check_uint8, full_float32

CANDIDATES = 3000  # ours: most (anchor, class) pairs of an image that enter the suppression


def anchor_centres(
    shapes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(height, width) per level -> cell centres x, y (A, 2) in pixels of the input, stride of each (A,), both float32.

    Level by level, row by row.
    """
    centres, sizes = [], []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y, x = ((torch.arange(side, device=device) + 0.5) * stride for side in (height, width))
        centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))  # (h * w, 2)
        sizes.append(torch.full((height * width,), float(stride), device=device))
    return torch.cat(centres), torch.cat(sizes)


def split_maps(raw: Sequence[Tensor], bins: int) -> tuple[Tensor, Tensor]:
    """Anchor-free maps (B, 4 * bins + C, h, w) -> side logits (B, A, 4, bins), class logits (B, A, C).

    The anchors are in the order of `anchor_centres`. ValueError where the maps have no class channel.
    """
    channels = raw[0].shape[1]
    if channels <= 4 * bins:
        raise ValueError(f"maps of {channels} channels hold no class beside 4 x {bins} bins; check family and bins")
    flat = torch.cat([at_least_float32(m).permute(0, 2, 3, 1).flatten(1, 2) for m in raw], 1)  # (B, A, 4 * bins + C)
    sides, classes = flat.split([4 * bins, channels - 4 * bins], -1)
    return sides.unflatten(-1, (4, bins)), classes


def expected_distances(logits: Tensor) -> Tensor:
    """(..., 4, bins) -> (..., 4): the mean distance of each side in strides, 0..bins - 1."""
    steps = torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)
    return (logits.softmax(-1) * steps).sum(-1)  # not a matrix product: autocast would lower it


def boxes_from_distances(distances: Tensor, centres: Tensor, strides: Tensor) -> Tensor:
    """Left, top, right, bottom (..., A, 4) in strides, centres (..., A, 2), strides (..., A) -> xyxy (..., A, 4) px."""
    before, after = (distances * strides[..., None]).split(2, -1)
    return torch.cat([centres - before, centres + after], -1)


def decode_anchor_free(
    raw: Sequence[Tensor], strides: Sequence[int] = STRIDES, bins: int = BINS
) -> tuple[Tensor, Tensor]:
    """Maps (B, 4 * bins + C, h, w), one per stride -> boxes (B, A, 4) xyxy in pixels of the input, not clipped, and
    scores (B, A, C) 0..1."""
    sides, classes = split_maps(raw, bins)
    centres, sizes = anchor_centres([m.shape[-2:] for m in raw], strides, raw[0].device)
    return boxes_from_distances(expected_distances(sides), centres, sizes), classes.sigmoid()


def split_anchors(level: Tensor, anchors: int) -> Tensor:
    """An anchor-based map (B, K * (5 + C), h, w) -> (B, K, h, w, 5 + C): x, y, w, h, objectness, classes."""
    return at_least_float32(level).unflatten(1, (anchors, -1)).permute(0, 1, 3, 4, 2)


def anchored_boxes(logits: Tensor, cells: Tensor, anchors: Tensor, stride: int) -> Tensor:
    """The v5 generation's box: centre = (2 sigmoid - 0.5 + cell) stride, size = (2 sigmoid)^2 anchor.

    logits x, y, w, h (..., 4); cells column, row (..., 2); anchors width, height (..., 2) px -> xyxy (..., 4) px.
    A centre reaches half a cell beyond its cell; a side is at most four times its anchor's.
    """
    position, factor = (2 * logits.sigmoid()).split(2, -1)
    centres = (position - 0.5 + cells) * stride
    half = factor.square() * anchors / 2
    return torch.cat([centres - half, centres + half], -1)


def decode_anchor_based(
    raw: Sequence[Tensor], anchors: Tensor, strides: Sequence[int] = STRIDES
) -> tuple[Tensor, Tensor]:
    """Maps (B, K * (5 + C), h, w), anchors (levels, K, 2) width, height in px -> boxes (B, A, 4) px, scores (B, A, C).

    Scores are objectness times class probability, 0..1; boxes are not clipped. Level by level, anchor by anchor, row by
    row.
    """
    boxes, scores = [], []
    for level, stride, shapes in zip(raw, strides, anchors, strict=True):
        height, width = level.shape[-2:]
        values = split_anchors(level, len(shapes))  # (B, K, h, w, 5 + C)
        columns, rows = (torch.arange(side, device=level.device) for side in (width, height))
        cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # (h, w, 2)
        boxes.append(anchored_boxes(values[..., :4], cells, shapes[:, None, None].to(values), stride).flatten(1, 3))
        scores.append((values[..., 4:5].sigmoid() * values[..., 5:].sigmoid()).flatten(1, 3))
    return torch.cat(boxes, 1), torch.cat(scores, 1)


class Kept(NamedTuple):
    """The boxes of one image that suppression keeps, by descending score."""

    anchors: Tensor  # (n,) int64
    labels: Tensor  # (n,) int64
    scores: Tensor  # (n,) float32


@torch.no_grad()
def suppress(boxes: Tensor, scores: Tensor, confidence: float, iou: float, most: int) -> list[Kept]:
    """Non-maximum suppression within each class and image, on the device of the boxes; none where `iou` is 1.

    boxes (B, A, 4), scores (B, A, C) 0..1. A box counts for every class whose score is above `confidence`; the 3000
    best pairs of an image enter, at most `most` leave. ValueError where a box or score is not finite.

    Images go one by one, so that a result does not depend on the batch: one call for all shifts the boxes of each
    image, which rounds them, and compares all pairs of all images. The host waits once per batch and once per image.
    """
    classes, boxes, scores = scores.shape[2], boxes.float(), scores.float()
    highest, pairs = scores.flatten(1).topk(min(CANDIDATES, scores[0].numel()), dim=1)  # descending
    finite = (boxes.isfinite().all() & scores.isfinite().all()).expand(1)
    finite, *counts = torch.cat([finite, (highest > confidence).sum(1)]).tolist()
    if not finite:
        raise ValueError("predicted boxes or scores are not finite: the training diverged; lower its learning rate")
    found = []
    for own, values, chosen, count in zip(boxes, highest, pairs, counts, strict=True):
        values, anchors, labels = values[:count], chosen[:count] // classes, chosen[:count] % classes
        kept = (batched_nms(own[anchors], values, labels, iou) if iou < 1 else torch.arange(count))[:most]
        found.append(Kept(anchors[kept], labels[kept], values[kept]))
    return found


def best(boxes: Tensor, scores: Tensor, most: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """The detections of an image without suppression: boxes (B, A, 4), scores (B, A, C) -> the boxes (B, k, 4),
    scores (B, k), descending, and labels (B, k) int64 of the k = min(`most`, A C) best pairs of anchor and class."""
    classes = scores.shape[2]
    values, pairs = scores.flatten(1).topk(min(most, scores.shape[1] * classes), dim=1)
    anchors = torch.div(pairs, classes, rounding_mode="floor")
    return boxes.gather(1, anchors[..., None].expand(-1, -1, 4)), values, pairs % classes


def select(
    boxes: Tensor,
    scores: Tensor,
    size: int,
    confidence: float = 0.001,
    iou: float = 0.7,
    most: int = 300,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    sizes: Tensor | None = None,
) -> list[dict[str, Tensor]]:
    """`suppress`, then back to the pixels of the original images.

    boxes (B, A, 4) xyxy in pixels of the size x size input, scores (B, A, C) 0..1. `scale` (B,) and `offset` (B, 2)
    x, y are the letterbox's (letterboxed = original * scale + offset; default none), `sizes` (B, 2) the original
    heights and widths to clip to (default size, size). Returns per image, on the CPU, {"boxes": (n, 4) float32 px of
    the original, "scores": (n,) float32 descending, "labels": (n,) int64}.
    """
    if not len(boxes):
        return []
    kept = suppress(boxes, scores, confidence, iou, most)
    lengths = [len(k.scores) for k in kept]
    image = torch.arange(len(kept)).repeat_interleave(torch.tensor(lengths))  # (n,): index of each box's image
    found = torch.cat([own[k.anchors] for own, k in zip(boxes.float(), kept, strict=True)]).cpu()
    if offset is not None:
        found = found - offset.cpu()[image].repeat(1, 2)
    if scale is not None:
        found = found / scale.cpu()[image, None]
    limits = torch.full_like(found, size) if sizes is None else sizes.cpu().flip(1)[image].repeat(1, 2).to(found)
    found = found.clamp(min=0).minimum(limits)
    values, labels = torch.cat([k.scores for k in kept]).cpu(), torch.cat([k.labels for k in kept]).cpu()
    parts = zip(found.split(lengths), values.split(lengths), labels.split(lengths), strict=True)
    return [{"boxes": b, "scores": s, "labels": k} for b, s, k in parts]


def decode(detector: Detector, raw: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Raw maps -> boxes (B, A, 4) xyxy in pixels of the input, scores (B, A, classes)."""
    if detector.family == "v8":
        return decode_anchor_free(raw)
    return decode_anchor_based(raw, detector.anchors)


class DefectFinder(nn.Module):
    """A detector as a user calls it: images -> boxes, by the fused network in float32."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    @torch.inference_mode()
    def forward(self, images: Tensor, *features: Tensor, **options: float) -> list[dict[str, Tensor]]:
        """uint8 images (B, 1 or 3, S, S), S a multiple of 32 -> for each image what `select` gives; `options`:
        `confidence`, `iou`, `most`. `features`: further inputs of the detector."""
        check_uint8(images)
        network = fused(self.detector)
        pixels = (images / 255).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with full_float32():
            boxes, scores = decode(self.detector, network(pixels, *features))
        return select(boxes, scores, images.shape[-1], **options)
