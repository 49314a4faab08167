"""A trained model on a reader's own images: scores and anomaly maps as files; or train on a folder of good ones."""

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from defectlab.data.anomaly import from_good_folder, load_folder
from defectlab.files import write_atomically
from defectlab.networks.feature_baselines import PatchCoreSettings
from defectlab.networks.reverse_distillation import MAP_SIZE, RD4AD, RD4ADSettings, image_scores
from defectlab.own import saved
from defectlab.papers import bsdrd
from defectlab.precision import precision_of
from defectlab.provenance import pick_device
from defectlab.runs import Context
from defectlab.training.anomaly import compute_features, run_rd4ad, score_features
from defectlab.training.bsdrd import run_bsdrd
from defectlab.training.feature_baselines import run_patchcore, score_patches

CHUNK = 256  # images whose features are held at once: about 0.9 MB each at 256 px with a ResNet-18
SETTINGS = {"rd4ad": RD4ADSettings, "bsdrd": bsdrd.Settings, "patchcore": PatchCoreSettings}
RUNS = {"rd4ad": run_rd4ad, "bsdrd": run_bsdrd, "patchcore": run_patchcore}
METHODS = {"rd4ad": RD4AD, "bsdrd": bsdrd.BSDRD}  # images to maps
REMEDY = "give a .safetensors of an anomaly method from runs/, or train one with --train-good"


@torch.inference_mode()
def score_images(model: saved.Saved, images: Tensor) -> tuple[Tensor, Tensor]:
    """A model on uint8 images (N, 3, size, size), in the precision of the study's own rows.

    -> (maps (N, 256, 256), scores (N,)), on the images' device. DataError where its tensors do not fit.
    """
    settings, chunks = model.settings, images.split(CHUNK)
    if settings.model == "patchcore":
        bank = torch.nn.Module()
        bank.register_buffer("bank", model.tensors.get("bank"))
        model.load_into(bank)
        bank.to(images.device)
        parts = [score_patches(compute_features(settings, chunk), bank.bank) for chunk in chunks]
        return torch.cat([maps for maps, _ in parts]), torch.cat([scores for _, scores in parts])
    method = METHODS[settings.model](settings)
    model.load_into(method.network)
    method.network.to(images.device, memory_format=torch.channels_last)
    precision = precision_of(settings, images.device)
    maps = [score_features(method.network, compute_features(settings, c), method.to_maps, precision) for c in chunks]
    return torch.cat(maps), image_scores(torch.cat(maps))


def train_good(options: argparse.Namespace, device: str) -> Path:
    """Train `--method` on a folder of good images; the threshold comes from defects pasted on a tenth of them."""
    kind = SETTINGS[options.method]
    settings = kind(dataset=f"folder {options.train_good.name}", teacher=options.teacher, size=options.size)
    if options.method != "patchcore":
        settings = replace(settings, epochs=options.epochs)
    data = from_good_folder(options.train_good, options.size, device)
    result = RUNS[options.method](settings, 0, data, Context(device=device))
    path = options.out / f"{options.method}.safetensors"
    saved.write(path, settings, result.dev, result.model)
    print(f"trained on {len(data.train)} good images; saved {path}")
    return path


def score(options: argparse.Namespace) -> int:
    """The command `score`: writes `scores.csv` (image, score, anomalous) and for each image the map as
    `<name>_map.npy` (256, 256) float32 and `<name>_map.png`, the image with the map laid over it."""
    device = pick_device(options.device)
    load_folder(options.images, 8, "cpu")  # a wrong folder is an error before any training
    path = train_good(options, device) if options.train_good else options.model
    model = saved.read(path, SETTINGS, REMEDY)
    images, names = load_folder(options.images, model.settings.size, device)
    maps, scores = score_images(model, images)
    options.out.mkdir(parents=True, exist_ok=True)
    high = max(float(maps.max()), model.threshold)
    for name, image, one in zip(names, images[:, 0].cpu(), maps.cpu(), strict=True):
        np.save(options.out / f"{name}_map.npy", one.numpy())
        overlay(image.numpy(), one.numpy() / high).save(options.out / f"{name}_map.png")
    table = pd.DataFrame({"image": names, "score": scores.tolist()})
    table["anomalous"] = (table["score"] >= model.threshold).astype(int)
    write_atomically(options.out / "scores.csv", lambda aside: table.to_csv(aside, index=False, float_format="%.6f"))
    flagged = f"{table['anomalous'].sum()} at or above the dev threshold {model.threshold:.4f}"
    print(f"{len(names)} images scored, {flagged}: {options.out}")
    return 0


def overlay(image: np.ndarray, heat: np.ndarray) -> Image.Image:
    """Grey image (H, W) uint8 and heat (256, 256) in 0..1 -> a colour image of 256 x 256."""
    grey = np.asarray(Image.fromarray(image).resize((MAP_SIZE, MAP_SIZE), Image.Resampling.BILINEAR))
    colour = matplotlib.colormaps["inferno"](heat.clip(0, 1))[..., :3] * 255
    return Image.fromarray((0.5 * grey[..., None] + 0.5 * colour).astype(np.uint8))
