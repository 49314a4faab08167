"""The training loop: seeds, resuming, the time budget, and what it says when the loss breaks."""

import json
import math
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from toy_runs import one_sitting, quiet

from defectlab.runs import Context, NonFiniteLoss, OutOfTime
from defectlab.training.loop import Trained, adam, epoch_order, rate_per_epoch, schedule_factor, train

EPOCHS, BATCH, IMAGES = 4, 3, 8


class TinyStudent(nn.Module):
    """A convolution with batch norm a scale: weights, buffers, and nothing to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)) for c in (4, 8))

    def forward(self, features: list[Tensor]) -> list[list[Tensor]]:
        return [[scale(f) for scale, f in zip(self.scales, features, strict=True)]]


class WeightedLoss(nn.Module):
    """A loss with a weight of its own: it has to be trained and saved with the student."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, teacher: list[Tensor], students: list[list[Tensor]]) -> dict[str, Tensor]:
        terms = torch.stack([(t - s).square().mean() for t, s in zip(teacher, students[0], strict=True)])
        return {"loss": (self.logits.softmax(0) * terms).sum() + self.logits.square().sum(), "plain": terms.mean()}


def features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(IMAGES, c, s, s, generator=generator) for c, s in ((4, 8), (8, 4))]


def fit(
    seed: int = 0, context: Context | None = None, loss=None, layout=torch.contiguous_format, **changes
) -> tuple[dict[str, Tensor], Trained]:
    """Train a fresh student and its loss, which may have weights. -> (weights of both, what `train` returned)."""
    torch.manual_seed(changes.pop("initial", seed))
    network, loss = TinyStudent().to(memory_format=layout), loss or WeightedLoss()
    parts = nn.ModuleList([network, loss] if isinstance(loss, nn.Module) else [network])
    data, epochs, schedule = features(), changes.pop("epochs", EPOCHS), changes.pop("schedule", "constant")
    options = {
        "draw": lambda indices, generator, epoch: [x[indices] for x in data],
        "count": IMAGES,
        "optimizer": adam(parts, 0.01, (0.5, 0.999)),
        "rate": rate_per_epoch(0.01, schedule, epochs),
        "settings": SimpleNamespace(epochs=epochs, batch=BATCH),
        "seed": seed,
        "context": context or quiet(),
    }
    trained = train(parts, step=lambda batch: loss(batch, network(batch)), **(options | changes))
    assert not any(module.training for module in parts.modules())
    return {k: v.clone() for k, v in parts.state_dict().items()}, trained


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stopped(folder: Path, **options) -> Path:
    """The checkpoint of a training that was stopped after its first epoch."""
    checkpoint = folder / "row.safetensors"
    with pytest.raises(OutOfTime):
        fit(context=one_sitting(checkpoint), **options)
    return checkpoint


# --- Seeds -----------------------------------------------------------------------------------------------------------


def test_the_seed_decides_the_weights_and_the_order_of_images() -> None:
    (first, trained), (again, trained_again), (other, trained_other) = (fit(seed) for seed in (0, 0, 1))
    assert same(first, again) and trained.curve == trained_again.curve
    assert all(not torch.equal(first[k], other[k]) for k in first if k.endswith("weight") and first[k].ndim == 4)
    assert trained.curve != trained_other.curve
    assert not same(first, fit(1, initial=0)[0])  # equal at the start


def test_training_trains_the_student_and_the_loss() -> None:
    lines: list[str] = []
    weights, trained = fit(context=quiet(log=lines.append))
    assert trained.curve["loss"][-1] < trained.curve["loss"][0]
    assert {name: len(values) for name, values in trained.curve.items()} == {"loss": EPOCHS, "plain": EPOCHS}
    assert weights["1.logits"].abs().max() > 0
    assert trained.seconds > 0 and trained.images_per_second > 0
    assert len(lines) == EPOCHS
    assert all(f"epoch {i + 1}/{EPOCHS}" in line and "images/s" in line for i, line in enumerate(lines))


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_is_too_few(count: int) -> None:
    with pytest.raises(ValueError, match=f"2 images or more, in batches of 2 or more, got {count} by 3"):
        fit(count=count)


