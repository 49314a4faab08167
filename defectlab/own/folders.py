"""Where `score` and `detect` write: a folder of its own, which never becomes input; and what is there already."""

from pathlib import Path
from typing import Any

from defectlab import runs
from defectlab.data.images import MARKER
from defectlab.files import DataError, writable
from defectlab.own.saved import Saved


def prepare(out: Path, *inputs: Path | None) -> None:
    """Make the folder of the results, before any training. ValueError where it holds a folder of images, DataError
    where nothing can be written to it."""
    for folder in filter(None, inputs):
        if folder.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--out {out} must be a folder of its own: it holds the images of {folder}")
    writable(out, "give another --out")
    (out / MARKER).write_text("Results of defectlab: it looks for no images here.\n", encoding="utf-8")


def key_and_checkpoint(path: Path, settings: Any, seed: int, data: Any) -> tuple[str, Path]:
    """Of a model that is to be trained into `path`: what it is, and where an interrupted training is kept."""
    identity = runs.row_identity(settings, "own")
    key = runs.make_key(settings.model, data.name, "own", seed, identity, {"data": data.fingerprint})
    return key, path.with_name(f"checkpoint-{key.rsplit('-', 1)[-1]}.safetensors")


def check_same(model: Saved, key: str) -> None:
    """Say that the model is there already; DataError where it is another."""
    if model.header.get("key") != key:
        raise DataError(f"{model.path} was trained with other images or settings: give another --out, or delete it")
    print(f"already trained: {model.path}")
