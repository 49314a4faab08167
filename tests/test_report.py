"""Tables and verdicts from records written by hand."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from defectlab import runs
from defectlab.files import project_root, write_json
from defectlab.metrics.anomaly import metrics_from_histograms
from defectlab.papers import bsdrd
from defectlab.studies.bsdrd import ROWS
from defectlab.verdicts import claims, measured
from defectlab.verdicts import tables as report
from defectlab.verdicts.tables import agreement, claims_table, judge_claims, per_class_table, results_table, shelf, show

PAPERS = project_root() / "results" / "papers"
METRICS = ("image_auroc", "pixel_auroc", "aupro")
TYPES = ("crack", "fray", "break")

TABLE = """row,column,metric,unit,value,higher_is_better,status,key,not_comparable,source
RD4AD,all,image_auroc,%,81.5,true,runnable,rd4ad,,made up
RD4AD,all,aupro,%,,true,runnable,rd4ad,,made up
BSDRD,all,image_auroc,%,,true,runnable,bsdrd,,made up
BSDRD,all,aupro,%,,true,runnable,bsdrd,,made up
Another,all,image_auroc,%,97.7,true,not run: code,,,made up
Another,all,aupro,%,,true,not run: code,,,made up
"""


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A project with one table, no claims and no runs."""
    monkeypatch.setattr(runs, "project_root", lambda: tmp_path)
    monkeypatch.setattr(report, "project_root", lambda: tmp_path)
    monkeypatch.setattr(claims, "project_root", lambda: tmp_path)
    monkeypatch.setattr(measured, "BOOTSTRAP_REPEATS", 20)
    monkeypatch.setattr(report, "fingerprints_here", lambda module, settings: {"data": "d", "weights": "w"})
    papers = tmp_path / "results" / "papers" / "bsdrd"
    papers.mkdir(parents=True)
    (papers / "main.csv").write_text(TABLE)
    return tmp_path


def claim(name: str, metric: str = "image_auroc", **changes) -> dict:
    plain = {"id": name, "kind": "gain", "a": "bsdrd", "b": "rd4ad", "metric": metric, "primary": True}
    return plain | changes


def write_claims(root: Path, *claims: dict) -> None:
    lines = []
    for one in claims:
        lines += ["[[claim]]", *(f"{k} = {json.dumps(v)}" for k, v in one.items())]
    (root / "results" / "papers" / "bsdrd" / "claims.toml").write_text("\n".join(lines))


def write_records(
    row: str,
    values: dict[str, Sequence[float]],
    profile: str = "paper",
    here: bool = False,
    per_class: Callable[[int, str], float] = lambda seed, kind: 90.0,
    names: str = "image",
    prints: dict[str, str] | None = None,
) -> None:
    """A record for each seed; `values`: metric -> a value a seed."""
    settings = ROWS[profile][row]
    folder = runs.runs_dir(profile) if here else runs.recorded_dir()
    for seed in range(len(next(iter(values.values())))):
        mark, prints = runs.row_identity(settings, profile), prints or {"data": "d", "weights": "w"}
        key = runs.make_key(settings.model, settings.dataset, profile, seed, mark, prints)
        content = {
            "key": key,
            "model": settings.model,
            "version": settings.version,
            "profile": profile,
            "seed": seed,
            "changed": runs.changed(settings),
            "fingerprints": prints,
            "metrics": {metric: listed[seed] for metric, listed in values.items()},
            "curve": {"loss": [1.0, 0.5]},
            "per_class": {kind: {metric: per_class(seed, kind) for metric in values} for kind in TYPES},
        }
        write_json(folder / f"{key}.json", content)
        rng = np.random.default_rng([seed, len(row)])
        labels = np.repeat([0, 1], 6)
        arrays = {
            "scores": rng.random(12) + (0.8 if row == "bsdrd" else 0.2) * labels,
            "labels": labels,
            "types": np.repeat([0, 1, 2, 3], [6, 2, 2, 2]),
            "type_names": np.array(["good", "crack", "fray", "break"]),
            "names": np.array([f"{names}{i}" for i in range(12)]),
            "histogram_edges": np.array([0.5], np.float32),
            "histogram_normal": np.full((12, 2), 8, np.uint16),
            "histogram_defect": np.outer(labels, (1, 3)).astype(np.uint16),
            "histogram_overlap": np.outer(labels, (0.25, 0.75)).astype(np.float32),
            "histogram_regions": labels.astype(np.uint32),
        }
        np.savez_compressed(folder / f"{key}.npz", **arrays)


