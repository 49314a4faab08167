"""`reproduce` on toy notebooks with real kernels (few: each takes seconds), and the page and the generated Markdown."""

import json
import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from defectlab import reproduce, runs
from defectlab.reproduce import Progress, clock, numbered_notebooks
from defectlab.verdicts import page
from defectlab.verdicts.page import Outcome

LITERALS = 'profile = "smoke"\ndevice = "auto"\nminutes = None'


def write_notebook(folder: Path, name: str, source: str, parameters: str = LITERALS) -> Path:
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(source)]
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project without studies: notebooks in `toys`, runs in `runs`."""
    monkeypatch.setattr(runs, "project_root", lambda: tmp_path)
    monkeypatch.setattr(page, "STUDIES", {})
    return tmp_path


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the process that runs a notebook: fails the test if anything is started."""
    monkeypatch.setattr(reproduce, "start", lambda *_: pytest.fail("a notebook was started"))


def run(root: Path, *options: str) -> int:
    options_of = dict(zip(options[::2], options[1::2], strict=True))
    notebooks = options_of.get("--notebooks")
    minutes = options_of.get("--minutes")
    return reproduce.reproduce(
        "smoke",
        notebooks=notebooks.split(",") if notebooks else None,
        minutes=float(minutes) if minutes else None,
        device="cpu",
        jobs=int(options_of.get("--jobs", 1)),
        folder=root / "toys",
    )


GOOD = "import os, sys\nfrom pathlib import Path\nprint(profile, device, minutes, sys.executable, Path.cwd().name)"


