"""From settings to a result: teacher features computed once, a student trained on them, maps, scores, metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defectlab.data.anomaly import AnomalyData, AnomalySplit
from defectlab.data.fabric import FabricSplit
from defectlab.metrics.anomaly import anomaly_metrics, pixel_histograms
from defectlab.metrics.costs import parameters
from defectlab.metrics.ranking import best_f1_threshold
from defectlab.networks import resnet as teachers
from defectlab.networks import reverse_distillation as rd4ad
from defectlab.networks.reverse_distillation import RD4ADSettings, gaussian_smooth, image_scores, initialise
from defectlab.precision import autocast, precision_of, sent
from defectlab.runs import Context, Result
from defectlab.training.loop import Trained, adam, rate_per_epoch, train
from defectlab.training.results import example_side, rounded, shrunk

EACH = 4  # examples of a kind
FLIPS = ((-1,), (-2,), (-2, -1))  # axes of (N, 3, H, W): horizontal, vertical, both


def teacher_features(
    data: AnomalyData, part: str, settings: Any, compute: Callable[[Any, Tensor], list[Tensor]] | None = None
) -> list[Tensor]:
    """Features of the images of "train", "dev" or "test" by the settings' teacher: tensors (N, C, h, w), one a level.

    Computed once, by `compute_features` or what is given, and kept in `data.derived`, so they go when the set goes.
    """
    key = _key(data, part, settings)
    if key not in data.derived:
        data.derived[key] = (compute or compute_features)(settings, getattr(data, part).images)
    return data.derived[key]


def flipped_features(data: AnomalyData, part: str, settings: Any) -> list[Tensor]:
    """The same of the images and of their flips, (4 N, C, h, w): as they are, then in the order of `FLIPS`.

    Features of a flipped image are not flipped features: stride-2 layers sample other pixels, and kernels are not
    symmetric.
    """
    key = (*_key(data, part, settings), "flips")
    if key not in data.derived:
        images = getattr(data, part).images
        plain = teacher_features(data, part, settings)
        layers = zip(plain, *(compute_features(settings, images.flip(axes)) for axes in FLIPS), strict=True)
        data.derived[key] = [torch.cat(layer).contiguous(memory_format=torch.channels_last) for layer in layers]
        data.derived[key[:-1]] = [layer[: len(images)] for layer in data.derived[key]]
    return data.derived[key]


def _key(data: AnomalyData, part: str, settings: Any) -> tuple[str, ...]:
    return settings.teacher, precision_of(settings, getattr(data, part).images.device), part


def compute_features(settings: Any, images: Tensor) -> list[Tensor]:
    """Teacher features of uint8 images (N, 3, size, size), on their device, in the dtype in which runs cache them."""
    dtype = torch.bfloat16 if precision_of(settings, images.device) == "bf16" else torch.float32
    teacher = teachers.load_teacher(settings.teacher, images.device).to(memory_format=torch.channels_last)
    return teachers.extract(teacher, images, dtype)


@torch.inference_mode()
def compare(
    network: nn.Module, features: list[Tensor], of: Callable[[list[Tensor], Any], Any], precision: str, batch: int = 32
) -> list[Any]:
    """`of`(teacher features, the network's outputs), a batch after the other."""
    found = []
    for start in range(0, len(features[0]), batch):
        chunk = [f[start : start + batch] for f in features]
        with autocast(chunk[0].device, precision):
            outputs = network(chunk)
        found.append(of(chunk, outputs))
    return found


def score_features(
    network: nn.Module, features: list[Tensor], to_maps: Callable[[list[Tensor], Any], Tensor], precision: str
) -> Tensor:
    """Cached features -> smoothed anomaly maps (N, 256, 256) float32."""
    return torch.cat(compare(network, features, lambda t, s: gaussian_smooth(to_maps(t, s)), precision))


@dataclass
class Student:
    """A trained network in eval mode, with its loss, what `train` returned, and the precision it computes in."""

    network: nn.Module
    loss: Callable[..., dict[str, Tensor]]
    trained: Trained
    precision: str


def train_student(
    settings: Any,
    seed: int,
    data: AnomalyData,
    context: Context,
    build: Callable[..., nn.Module],
    make_loss: Callable[..., Callable],
) -> Student:
    """Train a student on the teacher's features of `data.train`; with `settings.flips`, of each image as it is or
    flipped, chosen anew every epoch, both flips with probability 1/2.

    Args:
        build: (settings, teacher's channels, its bottleneck) -> network.
        make_loss: settings -> (teacher features, outputs) -> named scalars.
    """
    precision = precision_of(settings, context.device)
    teacher = teachers.load_teacher(settings.teacher, "cpu")
    torch.manual_seed(seed)
    network = build(settings, teacher.channels, teacher.bottleneck)
    initialise(network)
    network.to(context.device, memory_format=torch.channels_last)
    loss = make_loss(settings)
    parts = nn.ModuleList([network, loss.to(context.device)]) if isinstance(loss, nn.Module) else network
    features = (flipped_features if settings.flips else teacher_features)(data, "train", settings)

    def draw(indices: Tensor, generator: torch.Generator, epoch: int) -> list[Tensor]:
        if settings.flips:
            which = sent(torch.randint(1 + len(FLIPS), (len(indices),), generator=generator), indices.device)
            indices = which * len(data.train) + indices
        return [f[indices] for f in features]

    def step(teacher: list[Tensor]) -> dict[str, Tensor]:
        with autocast(teacher[0].device, precision):
            outputs = network(teacher)
        return loss(teacher, outputs)

    optimizer = adam(parts, settings.learning_rate, settings.betas)
    rate = rate_per_epoch(settings.learning_rate, settings.schedule, settings.epochs)
    trained = train(parts, draw, step, len(data.train), settings, seed, context, optimizer, rate)
    return Student(network, loss, trained, precision)


def result_of(student: Student, data: AnomalyData, dev_maps: Tensor, test_maps: Tensor) -> Result:
    """`evaluate`, plus curve, weights and costs of the student's training."""
    result = evaluate(data, dev_maps, test_maps)
    result.curve = student.trained.curve
    result.precision = student.precision
    result.model = student.network.state_dict()
    result.costs = {"parameters": parameters(student.network)} | student.trained.costs
    return result


def distil(
    settings: Any,
    seed: int,
    data: AnomalyData,
    context: Context,
    build: Callable[..., nn.Module],
    make_loss: Callable[..., Callable],
    to_maps: Callable[..., Tensor],
) -> Result:
    """Train a student and evaluate its last epoch, once.

    Args:
        build, make_loss: as in `train_student`.
        to_maps: (settings, teacher features, outputs) -> anomaly maps (B, 256, 256).
    """
    student = train_student(settings, seed, data, context, build, make_loss)
    features = (teacher_features(data, part, settings) for part in ("dev", "test"))
    maps = [score_features(student.network, f, partial(to_maps, settings), student.precision) for f in features]
    return result_of(student, data, *maps)


def evaluate(
    data: AnomalyData,
    dev_maps: Tensor,
    test_maps: Tensor,
    dev_scores: Tensor | None = None,
    test_scores: Tensor | None = None,
) -> Result:
    """Metrics of dev and test; the image threshold comes from dev. Scores default to the maxima of the maps."""
    dev_scores = image_scores(dev_maps) if dev_scores is None else dev_scores
    test_scores = image_scores(test_maps) if test_scores is None else test_scores
    threshold = best_f1_threshold(dev_scores, data.dev.labels)
    dev, _ = _metrics(data, data.dev, dev_maps, dev_scores, threshold)
    metrics, per_class = _metrics(data, data.test, test_maps, test_scores, threshold)
    test = data.test
    predictions = {
        "scores": test_scores.float().cpu().numpy(),
        "labels": test.labels.cpu().numpy(),
        "types": test.types.cpu().numpy(),
        "names": np.array(test.names),
        "type_names": np.array(data.type_names),
        "dev_scores": dev_scores.float().cpu().numpy(),
        "dev_labels": data.dev.labels.cpu().numpy(),
    }
    histograms = pixel_histograms(test_maps, test.masks, test.has_mask)
    predictions |= {f"histogram_{k}": v for k, v in histograms.items()}
    predictions |= examples(test, test_maps, test_scores)
    return Result(metrics, per_class, dev | {"threshold": threshold}, {}, predictions, {}, {}, "fp32")


def _metrics(
    data: AnomalyData, split: AnomalySplit, maps: Tensor, scores: Tensor, threshold: float
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    found = anomaly_metrics(
        maps, split.masks, split.labels, split.types, split.has_mask, data.type_names, scores, threshold
    )
    present = {data.type_names[t] for t in split.types.unique().tolist()}  # "pasted" is in dev only
    return rounded(found.overall), {t: rounded(values) for t, values in found.per_class.items() if t in present}


def examples(split: AnomalySplit | FabricSplit, maps: Tensor, scores: Tensor) -> dict[str, np.ndarray]:
    """A dozen small examples: the defects that scored lowest, the good parts that scored highest, and the defects that
    scored highest, four of each: images, maps (scaled to the range of the whole test set) and masks.

    All are uint8 and (K, side, side); where the images have colour, case_images are (K, side, side, 3).
    """
    order = scores.argsort().cpu()
    bad = order[split.labels.cpu()[order] == 1]
    good = order[split.labels.cpu()[order] == 0]
    chosen = torch.cat([bad[:EACH], good.flip(0)[:EACH], bad.flip(0)[:EACH]])
    low, high = maps.amin(), maps.amax()
    picked = chosen.to(maps.device)
    images = split.images[picked]
    images = images[:, :1] if (images[:, :1] == images).all() else images
    side = example_side(images)
    scaled = (maps[picked, None] - low) / (high - low).clamp(min=1e-12) * 255
    return {
        "case_index": chosen.numpy(),
        "case_images": shrunk(images, side),
        "case_maps": shrunk(scaled, side),
        "case_masks": (shrunk(255 * split.masks[picked, None], side) > 0).astype(np.uint8),
    }


def run_rd4ad(settings: RD4ADSettings, seed: int, data: AnomalyData, context: Context) -> Result:
    """One row and seed of RD4AD."""
    return distil(settings, seed, data, context, rd4ad.build, rd4ad.make_loss, rd4ad.to_maps)
