"""Unpack NEU-Seg (4,470 grey images of hot-rolled steel strip with masks of three defects, 32 MB) into data/neu_seg.

    python data_scripts/neu_seg.py --archive FILE   use a local zip
    python data_scripts/neu_seg.py --verify         check every file

No address is fetched by this script: get the archive from the page. Its folders images/{training,test} and
annotations/{training,test} may lie below any other folder.

What is pinned: the decoded pixels of the 4,470 masks (another archive is refused) and of the 4,470 images (another
is noted "re-encoded"), computed from the archive whose sha256 is in `archive_sha256`, whose JPEG files were stored anew
without loss. All are 200 x 200 px, 3,630 for training and 840 for testing. Mask values: 0 background, 1 inclusion,
2 patches, 3 scratches (names from the literature); no mask is empty.

The files are kept as published, with their own defects. Most training images are quarter turns of test images (see
defectlab/data/instances.py). Four pairs of files are one image with two masks (test 000301 and 000305; training
001281 and 001285, 002151 and 002155, 003021 and 003025). 900 images, 600 of them in the test part, are NEU-DET's
images of these three classes to the last bit: never train on one of the two sets and test on the other.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import reduce
from PIL import Image
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from defectlab.data import fetch
from defectlab.data.images import pixel_hash, read_header
from defectlab.data.instances import CLASSES, NEU_SEG_PIXELS
from defectlab.files import DataError

COUNTS = {"training": 3630, "test": 840}
SIZE = (200, 200)
TURNS_HEADER = """\
# The 4,470 images of NEU-Seg by what they show: a line names all images that are one image, turned by 0, 90, 180
# or 270 degrees, after the classes in the mask of the first. Drawn by list_of_turns in data_scripts/neu_seg.py; a
# test draws it again.
"""
SAME = 0.998  # ours: the best correlation of an image with a turned one is above this or below 0.95 for all NEU-Seg


def pixels(folder: Path, group: str) -> str:
    """`pixel_hash` of all files of "images" or "annotations", in the order of paths; DataError for another size."""
    paths = sorted((folder / group).glob("*/*"))
    for path in paths:
        if (size := read_header(path, "fetch it again")[:2]) != SIZE:
            raise DataError(f"{path.relative_to(folder)} of the archive has {size} pixels, not {SIZE}: fetch it again")
    return pixel_hash(paths)


def _check(folder: Path) -> str:
    """DataError unless every image has its mask, there are as many as published, and the masks are those."""
    for part, count in COUNTS.items():
        images, masks = (
            {path.stem for path in (folder / group / part).glob("*")} for group in ("images", "annotations")
        )
        if images != masks or len(images) != count:
            raise DataError(
                f"NEU-Seg should have {count} {part} images, each with a mask; the archive has {len(images)} "
                f"images and {len(masks)} masks: fetch it again"
            )
    if pixels(folder, "annotations") != NEU_SEG_PIXELS["annotations"]:
        raise DataError("the masks of the archive are not those of NEU-Seg as published: fetch it again")
    return "" if pixels(folder, "images") == NEU_SEG_PIXELS["images"] else "re-encoded"


DATASET = fetch.DataSet(
    name="NEU-Seg",
    folder="neu_seg",
    command="python data_scripts/neu_seg.py",
    members=r"(?:.*/)?(?P<path>images/(?:training|test)/\d{6}\.jpg|annotations/(?:training|test)/\d{6}\.png)",
    sources=(),
    page="https://github.com/DHW-Master/NEU_Seg",
    licence="none stated",
    citation=(
        "Dong, Song, He, Xu, Yan, Meng: PGA-Net: Pyramid feature fusion and global context attention network for "
        "automated surface defect detection. IEEE TII 16(12), 7448-7458, 2020"
    ),
    archive_sha256=("db66e4da13f2d359d34b88fa61b63cdf72892ce4c64d790ccae2b5b619b002e0",),
    unpacked_limit=200_000_000,
    check=_check,
)
main = fetch.script(DATASET, __doc__)


def turn_groups(images: np.ndarray) -> np.ndarray:
    """(N,) int: images (N, S, S) uint8, S divisible by 25, get one number if they show the same, turned or not.

    The same: thumbnails of 25 x 25 px correlate by more than `SAME` under some quarter turn, directly or by way of
    others. NEU-Seg's turned copies were stored as JPEG again, so no two are equal to the last bit.
    """
    thumbnails = reduce(images.astype(np.float32), "n (h a) (w b) -> n h w", "mean", h=25, w=25)
    thumbnails -= thumbnails.mean((1, 2), keepdims=True)
    thumbnails /= np.linalg.norm(thumbnails, axis=(1, 2), keepdims=True) + 1e-6
    flat = thumbnails.reshape(len(images), -1)
    turned = (np.rot90(thumbnails, k, (1, 2)).reshape(flat.shape) for k in range(3))  # 270 degrees are 90 the other way
    same = np.logical_or.reduce([turn @ flat.T > SAME for turn in turned])  # (N, N)
    return connected_components(csr_matrix(same), directed=False)[1]


def list_of_turns(folder: Path) -> str:
    """The content of TURNS_LIST, from the unpacked set: "class+class part/number part/number ..." a line."""
    names = sorted(path.relative_to(folder / "images").with_suffix("").as_posix() for path in _images(folder))
    groups: dict[int, list[str]] = {}
    for name, group in zip(names, turn_groups(_stack(folder, names)), strict=True):
        groups.setdefault(int(group), []).append(name)
    lines = []
    for members in groups.values():
        values = np.unique(np.asarray(Image.open(folder / "annotations" / f"{members[0]}.png")))
        lines.append(" ".join(["+".join(CLASSES[value - 1] for value in values if value), *members]))
    return TURNS_HEADER + "".join(f"{line}\n" for line in lines)


def _images(folder: Path) -> list[Path]:
    return list((folder / "images").glob("*/*.jpg"))


def _stack(folder: Path, names: Sequence[str]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / "images" / f"{name}.jpg").convert("L")) for name in names])


if __name__ == "__main__":
    sys.exit(main())
