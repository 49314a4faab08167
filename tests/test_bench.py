"""The timings of a study's networks: in turns, as deployed, on an idle machine, and what is written."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from defectlab import bench
from defectlab.__main__ import main
from defectlab.papers import yolo_dcf
from defectlab.studies import STUDIES, study


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(bench, "project_root", lambda: tmp_path)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 4.0)
    return tmp_path / "results" / "costs"


def test_networks_take_turns_and_the_clock_counts_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, called = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def call(name: str, seconds: float):
        called.append(name)
        clock[0] += seconds

    calls = {"a": lambda: call("a", 2.0), "b": lambda: call("b", 3.0)}
    times = bench.alternating(calls, torch.device("cpu"), 30)
    assert times == {"a": [2.0] * 30, "b": [3.0] * 30}
    rounds = list(zip(called[::2], called[1::2], strict=True))
    assert len(rounds) == 33 and set(rounds) == {("a", "b"), ("b", "a")}  # an order of its own each
    assert bench.ratio([2.0, 3, 4, 5, 6], [1.0] * 5) == (4.0, 3.0, 5.0)


def test_the_table_and_the_file(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    networks = {row: (torch.nn.Linear(4, size), torch.zeros(1, 4)) for row, size in (("small", 1), ("large", 9))}
    monkeypatch.setattr(bench, "networks_of", lambda name, device: networks)
    monkeypatch.setattr(bench, "alternating", lambda calls, device, n: {"small": [0.002] * n, "large": [0.006] * n})
    assert main(["bench", "yolo_dcf", "--device", "cpu"]) == 0
    assert "6.00 ms  x3.00 [3.00, 3.00]  large" in capsys.readouterr().out
    found = json.loads((root / "yolo_dcf-cpu.json").read_text())
    assert (found["threads"], found["busy_percent"], found["repeats"]) == (torch.get_num_threads(), 4.0, 30)
    assert found["networks"]["large"] == {"size": 4, "parameters_m": 0.0, "latency_ms": 6.0, "ratio": [3.0, 3.0, 3.0]}


def test_a_busy_machine_and_few_repeats_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 50.0)
    assert main(["bench", "yolo_dcf", "--device", "cpu"]) == 1
    assert "other work uses 50 % of this machine: end it, or say --busy" in capsys.readouterr().err
    assert main(["bench", "yolo_dcf", "--repeats", "29"]) == 1
    assert "must be 30 or more, got 29" in capsys.readouterr().err
    assert not root.exists()


def test_networks_of_every_kind_run_on_their_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of each kind of settings; detectors fused."""
    rows = {type(row.settings): (name, row) for of in STUDIES for name, row in study(of).rows["recorded"].items()}
    assert set(bench.BUILD) <= set(rows)
    planned = {name: replace(row, seeds=1, optional=False) for name, row in rows.values()}
    one_each = {"recorded": dict(rows.values()), "quick": planned}
    monkeypatch.setattr(bench, "study", lambda name: SimpleNamespace(rows=one_each))
    found = bench.networks_of("every", "cpu")
    assert set(found) == {rows[kind][0] for kind in bench.BUILD}
    with torch.inference_mode():
        for network, image in found.values():
            network(image)
    whole = found[rows[yolo_dcf.Settings][0]][0]
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in whole.modules())
