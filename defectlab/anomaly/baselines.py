"""The baselines that anomaly papers here are measured against: RD4AD and PatchCore, as rows; PaDiM and SPADE."""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch

from defectlab.anomaly import teacher as teachers
from defectlab.anomaly.distil import cached_features, distil, evaluate
from defectlab.anomaly.maps import anomaly_map, gaussian_smooth, upsample
from defectlab.anomaly.padim import PaDiMSettings, run_padim
from defectlab.anomaly.patchcore import greedy_coreset, nearest_distances, patch_features, reweighted_score
from defectlab.anomaly.reverse_distillation import LOSSES, ReverseDistillation
from defectlab.anomaly.spade import SPADESettings, run_spade
from defectlab.data.anomaly import AnomalyData, data_fingerprint, load_anomaly
from defectlab.runs import Result
from defectlab.train import Session, precision_of

TITLE = "Reverse distillation (CVPR 2022) and PatchCore (CVPR 2022): the baselines"


@dataclass(frozen=True)
class RD4ADSettings:
    """RD4AD. Defaults are the paper profile's; they are frozen, since records are keyed by what differs from them."""

    model: ClassVar[str] = "rd4ad"
    version: ClassVar[int] = 1

    dataset: str = "magnetic_tile"
    teacher: str = "resnet18"  # ours: BSDRD is silent; RD4AD's headline is wide_resnet50_2
    size: int = 256  # RD4AD section 4.1: plain resize, no crop
    epochs: int = 200  # official RD4AD code
    batch: int = 16  # RD4AD section 4.1
    learning_rate: float = 0.005  # RD4AD section 4.1, no schedule
    betas: tuple[float, float] = (0.5, 0.999)  # RD4AD section 4.1
    loss: str = "whole_map"  # official RD4AD code; the paper's formula is "per_pixel"
    schedule: str = "constant"  # RD4AD section 4.1
    flips: bool = False  # RD4AD section 4.1: no augmentation
    precision: str = "bf16"  # ours: where the device is fast at it, else fp32


@dataclass(frozen=True)
class PatchCoreSettings:
    """PatchCore at 1 % of the patches."""

    model: ClassVar[str] = "patchcore"
    version: ClassVar[int] = 1

    dataset: str = "magnetic_tile"
    teacher: str = "resnet18"  # ours: the same teacher for every row
    size: int = 256  # ours: the same input for every row (the paper crops 224 from 256)
    coreset: float = 0.01  # PatchCore table 1, its fastest setting
    precision: str = "bf16"  # of the cached teacher features


# What a profile changes; "smoke" draws its data and asks for a random teacher by name.
SMOKE_DATA = {"magnetic_tile": "synthetic_tile", "mvtec_ad/metal_nut": "synthetic_nut"}
SMALL = {"size": 128, "teacher": "resnet18_random"}
SETTINGS = {
    "smoke": RD4ADSettings(dataset="synthetic_tile", epochs=2, batch=8, **SMALL),
    "quick": RD4ADSettings(epochs=10),
    "paper": RD4ADSettings(),
}
PATCHCORE = {
    "smoke": PatchCoreSettings(dataset="synthetic_tile", **SMALL),
    "quick": PatchCoreSettings(),
    "paper": PatchCoreSettings(),
}


def rows(profile: str) -> dict[str, Any]:
    """The rows of notebook 03 at one profile."""
    base, plain = SETTINGS[profile], PATCHCORE[profile]
    nut = SMOKE_DATA["mvtec_ad/metal_nut"] if profile == "smoke" else "mvtec_ad/metal_nut"
    return {
        "rd4ad": base,
        "rd4ad_per_pixel": replace(base, loss="per_pixel"),
        "patchcore": plain,
        "rd4ad_metal_nut": replace(base, dataset=nut),
        "patchcore_metal_nut": replace(plain, dataset=nut),
    }


ROWS = {profile: rows(profile) for profile in SETTINGS}
PRIMARY = ("rd4ad", "patchcore", "rd4ad_metal_nut", "patchcore_metal_nut")
TABLES = {
    "magnetic_tile": "RD4AD and PatchCore on magnetic tiles",
    "metal_nut": "RD4AD and PatchCore on MVTec metal_nut (reduced copy), beside published values",
}


def planned_seeds(row: str, profile: str) -> int:
    """How many seeds a row gets: most for "rd4ad", on which papers rest their primary claims."""
    if row == "rd4ad":
        return {"smoke": 1, "quick": 3, "paper": 5}[profile]
    return {"smoke": 1, "quick": 1, "paper": 3}[profile]


def load(settings: Any, device: str) -> AnomalyData:
    return _load(settings.dataset, settings.size, str(device))


@lru_cache(maxsize=1)
def _load(dataset: str, size: int, device: str) -> AnomalyData:
    return load_anomaly(dataset, size, device)


@lru_cache(maxsize=4)
def weights_fingerprint(teacher: str) -> str:
    return teachers.fingerprint(teachers.load_teacher(teacher))


def fingerprints(settings: Any) -> dict[str, str]:
    return {"data": data_fingerprint(settings.dataset), "weights": weights_fingerprint(settings.teacher)}


def run_row(settings: Any, seed: int, data: AnomalyData, device: str, session: Session) -> Result:
    """One row and seed: RD4AD, PatchCore, PaDiM or SPADE, by the kind of its settings."""
    for kind, run in ((PatchCoreSettings, run_patchcore), (PaDiMSettings, run_padim), (SPADESettings, run_spade)):
        if isinstance(settings, kind):
            return run(settings, seed, data, device, session)
    return distil(settings, seed, data, device, session, build, make_loss, to_maps)


def build(settings: RD4ADSettings, channels: tuple[int, int, int], bottleneck: int) -> ReverseDistillation:
    return ReverseDistillation(channels, bottleneck)


def make_loss(settings: RD4ADSettings):
    """One of `LOSSES` as (teacher, students) -> named scalars."""
    loss = LOSSES[settings.loss]
    return lambda teacher, students: {"loss": sum(loss(teacher, maps) for maps in students)}


def to_maps(settings: RD4ADSettings, teacher: list[torch.Tensor], students: list[list[torch.Tensor]]) -> torch.Tensor:
    return sum(anomaly_map(teacher, maps) for maps in students)


@torch.inference_mode()
def run_patchcore(settings: PatchCoreSettings, seed: int, data: AnomalyData, device: str, session: Session) -> Result:
    features = partial(cached_features, data, settings=settings, device=device)
    chunks = zip(*(f.split(64) for f in features("train")), strict=True)  # the temporaries of all images are GBs
    patches = torch.cat([patch_features(list(chunk)).flatten(0, 2) for chunk in chunks])
    bank = patches[greedy_coreset(patches, max(1, round(settings.coreset * len(patches))), seed)]
    del patches
    session.say(f"  {len(bank)} patches of {bank.shape[1]} channels remembered")
    maps, scores = {}, {}
    for part in ("dev", "test"):
        maps[part], scores[part] = score_patches(features(part), bank)
    result = evaluate(data, maps["dev"], maps["test"], scores["dev"], scores["test"])
    result.precision = precision_of(settings, device)
    result.model = {"bank": bank}
    result.costs = {"parameters": 0, "remembered_patches": len(bank)}
    return result


def score_patches(features: list[torch.Tensor], bank: torch.Tensor, batch: int = 16):
    """Teacher features -> (smoothed maps (N, 256, 256), image scores (N,))."""
    maps, scores = [], []
    for start in range(0, len(features[0]), batch):
        patches = patch_features([f[start : start + batch] for f in features])  # (B, h, w, C)
        count, height, width, _ = patches.shape
        distances, indices = nearest_distances(patches.flatten(0, 2), bank)
        distances, indices = distances.view(count, -1), indices.view(count, -1)
        maps.append(gaussian_smooth(upsample(distances.view(count, height, width))))
        scores += [
            reweighted_score(p.flatten(0, 1), d, i, bank) for p, d, i in zip(patches, distances, indices, strict=True)
        ]
    return torch.cat(maps), torch.stack(scores)
