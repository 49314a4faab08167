"""D3N's numbers as data, and whether they add up: against values read and worked out by hand."""

from functools import partial

import pytest

from defectlab.verdicts import audit_d3n as arithmetic
from defectlab.verdicts.audit_d3n import printed
from defectlab.verdicts.claims import claims_of
from defectlab.verdicts.tables import printed_table

lines_of = partial(printed_table, "d3n")
TABLES = [f"table{n}" for n in range(1, 8)] + ["text"]
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
COSTS = {"parameters_m", "gflops", "size_mb", "fps"}


# --- The printed numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "row", "values"),
    [
        ("table1", "weighted sum, residual", {"map50": "78.2"}),
        ("table1", "dual self-att", {"map50": "76.3"}),
        ("table2", "Concat + Conv1×1", {"map50": "77.6"}),
        ("table3", "ResVAE, noise filter", {"map50": "78.1"}),
        ("table4", "YOLOv5", {"precision_dev": "82.9", "recall_dev": "82.7", "map50": "89.2", "mask_map50": "85.8"}),
        ("table4", "Proposed", {"recall_dev": "85", "mask_precision_dev": "83", "mask_recall_dev": "81.8"}),
        ("table5", "YOLOv3", {"map50": "56.44", "size_mb": "235.2", "gflops": "54.6", "fps": "37"}),
        ("table5", "PAA, ResNet-101", {"map50": "68.7", "size_mb": "391.9", "gflops": "215", "fps": "9"}),
        ("table5", "YOLOv5-l", {"map50": "78.2", "size_mb": "92.9", "gflops": "109.1", "fps": "41"}),
        ("table5", "RT-DETR-l", {"map50": "76.7", "size_mb": "66.2", "gflops": "110.0", "fps": "84"}),
        ("table5", "Ours", {"map50": "77.7", "size_mb": "14.5", "gflops": "16.5", "fps": "144"}),
        ("table6", "Faster R-CNN, ResNet-34", {"map50": "70.0"}),
        ("table6", "YOLOX-m", {"map50": "75.6"}),
        ("table6", "Ours", {"map50": "79.0"}),
        ("table7", "Dynamic R-CNN, ResNet-101", {"map50": "64.5"}),
        ("table7", "YOLOv8-m", {"map50": "66.8"}),
    ],
)
def test_numbers_stand_as_printed(table: str, row: str, values: dict[str, str]) -> None:
    found = {line["metric"]: line["value"] for line in lines_of(table) if line["row"] == row}
    assert values.items() <= found.items()


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
    assert {("YOLOv5s", "baseline"), ("Ours", "student"), ("SSD, VGG-16", "ssd"), ("CABF-FCOS, ResNet-50", "")} <= keys
    for table in ("table1", "table2", "table3"):
        assert [line["key"] for line in lines_of(table) if line["value"] == "79.0"] == ["hybrid"]


@pytest.mark.parametrize("table", TABLES)
def test_lines_are_complete(table: str) -> None:
    lines = lines_of(table)
    assert len({(line["row"], line["metric"]) for line in lines}) == len(lines)
    for line in lines:
        assert line["column"] == "all" and line["source"]
        assert (line["status"] == "runnable") == bool(line["key"])
        assert line["key"] or line["status"] in ("not run: code", "not run: data")
        assert line["value"] or (line["key"] and not line["not_comparable"])
        if line["value"] and line["key"]:  # levels are not judged; FLOPs follow from the network alone
            assert bool(line["not_comparable"]) == (line["metric"] != "gflops")


def test_sets_that_are_not_at_hand_have_no_key() -> None:
    fabric = [line for line in lines_of("table5") if line["metric"] == "map50"]
    for line in fabric + lines_of("table7"):
        assert (line["status"], line["key"]) == ("not run: data", "")
    assert (len(fabric), len(lines_of("table7"))) == (21, 15)
    assert all(line["key"].startswith("cost_") for line in lines_of("table5") if line["key"])


# --- Claims ----------------------------------------------------------------------------------------------------------


