"""Figures that the notebooks share, drawn from arrays or from records, so that none needs a GPU.

Here what all families use; beside it `common` (which records a figure shows, grids), `anomaly`, `detection` and
`instances`. Figures of records take the records of several rows, name -> one record for each seed, and leave out rows
that have none; where no row has any, the figure says so.
"""

import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from defectlab.runs import Record

INK, GOOD, BAD = "#333333", "#4477aa", "#cc6677"
PROBES = ("dev_", "weight_")  # scalars of a curve with a value for each probe of dev, not for each epoch

Rows = Mapping[str, Sequence[Record]]


def small_figures(quality: int = 85) -> None:
    """Figure settings of the notebooks: small files (JPEG: noisy images are large as PNG), quiet axes."""
    set_matplotlib_formats("jpeg", pil_kwargs={"quality": quality})
    quiet = {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
    plt.rcParams.update({"figure.dpi": 84, "font.size": 9} | quiet)


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


# --- Images ----------------------------------------------------------------------------------------------------------


def image_axes(rows: int, columns: int, cell: float, above: float) -> tuple[Figure, np.ndarray]:
    """Places (rows, columns) for square images of about `cell` inches, close together, without frame and ticks;
    `above`: inches in all that titles and captions need beside them."""
    size = (cell * columns, cell * rows + above)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for axis in axes.flat:
        axis.set_box_aspect(1)
        axis.set(xticks=[], yticks=[])
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


def thumbnails(images: Tensor, side: int = 128) -> np.ndarray:
    """uint8 images (N, 3, H, W) -> (N, side, side) uint8 where all three channels agree, else (N, side, side, 3)."""
    small = interpolate(images.float().cpu(), (side, side), mode="area").round().byte().movedim(1, -1).numpy()
    return small[..., 0] if bool((images[:, :1] == images).all()) else small


# --- Records ---------------------------------------------------------------------------------------------------------


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
    """Scalars of the loss by epoch, a panel a scalar, a line a seed, a colour a row.

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
    handles = [Line2D([], [], color=colour, label=row) for row, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure
