"""The child process of `defectlab.reproduce`: `python -m defectlab.execute SOURCE TARGET PARAMETERS_AS_JSON`.

A module of its own so that it starts fast: it needs papermill, not torch.
"""

import argparse
import ast
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import nbformat
import papermill

from defectlab import runs
from defectlab.files import write_json
from defectlab.provenance import pick_device
from defectlab.verdicts import page


def end_with_parent() -> None:
    """Standard input is a pipe from the parent: its end says that the parent is gone, however it went."""
    os.read(0, 1)  # not sys.stdin: its lock, held here, would break the interpreter's own end
    os._exit(1)


def execute(source: Path, target: Path, parameters: dict) -> None:
    """Papermill saves the notebook after every cell, failing ones too. The kernel watches us and so ends with us."""
    papermill.execute_notebook(
        source,
        target,
        parameters,
        kernel_name="python3",
        progress_bar=False,
        log_output=True,
        cwd=source.parent,
    )


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    execute(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))

PARAMETERS = ("profile", "device", "seeds", "minutes")  # all that a notebook's `parameters` cell may hold
PACKAGE = Path(__file__).resolve().parent
COMPLETE = ("done", "done before")


@dataclass
class Notebook:
    """One notebook of a call: what it gets, and the process that runs it."""

    source: Path
    output: Path
    parameters: dict[str, Any]  # without `minutes`, which is known only when the notebook starts
    own_minutes: float | None  # the default in its parameters cell
    made_from: str
    process: subprocess.Popen | None = None
    log: TextIO | None = None
    started: float = 0.0
    minutes: float | None = None

    @property
    def name(self) -> str:
        return self.source.stem

    def beside(self, suffix: str) -> Path:
        return self.output.with_suffix(suffix)


# --- Before anything runs --------------------------------------------------------------------------------------------


def numbered_notebooks(folder: Path, wanted: list[str] | None = None) -> list[Path]:
    """`NN_*.ipynb` in order, those that start with one of `wanted`; ValueError where one of these matches nothing."""
    there = [path for path in sorted(folder.glob("*.ipynb")) if re.match(r"\d\d_", path.name)]
    if not there:
        raise ValueError(f"no notebook NN_*.ipynb in {folder}")
    for prefix in wanted or []:
        if not any(path.stem.startswith(prefix) for path in there):
            raise ValueError(f"unknown notebook {prefix!r}: there is {', '.join(path.stem for path in there)}")
    return [path for path in there if not wanted or path.stem.startswith(tuple(wanted))]


def content_hash() -> str:
    """sha256 over the package, the printed numbers and the recorded runs: what every notebook shows beside its own."""
    root = runs.recorded_dir().parent
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for kept, kinds in ((root / "papers", ("*.csv", "*.toml")), (root / "runs", ("*.json",))):
        files += [path for kind in kinds for path in kept.rglob(kind)]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def prepare(source: Path, folder: Path, parameters: dict[str, Any], minutes: float | None, content: str) -> Notebook:
    """Check a notebook's parameters cell against what it will be given. ValueError where they do not fit."""
    try:
        cells = [[cell.cell_type, cell.source] for cell in nbformat.read(source, as_version=4).cells]
        own = papermill.inspect_notebook(source)
    except Exception as error:  # nbformat and papermill raise many kinds
        raise ValueError(f"{source} cannot be read as a notebook ({error}): restore it") from error
    given = [*parameters, *(["minutes"] if minutes is not None else [])]
    for name in given:
        if name not in own:
            raise ValueError(f"{source} has no parameter {name!r}: add it to the cell tagged `parameters`")
    for name in own:
        if name not in PARAMETERS:
            raise ValueError(f"{source} has an unknown parameter {name!r}: only {', '.join(PARAMETERS)} are known")
    made_from = hashlib.sha256(json.dumps([cells, parameters, content], sort_keys=True).encode()).hexdigest()
    default = ast.literal_eval(own["minutes"]["default"]) if "minutes" in own else None
    return Notebook(source, folder / source.name, parameters, default, made_from)


def finished_before(notebook: Notebook) -> bool:
    """Whether the output was made from the same source, parameters and package, and was not cut short by its budget."""
    if not notebook.output.exists() or notebook.source.name.startswith("00_"):  # 00 shows the machine as it is now
        return False
    made = json.loads(notebook.output.read_text())["metadata"].get("defectlab", {})
    return made.get("made_from") == notebook.made_from and not made["cut_short"]


