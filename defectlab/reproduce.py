"""The numbered notebooks by papermill, some side by side, then their HTML and the page of the profile.

What finished is run again only where its source, its parameters, the package, the printed numbers or the recorded runs
changed, so the same command continues what was interrupted. Kernels end with this process, however it ends: ipykernel
watches its parent.
"""

import argparse
import hashlib
import json
import math
import os
import queue
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
from filelock import FileLock, Timeout

from defectlab import runs
from defectlab.files import rename, writable
from defectlab.provenance import pick_device
from defectlab.verdicts import page
from defectlab.verdicts.page import NotebookStatus

PARAMETERS = ("profile", "device", "seeds", "minutes")  # all that a notebook's `parameters` cell may hold
PACKAGE = Path(__file__).resolve().parent
NOTEBOOKS = PACKAGE.parent / "notebooks"


@dataclass(frozen=True)
class Notebook:
    """One notebook of a call, and what it is given."""

    source: Path
    output: Path
    parameters: dict[str, Any]  # without `minutes`, which is known only when the notebook starts
    made_from: str  # hash of its cells, its parameters, the package and the records
    seconds: float | None  # that an earlier call took
    finished: bool  # by that call, from the same

    @property
    def name(self) -> str:
        return self.source.stem

    def beside(self, suffix: str) -> Path:
        return self.output.with_suffix(suffix)


def numbered_notebooks(folder: Path, wanted: list[str] | None = None) -> list[Path]:
    """`NN_*.ipynb` in order, those that start with one of `wanted`; ValueError where one of these matches nothing."""
    there = [path for path in sorted(folder.glob("*.ipynb")) if re.match(r"\d\d_", path.name)]
    for prefix in wanted or [""]:
        if not any(path.stem.startswith(prefix) for path in there):
            listed = ", ".join(path.stem for path in there) or "no NN_*.ipynb"
            raise ValueError(f"unknown notebook {prefix!r}: {folder} has {listed}")
    return [path for path in there if path.stem.startswith(tuple(wanted or [""]))]


def content_hash() -> str:
    """sha256 over the package and `results` (printed numbers, records, timings, data cards): what every notebook shows
    beside its own."""
    root = runs.recorded_dir().parent
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files += [path for path in root.rglob("*") if path.suffix in (".csv", ".toml", ".json")]
    parts = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in sorted(files)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def prepare(source: Path, folder: Path, parameters: dict[str, Any], content: str) -> Notebook:
    """Look at a notebook and at what an earlier call left of it. ValueError where its parameters cell is wrong."""
    try:
        cells = [[cell.cell_type, cell.source] for cell in nbformat.read(source, as_version=4).cells]
        own = papermill.inspect_notebook(source)
    except Exception as error:  # nbformat and papermill raise many kinds
        raise ValueError(f"{source} cannot be read as a notebook ({error}): restore it") from error
    if sorted(own) != sorted(PARAMETERS):
        listed = ", ".join(own) or "none"
        raise ValueError(f"{source} has the parameters {listed}: its tagged cell must have {', '.join(PARAMETERS)}")
    made_from = hashlib.sha256(json.dumps([cells, parameters, content], sort_keys=True).encode()).hexdigest()
    output = folder / source.name
    try:
        made = json.loads(output.read_text(encoding="utf-8"))["metadata"].get("defectlab", {})
    except (FileNotFoundError, ValueError, LookupError):  # none, or one that a power loss cut
        made = {}
    again = made.get("cut_short") or source.name.startswith("00_")  # which shows the machine as it is now
    finished = made.get("made_from") == made_from and not again
    return Notebook(source, output, parameters, made_from, made.get("seconds"), finished)


def prepare_environment(jobs: int) -> None:
    """What kernels inherit: figures in the notebook, the python3 kernel of this very environment and this very package
    before any other on the machine, and each its share of the cores."""
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for variable, first in (("JUPYTER_PATH", Path(sys.prefix, "share", "jupyter")), ("PYTHONPATH", PACKAGE.parent)):
        os.environ[variable] = os.pathsep.join(filter(None, [str(first), os.environ.get(variable)]))
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))