def test_a_failing_notebook_is_kept_and_named_and_resuming_skips_what_is_done(root, capsys, monkeypatch):
    decoy = root / "jupyter" / "kernels" / "python3"  # a kernel of the user's that must not win
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(root / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.setenv("MPLBACKEND", "agg")
    figure = "import matplotlib.pyplot as plt\nplt.plot([1, 2], label='<x>')\nplt.show()\nprint(minutes)"
    write_notebook(root / "toys", "10_fails", "print('so far')\nraise KeyError('no such row')")
    write_notebook(root / "toys", "03_good", f"{GOOD}\n{figure}")
    assert run(root, "--minutes", "5") == 1
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert re.fullmatch(r"\[1/2\] 03_good  \d+ s   \(elapsed 0:\d\d, about 0:\d\d to go\)", lines[0])
    assert re.fullmatch(r"\[2/2\] 10_fails  FAILED \(KeyError: 'no such row'\)  \d+ s   \(elapsed 0:\d\d\)", lines[1])
    assert "1 of 2 notebooks are not done" in out
    assert "10_fails  failed: KeyError: 'no such row'" in out.split("not done")[1]
    # what the good one printed: its parameters, this python, the notebooks' folder; and its figure
    kept = root / "runs" / "smoke" / "notebooks"
    assert sorted(p.name for p in kept.glob("*.*") if p.suffix in (".ipynb", ".html")) == [
        "03_good.html",
        "03_good.ipynb",
        "10_fails.error.html",
        "10_fails.error.ipynb",
    ]
    executed = nbformat.read(kept / "03_good.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    printed_profile, device, minutes, python, folder = text.splitlines()[0].split()
    assert (printed_profile, device, python, folder) == ("smoke", "cpu", sys.executable, "toys")
    assert 4 < float(minutes) <= 5
    assert any("image/png" in output.get("data", {}) for output in outputs)
    shown = (kept / "03_good.html").read_text()
    assert "data:image/png;base64," in shown
    assert "require.min.js" not in shown
    failed = nbformat.read(kept / "10_fails.error.ipynb", as_version=4)
    assert any("so far" in output.get("text", "") for cell in failed.cells for output in cell.get("outputs", []))
    index = (root / "runs" / "smoke" / "index.html").read_text()
    assert 'href="notebooks/03_good.html"' in index
    assert 'href="notebooks/10_fails.error.html"' in index
    assert "KeyError: &#x27;no such row&#x27;" in index
    # again: the good one is skipped whatever the budget, the repaired one runs
    write_notebook(root / "toys", "10_fails", "pass")
    assert run(root) == 0
    out = capsys.readouterr().out
    assert out.startswith("[1/2] 03_good  done before\n[2/2] 10_fails  ")
    assert not list(kept.glob("*.error.*"))


def finished(root: Path, name: str, *, cut_short: bool = False, **parameters: str) -> Path:
    """An executed notebook as an earlier call with the same source left it."""
    kept = root / "runs" / "smoke" / "notebooks"
    kept.mkdir(parents=True, exist_ok=True)
    given = {"profile": "smoke", "device": "cpu"} | parameters
    source = root / "toys" / f"{name}.ipynb"
    planned = reproduce.prepare(source, kept, given, None, reproduce.content_hash())
    executed = nbformat.read(source, as_version=4)
    executed.metadata["defectlab"] = {"made_from": planned.made_from, "seconds": 7.0, "cut_short": cut_short}
    nbformat.write(executed, kept / source.name)
    return kept / source.name


def plan(root: Path, content: str | None = None, **parameters: str) -> reproduce.Notebook:
    given = {"profile": "smoke", "device": "cpu"} | parameters
    source = numbered_notebooks(root / "toys")[0]
    return reproduce.prepare(
        source, root / "runs" / "smoke" / "notebooks", given, None, content or reproduce.content_hash()
    )


def test_an_output_counts_only_for_the_same_source_parameters_and_package(root):
    write_notebook(root / "toys", "03_a", "1")
    assert not reproduce.finished_before(plan(root))
    finished(root, "03_a")
    assert reproduce.finished_before(plan(root))
    assert not reproduce.finished_before(plan(root, device="auto"))
    assert not reproduce.finished_before(plan(root, content="another version of the package"))
    finished(root, "03_a", cut_short=True)
    assert not reproduce.finished_before(plan(root))
    finished(root, "03_a")
    write_notebook(root / "toys", "03_a", "2")
    assert not reproduce.finished_before(plan(root))


def test_the_content_hash_sees_records_and_printed_numbers(root):
    before = reproduce.content_hash()
    claims = root / "results" / "papers" / "x" / "claims.toml"
    claims.parent.mkdir(parents=True)
    claims.write_text("a = 1")
    after = reproduce.content_hash()
    claims.write_text("a = 2")
    assert len({before, after, reproduce.content_hash()}) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"profile": "fast"}, "unknown profile 'fast'"),
        ({"notebooks": ["03", "7"]}, "unknown notebook '7': there is 03_a, 20_b"),
        ({"device": "tpu"}, "'tpu' is not available"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"minutes": 0.0}, "minutes must be more than 0"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"seeds": [0]}, "20_b.ipynb has no parameter 'seeds'"),
        ({"folder": Path("nowhere")}, "no notebook NN_*.ipynb"),
    ],
)
def test_a_wrong_argument_ends_with_2_before_anything_runs(root, no_kernel, capsys, options, named):
    write_notebook(root / "toys", "03_a", "1", LITERALS + "\nseeds = None")
    write_notebook(root / "toys", "20_b", "1")
    arguments = {"profile": "smoke", "folder": root / "toys"} | options
    assert reproduce.reproduce(**arguments) == 2
    assert named in capsys.readouterr().err
    assert not (root / "runs" / "smoke" / "index.html").exists()


@pytest.mark.parametrize("argv", [["--profile", "fast"], ["--seeds", "a"], ["--jobs", "x"], ["--colour", "red"]])
def test_the_command_line_refuses_with_2(root, no_kernel, argv):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(argv)
    assert stop.value.code == 2


def test_an_unknown_parameter_of_a_notebook_is_an_error(root, no_kernel, capsys):
    write_notebook(root / "toys", "03_a", "1", LITERALS + "\nepochs = 3")
    assert run(root) == 2
    assert "unknown parameter 'epochs'" in capsys.readouterr().err


