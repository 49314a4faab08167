"""The readers of the anomaly sets, on tiny sets in the real layouts and on a synthetic one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defectlab.data import anomaly
from defectlab.data import fetch as store
from defectlab.data.anomaly import load_anomaly
from defectlab.data.images import resize_mask
from defectlab.data.synthetic import SYNTHETIC
from defectlab.files import DataError

SIZE = 32


def image(seed: int, width: int, height: int, colour: bool = False) -> Image.Image:
    rng = np.random.default_rng(seed)
    shape = (height // 8, width // 8, 3) if colour else (height // 8, width // 8)
    return Image.fromarray(rng.integers(60, 180, shape, dtype=np.uint8)).resize((width, height))


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def manifest(folder: Path, note: str = "") -> None:
    (folder / "manifest.json").unlink(missing_ok=True)
    store.write_manifest(folder, "a tiny set", "a test", note)


@pytest.fixture
def tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """25 normal tiles (20 of them listed for training) and two of each type; width 64, height 80."""
    folder = tmp_path / "magnetic_tile"
    for i in range(25):
        save(folder / f"MT_Free/Imgs/exp1_num_{i:02}.jpg", image(i, 64, 80))
        save(folder / f"MT_Free/Imgs/exp1_num_{i:02}.png", Image.new("L", (64, 80)))
    for number, kind in enumerate(anomaly.TILE_TYPES):
        for i in range(2):
            stem = folder / f"MT_{kind.capitalize()}/Imgs/exp{number}_num_{i}"
            mask = Image.new("L", (64, 80))
            mask.paste(255, (16, 20, 32, 40))
            mask.paste(127, (0, 0, 8, 8))  # grey edges up to 127 are no defect
            save(stem.with_suffix(".jpg"), image(100 + 10 * number + i, 64, 80))
            save(stem.with_suffix(".png"), Image.new("L", (64, 80)) if (kind, i) == ("uneven", 1) else mask)
    manifest(folder)
    names = tmp_path / "train.txt"
    names.write_text("".join(f"exp1_num_{i:02}.jpg\n" for i in range(20)))
    monkeypatch.setattr(anomaly, "TILE_TRAIN_LIST", names)
    return folder


def load_tiles(folder: Path, size: int = SIZE) -> anomaly.AnomalyData:
    return load_anomaly("magnetic_tile", size, root=folder.parent)


@pytest.fixture
def bottles(tmp_path: Path) -> Path:
    folder = tmp_path / "mvtec_ad" / "bottle"
    for i in range(20):
        save(folder / f"train/good/{i:03}.png", image(i, 64, 64, colour=True))
    for i in range(3):
        save(folder / f"test/good/{i:03}.png", image(50 + i, 64, 64, colour=True))
    for kind in ("broken", "dirty"):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, 32, 32))
        save(folder / f"test/{kind}/000.png", image(60, 64, 64, colour=True))
        save(folder / f"ground_truth/{kind}/000_mask.png", mask)
    (folder / "license.txt").write_text("CC BY-NC-SA 4.0")
    manifest(folder, note="reduced")
    return folder


def test_tiles(tiles: Path) -> None:
    data = load_tiles(tiles)
    assert data.name == "magnetic_tile" and data.label == "magnetic tiles"
    assert data.type_names == ("good", "blowhole", "break", "crack", "fray", "uneven")
    assert (len(data.train), len(data.dev), len(data.test)) == (18, 4, 15)
    for split in (data.train, data.dev, data.test):
        n = len(split)
        assert split.images.shape == (n, 3, SIZE, SIZE) and split.images.dtype == torch.uint8
        assert split.masks.shape == (n, 256, 256) and split.masks.dtype == torch.uint8 and split.masks.max() <= 1
        assert split.labels.dtype == split.types.dtype == torch.uint8 and split.has_mask.dtype == torch.bool
        assert torch.equal(split.labels == 1, split.types > 0)
        assert (split.images[:, 0] == split.images[:, 2]).all()
        assert split.original_sizes == ((80, 64),) * n and len(set(split.names)) == n
    assert data.train.labels.sum() == 0 and data.train.has_mask.all() and data.train.masks.sum() == 0
    assert data.test.types.tolist() == [0] * 5 + [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_masks_and_images_are_resized_as_stated(tiles: Path) -> None:
    data = load_tiles(tiles)
    expected = torch.zeros(256, 256, dtype=torch.uint8)
    expected[64:128, 64:128] = 1  # (16, 20, 32, 40) of 64 x 80; the grey 127 in the corner is no defect
    assert torch.equal(data.test.masks[5], expected)
    path = tiles / data.test.names[5]
    antialiased = torch.nn.functional.interpolate(
        torch.from_numpy(np.asarray(Image.open(path)).astype(np.float32))[None, None],
        (SIZE, SIZE),
        mode="bilinear",
        antialias=True,
    )
    assert (data.test.images[5, 0] - antialiased[0, 0]).abs().max() <= 1


def test_masks_shrink_to_pixel_centres() -> None:
    """nearest-exact samples at pixel centres: of 512 columns every second, from 1 on; plain nearest starts at 0."""
    mask = np.zeros((512, 512), bool)
    mask[:, 511] = True
    resized = resize_mask(mask)
    assert resized.shape == (256, 256) and resized[:, 255].all() and not resized[:, :255].any()


def test_empty_mask_is_anomalous_without_mask(tiles: Path) -> None:
    test = load_tiles(tiles).test
    without = [name for name, has in zip(test.names, test.has_mask, strict=True) if not has]
    assert without == ["MT_Uneven/Imgs/exp4_num_1.jpg"]
    assert test.labels[test.names.index(without[0])] == 1


def test_dev_is_held_out_and_pasted(tiles: Path) -> None:
    data = load_tiles(tiles)
    normal, pasted = data.dev.names[:2], data.dev.names[2:]
    assert not set(normal) & (set(data.train.names) | set(data.test.names))
    assert set(normal) | set(data.train.names) == {f"MT_Free/Imgs/exp1_num_{i:02}.jpg" for i in range(20)}
    assert pasted == (normal[0] + "+blowhole", normal[1] + "+break")
    assert data.dev.types.tolist() == [0, 0, 1, 2] and data.dev.has_mask.all()
    assert (data.dev.masks[2:].flatten(1).sum(1) > 0).all() and data.dev.masks[:2].sum() == 0
    large = load_anomaly("magnetic_tile", 256, root=tiles.parent).dev
    change = (large.images[2:].int() - large.images[:2].int()).abs()[:, 0].float()
    inside = large.masks[2:] == 1
    assert change[inside].mean() > 5 * change[~inside].mean() > 0 or change[~inside].max() == 0


def test_dev_of_a_grouped_split_cuts_no_group() -> None:
    paths = [f"MT_Free/Imgs/exp{e}_num_{1000 * tile + e}.jpg" for tile in range(20) for e in range(1, 7)]
    train, groups = [anomaly.Sample(path) for path in paths], {path: i // 6 for i, path in enumerate(paths)}
    rest, dev = anomaly.hold_out(train, ("crack",), groups)
    normal, pasted = dev[:12], dev[12:]
    assert [sample.path for sample in normal] == [sample.path for sample in pasted] and len(rest) == 108
    assert not {groups[sample.path] for sample in rest} & {groups[sample.path] for sample in normal}


def test_same_every_time_and_fingerprint_follows_the_content(tiles: Path, monkeypatch) -> None:
    first, second = load_tiles(tiles), load_tiles(tiles)
    assert first.fingerprint == second.fingerprint and first.dev.names == second.dev.names
    assert all(
        torch.equal(getattr(getattr(first, split), field), getattr(getattr(second, split), field))
        for split in ("train", "dev", "test")
        for field in ("images", "masks", "types")
    )
    names = anomaly.TILE_TRAIN_LIST.read_text()
    anomaly.TILE_TRAIN_LIST.write_text(names.replace("exp1_num_00.jpg", "exp1_num_24.jpg"))
    other_split = load_tiles(tiles).fingerprint
    anomaly.TILE_TRAIN_LIST.write_text(names)
    save(tiles / "MT_Crack/Imgs/exp2_num_0.jpg", image(999, 64, 80))
    manifest(tiles)
    assert len({first.fingerprint, other_split, load_tiles(tiles).fingerprint}) == 3


def test_mvtec(bottles: Path) -> None:
    data = load_anomaly("mvtec_ad/bottle", SIZE, root=bottles.parents[1])
    assert data.label == "MVTec bottle (reduced copy)"
    assert data.type_names == ("good", "broken", "dirty", "pasted")
    assert (len(data.train), len(data.dev), len(data.test)) == (18, 4, 5)
    assert data.test.types.tolist() == [0, 0, 0, 1, 2] and data.dev.types.tolist() == [0, 0, 3, 3]
    assert data.test.masks[3].sum() == 128 * 128 and data.test.masks[3, :128, :128].all()
    assert (data.train.images[:, 0] != data.train.images[:, 2]).any()  # colour stays
    change = (data.dev.images[2:].int() - data.dev.images[:2].int()).flatten(1).abs().amax(1)
    assert (change > 0).all()
    manifest(bottles)
    assert load_anomaly("mvtec_ad/bottle", SIZE, root=bottles.parents[1]).label == "MVTec bottle"


def test_synthetic_tile(synthetic: Path) -> None:
    data = load_anomaly("synthetic_tile", SIZE, root=synthetic)
    assert data.label == "synthetic tiles" and data.type_names[1:] == anomaly.TILE_TYPES
    normal = len(data.train) + len(data.dev) // 2
    assert normal == round(0.8 * (normal + int((data.test.labels == 0).sum())))
    assert not set(data.train.names) & set(data.test.names)


def test_script_of_the_synthetic_sets(tmp_path: Path, script, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    for name in SYNTHETIC.keys() - {"synthetic_nut"}:
        monkeypatch.delitem(SYNTHETIC, name)
    main, listed = script("synthetic").main, tmp_path / "synthetic_nut" / "manifest.json"
    assert main(["--verify", "--data-dir", str(tmp_path)]) == 1
    assert "run `python data_scripts/synthetic.py`" in capsys.readouterr().err
    assert main(["--data-dir", str(tmp_path)]) == 0
    stamp = listed.stat().st_mtime_ns
    assert main(["--data-dir", str(tmp_path)]) == 0 and main(["--verify", "--data-dir", str(tmp_path)]) == 0
    assert "synthetic nuts: 132 files" in capsys.readouterr().out
    assert listed.stat().st_mtime_ns == stamp  # not drawn again


SCRIPT = r".*run `python data_scripts/magnetic_tile\.py`"
DAMAGED = [  # suffix of the file, what becomes of it, whether the manifest knows, message
    ("jpg", Path.unlink, False, "is missing.*" + SCRIPT),
    ("jpg", lambda path: path.write_bytes(b"x" * 200), False, "has 200 bytes" + SCRIPT),
    ("jpg", lambda path: path.write_bytes(path.read_bytes()[:400]), True, "cannot be decoded" + SCRIPT),
    ("jpg", lambda path: path.write_bytes(b"<html></html>"), True, "cannot be decoded" + SCRIPT),
    ("png", Path.unlink, True, "is missing" + SCRIPT),
    ("png", lambda path: Image.new("L", (80, 64)).save(path), True, r"is 80 x 64 pixels, its image .*\.jpg 64 x 80"),
    ("png", lambda path: Image.fromarray(np.ones((80, 64), np.uint16)).save(path), True, "more than 8 bits a channel"),
]


@pytest.mark.parametrize(("suffix", "change", "known", "message"), DAMAGED)
def test_missing_and_damaged_files(tiles: Path, suffix: str, change, known: bool, message: str) -> None:
    change(tiles / f"MT_Crack/Imgs/exp2_num_0.{suffix}")
    if known:
        manifest(tiles)
    with pytest.raises(DataError, match=rf"exp2_num_0\.{suffix} .*{message}"):
        load_tiles(tiles)


def test_mask_missing_in_the_layout_of_mvtec(bottles: Path) -> None:
    (bottles / "ground_truth/dirty/000_mask.png").unlink()
    manifest(bottles)
    with pytest.raises(DataError, match=r"dirty/000_mask\.png is missing: run .*--category bottle"):
        load_anomaly("mvtec_ad/bottle", SIZE, root=bottles.parents[1])


def test_list_and_set_that_do_not_fit(tiles: Path) -> None:
    with anomaly.TILE_TRAIN_LIST.open("a") as names:
        names.write("exp9_num_99.jpg\n")
    with pytest.raises(DataError, match=r"train\.txt lists MT_Free/Imgs/exp9_num_99\.jpg, which .* does not hold"):
        load_tiles(tiles)


def test_set_without_defects(bottles: Path) -> None:
    for path in [*bottles.glob("test/[!g]*/*"), *bottles.glob("ground_truth/*/*")]:
        path.unlink()
    manifest(bottles)
    with pytest.raises(DataError, match="has no training or no anomalous test images"):
        load_anomaly("mvtec_ad/bottle", SIZE, root=bottles.parents[1])


def test_published_list() -> None:
    names = anomaly.TILE_TRAIN_LIST.read_text().split()
    assert len(names) == len(set(names)) == 761 and all(name.endswith(".jpg") for name in names)
