"""The feature repository: what comes back, what is refused, and what a killed build or a bad disk leaves behind."""

import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from defectlab import files as files_
from defectlab.files import DataError
from defectlab.training import feature_store as repository
from defectlab.training.feature_store import Repository, build_repository

SHAPES = ((4, 8, 8), (6, 4, 4))
NAMES = [f"plate_{i}" for i in range(7)]  # in shards of three: 3, 3, 1
FEATURES = [torch.randn(len(NAMES), *shape, generator=torch.Generator().manual_seed(0)) for shape in SHAPES]


class Killed(BaseException):
    """What no code of ours may catch."""


class Compute:
    """Features of `FEATURES`; `calls` keeps what was asked for, and call number `fails_at` raises."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls: list[list[int]] = []
        self.fails_at = fails_at

    def __call__(self, indices: list[int]) -> list[Tensor]:
        if len(self.calls) == self.fails_at:
            raise Killed
        self.calls.append(indices)
        return [level[indices] for level in FEATURES]


def build(folder: Path, compute: Callable[[list[int]], list[Tensor]], **changed) -> Repository:
    arguments = {"names": NAMES, "shapes": SHAPES, "identity": "weights 1", "shard": 3, "say": lambda line: None}
    return build_repository(folder, compute=compute, **(arguments | changed))


def reopen(folder: Path) -> Repository:
    return Repository.open(folder, "weights 1", NAMES, SHAPES)


def shard(folder: Path, n: int) -> Path:
    return folder / f"shard-{n:05d}.safetensors"


def assert_holds_the_features(found: Repository) -> None:
    for level, expected in zip(found.load("cpu"), FEATURES, strict=True):
        assert torch.equal(level, expected.half())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repositories") / "whole"
    build(folder, Compute())
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A whole repository to damage."""
    return shutil.copytree(built, tmp_path / "copy")


# --- Round trip ------------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_computed_in_half_precision(built: Path) -> None:
    found = reopen(built)
    assert len(found) == 7
    assert found.shards == 3
    assert found.verify() == []
    assert found.bytes == sum(shard(built, n).stat().st_size for n in range(3)) > 7 * 2 * (256 + 96)
    assert_holds_the_features(found)
    for level, expected in zip(found.load("cpu", torch.float32), FEATURES, strict=True):
        assert level.dtype == torch.float32
        torch.testing.assert_close(level, expected, rtol=2**-11, atol=1e-7)


@pytest.mark.parametrize("indices", [[6, 0, 3, 3, 1], range(2, 5), torch.tensor([5, 2]), []])
def test_images_are_read_in_any_order_across_shards(built: Path, indices) -> None:
    levels = reopen(built).read(indices)
    for level, expected in zip(levels, FEATURES, strict=True):
        assert level.is_contiguous()
        assert torch.equal(level, expected[torch.as_tensor(indices).long()].half())


@pytest.mark.parametrize("index", [7, -1])
def test_an_image_that_is_not_there_is_refused(built: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"image {index} .* holds 0 to 6"):
        reopen(built).read([0, index])


def test_a_shard_has_one_flat_vector_an_image_with_its_levels_in_order(built: Path) -> None:
    with safe_open(shard(built, 1), framework="pt") as file:
        assert sorted(file.keys()) == ["plate_3", "plate_4", "plate_5"]
        vector = file.get_tensor("plate_4")
    assert torch.equal(vector, torch.cat([level[4].flatten() for level in FEATURES]).half())


