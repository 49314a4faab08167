"""YOLO-DCF's rows as they are run: which there are, teacher before student, robustness of what a row has trained."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy_detection import toy_data
from toy_runs import quiet, recorded, runs_of

from defectlab import runs
from defectlab.data.detection import DetectionData
from defectlab.metrics.robustness import KEPT, robustness_statistic, summary
from defectlab.networks.yolo.model import build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.papers import yolo_dcf
from defectlab.papers.yolo_dcf import teacher_settings
from defectlab.runs import Record, Result
from defectlab.studies.yolo_dcf import STUDY
from defectlab.training import robustness
from defectlab.training.detection import run_detector
from defectlab.training.robustness import RobustnessSettings, run_robustness
from defectlab.training.yolo_dcf import run_yolo_dcf

TINY = {
    "dataset": "toy", "scale": "t", "size": 64, "epochs": 1, "batch": 4, "warm_up": 0.0, "close_mosaic": 0,
    "average_ramp": 1.0, "learning_rate": 0.001, "precision": "fp32",
}  # fmt: skip
STUDENT = yolo_dcf.Settings(**TINY, teacher_scale="n", relation=20.0, channel=1.0)
MODULES = yolo_dcf.Settings(**TINY)


# --- Rows ------------------------------------------------------------------------------------------------------------

STEEL = ["baseline", "fusion", "block", "modules", "relation", "channel", "yolo_dcf", "teacher", "se", "cbam"]
BOARD = ["pcb_baseline", "pcb_modules", "pcb_yolo_dcf", "pcb_teacher"]


def differing(first: DetectorSettings, second: DetectorSettings) -> set[str]:
    one, other = asdict(first), asdict(second)
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


@pytest.mark.parametrize("profile", runs.PROFILES)
def test_rows(profile: str) -> None:
    assert list(STUDY.rows[profile]) == [*STEEL, *BOARD, "baseline_robustness", "yolo_dcf_robustness"]
    assert all(row.seeds >= 1 for row in STUDY.rows[profile].values())
    rows = {name: row.settings for name, row in STUDY.rows[profile].items()}
    for prefix in ("", "pcb_"):
        whole, modules, teacher = (rows[prefix + name] for name in ("yolo_dcf", "modules", "teacher"))
        assert differing(whole, modules) == {"teacher_scale", "relation", "channel"}
        assert teacher_settings(whole) == teacher
        assert differing(teacher, modules) == (set() if profile == "smoke" else {"scale"})
    for name, whole, change in (
        ("relation", "yolo_dcf", {"channel": 0}),
        ("channel", "yolo_dcf", {"relation": 0}),
        ("fusion", "modules", {"block": "plain"}),
        ("block", "modules", {"fusion": "concat"}),
        ("se", "fusion", {"fusion": "se"}),
        ("cbam", "fusion", {"fusion": "cbam"}),
    ):
        assert rows[name] == replace(rows[whole], **change) != rows[whole]
    own = {"fusion", "block", "teacher_scale", "teacher_seed", "relation", "channel", "temperature", "grid"}
    assert differing(rows["baseline"], rows["modules"]) <= own
    assert rows["baseline_robustness"].of == rows["baseline"] and rows["yolo_dcf_robustness"].of == rows["yolo_dcf"]


def test_a_student_learns_from_its_own_kind() -> None:
    teacher = teacher_settings(STUDENT)
    assert teacher == replace(STUDENT, scale="n", teacher_scale="", relation=0.0, channel=0.0)


# --- Running ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Record]:
    """run(settings, seed) -> record, in a project of this file's own, on the toy set."""
    monkeypatch.setattr(runs, "project_root", lambda: project)
    monkeypatch.setattr(robustness, "load_images", lambda dataset, part, size, device: toy_data(size).test.images)
    monkeypatch.setattr("defectlab.training.detection.COST_SIZE", 64)

    def run_of(settings: object) -> Callable[..., Result]:
        if isinstance(settings, RobustnessSettings):
            return partial(run_robustness, build=yolo_dcf.build)
        return run_yolo_dcf if isinstance(settings, yolo_dcf.Settings) else run_detector

    return runs_of(run_of, lambda settings, device: toy_data(settings.size))


