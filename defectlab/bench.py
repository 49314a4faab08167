"""Speed on this machine: what `make bench` prints."""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy import ndimage

from defectlab import bench_detectors as detector_bench
from defectlab.metrics.anomaly import anomaly_metrics
from defectlab.metrics.costs import seconds_per_call
from defectlab.networks import resnet as teachers
from defectlab.networks.reverse_distillation import build, make_loss, to_maps
from defectlab.networks.yolo.model import build_detector
from defectlab.papers import bsdrd, yolo_dcf
from defectlab.precision import autocast, precision_of
from defectlab.provenance import device_name, peak_memory_mb, pick_device
from defectlab.studies import bsdrd as bsdrd_rows
from defectlab.studies import detector as detectors
from defectlab.studies import yolo_dcf as dcf_rows
from defectlab.studies.reverse_distillation import RD4AD
from defectlab.training.anomaly import score_features

BATCH = 16
DETECTORS = {  # of the quick profile, at the scale n
    "v8n": (detectors.SETTINGS["quick"], build_detector),
    "v5n": (detectors.STUDY.rows["quick"]["v5n"].settings, build_detector),
    "yolo_dcf n": (dcf_rows.SETTINGS["quick"], yolo_dcf.build),
}


def seconds(action: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Median wall time of `action` after one warm-up call."""
    return seconds_per_call(action, torch.device(device), repeats, warm_up=1)


def bench(options: argparse.Namespace) -> int:
    """The command `bench`: what `--part` names. Images are random: speed does not depend on what they show."""
    device = pick_device(options.device)
    print(device_name(device))
    if options.part in ("detector", "all"):
        for line in detector_bench.table(DETECTORS, options.sizes, device):
            print(line, flush=True)
    if options.part in ("anomaly", "all"):
        bench_anomaly(device, options.teacher)
        bench_metrics()
        print(f"peak memory                        {peak_memory_mb(device):8.0f} MB")
    return 0


def bench_anomaly(device: str, teacher_name: str) -> None:
    """Print images/s of training steps, of inference and of the teacher, and the share of a step spent on fetching its
    batch."""
    settings = RD4AD["quick"]
    precision = precision_of(settings, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    print(f"anomaly detection: {settings.size} px, batch {BATCH}, {precision}, teacher {teacher_name}")
    teacher = teachers.load_teacher(teacher_name, device).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4 * BATCH, 3, settings.size, settings.size), generator=generator, dtype=torch.uint8)
    images = images.to(device)
    cache = teachers.extract(teacher, images, dtype)
    extract = seconds(lambda: teachers.extract(teacher, images[:BATCH], dtype), device)
    print(f"teacher                            {BATCH / extract:8.1f} images/s")
    rows = {"rd4ad": (settings, build, make_loss, to_maps)}
    rows["bsdrd"] = (bsdrd_rows.SETTINGS["quick"], bsdrd.build, bsdrd.make_loss, bsdrd.to_maps)
    for name, (row, make_network, loss_of, maps_of) in rows.items():
        network = make_network(row, teacher.channels, teacher.bottleneck).to(device, memory_format=torch.channels_last)
        loss = loss_of(row)
        if isinstance(loss, torch.nn.Module):
            loss.to(device)
        optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=True)
        order = torch.randperm(len(images), generator=generator)[:BATCH].to(device)

        def step(features, network=network, loss=loss, optimizer=optimizer):
            with autocast(torch.device(device), precision):
                outputs = network(features)
            total = loss(features, outputs)["loss"]
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()

        def fetch(order=order):
            return [f[order] for f in cache]

        cached = seconds(lambda step=step, fetch=fetch: step(fetch()), device)
        plain = seconds(lambda step=step: step(teachers.extract(teacher, images[:BATCH], dtype)), device)
        fetching = seconds(fetch, device)
        network.eval()
        few = [f[:BATCH] for f in cache]
        infer = seconds(
            lambda n=network, few=few, row=row, f=maps_of: score_features(n, few, lambda t, o: f(row, t, o), precision),
            device,
        )
        print(f"{name}: training step, cached       {BATCH / cached:8.1f} images/s")
        print(f"{name}: training step, not cached   {BATCH / plain:8.1f} images/s")
        print(f"{name}: share of the step on data   {100 * fetching / cached:8.1f} %   (aim: at most 5)")
        print(f"{name}: maps from cached features   {BATCH / infer:8.1f} images/s")
        parameters = sum(p.numel() for p in network.parameters())
        print(f"{name}: parameters                  {parameters / 1e6:8.2f} M")


def aupro_by_definition(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """AUPRO in per cent as it is defined: for every threshold the overlap of every region, and the false positives."""
    eight = np.ones((3, 3), int)
    labelled = [ndimage.label(mask, eight) for mask in masks]
    regions = [(i, found == r) for i, (found, count) in enumerate(labelled) for r in range(1, count + 1)]
    normal, curve = masks == 0, [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        over = maps >= threshold
        overlap = np.mean([over[i][region].mean() for i, region in regions])
        curve.append((over[normal].mean(), overlap))
    rates, overlaps = np.array(curve).T
    inside = rates < limit
    rates = np.append(rates[inside], limit)
    overlaps = np.append(overlaps[inside], np.interp(limit, *np.array(curve).T))
    return float(100 * np.trapezoid(overlaps, rates) / limit)


def bench_metrics(count: int = 40, size: int = 64) -> None:
    """All metrics at once against AUPRO alone by its definition, on maps of 500 different values."""
    rng = np.random.default_rng(0)
    masks = np.zeros((count, size, size), np.uint8)
    for mask in masks[count // 2 :]:
        for row, column in rng.integers(0, size - 12, (2, 2)):
            mask[row : row + 12, column : column + 8] = 1
    maps = np.floor(500 * (0.7 * rng.random(masks.shape) + 0.3 * masks)).astype(np.float32)
    labels = torch.arange(count).ge(count // 2).to(torch.uint8)
    everything = partial(
        anomaly_metrics,
        torch.from_numpy(maps),
        torch.from_numpy(masks),
        labels,
        labels,
        torch.ones(count, dtype=torch.bool),
        ("good", "bad"),
        torch.from_numpy(maps).amax((1, 2)),
    )
    ours, defined = everything().overall["aupro"], aupro_by_definition(maps, masks)
    print(f"AUPRO {ours:.4f}, by its definition {defined:.4f}, difference {abs(ours - defined):.1e}")
    print(f"all metrics, {count} maps {size}x{size}        {seconds(everything, 'cpu') * 1e3:8.1f} ms")
    slow = seconds(lambda: aupro_by_definition(maps, masks), "cpu", 1)
    print(f"AUPRO alone by its definition      {slow * 1e3:8.1f} ms")
