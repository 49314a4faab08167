"""Trained models as files: tensors, and in the header what they are, as a run writes them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor, nn

from defectlab.files import DataError, read_tensors, write_tensors
from defectlab.runs import first_line


class Saved(NamedTuple):
    """What a model file holds."""

    path: Path
    settings: Any
    threshold: float  # from dev: the score from which on a box is kept or an image is anomalous
    header: dict[str, Any]  # all of it
    tensors: dict[str, Tensor]

    def load_into(self, network: nn.Module) -> None:
        try:
            network.load_state_dict(self.tensors)
        except RuntimeError as error:
            reason = f"does not hold the tensors that its settings call for ({first_line(error)})"
            raise DataError(f"{self.path} {reason}: train it again") from error


def write(path: Path, settings: Any, dev: dict[str, float], tensors: Mapping[str, Tensor], **header: Any) -> None:
    """`dev`: metrics on dev with the "threshold". `header`: strings, or what JSON can hold."""
    header |= {"settings": asdict(settings), "dev": dev}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in header.items()}
    write_tensors(path, tensors, texts | {"model": settings.model})


def read(path: Path, kinds: Mapping[str, Callable[..., Any]], remedy: str) -> Saved:
    """A model of one of these kinds (name -> class of its settings), of `write` or of a run. DataError, ending in the
    remedy, where the file is none."""
    try:
        tensors, texts = read_tensors(path)
        kind = kinds[texts["model"]]
        header = {name: json.loads(text) if text[:1] in "[{" else text for name, text in texts.items()}
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in header["settings"].items()}
        fields.pop("mixup", None)  # mixup: a setting of older model files, ignored
        return Saved(path, kind(**fields), float(header["dev"]["threshold"]), header, tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no model that this program saved ({first_line(error)}): {remedy}") from error