def test_a_second_reproduce_of_a_profile_waits_its_turn(root, no_kernel, capsys):
    write_notebook(root / "toys", "03_a", "1")
    with reproduce.only_one(root / "runs" / "smoke" / "notebooks", "smoke"):
        assert run(root) == 2
    assert "another reproduce of profile smoke is running" in capsys.readouterr().err


def test_numbers_and_beginnings_select(root):
    for name in ("20_bsdrd", "00_start", "21_ablation", "notes"):
        write_notebook(root / "toys", name, "1")
    names = [[p.stem for p in numbered_notebooks(root / "toys", w)] for w in (None, ["21", "00"], ["2"], ["20_bs"])]
    assert names == [
        ["00_start", "20_bsdrd", "21_ablation"],
        ["00_start", "21_ablation"],
        ["20_bsdrd", "21_ablation"],
        ["20_bsdrd"],
    ]


def test_the_budget_stops_what_was_not_started(root, capsys, monkeypatch):
    """A notebook that outlives the budget is cut short, the next one is not started, one that is done stays done."""
    for name in ("03_a", "20_b", "30_c"):
        write_notebook(root / "toys", name, "1")
    finished(root, "30_c")

    class Ended:
        returncode = 0

        def poll(self) -> int:
            return 0

    def start(notebook, minutes, jobs):
        nbformat.write(nbformat.read(notebook.source, as_version=4), notebook.beside(".running.ipynb"))
        notebook.process, notebook.minutes = Ended(), minutes
        notebook.started = reproduce.time.monotonic() - 100

    clock_now, real = [0.0], reproduce.time.monotonic
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: real() + clock_now[0])
    monkeypatch.setattr(reproduce, "close", lambda notebook: clock_now.__setitem__(0, 100.0))
    monkeypatch.setattr(reproduce, "start", start)
    assert run(root, "--minutes", "1") == 1
    out = capsys.readouterr().out
    assert "[1/3] 03_a  stopped by its budget" in out
    assert "[2/3] 20_b  not started\n[3/3] 30_c  done before\n" in out
    assert "20_b  not started: the 1 minutes were used up" in out


def test_ctrl_c_names_what_is_done_and_ends_the_children(root, capsys, monkeypatch):
    write_notebook(root / "toys", "03_a", "1")
    write_notebook(root / "toys", "20_b", "import time\ntime.sleep(600)")
    finished(root, "03_a")
    seen = []

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    real = reproduce.start
    monkeypatch.setattr(reproduce, "start", lambda notebook, *rest: (seen.append(notebook), real(notebook, *rest)))
    monkeypatch.setattr(reproduce.time, "sleep", interrupted)
    assert run(root) == 130
    assert "done: 03_a. The same command continues." in capsys.readouterr().err
    assert [n.name for n in seen] == ["20_b"]
    assert seen[0].process.returncode == -9
    assert not seen[0].output.exists()


def test_the_estimate_uses_earlier_times_and_shares_them_between_jobs(root, capsys):
    times = root / "seconds.json"
    times.write_text(json.dumps({"20_b": 100.0, "30_c": 60.0}))
    waiting = [reproduce.Notebook(Path(f"{name}.ipynb"), Path("x"), {}, None, "") for name in ("20_b", "30_c", "40_d")]
    progress = Progress(4, 1, times)
    assert progress.to_go(waiting, []) == pytest.approx(100 + 60 + 80)  # 40_d has no time: the mean of the others
    assert Progress(4, 2, times).to_go(waiting, []) == pytest.approx(120)
    assert progress.to_go([], []) is None
    progress.line(Outcome("03_a", "done", 20.0, ""), waiting, [])
    assert json.loads(times.read_text())["03_a"] == 20.0
    assert capsys.readouterr().out == "[1/4] 03_a  20 s   (elapsed 0:00, about 3:40 to go)\n"


