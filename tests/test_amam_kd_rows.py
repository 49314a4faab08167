"""The rows of the two-stage paper's study: what each profile runs, and how often."""

from collections.abc import Mapping
from typing import Any

import pytest

from defectlab.files import DataError
from defectlab.papers.amam_kd.two_stage import TwoStageSettings
from defectlab.studies import Row, amam_kd


def settings_by_name(rows: Mapping[str, Row]) -> dict[str, Any]:
    return {name: row.settings for name, row in rows.items()}


def test_rows_are_the_same_in_every_profile() -> None:
    smoke, quick, paper = (list(amam_kd.STUDY.rows[profile]) for profile in ("smoke", "quick", "paper"))
    assert smoke == quick == paper
    assert set(amam_kd.PRIMARY) | set(amam_kd.OPTIONAL) <= set(paper)


@pytest.mark.parametrize(("profile", "most"), [("smoke", 1), ("quick", 3), ("paper", 5)])
def test_the_primary_claims_get_most_seeds(profile: str, most: int) -> None:
    seeds = {name: row.seeds for name, row in amam_kd.STUDY.rows[profile].items()}
    assert all(seeds[name] == most for name in ("two_stage", "kd_metal_nut", "amam_10_nut", "gates_10_defect"))
    assert most < 5 or all(seeds[name] < most for name in ("amam_10_steps_nut", "amam_nut", "gates_nut", "kd_l1"))


def test_two_stages_use_the_rows_of_their_stages() -> None:
    for rows in map(settings_by_name, amam_kd.STUDY.rows.values()):
        two, leaky = rows["two_stage"], rows["two_stage_paper_split"]
        assert isinstance(two, TwoStageSettings)
        assert (two.segmenter, two.detector) == (rows["nut_from_good"], rows["kd_metal_nut"])
        assert (two.segmenter.split, leaky.segmenter) == ("good", rows["amam_nut"])


def test_rows_without_amam_differ_in_nothing_else() -> None:
    for rows in map(settings_by_name, amam_kd.STUDY.rows.values()):
        for share in ("", "_10", "_20_steps"):
            with_it, without = rows[f"amam{share}_nut"], rows[f"gates{share}_nut"]
            assert (with_it.amam, without.amam) == (True, False)
            assert (with_it.share, with_it.skips) == (without.share, without.skips)


def test_categories_that_are_not_here_are_not_present(monkeypatch: pytest.MonkeyPatch) -> None:
    def data_fingerprint(dataset: str) -> str:
        if dataset not in ("mvtec_ad/metal_nut", "mvtec_ad/screw"):
            raise DataError("not here")
        return "d"

    monkeypatch.setattr(amam_kd.baselines, "data_fingerprint", data_fingerprint)
    monkeypatch.setattr(amam_kd.baselines, "weights_fingerprint", lambda teacher: "w")
    assert amam_kd.present("quick") == ["metal_nut", "screw"]
    assert amam_kd.present("smoke") == ["metal_nut"]  # the synthetic one
