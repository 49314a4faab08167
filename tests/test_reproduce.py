"""`reproduce` on toy notebooks with real kernels (few: each takes seconds), and the page and the generated Markdown."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import nbformat
import pandas as pd
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from defectlab import reproduce, runs
from defectlab.__main__ import main
from defectlab.reproduce import numbered_notebooks
from defectlab.studies import Study
from defectlab.verdicts import page
from defectlab.verdicts.page import NotebookStatus

LITERALS = 'profile = "smoke"\ndevice = "auto"\nseeds = None\nminutes = None'


def write_notebook(folder: Path, name: str, source: str, parameters: str = LITERALS) -> Path:
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(source)]
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def toys(root: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder of notebooks of an empty project without studies; `reproduce` may change the environment."""
    monkeypatch.setattr(reproduce, "NOTEBOOKS", root / "toys")
    monkeypatch.setattr(page, "STUDIES", ())
    with patch.dict(os.environ):
        yield root / "toys"


@pytest.fixture
def kept(root: Path) -> Path:
    """Where executed notebooks lie."""
    return root / "runs" / "smoke" / "notebooks"


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a notebook is run."""
    monkeypatch.setattr(reproduce.papermill, "execute_notebook", lambda *_, **__: pytest.fail("a notebook was run"))


def outputs_of(path: Path) -> list[nbformat.NotebookNode]:
    return [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]


def call(*options: str) -> int:
    return main(["reproduce", "--device", "cpu", *options])


GOOD = """
import os, sys
from pathlib import Path
import matplotlib.pyplot as plt
print(profile, device, minutes, sys.executable, Path.cwd().name, os.environ.get("OMP_NUM_THREADS"))
plt.plot([1, 2], label='<x>')
plt.show()
"""


def test_a_failing_notebook_is_kept_and_named_and_the_same_command_goes_on(toys, root, kept, capsys, monkeypatch):
    decoy = root / "jupyter" / "kernels" / "python3"  # a kernel of the user's that must not win
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(root / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    write_notebook(toys, "10_fails", "print('so far')\nraise KeyError('no such row')")
    write_notebook(toys, "03_good", GOOD)
    assert call("--minutes", "5", "--jobs", "2") == 1
    out = capsys.readouterr().out
    times = r"  \d+ s   \(\d\.\d min, about \d\.\d to go\)"
    assert re.search(rf"^\[[12]/2\] 03_good  done{times}$", out, re.M)
    assert re.search(rf"^\[[12]/2\] 10_fails  FAILED \(KeyError: 'no such row'\){times}$", out, re.M)
    assert "not done: 10_fails; the same command continues" in out
    left = sorted(p.name for p in kept.glob("[01]*") if p.suffix != ".log")
    assert left == ["03_good.html", "03_good.ipynb", "10_fails.error.html", "10_fails.error.ipynb"]
    # what the good one printed: its parameters, this python, the notebooks' folder; and its figure
    outputs = outputs_of(kept / "03_good.ipynb")
    profile, device, minutes, *others = "".join(output.get("text", "") for output in outputs).split()
    assert (profile, device, *others) == ("smoke", "cpu", sys.executable, "toys", str(max(1, os.cpu_count() // 2)))
    assert 4 < float(minutes) <= 5
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert sys.executable in (kept / "03_good.log").read_text()
    shown = (kept / "03_good.html").read_text()
    assert "data:image/png;base64," in shown and "require.min.js" not in shown
    assert any("so far" in output.get("text", "") for output in outputs_of(kept / "10_fails.error.ipynb"))
    index = (root / "runs" / "smoke" / "index.html").read_text()
    for part in ('href="notebooks/03_good.html"', 'href="notebooks/10_fails.error.html"', "no such row"):
        assert part in index
    # again: the good one is skipped whatever the budget, the repaired one runs
    write_notebook(toys, "10_fails", "pass")
    assert call() == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("[1/2] 03_good  done before") and second.startswith("[2/2] 10_fails  done")
    assert not list(kept.glob("*.error.*"))


RUN = """
import sys
from pathlib import Path
from defectlab import reproduce, runs
from defectlab.__main__ import main
from defectlab.verdicts import page
root = Path({root!r})
runs.project_root = lambda: root
page.STUDIES = ()
reproduce.NOTEBOOKS = root / "toys"
sys.exit(main(["reproduce", "--device", "cpu", "--jobs", "2"]))
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_no_kernel_outlives_the_command_and_what_is_done_stays(toys, root, kept, sign, capsys, monkeypatch):
    write_notebook(toys, "03_a", "print('ready')")
    write_notebook(toys, "20_b", "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)")
    environment = os.environ | {"PYTHONPATH": str(reproduce.PACKAGE.parent)}
    child = subprocess.Popen([sys.executable, "-c", RUN.format(root=str(root))], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not ((kept / "03_a.ipynb").exists() and (kept / "20_b.log").read_text().strip()):
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.1)
        kernel = psutil.Process(int((kept / "20_b.log").read_text().split()[0]))
    finally:
        child.send_signal(sign)
        code = child.wait(60)
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130}[sign]
    kernel.wait(20)  # raises where it is still there
    assert not (kept / "20_b.ipynb").exists()
    monkeypatch.setattr(reproduce.papermill, "execute_notebook", lambda *_, **__: 1 / 0)
    assert call() == 1  # only what is not done is run
    out = capsys.readouterr().out
    assert "03_a  done before" in out and "20_b  FAILED (ZeroDivisionError: division by zero)" in out


