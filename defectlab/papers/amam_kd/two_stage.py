"""Both stages (section 4.3): segment the nut, cut it out, distil and detect on the crop.

The paper gives no procedure beyond "cascaded knowledge distillation training on the segmented normal data" and
figure 7. Ours: a square box around the largest segmented component, with a margin, cut from the image as stored and
resized to the detector's input. Maps are pasted back onto the whole image, so that one stage and two are evaluated on
the same pixels; the paper evaluates crops, which lack the easy background.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from defectlab.networks.reverse_distillation import MAP_SIZE
from defectlab.papers.amam_kd import segmentation
from defectlab.papers.amam_kd.distillation import DistillationSettings, KnowledgeDistillation
from defectlab.precision import check_uint8, full_float32

SEGMENTER = segmentation.Settings(split="good")
DETECTOR = DistillationSettings()


@dataclass(frozen=True)
class TwoStageSettings:
    """The segmenter's settings (it is trained first, with the same seed) and the detector's."""

    model: ClassVar[str] = "amam_two_stage"
    version: ClassVar[int] = 1

    segmenter: segmentation.Settings = SEGMENTER  # ours: split "good"; the paper's own split has most test images in it
    detector: DistillationSettings = DETECTOR  # paper section 4.3: the model of section 3.2
    margin: float = 0.05  # ours: of the nut's larger side, on each side
    source: int = 512  # ours: side in px of the images that are cut (the reduced copy's own)

    @property
    def dataset(self) -> str:
        return self.detector.dataset

    @property
    def size(self) -> int:
        """Of the images that are loaded: they are cut before they are resized."""
        return self.source

    @property
    def teacher(self) -> str:
        return self.detector.teacher


# --- Boxes, cutting and pasting --------------------------------------------------------------------------------------


def square_boxes(foreground: Tensor, margin: float) -> Tensor:
    """Masks (N, H, W) bool, H = W -> (N, 4) float boxes (left, top, right, bottom) as shares of the side, 0..1.

    Each is the square around the largest connected component, its side the component's larger one plus `margin` of it
    on each side, moved inside the image (and the whole image where it does not fit, or where nothing was found).
    """
    side = foreground.shape[-1]
    boxes = []
    for mask in foreground.cpu().numpy():
        labelled, count = ndimage.label(mask)
        if not count:
            boxes.append((0.0, 0.0, 1.0, 1.0))
            continue
        largest = 1 + int(np.argmax(np.bincount(labelled.ravel())[1:]))
        rows, columns = ndimage.find_objects(labelled)[largest - 1]
        height, width = rows.stop - rows.start, columns.stop - columns.start
        wanted = min(side, max(height, width) * (1 + 2 * margin))
        top, left = (float(np.clip((p.start + p.stop - wanted) / 2, 0, side - wanted)) for p in (rows, columns))
        boxes.append((left / side, top / side, (left + wanted) / side, (top + wanted) / side))
    return torch.tensor(boxes, dtype=torch.float64)


def cut(images: Tensor, boxes: Tensor, size: int, interpolation: v2.InterpolationMode) -> Tensor:
    """(N, C, H, W) uint8 cut along `boxes` (rounded to whole pixels) and resized: (N, C, size, size) uint8."""
    corners = (boxes * images.shape[-1]).round().long().tolist()
    crops = [
        v2.functional.resized_crop(image, top, left, bottom - top, right - left, [size, size], interpolation, True)
        for image, (left, top, right, bottom) in zip(images, corners, strict=True)
    ]
    return torch.stack(crops)


def paste_back(maps: Tensor, boxes: Tensor, fill: float) -> Tensor:
    """Maps of crops (N, h, w) -> (N, 256, 256) maps of whole images, bilinear; `fill` outside the boxes."""
    boxes = boxes.to(maps.device, torch.float64)
    left, top, right, bottom = boxes.unbind(1)
    centres = (torch.arange(MAP_SIZE, device=maps.device, dtype=torch.float64) + 0.5) / MAP_SIZE  # of the pixels, 0..1
    x = 2 * (centres[None] - left[:, None]) / (right - left)[:, None] - 1  # (N, 256): -1..1 inside the box
    y = 2 * (centres[None] - top[:, None]) / (bottom - top)[:, None] - 1
    grid = torch.stack([x[:, None, :].expand(-1, MAP_SIZE, -1), y[:, :, None].expand(-1, -1, MAP_SIZE)], -1)
    inside = (grid.abs() <= 1).all(-1)  # (N, 256, 256)
    grid = grid.to(maps.dtype)
    values = functional.grid_sample(maps[:, None], grid, "bilinear", padding_mode="border", align_corners=False)
    return values[:, 0].where(inside, fill)


# --- The whole method ------------------------------------------------------------------------------------------------


class TwoStage(nn.Module):
    """Segment, box, cut, detect, paste back: `TwoStage(TwoStageSettings())(images)`; `segmenter` and `detector.network`
    have fresh weights.

    threshold: of the foreground's probability, best by IoU on dev; fill: value of the map outside the box, the smallest
    of the maps on dev.
    """

    def __init__(self, settings: TwoStageSettings, threshold: float = 0.5, fill: float = 0.0):
        super().__init__()
        self.settings, self.threshold, self.fill = settings, threshold, fill
        self.segmenter = segmentation.build(settings.segmenter)
        self.detector = KnowledgeDistillation(settings.detector)
        self.eval()

    @torch.no_grad()
    def boxes(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) -> boxes of the nuts (B, 4), as `square_boxes`."""
        size = self.settings.segmenter.size
        small = v2.functional.resize(images, [size, size], antialias=True)
        with full_float32():
            probabilities = self.segmenter(small).sigmoid()
        return square_boxes(probabilities > self.threshold, self.settings.margin)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) -> smoothed anomaly maps of the whole images (B, 256, 256)."""
        check_uint8(images)
        boxes = self.boxes(images)
        crops = cut(images, boxes, self.settings.detector.size, v2.InterpolationMode.BILINEAR)
        return paste_back(self.detector(crops), boxes, self.fill)
