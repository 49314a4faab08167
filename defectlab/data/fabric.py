"""AITEX fabric for methods that learn from defects: tiles with masks on both sides of the split, and whole strips.

Silvestre-Blanes et al., "A Public Fabric Database for Defect Detection Methods and Results", AUTEX Research Journal 19,
2019. The tiles are those of `load_anomaly("aitex")`, at full resolution; here the training part has its defective
tiles, too. `dev` is a quarter of the training part. A strip is on one side; so are its neighbours that may be one roll,
of defective strips. Good strips are drawn one by one: of 133 pairs of consecutive numbers 62 are on two sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from defectlab.data.anomaly import AITEX, AITEX_PIXELS, SYNTHETIC_FABRIC, Sample, read_mask
from defectlab.data.images import decode, in_threads
from defectlab.data.splits import PARTS, Named, Plan, draw_split, identity, locate, set_and_root
from defectlab.data.synthetic import SYNTHETIC
from defectlab.files import DataError

DEV_SHARE = 0.25  # of the good and of the defective tiles of the training part


@dataclass(frozen=True)
class FabricSplit(Named):
    """N tiles and their masks, as tensors on one device."""

    images: Tensor  # (N, 1, S, S) uint8; S = 256, in the committed sample less
    masks: Tensor  # (N, S, S) uint8, 1 = defect
    labels: Tensor  # (N,) uint8, 1 = defective
    types: Tensor  # (N,) uint8, index into FabricData.type_names, 0 = "good"
    names: tuple[str, ...]  # PART/KIND/STRIP_K


@dataclass(frozen=True)
class FabricData:
    name: str  # as given to load_fabric
    label: str  # as printed in tables
    type_names: tuple[str, ...]  # "good" first
    train: FabricSplit
    dev: FabricSplit
    test: FabricSplit
    strips: dict[str, tuple[np.ndarray, np.ndarray]]  # of the test part, whole: image (H, W) uint8, mask (H, W) bool
    fingerprint: str


def rolls(strips: Iterable[str]) -> dict[str, str]:
    """Strip -> the first strip of its roll: neighbours in number with one kind of defect on one fabric are taken for
    one roll. Strips as the set names them: 0001_002_00 is strip 1, defect 002 (000: none), fabric 00."""
    found: dict[str, str] = {}
    runs = groupby(enumerate(sorted(strips)), lambda at: (int(at[1][:4]) - at[0], at[1][5:]))
    for _, run in runs:
        names = [strip for _, strip in run]
        found |= dict.fromkeys(names, names[0])
    return found


def _strip_of(path: str) -> str:
    return Path(path).stem[:11]


def _plan(name: str, root: Path | None) -> Plan:
    own_name, root = set_and_root(name, root)
    if own_name not in (AITEX, SYNTHETIC_FABRIC):
        raise DataError(f"there is no fabric {name!r}: choose {AITEX} or {SYNTHETIC_FABRIC}")
    label = "AITEX fabric" if own_name == AITEX else SYNTHETIC[own_name].label
    plan = locate(own_name, label, "aitex.py --archive FILE", root)
    tiles = {part: [p for p in sorted(plan.manifest.files) if p.startswith(f"{part}/")] for part in ("train", "test")}
    kinds = {path: path.split("/")[1] for paths in tiles.values() for path in paths}
    defective = rolls({_strip_of(path) for path, kind in kinds.items() if kind != "good"})
    together = {path: defective.get(_strip_of(path), _strip_of(path)) for path in kinds}
    dev: set[str] = set()
    for good in (True, False):
        strata = {path: kinds[path] for path in tiles["train"] if (kinds[path] == "good") == good}
        if strata:  # a sample has no defects to train on
            dev |= set(draw_split(strata, DEV_SHARE, "fabric dev", together))
    train = [path for path in tiles["train"] if path not in dev]
    parts = dict(zip(PARTS, (train, sorted(dev), tiles["test"]), strict=True))
    content = AITEX_PIXELS if own_name == AITEX and not plan.manifest.note else plan.manifest.fingerprint
    type_names = ("good", *sorted(set(kinds.values()) - {"good"}))
    return replace(plan, parts=parts, fingerprint=identity(content, parts.values()), type_names=type_names)


def fabric_fingerprint(name: str, root: Path | None = None) -> str:
    """sha256 over the content of the set and the three lists of tiles; no image is read."""
    return _plan(name, root).fingerprint


def _read(path: str, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    kind, stem = path.split("/")[1], Path(path).stem
    image = decode(plan.folder / path, plan.remedy).convert("L")
    sample = Sample(path, kind, None if kind == "good" else f"ground_truth/{kind}/{stem}_mask.png")
    return np.asarray(image), read_mask(plan.folder, sample, image.size, plan.remedy)


def load_fabric(name: str, device="cpu", root: Path | None = None) -> FabricData:
    """Read the tiles, whole, as tensors on `device`, and the whole strips that the set has of its test part.

    `name`: "aitex" or "synthetic_fabric"; "sample/" before it: its committed sample, which has no defects to train on.
    `root`: where data sets lie, by default `data_dir()`. Raises DataError naming the file and the remedy.
    """
    plan = _plan(name, root)
    if not plan.parts["train"] or not plan.parts["test"]:
        raise DataError(f"{plan.folder} has no tiles to train on or to test on: delete it, then {plan.remedy}")
    splits = {}
    for part, paths in plan.parts.items():
        images, masks = zip(*in_threads(partial(_read, plan=plan), paths), strict=True)
        if odd := [path for path, image in zip(paths, images, strict=True) if image.shape != (images[0].shape[1],) * 2]:
            raise DataError(f"{plan.folder / odd[0]} is no square tile of the size of the others: {plan.remedy}")
        types = torch.tensor([plan.type_names.index(path.split("/")[1]) for path in paths], dtype=torch.uint8)
        arrays = (torch.from_numpy(np.stack(images))[:, None], torch.from_numpy(np.stack(masks).astype(np.uint8)))
        tensors = (*arrays, (types > 0).to(torch.uint8), types)
        splits[part] = FabricSplit(*(t.to(device) for t in tensors), tuple(path[:-4] for path in paths))
    return FabricData(name, plan.label, plan.type_names, **splits, strips=_strips(plan), fingerprint=plan.fingerprint)


def _strips(plan: Plan) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The whole strips of which tiles are in the test part."""
    tested = {_strip_of(path) for path in plan.parts["test"]}
    found = {}
    for path in sorted(plan.manifest.files):
        if path.startswith("whole_strips/") and "_mask" not in path and (strip := _strip_of(path)) in tested:
            image = decode(plan.folder / path, plan.remedy).convert("L")
            mask = path.replace(strip, f"{strip}_mask")
            sample = Sample(path, mask=mask if mask in plan.manifest.files else None)
            found[strip] = (np.asarray(image), read_mask(plan.folder, sample, image.size, plan.remedy))
    return found
