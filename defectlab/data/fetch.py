"""Fetch, unpack and verify data sets: what is behind every script in `data_scripts`.

A data set is a folder below `data_dir()` with a `manifest.json` that lists every file's size and sha256. It appears by
one rename when it is complete. Readers call `quick_check` at every load; `verify` reads every byte.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PureWindowsPath

import pooch
from filelock import FileLock

from defectlab.files import DataError, data_dir, disk_full, write_json

MANIFEST = "manifest.json"
_SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}  # file managers leave these behind
_NOT_READ = (zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError)
_NOT_READ += (NotImplementedError, UnicodeError)  # a compression that Python lacks, names in another code
_PACK_ANEW = "unpack it and pack the folder as zip"
_OTHER_KINDS = {  # what people have instead of a zip or a tar, by its first bytes (a split zip: or its last)
    rb"\ARar!\x1a\x07": f"is a rar archive: {_PACK_ANEW}",
    rb"\A7z\xbc\xaf\x27\x1c": f"is a 7z archive: {_PACK_ANEW}",
    rb"\APK\x07\x08|PK\x05\x06(?!\0\0|\xff\xff)": f"is a part of a split zip: with all parts, {_PACK_ANEW}",
    rb"\A(?:\xef\xbb\xbf)?\s*<": "is a web page: fetch the archive in a browser, its address may ask for a login",
    rb"\A\Z": "is empty: fetch it again",
}


@dataclass(frozen=True)
class Source:
    """One public address of an archive; `sha256` is None where it is not known."""

    url: str
    sha256: str | None = None
    size: int = 0  # bytes, about: free space is checked before the download


@dataclass(frozen=True)
class DataSet:
    """What a data script knows about its set.

    `members` is a regular expression over the full member names of an archive, whatever its top-level folders; its
    group `path` is where a matching member goes below `folder`; any other named group goes into the subfolder of that
    name. Others are left out. `check` gets the unpacked folder, raises DataError if it is not this set, and returns a
    note for the manifest (such as "reduced", or "").
    """

    name: str  # as printed
    folder: str  # below data_dir(), "/" between parts
    command: str  # the command that fetches it
    members: str
    sources: tuple[Source, ...]
    page: str
    licence: str
    citation: str
    archive_sha256: tuple[str, ...] = ()  # archives known to hold the set, beside those in `sources`
    unpacked_limit: int = 2 * 2**30  # bytes; an archive that unpacks to more is refused
    fingerprint: str | None = None  # of the content, see `Manifest`
    check: Callable[[Path], str] | None = None


@dataclass(frozen=True)
class Manifest:
    """`files`: path in the folder ("/" between parts) -> (size in bytes, sha256).

    `fingerprint`: sha256 over the lines "path sha256\\n", sorted by path, whatever archive they came from.
    """

    name: str
    note: str
    source: str
    archive_sha256: str | None
    fingerprint: str
    files: dict[str, tuple[int, str]]


# --------------------------------------------------------------------------------------------------- manifest


def _fingerprint(files: dict[str, tuple[int, str]]) -> str:
    return hashlib.sha256("".join(f"{path} {sha}\n" for path, (_, sha) in sorted(files.items())).encode()).hexdigest()


def _list_files(folder: Path) -> Iterator[tuple[str, int]]:
    """(relative path, size) of every file of the set: not the manifest, nor what file managers leave."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in map(Path(parent).joinpath, names):
            relative = path.relative_to(folder).as_posix()
            if relative != MANIFEST and not path.name.startswith(".") and path.name not in _SYSTEM_FILES:
                yield relative, path.stat().st_size if path.exists() else -1  # a broken link


def write_manifest(folder: Path, name: str, source: str, note: str = "", archive_sha256: str | None = None) -> Manifest:
    """Hash every file below `folder` and write its manifest.json."""
    files = {path: (size, pooch.file_hash(folder / path, "sha256")) for path, size in _list_files(folder)}
    manifest = Manifest(name, note, source, archive_sha256, _fingerprint(files), dict(sorted(files.items())))
    write_json(folder / MANIFEST, asdict(manifest))
    return manifest


