"""A toy set drawn in memory, for the tests of anomaly detection."""

import torch

from defectlab.data.anomaly import AnomalySplit


def fake_split(good: int, bad: int, seed: int, size: int = 64) -> AnomalySplit:
    """Noise; a bad image has a bright square, and its mask says where."""
    generator = torch.Generator().manual_seed(seed)
    count = good + bad
    images = torch.randint(90, 130, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(count, 256, 256, dtype=torch.uint8)
    labels = (torch.arange(count) >= good).to(torch.uint8)
    images[good:, :, size // 4 : size // 2, size // 4 : size // 2] += 100
    masks[good:, 64:128, 64:128] = 1
    names = tuple(f"{seed}_{i}" for i in range(count))
    return AnomalySplit(
        images, masks, labels, labels, torch.ones(count, dtype=torch.bool), names, ((size, size),) * count
    )
