"""The training loop of all but the detectors, on data that lie on the device; what every training shares: checkpoints,
a time budget, seeds, precision, the moving average of weights."""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from defectlab.runs import Context, NonFiniteLoss, OutOfTime, first_line


@dataclass
class Trained:
    """curve: mean of each named scalar of the loss, an entry an epoch; seconds of training in all sittings."""

    curve: dict[str, list[float]]
    seconds: float
    images_per_second: float

    @property
    def costs(self) -> dict[str, float]:
        """As records keep them."""
        return {
            "train_seconds": round(self.seconds, 1),
            "train_images_per_second": round(self.images_per_second, 1),
        }


class Checkpoints:
    """Where an interrupted training goes on from: after an epoch, when the last one is a while ago or time is up."""

    def __init__(self, context: Context):
        self.context, self._last = context, time.monotonic()

    def after(self, epoch: int, epochs: int, save: Callable[[Path], None]) -> None:
        """`epoch` (from 1) of `epochs` is done. Raises OutOfTime where the time is up and epochs are left."""
        context = self.context
        if epoch == epochs:
            return
        due = time.monotonic() - self._last >= context.every_seconds
        if context.checkpoint and (due or context.out_of_time()):
            save(context.checkpoint)
            self._last = time.monotonic()
        if context.out_of_time():
            raise OutOfTime(f"time budget used up after epoch {epoch} of {epochs}; run again to go on")