def test_clock():
    assert [clock(s) for s in (0, 72, 3599.6, 7384)] == ["0:00", "1:12", "1:00:00", "2:03:04"]


# --- The page and the generated Markdown -----------------------------------------------------------------------------


class Study:
    TITLE = "A <study>"
    TABLES: dict[str, str] = {"main": "its table", "broken": "its other table"}  # noqa: RUF012
    ROWS: dict[str, dict[str, object]] = {"smoke": {}}  # noqa: RUF012


@pytest.fixture
def toy_study(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One study with a table that works and one whose record is broken."""

    def results_table(name: str, table: str, profile: str, metrics: list[str], books: object) -> pd.DataFrame:
        if table == "broken":
            raise RuntimeError("x.json is not a readable record")
        return pd.DataFrame({("image AUROC", "paper"): ["97.7"]}, index=pd.Index(["row one"], name="row"))

    monkeypatch.setattr(page, "STUDIES", {"toy": "unused"})
    monkeypatch.setattr(page, "study", lambda name: Study)
    monkeypatch.setattr(page.report, "results_table", results_table)
    monkeypatch.setattr(page.report, "claims_table", lambda name, profile, books: pd.DataFrame())
    return root


def test_a_table_that_cannot_be_built_says_so_in_its_place(toy_study: Path):
    results = [Outcome("03_a", "done", 1800.0, ""), Outcome("20_b", "failed", 1800.0, "ValueError: a < b")]
    with pytest.raises(page.IncompletePage, match=r"its other table: x\.json is not a readable record") as raised:
        page.write_page("smoke", results)
    text = raised.value.path.read_text()
    assert text.index("its other table") < text.index("could not be built: x.json is not a readable record")
    assert "row one" in text and "97.7" in text
    assert "A &lt;study&gt;" in text and "ValueError: a &lt; b" in text
    assert "1.00 hours in all" in text and "Failed: 20_b." in text
    assert "<script" not in text and "http" not in text


def test_a_page_without_problems_adds_what_earlier_calls_left(toy_study: Path, monkeypatch):
    monkeypatch.setattr(Study, "TABLES", {"main": "its table"})
    write_notebook(toy_study / "toys", "03_a", "1")
    finished(toy_study, "03_a")
    written = page.write_page("smoke")
    assert written == toy_study / "runs" / "smoke" / "index.html"
    assert "<td>03_a<td>done before<td>0.1" in written.read_text()


def test_reproduce_ends_with_1_where_a_table_is_broken(toy_study: Path, no_kernel, capsys):
    write_notebook(toy_study / "toys", "03_a", "1")
    finished(toy_study, "03_a")
    assert run(toy_study) == 1
    assert "not a readable record" in capsys.readouterr().out


def test_markdown_keeps_rows_and_drops_columns_without_values():
    columns = pd.MultiIndex.from_tuples([("image AUROC", "paper"), ("image AUROC", "recorded (quick)"), ("", "note")])
    frame = pd.DataFrame(
        [["97.7", "–", "a|b"], ["–", "–", ""]], index=pd.Index(["x", "y"], name="row"), columns=columns
    )
    assert page._markdown(frame).splitlines() == [
        "| row | image AUROC, paper | note |",
        "| --- | --- | --- |",
        "| x | 97.7 | a\\|b |",
        "| y | – |  |",
    ]


def test_update_generated_replaces_only_what_is_between_the_marks(root):
    readme = root / "README.md"
    readme.write_text("before\n")
    with pytest.raises(ValueError, match="has no place for the verdicts"):
        page.update_generated()
    readme.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    assert page.update_generated() == [readme]
    assert readme.read_text() == f"before\n{page.BEGIN}\n\n\n\n{page.END}\nafter\n"
    assert page.update_generated() == []


def test_readme_and_tables_are_up_to_date():
    outdated = [path.name for path, text in page.generated().items() if not path.exists() or path.read_text() != text]
    assert not outdated, f"run `python -m defectlab report` and commit {outdated}"
