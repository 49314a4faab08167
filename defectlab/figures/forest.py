"""A forest plot: differences with their intervals, one under the other, and the gains that a paper printed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from defectlab.figures import BAD, GOOD, INK, nothing_yet


class Line(NamedTuple):
    """One comparison: a difference in points, its 95 % interval, what it is over, the printed gain (None: none), and
    whether its verdict is "no evidence"."""

    label: str
    mean: float
    low: float
    high: float
    over_seeds: bool  # else over test images: one seed
    printed: float | None
    no_evidence: bool = False


def forest(lines: Sequence[Line], width: float = 8.0) -> Figure:
    """`lines` from top to bottom. Thick intervals are over seeds, thin ones over test images; a tick is a printed gain.

    Blue: the interval lies above 0; red: below; grey: it holds 0. A hollow dot: no evidence, by the verdict. An arrow:
    the interval goes on beyond the edge.
    """
    if not lines:
        return nothing_yet()
    figure, axis = plt.subplots(figsize=(width, 0.9 + 0.3 * len(lines)), layout="constrained")
    axis.axvline(0, color="#999999", linewidth=0.8)
    ends = sorted(abs(x) for one in lines for x in (one.mean, one.low, one.high) if not math.isnan(x))
    # as far as the printed gains, and not so far that one long interval squeezes the others
    printed = max((abs(one.printed or 0) for one in lines), default=0)
    reach = min(1.1 * max(*ends, printed), max(1 + 2 * ends[int(0.9 * (len(ends) - 1))], 1.1 * printed))
    for y, line in enumerate(reversed(lines)):
        colour = GOOD if line.low > 0 else BAD if line.high < 0 else "#777777"
        axis.plot(line.mean, y, "o", color=colour, markersize=5, fillstyle="none" if line.no_evidence else "full")
        if not math.isnan(line.low):
            axis.hlines(y, line.low, line.high, color=colour, linewidth=3 if line.over_seeds else 1.2)  # ends exact
        for x, marker in ((-reach, "<"), (reach, ">")):
            if (line.low < x) if x < 0 else (line.high > x):
                axis.plot(x, y, marker, color=colour, markersize=6, clip_on=False)  # it goes on
        if line.printed is not None:
            axis.plot(line.printed, y, "|", color=INK, markersize=13, markeredgewidth=2)
    axis.set_yticks(range(len(lines)), [line.label for line in reversed(lines)], fontsize=8)
    axis.set(xlabel="difference in points", xlim=(-reach, reach), ylim=(-0.7, len(lines) - 0.3))
    axis.tick_params(left=False)
    axis.spines["left"].set_visible(False)
    widths = {True: ("over seeds", 3), False: ("over images", 1.2)}
    shown = [kind for over_seeds, kind in widths.items() if over_seeds in {line.over_seeds for line in lines}]
    handles = [Line2D([], [], color="#777777", linewidth=wide, label=kind) for kind, wide in shown]
    if any(line.printed is not None for line in lines):
        look = {"color": INK, "marker": "|", "linestyle": "", "markersize": 12, "markeredgewidth": 2}
        handles.append(Line2D([], [], label="gain that the paper printed", **look))
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return figure
