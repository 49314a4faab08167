"""Training a detector: schedule, decay and moving average by hand, the loop, resuming to the last bit."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch
from torch import Tensor, nn
from toy_detection import SHORT, equal, fit, toy_data, toy_split
from toy_runs import one_sitting, quiet

from defectlab.data.augment import augment
from defectlab.networks.yolo.blocks import ConvBlock
from defectlab.networks.yolo.model import Detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.runs import Context, OutOfTime
from defectlab.training import recipe as training
from defectlab.training.loop import MovingAverage
from defectlab.training.recipe import learning_rate, make_optimizer, train_detector


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums in the order of one thread, so that equal trainings are equal to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- Schedule, optimiser, average ------------------------------------------------------------------------------------

HAND = DetectorSettings(epochs=10, learning_rate=0.2, final_rate=0.1, warm_up=2.0)  # of 4 steps an epoch: 40 steps


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        # both alike: the first of 8 steps of warm-up, the middle, the end
        *((name, *known) for name in ("cosine", "linear") for known in ((0, 0.2 / 8), (20, 0.2 * 0.55), (40, 0.02))),
        ("cosine", 10, 0.2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)),
        ("cosine", 39, 0.2 * (0.1 + 0.9 * 0.0015413)),
        ("linear", 3, 0.2 / 2 * (0.1 + 0.9 * 37 / 40)),
        ("linear", 7, 0.2 * (0.1 + 0.9 * 33 / 40)),  # the warm-up ends
        ("linear", 39, 0.2 * (0.1 + 0.9 / 40)),
    ],
)
def test_learning_rate_by_hand(schedule: str, step: int, expected: float) -> None:
    assert learning_rate(step, 4, replace(HAND, schedule=schedule)) == pytest.approx(expected, rel=1e-5)


def test_learning_rate_without_warm_up_and_what_is_unknown() -> None:
    assert learning_rate(0, 4, replace(HAND, warm_up=0.0)) == 0.2
    with pytest.raises(ValueError, match="unknown schedule 'step': use cosine or linear"):
        learning_rate(0, 4, replace(HAND, schedule="step"))
    with pytest.raises(ValueError, match="unknown optimizer 'adam': use sgd or adamw"):
        make_optimizer(nn.Linear(2, 2), replace(SHORT, optimizer="adam"))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("family", ["v8", "v5"])
def test_norms_and_biases_do_not_decay(name: str, family: str) -> None:
    detector = Detector(family, "t", 2)
    optimizer = make_optimizer(detector, replace(SHORT, optimizer=name))
    decaying, others = optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.0005, 0.0)
    kernels = {id(m.weight) for m in detector.modules() if isinstance(m, nn.Conv2d)}
    assert {id(p) for p in decaying["params"]} == kernels
    assert {id(p) for p in others["params"]} == {id(p) for p in detector.parameters()} - kernels
    frozen = make_optimizer(nn.Conv2d(2, 2, 1).requires_grad_(False), replace(SHORT, optimizer=name))
    assert [group["params"] for group in frozen.param_groups] == [[], []]
    if name == "sgd":
        assert decaying["nesterov"] and decaying["momentum"] == 0.937
    else:
        assert decaying["betas"] == (0.937, 0.999)


@pytest.mark.parametrize("counted", [0, 1])
def test_moving_average_against_the_slow_formula(counted: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    average = MovingAverage(model, 0.9, 4.0, counted)
    expected = {name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}
    for step in range(6):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value))
            model(torch.randn(4, 2, 5, 5))  # moves the running statistics
        average.update(step + 1)
        decay = 0.9 * (1 - math.exp(-(step + 1 + counted) / 4))
        for name in expected:
            expected[name] = decay * expected[name] + (1 - decay) * model.state_dict()[name].double()
    found = average.model.state_dict()
    torch.testing.assert_close({name: found[name].double() for name in expected}, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["1.running_mean"], torch.zeros(3))
    assert not average.model.training and model.training
    assert not any(p.requires_grad for p in average.model.parameters())


# --- The loop --------------------------------------------------------------------------------------------------------


def test_every_step_has_its_rate_and_a_clipped_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, norms = [], []

    def note(optimizer: torch.optim.Optimizer, arguments: tuple, options: dict) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        rates.append(optimizer.param_groups[1]["lr"])
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    def watched(*arguments) -> torch.optim.Optimizer:
        optimizer = make_optimizer(*arguments)
        optimizer.register_step_pre_hook(note)
        return optimizer

    monkeypatch.setattr(training, "make_optimizer", watched)
    settings = replace(SHORT, clip=0.5)
    fit(settings, toy_data())
    assert rates == [learning_rate(step, 2, settings) for step in range(8)]
    assert 0.49 < max(norms) <= 0.5 * 1.001


def test_mosaic_is_closed_for_the_last_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Mock(side_effect=augment)
    monkeypatch.setattr(training, "augment", watched)
    fit(replace(SHORT, mosaic=0.7, close_mosaic=2), toy_data())
    recipes = [call.args[4] for call in watched.call_args_list]
    assert [(recipe.mosaic, recipe.scale) for recipe in recipes] == [(0.7, 0.5)] * 4 + [(0.0, 0.5)] * 4


def test_the_seed_decides_everything() -> None:
    data = toy_data()
    (first, average, trained), (again, same, repeated), (other, _, others) = (fit(SHORT, data, s) for s in (1, 1, 2))
    assert equal(first, again) and equal(average, same)
    assert trained.curve == repeated.curve
    assert not equal(first, other)
    assert trained.curve["loss"] != others.curve["loss"]
    assert all(len(values) == 4 for values in trained.curve.values())
    assert set(trained.curve) == {"loss", "box", "cls", "dfl"}
    assert not average.training and not equal(average, first)


@pytest.mark.parametrize("separate", [False, True])
def test_order_and_augmentation_share_a_stream_as_in_records(monkeypatch: pytest.MonkeyPatch, separate: bool) -> None:
    """What is drawn for the augmentation starts where the order's does (records rest on it), or from a seed apart."""
    drawn: dict[int, Tensor] = {}

    def watched(images, boxes, labels, indices, recipe, generator):
        drawn.setdefault(generator.initial_seed(), torch.rand(4, generator=generator.clone_state()))
        return augment(images, boxes, labels, indices, recipe, generator)

    monkeypatch.setattr(training, "augment", watched)
    _, _, trained = fit(replace(SHORT, separate_streams=separate), toy_data(), seed=1)
    orders = {seed: torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in range(100_003, 100_007)}
    shared = {seed for seed, values in drawn.items() if any(torch.equal(values, first) for first in orders.values())}
    assert len(drawn) == 4
    assert shared == (set() if separate else set(orders))
    assert (trained.curve == fit(SHORT, toy_data(), seed=1)[2].curve) is not separate


