"""Figures that the notebooks share, drawn from arrays or from records, so that none needs a GPU.

Here what all families use; beside it `anomaly`, `detection` and `instances`. Figures of records take the records of
several rows, name -> one record for each seed, and leave out rows that have none; where no row has any, the figure says
so.
"""

import io
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image as DisplayedImage
from IPython.display import Markdown, display
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from defectlab.runs import Record

INK, GOOD, BAD = "#333333", "#4477aa", "#cc6677"
MASK, OTHER = "#ff5566", "#ffd84d"  # outlines: both are seen on steel, on dark ground, and beside each other
PROBES = ("dev_", "weight_")  # scalars of a curve with a value for each probe of dev, not for each epoch

Rows = Mapping[str, Sequence[Record]]
Grid = Sequence[Sequence[np.ndarray | None]]


def small_figures(quality: int = 85) -> None:
    """Figure settings of the notebooks: small files (JPEG: noisy images are large as PNG), quiet axes."""
    set_matplotlib_formats("jpeg", pil_kwargs={"quality": quality})
    quiet = {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
    plt.rcParams.update({"figure.dpi": 110, "font.size": 9} | quiet)


def show(figure: Figure | Image.Image, caption: str, quality: int = 88, dpi: int = 110) -> None:
    """Display a figure of photographs, as JPEG, with its caption below, which is its alternative text, too.

    What `graph` made is shown as it is, as PNG.
    """
    file, drawn = io.BytesIO(), isinstance(figure, Figure)
    if drawn:
        figure.savefig(file, format="jpeg", dpi=dpi, pil_kwargs={"quality": quality})
        plt.close(figure)
    else:
        figure.save(file, "PNG")
    kind = "jpeg" if drawn else "png"
    display(DisplayedImage(file.getvalue(), format=kind, alt=" ".join(caption.split())), Markdown(f"*{caption}*"))


def graph(figure: Figure, colours: int = 64, dpi: int | None = None) -> Image.Image:
    """A figure of lines and letters as an image of few colours: a small PNG, unlike the JPEG that suits photos."""
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi or "figure")
    plt.close(figure)
    whole = Image.open(file).convert("RGB")
    return whole.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)  # thin lines keep theirs


def nothing_yet() -> Figure:
    """In place of a figure whose runs are not finished (the minutes were used up): it says so."""
    figure, axis = plt.subplots(figsize=(4, 0.5))  # a figure without axes would not be shown
    axis.axis("off")
    figure.text(0, 0.3, "no finished run yet: run again to go on")
    return figure


def panels(
    count: int, columns: int, cell: tuple[float, float], below: float = 0.0, **options
) -> tuple[Figure, list[Axes]]:
    """Places for `count` panels of `cell` inches (width, height), row after row; `below`: inches for a legend."""
    rows = -(-count // columns)
    size = (cell[0] * columns, cell[1] * rows + below)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


def legend_above(figure: Figure, handles: Sequence[Artist]) -> None:
    """One legend for all panels, in as many columns (at most four) as the figure has room for."""
    for columns in range(4, 0, -1):
        legend = figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


# --- Images ----------------------------------------------------------------------------------------------------------


def image_axes(rows: int, columns: int, cell: float, above: float) -> tuple[Figure, np.ndarray]:
    """Places (rows, columns) for square images of about `cell` inches, close together, without frame and ticks;
    `above`: inches in all that titles and captions need beside them."""
    size = (cell * columns, cell * rows + above)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for axis in axes.flat:
        axis.set_box_aspect(1)
        axis.set(xticks=[], yticks=[], anchor="N")  # room above is for titles
        axis.spines[:].set_visible(False)
    return figure, axes


def gallery(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    columns: int = 6,
    masks: Sequence[np.ndarray | None] | None = None,
    width: float = 9.0,
) -> Figure:
    """Images uint8, (H, W) or (H, W, 3) of any size, one after the other; a mask (H, W) is drawn as its red outline."""
    figure, axes = panels(len(images), columns, (width / columns, width / columns * 1.15))
    for axis, image, title, mask in zip(axes, images, titles, masks or [None] * len(images), strict=True):
        axis.axis("off")
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=8)
        if mask is not None and mask.any():
            axis.contour(mask, [0.5], colors=BAD, linewidths=1)
    return figure


