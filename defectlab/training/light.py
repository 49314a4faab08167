"""One kind of light to learn from, another to be tested under: magnetic tiles by exposure, and what may help.

Each tile was photographed under rising exposures, 1 to 6 in the files' names (Huang et al., The Visual Computer 36,
2020); the mean grey level rises from 66 to 153. So the change of light is real, and the tiles are others than those of
the training part where the split says so.
"""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from defectlab.data.anomaly import AnomalyData, AnomalySplit
from defectlab.files import DataError
from defectlab.metrics.windows import shares
from defectlab.networks.feature_baselines import PatchCoreSettings
from defectlab.runs import Context, OfAnother, Result
from defectlab.training.feature_baselines import run_patchcore
from defectlab.training.results import rounded

CURES = ("none", "jitter", "normalise")
DARK, BRIGHT = (1, 2), (5, 6)  # exposures; ours
GAIN, GAMMA = 2.0, 1.5  # of the jitter: at most so much more or less, evenly in the logarithm; ours
MEAN, SPREAD = 110.0, 40.0  # grey levels that `normalise` gives every image; ours
GROUPED = PatchCoreSettings(dataset="magnetic_tile_grouped")


@dataclass(frozen=True)
class LightSettings(OfAnother):
    """PatchCore that remembers tiles under some exposures and is tested on tiles under others."""

    model: ClassVar[str] = "light"
    version: ClassVar[int] = 1

    of: PatchCoreSettings = GROUPED
    learns: tuple[int, ...] = DARK
    tested: tuple[int, ...] = BRIGHT
    cure: str = "none"  # "jitter": training images also under drawn light; "normalise": every image alike
    copies: int = 2  # of each training image, under drawn light


def under(split: AnomalySplit, exposures: tuple[int, ...]) -> AnomalySplit:
    """The images under these exposures. DataError where there is none, or a name tells no exposure."""
    told = [re.search(r"exp(\d)_num_", name) for name in split.names]
    if None in told:
        raise DataError(f"{split.names[told.index(None)]} tells no exposure: take magnetic tiles")
    kept = [i for i, found in enumerate(told) if int(found[1]) in exposures]
    if not kept:
        raise DataError(f"no image under the exposures {exposures}: take the whole set of magnetic tiles")
    return chosen(split, kept)


def chosen(split: AnomalySplit, kept: list[int]) -> AnomalySplit:
    """Some of the images."""
    index = torch.tensor(kept, device=split.images.device)
    tensors = (split.images, split.masks, split.labels, split.types, split.has_mask)
    names = (tuple(values[i] for i in kept) for values in (split.names, split.original_sizes))
    return AnomalySplit(*(values[index] for values in tensors), *names)


def relit(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 images (N, 3, H, W), each under a gain and a gamma of its own: 255 · gain · (grey / 255) ^ gamma."""
    draws = 2 * torch.rand(2, len(images), 1, 1, 1, generator=generator).to(images.device) - 1
    gain, gamma = GAIN ** draws[0], GAMMA ** draws[1]
    return (255 * gain * (images.float() / 255) ** gamma).round().clamp(0, 255).to(torch.uint8)


def normalised(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W), each brought to the mean `MEAN` and the standard deviation `SPREAD`."""
    grey = images.float()
    mean, spread = (f(dim=(1, 2, 3), keepdim=True) for f in (grey.mean, grey.std))
    return ((grey - mean) / spread.clamp(min=1e-3) * SPREAD + MEAN).round().clamp(0, 255).to(torch.uint8)


def lit(data: AnomalyData, settings: LightSettings, seed: int) -> AnomalyData:
    """The set as a row sees it: training part and dev under the light to learn from, the test part under the other.
    ValueError for an unknown cure."""
    if settings.cure not in CURES:
        raise ValueError(f"unknown cure {settings.cure!r}: use one of {', '.join(CURES)}")
    parts = {"train": settings.learns, "dev": settings.learns, "test": settings.tested}
    found = {part: under(getattr(data, part), exposures) for part, exposures in parts.items()}
    if settings.cure == "normalise":
        found = {part: replace(split, images=normalised(split.images)) for part, split in found.items()}
    if settings.cure == "jitter":
        generator, images = torch.Generator().manual_seed(seed), found["train"].images
        found["train"] = with_copies(found["train"], [relit(images, generator) for _ in range(settings.copies)])
    return replace(data, **found)


def with_copies(split: AnomalySplit, copies: list[Tensor]) -> AnomalySplit:
    """Good images and changed copies of them (N, 3, S, S), one after the other."""
    times = 1 + len(copies)
    others = (split.masks, split.labels, split.types, split.has_mask)
    repeated = (values.repeat(times, *[1] * (values.ndim - 1)) for values in others)
    return AnomalySplit(
        torch.cat([split.images, *copies]), *repeated, times * split.names, times * split.original_sizes
    )


def run_light(settings: LightSettings, seed: int, data: AnomalyData, context: Context) -> Result:
    """One row and seed; also what the threshold from dev, under the training's light, finds and reports falsely."""
    result = run_patchcore(settings.of, seed, lit(data, settings, seed), context)
    scores, labels = result.predictions["scores"], result.predictions["labels"]
    result.metrics |= rounded(shares(scores, labels, result.dev["threshold"]))
    return result
