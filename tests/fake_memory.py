"""Peak memory of the rows of paper, without a GPU and without the memory: two training steps on tensors that have a
shape and no numbers (torch's FakeTensorMode), every storage counted from its making to its end.

Where a row asks for bf16 it has it, as on a GPU of today. A row is prepared as `gpu-check` does it, on a few synthetic
images in the paper's size, on the CPU; a network that it needs of another row stands in untrained. What is left out:
CUDA itself and what cuDNN takes for its work, and rows that build on a diffusion model's features, since these would
have to be computed.

    python tests/fake_memory.py [STUDY ...]     writes results/memory.json, which `status --profile paper` shows
"""

import dataclasses
import importlib
import json
import pkgutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from defectlab import precision, runs, training
from defectlab.batch import run_row
from defectlab.batch.sizes import images_an_epoch, memory_path
from defectlab.files import write_json
from defectlab.gpu_check import shortened
from defectlab.runs import Context, first_line
from defectlab.studies import STUDIES, Row, Study, study
from defectlab.training import loop

MODULES = [importlib.import_module(f"defectlab.training.{one.name}") for one in pkgutil.iter_modules(training.__path__)]
TRAINING = [module for module in MODULES if hasattr(module, "train") and module is not loop]  # they call `train`
BLOCK = 512  # bytes: what CUDA's allocator rounds up to


class Measured(Exception):
    """Ends a row: its peak, in bytes, is known."""


class Tracked(TorchDispatchMode):
    """peak: the most bytes at once of what operations made; given: storage from before -> (its bytes, its length)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self.given: dict[Any, tuple[int, int]] = {}

    def gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in self.tensors((args, kwargs)):
            if not isinstance(tensor, FakeTensor):
                self.known[tensor.untyped_storage()] = True
                length = len(tensor) if tensor.ndim else 0
                self.given[tensor.untyped_storage()] = (tensor.untyped_storage().nbytes(), length)
        found = func(*args, **(kwargs or {}))
        for tensor in self.tensors(found):
            self.known[storage := tensor.untyped_storage()] = True
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, size)
        return found

    def tensors(self, tree: Any) -> Iterator[torch.Tensor]:
        """Those whose storage was not seen before."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage() not in self.known:
                yield leaf


def faked(batch: Any, mode: FakeTensorMode) -> Any:
    """A batch, whatever it is made of, without its numbers."""
    if isinstance(batch, torch.Tensor):
        return mode.from_tensor(batch)
    if dataclasses.is_dataclass(batch):
        fields = {one.name: faked(getattr(batch, one.name), mode) for one in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **fields)
    if isinstance(batch, list | tuple):
        return type(batch)([faked(one, mode) for one in batch])
    if isinstance(batch, dict):
        return {name: faked(one, mode) for name, one in batch.items()}
    return batch


def size_of(batch: Any) -> int:
    if dataclasses.is_dataclass(batch):
        batch = [getattr(batch, one.name) for one in dataclasses.fields(batch)]
    return sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))


def measuring(images: int) -> Callable[..., Any]:
    """What stands in for `train`: Measured, with the peak were there so many training images."""

    def train(
        parts, draw, step, count, settings, seed, context, optimizer=None, rate=None, *, clip=None, average=None, **rest
    ):
        parts.train()
        optimizer = optimizer or loop.adam(parts, settings.learning_rate)
        weights = [p for p in parts.parameters() if p.requires_grad]
        with Tracked() as drawing:
            batch = draw(torch.arange(settings.batch) % count, torch.Generator().manual_seed(0), 0)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, Tracked() as steps:
            shapes = faked(batch, mode)
            for _ in range(2):  # the second one has the optimiser's state from the start
                scalars = step(shapes)
                optimizer.zero_grad(set_to_none=True)
                scalars["loss"].backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(weights, clip)
                optimizer.step()
                del scalars
        held = sum(size for size, _ in steps.given.values()) + (size_of(average.model.state_dict()) if average else 0)
        held += sum(size * images // count for size, length in drawing.given.values() if length == count)  # the data
        raise Measured(held + max(drawing.peak, size_of(batch) + steps.peak))

    return train


def untrained(parts, *args, **options) -> loop.Trained:
    """What stands in for `train` in a row that another one needs."""
    parts.eval()
    return loop.Trained({"loss": [0.0]}, 1.0, 1.0)


@contextmanager
def in_place_of_train(stand_in: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as all_modules:
        for module in TRAINING:
            all_modules.enter_context(mock.patch.object(module, "train", stand_in))
        yield


def peak_bytes(of: Study, row: Row, images: int, scratch: Path) -> int | None:
    """Of a row of `shortened(study)` with so many training images; None for one that trains by other means."""

    def require(settings: Any, seed: int) -> runs.Record:
        with in_place_of_train(untrained):
            return run_row(of, of.row_with(settings, "paper"), seed, "paper", Context(log=lambda line: None), scratch)

    def load(other: Any) -> Any:
        return of.row_with(other, "paper").load(other, "cpu")

    context = Context(log=lambda line: None, require=require, load=load)
    data = row.load(row.settings, "cpu")
    with in_place_of_train(measuring(images)), mock.patch.object(precision, "fast_bf16", lambda device: True):
        try:
            row.run(row.settings, 0, data, context)
        except Measured as end:
            return end.args[0]
    return None


def builds_on(of: Study, row: Row, model: str) -> bool:
    """Whether a row needs one of such a model, or one that does."""
    needed = [of.row_with(settings, "paper") for settings, _ in row.needs(row.settings, 0)]
    return any(other.settings.model == model or builds_on(of, other, model) for other in needed)


def computable(of: Study) -> dict[str, Row]:
    """The rows of `shortened(study)` whose training is looked at; optional ones need images that nobody may have."""
    rows = {name: row for name, row in of.rows["paper"].items() if getattr(row.settings, "epochs", 0)}
    steps = {name: row for name, row in rows.items() if getattr(row.settings, "network", "") != "lite0"}  # frozen
    return {name: row for name, row in steps.items() if not row.optional and not builds_on(of, row, "ddpm")}


def main(names: list[str]) -> None:
    """Rows that differ in their data set alone are computed once."""
    for name in names or STUDIES:
        of, short, alike, told = study(name), shortened(study(name)), {}, {}
        with tempfile.TemporaryDirectory() as scratch:
            for row_name, row in computable(short).items():
                settings = of.rows["paper"][row_name].settings
                key = repr(dataclasses.replace(settings, dataset="")) if "dataset" in vars(settings) else repr(settings)
                if key not in alike:
                    try:
                        alike[key] = peak_bytes(short, row, images_an_epoch(settings), Path(scratch))
                    except Exception as error:  # a step whose shapes depend on numbers
                        print(f"{name} {row_name}: {type(error).__name__}: {first_line(error)}", flush=True)
                        alike[key] = None
                if alike[key] is not None:
                    gb = round(alike[key] / 2**30, 2)
                    told[row_name] = {"row": runs.row_identity(settings, "paper"), "gb": gb}
                    print(f"{name} {row_name}: {told[row_name]['gb']} GB", flush=True)
        path = memory_path()
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(path, kept | {name: told})


if __name__ == "__main__":
    main(sys.argv[1:])
