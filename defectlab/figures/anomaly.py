"""Figures that the notebooks share; each is drawn from arrays or from a record, so none needs a GPU."""

import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from defectlab.data.anomaly import AnomalyData
from defectlab.runs import Record

INK, GOOD, BAD = "#333333", "#4477aa", "#cc6677"


def small_figures(quality: int = 85) -> None:
    """Figure settings of the notebooks: small files (JPEG: noisy pictures are large as PNG), quiet axes."""
    set_matplotlib_formats("jpeg", pil_kwargs={"quality": quality})
    plt.rcParams.update(
        {
            "figure.dpi": 84,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.constrained_layout.use": True,
        }
    )


def graph(figure: Figure, colours: int = 64, dpi: int | None = None) -> Image.Image:
    """A figure of lines and letters as a picture of few colours: a small PNG, unlike the JPEG that suits photos."""
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi or "figure")
    plt.close(figure)
    return Image.open(file).convert("RGB").quantize(colours, dither=Image.Dither.NONE)


def picture_grid(
    pictures: Sequence[np.ndarray],
    titles: Sequence[str],
    columns: int = 6,
    masks: Sequence[np.ndarray | None] | None = None,
    width: float = 9.0,
) -> Figure:
    """Pictures uint8, grey (H, W) or coloured (H, W, 3), in a grid; a mask (H, W) is drawn as its red outline."""
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width, width / columns * rows * 1.15), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        axis = axes.flat[index]
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=8)
        if masks is not None and masks[index] is not None and masks[index].any():
            axis.contour(masks[index], [0.5], colors=BAD, linewidths=1)
    return figure


def picture_axes(rows: int, columns: int, cell: float, above: float) -> tuple[Figure, np.ndarray]:
    """Places (rows, columns) for square pictures of about `cell` inches, close together, without frame and ticks;
    `above`: inches in all that titles and captions need beside them."""
    size = (cell * columns, cell * rows + above)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for axis in axes.flat:
        axis.set_box_aspect(1)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def samples(data: AnomalyData, part: str, indices: Sequence[int], columns: int = 6, width: float = 9.0) -> Figure:
    """Pictures of one split ("train", "dev", "test") as the network sees them, named by type, the mask outlined."""
    split = getattr(data, part)
    chosen = torch.as_tensor(list(indices), dtype=torch.long)
    masks = interpolate(split.masks[chosen, None].cpu(), (128, 128), mode="nearest-exact")[:, 0]
    titles = [data.type_names[t] for t in split.types[chosen].tolist()]
    return picture_grid(list(thumbnails(split.images[chosen])), titles, columns, list(masks.numpy()), width)


def thumbnails(images: Tensor, side: int = 128) -> np.ndarray:
    """uint8 images (N, 3, H, W) -> (N, side, side) uint8 where all three channels agree, else (N, side, side, 3)."""
    small = interpolate(images.float().cpu(), (side, side), mode="area").round().byte().movedim(1, -1).numpy()
    return small[..., 0] if bool((images[:, :1] == images).all()) else small


def one_of_each(data: AnomalyData, part: str = "test") -> list[int]:
    """The index of the first picture of each type that the split has."""
    types = getattr(data, part).types.tolist()
    return [types.index(t) for t in range(len(data.type_names)) if t in types]


def loss_curves(records: dict[str, list[Record]]) -> Figure:
    """Training loss an epoch, a line a seed, a colour a row; each row divided by its first value, since losses of
    different definition have different heights."""
    if not records:
        return nothing_yet()
    figure, axis = plt.subplots(figsize=(6, 2.8))
    for colour, (name, found) in enumerate(records.items()):
        for record in found:
            loss = np.array(record.curve["loss"])
            axis.plot(range(1, len(loss) + 1), loss / loss[0], color=f"C{colour}", alpha=0.7)
        axis.plot([], [], color=f"C{colour}", label=name)
    axis.set(xlabel="epoch", ylabel="loss / loss of epoch 1", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)
    return figure


