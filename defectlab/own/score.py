"""A trained model on a reader's own pictures: scores and anomaly maps as files; or train on a folder of good ones."""

import argparse
import csv
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from defectlab.data.anomaly import from_good_folder, load_folder
from defectlab.files import DataError, write_atomically
from defectlab.networks import resnet as teachers
from defectlab.networks import reverse_distillation
from defectlab.networks.feature_baselines import PatchCoreSettings
from defectlab.networks.reverse_distillation import MAP_SIZE, RD4ADSettings, image_scores
from defectlab.papers import bsdrd
from defectlab.precision import precision_of
from defectlab.provenance import pick_device
from defectlab.runs import Context
from defectlab.training.anomaly import compute_features, run_rd4ad, score_features
from defectlab.training.bsdrd import run_bsdrd
from defectlab.training.feature_baselines import run_patchcore, score_patches

CHUNK = 256  # pictures whose features are held at once: about 0.9 MB each at 256 px with a ResNet-18
KINDS = {  # settings, how it is trained, and the module with the network and its maps
    "rd4ad": (RD4ADSettings, run_rd4ad, reverse_distillation),
    "patchcore": (PatchCoreSettings, run_patchcore, None),
    "bsdrd": (bsdrd.Settings, run_bsdrd, bsdrd),
}


def read_model(path: Path) -> tuple[Any, dict[str, float], dict[str, Tensor]]:
    """-> (settings, metrics on dev with the threshold, tensors). DataError for a file that is no model of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        kind, *_ = KINDS[header["model"]]
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(header["settings"]).items()}
        return kind(**values), json.loads(header["dev"]), tensors
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no model that this program saved ({error}): give a .safetensors from runs/, or train one with "
            "--train-good"
        ) from error


@torch.inference_mode()
def score_pictures(path: Path, settings: Any, tensors: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """The model read from `path` on uint8 images (N, 3, size, size), as in the study's own rows.

    -> (maps (N, 256, 256), scores (N,)), on the images' device. DataError where the tensors do not fit.
    """
    device = images.device
    if settings.model == "patchcore":
        _check_tensors(path, tensors, {"bank"})
        bank = tensors["bank"].to(device)
        parts = [score_patches(compute_features(settings, chunk), bank) for chunk in images.split(CHUNK)]
        return torch.cat([maps for maps, _ in parts]), torch.cat([scores for _, scores in parts])
    *_, module = KINDS[settings.model]
    teacher = teachers.Teacher(settings.teacher)  # for its shapes only
    network = module.build(settings, teacher.channels, teacher.bottleneck)
    _check_tensors(path, tensors, set(network.state_dict()))
    network.load_state_dict(tensors)
    network.to(device, memory_format=torch.channels_last).eval()
    to_maps = partial(module.to_maps, settings)
    precision = precision_of(settings, device)
    maps = torch.cat(
        [score_features(network, compute_features(settings, c), to_maps, precision) for c in images.split(CHUNK)]
    )
    return maps, image_scores(maps)


def _check_tensors(path: Path, tensors: dict[str, Tensor], wanted: set[str]) -> None:
    if tensors.keys() != wanted:
        odd = sorted(tensors.keys() ^ wanted)[0]
        raise DataError(f"{path} does not hold the tensors that its settings call for ({odd}): train it again")


def train_good(options: argparse.Namespace, device: str) -> Path:
    """Train `--method` on a folder of good pictures; the threshold comes from defects pasted on a tenth of them."""
    kind, run, _ = KINDS[options.method]
    settings = kind(dataset=f"folder {options.train_good.name}", teacher=options.teacher, size=options.size)
    if options.method != "patchcore":
        settings = dataclasses.replace(settings, epochs=options.epochs)
    data = from_good_folder(options.train_good, options.size, device)
    result = run(settings, 0, data, Context(device=device))
    path = options.out / f"{options.method}.safetensors"
    header = {"model": options.method, "settings": json.dumps(dataclasses.asdict(settings))}
    header["dev"] = json.dumps(result.dev)
    tensors = {k: v.detach().cpu().contiguous() for k, v in result.model.items()}
    write_atomically(path, lambda aside: save_file(tensors, aside, header))
    print(f"trained on {len(data.train)} good pictures; saved {path}")
    return path


def score(options: argparse.Namespace) -> int:
    """The command `score`: writes `scores.csv` (picture, score, anomalous) and, a picture, the map as
    `<name>_map.npy` (256, 256) float32 and `<name>_map.png`, the picture with the map laid over it."""
    device = pick_device(options.device)
    load_folder(options.images, 8, "cpu")  # a wrong folder is an error before any training
    path = train_good(options, device) if options.train_good else options.model
    settings, dev, tensors = read_model(path)
    images, names = load_folder(options.images, settings.size, device)
    maps, scores = score_pictures(path, settings, tensors, images)
    threshold = dev["threshold"]
    options.out.mkdir(parents=True, exist_ok=True)
    high = max(float(maps.max()), threshold)
    for name, picture, one in zip(names, images[:, 0].cpu(), maps.cpu(), strict=True):
        np.save(options.out / f"{name}_map.npy", one.numpy())
        overlay(picture.numpy(), one.numpy() / high).save(options.out / f"{name}_map.png")
    with (options.out / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "score", "anomalous"])
        for name, value in zip(names, scores.tolist(), strict=True):
            writer.writerow([name, f"{value:.6f}", int(value >= threshold)])
    flagged = int((scores >= threshold).sum())
    print(f"{len(names)} pictures scored, {flagged} at or above the dev threshold {threshold:.4f}: {options.out}")
    return 0


def overlay(picture: np.ndarray, heat: np.ndarray) -> Image.Image:
    """Grey picture (H, W) uint8 and heat (256, 256) in 0..1 -> a colour image of 256 x 256."""
    grey = np.asarray(Image.fromarray(picture).resize((MAP_SIZE, MAP_SIZE), Image.Resampling.BILINEAR))
    colour = matplotlib.colormaps["inferno"](heat.clip(0, 1))[..., :3] * 255
    return Image.fromarray((0.5 * grey[..., None] + 0.5 * colour).astype(np.uint8))
