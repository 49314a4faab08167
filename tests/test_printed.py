"""The committed tables of printed numbers and the claims: complete, in agreement, as read by hand from the papers."""

import math
import tomllib
from functools import partial
from itertools import pairwise

import pytest

from defectlab import runs
from defectlab.data.anomaly import MVTEC_CATEGORIES, TILE_TYPES
from defectlab.data.detection import DEEP_PCB_CLASSES, NEU_CLASSES
from defectlab.files import project_root
from defectlab.studies import STUDIES, study
from defectlab.verdicts import stats
from defectlab.verdicts.audit import PrintedNumbers
from defectlab.verdicts.claims import claims_of
from defectlab.verdicts.measured import COSTS, METRIC_NAMES, UNITS
from defectlab.verdicts.tables import printed_table

# fields of a claim: all kinds have the first; then by kind what it needs and what it may have
EVERY_CLAIM = {"id", "sentence", "place", "kind", "a", "metric", "primary", "rule", "date_set"}
FIELDS = {
    "gain": ({"b"}, {"printed"}),
    "order": ({"b", "types"}, {"printed"}),
    "bound": (set(), {"b", "at_most", "at_least"}),
    "level": (set(), {"at_most", "at_least"}),
}
TYPES = {*TILE_TYPES, *("bent", "color", "flip", "scratch"), *NEU_CLASSES, *DEEP_PCB_CLASSES}
NUMBERS = {name: PrintedNumbers(name) for name in ("d3n", "amam_kd")}
d3n_table, amam_table = (partial(printed_table, name) for name in ("d3n", "amam_kd"))
D3N, AMAM = NUMBERS.values()
D3N_TABLES = [*(f"table{n}" for n in range(1, 8)), "text"]
AMAM_TABLES = [*(f"table{n}" for n in (2, 4, 5, 6, 7, 8, 9, 10, 11)), "audit/table7_originals", "text"]
OWN = "the paper's method"
PAPERS = project_root() / "results" / "papers"
TABLES = [(name, path.stem) for name in STUDIES for path in sorted((PAPERS / name).glob("*.csv"))]
_LOWER = """mae mae_nonempty crop_share noise_error unexplained parameters_m gflops size_mb latency_ms windows
false_alarms f1_regret missed_at_5 duplicates duplicates_all candidates candidates_all copies copies_held_out
windows_seen gflops_image"""
LOWER_IS_BETTER = set(_LOWER.split())


@pytest.mark.parametrize(("name", "table"), TABLES)
def test_every_printed_line_is_a_row_or_says_why_not(name: str, table: str) -> None:
    rows, lines = study(name).rows, printed_table(name, table)
    assert lines
    for number, line in enumerate(lines, 2):
        where = f"{table}.csv:{number}"
        if line["key"]:
            assert all(line["key"] in rows[profile] for profile in runs.PROFILES), where
            assert line["status"] == "runnable", where
        else:
            assert line["status"] in {f"not run: {why}" for why in ("data", "weights", "code")}, where
        assert line["metric"] in METRIC_NAMES, where
        cost = COSTS.get(line["metric"])
        assert line["unit"] == (cost.unit if cost else UNITS.get(line["metric"], "%")), where
        assert line["higher_is_better"] == str(line["metric"] not in LOWER_IS_BETTER).lower(), where
        assert line["source"], where
        assert not line["value"] or 0 <= float(line["value"]) <= (math.inf if cost else 100), where
        assert "ours" not in line["row"].lower(), where  # "ours" is this project's
    assert len({(line["row"], line["column"], line["metric"]) for line in lines}) == len(lines)
    keys: dict[tuple[str, str], set[str]] = {}
    for line in lines:
        keys.setdefault((line["row"], line["column"]), set()).update({line["key"]} - {""})
    assert all(len(of_cell) <= 1 for of_cell in keys.values())


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_shows_its_tables_rows_and_known_metrics_each_once(name: str) -> None:
    assert set(study(name).tables) == {path.stem for path in (PAPERS / name).glob("*.csv")}
    keys = {line["key"] for paper, table in TABLES if paper == name for line in printed_table(name, table)} - {""}
    assert all(set(rows) == keys for rows in study(name).rows.values())
    shown = [metric for group in study(name).metrics for metric in group]
    assert shown and set(shown) <= set(METRIC_NAMES) and len(set(shown)) == len(shown)


