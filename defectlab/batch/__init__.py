"""Running rows: one row and seed, and batches of them: which, in which order, within how many minutes."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from defectlab import runs
from defectlab.batch.sizes import CUDA_GB, OTHERS_GB, hours, measured_here, peak_gb
from defectlab.files import Busy, disk_full, locked, writable
from defectlab.provenance import peak_memory_mb, pick_device, provenance, reset_peak_memory
from defectlab.runs import Context, OutOfTime, Record, first_line
from defectlab.studies import STUDIES, Row, Study, study
from defectlab.verdicts.measured import COSTS, value_of, written
from defectlab.verdicts.tables import record_store


class RowsFailed(RuntimeError):
    """Rows of a batch that could not be computed; the others ran."""


# --- One row ---------------------------------------------------------------------------------------------------------


def run_row(of: Study, row: Row, seed: int, profile: str, context: Context, folder: Path | None = None) -> Record:
    """Compute one row and seed unless `runs/<profile>/` (or `folder`) has it already, and keep the result there.

    An interrupted training leaves a checkpoint and is continued by the next call. `seconds` of the record are those
    of this call and, of earlier ones, of their training; other rows have records of their own.
    """
    settings, given = row.settings, folder
    folder = given or runs.runs_dir(profile)
    key, prints = key_and_prints(row, seed, profile)
    path, checkpoint = folder / f"{key}.json", folder / "checkpoints" / f"{key}.safetensors"
    made = provenance(context.device)
    elsewhere = 0.0  # seconds spent on other rows

    def require(other: Any, its_seed: int) -> Record:
        nonlocal elsewhere
        if (other, its_seed) not in row.needs(settings, seed):
            raise LookupError(f"{key} asks for a row that its study does not say it needs: {other}, seed {its_seed}")
        began = time.monotonic()
        found = run_row(of, of.row_with(other, profile), its_seed, profile, context, given)
        elsewhere += time.monotonic() - began
        reset_peak_memory(context.device)
        return found

    def load(other: Any) -> Any:
        return of.row_with(other, profile).load(other, context.device)

    def finished() -> Record | None:
        if not path.exists():
            return None
        record = runs.read_record(path)
        runs.check_settings(record, settings)
        return record

    if record := finished():
        return record
    with locked(folder / "locks" / key, context.log, context.wait, context.out_of_time):
        if record := finished():  # by another process, meanwhile
            return record
        reset_peak_memory(context.device)
        earlier, started = seconds_before(checkpoint), time.monotonic()
        data = row.load(settings, context.device)
        own = replace(context, checkpoint=checkpoint, require=require, load=load)
        result = row.run(settings, seed, data, own)
        described = {
            "key": key,
            "model": settings.model,
            "version": settings.version,
            "profile": profile,
            "seed": seed,
            "dataset": settings.dataset,
            "data_label": data.label,
            "settings": dataclasses.asdict(settings),
            "changed": runs.changed(settings),
            "seconds": round(earlier + time.monotonic() - started - elsewhere, 1),
            "peak_memory_mb": peak_memory_mb(context.device),
            "fingerprints": prints,
        }
        record = runs.write_run(path, described | made, result)
        checkpoint.unlink(missing_ok=True)
    return record


def key_and_prints(row: Row, seed: int, profile: str) -> tuple[str, dict[str, str]]:
    """The key of a row and seed on this machine, and the fingerprints of what it is computed from. Errors of
    `row.fingerprints`."""
    settings, prints = row.settings, row.fingerprints(row.settings)
    identity = runs.row_identity(settings, profile)
    return runs.make_key(settings.model, settings.dataset, profile, seed, identity, prints), prints


def seconds_before(checkpoint: Path) -> float:
    """Seconds of training in earlier calls, from the checkpoint that they left; 0 without one."""
    try:
        with safe_open(checkpoint, framework="pt") as file:
            return float(json.loads(file.metadata()["header"])["seconds"])
    except (OSError, SafetensorError, LookupError, TypeError, ValueError):  # none, or none that can be continued
        return 0.0


# --- Batches ---------------------------------------------------------------------------------------------------------

ALL = "all"  # in place of a study's name: every study


@dataclass(frozen=True)
class Task:
    """One row and seed of a study, and whether it is recorded (committed) or has been run here."""

    study: str
    name: str  # of the row
    seed: int
    row: Row
    recorded: bool
    here: bool


def tasks(
    name: str,
    profile: str,
    rows: list[str] | None = None,
    seeds: list[int] | None = None,
    log: Callable[[str], None] | None = None,
) -> list[Task]:
    """Rows x seeds in the order in which to run them: the first seed of every row, then the second, and so on, so
    that a batch that is cut short has touched the headline rows first. `seeds` None: as the study plans them.
    `name` "all": of every study, the headline rows of all before any other, a row that two studies share once.
    Its optional rows (further data sets and weights) that cannot be run here are listed only where named.
    ValueError for a record that cannot be read; with `log` it is named there, and the tasks are listed without it."""
    if name == ALL and rows:
        raise ValueError(f"rows belong to a study: name it in place of {ALL!r} to choose among its rows")
    if seeds is not None and (len(set(seeds)) < len(seeds) or min(seeds, default=0) < 0):
        raise ValueError(f"seeds must be different and not negative, got {seeds}")
    recorded, here = (runs.read_records(folder, log) for folder in (runs.recorded_dir(), runs.runs_dir(profile)))
    listed = []
    names = STUDIES if name == ALL else [name]
    chosen = [(of, *item) for of in names for item in study(of).pick(profile, rows).items()]
    for position, (of, row_name, row) in enumerate(chosen):
        identity = runs.row_identity(row.settings, profile)
        prints = row.fingerprints_here()
        if prints is None and not rows and row.optional:
            continue
        mine = {r.seed for r in here if r.row == identity and prints in (None, r.fingerprints)}
        kept = {r.seed for r in recorded if r.row == identity}
        for turn, seed in enumerate(range(row.seeds) if seeds is None else seeds):
            task = Task(of, row_name, seed, row, seed in kept, seed in mine)
            run = (identity, json.dumps(prints, sort_keys=True), seed) if name == ALL else (row_name, seed)
            listed.append(((not row.primary, turn, position), run, task))
    first: dict[tuple, Task] = {}
    for _, run, task in sorted(listed, key=lambda item: item[0]):
        first.setdefault(run, task)
    return list(first.values())


def with_needed(listed: list[Task], profile: str) -> list[Row]:
    """The rows of tasks, and those that they need."""
    found: dict[str, Row] = {}

    def add(of: Study, row: Row, seed: int) -> None:
        identity = runs.row_identity(row.settings, profile)
        if identity not in found:
            found[identity] = row
            for settings, its_seed in row.needs(row.settings, seed):
                add(of, of.row_with(settings, profile), its_seed)

    for task in listed:
        add(study(task.study), task.row, task.seed)
    return list(found.values())


def run_tasks(
    listed: list[Task], profile: str, device: str, minutes: float | None, log: Callable[[str], None] = print
) -> list[Record]:
    """Run what `runs/<profile>/` lacks, one after the other; stops cleanly when the minutes are used up.

    -> the finished records of the list, those from earlier calls included. A row that another process computes comes
    last. A row that fails, for whatever reason, does not keep the others from running: RowsFailed names all of them at
    the end. Only a full disk stops all (the error has the errno of it).
    """
    writable(runs.runs_dir(profile))
    started = time.monotonic()
    deadline = None if minutes is None else started + 60 * minutes
    context = Context(device=device, deadline=deadline, log=log)
    finished, failed = [], []
    left, busy = list(enumerate(listed, 1)), 0  # busy: how many in a row other processes were at
    while left:
        if context.out_of_time():
            log(f"{minutes:g} minutes are used up: {len(left)} of {len(listed)} left; run again to go on")
            break
        number, task = left.pop(0)
        log(f"[{number}/{len(listed)}] {task.study} {task.name} seed {task.seed} ({profile}, {device})")
        try:
            record = run_row(study(task.study), task.row, task.seed, profile, replace(context, wait=busy >= len(left)))
        except Busy as other:
            log(f"  {other}: left for later")
            left.append((number, task))
            busy += 1
            continue
        except OutOfTime as stop:
            log(f"  {stop}")
            break
        except Exception as error:
            if disk_full(error):  # for the other rows, too
                raise
            kind = type(error).__name__
            failed.append(f"{task.study} {task.name} seed {task.seed} ({kind}): {first_line(error)}")
            log(f"  failed ({kind}): {first_line(error)}")
        else:
            finished.append(record)
            so_far = time.monotonic() - started
            log(f"  {headline(record, task.study)}  ({record.seconds:.0f} s; {so_far:.0f} s so far)")
        busy = 0
    if failed:
        raise RowsFailed("; ".join(failed))
    return finished


def headline(record: Record, name: str) -> str:
    """The first group of the study's metrics, then of its costs, that the record has any of, on a line: a stage or a
    row of costs has not the headline's."""
    groups = sorted(study(name).metrics, key=lambda group: group[0] in COSTS)
    for group in groups:
        values = {metric: value_of(record, metric) for metric in group}
        shown = [f"{metric} {written(v, metric)}" for metric, v in values.items() if not math.isnan(v)]
        if shown:
            return ", ".join(shown)
    return "done"


