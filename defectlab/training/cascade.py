"""Training of the cascade and of the single network beside it: what correcting adds, what labels cost, what a leak is
worth."""

from dataclasses import replace

import torch
from torch import Tensor

from defectlab.data.marked import MarkedData, labelled
from defectlab.data.masks import SegmentationSplit
from defectlab.metrics.costs import flops, parameters
from defectlab.metrics.segmentation import best_threshold
from defectlab.networks.cascade import CascadeNet, CascadeSettings, cascade_loss
from defectlab.precision import autocast, precision_of
from defectlab.runs import Context, Result
from defectlab.training.loop import train
from defectlab.training.results import rounded
from defectlab.training.segmentation import draw_flipped, epochs_of, evaluate, segment


def run_cascade(settings: CascadeSettings, seed: int, data: MarkedData, context: Context) -> Result:
    """One row and seed: the last epoch, evaluated once; the threshold comes from dev, which is whole at every share.

    Raises OutOfTime, NonFiniteLoss and ValueError of `train`, of `labelled` and of `CascadeNet`.
    """
    precision = precision_of(settings, context.device)
    torch.manual_seed(seed)
    network = CascadeNet(settings).to(context.device, memory_format=torch.channels_last)
    split = labelled(data, settings.share, seed)
    epochs = epochs_of(settings, len(data.train), len(split))

    def draw(indices: Tensor, generator: torch.Generator, epoch: int) -> list[Tensor]:
        return draw_flipped(split, indices, generator)

    def step(batch: list[Tensor]) -> dict[str, Tensor]:
        images, masks = batch
        with autocast(images.device, precision):
            logits = network(images)
        return cascade_loss(logits, masks, settings.defect_weight)

    trained = train(network, draw, step, len(split), replace(settings, epochs=epochs), seed, context)
    result = evaluate(network, data, precision)
    if settings.network == "cascade":
        judge_first(network, data, precision, result)
    result.curve = trained.curve
    one = split.images[:1]
    result.costs = {"parameters_m": round(parameters(network) / 1e6, 4), "gflops": round(flops(network, one) / 1e9, 3)}
    result.costs |= trained.costs
    shown = dict(zip(data.train.names, data.shown, strict=True))
    first = {shown[name]: index for index, name in enumerate(split.names)}  # one of the turns of each image
    result.notes = {
        "train_images": str(len(split)),
        "labelled_images": str(len(first)),
        "marked_pixels": str(int(split.masks[list(first.values())].sum())),
        "epochs": str(epochs),
    }
    return result


def first_stage(network: CascadeNet, split: SegmentationSplit, precision: str) -> Tensor:
    """What the first network alone says: probabilities (N, H, W) float32."""
    return segment(lambda images: network.logits(images)[0], split.images, precision)


def judge_first(network: CascadeNet, data: MarkedData, precision: str, result: Result) -> None:
    """Add to a result what the first network is worth, with its own threshold, from dev: "iou_first" of test and dev,
    "threshold_first" and, for each test image, the pixels first_tp, first_fp and first_fn (N,)."""
    found = {part: first_stage(network, getattr(data, part), precision) for part in ("dev", "test")}
    threshold = best_threshold(found["dev"], data.dev.masks)
    counts = {}
    for part, probabilities in found.items():
        said, truth = (probabilities > threshold).flatten(1), (getattr(data, part).masks > 0).flatten(1)
        counts[part] = [x.sum(1) for x in (said & truth, said & ~truth, ~said & truth)]
    dev, test = ({"iou_first": 100 * iou(*counts[part])} for part in ("dev", "test"))
    result.metrics |= rounded(test)
    result.dev |= rounded(dev) | {"threshold_first": threshold}
    names = ("first_tp", "first_fp", "first_fn")
    result.predictions |= {name: x.cpu().numpy() for name, x in zip(names, counts["test"], strict=True)}


def iou(tp: Tensor, fp: Tensor, fn: Tensor) -> float:
    """Of the pixels of all images together, 0 to 1; counts (N,) per image. NaN: nothing is there, nothing found."""
    return float(tp.sum() / (tp + fp + fn).sum())