def finished(source: Path, kept: Path, *, cut_short: bool = False, **parameters: str) -> Path:
    """An executed notebook as an earlier call with the same source left it."""
    kept.mkdir(parents=True, exist_ok=True)
    executed = nbformat.read(source, as_version=4)
    made_from = plan(source, kept, **parameters).made_from
    executed.metadata["defectlab"] = {"made_from": made_from, "seconds": 120.0, "cut_short": cut_short}
    nbformat.write(executed, kept / source.name)
    return kept / source.name


def plan(source: Path, kept: Path, content: str | None = None, **parameters: str) -> reproduce.Notebook:
    given = {"profile": "smoke", "device": "cpu"} | parameters
    return reproduce.prepare(source, kept, given, content or reproduce.content_hash())


def test_an_output_counts_only_for_the_same_source_parameters_and_package(toys, kept):
    source, shows_the_machine = (write_notebook(toys, name, "1") for name in ("03_a", "00_a"))
    assert not plan(source, kept).finished
    for one in (source, shows_the_machine):
        finished(one, kept)
    assert plan(source, kept).finished and plan(source, kept).seconds == 120
    assert not plan(shows_the_machine, kept).finished
    assert not plan(source, kept, device="auto").finished
    assert not plan(source, kept, content="another version of the package").finished
    write_notebook(toys, "03_a", "2")
    assert not plan(source, kept).finished
    finished(source, kept, cut_short=True)
    assert not plan(source, kept).finished
    finished(source, kept).write_text('{"cells"')  # cut by a power loss
    assert not plan(source, kept).finished


def test_a_notebook_that_cannot_be_kept_is_named_and_the_others_run(toys, kept, capsys, monkeypatch):
    for name in ("03_a", "20_b"):
        write_notebook(toys, name, "1")

    def full(aside: Path, path: Path) -> None:
        if "03_a" in path.name:
            raise OSError("No space left on device")
        aside.replace(path)

    def executed(source: Path, target: Path, parameters: dict, **options):
        target.write_bytes(source.read_bytes())
        return nbformat.read(source, as_version=4)

    monkeypatch.setattr(reproduce, "rename", full)
    monkeypatch.setattr(reproduce.papermill, "execute_notebook", executed)
    assert call() == 1
    out = capsys.readouterr().out
    assert "03_a  FAILED (No space left on device)" in out and "20_b  done" in out


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
        (("--notebooks", "03,7"), "unknown notebook '7'"),
        (("--device", "tpu"), "'tpu' is not available"),
        (("--notebooks", "20"), "20_b.ipynb has the parameters profile, device, seeds, minutes, epochs"),
        (("--notebooks", "30"), "30_c.ipynb has the parameters profile: its tagged cell must have profile, device"),
        (("--notebooks", "40"), "40_d.ipynb cannot be read as a notebook"),
    ],
)
def test_a_wrong_argument_or_cell_is_an_error_before_anything_runs(toys, root, no_kernel, capsys, options, named):
    write_notebook(toys, "03_a", "1")
    write_notebook(toys, "20_b", "1", LITERALS + "\nepochs = 3")
    write_notebook(toys, "30_c", "1", 'profile = "smoke"')
    (toys / "40_d.ipynb").write_text("{")
    assert call(*options) == 1
    assert named in capsys.readouterr().err
    assert not (root / "runs").exists()


def test_a_second_reproduce_of_a_profile_is_refused(toys, kept, no_kernel, capsys):
    write_notebook(toys, "03_a", "1")
    kept.mkdir(parents=True)
    with reproduce.FileLock(kept / ".lock"):
        assert call() == 1
    assert "another reproduce of profile smoke is running" in capsys.readouterr().err


