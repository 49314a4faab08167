"""Potholes with depth, split by session, 16 bits of disparity; ball screws, split by place on the screw."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defectlab.data import fetch
from defectlab.data.frames import (
    BALL_SCREWS,
    FRAMES,
    OFFICIAL_TEST,
    ROAD,
    SPLITS,
    frames_fingerprint,
    load_frames,
    position_of,
)
from defectlab.data.images import save_image
from defectlab.data.splits import PARTS, read_list
from defectlab.files import DataError


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Three frames of each session, of 20 x 33 or 21 x 33 px; frame 07 of session 2 is one that is left out."""
    rng = np.random.default_rng(0)
    for session in FRAMES:
        folder, rows = tmp_path / ROAD / f"dataset{session}", 20 + session % 2
        for frame in ("01", "02", "05", "07")[: 3 + (session == 2)]:
            save_image(folder / "rgb" / f"{frame}.jpg", rng.integers(256, size=(rows, 33, 3), dtype=np.uint8))
            (folder / "disp").mkdir(exist_ok=True)
            disparity = rng.integers(1024, size=(rows, 33), dtype=np.uint16)
            Image.fromarray(disparity).save(folder / "disp" / f"{frame}.png")
            save_image(folder / "label" / f"{frame}.png", (disparity < 300) * np.uint8(255))
    fetch.write_manifest(tmp_path / ROAD, "potholes with depth", "a test", "sample of 10 images")
    return tmp_path


def test_a_session_trains_and_the_others_test(frames: Path) -> None:
    data = load_frames("road_depth", "session_2", root=frames)
    assert data.train.names == ("dataset2/01", "dataset2/02") and data.dev.names == ("dataset2/05",)
    assert {name.split("/")[0] for name in data.test.names} == {"dataset1", "dataset3"} and len(data.test) == 6
    assert data.fingerprint == frames_fingerprint("road_depth", "session_2", frames)
    assert data.fingerprint != frames_fingerprint("road_depth", "session_1", frames)


def test_disparity_is_kept_and_edges_are_repeated(frames: Path) -> None:
    data = load_frames("road_depth", "session_2", root=frames)
    assert data.train.images.shape == (2, 3, 32, 64) and data.train.depth.shape == (2, 1, 32, 64)
    stored = np.asarray(Image.open(frames / "road_depth/dataset2/disp/01.png"), np.int16)
    assert torch.equal(data.train.depth[0, 0, :20, :33], torch.from_numpy(stored))
    assert torch.equal(data.train.masks[0], (data.train.depth[0, 0] < 300).to(torch.uint8))
    assert (data.train.depth[0, 0, 20:, :33] == data.train.depth[0, 0, 19, :33]).all()


def test_wrong_requests_and_files(frames: Path) -> None:
    with pytest.raises(DataError, match="no set 'road_depth' with a split 'session_4': choose road_depth: session_1"):
        load_frames("road_depth", "session_4", root=frames)
    path = frames / "road_depth/dataset1/disp/01.png"
    Image.fromarray(np.full((5, 5), 7, np.uint16)).save(path)
    fetch.write_manifest(frames / ROAD, "potholes with depth", "a test", "sample of 10 images")
    with pytest.raises(DataError, match=r"01\.png has \(5, 5\) values up to 7, not \(21, 33\)"):
        load_frames("road_depth", "session_2", root=frames)


