"""Batches of rows: what fails, and what another process computes."""

import errno
import graphlib
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import UnidentifiedImageError
from safetensors import SafetensorError
from toy_study import FakeStudy, call, fake_result, raising

from defectlab import batch, runs
from defectlab.files import DataError, WeightsError, write_atomically
from defectlab.metrics.ranking import auroc
from defectlab.runs import Context, NonFiniteLoss, Result
from defectlab.studies import STUDIES, study
from defectlab.training.loop import resume


@pytest.fixture
def fake(root: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStudy:
    return FakeStudy(monkeypatch)


# --- Rows that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteLoss("the loss is not finite: epoch 2, batch 3 of 4"),
        torch.OutOfMemoryError("CUDA out of memory.\nAnd pages of advice"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        ValueError("predicted boxes or scores are not finite"),
        UnidentifiedImageError("cannot identify image file 'tile_7.png'"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "tile_7.png"),
        OSError(errno.EROFS, "Read-only file system"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_row_that_fails_is_named_with_the_kind_and_the_others_run(fake: FakeStudy, capsys, error: Exception) -> None:
    fake.run = raising(error, 1)
    assert call("run bsdrd --rows rd4ad --seeds 0,1,2 --device cpu") == 1
    assert [seed for _, seed in fake.computed] == [0, 2]
    assert sorted(record.seed for record in runs.read_records(runs.runs_dir("quick"))) == [0, 2]
    said, kind = capsys.readouterr(), type(error).__name__
    reason = (str(error) or kind).splitlines()[0]
    assert said.err == f"error: bsdrd rd4ad seed 1 ({kind}): {reason}\n"
    assert f"  failed ({kind}): {reason}\n" in said.out


def test_each_row_that_fails_is_named(fake: FakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    """For data and weights that are missing or locked away, and for predictions that are not finite."""
    rows = fake.rows["quick"]
    errors = {
        "rd4ad": DataError("no such set"),
        "struct_only": WeightsError("no such teacher"),
        "gate_equal": PermissionError(errno.EACCES, "Permission denied", "tile_7.png"),
    }

    def prints(settings) -> dict[str, str]:
        for name, error in errors.items():
            if settings == rows[name].settings:
                raise error
        return {"data": "d", "weights": "w"}

    def diverged(settings, seed: int, data, context: Context) -> Result:
        if settings == rows["detail_only"].settings:
            auroc(np.array([0.5, np.nan]), np.array([0, 1]))
        return fake_result(seed)

    fake.prints, fake.run = prints, diverged
    assert call("run bsdrd --rows rd4ad,struct_only,gate_equal,detail_only,bsdrd --seeds 0 --device cpu") == 1
    assert fake.computed == [("bsdrd", 0)]
    said = capsys.readouterr().err
    assert all(f"{name} seed 0 ({type(error).__name__}): {error}" in said for name, error in errors.items())
    assert "detail_only seed 0 (ValueError): scores contain NaN" in said


@pytest.mark.parametrize("content", [b"of another version", b""])
def test_a_stale_checkpoint_does_not_stop_the_batch(fake: FakeStudy, capsys, content: bytes) -> None:
    def trains(settings, seed: int, data, context: Context) -> Result:
        if seed == 0:
            context.checkpoint.parent.mkdir(parents=True)
            context.checkpoint.write_bytes(content)
        weights = torch.nn.Linear(2, 2)
        resume(context, weights, torch.optim.SGD(weights.parameters()), 3)
        return fake_result(seed)

    fake.run = trains
    assert call("run bsdrd --rows rd4ad --seeds 0,1 --device cpu") == 1
    assert fake.computed == [("rd4ad", 1)]
    said = capsys.readouterr().err
    assert re.search(r"error: bsdrd rd4ad seed 0 \(ValueError\): .*does not continue this training .*: delete it", said)


def test_an_unreadable_record_fails_its_own_row_alone(fake: FakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run bsdrd --rows rd4ad --seeds 0 --device cpu") == 0
    (path,) = runs.runs_dir("quick").glob("*.json")
    path.write_text("{")
    (path.parent / "foreign.json").write_text("[]")
    capsys.readouterr()
    assert call("run bsdrd --rows rd4ad --seeds 1,0,2 --device cpu") == 1
    assert fake.computed[1:] == [("rd4ad", 1), ("rd4ad", 2)]
    said = capsys.readouterr()
    assert said.err.startswith(f"error: bsdrd rd4ad seed 0 (ValueError): {path} is not a readable record")
    assert all(f"left out: {one} is not" in said.out for one in (path, path.parent / "foreign.json"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        DataError("the disk is full"),
    ],
    ids=["disk", "quota", "weights", "data"],
)
def test_a_full_disk_stops_the_batch(fake: FakeStudy, capsys, error: Exception) -> None:
    """It is the other rows', too."""

    def run(settings, seed: int, data, context: Context) -> Result:
        if isinstance(error, DataError):
            raise error from OSError(errno.ENOSPC, "No space left on device")
        write_atomically(context.checkpoint, Mock(side_effect=error))
        return fake_result(seed)

    fake.run = run
    assert call("run bsdrd --rows rd4ad --seeds 0,1,2 --device cpu") == 1
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and re.search("disk space$|disk is full$", said.err)
    assert "[1/3]" in said.out and "[2/3]" not in said.out


# --- Rows that another process computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("asked_by", ["rd4ad", "bsdrd"])
def test_a_row_that_another_process_computes_comes_last(fake: FakeStudy, asked_by: str) -> None:
    """A row, or one that needs it as a teacher. Only with nothing else left it is waited for."""
    settings = fake.rows["quick"]["rd4ad"].settings
    identity = runs.row_identity(settings, "quick")
    key = runs.make_key(settings.model, settings.dataset, "quick", 0, identity, fake.prints(settings))
    lock, lines = FileLock(runs.runs_dir("quick") / "locks" / key), []

    def needs_a_teacher(of, seed: int, data, context: Context) -> Result:
        if of != settings and seed == 0:
            context.require(settings, 0)
        return fake_result(seed)

    def log(line: str) -> None:
        lines.append(line)
        if line == f"  waits for another process that is at locks/{key}":
            assert fake.computed == [(asked_by, 1), (asked_by, 2)]
            lock.release()

    fake.run = needs_a_teacher
    fake.needs = lambda of, seed: [(settings, 0)] if of != settings and seed == 0 else []
    Path(lock.lock_file).parent.mkdir(parents=True)
    lock.acquire()
    batch.run_tasks(batch.tasks("bsdrd", "quick", [asked_by], [0, 1, 2]), "quick", "cpu", None, log)
    assert fake.computed[2:] == [("rd4ad", 0), ("bsdrd", 0)][: 1 + (asked_by == "bsdrd")]
    assert lines[1] == f"  another process is at locks/{key}: left for later"
    assert sum(key in line for line in lines) == 2


def test_the_minutes_end_a_wait(fake: FakeStudy) -> None:
    (task,) = batch.tasks("bsdrd", "quick", ["rd4ad"], [0])
    key, _ = batch.key_and_prints(task.row, 0, "quick")
    lock, lines = FileLock(runs.runs_dir("quick") / "locks" / key), []
    Path(lock.lock_file).parent.mkdir(parents=True)
    lock.acquire()
    assert batch.run_tasks([task], "quick", "cpu", 0.01, lines.append) == [] and not fake.computed
    assert lines[-1] == "0.01 minutes are used up: 1 of 1 left; run again to go on"


# --- What rows need of each other ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_that_is_needed_is_one_of_the_study_and_none_needs_itself(name: str) -> None:
    of = study(name)
    for profile in runs.PROFILES:
        graph = {}
        for row in of.rows[profile].values():
            for seed in (0, 2):
                needed = [(of.row_with(other, profile).settings, own) for other, own in row.needs(row.settings, seed)]
                graph[row.settings, seed] = needed
        graphlib.TopologicalSorter(graph).prepare()


def test_a_row_reads_no_result_that_its_study_does_not_name(fake: FakeStudy, capsys) -> None:
    teacher = fake.rows["quick"]["rd4ad"].settings
    fake.run = lambda settings, seed, data, context: context.require(teacher, seed)
    assert call("run bsdrd --rows bsdrd --seeds 0 --device cpu") == 1
    assert "(LookupError): bsdrd-magnetic_tile-quick-s0" in (said := capsys.readouterr().err)
    assert "asks for a row that its study does not say it needs" in said
