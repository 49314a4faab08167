"""Draw the stand-in for the magnetic tiles into data/synthetic_tile (no network, a few seconds).

    python data_scripts/synthetic_tile.py             draw, unless it is already there
    python data_scripts/synthetic_tile.py --verify    check every file

The same layout as the real set, so that the same reader reads both. Its numbers say nothing about real tiles.
"""

import sys

from defectlab.data import fetch as store
from defectlab.data.anomaly import SYNTHETIC_TILE, ensure_synthetic


def main(argv: list[str] | None = None) -> int:
    return store.draw_main(argv, __doc__, {SYNTHETIC_TILE: ensure_synthetic}, "python data_scripts/synthetic_tile.py")


if __name__ == "__main__":
    sys.exit(main())
