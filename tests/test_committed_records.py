"""The committed records: whole, small, and under the key of their content."""

import dataclasses
import json

from defectlab import runs
from defectlab.studies import STUDIES, study

COMMITTED = runs.recorded_dir()


def rebuilt(kind: type, fields: dict, changed: dict, kinds: dict[str, type]):
    """Settings from a record; those inside of settings say their kind in what differs."""
    values = {}
    for name, value in fields.items():
        if not isinstance(value, dict):
            values[name] = tuple(value) if isinstance(value, list) else value
        elif name in changed:
            values[name] = rebuilt(kinds[changed[name]["model"]], value, changed[name], kinds)
    return kind(**values)


def test_committed_records_stand_under_the_key_of_their_content() -> None:
    rows = [row for name in STUDIES for rows in study(name).ROWS.values() for row in rows.values()]
    kinds = {row.model: type(row) for row in rows}
    for record in runs.read_records(COMMITTED):
        kind = kinds[record.model]
        known = {f.name for f in dataclasses.fields(kind)}
        assert set(record.settings) <= known, f"{record.path.name}: settings that {record.model} no longer has"
        settings = rebuilt(kind, record.settings, record.changed, kinds)
        # changed defaults would show here: the record's row would no longer be the row of its own settings
        assert json.loads(json.dumps(runs.changed(settings))) == record.changed, record.path.name
        assert record.version == kind.version, f"{record.path.name}: results changed since; run it again"
        assert runs.row_identity(settings, record.profile) == record.row, record.path.name
        expected = runs.make_key(
            record.model, record.dataset, record.profile, record.seed, record.row, record.fingerprints
        )
        assert record.key == expected == record.path.stem


def test_committed_records_are_whole_small_and_not_synthetic() -> None:
    records = runs.read_records(COMMITTED)
    for record in records:
        arrays = record.path.with_suffix(".npz")
        assert arrays.is_file(), f"{record.path.name} has no arrays beside it"
        assert arrays.stat().st_size <= 300_000, f"{arrays.name} is too large to commit"
        assert record.profile in ("quick", "paper")
        content = record.arrays
        known = {"scores", "labels", "truth_counts", "prediction_counts", "truths"}
        per_image = sorted(known & content.keys())
        assert all(len(content[name]) == len(content["names"]) > 0 for name in per_image), record.path.name
        if record.per_class:  # stages and costs have no classes, and no images
            assert len(content["names"]) > 0, record.path.name
    stems = {record.path.stem for record in records}
    assert {p.stem for p in COMMITTED.glob("*.npz")} == stems