def execute(notebook: Notebook, deadline: float) -> NotebookStatus:
    """Run one, unless it is finished or the time is up, and tell it how many minutes are left. What it prints goes to
    `<name>.log` at once, the notebook is saved after every cell, and kept as `<name>.error.ipynb` where it fails."""
    started, status, error = time.monotonic(), "failed", ""
    if notebook.finished:
        return NotebookStatus(notebook.name, "done before", notebook.seconds, "")
    if started >= deadline:
        return NotebookStatus(notebook.name, "not started", 0.0, "the minutes were used up")
    given, running = dict(notebook.parameters), notebook.beside(".running.ipynb")
    if deadline < math.inf:
        given["minutes"] = round((deadline - started) / 60, 2)
    options = {"kernel_name": "python3", "progress_bar": False, "extra_arguments": ["--log-level=ERROR"]}
    options["resources"] = {"metadata": {"path": str(notebook.source.parent)}}  # where its kernel runs
    try:
        with notebook.beside(".log").open("w", encoding="utf-8") as log:
            options |= {"stdout_file": log, "stderr_file": log}
            executed = papermill.execute_notebook(notebook.source, running, given, **options)
        ended, made = time.monotonic(), {"made_from": notebook.made_from}
        cut_short = ended > deadline  # it may have left runs out
        executed.metadata["defectlab"] = made | {"seconds": round(ended - started, 1), "cut_short": cut_short}
        nbformat.write(executed, running)
        status = "out of time" if cut_short else "done"
    except papermill.PapermillExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue.strip()}"
    except Exception as failure:  # a kernel that died, a full disk
        error = f"{type(failure).__name__}: {failure}"
    if running.exists():
        rename(running, notebook.beside(".error.ipynb" if error else ".ipynb"))
    for suffix in (".ipynb", ".html") if error else (".error.ipynb", ".error.html"):
        notebook.beside(suffix).unlink(missing_ok=True)  # of an earlier source: no longer true
    return NotebookStatus(notebook.name, status, time.monotonic() - started, error.split("\n")[0])


def run_all(notebooks: list[Notebook], minutes: float | None, jobs: int) -> list[NotebookStatus]:
    """Run what is not finished, `jobs` at a time; a line for each as it ends, with an estimate by what each took before
    (one that never ran: as the mean of the others)."""
    began, outcomes = time.monotonic(), []
    deadline = math.inf if minutes is None else began + 60 * minutes
    usual = {n.name: n.seconds for n in notebooks if n.seconds is not None}
    left = {n.name for n in notebooks if not n.finished}
    waiting, ended = iter(notebooks), queue.SimpleQueue()

    def work() -> None:
        for notebook in waiting:  # shared by the threads: each takes the next
            try:
                outcome = execute(notebook, deadline)
            except OSError as failure:  # of what it leaves: a full disk
                outcome = NotebookStatus(notebook.name, "failed", 0.0, str(failure))
            ended.put(outcome)

    for _ in range(jobs):
        threading.Thread(target=work, daemon=True).start()  # a daemon: nobody waits for it after Ctrl-C
    while len(outcomes) < len(notebooks):
        outcome = ended.get()
        outcomes.append(outcome)
        left.discard(outcome.name)
        usual |= {outcome.name: outcome.seconds} if outcome.seconds else {}
        mean = sum(usual.values()) / max(1, len(usual))
        rest = sum(usual.get(name, mean) for name in left) / min(jobs, len(left) or 1)
        shown = f"FAILED ({outcome.error})" if outcome.status == "failed" else outcome.status
        times = f"{outcome.seconds:.0f} s   ({(time.monotonic() - began) / 60:.1f} min, about {rest / 60:.1f} to go)"
        print(f"[{len(outcomes)}/{len(notebooks)}] {outcome.name}  {shown}  {times}", flush=True)
    return outcomes


def reproduce(options: argparse.Namespace) -> int:
    """The command `reproduce`: run the numbered notebooks, then write HTML and the page.

    Each notebook gets what is left of the minutes, and its share of the cores unless OMP_NUM_THREADS is set. -> 0 where
    all is done; 1 where a notebook failed, was cut short or not started, or a table of the page could not be built.
    ValueError for a wrong option or parameters cell, before anything is run.
    """
    results = runs.runs_dir(options.profile) / "notebooks"
    chosen = numbered_notebooks(NOTEBOOKS, options.notebooks)
    parameters = {"profile": options.profile, "device": options.device}
    pick_device(options.device)  # ValueError where it is not there
    if options.seeds is not None:
        parameters["seeds"] = options.seeds
    content = content_hash()
    planned = [prepare(path, results, parameters, content) for path in chosen]
    writable(results)
    prepare_environment(options.jobs)
    try:
        with FileLock(results / ".lock", blocking=False):
            outcomes = run_all(planned, options.minutes, options.jobs)
    except Timeout:
        running = f"another reproduce of profile {options.profile} is running"
        raise ValueError(f"{running}: wait for it, or stop it") from None
    for path in (notebook.beside(suffix) for notebook in planned for suffix in (".ipynb", ".error.ipynb")):
        if path.exists():
            page.write_html(path)
    left = [outcome.name for outcome in outcomes if outcome.status not in ("done", "done before")]
    if left:
        print(f"not done: {', '.join(left)}; the same command continues with them")
    try:
        print(f"page: {page.write_page(options.profile, outcomes)}")
    except page.IncompletePage as error:
        print(f"page: {error}")
        return 1
    return 1 if left else 0
