"""The command line, without Jupyter: `python -m defectlab run|status|record|report|...`, see --help."""

import argparse
import importlib
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from defectlab import batch, runs
from defectlab.batch import RowsFailed, Task, tasks
from defectlab.files import DataError, WeightsError, writable
from defectlab.provenance import pick_device
from defectlab.runs import PROFILES, RECORDED, NonFiniteLoss, first_line
from defectlab.studies import STUDIES

MODULES = {  # of the commands that have one, imported when it is asked for
    "reproduce": "defectlab.reproduce",
    "score": "defectlab.own.score",
    "detect": "defectlab.own.detect",
    "bench": "defectlab.bench",
    "gpu-check": "defectlab.gpu_check",
}


def names(text: str) -> list[str]:
    """ValueError, of which argparse makes a sentence, for none."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise ValueError
    return found


def seeds(text: str) -> list[int]:
    """ValueError for none, a negative one, the same twice."""
    found = [int(part) for part in names(text)]
    if min(found) < 0 or len(set(found)) < len(found):
        raise ValueError
    return found


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def minutes(text: str) -> float:
    """ValueError for no time, less than none, time without end, and what is no number."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m defectlab", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, profile: str | None = "quick") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        if name in ("run", "status", "record"):
            studies = [*STUDIES, batch.ALL] if name == "run" else list(STUDIES)
            command.add_argument("study", choices=studies, nargs=None if name == "run" else "?")
            command.add_argument("--rows", type=names, metavar="A,B", help="rows of the study; default: all")
            command.add_argument("--seeds", type=seeds, metavar="0,1", help="default: as the study plans them")
        if profile:
            choices = (RECORDED, *PROFILES) if name in ("report", "reproduce") else PROFILES
            command.add_argument("--profile", choices=choices, default=profile, help=f"default: {profile}")
        if name not in ("status", "record", "report"):
            command.add_argument("--device", default="auto", help="auto, cpu or cuda")
        return command

    run = add("run", "run rows and seeds that this machine has not run yet")
    run.add_argument("--minutes", type=minutes, help="stop cleanly after so many; the same command goes on")
    run.add_argument("--workers", type=positive, help="rows side by side here, each on a GPU or a share of one")
    where = run.add_mutually_exclusive_group()
    where.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="on the workers of a running Dask cluster")
    where.add_argument(
        "--slurm", metavar="partition=gpu,gpus=1,hours=8", help="as many jobs; also account, cores (4), memory (16GB)"
    )
    run.add_argument("--tasks", type=names, metavar="ROW:SEED,...", help="exactly these, instead of --rows and --seeds")

    add("status", "which rows and seeds are recorded, run here, missing, in the order in which to run them")
    add("record", "promote finished runs of this machine into results/runs")
    add("report", "write the page of findings, tables and verdicts, and what is generated of README", RECORDED)

    reproduce = add("reproduce", "run the numbered notebooks, then write their HTML and the page", "smoke")
    reproduce.add_argument("--notebooks", type=names, metavar="03,20", help="numbers or beginnings of names")
    reproduce.add_argument("--minutes", type=minutes, help="budget of the whole call; the same command goes on")
    reproduce.add_argument("--seeds", type=seeds, metavar="0,1", help="default: as each notebook says")
    reproduce.add_argument("--jobs", type=positive, default=1, help="notebooks side by side")

    score = add("score", "score a folder of images with a trained model: scores.csv and a map for each image", None)
    score.add_argument("--images", type=Path, required=True, help="folder of images to score")
    score.add_argument("--out", type=Path, default=Path("scores"), help="for scores.csv and maps; default: scores")
    score.add_argument("--threshold", type=float, help="score from which on it is anomalous; default: that from dev")
    model = score.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="a .safetensors of runs/ or of an earlier --train-good")
    model.add_argument("--train-good", type=Path, help="folder of good images: train on these first")
    good = score.add_argument_group("with --train-good")
    good.add_argument("--method", choices=("rd4ad", "bsdrd", "patchcore"), default="bsdrd", help="default: bsdrd")
    good.add_argument("--teacher", default="resnet18", help="default: resnet18; resnet18_random needs no weights")
    good.add_argument("--epochs", type=positive, default=10, help="default: 10; patchcore has none")
    good.add_argument(
        "--size", type=positive, default=256, help="pixels per side; default: 256 (a --model has its own)"
    )

    detect = add("detect", "train a detector on images with boxes, or find defects in others with it", None)
    source = detect.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of images with boxes: train on it and evaluate")
    source.add_argument("--model", type=Path, help="a .safetensors of runs/ or of an earlier --data: find defects")
    detect.add_argument("--format", choices=("voc", "yolo", "coco"), help="with --data: how its boxes are written")
    detect.add_argument("--size", type=positive, default=320, help="with --data: pixels per side; default: 320")
    detect.add_argument("--epochs", type=positive, default=50, help="with --data; default: 50")
    detect.add_argument("--family", choices=("v8", "v5"), default="v8", help="with --data: anchor-free or anchor-based")
    detect.add_argument("--scale", default="n", help="with --data: t, n, s, m, l or (v8) x")
    detect.add_argument("--batch", type=int, default=16, help="with --data: images per step")
    detect.add_argument("--seed", type=int, default=0, help="with --data")
    detect.add_argument("--minutes", type=minutes, help="with --data: pause after so many; again to go on")
    detect.add_argument("--images", type=Path, help="with --model: folder of images to look at")
    detect.add_argument("--confidence", type=float, help="with --model: lowest score; default: the threshold from dev")
    detect.add_argument("--draw", action="store_true", help="with --model: the images with their boxes, too")
    detect.add_argument("--out", type=Path, help="folder of the results; default: detections, with --model found")
    detect.add_argument("--onnx", action="store_true", help="write detector.onnx, too, and compare it with torch")

    bench = add("bench", "time all networks of a study in one process, in turns, on an idle machine", None)
    bench.add_argument("study", choices=list(STUDIES))
    bench.add_argument("--repeats", type=positive, default=30, help="rounds; default: 30, which is the least")
    bench.add_argument("--busy", action="store_true", help="go on where other work uses the machine; it is recorded")

    check = add("gpu-check", "is this GPU used right, how fast is it, what would the paper profile take", None)
    check.add_argument("--kinds", type=names, metavar="A,B", help="of rows; default: all")
    check.add_argument("--minutes", type=minutes, default=5, help="begin no other kind after so many; default: 5")
    return top