@contextlib.contextmanager
def only_one(folder: Path, profile: str) -> Iterator[None]:
    """ValueError where another reproduce of this profile is at work; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another reproduce of profile {profile} is running: wait for it, or stop it") from None
        yield


# --- One notebook in a process of its own ----------------------------------------------------------------------------


def start(notebook: Notebook, minutes: float | None, jobs: int) -> None:
    """Start the process; `minutes` is what is left of the budget. What it prints goes to `<name>.log` at once."""
    parameters = dict(notebook.parameters)
    if minutes is not None:
        parameters["minutes"] = round(minutes, 2)
    notebook.minutes = notebook.own_minutes if minutes is None else minutes
    environment = dict(os.environ)
    environment["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # figures appear in the notebook
    # The python3 kernel of this very environment, and this very package, before any other on the machine:
    for variable, first in (("JUPYTER_PATH", Path(sys.prefix, "share", "jupyter")), ("PYTHONPATH", PACKAGE.parent)):
        environment[variable] = os.pathsep.join(filter(None, [str(first), os.environ.get(variable)]))
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    notebook.log = notebook.beside(".log").open("w")
    files = [str(notebook.source), str(notebook.beside(".running.ipynb"))]
    notebook.started = time.monotonic()
    notebook.process = subprocess.Popen(
        [sys.executable, "-m", "defectlab.reproduce", *files, json.dumps(parameters)],
        stdin=subprocess.PIPE,  # its end tells the child that we are gone, however we went
        stdout=notebook.log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches us alone
    )


def finish(notebook: Notebook) -> page.Outcome:
    """After the process ended: stamp and rename its output, or keep what was executed as `<name>.error.ipynb`."""
    seconds = time.monotonic() - notebook.started
    close(notebook)
    running = notebook.beside(".running.ipynb")
    if notebook.process.returncode == 0:
        executed = nbformat.read(running, as_version=4)
        # A notebook that used up its budget may have left runs out: the next call continues it.
        cut_short = notebook.minutes is not None and seconds > 60 * notebook.minutes
        executed.metadata["defectlab"] = {
            "made_from": notebook.made_from,
            "seconds": round(seconds, 1),
            "cut_short": cut_short,
        }
        nbformat.write(executed, running)
        running.replace(notebook.output)
        for kind in (".error.ipynb", ".error.html"):
            notebook.beside(kind).unlink(missing_ok=True)
        return page.Outcome(notebook.name, "out of time" if cut_short else "done", seconds, "")
    error = error_line(running) or last_line(notebook.beside(".log"))
    if running.exists():
        running.replace(notebook.beside(".error.ipynb"))
    for kind in (".ipynb", ".html"):  # of an earlier source: no longer true
        notebook.beside(kind).unlink(missing_ok=True)
    return page.Outcome(notebook.name, "failed", seconds, error)


def close(notebook: Notebook) -> None:
    notebook.process.stdin.close()
    notebook.process.wait()
    notebook.log.close()


def error_line(executed: Path) -> str:
    """'ValueError: what it says' of the first failing cell; '' where there is none (a kernel that died)."""
    if not executed.exists():
        return ""
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    errors = [f"{o.ename}: {o.evalue.strip()}" for o in outputs if o.output_type == "error"]
    return errors[0].splitlines()[0] if errors else ""


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "the process ended without a word"


# --- All of them -----------------------------------------------------------------------------------------------------


def clock(seconds: float) -> str:
    """'1:12' or '2:03:04'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """One line a notebook, with an estimate from earlier calls (`seconds.json`) and from this one."""

    def __init__(self, count: int, jobs: int, times: Path) -> None:
        self.count, self.jobs, self.times, self.printed = count, jobs, times, 0
        self.started = time.monotonic()
        self.seconds: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}

    def line(self, outcome: page.Outcome, waiting: list[Notebook], running: list[Notebook]) -> None:
        self.printed += 1
        if outcome.status == "done":
            self.seconds[outcome.name] = round(outcome.seconds, 1)
            write_json(self.times, self.seconds)
        text = f"[{self.printed}/{self.count}] {outcome.name}  "
        if outcome.status in ("done before", "not started"):
            print(text + outcome.status, flush=True)
            return
        text += f"FAILED ({outcome.error})  " if outcome.status == "failed" else ""
        text += "stopped by its budget  " if outcome.status == "out of time" else ""
        left = self.to_go(waiting, running)
        about = "" if left is None else f", about {clock(left)} to go"
        elapsed = clock(time.monotonic() - self.started)
        print(f"{text}{outcome.seconds:.0f} s   (elapsed {elapsed}{about})", flush=True)

    def to_go(self, waiting: list[Notebook], running: list[Notebook]) -> float | None:
        if not (waiting or running) or not self.seconds:
            return None
        usual = sum(self.seconds.values()) / len(self.seconds)
        now = time.monotonic()
        left = [self.seconds.get(n.name, usual) for n in waiting]
        left += [max(0.0, self.seconds.get(n.name, usual) - (now - n.started)) for n in running]
        return sum(left) / min(self.jobs, len(left))


