"""What a study is: its rows as data, the tables that show them, and the metrics that the tables have."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

from defectlab.data.splits import here_or_sample
from defectlab.files import DataError, WeightsError
from defectlab.runs import RECORDED, Context, Result, check_profile
from defectlab.training.cost_rows import NoData

MORE = {"smoke": 1, "quick": 3, "paper": 5}  # seeds, of the rows that most claims rest on
FEW = {"smoke": 1, "quick": 3, "paper": 3}  # of the others: a verdict needs three
PAPER_ONLY = {"smoke": 1, "quick": 0, "paper": 3}  # of rows that would take a night in quick
ONCE = {"smoke": 1, "quick": 1, "paper": 1}  # of stages and teachers that serve all seeds of what follows


Needs = Callable[[Any, int], list[tuple[Any, int]]]


def needs_nothing(settings: Any, seed: int) -> list[tuple[Any, int]]:
    return []


def needs_of(settings: Any, seed: int) -> list[tuple[Any, int]]:
    """For a row that looks at another one's network, of the same seed."""
    return [(settings.of, seed)]


@dataclass(frozen=True)
class Row:
    """One row of a study at one profile: what is computed, how, from what, and how often.

    run: (settings, seed, data, context) -> result. load: (settings, device) -> data, which has a `label`.
    fingerprints: settings -> what the row is computed from, by name ("data", "weights"); DataError or WeightsError
    where that is not on this machine. seeds: how many the profile plans. primary: comes first in a batch. optional:
    left out of a batch where its data or weights are not on this machine. needs: (settings, seed) -> settings and seed
    of each other row of the study at the same profile whose result it reads.
    """

    settings: Any
    run: Callable[[Any, int, Any, Context], Result]
    load: Callable[[Any, str], Any]
    fingerprints: Callable[[Any], dict[str, str]]
    seeds: int = 1
    primary: bool = False
    optional: bool = False
    needs: Needs = needs_nothing

    def fingerprints_here(self) -> dict[str, str] | None:
        """What the row would be computed from on this machine; None where data or weights are not there, or cannot
        be read."""
        try:
            return self.fingerprints(self.settings)
        except (DataError, WeightsError, OSError):
            return None


def kept(read: Callable, *names: str, sets: int = 2) -> Callable[[Any, str], Any]:
    """For `Row.load`: what `read` gives for these fields of the settings and the device; the last `sets` stay in
    memory."""
    remembered = lru_cache(maxsize=sets)(read)
    return lambda settings, device: remembered(*(getattr(settings, name) for name in names), str(device))


def rows_by_kind(
    settings: Mapping[str, Any],
    kinds: Mapping[type, tuple[Callable, ...]],
    seeds_of: Callable[[str, Any], int],
    primary: Collection[str],
    optional: Collection[str],
) -> dict[str, Row]:
    """Name -> row, for settings by name. `kinds`: run, load, fingerprints and, where it needs any, needs by
    the type of the settings."""

    def row(name: str, of: Any) -> Row:
        run, load, fingerprints, *needs = kinds[type(of)]
        marks = {"primary": name in primary, "optional": name in optional} | ({"needs": needs[0]} if needs else {})
        return Row(of, run, load, fingerprints, seeds=seeds_of(name, of), **marks)

    return {name: row(name, of) for name, of in settings.items()}


def cost_row(settings: Any, run: Callable[[Any, int, Any, Context], Result], profile: str) -> Row:
    """A row that needs no data, once."""
    return Row(settings, run, lambda *_: NoData(), lambda _: {}, ONCE[profile])


def changed_at_every_depth(settings: Any, change: Callable[[str, Any], Any]) -> Any:
    """Settings in which each field, also of settings inside them, is what `change(name, value)` makes of it."""
    changes = {}
    for one in fields(settings):
        value = getattr(settings, one.name)
        inner = is_dataclass(value)
        changes[one.name] = changed_at_every_depth(value, change) if inner else change(one.name, value)
    return replace(settings, **changes)


def _untrained(name: str, value: Any) -> Any:
    lacking = name in ("teacher", "encoder") and value.startswith(("resnet", "wide_resnet"))
    return "resnet18_random" if lacking else value


def _real_images(name: str, value: Any) -> Any:
    return here_or_sample(value) if name == "dataset" else value


def to_look_at(row: Row) -> Row:
    """A row of quick for the profile `recorded`, in which nothing is trained: real images, of the whole set or, where
    that is not on this machine, of its sample; a network's own weights are random."""

    def load(settings: Any, device: str) -> Any:
        return row.load(changed_at_every_depth(settings, _real_images), device)

    return replace(row, settings=changed_at_every_depth(row.settings, _untrained), load=load, seeds=0)


@dataclass(frozen=True)
class Study:
    """rows: profile -> name -> row; `recorded` is added (see `to_look_at`). tables: name of a printed table -> its
    caption. metrics: the groups of metrics that tables of the study show, the headline first."""

    title: str
    rows: Mapping[str, Mapping[str, Row]]
    tables: Mapping[str, str]
    metrics: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        shown = {name: to_look_at(row) for name, row in self.rows.get("quick", {}).items()}
        object.__setattr__(self, "rows", {**self.rows, RECORDED: shown})

    def pick(self, profile: str, wanted: list[str] | None = None) -> dict[str, Row]:
        """Name -> row, in the study's order; every row where `wanted` is None. ValueError for an unknown name."""
        rows = self.rows[check_profile(profile)]
        unknown = [name for name in wanted or [] if name not in rows]
        if unknown:
            raise ValueError(f"unknown row {unknown[0]!r}: use some of {', '.join(rows)}")
        return dict(rows) if wanted is None else {name: rows[name] for name in wanted}

    def row_with(self, settings: Any, profile: str) -> Row:
        """The row that has these settings: a teacher, a stage. ValueError where the study has none."""
        for row in self.rows[check_profile(profile)].values():
            if row.settings == settings:
                return row
        raise ValueError(f"no row of {self.title!r} at profile {profile} has the settings {settings}: add one")
