"""Batches of runs: which rows and seeds of a study, in which order, within how many minutes."""

from collections.abc import Callable
from dataclasses import dataclass
from defectlab import runs
from defectlab.files import DataError
from defectlab.networks.resnet import WeightsError
from defectlab.runs import NonFiniteLoss
from defectlab.runs import OutOfTime
from defectlab.runs import Record
from defectlab.runs import Session
from defectlab.runs import first_line
from defectlab.studies import pick_rows
from defectlab.studies import study
from defectlab.verdicts.measured import COSTS
from defectlab.verdicts.measured import metric_groups
from defectlab.verdicts.measured import value_of
from defectlab.verdicts.measured import written
from typing import Any
import math
import os
import subprocess
import sys
import time
import torch



class RowsFailed(RuntimeError):
    """Rows of a batch that could not be trained; the others ran."""


@dataclass(frozen=True)
class Task:
    """One row and seed of a study, and whether it is recorded (committed) or has been run here."""

    row: str
    seed: int
    settings: Any
    recorded: bool
    here: bool


def pick_device(name: str) -> str:
    """'auto' -> 'cuda' where there is one, else 'cpu'. ValueError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if (index and not index.isdigit()) or int(index or 0) >= there:
        raise ValueError(f"device {name!r} is not available here: use auto, cpu or (with a GPU) cuda")
    return name


def fingerprints_here(module: Any, settings: Any) -> dict[str, str] | None:
    """What a row would be computed from on this machine; None where data or weights are not there."""
    try:
        return module.fingerprints(settings)
    except (DataError, WeightsError):
        return None


def tasks(name: str, profile: str, rows: list[str] | None = None, seeds: list[int] | None = None) -> list[Task]:
    """Rows x seeds in the order in which to run them: the first seed of every row, then the second, and so on, so
    that a batch that is cut short has touched the headline rows first. `seeds` None: as the study plans them.
    Its `OPTIONAL` rows (further data sets and weights) that cannot be run here are listed only where named."""
    if seeds is not None and (len(set(seeds)) < len(seeds) or min(seeds, default=0) < 0):
        raise ValueError(f"seeds must be different and not negative, got {seeds}")
    module = study(name)
    chosen = pick_rows(name, profile, rows)
    recorded, here = runs.read_records(runs.recorded_dir()), runs.read_records(runs.runs_dir(profile))
    listed = []
    for position, (row, settings) in enumerate(chosen.items()):
        wanted = range(module.planned_seeds(row, profile)) if seeds is None else seeds
        mark = runs.row_identity(settings, profile)
        prints = fingerprints_here(module, settings)
        if prints is None and not rows and row in getattr(module, "OPTIONAL", ()):
            continue
        mine = {r.seed for r in here if r.row == mark and prints in (None, r.fingerprints)}
        kept = {r.seed for r in recorded if r.row == mark}
        for turn, seed in enumerate(wanted):
            task = Task(row, seed, settings, seed in kept, seed in mine)
            listed.append(((row not in module.PRIMARY, turn, position), task))
    return [task for _, task in sorted(listed, key=lambda item: item[0])]


def run_tasks(
    name: str, listed: list[Task], profile: str, device: str, minutes: float | None, say: Callable[[str], None] = print
) -> list[Record]:
    """Run what `runs/<profile>/` lacks, one after the other; stops cleanly when the minutes are used up.

    -> the finished records of the list, those from earlier calls included. A row whose loss is not finite, or that the
    device has no memory for, does not keep the others from running: RowsFailed names all of them at the end.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    started, finished, failed = time.monotonic(), [], []
    for number, task in enumerate(listed, 1):
        if deadline is not None and time.monotonic() > deadline:
            say(
                f"{minutes:g} minutes are used up: {len(listed) - number + 1} of {len(listed)} left; run again to go on"
            )
            break
        say(f"[{number}/{len(listed)}] {name} {task.row} seed {task.seed} ({profile}, {device})")
        try:
            session = Session(deadline=deadline, say=say)
            record = runs.run(study(name), task.settings, task.seed, profile, device, session)
        except OutOfTime as stop:
            say(f"  {stop}")
            break
        except (NonFiniteLoss, torch.OutOfMemoryError) as error:
            failed.append(f"{task.row} seed {task.seed}: {first_line(error)}")
            say(f"  failed: {first_line(error)}")
            continue
        finished.append(record)
        say(f"  {headline(record, name)}  ({record.seconds:.0f} s; {time.monotonic() - started:.0f} s so far)")
    if failed:
        raise RowsFailed("; ".join(failed))
    return finished


