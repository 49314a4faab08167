"""Potholes by colour, depth or both: trained on one drive, tested on others, also with the depth lost or shifted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from defectlab.data.frames import FrameData, FrameSplit
from defectlab.metrics.costs import parameters
from defectlab.metrics.segmentation import best_threshold, segmentation_metrics
from defectlab.networks.blocks import pick
from defectlab.networks.second_sensor import SensorNet, SensorSettings, levelled, standardised
from defectlab.networks.segmentation import segmentation_loss
from defectlab.precision import autocast, full_float32, precision_of, sent
from defectlab.runs import Context, Result, load_weights
from defectlab.training.loop import train
from defectlab.training.results import rounded, shrunk
from defectlab.training.segmentation import flip, lightened

GAIN = 0.3  # brightness of a training image: 1 ± GAIN; ours
SHIFTS = (4, 8, 16)  # px of 320, by which the depth lies too far to the right
EACH, WIDTH = 4, 160  # examples of a kind, and px across


@dataclass(frozen=True)
class ThresholdSettings:
    """Nothing is learnt but one threshold, on dev: what is darker, or deeper, than the rest of its image is a hole."""

    model: ClassVar[str] = "sensor_threshold"
    version: ClassVar[int] = 1

    dataset: str = "road_depth"
    split: str = "session_2"
    inputs: str = "depth"  # or "grey"


@dataclass(frozen=True)
class LateSettings:
    """The mean of what two finished networks say, one of colour, one of depth; nothing is trained."""

    model: ClassVar[str] = "sensor_late"
    version: ClassVar[int] = 1

    colour: SensorSettings
    depth: SensorSettings

    @property
    def dataset(self) -> str:
        return self.colour.dataset

    @property
    def split(self) -> str:
        return self.colour.split


# --- What is done to the depth at test -------------------------------------------------------------------------------


def shifted(depth: Tensor, by: int) -> Tensor:
    """(B, 1, H, W), moved to the right by so many px; unknown (0) where nothing came."""
    moved = torch.zeros_like(depth)
    moved[..., by:] = depth[..., : depth.shape[-1] - by]
    return moved


def conditions(depth: Tensor) -> dict[str, Tensor]:
    """What a metric's name ends with -> the depth that the network gets."""
    return {"": depth, "_no_depth": torch.zeros_like(depth)} | {f"_shift_{by}": shifted(depth, by) for by in SHIFTS}


# --- Rows ------------------------------------------------------------------------------------------------------------


def run_sensor(settings: SensorSettings, seed: int, data: FrameData, context: Context) -> Result:
    """One row and seed: the last epoch, evaluated once; the threshold comes from dev."""
    precision = precision_of(settings, context.device)
    torch.manual_seed(seed)
    network = SensorNet(settings).to(context.device, memory_format=torch.channels_last)

    def draw(indices: Tensor, generator: torch.Generator, epoch: int) -> tuple:
        return *drawn(data.train, len(indices), generator), generator

    def step(batch: tuple) -> dict[str, Tensor]:
        images, depth, masks, generator = batch
        with autocast(images.device, precision):
            logits = network(images, depth, generator)
        return segmentation_loss(logits, masks)

    trained = train(network, draw, step, settings.draws, settings, seed, context)
    result = judge(data, lambda images, depth: network(images, depth).float().sigmoid())
    result.curve, result.precision, result.model = trained.curve, precision, network.state_dict()
    result.costs = {"parameters_m": round(parameters(network) / 1e6, 4)} | trained.costs
    return result


def drawn(split: FrameSplit, count: int, generator: torch.Generator) -> list[Tensor]:
    """Frames at random, mirrored left to right at random, their colour lighter or darker: images, depth, masks."""
    chosen = sent(torch.randint(len(split), (count,), generator=generator), split.images.device)
    across = sent(torch.rand(count, generator=generator) < 0.5, chosen.device)
    found = [flip(x[chosen], across, torch.zeros_like(across)) for x in (split.images, split.depth, split.masks)]
    return [lightened(found[0], generator, GAIN), *found[1:]]


