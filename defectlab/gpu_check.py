"""`python -m defectlab gpu-check`: is this GPU used right, how fast is it, and what would the paper profile take?

One row of each kind is trained on synthetic images: in smoke's size on the CPU and on the GPU, whose losses must agree;
then in the paper's size and batch for a few epochs, for images/s, the GPU's utilisation and peak memory. What was
measured lies in `runs/gpu-check.json`, where `status --profile paper` and the workers of a batch read it. Without a GPU
the first part runs on the CPU alone and the rest is left out.
"""

import argparse
import dataclasses
import math
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from defectlab.batch import run_row
from defectlab.batch.sizes import check_path, hours, kind_of, measured_here
from defectlab.files import write_json
from defectlab.precision import fast_bf16
from defectlab.provenance import device_name, pick_device, provenance
from defectlab.runs import Context, Record, first_line
from defectlab.studies import STUDIES, Study, study

EPOCHS, DRAWS = 8, 4  # of a row in the paper's size; batches of an epoch, where an epoch is not the whole set
FROM_SMOKE = ("dataset", "teacher", "encoder", "pretrained", "split")  # synthetic images
# CPU against GPU: loss of the first epoch in fp32, and with TF32 or bf16 on one side; metrics of what trains nothing
LOSS_TOLERANCE, METRIC_TOLERANCE = {"fp32": 0.01, "lower": 0.05}, 1.0
COMPILED = ("detector", ("inductor", "graphs"))  # a kind whose settings have `compile`, and what is tried of it
COUNTING = "costs"  # kinds that end so count operations


def kinds() -> dict[str, tuple[str, str]]:
    """Kind -> study and row, the first that smoke plans and every machine has."""
    found: dict[str, tuple[str, str]] = {}
    for name in STUDIES:
        for row_name, row in study(name).rows["smoke"].items():
            if row.seeds and not row.optional and not row.settings.model.endswith(COUNTING):
                found.setdefault(kind_of(row.settings), (name, row_name))
    return found


def in_papers_size(paper: Any, smoke: Any) -> Any:
    """Settings of a row of paper on smoke's data, with random weights of the same networks, for a few epochs."""
    changes = {}
    for field in dataclasses.fields(paper):
        value, small = getattr(paper, field.name), getattr(smoke, field.name)
        if dataclasses.is_dataclass(value) and dataclasses.is_dataclass(small):
            changes[field.name] = in_papers_size(value, small)
        elif field.name in ("teacher", "encoder") and str(value).startswith(("resnet", "wide_resnet")):
            changes[field.name] = f"{value.removesuffix('_random')}_random"
        elif field.name in FROM_SMOKE:
            changes[field.name] = small
        elif field.name == "epochs":
            changes[field.name] = min(value, EPOCHS)
        elif field.name == "draws":
            changes[field.name] = min(value, DRAWS * paper.batch)
    return dataclasses.replace(paper, **changes)


def shortened(of: Study) -> Study:
    """The study with rows of paper in the papers' sizes, that end soon and need no real data."""
    smoke = of.rows["smoke"]
    rows = {
        name: dataclasses.replace(smoke[name], settings=in_papers_size(row.settings, smoke[name].settings))
        for name, row in of.rows["paper"].items()
        if name in smoke
    }
    return dataclasses.replace(of, rows={"paper": rows})


# --- What is measured ------------------------------------------------------------------------------------------------


