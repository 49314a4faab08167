"""Unpack BSData (ball screws with pits; 325 labelled frames of one type are used; 31 MB) into data/bsdata.

    python data_scripts/bsdata.py --archive FILE   use a local zip
    python data_scripts/bsdata.py --verify         check every file

No address is fetched by this script: get the archive from the page. Frames lie in images/ (or data/), outlines of the
pits in polygons/ (or label/) as JSON, as labelme writes it or as in this study's archive. The masks are drawn from the
outlines. Only frames of the type that is used (01_*) are unpacked; an archive may have the other type reduced.
What is pinned: the decoded pixels of the masks. The official split, 51 frames of this type to test on, is
defectlab/data/splits/bsdata_official_test.txt; it leaks: see defectlab/data/frames.py.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from defectlab.data import fetch
from defectlab.data.frames import SCREW_MASKS
from defectlab.data.images import decode, pixel_hash, save_image
from defectlab.files import DataError

COUNT = 325  # labelled frames whose name begins with 01_


def outlines(path: Path) -> list[list[tuple[float, float]]]:
    """Each pit's corners (x, y) in pixels of the image."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        scale = found.get("scale", 1)
        polygons = found["polygons"] if "polygons" in found else [shape["points"] for shape in found["shapes"]]
        return [[(x * scale, y * scale) for x, y in polygon] for polygon in polygons]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path.name} of the archive holds no outlines ({error}): fetch it again") from error


def _draw(folder: Path) -> str:
    """Draw the masks; the outlines go. DataError unless there are as many labelled frames as published."""
    for name, own in (("data", "images"), ("label", "polygons")):
        if (folder / name).is_dir():
            (folder / name).rename(folder / own)
    labelled = sorted((folder / "polygons").glob("01_*.json"))
    if len(labelled) != COUNT:
        raise DataError(f"BSData should have {COUNT} labelled frames 01_*, not {len(labelled)}: fetch it again")
    for path in labelled:
        image = folder / "images" / f"{path.stem}.jpg"
        mask = Image.new("L", decode(image, "fetch the archive again").size)
        for corners in outlines(path):
            ImageDraw.Draw(mask).polygon(corners, fill=255, outline=255)
        save_image(folder / "masks" / f"{path.stem}.png", np.asarray(mask))
    shutil.rmtree(folder / "polygons")
    if pixel_hash(sorted((folder / "masks").glob("*"))) != SCREW_MASKS:
        raise DataError("the outlines of the archive are not those of BSData as published: fetch it again")
    return ""


DATASET = fetch.DataSet(
    name="BSData, ball screws",
    folder="bsdata",
    command="python data_scripts/bsdata.py",
    members=r"(?:.*/)?(?P<path>(?:images|data)/01_[^/]+\.jpg|(?:polygons|label)/01_[^/]+\.json)",
    sources=(),
    page="https://github.com/2Obe/BSData",
    licence="CC BY-SA 4.0",
    citation=(
        "Schlagenhauf, Landwehr: Industrial machine tool component surface defect dataset. Data in Brief 39, 107643, "
        "2021"
    ),
    unpacked_limit=200_000_000,
    check=_draw,
)
main = fetch.script(DATASET, __doc__)


if __name__ == "__main__":
    sys.exit(main())
