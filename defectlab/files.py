"""Where things lie, files that are whole or not there, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor


FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, a quota


class DataError(RuntimeError):
    """Data that are missing, damaged or not what they claim; the message names the file and the remedy."""


class WeightsError(RuntimeError):
    """Pretrained weights are missing or do not fit; the message names the file and where to put it."""


class Busy(RuntimeError):
    """Another process is at it; the message says at what."""


def project_root() -> Path:
    """The repository, from wherever it is called; the current folder where the package is installed without it."""
    repository = Path(__file__).resolve().parents[1]
    return Path.cwd() if repository.name in ("site-packages", "dist-packages") else repository


def data_dir() -> Path:
    """Where data sets lie: DEFECTLAB_DATA, else `data` in the repository (in cwd, if not in a checkout)."""
    return Path(os.environ.get("DEFECTLAB_DATA") or project_root() / "data").expanduser()


def weights_dir() -> Path | None:
    """Where weights lie that cannot be downloaded: DEFECTLAB_WEIGHTS, else None."""
    chosen = os.environ.get("DEFECTLAB_WEIGHTS")
    return Path(chosen).expanduser() if chosen else None


def writable(folder: Path, remedy: str = "make it writable, or work in a copy of the checkout that is") -> None:
    """Make `folder` and try it, before any work: DataError, ending in the remedy, where it takes no file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror or error}): {remedy}") from error


def disk_full(error: BaseException | None) -> bool:
    """Whether it says that a disk or a quota is full, or what it was raised from does."""
    return error is not None and (getattr(error, "errno", None) in FULL or disk_full(error.__cause__))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(aside)` into a file beside `path`, then `rename`: what stands under `path` is always whole.

    OSError names the file and the remedy, and keeps the errno of what went wrong.
    """
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        rename(aside, path)
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of the former
        told = re.search(r"\(os error (\d+)\)", str(error))
        code = int(told[1]) if told else getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or error
        remedy = "free some disk space" if code in FULL else f"make {path.parent} a folder that can be written"
        failed = OSError(f"could not write {path} ({reason}): {remedy}")
        failed.errno = code
        raise failed from error
    finally:
        with contextlib.suppress(OSError):  # it is gone, or nothing can be written there
            aside.unlink()


def rename(aside: Path, path: Path) -> None:
    """`aside` becomes `path`, and what it holds is on the disk before its name: a power loss leaves it whole, or not
    there."""
    with aside.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    with contextlib.suppress(OSError):  # Windows opens no folder, some network drives sync none
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Sorted and indented. ValueError for NaN or infinity, which JSON does not know."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """A .safetensors file, from whatever device and memory order."""
    from safetensors.torch import save_file  # needs torch, which takes a second

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def write(aside: Path) -> None:
        save_file(plain, aside, header)
        aside.chmod(path.parent.stat().st_mode & 0o666)  # as its folder: safetensors' files are for their owner alone

    write_atomically(path, write)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU and the header, which may be empty. SafetensorError or OSError where it is no such file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def locked(
    path: Path, log: Callable[[str], None] = print, wait: bool = True, late: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """One process at a time, the others say that they wait, or raise Busy: at once where `wait` is False, else when it
    is `late`. The lock goes with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        place = f"{path.parent.name}/{path.name}"
        if not wait:
            raise Busy(f"another process is at {place}") from None
        log(f"  waits for another process that is at {place}")
        while not lock.is_locked:
            try:
                lock.acquire(timeout=1)
            except Timeout:
                if late():
                    raise Busy(f"another process is at {place}") from None
    try:
        yield
    finally:
        lock.release()
