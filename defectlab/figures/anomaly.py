"""Figures of the notebooks on anomaly maps: samples of a set, scores, examples that a record keeps."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.functional import interpolate

from defectlab.data.anomaly import AnomalyData
from defectlab.figures import BAD, GOOD, INK, Rows, gallery, image_axes, nothing_yet, thumbnails
from defectlab.runs import Record

SIDE = 256  # pixels of an image that is shown
EACH = 4  # how many examples of a kind a record keeps
CASES = ("defects, lowest scores", "good parts, highest scores", "defects, highest scores")


def samples(data: AnomalyData, part: str, indices: Sequence[int], columns: int = 3, width: float = 9.0) -> Figure:
    """Images of a split as the network sees them, named by type of defect, with the outlines of their masks."""
    split = getattr(data, part)
    chosen = torch.as_tensor(list(indices), dtype=torch.long)
    masks = interpolate(split.masks[chosen, None].cpu(), (SIDE, SIDE), mode="nearest-exact")[:, 0]
    titles = [data.type_names[t] for t in split.types[chosen].tolist()]
    return gallery(list(thumbnails(split.images[chosen], SIDE)), titles, columns, list(masks.numpy()), width)


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


def examples(
    record: Record | None, data: AnomalyData | None = None, kinds: Sequence[int] = (0, 1, 2), width: float = 9.0
) -> Figure:
    """The images that a record keeps, four in a line, with the outline of the mask; below each its anomaly map (one
    scale for all).

    data: where it has the record's test images, they are shown instead, at its resolution, with the masks of its own.
    kinds: of `CASES`, four examples each, in this order.
    """
    if record is None:
        return nothing_yet()
    arrays = record.arrays
    cases, masks, maps = (arrays[f"case_{name}"] for name in ("images", "masks", "maps"))
    indices = torch.from_numpy(np.array(arrays["case_index"]))
    if data is not None and list(data.test.names) == list(arrays["names"]):
        cases, masks = thumbnails(data.test.images[indices], SIDE), data.test.masks[indices].cpu().numpy()
    bad, good = (min(EACH, int((arrays["labels"] == label).sum())) for label in (1, 0))  # kept of each kind
    ends = np.cumsum([0, bad, good, bad])
    lines = {kind: range(ends[kind], ends[kind + 1]) for kind in kinds if ends[kind] < ends[kind + 1]}
    figure, axes = image_axes(2 * len(lines), EACH, width / EACH, 0.2 * len(lines))
    for (kind, line), above, below in zip(lines.items(), axes[::2], axes[1::2], strict=True):
        above[0].set_ylabel(CASES[kind], fontsize=9)
        below[0].set_ylabel("anomaly map", fontsize=9)
        for image, heat, case in zip(above, below, line, strict=False):
            image.imshow(cases[case], "gray", vmin=0, vmax=255, interpolation="bilinear")
            if masks[case].any():
                image.contour(masks[case], [0.5], colors=BAD, linewidths=0.8)
            heat.imshow(maps[case], "inferno", vmin=0, vmax=255, interpolation="bilinear")
            index = indices[case]
            name, score = arrays["type_names"][arrays["types"][index]], arrays["scores"][index]
            image.set_title(f"{name}, score {score:.2f}", fontsize=8)
    return figure
