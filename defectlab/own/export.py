"""A trained detector as an ONNX file, for programs without torch; checked against torch as soon as it is written."""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from defectlab.files import write_atomically
from defectlab.networks.yolo.blocks import fused
from defectlab.networks.yolo.decode import best, decode
from defectlab.networks.yolo.model import Detector
from defectlab.networks.yolo.one_to_one import TwoHeads

PACKAGES = ("onnx", "onnxruntime")
TRACED, CHECKED = 2, (1, 3)  # images: traced with one batch, compared at others, since the batch is to be free
OUTPUTS = ("boxes", "scores")
NEAR = 1e-6  # scores as near as this may change places


class Decoded(nn.Module):
    """A fused detector and its decoding in one: images (B, 3, S, S) -> boxes (B, A, 4), scores (B, A, classes)."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = fused(detector).cpu().float()
        self.to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return decode(self.detector, self.detector(images))


class Answered(Decoded):
    """The same of a detector that needs no suppression, to the end: -> what `decode.best` gives."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return best(*super().forward(images))


def check_installed() -> None:
    """ValueError where a package that the export needs is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the ONNX export needs {', '.join(missing)}: python -m pip install {' '.join(missing)}")


def to_onnx(detector: Detector, path: Path, size: int) -> dict[str, float]:
    """Write `detector`, fused, to `path`, run the file on random images, print and return the largest absolute
    difference between onnxruntime and torch over all "boxes" (pixels of the input) and all "scores".

    Input "images": float32 (B, 3, size, size) in 0..1, letterboxed as in training; B is free. Outputs: "boxes" float32
    (B, A, 4), x1 y1 x2 y2 in pixels of the input, not clipped; "scores" float32 (B, A, classes) in 0..1.
    Non-maximum suppression within each class is left to the caller (as in `decode.select`). A detector with two heads
    needs none: outputs "boxes" (B, k, 4), "scores" (B, k) and "labels" (B, k) int64 of its k = 300 best, and boxes of
    nearly equal scores are not compared. The weights are in the file. ValueError: a size that is not a multiple of 32,
    or a package that is missing.
    """
    check_installed()
    import onnxruntime

    ends = isinstance(detector, TwoHeads)
    model = (Answered if ends else Decoded)(detector).eval()
    outputs = (*OUTPUTS, "labels") if ends else OUTPUTS
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(count, 3, size, size, generator=generator) for count in CHECKED]
    with torch.no_grad():
        wanted = [model(batch) for batch in batches]

    def write(aside: Path) -> None:
        with warnings.catch_warnings():
            # The exporter that traces is called deprecated, but it takes one second where the one that goes through
            # torch.export takes ten; the comparison below would show if tracing had frozen what it must not.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            names = {"input_names": ["images"], "output_names": list(outputs)}
            free = {name: {0: "batch"} for name in ("images", *outputs)}
            traced = (torch.zeros(TRACED, 3, size, size),)
            torch.onnx.export(model, traced, str(aside), dynamic_axes=free, dynamo=False, **names)

    write_atomically(path, write)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = [session.run(list(OUTPUTS), {"images": batch.numpy()}) for batch in batches]
    differs = dict.fromkeys(OUTPUTS, 0.0)
    for one, other in zip(found, wanted, strict=True):
        compared = clear(other[1]).numpy() if ends else slice(None)
        for name, here, there in zip(OUTPUTS, one, other, strict=False):
            differs[name] = max(differs[name], float(np.abs(here - there.numpy())[compared].max(initial=0)))
    boxes, scores = (f"{differs[name]:.1e}" for name in OUTPUTS)
    print(f"saved {path}: differs from torch by at most {boxes} px in boxes and {scores} in scores")
    return differs


def clear(scores: Tensor) -> Tensor:
    """Where descending scores (B, k) are further than `NEAR` from both neighbours: (B, k) bool."""
    apart = torch.nn.functional.pad(-scores.diff(dim=1) > NEAR, (1, 1), value=True)
    return apart[:, 1:] & apart[:, :-1]