def test_the_teacher_is_trained_first_and_once(run: Callable[..., Record], project: Path) -> None:
    student = run(STUDENT, 1)
    found = recorded(project)
    (key,) = set(found) - {student.key}
    teacher, path = found[key], project / "runs" / "smoke" / f"{key}.json"
    assert (teacher["seed"], teacher["settings"]["scale"]) == (0, "n")
    assert teacher["settings"] | {"scale": "t"} == asdict(MODULES)
    assert student.notes == {"teacher": key, "teacher_sha256": teacher["model_sha256"]}
    assert {"relation", "channel"} < set(student.curve) and not {"relation", "channel"} & set(teacher["curve"])
    before = path.stat().st_mtime_ns
    assert run(STUDENT, 2).notes == student.notes
    assert path.stat().st_mtime_ns == before


def test_nothing_of_the_distillation_is_deployed(run: Callable[..., Record]) -> None:
    student, modules, plain = run(STUDENT, 1), run(MODULES, 1), run(DetectorSettings(**TINY))
    files = (load_file(record.path.with_suffix(".safetensors")) for record in (student, modules))
    first, second = ({name: value.shape for name, value in tensors.items()} for tensors in files)
    assert first == second
    for cost in ("parameters_m", "gflops", "size_mb"):
        assert student.costs[cost] == modules.costs[cost] > 0
    assert "notes" not in modules.content
    assert student.curve["loss"] != modules.curve["loss"]
    averages = {"map50", "map50_95", "map33", "f1_oracle"}
    assert averages <= set(student.metrics) <= averages | {"precision_dev", "recall_dev", "f1_dev"}
    assert plain.model == "detector"
    assert set(plain.curve) == {"loss", "box", "cls", "dfl", "probe_epoch", "dev_map50", "dev_map50_95"}


def test_robustness_looks_at_the_network_of_another_row(run: Callable[..., Record], project: Path) -> None:
    modules = run(MODULES, 1)
    before = set(recorded(project))
    record = run(RobustnessSettings(of=MODULES, blur=(3,), noise=(10, 30)), 1)
    assert set(recorded(project)) == before | {record.key}  # nothing was trained
    assert record.notes == {"of": modules.key, "of_sha256": modules.model_sha256}
    assert {"map50_blur_0", "map50_blur_1", "map50_noise_0", "map50_noise_2", "map50_blur"} <= set(record.metrics)
    assert record.metrics["map50_blur_0"] == record.metrics["map50_noise_0"] == modules.metrics["map50"]
    assert not record.path.with_suffix(".safetensors").exists()


def test_weights_missing_beside_their_record_are_named(run: Callable[..., Record]) -> None:
    """As after copying records without weights from another machine."""
    record = run(MODULES, 6)
    weights = record.path.with_suffix(".safetensors")
    weights.unlink()
    with pytest.raises(ValueError, match=r"is missing beside its record: delete .* and run that row again") as caught:
        run(RobustnessSettings(of=MODULES), 6)
    assert str(weights) in str(caught.value) and str(record.path) in str(caught.value)


# --- Robustness ------------------------------------------------------------------------------------------------------


def test_summary_by_hand() -> None:
    assert summary("blur", [80.0, 60, 40, 20]) == {"map50_blur": 40.0, "kept_blur": 50.0}
    assert summary("noise", [0.0, 10]) == pytest.approx({"map50_noise": 10, "kept_noise": np.nan}, nan_ok=True)
    with pytest.raises(ValueError, match="no robustness metric is called 'map50_rain': use map50_ or kept_ with blur"):
        robustness_statistic({}, "map50_rain")


