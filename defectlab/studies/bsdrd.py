"""The rows of BSDRD (notebooks 20 and 21): two students on magnetic tiles. "bsdrd" is the whole method."""

from dataclasses import replace
from functools import partial

from defectlab.papers.bsdrd import Settings, build, make_loss, to_maps
from defectlab.studies import reverse_distillation as baselines
from defectlab.studies.study import FEW, MORE, ONCE, Row, Study
from defectlab.training.anomaly import distil

SETTINGS = {
    "smoke": Settings(dataset="synthetic_tile", epochs=2, batch=8, low_channels=32, **baselines.SMALL),
    "quick": Settings(epochs=10),
    "paper": Settings(),
}
ABLATION = {  # what each row changes of the whole method
    "loss_per_pixel": {"loss": "per_pixel"},
    "loss_whole_map": {"loss": "whole_map"},
    "gate_focus": {"gate": "focus"},
    "gate_equal": {"gate": "equal"},
    # the wavelet
    "wavelet_none": {"wavelet": "none"},
    "wavelet_db2": {"wavelet": "db2"},
    "wavelet_two_levels": {"wavelet_levels": 2},
    # the other reading of "high-level features"
    "high_level_2_and_3": {"high_level": "layer2+3"},
}
run_bsdrd = partial(distil, build=build, make_loss=make_loss, to_maps=to_maps)


def on_grouped(row: Row, profile: str) -> Row:
    """The same on the split that cuts no tile."""
    dataset = {"smoke": "synthetic_tile"}.get(profile, "magnetic_tile_grouped")
    return replace(row, settings=replace(row.settings, dataset=dataset))


def rows(profile: str) -> dict[str, Row]:
    base, plain = SETTINGS[profile], baselines.rows(profile)

    def own(seeds: dict[str, int] = FEW, primary: bool = False, **changes) -> Row:
        return baselines.row(replace(base, **changes), run_bsdrd, seeds=seeds[profile], primary=primary)

    main = {
        "rd4ad": plain["rd4ad"],
        "struct_only": own(students=("struct",), primary=True),
        "detail_only": own(students=("detail",), primary=True),
        "bsdrd": own(MORE, primary=True),
        "patchcore": plain["patchcore"],
    }
    parts = {"rd4ad_per_pixel": plain["rd4ad_per_pixel"]} | {name: own(**of) for name, of in ABLATION.items()}
    grouped = {f"{name}_grouped": on_grouped(row, profile) for name, row in (main | parts).items()}
    return main | grouped | {name: replace(row, seeds=ONCE[profile]) for name, row in parts.items()}


STUDY = Study(
    "BSDRD (Sci Rep 2025): two students on magnetic tiles",
    {profile: rows(profile) for profile in SETTINGS},
    {
        "main": "BSDRD, its two students, RD4AD and PatchCore on magnetic tiles, published split",
        "grouped": "the same on a split that has no tile on two sides",
        "ablation_grouped": "what the loss, the gate and the wavelet contribute, no tile on two sides",
        "ablation": "the same on the published split",
    },
    baselines.METRICS,
)
