"""Tiles under other light: which images a row sees, the cures, the rows."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import quiet

from defectlab.data.anomaly import AnomalyData, load_anomaly
from defectlab.files import DataError
from defectlab.studies import cures as study
from defectlab.training.light import DARK, LightSettings, lit, normalised, relit, run_light, under


@pytest.fixture(scope="module")
def data(synthetic: Path) -> AnomalyData:
    return load_anomaly("synthetic_tile", 64, root=synthetic)


def exposures(names) -> set[int]:
    return {int(Path(name).name[3]) for name in names}


def test_a_row_learns_under_one_light_and_is_tested_under_the_other(data: AnomalyData) -> None:
    seen = lit(data, LightSettings(learns=(1, 2), tested=(5, 6)), 0)
    assert exposures(seen.train.names) == {1, 2} and exposures(seen.dev.names) <= {1, 2}
    assert exposures(seen.test.names) == {5, 6}
    assert 0 < len(seen.train) < len(data.train) and seen.test.labels.unique().tolist() == [0, 1]
    at = [data.test.names.index(name) for name in seen.test.names]
    for name in ("images", "masks", "labels", "types", "has_mask"):
        assert torch.equal(getattr(seen.test, name), getattr(data.test, name)[at])
    assert seen.test.original_sizes == tuple(data.test.original_sizes[i] for i in at)


def test_other_images_are_refused(data: AnomalyData) -> None:
    with pytest.raises(DataError, match="tells no exposure"):
        under(replace(data.test, names=("part.jpg", *data.test.names[1:])), DARK)
    with pytest.raises(DataError, match=r"no image under the exposures \(9,\)"):
        under(data.test, (9,))
    with pytest.raises(ValueError, match="unknown cure 'lamp'"):
        lit(data, LightSettings(cure="lamp"), 0)


def test_drawn_light_is_monotone_and_an_images_own() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(40, 3, 16, 16)
    found = relit(images, torch.Generator().manual_seed(0))
    ramps = found[:, 0].flatten(1).int()
    assert (ramps.diff(dim=1) >= 0).all() and len({tuple(ramp.tolist()) for ramp in ramps}) == 40
    assert torch.equal(found[:, 0], found[:, 2]) and ramps[:, 0].max() == 0
    means = ramps.float().mean(1)
    assert means.min() < 80 and means.max() > 175  # of 127.5: half and twice as bright occur
    assert torch.equal(found, relit(images, torch.Generator().manual_seed(0)))


def test_normalised_images_do_not_know_their_light() -> None:
    dark = torch.randint(20, 80, (5, 1, 32, 32), generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    bright = 2 * dark + 30
    one, other = (normalised(images.to(torch.uint8)) for images in (dark, bright))
    assert torch.equal(one, other)
    assert one.float().mean() == pytest.approx(110, abs=1) and one[0].float().std() == pytest.approx(40, abs=1)
    assert normalised(torch.full((1, 3, 4, 4), 9, dtype=torch.uint8)).unique().tolist() == [110]


def test_jitter_adds_copies_to_the_training_part_alone(data: AnomalyData) -> None:
    plain, more = (lit(data, LightSettings(cure=cure, learns=(1, 2, 3)), 4) for cure in ("none", "jitter"))
    count = len(plain.train)
    assert len(more.train) == 3 * count == len(more.train.images) == len(more.train.original_sizes)
    assert torch.equal(more.train.images[:count], plain.train.images) and more.train.names == 3 * plain.train.names
    assert not torch.equal(more.train.images[count : 2 * count], more.train.images[2 * count :])
    assert torch.equal(more.dev.images, plain.dev.images) and torch.equal(more.test.images, plain.test.images)


def test_a_row_says_what_its_threshold_finds(synthetic: Path) -> None:
    row = study.STUDY.rows["smoke"]["to_bright_jitter"]
    data = load_anomaly("synthetic_tile", row.settings.size, root=synthetic)
    result = run_light(row.settings, 0, data, quiet())
    scores, labels = result.predictions["scores"], result.predictions["labels"]
    assert exposures(result.predictions["names"]) == {5, 6}
    found = 100 * np.mean(scores[labels == 1] >= result.dev["threshold"])
    assert result.metrics["found"] == pytest.approx(found, abs=1e-3)
    assert {"image_auroc", "aupro", "false_alarms"} <= result.metrics.keys()


def test_rows_are_the_same_in_every_profile_and_differ_in_light_alone() -> None:
    assert len({tuple(study.STUDY.rows[profile]) for profile in ("smoke", "quick", "paper")}) == 1
    rows = {name: row.settings for name, row in study.light_rows("quick").items()}
    assert {settings.of for settings in rows.values()} == {LightSettings().of}
    assert rows["to_bright_same"].learns == rows["to_bright_none"].tested == rows["to_dark_none"].learns
    assert len(set(rows.values())) == len(rows) == 10


@pytest.mark.real_data
def test_exposures_are_light(real_set) -> None:
    """The mean grey level rises with the number in the name."""
    data = load_anomaly("magnetic_tile_grouped", 32, root=real_set("magnetic_tile"))
    means = [float(under(data.train, (number,)).images.float().mean()) for number in range(1, 7)]
    assert all(a + 10 < b for a, b in pairwise(means)) and means[5] > 2 * means[0]
