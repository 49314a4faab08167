"""Augmentation against a slow version: the canvas assembled by slicing, pixels sampled by scipy, boxes by loops."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from defectlab.data.augment import GROUND, Augmentation, _move_boxes, augment, plain, warp

SIZE = 32
OFF = Augmentation(
    mosaic=0, translate=0, scale=0, flip_left_right=0, hue=0, saturation=0, brightness=0
)  # every setting zero
GEOMETRY = {"degrees": 30.0, "translate": 0.2, "scale": 0.4, "shear": 8.0, "flip_up_down": 0.5}
NO_COLOUR = {"hue": 0.0, "saturation": 0.0, "brightness": 0.0}


def only(**settings):
    """Everything off but `settings`."""
    return Augmentation(**{**vars(OFF), **settings})


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_split(seed, count=9, channels=1, size=SIZE, most=4):
    """Smooth random pictures (N, C, S, S), and 0 to `most` boxes each that lie inside."""
    random = np.random.default_rng(seed)
    images = ndimage.gaussian_filter(random.random((count, channels, size, size)), (0, 0, 1, 1))
    images = 255 * (images - images.min()) / np.ptp(images)
    corners = np.sort(random.uniform(0, size, (count, most, 2, 2)), axis=2)
    labels = np.where(np.arange(most) < random.integers(0, most + 1, (count, 1)), random.integers(0, 5, (1, most)), -1)
    boxes = np.where(labels[..., None] >= 0, corners.reshape(count, most, 4), 0)
    return torch.from_numpy(images.round().astype(np.uint8)), torch.from_numpy(boxes).float(), torch.from_numpy(labels)


def one_box(box, channels=1, size=SIZE, paint=255, background=0):
    """A split of one picture with one box (x0, y0, x1, y1) of whole pixels, painted."""
    images = torch.full((1, channels, size, size), background, dtype=torch.uint8)
    x0, y0, x1, y1 = box
    images[0, :, y0:y1, x0:x1] = paint
    return images, torch.tensor([[box]], dtype=torch.float32), torch.zeros(1, 1, dtype=torch.int64)


def real(batch, row):
    """Boxes and labels of one picture as numpy, without the padding."""
    keep = batch.labels[row] >= 0
    return batch.boxes[row][keep].numpy(), batch.labels[row][keep].numpy()


# ---------------------------------------------------------------------------------------------------- the slow version


def slow_picture(images, tiles, matrices, is_mosaic):
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
        expected, shown, (left, top) = slow_picture(images.numpy(), tiles, matrices, is_mosaic)
        np.testing.assert_allclose(batch.images[row, :channels].numpy(), expected, atol=1 / 255)
        if is_mosaic:
            assert SIZE / 2 <= left + SIZE <= 3 * SIZE / 2 and SIZE / 2 <= top + SIZE <= 3 * SIZE / 2
            for k in range(4):  # the tiles share one affine map and lie a side apart
                step = matrices[0] @ [[1, 0, SIZE * (k % 2)], [0, 1, SIZE * (k // 2)], [0, 0, 1]]
                np.testing.assert_allclose(matrices[k], step, atol=1e-4)
        else:
            assert (left, top) == (0, 0) and tiles == [row] * 4
        expected = slow_boxes(boxes.numpy(), labels.numpy(), tiles, matrices, shown, SIZE)
        found, found_labels = real(batch, row)
        np.testing.assert_allclose(found, expected[:, :4], atol=1e-3)
        assert found_labels.tolist() == expected[:, 4].tolist()
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


def test_shear_keeps_the_middle_and_leans_by_the_angle():
    images, boxes, labels = make_split(2, count=3)
    matrices = augment(images, boxes, labels, torch.zeros(400, dtype=torch.int64), only(shear=10), seeded(0)).matrices
    linear = matrices[:, 0, :2, :2]
    assert torch.allclose(linear.diagonal(dim1=1, dim2=2), torch.ones(400, 2), atol=1e-6)
    for lean in (linear[:, 0, 1], linear[:, 1, 0]):
        assert 0.95 * math.tan(math.radians(10)) < lean.abs().max() <= math.tan(math.radians(10)) + 1e-6
    assert torch.allclose(matrices[:, 0] @ torch.tensor([16.0, 16, 1]), torch.tensor([16.0, 16, 1]), atol=1e-4)


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


def test_a_painted_rectangle_stays_in_its_box():
    box = (9, 12, 21, 26)
    pictures = [one_box(box)[0][0, 0] * (torch.arange(3) == k)[:, None, None] for k in range(3)]  # one channel each
    images, boxes = torch.stack(pictures).to(torch.uint8), torch.tensor([[box]] * 3, dtype=torch.float32)
    settings = Augmentation(mosaic=0.5, **NO_COLOUR, **{**GEOMETRY, "degrees": 180.0})
    checked = {True: 0, False: 0}
    for seed in range(30):
        batch = augment(images, boxes, torch.arange(3)[:, None], torch.arange(12) % 3, settings, seeded(seed))
        for row in range(12):
            is_mosaic = not torch.equal(batch.matrices[row, 0], batch.matrices[row, 1])
            found, labels = real(batch, row)
            for label in range(3):
                present = int((batch.sources[row] == label).sum()) if is_mosaic else int(row % 3 == label)
                if present == 0 or (labels == label).sum() < present:
                    continue  # a box was dropped; what is left of its paint lies in no box
                # The ground is below 0.45, so above 0.75 more than half of the bilinear weight is on the paint.
                rows, columns = torch.nonzero(batch.images[row, label] > 0.75, as_tuple=True)
                inside = torch.zeros(len(rows), dtype=torch.bool)
                for x0, y0, x1, y1 in found[labels == label]:
                    inside |= (columns + 0.5 > x0) & (columns + 0.5 < x1) & (rows + 0.5 > y0) & (rows + 0.5 < y1)
                assert inside.all()
                checked[is_mosaic] += len(rows) > 0
    assert min(checked.values()) > 60


def test_matrices_lead_to_a_landmark():
    size, landmark = 48, torch.tensor([22.5, 26.5, 1.0])
    y, x = np.mgrid[:size, :size]
    blob = np.exp(-((x - 22) ** 2 + (y - 26) ** 2) / (2 * 1.5**2))
    images = torch.full((4, 1, size, size), GROUND, dtype=torch.uint8)
    images[2, 0] = torch.from_numpy(np.rint(GROUND + 141 * blob).astype(np.uint8))
    boxes, labels = torch.zeros(4, 1, 4), torch.full((4, 1), -1)
    # Without scaling the output lies inside the canvas, so only the output's own border can cut the blob.
    settings = only(mosaic=0.7, degrees=30, shear=5, translate=0.1, flip_left_right=0.5, flip_up_down=0.5)
    checked = set()
    for seed in range(50):
        batch = augment(images, boxes, labels, torch.arange(16) % 4, settings, seeded(seed))
        for row in range(16):
            is_mosaic = not torch.equal(batch.matrices[row, 0], batch.matrices[row, 1])
            tiles = (batch.sources[row, : 4 if is_mosaic else 1] == 2).nonzero()[:, 0].tolist()
            if len(tiles) != 1:
                continue
            expected = (batch.matrices[row, tiles[0]] @ landmark)[:2]
            if expected.min() < 7 or expected.max() > size - 7:
                continue
            above = batch.images[row, 0] - GROUND / 255
            positions = torch.arange(size) + 0.5
            centroid = torch.stack([(above.sum(0) * positions).sum(), (above.sum(1) * positions).sum()]) / above.sum()
            assert torch.allclose(centroid, expected, atol=0.1)
            checked.add((is_mosaic, tiles[0]))
    assert checked == {(False, 0), (True, 0), (True, 1), (True, 2), (True, 3)}


# --------------------------------------------------------------------------------------------------- degenerate inputs


@pytest.mark.parametrize("channels", [1, 3])
def test_all_settings_zero_change_nothing(channels):
    images, boxes, labels = make_split(4, channels=channels)
    boxes[..., 2:] = boxes[..., 2:].maximum(boxes[..., :2] + 3).clamp(max=SIZE)  # none is too small to be kept
    boxes[..., :2] = boxes[..., :2].minimum(boxes[..., 2:] - 3)
    indices = torch.tensor([3, 0, 8])
    batch = augment(images, boxes, labels, indices, OFF, seeded(0))
    expected = images[indices].expand(-1, 3, -1, -1)
    assert torch.equal((batch.images * 255).round(), expected.float())
    assert batch.images.shape == (3, 3, SIZE, SIZE) and batch.images.dtype == torch.float32
    torch.testing.assert_close(batch.images, plain(images, indices), atol=1e-5, rtol=0)
    assert torch.equal((plain(images, indices) * 255).round(), expected.float())
    torch.testing.assert_close(batch.matrices, torch.eye(3).expand(3, 4, 3, 3))
    assert batch.sources.tolist() == [[3] * 4, [0] * 4, [8] * 4]
    count = int((labels[indices] >= 0).sum(1).max())
    torch.testing.assert_close(batch.boxes, (boxes * (labels >= 0)[..., None])[indices][:, :count])
    assert torch.equal(batch.labels, labels[indices][:, :count])


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_pictures_without_boxes(mosaic):
    images, boxes, labels = make_split(5)
    batch = augment(images, boxes, torch.full_like(labels, -1), torch.arange(4), only(mosaic=mosaic), seeded(0))
    assert batch.boxes.shape == (4, 1, 4) and not batch.boxes.any()
    assert batch.labels.tolist() == [[-1]] * 4


def test_a_batch_of_one_is_not_mixed():
    images, boxes, labels = make_split(6)
    mixed, alone = (augment(images, boxes, labels, torch.tensor([2]), only(mixup=p), seeded(0)) for p in (1.0, 0.0))
    assert torch.equal((mixed.images[:, :1] * 255).round(), images[2:3].float())
    assert torch.equal(mixed.boxes, alone.boxes) and torch.equal(mixed.labels, alone.labels)


def test_padding_comes_last():
    images, boxes, labels = make_split(7, count=20, most=6)
    batch = augment(images, boxes, labels, torch.arange(20), Augmentation(), seeded(0))
    is_real = batch.labels >= 0
    counts = is_real.sum(1)
    assert counts.min() < counts.max() == batch.labels.shape[1]
    assert torch.equal(is_real, torch.arange(batch.labels.shape[1]) < counts[:, None])
    assert not batch.boxes[~is_real].any()


def test_grey_pictures_equal_colour_pictures_without_colour():
    images, boxes, labels = make_split(8)
    settings = Augmentation(mosaic=0.5, mixup=0.5, hue=0.5, contrast=0.5, **GEOMETRY | {"translate": 0.1})
    grey = augment(images, boxes, labels, torch.arange(6), settings, seeded(3))
    colour = augment(images.expand(-1, 3, -1, -1), boxes, labels, torch.arange(6), settings, seeded(3))
    torch.testing.assert_close(grey.images, colour.images, atol=1e-5, rtol=0)
    assert torch.equal(grey.boxes, colour.boxes)
    assert grey.images.stride(1) == 0, "the three channels of a grey picture share memory"


# ------------------------------------------------------------------------------------------------- generator, settings


def test_the_generator_decides_everything():
    images, boxes, labels = make_split(9)

    def batch(seed, settings=Augmentation(mosaic=0.5, mixup=0.5)):  # noqa: B008 (frozen)
        return vars(augment(images, boxes, labels, torch.arange(6), settings, seeded(seed)))

    first, again, other = batch(1), batch(1), batch(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["images"], other["images"])
    assert not torch.equal(first["matrices"], other["matrices"])
    without_colour = batch(1, Augmentation(mosaic=0.5, mixup=0.5, **NO_COLOUR))
    assert torch.equal(first["boxes"], without_colour["boxes"])
    assert not torch.equal(first["images"], without_colour["images"])
    generator = seeded(1)  # a generator moves on from batch to batch
    pair = [augment(images, boxes, labels, torch.arange(6), Augmentation(), generator).matrices for _ in range(2)]
    assert not torch.equal(*pair)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_batch_on_a_gpu():
    split = make_split(9, channels=3)
    settings = Augmentation(mosaic=0.5, mixup=0.5, **GEOMETRY)
    cpu = augment(*split, torch.arange(6), settings, seeded(1))
    gpu = augment(*(tensor.cuda() for tensor in split), torch.arange(6).cuda(), settings, seeded(1))
    torch.testing.assert_close(gpu.images.cpu(), cpu.images, atol=2e-3, rtol=0)  # the colour matrix may run in TF32
    torch.testing.assert_close(gpu.boxes.cpu(), cpu.boxes, atol=1e-4, rtol=1e-5)
    assert torch.equal(gpu.labels.cpu(), cpu.labels) and torch.equal(gpu.sources.cpu(), cpu.sources)


def test_partners_come_from_the_whole_split():
    images, boxes, labels = make_split(10)
    sources = augment(images, boxes, labels, torch.arange(9).repeat(20), only(mosaic=1), seeded(0)).sources
    assert torch.equal(sources[:, 0], torch.arange(9).repeat(20))
    for k in (1, 2, 3):
        assert sources[:, k].unique().tolist() == list(range(9))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mosaic", 1.1),
        ("mixup", -0.1),
        ("flip_up_down", 2),
        ("scale", 1.0),
        ("shear", 45.0),
        ("degrees", 181.0),
        ("translate", float("nan")),
        ("hue", 0.6),
        ("brightness", 1.5),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} = "):
        Augmentation(**{name: value})


def test_pictures_of_a_wrong_form_are_refused():
    images, boxes, labels = make_split(11)
    for wrong in (images.float(), images[..., :-1], images.expand(-1, 2, -1, -1)):
        with pytest.raises(ValueError, match="split_images is"):
            augment(wrong, boxes, labels, torch.arange(2), OFF, seeded(0))


# ------------------------------------------------------------------------------------------------- rules of the boxes


@pytest.mark.parametrize(
    ("box", "visible", "shift", "expected"),
    [
        ((0, 0, 20, 10), (0, 0, 256, 256), 0, (0, 0, 20, 10)),
        ((0, 0, 20, 10), (0, 0, 256, 256), 250, (250, 0, 256, 10)),  # the output cuts: 6 of 20 px remain
        ((0, 0, 20, 10), (0, 0, 256, 256), 254.5, None),  # 1.5 px wide
        ((0, 0, 20, 10), (0, 0, 256, 256), -30, None),  # outside
        ((0, 0, 30, 10), (27, 0, 256, 256), 5, (32, 0, 35, 10)),  # the canvas cuts: exactly a tenth remains
        ((0, 0, 31, 10), (28, 0, 256, 256), 5, None),  # 3 of 31 px remain
        ((0, 0, 20, 10), (20, 0, 256, 256), 5, None),  # the canvas shows nothing of it
        ((0, 0, 20, 10), (0, 0, 256, 2), 0, (0, 0, 20, 2)),
        ((0, 0, 200, 2), (0, 0, 256, 256), 0, (0, 0, 200, 2)),  # aspect ratio 100
        ((0, 0, 201, 2), (0, 0, 256, 256), 0, None),
    ],
)
def test_clipping_and_dropping_by_hand(box, visible, shift, expected):
    matrix = torch.tensor([[1.0, 0, shift], [0, 1, 0], [0, 0, 1]]).expand(1, 4, 3, 3)
    boxes = torch.tensor(box, dtype=torch.float32).expand(1, 4, 1, 4)
    moved, keep = _move_boxes(boxes, matrix, torch.tensor([visible]), torch.zeros(1, 4, 2), 256)
    assert keep.tolist() == [[[expected is not None]] * 4]
    if expected is not None:
        assert moved[0, 0, 0].tolist() == list(expected)


def test_a_box_that_the_canvas_hides_does_not_come_back_by_rotation():
    turned = math.sqrt(0.5) * torch.tensor([[1.0, -1, 0], [1, 1, 0], [0, 0, math.sqrt(2)]]).expand(1, 4, 3, 3)
    boxes = torch.tensor([40.0, 0, 60, 10]).expand(1, 4, 1, 4)
    visible = torch.tensor([[60.0, 0, 256, 256]])
    assert not _move_boxes(boxes, turned, visible, torch.zeros(1, 4, 2), 256)[1].any()
    assert _move_boxes(boxes, turned, visible - 20, torch.zeros(1, 4, 2), 256)[1].all()


# ------------------------------------------------------------------------------------------------------ colour, mixup


def colour_of(level, repeats=300, **settings):
    """(repeats, 3): the changed colour of a picture that has one colour, in 0..1."""
    images = torch.tensor(level, dtype=torch.uint8)[None, :, None, None].expand(1, -1, 8, 8)
    indices = torch.zeros(repeats, dtype=torch.int64)
    batch = augment(images, torch.zeros(1, 1, 4), torch.full((1, 1), -1), indices, only(**settings), seeded(0))
    assert torch.equal(batch.images.amax((2, 3)), batch.images.amin((2, 3)))
    return batch.images[:, :, 0, 0]


@pytest.mark.parametrize("level", [[100], [100, 60, 20]])
def test_brightness_is_a_gain(level):
    gain = colour_of(level, brightness=0.4) / (torch.tensor(level) / 255)
    torch.testing.assert_close(gain, gain[:, :1].expand_as(gain))
    assert 0.6 <= gain.min() < 0.62 and 1.38 < gain.max() <= 1.4
    assert colour_of([250], brightness=1.0).max() == 1, "clamped"


def test_saturation_scales_the_distance_from_grey():
    changed = colour_of([150, 120, 90], saturation=0.7)
    gain = (changed - 120 / 255) / (torch.tensor([30, 1, -30]) / 255)
    assert torch.allclose(changed[:, 1], torch.tensor(120 / 255)) and torch.allclose(gain[:, 0], gain[:, 2], atol=1e-5)
    assert 0.3 - 1e-4 <= gain[:, 0].min() < 0.33 and 1.67 < gain[:, 0].max() <= 1.7 + 1e-4
    assert torch.allclose(colour_of([80, 80, 80], saturation=0.7, hue=0.5), torch.tensor(80 / 255))


def test_hue_turns_about_the_grey_axis():
    level = torch.tensor([150, 120, 90]) / 255
    changed = colour_of([150, 120, 90], hue=0.1)
    chroma, before = changed - changed.mean(1, keepdim=True), level - level.mean()
    assert torch.allclose(changed.mean(1), level.mean())
    assert torch.allclose(chroma.norm(dim=1), before.norm())
    turn = torch.acos((chroma @ before / before.norm() ** 2).clamp(-1, 1)) / (2 * math.pi)
    assert 0.095 < turn.max() <= 0.1 + 1e-4
    # A third of a turn leads from red to green.
    towards_green = colour_of([200, 50, 50], hue=1 / 3)[:, 1].max()
    assert torch.isclose(towards_green, torch.tensor(200 / 255), atol=0.01)


def test_contrast_keeps_the_mean():
    images = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    images[..., :4] = 140
    indices = torch.zeros(300, dtype=torch.int64)
    split = images, torch.zeros(1, 1, 4), torch.full((1, 1), -1), indices
    changed = augment(*split, only(contrast=0.5), seeded(0)).images
    torch.testing.assert_close(changed.mean((1, 2, 3)), torch.full((300,), 120 / 255))
    gain = (changed[:, 0, 0, 0] - changed[:, 0, 0, 7]) * 255 / 40
    assert 0.5 - 1e-4 <= gain.min() < 0.52 and 1.48 < gain.max() <= 1.5 + 1e-4
    both = augment(*split, only(contrast=0.5, brightness=0.3), seeded(0)).images
    brightness = augment(*split, only(brightness=0.3), seeded(0)).images
    torch.testing.assert_close(both.mean((1, 2, 3)), brightness.mean((1, 2, 3)))


def test_mixup_blends_and_keeps_both_pictures_boxes():
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 1, 16, 16)
    boxes = torch.tensor([[[1.0, 2, 7, 8]], [[3.0, 3, 12, 14]]])
    batch = augment(images, boxes, torch.tensor([[0], [1]]), torch.tensor([0, 1]), only(mixup=1.0), seeded(0))
    assert batch.boxes.tolist() == [boxes[:, 0].tolist(), boxes[:, 0].flip(0).tolist()]
    assert batch.labels.tolist() == [[0, 1], [1, 0]]
    assert batch.sources.tolist() == [[0] * 4, [1] * 4]

    # The share of the other picture, which is white for black pictures and black for white ones.
    indices = torch.arange(2).repeat(1000)
    batch = augment(images, boxes, torch.tensor([[0], [1]]), indices, only(mixup=0.5), seeded(0))
    mixed = batch.labels[:, 1] >= 0
    assert 0.45 < mixed.float().mean() < 0.55
    share = batch.images[:, 0, 0, 0]
    share = share[mixed & (batch.labels[:, 0] != batch.labels[:, 1])]
    share, expected = share.double(), 1 / math.sqrt(4 * 65)  # Beta(32, 32): mean 1/2, this standard deviation
    assert abs(share.mean() - 0.5) < 4 * expected / math.sqrt(len(share))
    assert abs(share.std() / expected - 1) < 0.15
    assert torch.equal(batch.images[~mixed][:, 0, 0, 0], indices[~mixed].float())


# --------------------------------------------------------------------------------------------------------------- maps


def test_warp_moves_maps_as_the_pictures_were_moved():
    images, boxes, labels = make_split(12)
    settings = only(degrees=30, shear=5, translate=0.1, scale=0.3, flip_left_right=0.5)
    batch = augment(images, boxes, labels, torch.arange(6), settings, seeded(0))
    moved = warp(plain(images, torch.arange(6)), batch.matrices[:, 0], SIZE, ground=GROUND / 255)
    torch.testing.assert_close(moved, batch.images, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 8)])
def test_warp_of_maps_of_another_resolution(height, width):
    """A linear map of the position is interpolated exactly, wherever the ground has no part in it."""
    x = (torch.arange(width) + 0.5) * SIZE / width
    y = (torch.arange(height) + 0.5) * SIZE / height
    features = torch.stack(torch.broadcast_tensors(x, y[:, None]))[None].expand(2, -1, -1, -1)
    matrices = torch.tensor([[[0.9, -0.3, 5], [0.3, 0.9, -2], [0, 0, 1]], [[-1, 0, SIZE], [0, 1, 4], [0, 0, 1]]])
    moved = warp(features, matrices, SIZE, ground=-1000.0)
    for row in range(2):
        source = torch.linalg.inv(matrices[row]) @ torch.stack(
            [*torch.broadcast_tensors(x, y[:, None]), torch.ones(height, width)]
        ).flatten(1)
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