def chosen(options: argparse.Namespace, log: Callable[[str], None] | None = None) -> list[Task]:
    """The tasks that --rows and --seeds or --tasks name. ValueError where there are none. `log`: see `batch.tasks`."""
    if getattr(options, "tasks", None):
        form = "STUDY/ROW:SEED" if options.study == batch.ALL else "ROW:SEED"
        wanted = []
        for pair in options.tasks:
            where, _, seed = pair.rpartition(":")
            of, _, row = where.rpartition("/")
            if not seed.isdigit() or bool(of) != (options.study == batch.ALL) or of not in ("", *STUDIES):
                raise ValueError(f"--tasks takes {form},{form},..., got {','.join(options.tasks)}")
            wanted.append((of or options.study, row, int(seed)))
        listed = {}
        for of in dict.fromkeys(name for name, _, _ in wanted):
            own = [(row, seed) for name, row, seed in wanted if name == of]
            rows, numbered = (list(dict.fromkeys(values)) for values in zip(*own, strict=True))
            listed |= {(of, t.name, t.seed): t for t in tasks(of, options.profile, rows, numbered, log)}
        return [listed[task] for task in wanted]
    listed = tasks(options.study, options.profile, options.rows, options.seeds, log)
    if unplanned := batch.unplanned(options.rows, listed):
        raise ValueError(f"{', '.join(unplanned)}: {batch.unplanned_note(options.profile)}")
    return listed


def run(options: argparse.Namespace) -> int:
    listed = chosen(options, print)
    if not (options.workers or options.scheduler or options.slurm):
        batch.run_tasks(listed, options.profile, pick_device(options.device), options.minutes)
        return 0
    if options.workers and options.scheduler:
        raise ValueError("--workers starts workers, a cluster at --scheduler has its own: give one of the two")
    try:
        from defectlab.batch import cluster, machines, sizes
    except ModuleNotFoundError as error:
        remedy = "python -m pip install -c constraints.txt -e '.[cluster]'"
        raise ValueError(f"workers need Dask, and {error.name} is not installed: {remedy}") from error
    elsewhere = options.scheduler or options.slurm  # there the device is looked for, not here
    device = options.device if elsewhere else pick_device(options.device)
    writable(runs.runs_dir(options.profile))
    workers = options.workers or 1
    if not elsewhere:
        measured = sizes.measured_here()
        peak = max((sizes.bound_gb(row, measured) for row in batch.with_needed(listed, options.profile)), default=0.0)
        workers = machines.fitting(workers, device, peak if options.profile == "paper" else 0.0)
    with machines.cluster(options.profile, device, workers, options.scheduler, options.slurm) as client:
        kind = device.partition(":")[0]  # a worker sees one GPU
        cluster.run_on(client, listed, options.profile, kind, options.minutes)
    return 0


def status(options: argparse.Namespace) -> int:
    for name in [options.study] if options.study else STUDIES:
        print("\n".join(batch.status_lines(name, options.profile, options.rows, options.seeds)))
    return 0


def record(options: argparse.Namespace) -> int:
    here = runs.read_records(runs.runs_dir(options.profile))
    if options.study:
        wanted = {(runs.row_identity(t.row.settings, options.profile), t.seed) for t in chosen(options)}
        here = [r for r in here if (r.row, r.seed) in wanted]
    elif options.rows or options.seeds:
        raise ValueError("--rows and --seeds need a study: python -m defectlab record STUDY --rows ...")
    print("\n".join(runs.promote(here)) or f"no finished run in {runs.runs_dir(options.profile)}")
    return 0


def report(options: argparse.Namespace) -> int:
    from defectlab.verdicts.generated import update_generated
    from defectlab.verdicts.page import write_page

    writable(runs.runs_dir(options.profile))
    runs.read_records(runs.runs_dir(options.profile))  # one that cannot be read is one error, not one of each table
    update_generated()
    print(f"wrote {write_page(options.profile)}")
    return 0


def goes_on(options: argparse.Namespace) -> bool:
    """Whether the same command continues what was interrupted: by finished runs and checkpoints."""
    return options.command in ("run", "reproduce") or any(getattr(options, o, None) for o in ("data", "train_good"))


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or file that lacks a letter shows its number
            stream.reconfigure(errors="backslashreplace")
    options = parser().parse_args(argv)
    try:
        action = {"run": run, "status": status, "record": record, "report": report}.get(options.command)
        action = action or getattr(importlib.import_module(MODULES[options.command]), options.command.replace("-", "_"))
        return action(options)
    except (DataError, WeightsError, NonFiniteLoss, RowsFailed, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        remedy = "take --device cpu, or images of a smaller --size where the command has it"
        print(f"error: {first_line(error)}: {remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        how = "; the same command goes on from what is finished and from the last checkpoint (one a minute)"
        print(f"stopped{how if goes_on(options) else ''}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