def run_threshold(settings: ThresholdSettings, seed: int, data: FrameData, context: Context) -> Result:
    """One row: the deeper, or darker, the likelier; the threshold is the best of nineteen on dev."""
    by_depth = pick({"depth": True, "grey": False}, settings.inputs, "inputs")

    def likely(images: Tensor, depth: Tensor) -> Tensor:
        seen = levelled(depth)[:, 0] if by_depth else standardised(images).mean(1)
        return (-seen).sigmoid()

    return judge(data, likely)


def run_late(settings: LateSettings, seed: int, data: FrameData, context: Context) -> Result:
    """One row and seed; the two networks are trained first, where they are not there yet."""
    networks, notes = [], {}
    for name in ("colour", "depth"):
        of = getattr(settings, name)
        record, network = context.require(of, seed), SensorNet(of).to(context.device).eval()
        load_weights(record, network)
        networks.append(network)
        notes |= {name: record.key, f"{name}_sha256": record.model_sha256}
    result = judge(data, lambda i, d: sum(network(i, d).float().sigmoid() for network in networks) / 2)
    result.notes = notes
    return result


@torch.no_grad()
def judge(data: FrameData, of: Callable[[Tensor, Tensor], Tensor], batch: int = 8) -> Result:
    """IoU of the holes under each of `conditions`, at the threshold that is best on dev as it is; classes are the
    drives tested on. of: images, depth -> probabilities (B, H, W)."""

    def found(split: FrameSplit, depth: Tensor) -> Tensor:
        with full_float32():
            chunks = zip(split.images.split(batch), depth.split(batch), strict=True)
            return torch.cat([of(images, deep) for images, deep in chunks])

    test, dev = data.test, found(data.dev, data.dev.depth)
    threshold = best_threshold(dev, data.dev.masks)
    names = sorted({name.split("/")[0] for name in test.names})
    types = [names.index(name.split("/")[0]) for name in test.names]
    probabilities = {condition: found(test, depth) for condition, depth in conditions(test.depth).items()}
    measured = {c: segmentation_metrics(p, test.masks, types, names, threshold) for c, p in probabilities.items()}
    metrics = {f"{m}{c}": one.overall[m] for c, one in measured.items() for m in ("iou", "dice")}
    whole = measured[""]
    per_class = {name: rounded({m: values[m] for m in ("iou", "dice")}) for name, values in whole.per_class.items()}
    arrays = {"names": np.array(test.names), "types": np.array(types), "type_names": np.array(names)}
    arrays |= examples(test, probabilities, whole.images["tp"] / np.maximum(whole.images["tp"] + whole.images["fn"], 1))
    arrays |= {f"image_{name}": values for name, values in whole.images.items()}
    return Result(rounded(metrics), per_class, {"threshold": threshold}, {}, arrays, {}, {}, "fp32")


def examples(split: FrameSplit, probabilities: dict[str, Tensor], recall: np.ndarray) -> dict[str, np.ndarray]:
    """Eight small frames, the four of whose holes least was found and the four of which most was: case_index (K,);
    case_images (K, h, w, 3), case_depth, case_masks, case_maps and case_maps_no_depth (K, h, w), uint8; depth and
    probabilities in 0..255."""
    order = np.argsort(recall, kind="stable")
    chosen = torch.from_numpy(np.concatenate([order[:EACH], order[EACH:][-EACH:]]))
    picked = chosen.to(split.images.device)
    size = (WIDTH * split.images.shape[-2] // split.images.shape[-1], WIDTH)
    kept = {
        "images": split.images[picked],
        "depth": 255 * (levelled(split.depth[picked]) / 6 + 0.5),
        "maps": 255 * probabilities[""][picked, None],
        "maps_no_depth": 255 * probabilities["_no_depth"][picked, None],
    }
    found = {f"case_{name}": shrunk(values, size) for name, values in kept.items()}
    masks = shrunk(255 * split.masks[picked, None], size)
    return {"case_index": chosen.numpy(), "case_masks": (masks > 127).astype(np.uint8)} | found
