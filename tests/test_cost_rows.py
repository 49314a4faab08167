"""Rows of costs alone: counts by hand, and a record without metrics."""

import dataclasses
import math
from pathlib import Path

import pytest
from toy_runs import quiet

from defectlab import batch, runs
from defectlab.files import write_json
from defectlab.metrics.costs import parameters
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.model import Detector
from defectlab.studies import Row, Study
from defectlab.training.cost_rows import CostSettings, NoData, run_costs
from defectlab.verdicts import claims, measured, tables
from defectlab.verdicts.measured import value_of

SMALL = CostSettings(scale="t", size=64)


def test_costs_by_hand() -> None:
    result = run_costs(SMALL, 0, NoData(), quiet())
    weights = parameters(fused(Detector("v5", "t", 80)))
    assert result.costs["parameters_m"] == pytest.approx(weights / 1e6, abs=1e-4)
    assert result.costs["size_mb"] == pytest.approx(2 * weights / 1e6, abs=0.01)
    assert result.metrics == result.per_class == result.dev == result.curve == result.predictions == result.model == {}
    larger = run_costs(dataclasses.replace(SMALL, size=128), 0, NoData(), quiet())
    assert larger.costs["gflops"] == pytest.approx(4 * result.costs["gflops"], rel=0.02)  # of this very size


@pytest.mark.parametrize(("changes", "message"), [({"scale": "z"}, "unknown detector"), ({"size": 100}, "divisible")])
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_costs(dataclasses.replace(SMALL, **changes), 0, NoData(), quiet())


# --- A record without metrics ----------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of cost rows alone, with a printed table, in a folder of its own."""
    row = Row(SMALL, run_costs, lambda settings, device: NoData(), lambda settings: {"data": "none"}, primary=True)
    rows = {profile: {"cost_t": row} for profile in runs.PROFILES}
    costs_alone = Study("costs", rows, {"table5": "costs"}, (("map50",), ("fps", "parameters_m")))
    for part in (runs, tables, measured):
        monkeypatch.setattr(part, "project_root", lambda: tmp_path)
    for part in (tables, batch):
        monkeypatch.setattr(part, "study", lambda name: costs_alone)
    folder = tmp_path / "results" / "papers" / "costs"
    folder.mkdir(parents=True)
    header = "row,column,metric,unit,value,higher_is_better,status,key,not_comparable,source"
    lines = ["t,all,fps,images/s,144,true,runnable,cost_t,,Table V", "t,all,map50,%,76.4,true,runnable,cost_t,,Table V"]
    (folder / "table5.csv").write_text("\n".join([header, *lines, ""]))
    network = {"latency_ms": 8.0, "ratio": [1.0, 1.0, 1.0]}
    write_json(
        tmp_path / "results/costs/costs-cpu.json",
        {"device": "a CPU", "first": "cost_t"} | {"networks": {"cost_t": network}},
    )
    return costs_alone


def test_it_is_run_recorded_and_shown(study: Study) -> None:
    row = study.rows["quick"]["cost_t"]
    (record,) = batch.run_tasks(batch.tasks("costs", "quick"), "quick", "cpu", None, lambda line: None)
    assert record.key.startswith("detector_costs-none-quick-s0-")
    assert record.data_label == NoData().label == "none (no data needed)"
    assert record.metrics == {} and record.arrays == {} and not record.path.with_suffix(".safetensors").exists()
    assert math.isnan(value_of(record, "fps")) and math.isnan(value_of(record, "map50"))
    assert batch.run_row(study, row, 0, "quick", quiet()).content == record.content  # it is there already
    assert runs.promote([record])[0].startswith("recorded: ")

    table = tables.results_table("costs", "table5", "quick")
    fps, precision = (table[measured.METRIC_NAMES[metric]].loc["t"] for metric in ("fps", "map50"))
    assert (fps["recorded"], fps["this run"]) == ("125", "–")
    assert table.loc["t", ("", "note")] == "timed in turns, × of cost_t, on a CPU"
    assert fps["verdict"] == "cannot be judged (timed on another device)"
    assert precision["recorded"] == "–" and precision["verdict"] == "cannot be judged (the records lack it)"
    assert table.loc["t", ("", "profile")] == "quick"
    assert tables.per_class_table("costs", ["cost_t"], "map50", "quick").loc["cost_t", "all"] == "–"


@pytest.mark.parametrize(("bound", "verdict"), [(100, "holds"), (126, "does not hold")])
def test_a_claim_about_its_speed_is_judged_by_the_timings(study: Study, bound: float, verdict: str) -> None:
    record = batch.run_row(study, study.rows["quick"]["cost_t"], 0, "quick", quiet())
    claim = {"id": "fast", "kind": "bound", "a": "cost_t", "metric": "fps", "at_least": bound, "primary": False}
    found = {"quick": {"cost_t": [record]}}
    (judged,) = claims.judge([claim], found, "quick", timed=measured.timings("costs"))
    assert (judged.value, judged.device, judged.verdict) == (125.0, "a CPU", verdict)
    assert claims.judge([claim], found, "quick")[0].verdict == "not timed yet"
