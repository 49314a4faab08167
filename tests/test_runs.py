"""Keys, records, and what is left when a run is killed or the disk is full."""

import dataclasses
import errno
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open

from defectlab import runs
from defectlab.files import locked, write_atomically, write_json
from defectlab.runs import OutOfTime, Record, RecordError, Result, Session

COMMITTED = runs.recorded_dir()


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


def make_study(run_row: Callable[..., Result] | None = None, prints: dict[str, str] | None = None) -> SimpleNamespace:
    """A study whose `run_row` counts its calls in `calls`."""
    study = SimpleNamespace(calls=0)

    def count(settings, seed, data, device, session):
        study.calls += 1
        return run_row(settings, seed, data, device, session) if run_row else fake_result(seed)

    study.load = lambda settings, device: SimpleNamespace(label="pretended tiles")
    study.fingerprints = lambda settings: prints or {"data": "d1", "weights": "w1"}
    study.run_row = count
    return study


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty project folder in place of the repository."""
    monkeypatch.setattr(runs, "project_root", lambda: tmp_path)
    return tmp_path


def run(study: SimpleNamespace, seed: int = 0, profile: str = "quick", settings: Fake | None = None) -> Record:
    return runs.run(study, settings or Fake(), seed, profile, "cpu", Session(say=lambda line: None))


def leftovers(root: Path) -> list[str]:
    """Every file below the project but the locks, which hold nothing."""
    return sorted(p.name for p in root.rglob("*") if p.is_file() and p.parent.name != "locks")


# --- Keys ------------------------------------------------------------------------------------------------------------


def key(settings: Fake | None = None, seed: int = 0, profile: str = "quick", **prints: str) -> str:
    settings = settings or Fake()
    fingerprints = {"data": "d1", "weights": "w1"} | prints
    row = runs.row_identity(settings, profile)
    return runs.make_key(settings.model, settings.dataset, profile, seed, row, fingerprints)


def test_a_new_field_with_its_old_behaviour_keeps_the_key() -> None:
    assert key(FakeWithAnotherField()) == key(Fake())
    assert key(FakeWithAnotherField(width=4)) == key(Fake(width=4))
    assert key(FakeWithAnotherField(dilation=2)) != key(Fake())


def test_what_is_computed_decides_the_key() -> None:
    others = [
        key(seed=1),
        key(profile="paper"),
        key(data="d2"),
        key(weights="w2"),
        key(Fake(width=4)),
        key(Fake(layers=(1,))),
        key(Fake(dataset="others/tiles")),
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key()


def test_model_and_version_decide_the_key() -> None:
    newer = type("Newer", (Fake,), {"version": 2})
    renamed = type("Renamed", (Fake,), {"model": "other"})
    assert len({runs.row_identity(kind(), "quick") for kind in (Fake, newer, renamed)}) == 3


def test_key_is_readable() -> None:
    assert key(seed=3, profile="paper").startswith("fake-tiles-paper-s3-")


def test_tuples_and_lists_are_one_identity() -> None:
    """Settings are written as JSON, which has no tuples: a record read back must be the row it was."""
    settings = Fake(layers=(3, 4))
    stored = json.loads(json.dumps(runs.changed(settings)))
    assert runs.identity("fake", 1, stored, "quick") == runs.row_identity(settings, "quick")


def test_unknown_profile(root: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown profile 'fast': use one of smoke, quick, paper"):
        run(make_study(), profile="fast")


# --- Running ---------------------------------------------------------------------------------------------------------


def test_run_writes_record_arrays_and_weights(root: Path) -> None:
    record = run(make_study(), seed=2, settings=Fake(width=4))
    assert record.path == root / "runs" / "quick" / f"{record.key}.json"
    assert leftovers(root) == [f"{record.key}.{ending}" for ending in ("json", "npz", "safetensors")]
    assert record.metrics == {"image_auroc": 92.0}
    assert record.changed == {"width": 4}
    assert record.settings == {"dataset": "sets/tiles", "width": 4, "layers": [1, 2]}
    assert record.data_label == "pretended tiles"
    assert record.row == runs.row_identity(Fake(width=4), "quick")
    np.testing.assert_array_equal(record.arrays["scores"], fake_result(2).predictions["scores"])
    assert list(record.arrays["names"]) == ["a", "b"]
    with safe_open(record.path.with_suffix(".safetensors"), framework="pt") as file:
        assert file.get_tensor("weight").tolist() == [2, 2]
        assert file.metadata()["key"] == record.key
        assert json.loads(file.metadata()["dev"]) == {"threshold": 0.5}
    for name in ("commit", "dirty", "versions", "device", "threads", "date", "seconds", "peak_memory_mb", "precision"):
        assert name in record.content


def test_second_call_reads_and_does_not_compute(root: Path) -> None:
    study = make_study()
    first, again = run(study), run(study)
    assert study.calls == 1
    assert again == first
    run(study, seed=1)
    run(study, settings=Fake(width=4))
    run(make_study(prints={"data": "d2", "weights": "w1"}))
    assert study.calls == 3
    assert len(runs.read_records(runs.runs_dir("quick"))) == 4


def test_checkpoint_is_removed_when_the_run_is_finished(root: Path) -> None:
    def interrupted(settings, seed, data, device, session):
        session.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        session.checkpoint.write_bytes(b"half a training")
        raise OutOfTime("after epoch 1")

    with pytest.raises(OutOfTime):
        run(make_study(interrupted))
    assert leftovers(root) == [f"{key()}.safetensors"]

    def resumed(settings, seed, data, device, session):
        assert session.checkpoint.read_bytes() == b"half a training"
        return fake_result(seed)

    run(make_study(resumed))
    assert not list((root / "runs" / "quick" / "checkpoints").iterdir())


def test_two_at_once_compute_once(root: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(settings, seed, data, device, session):
        inside.set()
        assert go_on.wait(20)
        return fake_result(seed)

    study, found = make_study(slow), []
    workers = [threading.Thread(target=lambda: found.append(run(study)), daemon=True) for _ in range(2)]
    workers[0].start()
    assert inside.wait(20)
    workers[1].start()
    workers[1].join(0.2)
    assert workers[1].is_alive()  # it waits for the lock
    go_on.set()
    for worker in workers:
        worker.join(20)
    assert study.calls == 1
    assert len(found) == 2
    assert found[0] == found[1]


# --- Interrupted runs ------------------------------------------------------------------------------------------------


def test_a_run_that_raises_leaves_no_record(root: Path) -> None:
    def fails(settings, seed, data, device, session):
        raise RuntimeError("the row broke")

    with pytest.raises(RuntimeError, match="the row broke"):
        run(make_study(fails))
    assert leftovers(root) == []
    study = make_study()
    assert run(study).metrics == {"image_auroc": 90.0}
    assert study.calls == 1


KILLED = """
import time
from pathlib import Path
from defectlab import runs
from test_runs import make_study, run