@contextmanager
def utilisation(device: str) -> Iterator[list[float]]:
    """Per cent, twice a second, as nvidia-smi says; none where it is not there."""
    found: list[float] = []
    if not shutil.which("nvidia-smi"):
        yield found
        return
    card = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = ["-i", f"GPU-{card}"] if card else []
    query = ["nvidia-smi", *which, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield found
        finally:
            process.terminate()
            said = process.communicate()[0].split()
            found += [float(one) for one in said if one.replace(".", "", 1).isdigit()]


def machine(device: str) -> dict[str, str]:
    """What a reader of the report must know of it."""
    made = provenance(device)
    told = {"system": platform.platform(), "device": device_name(device), "commit": made["commit"][:12]}
    told |= {name: made["versions"].get(name, "not installed") for name in ("python", "torch", "torchvision")}
    told["bf16"] = "used" if fast_bf16(torch.device(device)) else "not used: slower than float32 here"
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        told["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        told["CUDA of torch"] = str(torch.version.cuda)
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version,compute_mode", "--format=csv,noheader"]
            lines = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.splitlines()
            told["driver, compute mode"] = lines[0] if lines else "not told"
    return told


def first_loss(record: Record) -> float:
    return next(iter(record.curve.get("loss", [])), math.nan)


def difference(cpu: Record, gpu: Record) -> str:
    """How a row on the GPU stands to the same on the CPU: "" where they agree."""
    one, other = first_loss(cpu), first_loss(gpu)
    if math.isfinite(one):
        same = cpu.precision == gpu.precision == "fp32"
        most = LOSS_TOLERANCE["fp32" if same else "lower"]
        apart = abs(one - other) / max(abs(one), 1e-9)
        return "" if apart <= most else f"loss of the first epoch {one:.4g} and {other:.4g} (tolerance {most:.0%})"
    for name, value in cpu.metrics.items():
        if not abs(value - gpu.metrics.get(name, math.nan)) <= METRIC_TOLERANCE:
            return f"{name} {value:.1f} and {gpu.metrics.get(name, math.nan):.1f} (tolerance {METRIC_TOLERANCE:g})"
    return ""


# --- The check -------------------------------------------------------------------------------------------------------


def gpu_check(options: argparse.Namespace) -> int:
    """The command. -> 1 where a kind failed, or computes something else on the GPU."""
    device = pick_device(options.device)
    on_gpu = torch.device(device).type == "cuda"
    chosen = {kind: at for kind, at in kinds().items() if not options.kinds or kind in options.kinds}
    if unknown := set(options.kinds or []) - chosen.keys():
        raise ValueError(f"unknown kind {min(unknown)!r}: use some of {', '.join(kinds())}")
    ends = time.monotonic() + 60 * options.minutes
    found: dict[str, dict[str, Any]] = {}
    last: Callable[[], dict[str, str]] | None = None
    with tempfile.TemporaryDirectory() as scratch:

        def run(of: Study, name: str, profile: str, where: str, log: Callable = lambda line: None) -> Record:
            context = Context(where, log=log)
            return run_row(of, of.rows[profile][name], 0, profile, context, Path(scratch) / where.replace(":", "-"))

        for kind, (name, row_name) in chosen.items():
            of, line = study(name), found.setdefault(kind, {"row": f"{name} {row_name}"})
            if time.monotonic() > ends:
                line["note"] = f"not reached in {options.minutes:g} minutes: --minutes gives it more"
                continue
            try:
                cpu = run(of, row_name, "smoke", "cpu")
                line["smoke_seconds"] = cpu.seconds
                if on_gpu:
                    gpu = run(of, row_name, "smoke", device)
                    line["problem"] = difference(cpu, gpu)
                    if row_name in (long := shortened(of)).rows["paper"]:
                        lines: list[str] = []
                        with utilisation(device) as used:
                            record = run(long, row_name, "paper", device, lines.append)
                        line |= {"gb": round(record.peak_memory_mb / 1024, 2), "seconds": record.seconds}
                        line["images_per_second"] = record.costs.get("train_images_per_second", 0.0)
                        line["utilisation"] = round(statistics.mean(used), 1) if used else None
                        if kind == COMPILED[0]:
                            line["compiled"] = {"": f"{settled(lines):.0f} images/s"}
                            last = partial(compiled, long, row_name, record, partial(run, where=device))
            except Exception as error:  # the other kinds are checked all the same
                line["problem"] = f"{type(error).__name__}: {first_line(error)}"
            print(shown(kind, line), flush=True)
        if last and time.monotonic() < ends:  # compiling takes minutes
            found[COMPILED[0]]["compiled"] |= last()
    told = machine(device)
    if on_gpu and not options.kinds:
        earlier = {kind: line for kind, line in measured_here().items() if "gb" in line}
        kept = {kind: line if "gb" in line else earlier.get(kind, line) for kind, line in found.items()}
        write_json(check_path(), {"machine": told, "kinds": kept})
    print(report(told, found, on_gpu))
    return int(any(line.get("problem") for line in found.values()))


def settled(lines: list[str]) -> float:
    """Images/s from what a training logs at each epoch's end, the mean so far: the median of the later epochs alone,
    since the first ones compile and warm up. NaN for fewer than three epochs."""
    rates = [float(found[1]) for line in lines if (found := re.search(r"([\d.]+) images/s$", line))]
    ends = [number / rate for number, rate in enumerate(rates, 1)]  # seconds, were there one image an epoch
    return statistics.median(1 / (after - before) for before, after in pairwise(ends[1:])) if ends[2:] else math.nan


def compiled(of: Study, name: str, plain: Record, run: Callable[..., Record]) -> dict[str, str]:
    """A row of `of` in the paper's size, whose record is `plain`, with each other setting of `compile` -> what it
    came to."""
    found: dict[str, str] = {}
    for how in COMPILED[1]:
        row, lines = of.rows["paper"][name], []
        row = dataclasses.replace(row, settings=dataclasses.replace(row.settings, compile=how))
        try:
            record = run(dataclasses.replace(of, rows={"paper": {name: row}}), name, "paper", log=lines.append)
            found[how] = f"{settled(lines):.0f} images/s, " + (difference(plain, record) or "same loss")
        except Exception as error:  # a compiler that does not work here is no fault of the rows
            found[how] = f"{type(error).__name__}: {first_line(error)}"
    return found


def shown(kind: str, line: dict[str, Any]) -> str:
    values = {"GB": line.get("gb"), "images/s": line.get("images_per_second"), "% used": line.get("utilisation")}
    told = ", ".join(f"{value:g} {unit}" for unit, value in values.items() if value is not None)
    return f"{kind}: {line.get('problem') or line.get('note') or told or 'runs'}"


def report(told: dict[str, str], found: dict[str, dict[str, Any]], on_gpu: bool) -> str:
    """Tables to paste into an issue."""
    lines = ["", "| machine | |", "|---|---|", *(f"| {name} | {value} |" for name, value in told.items()), ""]
    head = ("kind", "row", "smoke, s on the CPU", "images/s", "GPU used, %", "peak, GB", "problem")
    names = ("row", "smoke_seconds", "images_per_second", "utilisation", "gb", "problem")
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for kind, line in found.items():
        values = ("" if line.get(name) is None else f"{line[name]}" for name in names)
        lines.append(f"| {kind} | {' | '.join(values)} |")
    for kind, line in found.items():
        if told := line.get("compiled"):
            lines += ["", f"| `compile` of {kind} | later epochs |", "|---|---|"]
            lines += [f'| `"{how}"` | {came} |' for how, came in told.items()]
    if not on_gpu:
        return "\n".join([*lines, "", "No GPU: images/s, memory and agreement are left out."])
    lines += ["", "| study | hours of paper, one GPU |", "|---|---|"]
    for name in STUDIES:
        rows = [row for row in study(name).rows["paper"].values() if not row.optional]
        of_rows = [row.seeds * hours(row, found) for row in rows]
        known = [value for value in of_rows if math.isfinite(value)]
        open_rows = f" and {len(of_rows) - len(known)} rows not estimated" if len(known) < len(of_rows) else ""
        lines.append(f"| {name} | {sum(known):.1f}{open_rows} |")
    return "\n".join(lines)