def guesses(seen: list[Tensor], false_boxes: int) -> Callable[..., list[dict[str, Tensor]]]:
    """In place of `predict`: the ground truth moved the farther, the later the call, among false boxes."""

    def predict(detector, split, images):
        generator = torch.Generator().manual_seed(len(seen))
        seen.append(images)
        found = []
        for truth in split.ground_truth():
            count = len(truth["labels"])
            moved = truth["boxes"] + len(seen) / 2 * torch.randn(count, 2, generator=generator).repeat(1, 2)
            corners = torch.rand(false_boxes, 2, generator=generator) * 60
            scores = torch.rand(count + false_boxes, generator=generator)
            scores[:count] = 0.5 + scores[:count] / 2
            false = torch.randint(0, 2, (false_boxes,), generator=generator)
            boxes = torch.cat([moved, torch.cat([corners, corners + 20], 1)])
            columns = {"boxes": boxes, "scores": scores, "labels": torch.cat([truth["labels"], false])}
            order = scores.argsort(descending=True)
            found.append({name: values[order] for name, values in columns.items()})
        return found

    return predict


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> tuple[Result, list[Tensor], DetectionData]:
    """What a row of 40 images of 96 px gives, looked at with 64 px."""
    data, seen = toy_data(96, (2, 2, 40)), []
    small = replace(data, test=replace(data.test, images=data.test.images[..., :64, :64]))
    monkeypatch.setattr(robustness, "load_images", lambda dataset, part, size, device: data.test.images)
    monkeypatch.setattr(robustness, "frozen", lambda record, detector, device: detector)
    monkeypatch.setattr(robustness, "predict", guesses(seen, false_boxes=30))
    context = quiet(require=lambda settings, seed: SimpleNamespace(key="k", model_sha256="h"))
    settings = RobustnessSettings(of=DetectorSettings(**TINY))
    return run_robustness(settings, 0, small, context, build_detector), seen, data


def test_images_are_corrupted_at_their_own_size(looked_at: tuple) -> None:
    result, seen, _ = looked_at
    assert len(seen) == 11  # clean and five strengths of either kind
    assert all(images.shape == (40, 1, 64, 64) and images.dtype == torch.uint8 for images in seen)
    contrast = [float(images.float().std()) for images in seen[:6]]
    assert contrast == sorted(contrast, reverse=True)
    for images, strength in zip(seen[6:], (5, 10, 20, 30, 40), strict=True):  # shrinking by 1.5 averages some of it
        deviation = float((images.float() - seen[0].float()).std())
        assert 0.4 * strength < deviation < 0.5 * strength
    expected = {f"map50_{kind}_{step}" for kind in ("blur", "noise") for step in range(6)}
    assert set(result.metrics) == expected | {"map50_blur", "kept_blur", "map50_noise", "kept_noise"}
    for kind in ("blur", "noise"):
        values = [result.metrics[f"map50_{kind}_{step}"] for step in range(6)]
        assert result.metrics[f"map50_{kind}"] == pytest.approx(sum(values[1:]) / 5, abs=1e-3)
        assert result.metrics[f"kept_{kind}"] == pytest.approx(20 * sum(values[1:]) / values[0], rel=1e-3)
    assert 90 > result.metrics["map50_blur_0"] > result.metrics["map50_blur_5"] > 1


@pytest.mark.parametrize("metric", ["map50_blur", "kept_blur", "map50_noise", "kept_noise"])
def test_the_statistic_from_a_record_equals_the_metric(looked_at: tuple, metric: str) -> None:
    result, _, _ = looked_at
    assert result.predictions["blur_1_counts"].max() < KEPT
    value = robustness_statistic(result.predictions, metric)
    assert value(np.ones(40)) == pytest.approx(result.metrics[metric], abs=0.01)
    first, second = np.repeat([1, 0], 20), np.repeat([0, 1], 20)
    assert value(first) != value(second)
    assert value(3 * first) == pytest.approx(value(first))