def around(mean: float, spread: float = 0.5) -> tuple[float, float, float]:
    return mean - spread, mean, mean + spread


def all_metrics(mean: float, spread: float = 0.5) -> dict[str, tuple[float, ...]]:
    return {metric: around(mean, spread) for metric in METRICS}


# --- Numbers ---------------------------------------------------------------------------------------------------------


def test_show() -> None:
    assert show([]) == "–"
    assert show([float("nan")]) == "–"
    assert show([87.34]) == "87.3 n=1"
    assert show([86.0, 87.0, 88.0]) == "87.0 [84.5, 89.5] n=3"  # t(0.975, 2) = 4.303, over sqrt(3)
    assert show([86.0, 88.0, float("nan")]) == "87.0 [74.3, 99.7] n=2"
    assert show([86.0, 90.0], "miou") == "88.0 [62.6, 100.0] n=2"  # not 113.4 %
    assert show([1.0, 5.0], "miou") == "3.0 [0.0, 28.4] n=2"
    assert show([0.2, 1.0], "kl") == "0.6 [-4.5, 5.7] n=2"  # nats, not per cent


def test_results_table(root: Path) -> None:
    write_records("bsdrd", {"image_auroc": (86.0, 87.0, 88.0), "aupro": (70.0, 70.0, 70.0)})
    write_records("bsdrd", {"image_auroc": (80.0,), "aupro": (60.0,)}, here=True)
    frame = results_table("bsdrd", "main", "paper")
    assert list(frame.index) == ["RD4AD", "BSDRD", "Another"]
    assert list(frame.columns) == [
        *(("image AUROC", column) for column in ("paper", "recorded (paper)", "this run", "verdict")),
        *(("AUPRO", column) for column in ("paper", "recorded (paper)", "this run")),  # nothing printed, no verdict
        ("", "note"),
    ]
    assert frame.loc["BSDRD"].tolist() == [
        "–", "87.0 [84.5, 89.5] n=3", "80.0 n=1", "", "–", "70.0 [70.0, 70.0] n=3", "60.0 n=1", "",
    ]  # fmt: skip
    assert frame.loc["RD4AD"].tolist() == ["81.5", "–", "–", "not run yet", "–", "–", "–", "not run yet"]
    assert frame.loc["Another"].tolist() == [
        "97.7",
        "–",
        "–",
        "",
        "–",
        "–",
        "–",
        "not run: code",
    ]
    assert "87.0 [84.5, 89.5] n=3" in report.styled(frame).to_html()


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((81.0, 81.4, 81.9), "agrees"), ((84.0, 84.2, 84.1), "above"), ((70.0, 70.2), "needs at least 3 seeds")],
)
def test_printed_level_gets_a_verdict(root: Path, values: tuple[float, ...], verdict: str) -> None:
    write_records("rd4ad", {"image_auroc": values, "aupro": values})
    assert results_table("bsdrd", "main", "paper").loc["RD4AD", ("image AUROC", "verdict")] == verdict


def test_near_100_the_interval_is_the_bootstrap_and_stays_below(root: Path) -> None:
    write_records("rd4ad", {"image_auroc": (99.7, 100.0, 99.9), "aupro": (70.0, 70.0, 70.0)})
    cell = results_table("bsdrd", "main", "paper").loc["RD4AD", ("image AUROC", "recorded (paper)")]
    low, high = re.fullmatch(r"99\.9 \[([\d.]+), ([\d.]+)\]‡ n=3", cell).groups()
    assert float(low) <= 99.9 <= float(high) <= 100


def test_records_from_other_data_are_not_compared(root: Path) -> None:
    write_claims(root, claim("image"))
    write_records("rd4ad", all_metrics(80))
    write_records("bsdrd", all_metrics(86), prints={"data": "other", "weights": "w"})
    assert verdicts() == {"image (primary)": "cannot be judged (records differ in data or weights)"}


def test_results_table_of_some_metrics(root: Path) -> None:
    frame = results_table("bsdrd", "main", "paper", ["aupro"])
    assert {title for title, _ in frame.columns} == {"AUPRO", ""}


def test_smoke_column_is_called_synthetic_and_recorded_runs_stay_beside_it(root: Path) -> None:
    write_records("rd4ad", {"image_auroc": (50.0,), "aupro": (40.0,)}, "smoke", here=True)
    write_records("rd4ad", {"image_auroc": (77.0,), "aupro": (66.0,)}, "quick")
    frame = results_table("bsdrd", "main", "smoke")
    assert frame.loc["RD4AD", ("image AUROC", "synthetic")] == "50.0 n=1"
    assert frame.loc["RD4AD", ("image AUROC", "recorded (quick)")] == "77.0 n=1"
    assert "this run" not in frame.columns.get_level_values(1)
    html = report.styled(frame).to_html()
    assert "#999" in html
    write_records(
        "rd4ad", {"image_auroc": (78.0,), "aupro": (67.0,)}, "paper"
    )  # one profile a table: the best there is
    frame = results_table("bsdrd", "main", "smoke")
    assert frame.loc["RD4AD", ("image AUROC", "recorded (paper)")] == "78.0 n=1"


