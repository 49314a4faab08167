"""The field's history: magnetic tiles under light that training has not seen, and what may help."""

from dataclasses import replace

from defectlab.studies import reverse_distillation as baselines
from defectlab.studies.study import FEW, Row, Study
from defectlab.training.light import BRIGHT, DARK, LightSettings, run_light

EVERY = (1, 2, 3, 4, 5, 6)  # exposures
CHANGES = {"to_bright": (DARK, BRIGHT), "to_dark": (BRIGHT, DARK)}  # light to learn from, light of the test
SETTINGS = {
    "smoke": LightSettings(of=baselines.PATCHCORE["smoke"]),
    "quick": LightSettings(),
    "paper": LightSettings(),
}


def fingerprints(settings: LightSettings) -> dict[str, str]:
    return baselines.fingerprints(settings.of)


def rows(profile: str) -> dict[str, Row]:
    def own(primary: bool = False, **changes) -> Row:
        settings = replace(SETTINGS[profile], **changes)
        return Row(settings, run_light, baselines.load, fingerprints, FEW[profile], primary)

    found = {}
    for name, (learns, tested) in CHANGES.items():
        change = {"learns": learns, "tested": tested}
        found |= {
            f"{name}_same": own(True, learns=tested, tested=tested),
            f"{name}_none": own(True, **change),
            f"{name}_jitter": own(cure="jitter", **change),
            f"{name}_normalise": own(cure="normalise", **change),
            f"{name}_all": own(True, learns=EVERY, tested=tested),
        }
    return found


STUDY = Study(
    "Light, for real: magnetic tiles under exposures that training has not seen",
    {profile: rows(profile) for profile in SETTINGS},
    {"tiles": "PatchCore on magnetic tiles under another light than in training, no tile on two sides"},
    (*baselines.METRICS, ("found", "false_alarms")),
)
