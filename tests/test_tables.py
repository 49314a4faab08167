"""Tables and verdicts of an anomaly study, from records written by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_records import HEADER, PRINTS, Project, row, toy_study, with_row

from defectlab import runs
from defectlab.training.light import LightSettings
from defectlab.verdicts import tables
from defectlab.verdicts.measured import image_statistic, within
from defectlab.verdicts.tables import agreement, claims_table, per_class_table, results_table, show

METRICS = ("image_auroc", "pixel_auroc", "aupro")
TYPES = ("crack", "fray", "break")
STUDY = toy_study("rd4ad", "bsdrd", "patchcore", metrics=(METRICS,))
TABLE = """RD4AD,all,image_auroc,%,81.5,true,runnable,rd4ad,,made up
RD4AD,all,aupro,%,,true,runnable,rd4ad,,made up
BSDRD,all,image_auroc,%,,true,runnable,bsdrd,,made up
BSDRD,all,aupro,%,,true,runnable,bsdrd,,made up
Another,all,image_auroc,%,97.7,true,not run: code,,,made up
Another,all,aupro,%,,true,not run: code,,,made up
"""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Project:
    return Project(tmp_path, monkeypatch, STUDY, TABLE)


def claim(name: str, metric: str = "image_auroc", **changes: Any) -> dict[str, Any]:
    return {"id": name, "kind": "gain", "a": "bsdrd", "b": "rd4ad", "metric": metric, "primary": True} | changes


def write(
    toy: Project,
    name: str,
    values: dict[str, Sequence[float]],
    profile: str = "paper",
    per_class: Callable[[int, str], float] = lambda seed, kind: 90.0,
    images: str = "image",
    **more: Any,
) -> None:
    """A record for each seed; `values`: metric -> a value for each seed."""
    labels = np.repeat([0, 1], 6)
    arrays = {
        "labels": labels,
        "types": np.repeat([0, 1, 2, 3], [6, 2, 2, 2]),
        "type_names": np.array(["good", *TYPES]),
        "names": np.array([f"{images}{i}" for i in range(12)]),
        "histogram_edges": np.array([0.5], np.float32),
        "histogram_normal": np.full((12, 2), 8, np.uint16),
        "histogram_defect": np.outer(labels, (1, 3)).astype(np.uint16),
        "histogram_overlap": np.outer(labels, (0.25, 0.75)).astype(np.float32),
        "histogram_regions": labels.astype(np.uint32),
    }
    for seed in range(len(next(iter(values.values())))):
        noise = np.random.default_rng([seed, len(name)]).random(12)
        scores = {"scores": noise + (0.8 if name == "bsdrd" else 0.2) * labels}
        metrics = {metric: listed[seed] for metric, listed in values.items()}
        types = {kind: dict.fromkeys(values, per_class(seed, kind)) for kind in TYPES}
        toy.write_record(name, seed, arrays | scores, profile, metrics=metrics, per_class=types, **more)


def around(mean: float, spread: float = 0.5) -> tuple[float, float, float]:
    return mean - spread, mean, mean + spread


def all_metrics(mean: float, spread: float = 0.5) -> dict[str, tuple[float, ...]]:
    return {metric: around(mean, spread) for metric in METRICS}


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "metric", "text"),
    [
        ([], "", "–"),
        ([float("nan")], "", "–"),
        ([87.34], "", "87.3"),
        ([86.0, 87.0, 88.0], "", "87.0 [84.5, 89.5] n=3"),  # t(0.975, 2) = 4.303, over sqrt(3)
        ([86.0, 88.0, float("nan")], "", "87.0 [74.3, 99.7] n=2"),
        ([86.0, 90.0], "miou", "88.0 [62.6, 100.0] n=2"),  # not 113.4 %
        ([1.0, 5.0], "miou", "3.0 [0.0, 28.4] n=2"),
        ([96.0, 104.0], "kept_blur", "100.0 [49.2, 150.8] n=2"),  # per cent of what can be exceeded
        ([0.2, 1.0], "kl", "0.6 [0.0, 5.7] n=2"),  # nats, not per cent
        ([4.0, 4.2, 4.4], "size_mb", "4.2 [3.7, 4.7] n=3"),
        ([912.4, 912.4], "gflops", "912.4 n=2"),  # costs on which seeds agree
    ],
)
def test_show(values: list[float], metric: str, text: str) -> None:
    assert show(values, metric) == text


def test_intervals_of_differences_end_where_two_percentages_can_differ() -> None:
    assert within("miou", -130.0, 120.0, differences=1) == (-100.0, 100.0)
    assert within("miou", -130.0, 220.0, differences=2) == (-130.0, 200.0)  # of an order
    assert within("latency_ms", -130.0, 120.0, differences=1) == (-130.0, 120.0)


def test_results_table(toy: Project) -> None:
    write(toy, "bsdrd", {"image_auroc": (86.0, 87.0, 88.0), "aupro": (70.0, 70.0, 70.0)})
    write(toy, "bsdrd", {"image_auroc": (80.0,), "aupro": (60.0,)}, here=True)
    frame = results_table("toy", "main", "paper")
    assert list(frame.index) == ["RD4AD", "BSDRD", "Another"]
    assert list(frame.columns) == [
        *(("image AUROC", column) for column in ("paper", "recorded", "this run", "verdict")),
        *(("AUPRO", column) for column in ("paper", "recorded", "this run")),  # nothing printed, no verdict
        *(("", column) for column in ("profile", "note")),
    ]
    bsdrd = ["–", "87.0 [84.5, 89.5] n=3", "80.0", "", "–", "70.0 [70.0, 70.0] n=3", "60.0", "paper", ""]
    assert frame.loc["BSDRD"].tolist() == bsdrd
    assert frame.loc["RD4AD"].tolist() == ["81.5", "–", "–", "not run yet", "–", "–", "–", "–", "not run yet"]
    assert frame.loc["Another"].tolist() == ["97.7", "–", "–", "", "–", "–", "–", "–", "not run: code"]
    assert "87.0 [84.5, 89.5] n=3" in tables.styled(frame).to_html()
    some = results_table("toy", "main", "paper", ["aupro"])
    assert {title for title, _ in some.columns} == {"AUPRO", ""}
    with pytest.raises(ValueError, match="toy has no table 'other': there is main"):
        results_table("toy", "other", "paper")


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((81.0, 81.4, 81.9), "agrees"), ((84.0, 84.2, 84.1), "above"), ((70.0, 70.2), "2 seeds: no verdict")],
)
def test_printed_level_gets_a_verdict(toy: Project, values: tuple[float, ...], verdict: str) -> None:
    write(toy, "rd4ad", {"image_auroc": values, "aupro": values})
    assert results_table("toy", "main", "paper").loc["RD4AD", ("image AUROC", "verdict")] == verdict


@pytest.mark.parametrize("profile", ["smoke", "recorded"])
def test_synthetic_numbers_stand_in_no_results_table(toy: Project, profile: str) -> None:
    write(toy, "rd4ad", {"image_auroc": (50.0,), "aupro": (40.0,)}, "smoke", here=True)
    write(toy, "rd4ad", {"image_auroc": (77.0,), "aupro": (66.0,)}, "quick")
    frame = results_table("toy", "main", profile)
    assert frame.loc["RD4AD", ("image AUROC", "recorded")] == "77.0"
    assert set(frame.columns.get_level_values(1)) == {"paper", "recorded", "verdict", "profile", "note"}
    assert "50.0" not in frame.to_csv()


@pytest.mark.parametrize("profile", runs.PROFILES)
def test_every_row_shows_the_best_profile_that_it_has_and_says_which(toy: Project, profile: str) -> None:
    """One paper record does not empty the other rows."""
    for name, level in (("rd4ad", 77.0), ("bsdrd", 79.0)):
        write(toy, name, {"image_auroc": (level,), "aupro": (66.0,)}, "quick")
    write(toy, "rd4ad", {"image_auroc": (82.0,), "aupro": (67.0,)}, "paper")
    frame = results_table("toy", "main", profile)
    shown = frame["image AUROC", "recorded"].tolist(), frame["", "profile"].tolist()
    assert shown == (["82.0", "79.0", "–"], ["paper", "quick", "–"])
    toy.write_claims(claim("gain"))
    (one,) = toy.judged(profile)  # and a claim is judged at the best profile that all its rows have
    assert (one.profile, one.difference.mean) == ("quick", 2.0)
    write(toy, "bsdrd", {"image_auroc": (85.0,)}, "paper")
    assert [(one.profile, one.difference.mean) for one in toy.judged(profile)] == [("paper", 3.0)]


def test_the_note_says_which_network_is_recorded_where_it_is_not_the_papers(toy: Project) -> None:
    smaller = with_row(STUDY, "quick", "rd4ad", row("rd4ad", scale="n", size=192))
    toy.use(with_row(smaller, "quick", "bsdrd", row("bsdrd", size=192)))
    for name in ("rd4ad", "bsdrd"):
        write(toy, name, {"image_auroc": (78.0,)}, "quick")
    notes = results_table("toy", "main", "quick")["", "note"]
    assert notes.tolist() == ["recorded: YOLOv5n, 192 px", "recorded: 192 px", "not run: code"]  # each once
    write(toy, "rd4ad", {"image_auroc": (78.0,)}, "paper")
    assert results_table("toy", "main", "quick").loc["RD4AD", ("", "note")] == ""


def test_per_class_table(toy: Project) -> None:
    write(toy, "bsdrd", {"image_auroc": (86.0, 88.0)}, per_class=lambda seed, kind: 70.0 + seed + len(kind))
    frame = per_class_table("toy", ["bsdrd", "rd4ad"], "image_auroc", "paper")
    assert list(frame.index) == ["bsdrd"]  # rd4ad has no record
    assert set(frame.columns) == {*TYPES, "all"}
    assert frame.loc["bsdrd", "fray"] == show([74.0, 75.0], "image_auroc")
    assert frame.loc["bsdrd", "all"] == show([86.0, 88.0], "image_auroc")


def test_a_table_with_a_column_for_each_data_set(toy: Project) -> None:
    lines = """Own,tiles,image_auroc,%,90.0,true,runnable,bsdrd,,made up
