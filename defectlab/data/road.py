"""Potholes in colour and in depth: 67 frames of three drives, as tensors on one device.

Fan et al., "Pothole Detection Based on Disparity Transformation and Road Surface Modeling", IEEE TIP 29, 2020. Frames
of one drive (a session) show the same potholes, so the split is by session: one to train on, the others to test. `dev`
is the last tenth of the training session, one block of frames. Twelve frames of session 2 are not used, as the authors
do not evaluate on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from defectlab.data.images import decode, in_threads, opened
from defectlab.data.splits import PARTS, Plan, identity, locate, set_and_root
from defectlab.files import DataError

ROAD = "road_depth"
FRAMES = {1: range(1, 23), 2: range(1, 41), 3: range(1, 6)}  # of each session
FRAMES = {session: tuple(f"{number:02}" for number in numbers) for session, numbers in FRAMES.items()}
LEFT_OUT = {2: ("06", "07", "08", "13", "14", "15", "21", "22", "23", "37", "38", "39")}  # the authors' note
MULTIPLE = 32  # px: frames are padded to the next multiple, at their right and lower edge


@dataclass(frozen=True)
class RoadSplit:
    """N frames of one size, edges repeated where a frame is smaller."""

    images: Tensor  # (N, 3, H, W) uint8
    depth: Tensor  # (N, 1, H, W) int16, transformed disparity, 0 to 1023: about flat on a flat road, lower in a hole
    masks: Tensor  # (N, H, W) uint8, 1 = pothole
    names: tuple[str, ...]  # dataset<session>/<frame>

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class RoadData:
    name: str  # as given to load_road
    label: str  # as printed in tables
    session: int  # trained on
    train: RoadSplit
    dev: RoadSplit
    test: RoadSplit
    fingerprint: str


def _plan(name: str, session: int, root: Path | None) -> Plan:
    own_name, root = set_and_root(name, root)
    if own_name != ROAD or session not in FRAMES:
        raise DataError(f"there is no set {name!r} with a session {session!r}: choose {ROAD} and 1, 2 or 3")
    plan = locate(ROAD, "potholes with depth", "road_depth.py --archive FILE", root)
    frames = {
        number: [f"dataset{number}/{frame}" for frame in frames if frame not in LEFT_OUT.get(number, ())]
        for number, frames in FRAMES.items()
    }
    listed = [name for names in frames.values() for name in names]
    held = set(plan.held(listed, {path.replace("/rgb", "")[:-4] for path in plan.manifest.files if "/rgb/" in path}))
    train = [name for name in frames[session] if name in held]
    if len(train) < 2:
        raise DataError(f"{plan.folder} has {len(train)} frames of session {session}, 2 are needed: choose another")
    dev = train[-max(1, round(len(train) / 10)) :]
    test = [name for name in listed if name in held and name not in frames[session]]
    parts = dict(zip(PARTS, (train[: -len(dev)], dev, test), strict=True))
    return replace(plan, parts=parts, fingerprint=identity(plan.manifest.fingerprint, parts.values()))


def road_fingerprint(name: str, session: int, root: Path | None = None) -> str:
    """sha256 over the content of the set and the three lists of frames; no image is read."""
    return _plan(name, session, root).fingerprint


def load_road(name: str, session: int, device="cpu", root: Path | None = None) -> RoadData:
    """Read the frames, whole, as tensors on `device`.

    `name`: "road_depth", or "sample/road_depth". `session`: 1, 2 or 3, the one to train on. `root`: where data sets
    lie, by default `data_dir()`. Raises DataError naming the file and the remedy.
    """
    plan = _plan(name, session, root)
    read = {
        part: in_threads(partial(_read_frame, folder=plan.folder, remedy=plan.remedy), names)
        for part, names in plan.parts.items()
    }
    frames = [frame for part in read.values() for frame in part]
    size = [-(-max(frame[2].shape[axis] for frame in frames) // MULTIPLE) * MULTIPLE for axis in (0, 1)]
    parts = {}
    for part, names in plan.parts.items():
        arrays = zip(*([_padded(array, size) for array in frame] for frame in read[part]), strict=True)
        images, depth, masks = (torch.from_numpy(np.stack(array)).to(device) for array in arrays)
        parts[part] = RoadSplit(images, depth, masks, tuple(names))
    return RoadData(name, plan.label, session, **parts, fingerprint=plan.fingerprint)


def _read_frame(name: str, folder: Path, remedy: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(3, H, W) uint8, (1, H, W) int16, (H, W) uint8."""
    session, frame = name.split("/")
    image = np.asarray(decode(folder / session / "rgb" / f"{frame}.jpg", remedy).convert("RGB"))
    path = folder / session / "disp" / f"{frame}.png"
    with opened(path, remedy) as file:  # 16 bits, which `decode` refuses
        depth = np.asarray(file, np.int32)
    mask = np.asarray(decode(folder / session / "label" / f"{frame}.png", remedy).convert("L")) > 127
    if not image.shape[:2] == depth.shape == mask.shape or depth.max() > 1023:
        raise DataError(f"{path} has {depth.shape} values up to {depth.max()}, not {image.shape[:2]} to 1023: {remedy}")
    return image.transpose(2, 0, 1), depth[None].astype(np.int16), mask.astype(np.uint8)


def _padded(array: np.ndarray, size: list[int]) -> np.ndarray:
    missing = [(0, 0)] * (array.ndim - 2) + [(0, side - now) for side, now in zip(size, array.shape[-2:], strict=True)]
    return np.pad(array, missing, "edge")
