"""Draw the stand-ins for NEU-DET and DeepPCB into data/synthetic_steel and data/synthetic_board (no network, seconds).

    python data_scripts/synthetic_detection.py             draw, unless they are already there
    python data_scripts/synthetic_detection.py --verify    check every file

The same layouts as the real sets, so that the same readers read both. Their numbers say nothing about real defects.
"""

import sys
from functools import partial

from defectlab.data import fetch as store
from defectlab.data.detection import SYNTHETIC, ensure_synthetic


def main(argv: list[str] | None = None) -> int:
    draw = {name: partial(ensure_synthetic, name=name) for name in SYNTHETIC}
    return store.draw_main(argv, __doc__, draw, "python data_scripts/synthetic_detection.py")


if __name__ == "__main__":
    sys.exit(main())