@pytest.mark.parametrize(
    "name", ["bsdrd", "yolo_dcf", "d3n", "amam_kd", "windows", "rebuild", "cures", "v8_v10", "ten_pictures", "stages"]
)
def test_claims_are_complete(name: str) -> None:
    claims, rows = claims_of(name), study(name).rows
    quick = tomllib.loads((PAPERS / name / "claims.toml").read_text())["quick"]
    assert "at quick scale" in quick["rule"] and quick["date_set"].isoformat() >= "2026-11-29"
    for one in claims:
        needed, optional = FIELDS[one["kind"]]
        assert EVERY_CLAIM | needed <= set(one) <= EVERY_CLAIM | needed | optional, one["id"]
        sides = [one[side] for side in ("a", "b") if side in one]
        assert all(side in rows[profile] for side in sides for profile in runs.PROFILES), one["id"]
        assert len(set(sides)) == len(sides), one["id"]
        assert one["metric"] in METRIC_NAMES, one["id"]
        assert isinstance(one["primary"], bool), one["id"]
        assert one["date_set"].isoformat() > "2026", one["id"]
        assert all(one[field].strip() for field in ("sentence", "place", "rule")), one["id"]
        assert one.get("printed", 1) > 0, one["id"]
        assert set(one.get("types", ())) <= TYPES, one["id"]
        assert (one["kind"] == "bound") == (one["metric"] in COSTS), one["id"]
        if one["kind"] in ("bound", "level"):
            assert ("at_most" in one) != ("at_least" in one), one["id"]
            assert one.get("at_most", one.get("at_least")) > 0, one["id"]
        if one["primary"] and one["kind"] != "bound":  # enough seeds for a verdict
            least = 5 if name == "bsdrd" else stats.MIN_SEEDS
            assert all(rows["paper"][side].seeds >= least for side in sides), one["id"]
        if one["kind"] == "order":
            assert one["types"], one["id"]
    assert len({one["id"] for one in claims}) == len(claims)


@pytest.mark.parametrize(
    ("study_name", "table", "row", "values"),
    [
        ("d3n", "table1", "weighted sum, residual", {"map50": 78.2}),
        ("d3n", "table2", "Concat + Conv1×1", {"map50": 77.6}),
        ("d3n", "table3", "ResVAE, noise filter", {"map50": 78.1}),
        ("d3n", "table4", "YOLOv5", {"precision_dev": 82.9, "recall_dev": 82.7, "map50": 89.2, "mask_map50": 85.8}),
        ("d3n", "table4", "Proposed", {"recall_dev": 85, "mask_precision_dev": 83, "mask_recall_dev": 81.8}),
        ("d3n", "table5", "YOLOv3", {"map50": 56.44, "size_mb": 235.2, "gflops": 54.6, "fps": 37}),
        ("d3n", "table5", "RT-DETR-l", {"map50": 76.7, "size_mb": 66.2, "gflops": 110.0, "fps": 84}),
        ("d3n", "table5", OWN, {"map50": 77.7, "size_mb": 14.5, "gflops": 16.5, "fps": 144}),
        ("d3n", "table6", OWN, {"map50": 79.0}),
        ("d3n", "table7", "YOLOv8-m", {"map50": 66.8}),
        ("amam_kd", "table2", "6, 10, 14, 18; nut", {"miou": 96.0, "accuracy": 98.2, "latency_ms": 36.0}),
        ("amam_kd", "table4", "ORCNet; nut", {"mae": 0.2, "dice": 87.8, "miou": 93.7, "weighted_f": 94.3}),
        ("amam_kd", "table4", "DeepLabV3+; defect", {"mae": 0.3, "dice": 91.7, "s_measure": 98.1, "e_measure": 99.3}),
        ("amam_kd", "table5", "Baseline; defect", {"miou": 91.4}),
        ("amam_kd", "table6", "20 %, without AMAM; nut", {"miou": 90.1}),
        ("amam_kd", "table6", "50 %, with AMAM, equal steps; defect", {"miou": 95.2}),
        ("amam_kd", "table8", "Swin Transformer", {"image_auroc": 92.4, "pixel_auroc": 92.7}),
        ("amam_kd", "table9", "Pre + MFF + Res", {"image_auroc": 93.6, "pixel_auroc": 97.9}),
        ("amam_kd", "text", "homogeneous student", {"pixel_auroc": 95.2}),
        ("amam_kd", "text", "two stages", {"pixel_auroc": 98.5, "pixel_auroc_crop": 98.5}),
    ],
)
def test_numbers_stand_as_printed(study_name: str, table: str, row: str, values: dict[str, float]) -> None:
    lines = [line for line in printed_table(study_name, table) if line["row"] == row]
    assert values.items() <= {line["metric"]: float(line["value"] or "nan") for line in lines}.items()


