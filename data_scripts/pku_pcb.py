"""Unpack PKU-Market-PCB, also called HRIPCB (693 colour pictures of boards with boxes), into data/pku_pcb.

    python data_scripts/pku_pcb.py --archive FILE   use a local archive
    python data_scripts/pku_pcb.py --verify         check every file

No public address of the archive is known for certain, so nothing is downloaded: get it from the page below. Read from
it, below any top-level folder (PCB_DATASET as published):

    images/Missing_hole/01_missing_hole_01.jpg          and Mouse_bite, Open_circuit, Short, Spur, Spurious_copper
    Annotations/Missing_hole/01_missing_hole_01.xml     Pascal VOC, classes missing_hole, mouse_bite, open_circuit, ...

The rotated copies (folder rotation) and the bare boards (PCB_USED) are left out. Checked are the 693 pictures with an
xml each. Nothing else is pinned: this script was tested on a drawn copy of the layout, never on the set itself.
"""

import sys
from pathlib import Path

from defectlab.data import fetch as store
from defectlab.files import DataError

FOLDERS = ("Missing_hole", "Mouse_bite", "Open_circuit", "Short", "Spur", "Spurious_copper")
EXPECTED = 693  # Huang & Wei, arXiv:1901.08204
CLASS = "|".join(FOLDERS)


def _check(folder: Path) -> str:
    """DataError unless there are as many pictures as published, some of each class, each with its xml."""
    pictures, annotations = (
        {path.relative_to(folder / top).with_suffix("") for path in folder.glob(f"{top}/*/*")}
        for top in ("images", "Annotations")
    )
    found = {path.parts[0] for path in pictures}
    if len(pictures) != EXPECTED or pictures != annotations or found != set(FOLDERS):
        raise DataError(
            f"PKU-Market-PCB should have {EXPECTED} pictures with an xml each in {', '.join(FOLDERS)}, the archive has "
            f"{len(pictures)} pictures and {len(annotations)} xml in {', '.join(sorted(found))}: fetch it again"
        )
    return ""


DATASET = store.DataSet(
    name="PKU-Market-PCB",
    folder="pku_pcb",
    command="python data_scripts/pku_pcb.py",
    members=rf"(?:.*/)?(?P<path>images/(?:{CLASS})/(?!\.)[^/]+\.jpg|Annotations/(?:{CLASS})/(?!\.)[^/]+\.xml)",
    sources=(),
    page="https://robotics.pkusz.edu.cn/resources/dataset/",
    licence="none stated",
    citation="Huang, Wei: A PCB dataset for defects detection and classification. arXiv:1901.08204, 2019",
    unpacked_limit=4 * 2**30,
    check=_check,
)


def main(argv: list[str] | None = None) -> int:
    return store.main(DATASET, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
