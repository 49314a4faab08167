"""A feature repository: what a frozen network says of each image, computed once and read from disk by name.

On disk, one folder: shards `shard-00000.safetensors` in half precision, one key an image, under it one flat vector
(the image's levels, one after the other); and `index.json`, which names the images and the sha256 of every shard.
A shard and then the index are written aside and renamed, so a killed build loses at most the shard it was in, and a
shard that the index does not know counts as missing. Reading maps the files into memory: no image is read that is
not asked for.
"""

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from defectlab.files import DataError, locked, write_atomically, write_json

INDEX = "index.json"
SPARE = 0.05  # of the free disk: never filled
AGAIN = "build the repository again, only missing and damaged shards are computed"

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Index:
    """The content of `index.json`. `files`: name of a shard -> its sha256, bytes and names of images."""

    identity: str
    shapes: list[list[int]]
    shard: int  # images a shard
    files: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Repository:
    """The features of `names`, in that order, each image with one map a level of `shapes` (without batch axis).

    Made by `build_repository` or `Repository.open`. Files that were opened stay mapped as long as this object lives;
    it cannot be pickled, so another process opens its own.
    """

    folder: Path
    names: tuple[str, ...]
    shapes: Shapes
    index: Index
    _opened: dict[int, safe_open] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(cls, folder: Path, identity: str, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> "Repository":
        """The finished repository in `folder`.

        DataError where it is missing, unfinished, unreadable or made of something else. The shards themselves are
        not looked at: `read` finds those that are missing or cut, `verify` every changed byte.
        """
        index = _read_index(folder)
        if index is None:
            raise DataError(f"{folder / INDEX} is missing: build the repository first")
        repository = cls(folder, tuple(names), _as_shapes(shapes), index)
        repository._check(identity)
        if lacking := [n for n in range(repository.shards) if _file(n) not in index.files]:
            raise DataError(f"{folder} lacks {len(lacking)} of {repository.shards} shards: {AGAIN}")
        return repository

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shards(self) -> int:
        """The number of files."""
        return math.ceil(len(self) / self.index.shard)

    @property
    def bytes(self) -> int:
        """On disk, of all shards."""
        return sum(entry["bytes"] for entry in self.index.files.values())

    def read(self, indices: Sequence[int] | Tensor) -> list[Tensor]:
        """Half-precision features of the images at `indices` (any order, repeats allowed): (B, *shape) a level.

        DataError where a shard is missing or cannot be read, IndexError for a number that no image has.
        """
        indices = torch.as_tensor(indices).tolist()
        for i in indices:
            if not 0 <= i < len(self):
                raise IndexError(f"image {i} was asked for, {self.folder} holds 0 to {len(self) - 1}")
        levels = [torch.empty(len(indices), *shape, dtype=torch.float16) for shape in self.shapes]
        opened = {n: self._shard(n) for n in {i // self.index.shard for i in indices}}
        sizes = [math.prod(shape) for shape in self.shapes]
        for row, i in enumerate(indices):
            n = i // self.index.shard
            try:
                parts = opened[n].get_tensor(self.names[i]).split(sizes)  # views of the mapped file
                for level, part in zip(levels, parts, strict=True):
                    level[row] = part.view(level.shape[1:])
            except (SafetensorError, RuntimeError, ValueError) as error:  # no such key, or of another size
                raise DataError(f"{self.folder / _file(n)} is damaged ({error}): {AGAIN}") from error
        return levels

    def load(self, device: str | torch.device, dtype: torch.dtype = torch.float16) -> list[Tensor]:
        """The whole repository on a device: (N, *shape) a level. Beyond that it takes the memory of one shard."""
        levels = [torch.empty(len(self), *shape, dtype=dtype, device=device) for shape in self.shapes]
        for n in range(self.shards):
            images = self.images(n)
            for level, part in zip(levels, self.read(images), strict=True):
                level[images.start : images.stop] = part
        return levels

    def verify(self) -> list[int]:
        """Numbers of the shards that are not there with the bytes that were written.

        Every byte is read: about a second a GB where the files are in the system's cache.
        """
        return [n for n in range(self.shards) if not self._sound(n)]

    def images(self, n: int) -> range:
        """Which images shard `n` holds."""
        return range(n * self.index.shard, min((n + 1) * self.index.shard, len(self)))

    def _sound(self, n: int) -> bool:
        path, entry = self.folder / _file(n), self.index.files.get(_file(n))
        if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]

    def _shard(self, n: int) -> safe_open:
        """The mapped shard `n`. Its size is looked at each time: touching a mapped page that is gone is fatal."""
        path = self.folder / _file(n)
        if not path.is_file():
            raise DataError(f"{path} is missing: {AGAIN}")
        size, expected = path.stat().st_size, self.index.files[_file(n)]["bytes"]
        if size != expected:
            raise DataError(f"{path} is damaged ({size} bytes, expected {expected}): {AGAIN}")
        if n not in self._opened:
            try:
                self._opened[n] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise DataError(f"{path} is damaged ({error}): {AGAIN}") from error
        return self._opened[n]

    def _check(self, identity: str) -> None:
        """DataError unless the index speaks of these features of these images."""
        expected = {_file(n): [self.names[i] for i in self.images(n)] for n in range(self.shards)}
        if self.index.identity != identity:
            differs = f"made from {self.index.identity}, not from {identity}"
        elif (held := _as_shapes(self.index.shapes)) != self.shapes:
            differs = f"of shapes {held}, not {self.shapes}"
        elif odd := [file for file, entry in self.index.files.items() if entry["names"] != expected.get(file)]:
            differs = f"of other images (in {odd[0]})"
        else:
            return
        raise DataError(f"{self.folder} holds features {differs}: choose another folder, or delete this one")


def build_repository(
    folder: Path,
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    compute: Callable[[list[int]], list[Tensor]],
    identity: str,
    shard: int = 64,
    log: Callable[[str], None] = print,
) -> Repository:
    """Fill `folder` with the features of `names` (N, unique), or what is missing or damaged of them.

    compute: indices of at most `shard` images -> their features, (B, *shape) a level, on any device.
    identity: what the features are made of (hash of the weights, timesteps ...). A folder of another identity,
    other images or shapes is refused with a DataError. shard: images a file; a folder once begun keeps its own.

    The size is said before anything is computed. OSError where the disk has no room for it; ValueError for repeated
    names, features of other shapes, and values that half precision cannot hold (beyond ±65504, infinite, NaN).
    Shards that are there are read and compared with their sha256 (see `Repository.verify`). One builder at a time; a
    second waits for the first and finds its work done.
    """
    if min(len(names), shard) < 1:
        raise ValueError(f"a repository needs images and shards: got {len(names)} names, {shard} images a shard")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{times} images are named {name!r}: each image needs a name of its own")
    with locked(folder / ".lock", log):
        for left in folder.glob(".*-shard-*.safetensors"):  # a killed builder's; no other builder is at work
            left.unlink()
        try:
            index = _read_index(folder)
        except DataError:
            log(f"  {folder.name}/{INDEX} is damaged: every shard is computed again")
            index = None
        shapes = _as_shapes(shapes)
        index = index or Index(identity, [list(shape) for shape in shapes], shard)
        repository = Repository(folder, tuple(names), shapes, index)
        repository._check(identity)
        missing = repository.verify()
        _say_size(repository, missing, log)
        started, done = time.monotonic(), 0
        for n in missing:
            images = repository.images(n)
            _write_shard(repository, n, compute(list(images)))
            done += len(images)
            rate = done / max(time.monotonic() - started, 1e-9)
            log(f"  shard {n + 1} of {repository.shards}: {len(images)} images, {rate:.1f} images/s")
    return repository


def _say_size(repository: Repository, missing: list[int], log: Callable[[str], None]) -> None:
    """What will be there, what of it is damaged, what is yet to compute; OSError where the disk has no room."""
    folder, an_image = repository.folder, 2 * sum(math.prod(shape) for shape in repository.shapes)
    size = an_image * len(repository) / 1e6
    line = f"feature repository {folder.name}: {size:.1f} MB, {len(repository)} images, {repository.shards} shards"
    log(f"{line}, {len(missing)} of them to compute" if missing else f"{line}, all there")
    for n in missing:
        if _file(n) in repository.index.files:
            log(f"  {folder.name}/{_file(n)} is missing or damaged: computed again")
    needed = an_image * sum(len(repository.images(n)) for n in missing)
    free = shutil.disk_usage(folder).free
    if needed > (1 - SPARE) * free:
        raise OSError(
            f"no room for the feature repository in {folder}: {needed} bytes needed, {free} free "
            f"({SPARE:.0%} of them stay spare): free some disk space, or choose another folder"
        )


def _write_shard(repository: Repository, n: int, features: list[Tensor]) -> None:
    """One shard, then the index that knows it: between the two the shard counts as missing."""
    names = [repository.names[i] for i in repository.images(n)]
    expected = [(len(names), *shape) for shape in repository.shapes]
    if (got := [tuple(level.shape) for level in features]) != expected:
        raise ValueError(f"features of shard {n} have shapes {got}, expected {expected}: `compute` or `shapes` is off")
    flat = torch.cat([level.detach().half().flatten(1).cpu() for level in features], dim=1)  # (B, values)
    finite = flat.isfinite().all(1)
    if not finite.all():
        name = names[int((~finite).nonzero()[0])]
        raise ValueError(
            f"features of image {name!r} are not finite in half precision (NaN, or beyond ±65504): scale them, or "
            "look for what made them"
        )
    content = save(dict(zip(names, flat, strict=True)))
    write_atomically(repository.folder / _file(n), lambda aside: aside.write_bytes(content))
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "names": names}
    repository.index.files[_file(n)] = entry
    write_json(repository.folder / INDEX, asdict(repository.index))


def _read_index(folder: Path) -> Index | None:
    """None where there is none; DataError where it cannot be read."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        return Index(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): {AGAIN}") from error


def _file(n: int) -> str:
    return f"shard-{n:05d}.safetensors"


def _as_shapes(shapes: Sequence[Sequence[int]]) -> Shapes:
    return tuple(tuple(shape) for shape in shapes)