def epoch_order(count: int, batch: int, seed: int, epoch: int, device: torch.device) -> tuple[Tensor, ...]:
    """Shuffled indices in batches; depends on (seed, epoch) alone, so a resumed training goes on with the same order.

    A last batch of a single image is dropped: batch norm cannot use it.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(count, generator=generator).to(device)
    return tuple(part for part in order.split(batch) if len(part) > 1)


class MovingAverage:
    """Exponential moving average of a model's weights and running statistics, in a copy of it (`model`).

    The decay of step t is decay * (1 - exp(-t / ramp)): short at the start, when old weights are worth nothing.
    """

    def __init__(self, model: nn.Module, decay: float, ramp: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.ramp = decay, ramp
        self._tensors: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """`model` is the same one every time: its tensors are looked up once (a dict of them costs milliseconds)."""
        decay = self.decay * (1 - math.exp(-(step + 1) / self.ramp))
        if self._tensors is None:
            old, new = self.model.state_dict(), model.state_dict()
            names = [name for name, value in old.items() if value.is_floating_point()]
            self._tensors = [old[n] for n in names], [new[n] for n in names]
        torch._foreach_lerp_(*self._tensors, 1 - decay)


def train(
    parts: nn.Module,
    step: Callable[[list[Tensor]], dict[str, Tensor]],
    data: list[Tensor],
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    betas: tuple[float, float],
    seed: int,
    context: Context,
    schedule: str = "constant",
    draw: Callable[[Tensor, torch.Generator], list[Tensor]] | None = None,
    final: float = 0.0,
) -> Trained:
    """Train whatever has parameters in `parts` on a set that lies on its device whole.

    Args:
        step: a batch -> named scalars, of which "loss" is minimised.
        data: tensors (N, ...) of the N examples, on the training device.
        schedule: of the learning rate over the epochs, "constant" or "cosine" (from the full rate towards `final`
            times it).
        draw: (indices on the device, generator) -> the batch of these examples, augmented; None: `data` at the indices.
            The generator is a CPU one that depends on seed and epoch alone.

    Raises:
        OutOfTime, NonFiniteLoss, ValueError (fewer than two examples, unknown schedule).
    """
    device = data[0].device
    count = len(data[0])
    if count < 2:
        raise ValueError(f"training needs at least 2 images, got {count}")
    weights = [p for p in parts.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, learning_rate, betas, fused=True)
    done, earlier, curve = resume(context, parts, optimizer, epochs)
    checkpoints = Checkpoints(context)
    parts.train()
    started, seen = time.monotonic(), 0
    for epoch in range(done, epochs):
        logged = []
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch + 50_000)  # not the order's
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule_factor(schedule, epoch, epochs, final)
        for indices in epoch_order(count, batch, seed, epoch, device):
            scalars = step(draw(indices, generator) if draw else [x[indices] for x in data])
            optimizer.zero_grad(set_to_none=True)
            scalars["loss"].backward()
            optimizer.step()
            logged.append(torch.stack([v.detach() for v in scalars.values()]))
            seen += len(indices)
        table = torch.stack(logged).cpu()  # the only synchronisation: once an epoch
        check_finite(table[:, list(scalars).index("loss")], epoch, len(logged))
        for name, value in zip(scalars, table.mean(0).tolist(), strict=True):
            curve.setdefault(name, []).append(round(value, 6))
        seconds = time.monotonic() - started
        context.log(f"  epoch {epoch + 1}/{epochs}  loss {curve['loss'][-1]:.4f}  {seen / seconds:.1f} images/s")
        spent = earlier + seconds
        checkpoints.after(
            epoch + 1,
            epochs,
            lambda path: save_checkpoint(path, parts, optimizer, epoch + 1, spent, curve),  # noqa: B023
        )
    seconds = time.monotonic() - started
    parts.eval()
    return Trained(curve, earlier + seconds, seen / seconds if seen else 0.0)


def schedule_factor(schedule: str, epoch: int, epochs: int, final: float = 0.0) -> float:
    """What the learning rate is multiplied with in an epoch (0-based): 1, or half a cosine from 1 towards `final`."""
    if schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule != "constant":
        raise ValueError(f"unknown schedule {schedule!r}: use constant or cosine")
    return 1.0


def resume(
    context: Context, parts: nn.Module, optimizer: torch.optim.Optimizer, epochs: int
) -> tuple[int, float, dict[str, list[float]]]:
    """Go on from the context's checkpoint, where there is one: -> (epochs done, seconds spent, curve)."""
    if not (context.checkpoint and context.checkpoint.exists()):
        return 0, 0.0, {}
    try:
        done, earlier, curve = load_checkpoint(context.checkpoint, parts, optimizer)
    except torch.OutOfMemoryError:  # a RuntimeError, too, and no fault of the checkpoint
        raise
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{context.checkpoint} does not continue this training ({first_line(error)}): delete it"
        ) from error
    context.log(f"  continues after epoch {done} of {epochs}")
    return done, earlier, curve


def check_finite(losses: Tensor, epoch: int, batches: int) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise NonFiniteLoss(
            f"the loss is not finite: epoch {epoch + 1}, batch {int(bad[0]) + 1} of {batches}; lower the learning rate"
        )


def save_checkpoint(
    path: Path, parts: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, seconds: float, curve: dict
) -> None:
    """Weights and optimiser state as safetensors, the rest as JSON in its header; written aside, then renamed."""
    tensors = {f"weights.{k}": v.contiguous() for k, v in parts.state_dict().items()}
    state = optimizer.state_dict()
    for index, slots in state["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v.contiguous() for k, v in slots.items()}
    header = {"epoch": epoch, "seconds": seconds, "curve": curve, "groups": state["param_groups"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".writing")
    try:
        save_file(tensors, aside, {"header": json.dumps(header)})
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path} ({error}): free some disk space") from error
    finally:
        aside.unlink(missing_ok=True)


def load_checkpoint(
    path: Path, parts: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float, dict[str, list[float]]]:
    """The other half of `save_checkpoint`: -> (epochs done, seconds spent, curve)."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["header"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    parts.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": header["groups"]})
    for weight, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == weight.shape:  # the fused step pairs elements by memory order: channels-last, too
                moments[name] = torch.empty_like(weight).copy_(value)
    return header["epoch"], header["seconds"], header["curve"]