def test_other_frames_than_the_reduced_ones_are_refused(frames: Path, script, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("road_depth")
    with pytest.raises(DataError, match="dataset1/rgb should have 22 frames, not 3"):
        module._check(frames / ROAD)
    monkeypatch.setattr(module, "FRAMES", {1: ("01", "02", "05")})
    with pytest.raises(DataError, match=r"dataset1/rgb/01\.jpg is 33 px wide, not 320: reduce the frames first"):
        module._check(frames / ROAD)


@pytest.mark.real_data
def test_real_frames(real_set) -> None:
    root = real_set("road_depth")
    sizes = {
        s: [len(getattr(load_frames("road_depth", f"session_{s}", root=root), p)) for p in PARTS] for s in (1, 2, 3)
    }
    assert sizes == {1: [20, 2, 33], 2: [25, 3, 27], 3: [4, 1, 50]}
    assert frames_fingerprint("road_depth", "session_2", root) == (
        "27daaf471745d27e30c923b143a2c2a5faf029b80f9de9bc43339d1bfc11d0e3"
    )


# --- Ball screws -----------------------------------------------------------------------------------------------------


def outline(folder: Path, stem: str, size: tuple[int, int], labelme: bool) -> None:
    """A frame and its outline, of a square from (4, 5) to (8, 9), as labelme writes it or halved with a scale."""
    save_image(folder / ("data" if labelme else "images") / f"{stem}.jpg", np.zeros((size[1], size[0], 3), np.uint8))
    corners = [[4, 5], [8, 5], [8, 9], [4, 9]]
    halved = [[x / 2, y / 2] for x, y in corners]
    text = {"shapes": [{"points": corners}]} if labelme else {"polygons": [halved], "scale": 2}
    path = folder / ("label" if labelme else "polygons") / f"{stem}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(text))


def test_both_kinds_of_outlines_give_the_same_masks(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, found = script("bsdata"), []
    monkeypatch.setattr(module, "COUNT", 1)
    for labelme in (True, False):
        outline(tmp_path / str(labelme), "01_1_5_0_crop_1", (20, 12), labelme)
        with pytest.raises(DataError, match="are not those of BSData as published"):
            module._draw(tmp_path / str(labelme))
        found.append(np.asarray(Image.open(tmp_path / str(labelme) / "masks/01_1_5_0_crop_1.png")))
    assert (found[0] == found[1]).all() and found[0].shape == (12, 20)
    assert (found[0] > 0).nonzero()[0].tolist() == sorted([*range(5, 10)] * 5) and not (
        tmp_path / "True/label"
    ).exists()
    (tmp_path / "again" / "polygons").mkdir(parents=True)
    with pytest.raises(DataError, match="should have 1 labelled frames"):
        module._draw(tmp_path / "again")


def test_larger_frames_are_reduced_with_their_masks(tmp_path: Path) -> None:
    places = {"395000_270": (1130, 460), "560000_000": (1540, 645), "277500_315": (1130, 460)}
    for number, (position, (width, height)) in enumerate(places.items()):
        stem, mask = f"01_{number}_{position}_crop_1", np.zeros((height, width), np.uint8)
        mask[height // 2 :] = 255
        save_image(tmp_path / f"bsdata/images/{stem}.jpg", np.zeros((height, width, 3), np.uint8))
        save_image(tmp_path / f"bsdata/masks/{stem}.png", mask)
    fetch.write_manifest(tmp_path / BALL_SCREWS, "ball screws", "a test")
    data = load_frames("bsdata", "zones", root=tmp_path)
    assert data.test.images.shape == (1, 3, 480, 1152) and data.train.depth is None
    assert not data.test.masks[0, :229].any() and data.test.masks[0, 231:, :1098].all()


def test_on_a_synthetic_screw_a_pit_grows_from_frame_to_frame(synthetic: Path) -> None:
    data = load_frames("synthetic_screw", "zones", root=synthetic)
    assert [len(getattr(data, part)) for part in PARTS] == [20, 10, 15] and data.label == "synthetic ball screws"
    areas = {}
    for part in PARTS:
        for name, mask in zip(getattr(data, part).names, getattr(data, part).masks, strict=True):
            areas.setdefault(position_of(name), []).append(int(mask.sum()))
    assert len(areas) == 9 and all(found[-1] > 3 * found[0] > 0 for found in areas.values())
    frames, marked = data.test.images.float().mean(1), data.test.masks > 0
    assert frames[marked].mean() < frames[~marked].mean() - 20
    with pytest.raises(DataError, match="no set 'synthetic_screw' with a split 'official'"):
        load_frames("synthetic_screw", "official", root=synthetic)


@pytest.mark.real_data
def test_real_screws(real_set) -> None:
    root = real_set("bsdata")
    found = {split: load_frames("bsdata", split, root=root) for split in SPLITS[BALL_SCREWS]}
    sizes = {split: [len(getattr(data, part)) for part in PARTS] for split, data in found.items()}
    assert sizes == {"zones": [159, 72, 94], "official": [247, 27, 51]}
    millimetres = [
        {int(position_of(n).split("_")[0]) / 1000 for n in getattr(found["zones"], part).names} for part in PARTS
    ]
    train, dev, test = map(sorted, millimetres)
    assert train[0] - dev[-1] == 62.5 and test[0] - train[-1] == 42.5
    assert set(found["official"].test.names) == set(read_list(OFFICIAL_TEST))
    assert found["zones"].fingerprint == "50513a2f3b2c380a5b5afb8f8f34ac6bfb31ecac610623659f8223b27b7e8a5d"
