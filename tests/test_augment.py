"""Augmentation: what its settings mean, its generator, the rules of the boxes, colour, worked by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from defectlab.data.augment import Augmentation, _move_boxes, augment, plain

SIZE = 32
# every setting zero
OFF = Augmentation(mosaic=0, translate=0, scale=0, flip_left_right=0, hue=0, saturation=0, brightness=0)
GEOMETRY = {"degrees": 30.0, "translate": 0.2, "scale": 0.4, "flip_up_down": 0.5}
NO_COLOUR = {"hue": 0.0, "saturation": 0.0, "brightness": 0.0}


def only(**settings):
    """Everything off but `settings`."""
    return Augmentation(**{**vars(OFF), **settings})


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_split(seed, count=9, channels=1, size=SIZE, most=4):
    """Smooth random images (N, C, S, S), and 0 to `most` boxes each that lie inside."""
    random = np.random.default_rng(seed)
    images = ndimage.gaussian_filter(random.random((count, channels, size, size)), (0, 0, 1, 1))
    images = 255 * (images - images.min()) / np.ptp(images)
    corners = np.sort(random.uniform(0, size, (count, most, 2, 2)), axis=2)
    labels = np.where(np.arange(most) < random.integers(0, most + 1, (count, 1)), random.integers(0, 5, (1, most)), -1)
    boxes = np.where(labels[..., None] >= 0, corners.reshape(count, most, 4), 0)
    return torch.from_numpy(images.round().astype(np.uint8)), torch.from_numpy(boxes).float(), torch.from_numpy(labels)


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
def test_images_without_boxes(mosaic):
    images, boxes, labels = make_split(5)
    batch = augment(images, boxes, torch.full_like(labels, -1), torch.arange(4), only(mosaic=mosaic), seeded(0))
    assert batch.boxes.shape == (4, 1, 4) and not batch.boxes.any()
    assert batch.labels.tolist() == [[-1]] * 4


def test_padding_comes_last():
    images, boxes, labels = make_split(7, count=20, most=6)
    batch = augment(images, boxes, labels, torch.arange(20), Augmentation(), seeded(0))
    is_real = batch.labels >= 0
    counts = is_real.sum(1)
    assert counts.min() < counts.max() == batch.labels.shape[1]
    assert torch.equal(is_real, torch.arange(batch.labels.shape[1]) < counts[:, None])
    assert not batch.boxes[~is_real].any()


def test_grey_images_equal_colour_images_without_colour():
    images, boxes, labels = make_split(8)
    settings = Augmentation(mosaic=0.5, hue=0.5, contrast=0.5, **GEOMETRY | {"translate": 0.1})
    grey = augment(images, boxes, labels, torch.arange(6), settings, seeded(3))
    colour = augment(images.expand(-1, 3, -1, -1), boxes, labels, torch.arange(6), settings, seeded(3))
    torch.testing.assert_close(grey.images, colour.images, atol=1e-5, rtol=0)
    assert torch.equal(grey.boxes, colour.boxes)
    assert grey.images.stride(1) == 0, "the three channels of a grey image share memory"


# ------------------------------------------------------------------------------------------------- generator, settings


def test_the_generator_decides_everything():
    images, boxes, labels = make_split(9)

    def batch(seed, settings=Augmentation(mosaic=0.5)):  # noqa: B008 (frozen)
        return vars(augment(images, boxes, labels, torch.arange(6), settings, seeded(seed)))

    first, again, other = batch(1), batch(1), batch(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["images"], other["images"])
    assert not torch.equal(first["matrices"], other["matrices"])
    without_colour = batch(1, Augmentation(mosaic=0.5, **NO_COLOUR))
    assert torch.equal(first["boxes"], without_colour["boxes"])
    assert not torch.equal(first["images"], without_colour["images"])
    generator = seeded(1)  # a generator moves on from batch to batch
    pair = [augment(images, boxes, labels, torch.arange(6), Augmentation(), generator).matrices for _ in range(2)]
    assert not torch.equal(*pair)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_batch_on_a_gpu():
    split = make_split(9, channels=3)
    settings = Augmentation(mosaic=0.5, **GEOMETRY)
    cpu = augment(*split, torch.arange(6), settings, seeded(1))
    gpu = augment(*(tensor.cuda() for tensor in split), torch.arange(6).cuda(), settings, seeded(1))
    torch.testing.assert_close(gpu.images.cpu(), cpu.images, atol=2e-3, rtol=0)  # the colour matrix may run in TF32
    torch.testing.assert_close(gpu.boxes.cpu(), cpu.boxes, atol=1e-4, rtol=1e-5)
    assert torch.equal(gpu.labels.cpu(), cpu.labels) and torch.equal(gpu.sources.cpu(), cpu.sources)


def test_a_seed_gives_what_it_gave_when_records_were_made():
    """The second batch of a generator: the order and the count of all random numbers, the reserved ones among them."""
    split, settings, generator = make_split(9, channels=3), Augmentation(mosaic=0.5, degrees=10.0), seeded(5)
    _, batch = (augment(*split, torch.arange(3), settings, generator) for _ in range(2))
    assert batch.sources.tolist() == [[0, 6, 7, 7], [1, 1, 1, 1], [2, 6, 3, 6]]
    expected = [[-0.69, 0.01, 41.92, 0.01, 0.69, -1.1], [1.3, -0.01, -1.6, 0.01, 1.3, -4.59]]
    torch.testing.assert_close(batch.matrices[:2, 0, :2].flatten(1), torch.tensor(expected), atol=0.006, rtol=0)
    torch.testing.assert_close(batch.images.mean((1, 2, 3)), torch.tensor([0.66, 0.683, 0.362]), atol=0.001, rtol=0)


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_nothing_waits_for_the_device(mosaic):
    """On the meta device there are no values: whatever is read back is an error."""
    images, boxes, labels = make_split(9, channels=3)
    arguments = boxes, labels, torch.arange(4), only(mosaic=mosaic, contrast=0.2)
    here, there = (augment(images.to(device), *arguments, seeded(0)) for device in ("cpu", "meta"))
    for name, value in vars(there).items():
        assert value.device.type == "meta" and value.shape == getattr(here, name).shape, name


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
        ("mosaic", -0.1),
        ("flip_up_down", 2),
        ("scale", 1.0),
        ("degrees", 181.0),
        ("translate", float("nan")),
        ("hue", 0.6),
        ("brightness", 1.5),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} = "):
        Augmentation(**{name: value})


def test_images_of_a_wrong_form_are_refused():
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


# ------------------------------------------------------------------------------------------------------------ colour


def colour_of(level, repeats=300, **settings):
    """(repeats, 3): the changed colour of an image that has one colour, in 0..1."""
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
