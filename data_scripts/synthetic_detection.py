"""Draw the stand-ins for NEU-DET and DeepPCB into data/synthetic_steel and data/synthetic_board (no network, seconds).

    python data_scripts/synthetic_detection.py             draw, unless they are already there
    python data_scripts/synthetic_detection.py --verify    check every file

The same layouts as the real sets, so that the same readers read both. Their numbers say nothing about real defects.
"""

import argparse
import sys
from pathlib import Path

from defectlab.data import store
from defectlab.data.detection import SYNTHETIC, ensure_synthetic


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="read every file again and compare its sha256")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where data lie (default: DEFECTLAB_DATA, or ./data)"
    )
    options = parser.parse_args(argv)

    def action() -> None:
        root = options.data_dir or store.data_dir()
        for name in SYNTHETIC:
            if options.verify:
                manifest = store.verify(root / name, "run `python data_scripts/synthetic_detection.py`")
            else:
                manifest = ensure_synthetic(root, name)
            store.report(manifest, root / name)
        print("every file verified" if options.verify else "ready")

    return store.guarded(action)


if __name__ == "__main__":
    sys.exit(main())
