"""The field's history II (notebook 54): ten images of a defect, a few of a good part: generate, meta-learn, or
borrow features?"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

from defectlab.data.anomaly import TILES_GROUPED, data_fingerprint, load_anomaly
from defectlab.data.domains import SYNTHETIC_DOMAINS, domains_fingerprint, load_domains
from defectlab.data.pictures import load_pictures, pictures_fingerprint
from defectlab.networks.diffusion import DiffusionSettings
from defectlab.networks.episodes import METHODS, RATES, EpisodeSettings
from defectlab.networks.few_normals import FewNormalsSettings, load_teacher
from defectlab.networks.generators import GANSettings
from defectlab.networks.resnet import fingerprint
from defectlab.studies.rebuild import lite0_fingerprint, untrained
from defectlab.studies.reverse_distillation import weights_fingerprint
from defectlab.studies.study import ONCE, PAPER_ONLY, Row, Study, changed_at_every_depth, cost_row, kept
from defectlab.training.episodes import run_episodes
from defectlab.training.few_normals import METRICS, run_few_normals
from defectlab.training.ten_pictures import (
    GeneratorCostSettings,
    TenPicturesSettings,
    run_generator_costs,
    run_ten_pictures,
)

DRAWS = {"smoke": 1, "quick": 5, "paper": 5}  # seeds of rows that say which images are drawn
TRAINED = {"smoke": 1, "quick": 3, "paper": 5}  # of rows that answer the same episodes
PICTURES = {"steel": ("neu_det", "synthetic_steel"), "cells": ("elpv", "synthetic_cell")}  # real set, in smoke
NORMALS = {"nut": ("mvtec_ad/metal_nut", "synthetic_nut"), "tile": (TILES_GROUPED, "synthetic_tile")}
GENERATORS = {  # ours: small networks, as many steps as some ten minutes of one CPU core allow
    "dcgan": GANSettings(width=16, epochs=75),
    "wgan_gp": GANSettings(width=16, penalty=10.0, critic_steps=5, epochs=75, learning_rate=0.0005, betas=(0.0, 0.9)),
    "ddpm": DiffusionSettings(
        dataset="none",  # the row's
        size=32,  # of 64 px, see `generators.folded`
        channels=(16, 32, 64),
        layers=1,
        attention=(False, False, False),
        learning_rate=0.002,
        batch=16,
        epochs=800,  # of 60 images: 3,200 steps
        average=0.998,
        average_ramp=100.0,
        flips=False,  # what flips are worth is a row of its own
    ),
}
PAPER = {  # wider, and longer
    "dcgan": {"width": 64, "epochs": 300},
    "wgan_gp": {"width": 64, "epochs": 300},
    "ddpm": {"channels": (64, 128, 256), "layers": 2, "epochs": 5000, "learning_rate": 0.0005},
}
SMOKE = {"each": 3, "made": 12, "draws": 64, "epochs": 1}
SMALL = SMOKE | {"batch": 8, "channels": (8, 16, 16), "average_ramp": 1.0}  # of a generator
EPISODES = {
    "smoke": {"size": 32, "width": 8, "shots": 2, "queries": 2, "epochs": 2, "episodes": 4, "test_episodes": 20},
    "quick": {},
    "paper": {"width": 64, "epochs": 100, "episodes": 100},
}
FEW_NORMALS = {"smoke": {"size": 128, "shots": (1, 2), "steps": 4}, "quick": {}, "paper": {"steps": 2000, "batch": 16}}


# --- What a row is computed from -------------------------------------------------------------------------------------


pictures, domains, normals = (kept(of, "dataset", "size", sets=1) for of in (load_pictures, load_domains, load_anomaly))


@lru_cache(maxsize=2)
def _few_normals_weights(settings: FewNormalsSettings) -> str:
    if settings.teacher.startswith("dinov2"):
        return fingerprint(load_teacher(settings))
    plain = settings.teacher.removesuffix("_random")
    return lite0_fingerprint(plain == settings.teacher) if plain == "lite0" else weights_fingerprint(settings.teacher)


def of_pictures(settings: TenPicturesSettings) -> dict[str, str]:
    """What is borrowed has a name of its own: a row without it can be compared with a row that has it."""
    frozen = settings.network == "lite0"
    borrowed = {"features": lite0_fingerprint(settings.pretrained)} if frozen else {"weights": "random"}
    return {"data": pictures_fingerprint(settings.dataset)} | borrowed


def of_episodes(settings: EpisodeSettings) -> dict[str, str]:
    weights = lite0_fingerprint(settings.pretrained) if settings.method == "frozen" else "random"
    return {"data": domains_fingerprint(settings.dataset), "weights": weights}


def of_normals(settings: FewNormalsSettings) -> dict[str, str]:
    alone = replace(settings, dataset="none", shots=(1,))  # what the weights do not depend on
    return {"data": data_fingerprint(settings.dataset), "weights": _few_normals_weights(alone)}


# --- Rows ------------------------------------------------------------------------------------------------------------


def generator(name: str, profile: str, kind: str = "steel") -> Any:
    found = replace(GENERATORS[name], **PAPER[name] if profile == "paper" else {})
    if kind == "cells" and isinstance(found, DiffusionSettings):
        found = replace(found, epochs=2 * found.epochs)  # half as many batches in an epoch: as many steps
    return changed_at_every_depth(found, lambda field, value: SMALL.get(field, value)) if profile == "smoke" else found


def picture_rows(kind: str, profile: str) -> dict[str, Row]:
    """A classifier from ten images a class, and from what is made of them."""
    real, synthetic = PICTURES[kind]

    def own(seeds: int = DRAWS[profile], primary: bool = True, **changes: Any) -> Row:
        settings = TenPicturesSettings(dataset=real)
        if profile == "smoke":
            settings = changed_at_every_depth(replace(settings, dataset=synthetic, **SMOKE), untrained)
        settings = replace(settings, **changes)
        if profile == "smoke" and ((kind == "cells" and settings.generator) or settings.size != 64):
            seeds = 0  # each kind once
        optional = kind == "cells"  # a package of its own
        return Row(settings, run_ten_pictures, pictures, of_pictures, seeds, primary, optional)

    found = {
        "real": own(),
        "flips": own(flips=True),
        "flips_and_crops": own(flips=True, smallest=0.8, primary=False),
        **{name: own(generator=generator(name, profile, kind)) for name in GENERATORS},
        "lite0": own(network="lite0"),
        "lite0_224": own(network="lite0", size=224, primary=False),
        "all": own(each=0, flips=True, primary=False),
    }
    return {f"{kind}_{name}": row for name, row in found.items()}


def episode_rows(profile: str) -> dict[str, Row]:
    """Few-shot classification: what is learnt on two domains, on a third."""
    base = EpisodeSettings(**EPISODES[profile])
    if profile == "smoke":
        base = changed_at_every_depth(replace(base, dataset=SYNTHETIC_DOMAINS), untrained)

    def own(method: str, domain: str) -> Row:
        seeds = (ONCE if method == "frozen" else TRAINED)[profile]
        if profile == "smoke" and domain != ("tiles" if method == "frozen" else "boards"):  # each method once
            seeds = 0
        settings = replace(base, method=method, left_out=domain, learning_rate=RATES[method])
        return Row(settings, run_episodes, domains, of_episodes, seeds, primary=True)

    return {f"{method}_{domain}": own(method, domain) for domain in ("boards", "steel", "tiles") for method in METHODS}


def normal_rows(kind: str, profile: str) -> dict[str, Row]:
    """Anomaly detection from 1 to 16 good images."""
    real, synthetic = NORMALS[kind]
    base = FewNormalsSettings(dataset=real, **FEW_NORMALS[profile])
    if profile == "smoke":
        base = changed_at_every_depth(replace(base, dataset=synthetic), untrained)

    def own(teacher: str, seeds: int = DRAWS[profile], **changes: Any) -> Row:
        if profile == "smoke" and (kind == "tile" or "turned" in changes):  # each method once
            seeds = 0
        name = f"{teacher}_random" if profile == "smoke" else teacher
        optional = teacher != "lite0"  # its weights come with no package
        settings = replace(base, teacher=name, **changes)
        return Row(settings, run_few_normals, normals, of_normals, seeds, teacher == "resnet18", optional)

    side = 126 if profile == "smoke" else 448
    dino = {"method": "nearest", "size": side, "bank": 100_000}  # of 16 images, turned: all patches
    found = {"anomalydino": own("dinov2_small", PAPER_ONLY[profile], **dino)}
    for end, more in (("", {}), ("_turned", {"turned": True})):
        found |= {
            f"patchcore{end}": own("resnet18", **more),
            f"patchcore_lite0{end}": own("lite0", **more),
            f"rd4ad{end}": own("resnet18", method="rd4ad", **more),
        }
    return {f"{name}_{kind}": row for name, row in found.items()}


def cost_rows(profile: str) -> dict[str, Row]:
    """What one image costs to make, with random weights; in smoke the networks of quick."""
    of = {name: generator(name, "quick" if profile == "smoke" else profile) for name in ("dcgan", "ddpm")}
    return {
        f"cost_{name}": cost_row(GeneratorCostSettings(settings), run_generator_costs, profile)
        for name, settings in of.items()
    }


def rows(profile: str) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for kind in PICTURES:
        found |= picture_rows(kind, profile)
    found |= episode_rows(profile)
    for kind in NORMALS:
        found |= normal_rows(kind, profile)
    return found | cost_rows(profile)


SHOTS = FewNormalsSettings.shots
STUDY = Study(
    "Ten images: generate, meta-learn, or borrow features?",
    {profile: rows(profile) for profile in DRAWS},
    {
        "steel": "six classes of NEU-DET from ten images of each",
        "cells": "defective solar cells (ELPV) from ten images of each class",
        "episodes": "few-shot classification, 600 episodes of five classes of a domain that was left out",
        "nut": "MVTec metal_nut (reduced copy) from 1 to 16 good images",
        "tile": "magnetic tiles, no tile on two sides, from 1 to 16 good images",
        "costs": "one image of 64 px, made",
    },
    (
        ("class_accuracy", "copies", "copies_held_out"),
        ("episode_accuracy", "episode_accuracy_1"),
        *(tuple(f"{metric}_{shots}" for shots in SHOTS) for metric in METRICS),
        ("parameters_m", "gflops", "latency_ms"),
    ),
)
