"""TODO studies.bsdrd."""

from dataclasses import replace
from defectlab.networks.feature_baselines import PatchCoreSettings
from defectlab.networks.reverse_distillation import RD4ADSettings
from defectlab.papers.bsdrd import Settings
from defectlab.papers.bsdrd import build
from defectlab.papers.bsdrd import make_loss
from defectlab.papers.bsdrd import to_maps
from defectlab.runs import Result
from defectlab.studies import reverse_distillation as baselines
from defectlab.training import anomaly as distil


TITLE = "BSDRD (Sci Rep 2025): two students on magnetic tiles"


# --- Settings of the three profiles, rows of the tables, one run -----------------------------------------------------

SMALLER = {"low_channels": 32}  # smoke only: 128 px and a random teacher need no more
SETTINGS = {
    "smoke": Settings(dataset="synthetic_tile", epochs=2, batch=8, **baselines.SMALL, **SMALLER),
    "quick": Settings(epochs=10),
    "paper": Settings(),
}


def rows(profile: str) -> dict[str, RD4ADSettings | PatchCoreSettings]:
    """Every row of notebooks 20 and 21 at one profile; "bsdrd" is the whole method."""
    base, plain = SETTINGS[profile], baselines.ROWS[profile]
    return {
        # the main table
        "rd4ad": plain["rd4ad"],
        "struct_only": replace(base, students=("struct",)),
        "detail_only": replace(base, students=("detail",)),
        "bsdrd": base,
        "patchcore": plain["patchcore"],
        # the loss
        "rd4ad_per_pixel": plain["rd4ad_per_pixel"],
        "loss_per_pixel": replace(base, loss="per_pixel"),
        "loss_whole_map": replace(base, loss="whole_map"),
        "gate_focus": replace(base, gate="focus"),
        "gate_equal": replace(base, gate="equal"),
        # the wavelet
        "wavelet_none": replace(base, wavelet="none"),
        "wavelet_db2": replace(base, wavelet="db2"),
        "wavelet_two_levels": replace(base, wavelet_levels=2),
        # the other reading of "high-level features"
        "high_level_2_and_3": replace(base, high_level="layer2+3"),
    }


ROWS = {profile: rows(profile) for profile in SETTINGS}
PRIMARY = ("rd4ad", "struct_only", "detail_only", "bsdrd", "patchcore")
TABLES = {
    "main": "BSDRD, its two students, RD4AD and PatchCore on magnetic tiles",
    "ablation": "what the loss, the gate and the wavelet contribute",
}
load, fingerprints = baselines.load, baselines.fingerprints


def planned_seeds(row: str, profile: str) -> int:
    """How many seeds a row gets: the primary claims compare "bsdrd" with "rd4ad"."""
    if row in ("rd4ad", "bsdrd"):
        return {"smoke": 1, "quick": 3, "paper": 5}[profile]
    return {"smoke": 1, "quick": 1, "paper": 3}[profile]


def run_row(settings, seed: int, data, device: str, session) -> Result:
    """One row and seed; the baselines' rows are computed by their own module, under the same key as in notebook 03."""
    if not isinstance(settings, Settings):
        return baselines.run_row(settings, seed, data, device, session)
    return distil.distil(settings, seed, data, device, session, build, make_loss, to_maps)