def read_manifest(folder: Path, remedy: str) -> Manifest:
    """The manifest of `folder`; DataError (ending in `remedy`) if it is missing, unreadable or edited."""
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: {remedy}")
    path, again = folder / MANIFEST, f"delete {folder}, then {remedy}"
    if not path.is_file():
        raise DataError(f"{path} is missing, nothing says that the set is complete: move {folder} away, then {remedy}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        files = {name: (int(size), str(sha256)) for name, (size, sha256) in fields.pop("files").items()}
        manifest = Manifest(**fields, files=files)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}): {again}") from error
    if _fingerprint(files) != manifest.fingerprint:
        raise DataError(f"{path} was edited (its fingerprint does not fit its list): {again}")
    return manifest


def quick_check(folder: Path, remedy: str) -> Manifest:
    """Compare names and sizes with the manifest, reading no file; DataError names the first that differs."""
    manifest = read_manifest(folder, remedy)
    present = dict(_list_files(folder))
    for path, (size, _) in manifest.files.items():
        if present.get(path) != size:
            found = f"has {present[path]} bytes, expected {size}" if path in present else "is missing"
            raise DataError(f"{folder / path} {found}: delete {folder}, then {remedy}")
    if extra := sorted(present.keys() - manifest.files.keys()):
        raise DataError(f"{folder / extra[0]} does not belong to {manifest.name}: move it out of {folder}")
    return manifest


def verify(folder: Path, remedy: str) -> Manifest:
    """`quick_check`, then the sha256 of every file."""
    manifest = quick_check(folder, remedy)
    for path, (_, expected) in manifest.files.items():
        got = pooch.file_hash(folder / path, "sha256")
        if got != expected:
            raise DataError(f"{folder / path} has sha256 {got}, expected {expected}: delete {folder}, then {remedy}")
    return manifest


def _check_fingerprint(dataset: DataSet, manifest: Manifest, where: Path) -> None:
    if dataset.fingerprint not in (None, manifest.fingerprint):
        raise DataError(
            f"{where} does not hold {dataset.name} as published: content fingerprint {manifest.fingerprint}, "
            f"expected {dataset.fingerprint}: fetch the archive again from {dataset.page}"
        )


# ---------------------------------------------------------------------------------------- folders, atomically


def create_folder(
    target: Path, fill: Callable[[Path], Manifest], existing: Callable[[], Manifest | None] = lambda: None
) -> Manifest:
    """Let `fill` write a set and its manifest into a temporary sibling, then rename that to `target`.

    A folder at `target` is replaced if it has a manifest, else refused. On any error nothing is left behind. Processes
    take turns; `existing`, asked when a turn comes, returns the manifest where another has just done the work.
    """
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{target.name}.lock"):
            if manifest := existing():
                return manifest
            if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
                raise DataError(f"{target} exists and has no {MANIFEST}: move it away first, it would be overwritten")
            for left in folder.glob(f".{target.name}.*.part"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=folder))
            try:
                manifest = fill(temporary / "new")
                old = target.rename(temporary / "old") if target.is_dir() else None
                try:
                    (temporary / "new").rename(target)
                except BaseException:
                    if old:
                        old.rename(target)
                    raise
                return manifest
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        full = f"the disk of {folder} is full; nothing was kept: free some space"
        message = full if disk_full(error) else f"{folder} could not be filled ({error}): check that it is writable"
        raise DataError(f"{message}, or choose another folder with --data-dir or DEFECTLAB_DATA") from error


# -------------------------------------------------------------------------------------------------------- unpacking


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DataError(
            f"{folder} has {free / 2**20:.0f} MiB free, {size / 2**20:.0f} MiB are needed: free some space, "
            "or choose another disk with --data-dir or DEFECTLAB_DATA"
        )


def _check_kind(archive: Path) -> None:
    """DataError for what people have instead of a zip or a tar."""
    with archive.open("rb") as file:
        ends = file.read(512)
        file.seek(max(0, archive.stat().st_size - 2**16))
        ends += file.read()
    for pattern, message in _OTHER_KINDS.items():
        if re.search(pattern, ends):
            raise DataError(f"{archive} {message}")