def test_profiles_are_not_mixed(root: Path) -> None:
    write_records("rd4ad", {"image_auroc": (78.0,), "aupro": (67.0,)}, "paper")
    frame = results_table("bsdrd", "main", "quick")
    assert frame.loc["RD4AD", ("image AUROC", "recorded (quick)")] == "–"


def test_unknown_table(root: Path) -> None:
    with pytest.raises(ValueError, match="bsdrd has no table 'other': there is main"):
        results_table("bsdrd", "other", "paper")


def test_per_class_table(root: Path) -> None:
    write_records("bsdrd", {"image_auroc": (86.0, 88.0)}, per_class=lambda seed, kind: 70.0 + seed + len(kind))
    frame = per_class_table("bsdrd", ["bsdrd", "rd4ad"], "image_auroc", "paper")
    assert list(frame.index) == ["bsdrd"]  # rd4ad has no record
    assert list(frame.columns) == [*sorted(TYPES), "all"]
    assert frame.loc["bsdrd", "fray"] == show([74.0, 75.0], "image_auroc")
    assert frame.loc["bsdrd", "all"] == show([86.0, 88.0], "image_auroc")


# --- Claims ----------------------------------------------------------------------------------------------------------


def verdicts(profile: str = "paper") -> dict[str, str]:
    frame = claims_table("bsdrd", profile)
    return dict(zip(frame["claim"], frame[f"outcome ({shelf(profile, ROWS).recorded_profile})"], strict=True))


def test_claims_without_runs(root: Path) -> None:
    write_claims(root, claim("sample_level"))
    assert verdicts() == {"sample level (primary)": "not run yet: bsdrd, rd4ad"}
    write_records("rd4ad", all_metrics(80))
    frame = claims_table("bsdrd", "paper")
    assert frame["outcome (paper)"].tolist() == ["not run yet: bsdrd"]
    assert frame["difference"].tolist() == ["–"]
    assert frame["n"].tolist() == ["–"]


def test_a_claim_about_rows_that_the_profile_leaves_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_claims(root, claim("sample_level"))
    monkeypatch.setattr(bsdrd, "planned_seeds", lambda row, profile: int(row != "rd4ad"))
    said = "not run: time (rd4ad: not part of paper)"
    assert verdicts() == {"sample level (primary)": said}
    assert report.findings("bsdrd", "paper").splitlines()[0].endswith(said)
    write_records("rd4ad", all_metrics(80))  # it can be run all the same
    assert verdicts() == {"sample level (primary)": "not run yet: bsdrd"}


def test_no_claims_at_all(root: Path) -> None:
    assert claims_table("bsdrd", "paper").empty


def test_reconstruction_verdicts_with_three_seeds(root: Path) -> None:
    write_claims(root, *(claim(metric, metric) for metric in METRICS))
    write_records("rd4ad", all_metrics(80))
    write_records("bsdrd", {"image_auroc": around(86), "pixel_auroc": around(80.1), "aupro": around(70)})
    assert verdicts() == {
        "image auroc (primary)": "supports",
        "pixel auroc (primary)": "no evidence",
        "aupro (primary)": "contradicts",
    }
    frame = claims_table("bsdrd", "paper").set_index("claim")
    line = frame.loc["image auroc (primary)"]
    assert line["compared"] == "bsdrd − rd4ad, image AUROC"
    assert line["difference"] == "+6.0"
    assert line["n"] == 3
    half = 2.776 * 0.5 * (2 / 3) ** 0.5  # t(0.975, 4), spread 0.5, two means of three
    assert line["95 % over seeds"] == f"[{6 - half:+.1f}, {6 + half:+.1f}]"
    assert frame.loc["aupro (primary)", "difference"] == "-10.0"


def test_printed_gain_gets_a_gains_verdict(root: Path) -> None:
    write_claims(root, claim("near", printed=6.2), claim("far", printed=20.0), claim("little", printed=1.0))
    write_records("rd4ad", all_metrics(80))
    write_records("bsdrd", all_metrics(86))
    assert list(verdicts().values()) == ["reproduced", "direction only", "larger than printed"]


