"""The feature repository: what comes back, what is refused, and what a killed build or a bad disk leaves behind."""

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from defectlab.files import DataError
from defectlab.training import feature_store

SHAPES = ((4, 8, 8), (6, 4, 4))
NAMES = [f"plate_{i}" for i in range(7)]  # in batches of three: 3, 3, 1
FEATURES = [torch.randn(len(NAMES), *shape, generator=torch.Generator().manual_seed(0)) for shape in SHAPES]


class Killed(BaseException):
    """What no code of the package may catch."""


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


def build(folder: Path, compute: Callable[[list[int]], list[Tensor]], **changed) -> list[np.ndarray]:
    arguments = {"names": NAMES, "shapes": SHAPES, "identity": "weights 1", "batch": 3, "log": lambda line: None}
    return feature_store.build(folder, compute=compute, **(arguments | changed))


def assert_holds_the_features(found: list[np.ndarray]) -> None:
    for level, expected in zip(feature_store.load(found, "cpu"), FEATURES, strict=True):
        assert torch.equal(level, expected.half())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repositories") / "whole"
    build(folder, Compute())
    return folder


def test_what_is_read_is_what_was_computed_in_half_precision(built: Path) -> None:
    nothing = Compute()
    found = build(built, nothing)
    assert nothing.calls == []
    assert_holds_the_features(found)
    assert all(isinstance(level, np.memmap) and not level.flags.writeable for level in found)
    assert sum(level.nbytes for level in found) == 7 * 2 * (256 + 96)
    assert np.array_equal(found[1][[6, 0, 3, 3]], FEATURES[1][[6, 0, 3, 3]].half().numpy())
    index = json.loads((built / "index.json").read_text())
    assert index.keys() == {"identity", "names", "shapes", "sha256"} and index["names"] == NAMES


# --- Resuming --------------------------------------------------------------------------------------------------------


def test_a_killed_build_goes_on_after_its_last_batch(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        build(tmp_path, Compute(fails_at=2))
    rest = Compute()
    assert_holds_the_features(build(tmp_path, rest))
    assert rest.calls == [[6]]


@pytest.mark.parametrize(
    ("place", "name", "effects", "left"),
    [
        (np.memmap, "flush", [None] * 4, [[3, 4, 5], [6]]),  # in the second batch, between the features and their mark
        (hashlib, "file_digest", [], []),  # all is there but the hash
    ],
)
def test_a_killed_build_computes_nothing_twice_that_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: object, name: str, effects: list, left: list
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place, name, Mock(side_effect=[*effects, Killed]))
        build(tmp_path, Compute())
    rest = Compute()
    assert_holds_the_features(build(tmp_path, rest))
    assert rest.calls == left
    assert "sha256" in json.loads((tmp_path / "index.json").read_text())


def test_a_second_builder_waits_and_finds_the_work_done(tmp_path: Path) -> None:
    begun, go_on, second = threading.Event(), threading.Event(), Compute()

    def slow(indices: list[int]) -> list[Tensor]:
        begun.set()
        assert go_on.wait(20)
        return Compute()(indices)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(build, tmp_path, slow)
        assert begun.wait(20)
        other = pool.submit(build, tmp_path, second)
        with pytest.raises(TimeoutError):
            other.result(0.2)
        go_on.set()
        first.result(20)
        assert_holds_the_features(other.result(20))
    assert second.calls == []


# --- Damage ----------------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": ("level_1.npy", flip_a_bit),
    "cut": ("level_0.npy", lambda path: os.truncate(path, path.stat().st_size - 10)),
    "gone": ("level_0.npy", Path.unlink),
    "header": ("level_0.npy", lambda path: path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])),
    "mask": ("done.npy", lambda path: os.truncate(path, 3)),
    "index": ("index.json", lambda path: path.write_text(path.read_text()[:100])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_repository_is_computed_again(built: Path, tmp_path: Path, damage: str) -> None:
    name, harm = DAMAGES[damage]
    harm(shutil.copytree(built, tmp_path / "copy") / name)
    again, lines = Compute(), []
    assert_holds_the_features(build(tmp_path / "copy", again, log=lines.append))
    assert [i for call in again.calls for i in call] == list(range(7))
    assert "copy is damaged (" in lines[0] and lines[0].endswith("every image is computed again")


# --- Refusals, and the size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"identity": "weights 2"}, "identity"),
        ({"names": NAMES[::-1]}, "names"),
        ({"shapes": SHAPES[::-1], "identity": "weights 2"}, "identity and shapes"),
    ],
)
def test_a_folder_of_other_features_is_refused(built: Path, changed: dict, said: str) -> None:
    compute = Compute()
    with pytest.raises(DataError, match=rf"the {said} of the features in .*whole are not .*: choose another folder"):
        build(built, compute, **changed)
    assert compute.calls == []


@pytest.mark.parametrize("value", [70_000.0, -70_000.0, math.nan, math.inf])
def test_a_value_beyond_half_precision_names_its_image(tmp_path: Path, value: float) -> None:
    broken = [level.clone() for level in FEATURES]
    broken[1][4, 2, 1, 1] = value
    with pytest.raises(ValueError, match="image 'plate_4' are not finite in half precision"):
        build(tmp_path, lambda indices: [level[indices] for level in broken])
    rest = Compute()
    build(tmp_path, rest)
    assert rest.calls == [[3, 4, 5], [6]]


@pytest.mark.parametrize("wrong", [lambda levels: levels[:1], lambda levels: levels[::-1]])
def test_features_of_other_shapes_are_refused(tmp_path: Path, wrong) -> None:
    with pytest.raises(ValueError, match=r"features have shapes .*, expected \[\(3, 4, 8, 8\), "):
        build(tmp_path, lambda indices: wrong(Compute()(indices)))


def test_the_size_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    lines, said = [], []

    def compute(indices: list[int]) -> list[Tensor]:
        said.append(list(lines))
        return [torch.zeros(len(indices), 2, 64, 64)]  # 16,384 bytes per image

    for missing in (7, 0):
        lines.clear()
        build(tmp_path, compute, shapes=((2, 64, 64),), log=lines.append)
        assert lines[0] == f"feature repository {tmp_path.name}: 0.1 MB, 7 images, {missing} to compute"
    assert len(lines) == 1 and [len(before) for before in said] == [1, 2, 3]
    assert said[1][1].startswith("  3 of 7 images, ")


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 7 * 2 * (4 * 8 * 8 + 6 * 4 * 4)
    free = Mock(side_effect=[SimpleNamespace(free=needed), SimpleNamespace(free=math.ceil(needed / 0.95) + 1)])
    monkeypatch.setattr(shutil, "disk_usage", free)
    compute = Compute(fails_at=0)
    with pytest.raises(OSError, match=f"{tmp_path}: {needed} bytes needed, {needed} free .*free some disk"):
        build(tmp_path, compute)  # room enough, were nothing to stay spare
    with pytest.raises(Killed):
        build(tmp_path, compute)
