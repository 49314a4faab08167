"""A toy data set and archives of it, whole and odd."""

import io
import tarfile
import zipfile
from pathlib import Path

from defectlab.data.fetch import DataSet

FILES = {"a/1.txt": b"one", "a/2.txt": b"two", "b/3.txt": b"three" * 100}
DATASET = DataSet(
    name="toy set",
    folder="group/toy",
    command="python data_scripts/toy.py",
    members=r"(?:.*/)?(?P<path>[ab]/[^/]+\.txt)",
    sources=(),
    page="https://example.org/toy",
    licence="free",
    citation="nobody",
    check=lambda folder: "",
)


def make_zip(path: Path, files: dict[str, bytes], top: str = "top/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(top + name, content)
    return path


def make_tar(path: Path, files: dict[str | tarfile.TarInfo, bytes], mode: str = "w:xz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def nothing_left(root: Path) -> bool:
    """Only lock files and empty folders remain."""
    return not [p for p in root.rglob("*") if p.suffix != ".lock" and (p.is_file() or p.suffix == ".part")]