Own,nuts,image_auroc,%,91.0,true,runnable,rd4ad,,made up
Own,average,image_auroc,%,90.5,true,not run: code,,,made up
Other,tiles,image_auroc,%,80.0,true,not run: code,,,made up
Plain,tiles,image_auroc,%,,true,runnable,patchcore,,made up
"Own, AUPRO (added)",tiles,aupro,%,,true,runnable,bsdrd,,made up
"""
    (toy.papers / "main.csv").write_text(f"{HEADER}\n{lines}")
    write(toy, "bsdrd", {"image_auroc": (88.0, 90.0, 92.0), "aupro": (70.0, 70.0, 70.0)})
    frame = results_table("toy", "main", "paper")
    assert list(frame.columns) == ["tiles", "nuts", "average", "verdict"]
    assert list(frame.index)[:4] == ["Own: paper", "Own: recorded (paper)", "Other: paper", "Plain: paper"]
    assert frame.loc["Own, AUPRO (added): recorded (paper)", "tiles"] == "70.0 [70.0, 70.0] n=3"
    assert list(frame.loc["Own: paper"])[:3] == ["90.0", "91.0", "90.5"]
    recorded = frame.loc["Own: recorded (paper)"]
    assert recorded["tiles"].startswith("90.0 [") and recorded["nuts"] == "–"
    assert recorded["verdict"] == "tiles: agrees; means: cannot be judged (1 of 2 data sets)"
    assert frame["verdict"].tolist()[2:4] == ["not run: code", "not run yet"]


# --- Claims ----------------------------------------------------------------------------------------------------------


def test_claims_without_runs(toy: Project) -> None:
    assert claims_table("toy", "paper").empty
    toy.write_claims(claim("sample_level"))
    assert toy.verdicts() == {"sample_level": "not run yet: bsdrd, rd4ad"}
    write(toy, "rd4ad", all_metrics(80))
    line = claims_table("toy", "paper").iloc[0]
    found = line[["claim", "outcome", "difference", "n", "profile"]].tolist()
    assert found == ["sample level (primary)", "not run yet: bsdrd", "–", "–", "–"]


def test_a_claim_about_rows_that_the_profile_leaves_out(toy: Project) -> None:
    toy.write_claims(claim("sample_level"))
    toy.use(with_row(STUDY, "paper", "rd4ad", replace(STUDY.rows["paper"]["rd4ad"], seeds=0)))
    said = "not run: time (rd4ad: not part of paper)"
    assert toy.verdicts() == {"sample_level": said}
    assert results_table("toy", "main", "paper").loc["RD4AD", ("", "note")] == "not run: time (not part of paper)"
    write(toy, "rd4ad", all_metrics(80))  # it can be run all the same
    assert toy.verdicts() == {"sample_level": "not run yet: bsdrd"}


def test_reconstruction_verdicts_with_three_seeds(toy: Project) -> None:
    toy.write_claims(*(claim(metric, metric) for metric in METRICS), claim("ablation", primary=False))
    write(toy, "rd4ad", all_metrics(80))
    write(toy, "bsdrd", {"image_auroc": around(86), "pixel_auroc": around(80.1), "aupro": around(70)})
    expected = ("supports", "no evidence", "contradicts", "not primary: interval only")
    assert tuple(toy.verdicts().values()) == expected
    line = claims_table("toy", "paper").iloc[0]
    assert (line["compared"], line["difference"], line["n"]) == ("bsdrd − rd4ad, image AUROC", "+6.0", 3)
    half = 2.776 * 0.5 * (2 / 3) ** 0.5  # t(0.975, 4), spread 0.5, two means of three
    interval = f"[{6 - half:+.1f}, {6 + half:+.1f}]"
    assert line["95 % over seeds"] == interval
    (line,) = tables.forest_lines("toy", tables.record_store("paper"))[:1]
    assert line.over_seeds and (round(line.low, 3), round(line.high, 3)) == (round(6 - half, 3), round(6 + half, 3))


def test_the_spread_is_that_of_the_two_rows_and_of_all_trained_ones_each_once(toy: Project) -> None:
    """A third row of one seed, trained on the same data, has no spread to lend; of three, its spread is pooled in."""
    study = toy_study("bsdrd", "rd4ad", "other", metrics=(METRICS,))
    toy.use(study)
    toy.write_claims(claim("gain"))
    write(toy, "rd4ad", {"image_auroc": around(80)}, curve={})  # looks at another's network
    write(toy, "bsdrd", {"image_auroc": around(86)})
    write(toy, "other", {"image_auroc": (70.0,)})
    (one,) = toy.judged()
    assert (one.verdict, one.difference.df) == ("supports", 4)
    write(toy, "other", {"image_auroc": around(70, 3.0)})
    (wider,) = toy.judged()
    assert wider.difference.df == 6 and wider.difference.high > one.difference.high + 1
    on_another = type("OnAnother", (LightSettings,), {"model": "toy", "version": 1})()  # on another row's network
    toy.use(with_row(study, "paper", "other", replace(study.rows["paper"]["other"], settings=on_another)))
    write(toy, "other", {"image_auroc": around(70, 3.0)})
    assert toy.judged()[0].difference.df == 4


def test_printed_gain_gets_a_gains_verdict(toy: Project) -> None:
    toy.write_claims(claim("near", printed=6.2), claim("far", printed=20.0), claim("little", printed=1.0))
    write(toy, "rd4ad", all_metrics(80))
    write(toy, "bsdrd", all_metrics(86))
    assert list(toy.verdicts().values()) == ["reproduced", "direction only", "larger than printed"]


def test_holm_takes_back_what_one_test_alone_would_give(toy: Project) -> None:
    """p = 0.03 each: alone it supports, among three it does not."""
    write(toy, "rd4ad", all_metrics(80, 1.0))
    write(toy, "bsdrd", all_metrics(82.7, 1.0))
    toy.write_claims(claim("alone"), *(claim(f"{metric} too", metric, primary=False) for metric in METRICS))
    assert toy.verdicts()["alone"] == "supports"  # claims that are not primary are not counted
    toy.write_claims(*(claim(metric, metric) for metric in METRICS))
    assert all(m.difference.low > 0 and 0.017 < m.difference.p < 0.05 for m in toy.judged())
    assert [m.verdict for m in toy.judged()] == ["no evidence"] * 3


@pytest.mark.parametrize("profile", ["quick", "paper"])
@pytest.mark.parametrize("primary", [True, False])
def test_one_seed_has_one_rule(toy: Project, profile: str, primary: bool) -> None:
    """The difference, its interval over test images, none over the seeds of other rows, and no verdict."""
    toy.write_claims(claim("gain", primary=primary))
    write(toy, "rd4ad", {"image_auroc": (80.0, 80.1, 79.9)}, profile)
    write(toy, "bsdrd", {"image_auroc": (86.0,)}, profile)
    line = claims_table("toy", profile).iloc[0]
    assert (line["difference"], line["95 % over seeds"], line["n"]) == ("+6.0", "–", 1)
    assert line["95 % over images"].startswith("[") and line["outcome"] == "one seed: no verdict"
    assert not tables.forest_lines("toy", tables.record_store(profile))[0].over_seeds


def test_few_seeds_and_synthetic_runs_get_no_verdict(toy: Project) -> None:
    toy.write_claims(claim("gain"))
    for name, mean in (("rd4ad", 80), ("bsdrd", 86)):
        write(toy, name, all_metrics(mean), "smoke", here=True)
    assert toy.verdicts("smoke") == {"gain": "not run yet: bsdrd, rd4ad"}  # recorded runs alone are judged
    write(toy, "rd4ad", {"image_auroc": (80.0, 80.1, 79.9)})
    write(toy, "bsdrd", {"image_auroc": (86.0, 86.1)})
    assert toy.verdicts() == {"gain": "2 seeds: no verdict"}


@pytest.mark.parametrize(
    ("gain", "verdict"), [(6, "supports"), (0.05, "no evidence"), (-6, "contradicts")], ids=["more", "same", "less"]
)
def test_quick_runs_are_judged_at_their_scale(toy: Project, gain: float, verdict: str) -> None:
    """In the words of a reconstruction, also where a gain of 6 is printed: that belongs to the paper's scale."""
    toy.write_claims(claim("primary", printed=6.0), claim("other", primary=False), claim("waits", b="patchcore"))
    for name, mean in (("rd4ad", 80), ("bsdrd", 80 + gain)):
        write(toy, name, all_metrics(mean), "quick")
    write(toy, "patchcore", {"image_auroc": (90.0,)}, "quick")
    said = {"primary": f"{verdict}, at quick scale", "other": "not primary: interval only"}
    assert toy.verdicts() == said | {"waits": "one seed: no verdict"}


