"""What the committed tables of printed numbers and the claims must hold."""

import math
from pathlib import Path

import pytest

from defectlab import runs
from defectlab.data.anomaly import TILE_TYPES
from defectlab.data.detection import DEEP_PCB_CLASSES, NEU_CLASSES, PKU_CLASSES
from defectlab.files import project_root
from defectlab.studies import STUDIES, study
from defectlab.studies.bsdrd import planned_seeds
from defectlab.verdicts import stats
from defectlab.verdicts.claims import claims_of
from defectlab.verdicts.measured import COSTS, LOWER_IS_BETTER, METRIC_NAMES, UNITS, metric_groups
from defectlab.verdicts.tables import printed_table

# fields of a claim: all kinds have the first; then by kind what it needs and what it may have
EVERY_CLAIM = {"id", "sentence", "place", "kind", "a", "metric", "primary", "rule", "date_set"}
FIELDS = {
    "gain": ({"b"}, {"printed"}),
    "order": ({"b", "types"}, {"printed"}),
    "bound": (set(), {"b", "at_most", "at_least"}),
}
NUT_TYPES = ("bent", "color", "flip", "scratch")
PAPERS = project_root() / "results" / "papers"
TABLES = [(name, path) for name in STUDIES for path in sorted((PAPERS / name).glob("*.csv"))]


@pytest.mark.parametrize(("name", "path"), TABLES, ids=lambda x: x.stem if isinstance(x, Path) else x)
def test_every_printed_line_is_a_row_or_says_why_not(name: str, path: Path) -> None:
    rows = study(name).ROWS
    lines = printed_table(name, path.stem)
    assert lines
    for number, line in enumerate(lines, 2):
        where = f"{path.name}:{number}"
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
    assert len({(line["row"], line["column"], line["metric"]) for line in lines}) == len(lines)
    cells = {(line["row"], line["column"]) for line in lines}
    keys = [{x["key"] for x in lines if (x["row"], x["column"]) == cell} - {""} for cell in cells]
    assert all(len(of_cell) <= 1 for of_cell in keys)


@pytest.mark.parametrize("name", STUDIES)
def test_every_table_of_a_study_is_there(name: str) -> None:
    assert set(study(name).TABLES) == {path.stem for path in (PAPERS / name).glob("*.csv")}


CLAIMS = sorted(PAPERS.glob("*/claims.toml"))


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.parent.name)
def test_claims_are_complete(path: Path) -> None:
    claims, module = claims_of(path.parent.name), study(path.parent.name)
    types = {name for names in (TILE_TYPES, NUT_TYPES, NEU_CLASSES, DEEP_PCB_CLASSES, PKU_CLASSES) for name in names}
    for one in claims:
        assert one["kind"] in FIELDS, one["id"]
        needed, optional = FIELDS[one["kind"]]
        assert EVERY_CLAIM | needed <= set(one) <= EVERY_CLAIM | needed | optional, one["id"]
        sides = [one[side] for side in ("a", "b") if side in one]
        assert all(side in module.ROWS[profile] for side in sides for profile in runs.PROFILES), one["id"]
        assert len(set(sides)) == len(sides), one["id"]
        assert one["metric"] in METRIC_NAMES, one["id"]
        assert isinstance(one["primary"], bool), one["id"]
        assert one["date_set"].isoformat() > "2026", one["id"]
        assert all(one[field].strip() for field in ("sentence", "place", "rule")), one["id"]
        assert one.get("printed", 1) > 0, one["id"]
        assert set(one.get("types", ())) <= types, one["id"]
        assert (one["kind"] == "bound") == (one["metric"] in COSTS), one["id"]
        if one["kind"] == "bound":
            assert ("at_most" in one) != ("at_least" in one), one["id"]
            assert one.get("at_most", one.get("at_least")) > 0, one["id"]
        if one["kind"] == "order":
            assert one["types"], one["id"]
    assert len({one["id"] for one in claims}) == len(claims)


@pytest.mark.parametrize("name", STUDIES)
def test_metrics_of_a_study_are_known_and_each_is_shown_once(name: str) -> None:
    shown = [metric for group in metric_groups(study(name)) for metric in group]
    assert shown
    assert set(shown) <= set(METRIC_NAMES)
    assert len(set(shown)) == len(shown)


def test_primary_claims_get_enough_seeds_for_a_verdict() -> None:
    for path in CLAIMS:
        seeds = study(path.parent.name).planned_seeds
        for one in claims_of(path.parent.name):
            if one["primary"] and one["kind"] != "bound":
                assert all(seeds(one[side], "paper") >= stats.MIN_SEEDS for side in ("a", "b")), one["id"]


def test_primary_claims_of_bsdrd_are_planned_with_enough_seeds() -> None:
    assert PAPERS / "bsdrd" / "claims.toml" in CLAIMS
    for one in claims_of("bsdrd"):
        if one["primary"]:
            assert all(planned_seeds(side, "paper") >= 5 for side in (one["a"], one["b"]))
