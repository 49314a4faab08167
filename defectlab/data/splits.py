"""A set before any image is read: where it lies, how it is split, and the fingerprint of both.

Splits depend on the names and contents of the files, never on a seed of a run.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from defectlab.data.fetch import MANIFEST, Manifest, quick_check
from defectlab.data.synthetic import SYNTHETIC, ensure_synthetic
from defectlab.files import DataError, data_dir, project_root

PARTS = ("train", "dev", "test")
SAMPLE = "sample/"  # before the name of a real set: its committed sample
# What enters a fingerprint besides files and names (pasted defects, recipes, rules of a split) is known by a digest of
# what it gives, which tests/test_data_fingerprints.py holds. Records older than the digests know these by a number.
_RECORDED = dict.fromkeys(("2f5ebef63256b8b1", "0a45cca9e4abcf4a", "82d8c3912da43740", "379610ebd6a97d37"), "1")
DETECTION_SPLITS = "82d8c3912da43740"  # digest of what `draw_split`, `with_dev` and `letterbox` give


def content_id(digest: str) -> str:
    """The name of a content in fingerprints: its digest, or the number by which committed records know it."""
    return _RECORDED.get(digest, digest)


@dataclass(frozen=True)
class Plan:
    """A set before any image is read."""

    folder: Path
    label: str  # as printed in tables
    remedy: str  # how error messages end
    manifest: Manifest | None  # None for a reader's own folder
    parts: dict[str, list] = field(default_factory=dict)  # "train", "dev", "test": what to read
    fingerprint: str = ""
    type_names: tuple[str, ...] = ()  # anomaly sets: "good" first

    def held(self, listed: Iterable[str], present: Container[str]) -> list[str]:
        """What a published list means here: all its names, but of a sample those that are present."""
        whole = not self.manifest.note.startswith("sample")
        return [name for name in listed if whole or name in present]


class Named:
    """A split whose images have names."""

    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)


def samples_dir() -> Path:
    """Where the committed samples lie: a few images of each real set, in its layout (see SOURCES.toml there)."""
    return project_root() / "results" / "samples"


def set_and_root(name: str, root: Path | None) -> tuple[str, Path | None]:
    """A set as its readers know it, and where it lies: `sample/NAME` is the committed sample of NAME."""
    return (name.removeprefix(SAMPLE), samples_dir()) if name.startswith(SAMPLE) else (name, root)


def folder_of(name: str) -> str:
    """The folder of a set, also by the name of its sample, of another split or of another form of it."""
    return re.sub("_(index|published|grouped|pair)$", "", name.removeprefix(SAMPLE))


def here_or_sample(name: str) -> str:
    """The name of a real set where it lies in `data_dir()`, else of its sample; a synthetic set is always there."""
    folder = folder_of(name)
    return name if folder in SYNTHETIC or (data_dir() / folder / MANIFEST).is_file() else SAMPLE + name


def locate(folder: str, label: str, command: str, root: Path | None) -> Plan:
    """The set in `folder` below the data root, checked as by `quick_check`; a synthetic one is written on first use.

    `command`: the script in data_scripts that fetches it, with its options.
    """
    root = data_dir() if root is None else Path(root)
    if folder in SYNTHETIC:
        manifest, remedy = ensure_synthetic(root, folder), f"delete {root / folder} and load it again"
    else:
        remedy = f"run `python data_scripts/{command}`"
        if root == samples_dir():
            remedy = "restore it from the repository"
        manifest = quick_check(root / folder, remedy)
    note = manifest.note and f" ({manifest.note}{'' if manifest.note.startswith('sample') else ' copy'})"
    return Plan(root / folder, label + note, remedy, manifest)


def identity(content: str, parts: Iterable[Iterable[str]]) -> str:
    """sha256 over `content` and the names of each part."""
    lists = "".join("".join(f"{name}\n" for name in names) + "\n" for names in parts)
    return hashlib.sha256(f"{content}\n{lists}".encode()).hexdigest()


def detection_identity(content: str, parts: Iterable[Iterable[str]]) -> str:
    return identity(f"{content} detection {content_id(DETECTION_SPLITS)}", parts)


# ------------------------------------------------------------------------------------------------------------- splits


def read_list(path: Path) -> list[str]:
    """The lines of a list of names, but for comments and empty ones. DataError where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): fetch the set again") from error
    return [line for line in lines if line.strip() and not line.startswith("#")]


def shuffled(names: list[str], purpose: str) -> list[str]:
    """A fixed order that looks random: by hash, so it depends on no library's random numbers and on no other name."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{purpose} {name}".encode()).digest())


def draw_split(strata: Mapping[str, str], share: float, purpose: str, content: Mapping[str, str]) -> list[str]:
    """Draw `share` of the names, sorted: the same part of each stratum, as nearly as whole images allow.

    `strata`: name -> stratum. `content`: name -> hash of its bytes; names of one content are drawn together or not at
    all, and passed over where they would exceed the share. The order is by hash, as in `shuffled`.
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


def number_of(path: str) -> int:
    """The digits at the end of a file's stem."""
    return int(re.search(r"(\d+)\.\w+$", path)[1])


def last_fifth(strata: Mapping[str, str]) -> list[str]:
    """The highest numbers of each class, a fifth of them (at least one)."""
    by_class = defaultdict(list)
    for path, stratum in strata.items():
        by_class[stratum].append(path)
    return [p for paths in by_class.values() for p in sorted(paths, key=number_of)[-max(1, round(len(paths) / 5)) :]]


def with_dev(
    strata: Mapping[str, str], test: Iterable[str], content: Mapping[str, str]
) -> tuple[list[str], list[str], list[str]]:
    """train, dev, test: all that is not in `test` is for training, a tenth of that is held out."""
    chosen = set(test)
    rest = {name: stratum for name, stratum in strata.items() if name not in chosen}
    dev = draw_split(rest, 0.1, "dev", content)
    return sorted(rest.keys() - set(dev)), dev, sorted(chosen)