def test_only_the_student_against_its_baseline_is_primary() -> None:
    primary = [claim for claim in claims_of("d3n") if claim["primary"]]
    assert [(x["a"], x["b"], x["metric"], x["printed"]) for x in primary] == [("student", "baseline", "map50", 2.4)]
    assert len({claim["id"] for claim in claims_of("d3n")}) == len(claims_of("d3n")) == 35


def test_claims_compare_rows_of_the_study() -> None:
    every = {"id", "sentence", "place", "kind", "a", "b", "metric", "primary", "rule", "date_set"}
    for claim in claims_of("d3n"):
        assert {claim["a"], claim["b"]} <= ROWS and claim["a"] != claim["b"], claim["id"]
        extra = set(claim) - every
        assert every <= set(claim), claim["id"]
        assert extra in ({"at_most"}, {"at_least"}) if claim["kind"] == "bound" else extra <= {"printed"}, claim["id"]
        assert (claim["kind"] == "bound") == (claim["metric"] in COSTS), claim["id"]
        assert claim["date_set"].isoformat() == "2026-11-21"


def test_printed_gains_of_the_claims_are_differences_of_printed_numbers() -> None:
    lines = [line for table in TABLES for line in lines_of(table)]
    levels = {"baseline_mosaic": "baseline"}  # the paper prints one YOLOv5s, we run two recipes of it
    checked = 0
    for claim in claims_of("d3n"):
        sides = []
        for side in (claim["a"], claim["b"]):
            of_side = [x for x in lines if x["key"] == levels.get(side, side) and x["metric"] == claim["metric"]]
            sides.append({float(x["value"]) for x in of_side if x["value"]})
        if "printed" in claim:  # a row may be printed with several numbers
            assert claim["printed"] in {round(a - b, 1) for a in sides[0] for b in sides[1]}, claim["id"]
            checked += 1
    assert checked == 25


# --- Does it add up? -------------------------------------------------------------------------------------------------


def test_a_number_that_is_not_printed_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"table5\.csv prints no gflops for row 'ES-Net'"):
        printed("table5", "ES-Net", "gflops")


def test_the_text_against_the_tables() -> None:
    table = arithmetic.stated_gains().reset_index()
    assert len(table) == 21
    differing = table[table["remark"] != "agrees"].set_index("statement")
    assert differing["printed"].tolist() == [0.4, 11.2, 21.3]
    assert differing["computed"].tolist() == [0.3, 10.8, 13.2]
    yolov3 = table[table["statement"].str.startswith("over YOLOv3")]
    assert yolov3["computed"].tolist() == [21.26] and yolov3["remark"].tolist() == ["agrees"]


def test_what_stands_twice() -> None:
    table = arithmetic.printed_twice()
    assert table["difference"].tolist() == [0, 0, 0, 0, 0.7]
    assert table.loc["hybrid, Table I, and student, Table VI", "of"] == "two models"
    thirds = arithmetic.third_row_fusion()
    assert thirds["difference"].tolist() == [0.5, 0.7, -0.1, 0.9] and "agrees" not in set(thirds["remark"])


def test_steps_of_the_ablations() -> None:
    steps = arithmetic.fusion_steps()
    assert steps["step"].tolist()[1:] == [-0.9, 0.4, 1.5, 0.4, 0.4]
    assert steps["over_first"].tolist() == [0, -0.9, -0.5, 1.0, 1.4, 1.8]
    components = arithmetic.component_steps()
    assert components["step"].tolist()[1:] == [-3.4, 4.6, 0.3, 0.9]
    assert components["over_yolov5s"].tolist() == [0, -3.4, 1.2, 1.5, 2.4]


def test_cross_attention_alone_is_below_the_plain_fusions() -> None:
    table = arithmetic.fusions()
    assert table["map50"].is_monotonic_decreasing and len(table) == 10
    assert table.loc["cross-attention alone (nothing ticked)", ["over_yolov5s", "over_sum"]].tolist() == [0.6, -0.2]
    assert table.index[table["over_sum"] < 0].tolist() == [
        "cross-attention alone (nothing ticked)",
        "dual self-att, weighted sum",
        "dual self-att",
    ]