def test_probe_sees_the_average_and_enters_the_curve() -> None:
    probe = Mock(side_effect=[{"dev": 1.0}, {"dev": 2.0}, {"dev": 3.0}])
    _, average, trained = fit(replace(SHORT, epochs=3), toy_data(), probe=probe)
    assert trained.curve["probe_epoch"] == [1, 2, 3] and trained.curve["dev"] == [1.0, 2.0, 3.0]
    assert probe.call_args_list == [call(average)] * 3


# --- Interrupted trainings -------------------------------------------------------------------------------------------


def in_sittings(path: Path, sit: Callable[[Context], tuple]) -> tuple[tuple, int]:
    """What `sit` gives at last, each sitting being stopped after an epoch -> (it, sittings that were stopped)."""
    stopped = 0
    while True:
        try:
            return sit(one_sitting(path)), stopped
        except OutOfTime as error:
            stopped += 1
            assert f"after epoch {stopped} of 4; run again to go on" in str(error)


@pytest.mark.parametrize(("optimizer", "family"), [("sgd", "v8"), ("adamw", "v8"), ("sgd", "v5")])
def test_an_interrupted_training_ends_as_if_it_were_not(tmp_path: Path, optimizer: str, family: str) -> None:
    data, settings = toy_data(), replace(SHORT, optimizer=optimizer, family=family, learning_rate=0.002)

    def probe(model: Detector) -> dict[str, float]:
        return {"norm": float(sum(p.double().square().sum() for p in model.parameters()))}

    whole, started = fit(settings, data, probe=probe), iter(range(4))

    def sit(context: Context) -> tuple:  # the checkpoint has to bring the weights: each sitting begins with others
        return fit(settings, data, context=context, probe=probe, initial=next(started))

    parts, stopped = in_sittings(tmp_path / "half.safetensors", sit)
    assert stopped == 3
    assert equal(whole[0], parts[0]) and equal(whole[1], parts[1])
    assert whole[2].curve == parts[2].curve
    assert len(parts[2].curve["probe_epoch"]) == 4


