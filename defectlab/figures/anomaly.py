"""Figures of the notebooks on anomaly maps: samples of a set, scores, examples that a record keeps."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.functional import interpolate

from defectlab.data.anomaly import AnomalyData
from defectlab.figures import BAD, GOOD, INK, Rows, gallery, nothing_yet, thumbnails
from defectlab.runs import Record


def samples(data: AnomalyData, part: str, indices: Sequence[int], columns: int = 6, width: float = 9.0) -> Figure:
    """Images of a split as the network sees them, named by type of defect, with the outlines of their masks."""
    split = getattr(data, part)
    chosen = torch.as_tensor(list(indices), dtype=torch.long)
    masks = interpolate(split.masks[chosen, None].cpu(), (128, 128), mode="nearest-exact")[:, 0]
    titles = [data.type_names[t] for t in split.types[chosen].tolist()]
    return gallery(list(thumbnails(split.images[chosen])), titles, columns, list(masks.numpy()), width)


def one_of_each(data: AnomalyData) -> list[int]:
    """The index of the first test image of each type that there is."""
    types = data.test.types.tolist()
    return [types.index(t) for t in range(len(data.type_names)) if t in types]


def score_histograms(records: Rows) -> Figure:
    """Scores of normal and defective test images, one panel per row (first seed); dashed: the threshold from dev."""
    shown = {name: found[0] for name, found in records.items() if found}
    if not shown:
        return nothing_yet()
    figure, axes = plt.subplots(1, len(shown), figsize=(3.2 * len(shown), 2.6), squeeze=False)
    for axis, (name, record) in zip(axes[0], shown.items(), strict=True):
        scores, labels = record.arrays["scores"], record.arrays["labels"]
        bins = np.histogram_bin_edges(scores, 30)
        axis.hist(scores[labels == 0], bins, color=GOOD, alpha=0.7, label="normal")
        axis.hist(scores[labels == 1], bins, color=BAD, alpha=0.6, label="defective")
        axis.axvline(record.dev["threshold"], color=INK, linestyle="--", linewidth=1)
        axis.set(title=f"{name}, seed {record.seed}", xlabel="image score", yticks=[])
    axes[0, 0].legend(frameon=False)
    return figure


def examples(record: Record | None, width: float = 9.0) -> Figure:
    """The images that a record keeps, with the outline of the mask; below each its anomaly map (one scale for all).

    Four defects that scored lowest, four good parts that scored highest, four defects that scored highest.
    """
    if record is None:
        return nothing_yet()
    arrays = record.arrays
    indices = arrays["case_index"]
    count = len(indices)
    figure, axes = plt.subplots(2, count, figsize=(width, width / count * 2.5), squeeze=False)
    kept = (arrays[f"case_{name}"] for name in ("images", "masks", "maps"))
    for (above, below), index, image, mask, anomaly_map in zip(axes.T, indices, *kept, strict=True):
        above.imshow(image, cmap="gray", vmin=0, vmax=255)
        if mask.any():
            above.contour(mask, [0.5], colors=BAD, linewidths=0.8)
        below.imshow(anomaly_map, cmap="inferno", vmin=0, vmax=255)
        above.set_title(f"{arrays['type_names'][arrays['types'][index]]}\n{arrays['scores'][index]:.2f}", fontsize=7)
    for axis in axes.flat:
        axis.axis("off")
    shown = ("defects with the lowest scores", "good parts with the highest", "defects with the highest")
    figure.suptitle("  ·  ".join(shown), size=9)
    return figure