OBJECTS = {  # Tables 10 and 11 of amam_kd: printed for the mean over objects, which no run has as its key
    ("cosine_better", "a"): ("table10", "cosine similarity"),
    ("cosine_better", "b"): ("table10", "MSE"),
    ("l2_is_mse", "a"): ("table10", "L2"),
    ("l2_is_mse", "b"): ("table10", "MSE"),
    ("weighting", "a"): ("table11", "1 × 1"),
    ("weighting", "b"): ("table11", "no convolution"),
}
LEVELS = {"baseline_mosaic": "baseline"}  # D3N prints one YOLOv5s, of which this study runs two recipes


@pytest.mark.parametrize(("name", "count"), [("d3n", 25), ("amam_kd", 24)])
def test_printed_gains_of_the_claims_are_differences_of_printed_numbers(name: str, count: int) -> None:
    lines = [line for paper, table in TABLES if paper == name for line in printed_table(name, table)]

    def printed(claim: dict, side: str) -> set[float]:
        if (claim["id"], side) in OBJECTS:
            return {NUMBERS[name].printed("pixel_auroc", *OBJECTS[claim["id"], side], "objects_average")}
        wanted = LEVELS.get(claim[side], claim[side]), claim["metric"]
        return {float(x["value"]) for x in lines if (x["key"], x["metric"]) == wanted and x["value"]}

    claims = [claim for claim in claims_of(name) if "printed" in claim]
    for claim in claims:  # a row may be printed with several numbers
        gains = {round(a - b, 1) for a in printed(claim, "a") for b in printed(claim, "b")}
        assert claim["printed"] in gains, claim["id"]
    assert len(claims) == count


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("d3n", ("gflops", "table5", "ES-Net"), r"d3n/table5\.csv prints no gflops for row 'ES-Net', column 'all'"),
        ("amam_kd", ("pixel_auroc", "table7", "PatchCore 1 % (added)", "tile"), r"table7\.csv prints no pixel_auroc"),
    ],
)
def test_a_number_that_is_not_printed_is_an_error(name: str, asked: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NUMBERS[name].printed(*asked)


@pytest.mark.parametrize(
    ("name", "primary"),
    [
        ("d3n", {"student_better"}),
        ("amam_kd", {"two_stage_better", "amam_at_ten_per_cent_nut", "amam_at_ten_per_cent_defect"}),
    ],
)
def test_which_claims_are_primary(name: str, primary: set[str]) -> None:
    assert {claim["id"] for claim in claims_of(name) if claim["primary"]} == primary


# --- D3N, worked out by hand ------------------------------------------------------------------------------------------


def test_d3n_every_printed_number_is_there() -> None:
    """Rows of the paper's tables, and their sums as added up by hand."""
    found = {table: [float(line["value"]) for line in d3n_table(table) if line["value"]] for table in D3N_TABLES}
    counts = {table: len(values) for table, values in found.items()}
    # Table V: 21 rows of four numbers; Sparse R-CNN has two of them, ES-Net three
    assert counts == dict(zip(D3N_TABLES, (6, 4, 4, 12, 81, 22, 15, 0), strict=True))
    sums = {table: round(sum(found[table]), 1) for table in ("table1", "table2", "table3", "table4", "table7")}
    assert sums == {"table1": 466.0, "table2": 312.2, "table3": 308.1, "table4": 1013.2, "table7": 982.1}


def test_d3n_keys_stand_at_the_rows_that_they_name() -> None:
    keys = {(line["row"], line["key"]) for line in d3n_table("table6")}
    assert {("YOLOv5s", "baseline"), (OWN, "student"), ("SSD, VGG-16", "ssd"), ("CABF-FCOS, ResNet-50", "")} <= keys
    for table in ("table1", "table2", "table3"):
        assert [line["key"] for line in d3n_table(table) if line["value"] == "79.0"] == ["hybrid"]


@pytest.mark.parametrize("table", D3N_TABLES)
def test_d3n_levels_are_not_judged_and_flops_are(table: str) -> None:
    for line in d3n_table(table):
        assert line["value"] or (line["key"] and not line["not_comparable"])
        if line["value"] and line["key"]:  # FLOPs follow from the network alone
            assert bool(line["not_comparable"]) == (line["metric"] != "gflops")


def test_d3n_sets_that_are_not_at_hand_have_no_key() -> None:
    fabric = [line for line in d3n_table("table5") if line["metric"] == "map50"]
    assert {(line["status"], line["key"]) for line in fabric + d3n_table("table7")} == {("not run: data", "")}
    assert (len(fabric), len(d3n_table("table7"))) == (21, 15)
    assert all(line["key"].startswith("cost_") for line in d3n_table("table5") if line["key"])


def test_d3n_the_text_against_the_tables() -> None:
    table = D3N.stated_gains().reset_index()
    assert len(table) == 21
    differing = table[table["remark"] != "agrees"].set_index("statement")
    assert differing["printed"].tolist() == [0.4, 11.2, 21.3]
    assert differing["computed"].tolist() == [0.3, 10.8, 13.2]
    yolov3 = table[table["statement"].str.startswith("over YOLOv3")]
    assert yolov3["computed"].tolist() == [21.26] and yolov3["remark"].tolist() == ["agrees"]


def test_d3n_what_stands_twice() -> None:
    table = D3N.printed_twice().droplevel("metric")
    assert table["difference"].tolist() == [0, 0, 0, 0, 0.7]
    assert table.loc["hybrid, Table I, and student, Table VI", "of"] == "two models"


def test_d3n_points_of_the_audit() -> None:
    points = d3n_table("audit/points")
    assert [int(point["point"]) for point in points] == list(range(1, 20))
    words = {word for point in points for word in point["here"].replace(";", " ").replace(",", " ").split()}
    rows = study("d3n").rows["paper"]
    named = {word for word in words if "_" in word}
    assert len(named) >= 4 and all(hasattr(D3N, word) or word in rows for word in named)


# --- AMAM and distillation, worked out by hand ------------------------------------------------------------------------


def test_amam_kd_means_over_categories_have_columns_of_their_own_and_no_key() -> None:
    for line in (line for table in ("table7", "table10", "table11") for line in amam_table(table)):
        if line["column"].endswith("average"):
            assert line["value"] and not line["key"] and "a mean over" in line["not_comparable"]
    for *place, value in (
        ("table7", "PaDiM", "total_average", 97.4),
        ("table7", "CutPaste", "screw", 96.6),
        ("table10", "L1", "objects_average", 95.2),
        ("table11", "5 × 5", "textures_average", 97.4),
    ):
        assert AMAM.printed("pixel_auroc", *place) == value


@pytest.mark.parametrize("table", AMAM_TABLES)
def test_amam_kd_no_printed_level_is_judged_and_each_says_why(table: str) -> None:
    lines = amam_table(table)
    assert all(line["not_comparable"] for line in lines if line["value"] and line["key"])
    assert any(line["value"] for line in lines)


@pytest.mark.parametrize("table", ["table2", "table4", "table5", "table6"])
def test_amam_kd_both_targets_have_the_same_rows_and_the_same_printed_numbers(table: str) -> None:
    of = {"nut": {}, "defect": {}}
    for line in amam_table(table):
        row, target = line["row"].rsplit("; ", 1)
        assert not line["key"] or line["key"].endswith(f"_{target}")
        of[target][row, line["metric"]] = line["value"]
    assert of["nut"] == of["defect"] and of["nut"]


def test_amam_kd_the_printed_sizes_follow_on_each_other() -> None:
    for name, length in (("audit/shapes1", 11), ("audit/shapes3", 5)):
        lines = amam_table(name)
        assert len(lines) == length
        assert all(a["output"] == b["input"] for a, b in pairwise(lines))
        assert (lines[0]["input"], lines[-1]["output"]) == ("256x256x3", "256x256x1")
    assert amam_table("audit/shapes1")[5]["output"] == "16x16x512"  # AMAM
    assert amam_table("audit/shapes3")[1]["output"] == "16x16x2048"  # the teacher


def test_amam_kd_stated_gains() -> None:
    table = AMAM.stated_gains().reset_index().set_index("printed")
    assert table.loc[14.9, ["computed", "relative"]].tolist() == [11.9, 14.46]
    assert table.loc[[1.5, 2.1], "computed"].tolist() == [1.9, 1.3]
    assert set(table.index[table["remark"] == "agrees"]) == {1.7, 2.2, 3.1, 4.8}
    mious = AMAM.column("miou", "table5").values()
    assert len(mious) == 6 and 2.1 not in {round(a - b, 1) for a in mious for b in mious}


def test_amam_kd_what_stands_twice() -> None:
    table = AMAM.printed_twice()["difference"]
    for *place, difference in (
        ("full model, Tables 4 and 5", "miou", 0.2),  # 96.4 in the abstract, 96.2 in Table 5
        ("U-Net, Tables 4 and 5", "miou", 1.0),
        ("full method, Tables 8 and 9", "image_auroc", -0.2),
        ("full method, Tables 8 and 9", "pixel_auroc", 0),
        ("full method, textures_average, Tables 7 and 11", "pixel_auroc", 0.1),
        ("metal nut, sections 4.3 and 4.2.2", "pixel_auroc", -0.5),
    ):
        assert table[tuple(place)] == difference


def test_amam_kd_rows_and_columns_as_printed() -> None:
    own = AMAM.row("pixel_auroc", "table7", OWN)
    assert len(own) == 18 and sum(own[c] for c in MVTEC_CATEGORIES) / 15 == pytest.approx(98.15, abs=0.005)
    assert list(AMAM.column("dice", "table4"))[-1] == OWN  # each once, though two targets print it
