"""The threshold of the best F1: by hand, with ties, against a search through all."""

import pytest
import torch
from torch import Tensor

from defectlab.metrics.ranking import best_f1_threshold


@pytest.mark.parametrize(
    ("scores", "labels", "threshold"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 2.5),  # separable: midway
        ([1, 2, 3, 4], [0, 1, 0, 1], 1.5),  # all but the lowest: F1 0.8, against 2/3 for {4} alone
        ([4, 3, 2, 1], [1, 1, 1, 1], 1.0),  # all anomalous: the lowest score itself
        ([5], [1], 5.0),
        ([3, 3, 1, 1], [1, 1, 0, 0], 2.0),  # ties within a class do not matter
    ],
)
def test_threshold_by_hand(scores: list[float], labels: list[int], threshold: float) -> None:
    for order in (list(range(len(scores))), list(range(len(scores)))[::-1]):
        s = torch.tensor(scores, dtype=torch.float32)[order]
        found = best_f1_threshold(s, torch.tensor(labels, dtype=torch.uint8)[order])
        assert found == pytest.approx(threshold)


def f1_at(threshold: float, scores: Tensor, labels: Tensor) -> float:
    called = scores.double() >= threshold
    return float(2 * (called & (labels == 1)).sum() / (called.sum() + labels.sum()))


def test_threshold_reaches_the_best_f1_when_the_classes_tie() -> None:
    """Equal scores fall on one side together: no threshold divides a tie, whatever the order of the images."""
    scores, labels = torch.tensor([3.0, 2.0, 2.0, 2.0, 2.0, 1.0]), torch.tensor([1, 1, 0, 0, 0, 1])
    # Possible: {3} with F1 1/2, {3, 2, 2, 2, 2} with 1/2, all with 2/3. A cut inside the tie would pretend 4/5.
    for order in (list(range(6)), list(range(6))[::-1]):
        found = best_f1_threshold(scores[order], labels[order])
        assert f1_at(found, scores, labels) == pytest.approx(2 / 3)


@pytest.mark.parametrize("levels", [1000, 6])  # 6: most scores tie, also across the classes
def test_threshold_reaches_the_best_f1(levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        labels = torch.randint(0, 2, (24,), generator=generator, dtype=torch.uint8)
        labels[0] = 1
        scores = (torch.randint(0, levels, (24,), generator=generator) + levels // 3 * labels).float()
        best = max(f1_at(float(t), scores, labels) for t in scores.double())
        assert f1_at(best_f1_threshold(scores, labels), scores, labels) == pytest.approx(best)
