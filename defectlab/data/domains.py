"""Defects of steel, magnetic tiles and circuit boards as three domains of grey square crops, 17 classes in all.

Steel: whole images of NEU-DET with defects of one class. Tiles: a square around the mask of each defective magnetic
tile. Boards: a square around a defect of DeepPCB. Images of one group show the same object (a tile under several
exposures, defects of one board image, copies of one file) and must not stand on both sides of an episode.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from defectlab.data.annotations import read_deep_pcb
from defectlab.data.anomaly import Sample, data_fingerprint, plan_of, read_mask
from defectlab.data.detection import DEEP_PCB_CLASSES, detection_fingerprint
from defectlab.data.images import check_size, decode, in_threads, to_square
from defectlab.data.pictures import load_pictures, pictures_fingerprint
from defectlab.data.splits import PARTS, SAMPLE, Named, here_or_sample, identity, locate, set_and_root, shuffled
from defectlab.data.tile_groups import tile_groups
from defectlab.files import DataError

THREE_DOMAINS, SYNTHETIC_DOMAINS = "three_domains", "synthetic_domains"
DOMAINS = ("steel", "tiles", "boards")
SETS = {
    THREE_DOMAINS: ("neu_det", "magnetic_tile", "deep_pcb"),
    SYNTHETIC_DOMAINS: ("synthetic_steel", "synthetic_tile", "synthetic_board"),
}
# ours: the rule of the crops, in pixels of the original
TILE_LEAST = 96  # a side
TILE_SHARE = 1.25  # the longer side of the box around the mask, times this
BOARD_SIDE = 64  # a tenth of an image
EACH_BOARD, EACH_CLASS = 4, 300  # crops of a class from one board image, and from all


@dataclass(frozen=True)
class Domain(Named):
    """Labels and groups lie on the CPU, where episodes are drawn."""

    name: str  # one of DOMAINS
    class_names: tuple[str, ...]
    images: Tensor  # (N, 1, S, S) uint8, on the device
    labels: Tensor  # (N,) int64, index in the class names
    groups: Tensor  # (N,) int64
    names: tuple[str, ...]  # N, all different


@dataclass(frozen=True)
class Domains:
    name: str  # as given to load_domains
    label: str  # as printed in tables
    domains: dict[str, Domain]  # in the order of DOMAINS
    fingerprint: str


def sets_of(name: str) -> dict[str, str]:
    """Domain -> name of its set; of "sample/three_domains" those sets that are not here by their samples. DataError
    for another name."""
    plain = name.removeprefix(SAMPLE)
    if plain not in SETS:
        raise DataError(f"there are no domains {name!r}: choose one of {', '.join(SETS)}")
    return dict(zip(DOMAINS, SETS[plain] if plain == name else map(here_or_sample, SETS[plain]), strict=True))


def domains_fingerprint(name: str, root: Path | None = None) -> str:
    """sha256 over the fingerprints of the three sets and the rule of the crops; no image is read."""
    steel, tiles, boards = sets_of(name).values()
    rule = f"domains: tiles {TILE_LEAST} {TILE_SHARE}, boards {BOARD_SIDE} {EACH_BOARD} {EACH_CLASS}"
    prints = (pictures_fingerprint(steel, root), data_fingerprint(tiles, root), detection_fingerprint(boards, root))
    return identity(rule, [prints])


def load_domains(name: str, size: int, device="cpu", root: Path | None = None) -> Domains:
    """Read the three domains, each image `size` x `size` px, on `device`.

    `name`: "three_domains", "synthetic_domains", or "sample/three_domains" (each set that is not here by its committed
    sample). `root`: where data sets lie, by default `data_dir()`. Raises DataError naming the file and the remedy;
    ValueError for a size below 1.
    """
    check_size(size)
    steel, tiles, boards = sets_of(name).values()
    found = (_steel(steel, size, root), _tiles(tiles, size, root), _boards(boards, size, root))
    domains = {kind: _domain(kind, *parts, device=device) for kind, parts in zip(DOMAINS, found, strict=True)}
    label = ("synthetic " if SYNTHETIC_DOMAINS in name else "") + "steel, tiles and boards"
    return Domains(name, label, domains, domains_fingerprint(name, root))


def _domain(kind: str, class_names: Sequence[str], images, labels, groups, names, device) -> Domain:
    tensors = torch.as_tensor(np.stack(images)).to(device), torch.as_tensor(labels), torch.as_tensor(groups)
    return Domain(kind, tuple(class_names), *tensors, names=tuple(names))


# --- Crops -----------------------------------------------------------------------------------------------------------


def window(centre: Sequence[float], side: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """left, top, right, bottom of a square around `centre` (x, y) in an image of `size` (width, height), moved inside;
    smaller where the image is."""
    side = min(side, *size)
    left, top = (min(max(round(middle - side / 2), 0), most - side) for middle, most in zip(centre, size, strict=True))
    return left, top, left + side, top + side


def tile_window(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The window around a mask (H, W) bool that is not empty."""
    ends = [np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (0, 1)]  # first and last column, row
    longest = max(last - first + 1 for first, last in ends)
    centre = [(first + last + 1) / 2 for first, last in ends]
    return window(centre, max(TILE_LEAST, round(TILE_SHARE * longest)), mask.shape[::-1])


