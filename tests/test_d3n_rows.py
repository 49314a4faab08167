"""D3N as it is run: its rows, stages before detectors, latents that follow the augmentation, a student at no cost."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_detection import SHORT, toy_data
from toy_diffusion import TOY
from toy_runs import recorded, runs_of

from defectlab import runs
from defectlab.data.augment import Augmentation, augment
from defectlab.data.instances import InstanceData
from defectlab.files import DataError
from defectlab.geometry import warp
from defectlab.networks.yolo.model import build_detector
from defectlab.papers.d3n import hybrid
from defectlab.papers.d3n.resvae import CompressionSettings, build_compressor, feature_shapes
from defectlab.runs import Record
from defectlab.studies import d3n
from defectlab.training.d3n import check_recipe, with_latents
from defectlab.training.detection import deployed_costs, fresh

DIFFUSION = replace(TOY, channels=(8, 8, 16), epochs=1, average=0.5)
COMPRESSION = CompressionSettings(dataset="toy", ddpm=DIFFUSION, epochs=1, batch=4, precision="fp32")
BASELINE = replace(
    SHORT, family="v5", epochs=1, warm_up=0.0, close_mosaic=0, mosaic=0.0, average_ramp=1.0, learning_rate=0.001
)
HYBRID = d3n.hybrid_of(BASELINE, COMPRESSION)
STUDENT = d3n.student_of(HYBRID)


def settings_of(profile: str) -> dict[str, Any]:
    return {name: row.settings for name, row in d3n.STUDY.rows[profile].items()}


def differing(first: object, second: object) -> set[str]:
    one, other = asdict(first), asdict(second)
    return {name for name in one.keys() & other.keys() if one[name] != other[name]}


@pytest.mark.parametrize("profile", runs.PROFILES)
def test_hybrid_student_and_baseline_share_one_recipe_without_mosaic(profile: str) -> None:
    rows = settings_of(profile)
    for prefix in ("", "pcb_"):
        baseline, whole, student = (rows[prefix + name] for name in ("baseline", "hybrid", "student"))
        assert not differing(baseline, whole) and not differing(baseline, student)
        assert (baseline.mosaic, baseline.family) == (0.0, "v5")
        assert student.teacher == whole and whole.compression == rows[prefix + "resvae"]
        assert whole.compression.ddpm == rows[prefix + "ddpm"]
    assert differing(rows["baseline"], rows["baseline_mosaic"]) <= {"mosaic", "close_mosaic"}
    assert rows["baseline_mosaic"].mosaic == 1.0
    assert rows["student_300"].epochs == rows["baseline_300"].epochs == 3 * rows["student"].epochs
    assert rows["student_300"].teacher == rows["student"].teacher  # the teacher stays the one of Table I
    whole = rows["hybrid"]
    longer = replace(whole, compression=replace(whole.compression, epochs=1 + whole.compression.epochs))
    assert runs.row_identity(longer, profile) != runs.row_identity(whole, profile)  # stages belong to the key


@pytest.mark.parametrize("profile", runs.PROFILES)
def test_ablation_rows_change_what_their_name_says(profile: str) -> None:
    rows = settings_of(profile)
    switches = ("dual", "weighted", "residual", "norm")
    for name, ticks in (  # of Table I, from the top
        ("fusion_cross", (False, False, False, False)),
        ("fusion_dual", (True, False, False, False)),
        ("fusion_dual_weighted", (True, True, False, False)),
        ("fusion_weighted_residual", (False, True, True, False)),
        ("fusion_dual_weighted_residual", (True, True, True, False)),
        ("hybrid", (True, True, True, True)),
    ):
        assert tuple(getattr(rows[name], switch) for switch in switches) == ticks
    for name in ("concat", "sum", "weighted_sum"):  # Table II
        assert differing(rows[f"fusion_{name}"], rows["hybrid"]) == {"fuse"}
    for method in ("pca", "resvae"):  # Table III
        row = rows[f"plain_{method}"]
        assert (row.fuse, row.noise_filter, row.compression) == ("sum", False, rows[method])
        assert row.compression.method == method
    assert differing(rows["student_bce"], rows["student"]) == {"distance"}
    for switch in ("printed_scale", "positional"):
        assert differing(rows[f"fusion_{switch}"], rows["hybrid"]) == {switch}


def test_planned_seeds() -> None:
    quick, paper = ({n: row.seeds for n, row in d3n.STUDY.rows[profile].items()} for profile in ("quick", "paper"))
    assert paper["baseline"] == paper["hybrid"] == paper["student"] == 5
    assert paper["ddpm"] == quick["ddpm"] == 1
    assert all(quick[row] for row in ("resvae", "pca", "baseline", "fusion_weighted_sum", "hybrid", "student"))
    assert not any(quick[row] for row in ("faster_rcnn", "retinanet", "ssd", "fcos", "student_300", "pcb_student"))


class Seen(torch.nn.Module):
    """In place of the fusion: keeps the features that it is given."""

    def forward(self, maps: list[Tensor], features: list[Tensor]) -> list[Tensor]:
        self.features = features
        return list(maps)


@pytest.mark.parametrize("name", ["student", "resvae", "multitask_student"])
def test_a_row_shows_the_sample_where_the_set_is_not_here(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("DEFECTLAB_DATA", str(tmp_path))
    row = d3n.STUDY.rows[runs.RECORDED][name]
    data = row.load(row.settings, "cpu")
    assert "sample of" in data.label and isinstance(data, InstanceData) == name.startswith("multitask")


def test_features_follow_the_image() -> None:
    """An image, and features that are the image itself, stay one image under flips and scale."""
    data = toy_data(64)
    split = data.train
    latents = [torch.nn.functional.avg_pool2d(split.images.float() / 255, 64 // side) for side in (64, 32, 16)]
    compressor = build_compressor(replace(COMPRESSION, method="none"), [(1, 64, 64), (1, 32, 32), (1, 16, 16)])
    network = hybrid.HybridDetector(fresh(build_detector, BASELINE, data), compressor, Seen()).eval()
    recipe = Augmentation(mosaic=0.0, brightness=0.0, flip_left_right=0.5, flip_up_down=0.5)
    generator = torch.Generator().manual_seed(3)
    batch = augment(split.images, split.boxes, split.labels, torch.tensor([5, 2, 7, 0]), recipe, generator)
    with_latents(network, latents)(batch)
    images, moved = batch.images, network.fusion.features
    signs = batch.matrices[:, 0, [0, 1], [0, 1]].sign()
    assert len(signs.unique(dim=0)) > 1  # some were flipped, some not
    inside = warp(torch.ones(4, 1, 64, 64), batch.matrices[:, 0], 64) > 0.999
    torch.testing.assert_close(moved[0][inside], images[:, :1][inside], atol=0.01, rtol=0)
    for level, side in zip(moved[1:], (32, 16), strict=True):
        small = torch.nn.functional.avg_pool2d(moved[0], 64 // side)
        whole = torch.nn.functional.avg_pool2d(inside.float(), 64 // side) == 1
        assert (level - small)[whole].abs().mean() < 0.03 < (level.flip(3) - small)[whole].abs().mean()


def test_a_recipe_that_mixes_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mosaic 0\.5.*needs it at 0"):
        check_recipe(replace(HYBRID, mosaic=0.5))


def test_the_hybrid_reads_its_latents_and_its_compressor_is_fixed() -> None:
    torch.manual_seed(0)
    compressor = build_compressor(COMPRESSION, feature_shapes(COMPRESSION))
    images = torch.rand(2, 3, 64, 64)
    latents = compressor.encode([torch.randn(2, c, 16 >> k, 16 >> k) for k, c in enumerate((8, 8, 16))])
    network = hybrid.build_hybrid(HYBRID, fresh(build_detector, HYBRID, toy_data(64)), compressor).train()
    assert network.training and network.detector.training and not network.compressor.training
    raw = network(images, *latents)
    assert [tuple(level.shape) for level in raw] == [(2, 21, 8, 8), (2, 21, 4, 4), (2, 21, 2, 2)]
    sum(level.sum() for level in raw).backward()
    assert all(p.grad is None and not p.requires_grad for p in network.compressor.parameters())
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert all(name.startswith(("detector.", "fusion.")) for name in trained)
    network.eval()
    assert not torch.equal(network(images, *latents)[0], network(images, *(z.flip(0) for z in latents))[0])


def test_the_student_costs_what_the_baseline_costs() -> None:
    data = toy_data(64)
    baseline, student = (fresh(build_detector, settings, data) for settings in (BASELINE, STUDENT))
    assert baseline.state_dict().keys() == student.state_dict().keys()
    costs = [deployed_costs(network, 64) for network in (baseline, student)]
    for name in ("parameters_m", "gflops", "size_mb"):
        assert costs[0][name] == costs[1][name] > 0


@pytest.fixture
def run(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Record]:
    """run(settings, seed) -> record, in a project of this file's own, on the toy set."""
    monkeypatch.setattr(runs, "project_root", lambda: project)
    monkeypatch.setattr("defectlab.training.detection.COST_SIZE", 64)
    monkeypatch.setattr("defectlab.training.d3n.COST_SIZE", 64)

    def load(settings: object, device: str) -> object:
        return toy_data(settings.ddpm.size if isinstance(settings, CompressionSettings) else settings.size)

    return runs_of(lambda settings: d3n.KINDS[type(settings)][0], load)


