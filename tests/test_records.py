"""Records: what is read, found and promoted, and what is refused."""

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from toy_rows import Fake, Fakes, FakeWithAnotherField, fake_result, key, no_space

from defectlab import runs
from defectlab.runs import Context, Result

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
