"""Augmentation's geometry against a slow version: the canvas assembled by slicing, pixels sampled by scipy, boxes by
loops; maps that follow their images."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_augment import GEOMETRY, NO_COLOUR, SIZE, make_split, only, seeded

from defectlab.data.augment import Augmentation, augment, plain
from defectlab.data.images import GROUND
from defectlab.geometry import warp

# ---------------------------------------------------------------------------------------------------- the slow version


def slow_image(images, tiles, matrices, is_mosaic):
    """(C, S, S) in 0..1 and the corners (x, y) of the canvas in atlas pixels, from whole-pixel slices.

    The position of the tiles on the canvas is not returned by `augment`; it follows from where tile 0's matrix sends
    the canvas's centre only up to the translation, so the caller gives translate = 0 and the centre goes to S / 2.
    """
    size = images.shape[-1]
    extent = 2 * size if is_mosaic else size
    middle = np.linalg.inv(matrices[0]) @ [size / 2, size / 2, 1]  # of the canvas, in pixels of tile 0
    left, top = np.rint(extent / 2 - middle[:2]).astype(int)  # where tile 0 begins on the canvas
    canvas = np.full((images.shape[1], extent, extent), GROUND, dtype=np.float64)
    shown = []
    for k in range(4 if is_mosaic else 1):
        x, y = left + size * (k % 2), top + size * (k // 2)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + size, extent), min(y + size, extent)
        canvas[:, y0:y1, x0:x1] = images[tiles[k], :, y0 - y : y1 - y, x0 - x : x1 - x]
        shown.append((x0 - x, y0 - y, x1 - x, y1 - y))  # of the tile, in its own pixels
    to_canvas = np.array([[1, 0, left], [0, 1, top], [0, 0, 1]]) @ np.linalg.inv(matrices[0])
    out = np.empty((images.shape[1], size, size))
    for row in range(size):
        for column in range(size):
            x, y, _ = to_canvas @ [column + 0.5, row + 0.5, 1]
            for channel in range(images.shape[1]):
                out[channel, row, column] = ndimage.map_coordinates(
                    canvas[channel], [[y - 0.5], [x - 0.5]], order=1, mode="grid-constant", cval=GROUND
                )[0]
    return out / 255, shown, (left, top)


def slow_boxes(boxes, labels, tiles, matrices, shown, size):
    """The rules of the boxes, one box at a time."""
    found = []
    for k, (low_x, low_y, high_x, high_y) in enumerate(shown):
        for box, label in zip(boxes[tiles[k]], labels[tiles[k]], strict=True):
            if label < 0:
                continue
            x0, y0, x1, y1 = (float(value) for value in box)

            def moved(x0, y0, x1, y1, matrix=matrices[k]):
                corners = np.array([matrix @ [x, y, 1] for x in (x0, x1) for y in (y0, y1)])
                return *corners[:, :2].min(0), *corners[:, :2].max(0)

            whole = moved(x0, y0, x1, y1)
            x0, x1 = min(max(x0, low_x), high_x), min(max(x1, low_x), high_x)
            y0, y1 = min(max(y0, low_y), high_y), min(max(y1, low_y), high_y)
            if x0 == x1 or y0 == y1:
                continue
            clipped = [min(max(value, 0), size) for value in moved(x0, y0, x1, y1)]
            width, height = clipped[2] - clipped[0], clipped[3] - clipped[1]
            if min(width, height) < 2 or max(width, height) > 100 * min(width, height):
                continue
            if width * height < 0.10 * (whole[2] - whole[0]) * (whole[3] - whole[1]):
                continue
            found.append((*clipped, label))
    return np.array(found).reshape(-1, 5)


@pytest.mark.parametrize(("mosaic", "channels"), [(1.0, 1), (0.0, 1), (0.5, 3)])
def test_agrees_with_the_slow_version(mosaic, channels):
    images, boxes, labels = make_split(1, channels=channels)
    settings = Augmentation(mosaic=mosaic, **NO_COLOUR, **{**GEOMETRY, "translate": 0.0})
    batch = augment(images, boxes, labels, torch.arange(5), settings, seeded(7))
    kinds = set()
    for row in range(5):
        tiles, matrices = batch.sources[row].tolist(), batch.matrices[row].double().numpy()
        is_mosaic = not np.array_equal(matrices[0], matrices[1])
        kinds.add(is_mosaic)
        expected, shown, (left, top) = slow_image(images.numpy(), tiles, matrices, is_mosaic)
        np.testing.assert_allclose(batch.images[row, :channels].numpy(), expected, atol=1 / 255)
        if is_mosaic:
            assert SIZE / 2 <= left + SIZE <= 3 * SIZE / 2 and SIZE / 2 <= top + SIZE <= 3 * SIZE / 2
            for k in range(4):  # the tiles share one affine map and lie a side apart
                step = matrices[0] @ [[1, 0, SIZE * (k % 2)], [0, 1, SIZE * (k // 2)], [0, 0, 1]]
                np.testing.assert_allclose(matrices[k], step, atol=1e-4)
        else:
            assert (left, top) == (0, 0) and tiles == [row] * 4
        expected = slow_boxes(boxes.numpy(), labels.numpy(), tiles, matrices, shown, SIZE)
        real = batch.labels[row] >= 0  # not the padding
        np.testing.assert_allclose(batch.boxes[row][real], expected[:, :4], atol=1e-3)
        assert batch.labels[row][real].tolist() == expected[:, 4].tolist()
    assert kinds == ({True, False} if mosaic == 0.5 else {mosaic == 1.0})


# -------------------------------------------------------------------------------------------------- geometry, by parts


def test_the_settings_span_their_ranges():
    images, boxes, labels = make_split(2, count=3)
    indices = torch.zeros(400, dtype=torch.int64)
    settings = only(degrees=20, translate=0.1, scale=0.5)
    matrices = augment(images, boxes, labels, indices, settings, seeded(0)).matrices[:, 0].double()
    factor = matrices[:, :2, :2].det().sqrt()
    angle = torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]).rad2deg()
    middle = matrices @ torch.tensor([SIZE / 2, SIZE / 2, 1], dtype=torch.float64)
    shift = (middle[:, :2] / SIZE - 0.5).flatten()
    for values, low, high in ((factor, 0.5, 1.5), (angle, -20, 20), (shift, -0.1, 0.1)):
        margin = 0.05 * (high - low)
        assert low - 1e-4 <= values.min() < low + margin and high - margin < values.max() <= high + 1e-4


@pytest.mark.parametrize(
    ("settings", "axes", "box"),
    [
        ({"flip_left_right": 1.0}, [-1], [22, 3, 28, 13]),
        ({"flip_up_down": 1.0}, [-2], [4, 19, 10, 29]),
        ({"flip_left_right": 1.0, "flip_up_down": 1.0}, [-1, -2], [22, 19, 28, 29]),
    ],
)
def test_flips_are_exact(settings, axes, box):
    images, _, labels = make_split(3, count=1, most=1)
    boxes, labels = torch.tensor([[[4.0, 3, 10, 13]]]), torch.zeros_like(labels)
    batch = augment(images, boxes, labels, torch.tensor([0]), only(**settings), seeded(0))
    assert torch.equal((batch.images[:, :1] * 255).round(), images.flip(axes).float())
    assert batch.boxes.tolist() == [[box]]


# --------------------------------------------------------------------------------------------------------------- maps


def test_warp_moves_maps_as_the_images_were_moved():
    images, boxes, labels = make_split(12)
    settings = only(degrees=30, translate=0.1, scale=0.3, flip_left_right=0.5)
    batch = augment(images, boxes, labels, torch.arange(6), settings, seeded(0))
    moved = warp(plain(images, torch.arange(6)), batch.matrices[:, 0], SIZE, ground=GROUND / 255)
    torch.testing.assert_close(moved, batch.images, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 8)])
def test_warp_of_maps_of_another_resolution(height, width):
    """A linear map of the position is interpolated exactly, wherever the ground has no part in it."""
    x = (torch.arange(width) + 0.5) * SIZE / width
    y = (torch.arange(height) + 0.5) * SIZE / height
    places = torch.stack(torch.broadcast_tensors(x, y[:, None]))
    matrices = torch.tensor([[[0.9, -0.3, 5], [0.3, 0.9, -2], [0, 0, 1]], [[-1, 0, SIZE], [0, 1, 4], [0, 0, 1]]])
    moved = warp(places.expand(2, -1, -1, -1), matrices, SIZE, ground=-1000.0)
    for row in range(2):
        source = torch.linalg.inv(matrices[row]) @ torch.cat([places, torch.ones(1, height, width)]).flatten(1)
        source = source[:2].view(2, height, width)
        inside = ((source[0] > x[0]) & (source[0] < x[-1])) & ((source[1] > y[0]) & (source[1] < y[-1]))
        assert inside.sum() > 0.3 * height * width
        torch.testing.assert_close(moved[row][:, inside], source[:, inside], atol=1e-3, rtol=0)
        far = ((source - SIZE / 2).abs() > SIZE / 2 + SIZE / width).any(0)
        assert (moved[row][:, far] == -1000).all()


def test_warp_with_the_identity_keeps_maps_and_their_dtype():
    features = torch.randn(2, 5, 7, 7, generator=seeded(0))
    torch.testing.assert_close(warp(features, torch.eye(3).expand(2, 3, 3), 224), features, atol=1e-5, rtol=1e-5)
    assert warp(features.bfloat16(), torch.eye(3).expand(2, 3, 3), 224).dtype == torch.bfloat16