def test_a_student_has_all_its_stages_run_first_and_once(run: Callable[..., Record], project: Path) -> None:
    student = run(STUDENT, 1)
    found = recorded(project)
    by_model = {record["model"]: record for record in found.values()}
    assert set(by_model) == {"ddpm", "d3n_compression", "d3n_hybrid", "d3n_student"} and len(found) == 4
    assert (by_model["d3n_hybrid"]["seed"], by_model["ddpm"]["seed"]) == (1, 0)  # a student's own teacher, one DDPM
    assert student.notes["teacher_sha256"] == by_model["d3n_hybrid"]["model_sha256"]
    assert student.notes["compressor_sha256"] == by_model["d3n_compression"]["model_sha256"]
    assert {"distill_obj", "distill_cls", "distill_box"} < set(student.curve)
    shares = by_model["d3n_hybrid"]["curve"]
    for point in zip(shares["weight_det"], shares["weight_ddpm"], shares["weight_cross"], strict=True):
        assert sum(point) == pytest.approx(1, abs=0.001)
    for cost in ("parameters_m", "gflops"):
        assert by_model["d3n_hybrid"]["costs"][cost] > student.costs[cost]
    assert by_model["d3n_compression"]["costs"]["latents_mb"] < by_model["d3n_compression"]["costs"]["features_mb"]
    before = {path: path.stat().st_mtime_ns for path in (project / "runs" / "smoke").glob("*.json")}
    run(replace(STUDENT, transfer=0.5), 1)
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert len(recorded(project)) == len(before) + 1


