"""Metrics of anomaly detection and localisation: image level, pixel level and per-region overlap (AUPRO).

All pixel metrics follow from the pooled test pixels: for each distinct score of a defect pixel, how many defect pixels
have it, and how many normal pixels lie strictly above it or not below it. Thresholds that no defect pixel has move a
curve only to the right, so nothing is lost. Each normal pixel is sorted once, within its defect type.

AUPRO: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from defectlab.metrics.ranking import auroc, average_precision, f1_max
from defectlab.metrics.thresholds import f1_at

FPR_LIMIT = 0.3  # of AUPRO
EIGHT_CONNECTED = np.ones((3, 3), dtype=np.uint8)


@dataclass(frozen=True)
class AnomalyMetrics:
    """Metrics in per cent, NaN where undefined; `per_class` has an entry for each type but "good"."""

    overall: dict[str, float]
    per_class: dict[str, dict[str, float]]


def anomaly_metrics(
    maps: torch.Tensor,
    masks: torch.Tensor | np.ndarray,
    labels: Sequence[int],
    types: Sequence[int],
    has_mask: Sequence[bool],
    type_names: Sequence[str],
    image_scores: Sequence[float],
    threshold: float | None = None,
    fpr_limit: float = FPR_LIMIT,
) -> AnomalyMetrics:
    """Metrics of a test set and of each defect type (the images of that type with all normal images).

    maps (N, H, W) anomaly maps on any device, compared as float32; masks (N, H, W), not 0 = defect; labels (N,), 1 =
    anomalous; types (N,) index into `type_names`, 0 = "good"; has_mask (N,): False for an anomalous image whose mask is
    not known (empty): it counts at image level alone; image_scores (N,). Higher scores mean more anomalous.

    In per cent: image_auroc, image_ap, image_f1_oracle, pixel_auroc, pixel_ap, pixel_f1_oracle (oracle: at the best
    threshold on these very images), aupro, and with `threshold`, chosen on dev, image_f1_dev: F1 of "score ≥
    threshold". A metric that needs both classes is NaN where one is missing. AP is scikit-learn's. aupro: overlap
    averaged over all 8-connected defect regions, against the false positive rate over all normal pixels, both pooled
    over the images; trapezoid from 0 to `fpr_limit`, interpolated there, over the limit.

    ValueError: shapes or labels that contradict each other, NaN scores, fpr_limit outside (0, 1].
    """
    labels, types, has_mask, image_scores = (_numpy(x) for x in (labels, types, has_mask, image_scores))
    labels, has_mask = labels > 0, has_mask.astype(bool)
    masks = _numpy(masks) != 0  # (N, H, W) bool
    _check(maps, masks, labels, types, has_mask, type_names, image_scores)
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1], got {fpr_limit}")
    pixels = [_PixelsOfType(maps, masks, (types == t) & has_mask) for t in range(len(type_names))]

    def metrics_of(chosen_types: list[int]) -> dict[str, float]:
        use = np.isin(types, chosen_types)
        result = _image_metrics(image_scores[use], labels[use], threshold)
        return result | _pixel_metrics([pixels[t] for t in chosen_types], fpr_limit)

    return AnomalyMetrics(
        overall=metrics_of(list(range(len(type_names)))),
        per_class={type_names[t]: metrics_of([0, t]) for t in range(1, len(type_names))},
    )


def pixel_histograms(
    maps: torch.Tensor, masks: torch.Tensor | np.ndarray, has_mask: Sequence[bool], bins: int = 96
) -> dict[str, np.ndarray]:
    """A summary small enough to commit, from which pixel metrics can be bootstrapped over images.

    Arguments as in `anomaly_metrics`. Arrays (K ≤ bins, fewer if scores repeat): edges (K − 1,) float32, ascending, bin
    k holding edges[k − 1] < score ≤ edges[k]; normal (N, K) and defect (N, K), counts of pixels, uint16 or uint32;
    overlap (N, K) float32, the sum over the image's regions of the fraction of the region in the bin; regions (N,)
    uint32. Rows of images without a mask are zero. The edges are quantiles of all scores, at tail fractions falling
    geometrically from 1 to 1e-5: that is where AP and AUPRO are decided.
    """
    has_mask, masks = _numpy(has_mask).astype(bool), _numpy(masks) != 0
    _check_maps(maps, masks, has_mask)
    if not 2 <= bins <= 256:
        raise ValueError(f"bins must lie between 2 and 256, got {bins}")
    scores = maps.detach().float()
    edges = _edges(scores[torch.from_numpy(has_mask).to(maps.device)], bins)  # on the device
    bin_of = torch.empty(maps.shape, dtype=torch.uint8)
    for image in range(len(maps)):  # one at a time: the indices of all would take 8 bytes a pixel
        bin_of[image] = torch.bucketize(scores[image].contiguous(), edges).to(torch.uint8)
    bin_of = bin_of.numpy()

    count = len(edges) + 1
    normal, defect = (np.zeros((len(maps), count), dtype=np.uint32) for _ in range(2))
    overlap = np.zeros((len(maps), count), dtype=np.float32)
    regions = np.zeros(len(maps), dtype=np.uint32)
    for image in np.flatnonzero(has_mask):
        mask, bins_here = masks[image], bin_of[image]
        normal[image] = np.bincount(bins_here[~mask], minlength=count)
        if mask.any():
            share, regions[image] = _region_shares(mask)
            defect[image] = np.bincount(bins_here[mask], minlength=count)
            overlap[image] = np.bincount(bins_here[mask], share, count)
    return {
        "edges": edges.cpu().numpy(),
        "normal": _smallest(normal),
        "defect": _smallest(defect),
        "overlap": overlap,
        "regions": regions,
    }


def metrics_from_histograms(hist: dict[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, float]:
    """pixel_auroc, pixel_ap and aupro in per cent from `pixel_histograms`, each image taken weights[i] times.

    weights (N,) integer, 1 each by default. Within a bin, normal and defect pixels are taken to be evenly mixed. NaN
    where a class is missing. Against the metrics of the 209 recorded rows: off by at most 0.3 (AUROC), 0.1 (AP) and 0.1
    points (AUPRO).
    """
    weights = np.ones(len(hist["normal"])) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != (len(hist["normal"]),):
        raise ValueError(f"weights must have shape ({len(hist['normal'])},), got {weights.shape}")
    normal, defect, overlap = ((weights @ hist[name])[::-1] for name in ("normal", "defect", "overlap"))
    regions = float(weights @ hist["regions"])
    if normal.sum() == 0 or regions == 0:
        return dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro"), math.nan)
    after = np.cumsum(normal) / normal.sum()
    before = after - normal / normal.sum()
    return {
        "pixel_auroc": 100 * _area(defect / defect.sum(), before, after),
        "pixel_ap": 100 * _mixed_average_precision(defect, normal),
        "aupro": 100 * _area(overlap / regions, before, after, FPR_LIMIT) / FPR_LIMIT,
    }


# --- Exact metrics ---------------------------------------------------------------------------------------------------


class _PixelsOfType:
    """Pixels of the chosen images: normal scores ascending, defect scores with their share of their region."""

    def __init__(self, maps: torch.Tensor, masks: np.ndarray, chosen: np.ndarray):
        index = np.flatnonzero(chosen)
        scores = maps.detach()[torch.from_numpy(index).to(maps.device)].float()  # (n, H, W)
        is_defect = torch.from_numpy(masks[index]).to(maps.device)
        self.normal = torch.sort(scores[~is_defect]).values
        self.defect = scores[is_defect]
        shares = [_region_shares(masks[i]) for i in index if masks[i].any()]
        self.share = np.concatenate([share for share, _ in shares]) if shares else np.zeros(0)
        self.regions = sum(count for _, count in shares)


def _pixel_metrics(parts: list[_PixelsOfType], fpr_limit: float) -> dict[str, float]:
    regions = sum(part.regions for part in parts)
    normals = sum(len(part.normal) for part in parts)
    if regions == 0 or normals == 0:
        return dict.fromkeys(("pixel_auroc", "pixel_ap", "pixel_f1_oracle", "aupro"), math.nan)

    distinct, group = torch.unique(torch.cat([part.defect for part in parts]), return_inverse=True)
    group, size = group.cpu().numpy(), len(distinct)
    share = np.concatenate([part.share for part in parts])
    defect = np.bincount(group, minlength=size)[::-1]  # from the highest score down, as all below
    overlap = np.bincount(group, share, size)[::-1] / regions

    def normals_above(right: bool) -> np.ndarray:
        below = sum(torch.searchsorted(part.normal, distinct, right=right) for part in parts)
        return normals - below.cpu().numpy()[::-1]

    before, after = normals_above(right=True), normals_above(right=False)
    found, total = np.cumsum(defect), len(group)
    before_rate, after_rate = before / normals, after / normals
    return {
        "pixel_auroc": 100 * _area(defect / total, before_rate, after_rate),
        "pixel_ap": 100 * float(np.sum(defect / total * (found / (found + after)))),
        "pixel_f1_oracle": 100 * float(np.max(2 * found / (found + after + total))),
        "aupro": 100 * _area(overlap, before_rate, after_rate, fpr_limit) / fpr_limit,
    }


def _image_metrics(scores: np.ndarray, labels: np.ndarray, threshold: float | None) -> dict[str, float]:
    result = {
        "image_auroc": auroc(scores, labels),
        "image_ap": average_precision(scores, labels),
        "image_f1_oracle": f1_max(scores, labels),
    }
    if threshold is not None:
        result["image_f1_dev"] = math.nan if labels.all() else f1_at(scores, labels, threshold)
    return result


# --- Helpers ---------------------------------------------------------------------------------------------------------


def _area(rise: np.ndarray, before: np.ndarray, after: np.ndarray, limit: float = 1.0) -> float:
    """Area under a piecewise linear curve from 0 to `limit`, the curve rising by rise[k] as x goes from before[k] to
    after[k]. A rise adds a triangle (cut at the limit) and, from after[k] on, a rectangle."""
    width = after - before
    inside = np.clip(limit - before, 0.0, width)
    with np.errstate(invalid="ignore", divide="ignore"):
        triangle = np.where(width > 0, inside**2 / (2 * width), 0.0)
    return float(rise @ (triangle + np.clip(limit - after, 0.0, None)))


def _mixed_average_precision(defect: np.ndarray, normal: np.ndarray) -> float:
    """∫ precision d recall with the pixels of a bin evenly mixed: within a bin found and all grow linearly, so the
    integral of their ratio is a straight part and a logarithm."""
    use = defect > 0
    step_all = (defect + normal)[use]
    all_before = (np.cumsum(defect + normal) - (defect + normal))[use]
    found_before = (np.cumsum(defect) - defect)[use]
    slope = defect[use] / step_all
    with np.errstate(invalid="ignore", divide="ignore"):
        # where nothing lies before the bin, precision is the slope all along
        growth = np.where(all_before > 0, np.log1p(step_all / all_before), 0.0)
    precision = slope + (found_before - slope * all_before) / step_all * growth
    return float(defect[use] @ precision / defect.sum())


def _region_shares(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """1 / (area of its region) for each defect pixel of a mask (H, W), row by row, and the number of regions."""
    labelled, count = ndimage.label(mask, structure=EIGHT_CONNECTED)
    return 1.0 / np.bincount(labelled.ravel())[labelled[mask]], count


def _edges(scores: torch.Tensor, bins: int) -> torch.Tensor:
    """Ascending distinct bin edges (≤ bins − 1), from an even subsample of the scores: edges need not be exact."""
    stride = math.ceil(scores.numel() / 4_000_000) | 1  # odd, so that it does not fall on the same columns
    sample = torch.sort(scores.reshape(-1)[::stride]).values
    if len(sample) == 0:
        return sample
    tail = torch.logspace(-5, 0, bins, dtype=torch.float64)[:-1]
    position = ((1 - tail) * len(sample)).long().clamp(max=len(sample) - 1)
    return torch.unique(sample[position.to(sample.device)])


def _smallest(counts: np.ndarray) -> np.ndarray:
    return counts.astype(np.uint16) if counts.max(initial=0) < 2**16 else counts


def _numpy(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _check_maps(maps: torch.Tensor, masks: np.ndarray, has_mask: np.ndarray) -> None:
    if maps.ndim != 3 or tuple(maps.shape) != masks.shape:
        raise ValueError(f"maps and masks must both be (N, H, W), got {tuple(maps.shape)} and {masks.shape}")
    if has_mask.shape != (len(maps),):
        raise ValueError(f"has_mask must have shape ({len(maps)},), got {has_mask.shape}")
    if torch.isnan(maps).any():
        raise ValueError("maps contain NaN: the model that gave them has diverged")


def _check(maps, masks, labels, types, has_mask, type_names, image_scores) -> None:
    """What must hold before the metrics mean anything; each message names the first image that breaks it."""
    _check_maps(maps, masks, has_mask)
    for name, vector in (("labels", labels), ("types", types), ("image_scores", image_scores)):
        if vector.shape != (len(maps),):
            raise ValueError(f"{name} must have shape ({len(maps)},), got {vector.shape}")
    filled = masks.any(axis=(1, 2))
    for broken, message in (
        ((types < 0) | (types >= len(type_names)), f"its type is none of the {len(type_names)} type_names"),
        (labels != (types > 0), "label and type disagree: type 0 is normal, all others are anomalous"),
        (~labels & filled, "it is normal, yet its mask is not empty"),
        (~labels & ~has_mask, "it is normal, so its empty mask is right: set has_mask True"),
        (labels & has_mask & ~filled, "it is anomalous, yet its mask is empty: set has_mask False"),
    ):
        if broken.any():
            raise ValueError(f"image {int(np.flatnonzero(broken)[0])}: {message}")
