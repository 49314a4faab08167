"""What a worker of a cluster does with a row: compute it in its own checkout, and hand back the files of the run."""

import errno
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import get_worker, rejoin, secede

from defectlab import runs
from defectlab.batch import key_and_prints, run_row
from defectlab.files import Busy, DataError, disk_full, locked, project_root, write_atomically
from defectlab.provenance import pick_device
from defectlab.runs import Context, OutOfTime, Record, first_line
from defectlab.studies import Row, study

ENDINGS = (".safetensors", ".npz", ".json")  # of a run's files, in the order in which they are written
EVENTS = "defectlab"  # Dask's topic on which workers say what they begin

Files = dict[str, bytes]  # the files of a run by name


@dataclass(frozen=True)
class Job:
    """A row and seed, the key that its record must have, and when to stop (`time.time()`)."""

    study: str
    name: str
    seed: int
    profile: str
    device: str
    key: str
    prints: dict[str, str]
    ends: float | None

    def __str__(self) -> str:
        return f"{self.study} {self.name} seed {self.seed}"


def compute(job: Job, *needed: Files | None) -> Files | None:
    """The files of the row's run; None where time is up, or was for a row that it needs.

    DataError where data, weights or code of this worker are others than those of the batch.
    """
    if None in needed:
        return None
    worker = get_worker()
    task = worker.get_current_task()
    if worker.state.nthreads != 1:
        raise DataError(f"worker {worker.name} takes {worker.state.nthreads} rows at once: start it with --nthreads 1")
    worker.log_event(EVENTS, {"row": str(job), "name": str(worker.name)})
    for files in needed:
        write_files(files, runs.runs_dir(job.profile))
    of = study(job.study)
    row = of.pick(job.profile, [job.name])[job.name]
    check_same(job, row)

    def unwanted() -> bool:
        """Whether the batch was stopped: its tasks are no longer anybody's."""
        known = worker.state.tasks.get(task)
        return known is None or known.state == "cancelled"

    lines = runs.runs_dir(job.profile) / "logs" / f"{job.key}.log"
    lines.parent.mkdir(parents=True, exist_ok=True)
    deadline = None if job.ends is None else time.monotonic() + job.ends - time.time()
    with lines.open("a", encoding="utf-8", buffering=1) as file:
        log = lambda line: print(line, file=file)  # noqa: E731
        context = Context(pick_device(job.device), None, deadline, log, wait=False, stopped=unwanted)
        try:
            return read_files(run_to_end(of, row, job, context))
        except OutOfTime:
            return None
        except Exception as error:
            log(f"failed ({type(error).__name__}): {error}")
            if disk_full(error):  # what it was raised from does not travel
                raise OSError(errno.ENOSPC, first_line(error)) from None
            raise


def run_to_end(of: Any, row: Row, job: Job, context: Context) -> Record:
    """`run_row`; while another process computes this row, the worker takes another."""
    while True:
        try:
            if context.out_of_time():
                raise OutOfTime("no time is left")
            return run_row(of, row, job.seed, job.profile, context)
        except Busy:
            secede()
            with locked(runs.runs_dir(job.profile) / "locks" / job.key, context.log):
                pass
            rejoin()


def check_same(job: Job, row: Row) -> None:
    """DataError where a worker would compute something else than the batch asks for."""
    key, prints = key_and_prints(row, job.seed, job.profile)
    for name in sorted(prints.keys() | job.prints.keys()):
        here, there = prints.get(name), job.prints.get(name)
        if here != there:
            where = f"{get_worker().name} ({project_root()})"
            raise DataError(f"worker {where} has other {name} than the batch: fingerprint {here}, not {there}")
    if key != job.key:
        raise DataError(f"worker {get_worker().name} has other code than the batch: {key} for {job}, not {job.key}")


def read_files(record: Record) -> Files:
    paths = [record.path.with_suffix(ending) for ending in ENDINGS]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def write_files(files: Files, folder: Path) -> None:
    """Those that are not there, the record last: with it the run is whole."""
    for name in sorted(files, key=lambda name: ENDINGS.index(Path(name).suffix)):
        content = files[name]
        if not (folder / name).exists():
            write_atomically(folder / name, lambda aside, content=content: aside.write_bytes(content))
