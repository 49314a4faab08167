"""Figures of instances: images with their boxes and coloured masks, in the colours of `defectlab.figures.detection`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from defectlab.data.instances import InstanceSplit
from defectlab.figures import image_axes, nothing_yet
from defectlab.figures.detection import CLASS_COLOURS, as_seen, class_colour, draw_boxes

STRENGTH = 0.4  # of a mask's colour over the image: defects stay visible below it


class Shown(NamedTuple):
    """An image with what stands on it."""

    image: np.ndarray  # (S, S) or (S, S, 3) uint8
    classes: np.ndarray  # (S, S) uint8: 1 + class of a pixel, 0 for background
    boxes: Mapping[str, Tensor]  # boxes (n, 4) xyxy px of the image, labels (n,); scores (n,) if predicted


def from_split(split: InstanceSplit, indices: Sequence[int]) -> list[Shown]:
    """Images of a split with the boxes and masks of their ground truth, as the network sees them."""
    images, boxes = as_seen(split, indices)
    maps = [class_map(split.maps[i].cpu(), own["labels"]) for i, own in zip(indices, boxes, strict=True)]
    return [Shown(*one) for one in zip(images, maps, boxes, strict=True)]


def class_map(numbers: Tensor, labels: Tensor) -> np.ndarray:
    """Numbers of instances (S, S), k + 1 for label k of (n,), 0 background -> (S, S) uint8, 1 + class of a pixel."""
    table = torch.cat([labels.new_zeros(1), labels.clamp(min=-1) + 1])
    return table[numbers.long()].byte().cpu().numpy()


def painted(image: np.ndarray, classes: np.ndarray, strength: float = STRENGTH) -> np.ndarray:
    """An image (H, W) or (H, W, 3) uint8 with the pixels of `classes` (H, W) above 0 in the colours of their class:
    (H, W, 3) uint8, of whose colour `strength`, 0..1, is the mask's."""
    ground = np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image
    palette = np.array([to_rgb(colour) for colour in CLASS_COLOURS]) * 255
    colours = palette[(classes.astype(int) - 1) % len(palette)]
    share = strength * (classes > 0)[..., None]
    return (ground * (1 - share) + colours * share).round().astype(np.uint8)


def overlaid(
    shown: Sequence[Shown],
    titles: Sequence[str],
    class_names: Sequence[str],
    columns: int = 6,
    width: float = 9.0,
    captions: Sequence[str] = (),
) -> Figure:
    """Images in a grid, masks and boxes in the colours of their classes, which the legend names; a predicted box has
    its score. `captions` stand below the images."""
    if not shown:
        return nothing_yet()
    rows, lines = -(-len(shown) // columns), max(title.count("\n") + 1 for title in titles)
    above = rows * (0.15 * lines + 0.05 + 0.17 * bool(captions)) + 0.4
    figure, axes = image_axes(rows, columns, width / columns, above)
    for index, (axis, one, title) in enumerate(zip(axes.flat, shown, titles, strict=False)):
        height, width = one.image.shape[:2]
        axis.imshow(painted(one.image, one.classes), extent=(0, width, height, 0))
        draw_boxes(axis, one.boxes, dict.fromkeys(range(len(class_names)), ""))
        axis.set_title(title, fontsize=7)
        if captions:
            axis.set_xlabel(captions[index], fontsize=7, labelpad=2)
    handles = [Patch(color=class_colour(label), label=name) for label, name in enumerate(class_names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    return figure
