"""The table of the field's systems: no gap, and every line says what its records say."""

import pandas as pd
import pytest

from defectlab.files import project_root
from defectlab.studies import STUDIES, study
from defectlab.verdicts import systems as module
from defectlab.verdicts import tables
from defectlab.verdicts.claims import claims_of
from defectlab.verdicts.measured import METRIC_NAMES
from defectlab.verdicts.page import parts_of
from defectlab.verdicts.systems import systems, systems_table


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return systems_table(tables.record_store("recorded"))


@pytest.mark.parametrize("line", systems(), ids=lambda line: line["system"])
def test_every_system_has_a_row_or_a_reason(line: dict[str, str]) -> None:
    if not line["row"]:
        assert line["reason"].startswith("not run: ")
        return
    assert line["row"] in study(line["study"]).rows["quick"]
    assert line["metric"] in METRIC_NAMES
    assert list((project_root() / "notebooks").glob(f"{line['notebook']}_*.ipynb"))
    known = {claim["id"]: claim for claim in claims_of(line["study"])}
    if line["claim"]:
        claim = known[line["claim"]]
        assert line["row"] in (claim["a"], claim.get("b")), "the claim compares other rows"


def test_every_study_of_the_history_is_in_it() -> None:
    history = {"windows", "stages", "v8_v10", "rebuild", "ten_pictures", "cures"}
    assert {line["study"] for line in systems()} - {""} == history <= set(STUDIES)


def test_the_table_has_no_gap(table: pd.DataFrame) -> None:
    assert len(table) == len(systems())
    assert (table["outcome"] != "").all() and (table["system"] != "").all()
    told = table.set_index("system")
    assert told.loc["YOLOv9", "outcome"].startswith("not run: code")
    assert told.loc["YOLOv8", "recorded"].startswith("mAP50 66.9 ")
    assert told.loc["YOLOv8", "recorded"].endswith("(quick, NEU-DET)")


def test_a_row_without_records_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"when": "", "system": "x", "study": "v8_v10", "row": "many", "metric": "map50", "claim": "", "reason": ""}
    monkeypatch.setattr(module, "systems", lambda: [line | {"notebook": "52"}])
    nothing = tables.RecordStore("recorded", [], [])
    (told,) = systems_table(nothing).to_dict("records")
    assert (told["recorded"], told["outcome"], told["since"]) == ("not run yet", "no claim", "–")


@pytest.mark.parametrize("name", ["stages", "v8_v10"])
def test_the_page_lacks_no_part_of_a_study_of_boxes(name: str) -> None:
    """Records of frames keep images of another form than those of a detector."""
    parts = parts_of(name, "recorded", lambda: tables.record_store("recorded"))
    assert "The hardest images" in {part.caption for part in parts}
    assert [part.problem for part in parts if part.problem] == []
