"""A trained model on a reader's own images: scores and anomaly maps as files; or train on a folder of good ones."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from defectlab.data.anomaly import AnomalyData, from_good_folder
from defectlab.data.images import plain, to_square
from defectlab.data.leaks import SIDE
from defectlab.data.own_folder import Images, look_alikes
from defectlab.figures.own import overlay
from defectlab.files import write_atomically
from defectlab.networks import reverse_distillation
from defectlab.networks.feature_baselines import PatchCoreSettings
from defectlab.networks.resnet import Teacher
from defectlab.networks.reverse_distillation import RD4ADSettings, image_scores
from defectlab.own import saved
from defectlab.own.folders import check_same, key_and_checkpoint, prepare
from defectlab.papers import bsdrd
from defectlab.precision import precision_of
from defectlab.provenance import pick_device
from defectlab.runs import Context
from defectlab.studies.bsdrd import run_bsdrd
from defectlab.training.anomaly import compute_features, run_rd4ad, score_features
from defectlab.training.feature_baselines import run_patchcore, score_patches

CHUNK = 64  # images whose features and maps are held at once: about 1.3 MB each at 256 px with a ResNet-18
SETTINGS = {"rd4ad": RD4ADSettings, "bsdrd": bsdrd.Settings, "patchcore": PatchCoreSettings}
RUNS = {"rd4ad": run_rd4ad, "bsdrd": run_bsdrd, "patchcore": run_patchcore}
METHODS = {  # how each network is built, and what makes maps of its output
    "rd4ad": (reverse_distillation.build, reverse_distillation.to_maps),
    "bsdrd": (bsdrd.build, bsdrd.to_maps),
}
REMEDY = "give a .safetensors of an anomaly method from runs/, or train one with --train-good"


def scorer(model: saved.Saved, device: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A model as a function, in the precision of the study's own rows: uint8 images (N, 3, size, size) on the device ->
    (maps (N, 256, 256), scores (N,)). DataError where its tensors do not fit."""
    settings = model.settings
    network = model.build(lambda: fresh(settings, model.tensors)).eval()
    network.to(device, memory_format=torch.channels_last)
    if settings.model == "patchcore":
        return torch.inference_mode()(lambda images: score_patches(compute_features(settings, images), network.bank))
    to_maps, precision = partial(METHODS[settings.model][1], settings), precision_of(settings, device)

    @torch.inference_mode()
    def maps_and_scores(images: Tensor) -> tuple[Tensor, Tensor]:
        maps = score_features(network, compute_features(settings, images), to_maps, precision)
        return maps, image_scores(maps)

    return maps_and_scores


def fresh(settings: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """What a model of these settings was trained into: a network, or a memory bank of as many patches as the file's."""
    teacher = Teacher(settings.teacher)  # for its widths alone
    if settings.model != "patchcore":
        return METHODS[settings.model][0](settings, teacher.channels, teacher.bottleneck)
    bank = nn.Module()
    bank.register_buffer("bank", torch.zeros(len(tensors["bank"]), sum(teacher.channels[1:])))
    return bank


def train_good(options: argparse.Namespace, device: str) -> tuple[Path, AnomalyData]:
    """Train `--method` on a folder of good images, or go on; the threshold comes from defects pasted on a tenth."""
    kind = SETTINGS[options.method]
    settings = kind(dataset=f"folder {options.train_good.resolve().name}", teacher=options.teacher, size=options.size)
    if options.method != "patchcore":
        settings = replace(settings, epochs=options.epochs)
    data = from_good_folder(options.train_good, options.size, device)
    prepare(options.out, options.images, options.train_good)
    path = options.out / f"{options.method}.safetensors"
    key, checkpoint = key_and_checkpoint(path, settings, 0, data)
    if path.exists():
        check_same(saved.read(path, SETTINGS, REMEDY), key)
        return path, data
    result = RUNS[options.method](settings, 0, data, Context(device, checkpoint))
    saved.write(path, settings, result.dev, result.model, key=key)
    checkpoint.unlink(missing_ok=True)
    print(f"learnt from {len(data.train)} good images; saved {path}")
    return path, data


def score(options: argparse.Namespace) -> int:
    """The command `score`: writes `scores.csv` (image, score, anomalous) and each map as `<name>_map.npy`, (256, 256)
    float32, and `<name>_map.png`, laid over the image in colours from 0 to twice the threshold. With `--train-good` the
    images that look like a good one are named, too. -> exit code, 1 where some images could not be read."""
    if options.threshold is not None and not np.isfinite(options.threshold):
        raise ValueError(f"--threshold must be a finite number, got {options.threshold}")
    if options.train_good:
        saved.check_size(options.size, 64)
    device, out = pick_device(options.device), options.out
    images = Images(options.images)  # a wrong folder is an error before any training
    path, good = train_good(options, device) if options.train_good else (options.model, None)
    model = saved.read(path, SETTINGS, REMEDY)
    maps_and_scores = scorer(model, device)
    prepare(out, options.images)
    threshold, whose = (model.threshold, "dev ") if options.threshold is None else (options.threshold, "")
    rows, small = [], []
    for names, squares in images.chunks(CHUNK, partial(to_square, size=model.settings.size)):
        pixels = torch.from_numpy(np.stack(squares))
        maps, scores = maps_and_scores(pixels.to(device))
        if good:
            small.append(adaptive_avg_pool2d(pixels.float().mean(1, keepdim=True), SIDE))  # all that a leak check uses
        rows += zip(map(plain, names), scores.tolist(), strict=True)
        for name, image, one in zip(names, pixels[:, 0].numpy(), maps.cpu().numpy(), strict=True):
            with images.writing("map", name):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                np.save(out / f"{name}_map.npy", one)
                overlay(image, one / max(2 * threshold, 1e-9)).save(out / f"{name}_map.png")
    table = pd.DataFrame(rows, columns=["image", "score"])
    table["anomalous"] = (table["score"] >= threshold).astype(int)
    write_atomically(out / "scores.csv", lambda aside: table.to_csv(aside, index=False, float_format="%.6f"))
    flagged = f"{table['anomalous'].sum()} at or above the {whose}threshold {threshold:.4f}"
    print(f"{len(table)} images scored, {flagged}: {out}")
    if small:
        half = len(good.dev) // 2  # then come copies with pasted defects
        seen = [f"{options.train_good / name}" for name in good.train.names + good.dev.names[:half]]
        pixels, new = torch.cat((good.train.images, good.dev.images[:half])), [f"{options.images / n}" for n, _ in rows]
        for line in look_alikes(seen, pixels, new, torch.cat(small).to(device)):
            print(line)
    return images.close()
