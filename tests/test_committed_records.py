"""The committed records: whole, small, under the key that the code computes of their content today, and each the record
of a row."""

import dataclasses
import json

import pytest

from defectlab import runs
from defectlab.runs import Record
from defectlab.studies import STUDIES, study

RECORDS = {record.key: record for record in runs.read_records(runs.recorded_dir())}  # each under its key, else an error
ROWS = {
    runs.row_identity(row.settings, profile): row.settings
    for name in STUDIES
    for profile in ("quick", "paper")
    for row in study(name).rows[profile].values()
}
GONE = {"mixup"}  # fields that settings had when records were made, and no row ever changed: no key hangs on them
WITHOUT_ROW: dict[str, str] = {}  # key -> why it is kept although no study has its row


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_is_that_of_a_row(record: Record) -> None:
    row = record.row
    if record.key in WITHOUT_ROW:
        assert row not in ROWS
        return
    # a changed default, field or version would show here: the record would no longer be that of the row's settings
    assert row in ROWS, "no study has this row: run it again, or say in WITHOUT_ROW why it is kept"
    settings = json.loads(json.dumps(runs.changed(ROWS[row])))
    assert set(record.settings) - GONE <= {field.name for field in dataclasses.fields(ROWS[row])}
    runs.check_settings(record, ROWS[row])
    assert (settings, ROWS[row].version, ROWS[row].dataset) == (record.changed, record.version, record.dataset)


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_is_whole_small_and_not_synthetic(record: Record) -> None:
    arrays = record.path.with_suffix(".npz")
    assert arrays.is_file() and arrays.stat().st_size <= runs.NPZ_LIMIT
    assert record.profile in ("quick", "paper") and "NaN" not in record.path.read_text()
    content = record.arrays
    per_image = {"scores", "labels", "truth_counts", "prediction_counts", "truths"} & content.keys()
    assert all(len(content[name]) == len(content["names"]) > 0 for name in per_image)
    if record.per_class:  # stages and costs have no classes, and no images
        assert len(content["accuracies" if "accuracies" in content else "names"]) > 0  # of episodes, or of images


def test_no_arrays_without_a_record() -> None:
    assert {path.stem for path in runs.recorded_dir().glob("*.npz")} == set(RECORDS)
    assert set(WITHOUT_ROW) <= set(RECORDS)