def unpack(archive: Path, folder: Path, members: str, limit: int = 2 * 2**30) -> None:
    """Unpack the files of a zip or tar (also .gz, .bz2, .xz) whose names match `members` into `folder`.

    `members`: see `DataSet`; a backslash counts as "/". `limit`: the most bytes written. DataError: an archive of
    another kind or damaged, any member that is a link or device or would lie outside the folder, two members for one
    path, too many bytes, no match, too little free space. What was written stays: call it inside `create_folder`.
    """
    wanted, total, taken, inner = re.compile(members), 0, set(), ""
    _check_kind(archive)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        is_zip = zipfile.is_zipfile(archive)
        if not is_zip and not tarfile.is_tarfile(archive):
            raise DataError(f"{archive} is damaged, or neither a zip nor a tar: fetch it again, or {_PACK_ANEW}")
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as opened:
            for member in opened.infolist() if is_zip else opened:  # a tar in one pass: 5 GB are slow to read twice
                if is_zip:
                    name, size, is_folder = member.filename, member.file_size, member.filename.endswith("/")
                    is_plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)  # 0: no Unix
                    if member.header_offset < 0:
                        raise zipfile.BadZipFile("its beginning is missing")
                    if member.flag_bits & 1:
                        raise DataError(f"{archive} asks for a password: {_PACK_ANEW}")
                else:
                    name, size, is_folder = member.name, member.size, member.isdir()
                    is_plain = is_folder or member.isreg()
                windows = PureWindowsPath(name)  # to it, "/" is a separator, too
                if windows.anchor or ".." in windows.parts:
                    raise DataError(f"{archive} holds {name!r}, which lies outside its folder: do not use it")
                if not is_plain:
                    raise DataError(f"{archive} holds {name!r}, a link or a device: do not use it")
                match = wanted.fullmatch(name.replace("\\", "/"))
                if match is None or is_folder:
                    inner = name if name.lower().endswith((".zip", ".rar", ".7z", ".tar", ".gz", ".xz")) else inner
                    continue
                group, path = match.lastgroup, match[match.lastgroup]
                path = path if group == "path" else f"{group}/{path}"
                if re.fullmatch("[ -~]{1,200}", path) is None:  # what every file system takes, and keeps as it is
                    raise DataError(f"{archive} holds the name {path[:50]!r}, too long or not ASCII: is it this set?")
                total += size
                if total > limit:
                    raise DataError(f"{archive} unpacks to more than {limit} bytes: it is not this set, fetch it again")
                _require_space(folder, size)
                if path.lower() in taken:
                    raise DataError(f"{archive} holds two files for {path} (case does not count): keep one")
                taken.add(path.lower())
                if is_zip:
                    member.filename = path
                    opened.extract(member, folder)  # at most the declared size is read, and its checksum compared
                else:
                    opened.extract(member.replace(name=path, deep=False), folder, filter="data")
    except _NOT_READ as error:
        raise DataError(f"{archive} is damaged, or not read here ({error}): fetch it again, or {_PACK_ANEW}") from error
    if not taken:
        remedy = f"unpack {inner!r} in it, and give that" if inner else "check that it is the right archive"
        raise DataError(f"{archive} holds no file of this data set: {remedy}")


# ---------------------------------------------------------------------------------------- fetch, command line


def _check_archive_hash(dataset: DataSet, archive: Path, expected: Sequence[str]) -> str:
    got = pooch.file_hash(str(archive), "sha256")
    if expected and got not in expected:
        remedy = f"delete it and fetch it again from {dataset.page}"
        raise DataError(f"{archive} has sha256 {got}, expected {' or '.join(expected)}: {remedy}")
    return got


