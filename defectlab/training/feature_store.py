"""A feature repository: features of each image by a frozen network, computed once and kept on disk.

One folder: `level_0.npy` .. in half precision, (N, C, H, W), mapped into memory; `done.npy`, which images are there;
`index.json`, what the features are made of, and once all are there the sha256 of the levels. Images are marked as done
after their features are on disk, so that a killed build goes on where it was.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from defectlab.files import DataError, locked, write_json

INDEX = "index.json"
SPARE = 0.05  # of the free disk: never filled


def build(
    folder: Path,
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    compute: Callable[[list[int]], list[Tensor]],
    identity: str,
    batch: int = 64,
    log: Callable[[str], None] = print,
    late: Callable[[], bool] = lambda: False,
) -> list[np.ndarray]:
    """The features of the images `names`, (N, *shape) float16 per level, mapped into memory read-only; what is missing
    is computed first. One builder at a time: a second waits, and finds the work done.

    Args:
        compute: indices of at most `batch` images -> their features, (B, *shape) per level, on any device.
        identity: what the features are made of (hash of the weights, timesteps ...).
        late: whether to give up waiting for another builder (`files.Busy`).

    Raises:
        DataError: the folder holds features of another identity, other images or shapes.
        OSError: the disk has no room. ValueError: features of other shapes, or not finite in half precision.
    """
    made_of = {"identity": identity, "names": list(names), "shapes": [list(shape) for shape in shapes]}
    with locked(folder / ".lock", log, late=late):
        levels, done, sealed = _open(folder, made_of, log)
        missing = np.flatnonzero(~done).tolist()
        size, began = sum(level.nbytes for level in levels), time.monotonic()
        log(f"feature repository {folder.name}: {size / 1e6:.1f} MB, {len(names)} images, {len(missing)} to compute")
        for start in range(0, len(missing), batch):
            indices = missing[start : start + batch]
            for level, values in zip(levels, _checked(compute(indices), indices, made_of), strict=True):
                level[indices] = values
                level.flush()
            done[indices] = True
            done.flush()
            count = start + len(indices)
            log(f"  {count} of {len(missing)} images, {count / max(time.monotonic() - began, 1e-9):.1f} images/s")
        if missing or not sealed:
            write_json(folder / INDEX, made_of | {"sha256": _digest(folder, shapes)})
    return [np.load(path, mmap_mode="r") for path in _paths(folder, shapes)]


def load(levels: Sequence[np.ndarray], device: str | torch.device) -> list[Tensor]:
    """A whole repository on a device: (N, *shape) float16 per level."""
    return [torch.tensor(level, device=device) for level in levels]


def _open(
    folder: Path, made_of: dict[str, Any], log: Callable[[str], None]
) -> tuple[list[np.ndarray], np.ndarray, bool]:
    """The writable levels, which images are done, and whether the hash says so: those of an earlier build where they
    are sound, else new ones."""
    paths = _paths(folder, made_of["shapes"])
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if differs := [what for what, value in made_of.items() if index[what] != value]:
            raise DataError(
                f"the {' and '.join(differs)} of the features in {folder} are not those asked for: choose another "
                "folder, or delete this one"
            )
        sealed = "sha256" in index
        if sealed and index["sha256"] != _digest(folder, made_of["shapes"]):
            raise ValueError("not the bytes that were written")
        return [np.load(path, mmap_mode="r+") for path in paths], np.load(folder / "done.npy", mmap_mode="r+"), sealed
    except (OSError, ValueError, LookupError, TypeError) as error:  # missing, no JSON, no array, cut
        if (folder / INDEX).exists():
            log(f"  {folder.name} is damaged ({error}): every image is computed again")
    count = len(made_of["names"])
    needed, free = 2 * count * sum(map(math.prod, made_of["shapes"])), shutil.disk_usage(folder).free
    if needed > (1 - SPARE) * free:
        raise OSError(
            f"no room for the feature repository in {folder}: {needed} bytes needed, {free} free "
            f"({SPARE:.0%} of them stay spare): free some disk space, or choose another folder"
        )
    (folder / INDEX).unlink(missing_ok=True)
    new = zip(paths, made_of["shapes"], strict=True)
    levels = [open_memmap(path, "w+", np.float16, (count, *shape)) for path, shape in new]
    done = open_memmap(folder / "done.npy", "w+", bool, (count,))
    write_json(folder / INDEX, made_of)  # last: where it lies, the arrays are there
    return levels, done, False


def _checked(features: list[Tensor], indices: list[int], made_of: dict[str, Any]) -> list[np.ndarray]:
    """Computed features in half precision."""
    expected = [(len(indices), *shape) for shape in made_of["shapes"]]
    if (got := [tuple(level.shape) for level in features]) != expected:
        raise ValueError(f"features have shapes {got}, expected {expected}: `compute` or `shapes` is off")
    halves = [level.detach().half().cpu() for level in features]
    finite = torch.stack([level.flatten(1).isfinite().all(1) for level in halves]).all(0)
    if not finite.all():
        name = made_of["names"][indices[int((~finite).nonzero()[0])]]
        raise ValueError(
            f"features of image {name!r} are not finite in half precision (NaN, or beyond ±65504): scale them, or "
            "look for what made them"
        )
    return [level.numpy() for level in halves]


def _paths(folder: Path, shapes: Sequence[Sequence[int]]) -> list[Path]:
    return [folder / f"level_{k}.npy" for k in range(len(shapes))]


def _digest(folder: Path, shapes: Sequence[Sequence[int]]) -> str:
    """Over the files of all levels; about a second per GB where they are in the system's cache."""
    found = hashlib.sha256()
    for path in _paths(folder, shapes):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()
