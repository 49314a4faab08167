"""Archives as people have them: one error each that names the archive and the remedy, and nothing left behind."""

import errno
import hashlib
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from toy_archives import DATASET, FILES, make_tar, make_zip, nothing_left

from defectlab.data import fetch as store
from defectlab.files import DataError


def special(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo("top/a/1.txt")
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def zip_of(folder: Path, name: str, content: bytes = b"x", attributes: int = 0, size: int | None = None) -> Path:
    """A zip of one member; `size`: what its directory says of it, true or not."""
    info, path = zipfile.ZipInfo(name), folder / "bad.zip"
    info.external_attr = attributes << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, content)
    if size is not None:
        whole = path.read_bytes()
        start = whole.rindex(b"PK\x01\x02") + 20  # compressed and uncompressed size in the directory
        path.write_bytes(whole[:start] + struct.pack("<II", size, size) + whole[start + 8 :])
    return path


def cut(path: Path, keep: float, flip: int | None = None) -> Path:
    content = bytearray(path.read_bytes())
    if flip is not None:
        content[flip] ^= 0xFF
    path.write_bytes(content[: int(keep * len(content))])
    return path


def raw(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


OUTSIDE = ["/etc/a/1.txt", "../a/1.txt", "top/../../a/1.txt", "..\\a\\1.txt", "C:\\a\\1.txt"]
NOISE, BIG = bytes(range(256)) * 40, b"0" * 100_000  # the latter compresses to almost nothing
REFUSED = [
    *((lambda f, n=n: zip_of(f, n), rf"bad\.zip holds {re.escape(repr(n))}, which lies outside") for n in OUTSIDE),
    *((lambda f, n=n: make_tar(f / "bad.tar", {n: b"x"}, "w"), "which lies outside its folder") for n in OUTSIDE),
    *(
        (lambda f, k=k: make_tar(f / "bad.tar", {special(k): b""}, "w"), r"bad\.tar holds 'top/a/1.txt', a link or a")
        for k in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    ),
    (lambda f: zip_of(f, "top/a/1.txt", b"/etc/passwd", stat.S_IFLNK | 0o777), "a link or a device"),
    (lambda f: make_zip(f / "big.zip", {"a/1.txt": BIG, "a/2.txt": BIG}), "unpacks to more than 150000 bytes"),
    (lambda f: make_tar(f / "big.tar.xz", {"a/1.txt": BIG, "a/2.txt": BIG}), "unpacks to more than 150000 bytes"),
    *((lambda f, s=s: zip_of(f, "a/1.txt", b"12345", size=s), r"bad\.zip is damaged.*fetch it again") for s in (3, 7)),
    (lambda f: cut(make_zip(f / "x", {"a/1.txt": NOISE}), 0.5), r"x is damaged.*fetch it again"),
    (lambda f: cut(make_zip(f / "x", {"a/1.txt": NOISE}), 1, flip=60), r"x is damaged.*fetch it again"),
    (lambda f: cut(make_tar(f / "x", {"a/1.txt": NOISE}), 0.5), r"x is damaged.*fetch it again"),
    (lambda f: raw(f / "x", zip_of(f, "a/1.txt").read_bytes()[10:]), r"x is damaged.*fetch it again"),
    (lambda f: raw(f / "x", b"no archive"), r"x is damaged, or neither .*fetch it again, or unpack it and pack"),
    *(
        (lambda f, s=s: raw(f / "x.zip", s + bytes(80)), rf"x\.zip is {message}")
        for s, message in (
            (b"Rar!\x1a\x07\x01\x00", "a rar archive: unpack it and pack the folder as zip"),
            (b"Rar!\x1a\x07\x00", "a rar archive: unpack"),
            (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it and pack the folder as zip"),
            (b"PK\x07\x08PK\x03\x04", "a part of a split zip: with all parts, unpack"),
            (b"\xef\xbb\xbf\r\n<!DOCTYPE html>", "a web page: fetch the archive in a browser.*login"),
        )
    ),
    (lambda f: cut(zip_of(f, "a/1.txt"), 1, flip=-18), r"bad\.zip is a part of a split zip"),  # its last part
    (lambda f: cut(zip_of(f, "a/1.txt"), 1, flip=-67), r"bad\.zip asks for a password: unpack it and pack"),
    (lambda f: cut(zip_of(f, "a/1.txt"), 1, flip=-65), r"bad\.zip .*method is not supported.*or unpack it"),
    (lambda f: raw(f / "x.zip", b""), r"x\.zip is empty: fetch it again"),
    (lambda f: make_zip(f / "x.zip", {}), r"x\.zip holds no file of this data set: check"),
    (lambda f: make_tar(f / "x.tar", {}), r"x\.tar holds no file of this data set: check"),
    (lambda f: make_zip(f / "x.zip", {"toy.tar.xz": b""}), r"x\.zip holds no file .*: unpack 'top/toy\.tar\.xz' in it"),
    (lambda f: f, "is a folder: pack it as zip, and give the path"),
    (lambda f: make_zip(f / "x.zip", {"x/a/1.txt": b"1", "y/a/1.txt": b"2"}), r"x\.zip holds two files for a/1\.txt"),
    (lambda f: make_zip(f / "x.zip", {"a/x.txt": b"1", "a\\X.txt": b"2"}), r"x\.zip holds two files for a/X\.txt"),
    *(
        (lambda f, n=n: make_tar(f / "x.tar", {n: b"x"}), r"x\.tar holds the name 'a/.* too long or not A")
        for n in (f"a/{'x' * 300}.txt", "a/\udcb6\udcab.txt", "a/\u00e9.txt", "a/e\u0301.txt")  # gb2312, NFC, NFD
    ),
    (lambda f: zip_of(f, "a/\u00e9.txt"), r"bad\.zip holds the name 'a/.* too long or not ASCII"),
    (
        lambda f: raw(f / "x", zip_of(f, "a/\u00e9.txt").read_bytes().replace("\u00e9".encode(), b"\xb6\xab")),
        "x is damaged, or .*'utf-8' codec.*or unpack it",
    ),
    (lambda f: make_zip(f / "other.zip", {"c/1.txt": b"1"}), "holds no file of this data set"),
    (lambda f: f / "none.zip", r"none\.zip is not a file"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_archives_that_are_refused(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(DataError, match=message):
        store.fetch(replace(DATASET, unpacked_limit=150_000), tmp_path / "data", make(tmp_path))
    assert nothing_left(tmp_path / "data")


def test_wrong_hash_and_wrong_fingerprint(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "toy.zip", FILES)
    got = hashlib.sha256(archive.read_bytes()).hexdigest()
    by_hash = replace(DATASET, check=None, archive_sha256=("0" * 64,))
    with pytest.raises(DataError) as error:
        store.fetch(by_hash, tmp_path / "data", archive)
    for part in ("toy.zip", got, "0" * 64, "https://example.org/toy"):
        assert part in str(error.value)
    assert store.fetch(replace(by_hash, archive_sha256=(got,)), tmp_path / "data", archive).archive_sha256 == got

    with pytest.raises(DataError, match=f"toy.zip does not hold toy set as published.*expected {'1' * 64}"):
        store.fetch(replace(DATASET, fingerprint="1" * 64), tmp_path / "new", archive)
    assert nothing_left(tmp_path / "new")


def test_folder_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    own = tmp_path / "data" / "group" / "toy" / "mine.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(DataError, match=r"has no manifest\.json: move it away first"):
        store.fetch(DATASET, tmp_path / "data", make_zip(tmp_path / "toy.zip", FILES))
    assert own.read_text() == "mine" and [path.name for path in own.parent.iterdir()] == ["mine.txt"]


def test_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 100))
    for archive in (make_zip(tmp_path / "toy.zip", FILES), make_tar(tmp_path / "toy.tar.xz", FILES)):
        with pytest.raises(DataError, match=r"0 MiB free.*DEFECTLAB_DATA"):
            store.fetch(DATASET, tmp_path / "data", archive)
        assert nothing_left(tmp_path / "data")


def test_disk_fills_up_while_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(source, sink, *_) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(sink.write(source.read()))

    monkeypatch.setattr(shutil, "copyfileobj", full)  # what zipfile copies with
    with pytest.raises(DataError, match=r"the disk of .* is full; nothing was kept: free some space"):
        store.fetch(DATASET, tmp_path / "data", make_zip(tmp_path / "toy.zip", FILES))
    assert written and nothing_left(tmp_path / "data")


@pytest.mark.parametrize(
    ("place", "name", "code", "message"),
    [
        (store.tempfile, "mkdtemp", errno.EROFS, "could not be filled .*Read-only.*: check that it is writable"),
        (store, "FileLock", errno.EACCES, "could not be filled .*Permission denied.*: check that it is writable"),
        (Path, "write_text", errno.ENOSPC, "the disk of .* is full; nothing was kept: free some space"),
    ],
)
def test_folder_that_takes_nothing(tmp_path: Path, monkeypatch, place, name: str, code: int, message: str) -> None:
    def refuse(*_, **__) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(place, name, refuse)
    with pytest.raises(DataError, match=rf"^.*{message}, or choose another folder with --data-dir"):
        store.fetch(DATASET, tmp_path / "data", make_zip(tmp_path / "toy.zip", FILES))
    assert nothing_left(tmp_path / "data")


def test_data_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(DataError, match=r"could not be filled.*--data-dir"):
        store.fetch(DATASET, tmp_path / "data", make_zip(tmp_path / "toy.zip", FILES))
