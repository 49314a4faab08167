"""Files that are whole or not there, on disks that are full or read-only."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
from safetensors import SafetensorError
from toy_rows import Fakes, key, leftovers, no_space

from defectlab.files import DataError, disk_full, writable, write_atomically, write_json


def test_a_folder_that_takes_files_is_made_and_left_empty(tmp_path: Path) -> None:
    writable(tmp_path / "new" / "out", "give another --out")
    assert list((tmp_path / "new" / "out").iterdir()) == []


def test_a_folder_that_takes_none_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/defectlab")):
        with pytest.raises(DataError, match=r"cannot be written \(.+\): give another --out$") as caught:
            writable(folder, "give another --out")
        assert str(caught.value).startswith(str(folder))


# --- A full disk -----------------------------------------------------------------------------------------------------


# what safetensors raises where Python raises OSError
NO_SPACE_FOR_TENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "name", "failure", "ending"),
    [
        (safetensors.torch, "save_file", Mock(side_effect=NO_SPACE_FOR_TENSORS), "safetensors"),
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
    assert disk_full(caught.value)
    assert not list(root.rglob("*.json"))
    assert not list(root.rglob(".*"))  # no half-written file beside
    fakes.run()
    assert fakes.calls == 2
    assert leftovers(root) == [f"{key()}.{ending}" for ending in ("json", "npz", "safetensors")]


@pytest.mark.parametrize(("code", "full"), [(errno.EDQUOT, True), (errno.EROFS, False)])
def test_a_quota_counts_as_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, full: bool) -> None:
    """And a read-only folder does not."""

    def refuse(aside: Path, path: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    remedy = "free some disk space" if full else f"make {tmp_path} a folder that can be written"
    with pytest.raises(OSError) as caught:
        write_json(tmp_path / "page.json", {})
    assert str(caught.value) == f"could not write {tmp_path / 'page.json'} ({os.strerror(code)}): {remedy}"
    assert caught.value.errno == code and disk_full(caught.value) == full


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


# --- A power loss ----------------------------------------------------------------------------------------------------


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_ino))
    monkeypatch.setattr(os, "replace", lambda *paths: [events.append("renamed"), replace(*paths)])
    write_json(tmp_path / "record.json", {})
    assert events == [(tmp_path / "record.json").stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_a_folder_that_cannot_be_opened_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    opened = os.open

    def no_folder(path: Path, *options) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *options)

    monkeypatch.setattr(os, "open", no_folder)
    write_json(tmp_path / "record.json", {"a": 1})
    assert json.loads((tmp_path / "record.json").read_text()) == {"a": 1}
