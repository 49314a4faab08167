"""From raw maps to boxes: decoding of both detector families, non-maximum suppression, inverse letterbox.

Anchor-free (v8 generation): each side's distance is the mean of a distribution over whole strides, Li et al.,
"Generalized Focal Loss", NeurIPS 2020, arXiv 2006.04388, section 3. Anchor-based (v5 generation): offsets to the cell
and factors of an anchor, both through sigmoids. All is computed in at least float32, whatever autocast does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.model import Detector
from defectlab.precision import full_float32

CANDIDATES = 3000  # ours: most (anchor, class) pairs of a picture that enter the suppression


def full_precision(values: Tensor) -> Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def anchor_centres(
    shapes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cell centres of all maps, level by level, row by row.

    shapes: (height, width) per level -> centres x, y (A, 2) in pixels of the input, stride of each (A,), both float32.
    """
    centres, sizes = [], []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y = (torch.arange(height, device=device) + 0.5) * stride
        x = (torch.arange(width, device=device) + 0.5) * stride
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
    flat = torch.cat([full_precision(m).permute(0, 2, 3, 1).flatten(1, 2) for m in raw], 1)  # (B, A, 4 * bins + C)
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
    raw: Sequence[Tensor], strides: Sequence[int] = (8, 16, 32), bins: int = 16
) -> tuple[Tensor, Tensor]:
    """Maps (B, 4 * bins + C, h, w), one a stride -> boxes (B, A, 4) xyxy in pixels of the input, scores (B, A, C) 0..1.

    Boxes are not clipped.
    """
    sides, classes = split_maps(raw, bins)
    centres, sizes = anchor_centres([m.shape[-2:] for m in raw], strides, raw[0].device)
    return boxes_from_distances(expected_distances(sides), centres, sizes), classes.sigmoid()


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
    raw: Sequence[Tensor], anchors: Tensor, strides: Sequence[int] = (8, 16, 32)
) -> tuple[Tensor, Tensor]:
    """Maps (B, K * (5 + C), h, w), anchors (levels, K, 2) width, height in px -> boxes (B, A, 4) px, scores (B, A, C).

    The scores are objectness times class probability, 0..1. Boxes are not clipped. The A boxes go level by level,
    anchor by anchor, row by row.
    """
    boxes, scores = [], []
    for level, stride, shapes in zip(raw, strides, anchors, strict=True):
        height, width = level.shape[-2:]
        values = full_precision(level).unflatten(1, (len(shapes), -1)).permute(0, 1, 3, 4, 2)  # (B, K, h, w, 5 + C)
        rows = torch.arange(height, device=level.device)
        columns = torch.arange(width, device=level.device)
        cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # (h, w, 2)
        box = anchored_boxes(values[..., :4], cells, shapes[:, None, None].to(values), stride)
        score = values[..., 4:5].sigmoid() * values[..., 5:].sigmoid()
        boxes.append(box.flatten(1, 3))
        scores.append(score.flatten(1, 3))
    return torch.cat(boxes, 1), torch.cat(scores, 1)


@torch.no_grad()
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
    """Non-maximum suppression within each class, then back to the pixels of the original pictures.

    boxes (B, A, 4) xyxy in pixels of the size x size input and scores (B, A, C) 0..1. A box counts for every class
    whose score is above `confidence`; the 3000 best pairs of a picture enter, at most `most` leave. `scale` (B,) and
    `offset` (B, 2) x, y are the letterbox's (letterboxed = original * scale + offset; default none), `sizes` (B, 2) the
    original heights and widths to clip to (default size, size). Returns per picture, on the CPU, {"boxes": (n, 4)
    float32 px of the original, "scores": (n,) float32 descending, "labels": (n,) int64}. ValueError where a box or
    score is not finite.
    """
    count, _, classes = scores.shape
    boxes, scores = boxes.float(), scores.float()
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise ValueError("predicted boxes or scores are not finite: the training diverged; lower its learning rate")
    scale = torch.ones(count) if scale is None else scale.cpu()
    offset = torch.zeros(count, 2) if offset is None else offset.cpu()
    sizes = torch.full((count, 2), size) if sizes is None else sizes.cpu()

    flat = scores.flatten(1)  # (B, A * C)
    best, pairs = flat.topk(min(CANDIDATES, flat.shape[1]), dim=1)
    predictions = []
    for i in range(count):  # one by one, so that a picture's result does not depend on its batch
        enough = best[i] > confidence
        values, labels = best[i][enough], pairs[i][enough] % classes
        candidates = boxes[i, pairs[i][enough] // classes]
        kept = batched_nms(candidates, values, labels, iou)[:most]
        original = ((candidates[kept].cpu() - offset[i].repeat(2)) / scale[i]).clamp(min=0)
        original = torch.minimum(original, sizes[i].flip(0).repeat(2).to(original))
        predictions.append({"boxes": original, "scores": values[kept].cpu(), "labels": labels[kept].cpu()})
    return predictions


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
        network = fused(self.detector.eval())
        pixels = (images / 255).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with full_float32():
            boxes, scores = decode(self.detector, network(pixels, *features))
        return select(boxes, scores, images.shape[-1], **options)
