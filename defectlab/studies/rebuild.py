"""The field's history I (notebook 53): learn what is normal, from the autoencoder to the transformer."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

from defectlab.data.anomaly import data_fingerprint, load_anomaly
from defectlab.data.pooled import (
    POOLED,
    SYNTHETIC_POOLED,
    foreign_fingerprint,
    is_pool,
    load_pooled,
    pooled_fingerprint,
    sets_of,
)
from defectlab.networks.efficientnet import Lite0
from defectlab.networks.rebuild.autoencoder import AutoencoderSettings
from defectlab.networks.rebuild.contrast import ContrastSettings
from defectlab.networks.rebuild.draem import DRAEMSettings
from defectlab.networks.rebuild.efficientad import EfficientADSettings
from defectlab.networks.rebuild.efficientad_teacher import EfficientADTeacherSettings
from defectlab.networks.rebuild.ganomaly import GANomalySettings
from defectlab.networks.rebuild.mscdae import MSCDAESettings
from defectlab.networks.rebuild.simplenet import SimpleNetSettings
from defectlab.networks.rebuild.sivt import SIVTSettings
from defectlab.networks.resnet import fingerprint
from defectlab.studies import reverse_distillation as baselines
from defectlab.studies.study import (
    FEW,
    ONCE,
    Row,
    Study,
    changed_at_every_depth,
    cost_row,
    kept,
    needs_nothing,
    needs_of,
)
from defectlab.training.anomaly import run_rd4ad
from defectlab.training.feature_baselines import run_patchcore
from defectlab.training.rebuild import (
    METHODS,
    PartSettings,
    RebuildCostSettings,
    run_part,
    run_rebuild,
    run_rebuild_costs,
)

SETS = {"smoke": sets_of(SYNTHETIC_POOLED), "quick": sets_of(POOLED), "paper": sets_of(POOLED)}  # kind -> set
METHODS_OF = {  # settings of quick; each method learns one set
    "contrast": ContrastSettings(),
    "ae_l2": AutoencoderSettings(loss="l2"),
    "ae_ssim": AutoencoderSettings(),
    "ganomaly": GANomalySettings(),
    "mscdae": MSCDAESettings(),
    "mscdae_no_noise": MSCDAESettings(noise=0.0),
    "draem": DRAEMSettings(),
    "simplenet": SimpleNetSettings(),
    "efficientad": EfficientADSettings(),
}
POOLED_METHODS = {"sivt": SIVTSettings(), "cnn_decoder": SIVTSettings(decoder="conv")}  # one model for all three sets
WHOLE = {"ae_l2": 128, "ae_ssim": 128, "ganomaly": 64, "draem": 128}  # px at which a nut is seen as a whole, no crops
LEVELS = (1, 2, 3)  # of MSCDAE's pyramid
SMOKE = {"size": 128, "draws": 8, "epochs": 1, "batch": 4, "hidden": 32}
PAPER = {  # the papers' settings where they are known; ours where they would be those of another set
    AutoencoderSettings: {"draws": 10_000, "epochs": 200, "stride": 30, "learning_rate": 0.0002},
    GANomalySettings: {"width": 64, "epochs": 150, "batch": 64},
    MSCDAESettings: {"draws": 1024, "epochs": 200},
    DRAEMSettings: {"draws": 256, "epochs": 700},
    SimpleNetSettings: {
        "teacher": "wide_resnet50_2",
        "hidden": 1024,
        "positions": 0,
        "draws": 256,
        "epochs": 160,
        "batch": 4,
    },
    EfficientADTeacherSettings: {
        "width": 1.0,
        "patch": 256,
        "batch": 16,
        "draws": 10_000,
        "epochs": 96,
        "learning_rate": 0.0001,
    },
    EfficientADSettings: {"width": 1.0, "draws": 10_000, "epochs": 14, "learning_rate": 0.0001},
    SIVTSettings: {"dim": 256, "depth": 4, "draws": 1152, "epochs": 200},
}


# --- What a row is computed from -------------------------------------------------------------------------------------


load = kept(lambda name, *rest: (load_pooled if is_pool(name) else load_anomaly)(name, *rest), "dataset", "size")


@lru_cache(maxsize=2)
def lite0_fingerprint(pretrained: bool) -> str:
    return fingerprint(Lite0(pretrained))


def _images(dataset: str) -> str:
    return (pooled_fingerprint if is_pool(dataset) else data_fingerprint)(dataset)


def _weights(settings: Any) -> str:
    """Of what is frozen; "random": all is learnt, or nothing."""
    if isinstance(settings, SimpleNetSettings):
        return baselines.weights_fingerprint(settings.teacher)
    return lite0_fingerprint(settings.pretrained) if hasattr(settings, "pretrained") else "random"


def fingerprints(settings: Any) -> dict[str, str]:
    found = {"data": _images(settings.dataset), "weights": _weights(getattr(settings, "of", settings))}
    if isinstance(settings, PartSettings):
        return found | {"learnt": _images(settings.of.dataset)}
    if isinstance(settings, EfficientADSettings):
        found |= {"weights": _weights(settings.teacher), "teacher": _images(settings.teacher.dataset)}
    return found | ({"foreign": foreign_fingerprint(settings.dataset)} if METHODS[type(settings)].foreign else {})


# --- Rows ------------------------------------------------------------------------------------------------------------


def at(profile: str, settings: Any, **changes: Any) -> Any:
    """The settings of quick as a profile has them."""
    names = {one.name for one in fields(settings)}
    if profile == "smoke":
        settings = changed_at_every_depth(settings, untrained)
        changes = {name: value for name, value in SMOKE.items() if name in names} | changes
    if profile == "paper":
        changes = PAPER.get(type(settings), {}) | changes
    return replace(settings, **changes)


def rows(profile: str) -> dict[str, Row]:
    few, once = FEW[profile], ONCE[profile]
    pool = {"smoke": SYNTHETIC_POOLED}.get(profile, POOLED)

    def own(settings: Any, run: Callable = run_rebuild, seeds: int = few, **marks: Any) -> Row:
        return Row(settings, run, load, fingerprints, seeds, **marks)

    shared = {name: at(profile, settings, dataset=pool) for name, settings in POOLED_METHODS.items()}
    teacher = at(profile, EfficientADTeacherSettings(), dataset=pool)
    found = {name: own(settings, primary=True) for name, settings in shared.items()}
    found["efficientad_teacher"] = own(teacher, seeds=once)
    for kind, dataset in SETS[profile].items():
        here = 0 if profile == "smoke" and kind != "nut" else few  # smoke trains each method on one set
        methods = {name: at(profile, settings, dataset=dataset) for name, settings in METHODS_OF.items()}
        methods["efficientad"] = replace(methods["efficientad"], teacher=teacher)
        if kind == "nut" and profile == "quick":
            methods |= {name: replace(methods[name], size=size) for name, size in WHOLE.items()}
        found[f"contrast_{kind}"] = own(methods.pop("contrast"), seeds=min(here, once))
        for name, settings in methods.items():
            optional = name == "simplenet"  # ResNet's weights come with no package
            row_name = f"{name}_{kind}" if name != "mscdae_no_noise" else f"mscdae_{kind}_no_noise"
            primary = name in ("ae_l2", "ae_ssim", "mscdae")
            needs = needs_of_efficientad if name == "efficientad" else needs_nothing
            found[row_name] = own(settings, seeds=here, primary=primary, optional=optional, needs=needs)
        for level in LEVELS:
            part = PartSettings(methods["mscdae"], dataset, level)
            found[f"mscdae_{kind}_level_{level}"] = own(part, run_part, here, primary=kind == "cloth", needs=needs_of)
        for name, settings in shared.items():
            part = PartSettings(settings, dataset)
            found[f"{name}_{kind}"] = own(part, run_part, here, primary=True, needs=needs_of)
        older = {"patchcore": (baselines.PATCHCORE, run_patchcore), "rd4ad": (baselines.RD4AD, run_rd4ad)}
        for name, (of, run) in older.items():
            settings = replace(of[profile], dataset=dataset)
            found[f"{name}_{kind}"] = baselines.row(settings, run, seeds=here, primary=True, optional=True)
    return found | cost_rows(profile)


def needs_of_efficientad(settings: Any, seed: int) -> list[tuple[Any, int]]:
    return [(settings.teacher, 0)]  # one serves all sets and seeds


def untrained(name: str, value: Any) -> Any:
    """A field of settings, for a network with random weights."""
    return {"pretrained": False, "teacher": f"{value}_random"}.get(name, value)


def cost_rows(profile: str) -> dict[str, Row]:
    """What an image costs, with random weights; in smoke the networks of quick."""

    def own(settings: Any, part: str = "") -> Row:
        of = at("quick" if profile == "smoke" else profile, settings)
        return cost_row(RebuildCostSettings(changed_at_every_depth(of, untrained), part), run_rebuild_costs, profile)

    whole = ("contrast", "ae_l2", "ganomaly", "mscdae", "draem", "simplenet", "efficientad")
    found = {f"cost_{name}": own(METHODS_OF[name]) for name in whole} | {"cost_sivt": own(POOLED_METHODS["sivt"])}
    found |= {f"cost_sivt_{part}": own(POOLED_METHODS["sivt"], part) for part in ("backbone", "decoder")}
    return found | {"cost_cnn_decoder": own(POOLED_METHODS["cnn_decoder"], "decoder")}


STUDY = Study(
    "Rebuild the normal: from the autoencoder to the transformer",
    {profile: rows(profile) for profile in SETS},
    {
        "cloth": "methods that learn good images alone, on AITEX fabric, no strip on two sides",
        "tile": "the same on magnetic tiles, no tile on two sides",
        "nut": "the same on MVTec metal_nut (reduced copy), beside published values",
        "levels": "MSCDAE by the levels of its pyramid",
        "pooled": "one model for the three sets, one threshold for all",
        "costs": "one image of 256 px",
    },
    (*baselines.METRICS, ("f1_regret", "missed_at_5"), ("parameters_m", "gflops", "latency_ms", "fps")),
)
