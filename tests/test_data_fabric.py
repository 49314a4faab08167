"""Cloth for methods that learn from defects: parts, rolls, masks, whole strips."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defectlab.data.fabric import fabric_fingerprint, load_fabric, rolls
from defectlab.data.fetch import write_manifest
from defectlab.data.synthetic import ensure_synthetic
from defectlab.files import DataError


def strips(split) -> set[str]:
    return {Path(name).stem[:11] for name in split.names}


def test_neighbours_in_number_with_one_defect_on_one_fabric_are_a_roll() -> None:
    names = ["0003_019_02", "0001_019_02", "0002_019_02", "0004_019_03", "0005_030_03", "0007_030_03"]
    found = rolls(names)
    assert [found[name] for name in names[:3]] == ["0001_019_02"] * 3
    assert [found[name] for name in names[3:]] == names[3:]


def test_parts_masks_and_strips(synthetic: Path) -> None:
    data = load_fabric("synthetic_fabric", root=synthetic)
    assert data.type_names == ("good", "broken_pick", "fuzzyball", "nep")
    assert (len(data.train) + len(data.dev), len(data.test)) == (36, 24)
    for split in (data.train, data.dev, data.test):
        assert split.images.shape[1:] == (1, 256, 256) and split.masks.shape == split.images[:, 0].shape
        assert ((split.masks.amax((1, 2)) > 0) == (split.labels == 1)).all()
        assert ((split.types > 0) == (split.labels == 1)).all() and 0 < split.labels.sum() < len(split)
    assert not strips(data.train) & strips(data.dev) and not strips(data.dev) & strips(data.test)
    together = rolls(strips(data.train) | strips(data.dev))
    bad = [{together[Path(n).stem[:11]] for n in s.names if "/good/" not in n} for s in (data.train, data.dev)]
    assert not bad[0] & bad[1]
    assert set(data.strips) <= strips(data.test) and len(data.strips) == 4
    image, mask = data.strips["0039_010_01"]
    assert image.shape == mask.shape == (256, 768) and mask.any() and not data.strips["0031_000_00"][1].any()
    assert fabric_fingerprint("synthetic_fabric", synthetic) == data.fingerprint


def test_the_committed_sample_has_nothing_to_learn_defects_from() -> None:
    data = load_fabric("sample/aitex")
    assert not data.train.labels.any() and data.test.labels.any() and not data.strips


def test_a_tile_of_another_size_is_refused(tmp_path: Path) -> None:
    source = ensure_synthetic(tmp_path, "synthetic_fabric").source
    folder = tmp_path / "synthetic_fabric"
    Image.new("L", (256, 200)).save(min(folder.glob("test/good/*")))
    write_manifest(folder, "cloth", source)
    with pytest.raises(DataError, match=r"test/good/\S+ is no square tile of the size of the others: delete"):
        load_fabric("synthetic_fabric", root=tmp_path)


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(DataError, match="choose aitex or synthetic_fabric"):
        load_fabric("silk")


@pytest.mark.real_data
def test_aitex(real_set) -> None:
    data = load_fabric("aitex", root=real_set("aitex"))
    assert [(len(s), int(s.labels.sum())) for s in (data.train, data.dev, data.test)] == [
        (266, 44),
        (87, 15),
        (201, 75),
    ]
    assert not strips(data.train) & strips(data.dev)
    assert not (strips(data.train) | strips(data.dev)) & strips(data.test)
    bad = {Path(n).stem[:11] for s in (data.train, data.dev) for n in s.names if "/good/" not in n}
    together = rolls(bad)
    sides = [{together[Path(n).stem[:11]] for n in s.names if "/good/" not in n} for s in (data.train, data.dev)]
    assert not sides[0] & sides[1]
    assert sorted(data.strips) == ["0001_002_00", "0010_006_02", "0083_029_04"]
    assert all(image.shape == (256, 4096) and mask.any() for image, mask in data.strips.values())
    assert np.isin(data.train.masks.unique().numpy(), (0, 1)).all()