# --- Schedule and augmentation ---------------------------------------------------------------------------------------


def test_the_cosine_starts_full_and_falls_towards_nothing() -> None:
    factors = [schedule_factor("cosine", epoch, 4) for epoch in range(4)]
    assert factors == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert schedule_factor("constant", 3, 4) == 1.0
    assert schedule_factor("cosine", 2, 4, 0.01) == pytest.approx(0.505)
    assert schedule_factor("cosine", 4, 4, 0.01) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        schedule_factor("step", 0, 4)


def shifted(indices: Tensor, generator: torch.Generator, epoch: int) -> list[Tensor]:
    """An augmentation that tells draws apart."""
    return [f[indices] + torch.rand(1, generator=generator) for f in features()]


def test_what_is_drawn_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    whole, _ = fit(draw=shifted, schedule="cosine")
    assert not same(whole, fit(schedule="cosine")[0])
    assert not same(whole, fit(draw=shifted)[0])
    checkpoint = stopped(tmp_path, draw=shifted, schedule="cosine")
    assert same(fit(draw=shifted, schedule="cosine", context=quiet(checkpoint=checkpoint))[0], whole)


# --- Order -----------------------------------------------------------------------------------------------------------


def order(count: int, batch: int, seed: int, epoch: int) -> list[list[int]]:
    return [part.tolist() for part in epoch_order(count, batch, seed, epoch, torch.device("cpu"))]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = order(20, 6, 3, 5)
    torch.manual_seed(2)
    assert order(20, 6, 3, 5) == first
    assert order(20, 6, 3, 6) != first != order(20, 6, 4, 5)
    assert sorted(chain(*first)) == list(range(20))
    assert [len(part) for part in first] == [6, 6, 6, 2]


def test_no_two_seeds_share_their_orders() -> None:
    found = {str(order(30, 30, seed, epoch)) for seed in range(5) for epoch in range(200)}
    assert len(found) == 5 * 200


def test_a_single_last_image_is_dropped() -> None:
    assert [len(part) for part in order(13, 4, 0, 0)] == [4, 4, 4]
    left = {n for epoch in range(60) for n in set(range(13)) - set(chain(*order(13, 4, 0, epoch)))}
    assert left == set(range(13))  # another image each time: none is left out for good


# --- Resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, layout: torch.memory_format) -> None:
    """Also in the layout in which the studies train: fused Adam pairs weights and moments by memory order."""
    whole, trained = fit(layout=layout)
    checkpoint = tmp_path / "checkpoints" / "row.safetensors"
    for done in (1, 2):  # each sitting has no time left and does its one epoch
        with pytest.raises(OutOfTime, match=f"after epoch {done} of {EPOCHS}; run again"):
            fit(context=one_sitting(checkpoint), layout=layout)
        assert checkpoint.exists()
    lines: list[str] = []
    context = quiet(checkpoint=checkpoint, log=lines.append)
    resumed, trained_again = fit(context=context, layout=layout, initial=7)  # other weights: the checkpoint's count
    assert f"continues after epoch 2 of {EPOCHS}" in lines[0]
    assert len(lines) == 1 + EPOCHS - 2
    assert same(resumed, whole)
    assert trained_again.curve == trained.curve


def test_checkpoint_is_safetensors_with_a_json_header_and_counts_seconds(tmp_path: Path) -> None:
    checkpoint = stopped(tmp_path)
    with safe_open(checkpoint, framework="pt") as file:  # reads no pickle
        header, keys = json.loads(file.metadata()["header"]), set(file.keys())
    assert header["epoch"] == 1
    assert len(header["curve"]["loss"]) == 1
    assert {"weights.1.logits", "weights.0.scales.0.1.running_mean"} <= keys
    assert any(k.startswith("optimizer.") and k.endswith("exp_avg_sq") for k in keys)
    assert list(tmp_path.iterdir()) == [checkpoint]
    assert 0 < header["seconds"] < 3600
    save_file(load_file(checkpoint), checkpoint, {"header": json.dumps(header | {"seconds": 3600})})
    _, trained = fit(context=quiet(checkpoint=checkpoint))
    assert 3600 < trained.seconds < 7200


