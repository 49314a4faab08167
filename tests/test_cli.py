"""The command line, called in this process: its errors, its order, its time budget, and scoring one's own pictures."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from defectlab import batch, runs
from defectlab.__main__ import main
from defectlab.data.synthetic import tiles as synthetic
from defectlab.data.synthetic.pasted import add_defect
from defectlab.files import DataError
from defectlab.own.score import read_model
from defectlab.papers import bsdrd
from defectlab.runs import NonFiniteLoss, OutOfTime, Result
from defectlab.studies import bsdrd as bsdrd_
from defectlab.studies.bsdrd import PRIMARY, ROWS


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty project folder in place of the repository."""
    monkeypatch.setattr(runs, "project_root", lambda: tmp_path)
    return tmp_path


def fake_row(settings, seed, data, device, session) -> Result:
    metrics = {"image_auroc": 90.0 + seed, "pixel_auroc": 80.0, "aupro": 70.0}
    return Result(metrics, {}, {}, {"loss": [1.0]}, {"scores": np.zeros(3)}, {}, {}, "fp32")


@pytest.fixture
def study(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """BSDRD without data and without training. -> (row, seed) of every run computed, in order."""
    computed: list[tuple[str, int]] = []
    names = {settings: row for row, settings in ROWS["quick"].items()}

    def run_row(settings, seed, data, device, session):
        computed.append((names[settings], seed))
        return fake_row(settings, seed, data, device, session)

    monkeypatch.setattr(bsdrd, "load", lambda settings, device: SimpleNamespace(label="pretended tiles"))
    monkeypatch.setattr(bsdrd, "fingerprints", lambda settings: {"data": "d", "weights": "w"})
    monkeypatch.setattr(bsdrd, "run_row", run_row)
    return computed


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nonsense"], "invalid choice: 'nonsense' (choose from 'reverse_distillation', 'bsdrd',"),
        (["run", "bsdrd", "--profile", "fast"], "invalid choice: 'fast' (choose from 'smoke', 'quick', 'paper')"),
        (["run", "bsdrd", "--seeds", "one"], "argument --seeds: invalid"),
        (["run", "bsdrd", "--minutes", "soon"], "argument --minutes: invalid"),
        (["run"], "the following arguments are required: study"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "the following arguments are required: COMMAND"),
        (["score", "--images", "x"], "one of the arguments --model --train-good is required"),
    ],
)
def test_arguments_that_cannot_be_understood(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert message.replace("'", "") in shown.replace("'", "")  # Python 3.12 quotes the choices no more


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "bsdrd", "--rows", "rd4ad,rd5ad"],
            "error: unknown row 'rd5ad' of bsdrd: use some of rd4ad, struct_only",
        ),
        (["status", "bsdrd", "--rows", "rd5ad"], "error: unknown row 'rd5ad' of bsdrd"),
        (["run", "bsdrd", "--tasks", "rd5ad:0"], "error: unknown row 'rd5ad' of bsdrd"),
        (["run", "bsdrd", "--tasks", "rd4ad"], "error: "),
        (["run", "bsdrd", "--device", "tpu"], "error: device 'tpu' is not available here: use auto, cpu"),
        (["run", "bsdrd", "--jobs", "0"], "error: --jobs must be at least 1, got 0"),
        (["record", "--rows", "rd4ad"], "error: --rows and --seeds need a study"),
    ],
)
def test_values_that_do_not_exist(
    arguments: list[str], message: str, study: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(message)
    assert len(shown.splitlines()) == 1
    assert study == []


def test_missing_data_name_the_script(root: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("DEFECTLAB_DATA", str(root / "data"))
    assert main(["run", "bsdrd", "--rows", "rd4ad", "--seeds", "0", "--device", "cpu"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "python data_scripts/magnetic_tile.py" in shown


def test_optional_rows_are_left_out_where_their_data_lack(study: list, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = ROWS["quick"]["struct_only"]

    def fingerprints(settings) -> dict[str, str]:
        if settings == lacking:
            raise DataError("no such set")
        return {"data": "d", "weights": "w"}

    monkeypatch.setattr(bsdrd, "fingerprints", fingerprints)
    assert "struct_only" in {t.row for t in batch.tasks("bsdrd", "quick")}  # not optional: an error when it is run
    monkeypatch.setattr(bsdrd, "OPTIONAL", ("struct_only", "patchcore"), raising=False)
    left = {t.row for t in batch.tasks("bsdrd", "quick")}
    assert "struct_only" not in left
    assert "patchcore" in left  # optional, and there
    assert [t.row for t in batch.tasks("bsdrd", "quick", ["struct_only"])] == ["struct_only"]  # named: listed


def test_corrupt_record_is_an_error_and_no_traceback(study: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "bsdrd", "--rows", "rd4ad", "--seeds", "0", "--device", "cpu"]) == 0
    (path,) = runs.runs_dir("quick").glob("*.json")
    path.write_text("{")
    for arguments in (["run", "bsdrd"], ["status"], ["record"]):
        capsys.readouterr()
        assert main(arguments) == 1
        assert f"error: {path} is not a readable record" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteLoss("the loss is not finite: epoch 2, batch 3 of 4"),
        torch.OutOfMemoryError("CUDA out of memory.\nAnd pages of advice"),
    ],
)
def test_a_row_that_fails_is_an_error_and_the_others_run(
    study: list, monkeypatch: pytest.MonkeyPatch, capsys, error: Exception
) -> None:
    run_row = bsdrd_.run_row

    def fails_once(settings, seed, *others):
        if seed == 1:
            raise error
        return run_row(settings, seed, *others)

    monkeypatch.setattr(bsdrd, "run_row", fails_once)
    assert main(["run", "bsdrd", "--rows", "rd4ad", "--seeds", "0,1,2", "--device", "cpu"]) == 1
    assert [seed for _, seed in study] == [0, 2]
    said = capsys.readouterr()
    reason = str(error).splitlines()[0]
    assert said.err == f"error: rd4ad seed 1: {reason}\n"
    assert f"  failed: {reason}\n" in said.out


def test_interrupted_by_the_user(study: list, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bsdrd, "run_row", interrupted)
    assert main(["run", "bsdrd", "--device", "cpu"]) == 130
    assert "the same command continues" in capsys.readouterr().err


# --- Running and recording -------------------------------------------------------------------------------------------


def shown_rows(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()[1:]]


def test_status_lists_rows_in_the_order_of_running(study: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "bsdrd"]) == 0
    text = capsys.readouterr().out
    rows = list(ROWS["quick"])
    assert sorted(shown_rows(text)) == sorted(rows)
    assert shown_rows(text) == sorted(rows, key=lambda row: (row not in PRIMARY, rows.index(row)))
    assert text.splitlines()[0].split() == ["bsdrd", "(quick):", "row", "recorded", "here", "missing"]
    lines = dict(line.split(maxsplit=1) for line in text.splitlines()[1:])
    assert lines["rd4ad"].split() == ["-", "-", "0,1,2"]
    assert lines["gate_equal"].split() == ["-", "-", "0"]
    main(["run", "bsdrd", "--rows", "rd4ad", "--seeds", "0,2", "--device", "cpu"])
    main(["record", "bsdrd", "--seeds", "2"])
    capsys.readouterr()
    main(["status", "bsdrd", "--rows", "rd4ad"])
    assert capsys.readouterr().out.splitlines()[1].split() == ["rd4ad", "2", "0,2", "1"]


def test_status_of_all_studies(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--profile", "paper"]) == 0
    text = capsys.readouterr().out
    assert "reverse_distillation (paper): row" in text
    assert "bsdrd (paper): row" in text


def test_run_computes_what_is_missing_headline_rows_first(study: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "bsdrd", "--rows", "gate_equal,bsdrd,rd4ad", "--seeds", "0,1", "--device", "cpu"]) == 0
    assert study == [("bsdrd", 0), ("rd4ad", 0), ("bsdrd", 1), ("rd4ad", 1), ("gate_equal", 0), ("gate_equal", 1)]
    assert "[6/6] bsdrd gate_equal seed 1 (quick, cpu)" in capsys.readouterr().out
    main(["run", "bsdrd", "--rows", "bsdrd", "--seeds", "0,2", "--device", "cpu"])
    assert study[6:] == [("bsdrd", 2)]


def test_run_of_listed_tasks(study: list) -> None:
    assert main(["run", "bsdrd", "--tasks", "gate_equal:3,bsdrd:1", "--device", "cpu"]) == 0
    assert study == [("gate_equal", 3), ("bsdrd", 1)]


def test_no_minutes_stop_cleanly(study: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "bsdrd", "--minutes", "0", "--device", "cpu"]) == 0
    assert study == []
    assert re.search(r"0 minutes are used up: (\d+) of \1 left; run again to go on", capsys.readouterr().out)


