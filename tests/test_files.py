"""Files that are whole or not there, on disks that are full or read-only."""

from pathlib import Path

import pytest

from defectlab.files import DataError, writable


def test_a_folder_that_takes_files_is_made_and_left_empty(tmp_path: Path) -> None:
    writable(tmp_path / "new" / "out", "give another --out")
    assert list((tmp_path / "new" / "out").iterdir()) == []


def test_a_folder_that_takes_none_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/defectlab")):
        with pytest.raises(DataError, match=r"cannot be written \(.+\): give another --out$") as caught:
            writable(folder, "give another --out")
        assert str(caught.value).startswith(str(folder))
