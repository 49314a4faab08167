"""What the committed tables of printed numbers and the claims must hold."""

import math

import pytest

from defectlab import runs
from defectlab.data.anomaly import TILE_TYPES
from defectlab.data.detection import DEEP_PCB_CLASSES, NEU_CLASSES
from defectlab.files import project_root
from defectlab.studies import STUDIES, study
from defectlab.verdicts import stats
from defectlab.verdicts.claims import claims_of
from defectlab.verdicts.measured import COSTS, LOWER_IS_BETTER, METRIC_NAMES, UNITS
from defectlab.verdicts.tables import printed_table

# fields of a claim: all kinds have the first; then by kind what it needs and what it may have
EVERY_CLAIM = {"id", "sentence", "place", "kind", "a", "metric", "primary", "rule", "date_set"}
FIELDS = {
    "gain": ({"b"}, {"printed"}),
    "order": ({"b", "types"}, {"printed"}),
    "bound": (set(), {"b", "at_most", "at_least"}),
}
TYPES = {*TILE_TYPES, *("bent", "color", "flip", "scratch"), *NEU_CLASSES, *DEEP_PCB_CLASSES}
PAPERS = project_root() / "results" / "papers"
TABLES = [(name, path.stem) for name in STUDIES for path in sorted((PAPERS / name).glob("*.csv"))]
CLAIMS = [path.parent.name for path in sorted(PAPERS.glob("*/claims.toml"))]


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
        higher = cost.higher_is_better if cost else line["metric"] not in LOWER_IS_BETTER
        assert line["higher_is_better"] == str(higher).lower(), where
        assert line["source"], where
        assert not line["value"] or 0 <= float(line["value"]) <= (math.inf if cost else 100), where
        assert "ours" not in line["row"].lower(), where  # "ours" is this project's
    assert len({(line["row"], line["column"], line["metric"]) for line in lines}) == len(lines)
    keys: dict[tuple[str, str], set[str]] = {}
    for line in lines:
        keys.setdefault((line["row"], line["column"]), set()).update({line["key"]} - {""})
    assert all(len(of_cell) <= 1 for of_cell in keys.values())


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_shows_its_tables_and_known_metrics_each_once(name: str) -> None:
    assert set(study(name).tables) == {path.stem for path in (PAPERS / name).glob("*.csv")}
    shown = [metric for group in study(name).metrics for metric in group]
    assert shown and set(shown) <= set(METRIC_NAMES) and len(set(shown)) == len(shown)


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_are_complete(name: str) -> None:
    claims, rows = claims_of(name), study(name).rows
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
        if one["kind"] == "bound":
            assert ("at_most" in one) != ("at_least" in one), one["id"]
            assert one.get("at_most", one.get("at_least")) > 0, one["id"]
        elif one["primary"]:  # enough seeds for a verdict
            least = 5 if name == "bsdrd" else stats.MIN_SEEDS
            assert all(rows["paper"][side].seeds >= least for side in sides), one["id"]
        if one["kind"] == "order":
            assert one["types"], one["id"]
    assert len({one["id"] for one in claims}) == len(claims)


def test_every_paper_has_claims() -> None:
    assert set(CLAIMS) == {"bsdrd", "yolo_dcf", "d3n", "amam_kd"}
