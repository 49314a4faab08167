"""A run's context that says nothing, and rows run as a study runs them, for the tests of trainings."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from defectlab import batch
from defectlab.runs import Context, Record, Result
from defectlab.studies import Row


def quiet(**options: Any) -> Context:
    return Context(**({"log": lambda line: None} | options))


def one_sitting(checkpoint: Path | None = None, **options: Any) -> Context:
    """A context whose time is up: a training stops after its next epoch."""
    return quiet(checkpoint=checkpoint, deadline=time.monotonic() - 1, **options)


class AnyRow:
    """What a row of a toy study needs; what real ones may ask for, is tested with their studies."""

    def __contains__(self, other: Any) -> bool:
        return True


class ToyStudy:
    """Has a row for whatever settings it is asked for; `run` gives what runs a row of such settings."""

    def __init__(self, run: Callable[[Any], Callable[..., Result]], load: Callable[[Any, str], Any]):
        self.run, self.load = run, load

    def row_with(self, settings: Any, profile: str) -> Row:
        prints = {"data": "toy", "weights": "random"}
        return Row(settings, self.run(settings), self.load, lambda settings: prints, needs=lambda *_: AnyRow())


def runs_of(run: Callable[[Any], Callable[..., Result]], load: Callable[[Any, str], Any]) -> Callable[..., Record]:
    """run_row(settings, seed) -> record, in the smoke profile on the CPU, by `ToyStudy(run, load)`."""
    study = ToyStudy(run, load)

    def run_row(settings: Any, seed: int = 0, **options: Any) -> Record:
        return batch.run_row(study, study.row_with(settings, "smoke"), seed, "smoke", quiet(**options))

    return run_row


def recorded(project: Path) -> dict[str, dict]:
    """What the records of a project's smoke runs hold, by their keys."""
    return {path.stem: json.loads(path.read_text()) for path in (project / "runs" / "smoke").glob("*.json")}
