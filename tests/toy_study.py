"""A study without data and without training, in the command line's own process."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from defectlab import batch
from defectlab.__main__ import main
from defectlab.runs import Context, Result
from defectlab.studies import Row, study

REAL = study("bsdrd")


class FakeStudy:
    """BSDRD without data and without training: `computed` has (row, seed) of every run, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computed: list[tuple[str, int]] = []
        self.run = lambda settings, seed, data, context: fake_result(seed)  # what tests put another in place of
        self.needs = lambda settings, seed: []
        self.prints = lambda settings: {"data": "d", "weights": "w"}
        self.rows = {p: {name: self.row(name, row) for name, row in rows.items()} for p, rows in REAL.rows.items()}
        self.study = dataclasses.replace(REAL, rows=self.rows)
        monkeypatch.setattr(batch, "study", lambda name: self.study if name == "bsdrd" else study(name))

    def row(self, name: str, row: Row) -> Row:
        def run(settings, seed: int, data, context: Context) -> Result:
            result = self.run(settings, seed, data, context)
            self.computed.append((name, seed))
            return result

        load = lambda settings, device: SimpleNamespace(label="pretended tiles")  # noqa: E731
        return dataclasses.replace(
            row,
            run=run,
            load=load,
            fingerprints=lambda settings: self.prints(settings),
            needs=lambda *of: self.needs(*of),
        )


def fake_result(seed: int) -> Result:
    metrics = {"image_auroc": 90.0 + seed, "pixel_auroc": 80.0, "aupro": 70.0}
    return Result(metrics, {}, {}, {"loss": [1.0]}, {"scores": np.zeros(3)}, {}, {}, "fp32")


def raising(error: BaseException, bad: int) -> Callable[..., Result]:
    """A run that fails at seed `bad` alone."""

    def run(settings, seed: int, data, context: Context) -> Result:
        if seed == bad:
            raise error
        return fake_result(seed)

    return run


def call(line: str) -> int:
    return main(line.split())
