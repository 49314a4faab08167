"""Tables and verdicts of a detection study, from records whose arrays are packed by hand: AP, costs and bounds."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from defectlab import runs
from defectlab.files import write_json
from defectlab.metrics import detection as evaluation
from defectlab.verdicts import claims, measured, page
from defectlab.verdicts import tables as report
from defectlab.verdicts.tables import (
    agreement,
    claims_table,
    findings,
    judge_claims,
    per_class_table,
    results_table,
    shelf,
)

CLASSES = ("crazing", "patches")
HEADER = "row,column,metric,unit,value,higher_is_better,status,key,not_comparable,source"
TABLE = f"""{HEADER}
Large,all,map50,%,81.5,true,runnable,large,,made up
Large,all,parameters_m,M,11.2,false,runnable,large,,made up
Large,all,latency_ms,ms,4.0,false,runnable,large,,made up
Small,all,map50,%,,true,runnable,small,,made up
Small,all,parameters_m,M,3.1,false,runnable,small,,made up
Another,all,map50,%,77.0,true,not run: code,,,made up
"""


@dataclass(frozen=True)
class Settings:
    model: ClassVar[str] = "toy"
    version: ClassVar[int] = 1
    dataset: str = "neu_det"
    width: int = 1


ROWS = {"large": Settings(width=2), "small": Settings()}
STUDY = SimpleNamespace(
    TITLE="Toy detectors",
    ROWS=dict.fromkeys(runs.PROFILES, ROWS),
    TABLES={"main": "Detectors"},
    METRICS=(("map50",), ("parameters_m", "latency_ms"), ("map50_blur",)),
    PRIMARY=("large",),
    planned_seeds=lambda row, profile: 1,
)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A project with one detection study `toy`: one table, no claims, no records."""
    for module in (runs, report, claims):
        monkeypatch.setattr(module, "project_root", lambda: tmp_path)
    for module in (report, page):
        monkeypatch.setattr(module, "study", lambda name: STUDY)
    monkeypatch.setattr(page, "STUDIES", {"toy": "unused"})
    monkeypatch.setattr(report, "fingerprints_here", lambda module, settings: {"data": "d"})
    monkeypatch.setattr(measured, "BOOTSTRAP_REPEATS", 40)
    papers = tmp_path / "results" / "papers" / "toy"
    papers.mkdir(parents=True)
    (papers / "main.csv").write_text(TABLE)
    return tmp_path


def packed(found: Sequence[Sequence[bool]]) -> dict[str, np.ndarray]:
    """Arrays of pictures with one box of each class; `found`: for each picture, whether the box of each class is hit.
    Where it is not, a surer false alarm stands in its place."""
    box = torch.tensor([[10.0, 10, 60, 60], [100, 100, 180, 180]])
    truths = [{"boxes": box, "labels": torch.tensor([0, 1])} for _ in found]
    predictions = []
    for hits in found:
        hit = torch.tensor(hits)
        boxes = torch.where(hit[:, None], box, box + 200)
        scores = torch.where(hit, 0.5, 0.75)
        order = scores.argsort(descending=True, stable=True)
        predictions.append({"boxes": boxes[order], "scores": scores[order], "labels": order})
    names = [f"picture{i}" for i in range(len(found))]
    return evaluation.pack(predictions, truths, names, CLASSES)


def write_records(
    row: str,
    map50: Sequence[float],
    found: Sequence[Sequence[bool]] = ((True, True), (True, False), (False, True), (True, True)),
    profile: str = "paper",
    here: bool = False,
    per_class: tuple[float, float] = (70.0, 90.0),
    device: str = "one GPU",
    trained: bool = True,
    **costs: float,
) -> None:
    settings = ROWS[row]
    mark, prints = runs.row_identity(settings, profile), {"data": "d"}
    for seed, value in enumerate(map50):
        key = runs.make_key("toy", settings.dataset, profile, seed, mark, prints)
        content = {
            "key": key,
            "model": "toy",
            "version": 1,
            "profile": profile,
            "seed": seed,
            "changed": runs.changed(settings),
            "fingerprints": prints,
            "metrics": {"map50": value, "f1_dev": value - 10} if trained else {"precision_dev": value},
            "per_class": {name: {"map50": ap} for name, ap in zip(CLASSES, per_class, strict=True)},
            "costs": costs,
            "curve": {"loss": [1.0]} if trained else {},
            "device": device,
            "seconds": 3600.0,
        }
        path = (runs.runs_dir(profile) if here else runs.recorded_dir()) / f"{key}.json"
        write_json(path, content)
        np.savez_compressed(path.with_suffix(".npz"), **packed(found))


