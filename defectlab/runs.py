"""Runs and records: what one run is given and gives, its key, and the files in which a result is kept.

A run is keyed by what is computed. `runs/<profile>/` holds this machine's runs (ignored by git), `results/runs/` the
recorded ones (committed). A record is `<key>.json` and `<key>.npz`; a run has its weights beside it as
`<key>.safetensors`. The JSON is written last and atomically, so a record is whole or it is not there.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import Tensor, nn

from defectlab.files import project_root, read_tensors, write_atomically, write_json, write_tensors

PROFILES = ("smoke", "quick", "paper")
RECORDED = "recorded"  # of notebooks: the committed records are read, nothing is trained
NPZ_LIMIT = 600_000  # bytes: what a committed record may weigh


class OutOfTime(RuntimeError):
    """The time budget is used up; what was trained so far lies in the checkpoint and the next run goes on from it."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message names epoch and batch."""


@dataclass(frozen=True)
class Context:
    """What one run may use and where it leaves traces: the same for every training in a row.

    device: "cpu", "cuda" or "cuda:1".
    checkpoint: file that an interrupted training continues from; None: do not write one.
    deadline: `time.monotonic()` value after which training stops at the end of an epoch with OutOfTime; None: none.
    log: where the line of an epoch goes.
    require: (settings, seed) -> record of another row of the study at the same profile, run first if it has not been
        run here: a teacher, or the network that a row looks at. `batch.run_row` gives it, and `load`.
    load: settings of another row -> its data.
    wait: for a row that another process computes; False: `files.Busy`.
    stopped: whether whoever asked for the run no longer wants it; then it ends as at the deadline.
    """

    device: str = "cpu"
    checkpoint: Path | None = None
    deadline: float | None = None
    log: Callable[[str], None] = print
    require: Callable[[Any, int], "Record"] | None = None
    load: Callable[[Any], Any] | None = None
    every_seconds: float = 60.0  # between two checkpoints
    wait: bool = True
    stopped: Callable[[], bool] | None = None

    def out_of_time(self) -> bool:
        late = self.deadline is not None and time.monotonic() > self.deadline
        return late or (self.stopped is not None and self.stopped())


class OfAnother:
    """For settings about another row, `of`: their data set and image size are that row's."""

    of: Any

    @property
    def dataset(self) -> str:
        return self.of.dataset

    @property
    def size(self) -> int:
        return self.of.size


@dataclass
class Result:
    """What a row's `run` returns.

    metrics: of the test set, in per cent; per_class: the same for each defect type; dev: the same on dev, with its
    threshold. curve: name -> a value for each epoch. predictions: arrays for the .npz. model: tensors for the
    .safetensors. costs: parameters, images/s, seconds of training ...; precision: what the network computed in.
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
    notes: dict[str, str] = field(default_factory=dict)


def first_line(error: Exception) -> str:
    """What torch says of a checkpoint that does not fit runs over pages: the first line will do."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def runs_dir(profile: str) -> Path:
    return project_root() / "runs" / check_profile(profile)


def recorded_dir() -> Path:
    return project_root() / "results" / "runs"


def check_profile(profile: str) -> str:
    if profile not in (*PROFILES, RECORDED):
        raise ValueError(f"unknown profile {profile!r}: use one of {', '.join((*PROFILES, RECORDED))}")
    return profile


# --- Keys ------------------------------------------------------------------------------------------------------------


def changed(settings: Any) -> dict[str, Any]:
    """The fields of a settings dataclass that differ from their frozen defaults. Settings inside settings (a row that
    looks at another row's network) always stand there, with model and version: these count even where all is default.
    """
    found = {}
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        if dataclasses.is_dataclass(value):
            found[one.name] = {"model": value.model, "version": value.version} | changed(value)
        elif value != one.default:
            found[one.name] = value
    return found


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


# --- Records ---------------------------------------------------------------------------------------------------------