def test_order_claims_say_that_they_are_differences_of_differences(toy: Project) -> None:
    """bsdrd gains 6 at cracks and nothing elsewhere: 6 less the mean gain of 2."""
    toy.write_claims(claim("small", kind="order", types=["crack"]))
    write(toy, "rd4ad", all_metrics(80), per_class=lambda seed, kind: 80.0 + seed)
    write(toy, "bsdrd", all_metrics(82), per_class=lambda seed, kind: 80.0 + seed + 6 * (kind == "crack"))
    (one,) = toy.judged()
    assert one.difference.mean == pytest.approx(6 - 2)
    assert one.images.low <= one.images.mean <= one.images.high
    compared = "bsdrd − rd4ad, image AUROC: gain at crack minus mean gain"
    line = claims_table("toy", "paper").iloc[0]
    assert (line["compared"], line["difference"]) == (compared, "+4.0")
    assert tables.forest_lines("toy", tables.record_store("paper"))[0].label == f"small: {compared.partition(', ')[2]}"


@pytest.mark.parametrize(
    ("one", "more", "why"),
    [
        (claim("small", kind="order", types=["crack", "rust"]), {}, r"claim 'small' names .* lacks: \['rust'\]"),
        (claim("image"), {"images": "another"}, "'image': the records were not tested on the same images"),
    ],
)
def test_claims_that_contradict_their_records(toy: Project, one: dict, more: dict, why: str) -> None:
    toy.write_claims(one)
    write(toy, "rd4ad", all_metrics(80))
    write(toy, "bsdrd", all_metrics(82), **more)
    with pytest.raises(ValueError, match=why):
        claims_table("toy", "paper")


