"""Draw the stand-in for the magnetic tiles into data/synthetic_tile (no network, a few seconds).

    python data_scripts/synthetic_tile.py             draw, unless it is already there
    python data_scripts/synthetic_tile.py --verify    check every file

The same layout as the real set, so that the same reader reads both. Its numbers say nothing about real tiles.
"""

import argparse
import sys
from pathlib import Path

from defectlab.data import store
from defectlab.data.anomaly import SYNTHETIC_TILE, ensure_synthetic


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="read every file again and compare its sha256")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where data lie (default: DEFECTLAB_DATA, or ./data)"
    )
    options = parser.parse_args(argv)

    def action() -> None:
        root = options.data_dir or store.data_dir()
        target = root / SYNTHETIC_TILE
        if options.verify:
            manifest = store.verify(target, "run `python data_scripts/synthetic_tile.py`")
        else:
            manifest = ensure_synthetic(root)
        store.report(manifest, target)
        print("every file verified" if options.verify else "ready")

    return store.guarded(action)


if __name__ == "__main__":
    sys.exit(main())