def test_a_row_that_runs_out_of_time_stops_the_batch_cleanly(study: list, monkeypatch: pytest.MonkeyPatch, capsys):
    def out_of_time(settings, seed, data, device, session):
        assert session.deadline is not None
        study.append(("one", seed))
        raise OutOfTime("time budget used up after epoch 1 of 10; run again to go on")

    monkeypatch.setattr(bsdrd, "run_row", out_of_time)
    assert main(["run", "bsdrd", "--minutes", "5", "--device", "cpu"]) == 0
    assert len(study) == 1
    assert "after epoch 1 of 10; run again" in capsys.readouterr().out
    assert runs.read_records(runs.runs_dir("quick")) == []


class FakeChild:
    """A process that ends at once."""

    started: list[list[str]]
    shared: list[str]  # what each was told of how many run at once
    codes: list[int]

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.started.append(command)
        self.shared.append(env[runs.JOBS])

    def wait(self) -> int:
        return self.codes.pop(0)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> type[FakeChild]:
    FakeChild.started, FakeChild.shared, FakeChild.codes = [], [], [0, 0, 0]
    monkeypatch.setattr(batch.subprocess, "Popen", FakeChild)
    return FakeChild


def test_jobs_share_the_tasks(study: list, children: type[FakeChild]) -> None:
    tasks = ["run", "bsdrd", "--rows", "rd4ad,bsdrd", "--seeds", "0,1", "--device", "cpu"]
    assert main([*tasks, "--jobs", "3", "--minutes", "7"]) == 0
    given = [command[command.index("--tasks") + 1] for command in children.started]
    assert sorted(",".join(given).split(",")) == ["bsdrd:0", "bsdrd:1", "rd4ad:0", "rd4ad:1"]
    assert len(given) == 3
    for command in children.started:
        assert command[command.index("--minutes") + 1] == "7.0"
        assert command[command.index("--device") + 1] == "cpu"