@pytest.mark.parametrize(
    ("prints", "verdict"),
    [
        (PRINTS | {"masks": "m"}, "supports"),  # a row may need more
        (PRINTS | {"data": "other"}, "cannot be judged (records differ in data or weights)"),
    ],
)
def test_rows_are_compared_where_their_data_and_weights_agree(toy: Project, prints: dict, verdict: str) -> None:
    toy.write_claims(claim("gain"))
    write(toy, "rd4ad", all_metrics(80))
    write(toy, "bsdrd", all_metrics(86), prints=prints)
    assert toy.verdicts() == {"gain": verdict}


def test_bootstrap_over_images_is_paired_and_reads_the_arrays(toy: Project) -> None:
    toy.write_claims(claim("image"), claim("pixel", "aupro"))
    write(toy, "rd4ad", all_metrics(80))
    write(toy, "bsdrd", all_metrics(86))
    image, pixel = (one.images for one in toy.judged())
    for record in (tables.record_store("paper").recorded_of(STUDY, name)[0][0] for name in ("rd4ad", "bsdrd")):
        by_definition = 100 * ((scores := record.arrays["scores"])[6:, None] > scores[None, :6]).mean()
        assert image_statistic(record, "image_auroc")(np.ones(len(scores))) == pytest.approx(by_definition)
    assert image.low <= image.mean == 6 <= image.high and image.low < image.high  # around the recorded values
    assert (pixel.mean, pixel.low, pixel.high) == (6, 6, 6)  # equal maps under equal weights


