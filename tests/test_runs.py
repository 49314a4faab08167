"""Keys, records, and what is left when a run is killed or the disk is full."""

import copy
import dataclasses
import errno
import json
import math
import os
import pickle
import queue
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
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from defectlab import batch, provenance, runs
from defectlab.files import write_atomically, write_json
from defectlab.runs import Context, OutOfTime, Record, Result
from defectlab.studies import Row, Study

REPOSITORY = runs.project_root()
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


# --- Keys ------------------------------------------------------------------------------------------------------------


def key(settings: Fake | None = None, seed: int = 0, profile: str = "quick", **prints: str) -> str:
    settings = settings or Fake()
    row = runs.row_identity(settings, profile)
    return runs.make_key(settings.model, settings.dataset, profile, seed, row, PRINTS | prints)


def test_what_is_computed_decides_the_key() -> None:
    newer, renamed = (type("Other", (Fake,), field)() for field in ({"version": 2}, {"model": "other"}))
    settings = (Fake(width=4), Fake(layers=(1,)), Fake(dataset="others/tiles"), FakeWithAnotherField(dilation=2))
    others = [key(seed=1), key(profile="paper"), key(data="d2"), key(weights="w2")]
    others += [key(one) for one in (*settings, newer, renamed)]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key()
    assert key(seed=3, profile="paper").startswith("fake-tiles-paper-s3-")


def test_a_new_field_with_its_old_behaviour_keeps_the_key() -> None:
    assert key(FakeWithAnotherField()) == key(Fake())
    assert key(FakeWithAnotherField(width=4)) == key(Fake(width=4))


def test_settings_inside_settings_count_with_their_version() -> None:
    outer = dataclasses.make_dataclass("Outer", [("inner", Fake, Fake())], frozen=True)
    assert runs.changed(outer()) == {"inner": {"model": "fake", "version": 1}}
    assert runs.changed(outer(Fake(width=4))) == {"inner": {"model": "fake", "version": 1, "width": 4}}


# --- Running ---------------------------------------------------------------------------------------------------------


def test_run_writes_record_arrays_and_weights(root: Path) -> None:
    settings = Fake(width=4, layers=(3, 4))
    record = Fakes().run(seed=2, settings=settings)
    assert record.path == root / "runs" / "quick" / f"{record.key}.json"
    assert leftovers(root) == [f"{record.key}.{ending}" for ending in ("json", "npz", "safetensors")]
    assert record.metrics == {"image_auroc": 92.0}
    assert record.changed == {"width": 4, "layers": [3, 4]}
    assert record.settings == {"dataset": "sets/tiles", "width": 4, "layers": [3, 4]}
    assert record.data_label == "pretended tiles"
    assert record.row == runs.row_identity(settings, "quick")  # JSON has no tuples: read back it is the same row
    np.testing.assert_array_equal(record.arrays["scores"], fake_result(2).predictions["scores"])
    assert list(record.arrays["names"]) == ["a", "b"]
    with safe_open(record.path.with_suffix(".safetensors"), framework="pt") as file:
        assert file.get_tensor("weight").tolist() == [2, 2]
        assert file.metadata()["key"] == record.key
        assert json.loads(file.metadata()["dev"]) == {"threshold": 0.5}
    for name in ("commit", "dirty", "versions", "device", "threads", "date", "seconds", "peak_memory_mb", "precision"):
        assert name in record.content
    assert "notes" not in record.content  # only where there are any
    noted = Fakes(lambda *_: dataclasses.replace(fake_result(), notes={"teacher": "fake-tiles"})).run()
    assert noted.notes == {"teacher": "fake-tiles"}


def test_second_call_reads_and_does_not_compute(root: Path) -> None:
    fakes = Fakes()
    first, again = fakes.run(), fakes.run()
    assert fakes.calls == 1
    assert again == first
    fakes.run(seed=1)
    fakes.run(settings=Fake(width=4))
    Fakes(data="d2").run()
    assert fakes.calls == 3
    assert len(runs.read_records(runs.runs_dir("quick"))) == 4
    with pytest.raises(ValueError, match=r"unknown profile 'fast': use one of smoke, quick, paper"):
        fakes.run(profile="fast")


def test_seconds_are_those_of_all_calls_and_the_checkpoint_goes(root: Path) -> None:
    def interrupted(seed: int, context: Context) -> Result:
        context.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        header = {"header": json.dumps({"epoch": 1, "seconds": 1234.5})}
        safetensors.torch.save_file({"weights.a": torch.zeros(1)}, context.checkpoint, header)
        raise OutOfTime("after epoch 1")

    with pytest.raises(OutOfTime):
        Fakes(interrupted).run()
    assert leftovers(root) == [f"{key()}.safetensors"]

    def resumed(seed: int, context: Context) -> Result:
        assert context.checkpoint.exists()
        return fake_result(seed)

    assert 1234.5 <= Fakes(resumed).run().seconds < 1244
    assert not list((root / "runs" / "quick" / "checkpoints").iterdir())


