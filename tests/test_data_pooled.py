"""Several sets as one, and images of other sets."""

from pathlib import Path

import pytest
import torch

from defectlab.data.anomaly import AnomalyData, load_anomaly
from defectlab.data.pooled import (
    KINDS,
    foreign_fingerprint,
    foreign_images,
    load_pooled,
    others,
    pooled_fingerprint,
    sets_of,
)
from defectlab.files import DataError

SETS = {"cloth": "synthetic_fabric", "tile": "synthetic_tile", "nut": "synthetic_nut"}


@pytest.fixture(scope="module")
def pooled(synthetic: Path) -> AnomalyData:
    return load_pooled("synthetic_pooled", 32, root=synthetic)


def test_a_pool_is_its_sets_one_after_the_other(pooled: AnomalyData, synthetic: Path) -> None:
    assert sets_of("synthetic_pooled") == SETS and tuple(SETS) == KINDS
    for part in ("train", "dev", "test"):
        whole, start = getattr(pooled, part), 0
        for kind, name in SETS.items():
            data = load_anomaly(name, 32, root=synthetic)
            own = getattr(data, part)
            here = slice(start, start + len(own))
            assert torch.equal(whole.images[here], own.images) and torch.equal(whole.masks[here], own.masks)
            assert whole.names[here] == own.names and torch.equal(whole.labels[here], own.labels)
            told = [pooled.type_names[t] for t in whole.types[here]]
            assert told == [f"{kind} {data.type_names[t]}" if t else "good" for t in own.types]
            start += len(own)
        assert start == len(whole) == len(whole.has_mask) == len(whole.original_sizes)


def test_foreign_images_are_training_images_of_the_other_sets(synthetic: Path) -> None:
    assert others("synthetic_tile") == ("synthetic_fabric", "synthetic_nut")
    found = foreign_images("synthetic_tile", 32, root=synthetic, each=5)
    known = [load_anomaly(name, 32, root=synthetic).train.images for name in others("synthetic_tile")]
    assert found.shape == (10, 3, 32, 32) and found.dtype == torch.uint8
    for image in found:
        assert any((image == one).flatten(1).all(1).any() for one in known)
    assert torch.equal(found, foreign_images("synthetic_tile", 32, root=synthetic, each=5))


def test_fingerprints_follow_the_sets(synthetic: Path, pooled: AnomalyData) -> None:
    assert pooled.fingerprint == pooled_fingerprint("synthetic_pooled", synthetic)
    prints = {foreign_fingerprint(name, synthetic) for name in SETS.values()}
    assert len(prints | {pooled.fingerprint}) == 4


def test_unknown_pools_are_refused() -> None:
    with pytest.raises(DataError, match="no pool 'all'"):
        sets_of("all")
    with pytest.raises(DataError, match="'neu_det' is in no pool"):
        others("neu_det")


def test_a_sample_pool_has_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEFECTLAB_DATA", str(tmp_path))
    assert sets_of("sample/pooled")["cloth"] == "sample/aitex"
    data = load_pooled("sample/pooled", 64)
    assert {name.split()[0] for name in data.type_names} == {"good", *KINDS} and len(data.train) > 0
