"""How a set is split where nobody did: by names and contents, never by a seed of a run."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

SPLIT_VERSION = 1  # raise when `draw_split` or a reader changes what a set gives: it enters the fingerprint


def _shuffled(names: list[str], purpose: str) -> list[str]:
    """A fixed order that looks random: by hash, so it depends on no library's random numbers and on no other name."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{purpose} {name}".encode()).digest())


# ------------------------------------------------------------------------------------------------------------- splits


def draw_split(strata: Mapping[str, str], share: float, purpose: str, content: Mapping[str, str]) -> list[str]:
    """Draw `share` of the names, sorted: the same part of each stratum, as nearly as whole pictures allow.

    `strata`: name to stratum. `content`: name to a hash of its bytes; names of one content are drawn together or not
    at all. Within a stratum the order is that of the sha256 of "purpose name", so the draw depends on no library's
    random numbers. A group of one content is passed over where it would exceed the share.
    """
    groups = defaultdict(list)
    for name in sorted(strata):
        groups[content[name]].append(name)
    by_stratum = defaultdict(list)
    for names in groups.values():
        by_stratum[strata[names[0]]].append(names)

    def order(names: list[str]) -> str:
        return hashlib.sha256(f"{purpose} {names[0]}".encode()).hexdigest()

    ranked = []  # (position in its stratum as a part of 1, tie breaker, names)
    for members in by_stratum.values():
        members.sort(key=order)
        ranked += [((i + 0.5) / len(members), order(names), names) for i, names in enumerate(members)]
    wanted = min(max(1, round(share * len(strata))), len(strata) - 1)
    drawn: list[str] = []
    for _, _, names in sorted(ranked):
        if len(drawn) + len(names) <= wanted:
            drawn += names
    return sorted(drawn)


def _number(path: str) -> int:
    return int(re.search(r"(\d+)\.\w+$", path)[1])


def _last_fifth(strata: Mapping[str, str]) -> list[str]:
    """The highest numbers of each class, a fifth of them (at least one)."""
    by_class = defaultdict(list)
    for path, stratum in strata.items():
        by_class[stratum].append(path)
    return [p for paths in by_class.values() for p in sorted(paths, key=_number)[-max(1, round(len(paths) / 5)) :]]


def with_dev(
    strata: Mapping[str, str], test: Sequence[str], content: Mapping[str, str]
) -> tuple[list[str], list[str], list[str]]:
    """train, dev, test: all that is not in `test` is for training, a tenth of that is held out."""
    chosen = set(test)
    rest = {name: stratum for name, stratum in strata.items() if name not in chosen}
    dev = draw_split(rest, 0.1, "dev", content)
    return sorted(rest.keys() - set(dev)), dev, sorted(chosen)


def split_identity(content: str, splits: Sequence[Sequence[str]]) -> str:
    identity = hashlib.sha256(f"{content} detection {SPLIT_VERSION}\n".encode())
    for names in splits:
        identity.update("".join(f"{name}\n" for name in names).encode() + b"\n")
    return identity.hexdigest()
