"""Does a paper add up? Its printed numbers against each other: no run, no data, no network.

Everything is computed from the numbers in `results/papers/<study>/*.csv`; `audit/text_gains.csv` there says which
numbers the text states of which, `audit/printed_twice.csv` what stands in two places. What one notebook alone compares
is compared there. A difference may have an ordinary cause (a slip in a digit, another run); the tables say what is
printed and what follows from it, no more.
"""

from dataclasses import dataclass
from functools import cache

import pandas as pd

from defectlab.verdicts.tables import printed_table

ROUNDING = 0.05  # what one printed digit hides
SLACK = 1e-9  # of floating point


@cache
def _numbers(study_name: str, table: str) -> dict[tuple[str, str, str], float]:
    """(metric, row, column) -> the printed number, in the file's order; of rows that stand twice, once for each target,
    the first, without its target."""
    lines = [
        line for line in printed_table(study_name, table) if line["value"] and not line["row"].endswith("; defect")
    ]
    return {(x["metric"], x["row"].removesuffix("; nut"), x["column"]): float(x["value"]) for x in lines}


@dataclass(frozen=True)
class PrintedNumbers:
    """What the tables and the text of a study's paper print: metrics in per cent, costs in their units."""

    study: str

    def printed(self, metric: str, table: str, row: str, column: str = "all") -> float:
        """One printed number. ValueError where there is none at that place."""
        numbers = _numbers(self.study, table)
        if (metric, row, column) not in numbers:
            raise ValueError(f"{self.study}/{table}.csv prints no {metric} for row {row!r}, column {column!r}")
        return numbers[metric, row, column]

    def column(self, metric: str, table: str) -> dict[str, float]:
        """Row -> the printed number of the column "all", in the table's order."""
        return {r: value for (m, r, c), value in _numbers(self.study, table).items() if (m, c) == (metric, "all")}

    def row(self, metric: str, table: str, row: str) -> dict[str, float]:
        """Column -> the printed number, in the table's order."""
        return {c: value for (m, r, c), value in _numbers(self.study, table).items() if (m, r) == (metric, row)}

    def stated_gains(self) -> pd.DataFrame:
        """What the text states against the tables: a level, or the difference of two printed numbers; `relative` is
        that difference in per cent of the smaller number."""
        lines = []
        for said in printed_table(self.study, "audit/text_gains"):
            if not said["a_row"]:  # not about a single table number
                continue
            a, *b = (
                self.printed(said["metric"], said[f"{x}_table"], said[f"{x}_row"]) for x in "ab" if said[f"{x}_row"]
            )
            line = {"statement": said["statement"], "place": said["place"]}
            line |= check_number(float(said["printed"]), a - sum(b))
            lines.append({**line, "relative": 100 * (a - b[0]) / b[0] if b else float("nan"), "note": said["note"]})
        return framed(lines, "statement", "place")

    def printed_twice(self) -> pd.DataFrame:
        """Numbers that stand in two places: `printed` and `elsewhere`, and whether they are `of` one model by the
        text."""
        lines = []
        for line in printed_table(self.study, "audit/printed_twice"):
            a, b = (
                self.printed(line["metric"], *(line[f"{x}_{name}"] for name in ("table", "row", "column")))
                for x in "ab"
            )
            lines.append({"number": line["number"], "metric": line["metric"], "of": line["of"], **check_number(a, b)})
        return framed(lines, "number", "metric").rename(columns={"computed": "elsewhere"})


def check_number(said: float, follows: float) -> dict[str, float | str]:
    """A printed number beside the one that follows from others: both, their difference, and whether they agree."""
    agrees = abs(said - follows) <= ROUNDING + SLACK
    remark = "agrees" if agrees else "differs by more than its own rounding"
    difference = round(said - follows, 6) + 0.0  # no -0.0
    return {"printed": said, "computed": follows, "difference": difference, "remark": remark}


def framed(lines: list[dict], *index: str) -> pd.DataFrame:
    """Lines as a table with the columns `index` as its index, numbers with two digits."""
    return pd.DataFrame(lines).set_index(list(index)).round(2)
