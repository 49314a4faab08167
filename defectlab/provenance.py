"""Where a run was made: device, versions of packages, commit, memory. What a record says of its origin."""

import contextlib
import datetime
import functools
import os
import platform
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from defectlab.files import data_dir, project_root

PACKAGES = (
    *("torch", "torchvision", "numpy", "scipy", "scikit-learn", "PyWavelets", "safetensors"),
    *("torchmetrics", "faster-coco-eval", "diffusers"),
)
JOBS = "DEFECTLAB_JOBS"  # environment: how many runs share the device


def pick_device(name: str) -> str:
    """'auto' -> 'cuda' where there is one, else 'cpu', with a warning where torch cannot use an NVIDIA GPU that is
    there. ValueError for a device that is not there, with torch's reason."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        if reason := why_no_gpu():
            warnings.warn(f"computing on the CPU, since torch cannot use the GPU: {reason}", stacklevel=2)
        return "cpu"
    kind, _, index = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if (index and not index.isdigit()) or int(index or 0) >= there:
        reason = why_no_gpu() if kind == "cuda" and not there else ""
        because = f" ({reason})" if reason else ""
        raise ValueError(f"device {name!r} is not available here{because}: use auto, cpu or (with a GPU) cuda")
    return name


def why_no_gpu() -> str:
    """Why torch cannot use an NVIDIA GPU whose driver is there (torch without CUDA, a driver that is too old); "" where
    there is no driver, or the GPUs are hidden on purpose."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if shutil.which("nvidia-smi") and not hidden:
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            return str(error).partition("\n")[0]
    return ""


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
    """Peak memory in MB of this process: in the run, with the sets that it holds, on a GPU; so far, on a CPU."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if sys.platform == "win32":
        import psutil

        return round(psutil.Process().memory_info().peak_wset / 2**20, 1)
    import resource  # not on Windows

    scale = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1)


def where() -> str:
    """One line on this machine for notebooks and logs."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"torch {torch.__version__}, {device_name('cpu')}, {gpu}; data in {data_dir().name}/"
