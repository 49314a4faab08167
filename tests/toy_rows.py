"""A row on pretended data, run as a study runs one, for the tests of runs, records and files."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch

from defectlab import batch, runs
from defectlab.runs import Context, Record, Result
from defectlab.studies import Row, Study

PRINTS = {"data": "d1", "weights": "w1"}


@dataclass(frozen=True)
class Fake:
    model: ClassVar[str] = "fake"
    version: ClassVar[int] = 1

    dataset: str = "sets/tiles"
    width: int = 8
    layers: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class FakeWithAnotherField(Fake):
    dilation: int = 1  # the old behaviour


def fake_result(seed: int = 0, npz_values: int = 5) -> Result:
    scores = np.random.default_rng(seed).random(npz_values)
    return Result(
        metrics={"image_auroc": 90.0 + seed},
        per_class={"crack": {"image_auroc": 80.0}},
        dev={"threshold": 0.5},
        curve={"loss": [1.0, 0.5]},
        predictions={"scores": scores, "names": np.array(["a", "b"])},
        model={"weight": torch.full((2,), float(seed))},
        costs={"parameters": 2},
        precision="fp32",
    )


class Fakes:
    """A row on pretended data whose runs give what `give(seed, context)` gives, and are counted in `calls`."""

    def __init__(self, give: Callable[..., Result] | None = None, **prints: str):
        self.give, self.prints, self.calls = give, PRINTS | prints, 0

    def compute(self, settings: Fake, seed: int, data: object, context: Context) -> Result:
        self.calls += 1
        return self.give(seed, context) if self.give else fake_result(seed)

    def run(
        self, seed: int = 0, profile: str = "quick", settings: Fake | None = None, log: Callable = lambda line: None
    ) -> Record:
        data = SimpleNamespace(label="pretended tiles")
        row = Row(settings or Fake(), self.compute, lambda settings, device: data, lambda settings: self.prints)
        study = Study("fakes", {profile: {"row": row}}, {}, ())
        return batch.run_row(study, row, seed, profile, Context(log=log))


def leftovers(root: Path) -> list[str]:
    """Every file below the project but the locks, which hold nothing."""
    return sorted(p.name for p in root.rglob("*") if p.is_file() and p.parent.name != "locks")


def key(settings: Fake | None = None, seed: int = 0, profile: str = "quick", **prints: str) -> str:
    settings = settings or Fake()
    row = runs.row_identity(settings, profile)
    return runs.make_key(settings.model, settings.dataset, profile, seed, row, PRINTS | prints)


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
