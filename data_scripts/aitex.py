"""Unpack the AITEX fabric database (244 strips of woven cloth) into data/aitex, as tiles in the layout of MVTec AD.

    python data_scripts/aitex.py --archive FILE   use a local zip
    python data_scripts/aitex.py --verify         check every file

No address is fetched by this script: get the archive from the page. Its folders Defect_images, Mask_images and
NODefect_images may lie below any other folder, as strips of 4096 x 256 px or as the pieces of 768 px of this study.

Half of the marked defects are thinner than 6 px, so nothing is shrunk: defectlab/data/splits/aitex.txt says which
three tiles of 256 x 256 px are cut from each strip, and on which side of the split the strip is. Good cloth goes to
train/good and test/good, a tile with a part of the mask to train/KIND or test/KIND, its mask to ground_truth/KIND, the
other tiles of a defective strip to unmarked: some have specks that nobody marked. Seven whole strips stay as they are.
The anomaly reader takes train/good and test; `defectlab.data.fabric` takes the defects of train and the strips, too.

What is pinned: the decoded pixels of all tiles and masks. Known flaws of the set: eight masks are cut off at the edge
of the 768 px, masks have grey edges (above 127 is defect), consecutive numbers are often one roll.
"""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from defectlab.data import fetch
from defectlab.data.anomaly import AITEX_LIST, AITEX_PIXELS
from defectlab.data.fabric import rolls
from defectlab.data.images import decode, pixel_hash, save_image
from defectlab.data.splits import draw_split, read_list
from defectlab.files import DataError

SIDE, TILES = 256, 3
KINDS = {  # of a defect, by the number in the middle of a name: 0001_002_00 is strip 1, a broken end, fabric 00
    "000": "good",
    "002": "broken_end",
    "006": "broken_yarn",
    "010": "broken_pick",
    "016": "weft_curling",
    "019": "fuzzyball",
    "022": "cut_selvage",
    "023": "crease",
    "025": "warp_ball",
    "027": "knots",
    "029": "contamination",
    "030": "nep",
    "036": "weft_crack",
}
WHOLE = ("0001_002_00", "0010_006_02", "0030_019_02", "0062_022_00", "0083_029_04", "0001_000_02", "0002_000_02")
HEADER = """\
# The strips of AITEX: name, left edge in px of the three tiles (in the strip of 4096 px), part, and which of the tiles
# have a part of the defect's mask. Left edges: those of this study's pieces of 768 px, placed so that the defect lies
# inside. The parts are drawn by drawn_for_test in data_scripts/aitex.py; a test draws them again.
"""


def kind(strip: str) -> str:
    return KINDS[strip.split("_")[1]]


def strips_in(folder: Path) -> dict[str, Path]:
    """Name -> file of each strip, or piece of one."""
    return {path.stem: path for path in sorted([*folder.glob("Defect_images/*"), *folder.glob("NODefect_images/*/*")])}


