"""Draw the synthetic sets into data/synthetic_*: parts of each kind that a real set shows (no network).

    python data_scripts/synthetic.py             draw those that are not there yet; ten seconds for all
    python data_scripts/synthetic.py --verify    check every file

The same layouts as the real sets, so that the same readers read both. Readers draw them on first use, too. Their
numbers say nothing about real defects.
"""

import sys
from functools import partial

from defectlab.data import fetch
from defectlab.data.synthetic import SYNTHETIC, ensure_synthetic


def main(argv: list[str] | None = None) -> int:
    options = fetch.argument_parser(__doc__, archive=False).parse_args(argv)
    sets = {name: partial(ensure_synthetic, name=name) for name in SYNTHETIC}
    return fetch.make_sets(sets, options, "python data_scripts/synthetic.py")


if __name__ == "__main__":
    sys.exit(main())
