"""The two-stage paper's numbers as data, and whether they add up: against values read and worked out by hand."""

from functools import partial
from itertools import pairwise

import pytest

from defectlab.data.anomaly import MVTEC_CATEGORIES
from defectlab.verdicts.audit import PrintedNumbers
from defectlab.verdicts.claims import claims_of
from defectlab.verdicts.tables import printed_table

lines_of = partial(printed_table, "amam_kd")
NUMBERS = PrintedNumbers("amam_kd")
METRIC_TABLES = [f"table{n}" for n in (2, 4, 5, 6, 7, 8, 9, 10, 11)] + ["audit/table7_originals", "text"]
TWICE = ["table2", "table4", "table5", "table6"]


@pytest.mark.parametrize(
    ("table", "row", "values"),
    [
        ("table2", "6, 10, 14, 18; nut", {"miou": "96.0", "accuracy": "98.2", "latency_ms": "36.0"}),
        ("table4", "ORCNet; nut", {"mae": "0.2", "dice": "87.8", "miou": "93.7", "weighted_f": "94.3"}),
        ("table4", "DeepLabV3+; defect", {"mae": "0.3", "dice": "91.7", "s_measure": "98.1", "e_measure": "99.3"}),
        ("table5", "Baseline; defect", {"miou": "91.4"}),
        ("table6", "20 %, without AMAM; nut", {"miou": "90.1"}),
        ("table6", "50 %, with AMAM, equal steps; defect", {"miou": "95.2"}),
        ("table8", "Swin Transformer", {"image_auroc": "92.4", "pixel_auroc": "92.7"}),
        ("table9", "Pre + MFF + Res", {"image_auroc": "93.6", "pixel_auroc": "97.9"}),
        ("text", "homogeneous student", {"pixel_auroc": "95.2"}),
        ("text", "two stages", {"pixel_auroc": "98.5", "pixel_auroc_crop": "98.5"}),
    ],
)
def test_numbers_stand_as_printed(table: str, row: str, values: dict[str, str]) -> None:
    found = {line["metric"]: line["value"] for line in lines_of(table) if line["row"] == row}
    assert values.items() <= found.items()


def test_means_over_categories_have_columns_of_their_own_and_no_key() -> None:
    for table in ("table7", "table10", "table11"):
        for line in lines_of(table):
            if line["column"].endswith("average"):
                assert line["value"] and not line["key"] and "a mean over" in line["not_comparable"]
    assert NUMBERS.printed("pixel_auroc", "table7", "PaDiM", "total_average") == 97.4
    assert NUMBERS.printed("pixel_auroc", "table7", "CutPaste", "screw") == 96.6
    assert NUMBERS.printed("pixel_auroc", "table10", "L1", "objects_average") == 95.2
    assert NUMBERS.printed("pixel_auroc", "table11", "5 × 5", "textures_average") == 97.4


@pytest.mark.parametrize("table", METRIC_TABLES)
def test_no_printed_level_is_judged_and_each_says_why(table: str) -> None:
    lines = lines_of(table)
    assert all(line["not_comparable"] for line in lines if line["value"] and line["key"])
    assert all(line["source"] for line in lines)
    assert any(line["value"] for line in lines)


@pytest.mark.parametrize("table", TWICE)
def test_both_targets_have_the_same_rows_and_the_same_printed_numbers(table: str) -> None:
    of = {"nut": {}, "defect": {}}
    for line in lines_of(table):
        row, target = line["row"].rsplit("; ", 1)
        assert not line["key"] or line["key"].endswith(f"_{target}")
        of[target][row, line["metric"]] = line["value"]
    assert of["nut"] == of["defect"] and of["nut"]


def test_keys_are_the_rows_of_the_study() -> None:
    networks = ["amam", "amam_table1", "amam_self", "baseline", "decoder", "skips", "all_gates", "gates"]
    networks += ["unet", "unetpp", "deeplabv3plus", "pspnet", "attention_unet"]
    networks += [f"dilation_{rates}" for rates in ("2_4_6_8", "6_10_14_18", "8_12_16_20")]
    networks += [f"{x}_{share}{s}" for x in ("gates", "amam") for share in (10, 20, 50) for s in ("", "_steps")]
    expected = {f"{network}_{target}" for network in networks for target in ("nut", "defect")} | {"nut_from_good"}
    expected |= {f"{method}_{c}" for method in ("kd", "padim", "spade", "patchcore") for c in MVTEC_CATEGORIES}
    switches = "resnet50 wide_resnet50_2 pre res mff_res l1 l2 mse no_weighting weighting_3 weighting_5"
    switches += " weighting_printed homogeneous no_flips 256"
    expected |= {f"kd_{switch}" for switch in switches.split()}
    expected |= {"rd4ad_metal_nut", "two_stage", "two_stage_paper_split"}
    assert {line["key"] for table in METRIC_TABLES for line in lines_of(table)} - {""} == expected