def mask_of(folder: Path, strip: str, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8, grey as published; some strips have two masks, which are one defect."""
    parts = sorted((folder / "Mask_images").glob(f"{strip}_mask*.png"))
    masks = [np.asarray(decode(path).convert("L")) for path in parts]
    if not masks or any(mask.shape != size[::-1] for mask in masks):
        raise DataError(f"{strip} of the archive has no mask of its size: fetch it again")
    return np.maximum.reduce(masks)


def list_of_strips(folder: Path) -> str:
    """The content of AITEX_LIST, from the whole archive of pieces, which has a crops.csv."""
    left = {Path(file).stem: x for file, x in pd.read_csv(folder / "crops.csv")[["file", "x0"]].itertuples(index=False)}
    test = set(drawn_for_test(left))
    lines = []
    for strip, path in strips_in(folder).items():
        marks = "0" * TILES
        if kind(strip) != "good":
            columns = (mask_of(folder, strip, decode(path).size) > 127).any(0)
            marks = "".join(str(int(part.any())) for part in np.split(columns, TILES))
        lines.append(f"{strip} {left[strip]} {'test' if strip in test else 'train'} {marks}\n")
    return HEADER + "".join(lines)


def drawn_for_test(strips: Iterable[str]) -> list[str]:
    """Three tenths of the good strips of each fabric, about half of all defective ones. Of these, what may be one roll
    stays on one side, so some kinds are on one side only; good strips are drawn one by one."""
    good = {strip: strip[-2:] for strip in strips if kind(strip) == "good"}
    together = rolls(strip for strip in strips if kind(strip) != "good")
    found = draw_split(good, 0.3, "aitex", {strip: strip for strip in good})
    return found + draw_split({strip: kind(strip) for strip in together}, 0.5, "aitex", together)


def _cut(folder: Path) -> str:
    """Cut the tiles; they and the whole strips replace what the archive held. DataError unless it is AITEX."""
    present = strips_in(folder)
    for line in read_list(AITEX_LIST):
        strip, left, part, marks = line.split()
        if strip not in present:
            raise DataError(f"the archive lacks the strip {strip}: fetch it again")
        image = np.asarray(decode(present[strip]).convert("L"))
        defective = kind(strip) != "good"
        mask = mask_of(folder, strip, image.shape[::-1]) if defective else np.zeros_like(image)
        start = 0 if image.shape[1] == SIDE * TILES else int(left)
        if image.shape[0] != SIDE or image.shape[1] < start + SIDE * TILES:
            raise DataError(f"{strip} of the archive has {image.shape[::-1]} pixels: take strips of 4096 x 256")
        for k, marked in enumerate(marks):
            columns, name = slice(start + k * SIDE, start + (k + 1) * SIDE), f"{strip}_{k}"
            if (mask[:, columns] > 127).any() != (marked == "1"):
                raise DataError(f"the mask of {strip} is not the published one: fetch the archive again")
            if marked == "1":
                save_image(folder / f"ground_truth/{kind(strip)}/{name}_mask.png", mask[:, columns])
            where = "unmarked" if defective and marked == "0" else f"{part}/{kind(strip)}"
            save_image(folder / where / f"{name}.png", image[:, columns])
    _keep_whole(folder, present)
    if pixels(folder) != AITEX_PIXELS:
        raise DataError("the tiles of the archive are not those of AITEX as published: fetch it again")
    return ""


def _keep_whole(folder: Path, present: dict[str, Path]) -> None:
    """The whole strips, with masks, to whole_strips; the folders of the archive go."""
    held = strips_in(folder / "whole_strips") or present
    for strip in WHOLE:
        image = np.asarray(decode(held[strip]).convert("L")) if strip in held else np.empty(0)
        if image.shape != (SIDE, SIDE * 16):
            raise DataError(f"the archive lacks {strip} as a whole strip of 4096 x 256: fetch it again")
        save_image(folder / f"whole_strips/{strip}.png", image)
        if kind(strip) != "good":
            mask = mask_of(held[strip].parents[1], strip, image.shape[::-1])
            save_image(folder / f"whole_strips/{strip}_mask.png", mask)
    for parent in (folder, folder / "whole_strips"):
        for name in ("Defect_images", "Mask_images", "NODefect_images"):
            shutil.rmtree(parent / name, ignore_errors=True)


def pixels(folder: Path) -> str:
    """`pixel_hash` of all tiles and their masks, in the order of paths."""
    return pixel_hash(path for path in sorted(folder.rglob("*.png")) if path.parent.name != "whole_strips")


FILES = r"(?:Defect_images|Mask_images|NODefect_images/[^/]+)/\d{4}_\d{3}_\d\d(?:_mask\d?)?\.png"
DATASET = fetch.DataSet(
    name="AITEX fabric",
    folder="aitex",
    command="python data_scripts/aitex.py",
    members=rf"(?:.*?/)?(?P<path>(?:whole_strips/)?{FILES})",
    sources=(),
    page="https://www.aitex.es/afid/",
    licence="none stated by the source; a third-party listing says CC0-1.0, which was not verified",
    citation=(
        "Silvestre-Blanes, Albero-Albero, Miralles, Pérez-Llorens, Moreno: A Public Fabric Database for Defect "
        "Detection Methods and Results. AUTEX Research Journal 19(4), 363-374, 2019"
    ),
    unpacked_limit=500_000_000,
    check=_cut,
)
main = fetch.script(DATASET, __doc__)


if __name__ == "__main__":
    sys.exit(main())