def test_stages_that_do_not_belong_together_are_refused(run: Callable[..., Record], project: Path) -> None:
    run(HYBRID, 0)
    (compressor,) = (project / "runs" / "smoke").glob("d3n_compression-*.json")
    content = json.loads(compressor.read_text())
    altered = content | {"notes": content["notes"] | {"ddpm_sha256": "another"}}
    try:
        compressor.write_text(json.dumps(altered))
        with pytest.raises(DataError, match=r"was made from another diffusion model than .*: delete it"):
            run(replace(HYBRID, epochs=2), 0)
    finally:
        compressor.write_text(json.dumps(content))


def test_the_repositories_hold_training_images_alone(run: Callable[..., Record], project: Path) -> None:
    run(HYBRID)
    indices = sorted((project / "runs" / "smoke" / "features").glob("*/index.json"))
    assert len(indices) == 2  # features, and latents
    data = toy_data(16)
    for path in indices:
        text = path.read_text()
        assert all(name in text for name in data.train.names)
        assert not any(f'"{name}"' in text for name in (*data.dev.names, *data.test.names))


def test_two_seeds_of_a_hybrid_differ_and_one_agrees_with_itself(run: Callable[..., Record]) -> None:
    first, second = run(HYBRID, 0), run(HYBRID, 1)
    assert first.curve["loss"] != second.curve["loss"]
    first.path.unlink()
    assert run(HYBRID, 0).curve["loss"] == first.curve["loss"]
