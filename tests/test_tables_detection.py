"""Tables and verdicts of a detection study, from records whose arrays are packed by hand: AP, costs and bounds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_records import Project, toy_study

from defectlab import runs
from defectlab.metrics import detection
from defectlab.verdicts import generated, measured, page, tables
from defectlab.verdicts.claims import signed
from defectlab.verdicts.tables import agreement, claims_table, results_table

CLASSES = ("crazing", "patches")
STUDY = toy_study("large", "small", metrics=(("map50",), ("parameters_m", "latency_ms"), ("map50_blur",)))
TABLE = """Large,all,map50,%,81.5,true,runnable,large,,made up
Large,all,parameters_m,M,11.2,false,runnable,large,,made up
Large,all,latency_ms,ms,4.0,false,runnable,large,,made up
Small,all,map50,%,,true,runnable,small,,made up
Small,all,parameters_m,M,3.1,false,runnable,small,,made up
Another,all,map50,%,77.0,true,not run: code,,,made up
"""
BOUND = {"id": "speed", "kind": "bound", "a": "large", "b": "small", "metric": "latency_ms", "primary": True}
GAIN = {"id": "better", "kind": "gain", "a": "large", "b": "small", "metric": "map50", "primary": True}
ALL = [(True, True)] * 4


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Project:
    return Project(tmp_path, monkeypatch, STUDY, TABLE)


def packed(found: Sequence[Sequence[bool]]) -> dict[str, np.ndarray]:
    """Arrays of images with one box of each class; `found`: for each image, whether the box of each class is hit.
    Where it is not, a surer false alarm stands in its place."""
    box = torch.tensor([[10.0, 10, 60, 60], [100, 100, 180, 180]])
    ground_truth = [{"boxes": box, "labels": torch.tensor([0, 1])} for _ in found]
    predictions = []
    for hit in torch.tensor(found):
        order = hit.int().argsort(stable=True)
        boxes, scores = box + 200 * ~hit[:, None], 0.75 - 0.25 * hit
        predictions.append({"boxes": boxes[order], "scores": scores[order], "labels": order})
    return detection.pack(predictions, ground_truth, [f"image{i}" for i in range(len(found))], CLASSES)


def write(
    toy: Project,
    name: str,
    map50: Sequence[float],
    found: Sequence[Sequence[bool]] = ((True, True), (True, False), (False, True), (True, True)),
    per_class: tuple[float, float] = (70.0, 90.0),
    trained: bool = True,
    costs: dict[str, float] | None = None,
    **more: Any,
) -> None:
    for seed, value in enumerate(map50):
        content = {
            "metrics": {"map50": value, "f1_dev": value - 10} if trained else {"precision_dev": value},
            "per_class": {kind: {"map50": ap} for kind, ap in zip(CLASSES, per_class, strict=True)},
            "costs": costs or {},
            "curve": {"loss": [1.0]} if trained else {},
        }
        toy.write_record(name, seed, packed(found), **content | more)


# --- Tables ----------------------------------------------------------------------------------------------------------


def test_results_table_with_costs(toy: Project) -> None:
    write(toy, "large", (80.0, 81.0, 82.0), costs={"parameters_m": 11.166})
    toy.write_timings({"small": 2.1, "large": 4.2})
    write(toy, "small", (78.0,), costs={"parameters_m": 3.157})
    write(toy, "small", (77.0,), here=True, costs={"parameters_m": 3.157})
    frame = results_table("toy", "main", "paper")
    parameters, latency = "parameters (M)", "latency (ms, batch 1)"
    assert [title for title, column in frame.columns if column == "paper"] == ["mAP50", parameters, latency]
    large, small, another = (frame.loc[name] for name in ("Large", "Small", "Another"))
    other_device = "cannot be judged (timed on another device)"
    assert large["mAP50"].tolist() == ["81.5", "81.0 [78.5, 83.5] n=3", "–", "agrees"]
    assert large[parameters].tolist() == ["11.2", "11.17 n=3", "–", "agrees"]  # no interval: seeds agree; 11.166 rounds
    assert large[latency].tolist() == ["4.0", "4.20 (×2.00)", "–", other_device]
    assert small[parameters].tolist() == ["3.1", "3.16", "3.16", "above"]  # one seed is enough
    assert small[latency, "paper"] == "–"  # the table has no such line
    assert large["", "note"] == "timed in turns, × of small, on a CPU"
    assert (small["", "note"], another["", "note"], another[parameters, "recorded"]) == ("", "not run: code", "–")
    for path in runs.recorded_dir().glob("*"):
        path.unlink()
    write(toy, "large", (80.0,))
    large = results_table("toy", "main", "paper").loc["Large"]
    assert large[parameters].tolist() == ["11.2", "–", "–", "cannot be judged (the records lack it)"]


def test_near_100_the_interval_is_over_test_images(toy: Project) -> None:
    write(toy, "large", (99.0, 99.5, 98.5))
    interval = measured.bootstrap_level(tables.record_store("paper").recorded_of(STUDY, "large")[0], "map50")
    assert interval.mean == pytest.approx(99.0)
    assert 0 <= interval.low < interval.high <= 100
    cell = results_table("toy", "main", "paper").loc["Large", ("mAP50", "recorded")]
    assert cell == f"99.0 [{interval.low:.1f}, {interval.high:.1f}]‡ n=3"


def test_order_of_metrics_is_the_one_asked_for_and_none_gives_an_empty_table(toy: Project) -> None:
    frame = results_table("toy", "main", "paper", ["parameters_m", "map50"])
    assert list(dict.fromkeys(frame.columns.get_level_values(0))) == ["parameters (M)", "mAP50", ""]
    assert results_table("toy", "main", "paper", ["map33"]).empty


def test_agreement_of_costs(toy: Project) -> None:
    write(toy, "large", (80.0, 81.0, 82.0), costs={"parameters_m": 11.17})
    write(toy, "large", (82.5,), here=True, costs={"parameters_m": 11.27})
    said = agreement("toy", "large", "parameters_m", "paper")
    assert said.endswith("NOT agree with the record: off by 0.10, allowed 0.00 M")
    assert agreement("toy", "large", "gflops", "paper") == ""


# --- Gains and orders ------------------------------------------------------------------------------------------------


def test_gain_with_both_intervals(toy: Project) -> None:
    """Over images: in each image taken, `large` finds both boxes; `small` finds one class in the first two only."""
    half = [(True, True), (True, True), (False, True), (False, True)]
    toy.write_claims(GAIN)
    write(toy, "large", (85.9, 86.0, 86.1), found=ALL)
    write(toy, "small", (79.9, 80.0, 80.1), found=half)
    (one,) = toy.judged()
    assert one.verdict == "supports"
    assert one.difference.mean == pytest.approx(6.0)
    of_small = measured.over_images(detection.statistic(packed(half), "map50"), packed(half))
    assert one.images.mean == pytest.approx(6.0)  # the recorded gain; only the width is that of the arrays
    assert one.images.high - one.images.low == pytest.approx(of_small.high - of_small.low)
    line = claims_table("toy", "paper").iloc[0]
    assert (line["compared"], line["difference"]) == ("large − small, mAP50", "+6.0")
    low, high = map(signed, (one.images.low, one.images.high))
    assert line["95 % over images"] == f"[{low}, {high}]"
    assert [signed(x) for x in (-0.04, 0.04, 1)] == ["0.0", "0.0", "+1.0"]


def test_order_compares_the_gain_at_some_classes(toy: Project) -> None:
    """`large` is better by 30 at crazing and by 10 at patches: 30 less the mean gain of 20."""
    half = [(False, True), (True, True)] * 2
    toy.write_claims(GAIN | {"kind": "order", "types": ["crazing"], "primary": False})
    write(toy, "large", (90.0, 90.0), found=ALL, per_class=(90.0, 90.0))
    write(toy, "small", (70.0, 70.0), found=half, per_class=(60.0, 80.0))
    (one,) = toy.judged()
    assert one.difference.mean == pytest.approx(30 - 20)
    at_crazing = measured.over_images(detection.statistic(packed(half), "map50", ["crazing"]), packed(half))
    assert one.images.mean == pytest.approx(10)  # as recorded; patches gain nothing in the arrays, so half the width
    assert one.images.high - one.images.low == pytest.approx((at_crazing.high - at_crazing.low) / 2)


def test_metrics_without_a_bootstrap_have_no_interval_over_images(toy: Project) -> None:
    toy.write_claims(GAIN | {"metric": "f1_dev"}, GAIN | {"id": "blurred", "metric": "map50_blur"})
    write(toy, "large", (85.9, 86.0, 86.1))
    write(toy, "small", (79.9, 80.0, 80.1))
    threshold, blurred = toy.judged()
    assert (threshold.verdict, threshold.images) == ("supports", None)
    assert (blurred.verdict, blurred.difference) == ("cannot be judged (the records lack the metric)", None)
    assert claims_table("toy", "paper")["95 % over images"].tolist() == ["–", "–"]


def test_rows_that_look_at_finished_networks_have_their_own_spread(toy: Project) -> None:
    toy.write_claims(GAIN | {"metric": "precision_dev"})
    for name, mean in (("large", 86), ("small", 80)):
        write(toy, name, (mean - 0.1, mean, mean + 0.1), trained=False)
    (one,) = toy.judged()
    half = 2.776 * 0.1 * (2 / 3) ** 0.5  # t(0.975, 4), spread 0.1, two means of three
    assert (one.difference.low, one.difference.high) == pytest.approx((6 - half, 6 + half), abs=1e-3)
    assert one.verdict == "supports"


def test_intervals_of_differences_end_at_100(toy: Project) -> None:
    toy.write_claims(GAIN)
    write(toy, "large", (10.0, 90.0), found=ALL)
    write(toy, "small", (5.0, 95.0), found=ALL)
    assert toy.judged()[0].difference.high > 100
    assert claims_table("toy", "paper")["95 % over seeds"].tolist() == ["[-100.0, +100.0]"]


# --- Bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "shown", "verdict"),
    [
        ({"at_most": 4}, "×3.50 (at most ×4)", "holds"),
        ({"at_most": 3.25}, "×3.50 (at most ×3.25)", "does not hold"),
        ({"at_least": 3.25}, "×3.50 (at least ×3.25)", "holds"),
        ({"b": None, "at_most": 11.5}, "11.20 M (at most 11.5 M)", "holds"),
        ({"b": None, "at_least": 11.5}, "11.20 M (at least 11.5 M)", "does not hold"),
    ],
)
@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_bound_of_an_exact_cost_needs_no_seeds(
    toy: Project, profile: str, fields: dict, shown: str, verdict: str
) -> None:
    toy.write_claims(BOUND | {"metric": "parameters_m"} | fields)
    write(toy, "large", (80.0,), profile=profile, costs={"parameters_m": 11.2})
    if "b" not in fields:
        write(toy, "small", (80.0, 81.0), profile=profile, costs={"parameters_m": 3.2})
    line = claims_table("toy", profile).iloc[0]
    compared = "large, parameters (M)" if "b" in fields else "large / small, parameters (M)"
    columns = ["compared", "difference", "outcome", "profile", "95 % over seeds", "95 % over images", "n"]
    assert line[columns].tolist() == [compared, shown, verdict, profile, "–", "–", 1]


def test_equal_costs_are_within_a_ratio_of_one(toy: Project) -> None:
    toy.write_claims(BOUND | {"metric": "parameters_m", "at_most": 1})
    for name, map50 in (("large", (80.0,)), ("small", (80.0, 81.0, 82.0))):  # the mean of three is a little less
        write(toy, name, map50, costs={"parameters_m": 1.7673})
    assert toy.verdicts() == {"speed": "holds"}


def test_two_speeds_are_compared_where_they_were_timed_in_turns(toy: Project) -> None:
    toy.write_claims(BOUND | {"at_most": 2}, GAIN, BOUND | {"id": "size", "metric": "gflops", "at_most": 2})
    write(toy, "large", (85.9, 86.0, 86.1), costs={"latency_ms": 1.0})  # a run's own time counts for nothing
    assert list(toy.verdicts().values()) == ["not run yet: small"] * 3
    write(toy, "small", (79.9, 80.0, 80.1), costs={"latency_ms": 3.0})
    assert toy.judged()[0].verdict == "not timed yet"
    toy.write_timings({"small": 3.0, "large": 6.9})
    speed, better, size = toy.judged()
    assert (speed.verdict, size.verdict) == ("does not hold", "cannot be judged (the records lack the cost)")
    line = claims_table("toy", "paper").iloc[0]
    assert line["compared"] == "large / small, latency (ms, batch 1), on a CPU"
    assert line["difference"] == "×2.30 (at most ×2)"
    assert better.verdict == "supports"  # and Holm counts the tested claims alone
    assert math.isfinite(better.difference.p)


# --- The page and the generated Markdown -----------------------------------------------------------------------------


def test_page_and_markdown_show_the_studys_own_groups(toy: Project) -> None:
    write(toy, "large", (80.0, 81.0, 82.0), costs={"parameters_m": 11.166})
    toy.write_claims(BOUND | {"metric": "parameters_m", "b": None, "at_most": 12})
    text = page.write_page("paper").read_text()
    assert text.count("<h3>Toys</h3>") == 1 and "81.0 [78.5, 83.5] n=3" in text and "11.17 n=3" in text
    assert "11.17 M (at most 12 M)" in text
    assert ">A toy study</h2>" in text and "AUROC" not in text
    line = "| Large | 81.5 | 81.0 [78.5, 83.5] n=3 | agrees | 11.2 | 11.17 n=3 | agrees | paper |"
    assert line in generated.tables_markdown("toy", tables.record_store("recorded"))


def test_a_broken_record_is_said_on_the_page(toy: Project) -> None:
    write(toy, "large", (80.0,))
    next(runs.recorded_dir().glob("*.json")).write_text("{<")
    with pytest.raises(page.IncompletePage, match=r"A toy study, Toys: .*is not a readable record") as raised:
        page.write_page("quick", [page.NotebookStatus("03_a", "failed", 1800.0, "ValueError: a < b")])
    assert "A toy study: The findings could not be built: " in str(raised.value)
    text = raised.value.path.read_text()
    assert "This part could not be built" in text and "ValueError: a &lt; b" in text  # escaped
    assert "Failed: 03_a." in text and "0.50 hours in all" in text
