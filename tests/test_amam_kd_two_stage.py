"""Boxes around the nut, cutting them out, and pasting maps back."""

from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode

from defectlab.data.anomaly import AnomalySplit
from defectlab.papers.amam_kd.two_stage import cut, cut_split, outside, paste_back, square_boxes


def rectangle(top: int, left: int, bottom: int, right: int, side: int = 100) -> torch.Tensor:
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[0, top:bottom, left:right] = True
    return mask


# --- Boxes -----------------------------------------------------------------------------------------------------------


def test_the_box_is_a_square_around_the_component() -> None:
    (box,) = square_boxes(rectangle(20, 30, 60, 50), margin=0.0).tolist()
    assert box == pytest.approx([0.2, 0.2, 0.6, 0.6])  # 40 high, 20 wide: 40 x 40 around (40, 40)


def test_the_margin_is_added_on_each_side() -> None:
    (box,) = square_boxes(rectangle(40, 40, 60, 60), margin=0.1).tolist()
    assert box == pytest.approx([0.38, 0.38, 0.62, 0.62])


def test_a_box_at_the_border_is_moved_inside_and_keeps_its_size() -> None:
    (box,) = square_boxes(rectangle(0, 70, 40, 100), margin=0.0).tolist()
    assert box == pytest.approx([0.6, 0.0, 1.0, 0.4])


def test_the_largest_component_counts() -> None:
    mask = rectangle(50, 50, 80, 80) | rectangle(0, 0, 5, 5)
    assert square_boxes(mask, 0.0)[0].tolist() == pytest.approx([0.5, 0.5, 0.8, 0.8])


@pytest.mark.parametrize("mask", [torch.zeros(1, 100, 100, dtype=torch.bool), rectangle(1, 0, 99, 40)])
def test_the_whole_picture_where_nothing_is_found_or_the_square_does_not_fit(mask: torch.Tensor) -> None:
    assert square_boxes(mask, 0.05)[0].tolist() == [0.0, 0.0, 1.0, 1.0]


# --- Cutting and pasting ---------------------------------------------------------------------------------------------


def test_cutting_takes_the_pixels_of_the_box() -> None:
    pictures = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    found = cut(pictures, torch.tensor([[0.25, 0.5, 0.75, 1.0]]), 4, InterpolationMode.NEAREST_EXACT)
    assert torch.equal(found, pictures[:, :, 4:8, 2:6])


def test_a_pasted_map_lies_where_it_was_cut() -> None:
    box = torch.tensor([[0.25, 0.5, 0.75, 1.0]], dtype=torch.float64)  # columns 64..192, rows 128..256 of 256
    whole = torch.rand(1, 256, 256, generator=torch.Generator().manual_seed(0))
    pasted = paste_back(whole[:, 128:, 64:192], box, fill=-1.0)
    assert torch.allclose(pasted[:, 128:, 64:192], whole[:, 128:, 64:192], atol=1e-5)
    assert (pasted[:, :128] == -1).all() and (pasted[:, :, :64] == -1).all() and (pasted[:, :, 192:] == -1).all()


def test_the_box_of_the_whole_picture_changes_nothing() -> None:
    maps = torch.rand(2, 256, 256)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64).expand(2, 4)
    assert torch.allclose(paste_back(maps, boxes, -1.0), maps, atol=1e-5)


def test_a_map_of_another_size_is_interpolated() -> None:
    ramp = torch.linspace(0, 1, 64).expand(1, 64, 64)
    pasted = paste_back(ramp, torch.tensor([[0.0, 0.0, 0.5, 0.5]]), 0.0)
    assert pasted[0, :128, 0].max() < 0.01 and pasted[0, :128, 127].min() > 0.99
    assert (pasted[0, 0, 1:128] >= pasted[0, 0, :127]).all()


def split_of_two() -> AnomalySplit:
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    masks = torch.zeros(2, 256, 256, dtype=torch.uint8)
    masks[0, 100:120, 100:120] = 1  # inside the box
    masks[1, :10, :10] = 1  # outside
    labels = torch.ones(2, dtype=torch.uint8)
    return AnomalySplit(images, masks, labels, labels, torch.tensor([True, True]), ("a", "b"), ((64, 64),) * 2)


BOXES = torch.tensor([[0.25, 0.25, 0.75, 0.75]], dtype=torch.float64).expand(2, 4)


def test_a_cut_split_keeps_masks_with_their_pictures() -> None:
    cropped = cut_split(split_of_two(), BOXES, 32)
    assert cropped.images.shape == (2, 3, 32, 32)
    assert cropped.masks.shape == (2, 256, 256)
    assert cropped.masks[0, 72:112, 72:112].all() and cropped.masks[0].sum() == 40 * 40  # twice as large
    assert cropped.has_mask.tolist() == [True, False]
    normal = replace(split_of_two(), labels=torch.zeros(2, dtype=torch.uint8))
    assert cut_split(normal, BOXES, 32).has_mask.tolist() == [True, True]  # normals have none, and count


def test_the_share_of_defect_pixels_cut_off() -> None:
    assert outside(split_of_two().masks, BOXES) == pytest.approx(100 / 500)
