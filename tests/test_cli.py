"""The command line, called in this process: its errors, its order, its time budget."""

import dataclasses
import errno
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from toy_study import FakeStudy, call

from defectlab import batch, reproduce, runs
from defectlab.files import DataError
from defectlab.runs import Context, OutOfTime, Result
from defectlab.studies import STUDIES


@pytest.fixture
def fake(root: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStudy:
    return FakeStudy(monkeypatch)


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run nonsense", "invalid choice: 'nonsense' (choose from 'reverse_distillation', 'bsdrd',"),
        ("run bsdrd --profile fast", "invalid choice: 'fast' (choose from 'smoke', 'quick', 'paper')"),
        ("run bsdrd --seeds one", "argument --seeds: invalid"),
        ("run bsdrd --seeds 1,1", "argument --seeds: invalid"),
        ("run bsdrd --seeds=-1", "argument --seeds: invalid"),
        ("run bsdrd --minutes soon", "argument --minutes: invalid"),
        *((f"run bsdrd --minutes {text}", "argument --minutes: invalid") for text in ("-5", "0", "nan", "inf")),
        *((f"{command} --minutes 0", "argument --minutes: invalid") for command in ("reproduce", "detect --data x")),
        *((f"{command} bsdrd --rows ,", "argument --rows: invalid") for command in ("run", "status", "record")),
        *((f"run bsdrd --{option}=", f"argument --{option}: invalid") for option in ("rows", "seeds", "tasks")),
        ("reproduce --notebooks=", "argument --notebooks: invalid"),
        ("reproduce --notebooks ,", "argument --notebooks: invalid"),
        ("run bsdrd --workers 0", "argument --workers: invalid"),
        ("run", "the following arguments are required: study"),
        ("nonsense", "invalid choice: 'nonsense'"),
        ("", "the following arguments are required: COMMAND"),
        ("score --images x", "one of the arguments --model --train-good is required"),
        ("detect --images x", "one of the arguments --data --model is required"),
        ("detect --data x --format txt", "argument --format: invalid choice"),
        ("reproduce --profile fast", "invalid choice: 'fast'"),
        ("reproduce --seeds 1,1", "argument --seeds: invalid"),
        ("reproduce --jobs 0", "argument --jobs: invalid"),
    ],
)
def test_arguments_that_cannot_be_understood(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(line)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert message.replace("'", "") in shown.replace("'", "")  # Python 3.12 quotes the choices no more


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run bsdrd --rows rd4ad,rd5ad", "unknown row 'rd5ad': use some of rd4ad, struct_only"),
        ("status bsdrd --rows rd5ad", "unknown row 'rd5ad'"),
        ("run bsdrd --tasks rd5ad:0", "unknown row 'rd5ad'"),
        ("run bsdrd --tasks rd4ad", "--tasks takes ROW:SEED"),
        ("run bsdrd --tasks bsdrd/rd4ad:0", "--tasks takes ROW:SEED"),
        ("run all --tasks rd4ad:0", "--tasks takes STUDY/ROW:SEED"),
        ("run all --rows rd4ad", "rows belong to a study"),
        ("run bsdrd --device tpu", "device 'tpu' is not available here: use auto, cpu"),
        ("record --rows rd4ad", "--rows and --seeds need a study"),
    ],
)
def test_values_that_do_not_exist(line: str, message: str, fake: FakeStudy, capsys) -> None:
    assert call(line) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert len(shown.splitlines()) == 1
    assert fake.computed == []


def test_a_row_that_the_profile_does_not_plan(fake: FakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    """It is neither a crash nor silence; with its seeds it runs."""
    fake.rows["quick"]["rd4ad"] = dataclasses.replace(fake.rows["quick"]["rd4ad"], seeds=0)
    note = "not part of quick: name its seeds to run it, as in --seeds 0"
    assert call("status bsdrd --rows rd4ad,bsdrd") == 0
    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=1) == ["rd4ad", note]
    for command in ("run bsdrd --rows rd4ad,bsdrd", "run bsdrd --rows rd4ad", "record bsdrd --rows rd4ad"):
        assert call(command) == 1
        assert capsys.readouterr().err == f"error: rd4ad: {note}\n"
    assert fake.computed == []
    assert call("run bsdrd --rows rd4ad --seeds 0 --device cpu") == 0
    assert fake.computed == [("rd4ad", 0)]


def test_status_of_all_studies_and_of_a_row_that_quick_leaves_out(root: Path, capsys) -> None:
    assert call("status --profile paper") == call("status d3n --rows student_300") == 0
    shown = capsys.readouterr().out
    for line in ("reverse_distillation (paper): row", "bsdrd (paper): row", "student_300  not part of quick: name its"):
        assert line in shown


