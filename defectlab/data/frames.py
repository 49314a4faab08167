"""Frames of one size with pixel labels, as tensors on one device: potholes with depth, ball screws with pits.

Both sets show few things many times, so a split by image would test on what it trained on:

- potholes (Fan et al., "Pothole Detection Based on Disparity Transformation and Road Surface Modeling", IEEE TIP 29,
  2020): 67 frames of three drives (sessions). One session trains, the others test; `dev` is its last tenth. Twelve
  frames of session 2 are not used, as the authors do not evaluate on them.
- ball screws (Schlagenhauf and Landwehr, "Industrial machine tool component surface defect dataset", Data in Brief 39,
  2021): 325 labelled frames of one type of screw from 14 camera positions, minutes to days apart while pits grow. The
  official split has the same positions on both sides. To leave positions out is not enough: two of them, 2.5 mm and 45
  degrees apart, seem to see one pit. So "zones" splits the screw: no two parts are nearer than 42 mm. Not used: the
  second type of screw, which comes in many image sizes, and frames without a label, which may contain pits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from defectlab.data.images import decode, in_threads, opened
from defectlab.data.splits import PARTS, Named, Plan, identity, locate, read_list, set_and_root, with_dev
from defectlab.data.synthetic import SYNTHETIC
from defectlab.files import DataError

ROAD, SYNTHETIC_ROAD = "road_depth", "synthetic_road"
BALL_SCREWS, SYNTHETIC_SCREW = "bsdata", "synthetic_screw"
SESSIONS = ("session_1", "session_2", "session_3")
SPLITS = {ROAD: SESSIONS, SYNTHETIC_ROAD: SESSIONS, BALL_SCREWS: ("zones", "official"), SYNTHETIC_SCREW: ("zones",)}
FRAMES = {  # of each session of the road
    session: tuple(f"{number:02}" for number in range(1, count + 1)) for session, count in {1: 22, 2: 40, 3: 5}.items()
}
LEFT_OUT = {2: ("06", "07", "08", "13", "14", "15", "21", "22", "23", "37", "38", "39")}  # the authors' note
ZONES = (350, 540)  # mm along the screw: below for dev, between to train on, above to test on; ours
OFFICIAL_TEST = Path(__file__).parent / "splits" / "bsdata_official_test.txt"
SCREW_MASKS = "52541c3d16203e46e3c5d28e9e36d352c3a604ac94a878e6a79b1084092f2eed"  # `pixel_hash` of its masks
SCREW_HEIGHT = 460  # px; later frames have 645, and are reduced to the height of the others
MULTIPLE = 32  # px: frames are padded to the next multiple, at their right and lower edge


@dataclass(frozen=True)
class FrameSplit(Named):
    """N frames of one size; where one is smaller, its edges are repeated, those of the mask, too."""

    images: Tensor  # (N, 3, H, W) uint8
    depth: Tensor | None  # road: (N, 1, H, W) int16, transformed disparity, 0 to 1023, lower in a hole, 0 where unknown
    masks: Tensor  # (N, H, W) uint8, 1 = defect
    names: tuple[str, ...]  # dataset<session>/<frame>; or the screw's file name without suffix


@dataclass(frozen=True)
class FrameData:
    name: str  # as given to load_frames
    label: str  # as printed in tables
    split: str
    train: FrameSplit
    dev: FrameSplit
    test: FrameSplit
    fingerprint: str


# --- Splits ----------------------------------------------------------------------------------------------------------


def _road_parts(plan: Plan, split: str) -> tuple[list[str], list[str], list[str]]:
    session = int(split[-1])
    listed = {
        number: [f"dataset{number}/{frame}" for frame in frames if frame not in LEFT_OUT.get(number, ())]
        for number, frames in FRAMES.items()
    }
    present = {path.replace("/rgb", "")[:-4] for path in plan.manifest.files if "/rgb/" in path}
    used = {number: plan.held(names, present) for number, names in listed.items()}
    own = used.pop(session)
    dev = own[-max(1, round(len(own) / 10)) :]
    return own[: -len(dev)], dev, [name for names in used.values() for name in names]


def position_of(name: str) -> str:
    """Of the camera: 01_200905161814_560000_000_crop_2 -> 560000_000, taken for 560 mm along the screw, 0 degrees."""
    return "_".join(name.split("_")[2:4])


def _screw_parts(plan: Plan, split: str) -> tuple[list[str], list[str], list[str]]:
    names = sorted(Path(path).stem for path in plan.manifest.files if path.startswith("masks/01_"))
    if split == "official":
        test = plan.held(read_list(OFFICIAL_TEST), names)
        return with_dev(dict.fromkeys(names, ""), test, {name: name for name in names})
    at = {name: int(position_of(name).split("_")[0]) / 1000 for name in names}
    low, high = ZONES
    dev, test = [n for n in names if at[n] < low], [n for n in names if at[n] > high]
    return [name for name in names if low <= at[name] <= high], dev, test


def _plan(name: str, split: str, root: Path | None) -> Plan:
    own_name, root = set_and_root(name, root)
    if split not in SPLITS.get(own_name, ()):
        choices = "; ".join(f"{of}: {', '.join(splits)}" for of, splits in SPLITS.items())
        raise DataError(f"there is no set {name!r} with a split {split!r}: choose {choices}")
    label, command, parts_of = {
        ROAD: ("potholes with depth", "road_depth.py", _road_parts),
        SYNTHETIC_ROAD: (SYNTHETIC[SYNTHETIC_ROAD].label, "", _road_parts),
        BALL_SCREWS: ("ball screws", "bsdata.py", _screw_parts),
        SYNTHETIC_SCREW: (SYNTHETIC[SYNTHETIC_SCREW].label, "", _screw_parts),
    }[own_name]
    plan = locate(own_name, label, f"{command} --archive FILE", root)
    parts = dict(zip(PARTS, parts_of(plan, split), strict=True))
    if empty := [part for part, names in parts.items() if not names]:
        raise DataError(f"{plan.folder} has no frames for {empty[0]} in split {split}: {plan.remedy}")
    content = plan.manifest.fingerprint
    if own_name == BALL_SCREWS and not plan.manifest.note:  # the bytes of a drawn mask depend on who wrote the file
        images = {path: sha256 for path, (_, sha256) in plan.manifest.files.items() if path.startswith("images/")}
        content = f"{sorted(images.items())} {SCREW_MASKS}"
    return replace(plan, parts=parts, fingerprint=identity(content, parts.values()))


def frames_fingerprint(name: str, split: str, root: Path | None = None) -> str:
    """sha256 over the content of the set and the three lists of frames; no image is read."""
    return _plan(name, split, root).fingerprint


# --- Loading ---------------------------------------------------------------------------------------------------------


def load_frames(name: str, split: str, device="cpu", root: Path | None = None) -> FrameData:
    """Read the frames, whole, as tensors on `device`.

    `name`: one of `SPLITS`; "sample/" before a real one: its committed sample. `split`: one of those of the set.
    `root`: where data sets lie, by default `data_dir()`. Raises DataError naming the file and the remedy.
    """
    plan = _plan(name, split, root)
    read = _read_screw if set_and_root(name, root)[0] in (BALL_SCREWS, SYNTHETIC_SCREW) else _read_road
    found = {part: in_threads(partial(read, plan=plan), names) for part, names in plan.parts.items()}
    masks = [frame["masks"] for frames in found.values() for frame in frames]
    size = [-(-max(mask.shape[axis] for mask in masks) // MULTIPLE) * MULTIPLE for axis in (0, 1)]
    parts = {}
    for part, frames in found.items():
        stacked = {key: np.stack([_padded(frame[key], size) for frame in frames]) for key in frames[0]}
        tensors = {key: torch.from_numpy(array).to(device) for key, array in stacked.items()}
        parts[part] = FrameSplit(**{"depth": None} | tensors, names=tuple(plan.parts[part]))
    return FrameData(name, plan.label, split, **parts, fingerprint=plan.fingerprint)


def _read_road(name: str, plan: Plan) -> Mapping[str, np.ndarray]:
    session, frame = name.split("/")
    folder = plan.folder / session
    image = np.asarray(decode(folder / "rgb" / f"{frame}.jpg", plan.remedy).convert("RGB"))
    path = folder / "disp" / f"{frame}.png"
    with opened(path, plan.remedy) as file:  # 16 bits, which `decode` refuses
        depth = np.asarray(file, np.int32)
    mask = np.asarray(decode(folder / "label" / f"{frame}.png", plan.remedy).convert("L")) > 127
    if not image.shape[:2] == depth.shape == mask.shape or depth.max() > 1023:
        what = f"{depth.shape} values up to {depth.max()}, not {image.shape[:2]} to 1023"
        raise DataError(f"{path} has {what}: {plan.remedy}")
    return {"images": image.transpose(2, 0, 1), "depth": depth[None].astype(np.int16), "masks": mask.astype(np.uint8)}


def _read_screw(name: str, plan: Plan) -> Mapping[str, np.ndarray]:
    image = decode(plan.folder / "images" / f"{name}.jpg", plan.remedy).convert("RGB")
    path = plan.folder / "masks" / f"{name}.png"
    mask = decode(path, plan.remedy).convert("L")
    if mask.size != image.size:
        raise DataError(f"{path} has {mask.size} pixels, its image {image.size}: {plan.remedy}")
    if image.height > SCREW_HEIGHT:
        size = (round(image.width * SCREW_HEIGHT / image.height), SCREW_HEIGHT)
        image, mask = image.resize(size, Image.Resampling.LANCZOS), mask.resize(size, Image.Resampling.NEAREST)
    return {"images": np.asarray(image).transpose(2, 0, 1), "masks": (np.asarray(mask) > 127).astype(np.uint8)}


def _padded(array: np.ndarray, size: list[int]) -> np.ndarray:
    missing = [(0, 0)] * (array.ndim - 2) + [(0, side - now) for side, now in zip(size, array.shape[-2:], strict=True)]
    return np.pad(array, missing, "edge")