def _cut(image: Image.Image, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """(1, size, size) uint8."""
    return to_square(image.convert("L").crop(box), size)[:1]


# --- The three sets: class names, images, labels, groups, names ------------------------------------------------------


def _steel(name: str, size: int, root: Path | None) -> tuple:
    """Images of the same pixels (the set has a pair) are one group."""
    data = load_pictures(name, size, "cpu", root)
    parts = [getattr(data, part) for part in PARTS]
    images, labels = (torch.cat([getattr(part, of) for part in parts]).numpy() for of in ("images", "labels"))
    first: dict[bytes, int] = {}
    groups = [first.setdefault(image.tobytes(), index) for index, image in enumerate(images)]
    return data.class_names, images, labels, groups, sum((part.names for part in parts), ())


def _tiles(name: str, size: int, root: Path | None) -> tuple:
    plan = plan_of(name, root)
    group = tile_groups({sample.path for samples in plan.parts.values() for sample in samples})

    def read(sample: Sample) -> np.ndarray | None:
        image = decode(plan.folder / sample.path, plan.remedy)
        mask = read_mask(plan.folder, sample, image.size, plan.remedy)
        return _cut(image, tile_window(mask), size) if mask.any() else None

    samples = [sample for sample in plan.parts["test"] if sample.mask]
    crops = zip(samples, in_threads(read, samples), strict=True)
    kept = [(sample, crop) for sample, crop in crops if crop is not None]
    kinds = tuple(kind for kind in plan.type_names if kind != "good")
    labels = [kinds.index(sample.type) for sample, _ in kept]
    names = [sample.path for sample, _ in kept]
    return kinds, [crop for _, crop in kept], labels, [group[path] for path in names], names


def _boards(name: str, size: int, root: Path | None) -> tuple:
    folder, root = set_and_root(name, root)
    plan = locate(folder, folder, f"{folder}.py", root)
    boards = read_deep_pcb(plan.folder, DEEP_PCB_CLASSES).images
    of = {  # name of a crop -> number of its board, of its box there
        f"{board.path.relative_to(plan.folder).as_posix()} {box}": (number, box)
        for number, board in enumerate(boards)
        for box in range(len(board.labels))
    }
    drawn, seen = Counter(), Counter()
    chosen: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for crop in shuffled(list(of), "domains"):
        number, box = of[crop]
        label = int(boards[number].labels[box])
        if seen[number, label] < EACH_BOARD and drawn[label] < EACH_CLASS:
            seen[number, label] += 1
            drawn[label] += 1
            chosen[number].append((box, crop))

    def read(number: int) -> list[np.ndarray]:
        board, image = boards[number], decode(boards[number].path, plan.remedy)
        corners = (board.boxes[box].tolist() for box, _ in chosen[number])
        centres = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in corners]
        return [_cut(image, window(centre, BOARD_SIDE, image.size), size) for centre in centres]

    numbers = sorted(chosen)
    images = [crop for crops in in_threads(read, numbers) for crop in crops]
    groups, boxes, names = zip(*((number, *one) for number in numbers for one in chosen[number]), strict=True)
    labels = [int(boards[number].labels[box]) for number, box in zip(groups, boxes, strict=True)]
    return DEEP_PCB_CLASSES, images, labels, groups, names