def test_missing_data_name_the_script(root: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("DEFECTLAB_DATA", str(root / "data"))
    assert call("run bsdrd --rows rd4ad --seeds 0 --device cpu") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "python data_scripts/magnetic_tile.py" in shown


def test_optional_rows_are_left_out_where_their_data_lack(fake: FakeStudy) -> None:
    rows = fake.rows["quick"]

    def prints(settings) -> dict[str, str]:
        if settings == rows["struct_only"].settings:
            raise DataError("no such set")
        return {"data": "d", "weights": "w"}

    fake.prints = prints
    assert "struct_only" in {t.name for t in batch.tasks("bsdrd", "quick")}  # not optional: an error when it is run
    for name in ("struct_only", "patchcore"):
        rows[name] = dataclasses.replace(rows[name], optional=True)
    left = {t.name for t in batch.tasks("bsdrd", "quick")}
    assert "struct_only" not in left
    assert "patchcore" in left  # optional, and there
    assert {t.name for t in batch.tasks("bsdrd", "quick", ["struct_only"])} == {"struct_only"}  # named: listed


@pytest.mark.parametrize("line", ["status", "record", "report --profile quick"])
@pytest.mark.parametrize("content", ["{", "[]", '{"key": 1}'])
def test_corrupt_record_is_one_error_and_no_traceback(root: Path, capsys, line: str, content: str) -> None:
    path = runs.runs_dir("quick") / "notes.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert call(line) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path} is not a readable record") and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "module", "goes_on"),
    [
        ("run bsdrd --device cpu", "defectlab.__main__.chosen", True),
        ("reproduce", "defectlab.reproduce.reproduce", True),
        ("score --images x --train-good y", "defectlab.own.score.score", True),
        ("score --images x --model y", "defectlab.own.score.score", False),
        ("detect --data x", "defectlab.own.detect.detect", True),
        ("detect --model x --images y", "defectlab.own.detect.detect", False),
        ("status", "defectlab.batch.status_lines", False),
        ("bench bsdrd", "defectlab.bench.bench", False),
    ],
)
def test_interrupted_by_the_user(monkeypatch, capsys, line: str, module: str, goes_on: bool) -> None:
    """It says that the same command goes on where it does."""
    monkeypatch.setattr(module, Mock(side_effect=KeyboardInterrupt))
    assert call(line) == 130
    how = "; the same command goes on from what is finished and from the last checkpoint (one a minute)"
    assert capsys.readouterr().err == f"stopped{how if goes_on else ''}\n"


def test_a_gpu_that_is_too_small_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("defectlab.own.detect.detect", Mock(side_effect=torch.OutOfMemoryError("Out of memory\nSee")))
    assert call("detect --data x --format voc") == 1
    assert capsys.readouterr().err.startswith("error: Out of memory: take --device cpu, or images of a smaller")


def test_what_a_terminal_cannot_print_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(batch, "status_lines", lambda *_: ["fußplatte"])
    assert call("status bsdrd") == 0
    shown.flush()
    assert shown.buffer.getvalue().split() == [b"fu\\xdfplatte"]


@pytest.mark.parametrize(
    "line", ["run bsdrd", "run bsdrd --workers 2", "report --profile quick", "reproduce --profile quick"]
)
def test_a_read_only_checkout_is_one_error(fake: FakeStudy, root: Path, monkeypatch, capsys, line: str) -> None:
    """Before any work, with the folder and the remedy."""

    def refuse(*_, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(root))

    for module, name in ((Path, "mkdir"), (tempfile, "TemporaryFile"), (reproduce.papermill, "execute_notebook")):
        monkeypatch.setattr(module, name, refuse)
    assert call(line) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: {root}/runs/quick\S* cannot be written \(Read-only file system\): make it writable", said)
    assert fake.computed == []


WINDOWS = """
import distributed  # of other people: on Linux it needs them
import importlib, pkgutil, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
import defectlab
from defectlab.__main__ import main
for module in pkgutil.walk_packages(defectlab.__path__, "defectlab."):
    importlib.import_module(module.name)
assert main(["status", "bsdrd", "--rows", "rd4ad"]) == 0
main(["score", "--help"])
"""


def test_all_of_the_package_goes_without_what_windows_lacks() -> None:
    done = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bsdrd (quick): row") and "--train-good" in done.stdout


# --- Running and recording -------------------------------------------------------------------------------------------


