"""What the committed tables of printed numbers and the claims must hold."""

import csv
import tomllib
from pathlib import Path

import pytest

from defectlab import runs
from defectlab.data.anomaly import TILE_TYPES
from defectlab.data.store import project_root
from defectlab.papers import bsdrd
from defectlab.report import METRIC_NAMES
from defectlab.studies import STUDIES, study

PAPERS = project_root() / "results" / "papers"
TABLES = [(name, path) for name in STUDIES for path in sorted((PAPERS / name).glob("*.csv"))]


@pytest.mark.parametrize(("name", "path"), TABLES, ids=lambda x: x.stem if isinstance(x, Path) else x)
def test_every_printed_line_is_a_row_or_says_why_not(name: str, path: Path) -> None:
    rows = study(name).ROWS
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines
    for number, line in enumerate(lines, 2):
        where = f"{path.name}:{number}"
        if line["key"]:
            assert all(line["key"] in rows[profile] for profile in runs.PROFILES), where
            assert line["status"] == "runnable", where
        else:
            assert line["status"] in {f"not run: {why}" for why in ("data", "weights", "code")}, where
        assert line["metric"] in METRIC_NAMES, where
        assert line["unit"] == "%", where
        assert line["higher_is_better"] == "true", where
        assert line["source"], where
        assert not line["value"] or 0 <= float(line["value"]) <= 100, where
    assert len({(line["row"], line["column"], line["metric"]) for line in lines}) == len(lines)
    assert all(len({line["key"] for line in lines if line["row"] == row}) == 1 for row in {x["row"] for x in lines})


@pytest.mark.parametrize("name", STUDIES)
def test_every_table_of_a_study_is_there(name: str) -> None:
    assert set(study(name).TABLES) == {path.stem for path in (PAPERS / name).glob("*.csv")}


CLAIMS = sorted(PAPERS.glob("*/claims.toml"))


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.parent.name)
def test_claims_are_complete(path: Path) -> None:
    claims = tomllib.loads(path.read_text())["claim"]
    rows = study(path.parent.name).ROWS
    for one in claims:
        for side in (one["a"], one["b"]):
            assert all(side in rows[profile] for profile in runs.PROFILES), one["id"]
        assert one["a"] != one["b"], one["id"]
        assert one["metric"] in METRIC_NAMES, one["id"]
        assert one["kind"] in ("level", "gain", "order"), one["id"]
        assert isinstance(one["primary"], bool), one["id"]
        assert one["date_set"].isoformat() > "2026", one["id"]
        assert all(one[field].strip() for field in ("sentence", "place", "rule")), one["id"]
        assert bool(one.get("types")) == (one["kind"] == "order"), one["id"]
        assert set(one.get("types", ())) <= set(TILE_TYPES), one["id"]
    assert len({one["id"] for one in claims}) == len(claims)


def test_primary_claims_of_bsdrd_are_planned_with_enough_seeds() -> None:
    assert PAPERS / "bsdrd" / "claims.toml" in CLAIMS
    for one in tomllib.loads((PAPERS / "bsdrd" / "claims.toml").read_text())["claim"]:
        if one["primary"]:
            assert all(bsdrd.planned_seeds(side, "paper") >= 5 for side in (one["a"], one["b"]))