def test_the_printed_sizes_follow_on_each_other() -> None:
    for name, length in (("audit/shapes1", 11), ("audit/shapes3", 5)):
        lines = lines_of(name)
        assert len(lines) == length
        assert all(a["output"] == b["input"] for a, b in pairwise(lines))
        assert (lines[0]["input"], lines[-1]["output"]) == ("256x256x3", "256x256x1")
    assert lines_of("audit/shapes1")[5]["output"] == "16x16x512"  # AMAM
    assert lines_of("audit/shapes3")[1]["output"] == "16x16x2048"  # the teacher


def test_only_the_two_stages_and_amam_at_ten_per_cent_are_primary() -> None:
    primary = {claim["id"] for claim in claims_of("amam_kd") if claim["primary"]}
    assert primary == {"two_stage_better", "amam_at_ten_per_cent_nut", "amam_at_ten_per_cent_defect"}


def test_printed_gains_of_the_claims_are_differences_of_printed_numbers() -> None:
    objects = {  # Tables 10 and 11: printed for the mean over objects, which no run has as its key
        ("cosine_better", "a"): ("table10", "cosine similarity"),
        ("cosine_better", "b"): ("table10", "MSE"),
        ("l2_is_mse", "a"): ("table10", "L2"),
        ("l2_is_mse", "b"): ("table10", "MSE"),
        ("weighting", "a"): ("table11", "1 × 1"),
        ("weighting", "b"): ("table11", "no convolution"),
    }
    checked = 0
    for claim in claims_of("amam_kd"):
        if "printed" not in claim:
            continue
        sides = []
        for side in ("a", "b"):
            if (claim["id"], side) in objects:
                sides.append({NUMBERS.printed("pixel_auroc", *objects[claim["id"], side], "objects_average")})
                continue
            found = [line for table in METRIC_TABLES for line in lines_of(table) if line["key"] == claim[side]]
            sides.append({float(x["value"]) for x in found if x["metric"] == claim["metric"] and x["value"]})
        gains = {round(a - b, 1) for a in sides[0] for b in sides[1]}  # a row may be printed with several numbers
        assert claim["printed"] in gains, claim["id"]
        checked += 1
    assert checked == 24


def test_a_number_that_is_not_printed_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"table7\.csv prints no pixel_auroc for row 'PatchCore 1 % \(added\)'"):
        NUMBERS.printed("pixel_auroc", "table7", "PatchCore 1 % (added)", "tile")


def test_stated_gains() -> None:
    table = NUMBERS.stated_gains().reset_index().set_index("printed")
    assert table.loc[14.9, ["computed", "relative"]].tolist() == [11.9, 14.46]
    assert table.loc[1.5, "computed"] == 1.9
    assert table.loc[2.1, "computed"] == 1.3
    assert set(table.index[table["remark"] == "agrees"]) == {1.7, 2.2, 3.1, 4.8}
    mious = NUMBERS.column("miou", "table5").values()
    assert len(mious) == 6
    assert 2.1 not in {round(a - b, 1) for a in mious for b in mious}


def test_what_stands_twice() -> None:
    table = NUMBERS.printed_twice()["difference"]
    assert table["full model, Tables 4 and 5", "miou"] == 0.2  # 96.4 in the abstract, 96.2 in Table 5
    assert table["U-Net, Tables 4 and 5", "miou"] == 1.0
    assert table["full method, Tables 8 and 9", "image_auroc"] == -0.2
    assert table["full method, Tables 8 and 9", "pixel_auroc"] == 0
    assert table["full method, textures_average, Tables 7 and 11", "pixel_auroc"] == 0.1
    assert table["metal nut, sections 4.3 and 4.2.2", "pixel_auroc"] == -0.5


def test_rows_and_columns_as_printed() -> None:
    own = NUMBERS.row("pixel_auroc", "table7", "the paper's method")
    assert len(own) == 18 and sum(own[c] for c in MVTEC_CATEGORIES) / 15 == pytest.approx(98.15, abs=0.005)
    assert list(NUMBERS.column("dice", "table4"))[-1] == "the paper's method"  # each once, though two targets print it
    assert NUMBERS.column("image_auroc", "table9").keys() == NUMBERS.column("pixel_auroc", "table9").keys()
