"""The leak check: which copies are found and which images are left alone; tiles in groups; what the real sets hold."""

import io
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from defectlab.data.anomaly import load_anomaly, plan_of
from defectlab.data.detection import load_detection
from defectlab.data.instances import TURNS_LIST, load_instances
from defectlab.data.leaks import FEWEST, TURNS, compared, near_duplicates
from defectlab.data.splits import PARTS, read_list
from defectlab.data.tile_groups import AGAIN, draw_grouped, tile_groups

GROUPED = Path(__file__).parents[1] / "defectlab" / "data" / "splits" / "magnetic_tile_grouped.txt"


def textures(count: int, seed: int, channels: int = 1) -> Tensor:
    """(count, channels, 64, 64) uint8: grain of two sizes on a slow slope, as of a flat ground."""
    generator = torch.Generator().manual_seed(seed)
    coarse, fine = (torch.randn(count, 1, side, side, generator=generator) for side in (16, 64))
    image = 120 + 25 * interpolate(coarse, (64, 64), mode="bilinear") + 8 * fine + torch.linspace(-40, 40, 64)
    return image.clamp(0, 255).byte().expand(-1, channels, -1, -1)


def lines(count: int, seed: int) -> Tensor:
    """A bright line across each, at one of few places, on a faint ground of its own: as scratches."""
    images = (80 + 0.3 * textures(count, seed)).byte()
    for i in range(count):
        at = 8 + 4 * (i % 10)
        images[i, :, :, at : at + 4] = 250
    return images


def aligned(count: int, seed: int) -> Tensor:
    """One part, always in the same place, whose surface differs."""
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, 64)], indexing="ij")
    radius = (x.square() + y.square()).sqrt()
    part = 200 * ((radius < 0.8) & (radius > 0.3) & (x.abs() + 0.4 * y > -0.3))
    return (part * 0.8 + 0.25 * textures(count, seed).float()).clamp(0, 255).byte()


def poses(count: int, seed: int) -> Tensor:
    """One pattern in some of 16 places, each image with a ground of its own."""
    pattern, own = textures(1, 0)[0], textures(count, seed)
    places = torch.randint(16, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    moved = torch.stack([pattern.roll(4 * place, 2) for place in places])
    return (0.54 * moved + 0.46 * own).byte()


def jpeg(images: Tensor) -> Tensor:
    stored = []
    for image in images[:, 0].numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=50)
        stored.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(stored))[:, None]


def shaded(images: Tensor) -> Tensor:
    """Half the contrast, and light from another side."""
    return (0.5 * images + torch.linspace(0, 120, 64)[:, None]).byte()


def test_parts_of_one_kind_are_no_copies() -> None:
    first, second = poses(200, 1), poses(40, 2)
    second[7] = first[50].rot90(1, (1, 2))
    assert [(pair.first, pair.second, pair.turn) for pair in near_duplicates(first, second)] == [(50, 7, TURNS[1])]


KINDS = pytest.mark.parametrize("kind", [textures, lines, aligned])