def write_claims(root: Path, **ones: dict) -> None:
    plain = {"kind": "gain", "a": "large", "b": "small", "metric": "map50", "primary": True}
    lines = []
    for name, changes in ones.items():
        fields = {k: v for k, v in (plain | {"id": name} | changes).items() if v is not None}
        lines += ["[[claim]]", *(f"{k} = {json.dumps(v)}" for k, v in fields.items())]
    (root / "results" / "papers" / "toy" / "claims.toml").write_text("\n".join(lines))


def judged(profile: str = "paper") -> list[claims.Judged]:
    return judge_claims("toy", shelf(profile, STUDY.ROWS))


# --- Tables ----------------------------------------------------------------------------------------------------------


def test_results_table_with_costs(root: Path) -> None:
    write_records("large", (80.0, 81.0, 82.0), parameters_m=11.166, latency_ms=4.2)
    write_records("small", (78.0,), parameters_m=3.157)
    write_records("small", (77.0,), here=True, parameters_m=3.157)
    frame = results_table("toy", "main", "paper")
    assert [title for title, column in frame.columns if column == "paper"] == [
        "mAP50",
        "parameters (M)",
        "latency (ms, batch 1)",
    ]
    large, small, another = (frame.loc[row] for row in ("Large", "Small", "Another"))
    recorded = "recorded (paper)"
    assert large["mAP50", recorded] == "81.0 [78.5, 83.5] n=3"
    assert large["mAP50", "verdict"] == "agrees"
    assert large["parameters (M)", recorded] == "11.17 n=3"  # no interval: the seeds agree
    assert large["parameters (M)", "verdict"] == "agrees"  # 11.166 rounds to 11.2
    assert small["parameters (M)", "verdict"] == "above"  # 3.157 does not round to 3.1, and one seed is enough
    assert large["latency (ms, batch 1)", recorded] == "4.20 n=3"
    assert large["latency (ms, batch 1)", "verdict"] == "cannot be judged (timed on another device)"
    assert large["", "note"] == "timed on one GPU"
    assert small["", "note"] == ""
    assert small["latency (ms, batch 1)", "paper"] == "–"  # the table has no such line
    assert small["parameters (M)", "this run"] == "3.16 n=1"
    assert another["", "note"] == "not run: code"
    assert another["parameters (M)", recorded] == "–"


def test_costs_on_which_seeds_differ_have_an_interval() -> None:
    assert report.show([4.0, 4.2, 4.4], "latency_ms") == "4.20 [3.70, 4.70] n=3"
    assert report.show([912.4, 912.4], "images_per_second_32") == "912 n=2"
    assert report.show([8.7], "gflops") == "8.7 n=1"


def test_what_the_records_lack_cannot_be_judged(root: Path) -> None:
    write_records("large", (80.0, 81.0, 82.0))
    frame = results_table("toy", "main", "paper")
    assert frame.loc["Large", ("parameters (M)", "recorded (paper)")] == "–"
    assert frame.loc["Large", ("parameters (M)", "verdict")] == "cannot be judged (the records lack it)"


def test_near_100_the_interval_is_over_test_images(root: Path) -> None:
    write_records("large", (99.0, 99.5, 98.5))
    found = shelf("paper", STUDY.ROWS).of(STUDY, "large")[0]
    interval = measured.bootstrap_level(found, "map50")
    assert interval.mean == pytest.approx(99.0)
    assert 0 <= interval.low < interval.high <= 100
    cell = results_table("toy", "main", "paper").loc["Large", ("mAP50", "recorded (paper)")]
    assert cell == f"99.0 [{interval.low:.1f}, {interval.high:.1f}]‡ n=3"


def test_order_of_metrics_is_the_one_asked_for_and_none_gives_an_empty_table(root: Path) -> None:
    frame = results_table("toy", "main", "paper", ["parameters_m", "map50"])
    assert list(dict.fromkeys(frame.columns.get_level_values(0))) == ["parameters (M)", "mAP50", ""]
    assert results_table("toy", "main", "paper", ["map33"]).empty