def test_holm_takes_back_what_one_test_alone_would_give(root: Path) -> None:
    """p = 0.03 each: alone it supports, among three it does not."""
    write_records("rd4ad", all_metrics(80, 1.0))
    write_records("bsdrd", all_metrics(82.7, 1.0))
    write_claims(root, claim("alone"))
    assert verdicts() == {"alone (primary)": "supports"}
    write_claims(root, *(claim(metric, metric) for metric in METRICS))
    judged = judge_claims("bsdrd", shelf("paper", ROWS))
    assert all(m.difference.low > 0 and 0.017 < m.difference.p < 0.05 for m in judged)
    assert [m.verdict for m in judged] == ["no evidence"] * 3
    # claims that are not primary are not counted
    write_claims(root, claim("alone"), *(claim(f"{metric} too", metric, primary=False) for metric in METRICS))
    assert verdicts()["alone (primary)"] == "supports"


def test_claims_that_are_not_primary_get_no_verdict(root: Path) -> None:
    write_claims(root, claim("ablation", primary=False))
    write_records("rd4ad", all_metrics(80))
    write_records("bsdrd", all_metrics(86))
    assert verdicts() == {"ablation": "+  (not primary: interval only)"}


def test_two_seeds_get_no_verdict(root: Path) -> None:
    write_claims(root, claim("sample_level"))
    write_records("rd4ad", {"image_auroc": (80.0, 80.1, 79.9)})
    write_records("bsdrd", {"image_auroc": (86.0, 86.1)})
    assert verdicts() == {"sample level (primary)": "+  (needs at least 3 seeds)"}


@pytest.mark.parametrize(("mean", "sign"), [(86.0, "+"), (80.1, "0"), (74.0, "−")])
def test_quick_gives_a_direction_only(root: Path, mean: float, sign: str) -> None:
    write_claims(root, claim("sample_level"))
    write_records("rd4ad", all_metrics(80), "quick")
    write_records("bsdrd", all_metrics(mean), "quick")
    assert verdicts("quick") == {"sample level (primary)": f"{sign}  (quick runs show a direction only)"}


def test_one_seed_each_has_no_interval(root: Path) -> None:
    write_claims(root, claim("sample_level"))
    write_records("rd4ad", {"image_auroc": (80.0,)}, "quick")
    write_records("bsdrd", {"image_auroc": (86.0,)}, "quick")
    frame = claims_table("bsdrd", "quick")
    assert frame["95 % over seeds"].tolist() == ["–"]
    assert frame["outcome (quick)"].tolist() == ["+  (quick runs show a direction only)"]


def test_synthetic_runs_are_never_judged(root: Path) -> None:
    write_claims(root, claim("sample_level"))
    write_records("rd4ad", all_metrics(80), "smoke", here=True)
    write_records("bsdrd", all_metrics(86), "smoke", here=True)
    assert verdicts("smoke") == {"sample level (primary)": "not run yet: bsdrd, rd4ad"}  # the recorded column is empty


def test_order_claims_compare_the_gain_at_some_types(root: Path) -> None:
    """bsdrd gains 6 at cracks and nothing elsewhere: 6 less the mean gain of 2."""
    write_claims(root, claim("small", kind="order", types=["crack"], primary=False), claim("all"))
    write_records("rd4ad", all_metrics(80), per_class=lambda seed, kind: 80.0 + seed)
    write_records("bsdrd", all_metrics(82), per_class=lambda seed, kind: 80.0 + seed + 6 * (kind == "crack"))
    judged = judge_claims("bsdrd", shelf("paper", ROWS))[0]
    assert judged.difference.mean == pytest.approx(6 - 2)
    assert judged.images.low <= judged.images.mean <= judged.images.high
    line = claims_table("bsdrd", "paper").iloc[0]
    assert line["compared"] == "bsdrd − rd4ad, image AUROC at crack"
    assert line["difference"] == "+4.0"


def test_order_claim_about_a_type_that_is_not_there(root: Path) -> None:
    write_claims(root, claim("small", kind="order", types=["crack", "rust"]))
    write_records("rd4ad", all_metrics(80))
    write_records("bsdrd", all_metrics(82))
    with pytest.raises(ValueError, match=r"claim 'small' names defect types that .* lacks: \['rust'\]"):
        claims_table("bsdrd", "paper")


