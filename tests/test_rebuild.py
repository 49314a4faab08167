"""Rows of methods that learn what is normal: trained, evaluated, looked at in parts; what follows from their scores."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import quiet, runs_of

from defectlab import runs
from defectlab.data.anomaly import AnomalyData, load_anomaly
from defectlab.data.pooled import load_pooled
from defectlab.metrics.thresholds import f1_regret, missed_at, normal_threshold
from defectlab.networks.rebuild.base import Normal, at_map_size, crops, over_windows
from defectlab.networks.rebuild.contrast import Contrast, ContrastSettings
from defectlab.runs import Record
from defectlab.studies import rebuild as study
from defectlab.training.rebuild import METHODS, PartSettings, fresh, run_part, run_rebuild, run_rebuild_costs
from defectlab.verdicts.measured import bootstrap_level, value_of

SMOKE = study.STUDY.rows["smoke"]


@pytest.fixture(scope="module")
def data(synthetic: Path) -> dict[str, AnomalyData]:
    names = ("synthetic_fabric", "synthetic_tile", "synthetic_nut")
    return {name: load_anomaly(name, 128, root=synthetic) for name in names}


@pytest.fixture
def run(synthetic: Path, data: dict[str, AnomalyData], monkeypatch: pytest.MonkeyPatch, project: Path):
    """run(settings, seed) -> record, with whatever that row needs run first."""
    monkeypatch.setenv("DEFECTLAB_DATA", str(synthetic))
    monkeypatch.setattr(runs, "project_root", lambda: project)

    def load(settings, device: str) -> AnomalyData:
        return data.get(settings.dataset) or load_pooled(settings.dataset, settings.size, device, synthetic)

    return runs_of(lambda settings: run_part if isinstance(settings, PartSettings) else run_rebuild, load)


# --- What all methods share ------------------------------------------------------------------------------------------


def test_crops_are_the_images_own() -> None:
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8)
    found = crops(images, 5, torch.Generator().manual_seed(0))
    for image, crop in zip(images, found, strict=True):
        y, x = divmod(int(crop[0, 0, 0] - image[0, 0, 0]), 8)
        assert torch.equal(crop, image[:, y : y + 5, x : x + 5])
    assert torch.equal(crops(images, 8, torch.Generator()), images)
    with pytest.raises(ValueError, match="crops of 9 px do not fit"):
        crops(images, 9, torch.Generator())


def test_a_map_of_windows_is_the_mean_over_windows() -> None:
    images = torch.rand(2, 1, 10, 12, generator=torch.Generator().manual_seed(0))
    same = over_windows(images, 4, 3, lambda windows: windows[:, 0])
    assert torch.allclose(same, images[:, 0], atol=1e-6)  # each window gives its own pixels
    total, times = torch.zeros(2, 10, 12), torch.zeros(10, 12)
    for y in (0, 3, 6):
        for x in (0, 3, 6, 8):
            window = images[:, :, y : y + 4, x : x + 4]
            total[:, y : y + 4, x : x + 4] += window.mean((1, 2, 3))[:, None, None]
            times[y : y + 4, x : x + 4] += 1
    means = over_windows(images, 4, 3, lambda w: w.mean((1, 2, 3))[:, None, None].expand(-1, 4, 4), batch=1)
    assert torch.allclose(means, total / times, atol=1e-6)
    assert at_map_size(means).shape == (2, 256, 256)


def test_contrast_is_the_deviation_around_a_pixel() -> None:
    image = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = image.float().mean(1)[0] / 255
    found = Contrast(ContrastSettings(window=17)).maps(image)[0, 100, 50]
    assert found == pytest.approx(float(grey[92:109, 42:59].std(unbiased=False)), abs=1e-4)


# --- Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["contrast_cloth", "ae_ssim_nut", "ganomaly_tile", "draem_cloth", "simplenet_nut"])
def test_a_row_on_synthetic_images(name: str, run, data: dict[str, AnomalyData]) -> None:
    record = run(SMOKE[name].settings)
    test = data[record.dataset].test
    assert {"image_auroc", "pixel_auroc", "aupro", "image_ap", "image_f1_dev"} <= record.metrics.keys()
    assert record.arrays["names"].tolist() == list(test.names) and len(record.arrays["scores"]) == len(test)
    assert bool(record.curve) == (name != "contrast_cloth")
    again = run_rebuild(SMOKE[name].settings, 0, data[record.dataset], quiet())
    assert np.array_equal(again.predictions["scores"], record.arrays["scores"])
    if record.curve:
        other = run_rebuild(SMOKE[name].settings, 1, data[record.dataset], quiet())
        assert not np.array_equal(other.predictions["scores"], record.arrays["scores"])


def test_a_level_is_that_of_the_finished_network(run) -> None:
    whole = run(SMOKE["mscdae_cloth"].settings)
    levels = [run(SMOKE[f"mscdae_cloth_level_{level}"].settings) for level in (1, 2, 3)]
    assert {record.notes["of"] for record in levels} == {whole.key}
    assert len({record.arrays["scores"].tobytes() for record in [whole, *levels]}) == 4
    assert not any(record.curve for record in levels)


def test_one_model_for_all_is_judged_on_each(run) -> None:
    whole = run(SMOKE["sivt"].settings)
    parts = {kind: run(SMOKE[f"sivt_{kind}"].settings) for kind in ("cloth", "tile", "nut")}
    joined = np.concatenate([record.arrays["scores"] for record in parts.values()])
    assert np.allclose(joined, whole.arrays["scores"], atol=1e-5)  # the same scores, set by set
    assert {record.notes["of"] for record in parts.values()} == {whole.key}


def test_efficientad_learns_from_the_row_of_its_teacher(run) -> None:
    record = run(SMOKE["efficientad_nut"].settings)
    assert record.settings["teacher"]["dataset"] == "synthetic_pooled"
    with pytest.raises(RuntimeError, match="teacher"):
        fresh(SMOKE["efficientad_nut"].settings).begin(torch.zeros(2, 3, 128, 128, dtype=torch.uint8))


def test_costs_of_parts_add_up() -> None:
    rows = study.cost_rows("quick")
    whole, backbone, decoder = (
        run_rebuild_costs(rows[name].settings, 0, None, quiet()).costs
        for name in ("cost_sivt", "cost_sivt_backbone", "cost_sivt_decoder")
    )
    assert whole["parameters_m"] == pytest.approx(backbone["parameters_m"] + decoder["parameters_m"], abs=2e-4)
    assert backbone["gflops"] + decoder["gflops"] <= whole["gflops"] < 1.1 * (backbone["gflops"] + decoder["gflops"])


def test_every_method_has_a_row_of_each_set() -> None:
    assert len({tuple(study.STUDY.rows[profile]) for profile in ("smoke", "quick", "paper")}) == 1
    used = {type(row.settings) for row in study.STUDY.rows["quick"].values()}
    assert set(METHODS) <= used and all(issubclass(method, Normal) for method in METHODS.values())
    quick = study.STUDY.rows["quick"]
    assert quick["draem_nut"].settings.size == 128 and quick["draem_cloth"].settings.size == 256
    assert quick["mscdae_tile_level_2"].settings.of == quick["mscdae_tile"].settings
    assert quick["sivt_nut"].settings.of == quick["sivt"].settings
    assert replace(quick["mscdae_nut"].settings, noise=0.0) == quick["mscdae_nut_no_noise"].settings


# --- What follows from scores ----------------------------------------------------------------------------------------


def test_derived_metrics_come_from_the_arrays(run) -> None:
    record: Record = run(SMOKE["contrast_nut"].settings)
    arrays = record.arrays
    threshold = normal_threshold(arrays["dev_scores"][arrays["dev_labels"] == 0], 0.95)
    wanted = f1_regret(arrays["scores"], arrays["labels"], threshold)
    assert value_of(record, "f1_regret") == pytest.approx(wanted) and "f1_regret" not in record.metrics
    assert value_of(record, "missed_at_5") == missed_at(arrays["scores"], arrays["labels"], 0.05)
    found = bootstrap_level([record], "missed_at_5")
    assert found.low <= found.mean <= found.high and found.mean == value_of(record, "missed_at_5")