def test_status_lists_rows_in_the_order_of_running(fake: FakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("status bsdrd") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    rows = fake.rows["quick"]
    shown = dict(line.split(maxsplit=1) for line in lines)
    assert list(shown) == sorted(rows, key=lambda row: not rows[row].primary)
    assert head.split() == ["bsdrd", "(quick):", "row", "recorded", "here", "missing"]
    assert {line.index("-") for line in lines} == {head.index("recorded")}  # columns under their headings
    assert shown["rd4ad"].split() == ["-", "-", "0,1,2"]
    assert [shown[row].split()[-1] for row in ("gate_equal", "gate_equal_grouped")] == ["0", "0,1,2"]
    call("run bsdrd --rows rd4ad --seeds 0,2 --device cpu")
    call("record bsdrd --seeds 2")
    capsys.readouterr()
    call("status bsdrd --rows rd4ad")
    assert capsys.readouterr().out.splitlines()[1].split() == ["rd4ad", "2", "0,2", "1"]


def test_run_computes_what_is_missing_headline_rows_first(fake: FakeStudy, capsys) -> None:
    assert call("run bsdrd --rows gate_equal,bsdrd,rd4ad --seeds 0,1 --device cpu") == 0
    first = [("bsdrd", 0), ("rd4ad", 0), ("bsdrd", 1), ("rd4ad", 1), ("gate_equal", 0), ("gate_equal", 1)]
    assert fake.computed == first
    assert "[6/6] bsdrd gate_equal seed 1 (quick, cpu)" in capsys.readouterr().out
    call("run bsdrd --rows bsdrd --seeds 0,2 --device cpu")
    assert fake.computed[6:] == [("bsdrd", 2)]
    assert call("run bsdrd --tasks gate_equal:3,bsdrd:4 --device cpu") == 0
    assert fake.computed[7:] == [("gate_equal", 3), ("bsdrd", 4)]  # as listed


def test_all_means_every_study_and_a_shared_row_once(root: Path, synthetic: Path, monkeypatch) -> None:
    monkeypatch.setenv("DEFECTLAB_DATA", str(synthetic))
    listed = batch.tasks("all", "smoke")
    primary = [task.row.primary for task in listed]
    assert {task.study for task in listed} == set(STUDIES) and primary == sorted(primary, reverse=True)
    known = {(runs.row_identity(t.row.settings, "smoke"), t.seed) for t in listed}
    alone = [task for name in STUDIES for task in batch.tasks(name, "smoke")]
    assert len(known) == len(listed) < len(alone)
    assert known == {(runs.row_identity(t.row.settings, "smoke"), t.seed) for t in alone}
    with pytest.raises(ValueError, match="rows belong to a study: name it in place of 'all'"):
        batch.tasks("all", "smoke", ["rd4ad"])


def test_tasks_of_all_are_named_by_study(fake: FakeStudy) -> None:
    assert call("run all --tasks bsdrd/gate_equal:3,bsdrd/bsdrd:4 --device cpu") == 0
    assert fake.computed == [("gate_equal", 3), ("bsdrd", 4)]


def test_no_minutes_stop_cleanly(fake: FakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run bsdrd --minutes 1e-9 --device cpu") == 0
    assert fake.computed == []
    assert re.search(r"1e-09 minutes are used up: (\d+) of \1 left; run again to go on", capsys.readouterr().out)


def test_a_row_that_runs_out_of_time_stops_the_batch_cleanly(fake: FakeStudy, capsys) -> None:
    def out_of_time(settings, seed: int, data, context: Context) -> Result:
        assert context.deadline is not None
        raise OutOfTime("time budget used up after epoch 1 of 10; run again to go on")

    fake.run = out_of_time
    assert call("run bsdrd --minutes 5 --device cpu") == 0
    shown = capsys.readouterr().out
    assert "after epoch 1 of 10; run again" in shown and "[2/" not in shown
    assert runs.read_records(runs.runs_dir("quick")) == []


@pytest.mark.parametrize(
    ("metrics", "costs", "line"),
    [
        ({"map50": 70.04, "kl": 1.0}, {"parameters_m": 2.7}, "map50 70.0"),
        ({"unexplained": 12.34, "kl": 0.5}, {}, "unexplained 12.3, kl 0.5"),
        ({}, {"parameters_m": 2.7}, "parameters_m 2.70"),
        ({}, {}, "done"),
    ],
)
def test_the_line_of_a_finished_run_shows_what_its_row_has(metrics: dict, costs: dict, line: str) -> None:
    assert batch.headline(runs.Record({"metrics": metrics, "costs": costs}, Path("run.json")), "d3n") == line


def test_record_promotes_finished_runs(fake: FakeStudy, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("record") == 0
    assert capsys.readouterr().out.startswith("no finished run in")
    call("run bsdrd --rows rd4ad,bsdrd --seeds 0,1 --device cpu")
    capsys.readouterr()
    assert call("record bsdrd --rows bsdrd --seeds 1") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    (record,) = runs.read_records(root / "results" / "runs")
    assert (record.row, record.seed) == (runs.row_identity(fake.rows["quick"]["bsdrd"].settings, "quick"), 1)
    assert call("record") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["already recorded", "recorded", "recorded", "recorded"]
    assert call("run bsdrd --rows rd4ad --profile smoke --device cpu") == 0
    assert call("record --profile smoke") == 1
    assert "is a smoke run on synthetic data" in capsys.readouterr().err