def test_bootstrap_over_images_is_paired_and_reads_the_arrays(root: Path) -> None:
    write_claims(root, claim("image"), claim("pixel", "aupro"))
    write_records("rd4ad", all_metrics(80))
    write_records("bsdrd", all_metrics(86))
    image, pixel = judge_claims("bsdrd", shelf("paper", ROWS))
    books = shelf("paper", ROWS)
    means = []
    for row in ("bsdrd", "rd4ad"):
        arrays = [r.arrays for r in books.of(bsdrd, row)[0]]
        pairs = [(a["scores"][6:, None] > a["scores"][None, :6]).mean() for a in arrays]  # AUROC by its definition
        means.append(100 * np.mean(pairs))
    assert image.images.mean == pytest.approx(means[0] - means[1])
    assert image.images.low <= image.images.mean <= image.images.high
    assert image.images.low < image.images.high
    assert (pixel.images.mean, pixel.images.low, pixel.images.high) == (0, 0, 0)  # equal maps under equal weights
    histogram = {k.removeprefix("histogram_"): v for k, v in arrays[0].items() if k.startswith("histogram_")}
    assert np.isfinite(metrics_from_histograms(histogram)["aupro"])


def test_records_of_other_test_images_are_not_compared(root: Path) -> None:
    write_claims(root, claim("image"))
    write_records("rd4ad", all_metrics(80))
    write_records("bsdrd", all_metrics(86), names="another")
    with pytest.raises(ValueError, match="'image': the records were not tested on the same images"):
        claims_table("bsdrd", "paper")


# --- This run against the record -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recorded", "here", "words"),
    [
        ((80.0, 81.0, 82.0), (82.9,), "image AUROC agrees with the record: off by 1.90, allowed 2.00"),
        ((80.0, 81.0, 82.0), (83.1,), "image AUROC does NOT agree with the record: off by 2.10, allowed 2.00"),
        ((80.0,), (80.4,), "agrees with the record: off by 0.40, allowed 0.50"),
        ((80.0,), (79.4,), "does NOT agree with the record: off by 0.60, allowed 0.50"),
    ],
)
def test_agreement(root: Path, recorded: tuple[float, ...], here: tuple[float, ...], words: str) -> None:
    write_records("rd4ad", {"image_auroc": recorded})
    write_records("rd4ad", {"image_auroc": here}, here=True)
    assert words in agreement("bsdrd", "rd4ad", "image_auroc", "paper")


def test_agreement_with_nothing_to_compare(root: Path) -> None:
    write_records("rd4ad", {"image_auroc": (80.0,)})
    text = agreement("bsdrd", "rd4ad", "image_auroc", "paper")
    assert text == "rd4ad: nothing to compare (this run: 0, recorded: 1, profile paper)"


def test_a_table_with_a_column_a_data_set(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(row: str, column: str, value: str, key: str) -> dict[str, str]:
        status = "runnable" if key else "not run: code"
        return {"row": row, "column": column, "metric": "image_auroc", "unit": "%", "value": value, "key": key,
                "higher_is_better": "true", "status": status, "not_comparable": "", "source": "made up"}  # fmt: skip

    lines = [
        line("Ours", "tiles", "90.0", "bsdrd"),
        line("Ours", "nuts", "91.0", "rd4ad"),
        line("Ours", "average", "90.5", ""),
        line("Theirs", "tiles", "80.0", ""),
        line("Plain", "tiles", "", "patchcore"),
    ]
    monkeypatch.setattr(report, "printed_table", lambda study_name, table: lines)
    write_records("bsdrd", {"image_auroc": (88.0, 90.0, 92.0)})
    frame = results_table("bsdrd", "main", "paper")
    assert list(frame.columns) == ["tiles", "nuts", "average", "verdict"]
    assert list(frame.index) == ["Ours: paper", "Ours: recorded (paper)", "Theirs: paper", "Plain: paper"]
    assert list(frame.loc["Ours: paper"])[:3] == ["90.0", "91.0", "90.5"]
    assert frame.loc["Ours: recorded (paper)", "tiles"].startswith("90.0 [")
    assert frame.loc["Ours: recorded (paper)", "nuts"] == "–"
    assert frame.loc["Ours: recorded (paper)", "verdict"] == "tiles: agrees; means: cannot be judged (1 of 2 data sets)"
    assert frame.loc["Theirs: paper", "verdict"] == "not run: code"
    assert frame.loc["Plain: paper", "verdict"] == "not run yet"


def test_a_row_that_needs_more_is_compared_where_data_and_weights_agree(root: Path) -> None:
    write_claims(root, claim("image"))
    write_records("rd4ad", all_metrics(80))
    write_records("bsdrd", all_metrics(86), prints={"data": "d", "weights": "w", "masks": "m"})
    assert not verdicts()["image (primary)"].startswith("cannot be judged")
