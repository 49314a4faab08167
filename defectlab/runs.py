"""Runs and records: profiles, keys, provenance, and the files in which a result is kept.

A run is keyed by what is computed. `runs/<profile>/` holds this machine's runs (ignored by git), `results/runs/` the
recorded ones (committed). A record is `<key>.json` and `<key>.npz`; a run has its weights beside it as
`<key>.safetensors`. The JSON is written last and atomically, so a record is whole or it is not there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from defectlab.files import data_dir
from defectlab.files import locked
from defectlab.files import project_root
from defectlab.files import write_atomically
from defectlab.files import write_json
from importlib import metadata
from pathlib import Path
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_file
from torch import Tensor
from torch import nn
from typing import Any
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import numpy as np
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import torch



class OutOfTime(RuntimeError):
    """The time budget is used up; what was trained so far lies in the checkpoint and the next run goes on from it."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message names epoch and batch."""


@dataclass
class Session:
    """What one run may use and where it leaves traces: the same for every training in a row.

    checkpoint: file that an interrupted training continues from; None: do not write one.
    deadline: `time.monotonic()` value after which training stops at the end of an epoch with OutOfTime; None: none.
    say: where the line an epoch goes.
    need: (settings, seed) -> record of another row of the study at the same profile, run first if it has not been run
        here: a teacher, or the network that a row looks at. `runs.run` sets it.
    """

    checkpoint: Path | None = None
    deadline: float | None = None
    say: Callable[[str], None] = print
    need: Callable[[Any, int], Any] | None = None
    every_seconds: float = 60.0  # between two checkpoints
    _last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        if time.monotonic() - self._last < self.every_seconds:
            return False
        self._last = time.monotonic()
        return True

    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def first_line(error: Exception) -> str:
    """What torch says of a checkpoint that does not fit runs over pages: the first line will do."""
    return (str(error).splitlines() or [type(error).__name__])[0]

PROFILES = ("smoke", "quick", "paper")
PACKAGES = (
    *("torch", "torchvision", "numpy", "scipy", "scikit-learn", "PyWavelets", "safetensors"),
    *("torchmetrics", "faster-coco-eval", "diffusers"),
)
NPZ_LIMIT = 300_000  # bytes: what a committed record may weigh
JOBS = "DEFECTLAB_JOBS"  # environment: how many runs share the device


@dataclass
class Result:
    """What `run_row` of a study returns.

    metrics: of the test set, in per cent; per_class: the same a defect type; dev: the same on dev, with its threshold.
    curve: name -> a value an epoch. predictions: arrays for the .npz. model: tensors for the .safetensors.
    costs: parameters, images/s, seconds of training ...; precision: what the network computed in.
    notes: what else a reader must know, such as the key and hash of the teacher that a student learnt from.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    dev: dict[str, float]
    curve: dict[str, list[float]]
    predictions: dict[str, np.ndarray]
    model: dict[str, Tensor]
    costs: dict[str, float]
    precision: str
    fingerprints: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def runs_dir(profile: str) -> Path:
    return project_root() / "runs" / profile


def recorded_dir() -> Path:
    return project_root() / "results" / "runs"


def check_profile(profile: str) -> str:
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: use one of {', '.join(PROFILES)}")
    return profile


# --- Keys ------------------------------------------------------------------------------------------------------------


def changed(settings: Any) -> dict[str, Any]:
    """The fields of a settings dataclass that differ from their frozen defaults."""
    found = {f.name: (getattr(settings, f.name), f.default) for f in dataclasses.fields(settings)}
    return {
        name: plain(value)
        for name, (value, default) in found.items()
        if value != default or dataclasses.is_dataclass(value)  # whose version counts even where all is default
    }


def plain(value: Any) -> Any:
    """Settings inside settings (a row that looks at another row's network) as a dict of what differs."""
    if not dataclasses.is_dataclass(value):
        return value
    return {"model": value.model, "version": value.version} | changed(value)


def identity(model: str, version: int, different: dict[str, Any], profile: str) -> str:
    """What a row is, whatever data and weights a machine has: the model, its version, its settings, the profile."""
    return _digest([model, version, json.loads(json.dumps(different)), profile])


def row_identity(settings: Any, profile: str) -> str:
    return identity(settings.model, settings.version, changed(settings), profile)


def make_key(model: str, dataset: str, profile: str, seed: int, row: str, fingerprints: dict[str, str]) -> str:
    """`<model>-<data>-<profile>-s<seed>-<hash>`, the hash over identity, seed and fingerprints."""
    return f"{model}-{dataset.split('/')[-1]}-{profile}-s{seed}-{_digest([row, seed, fingerprints])}"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


# --- Provenance ------------------------------------------------------------------------------------------------------


def device_name(device: str | torch.device) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"CPU {model}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"


@functools.cache  # once a process: a run is made by the code that was imported, wherever HEAD moves meanwhile
def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, or no git: the record says "unknown"
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    """Package -> version, of those of `PACKAGES` that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def provenance(device: str | torch.device) -> dict[str, Any]:
    status = _git(project_root(), "status", "--porcelain", "--untracked-files=no", "--", "defectlab")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "jobs": int(os.environ.get(JOBS, 1)),
        "versions": {"python": platform.python_version()} | _versions(),
        "commit": _git(project_root(), "rev-parse", "HEAD") or "unknown",
        "dirty": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def reset_peak_memory(device: str | torch.device) -> None:
    """Where it can be reset: on a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: str | torch.device) -> float:
    """Peak memory in MB: of the run on a GPU, of the whole process so far on a CPU."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1)


# --- Records ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """A finished run: the JSON as a dict, and where it lies."""

    content: dict[str, Any]
    path: Path

    def __getattr__(self, name: str) -> Any:
        try:
            return self.content[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path.with_suffix(".npz"), allow_pickle=False) as file:
            return dict(file)

    @property
    def timed_alone(self) -> bool:
        """Whether its speeds are the network's own: no other run shared the device."""
        return self.content.get("jobs", 1) == 1

    @property
    def row(self) -> str:
        return identity(self.model, self.version, self.changed, self.profile)


