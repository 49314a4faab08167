"""Anomaly metrics against scikit-learn and against slow versions written from the definitions."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch import Tensor

from defectlab.metrics.anomaly import anomaly_metrics, metrics_from_histograms, pixel_histograms
from defectlab.metrics.ranking import best_f1_threshold

NAMES = ("good", "scratch", "stain")
FIVE = ("good", *"abcde")


def noise(seed, levels=None, count=6, size=9):
    """Random maps, masks and types; `levels` rounds the scores so that most of them are tied."""
    generator = np.random.default_rng(seed)
    types = np.arange(count) % 3
    masks = ((generator.random((count, size, size)) < 0.3) * (types > 0)[:, None, None]).astype(np.uint8)
    maps = generator.normal(size=masks.shape) + masks
    if levels:
        maps = np.round(maps * levels) / levels
    return torch.from_numpy(maps.astype(np.float32)), masks, types


def evaluate(maps, masks, types, has_mask=None, names=NAMES, labels=None, **options):
    types = np.asarray(types)
    labels = types > 0 if labels is None else labels
    has_mask = np.ones(len(types), dtype=bool) if has_mask is None else has_mask
    return anomaly_metrics(maps, masks, labels, types, has_mask, names, maps.flatten(1).amax(1), **options)


def slow_aupro(maps, masks, limit):
    """The definition: at every distinct threshold, mean overlap of all regions and false positive rate."""
    maps = np.asarray(maps, dtype=np.float64)
    regions = []
    for image, mask in enumerate(masks):
        labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(image, labelled == k) for k in range(1, count + 1)]
    curve = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel()), reverse=True):
        found = maps >= threshold
        overlaps = [found[image][region].mean() for image, region in regions]
        curve.append((found[masks == 0].mean(), np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 >= limit or x1 == x0:
            continue
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return 100 * area / limit


def one_defect_pixel():
    maps, masks, types = noise(5, count=3)
    masks[1:] = 0
    masks[1, 4, 4] = masks[2, 0, 8] = 1
    return maps, masks, types


CASES = {
    "random": lambda: noise(0),
    "tied": lambda: noise(1, levels=1),
    "few ties": lambda: noise(2, levels=10),
    "constant": lambda: (torch.full((6, 9, 9), 0.25), *noise(6)[1:]),
    "one defect pixel": one_defect_pixel,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_is_its_definition(case, limit):
    maps, masks, types = CASES[case]()
    found = evaluate(maps, masks, types, fpr_limit=limit).overall["aupro"]
    assert found == pytest.approx(slow_aupro(maps, masks, limit), abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_areas_and_f1_are_scikit_learns(case):
    maps, masks, types = CASES[case]()
    result = evaluate(maps, masks, types).overall
    pixels, images = (masks.ravel() > 0, maps.numpy().ravel()), (types > 0, maps.amax((1, 2)).numpy())
    for of, (labels, scores) in (("pixel", pixels), ("image", images)):
        assert result[f"{of}_auroc"] == pytest.approx(100 * roc_auc_score(labels, scores), abs=1e-6)
        assert result[f"{of}_ap"] == pytest.approx(100 * average_precision_score(labels, scores), abs=1e-6)
        best = max(f1_score(labels, scores >= threshold) for threshold in np.unique(scores))
        assert result[f"{of}_f1_oracle"] == pytest.approx(100 * best, abs=1e-6)


def test_threshold_from_dev():
    maps, masks, types = noise(0)
    image_scores = maps.amax((1, 2)).numpy()
    threshold = float(np.sort(image_scores)[2])  # a score itself: "at the threshold" counts as anomalous
    result = evaluate(maps, masks, types, threshold=threshold)
    expected = 100 * f1_score(types > 0, image_scores >= threshold)
    assert result.overall["image_f1_dev"] == pytest.approx(expected)
    assert "image_f1_dev" not in evaluate(maps, masks, types).overall


def test_diagonal_neighbours_are_one_region():
    maps = torch.zeros(2, 6, 6)
    masks = np.zeros((2, 6, 6), dtype=np.uint8)
    masks[1, 1, 1] = masks[1, 2, 2] = 1  # one region of two pixels, touching at a corner
    masks[1, 5, 0:4] = 1  # one region of four pixels
    maps[1][torch.from_numpy(masks[1]) > 0] = -1.0
    maps[1, 1, 1] = 1.0
    # At FPR 0 half of the first region and none of the second is found; the rest comes after all normal pixels.
    assert evaluate(maps, masks, [0, 1]).overall["aupro"] == pytest.approx(25.0)


def test_perfect_and_reversed_maps():
    _, masks, types = noise(3)
    perfect = evaluate(torch.from_numpy(masks).float(), masks, types).overall
    assert {name: round(value, 6) for name, value in perfect.items()} == dict.fromkeys(perfect, 100.0)
    reversed_maps = evaluate(-torch.from_numpy(masks).float(), masks, types).overall
    assert reversed_maps["pixel_auroc"] == 0
    assert reversed_maps["aupro"] == 0


def test_types_are_the_metrics_of_their_subset():
    maps, masks, types = noise(4, levels=3, count=12)
    result = evaluate(maps, masks, types, threshold=1.5)
    assert list(result.per_class) == ["scratch", "stain"]
    for index, name in enumerate(NAMES[1:], start=1):
        use = np.isin(types, [0, index])
        alone = evaluate(maps[torch.from_numpy(use)], masks[use], types[use], threshold=1.5).overall
        assert result.per_class[name] == pytest.approx(alone, abs=1e-9)


def test_undefined_is_nan():
    maps, masks, types = noise(0)
    normal = types == 0
    result = evaluate(maps[torch.from_numpy(normal)], masks[normal], types[normal], threshold=0.0)
    assert len(result.overall) == 8
    for values in (result.overall, *result.per_class.values()):
        assert all(math.isnan(value) for value in values.values())
    all_defect = np.ones((1, 9, 9), dtype=np.uint8)
    assert all(math.isnan(value) for value in evaluate(maps[:1], all_defect, [1]).overall.values())


def test_an_anomalous_image_without_mask_counts_at_image_level_only():
    maps, masks, types = noise(7)
    masks[4] = 0
    maps[4] -= 10  # missed at image level
    has_mask = np.arange(6) != 4
    result = evaluate(maps, masks, types, has_mask=has_mask).overall
    without = evaluate(maps[torch.from_numpy(has_mask)], masks[has_mask], types[has_mask]).overall
    scores = maps.amax((1, 2)).numpy()
    assert result["image_auroc"] == pytest.approx(100 * roc_auc_score(types > 0, scores))
    assert result["image_auroc"] != pytest.approx(without["image_auroc"])
    pixels = ("pixel_auroc", "pixel_ap", "aupro", "pixel_f1_oracle")
    assert {name: result[name] for name in pixels} == pytest.approx({name: without[name] for name in pixels})


EMPTY, ALL_FILLED = np.zeros((6, 9, 9)), np.ones((6, 9, 9))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"masks": EMPTY}, "image 1: it is anomalous, yet its mask is empty"),
        ({"has_mask": np.arange(6) % 3 > 0}, "image 0: it is normal, so its empty mask is right"),
        ({"masks": ALL_FILLED}, "image 0: it is normal, yet its mask is not empty"),
        ({"types": np.arange(6) % 3 + 1}, "its type is none of the 3"),
        ({"maps": torch.full((6, 9, 9), math.nan)}, "NaN"),
        ({"masks": ALL_FILLED[:, :4]}, r"\(N, H, W\)"),
        ({"fpr_limit": 0.0}, "fpr_limit"),
        ({"labels": np.ones(6)}, "image 0: label and type disagree"),
    ],
)
def test_contradictions_are_named(changes, why):
    maps, masks, types = noise(8)
    with pytest.raises(ValueError, match=why):
        evaluate(**({"maps": maps, "masks": masks, "types": types} | changes))


# --- The threshold of the best F1 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "labels", "threshold"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 2.5),  # separable: midway
        ([1, 2, 3, 4], [0, 1, 0, 1], 1.5),  # all but the lowest: F1 0.8, against 2/3 for {4} alone
        ([4, 3, 2, 1], [1, 1, 1, 1], 1.0),  # all anomalous: the lowest score itself
        ([5], [1], 5.0),
        ([3, 3, 1, 1], [1, 1, 0, 0], 2.0),  # ties within a class do not matter
        # Possible: {3} with F1 1/2, {3, 2, 2, 2, 2} with 1/2, all with 2/3. A cut inside the tie would pretend 4/5.
        ([3, 2, 2, 2, 2, 1], [1, 1, 0, 0, 0, 1], 1.0),
    ],
)
def test_threshold_by_hand(scores: list[float], labels: list[int], threshold: float) -> None:
    """Equal scores fall on one side together: no threshold divides a tie, whatever the order of the images."""
    for order in (list(range(len(scores))), list(range(len(scores)))[::-1]):
        s = torch.tensor(scores, dtype=torch.float32)[order]
        found = best_f1_threshold(s, torch.tensor(labels, dtype=torch.uint8)[order])
        assert found == pytest.approx(threshold)


def f1_at(threshold: float, scores: Tensor, labels: Tensor) -> float:
    called = scores.double() >= threshold
    return float(2 * (called & (labels == 1)).sum() / (called.sum() + labels.sum()))


@pytest.mark.parametrize("levels", [1000, 6])  # 6: most scores tie, also across the classes
def test_threshold_reaches_the_best_f1(levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        labels = torch.randint(0, 2, (24,), generator=generator, dtype=torch.uint8)
        labels[0] = 1
        scores = (torch.randint(0, levels, (24,), generator=generator) + levels // 3 * labels).float()
        best = max(f1_at(float(t), scores, labels) for t in scores.double())
        assert f1_at(best_f1_threshold(scores, labels), scores, labels) == pytest.approx(best)


# --- At a real size --------------------------------------------------------------------------------------------------


def smooth(count, size=256, strength=6.0, seed=0):
    """Smooth maps with elliptic defects that differ in visibility; five types, a quarter of the images normal."""
    generator = np.random.default_rng(seed)
    types = np.r_[np.zeros(count // 4, dtype=np.int64), generator.integers(1, 6, count - count // 4)]
    masks = np.zeros((count, size, size), dtype=np.uint8)
    maps = np.empty(masks.shape, dtype=np.float32)
    rows, columns = np.mgrid[:size, :size]
    for image in range(count):
        texture = ndimage.gaussian_filter(generator.standard_normal((size // 4, size // 4)), 2)
        field = ndimage.zoom(texture / texture.std(), 4, order=1) + generator.normal(0, 0.5)
        for _ in range(generator.integers(1, 4) if types[image] else 0):
            (row, column), (a, b) = generator.uniform(0.1, 0.9, 2) * size, generator.uniform(0.02, 0.1, 2) * size
            blob = ((rows - row) / a) ** 2 + ((columns - column) / b) ** 2 < 1
            masks[image] |= blob
            visible = strength * generator.uniform(0.3, 1.3)
            field = field + visible * ndimage.gaussian_filter(blob.astype(np.float32), size / 64)
        maps[image] = np.exp(field / 2)
    return torch.from_numpy(maps), masks, types


def test_histograms_stand_for_the_pixels():
    maps, masks, types = smooth(80)
    result = evaluate(maps, masks, types, names=FIVE)
    histograms = pixel_histograms(maps, masks, np.ones(80, dtype=bool))
    assert (histograms["normal"].sum(1) + histograms["defect"].sum(1) == 256 * 256).all()
    assert np.allclose(histograms["overlap"].sum(1), histograms["regions"], atol=1e-5)
    packed = io.BytesIO()
    np.savez_compressed(packed, **histograms)
    assert len(packed.getvalue()) < 200_000 * 80 / 583  # small enough to commit
    subsets = [(np.ones(80, dtype=int), result.overall)]
    subsets += [(np.isin(types, [0, t]).astype(int), result.per_class["abcde"[t - 1]]) for t in range(1, 6)]
    for weights, exact in subsets:
        for name, value in metrics_from_histograms(histograms, weights).items():
            assert value == pytest.approx(exact[name], abs=0.3), name


def test_image_weights_are_repeated_images():
    maps, masks, types = smooth(12, size=64)
    masks[11] = 0
    has_mask = np.arange(12) != 11
    histograms = pixel_histograms(maps, masks, has_mask)
    assert histograms["normal"][11].sum() == histograms["regions"][11] == 0
    weights = np.array([0, 2, 1, 3, 0, 1, 2, 0, 1, 1, 1, 5])
    repeated = {name: np.repeat(rows, weights, axis=0) for name, rows in histograms.items() if name != "edges"}
    assert metrics_from_histograms(histograms, weights) == pytest.approx(metrics_from_histograms(repeated))
    index = np.repeat(np.arange(11), weights[:11])
    exact = evaluate(maps[index], masks[index], types[index], names=FIVE).overall
    for name, value in metrics_from_histograms(histograms, weights).items():
        assert value == pytest.approx(exact[name], abs=0.5), name


def test_histograms_of_degenerate_maps():
    maps, masks, _ = noise(9, size=256, count=3)
    flat = pixel_histograms(torch.zeros_like(maps), masks, np.ones(3, dtype=bool))
    assert flat["normal"].dtype == np.uint32  # 65536 pixels in one bin do not fit 16 bits
    expected = 100 * (masks > 0).mean()
    assert metrics_from_histograms(flat) == pytest.approx({"pixel_auroc": 50.0, "pixel_ap": expected, "aupro": 15.0})
    only_normal = metrics_from_histograms(flat, np.array([1, 0, 0]))
    assert all(math.isnan(value) for value in only_normal.values())
    with pytest.raises(ValueError, match="weights must have shape"):
        metrics_from_histograms(flat, np.ones(2))
    with pytest.raises(ValueError, match="bins"):
        pixel_histograms(maps, masks, np.ones(3, dtype=bool), bins=1000)