def test_precision_falls_in_both_tasks() -> None:
    gains = arithmetic.multitask()["gain"]
    assert gains["precision_dev"] == -0.4 and gains["mask_precision_dev"] == -1.5
    assert gains[gains < 0].index.tolist() == ["precision_dev", "mask_precision_dev"]
    assert gains["recall_dev"] == 2.3 and gains["mask_map50"] == 0.6


def test_gain_on_gc10_cannot_be_computed() -> None:
    gains = arithmetic.gains_over_yolov5s()["gain"]
    assert gains["NEU-DET"] == 2.4 and gains["Tianchi fabric"] == 1.3
    assert gains.isna().sum() == 1 and gains.isna()["GC10-DET"]


def test_methods_at_or_above_the_papers_own() -> None:
    table = arithmetic.ahead_of_ours()
    assert table["difference"].to_dict() == {
        ("NEU-DET", "DDN, ResNet-50"): -3.1,
        ("NEU-DET", "DEA-RetinaNet, ResNet-50"): -0.1,
        ("NEU-DET", "ES-Net"): -0.1,
        ("Tianchi fabric", "YOLOv5-l"): -0.5,
        ("GC10-DET", "PAA, ResNet-101"): -0.1,
    }
    wider = arithmetic.ahead_of_ours(0.3)
    assert set(wider.index) - set(table.index) == {("NEU-DET", "YOLOv8-n")}


def test_only_yolov8_on_neu_det_falls_with_size() -> None:
    order = arithmetic.scales()["with_size"]
    assert order.to_dict() == {
        ("NEU-DET", "YOLOv5"): "rises",
        ("NEU-DET", "YOLOX"): "rises",
        ("NEU-DET", "YOLOv8"): "falls",
        ("Tianchi fabric", "YOLOv5"): "rises",
        ("Tianchi fabric", "YOLOv8"): "rises",
        ("GC10-DET", "YOLOv8"): "rises",
    }


def test_speed_and_size_of_es_net() -> None:
    table = arithmetic.es_net()
    assert table.loc["speed", "ratio"] == 2.57  # 144 / 56
    assert table.loc["Param", "ratio"] == 0.1  # 14.5 / 147.98 = 0.098
    bytes_each = ["ratio", "said"]
    assert table.loc["parameters, ES-Net's at 2 bytes", bytes_each].tolist() == [0.1, 0.1]
    assert table.loc["parameters, ES-Net's at 8 bytes", bytes_each].tolist() == [0.39, 0.1]


def test_param_is_the_size_of_a_file() -> None:
    table = arithmetic.file_sizes()
    yolo = table.index.str.startswith("YOLO")
    assert yolo.sum() == 6 and len(table) == 8
    assert table.loc[yolo, "bytes"].between(2, 2.07).all()
    assert table.loc[~yolo, "bytes_mib"].between(7.95, 8).all()
    assert table.loc["YOLOv5-s", "parameters_m"] == pytest.approx(7.04, abs=0.01)


def test_printed_flops_are_those_of_80_classes() -> None:
    table = arithmetic.model_costs(("YOLOv5-s", "YOLOv5-m", "YOLOv8-s"))  # the others take seconds more
    assert (table["gflops"] - table["gflops_80"]).abs().max() < 0.15
    assert ((table["gflops"] - table["gflops_80"]).abs() < (table["gflops"] - table["gflops_9"]).abs()).all()
    assert table.index[table["size_mb"] < table["size_mb_80"]].tolist() == ["YOLOv5-m"]
    assert (table["size_mb"] > table["size_mb_9"]).all()


def test_points_of_the_audit_name_functions_that_exist() -> None:
    points = lines_of("audit/points")
    assert [int(point["point"]) for point in points] == list(range(1, 20))
    said = " ".join(point["here"] for point in points)
    own = [name for name, value in vars(arithmetic).items() if getattr(value, "__module__", "") == arithmetic.__name__]
    named = [name for name in own if not name.startswith("_") and name in said.replace(",", " ").split()]
    assert len(named) >= 8
    words = [word for point in points for word in point["here"].replace(";", " ").replace(",", " ").split()]
    assert all(hasattr(arithmetic, word) or word in ROWS for word in words if "_" in word)
