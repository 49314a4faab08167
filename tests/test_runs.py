"""Keys, runs, and what is left when one is killed."""

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from toy_rows import PRINTS, Fake, Fakes, FakeWithAnotherField, fake_result, key, leftovers

from defectlab import batch, provenance, runs
from defectlab.runs import Context, OutOfTime, Result
from defectlab.studies import Row, Study

REPOSITORY = runs.project_root()


# --- Keys ------------------------------------------------------------------------------------------------------------


def test_what_is_computed_decides_the_key() -> None:
    newer, renamed = (type("Other", (Fake,), field)() for field in ({"version": 2}, {"model": "other"}))
    settings = (Fake(width=4), Fake(layers=(1,)), Fake(dataset="others/tiles"), FakeWithAnotherField(dilation=2))
    others = [key(seed=1), key(profile="paper"), key(data="d2"), key(weights="w2")]
    others += [key(one) for one in (*settings, newer, renamed)]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key()
    assert key(seed=3, profile="paper").startswith("fake-tiles-paper-s3-")
    for same in ({}, {"width": 4}):  # a new field with its old behaviour keeps the key
        assert key(FakeWithAnotherField(**same)) == key(Fake(**same))


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


def test_weights_of_another_run_of_the_same_key_are_refused(root: Path) -> None:
    record, network = Fakes().run(seed=2), torch.nn.ParameterDict({"weight": torch.zeros(2)})
    runs.load_weights(record, network)
    assert network["weight"].tolist() == [2, 2]
    other = {"weight": torch.ones(2)}
    safetensors.torch.save_file(other, record.path.with_suffix(".safetensors"), {"key": record.key})
    with pytest.raises(ValueError, match=r"\.safetensors does not fit this network \(it is of another run"):
        runs.load_weights(record, network)


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
    needs = lambda settings, seed: [(Fake(), 0)] if settings.width == 4 else []  # noqa: E731
    teacher, student = (Row(Fake(width=w), compute, load, lambda settings: PRINTS, needs=needs) for w in (8, 4))
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
from toy_rows import Fakes

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


@pytest.mark.parametrize(
    ("driver", "visible", "reason"),
    [
        ("nvidia-smi", None, RuntimeError("The NVIDIA driver on your system is too old.\nUpdate it")),
        ("nvidia-smi", None, AssertionError("Torch not compiled with CUDA enabled")),
        (None, None, None),
        ("nvidia-smi", "", None),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch, driver, visible, reason: Exception | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", Mock(side_effect=reason or pytest.fail))
    monkeypatch.setattr(provenance.shutil, "which", lambda name: driver if name == "nvidia-smi" else None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert provenance.pick_device("auto") == "cpu"
    start = "computing on the CPU, since torch cannot use the GPU: "
    expected = [start + str(reason).splitlines()[0]] if reason else []
    assert [str(one.message) for one in said] == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    because = f" ({str(reason).splitlines()[0]})" if reason else ""
    with pytest.raises(ValueError) as error:
        provenance.pick_device("cuda")
    assert str(error.value).startswith(f"device 'cuda' is not available here{because}: use auto, cpu")
