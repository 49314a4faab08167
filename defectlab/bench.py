"""Speed of training and inference on this machine, a line for each network: what `make bench` prints."""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from defectlab.data.anomaly import AnomalySplit
from defectlab.data.augment import Batch, augment
from defectlab.data.detection import DetectionSplit
from defectlab.metrics.costs import inference_seconds, parameters, seconds_per_call
from defectlab.networks import reverse_distillation
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.losses import detection_loss
from defectlab.networks.yolo.model import build_detector
from defectlab.papers import bsdrd, yolo_dcf
from defectlab.precision import precision_of
from defectlab.provenance import device_name, peak_memory_mb, pick_device, reset_peak_memory
from defectlab.runs import Context
from defectlab.studies import study
from defectlab.training.anomaly import teacher_features, train_student
from defectlab.training.detection import fresh
from defectlab.training.loop import Trained
from defectlab.training.recipe import augmentation_of, train_detector

BATCH, IMAGES = 16, 32  # images per batch, in training and inference, and of the set
CLASSES, BOXES = 6, 4  # as NEU-DET has them: classes, boxes per image
DETECTORS = (("detector", "v8n"), ("detector", "v5n"), ("yolo_dcf", "yolo_dcf"))  # study, row
BUILD = {"detector": build_detector, "yolo_dcf": yolo_dcf.build}  # by the model of the settings
METHODS = {"rd4ad": (reverse_distillation, reverse_distillation.RD4AD), "bsdrd": (bsdrd, bsdrd.BSDRD)}
TABLE = "{:16} {:>4} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}"


def show(
    settings: Any,
    trained: nn.Module,
    train: Callable[[int], Trained],
    batch: Callable[[], Any],
    images: Tensor,
    forms: dict[str, nn.Module],
) -> None:
    """Print the lines of a network. train: epochs -> curve and speed. batch: makes one for a step. forms: name -> what
    inference runs on `images`. All but the training, which is the second, are medians after a warm-up."""
    device = images.device
    reset_peak_memory(device)
    train(1)
    speed = train(1).images_per_second
    share = min(1.0, seconds_per_call(batch, device, 5, 1) * speed / BATCH)
    training = [precision_of(settings, device), f"{speed:.1f}", f"{100 * share:.1f}"]
    for name, network in forms.items():
        single, many = (inference_seconds(network, images[:count], "fp32", 3) for count in (1, BATCH))
        columns = [name, images.shape[-1], f"{parameters(trained) / 1e6:.2f}", *training]
        columns += [f"{1000 * single:.1f}", f"{BATCH / many:.1f}", f"{peak_memory_mb(device):.0f}"]
        print(TABLE.format(*columns), flush=True)
        training = ["", "", ""]


def noise(channels: int, size: int, device: str) -> Tensor:
    """uint8 images: speed does not depend on what they show."""
    return torch.randint(0, 256, (IMAGES, channels, size, size), dtype=torch.uint8).to(device)


def show_detector(name: str, settings: Any, context: Context) -> None:
    """As it is trained, and fused as it is deployed; inference without decoding and suppression."""
    boxes = (torch.rand(IMAGES, BOXES, 2).repeat(1, 1, 2) * 0.6 + torch.tensor([0, 0, 0.3, 0.3])) * settings.size
    labels = torch.randint(CLASSES, (IMAGES, BOXES))
    split = DetectionSplit(noise(1, settings.size, context.device), boxes, labels, [""] * IMAGES, None, None, None)
    network = fresh(BUILD[settings.model], settings, SimpleNamespace(class_names=[""] * CLASSES, train=split))
    network.to(context.device, memory_format=torch.channels_last)
    loss = detection_loss(network, settings.size)

    def step(batch: Batch) -> dict[str, Tensor]:
        return loss(network(batch.images), batch.boxes, batch.labels)

    def train(epochs: int) -> Trained:
        return train_detector(network, step, split, replace(settings, epochs=epochs), 0, context)[1]

    def batch() -> Batch:
        return augment(split.images, boxes, labels, torch.arange(BATCH), augmentation_of(settings), torch.Generator())

    images = (noise(3, settings.size, context.device) / 255).contiguous(memory_format=torch.channels_last)
    forms = {name: network, f"{name}, fused": fused(network.eval()).to(memory_format=torch.channels_last)}
    show(settings, network, train, batch, images, forms)


def show_anomaly(name: str, settings: Any, context: Context) -> None:
    """Trained on cached features of the teacher; inference from images to maps, with the teacher."""
    split = AnomalySplit(noise(3, settings.size, context.device), *[None] * 4, ("",) * IMAGES, ())
    module, method = METHODS[name]
    data, whole = SimpleNamespace(train=split, derived={}), method(settings).to(context.device)

    def train(epochs: int) -> Trained:
        longer = replace(settings, epochs=epochs)
        return train_student(longer, 0, data, context, module.build, module.make_loss).trained

    def batch() -> list[Tensor]:
        chosen = torch.randperm(IMAGES)[:BATCH].to(context.device)
        return [layer[chosen] for layer in teacher_features(data, "train", settings)]

    show(settings, whole.network, train, batch, split.images, {name: whole})


def bench(options: argparse.Namespace) -> int:
    """The command `bench`: what `--part` names. ValueError for sizes that no detector takes."""
    device = pick_device(options.device)
    if any(size < 32 or size % 32 for size in options.sizes):
        raise ValueError(f"image sizes must be multiples of 32, got {','.join(map(str, options.sizes))}")
    print(device_name(device))
    print(TABLE.format("", "", "weights", "trained", "training", "batches", "1 image", f"batch {BATCH}", "memory"))
    print(TABLE.format("network", "px", "M", "in", "images/s", "% time", "ms", "images/s", "MB"))
    context = Context(device, log=lambda line: None)
    if options.part != "anomaly":
        for (of, row), size in itertools.product(DETECTORS, options.sizes):
            show_detector(row, replace(study(of).rows["quick"][row].settings, size=size, batch=BATCH), context)
    if options.part != "detector":
        for row in METHODS:
            settings = study("bsdrd").rows["quick"][row].settings
            show_anomaly(row, replace(settings, teacher=options.teacher, batch=BATCH), context)
    print(f"inference in fp32; memory: peak {'of the network' if device != 'cpu' else 'of the process so far'}")
    return 0
