"""The rows of notebook 51: what differs between them, and what tables and claims read of their records."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest

from defectlab import runs
from defectlab.metrics.stages import recalls
from defectlab.studies import detector, stages
from defectlab.verdicts.claims import claims_of, measured_text
from defectlab.verdicts.measured import image_statistic, within

RECIPE = {"dataset", "size", "batch", "optimizer", "learning_rate", "mosaic", "average_ramp", "flip_up_down"}


def differing(a: object, b: object) -> set[str]:
    return {one.name for one in fields(a) if getattr(a, one.name) != getattr(b, one.name)}


@pytest.fixture(params=runs.PROFILES)
def settings(request: pytest.FixtureRequest) -> dict:
    return {name: row.settings for name, row in stages.STUDY.rows[request.param].items()}


def test_later_stages_look_through_the_zoom_rows_network(settings: dict) -> None:
    assert settings["three"].of == settings["two"] and settings["two"].of == settings["zoom"]
    assert settings["zoom"].windows and not settings["one_320"].windows and not settings["one_640"].windows
    assert {settings[name].split for name in ("one_320", "one_640", "zoom", "two", "three")} == {"zones"}
    needed = stages.STUDY.rows["quick"]["three"].needs(settings["three"], 2)
    assert needed == [(settings["two"], 2), (settings["zoom"], 2)]


def test_heads_differ_in_the_head_and_in_epochs_alone(settings: dict) -> None:
    for start, plain, names in (("", "v8n", stages.TIMES), ("board_", "board_v8n", stages.BOARD_TIMES)):
        for name, times in names.items():
            one, ours = settings[start + name], settings[plain]
            assert {field: getattr(one, field) for field in RECIPE} == {f: getattr(ours, f) for f in RECIPE}
            assert one.backbone == f"v8{ours.scale}" and one.epochs == max(1, round(ours.epochs / times))
    assert differing(settings["ssd"], settings["faster_rcnn"]) <= {"architecture", "epochs"}
    means = {"anchors", "stride_4", "hard_examples"}
    assert differing(settings["board_tiny"], settings["board_rcnn"]) - {"epochs"} == means
    for name, mean in (("kmeans", "anchors"), ("stride_4", "stride_4"), ("hard", "hard_examples")):
        assert differing(settings[f"board_{name}"], settings["board_rcnn"]) - {"epochs"} == {mean}


def test_masks_differ_in_one_thing_each(settings: dict) -> None:
    for kind in ("pits", "steel"):
        single = settings[f"{kind}_single"]
        assert differing(settings[f"{kind}_cascade"], single) == {"network"}
        for share in stages.SHARES:
            assert differing(settings[f"{kind}_share_{share}"], single) == {"share", "equal_steps"}
    assert differing(settings["pits_mixed"], settings["pits_single"]) == {"split"}
    assert differing(settings["pits_cascade_image"], settings["pits_cascade"]) == {"second_sees"}


def test_quick_is_on_real_data_with_the_shares_that_tables_name() -> None:
    rows = stages.STUDY.rows["quick"]
    sets = {row.settings.dataset for row in rows.values()}
    assert sets == {"bsdata", "neu_det", "deep_pcb", "neu_seg"}
    assert [rows[f"steel_share_{share}"].settings.share for share in stages.SHARES] == [0.05, 0.1, 0.2, 0.5]
    assert rows["v8n"].settings == detector.SETTINGS["quick"]
    assert rows["pits_official"].settings.split == "official"


def test_stage_metrics_are_read_from_a_records_arrays() -> None:
    """Two images with two pits each: the first stage loses one pit, the second another."""
    arrays = {
        "pit_region": np.array([True, False, True, True]),
        "pit_part": np.array([True, True, False, True]),
        "pit_total": np.array([True, False, False, True]),
        "pit_image": np.array([0, 0, 1, 1]),
        "names": np.array(["a", "b"]),
    }
    record = SimpleNamespace(arrays=arrays)
    both, first = np.ones(2), np.array([1.0, 0.0])
    assert image_statistic(record, "recall_product")(both) == pytest.approx(100 * 0.75 * 0.75)
    assert image_statistic(record, "beyond_product")(both) == pytest.approx(50 - 100 * 0.75 * 0.75)
    assert image_statistic(record, "recall_region")(first) == 50
    assert image_statistic(record, "recall_part")(first) == 100
    assert recalls(arrays)["recall_joint"] == 50


def test_points_beyond_the_product_may_be_negative_and_say_their_unit() -> None:
    assert within("beyond_product", -7.0, 2.0) == (-7.0, 2.0)
    (claim,) = (one for one in claims_of("stages") if one["id"] == "misses_multiply")
    judged = SimpleNamespace(claim=claim, difference=None, value=-6.25)
    assert measured_text(judged) == "-6.2 points (at most 5 points)"