def hang(*arguments):
    print("inside run_row", flush=True)
    time.sleep(600)

runs.project_root = lambda: Path({root!r})
run(make_study(hang))
"""


def test_a_killed_run_leaves_no_record_and_no_lock(root: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(root=str(root))],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "inside run_row\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(20)
        child.stdout.close()
    assert (root / "runs" / "quick" / "locks" / key()).exists()  # the child held it
    assert leftovers(root) == []
    study = make_study()
    run(study)
    assert study.calls == 1
    assert len(runs.read_records(runs.runs_dir("quick"))) == 1


def test_who_waits_for_another_process_says_so(tmp_path: Path) -> None:
    said, turns = queue.Queue(), []

    def second() -> None:
        with locked(tmp_path / "row", said.put):
            turns.append("second")

    waiting = threading.Thread(target=second)
    with locked(tmp_path / "row", said.put):
        waiting.start()
        assert said.get(timeout=20) == f"  waits for another process that is at {tmp_path.name}/row"
        turns.append("first")
    waiting.join(20)
    assert turns == ["first", "second"] and said.empty()


# --- A full disk -----------------------------------------------------------------------------------------------------


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_tensors(*arguments, **options):
    """What safetensors raises where Python raises OSError."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "name", "failure", "ending"),
    [
        (runs, "save_file", no_space_for_tensors, "safetensors"),
        (np, "savez_compressed", no_space, "npz"),
        (Path, "write_text", no_space, "json"),
        (os, "replace", no_space, "safetensors"),
    ],
)
def test_full_disk_names_the_file_and_leaves_no_record(
    root: Path, monkeypatch: pytest.MonkeyPatch, place, name: str, failure: Callable, ending: str
) -> None:
    study = make_study()
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failure)
        with pytest.raises(OSError, match=r"could not write .*No space left.*free some disk space") as caught:
            run(study)
    assert str(root / "runs" / "quick" / f"{key()}.{ending}") in str(caught.value)
    assert not list(root.rglob("*.json"))
    assert not list(root.rglob(".*"))  # no half-written file beside
    run(study)
    assert study.calls == 2
    assert leftovers(root) == [f"{key()}.{ending}" for ending in ("json", "npz", "safetensors")]


def test_a_failed_write_keeps_what_was_there(root: Path) -> None:
    path = root / "page.json"
    write_json(path, {"old": 1})

    def half(aside: Path) -> None:
        aside.write_text("ha")
        no_space()

    with pytest.raises(OSError, match=r"page\.json"):
        write_atomically(path, half)
    assert json.loads(path.read_text()) == {"old": 1}
    assert leftovers(root) == ["page.json"]


