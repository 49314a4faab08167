"""Rows of costs alone: counts and speed by hand, and a record without metrics."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from toy_runs import quiet

from defectlab import batch, runs
from defectlab.metrics import costs
from defectlab.metrics.costs import parameters
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.model import Detector
from defectlab.studies import Row, Study
from defectlab.training.cost_rows import CostSettings, NoData, run_costs
from defectlab.verdicts import claims, measured, tables
from defectlab.verdicts.measured import value_of

SMALL = CostSettings(scale="t", size=64)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """An image takes 8 ms, in a batch 4 ms; -> the shapes of what was timed."""
    seen: list[tuple[int, ...]] = []

    def seconds(model: torch.nn.Module, images: torch.Tensor, *options) -> float:
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())  # as deployed
        seen.append(tuple(images.shape))
        return 0.008 if len(images) == 1 else 0.004 * len(images)

    monkeypatch.setattr(costs, "inference_seconds", seconds)
    return seen


def test_costs_by_hand(clock: list[tuple[int, ...]]) -> None:
    result = run_costs(SMALL, 0, NoData(), quiet())
    weights = parameters(fused(Detector("v5", "t", 80)))
    assert result.costs["parameters_m"] == pytest.approx(weights / 1e6, abs=1e-4)
    assert result.costs["size_mb"] == pytest.approx(2 * weights / 1e6, abs=0.01)
    timed = [result.costs[name] for name in ("latency_ms", "fps")]
    assert "images_per_second_32" not in result.costs  # minutes on a CPU, and not what Table V asks
    assert timed == [8.0, 125.0]
    assert clock == [(1, 3, 64, 64)]
    assert result.metrics == result.per_class == result.dev == result.curve == result.predictions == result.model == {}
    larger = run_costs(dataclasses.replace(SMALL, size=128), 0, NoData(), quiet())
    assert larger.costs["gflops"] == pytest.approx(4 * result.costs["gflops"], rel=0.02)  # of this very size


@pytest.mark.parametrize(("changes", "message"), [({"scale": "z"}, "unknown detector"), ({"size": 100}, "divisible")])
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_costs(dataclasses.replace(SMALL, **changes), 0, NoData(), quiet())


# --- A record without metrics ----------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: list[tuple[int, ...]]) -> Study:
    """A study of cost rows alone, with a printed table, in a folder of its own."""
    row = Row(SMALL, run_costs, lambda settings, device: NoData(), lambda settings: {"data": "none"}, primary=True)
    rows = {profile: {"cost_t": row} for profile in runs.PROFILES}
    costs_alone = Study("costs", rows, {"table5": "costs"}, (("map50",), ("fps", "parameters_m")))
    for part in (runs, tables):
        monkeypatch.setattr(part, "project_root", lambda: tmp_path)
    for part in (tables, batch):
        monkeypatch.setattr(part, "study", lambda name: costs_alone)
    folder = tmp_path / "results" / "papers" / "costs"
    folder.mkdir(parents=True)
    header = "row,column,metric,unit,value,higher_is_better,status,key,not_comparable,source"
    lines = ["t,all,fps,1/s,144,true,runnable,cost_t,,Table V", "t,all,map50,%,76.4,true,runnable,cost_t,,Table V"]
    (folder / "table5.csv").write_text("\n".join([header, *lines, ""]))
    return costs_alone


def test_it_is_run_recorded_and_shown(study: Study) -> None:
    row = study.rows["quick"]["cost_t"]
    (record,) = batch.run_tasks("costs", batch.tasks("costs", "quick"), "quick", "cpu", None, lambda line: None)
    assert record.key.startswith("detector_costs-none-quick-s0-")
    assert record.data_label == NoData().label == "none (no data needed)"
    assert record.metrics == {} and record.arrays == {} and not record.path.with_suffix(".safetensors").exists()
    assert value_of(record, "fps") == 125.0 and math.isnan(value_of(record, "map50"))
    assert batch.run_row(study, row, 0, "quick", quiet()).content == record.content  # it is there already
    assert runs.promote([record])[0].startswith("recorded: ")

    table = tables.results_table("costs", "table5", "quick")
    fps, precision = (table[measured.METRIC_NAMES[metric]].loc["t"] for metric in ("fps", "map50"))
    assert fps["recorded"] == fps["this run"] == "125 n=1"
    assert fps["verdict"] == "cannot be judged (timed on another device)"
    assert precision["recorded"] == "–" and precision["verdict"] == "cannot be judged (the records lack it)"
    assert table.loc["t", ("", "profile")] == "quick"
    assert tables.per_class_table("costs", ["cost_t"], "map50", "quick").loc["cost_t", "all"] == "–"


def test_a_claim_about_its_speed_is_not_judged(study: Study) -> None:
    record = batch.run_row(study, study.rows["quick"]["cost_t"], 0, "quick", quiet())
    claim = {"id": "fast", "kind": "bound", "a": "cost_t", "metric": "fps", "at_least": 100, "primary": False}
    (judged,) = claims.judge([claim], {"quick": {"cost_t": [record]}}, "quick")
    assert judged.value == 125.0 and judged.device == record.device
    assert judged.verdict == "not judged: timings of different runs are not compared"
