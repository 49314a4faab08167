"""A study for the tests of the cluster, put in place of `defectlab/studies/bsdrd.py` in a copy of the package: a row
that trains for seconds, one that needs it, rows that sleep, fail or kill their process. They say so in `seen.txt`."""

import hashlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from defectlab.files import DataError, data_dir, project_root
from defectlab.runs import PROFILES, Context, Result, load_weights
from defectlab.studies.study import Row, Study, needs_of
from defectlab.training.loop import adam, train


@dataclass(frozen=True)
class Toy:
    model: ClassVar[str] = "toy"
    version: ClassVar[int] = 1

    kind: str = "learns"
    epochs: int = 40
    batch: int = 4
    dataset: str = "toys"


@dataclass(frozen=True)
class Looks:
    model: ClassVar[str] = "looks"
    version: ClassVar[int] = 1

    of: Any
    kind: str = "looks"
    dataset: str = "toys"


def leave(settings: Any, seed: int, text: str) -> None:
    with (project_root() / "seen.txt").open("a") as file:
        file.write(f"{settings.kind} {seed} {os.getpid()} {time.time()} {text}\n")


def seen(root: Path) -> list[list[str]]:
    """Kind, seed, process, time and text of each line."""
    path = root / "seen.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def result(value: float, weights: dict | None = None) -> Result:
    return Result({"value": value}, {}, {}, {}, {"value": np.array(value)}, weights or {}, {}, "fp32")


def learn(settings: Toy, seed: int, data: Any, context: Context) -> Result:
    """Epochs of 0.1 s, with a checkpoint after each."""
    torch.manual_seed(seed)
    network, images = torch.nn.Linear(3, 1), torch.arange(24.0).reshape(8, 3) / 24
    context = Context(**vars(context) | {"every_seconds": 0.0})

    def draw(indices: torch.Tensor, generator: torch.Generator, epoch: int) -> torch.Tensor:
        leave(settings, seed, f"epoch-{epoch}")
        time.sleep(0.05)  # two batches an epoch
        return images[indices] + torch.randn(len(indices), 3, generator=generator)

    def step(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (network(batch) - batch.sum(1, keepdim=True)).square().mean()}

    trained = train(network, draw, step, 8, settings, seed, context, adam(network, 0.01), lambda *_: 0.01)
    leave(settings, seed, "end")
    return result(trained.curve["loss"][-1], dict(network.state_dict()))


def look(settings: Looks, seed: int, data: Any, context: Context) -> Result:
    network = torch.nn.Linear(3, 1)
    load_weights(context.require(settings.of, seed), network)
    leave(settings, seed, "end")
    return result(network.weight.sum().item())


def sleep(settings: Toy, seed: int, data: Any, context: Context) -> Result:
    leave(settings, seed, "begin")
    time.sleep(settings.epochs / 10)
    leave(settings, seed, "end")
    return result(seed)


def fail(settings: Toy, seed: int, data: Any, context: Context) -> Result:
    leave(settings, seed, "begin")
    raise ValueError("boxes are not finite\nand pages more")


def die(settings: Toy, seed: int, data: Any, context: Context) -> Result:
    leave(settings, seed, "begin")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def prints(settings: Any) -> dict[str, str]:
    path = data_dir() / "toys.txt"
    if not path.exists():
        raise DataError(f"{path} is missing")
    return {"data": hashlib.sha256(path.read_bytes()).hexdigest()[:8]}


def row(settings: Any, run: Any, seeds: int, **marks: Any) -> Row:
    return Row(settings, run, lambda *_: SimpleNamespace(label="toys"), prints, seeds, **marks)


LEARNS = Toy()
ROWS = {
    "looks": row(Looks(LEARNS), look, 2, primary=True, needs=needs_of),
    "learns": row(LEARNS, learn, 2),
    "sleeps": row(Toy("sleeps", 5), sleep, 4),
    "long": row(Toy("long", 100), learn, 0),
    "fails": row(Toy("fails"), fail, 0),
    "looks_at_failed": row(Looks(Toy("fails")), look, 0, needs=needs_of),
    "dies": row(Toy("dies"), die, 0),
}
STUDY = Study("Toys", dict.fromkeys(PROFILES, ROWS), {}, (("value",),))
