"""Records: what is read, found and promoted, and what is refused."""

import copy
import dataclasses
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_rows import Fake, Fakes, FakeWithAnotherField, fake_result, key, no_space

from defectlab import runs
from defectlab.files import write_json
from defectlab.runs import Context, Result

# --- Reading, finding, promoting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [b"", b'{"key": "fake"', b"\xff\xfe\x00", b"{}", b"[]", b"null", b'"text"', b'{"a": 1}', b"[" * 100_000],
    ids=lambda content: content[:14],
)
def test_a_corrupt_or_foreign_record_is_named(root: Path, broken: bytes) -> None:
    path = Fakes().run().path
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"is not a readable record .*: restore it, or move it away and") as caught:
        runs.read_records(path.parent)
    assert str(path) in str(caught.value)


def edited(root: Path, **fields: Any) -> Path:
    """The record of a run, some of its fields replaced; None: taken away."""
    path = Fakes().run(settings=Fake(width=4)).path
    content = json.loads(path.read_text()) | fields
    write_json(path, {name: value for name, value in content.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        *(({name: None}, f"it lacks '{name}'") for name in ("metrics", "settings", "seed", "date", "curve")),
        *(({name: []}, f"its '{name}' is of another type") for name in ("metrics", "changed", "seed", "device")),
        ({"metrics": {"image_auroc": "90"}}, "its 'metrics' is of another type"),
        ({"per_class": {"crack": 80.0}}, "its 'per_class' is of another type"),
        ({"curve": {"loss": [1.0, "x"]}}, "its 'curve' is of another type"),
        ({"seed": 5}, "the key of what it holds is fake-tiles-quick-s5-"),
        ({"version": 2}, "the key of what it holds is"),
        ({"dataset": "others/tiles2"}, "the key of what it holds is"),
        ({"fingerprints": {"data": "d2", "weights": "w1"}}, "the key of what it holds is"),
        ({"changed": {}}, "the key of what it holds is"),
        ({"key": "fake-tiles-quick-s0-000000000000"}, "the key of what it holds is"),
        ({"settings": {"dataset": "sets/tiles", "width": 5}}, "its 'changed' and its 'settings' disagree on 'width'"),
        ({"settings": {"dataset": "sets/tiles"}}, "its 'changed' and its 'settings' disagree on 'width'"),
    ],
)
def test_an_edited_record_is_named_with_the_reason(root: Path, fields: dict[str, Any], why: str) -> None:
    path = edited(root, **fields)
    with pytest.raises(ValueError, match=re.escape(why)) as caught:
        runs.read_record(path)
    assert str(path) in str(caught.value) and "move it away" in str(caught.value)


def test_a_record_under_another_name_and_what_a_killed_process_was_writing(root: Path) -> None:
    path = Fakes().run().path
    path.with_name(f".123-{path.name}").write_text("{")
    assert len(runs.read_records(path.parent)) == 1
    path.rename(path.with_name("copy.json"))
    with pytest.raises(ValueError, match=r"copy\.json is not a readable record \(it was edited or renamed"):
        runs.read_records(path.parent)


def test_settings_that_are_not_the_rows_are_an_error(root: Path) -> None:
    """Those that no key hangs on, too. Fields that were added or removed since do not count."""
    settings = {"dataset": "sets/tiles", "width": 4, "layers": [1, 2], "mixup": 0.1}
    path = edited(root, settings=settings)
    fakes, row = Fakes(), FakeWithAnotherField(width=4)
    assert len(runs.find(runs.read_records(path.parent), row, "quick")) == 1
    assert fakes.run(settings=row).path == path
    path = edited(root, settings=settings | {"layers": [1, 3]})
    for look in (lambda: runs.find(runs.read_records(path.parent), row, "quick"), lambda: fakes.run(settings=row)):
        with pytest.raises(
            ValueError, match=r"\.json was edited \(it says another 'layers' than its row has\): restore"
        ):
            look()
    assert fakes.calls == 0


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b""), "No data left"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "File is not a zip file|pickle"),
        (lambda path: np.savez(path, scores=np.zeros(1)), "the arrays are those of no record"),
        (lambda path: np.savez(path, key="fake-tiles-quick-s1"), "the arrays are those of fake-tiles-quick-s1"),
    ],
    ids=["missing", "empty", "cut", "foreign", "another's"],
)
def test_arrays_that_are_not_the_records_are_named(root: Path, damage: Callable[[Path], object], why: str) -> None:
    record = Fakes().run()
    path = record.path.with_suffix(".npz")
    damage(path)
    for look in (lambda: record.arrays, lambda: runs.promote([record])):
        with pytest.raises(ValueError, match=rf"\.npz cannot be read \(.*({why}).*\): restore it, or move it away"):
            look()
    assert not runs.recorded_dir().exists()


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
    too_large = Fakes().run(1)
    too_large.path.with_suffix(".npz").write_bytes(bytes(runs.NPZ_LIMIT + 1))
    with pytest.raises(
        ValueError, match=r"\.npz has 600001 bytes, .*: record other rows with --rows; nothing was copied"
    ):
        runs.promote([record, too_large])
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
    [("smoke", 5, "is a smoke run on synthetic data"), ("quick", 120_000, "bytes, more than the 600000 a record may")],
)
def test_what_is_not_promoted(root: Path, profile: str, values: int, message: str) -> None:
    record = Fakes(lambda *_: fake_result(npz_values=values)).run(profile=profile)
    with pytest.raises(ValueError, match=message) as caught:
        runs.promote([record])
    assert record.key in str(caught.value)
    assert not runs.recorded_dir().exists()