# --- This run against the record -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recorded", "here", "words"),
    [
        ((80.0, 81.0, 82.0), 82.9, "rd4ad: image AUROC agrees with the record: off by 1.90, allowed 2.00 points"),
        ((80.0, 81.0, 82.0), 83.1, "rd4ad: image AUROC does NOT agree with the record: off by 2.10, allowed 2.00"),
        ((80.0,), 80.4, "agrees with the record: off by 0.40, allowed 0.50"),
        ((80.0,), 79.4, "does NOT agree with the record: off by 0.60, allowed 0.50"),
    ],
)
def test_agreement(toy: Project, recorded: tuple[float, ...], here: float, words: str) -> None:
    write(toy, "rd4ad", {"image_auroc": recorded})
    assert agreement("toy", "rd4ad", "image_auroc", "paper") == ""  # nothing to compare
    write(toy, "rd4ad", {"image_auroc": (here,)}, here=True)
    assert words in agreement("toy", "rd4ad", "image_auroc", "paper")


@pytest.mark.parametrize(
    ("limit", "seeds", "profile", "verdict"),
    [
        ({"at_least": 10}, 3, "paper", "supports"),
        ({"at_least": 10}, 3, "quick", "supports, at quick scale"),
        ({"at_most": 10}, 3, "paper", "contradicts"),
        ({"at_least": 86}, 3, "paper", "no evidence"),
        ({"at_least": 10}, 1, "quick", "one seed: no verdict"),
        ({"at_least": 10, "primary": False}, 3, "quick", "not primary: interval only"),
    ],
)
def test_a_level_is_judged_by_the_side_on_which_its_interval_lies(
    toy: Project, limit: dict, seeds: int, profile: str, verdict: str
) -> None:
    write(toy, "bsdrd", {"image_auroc": (86.0,) * seeds}, profile)
    toy.write_claims({"id": "high", "kind": "level", "a": "bsdrd", "metric": "image_auroc", "primary": True} | limit)
    (line,) = claims_table("toy", profile).to_dict("records")
    side, number = next(iter(limit.items()))
    assert line["difference"] == f"86.0 % ({side.replace('_', ' ')} {number} %)" and line["outcome"] == verdict
    told = "bsdrd, image AUROC", "[86.0, 86.0]" if seeds > 1 else "–"  # of seeds beside it: it is not judged by these
    assert (line["compared"], line["95 % over seeds"]) == told
    low, high = (float(end) for end in line["95 % over images"].strip("[]").split(", "))
    assert 10 < low <= 86 <= high <= 100
