"""Trained models as files: tensors, and in the header what they are, as a run writes them."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from defectlab.files import DataError, WeightsError, read_tensors, write_tensors
from defectlab.runs import first_line

SIZES = 32, 4096  # the least and the most px per side


class Saved(NamedTuple):
    """What a model file holds."""

    path: Path
    settings: Any
    threshold: float  # from dev: the score from which on a box is kept or an image is anomalous
    header: dict[str, Any]  # all of it
    tensors: dict[str, Tensor]

    def build(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The network that `make()` builds from the settings, with the file's tensors. DataError where the settings
        call for others: seen on the meta device, before memory is asked for."""
        try:
            with torch.device("meta"):
                wanted = {name: value.shape for name, value in make().state_dict().items()}
            found = {name: value.shape for name, value in self.tensors.items()}
            if wrong := sorted(name for name in wanted.keys() | found if wanted.get(name) != found.get(name)):
                raise ValueError(f"{wrong[0]} and {len(wrong) - 1} more")
            network = make()
            network.load_state_dict(self.tensors)
        except (WeightsError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = f"does not hold the tensors that its settings call for ({first_line(error)})"
            raise DataError(f"{self.path} {reason}: train it again") from error
        return network


def write(path: Path, settings: Any, dev: dict[str, float], tensors: Mapping[str, Tensor], **header: Any) -> None:
    """`dev`: metrics on dev with the "threshold". `header`: strings, or what JSON can hold."""
    header |= {"settings": asdict(settings), "dev": dev}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in header.items()}
    write_tensors(path, tensors, texts | {"model": settings.model})


def check_size(size: int, least: int) -> None:
    """ValueError for a --size that no network here takes, or that no model file may have."""
    if size % 32 or not least <= size <= SIZES[1]:
        raise ValueError(f"--size must be a multiple of 32 from {least} to {SIZES[1]}, got {size}")


def read(path: Path, kinds: Mapping[str, Callable[..., Any]], remedy: str) -> Saved:
    """A model of one of these kinds (name -> class of its settings), of `write` or of a run. DataError, ending in the
    remedy, where the file is none."""
    try:
        tensors, texts = read_tensors(path)
        kind = kinds[texts["model"]]
        header = {name: json.loads(text) if text[:1] in "[{" else text for name, text in texts.items()}
        told = {name: tuple(v) if isinstance(v, list) else v for name, v in header["settings"].items()}
        told.pop("mixup", None)  # mixup: a setting of older model files, ignored
        settings, threshold = kind(**told), header["dev"]["threshold"]
        _check(settings, threshold, header.get("class_names", []))
        for name, value in tensors.items():
            if not value.numel() or not value.isfinite().all():
                raise ValueError(f"its tensor {name} is empty or not finite")
        return Saved(path, settings, float(threshold), header, tensors)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path} is no model that this program saved ({first_line(error)}): {remedy}") from error


def _check(settings: Any, threshold: Any, class_names: Any) -> None:
    """ValueError for a value that this program does not write."""
    for one in fields(settings):
        if not _like(getattr(settings, one.name), one.default):
            raise ValueError(f"its setting {one.name} is {getattr(settings, one.name)!r}")
    if not SIZES[0] <= settings.size <= SIZES[1]:
        raise ValueError(f"its setting size is {settings.size}")
    if not _like(threshold, 0.0):
        raise ValueError(f"its threshold is {threshold!r}")
    if not (isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)):
        raise ValueError("its class_names are no list of texts")


def _like(value: Any, default: Any) -> bool:
    """Whether a setting is what its default is: a number, a text, a tuple of such."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_like(one, default[0]) for one in value)
    if isinstance(default, float):
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is type(default)
