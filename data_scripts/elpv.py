"""Unpack ELPV (2,624 electroluminescence images of solar cells with the probability of a defect; 91 MB) into data/elpv.

    python data_scripts/elpv.py --archive FILE   use a local zip, or the wheel of the authors' Python package
    python data_scripts/elpv.py --verify         check every file

No address is fetched by this script: `pip download --no-deps elpv-dataset==1.0.0.post1` gets the wheel, which is a zip.
It holds images/cellNNNN.png (grey, 300 x 300 px) and labels.csv: image, probability, mono or poly, between spaces.
What is pinned: the bytes of all images and of labels.csv. Which of the 44 modules a cell was cut from is not in it, so
no split can be sure to keep the cells of a module together: see defectlab/data/cells.py.
"""

import sys
from pathlib import Path

from defectlab.data import fetch
from defectlab.data.cells import ELPV, read_labels
from defectlab.data.images import read_header
from defectlab.files import DataError

COUNT = 2624  # images, each with a label
SIDE = 300  # px


def _check(folder: Path) -> str:
    """DataError unless there are as many images as published, of one size, each with a label."""
    again = "fetch the archive again"
    images = {path.relative_to(folder).as_posix() for path in (folder / "images").glob("*.png")}
    labelled = {image for image, _, _ in read_labels(folder / "labels.csv", again).values()}
    if not len(images) == len(images & labelled) == len(labelled) == COUNT:
        found = f"{len(images)} and {len(labelled)}, {len(images & labelled)} of them in both"
        raise DataError(f"ELPV should have {COUNT} images and a label of each, not {found}: {again}")
    for image in sorted(images):
        if (size := read_header(folder / image, again)[:2]) != (SIDE, SIDE):
            raise DataError(f"{image} has {size} pixels, not {(SIDE, SIDE)}: {again}, not a reduced one")
    return ""


DATASET = fetch.DataSet(
    name="ELPV, solar cells",
    folder=ELPV,
    command="python data_scripts/elpv.py",
    members=r"(?:.*/)?(?P<path>images/cell\d{4}\.png|labels\.csv)",
    sources=(),
    page="https://github.com/zae-bayern/elpv-dataset",
    licence="CC BY-NC-SA 4.0 (no commercial use)",
    citation=(
        "Buerhop-Lutz et al.: A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence "
        "Imagery. EU PVSEC, 2018; Deitsch et al.: Automatic classification of defective photovoltaic module cells in "
        "electroluminescence images. Solar Energy 185, 455-468, 2019; Deitsch et al.: Segmentation of photovoltaic "
        "module cells in uncalibrated electroluminescence images. Machine Vision and Applications 32(4), 2021"
    ),
    unpacked_limit=200_000_000,
    fingerprint="fe1451ba1adeaa0a02e79780415a40ede2a35aae35d4291fe9aecbab2541fa1f",
    check=_check,
)
main = fetch.script(DATASET, __doc__)


if __name__ == "__main__":
    sys.exit(main())