def _download(dataset: DataSet, folder: Path) -> tuple[Path, str, str]:
    """Try the sources in order: (archive, its sha256, url) of the first that answers with the right bytes."""
    failures = []
    for source in dataset.sources:
        try:
            _require_space(folder, source.size)
            downloader = pooch.HTTPDownloader(timeout=60)
            path = Path(pooch.retrieve(source.url, None, fname="archive", path=folder, downloader=downloader))
            _check_kind(path)
            return path, _check_archive_hash(dataset, path, [source.sha256] if source.sha256 else []), source.url
        except (OSError, ValueError, DataError) as error:
            if disk_full(error):
                raise
            failures.append(f"{source.url}: {type(error).__name__}, {error}")
            (folder / "archive").unlink(missing_ok=True)
    tried = "; ".join(failures) or "it has no address that a script may fetch"
    remedy = f"get the archive from {dataset.page} and run `{dataset.command} --archive FILE`"
    raise DataError(f"{dataset.name} could not be downloaded ({tried}): {remedy}")


def fetch(dataset: DataSet, root: Path, archive: Path | None = None) -> Manifest:
    """Put the set into `root / dataset.folder`, from `archive` or its addresses. Raises DataError.

    Without `archive`, a folder that is already there and passes `quick_check` is kept. A local archive is judged
    by its content (pinned fingerprint or check function); where the set has neither, by its sha256.
    """
    target, given = root / dataset.folder, archive is not None

    def there() -> Manifest | None:
        if given or not (target / MANIFEST).is_file():
            return None
        _check_fingerprint(dataset, manifest := quick_check(target, f"run `{dataset.command}`"), target)
        return manifest

    if manifest := there():
        return manifest
    if given and not archive.is_file():
        fault = "is a folder: pack it as zip, and" if archive.is_dir() else "is not a file:"
        raise DataError(f"{archive} {fault} give the path of the archive of {dataset.name} ({dataset.page})")

    def fill(folder: Path) -> Manifest:
        if given:
            known = [*dataset.archive_sha256, *(source.sha256 for source in dataset.sources if source.sha256)]
            path, source = archive, archive.name
            sha256 = _check_archive_hash(dataset, path, [] if dataset.fingerprint or dataset.check else known)
        else:
            path, sha256, source = _download(dataset, folder.parent)
        unpack(path, folder, dataset.members, dataset.unpacked_limit)
        manifest = write_manifest(folder, dataset.name, source, dataset.check(folder) if dataset.check else "", sha256)
        _check_fingerprint(dataset, manifest, path)
        return manifest

    return create_folder(target, fill, there)


def argument_parser(description: str | None, archive: bool = True) -> argparse.ArgumentParser:
    """The options that every data script has; a script that only draws has no `archive`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if archive:
        parser.add_argument("--archive", type=Path, metavar="FILE", help="a local zip or tar: nothing is downloaded")
    parser.add_argument("--verify", action="store_true", help="read every file of the set again and compare its sha256")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="instead of DEFECTLAB_DATA, or ./data")
    return parser


def make_sets(
    sets: dict[str, Callable[[Path], Manifest]],
    options: argparse.Namespace,
    command: str,
    check: Callable[[Manifest, Path], None] = lambda manifest, folder: None,
) -> int:
    """Make each set, or verify what is there; the exit status, 1 with one line on stderr.

    `sets`: folder below the data root -> what makes it, given that root. `command`: what to run where one is missing.
    """
    root = options.data_dir or data_dir()
    try:
        for folder, make in sets.items():
            manifest = verify(root / folder, f"run `{command}`") if options.verify else make(root)
            check(manifest, root / folder)
            note = f" ({manifest.note})" if manifest.note else ""
            print(f"{manifest.name}{note}: {len(manifest.files)} files in {root / folder}")
            print(f"source:      {manifest.source}\nfingerprint: {manifest.fingerprint}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("every file verified" if options.verify else "ready")
    return 0


def run(dataset: DataSet, options: argparse.Namespace) -> int:
    """Fetch or verify `dataset` as the parsed options say; the exit status."""
    print(f"licence:     {dataset.licence}\ncite:        {dataset.citation}\npage:        {dataset.page}")
    sets = {dataset.folder: lambda root: fetch(dataset, root, options.archive)}
    return make_sets(sets, options, dataset.command, partial(_check_fingerprint, dataset))


def script(dataset: DataSet, description: str | None) -> Callable[..., int]:
    """The command line of a script with one set: fetch, or `--archive FILE`, `--verify`, `--data-dir DIR`."""
    return lambda argv=None: run(dataset, argument_parser(description).parse_args(argv))
