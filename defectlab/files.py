"""TODO files."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from safetensors import SafetensorError
from typing import Any
import contextlib
import fcntl
import json
import os
import time



def project_root() -> Path:
    """The repository, from wherever it is called; the current folder where the package is installed without it."""
    repository = Path(__file__).resolve().parents[2]
    return Path.cwd() if repository.name in ("site-packages", "dist-packages") else repository


def data_dir() -> Path:
    """Where data sets lie: DEFECTLAB_DATA, else `data` in the repository (in cwd, if not in a checkout)."""
    return Path(os.environ.get("DEFECTLAB_DATA") or project_root() / "data").expanduser()


def weights_dir() -> Path | None:
    """Where weights lie that cannot be downloaded: DEFECTLAB_WEIGHTS, else None."""
    chosen = os.environ.get("DEFECTLAB_WEIGHTS")
    return Path(chosen).expanduser() if chosen else None


class DataError(RuntimeError):
    """Data that are missing, damaged or not what they claim; the message names the file and the remedy."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write(aside)` into a file beside `path`, then rename: what stands under `path` is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        raise OSError(
            f"could not write {path} ({getattr(error, 'strerror', None) or error}): free some disk space"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, sort_keys=True)
    write_atomically(path, lambda aside: aside.write_text(text + "\n"))


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """One process at a time, the others say that they wait; the lock goes with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"  waits for another process that is at {path.parent.name}/{path.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
