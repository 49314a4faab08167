"""The field's history I (notebook 50): windows of cloth, classified one by one or all in one pass."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

from defectlab.data.fabric import fabric_fingerprint, load_fabric
from defectlab.networks.resnet import fingerprint
from defectlab.networks.windows import Frozen, WindowSettings, build
from defectlab.studies.study import FEW, ONCE, Row, Study, cost_row, kept
from defectlab.training.windows import WindowCostSettings, run_window_costs, run_windows

SETTINGS = {
    "smoke": WindowSettings(dataset="synthetic_fabric", draws=128, epochs=2, pretrained=False),
    "quick": WindowSettings(),
    "paper": WindowSettings(draws=8192, epochs=100),
}
STRIDES = (32, 64, 128)  # px, of the loop


load = kept(load_fabric, "dataset", sets=1)


@lru_cache(maxsize=4)
def _weights(network: str, pretrained: bool) -> str:
    """Of what is frozen; "random": all is learnt, or nothing."""
    built = build(WindowSettings(network=network, pretrained=pretrained))
    return fingerprint(built.backbone) if isinstance(built, Frozen) else "random"


def fingerprints(settings: WindowSettings) -> dict[str, str]:
    weights = _weights(settings.network, settings.pretrained)
    return {"data": fabric_fingerprint(settings.dataset), "weights": weights}


def rows(profile: str) -> dict[str, Row]:
    base = SETTINGS[profile]

    def own(seeds: int = FEW[profile], primary: bool = False, **changes: Any) -> Row:
        settings = replace(base, **changes)
        optional = settings.network == "resnet18"  # its weights come with no package
        return Row(settings, run_windows, load, fingerprints, seeds, primary, optional)

    def cost(**settings: Any) -> Row:
        return cost_row(WindowCostSettings(**settings), run_window_costs, profile)

    learnt = {
        "cnn": own(primary=True),
        "lite0": own(network="lite0", primary=True),
        "resnet18": own(network="resnet18", primary=True),
        "lite0_loop": own(network="lite0", form="loop"),
        "resnet18_loop": own(network="resnet18", form="loop"),
        # what was learnt window by window, moved to whole images
        "lite0_moved": own(network="lite0", learnt="loop"),
        "resnet18_moved": own(network="resnet18", learnt="loop"),
        "contrast": own(ONCE[profile], network="contrast"),
    }
    costs = {"cost_cnn_convolutional": cost()}
    costs |= {f"cost_cnn_loop_{stride}": cost(form="loop", stride=stride) for stride in STRIDES}
    costs |= {"cost_lite0_convolutional": cost(network="lite0")}
    costs |= {"cost_lite0_loop_32": cost(network="lite0", form="loop")}
    return learnt | costs


METRICS = (
    ("balanced_accuracy", "image_auroc"),
    ("found", "false_alarms", "window_balanced_accuracy", "image_ap"),
    ("windows", "parameters_m", "gflops", "latency_ms"),
)
STUDY = Study(
    "A patch at a time: window classifiers on cloth",
    {profile: rows(profile) for profile in SETTINGS},
    {"aitex": "window classifiers on AITEX fabric", "costs": "one image of 2000 × 2000 px"},
    METRICS,
)
