"""What figures of several notebooks share: which records they show, and grids of images and maps."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from defectlab.figures import image_axes, nothing_yet
from defectlab.runs import Record

MASK, OTHER = "#ff5566", "#ffd84d"  # outlines: both are seen on steel, on dark ground, and beside each other

Grid = Sequence[Sequence[np.ndarray | None]]


def both_sides(store: Any, study: Any, name: str) -> dict[str, list[Record]]:
    """The records of a row by what a table calls them: the committed ones, then this machine's. `store`: a
    `RecordStore`."""
    recorded, profile = store.recorded_of(study, name)
    here = "synthetic" if store.profile == "smoke" else "this run"
    return {f"recorded ({profile})": recorded, here: store.here_of(study, name)}


def records_to_show(store: Any, study: Any, *names: str) -> dict[str, list[Record]]:
    """The records of some rows for one figure: this machine's; in smoke the committed ones, if any row has some.

    A line is printed that says which they are. Rows without a record are left out.
    """
    recorded = {name: store.recorded_of(study, name)[0] for name in names}
    committed = store.profile == "smoke" and any(recorded.values())
    found = recorded if committed else {name: store.here_of(study, name) for name in names}
    found = {name: records for name, records in found.items() if records}
    sources: dict[str, list[str]] = {}
    for name, records in found.items():
        profiles = " and ".join(sorted({record.profile for record in records}))
        side = f"recorded ({profiles})" if committed else "synthetic" if profiles == "smoke" else "this run"
        sources.setdefault(f"{side}, {records[0].data_label}", []).append(name)
    print("shown:", "; ".join(f"{', '.join(rows)}: {side}" for side, rows in sources.items()) or "not run yet")
    return found


def image_grid(
    images: Grid,
    columns: Sequence[str] = (),
    lines: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    outlines: Mapping[str, Grid] = MappingProxyType({}),
    limits: tuple[float, float] | None = (0, 255),
    colours: str = "gray",
    width: float = 9.0,
) -> Figure:
    """Images (H, W) or (H, W, 3) and maps (H, W) in lines of equal length; None leaves a place empty.

    columns: titles above; lines: labels on the left; captions: below each place. outlines: colour -> for each place a
    mask (H, W), of which the edge is drawn, or None; the first colour lies below and is the broadest. limits: the
    values of black and white; None: for each line those of its 1st and 99th percentile. colours: a colour map of
    matplotlib. Without any line the figure says so.
    """
    if not len(images):
        return nothing_yet()
    cell = width / max(len(images[0]), 3)
    above = 0.15 * max((title.count("\n") + 1 for title in columns), default=0) + 0.05
    figure, axes = image_axes(len(images), len(images[0]), cell, above + (0.17 * len(images) if captions else 0))
    for row, (line, values) in enumerate(zip(axes, images, strict=True)):
        shown = [np.asarray(value) for value in values if value is not None]
        low, high = limits or np.percentile(np.concatenate([value.ravel() for value in shown]), (1, 99))
        for column, (axis, value) in enumerate(zip(line, values, strict=True)):
            if value is not None:
                axis.imshow(np.asarray(value), colours, vmin=low, vmax=high)
            if captions:
                axis.set_xlabel(captions[row][column], fontsize=7, labelpad=2)
            for under, (colour, masks) in zip(range(len(outlines) - 1, -1, -1), outlines.items(), strict=True):
                mask = masks[row][column]
                if mask is not None and mask.any() and not mask.all():  # contour warns where there is no edge
                    axis.contour(np.asarray(mask, float), [0.5], colors=colour, linewidths=1 + 1.2 * under)
    for axis, title in zip(axes[0], columns, strict=False):
        axis.set_title(title, fontsize=8)
    for axis, title in zip(axes[:, 0], lines, strict=False):
        axis.set_ylabel(title, fontsize=8)
    return figure