def image_grid(
    images: Grid,
    columns: Sequence[str] = (),
    lines: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    outlines: Mapping[str, Grid] = MappingProxyType({}),
    limits: tuple[float, float] | None = (0, 255),
    width: float = 9.0,
) -> Figure:
    """Images (H, W) or (H, W, 3) and maps (H, W) in lines of equal length; None leaves a place empty.

    columns: titles above; lines: labels on the left; captions: below each place. outlines: colour -> for each place a
    mask (H, W), of which the edge is drawn, or None; the first colour lies below and is the broadest. limits: the
    values of black and white; None: for each line those of its 1st and 99th percentile.
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
                axis.imshow(np.asarray(value), "gray", vmin=low, vmax=high)
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


def thumbnails(images: Tensor, side: int = 128) -> np.ndarray:
    """uint8 images (N, 3, H, W) -> (N, side, side) uint8 where all three channels agree, else (N, side, side, 3)."""
    small = interpolate(images.float().cpu(), (side, side), mode="area").round().byte().movedim(1, -1).numpy()
    return small[..., 0] if bool((images[:, :1] == images).all()) else small


# --- Records ---------------------------------------------------------------------------------------------------------


def both_sides(store: Any, study: Any, name: str) -> dict[str, list[Record]]:
    """The records of a row by what a table calls them: the committed ones, in quick and paper also this machine's.
    `store`: a `RecordStore`."""
    recorded, profile = store.recorded_of(study, name)
    here = {"this run": store.here_of(study, name)} if store.shows_here else {}
    return {f"recorded ({profile})": recorded} | here


def records_to_show(store: Any, study: Any, *names: str) -> dict[str, list[Record]]:
    """The records of some rows for one figure: in quick and paper this machine's, else the committed ones.

    A line is printed that says which they are. Rows without a record are left out.
    """
    of = store.here_of if store.shows_here else lambda study, name: store.recorded_of(study, name)[0]
    found = {name: records for name in names if (records := of(study, name))}
    sources: dict[str, list[str]] = {}
    for name, records in found.items():
        profiles = " and ".join(sorted({record.profile for record in records}))
        side = "this run" if store.shows_here else f"recorded ({profiles})"
        sources.setdefault(f"{side}, {records[0].data_label}", []).append(name)
    print("shown:", "; ".join(f"{', '.join(rows)}: {side}" for side, rows in sources.items()) or "not run yet")
    return found


def frame(records: Rows) -> pd.DataFrame:
    """Every metric of every record in one long table: row, seed, type (of defect; "all": of the set), metric, value."""
    lines = [
        (row, record.seed, kind, metric, value)
        for row, found in records.items()
        for record in found
        for kind, values in ({"all": record.metrics} | record.per_class).items()
        for metric, value in values.items()
    ]
    return pd.DataFrame(lines, columns=["row", "seed", "type", "metric", "value"])


def curves(records: Rows) -> pd.DataFrame:
    """Every scalar of every training in one long table: row, seed, scalar, epoch (from 1), value."""
    lines = []
    for row, found in records.items():
        for record in found:
            for scalar, values in record.curve.items():
                probed = scalar.startswith(PROBES)
                epochs = record.curve["probe_epoch"] if probed else range(1, len(values) + 1)
                pairs = zip(epochs, values, strict=True) if scalar != "probe_epoch" else ()
                lines += [(row, record.seed, scalar, *pair) for pair in pairs]
    return pd.DataFrame(lines, columns=["row", "seed", "scalar", "epoch", "value"])


def training_curves(records: Rows, scalars: Sequence[str] = (), columns: int = 3, first_is_one: bool = False) -> Figure:
    """Scalars of the loss by epoch: one panel per scalar, one line per seed, one colour per row.

    scalars: by default all of the loss, and mAP50 of dev where it was probed. first_is_one: each line is divided by its
    first value, since losses of different definition have different heights.
    """
    table = curves(records)
    if table.empty:
        return nothing_yet()
    found, dev = table["scalar"].unique(), "dev_map50"
    scalars = list(scalars) or [s for s in found if not s.startswith(PROBES)] + [dev] * (dev in found)
    cell = (3, 2.1) if len(scalars) > 1 else (5.5, 2.3)
    figure, axes = panels(len(scalars), min(columns, len(scalars)), cell, below=0.3)
    colours = {row: f"C{index}" for index, row in enumerate(table["row"].unique())}
    for axis, scalar in zip(axes, scalars, strict=True):
        look = {"alpha": 0.7, "linewidth": 1, "marker": "." if scalar == dev else None}
        for (row, _), line in table[table["scalar"] == scalar].groupby(["row", "seed"], sort=False):
            first = line["value"].iloc[0] if first_is_one else 1
            axis.plot(line["epoch"], line["value"] / first, color=colours[row], **look)
        title = "mAP50 of dev / %" if scalar == dev else f"{scalar} / that of epoch 1" if first_is_one else scalar
        axis.set(title=title, xlabel="epoch")
        axis.set_ylim(0, 100 if scalar == dev else None)
        axis.xaxis.get_major_locator().set_params(integer=True)
    legend_above(figure, [Line2D([], [], color=colour, label=row) for row, colour in colours.items()])
    return figure
