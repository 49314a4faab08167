"""Fetch DeepPCB (1,500 pairs of binary board images, 640 x 640, with boxes) into data/deep_pcb.

    python data_scripts/deep_pcb.py                  download
    python data_scripts/deep_pcb.py --archive FILE   use a local copy: the repository's zip, or a tar of it
    python data_scripts/deep_pcb.py --verify         check every file

Kept are the inspected images NAME_test.jpg, their boxes NAME.txt, the official lists trainval.txt and test.txt, and
the defect-free templates NAME_temp.jpg, one of them (90100034) without an inspected image. The set "deep_pcb" is read
without the templates, "deep_pcb_pair" with them. The inspected image 44000020 (test list) has its boxes and class names
painted in.

What is pinned: the fingerprint of those 4,503 files, computed from the archive whose sha256 is in `archive_sha256`;
every fetched archive must give it. The zip that the public address serves was not fetched for this study.
"""

import sys
from pathlib import Path

from defectlab.data import fetch
from defectlab.files import DataError


def _check(folder: Path) -> str:
    """DataError unless there are 1,500 inspected images with boxes, 1,501 templates and lists of 1,000 and 500."""
    data = folder / "PCBData"
    counts = tuple(len(list(data.glob(f"group*/*/{pattern}"))) for pattern in ("*_test.jpg", "*_temp.jpg", "*.txt"))
    lists = [data / "trainval.txt", data / "test.txt"]
    lines = tuple(len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0 for path in lists)
    if counts != (1500, 1501, 1500) or lines != (1000, 500):
        raise DataError(
            "DeepPCB should have (1500, 1501, 1500) inspected images, templates and txt files and lists of (1000, "
            f"500), the archive has {counts} and {lines}: fetch it again"
        )
    return ""


DATASET = fetch.DataSet(
    name="DeepPCB",
    folder="deep_pcb",
    command="python data_scripts/deep_pcb.py",
    members=(
        r"(?:.*/)?(?P<path>PCBData/(?:(?:trainval|test)\.txt"
        r"|group\d+/\d+/\d+_(?:test|temp)\.jpg|group\d+/\d+_not/\d+\.txt))"
    ),
    sources=(
        fetch.Source("https://codeload.github.com/tangsanli5201/DeepPCB/zip/refs/heads/master", size=200_000_000),
        fetch.Source("https://github.com/tangsanli5201/DeepPCB/archive/refs/heads/master.zip", size=200_000_000),
    ),
    page="https://github.com/tangsanli5201/DeepPCB",
    licence="MIT; the authors offer it for research purposes",
    citation="Tang, He, Huang, Yang: Online PCB defect detector on a new PCB defect dataset. arXiv:1902.06197, 2019",
    archive_sha256=("f06f1baac4b76bda04b5e7167c729a48647652ff35c105bfa786d8188d294b73",),
    unpacked_limit=1_000_000_000,
    fingerprint="858b2d6350f3151841a235d921fb1fb218764f6c4a04aeece4e47f3abef309b5",
    check=_check,
)
main = fetch.script(DATASET, __doc__)


if __name__ == "__main__":
    sys.exit(main())