def test_further_weights_of_the_loss_are_trained_and_resumed(tmp_path: Path) -> None:
    split, settings = toy_split(8, 0, 32), replace(SHORT, optimizer="adamw")

    def sit(context: Context) -> tuple[nn.Module, nn.Module, nn.Module]:
        torch.manual_seed(0)
        model, adapter = nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
        start = [p.detach().clone() for p in adapter.parameters()]
        average, _ = train_detector(
            model, lambda batch: {"loss": (adapter(model(batch.images.mean((2, 3)))) - 1).square().mean()},
            split, settings, 0, context, adapter,
        )  # fmt: skip
        assert not any(torch.equal(p, old) for p, old in zip(adapter.parameters(), start, strict=True))
        return model, average, adapter

    whole = sit(quiet())
    parts, stopped = in_sittings(tmp_path / "half.safetensors", sit)
    assert stopped == 3
    assert all(equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert set(whole[1].state_dict()) == {"weight", "bias"}  # nothing of the adapter


# --- Compiled parts --------------------------------------------------------------------------------------------------


def test_compile_is_for_gpus() -> None:
    asked = replace(SHORT, compile="graphs")
    assert training.compile_of(asked, torch.device("cuda", 1)) == "graphs"
    assert training.compile_of(asked, torch.device("cpu")) == "" == training.compile_of(SHORT, torch.device("cuda"))
    with pytest.raises(ValueError, match="unknown compile 'jit': use inductor, graphs or nothing"):
        training.compile_parts(nn.Identity(), "jit")


@pytest.mark.parametrize("family", ["v8", "v5"])
def test_compiled_parts_compute_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and split by torch as on a GPU, run without generated code, which takes minutes to build."""
    modes, real = [], nn.Module.compile

    def traced(part: nn.Module, *, mode: str, dynamic: bool) -> None:
        modes.append(mode)
        real(part, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", traced)
    torch.manual_seed(0)
    plain = Detector(family, "t", 2)
    compiled = copy.deepcopy(plain)
    training.compile_parts(nn.ModuleList([compiled]), "graphs")
    assert modes == ["reduce-overhead"] * 3 and list(compiled.state_dict()) == list(plain.state_dict())
    images = torch.rand(2, 3, 64, 64)
    for detector in (plain, compiled):
        sum(level.square().mean() for level in detector(images)).backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert equal(plain, compiled)  # running statistics, too
    assert compiled.neck._compiled_call_impl and copy.deepcopy(compiled).neck._compiled_call_impl is None


def test_a_block_with_generated_code_computes_the_same() -> None:
    plain = ConvBlock(3, 4, 3, 2)
    compiled = copy.deepcopy(plain)
    compiled.compile(mode="reduce-overhead", dynamic=False)
    for block in (plain, compiled):
        torch.manual_seed(1)
        block(torch.rand(2, 3, 16, 16)).square().sum().backward()
    torch.testing.assert_close(plain.conv.weight.grad, compiled.conv.weight.grad, rtol=0.01, atol=0.001)
