"""Cloth, tiles and nuts as one set, for one model of all three, and images of other sets as foreign ones."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from defectlab.data.anomaly import (
    AITEX,
    PARTS,
    SYNTHETIC_SETS,
    TILES_GROUPED,
    AnomalyData,
    AnomalySplit,
    data_fingerprint,
    load_anomaly,
    plan_of,
    read_split,
)
from defectlab.data.splits import SAMPLE, here_or_sample, identity, shuffled
from defectlab.files import DataError

POOLED, SYNTHETIC_POOLED = "pooled", "synthetic_pooled"
KINDS = ("cloth", "tile", "nut")  # what the sets of a pool show, in their order
TILE, NUT, FABRIC = SYNTHETIC_SETS
POOLS = {POOLED: (AITEX, TILES_GROUPED, "mvtec_ad/metal_nut"), SYNTHETIC_POOLED: (FABRIC, TILE, NUT)}


def sets_of(name: str) -> dict[str, str]:
    """Kind -> name of the set, of a pool; of "sample/pooled" those sets that are not here by their samples.
    DataError for another name."""
    plain = name.removeprefix(SAMPLE)
    if plain not in POOLS:
        raise DataError(f"there is no pool {name!r}: choose one of {', '.join(POOLS)}")
    found = POOLS[plain] if plain == name else map(here_or_sample, POOLS[plain])
    return dict(zip(KINDS, found, strict=True))


def is_pool(name: str) -> bool:
    return name.removeprefix(SAMPLE) in POOLS


def others(name: str) -> tuple[str, ...]:
    """The sets of the pool that a set is in, without it. DataError where it is in none."""
    for sets in POOLS.values():
        if name in sets:
            return tuple(other for other in sets if other != name)
    raise DataError(f"the set {name!r} is in no pool: choose one of {', '.join(n for s in POOLS.values() for n in s)}")


def pooled_fingerprint(name: str, root: Path | None = None) -> str:
    """sha256 over the fingerprints of the sets; no image is read."""
    return identity(name, [[data_fingerprint(one, root) for one in sets_of(name).values()]])


def foreign_fingerprint(name: str, root: Path | None = None) -> str:
    return identity("foreign", [[data_fingerprint(one, root) for one in others(name)]])


def load_pooled(name: str, size: int, device="cpu", root: Path | None = None) -> AnomalyData:
    """The sets of a pool, one after the other in each part; types are "cloth nep", "nut bent" ..., "good" is shared.
    Errors and `size` as in `load_anomaly`."""
    sets = {kind: load_anomaly(one, size, device, root) for kind, one in sets_of(name).items()}
    type_names = ("good", *(f"{kind} {t}" for kind, data in sets.items() for t in data.type_names[1:]))
    parts = {part: _joined([_retyped(getattr(d, part), k, d, type_names) for k, d in sets.items()]) for part in PARTS}
    fingerprint = pooled_fingerprint(name, root)
    return AnomalyData(name, "cloth, tiles and nuts", type_names, **parts, fingerprint=fingerprint)


def _retyped(split: AnomalySplit, kind: str, data: AnomalyData, type_names: tuple[str, ...]) -> AnomalySplit:
    """With types that index `type_names`."""
    numbers = [0, *(type_names.index(f"{kind} {name}") for name in data.type_names[1:])]
    return replace(split, types=torch.tensor(numbers, dtype=torch.uint8, device=split.types.device)[split.types.long()])


def _joined(splits: list[AnomalySplit]) -> AnomalySplit:
    tensors = ("images", "masks", "labels", "types", "has_mask")
    found = {name: torch.cat([getattr(split, name) for split in splits]) for name in tensors}
    names, sizes = (sum((getattr(split, of) for split in splits), ()) for of in ("names", "original_sizes"))
    return AnomalySplit(**found, names=names, original_sizes=sizes)


def foreign_images(name: str, size: int, device="cpu", root: Path | None = None, each: int = 64) -> Tensor:
    """Training images of the other sets of the pool, uint8 (M, 3, size, size): up to `each` of every one, the same
    ones always."""
    found = []
    for other in others(name):
        plan = plan_of(other, root)
        chosen = set(shuffled([sample.name for sample in plan.parts["train"]], "foreign")[:each])
        found.append(read_split([s for s in plan.parts["train"] if s.name in chosen], plan, size, device).images)
    return torch.cat(found)
