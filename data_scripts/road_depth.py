"""Unpack the pothole set with depth (67 frames: colour, disparity, pixel labels; 6 MB) into data/road_depth.

    python data_scripts/road_depth.py --archive FILE   use a local zip
    python data_scripts/road_depth.py --verify         check every file

No address is fetched by this script: get the archive from the page. The readers take it reduced: dataset1 to dataset3,
in each rgb/NN.jpg, disp/NN.png (transformed disparity, 16 bit, 0 to 1023) and label/NN.png, 320 px wide. To reduce the
published files (1,710 to 1,730 px): colour by Lanczos, disparity by the mean over boxes, labels by nearest pixel.

A road is no industrial surface; it is the only set of real colour images with aligned depth that could be had. Every
frame shows a pothole, so there are no good images: pixel metrics only. The disparity of sessions 1 and 3 has gaps.
"""

import sys
from pathlib import Path

from defectlab.data import fetch
from defectlab.data.frames import FRAMES
from defectlab.data.images import read_header
from defectlab.files import DataError

WIDTH = 320  # px


def _check(folder: Path) -> str:
    """DataError unless each session has its frames, each with all three files, reduced as the readers take them."""
    for session, frames in FRAMES.items():
        for kind in ("rgb", "disp", "label"):
            found = {path.stem for path in (folder / f"dataset{session}" / kind).glob("*")}
            if found != set(frames):
                where = f"dataset{session}/{kind}"
                raise DataError(f"{where} should have {len(frames)} frames, not {len(found)}: fetch the archive again")
    for path in sorted(folder.glob("dataset*/rgb/*")):
        if (width := read_header(path, "fetch the archive again")[0]) != WIDTH:
            raise DataError(f"{path.relative_to(folder)} is {width} px wide, not {WIDTH}: reduce the frames first")
    return "reduced"


DATASET = fetch.DataSet(
    name="potholes with depth",
    folder="road_depth",
    command="python data_scripts/road_depth.py",
    members=r"(?:.*/)?(?P<path>dataset[123]/(?:rgb/\d\d\.jpg|(?:disp|label)/\d\d\.png))",
    sources=(),
    page="https://github.com/ruirangerfan/stereo_pothole_datasets",
    licence="MIT",
    citation=(
        "Fan, Ozgunalp, Hosking, Liu, Pitas: Pothole detection based on disparity transformation and road surface "
        "modeling. IEEE TIP 29, 897-908, 2020"
    ),
    unpacked_limit=100_000_000,
    check=_check,
)
main = fetch.script(DATASET, __doc__)


if __name__ == "__main__":
    sys.exit(main())