def test_per_class_table(root: Path) -> None:
    write_records("large", (80.0, 80.0))
    frame = per_class_table("toy", ["large", "small"], "map50", "paper")
    assert frame.loc["large"].tolist() == ["70.0 [70.0, 70.0] n=2", "90.0 [90.0, 90.0] n=2", "80.0 [80.0, 80.0] n=2"]


def test_agreement_of_metrics_and_costs(root: Path) -> None:
    write_records("large", (80.0, 81.0, 82.0), parameters_m=11.17)
    write_records("large", (82.5,), here=True, parameters_m=11.27)
    assert agreement("toy", "large", "map50", "paper").endswith(
        "agrees with the record: off by 1.50, allowed 2.00 points"
    )
    assert agreement("toy", "large", "parameters_m", "paper").endswith(
        "NOT agree with the record: off by 0.10, allowed 0.00 M"
    )
    assert "nothing to compare" in agreement("toy", "large", "gflops", "paper")


# --- Gains and orders ------------------------------------------------------------------------------------------------


def test_gain_with_both_intervals(root: Path) -> None:
    """Over images: in each picture drawn, `large` finds both boxes; `small` finds one class in the first two only."""
    write_claims(root, better={})
    write_records("large", (85.9, 86.0, 86.1), found=[(True, True)] * 4)
    write_records("small", (79.9, 80.0, 80.1), found=[(True, True), (True, True), (False, True), (False, True)])
    (one,) = judged()
    assert one.verdict == "supports"
    assert one.difference.mean == pytest.approx(6.0)
    expected = evaluation.statistic(packed([(True, True), (True, True), (False, True), (False, True)]), "map50")
    assert one.images.mean == pytest.approx(100 - expected(np.ones(4)))
    assert 0 <= one.images.low < one.images.high <= 100
    line = claims_table("toy", "paper").iloc[0]
    assert line["compared"] == "large − small, mAP50"
    assert line["difference"] == "+6.0"
    assert line["95 % over images"] == f"[{one.images.low:+.1f}, {one.images.high:+.1f}]"


def test_order_compares_the_gain_at_some_classes(root: Path) -> None:
    """`large` is better by 30 at crazing and by 10 at patches: 30 less the mean gain of 20."""
    write_claims(root, at_crazing={"kind": "order", "types": ["crazing"], "primary": False})
    write_records("large", (90.0, 90.0), found=[(True, True)] * 4, per_class=(90.0, 90.0))
    write_records("small", (70.0, 70.0), found=[(False, True), (True, True)] * 2, per_class=(60.0, 80.0))
    (one,) = judged()
    assert one.difference.mean == pytest.approx(30 - 20)
    gain_at_crazing = 100 - evaluation.statistic(packed([(False, True), (True, True)] * 2), "map50", ["crazing"])(
        np.ones(4)
    )
    assert one.images.mean == pytest.approx(gain_at_crazing / 2)  # patches gain nothing there
    assert claims_table("toy", "paper").iloc[0]["compared"] == "large − small, mAP50 at crazing"


def test_metrics_without_a_bootstrap_have_no_interval_over_images(root: Path) -> None:
    write_claims(root, threshold={"metric": "f1_dev"}, blurred={"metric": "map50_blur"})
    write_records("large", (85.9, 86.0, 86.1))
    write_records("small", (79.9, 80.0, 80.1))
    threshold, blurred = judged()
    assert (threshold.verdict, threshold.images) == ("supports", None)
    assert (blurred.verdict, blurred.difference) == ("cannot be judged (the records lack the metric)", None)
    assert claims_table("toy", "paper")["95 % over images"].tolist() == ["–", "–"]


