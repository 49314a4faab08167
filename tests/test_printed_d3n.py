"""D3N's numbers as data, and whether they add up: against values read and worked out by hand."""

from functools import partial

import pytest

from defectlab.verdicts.audit import PrintedNumbers
from defectlab.verdicts.claims import claims_of
from defectlab.verdicts.tables import printed_table

lines_of = partial(printed_table, "d3n")
NUMBERS = PrintedNumbers("d3n")
TABLES = [f"table{n}" for n in range(1, 8)] + ["text"]
OWN = "the paper's method"
ROWS = {
    *("ddpm", "ddpm_printed", "resvae", "pca", "pcb_ddpm", "pcb_resvae", "seg_ddpm", "seg_resvae"),
    *("baseline", "baseline_mosaic", "hybrid", "student", "baseline_300", "student_300", "student_bce"),
    *("fusion_cross", "fusion_dual", "fusion_dual_weighted", "fusion_weighted_residual"),
    *("fusion_dual_weighted_residual", "fusion_concat", "fusion_sum", "fusion_weighted_sum"),
    *("plain_pca", "plain_resvae", "fusion_positional", "fusion_printed_scale"),
    *("pcb_baseline", "pcb_hybrid", "pcb_student"),
    *("multitask_baseline", "multitask_baseline_published", "multitask_hybrid", "multitask_student"),
    *("v5m", "v5l", "v8n", "v8s", "v8m", "v8l", "faster_rcnn", "retinanet", "ssd", "fcos"),
    *(f"cost_v{family}{scale}" for family in (5, 8) for scale in "nsml"),
}


@pytest.mark.parametrize(
    ("table", "row", "values"),
    [
        ("table1", "weighted sum, residual", {"map50": 78.2}),
        ("table2", "Concat + Conv1×1", {"map50": 77.6}),
        ("table3", "ResVAE, noise filter", {"map50": 78.1}),
        ("table4", "YOLOv5", {"precision_dev": 82.9, "recall_dev": 82.7, "map50": 89.2, "mask_map50": 85.8}),
        ("table4", "Proposed", {"recall_dev": 85, "mask_precision_dev": 83, "mask_recall_dev": 81.8}),
        ("table5", "YOLOv3", {"map50": 56.44, "size_mb": 235.2, "gflops": 54.6, "fps": 37}),
        ("table5", "RT-DETR-l", {"map50": 76.7, "size_mb": 66.2, "gflops": 110.0, "fps": 84}),
        ("table5", OWN, {"map50": 77.7, "size_mb": 14.5, "gflops": 16.5, "fps": 144}),
        ("table6", OWN, {"map50": 79.0}),
        ("table7", "YOLOv8-m", {"map50": 66.8}),
    ],
)
def test_numbers_stand_as_printed(table: str, row: str, values: dict[str, float]) -> None:
    assert {metric: NUMBERS.printed(metric, table, row) for metric in values} == values


def test_every_printed_number_is_there() -> None:
    """Rows of the paper's tables, and their sums as added up by hand."""
    found = {table: [float(line["value"]) for line in lines_of(table) if line["value"]] for table in TABLES}
    counts = {table: len(values) for table, values in found.items()}
    # Table V: 21 rows of four numbers; Sparse R-CNN has two of them, ES-Net three
    assert counts == dict(zip(TABLES, (6, 4, 4, 12, 81, 22, 15, 0), strict=True))
    sums = {table: round(sum(found[table]), 1) for table in ("table1", "table2", "table3", "table4", "table7")}
    assert sums == {"table1": 466.0, "table2": 312.2, "table3": 308.1, "table4": 1013.2, "table7": 982.1}


def test_keys_are_the_rows_of_the_study() -> None:
    assert {line["key"] for table in TABLES for line in lines_of(table)} - {""} == ROWS
    keys = {(line["row"], line["key"]) for line in lines_of("table6")}
    assert {("YOLOv5s", "baseline"), (OWN, "student"), ("SSD, VGG-16", "ssd"), ("CABF-FCOS, ResNet-50", "")} <= keys
    for table in ("table1", "table2", "table3"):
        assert [line["key"] for line in lines_of(table) if line["value"] == "79.0"] == ["hybrid"]


@pytest.mark.parametrize("table", TABLES)
def test_levels_are_not_judged_and_flops_are(table: str) -> None:
    for line in lines_of(table):
        assert line["value"] or (line["key"] and not line["not_comparable"])
        if line["value"] and line["key"]:  # FLOPs follow from the network alone
            assert bool(line["not_comparable"]) == (line["metric"] != "gflops")


def test_sets_that_are_not_at_hand_have_no_key() -> None:
    fabric = [line for line in lines_of("table5") if line["metric"] == "map50"]
    assert {(line["status"], line["key"]) for line in fabric + lines_of("table7")} == {("not run: data", "")}
    assert (len(fabric), len(lines_of("table7"))) == (21, 15)
    assert all(line["key"].startswith("cost_") for line in lines_of("table5") if line["key"])


def test_only_the_student_against_its_baseline_is_primary() -> None:
    primary = [claim for claim in claims_of("d3n") if claim["primary"]]
    assert [(x["a"], x["b"], x["metric"], x["printed"]) for x in primary] == [("student", "baseline", "map50", 2.4)]
    assert len(claims_of("d3n")) == 35


def test_printed_gains_of_the_claims_are_differences_of_printed_numbers() -> None:
    lines = [line for table in TABLES for line in lines_of(table)]
    levels = {"baseline_mosaic": "baseline"}  # the paper prints one YOLOv5s, we run two recipes of it
    claims = [claim for claim in claims_of("d3n") if "printed" in claim]
    for claim in claims:
        sides = []
        for side in (claim["a"], claim["b"]):
            of_side = [x for x in lines if x["key"] == levels.get(side, side) and x["metric"] == claim["metric"]]
            sides.append({float(x["value"]) for x in of_side if x["value"]})
        # a row may be printed with several numbers
        assert claim["printed"] in {round(a - b, 1) for a in sides[0] for b in sides[1]}, claim["id"]
    assert len(claims) == 25


def test_a_number_that_is_not_printed_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"d3n/table5\.csv prints no gflops for row 'ES-Net', column 'all'"):
        NUMBERS.printed("gflops", "table5", "ES-Net")


def test_the_text_against_the_tables() -> None:
    table = NUMBERS.stated_gains().reset_index()
    assert len(table) == 21
    differing = table[table["remark"] != "agrees"].set_index("statement")
    assert differing["printed"].tolist() == [0.4, 11.2, 21.3]
    assert differing["computed"].tolist() == [0.3, 10.8, 13.2]
    yolov3 = table[table["statement"].str.startswith("over YOLOv3")]
    assert yolov3["computed"].tolist() == [21.26] and yolov3["remark"].tolist() == ["agrees"]


def test_what_stands_twice() -> None:
    table = NUMBERS.printed_twice().droplevel("metric")
    assert table["difference"].tolist() == [0, 0, 0, 0, 0.7]
    assert table.loc["hybrid, Table I, and student, Table VI", "of"] == "two models"


def test_points_of_the_audit() -> None:
    points = lines_of("audit/points")
    assert [int(point["point"]) for point in points] == list(range(1, 20))
    words = {word for point in points for word in point["here"].replace(";", " ").replace(",", " ").split()}
    named = {word for word in words if "_" in word}
    assert len(named) >= 4 and all(hasattr(NUMBERS, word) or word in ROWS for word in named)
