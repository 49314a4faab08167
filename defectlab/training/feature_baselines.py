"""PaDiM, SPADE and PatchCore on the features of a teacher: fitted to the good images, scored, evaluated."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from defectlab.data.anomaly import AnomalyData
from defectlab.networks import feature_baselines as methods
from defectlab.networks.feature_baselines import PaDiMSettings, PatchCoreSettings, SPADESettings
from defectlab.networks.reverse_distillation import gaussian_smooth, upsample
from defectlab.precision import full_float32, precision_of
from defectlab.runs import Context, Result
from defectlab.training.anomaly import evaluate, teacher_features

POSITIONS = 256  # whose Gaussians are held at once


@torch.inference_mode()
def run_padim(settings: PaDiMSettings, seed: int, data: AnomalyData, context: Context) -> Result:
    """Fit on the good images, score dev and test; the seed draws the channels.

    The Gaussians are not kept with the run: 125 MB with a ResNet-18, seconds to fit again.
    """
    features = {part: teacher_features(data, part, settings) for part in ("train", "dev", "test")}
    widths = [layer.shape[1] for layer in features["train"]]
    channels = methods.draw_channels(sum(widths), methods.CHANNELS[widths[0]], seed)
    embedded = {part: methods.embedding(layers, channels) for part, layers in features.items()}
    height, width = features["train"][0].shape[-2:]
    distances: dict[str, list[Tensor]] = {"dev": [], "test": []}
    with full_float32():
        for start in range(0, height * width, POSITIONS):
            mean, factor = methods.fit_gaussians(embedded["train"][start : start + POSITIONS])
            for part, found in distances.items():
                found.append(methods.mahalanobis(embedded[part][start : start + POSITIONS], mean, factor))
    context.log(f"  {height * width} Gaussians of {len(channels)} channels fitted to {len(data.train)} images")
    maps = {
        part: gaussian_smooth(upsample(torch.cat(found).T.unflatten(1, (height, width))))
        for part, found in distances.items()
    }
    result, costs = evaluate(data, maps["dev"], maps["test"]), {"parameters": 0, "gaussians": height * width}
    return replace(result, precision=precision_of(settings, context.device), costs=costs)


@torch.inference_mode()
def run_spade(settings: SPADESettings, seed: int, data: AnomalyData, context: Context) -> Result:
    """Score dev and test against the good images; nothing depends on the seed."""
    good = teacher_features(data, "train", settings)
    described, pixels = methods.descriptors(good), methods.pyramid(good)
    maps, scores = {}, {}
    for part in ("dev", "test"):
        features = teacher_features(data, part, settings)
        scores[part], nearest = methods.nearest_images(methods.descriptors(features), described, settings.neighbours)
        maps[part] = gaussian_smooth(upsample(methods.pixel_distances(methods.pyramid(features), pixels, nearest)))
    context.log(f"  {len(maps['dev']) + len(maps['test'])} images compared with {len(good[0])} good ones")
    result = evaluate(data, maps["dev"], maps["test"], scores["dev"], scores["test"])
    costs = {"parameters": 0, "remembered_images": len(good[0])}
    return replace(result, precision=precision_of(settings, context.device), costs=costs)


@torch.inference_mode()
def run_patchcore(settings: PatchCoreSettings, seed: int, data: AnomalyData, context: Context) -> Result:
    """One row; the seed draws the projection and the first patch. The model is the bank of patches (M, C)."""
    features = partial(teacher_features, data, settings=settings)
    chunks = zip(*(f.split(64) for f in features("train")), strict=True)  # the temporaries of all images are GBs
    patches = torch.cat([methods.patch_features(list(chunk)).flatten(0, 2) for chunk in chunks])
    bank = patches[methods.greedy_coreset(patches, max(1, round(settings.coreset * len(patches))), seed)]
    del patches
    context.log(f"  {len(bank)} patches of {bank.shape[1]} channels remembered")
    maps, scores = {}, {}
    for part in ("dev", "test"):
        maps[part], scores[part] = score_patches(features(part), bank)
    result = evaluate(data, maps["dev"], maps["test"], scores["dev"], scores["test"])
    costs = {"parameters": 0, "remembered_patches": len(bank)}
    return replace(result, precision=precision_of(settings, context.device), model={"bank": bank}, costs=costs)


def score_patches(features: list[Tensor], bank: Tensor, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Teacher features -> (smoothed maps (N, 256, 256), image scores (N,))."""
    maps, scores = [], []
    for start in range(0, len(features[0]), batch):
        patches = methods.patch_features([f[start : start + batch] for f in features])  # (B, h, w, C)
        count, height, width, _ = patches.shape
        distances, indices = methods.nearest_distances(patches.flatten(0, 2), bank)
        distances, indices = distances.view(count, -1), indices.view(count, -1)
        maps.append(gaussian_smooth(upsample(distances.view(count, height, width))))
        images = zip(patches, distances, indices, strict=True)
        scores += [methods.reweighted_score(p.flatten(0, 1), d, i, bank) for p, d, i in images]
    return torch.cat(maps), torch.stack(scores)