def trained(
    name: str,
    profile: str,
    rows: list[str] | None = None,
    seeds: list[int] | None = None,
    device: str = "auto",
    minutes: float | None = None,
) -> dict[str, list[Record]]:
    """What a notebook's training cell calls: row -> records. `rows` None: all.

    In the profile `recorded` nothing is trained: the committed records, of each row the best profile that it has. Else
    what is missing on this machine is run first, by `tasks` and `run_tasks`.
    """
    of = study(name)
    chosen = of.pick(profile, rows)
    if profile == runs.RECORDED:
        store = record_store(profile)
        found = {row: store.recorded_of(of, row) for row in chosen}
        for row, (records, at) in found.items():
            seeds_of = ", ".join(str(record.seed) for record in records)
            print(f"{row}: " + (f"recorded in {at}, seed {seeds_of}" if records else "not recorded yet"))
        return {row: records for row, (records, _) in found.items()}
    finished = run_tasks(tasks(name, profile, rows, seeds, print), profile, pick_device(device), minutes)
    print(f"trained here ({profile}): {len({record.key for record in finished})} runs, all finished")
    return {row: runs.find(finished, one.settings, profile) for row, one in chosen.items()}


def sizes_of_rows(name: str, profile: str, rows: Collection[str]) -> tuple[str, dict[str, str]]:
    """Where GB and hours of the rows of paper are from, and these; none of other profiles."""
    if profile != "paper":
        return "", {}
    measured, of = measured_here(), study(name).rows[profile]
    told = {row: (peak_gb(of[row], measured), hours(of[row], measured)) for row in rows}
    bound = f"≤{OTHERS_GB + CUDA_GB:.0f}"
    texts = {
        row: f"  {bound if math.isnan(gb) else f'{gb:.0f}':>4}  {'?' if math.isnan(time) else f'{time:.1f}'}"
        for row, (gb, time) in told.items()
    }
    return "gpu-check here" if measured else "computed; for hours: gpu-check", texts


