"""Images of solar cells, each with the probability of a defect, as tensors on one device: ELPV.

2,624 grey images of 300 x 300 px, each a cell cut from an electroluminescence image of one of 44 modules, mono- or
polycrystalline (Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in
Electroluminescence Imagery", EU PVSEC 2018; Deitsch et al., "Automatic classification of defective photovoltaic module
cells in electroluminescence images", Solar Energy 185, 2019, and "Segmentation of photovoltaic module cells in
uncalibrated electroluminescence images", Machine Vision and Applications 32(4), 2021). There are no masks: a label is
0, 1/3, 2/3 or 1, the probability that the cell is defective. "Defective" here, by our choice: 2/3 or 1.

No split comes with the files, and they do not say which module a cell was cut from. So any split may have cells of one
module on both sides. One that draws cells by a hash of the name ("drawn") surely has: most of its test cells look like
a training cell, mostly one with nearly the same number, so numbers seem to go module by module. Our split ("blocks")
cuts between runs of numbers of one kind, where the leak check finds no pair. That two blocks share no module is likely,
and not known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from defectlab.data.images import check_size, decode, in_threads, to_square
from defectlab.data.splits import PARTS, SAMPLE, Named, Plan, draw_split, identity, locate, set_and_root, with_dev
from defectlab.data.synthetic import SYNTHETIC
from defectlab.files import DataError

ELPV, SYNTHETIC_CELL = "elpv", "synthetic_cell"
KINDS = ("mono", "poly")
CLASSES = ("functional", "defective")
DEFECTIVE = 0.5  # a cell is defective from this probability on: 2/3 and 1 are, 0 and 1/3 are not; ours
SPLITS = ("blocks", "drawn")
DEV, TEST = ((1, 180),), ((361, 900), (2145, 2216))  # numbers of cells, both kinds in each; ours
TEST_SHARE = 0.25  # of "drawn", and a tenth of the rest for dev
LINE = re.compile(r"(images/(cell\d+)\.\w+)\s+(0\.0|0\.3{3,}|0\.6{3,}7?|1\.0)\s+(mono|poly)\s*")  # of labels.csv


@dataclass(frozen=True)
class CellSplit(Named):
    images: Tensor  # (N, 1, S, S) uint8
    probability: Tensor  # (N,) float32: 0, 1/3, 2/3 or 1
    labels: Tensor  # (N,) int64, index in CLASSES: 1 = defective
    kind: Tensor  # (N,) int64, index in KINDS
    names: tuple[str, ...]  # cellNNNN


@dataclass(frozen=True)
class CellData:
    name: str  # as given to load_cells
    label: str  # as printed in tables
    train: CellSplit
    dev: CellSplit
    test: CellSplit
    fingerprint: str


def read_labels(path: Path, remedy: str) -> dict[str, tuple[str, float, str]]:
    """Name of a cell -> path of its image in the set, probability of a defect, kind; from a set's labels.csv.

    DataError (ending in `remedy`) where it cannot be read, a line is none of these, or a cell has two lines.
    """
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): {remedy}") from error
    for number, line in enumerate(lines, 1):
        if (match := LINE.fullmatch(line)) is None or match[2] in found:
            fault = "no image, probability (0, 1/3, 2/3, 1) and kind" if match is None else "a second label"
            raise DataError(f"{path}, line {number}: {line[:60]!r} is {fault}: {remedy}")
        found[match[2]] = match[1], float(match[3]), match[4]
    return found


def _within(cell: str, blocks: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= int(cell.removeprefix("cell")) <= last for first, last in blocks)


def _plan(name: str, split: str, root: Path | None) -> tuple[Plan, dict[str, tuple[str, float, str]]]:
    own_name, root = set_and_root(name, root)
    if own_name not in (ELPV, SYNTHETIC_CELL) or split not in SPLITS:
        choices = f"{ELPV}, {SAMPLE}{ELPV} or {SYNTHETIC_CELL}, split {' or '.join(SPLITS)}"
        raise DataError(f"there is no set of cells {name!r} with a split {split!r}: choose {choices}")
    label = "solar cells" if own_name == ELPV else SYNTHETIC[own_name].label
    plan = locate(own_name, label, f"{ELPV}.py --archive FILE", root)
    cells = read_labels(plan.folder / "labels.csv", plan.remedy)
    images = {path for path in plan.manifest.files if path.startswith("images/")}
    if odd := images.symmetric_difference(path for path, _, _ in cells.values()):
        fault = "has no line in labels.csv" if min(odd) in images else "is in labels.csv and missing"
        raise DataError(f"{plan.folder / min(odd)} {fault}: {plan.remedy}")
    if split == "blocks":
        dev, test = ([cell for cell in sorted(cells) if _within(cell, blocks)] for blocks in (DEV, TEST))
        found = (sorted(cells.keys() - {*dev, *test}), dev, test)
    else:
        strata = {cell: f"{kind} {CLASSES[probability > DEFECTIVE]}" for cell, (_, probability, kind) in cells.items()}
        content = {cell: plan.manifest.files[path][1] for cell, (path, _, _) in cells.items()}
        found = with_dev(strata, draw_split(strata, TEST_SHARE, "test", content), content)
    parts = dict(zip(PARTS, found, strict=True))
    if empty := [part for part, names in parts.items() if not names]:
        raise DataError(f"{plan.folder} has no cells for {empty[0]}: {plan.remedy}")
    whole = identity(f"{plan.manifest.fingerprint} defective from {DEFECTIVE}", parts.values())
    return replace(plan, parts=parts, fingerprint=whole), cells


def cells_fingerprint(name: str, split: str = "blocks", root: Path | None = None) -> str:
    """sha256 over the content of the set, the rule of the labels and the three lists of cells; no image is read."""
    return _plan(name, split, root)[0].fingerprint


def load_cells(
    name: str = ELPV, size: int = 300, split: str = "blocks", device="cpu", root: Path | None = None
) -> CellData:
    """Read the cells as tensors on `device`, resized to `size` x `size` px.

    `name`: "elpv", "sample/elpv", its committed sample, or "synthetic_cell". `split`: one of `SPLITS`. `root`: where
    data sets lie, by default `data_dir()`.
    Raises DataError naming the file and the remedy; ValueError for a size below 1.
    """
    check_size(size)
    plan, cells = _plan(name, split, root)

    def read(cell: str) -> np.ndarray:
        return to_square(decode(plan.folder / cells[cell][0], plan.remedy).convert("L"), size)[:1]

    def part_of(names: Sequence[str]) -> CellSplit:
        probability = torch.tensor([cells[cell][1] for cell in names])
        kind = torch.tensor([KINDS.index(cells[cell][2]) for cell in names])
        found = (np.stack(in_threads(read, names)), probability, (probability > DEFECTIVE).long(), kind)
        return CellSplit(*(torch.as_tensor(values).to(device) for values in found), names=tuple(names))

    return CellData(name, plan.label, *(part_of(plan.parts[part]) for part in PARTS), fingerprint=plan.fingerprint)