# --- Reading, finding, promoting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [b"", b'{"key": "fake"', b"\xff\xfe\x00"])
def test_a_corrupt_record_is_named(root: Path, broken: bytes) -> None:
    path = run(make_study()).path
    path.write_bytes(broken)
    with pytest.raises(RecordError, match=r"is not a readable record .*; delete it and run again") as caught:
        runs.read_records(path.parent)
    assert str(path) in str(caught.value)


def test_no_folder_is_no_record(root: Path) -> None:
    assert runs.read_records(runs.runs_dir("paper")) == []


def test_find_by_row_and_seed(root: Path) -> None:
    study = make_study()
    for seed in (2, 0, 1):
        run(study, seed)
    run(study, settings=Fake(width=4))
    records = runs.read_records(runs.runs_dir("quick"))
    assert [r.seed for r in runs.find(records, Fake(), "quick")] == [0, 1, 2]
    assert [r.seed for r in runs.find(records, FakeWithAnotherField(), "quick")] == [0, 1, 2]
    assert len(runs.find(records, Fake(width=4), "quick")) == 1
    assert runs.find(records, Fake(), "paper") == []


@pytest.mark.parametrize("larger", ["d1", "d2"])
def test_find_mixes_no_fingerprints_and_prefers_the_largest_group(root: Path, larger: str) -> None:
    for data in ("d1", "d2"):
        for seed in range(3 if data == larger else 2):
            run(make_study(prints={"data": data, "weights": "w1"}), seed)
    found = runs.find(runs.read_records(runs.runs_dir("quick")), Fake(), "quick")
    assert [r.fingerprints["data"] for r in found] == [larger] * 3


def test_notes_are_kept_only_where_there_are_any(root: Path) -> None:
    plain = run(make_study())
    assert "notes" not in plain.content

    def taught(settings, seed, data, device, session):
        return dataclasses.replace(fake_result(seed), notes={"teacher": "fake-tiles-quick-s0", "sha256": "ab"})

    record = run(make_study(taught), seed=1)
    assert record.notes == {"teacher": "fake-tiles-quick-s0", "sha256": "ab"}
    assert set(record.content) - {"notes"} == set(plain.content)


def test_promote_copies_once(root: Path) -> None:
    record = run(make_study())
    doubt = "  (made with uncommitted changes, or outside a checkout)"
    assert runs.promote([record]) == [f"recorded: {record.key}{doubt}"]
    (copied,) = runs.read_records(runs.recorded_dir())
    assert copied.content == record.content
    np.testing.assert_array_equal(copied.arrays["scores"], record.arrays["scores"])
    assert sorted(p.suffix for p in runs.recorded_dir().iterdir()) == [".json", ".npz"]  # no weights
    before = {p.name: p.stat().st_mtime_ns for p in runs.recorded_dir().iterdir()}
    assert runs.promote([record]) == [f"already recorded: {record.key}"]
    assert {p.name: p.stat().st_mtime_ns for p in runs.recorded_dir().iterdir()} == before


def test_promote_refuses_smoke(root: Path) -> None:
    record = run(make_study(), profile="smoke")
    with pytest.raises(ValueError, match=r"is a smoke run on synthetic data: only quick and paper runs") as caught:
        runs.promote([record])
    assert record.key in str(caught.value)
    assert not runs.recorded_dir().exists()


def test_promote_refuses_large_arrays(root: Path) -> None:
    record = run(make_study(lambda *arguments: fake_result(npz_values=60_000)))
    with pytest.raises(ValueError, match=r"bytes, more than the 300000 a record may have") as caught:
        runs.promote([record])
    assert str(record.path.with_suffix(".npz")) in str(caught.value)
    assert not runs.recorded_dir().exists()


def test_promote_on_a_full_disk_leaves_no_record(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run(make_study())
    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "copyfile", no_space)
        with pytest.raises(OSError, match=r"could not write .*\.npz"):
            runs.promote([record])
    assert list(runs.recorded_dir().iterdir()) == []
    assert runs.promote([record])[0].startswith(f"recorded: {record.key}")


def test_provenance_outside_a_checkout_says_unknown(root: Path) -> None:
    found = runs.provenance("cpu")
    assert (found["commit"], found["dirty"]) == ("unknown", None)


def test_provenance_names_only_packages_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PACKAGES", ("numpy", "surely-not-installed"))
    assert runs.provenance("cpu")["versions"].keys() == {"python", "numpy"}


def test_provenance_in_the_repository() -> None:
    if not (COMMITTED.parents[1] / ".git").exists():
        pytest.skip("needs a git checkout")
    found = runs.provenance("cpu")
    assert len(found["commit"]) == 40
    assert isinstance(found["dirty"], bool)
    assert torch.__version__.startswith(found["versions"]["torch"])  # which leaves out a build tag such as +cpu
