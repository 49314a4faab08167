"""One method on 1, 2, 4 ... good images of a set, drawn by the seed; the whole dev and test sets judge each of them."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from defectlab.data.anomaly import AnomalyData, AnomalySplit
from defectlab.networks import few_normals
from defectlab.networks import reverse_distillation as rd4ad
from defectlab.networks.feature_baselines import greedy_coreset
from defectlab.networks.few_normals import FewNormalsSettings
from defectlab.networks.resnet import extract
from defectlab.networks.reverse_distillation import RD4ADSettings
from defectlab.precision import precision_of
from defectlab.runs import Context, OutOfTime, Result
from defectlab.training.anomaly import evaluate, result_of, score_features, teacher_features, train_student
from defectlab.training.feature_baselines import score_patches
from defectlab.training.light import chosen, with_copies

METRICS = ("image_auroc", "pixel_auroc", "aupro")


# --- Data and features ------------------------------------------------------------------------------------------------


def draw_normals(count: int, most: int, seed: int) -> list[int]:
    """`most` of `count` good images in a random order: fewer of them are the first ones, so draws are nested.

    ValueError where there are fewer.
    """
    if most > count:
        raise ValueError(f"{most} good images cannot be drawn from {count}")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].tolist()


def turns(split: AnomalySplit) -> AnomalySplit:
    """Good images, then all of them turned by 90 degrees, by 180 and by 270: (4 N, 3, S, S)."""
    return with_copies(split, [split.images.rot90(quarter, (2, 3)) for quarter in (1, 2, 3)])


def maps_of(settings: FewNormalsSettings, images: Tensor) -> list[Tensor]:
    """The teacher's maps of uint8 images (N, 3, size, size), in the dtype in which runs cache them."""
    dtype = torch.bfloat16 if precision_of(settings, images.device) == "bf16" else torch.float32
    return extract(few_normals.load_teacher(settings, images.device), images, dtype)


def cached_maps(data: AnomalyData, part: str, settings: FewNormalsSettings) -> list[Tensor]:
    """The same of "dev" or "test": once for all numbers of images, rows and seeds."""
    return teacher_features(data, part, settings, maps_of)


# --- The methods ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def remember(settings: FewNormalsSettings, seed: int, data: AnomalyData, patches: Tensor) -> Result:
    """PatchCore or AnomalyDINO on the patches (M, C) of the good images."""
    kept = patches if len(patches) <= settings.bank else patches[greedy_coreset(patches, settings.bank, seed)]
    score = score_patches if settings.method == "patchcore" else few_normals.score_nearest
    scored = (score(cached_maps(data, part, settings), kept) for part in ("dev", "test"))
    maps, scores = zip(*scored, strict=True)
    return replace(evaluate(data, *maps, *scores), costs={"parameters": 0, "remembered_patches": len(kept)})


def distil(
    settings: FewNormalsSettings, seed: int, data: AnomalyData, normals: AnomalySplit, context: Context
) -> Result:
    """RD4AD on these good images, repeated until they fill whole batches."""
    count = -(-len(normals) // settings.batch) * settings.batch
    few = replace(data, train=chosen(normals, [i % len(normals) for i in range(count)]))
    shared = ("dataset", "teacher", "size", "batch", "learning_rate", "betas", "loss", "precision")
    passes = max(1, round(settings.steps * settings.batch / count))
    recipe = RD4ADSettings(epochs=passes, **{name: getattr(settings, name) for name in shared})
    quiet = replace(context, checkpoint=None, deadline=None, stopped=None, log=lambda line: None)  # a part of a row
    student = train_student(recipe, seed, few, quiet, rd4ad.build, rd4ad.make_loss)
    to_maps = partial(rd4ad.to_maps, recipe)
    cached = (cached_maps(data, part, settings) for part in ("dev", "test"))
    return result_of(student, data, *(score_features(student.network, m, to_maps, student.precision) for m in cached))


# --- A row ------------------------------------------------------------------------------------------------------------


def run_few_normals(settings: FewNormalsSettings, seed: int, data: AnomalyData, context: Context) -> Result:
    """One row and seed. Metrics and scores end in the number of good images: "image_auroc_4", "scores_4".

    The examples are those of the fewest images, the curve that of the most. ValueError for settings that do not go
    together and for more images than there are; OutOfTime between two numbers of images: nothing is kept then.
    """
    few_normals.check(settings)
    most = settings.shots[-1]
    drawn = draw_normals(len(data.train), most, seed)
    normals = chosen(data.train, drawn)
    normals = turns(normals) if settings.turned else normals
    if settings.method != "rd4ad":
        patches = few_normals.patches_of(maps_of(settings, normals.images)).flatten(1, 2)  # (N, h w, C)
    found: dict[int, Result] = {}
    for shots in settings.shots:
        if found and context.out_of_time():
            raise OutOfTime(f"time budget used up before {shots} good images; run again: the row starts anew")
        first = [i for i in range(len(normals)) if i % most < shots]  # and their turns
        if settings.method == "rd4ad":
            found[shots] = distil(settings, seed, data, chosen(normals, first), context)
        else:
            found[shots] = remember(settings, seed, data, patches[first].flatten(0, 1))
        shown = "  ".join(f"{name} {found[shots].dev.get(name, np.nan):.1f}" for name in METRICS)
        context.log(f"  {shots} good images  dev: {shown}")
    return _joined(settings, data, found, [data.train.names[i] for i in drawn], precision_of(settings, context.device))


def _joined(
    settings: FewNormalsSettings, data: AnomalyData, found: dict[int, Result], drawn: list[str], precision: str
) -> Result:
    def named(of: dict[int, dict[str, float]]) -> dict[str, float]:
        return {f"{name}_{shots}": of[shots][name] for shots in of for name in METRICS if name in of[shots]}

    few, last = found[settings.shots[0]], found[settings.shots[-1]]
    costs = dict(last.costs)
    if settings.method == "rd4ad":
        seconds = sum(result.costs["train_seconds"] for result in found.values())
        costs = {"parameters": costs["parameters"], "train_seconds": round(seconds, 1)}
    kept = ("labels", "types", "type_names", "names")
    predictions = {name: values for name, values in few.predictions.items() if name in kept or name[:5] == "case_"}
    predictions |= {f"scores_{shots}": result.predictions["scores"] for shots, result in found.items()}
    return Result(
        metrics=named({shots: result.metrics for shots, result in found.items()}),
        per_class={t: named({k: result.per_class[t] for k, result in found.items()}) for t in few.per_class},
        dev=named({shots: result.dev for shots, result in found.items()}),
        curve=last.curve,
        predictions=predictions | {"drawn": np.array(drawn)},
        model={},
        costs=costs,
        precision=precision,
    )