def dimension_curves(records: dict[str, Record], dimensions: Sequence[str], ylabel: str = "1 − cosine") -> Figure:
    """Named scalars of the loss an epoch, a panel a row, a line a dimension."""
    if not records:
        return nothing_yet()
    figure, axes = plt.subplots(1, len(records), figsize=(3 * len(records), 2.4), sharey=True, squeeze=False)
    for axis, (name, record) in zip(axes[0], records.items(), strict=True):
        for dimension in dimensions:
            values = record.curve[dimension]
            axis.plot(range(1, len(values) + 1), values, label=dimension)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title=name, xlabel="epoch")
    axes[0, 0].set_ylabel(ylabel)
    axes[0, 0].legend(frameon=False)
    return figure


def nothing_yet() -> Figure:
    """In place of a figure whose runs are not finished (the minutes were used up): it says so."""
    figure, axis = plt.subplots(figsize=(4, 0.5))  # a figure without axes would not be shown
    axis.axis("off")
    figure.text(0, 0.3, "no finished run yet: run again to go on")
    return figure


def score_histograms(records: dict[str, Record]) -> Figure:
    """Image scores of normal and defective test images, a panel a row; the dashed line is the threshold from dev."""
    if not records:
        return nothing_yet()
    figure, axes = plt.subplots(1, len(records), figsize=(3.2 * len(records), 2.6), squeeze=False)
    for axis, (name, record) in zip(axes[0], records.items(), strict=True):
        arrays = record.arrays
        scores, labels = arrays["scores"], arrays["labels"]
        bins = np.histogram_bin_edges(scores, 30)
        axis.hist(scores[labels == 0], bins, color=GOOD, alpha=0.7, label="normal")
        axis.hist(scores[labels == 1], bins, color=BAD, alpha=0.6, label="defective")
        axis.axvline(record.dev["threshold"], color=INK, linestyle="--", linewidth=1)
        axis.set(title=f"{name}, seed {record.seed}", xlabel="image score", yticks=[])
    axes[0, 0].legend(frameon=False)
    return figure


def cases(record: Record, width: float = 9.0) -> Figure:
    """The telling cases of a record: image, grey or coloured as it is, with the mask's outline above, anomaly map
    below (one scale for all).

    Four defects that scored lowest, four good parts that scored highest, four defects that scored highest.
    """
    arrays = record.arrays
    count = len(arrays["case_index"])
    figure, axes = plt.subplots(2, count, figsize=(width, width / count * 2.5), squeeze=False)
    for column, index in enumerate(arrays["case_index"]):
        kind = str(arrays["type_names"][arrays["types"][index]])
        axes[0, column].imshow(arrays["case_images"][column], cmap="gray", vmin=0, vmax=255)
        if arrays["case_masks"][column].any():
            axes[0, column].contour(arrays["case_masks"][column], [0.5], colors=BAD, linewidths=0.8)
        axes[1, column].imshow(arrays["case_maps"][column], cmap="inferno", vmin=0, vmax=255)
        axes[0, column].set_title(f"{kind}\n{arrays['scores'][index]:.2f}", fontsize=7)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(
        "defects with the lowest scores  ·  good parts with the highest  ·  defects with the highest", size=9
    )
    return figure


def map_rows(
    pictures: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    maps: dict[str, np.ndarray],
    titles: Sequence[str],
    height: float = 1.0,
) -> Figure:
    """A line a picture: the picture uint8 (H, W) or (H, W, 3) with its mask's outline, then one map after the other.

    `maps`: title of the column -> (N, h, w), drawn bilinearly. A column has one scale for all pictures, from 0 to its
    largest value.
    `height`: inches a line.
    """
    columns = 1 + len(maps)
    figure, axes = plt.subplots(
        len(pictures), columns, figsize=(columns * height * 1.15, len(pictures) * height + 0.3), squeeze=False
    )
    for line, (picture, mask, title) in enumerate(zip(pictures, masks, titles, strict=True)):
        axes[line, 0].imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes[line, 0].set_ylabel(title, fontsize=8)
        if mask.any():
            axes[line, 0].contour(mask, [0.5], colors=BAD, linewidths=0.8)
        for column, (name, values) in enumerate(maps.items(), 1):
            axes[line, column].imshow(
                values[line], "inferno", interpolation="bilinear", vmin=0, vmax=float(values.max())
            )
            if line == 0:
                axes[line, column].set_title(f"{name}, 0 to {values.max():.2g}", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure
