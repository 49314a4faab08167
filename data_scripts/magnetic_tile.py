"""Fetch the magnetic-tile defect set (1,344 grey images with masks, 52 MB) into data/magnetic_tile.

    python data_scripts/magnetic_tile.py                  download
    python data_scripts/magnetic_tile.py --archive FILE   use a local zip
    python data_scripts/magnetic_tile.py --verify         check every file

What is pinned: the fingerprint of the 2,688 image and mask files, computed from an archive of the authors' files
(its sha256 is in `archive_sha256`); every fetched archive must give that fingerprint. The sha256 of the zip that the
public address serves is not pinned: it was never fetched for this study, and GitHub does not promise stable bytes.
"""

import sys

from defectlab.data import fetch

COMMIT = "cc4eb530b57b9cb7225bf76023873043ffd50655"  # 2020-05-09
SIZE = 55_000_000  # about

DATASET = fetch.DataSet(
    name="magnetic tiles",
    folder="magnetic_tile",
    command="python data_scripts/magnetic_tile.py",
    members=r"(?:.*/)?(?P<path>MT_(?:Blowhole|Break|Crack|Fray|Free|Uneven)/Imgs/(?!\.)[^/]+\.(?:jpg|png))",
    sources=(  # the dot at the end of the repository's name belongs to it
        fetch.Source(f"https://codeload.github.com/abin24/Magnetic-tile-defect-datasets./zip/{COMMIT}", size=SIZE),
        fetch.Source(f"https://github.com/abin24/Magnetic-tile-defect-datasets./archive/{COMMIT}.zip", size=SIZE),
    ),
    page="https://github.com/abin24/Magnetic-tile-defect-datasets.",
    licence='none stated; the authors write "It is welcomed to use our dataset" and ask to be cited',
    citation="Huang, Qiu, Yuan: Surface defect saliency of magnetic tile. The Visual Computer 36, 85-96, 2020",
    archive_sha256=("ad5f8716fd63bfdfd5f66fbca9b25da0c32014106d3c698b273c85b44025c9df",),
    unpacked_limit=200_000_000,
    fingerprint="426e4d9cc292eff45e476cee5b9bf3183004abd4575e1a54e154c0bedf6c17d2",
)
main = fetch.script(DATASET, __doc__)


if __name__ == "__main__":
    sys.exit(main())