def headline(record: Record, name: str) -> str:
    """The first group of the study's metrics, then of its costs, that the record has any of, on a line: a stage or a
    row that is only timed has not the headline's."""
    groups = sorted(metric_groups(study(name)), key=lambda group: group[0] in COSTS)
    for group in groups:
        values = {metric: value_of(record, metric) for metric in group}
        shown = [f"{metric} {written(v, metric)}" for metric, v in values.items() if not math.isnan(v)]
        if shown:
            return ", ".join(shown)
    return "done"


def run_rows(
    name: str,
    profile: str,
    rows: list[str] | None = None,
    seeds: list[int] | None = None,
    device: str = "auto",
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """What a notebook's training cell calls: `tasks` and `run_tasks` in one."""
    return run_tasks(name, tasks(name, profile, rows, seeds), profile, pick_device(device), minutes, say)


def run_parallel(name: str, listed: list[Task], profile: str, device: str, minutes: float | None, jobs: int) -> int:
    """The same in `jobs` processes, tasks dealt in turn (rows of small networks share one GPU well). -> exit code.

    Rows that only time a network (`alone` in their settings) run afterwards, one by one. The other records say how many
    runs shared the device: what was timed then is no speed of the network's own.
    """
    began = time.monotonic()
    alone = [task for task in listed if getattr(task.settings, "alone", False)]
    shared = [task for task in listed if task not in alone]
    jobs = min(jobs, len(shared))
    children = []

    def start(mine: list[Task], beside: int, minutes: float | None) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // beside))
        pairs = ",".join(f"{t.row}:{t.seed}" for t in mine)
        command = [sys.executable, "-m", "defectlab", "run", name, "--tasks", pairs]
        command += ["--profile", profile, "--device", device]
        if minutes is not None:
            command += ["--minutes", str(minutes)]
        environment = {"OMP_NUM_THREADS": threads} | os.environ | {runs.JOBS: str(beside)}
        children.append(subprocess.Popen(command, env=environment))

    try:
        for job in range(jobs):
            start(shared[job::jobs], jobs, minutes)
        codes = [child.wait() for child in children]  # negative: killed by a signal
        if alone:
            left = None if minutes is None else max(0.0, minutes - (time.monotonic() - began) / 60)
            start(alone, 1, left)
            codes.append(children[-1].wait())
        return max(map(abs, codes), default=0)
    except KeyboardInterrupt:
        for child in children:
            child.terminate()
        raise


def status_lines(name: str, profile: str, rows: list[str] | None = None, seeds: list[int] | None = None) -> list[str]:
    """A line a row: seeds recorded, run here, missing; in the order in which to run them."""
    by_row: dict[str, list[Task]] = {}
    for task in tasks(name, profile, rows, seeds):
        by_row.setdefault(task.row, []).append(task)
    width = max(map(len, by_row))
    lines = [f"{name} ({profile}): {'row':{width}}  recorded  here      missing"]
    indent = " " * (len(f"{name} ({profile}): "))
    for row, listed in by_row.items():
        seeds = [
            ",".join(str(t.seed) for t in listed if test(t)) or "-"
            for test in (lambda t: t.recorded, lambda t: t.here, lambda t: not (t.recorded or t.here))
        ]
        lines.append(f"{indent}{row:{width}}  {seeds[0]:8}  {seeds[1]:8}  {seeds[2]}")
    return lines