def test_a_killed_training_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    probe, said = Mock(side_effect=[{}, {}, KeyboardInterrupt]), []
    checkpoint = tmp_path / "row.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(context=quiet(checkpoint=checkpoint, every_seconds=0.0), probe=probe)
    resumed, trained = fit(context=quiet(checkpoint=checkpoint, log=said.append), initial=7)
    assert said[0] == f"  continues after epoch 2 of {EPOCHS}"
    whole, uninterrupted = fit()
    assert same(resumed, whole)
    assert {name: trained.curve[name] for name in uninterrupted.curve} == uninterrupted.curve


def test_out_of_time_stops_without_a_checkpoint_too_but_not_after_the_last_epoch() -> None:
    with pytest.raises(OutOfTime, match="after epoch 1"):
        fit(context=one_sitting())
    _, trained = fit(context=one_sitting(), epochs=1)
    assert len(trained.curve["loss"]) == 1


def test_checkpoint_is_written_when_due_and_not_after_the_last_epoch(tmp_path: Path) -> None:
    checkpoint = tmp_path / "row.safetensors"
    fit(context=quiet(checkpoint=checkpoint, every_seconds=0.0), epochs=1)
    assert not checkpoint.exists()
    fit(context=quiet(checkpoint=checkpoint, every_seconds=3600.0))
    assert not checkpoint.exists()
    fit(context=quiet(checkpoint=checkpoint, every_seconds=0.0))
    with safe_open(checkpoint, framework="pt") as file:
        assert json.loads(file.metadata()["header"])["epoch"] == EPOCHS - 1


@pytest.mark.parametrize(
    "content", [b"", b"no tensors", save({"weights.0.other": torch.zeros(2)}, {"header": '{"epoch": 1}'})]
)
def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    checkpoint = tmp_path / "row.safetensors"
    checkpoint.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=r"(?s)row\.safetensors.*delete it"):
        fit(context=quiet(checkpoint=checkpoint))


def test_a_device_without_memory_condemns_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, no_memory = stopped(tmp_path), Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr("defectlab.training.loop.load_checkpoint", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        fit(context=quiet(checkpoint=checkpoint))


def test_a_full_disk_is_named_and_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = stopped(tmp_path)
    before = checkpoint.read_bytes()

    def no_space(tensors, path, header):  # as safetensors does, which raises no OSError
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", no_space)
    with pytest.raises(OSError, match=r"could not write .*row\.safetensors"):
        fit(context=one_sitting(checkpoint))
    assert checkpoint.read_bytes() == before
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize(("epochs", "asked"), [(20, [*range(2, 21, 2)]), (25, [*range(2, 25, 2), 25]), (3, [1, 2, 3])])
def test_probe_is_asked_every_tenth_part_and_at_the_end(epochs: int, asked: list[int]) -> None:
    _, trained = fit(epochs=epochs, probe=lambda: {"one": 1.0})
    assert trained.curve["probe_epoch"] == asked and trained.curve["one"] == [1.0] * len(asked)
    assert len(trained.curve["loss"]) == epochs


# --- A loss that breaks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "epoch", "batch"), [(math.nan, 2, 3), (math.inf, 2, 3), (math.nan, 1, 2)])
def test_non_finite_loss_names_epoch_and_batch(tmp_path: Path, value: float, epoch: int, batch: int) -> None:
    batches = -(-IMAGES // BATCH)
    factors = iter([1.0] * (batches * (epoch - 1) + batch - 1) + [value] + [1.0] * IMAGES)

    def loss(teacher: list[Tensor], students: list[list[Tensor]]) -> dict[str, Tensor]:
        terms = [(t - s).square().mean() for t, s in zip(teacher, students[0], strict=True)]
        return {"other": torch.zeros(()), "loss": sum(terms) * next(factors)}

    checkpoint = tmp_path / "row.safetensors"
    with pytest.raises(NonFiniteLoss, match=f"epoch {epoch}, batch {batch} of {batches}; lower the learning rate"):
        fit(loss=loss, context=quiet(checkpoint=checkpoint, every_seconds=0.0))
    assert checkpoint.exists() == (epoch > 1)  # none of the broken epoch