class RecordError(ValueError):
    """A record cannot be read; the message names the file and the remedy."""


def read_record(path: Path) -> Record:
    try:
        return Record(json.loads(path.read_text()), path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is not a readable record ({error}); delete it and run again") from error


def read_records(folder: Path) -> list[Record]:
    return [read_record(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []


def find(records: list[Record], settings: Any, profile: str) -> list[Record]:
    """The records of one row, by seed. Where data or weights differ between them, those of the largest group."""
    row = row_identity(settings, profile)
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.row == row:
            groups.setdefault(_digest(record.fingerprints), []).append(record)
    best = max(groups.values(), key=len, default=[])
    return sorted(best, key=lambda r: r.seed)


def _write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


# --- Running a row ---------------------------------------------------------------------------------------------------


def run(study: Any, settings: Any, seed: int, profile: str, device: str, session: Session) -> Record:
    """Compute one row and seed unless `runs/<profile>/` has it already, and keep the result there.

    `study` is a module with `load(settings, device)`, `fingerprints(settings)` and `run_row(settings, seed, data,
    device, session)`. An interrupted training leaves a checkpoint and is continued by the next call.
    """
    folder = runs_dir(check_profile(profile))
    prints = study.fingerprints(settings)
    key = make_key(settings.model, settings.dataset, profile, seed, row_identity(settings, profile), prints)
    path = folder / f"{key}.json"
    code = provenance(device)
    with locked(folder / "locks" / key, session.say):
        if path.exists():
            return read_record(path)
        session.checkpoint = folder / "checkpoints" / f"{key}.safetensors"
        elsewhere = 0.0  # seconds spent on other rows, which have records of their own

        def need(other: Any, its_seed: int) -> Record:
            nonlocal elsewhere
            began = time.monotonic()
            found = run(study, other, its_seed, profile, device, Session(deadline=session.deadline, say=session.say))
            elsewhere += time.monotonic() - began
            reset_peak_memory(device)
            return found

        session.need = need
        reset_peak_memory(device)
        started = time.monotonic()
        data = study.load(settings, device)
        result = study.run_row(settings, seed, data, device, session)
        content = {
            "key": key,
            "model": settings.model,
            "version": settings.version,
            "profile": profile,
            "seed": seed,
            "dataset": settings.dataset,
            "data_label": data.label,
            "settings": dataclasses.asdict(settings),
            "changed": changed(settings),
            "metrics": result.metrics,
            "per_class": result.per_class,
            "dev": result.dev,
            "curve": result.curve,
            "costs": result.costs,
            "precision": result.precision,
            "seconds": round(time.monotonic() - started - elsewhere, 1),
            "peak_memory_mb": peak_memory_mb(device),
            "fingerprints": prints,
        } | code
        if result.notes:
            content["notes"] = result.notes
        if result.model:
            weights = path.with_suffix(".safetensors")
            header = {"key": key, "settings": json.dumps(content["settings"]), "model": settings.model}
            header["dev"] = json.dumps(result.dev)
            tensors = {k: v.detach().cpu().contiguous() for k, v in result.model.items()}
            write_atomically(weights, lambda aside: save_file(tensors, aside, header))
            content["model_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        _write_npz(path.with_suffix(".npz"), result.predictions)
        write_json(path, content)
        session.checkpoint.unlink(missing_ok=True)
    return read_record(path)


def load_weights(record: Record, network: nn.Module) -> None:
    """The weights that a run left beside its record, into `network`. ValueError where they are missing or foreign."""
    path = record.path.with_suffix(".safetensors")
    if not path.exists():
        raise ValueError(f"{path} is missing beside its record: delete {record.path} and run that row again")
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not fit this network ({first_line(error)}): delete {record.path} and it"
        ) from error


def promote(records: list[Record]) -> list[str]:
    """Copy finished runs into `results/runs`; -> a line for each. Smoke runs and too large ones are refused."""
    lines = []
    for record in records:
        if record.profile == "smoke":
            raise ValueError(f"{record.key} is a smoke run on synthetic data: only quick and paper runs are recorded")
        target = recorded_dir() / record.path.name
        if target.exists():
            lines.append(f"already recorded: {record.key}")
            continue
        arrays = record.path.with_suffix(".npz")
        if arrays.stat().st_size > NPZ_LIMIT:
            raise ValueError(f"{arrays} has {arrays.stat().st_size} bytes, more than the {NPZ_LIMIT} a record may have")
        write_atomically(target.with_suffix(".npz"), lambda aside, a=arrays: shutil.copyfile(a, aside) and None)
        write_json(target, record.content)
        doubt = "" if record.dirty is False else "  (made with uncommitted changes, or outside a checkout)"
        lines.append(f"recorded: {record.key}{doubt}")
    return lines


def where() -> str:
    """One line on this machine for notebooks and logs."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"torch {torch.__version__}, {device_name('cpu')}, {gpu}; data in {data_dir().name}/"