def test_what_is_only_timed_runs_afterwards_and_alone(children: type[FakeChild]) -> None:
    rows = "cost_v5n,cost_v5s,v8n,v8s"
    assert main(["run", "d3n", "--rows", rows, "--seeds", "0", "--jobs", "2", "--minutes", "7", "--device", "cpu"]) == 0
    given = [command[command.index("--tasks") + 1] for command in children.started]
    assert given == ["v8n:0", "v8s:0", "cost_v5n:0,cost_v5s:0"]
    assert children.shared == ["2", "2", "1"]
    minutes = [float(command[command.index("--minutes") + 1]) for command in children.started]
    assert minutes[:2] == [7, 7] and 6.5 < minutes[2] < 7


def test_a_record_says_how_many_runs_shared_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs.provenance("cpu")["jobs"] == 1
    monkeypatch.setenv(runs.JOBS, "4")
    assert runs.provenance("cpu")["jobs"] == 4


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        ({"map50": 70.04, "kl": 1.0}, "map50 70.0"),
        ({"unexplained": 12.34, "kl": 0.5}, "unexplained 12.3, kl 0.5"),
        ({}, "done"),
    ],
)
def test_the_line_of_a_finished_run_shows_what_its_row_has(metrics: dict, line: str) -> None:
    assert batch.headline(runs.Record({"metrics": metrics, "costs": {}}, Path("run.json")), "d3n") == line
    costs = {"parameters_m": 2.7}
    line = "parameters_m 2.70" if line == "done" else line
    assert batch.headline(runs.Record({"metrics": metrics, "costs": costs}, Path("run.json")), "d3n") == line


def test_jobs_get_a_budget_of_no_minutes_too(study: list, children: type[FakeChild]) -> None:
    assert main(["run", "bsdrd", "--jobs", "2", "--minutes", "0", "--device", "cpu"]) == 0
    assert all("--minutes" in command for command in children.started)


@pytest.mark.parametrize("code", [1, 2, -9])
def test_a_job_that_failed_or_was_killed_is_no_success(study: list, children: type[FakeChild], code: int) -> None:
    children.codes[:] = [0, code]
    assert main(["run", "bsdrd", "--jobs", "2", "--device", "cpu"]) != 0


