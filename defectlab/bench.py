"""What the networks of a study cost in time on this machine: `python -m defectlab bench yolo_dcf`.

All networks stay in one process and take turns, one image each, as they are deployed (fused, float32), so that whatever
slows the machine for a moment slows all of them alike. These are the only latencies that this study compares.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defectlab.files import project_root, write_json
from defectlab.metrics.costs import parameters, synchronise
from defectlab.networks.reverse_distillation import RD4AD, RD4ADSettings
from defectlab.networks.segmentation import SegmentationSettings
from defectlab.networks.yolo import one_to_one
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.model import Detector, build_detector
from defectlab.networks.yolo.one_to_one import OneToOneSettings
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.papers import bsdrd, yolo_dcf
from defectlab.papers.amam_kd import segmentation
from defectlab.papers.amam_kd.distillation import DistillationSettings, KnowledgeDistillation
from defectlab.papers.amam_kd.two_stage import TwoStage, TwoStageSettings
from defectlab.precision import full_float32
from defectlab.provenance import pick_device, provenance
from defectlab.runs import RECORDED
from defectlab.studies import study
from defectlab.training.cost_rows import AnswerCostSettings, Answered, CostSettings
from defectlab.training.rebuild import Asked, RebuildCostSettings
from defectlab.training.ten_pictures import GeneratorCostSettings, Made
from defectlab.training.windows import Slid, WindowCostSettings

CLASSES = 6  # as NEU-DET has them
LEAST_REPEATS, WARM_UP = 30, 3
BUSY = 10.0  # per cent of the whole machine that others may use
BUILD: dict[type, Callable[[Any], nn.Module]] = {  # what is deployed: of a detector all but decoding and suppression
    DetectorSettings: lambda settings: fused(build_detector(settings, CLASSES)),
    OneToOneSettings: lambda settings: fused(one_to_one.build(settings, CLASSES)),
    yolo_dcf.Settings: lambda settings: fused(yolo_dcf.build(settings, CLASSES)),
    CostSettings: lambda settings: fused(Detector(settings.family, settings.scale, settings.classes)),
    AnswerCostSettings: Answered,
    RD4ADSettings: RD4AD,
    bsdrd.Settings: bsdrd.BSDRD,
    DistillationSettings: KnowledgeDistillation,
    TwoStageSettings: TwoStage,
    SegmentationSettings: segmentation.build,
    segmentation.Settings: segmentation.build,
    GeneratorCostSettings: Made,
    WindowCostSettings: Slid,
    RebuildCostSettings: Asked,
}


def networks_of(name: str, device: str) -> dict[str, tuple[nn.Module, Tensor]]:
    """Row of quick -> its network with random weights, and an image of the row's size. Rows of one network show how
    far two timings of it differ. Left out: rows whose network needs data to be built (features, a memory), rows of
    other sets."""
    found, quick = {}, study(name).rows["quick"]
    for row, of in study(name).rows[RECORDED].items():
        if type(of.settings) not in BUILD or quick[row].optional or not quick[row].seeds or row.endswith("_grouped"):
            continue
        torch.manual_seed(0)
        network = BUILD[type(of.settings)](of.settings).eval().to(device, memory_format=torch.channels_last)
        size = getattr(of.settings, "size", None) or of.settings.detector.size
        image = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, device=device)
        if type(of.settings) not in (RD4ADSettings, bsdrd.Settings, DistillationSettings, TwoStageSettings):
            image = (image / 255).contiguous(memory_format=torch.channels_last)
        found[row] = (network, image)
    return found


@torch.inference_mode()
def alternating(
    calls: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Name -> seconds of each of `repeats` calls, all called once in a round, after `WARM_UP` rounds. Each round has an
    order of its own: what a network takes depends on which one came before it."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls.items()), random.Random(0).shuffle
    for round_ in range(WARM_UP + repeats):
        shuffle(order)
        for name, call in order:
            started = time.perf_counter()
            call()
            synchronise(device)
            if round_ >= WARM_UP:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(times: list[float], of: list[float]) -> tuple[float, float, float]:
    """(median, lower, upper quartile) of the ratios of two networks, round by round."""
    median, low, high = np.quantile(np.divide(times, of), (0.5, 0.25, 0.75))
    return float(median), float(low), float(high)


def bench(options: argparse.Namespace) -> int:
    """The command `bench`: prints a table and writes `results/costs/<study>-<cpu or cuda>.json`. ValueError where the
    machine is busy (unless `--busy`, which is recorded) or for fewer than 30 repeats."""
    if options.repeats < LEAST_REPEATS:
        raise ValueError(f"--repeats must be {LEAST_REPEATS} or more, got {options.repeats}")
    import psutil  # takes its time, and nothing else here needs it

    device = torch.device(pick_device(options.device))
    busy = psutil.cpu_percent(interval=2.0)
    if busy > BUSY and not options.busy:
        raise ValueError(f"other work uses {busy:.0f} % of this machine: end it, or say --busy, which is recorded")
    networks = networks_of(options.study, str(device))
    with full_float32():
        calls = {name: lambda n=network, i=image: n(i) for name, (network, image) in networks.items()}
        times = alternating(calls, device, options.repeats)
    first, table = next(iter(times)), {}
    for name, (network, image) in networks.items():
        median, low, high = ratio(times[name], times[first])
        table[name] = {
            "size": image.shape[-1],
            "parameters_m": round(parameters(network) / 1e6, 4),
            "latency_ms": round(1000 * statistics.median(times[name]), 2),
            "ratio": [round(value, 3) for value in (median, low, high)],
        }
        line = "{size:4} px  {parameters_m:8.2f} M  {latency_ms:8.2f} ms".format(**table[name])
        print(f"{line}  x{median:.2f} [{low:.2f}, {high:.2f}]  {name}", flush=True)
    print(f"medians of {options.repeats} rounds; ratio to {first} with its quartiles; other work {busy:.0f} %")
    made = provenance(device) | {"repeats": options.repeats, "busy_percent": busy, "batch": 1}
    made |= {"first": first, "networks": table}
    write_json(project_root() / "results" / "costs" / f"{options.study}-{device.type}.json", made)
    return 0