@KINDS
@pytest.mark.parametrize("count", [12, 60])
def test_unrelated_images_are_left_alone(kind: Callable[[int, int], Tensor], count: int) -> None:
    assert near_duplicates(kind(count, 1), kind(count // 3, 2)) == []


@KINDS
@pytest.mark.parametrize("count", [12, 60])
@pytest.mark.parametrize("change", [jpeg, shaded, lambda images: images.expand(-1, 3, -1, -1)])
def test_copies_are_found_with_their_turn(kind: Callable, count: int, change: Callable[[Tensor], Tensor]) -> None:
    """Image i is turned by TURNS[i]: all eight, among images that are no copies."""
    first, second = kind(count, 1), kind(count // 3, 2)
    copies = torch.stack(
        [(image.flip(2) if i > 3 else image).rot90(i % 4, (1, 2)) for i, image in enumerate(first[:8])]
    )
    pairs = near_duplicates(first, torch.cat([change(copies), change(second)]))
    assert sorted((pair.first, pair.second, pair.turn) for pair in pairs) == [(i, i, TURNS[i]) for i in range(8)]
    similarities = [pair.similarity for pair in pairs]
    assert similarities == sorted(similarities, reverse=True) and FEWEST <= similarities[-1] <= similarities[0] < 1.001


def test_the_threshold_is_that_of_the_sets() -> None:
    """Where images are others' rolled copies, chance goes further: the patterns of such sets repeat."""
    first, second = textures(40, 1), textures(20, 2)
    assert compared(first, second)[1] == FEWEST
    second[0] = first[7].roll((32, 32), (1, 2))
    pairs, higher = compared(first, second)
    assert higher > 0.7 and pairs == near_duplicates(first, second) == []


def test_images_without_content_and_sets_without_images() -> None:
    blank = torch.full((12, 3, 20, 20), 7, dtype=torch.uint8)
    assert all(0 <= pair.similarity <= 1 for pair in near_duplicates(blank, blank))
    assert near_duplicates(torch.cat([blank, textures(1, 1, 3)[..., :20, :20]]), textures(4, 2, 3)) == []
    with pytest.raises(ValueError, match="both sets need an image, got 0 and 12"):
        near_duplicates(blank[:0], blank)


def test_names_tell_the_groups() -> None:
    one = [f"exp{e}_num_{100000 + 20 * e}" for e in range(1, 7)]
    short, next_ = ["exp5_num_100300", "exp6_num_100330"], ["exp1_num_100350"]
    late = ["exp2_num_100900"]  # fits the last series but for the gap
    interleaved = [f"exp{e}_num_{200000 + 30 * e + k}" for e in (1, 2, 3) for k in (0, 12)]
    seen = [f"MT_Free/Imgs/exp1_num_{AGAIN[0][0]}.jpg", f"MT_Blowhole/Imgs/exp1_num_{AGAIN[0][2]}.jpg"]
    every = [*late, *interleaved, *one[::-1], *next_, *short, *seen]
    groups = tile_groups(every)
    members = defaultdict(set)
    for name, group in groups.items():
        members[group].add(name)
    expected = (one, short, next_, late, interleaved, seen)
    assert sorted(map(sorted, members.values())) == sorted(map(sorted, expected))
    assert groups.keys() == set(every) and groups == tile_groups(every[::-1])
    with pytest.raises(
        ValueError, match=r"crack_1 is no image of a magnetic tile: its name should hold exp<exposure>_num"
    ):
        tile_groups(["crack_1"])


def test_a_grouped_split_cuts_no_tile() -> None:
    names = [f"MT_Free/Imgs/exp{e}_num_{1000000 + 1000 * tile + e}.jpg" for tile in range(60) for e in range(1, 7)]
    cracked = range(3, 60, 6)
    for i in cracked:
        names[i] = names[i].replace("Free", "Crack")
    train = draw_grouped(names)
    groups = tile_groups(names)
    left = [name for name in names if name not in train]
    assert not {groups[name] for name in train} & {groups[name] for name in left}
    good = [name for name in left if "Free" in name]
    assert 186 <= len(good) <= 191 and {groups[names[i]] for i in cracked} <= {groups[name] for name in good}


@pytest.fixture(scope="module")
def tiles(real_set) -> tuple[list[str], Tensor, int]:
    """Paths and images, and how many of them, the first, are the good ones to train on in the published split."""
    data = load_anomaly("magnetic_tile", 128, root=real_set("magnetic_tile"))
    held_out = len(data.dev) // 2
    names = [*data.train.names, *data.dev.names[:held_out], *data.test.names]
    images = torch.cat([data.train.images, data.dev.images[:held_out], data.test.images])
    return names, images[:, :1], len(data.train) + held_out


@pytest.mark.real_data
def test_tiles_in_the_published_split(tiles) -> None:
    names, images, train = tiles
    groups = tile_groups(names)
    assert len(set(groups.values())) == 205
    pairs = near_duplicates(images[:train], images[train:])
    assert all(groups[names[pair.first]] == groups[names[train + pair.second]] for pair in pairs)
    assert {pair.turn for pair in pairs} == {"unturned", "turned by 180 degrees"}
    shown = {pair.second for pair in pairs}
    assert len([i for i in shown if i < 191]) == 184 and len([i for i in shown if i >= 191]) == 12
    trained = {groups[name] for name in names[:train]}
    assert sum(groups[name] in trained for name in names[train:][:191]) == 191


@pytest.mark.real_data
def test_no_tile_is_in_two_groups_and_the_list_is_what_the_recipe_gives(tiles) -> None:
    """Among all images, near-duplicates are of one group, but for the image itself."""
    names, images, _ = tiles
    groups = tile_groups(names)
    pairs = near_duplicates(images, images)
    assert len(pairs) > 6000 and all(groups[names[pair.first]] == groups[names[pair.second]] for pair in pairs)
    train = draw_grouped(names)
    assert [Path(name).name for name in train] == read_list(GROUPED)
    assert len(train) == 763 and sum("MT_Free" in name for name in names) - len(train) == 189


@pytest.mark.real_data
def test_the_grouped_split_has_no_tile_on_two_sides(real_set) -> None:
    parts = plan_of("magnetic_tile_grouped", real_set("magnetic_tile")).parts
    groups = tile_groups([sample.path for samples in parts.values() for sample in samples])
    train, dev, test = ({groups[sample.path] for sample in parts[part]} for part in PARTS)
    assert not (train & dev or train & test or dev & test)
    assert [len(parts[part]) for part in PARTS] == [691, 144, 581]


@pytest.mark.real_data
def test_turned_copies_of_neu_seg(real_set) -> None:
    """All 810 test images that training repeats are found, and no other. In our split 28 test images are left, each
    joined from two images, of which training holds the larger part."""
    turns = {f"images/{name}.jpg": line for line in read_list(TURNS_LIST) for name in line.split()[1:]}
    data = load_instances("neu_seg_published", 128, root=real_set("neu_seg"))
    pairs = near_duplicates(torch.cat([data.train.images, data.dev.images]), data.test.images)
    trained = {turns[name] for part in (data.train, data.dev) for name in part.names}
    repeated = {i for i, name in enumerate(data.test.names) if turns[name] in trained}
    assert len(repeated) == 810 and {pair.second for pair in pairs} == repeated
    ours = load_instances("neu_seg", 128, root=real_set("neu_seg"))
    pairs = near_duplicates(torch.cat([ours.train.images, ours.dev.images]), ours.test.images)
    assert len({pair.second for pair in pairs}) == 28


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "count", "best"), [("neu_det", 2, "inclusion_125"), ("deep_pcb", 19, "50600066_test")]
)
def test_steel_and_boards(real_set, name: str, count: int, best: str) -> None:
    """NEU-DET: two places of the strip photographed twice. DeepPCB: boards of one design in both official lists."""
    data = load_detection(name, 128, root=real_set(name))
    pairs = near_duplicates(torch.cat([data.train.images, data.dev.images]), data.test.images)
    assert len({pair.second for pair in pairs}) == count and Path(data.test.names[pairs[0].second]).stem == best
