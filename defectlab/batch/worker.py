"""What a worker of a cluster does with a row: compute it in its own checkout, and hand back the files of the run."""

import errno
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from distributed import get_worker

from defectlab import runs
from defectlab.batch import key_and_prints, run_row
from defectlab.files import Busy, disk_full, project_root, write_atomically
from defectlab.provenance import pick_device
from defectlab.runs import Context, OutOfTime, Record, first_line
from defectlab.studies import Row, study

ENDINGS = (".safetensors", ".npz", ".json")  # of a run's files, in the order in which they are written
EVENTS = "defectlab"  # Dask's topic on which workers say what they begin


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def code() -> str:
    """Hash of the package's files."""
    files = sorted((project_root() / "defectlab").rglob("*.py"))
    return digest(b"".join(digest(path.read_bytes()).encode() for path in files))


CODE = code()  # as it was when this process began to use it


Files = dict[str, bytes]  # the files of a run by name


@dataclass(frozen=True)
class Job:
    """A row and seed, the key that its record must have, and when to stop (`time.time()`). needs: name of the record of
    each row that it needs -> its hash. code: hash of the package (`CODE`)."""

    study: str
    name: str
    seed: int
    profile: str
    device: str
    key: str
    prints: dict[str, str]
    ends: float | None
    code: str
    needs: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.study} {self.name} seed {self.seed}"


@dataclass(frozen=True)
class Done:
    """What became of a job: the files of its run, or "busy" (another process computes it), "late" (time is up),
    "missing" (files of a needed row are not here, and were not sent), or why this worker would compute something else
    than the batch asks for. worker: its name and address."""

    worker: str
    address: str
    files: Files | None = None
    reason: str = ""
    refused: str = ""


def compute(job: Job, sent: list[Files]) -> Done:
    """One row and seed. `sent`: the files of the rows that it needs, where they do not lie here."""
    worker = get_worker()
    task, me = worker.get_current_task(), (str(worker.name), worker.address)
    if refused := difference(job):
        return Done(*me, refused=f"worker {me[0]} ({project_root()}) {refused}")
    row = row_of(job)
    worker.log_event(EVENTS, {"row": str(job), "name": me[0]})
    folder = runs.runs_dir(job.profile)
    for files in sent:
        write_files(files, folder)
    for name, wanted in job.needs:
        if not (folder / name).exists():
            return Done(*me, reason="missing")
        if digest((folder / name).read_bytes()) != wanted:
            return Done(*me, refused=f"worker {me[0]} has another run of a row that is needed: delete {folder / name}")

    def unwanted() -> bool:
        """Whether the batch was stopped: its tasks are no longer anybody's."""
        known = worker.state.tasks.get(task)
        return known is None or known.state == "cancelled"

    lines = folder / "logs" / f"{job.key}.log"
    lines.parent.mkdir(parents=True, exist_ok=True)
    deadline = None if job.ends is None else time.monotonic() + job.ends - time.time()
    with lines.open("a", encoding="utf-8", buffering=1) as file:
        log = lambda line: print(line, file=file)  # noqa: E731
        context = Context(pick_device(job.device), None, deadline, log, wait=False, stopped=unwanted)
        try:
            return Done(*me, read_files(run_row(study(job.study), row, job.seed, job.profile, context)))
        except OutOfTime:
            return Done(*me, reason="late")
        except Busy:
            return Done(*me, reason="busy")
        except Exception as error:
            log(f"failed ({type(error).__name__}): {error}")
            if disk_full(error):  # what it was raised from does not travel
                raise OSError(errno.ENOSPC, f"{first_line(error)} (worker {me[0]})") from None
            raise


def row_of(job: Job) -> Row:
    return study(job.study).pick(job.profile, [job.name])[job.name]


def difference(job: Job) -> str:
    """Why this worker would compute something else than the batch asks for, or nothing; "" where it would not."""
    if job.code != CODE:
        return "has other code than the batch: bring both to the same files and start it again"
    if (rows := get_worker().state.nthreads) != 1:
        return f"takes {rows} rows at once: start it with --nthreads 1"
    try:
        pick_device(job.device)
        key, prints = key_and_prints(row_of(job), job.seed, job.profile)
    except Exception as error:  # device, data or weights are not there
        return f"cannot compute this row: {first_line(error)}"
    for name in sorted(prints.keys() | job.prints.keys()):
        here, there = prints.get(name), job.prints.get(name)
        if here != there:
            return f"has other {name} than the batch: fingerprint {here}, not {there}"
    return "" if key == job.key else f"makes another key of the same row ({key}): start it again"


def read_files(record: Record) -> Files:
    paths = [record.path.with_suffix(ending) for ending in ENDINGS]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def write_files(files: Files, folder: Path) -> None:
    """The files of a run, the record last: with it the run is whole. One that is whole here already stays."""
    ordered = sorted(files, key=lambda name: ENDINGS.index(Path(name).suffix))
    if (folder / ordered[-1]).exists():
        return
    for name in ordered:
        write_atomically(folder / name, lambda aside, content=files[name]: aside.write_bytes(content))
