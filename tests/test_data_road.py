"""Potholes with depth: split by session, frames that the authors leave out, 16 bits of disparity."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defectlab.data import fetch, road
from defectlab.data.images import save_image
from defectlab.files import DataError


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Three frames of each session, of 20 x 33 or 21 x 33 px; frame 07 of session 2 is one that is left out."""
    rng = np.random.default_rng(0)
    for session in road.FRAMES:
        folder, rows = tmp_path / road.ROAD / f"dataset{session}", 20 + session % 2
        for frame in ("01", "02", "05", "07")[: 3 + (session == 2)]:
            save_image(folder / "rgb" / f"{frame}.jpg", rng.integers(256, size=(rows, 33, 3), dtype=np.uint8))
            (folder / "disp").mkdir(exist_ok=True)
            disparity = rng.integers(1024, size=(rows, 33), dtype=np.uint16)
            Image.fromarray(disparity).save(folder / "disp" / f"{frame}.png")
            save_image(folder / "label" / f"{frame}.png", (disparity < 300) * np.uint8(255))
    fetch.write_manifest(tmp_path / road.ROAD, "potholes with depth", "a test", "sample of 10 images")
    return tmp_path


def test_a_session_trains_and_the_others_test(frames: Path) -> None:
    data = road.load_road("road_depth", 2, root=frames)
    assert data.train.names == ("dataset2/01", "dataset2/02") and data.dev.names == ("dataset2/05",)
    assert {name.split("/")[0] for name in data.test.names} == {"dataset1", "dataset3"} and len(data.test) == 6
    assert data.fingerprint == road.road_fingerprint("road_depth", 2, frames)
    assert data.fingerprint != road.road_fingerprint("road_depth", 1, frames)


def test_disparity_is_kept_and_edges_are_repeated(frames: Path) -> None:
    data = road.load_road("road_depth", 2, root=frames)
    assert data.train.images.shape == (2, 3, 32, 64) and data.train.depth.shape == (2, 1, 32, 64)
    stored = np.asarray(Image.open(frames / "road_depth/dataset2/disp/01.png"), np.int16)
    assert torch.equal(data.train.depth[0, 0, :20, :33], torch.from_numpy(stored))
    assert torch.equal(data.train.masks[0], (data.train.depth[0, 0] < 300).to(torch.uint8))
    assert (data.train.depth[0, 0, 20:, :33] == data.train.depth[0, 0, 19, :33]).all()


def test_wrong_requests_and_files(frames: Path) -> None:
    with pytest.raises(DataError, match="session 4: choose road_depth and 1, 2 or 3"):
        road.load_road("road_depth", 4, root=frames)
    path = frames / "road_depth/dataset1/disp/01.png"
    Image.fromarray(np.full((5, 5), 7, np.uint16)).save(path)
    fetch.write_manifest(frames / road.ROAD, "potholes with depth", "a test", "sample of 10 images")
    with pytest.raises(DataError, match=r"01\.png has \(5, 5\) values up to 7, not \(21, 33\)"):
        road.load_road("road_depth", 2, root=frames)


@pytest.mark.real_data
def test_real_frames(real_set) -> None:
    root = real_set("road_depth")
    sizes = {s: [len(getattr(road.load_road("road_depth", s, root=root), p)) for p in road.PARTS] for s in (1, 2, 3)}
    assert sizes == {1: [20, 2, 33], 2: [25, 3, 27], 3: [4, 1, 50]}
    assert road.road_fingerprint("road_depth", 2, root) == (
        "27daaf471745d27e30c923b143a2c2a5faf029b80f9de9bc43339d1bfc11d0e3"
    )