def mapped_kb(path: Path) -> int:
    """How much of a mapped file is in this process's memory."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    ours = [block for block in blocks if str(path) in block]
    assert ours, f"{path} is not mapped"
    return sum(int(re.search(r"^Rss:\s+(\d+)", block, flags=re.MULTILINE)[1]) for block in ours)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux to see what is mapped")
def test_reading_one_image_leaves_the_rest_of_its_file_on_disk(tmp_path: Path) -> None:
    shapes = ((256, 64, 64),)  # 2 MB an image, 14 MB a file
    found = build(tmp_path, lambda i: [torch.ones(len(i), *shapes[0])], shapes=shapes, shard=7)
    assert found.read([4])[0].sum() == math.prod(shapes[0])
    assert mapped_kb(shard(tmp_path, 0)) < 7 * 1024  # the system maps some pages around the image
    found.load("cpu")
    assert mapped_kb(shard(tmp_path, 0)) > 13 * 1024


# --- Resuming --------------------------------------------------------------------------------------------------------


def test_a_killed_build_goes_on_after_its_last_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index.json is missing: build the repository first"):
        reopen(tmp_path)
    with pytest.raises(Killed):
        build(tmp_path, Compute(fails_at=2))
    aside = tmp_path / ".4242-shard-00002.safetensors"
    aside.write_bytes(b"half a shard")  # what a killed process could not remove
    with pytest.raises(DataError, match="lacks 1 of 3 shards: build the repository again"):
        reopen(tmp_path)
    rest = Compute()
    assert_holds_the_features(build(tmp_path, rest))
    assert rest.calls == [[6]]
    assert not aside.exists()
    nothing = Compute()
    assert_holds_the_features(build(tmp_path, nothing))
    assert nothing.calls == []


def test_a_kill_between_shard_and_index_costs_that_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json, written = files_.write_json, []

    def killed_at_the_second(path: Path, content: dict) -> None:
        written.append(path)
        if len(written) == 2:
            raise Killed
        write_json(path, content)

    monkeypatch.setattr(repository, "write_json", killed_at_the_second)
    with pytest.raises(Killed):
        build(tmp_path, Compute())
    monkeypatch.undo()
    assert shard(tmp_path, 1).exists()
    shard(tmp_path, 1).write_bytes(b"of another build")  # not in the index, so nothing vouches for its bytes
    rest = Compute()
    assert_holds_the_features(build(tmp_path, rest))
    assert rest.calls == [[3, 4, 5], [6]]


def test_an_index_that_cannot_be_read_is_made_again(folder: Path) -> None:
    index = folder / "index.json"
    index.write_text(index.read_text()[:100])
    with pytest.raises(DataError, match=r"index.json is damaged .* build the repository again"):
        reopen(folder)
    again, lines = Compute(), []
    assert_holds_the_features(build(folder, again, say=lines.append))
    assert len(again.calls) == 3
    assert lines[0].endswith("index.json is damaged: every shard is computed again")
    assert json.loads(index.read_text())["identity"] == "weights 1"


def test_a_begun_folder_keeps_its_number_of_images_a_shard(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        build(tmp_path, Compute(fails_at=1))
    rest = Compute()
    assert_holds_the_features(build(tmp_path, rest, shard=5))
    assert rest.calls == [[3, 4, 5], [6]]


def test_a_second_builder_waits_and_finds_the_work_done(tmp_path: Path) -> None:
    begun, go_on, second = threading.Event(), threading.Event(), Compute()

    def slow(indices: list[int]) -> list[Tensor]:
        begun.set()
        assert go_on.wait(10)
        return [level[indices] for level in FEATURES]

    builders = [threading.Thread(target=build, args=(tmp_path, slow))]
    builders[0].start()
    assert begun.wait(10)
    builders.append(threading.Thread(target=build, args=(tmp_path, second)))
    builders[1].start()
    builders[1].join(0.2)
    assert builders[1].is_alive()
    go_on.set()
    for builder in builders:
        builder.join(10)
    assert second.calls == []
    assert_holds_the_features(reopen(tmp_path))


# --- Damage ----------------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip_a_byte,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 10),
    "empty": lambda path: os.truncate(path, 0),
    "gone": Path.unlink,
    "header": lambda path: path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:]),
    "renamed": lambda path: path.write_bytes(path.read_bytes().replace(b"plate_4", b"plate_x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_alone_is_computed_again(folder: Path, damage: str) -> None:
    DAMAGES[damage](shard(folder, 1))
    assert reopen(folder).verify() == [1]
    again, lines = Compute(), []
    found = build(folder, again, say=lines.append)
    assert again.calls == [[3, 4, 5]]
    assert "shard-00001.safetensors is missing or damaged: computed again" in lines[1]
    assert found.verify() == []
    assert_holds_the_features(found)


# What was mapped and understood before is not read again when its header changes: `verify` tells.
@pytest.mark.parametrize(
    ("damage", "read_before"),
    [("gone", False), ("gone", True), ("cut", False), ("cut", True), ("header", False), ("renamed", False)],
)
def test_reading_a_bad_shard_is_one_clear_error(folder: Path, damage: str, read_before: bool) -> None:
    found = reopen(folder)
    if read_before:
        found.read([4])
    DAMAGES[damage](shard(folder, 1))
    said = "missing" if damage == "gone" else "damaged"
    with pytest.raises(DataError, match=rf"shard-00001\.safetensors is {said}.*: build the repository again"):
        found.read([0, 4])
    assert torch.equal(found.read([2, 6])[0], FEATURES[0][[2, 6]].half())  # the other shards are as good as before


# --- Refusals, and the size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"identity": "weights 2"}, "made from weights 1, not from weights 2"),
        ({"names": NAMES[::-1]}, "of other images"),
        ({"names": NAMES[:3]}, "of other images"),
        ({"shapes": SHAPES[::-1]}, "of shapes"),
    ],
)
def test_a_folder_of_other_features_is_refused(built: Path, changed: dict, said: str) -> None:
    compute = Compute()
    with pytest.raises(DataError, match=f"whole holds features {said}.*: choose another folder, or delete this one"):
        build(built, compute, **changed)
    assert compute.calls == []
    with pytest.raises(DataError, match=said):
        Repository.open(built, **({"identity": "weights 1", "names": NAMES, "shapes": SHAPES} | changed))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"names": ["a", "b", "a"]}, "2 images are named 'a'"),
        ({"names": []}, "got 0 names"),
        ({"shard": 0}, "0 images a shard"),
    ],
)
def test_names_and_shards_are_checked_first(tmp_path: Path, changed: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(tmp_path / "new", Compute(), **changed)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [70_000.0, -70_000.0, math.nan, math.inf])
def test_a_value_beyond_half_precision_names_its_image(tmp_path: Path, value: float) -> None:
    def compute(indices: list[int]) -> list[Tensor]:
        levels = [level[indices] for level in FEATURES]
        if 4 in indices:
            levels[1][indices.index(4), 2, 1, 1] = value
        return levels

    with pytest.raises(ValueError, match="image 'plate_4' are not finite in half precision"):
        build(tmp_path, compute)
    rest = Compute()
    build(tmp_path, rest)
    assert rest.calls == [[3, 4, 5], [6]]


@pytest.mark.parametrize("wrong", [lambda levels: levels[:1], lambda levels: levels[::-1]])
def test_features_of_other_shapes_are_refused(tmp_path: Path, wrong) -> None:
    with pytest.raises(ValueError, match=r"features of shard 0 have shapes .*, expected \[\(3, 4, 8, 8\), "):
        build(tmp_path, lambda indices: wrong(Compute()(indices)))


def test_the_size_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    lines, said = [], []
    shapes = ((2, 64, 64),)  # 16,384 bytes an image

    def compute(indices: list[int]) -> list[Tensor]:
        said.append(list(lines))
        return [torch.zeros(len(indices), *shapes[0])]

    build(tmp_path, compute, shapes=shapes, say=lines.append)
    assert said[0] == [f"feature repository {tmp_path.name}: 0.1 MB, 7 images, 3 shards, 3 of them to compute"]
    assert lines[1].startswith("  shard 1 of 3: 3 images, ")
    lines.clear()
    build(tmp_path, compute, shapes=shapes, say=lines.append)
    assert lines == [f"feature repository {tmp_path.name}: 0.1 MB, 7 images, 3 shards, all there"]


def test_a_disk_without_room_is_refused_by_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    an_image = 2 * (4 * 8 * 8 + 6 * 4 * 4)

    def free(size: int) -> None:
        monkeypatch.setattr(repository.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))

    compute, lines = Compute(fails_at=2), []
    free(7 * an_image)  # room enough, were nothing to stay spare
    with pytest.raises(OSError, match=f"{tmp_path}: {7 * an_image} bytes needed, {7 * an_image} free .*free some disk"):
        build(tmp_path, compute, say=lines.append)
    assert compute.calls == []
    assert len(lines) == 1
    free(math.ceil(7 * an_image / 0.95) + 1)
    with pytest.raises(Killed):
        build(tmp_path, compute)
    free(math.ceil(an_image / 0.95) + 1)  # one image is missing
    assert_holds_the_features(build(tmp_path, Compute()))