def test_numbers_and_beginnings_select(tmp_path):
    with pytest.raises(ValueError, match=r"has no NN_\*\.ipynb"):
        numbered_notebooks(tmp_path)
    for name in ("20_bsdrd", "00_start", "21_ablation", "notes"):
        write_notebook(tmp_path, name, "1")
    for wanted, numbers in ((None, "00 20 21"), (["21", "00"], "00 21"), (["2"], "20 21"), (["20_bs"], "20")):
        assert " ".join(path.stem[:2] for path in numbered_notebooks(tmp_path, wanted)) == numbers


def test_the_budget_stops_what_was_not_started_and_the_estimate_knows_earlier_times(toys, kept, capsys, monkeypatch):
    """A notebook that outlives the budget is cut short, the next one is not started, one that is done stays done."""
    for name in ("03_a", "20_b", "30_c", "40_d"):
        write_notebook(toys, name, "1")
    finished(toys / "40_d.ipynb", kept)
    finished(toys / "20_b.ipynb", kept, cut_short=True)
    clock, seen = [0.0], []
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: clock[0])

    def execute_notebook(source: Path, target: Path, parameters: dict, **options):
        seen.append(parameters)
        clock[0] += 90
        return nbformat.read(source, as_version=4)

    monkeypatch.setattr(reproduce.papermill, "execute_notebook", execute_notebook)
    assert call("--minutes", "3", "--seeds", "0,1") == 1
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split("]")[1].split("  ")[:2] for line in lines[:4]]
    assert shown == [[" 03_a", "done"], [" 20_b", "done"], [" 30_c", "not started"], [" 40_d", "not started"]]
    assert seen == [
        {"profile": "smoke", "device": "cpu", "seeds": [0, 1], "minutes": minutes} for minutes in (3.0, 1.5)
    ]
    assert "not done: 30_c, 40_d" in lines[4]
    clock[0] = 0.0
    assert call("--minutes", "1") == 1  # other parameters
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/4] 03_a  out of time  90 s   (1.5 min, about 3.2 to go)"  # 20_b: 90 s, 30_c: the mean of all
    assert lines[3] == "[4/4] 40_d  done before  120 s   (1.5 min, about 0.0 to go)"
    assert nbformat.read(kept / "03_a.ipynb", as_version=4).metadata["defectlab"]["cut_short"]


# --- The page and the generated Markdown -----------------------------------------------------------------------------


@pytest.fixture
def toy_study(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One study with a table that works and one whose record is broken."""

    def results_table(name: str, table: str, profile: str, metrics: list[str], store: object) -> pd.DataFrame:
        if table == "broken":
            raise RuntimeError("x.json is not a readable record")
        columns = {
            ("image AUROC", "paper"): ["97.7", "90.1"],
            ("image AUROC", "recorded"): ["95.0", "–"],
            ("", "profile"): ["quick", "–"],
            ("", "note"): ["", "time"],
        }
        return pd.DataFrame(columns, index=pd.Index(["row one", "row two"], name="row"))

    tables = {"main": "its table", "broken": "its other table"}
    lines = [{"row": "row one", "column": "all", "metric": "image_auroc"}]
    monkeypatch.setattr(page, "STUDIES", ("toy",))
    monkeypatch.setattr(page, "study", lambda name: Study("A <study>", {"smoke": {}}, tables, (("image_auroc",),)))
    monkeypatch.setattr(page.tables, "results_table", results_table)
    monkeypatch.setattr(page.tables, "printed_table", lambda name, table: lines)
    monkeypatch.setattr(page.tables, "forest_lines", lambda name, store: [])
    monkeypatch.setattr(page.tables, "claims_table", lambda name, profile, store: pd.DataFrame())


def test_a_table_that_cannot_be_built_says_so_in_its_place(toy_study, toys, kept, no_kernel, capsys):
    results = [
        NotebookStatus("03_a", "done", 1800.0, ""),
        NotebookStatus("20_b", "failed", 1800.0, "ValueError: a < b"),
    ]
    with pytest.raises(page.IncompletePage, match=r"its other table: x\.json is not a readable record") as raised:
        page.write_page("smoke", results)
    text = raised.value.path.read_text()
    assert text.index("its other table") < text.index("x.json is not a readable record")
    assert "row one" in text and "97.7" in text and "Not run: row two." in text and "90.1" not in text
    assert "A &lt;study&gt;" in text and "ValueError: a &lt; b" in text
    assert "1.00 hours in all" in text and "Failed: 20_b." in text
    plain = re.sub(r"<style>.*?</style>|<script.*?</script>", "", text, flags=re.DOTALL)
    assert "http" not in plain and "src=" not in plain.replace('src="data:', "")  # nothing is fetched

    finished(write_notebook(toys, "03_a", "1"), kept)  # `reproduce` does not hide it
    assert call() == 1
    assert "not a readable record" in capsys.readouterr().out
    assert re.search(r"03_a.*done before.*2\.0", (runs.runs_dir("smoke") / "index.html").read_text(), re.S)
