"""Circuit boards beside their templates, without any learning: what differs is a defect, of whatever type.

The detectors that get the template are plain ones on the set "deep_pcb_pair", whose images have three planes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from defectlab.data.detection import DetectionData, DetectionSplit
from defectlab.metrics.detection import Boxes, best_f1_threshold, evaluate, match, pack
from defectlab.metrics.ranking import f1_curve
from defectlab.runs import Context, Result
from defectlab.training.detection import example_arrays, result_of

AROUND = np.ones((3, 3), bool)  # pixels that touch at a corner belong together


@dataclass(frozen=True)
class DifferenceSettings:
    """Of openings, closings and margins the best on dev is taken, by F1 at IoU 0.5."""

    model: ClassVar[str] = "board_difference"
    version: ClassVar[int] = 1

    dataset: str = "deep_pcb_pair"
    size: int = 640  # px, as photographed
    level: int = 128  # grey levels, of 255, from which on two pixels differ
    openings: tuple[int, ...] = (3, 4, 5)  # px: narrower differences are edges that lie half a pixel apart
    closings: tuple[int, ...] = (0, 9, 15)  # px: nearer differences are one defect
    margins: tuple[int, ...] = (0, 9, 11, 13)  # px by which the boxes of a set are larger than what differs


def regions(difference: np.ndarray, level: int, opening: int, closing: int) -> tuple[np.ndarray, np.ndarray]:
    """What differs from `level` on in (H, W): boxes (n, 4) x1 y1 x2 y2 in whole pixels, the last one past the region,
    and their areas (n,) in pixels."""
    differs = ndimage.binary_opening(difference >= level, np.ones((opening, opening), bool))
    if closing:
        wide = ndimage.binary_closing(np.pad(differs, closing), np.ones((closing, closing), bool))
        differs = wide[closing:-closing, closing:-closing]
    labels, count = ndimage.label(differs, AROUND)
    places = ndimage.find_objects(labels)
    boxes = [[x.start, y.start, x.stop, y.stop] for y, x in places]
    return np.array(boxes).reshape(count, 4), np.bincount(labels.ravel(), minlength=count + 1)[1:]


def find(split: DetectionSplit, level: int, opening: int, closing: int) -> list[tuple[Tensor, Tensor]]:
    """Of each board `regions`: boxes (n, 4) in pixels of the original image, scores (n,), the larger the surer."""
    found = []
    for plane, scale, offset in zip(split.images[:, 2].cpu().numpy(), split.scale, split.offset, strict=True):
        boxes, areas = regions(plane, level, opening, closing)
        areas = torch.from_numpy(areas).float() / scale**2  # to 0..1 below: only their order counts
        found.append(((torch.from_numpy(boxes).float() - offset.repeat(2)) / scale, areas / (areas + 100)))
    return found


def widened(found: Iterable[tuple[Tensor, Tensor]], sizes: Tensor, margin: int) -> Boxes:
    """Boxes that are larger by `margin` on all sides, cut at the image's edge; sizes (N, 2): height and width."""
    by, wide = torch.tensor([-1, -1, 1, 1]) * margin, []
    for (boxes, scores), size in zip(found, sizes, strict=True):
        limits = size.flip(0).repeat(2)
        labels = torch.zeros(len(scores), dtype=torch.long)
        wide.append({"boxes": (boxes + by).clamp(min=0).minimum(limits), "scores": scores, "labels": labels})
    return wide


def run_difference(settings: DifferenceSettings, seed: int, data: DetectionData, context: Context) -> Result:
    """One row: nothing is drawn, so each seed is the same. Types are ignored; its metrics are of boxes alone."""
    ground_truth = {
        part: [t | {"labels": torch.zeros_like(t["labels"])} for t in getattr(data, part).ground_truth()]
        for part in ("dev", "test")
    }
    tried = {}
    for opening, closing in product(settings.openings, settings.closings):
        found = find(data.dev, settings.level, opening, closing)
        for margin in settings.margins:
            boxes = widened(found, data.dev.sizes, margin)
            matches = match(boxes, ground_truth["dev"], (0.5,), 1)
            f1 = f1_curve(matches.scores, matches.right[:, 0], int(matches.ground_truth.sum())).max(initial=0.0)
            tried[opening, closing, margin] = f1, boxes
    opening, closing, margin = chosen = max(tried, key=lambda names: tried[names][0])
    dev = tried[chosen][1]
    threshold = best_f1_threshold(dev, ground_truth["dev"])
    test = widened(find(data.test, settings.level, opening, closing), data.test.sizes, margin)
    parts = {"dev": dev, "test": test}
    measured = {p: evaluate(boxes, ground_truth[p], ("defect",), threshold)[0] for p, boxes in parts.items()}
    metrics = {p: {k: v for k, v in m.items() if not k.startswith("map")} for p, m in measured.items()}
    arrays = pack(test, ground_truth["test"], data.test.names, ("defect",))
    arrays |= example_arrays(data.test, test, ground_truth["test"])
    result = result_of((metrics["test"], {}), metrics["dev"], threshold, arrays, torch.nn.Identity())
    result.notes = {"opening": f"{opening} px", "closing": f"{closing} px", "margin": f"{margin} px"}
    return result
