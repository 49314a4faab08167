"""Where things lie, files that are whole or not there, and locks between processes."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor


class DataError(RuntimeError):
    """Data that are missing, damaged or not what they claim; the message names the file and the remedy."""


class WeightsError(RuntimeError):
    """Pretrained weights are missing or do not fit; the message names the file and where to put it."""


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


def writable(folder: Path, remedy: str) -> None:
    """Make `folder` and try it, before any work: DataError, ending in the remedy, where no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror or error}): {remedy}") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(aside)` into a file beside `path`, then rename: what stands under `path` is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"could not write {path} ({reason}): free some disk space") from error
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Sorted and indented. ValueError for NaN or infinity, which JSON does not know."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """A .safetensors file, from whatever device and memory order."""
    from safetensors.torch import save_file  # needs torch, which takes a second

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda aside: save_file(plain, aside, header))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU and the header, which may be empty. SafetensorError or OSError where it is no such file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def locked(path: Path, log: Callable[[str], None] = print) -> Iterator[None]:
    """One process at a time, the others say that they wait; the lock goes with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(f"  waits for another process that is at {path.parent.name}/{path.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