NUMBER = int | float
FIELDS = (  # what a record holds at least; {str: X}: a dict of X, [X]: a list
    (str, "key model profile dataset data_label precision device commit date"),
    (int, "version seed threads"),
    (NUMBER, "seconds peak_memory_mb"),
    (dict, "settings changed"),
    ({str: str}, "fingerprints versions"),
    ({str: NUMBER}, "metrics dev costs"),
    ({str: {str: NUMBER}}, "per_class"),
    ({str: [NUMBER | None]}, "curve"),  # null: the value was not finite
)
REMEDY = "restore it, or move it away and run that row again"


@dataclass(frozen=True)
class Record:
    """A finished run: the JSON as a dict, and where it lies."""

    content: dict[str, Any]
    path: Path

    def __getattr__(self, name: str) -> Any:
        if name == "content":  # asked before it is there, by `copy` and `pickle`
            raise AttributeError(name)
        try:
            return self.content[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """ValueError where they are missing, damaged or those of another record."""
        path = self.path.with_suffix(".npz")
        try:
            with np.load(path, allow_pickle=False) as file:
                found = dict(file)
            if (key := str(found.pop("key", "no record"))) != self.path.stem:
                raise ValueError(f"the arrays are those of {key}")
        except Exception as error:  # numpy and zipfile raise many kinds
            raise ValueError(f"{path} cannot be read ({first_line(error)}): {REMEDY}, its .json, too") from error
        return found

    @cached_property  # a page of tables asks each record for it thousands of times
    def row(self) -> str:
        return identity(self.model, self.version, self.changed, self.profile)


def read_record(path: Path) -> Record:
    """ValueError where it cannot be read, is no record, or not that of its key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _check(content, path.stem)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable record ({error}): {REMEDY}") from error
    curve = content["curve"]
    content["curve"] = {name: [math.nan if v is None else v for v in values] for name, values in curve.items()}
    return Record(content, path)


def _check(content: Any, stem: str) -> None:
    """ValueError that says what is wrong with the content of `<stem>.json`."""
    if not isinstance(content, dict):
        raise ValueError("it holds no fields")
    for kind, names in FIELDS:
        for name in names.split():
            if name not in content:
                raise ValueError(f"it lacks {name!r}")
            if not _typed(content[name], kind):
                raise ValueError(f"its {name!r} is of another type")
    settings, different = content["settings"], content["changed"]
    if name := min(different.keys() - settings.keys(), default="") or _differs(different, settings):
        raise ValueError(f"its 'changed' and its 'settings' disagree on {name!r}")
    row = identity(content["model"], content["version"], different, content["profile"])
    told = (content[name] for name in ("model", "dataset", "profile", "seed"))
    key = make_key(*told, row, content["fingerprints"])
    if not stem == content["key"] == key:
        raise ValueError(f"it was edited or renamed: the key of what it holds is {key}")


def _typed(value: Any, kind: Any) -> bool:
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_typed(one, kind[str]) for one in value.values())
    if isinstance(kind, list):
        return isinstance(value, list) and all(_typed(one, kind[0]) for one in value)
    return isinstance(value, kind)


def _differs(settings: dict[str, Any], others: dict[str, Any]) -> str:
    """The first field in which two settings, as JSON has them, differ; "" where all that both have are equal."""
    for name in sorted(settings.keys() & others.keys()):
        one, other = settings[name], others[name]
        if isinstance(one, dict) and isinstance(other, dict):
            if inner := _differs(one, other):
                return f"{name}.{inner}"
        elif one != other:
            return name
    return ""


def check_settings(record: Record, settings: Any) -> None:
    """ValueError where the record of a row says other settings than the row has. A field that one of them lacks was
    added or removed since."""
    if name := _differs(record.settings, json.loads(json.dumps(dataclasses.asdict(settings)))):
        raise ValueError(f"{record.path} was edited (it says another {name!r} than its row has): {REMEDY}")


def read_records(folder: Path, log: Callable[[str], None] | None = None) -> list[Record]:
    """The records of a folder, none where it is not there. One that cannot be read is a ValueError; with `log` it is
    named there and left out."""
    found = []
    for path in sorted(folder.glob("[!.]*.json")):  # a hidden one is what a killed process was writing
        try:
            found.append(read_record(path))
        except ValueError as error:
            if log is None:
                raise
            log(f"left out: {error}")
    return found


def find(records: list[Record], settings: Any, profile: str) -> list[Record]:
    """The records of one row, by seed.

    Records made from other data or weights cannot stand in one mean: where there are several groups, that of the most
    seeds is taken (of the latest date, where these are equal), and a warning names what is left out.
    """
    row = row_identity(settings, profile)
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.row == row:
            check_settings(record, settings)
            groups.setdefault(_digest(record.fingerprints), []).append(record)
    ordered = sorted(groups.values(), key=lambda group: (len(group), max(r.date for r in group)))
    if len(ordered) > 1:
        others = ", ".join(record.key for group in ordered[:-1] for record in group)
        reason = f"left out, since made from other data or weights than {ordered[-1][0].key}"
        warnings.warn(f"{reason}: {others}", stacklevel=2)
    return sorted(ordered[-1], key=lambda r: r.seed) if ordered else []


def write_run(path: Path, identity: dict[str, Any], result: Result) -> Record:
    """The files of a finished run: weights, arrays, and last the JSON, `identity` and what the result says.

    A value that is NaN or infinite has no place in JSON: a metric or cost is left out, in a curve it stands as null.
    """
    content = identity | {
        "metrics": _finite(result.metrics),
        "per_class": {name: _finite(values) for name, values in result.per_class.items()},
        "dev": _finite(result.dev),
        "curve": {name: [v if math.isfinite(v) else None for v in values] for name, values in result.curve.items()},
        "costs": _finite(result.costs),
        "precision": result.precision,
    }
    if result.notes:
        content["notes"] = result.notes
    if result.model:
        weights = path.with_suffix(".safetensors")
        header = {"key": content["key"], "settings": json.dumps(content["settings"]), "model": content["model"]}
        write_tensors(weights, result.model, header | {"dev": json.dumps(content["dev"])})
        content["model_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    arrays = {"key": np.array(content["key"])} | result.predictions
    write_atomically(path.with_suffix(".npz"), lambda aside: np.savez_compressed(aside, **arrays))
    write_json(path, content)
    return read_record(path)


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def load_weights(record: Record, network: nn.Module) -> None:
    """The weights that a run left beside its record, into `network`. ValueError where they are missing or foreign."""
    path = record.path.with_suffix(".safetensors")
    if not path.exists():
        raise ValueError(f"{path} is missing beside its record: delete {record.path} and run that row again")
    try:
        tensors, header = read_tensors(path)
        if hashlib.sha256(path.read_bytes()).hexdigest() != record.model_sha256:
            raise RuntimeError(f"it is of another run, of {header.get('key')}")
        network.load_state_dict(tensors)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = f"does not fit this network ({first_line(error)})"
        raise ValueError(f"{path} {reason}: delete it and {record.path}, and run that row again") from error


def promote(records: list[Record]) -> list[str]:
    """Copy finished runs into `results/runs`; -> a line for each. Smoke runs and too large ones are a ValueError before
    anything is copied."""
    lines = []
    for record in records:
        if record.profile == "smoke":
            raise ValueError(f"{record.key} is a smoke run on synthetic data: only quick and paper runs are recorded")
        arrays = record.path.with_suffix(".npz")
        if arrays.exists() and (size := arrays.stat().st_size) > NPZ_LIMIT:
            most = f"more than the {NPZ_LIMIT} a record may have"
            raise ValueError(f"{arrays} has {size} bytes, {most}: record other rows with --rows; nothing was copied")
    for record in records:
        if (recorded_dir() / record.path.name).exists():
            lines.append(f"already recorded: {record.key}")
            continue
        record.arrays  # noqa: B018 - an error here, rather than in what is recorded
        for path in (record.path.with_suffix(".npz"), record.path):  # the JSON last: with it the record is there
            write_atomically(recorded_dir() / path.name, partial(shutil.copyfile, path))
        doubt = "" if record.dirty is False else "  (made with uncommitted changes, or outside a checkout)"
        lines.append(f"recorded: {record.key}{doubt}")
    return lines