def test_a_broken_checkpoint_adds_no_seconds(root: Path) -> None:
    path = root / "runs" / "quick" / "checkpoints" / f"{key()}.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    assert Fakes().run().seconds < 10


def test_seconds_of_a_required_row_are_its_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(batch.time, "monotonic", lambda: clock[0])

    def compute(settings: Fake, seed: int, data: object, context: Context) -> Result:
        clock[0] += 100 if settings.width == 8 else 7
        if settings.width == 4:
            assert context.require(Fake(), 0).seconds == 100
            assert context.load(Fake()).label == "tiles"
        return fake_result(seed)

    load = lambda settings, device: SimpleNamespace(label="tiles")  # noqa: E731
    teacher, student = (Row(Fake(width=width), compute, load, lambda settings: PRINTS) for width in (8, 4))
    study = Study("fakes", {"quick": {"teacher": teacher, "student": student}}, {}, ())
    assert batch.run_row(study, student, 0, "quick", Context(log=lambda line: None)).seconds == 7
    assert len(runs.read_records(runs.runs_dir("quick"))) == 2


def test_two_at_once_compute_once_and_who_waits_says_so(root: Path) -> None:
    inside, go_on, said = threading.Event(), threading.Event(), queue.Queue()

    def slow(seed: int, context: Context) -> Result:
        inside.set()
        assert go_on.wait(20)
        return fake_result(seed)

    fakes, found = Fakes(slow), []
    workers = [
        threading.Thread(target=lambda log=log: found.append(fakes.run(log=log)), daemon=True)
        for log in (pytest.fail, said.put)
    ]
    workers[0].start()
    assert inside.wait(20)
    workers[1].start()
    assert said.get(timeout=20) == f"  waits for another process that is at locks/{key()}"
    go_on.set()
    for worker in workers:
        worker.join(20)
    assert fakes.calls == 1 and said.empty()
    assert len(found) == 2 and found[0] == found[1]


# --- Interrupted runs ------------------------------------------------------------------------------------------------


KILLED = """
import time
from pathlib import Path
from defectlab import runs
from test_runs import Fakes

def hang(*arguments):
    print("inside run", flush=True)
    time.sleep(600)

runs.project_root = lambda: Path({root!r})
Fakes(hang).run()
"""


def test_a_killed_run_leaves_no_record_and_no_lock(root: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(REPOSITORY)])}
    command = [sys.executable, "-c", KILLED.format(root=str(root))]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "inside run\n"
        finally:
            child.kill()
    assert (root / "runs" / "quick" / "locks" / key()).exists()  # the child held it
    assert leftovers(root) == []
    fakes = Fakes()
    fakes.run()
    assert fakes.calls == 1
    assert len(runs.read_records(runs.runs_dir("quick"))) == 1