def unplanned(rows: list[str] | None, listed: list[Task]) -> list[str]:
    """The named rows that have no task: the profile plans no seed of them."""
    return [row for row in rows or [] if row not in {task.name for task in listed}]


def unplanned_note(profile: str) -> str:
    return f"not part of {profile}: name its seeds to run it, as in --seeds 0"


def status_lines(name: str, profile: str, rows: list[str] | None = None, seeds: list[int] | None = None) -> list[str]:
    """A line for each row: seeds recorded, run here, missing; in the order in which to run them. Rows that the profile
    plans no seed of are listed where they are named."""
    listed = tasks(name, profile, rows, seeds)
    by_row: dict[str, list[str]] = {}
    for task in listed:
        columns = by_row.setdefault(task.name, [[], [], []])
        for column, stands in zip(columns, (task.recorded, task.here, not (task.recorded or task.here)), strict=True):
            column += [str(task.seed)] if stands else []
    measured, sizes = sizes_of_rows(name, profile, by_row)
    texts = {"row": "recorded  here      missing" + (f"    GB  hours a seed ({measured})" if sizes else "")}
    for row, columns in by_row.items():
        recorded, here, missing = (",".join(column) or "-" for column in columns)
        texts[row] = f"{recorded:8}  {here:8}  {missing:{9 if sizes else 0}}{sizes.get(row, '')}"
    texts |= {row: unplanned_note(profile) for row in unplanned(rows, listed)}
    width = max(map(len, texts))
    start = f"{name} ({profile}): "
    lines = [f"{'':{len(start)}}{row:{width}}  {text}" for row, text in texts.items()]
    return [start + lines[0][len(start) :], *lines[1:]]
