"""Findings: sentences filled in from records, said only under their condition."""

from pathlib import Path

import pytest
from toy_records import Project, toy_study

from defectlab.studies import STUDIES
from defectlab.verdicts import findings as module
from defectlab.verdicts.claims import claims_of
from defectlab.verdicts.findings import findings, said
from defectlab.verdicts.generated import papers_of
from defectlab.verdicts.tables import judge_claims, record_store

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize("name", STUDIES)
def test_every_committed_finding_holds_and_is_told_somewhere(name: str) -> None:
    found = findings(name)
    assert [one.text for one in found if not one.holds] == []
    numbers = {number for one in found for number in one.notebooks}
    missing = [n for n in numbers if not list(NOTEBOOKS.glob(f"{n}_*.ipynb"))]
    assert not missing and all(one.notebooks for one in found)


def test_readme_shows_few_findings_and_every_paper() -> None:
    """Four of the papers and their baselines, three of the field's history; what was tested are claims of the study."""
    assert sum(one.readme for name in STUDIES for one in findings(name)) == 4 + 3
    papers = [(name, paper) for name in STUDIES for paper in papers_of(name)]
    assert len(papers) == 4 + 6
    for name, paper in papers:
        known = {claim["id"] for claim in claims_of(name)}
        assert {one["claim"] for one in paper["tested"]} <= known and set(paper) == {
            "title",
            "source",
            "notebook",
            "tested",
        }


def test_what_readme_says_in_short_is_so() -> None:
    """No claim of the four papers that its table shows is supported."""
    store = record_store("recorded")
    for name in ("bsdrd", "yolo_dcf", "d3n", "amam_kd"):
        shown = {one["claim"] for paper in papers_of(name) for one in paper["tested"]}
        judged = [one for one in judge_claims(name, store) if one.claim["id"] in shown]
        assert judged and not [one.claim["id"] for one in judged if one.verdict.startswith(("supports", "reproduced"))]


def test_one_seed_among_several_is_marked(toy: Project, one_finding) -> None:
    write(toy, "rd4ad", {"image_auroc": (77.0, 79.0), "aupro": (66.0, 68.0)}, "quick")
    write(toy, "bsdrd", {"image_auroc": (75.0,), "aupro": (60.0,)}, "quick")
    found = one_finding("{rd4ad.image_auroc:.1f} and {bsdrd.lowest.image_auroc:.1f}", "rd4ad.aupro > bsdrd.aupro")
    assert found.holds and found.text == "78.0 and 75.0¹ [quick, 2 seeds; ¹ one seed]"


def test_a_sentence_may_name_what_was_timed(toy: Project, one_finding) -> None:
    toy.write_timings({"rd4ad": 20.0, "bsdrd": 30.0})
    found = one_finding("{timed[bsdrd].latency_ms:.0f} ms.", "timed['bsdrd'].ratio[0] > 1.4")
    assert found.holds and found.text == "30 ms."


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    study = toy_study("rd4ad", "bsdrd", metrics=(("image_auroc", "aupro"),))
    return Project(tmp_path, monkeypatch, study, "")


def write(toy: Project, name: str, metrics: dict[str, tuple[float, ...]], profile: str) -> None:
    for seed, values in enumerate(zip(*metrics.values(), strict=True)):
        toy.write_record(name, seed, {}, profile, metrics=dict(zip(metrics, values, strict=True)))


@pytest.fixture
def one_finding(toy: Project):
    def put(text: str, when: str = "rd4ad.aupro > 60"):
        path = toy.root / "results" / "papers" / "toy" / "findings.toml"
        path.write_text(f'[[finding]]\ntext = """{text}"""\nwhen = """{when}"""\nnotebooks = ["20"]\n')
        (found,) = findings("toy")
        return found

    return put


def test_a_sentence_is_filled_in_and_says_its_scale(toy: Project, one_finding) -> None:
    write(toy, "rd4ad", {"image_auroc": (77.0, 79.0), "aupro": (66.0, 68.0)}, "quick")
    found = one_finding("RD4AD reaches {rd4ad.image_auroc:.1f}\n here.")
    assert found.holds and found.text == "RD4AD reaches 78.0 here. [quick, 2 seeds]"
    assert said("toy", "20").data.splitlines()[0] == f"- {found.text}" and "- " not in said("toy", "21").data
    assert "Cost: 2 recorded quick runs" in said("toy", "20").data


def test_a_sentence_may_name_the_extreme_seeds(toy: Project, one_finding) -> None:
    write(toy, "rd4ad", {"image_auroc": (77.0, 79.0), "aupro": (66.0, 68.0)}, "quick")
    text = one_finding("from {rd4ad.lowest.aupro:.0f} to {rd4ad.highest.aupro:.0f}").text
    assert text == "from 66 to 68 [quick, 2 seeds]"


def test_a_sentence_whose_condition_no_longer_holds_is_not_said(toy: Project, one_finding) -> None:
    write(toy, "rd4ad", {"image_auroc": (77.0,), "aupro": (50.0,)}, "quick")
    assert not one_finding("RD4AD finds {rd4ad.aupro:.0f}.").holds and "finds" not in said("toy", "20").data


@pytest.mark.parametrize("text", ["{other.aupro}", "{bsdrd.aupro}", "{rd4ad.map50}", "{rd4ad[crack].aupro}"])
def test_what_is_not_there_is_named(toy: Project, one_finding, text: str) -> None:
    write(toy, "rd4ad", {"image_auroc": (77.0,), "aupro": (66.0,)}, "quick")
    with pytest.raises(ValueError, match=r"findings\.toml, finding 1: "):
        one_finding(text)


def test_conditions_know_types_and_spreads() -> None:
    rows = {name: module.RowValues(name, [type("R", (), {"per_class": kinds})()]) for name, kinds in KINDS.items()}
    assert module.all_below(rows["low"], rows["high"], "iou") and not module.all_below(rows["high"], rows["low"], "iou")
    both = module.RowValues("both", [*rows["low"].records, *rows["high"].records])
    assert module.spread(both, "bent", "iou") == 5.0


KINDS = {"low": {"bent": {"iou": 1.0}, "flip": {"iou": 2.0}}, "high": {"bent": {"iou": 6.0}, "flip": {"iou": 3.0}}}
