"""The check of a GPU, on the CPU and on a pretended one; and what it makes known: memory, hours, how many workers."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import fake_memory
import pytest
import torch
from test_phantom import TESTS, run
from toy_study import call

from defectlab import gpu_check, runs
from defectlab.batch import machines, sizes
from defectlab.studies import STUDIES, study

# shapes that depend on numbers; of "episodes", synthetic tiles are too few for those of the paper's size
NOT_COMPUTED = (
    "torchvision_detector",
    "windows",
    "autoencoder",
    "ganomaly",
    "mscdae",
    "draem",
    "efficientad_teacher",
    "episodes",
)
SOME = "patchcore,second_sensor,sensor_threshold"


def test_without_a_gpu_it_runs_each_kind_on_the_cpu(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(f"gpu-check --device cpu --kinds {SOME}") == 0
    said = capsys.readouterr().out
    assert "| second_sensor | cures net_grey | " in said and "No GPU: images/s, memory and agreement" in said
    assert "| torch | " in said and not (root / "runs").exists()


def test_on_a_gpu_it_compares_measures_and_estimates() -> None:
    done = run(TESTS.parent, str(TESTS / "phantom.py"), "gpu-check", "--device", "cuda", "--kinds", SOME)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line}
    assert float(lines["| second_sensor"][3]) > 0 and "| device | Phantom |" in done.stdout
    assert float(lines["| cures"][1].split()[0]) > 0 and "rows not estimated" in lines["| detector"][1]


def test_a_kind_that_fails_or_differs_is_named_and_the_others_run(monkeypatch, root: Path, capsys) -> None:
    def broken(of, row, *rest):
        if row.settings.model == "sensor_threshold":
            raise RuntimeError("CUDA error: invalid device function\nand more")
        return real(of, row, *rest)

    real = gpu_check.run_row
    monkeypatch.setattr(gpu_check, "run_row", broken)
    assert call(f"gpu-check --device cpu --kinds {SOME}") == 1
    said = capsys.readouterr().out
    assert "sensor_threshold: RuntimeError: CUDA error: invalid device function\n" in said and "patchcore: runs" in said
    assert call("gpu-check --device cpu --kinds nothing") == 1
    assert "unknown kind 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "cpu, gpu, said",
    [
        ((1.0, "fp32"), (1.005, "fp32"), ""),
        ((1.0, "fp32"), (1.02, "fp32"), "loss of the first epoch 1 and 1.02 (tolerance 1%)"),
        ((1.0, "fp32"), (1.04, "tf32"), ""),
        ((1.0, "bf16"), (1.06, "bf16"), "loss of the first epoch 1 and 1.06 (tolerance 5%)"),
        ((1.0, "bf16"), (math.nan, "bf16"), "loss of the first epoch 1 and nan (tolerance 5%)"),
    ],
)
def test_losses_of_cpu_and_gpu_agree_within_a_tolerance(cpu: tuple, gpu: tuple, said: str) -> None:
    records = [SimpleNamespace(curve={"loss": [loss, 9]}, precision=precision) for loss, precision in (cpu, gpu)]
    assert gpu_check.difference(*records) == said


def test_what_trains_nothing_is_compared_by_its_metrics() -> None:
    cpu, near, far = (SimpleNamespace(curve={}, metrics={"aupro": v}, precision="fp32") for v in (70, 70.9, 71.1))
    assert gpu_check.difference(cpu, near) == ""
    assert gpu_check.difference(cpu, far) == "aupro 70.0 and 71.1 (tolerance 1)"
    assert gpu_check.difference(cpu, SimpleNamespace(curve={}, metrics={}, precision="fp32")).startswith(
        "aupro 70.0 and nan"
    )


def test_images_per_second_are_those_of_the_later_epochs() -> None:
    lines = ["starts", *(f"  epoch {k}/4  loss 1.0  {100 * k / (10 + k - 1):.1f} images/s" for k in (1, 2, 3, 4))]
    assert gpu_check.settled(lines) == pytest.approx(100, rel=0.01)  # the first of 10 s, the others of 1 s
    assert math.isnan(gpu_check.settled(lines[:3]))


def test_compiled_forms_of_a_row_are_tried_and_compared() -> None:
    def run(of, name, profile, log):
        settings = of.rows[profile][name].settings
        if settings.compile == "graphs":
            raise RuntimeError("no compiler\nand more")
        for line in ("9 images/s", "50.0 images/s", "50.0 images/s"):
            log(line)
        return SimpleNamespace(curve={"loss": [1.2]}, precision="bf16")

    of = gpu_check.shortened(study("detector"))
    plain = SimpleNamespace(curve={"loss": [1.0]}, precision="bf16")
    found = gpu_check.compiled(of, "v8n", plain, run)
    assert found["graphs"] == "RuntimeError: no compiler" and list(found) == ["inductor", "graphs"]
    assert found["inductor"].endswith(" images/s, loss of the first epoch 1 and 1.2 (tolerance 5%)")
    told = gpu_check.report({}, {"detector": {"row": "detector v8n", "compiled": found}}, True)
    assert '| `"graphs"` | RuntimeError: no compiler |' in told.splitlines()


def test_rows_in_the_papers_size_need_no_real_data_and_end_soon() -> None:
    for name in STUDIES:
        of = study(name)
        for row_name, row in gpu_check.shortened(of).rows["paper"].items():
            paper, settings = of.rows["paper"][row_name].settings, row.settings
            assert settings.dataset == of.rows["smoke"][row_name].settings.dataset
            assert getattr(settings, "epochs", 0) <= gpu_check.EPOCHS
            for field in {"size", "batch"} & {one.name for one in dataclasses.fields(paper)}:
                assert getattr(settings, field) == getattr(paper, field)
            for other, _ in row.needs(settings, 0):
                assert gpu_check.shortened(of).row_with(other, "paper")


def test_hours_and_memory_are_those_that_were_measured(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = study("windows").rows["paper"]["cnn"]
    assert math.isnan(sizes.hours(row, {})) and sizes.peak_gb(row, {}) == 1.05  # of tensors 0.05
    measured = {"windows": {"row": "windows cnn", "gb": 3.5, "images_per_second": 1000.0}}
    assert sizes.hours(row, measured) == pytest.approx(100 * 8192 / 1000 / 3600)
    assert sizes.peak_gb(row, measured) == 3.5 + sizes.CUDA_GB
    other = study("windows").rows["paper"]["lite0"]  # another network: what was measured says nothing of it
    assert math.isnan(sizes.peak_gb(other, measured)) and sizes.measured_of(other, measured) == {}
    assert sizes.hours(study("bsdrd").rows["paper"]["patchcore"], measured) == 0
    assert call("status windows --profile paper --rows cnn") == 0
    assert "hours a seed (computed; for hours: gpu-check)" in capsys.readouterr().out
    sizes.check_path().parent.mkdir()
    sizes.check_path().write_text(json.dumps({"machine": {"device": "a GPU"}, "kinds": measured}))
    assert call("status windows --profile paper --rows cnn") == 0
    said = capsys.readouterr().out.splitlines()
    assert "hours a seed (gpu-check here)" in said[0] and said[1].split()[-2:] == ["4", "0.2"]
    assert call("status windows --profile paper --rows lite0") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["≤15", "?"]


def test_memory_is_computed_for_the_rows_of_paper_that_train_by_steps() -> None:
    """But where the shapes of a step depend on numbers."""
    computed = sizes.computed_gb()
    for name in STUDIES:
        for row_name in fake_memory.computable(gpu_check.shortened(study(name))):
            row = study(name).rows["paper"][row_name]
            if row.settings.model not in NOT_COMPUTED:
                assert 0 < computed[runs.row_identity(row.settings, "paper")] < 24, (name, row_name)
    teacher = study("yolo_dcf").rows["paper"]["teacher"]
    assert 18 < sizes.bound_gb(teacher, {}) < 24  # README names a GPU of 24 GB
    patchcore = study("bsdrd").rows["paper"]["patchcore"]
    assert math.isnan(sizes.peak_gb(patchcore, {})) and sizes.bound_gb(patchcore, {}) == 15


def test_computed_memory_is_what_the_tensors_of_two_steps_take(tmp_path: Path) -> None:
    """By hand for one layer; and a row as the file has it."""
    layer, optimizer = torch.nn.Linear(256, 256, bias=False), None
    optimizer = torch.optim.Adam(layer.parameters())

    def draw(indices, generator, epoch):
        return images[indices]

    def step(batch):
        return {"loss": layer(batch).sum()}

    images, settings = torch.zeros(10, 256), SimpleNamespace(batch=4)
    with pytest.raises(fake_memory.Measured) as end:
        fake_memory.measuring(1000)(layer, draw, step, 10, settings, 0, None, optimizer, None)
    weight, batch = 4 * 256 * 256, 4 * 4 * 256
    steps = 5 * weight  # gradient, two moments, and what an Adam that is not fused needs on the way: two more
    assert end.value.args[0] == pytest.approx(weight + 1000 * 4 * 256 + batch + steps, rel=0.02)
    kept = json.loads(sizes.memory_path().read_text())["bsdrd"]["bsdrd"]
    of = gpu_check.shortened(study("bsdrd"))
    images_there = sizes.images_an_epoch(study("bsdrd").rows["paper"]["bsdrd"].settings)
    found = fake_memory.peak_bytes(of, of.rows["paper"]["bsdrd"], images_there, tmp_path)
    assert found / 2**30 == pytest.approx(kept["gb"], rel=0.05)


@pytest.mark.parametrize(
    "peak, mode, workers, said",
    [
        (0, "Default", 8, ""),
        (20, "Default", 8, ""),
        (30, "Default", 4, "4 workers in place of 8: a row needs up to 30 GB of 80"),
        (100, "Default", 2, "2 workers in place of 8: a row needs up to 100 GB of 80"),
        (
            20,
            "Exclusive_Process",
            2,
            "2 workers in place of 8: the cards are in exclusive compute mode, one process each",
        ),
    ],
)
def test_workers_that_share_a_card_fit_on_it(monkeypatch, peak: float, mode: str, workers: int, said: str) -> None:
    monkeypatch.setattr(machines, "cards_of", lambda device: ["0", "1"])
    card = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(machines.torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(machines.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=f"{mode}\n{mode}\n"))
    lines: list[str] = []
    assert machines.fitting(8, "cuda", peak, lines.append) == workers
    assert lines == [said] * bool(said)
