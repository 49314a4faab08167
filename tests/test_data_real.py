"""The real magnetic tiles and metal nuts, unpacked by the project's own scripts (see the fixture `real_set`)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, normalize

from defectlab.data.anomaly import AnomalyData, load_anomaly

pytestmark = pytest.mark.real_data
TILE = ("magnetic_tile", "magnetic_tile", "magnetic-tile.zip")
NUT = ("mvtec_ad/metal_nut", "mvtec_ad", "mvtec_metal_nut_512.zip", "--category", "metal_nut")
EMPTY = {"exp3_num_45042", "exp4_num_45057", "exp4_num_124690", "exp4_num_352527"}


@pytest.fixture(scope="module")
def tile_root(real_set) -> Path:
    return real_set(*TILE)


@pytest.fixture(scope="module")
def tiles(tile_root: Path) -> AnomalyData:
    return load_anomaly("magnetic_tile", 64, root=tile_root)


def test_verify(tile_root: Path, script, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("magnetic_tile").main(["--verify", "--data-dir", str(tile_root)]) == 0
    out = capsys.readouterr().out
    assert "2688 files" in out and "every file verified" in out


def test_tile_counts(tiles: AnomalyData) -> None:
    assert (len(tiles.train), len(tiles.dev), len(tiles.test)) == (685, 2 * 76, 191 + 392)
    assert tiles.test.types.bincount().tolist() == [191, 115, 85, 57, 32, 103]
    assert tiles.dev.labels.sum() == 76 and tiles.train.labels.sum() == 0
    train, dev, test = (set(split.names) for split in (tiles.train, tiles.dev, tiles.test))
    assert not (train & dev or train & test or dev & test)
    assert len(train | dev | test) == 685 + 152 + 583


def test_tile_masks(tiles: AnomalyData, tile_root: Path) -> None:
    test = tiles.test
    without = {Path(name).stem for name, has in zip(test.names, test.has_mask, strict=True) if not has}
    assert without == EMPTY
    labels = {Path(name).stem: int(label) for name, label in zip(test.names, test.labels, strict=True)}
    assert all(labels[stem] == 1 for stem in EMPTY)
    for index in test.labels.nonzero().flatten().tolist():  # no defect gets lost in the resize
        mask = Image.open((tile_root / "magnetic_tile" / test.names[index]).with_suffix(".png"))
        assert (np.asarray(mask) > 127).any() == bool(test.masks[index].any()), test.names[index]


def test_tile_shapes(tiles: AnomalyData) -> None:
    sizes = np.array(tiles.train.original_sizes + tiles.test.original_sizes)
    ratio = sizes[:, 1] / sizes[:, 0]
    assert 0.3 < ratio.min() < 0.4 and 2.6 < ratio.max() < 2.8
    assert (sizes[:, 1].min(), sizes[:, 1].max()) == (103, 632)
    assert (sizes[:, 0].min(), sizes[:, 0].max()) == (222, 403)


def test_metal_nut(real_set, script, capsys: pytest.CaptureFixture[str]) -> None:
    root = real_set(*NUT)
    assert script("mvtec_ad").main(["--category", "metal_nut", "--verify", "--data-dir", str(root)]) == 0
    reduced = "(reduced)" in capsys.readouterr().out
    data = load_anomaly("mvtec_ad/metal_nut", 64, root=root)
    assert (len(data.train), len(data.dev), len(data.test)) == (198, 2 * 22, 115)
    assert data.type_names == ("good", "bent", "color", "flip", "scratch", "pasted")
    assert data.test.types.bincount().tolist() == [22, 25, 22, 23, 23]
    assert data.test.has_mask.all() and data.dev.has_mask.all()
    assert reduced == ("reduced" in data.label) == (data.train.original_sizes[0] == (512, 512))


def test_twins_between_training_and_test(tiles: AnomalyData) -> None:
    """What notebook 01 says of the published split: most good test tiles have a second exposure in training."""

    def fine_structure(images: torch.Tensor) -> torch.Tensor:
        small = avg_pool2d(images[:, :1].float(), images.shape[-1] // 32)
        flat = (small - avg_pool2d(small, 9, 1, 4, count_include_pad=False)).flatten(1)
        return normalize(flat - flat.mean(1, keepdim=True))

    closest = (fine_structure(tiles.test.images) @ fine_structure(tiles.train.images).T).amax(1)
    good = tiles.test.labels == 0
    twins = closest > 0.95
    assert 100 <= int(twins[good].sum()) <= 120  # 108 at 256 px, where the notebook counts
    assert int(twins[~good].sum()) <= 6  # 3 at 256 px
