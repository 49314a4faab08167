"""The field's history II (notebook 52): what does a detector gain by dropping non-maximum suppression, what by
attention, what by size?"""

from dataclasses import replace
from functools import partial
from typing import Any

from defectlab.networks.yolo.decode import CANDIDATES
from defectlab.networks.yolo.one_to_one import OneToOneSettings
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.papers.yolo_dcf import Settings
from defectlab.studies import detector
from defectlab.studies.cures import BOARD
from defectlab.studies.detector import row
from defectlab.studies.study import FEW, PAPER_ONLY, Row, Study, cost_row, needs_of
from defectlab.training.cost_rows import AnswerCostSettings, CostSettings, run_costs
from defectlab.training.one_to_one import OtherEndSettings, run_one_to_one, run_other_end
from defectlab.training.yolo_dcf import run_yolo_dcf

# With attention an image takes longer (SE x1.06, CBAM x1.10 as deployed, results/costs/yolo_dcf-cpu.json): fewer epochs
SHARE = {"se": 1 / 1.06, "cbam": 1 / 1.10}
# Of the plot of accuracy against time: generation, scale, px. Quick trains the small ones; the others would take hours
# there, and their time alone is measured.
SIZES = [("v8", "n", 224), ("v8", "s", 224), ("v5", "n", 224), ("v5", "s", 224), ("v8", "n", 320)]
LARGE = [("v8", "m", 224), ("v5", "m", 224), ("v8", "n", 448), ("v8", "n", 640)]
# Boxes that NMS compares: about what a one-to-many head gives on NEU-DET from a score of 0.25 and of 0.001 on (the
# records' `candidates` and `candidates_all`), and all that ever enter here, as in a crowded image.
ENTER = (11, 440, CANDIDATES)


def like(plain: DetectorSettings, kind: type, **changes: Any) -> Any:
    """Settings of another kind of detector with the recipe of a plain one."""
    return kind(**vars(plain) | changes)


one_to_one = partial(like, kind=OneToOneSettings)


def rows_on(plain: DetectorSettings, profile: str, start: str = "") -> dict[str, Row]:
    """Both heads, with and without suppression; `start`: what the rows' names begin with."""
    few = {"seeds": FEW[profile]}
    both = one_to_one(plain)

    def other_end(of: DetectorSettings, head: str, suppressed: bool) -> Row:
        settings = OtherEndSettings(of=of, head=head, suppressed=suppressed)
        return row(settings, run_other_end, needs=needs_of, **few)

    found = {
        "many": row(plain, **few, primary=True),
        "many_unsuppressed": other_end(plain, "many", False),
        "one": row(one_to_one(plain, heads="one"), run_one_to_one, **few, primary=True),
        "both": row(both, run_one_to_one, **few, primary=True),
        "both_suppressed": other_end(both, "one", True),
        "both_many": other_end(both, "many", True),
    }
    return {start + name: one for name, one in found.items()}


def attention_rows(plain: DetectorSettings, profile: str) -> dict[str, Row]:
    """Attention at the four places where the neck joins maps, with and without mosaic, in the time of a plain one."""
    few = {"seeds": FEW[profile]}
    found = {}
    for end, base in (("", plain), ("_no_mosaic", replace(plain, mosaic=0.0, close_mosaic=0))):
        if end:
            found[f"many{end}"] = row(base, **few)
        for kind, share in SHARE.items():
            settings = like(base, Settings, epochs=round(share * base.epochs), fusion=kind, block="plain")
            found[kind + end] = row(settings, run_yolo_dcf, **few, primary=not end)
    return found


def size_rows(plain: DetectorSettings, profile: str) -> dict[str, Row]:
    """Plain detectors of both generations, three scales and several image sizes, and what each costs."""
    found, small = {}, profile == "smoke"
    for one in SIZES + LARGE:
        family, scale, size = one
        name = f"{family}{scale}_{size}"
        own = {"family": family, "scale": plain.scale if small else scale, "size": plain.size if small else size}
        found[name] = row(replace(plain, **own), seeds=(FEW if one in SIZES else PAPER_ONLY)[profile])
        found[f"cost_{name}"] = cost_row(CostSettings(**own, classes=6), run_costs, profile)
    return found


def answer_rows(profile: str) -> dict[str, Row]:
    """What an image costs from pixels to boxes, without NMS and with so many boxes in it."""
    names = {"cost_no_nms": 0} | {f"cost_nms_{count}": count for count in ENTER}
    return {name: cost_row(AnswerCostSettings(suppressed=n), run_costs, profile) for name, n in names.items()}


def rows(profile: str) -> dict[str, Row]:
    steel = detector.SETTINGS[profile]
    board = replace(BOARD[profile], dataset=detector.on("deep_pcb", profile))
    few = {"seeds": FEW[profile]}
    parts = {
        # the paper's Table 4 has exponents 0.5 and 2 for the one-to-one head, too
        "inconsistent": row(one_to_one(steel, beta=2.0), run_one_to_one, **few),
        "attached": row(one_to_one(steel, detached=False), run_one_to_one, **few),
    }
    on_steel = rows_on(steel, profile) | parts | attention_rows(steel, profile)
    return on_steel | rows_on(board, profile, "board_") | size_rows(steel, profile) | answer_rows(profile)


STUDY = Study(
    "v8 or v10? One box for each object without suppression, and attention",
    {profile: rows(profile) for profile in detector.SETTINGS},
    {
        "steel": "one box for each object on NEU-DET, with and without suppression",
        "boards": "one box for each object on DeepPCB, with and without suppression",
        "attention": "SE and CBAM with and without mosaic on NEU-DET, in equal time",
        "speed": "time of an image from pixels to boxes, with and without suppression",
        "sizes": "accuracy and time of two generations, three scales and four image sizes on NEU-DET",
    },
    (*detector.METRICS, ("recall_at_01",), ("duplicates", "duplicates_all"), ("candidates", "candidates_all")),
)
