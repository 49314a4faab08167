"""Unpack a downloaded archive without trusting it."""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from defectlab.files import DataError

_DAMAGED = (zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, RuntimeError)


def require_space(folder: Path, size: int) -> None:
    """DataError unless the disk of `folder` has `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DataError(
            f"{folder} has {free / 2**20:.0f} MiB free, {size / 2**20:.0f} MiB are needed: free some space, "
            "or choose another disk with --data-dir or DEFECTLAB_DATA"
        )


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    is_file: bool  # False for a folder
    is_special: bool  # a link, a device, a pipe
    open: Callable[[], IO[bytes]]


def _zip_members(archive: zipfile.ZipFile) -> Iterator[_Member]:
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the writer was not a Unix
        special = kind not in (0, stat.S_IFREG, stat.S_IFDIR)
        yield _Member(info.filename, info.file_size, not info.is_dir(), special, lambda info=info: archive.open(info))


def _tar_members(archive: tarfile.TarFile) -> Iterator[_Member]:
    for info in archive:  # one pass: a compressed archive of 5 GB is slow to read twice
        special = not (info.isreg() or info.isdir())
        yield _Member(info.name, info.size, info.isreg(), special, lambda info=info: archive.extractfile(info))


@contextmanager
def _open_archive(path: Path) -> Iterator[Iterable[_Member]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield list(_zip_members(archive))
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            yield _tar_members(archive)
    else:
        raise DataError(f"{path} is damaged, or neither a zip nor a tar archive: fetch it again")


def _copy(source: IO[bytes], sink: IO[bytes], size: int) -> bool:
    """Copy to the end of `source`, never more than `size` bytes; False if it does not hold exactly `size`."""
    written = 0
    while chunk := source.read(min(2**20, size - written + 1)):
        written += len(chunk)
        if written > size:
            return False
        sink.write(chunk)
    return written == size


def _check_member(member: _Member, archive: Path) -> None:
    parts = PurePosixPath(member.name).parts + PureWindowsPath(member.name).parts
    windows = PureWindowsPath(member.name)
    if ".." in parts or windows.root or windows.drive:  # a leading "/" is a root to both systems
        raise DataError(f"{archive} holds {member.name!r}, which lies outside its folder: do not use it")
    if member.is_special:
        raise DataError(f"{archive} holds {member.name!r}, a link or a device: do not use it")


def unpack(archive: Path, folder: Path, members: str, limit: int = 2 * 2**30) -> None:
    """Unpack the files of a zip or tar (also .gz, .bz2, .xz) whose names match `members` into `folder`.

    `members`: see `store.DataSet`. `limit`: the most bytes written. DataError: a damaged archive, any member that
    is a link or device or would lie outside the folder, two members for one path, too many bytes, no match, too
    little free space. OSError from writing passes through. What was written until then stays: call it inside
    `store.create_folder`.
    """
    wanted = re.compile(members)
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    try:
        with _open_archive(archive) as listed:
            if isinstance(listed, list):  # a zip tells all sizes beforehand, a tar as it goes
                sizes = sum(member.size for member in listed if member.is_file and wanted.fullmatch(member.name))
                require_space(folder, min(sizes, limit))
            for member in listed:
                _check_member(member, archive)
                match = wanted.fullmatch(member.name)
                if match is None or not member.is_file:
                    continue
                total += member.size
                if total > limit:
                    raise DataError(f"{archive} unpacks to more than {limit} bytes: it is not this set, fetch it again")
                require_space(folder, member.size)
                path = folder / match["path"]
                if path.exists():
                    raise DataError(f"{archive} holds two files for {match['path']}: fetch it again")
                path.parent.mkdir(parents=True, exist_ok=True)
                with member.open() as source, path.open("xb") as sink:
                    if not _copy(source, sink, member.size):
                        raise DataError(
                            f"{archive} is damaged: {member.name} has not its declared size: fetch it again"
                        )
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"{archive} is damaged ({error}): fetch it again") from error
    if total == 0:
        raise DataError(f"{archive} holds no file of this data set: check that it is the right archive")