def test_rows_that_look_at_finished_networks_have_their_own_spread(root: Path) -> None:
    write_claims(root, kept={"metric": "precision_dev"})
    write_records("large", (85.9, 86.0, 86.1), trained=False)
    write_records("small", (79.9, 80.0, 80.1), trained=False)
    (one,) = judged()
    half = 2.776 * 0.1 * (2 / 3) ** 0.5  # t(0.975, 4), spread 0.1, two means of three
    assert (one.difference.low, one.difference.high) == pytest.approx((6 - half, 6 + half), abs=1e-3)
    assert one.verdict == "supports"


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
    root: Path, profile: str, fields: dict, shown: str, verdict: str
) -> None:
    write_claims(root, costs={"kind": "bound", "metric": "parameters_m"} | fields)
    write_records("large", (80.0,), profile=profile, parameters_m=11.2)
    if "b" not in fields:
        write_records("small", (80.0, 81.0), profile=profile, parameters_m=3.2)
    line = claims_table("toy", profile).iloc[0]
    assert line["compared"] == ("large, parameters (M)" if "b" in fields else "large / small, parameters (M)")
    assert line["difference"] == shown
    assert line[f"outcome ({profile})"] == verdict
    assert line["95 % over seeds"] == line["95 % over images"] == "–"
    assert line["n"] == 1
    text = findings("toy", profile)
    rows = "large" if "b" in fields else "large against small"
    assert f"costs: {rows}, parameters (M): {shown} with 1 seed(s): {verdict}" in text
    assert "points" not in text


@pytest.mark.parametrize(("profile", "verdict"), [("quick", "holds here"), ("paper", "holds")])
def test_bound_of_a_speed_names_its_device(root: Path, profile: str, verdict: str) -> None:
    write_claims(root, speed={"kind": "bound", "metric": "images_per_second_32", "at_least": 0.5})
    write_records("large", (80.0, 80.0), profile=profile, images_per_second_32=900.0)
    write_records("small", (80.0,), profile=profile, images_per_second_32=1500.0)
    line = claims_table("toy", profile).iloc[0]
    assert line["compared"] == "large / small, images/s (batch 32), on one GPU"
    assert (line["difference"], line[f"outcome ({profile})"]) == ("×0.60 (at least ×0.5)", verdict)
    assert "×0.60 (at least ×0.5) on one GPU with 1 seed(s)" in findings("toy", profile)


def test_a_speed_beside_other_runs_is_said_and_not_judged(root: Path) -> None:
    write_claims(root, speed={"kind": "bound", "metric": "latency_ms", "at_most": 2}, better={})
    for row in ("large", "small"):
        write_records(row, (80.0, 80.1, 80.2), latency_ms=4.0)
    assert judged()[0].verdict == "holds"
    for path in runs.recorded_dir().glob("*.json"):
        write_json(path, runs.read_record(path).content | {"jobs": 4})
    speed, better = judged()
    assert speed.verdict == "cannot be judged (timed while other runs shared the device)"
    assert better.difference is not None  # accuracy does not ask for it


def test_bounds_that_cannot_be_judged(root: Path) -> None:
    bound = {"kind": "bound", "metric": "latency_ms", "at_most": 2}
    write_claims(root, speed=bound, better={}, size=bound | {"metric": "gflops"})
    write_records("large", (85.9, 86.0, 86.1), latency_ms=4.0)
    assert [one.verdict for one in judged()] == ["not run yet: small"] * 3
    write_records("small", (79.9, 80.0, 80.1), latency_ms=3.0, device="another GPU")
    speed, better, size = judged()
    assert speed.verdict == "cannot be judged (timed on different devices: another GPU; one GPU)"
    assert size.verdict == "cannot be judged (the records lack the cost)"
    assert speed.value is size.value is None
    assert better.verdict == "supports"  # and Holm counts the tested claims alone
    assert math.isfinite(better.difference.p)


# --- The page --------------------------------------------------------------------------------------------------------


def test_page_shows_the_studys_own_groups(root: Path) -> None:
    write_records("large", (80.0, 81.0, 82.0), parameters_m=11.166)
    write_claims(root, small={"kind": "bound", "metric": "parameters_m", "b": None, "at_most": 12})
    text = page.write_page("paper").read_text()
    assert text.index("<h3>Detectors</h3>") < text.index("<h3>Detectors: more metrics</h3>")
    assert text.count("<h3>Detectors") == 2  # the csv has nothing of the third group
    headline, more = text.split("<h3>Detectors: more metrics</h3>")
    assert "81.0 [78.5, 83.5] n=3" in headline and "parameters (M)" not in headline
    assert "11.17 n=3" in more and "11.17 M (at most 12 M)" in more
    assert "AUROC" not in text


def test_markdown_of_a_detection_study(root: Path) -> None:
    write_records("large", (80.0, 81.0, 82.0), parameters_m=11.166)
    text = page.tables_markdown("toy")
    assert "| Large | 81.5 | 81.0 [78.5, 83.5] n=3 | agrees | 11.2 | 11.17 n=3 | agrees |" in text