def test_record_promotes_finished_runs(study: list, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record"]) == 0
    assert capsys.readouterr().out.startswith("no finished run in")
    main(["run", "bsdrd", "--rows", "rd4ad,bsdrd", "--seeds", "0,1", "--device", "cpu"])
    capsys.readouterr()
    assert main(["record", "bsdrd", "--rows", "bsdrd", "--seeds", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    (record,) = runs.read_records(root / "results" / "runs")
    assert (record.row, record.seed) == (runs.row_identity(ROWS["quick"]["bsdrd"], "quick"), 1)
    assert main(["record"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["already recorded", "recorded", "recorded", "recorded"]


def test_record_refuses_smoke_runs(study: list, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bsdrd, "run_row", fake_row)
    assert main(["run", "bsdrd", "--rows", "rd4ad", "--profile", "smoke", "--device", "cpu"]) == 0
    assert main(["record", "--profile", "smoke"]) == 1
    assert "is a smoke run on synthetic data" in capsys.readouterr().err


# --- Scoring one's own pictures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good` with 24 drawn tiles to train on; `new` with two good ones and two with a fray."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, count in (("good", 24), ("new", 4)):
        (folder / name).mkdir()
        for index in range(count):
            tile = synthetic.draw_tile(rng, 64, 48)
            if name == "new" and index >= 2:
                tile, _ = add_defect(tile, "fray", rng)
            Image.fromarray(tile).save(folder / name / f"tile{index:02d}.png")
    return folder


def read_scores(folder: Path) -> dict[str, tuple[float, int]]:
    with (folder / "scores.csv").open(newline="") as file:
        return {line["picture"]: (float(line["score"]), int(line["anomalous"])) for line in csv.DictReader(file)}


@pytest.mark.parametrize("method", ["patchcore", "rd4ad"])
def test_train_on_good_pictures_then_score_with_the_model(
    method: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    common = ["score", "--images", str(pictures / "new"), "--device", "cpu"]
    options = ["--method", method, "--epochs", "1", "--teacher", "resnet18_random", "--size", "64"]
    assert main([*common, "--out", str(first), "--train-good", str(pictures / "good"), *options]) == 0
    model = first / f"{method}.safetensors"
    assert f"trained on 22 good pictures; saved {model}" in capsys.readouterr().out

    assert main([*common, "--out", str(second), "--model", str(model)]) == 0
    assert "4 pictures scored" in capsys.readouterr().out
    scores = read_scores(second)
    assert scores == read_scores(first)
    names = [f"tile{index:02d}.png" for index in range(4)]
    assert list(scores) == names
    assert len({score for score, _ in scores.values()}) == 4
    settings, dev, _ = read_model(model)
    assert (settings.model, settings.size, settings.teacher) == (method, 64, "resnet18_random")
    assert all(flag == int(score >= dev["threshold"]) for score, flag in scores.values())
    for name in names:
        one = np.load(second / f"{name}_map.npy")
        assert (one.shape, one.dtype) == ((256, 256), np.float32)
        if method == "rd4ad":
            assert float(one.max()) == pytest.approx(scores[name][0], abs=1e-5)
        with Image.open(second / f"{name}_map.png") as overlay:
            assert (overlay.size, overlay.mode) == ((256, 256), "RGB")


def test_a_file_that_is_no_model(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    for path in (text, foreign, tmp_path / "missing.safetensors", tmp_path):
        out = tmp_path / "out"
        assert main(["score", "--images", str(pictures / "new"), "--model", str(path), "--out", str(out)]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith(f"error: {path} is no model that this program saved")
        assert "--train-good" in shown
        assert not out.exists()


def test_model_that_lacks_tensors(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A header of ours over other tensors: as after a truncated copy, or from another version."""
    model = tmp_path / "patchcore.safetensors"
    header = {"model": "patchcore", "settings": '{"teacher": "resnet18_random", "size": 64}', "dev": '{"threshold": 1}'}
    save_file({"weight": torch.zeros(2)}, model, header)
    arguments = ["score", "--images", str(pictures / "new"), "--model", str(model), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--device", "cpu"]) == 1
    assert f"error: {model}" in capsys.readouterr().err


def test_pictures_that_are_not_there(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path / "out"), "--teacher", "resnet18_random", "--size", "64", "--method", "patchcore"]
    arguments = ["score", "--images", str(pictures / "new"), "--train-good", str(pictures / "new"), *options]
    assert main([*arguments, "--device", "cpu"]) == 1
    assert "holds 4 pictures: training needs at least 20 good ones" in capsys.readouterr().err
    model = tmp_path / "model.safetensors"
    header = {"model": "patchcore", "settings": '{"teacher": "resnet18_random", "size": 64}', "dev": '{"threshold": 1}'}
    save_file({"bank": torch.zeros(3, 384)}, model, header)
    assert main(["score", "--images", str(tmp_path / "none"), "--model", str(model), "--device", "cpu"]) == 1
    assert "holds no jpg, png, bmp or tif picture" in capsys.readouterr().err


def test_missing_weights_are_an_error(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEFECTLAB_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    arguments = ["score", "--images", str(pictures / "new"), "--train-good", str(pictures / "good")]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--size", "64", "--device", "cpu"]) == 1
    assert "error: no ImageNet weights for the teacher resnet18" in capsys.readouterr().err