def run_all(notebooks: list[Notebook], minutes: float | None, jobs: int, outcomes: list[page.Outcome]) -> None:
    """Run what is missing, `jobs` at a time; fills `outcomes`, so that an interrupted caller knows what is done."""
    waiting = [n for n in notebooks if not finished_before(n)]
    before = {n.name for n in notebooks} - {n.name for n in waiting}
    queue, running = list(notebooks), []
    progress = Progress(len(notebooks), jobs, notebooks[0].output.with_name("seconds.json"))
    deadline = None if minutes is None else time.monotonic() + 60 * minutes

    def ended(outcome: page.Outcome) -> None:
        outcomes.append(outcome)
        progress.line(outcome, waiting, running)

    try:
        while queue or running:
            while queue and (queue[0].name in before or len(running) < jobs):
                notebook = queue.pop(0)
                if notebook.name in before:
                    made = json.loads(notebook.output.read_text())["metadata"]["defectlab"]
                    ended(page.Outcome(notebook.name, "done before", made["seconds"], ""))
                    continue
                waiting.remove(notebook)
                left = None if deadline is None else (deadline - time.monotonic()) / 60
                if left is not None and left <= 0:
                    ended(page.Outcome(notebook.name, "not started", 0.0, f"the {minutes:g} minutes were used up"))
                    continue
                running.append(notebook)
                start(notebook, left, jobs)
            for notebook in [n for n in running if n.process.poll() is not None]:
                running.remove(notebook)
                ended(finish(notebook))
            time.sleep(0.05)
    finally:
        for notebook in (n for n in running if n.process):  # only where we were interrupted
            notebook.process.kill()
            close(notebook)


def reproduce(
    profile: str,
    notebooks: list[str] | None = None,
    minutes: float | None = None,
    device: str = "auto",
    seeds: list[int] | None = None,
    jobs: int = 1,
    folder: Path | None = None,
) -> int:
    """Run the numbered notebooks of `folder` (default: the repository's), then write HTML and the page.

    Args:
        notebooks: numbers or beginnings of names; None: all.
        minutes: budget of the whole call; each notebook gets what is left of it.
        seeds: None: as each notebook says.
        jobs: notebooks side by side; each gets its share of the cores unless OMP_NUM_THREADS is set.

    Returns:
        0 where all is done; 1 where a notebook failed, was cut short by the budget or not started, or a table of the
        page could not be built; 2 where an argument or a notebook's parameters cell is wrong (nothing was run);
        130 after Ctrl-C.
    """
    outcomes: list[page.Outcome] = []
    with contextlib.ExitStack() as stack:
        try:
            results = runs.runs_dir(runs.check_profile(profile)) / "notebooks"
            chosen = numbered_notebooks((folder or PACKAGE.parent / "notebooks").resolve(), notebooks)
            pick_device(device)
            if jobs < 1:
                raise ValueError(f"jobs must be at least 1, got {jobs}")
            if minutes is not None and not minutes > 0:
                raise ValueError(f"minutes must be more than 0, got {minutes:g}")
            if seeds is not None and (not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds)):
                raise ValueError(f"seeds must be different numbers from 0 on, got {seeds}")
            parameters = {"profile": profile, "device": device} | ({} if seeds is None else {"seeds": seeds})
            content = content_hash()
            planned = [prepare(path, results, parameters, minutes, content) for path in chosen]
            stack.enter_context(only_one(results, profile))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            run_all(planned, minutes, jobs, outcomes)
            return conclude(profile, planned, outcomes)
        except KeyboardInterrupt:
            done = [outcome.name for outcome in outcomes if outcome.status in COMPLETE]
            print(f"\nstopped; done: {', '.join(done) or 'none'}. The same command continues.", file=sys.stderr)
            return 130


def conclude(profile: str, planned: list[Notebook], outcomes: list[page.Outcome]) -> int:
    """HTML, the page, and at the end what is not as it should be. -> exit code 0 or 1."""
    for notebook in planned:
        for kind in (".ipynb", ".error.ipynb"):
            if notebook.beside(kind).exists():
                page.write_html(notebook.beside(kind))
    problem = ""
    try:
        written = page.write_page(profile, outcomes)
    except page.IncompletePage as error:
        written, problem = error.path, str(error)
    print(f"page: {written}")
    bad = [outcome for outcome in outcomes if outcome.status not in COMPLETE]
    if bad:
        print(f"{len(bad)} of {len(outcomes)} notebooks are not done; the same command continues with them:")
    for outcome in bad:
        print(f"  {outcome.name}  {outcome.status}{': ' * bool(outcome.error)}{outcome.error}")
        if outcome.status == "failed":
            print(f"    see {written.parent / 'notebooks' / outcome.name}.error.ipynb and .log")
    if problem:
        print(problem)
    return 1 if bad or problem else 0


def main(argv: list[str] | None = None) -> int:
    """The command line of `reproduce`; argparse exits with 2 on a wrong argument."""

    def names(text: str) -> list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]

    def numbers(text: str) -> list[int]:
        return [int(part) for part in names(text)]

    parser = argparse.ArgumentParser(prog="python -m defectlab reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=runs.PROFILES, default="smoke", help="default: smoke")
    parser.add_argument("--notebooks", type=names, metavar="03,20", help="numbers or beginnings of names; default: all")
    parser.add_argument("--minutes", type=float, help="budget of the whole call; the same command goes on")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seeds", type=numbers, metavar="0,1", help="default: as each notebook says")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks side by side")
    return reproduce(**vars(parser.parse_args(argv)))