# --- A full disk -----------------------------------------------------------------------------------------------------


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_tensors(*arguments, **options):
    """What safetensors raises where Python raises OSError."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "name", "failure", "ending"),
    [
        (safetensors.torch, "save_file", no_space_for_tensors, "safetensors"),
        (np, "savez_compressed", no_space, "npz"),
        (Path, "write_text", no_space, "json"),
        (os, "replace", no_space, "safetensors"),
    ],
)
def test_full_disk_names_the_file_and_leaves_no_record(
    root: Path, monkeypatch: pytest.MonkeyPatch, place, name: str, failure: Callable, ending: str
) -> None:
    fakes = Fakes()
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failure)
        with pytest.raises(OSError, match=r"could not write .*No space left.*free some disk space") as caught:
            fakes.run()
    assert str(root / "runs" / "quick" / f"{key()}.{ending}") in str(caught.value)
    assert not list(root.rglob("*.json"))
    assert not list(root.rglob(".*"))  # no half-written file beside
    fakes.run()
    assert fakes.calls == 2
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
    path = Fakes().run().path
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"is not a readable record .*; delete it and run again") as caught:
        runs.read_records(path.parent)
    assert str(path) in str(caught.value)


def test_a_record_can_be_copied_and_pickled(root: Path) -> None:
    record = Fakes().run()
    for other in (copy.copy(record), copy.deepcopy(record), pickle.loads(pickle.dumps(record))):
        assert other == record and other.metrics == record.metrics
    with pytest.raises(AttributeError, match="nonsense"):
        record.nonsense  # noqa: B018


def test_what_is_not_finite_is_no_metric_and_a_gap_in_the_curve(root: Path) -> None:
    def diverged(seed: int, context: Context) -> Result:
        odd, found = {"f1": math.nan, "recall": math.inf}, fake_result(seed)
        found.metrics, found.per_class, found.dev, found.costs = ({**odd, "map50": 1.0} for _ in range(4))
        found.per_class, found.curve = {"crack": found.per_class}, {"loss": [1.0, math.nan, -math.inf]}
        return found

    record = Fakes(diverged).run()
    stored = json.loads(record.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    assert [stored[name] for name in ("metrics", "dev", "costs")] == [{"map50": 1.0}] * 3
    assert stored["per_class"] == {"crack": {"map50": 1.0}}
    assert stored["curve"] == {"loss": [1.0, None, None]}
    np.testing.assert_equal(record.curve["loss"], [1.0, math.nan, math.nan])  # a plot leaves these out
    assert runs.promote([record])[0].startswith("recorded: ")
    (copied,) = runs.read_records(runs.recorded_dir())
    np.testing.assert_equal(copied.curve["loss"], record.curve["loss"])


def test_find_by_row_and_seed(root: Path) -> None:
    fakes = Fakes()
    for seed in (2, 0, 1):
        fakes.run(seed)
    fakes.run(settings=Fake(width=4))
    records = runs.read_records(runs.runs_dir("quick"))
    assert [r.seed for r in runs.find(records, Fake(), "quick")] == [0, 1, 2]
    assert [r.seed for r in runs.find(records, FakeWithAnotherField(), "quick")] == [0, 1, 2]
    assert len(runs.find(records, Fake(width=4), "quick")) == 1
    assert runs.find(records, Fake(), "paper") == []
    assert runs.find([], Fake(), "quick") == runs.read_records(runs.runs_dir("paper")) == []


@pytest.mark.parametrize("larger", ["d1", "d2"])
def test_find_mixes_no_fingerprints_and_says_what_it_leaves_out(root: Path, larger: str) -> None:
    smaller = {"d1": "d2", "d2": "d1"}[larger]
    for data, count in ((larger, 3), (smaller, 2)):
        for seed in range(count):
            Fakes(data=data).run(seed)
    records = runs.read_records(runs.runs_dir("quick"))
    with pytest.warns(UserWarning, match="left out, since made from other data or weights") as said:
        found = runs.find(records, Fake(), "quick")
    assert [r.fingerprints["data"] for r in found] == [larger] * 3
    assert all(key(seed=seed, data=smaller) in str(said[0].message) for seed in (0, 1))


def test_promote_copies_once_or_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Fakes().run()
    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "copyfile", no_space)
        with pytest.raises(OSError, match=r"could not write .*\.npz"):
            runs.promote([record])
    assert list(runs.recorded_dir().iterdir()) == []
    doubt = "  (made with uncommitted changes, or outside a checkout)"
    assert runs.promote([dataclasses.replace(record, content=record.content | {"dirty": None})]) == [
        f"recorded: {record.key}{doubt}"
    ]
    (copied,) = runs.read_records(runs.recorded_dir())
    assert copied.content == record.content
    np.testing.assert_array_equal(copied.arrays["scores"], record.arrays["scores"])
    assert sorted(p.suffix for p in runs.recorded_dir().iterdir()) == [".json", ".npz"]  # no weights
    before = copied.path.stat().st_mtime_ns
    assert runs.promote([record]) == [f"already recorded: {record.key}"]
    assert copied.path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("profile", "values", "message"),
    [("smoke", 5, "is a smoke run on synthetic data"), ("quick", 60_000, "bytes, more than the 300000 a record may")],
)
def test_what_is_not_promoted(root: Path, profile: str, values: int, message: str) -> None:
    record = Fakes(lambda *_: fake_result(npz_values=values)).run(profile=profile)
    with pytest.raises(ValueError, match=message) as caught:
        runs.promote([record])
    assert record.key in str(caught.value)
    assert not runs.recorded_dir().exists()


# --- Where a run was made --------------------------------------------------------------------------------------------


def test_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "torch", "surely-not-installed"))
    found = provenance.provenance("cpu")
    assert found["versions"].keys() == {"python", "numpy", "torch"}  # those that are installed
    assert torch.__version__.startswith(found["versions"]["torch"])  # which leaves out a build tag such as +cpu
    if (REPOSITORY / ".git").exists():
        assert len(found["commit"]) == 40 and isinstance(found["dirty"], bool)
    assert found["jobs"] == 1
    monkeypatch.setenv(provenance.JOBS, "4")
    assert provenance.provenance("cpu")["jobs"] == 4  # runs that shared the device
    monkeypatch.setattr(provenance, "project_root", lambda: tmp_path)
    found = provenance.provenance("cpu")
    assert (found["commit"], found["dirty"]) == ("unknown", None)
    assert provenance.peak_memory_mb("cpu") > 50
