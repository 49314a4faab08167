"""Memory and time that rows of the paper profile need on a GPU: as `gpu-check` measured here, else as computed."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from defectlab.files import project_root
from defectlab.runs import row_identity, runs_dir
from defectlab.studies import STUDIES, Row, study

OTHERS_GB = 14.0  # a bound of the rows whose memory is not computed: no training, or shapes that depend on numbers
OF_A_NETWORK = ("family", "scale", "teacher", "encoder", "network", "size", "windows")  # they change what a step takes
CUDA_GB = 1.0  # of each process: CUDA itself and what cuDNN takes for its work


def kind_of(settings: Any) -> str:
    """Rows of one kind are trained alike: the same model, and the same model of the row `of` and of the generator."""
    inner = ((word, getattr(settings, name, None)) for word, name in (("of", "of"), ("with", "generator")))
    return settings.model + "".join(f" {word} {one.model}" for word, one in inner if dataclasses.is_dataclass(one))


def check_path() -> Path:
    return runs_dir("paper").parent / "gpu-check.json"


def measured_here() -> dict[str, dict[str, Any]]:
    """Kind -> what the last `gpu-check` measured in the papers' sizes on such a GPU; {} before the first."""
    path = check_path()
    if not path.exists():
        return {}
    checked = json.loads(path.read_text(encoding="utf-8"))
    other = torch.cuda.is_available() and checked["machine"]["device"] != torch.cuda.get_device_name()
    return {} if other else checked["kinds"]


def memory_path() -> Path:
    """What `tests/fake_memory.py` computed from the shapes of a step's tensors, in the paper's size and batch."""
    return project_root() / "results" / "memory.json"


def computed_gb() -> dict[str, float]:
    """Identity of a row of paper -> peak of its tensors."""
    path = memory_path()
    studies = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {one["row"]: one["gb"] for rows in studies.values() for one in rows.values()}


def measured_of(row: Row, measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What was measured of a network like the row's: of its kind, family, scale and backbone; {} where nothing was."""
    found = measured.get(kind_of(row.settings), {})
    name, _, row_name = found.get("row", "").partition(" ")
    seen = study(name).rows["paper"].get(row_name) if name in STUDIES else None
    same = seen and all(getattr(seen.settings, of, "") == getattr(row.settings, of, "") for of in OF_A_NETWORK)
    return found if same else {}


def peak_gb(row: Row, measured: dict[str, dict[str, Any]]) -> float:
    """The larger of what was computed and what was measured on few images; NaN where neither was."""
    known = (measured_of(row, measured).get("gb"), computed_gb().get(row_identity(row.settings, "paper")))
    return max((gb for gb in known if gb), default=math.nan) + CUDA_GB


def bound_gb(row: Row, measured: dict[str, dict[str, Any]]) -> float:
    """What a row is not above."""
    gb = peak_gb(row, measured)
    return OTHERS_GB + CUDA_GB if math.isnan(gb) else gb


def images_an_epoch(settings: Any) -> int:
    """What a row draws, or the training images that its set's card counts; 0 where there is no card."""
    if draws := getattr(settings, "draws", 0):
        return draws
    name = settings.dataset.split("/")[-1].removesuffix("_grouped").removesuffix("_pair").removesuffix("_index")
    path = project_root() / "results" / "data" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["parts"]["train"]["images"] if path.exists() else 0


def hours(row: Row, measured: dict[str, dict[str, Any]]) -> float:
    """Of one seed of a row on the machine that was measured; NaN where it cannot be told, as with a generator that is
    trained beside. A row that trains nothing counts as nothing."""
    epochs = getattr(row.settings, "epochs", 0)
    if getattr(row.settings, "generator", None) or (not epochs and getattr(row.settings, "steps", 0)):
        return math.nan
    if not epochs:
        return 0.0
    images, speed = images_an_epoch(row.settings), measured_of(row, measured).get("images_per_second")
    return epochs * images / speed / 3600 if images and speed else math.nan
