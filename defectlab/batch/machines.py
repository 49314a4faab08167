"""Where rows are computed side by side: processes of this machine, jobs of Slurm, or a cluster that runs already."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import torch
from distributed import Client, Nanny, Scheduler, SpecCluster

from defectlab import runs
from defectlab.files import DataError
from defectlab.provenance import JOBS
from defectlab.runs import first_line

TRIES = 3  # of a row, before it has failed
CONNECT_SECONDS = 10
CONFIG = {
    "distributed.scheduler.allowed-failures": TRIES - 1,
    "distributed.comm.timeouts.connect": "60s",
    # what must be set before Python starts; else Dask would give each worker one thread
    "distributed.nanny.pre-spawn-environ": {"DASK_LOGGING__DISTRIBUTED": "critical"},
}


def cards_of(device: str) -> list[str]:
    """The GPUs that a device's name allows, as CUDA_VISIBLE_DEVICES writes them; none for "cpu"."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = named.split(",") if named else [str(card) for card in range(torch.cuda.device_count())]
    return [cards[int(index)]] if index else cards


def fitting(workers: int, device: str, peak_gb: float, log: Callable = print) -> int:
    """How many of so many workers fit on the cards, where the largest row needs so much; a line where it is fewer."""
    cards = cards_of(device)
    if not cards:
        return workers
    most, reason = workers, ""
    if peak_gb:
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        most, reason = len(cards) * max(1, int(memory // peak_gb)), f"a row needs up to {peak_gb:g} GB of {memory:.0f}"
    if _exclusive():
        most, reason = min(most, len(cards)), "the cards are in exclusive compute mode, one process each"
    if most < workers:
        log(f"{most} workers in place of {workers}: {reason}")
    return min(workers, most)


def _exclusive() -> bool:
    """Whether nvidia-smi says so; it says nothing where it is not there."""
    query = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return "Exclusive" in subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    return False


def worker_environments(workers: int, device: str) -> list[dict[str, str]]:
    """Environment variables of each worker: one GPU, the GPUs dealt in turn, and its part of the cores."""
    cards = cards_of(device)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
    common = {"OMP_NUM_THREADS": threads}
    if not cards:
        return [common | {JOBS: str(workers)}] * workers
    dealt = [cards[worker % len(cards)] for worker in range(workers)]
    return [common | {JOBS: str(dealt.count(card)), "CUDA_VISIBLE_DEVICES": card} for card in dealt]


def local_workers(workers: int, device: str, scratch: str) -> SpecCluster:
    """Processes of this machine; each ends with this one, however this one ends."""

    def spec(name: int, env: dict[str, str]) -> dict[str, Any]:
        options = {"nthreads": 1, "memory_limit": 0, "env": env, "host": "127.0.0.1", "local_directory": scratch}
        if card := env.get("CUDA_VISIBLE_DEVICES"):
            name = f"{name} (GPU {card})"
        return {"cls": Nanny, "options": {**options, "name": f"worker {name}", "dashboard": False}}

    environments = worker_environments(workers, device)
    scheduler = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:8787"}
    return SpecCluster(
        workers={name: spec(name, env) for name, env in enumerate(environments)},
        scheduler={"cls": Scheduler, "options": scheduler},
        silence_logs=logging.CRITICAL,
    )


SLURM = {"partition": None, "account": None, "gpus": "1", "hours": "8", "cores": "4", "memory": "16GB"}


def slurm_options(text: str) -> dict[str, Any]:
    """`partition=gpu,gpus=1,hours=8` -> what SLURMCluster takes. ValueError for what it does not know."""
    given = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if unknown := [name for name, value in given.items() if name not in SLURM or not value]:
        raise ValueError(f"--slurm: {unknown[0]!r} is not one of {', '.join(f'{name}=...' for name in SLURM)}")
    of = SLURM | given
    if of["gpus"] not in ("0", "1"):
        raise ValueError("--slurm: a worker computes on one GPU, so gpus is 0 or 1: --workers says how many jobs")
    try:
        minutes = round(60 * float(of["hours"]))
        cores = int(of["cores"])
        if minutes < 1 or cores < 1:
            raise ValueError
    except ValueError:
        raise ValueError("--slurm: hours and cores are numbers greater than 0") from None
    kept = ("DEFECTLAB_DATA", "DEFECTLAB_WEIGHTS")
    variables = {name: str(Path(os.environ[name]).absolute()) for name in kept if os.environ.get(name)}
    variables |= {"OMP_NUM_THREADS": str(cores), "DASK_LOGGING__DISTRIBUTED": "error"}
    return {
        "queue": of["partition"],
        "account": of["account"],
        "cores": 1,  # of Dask: one row at a time
        "job_cpu": cores,
        "memory": of["memory"],
        "walltime": f"{minutes // 60:02d}:{minutes % 60:02d}:00",
        "job_extra_directives": [f"--gres=gpu:{of['gpus']}"] if of["gpus"] != "0" else [],
        # Slurm's own limit of memory holds; a worker that leaves before its hours are over is not one that died
        "worker_extra_args": ["--memory-limit", "0", "--lifetime", f"{max(minutes - 5, minutes / 2):g}m"],
        "job_script_prologue": [f'export {name}="{value}"' for name, value in variables.items()],
        "python": sys.executable,
    }


def slurm_jobs(options: dict[str, Any], profile: str) -> Any:
    """A cluster without workers yet; what they print goes to `runs/<profile>/logs`. DataError where Slurm would not
    take its jobs: later no one would hear of it."""
    if not shutil.which("sbatch"):
        raise DataError("sbatch is not installed here: give --slurm on a login node of the cluster")
    handler = signal.getsignal(signal.SIGINT)
    from dask_jobqueue import SLURMCluster  # on import it makes Ctrl-C an exit without a word

    signal.signal(signal.SIGINT, handler)
    logs = str(runs.runs_dir(profile) / "logs")
    jobs = SLURMCluster(**options, log_directory=logs, silence_logs=logging.CRITICAL)
    tried = subprocess.run(["sbatch", "--test-only"], input=jobs.job_script(), capture_output=True, text=True)
    if tried.returncode:
        jobs.close()
        raise DataError(f"sbatch refuses such a job ({tried.stderr.strip() or tried.returncode}): change --slurm")
    return jobs


@contextlib.contextmanager
def cluster(profile: str, device: str, workers: int = 1, scheduler: str = "", slurm: str = "") -> Iterator[Client]:
    """A client of a running cluster (`scheduler`, as in tcp://host:8786), of `workers` jobs of Slurm, or of as many
    processes here. DataError where the cluster does not answer, or there is no Slurm."""
    options = slurm_options(slurm) if slurm else {}
    warnings.filterwarnings("ignore", message="Port 8787 is already in use")  # the address is printed
    with contextlib.ExitStack() as stack, dask.config.set(CONFIG):
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="defectlab-", ignore_cleanup_errors=True))
        if scheduler:
            place: Any = scheduler
        elif slurm:
            place = stack.enter_context(slurm_jobs(options, profile))
            place.adapt(minimum_jobs=workers, maximum_jobs=workers)  # a job whose hours are over is followed by another
        else:
            place = stack.enter_context(local_workers(workers, device, scratch))
        try:
            client = stack.enter_context(Client(place, timeout=CONNECT_SECONDS))
        except OSError as error:
            raise DataError(
                f"no Dask scheduler answers at {scheduler} ({first_line(error)}): start one there"
            ) from error
        print(f"dashboard: {client.dashboard_link}")
        yield client
