"""What printed numbers of a paper say of each other: tables of them, and whether one follows from others.

Each paper's own `arithmetic` (`defectlab/papers/*/arithmetic.py`) says which numbers to compare.
"""

import pandas as pd

ROUNDING = 0.05  # what one printed digit hides
SLACK = 1e-9  # of floating point


def framed(lines: list[dict], *index: str) -> pd.DataFrame:
    """Lines as a table with the columns `index` as its index, numbers with two digits."""
    return pd.DataFrame(lines).set_index(list(index)).round(2)


def compared(said: float, follows: float) -> dict[str, float | str]:
    """A printed number beside the one that follows from others: both, their difference, and whether they agree."""
    agrees = abs(said - follows) <= ROUNDING + SLACK
    remark = "agrees" if agrees else "differs by more than its own rounding"
    difference = round(said - follows, 6) + 0.0  # no -0.0
    return {"printed": said, "computed": follows, "difference": difference, "remark": remark}
