"""The training loop on data that lie on the device, its checkpoints, and the moving average of the weights."""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from defectlab.files import read_tensors, write_tensors
from defectlab.runs import Context, NonFiniteLoss, OutOfTime, first_line


@dataclass
class Trained:
    """curve: mean of each named scalar of the loss, one value per epoch; seconds of training in all calls."""

    curve: dict[str, list[float]]
    seconds: float
    images_per_second: float

    @property
    def costs(self) -> dict[str, float]:
        """As records keep them."""
        found = {"train_seconds": self.seconds, "train_images_per_second": self.images_per_second}
        return {name: round(value, 1) for name, value in found.items()}


# --- Order, learning rate, moving average ----------------------------------------------------------------------------


def epoch_order(count: int, batch: int, seed: int, epoch: int, device: torch.device) -> tuple[Tensor, ...]:
    """Shuffled indices in batches; depends on (seed, epoch) alone, so a resumed training goes on with the same order.

    A last batch of a single image is dropped: batch norm cannot use it.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(count, generator=generator).to(device)
    return tuple(part for part in order.split(batch) if len(part) > 1)


def adam(parts: nn.Module, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in parts.parameters() if p.requires_grad], learning_rate, betas, fused=True)


def schedule_factor(schedule: str, epoch: int, epochs: int, final: float = 0.0) -> float:
    """What the learning rate is multiplied with in an epoch (0-based): 1, or half a cosine from 1 towards `final`."""
    if schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule != "constant":
        raise ValueError(f"unknown schedule {schedule!r}: use constant or cosine")
    return 1.0


def rate_per_epoch(learning_rate: float, schedule: str, epochs: int, final: float = 0.0) -> Callable[[int, int], float]:
    """The `rate` of `train` that changes from one epoch to the next, by `schedule_factor`."""
    return lambda step, steps: learning_rate * schedule_factor(schedule, step // steps, epochs, final)


class MovingAverage:
    """Exponential moving average of a network's weights and running statistics, in a copy of it (`model`).

    The decay after step t is decay * (1 - exp(-t / ramp)): short at the start, when old weights are worth nothing.
    Steps count from 1; `counted` are counted before the first (1: the untrained weights count as a step's).
    """

    def __init__(self, network: nn.Module, decay: float, ramp: float, counted: int = 0):
        self.network = network
        self.model = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay, self.ramp, self.counted = decay, ramp, counted
        self._tensors: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights that the optimiser's `step` (from 1) left."""
        decay = self.decay * (1 - math.exp(-(step + self.counted) / self.ramp))
        if self._tensors is None:  # looked up once: a dict of them costs milliseconds
            old, new = self.model.state_dict(), self.network.state_dict()
            names = [name for name, value in old.items() if value.is_floating_point()]
            self._tensors = [old[n] for n in names], [new[n] for n in names]
        torch._foreach_lerp_(*self._tensors, 1 - decay)


# --- The loop --------------------------------------------------------------------------------------------------------


def train(
    parts: nn.Module,
    draw: Callable[[Tensor, torch.Generator, int], Any],
    step: Callable[[Any], dict[str, Tensor]],
    count: int,
    settings: Any,
    seed: int,
    context: Context,
    optimizer: torch.optim.Optimizer | None = None,
    rate: Callable[[int, int], float] | None = None,
    *,
    stream: int = 50_000,
    clip: float | None = None,
    indices_on: torch.device | None = None,
    average: MovingAverage | None = None,
    probe: Callable[[], dict[str, float]] | None = None,
) -> Trained:
    """Train whatever has parameters in `parts`, on `count` examples; leaves it in eval mode.

    Args:
        draw: (indices, CPU generator, epoch from 0) -> a batch of these examples, augmented. The
            generator depends on seed, epoch and `stream` alone (0, that of the order: recorded detectors).
        step: a batch -> named scalars, of which "loss" is minimised.
        settings: have `epochs` and `batch`, and `learning_rate` where there is no `optimizer` or no `rate`.
        optimizer: by default `adam`.
        rate: (step of the whole training, from 0, steps per epoch) -> learning rate; by default half a cosine.
        clip: largest norm of the gradient.
        indices_on: where `draw` gets its indices; by default the weights' device.
        average: updated after each step.
        probe: called about ten times, and at the end, for scalars that enter the curve, beside "probe_epoch".

    Raises:
        OutOfTime, NonFiniteLoss (names epoch and batch), ValueError (fewer than two examples, or in a batch, a foreign
            checkpoint).
    """
    if min(count, settings.batch) < 2:
        raise ValueError(f"training needs 2 images or more, in batches of 2 or more, got {count} by {settings.batch}")
    optimizer = optimizer or adam(parts, settings.learning_rate)
    rate = rate or rate_per_epoch(settings.learning_rate, "cosine", settings.epochs)
    epochs, weights = settings.epochs, [p for p in parts.parameters() if p.requires_grad]
    kept = nn.ModuleList([parts, average.model]) if average else parts  # what a checkpoint holds
    done, earlier, curve = resume(context, kept, optimizer, epochs)
    parts.train()
    seen, probing, started = 0, 0.0, time.monotonic()
    saved = started  # when the last checkpoint was written
    for epoch in range(done, epochs):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch + stream)
        where = indices_on or weights[0].device
        batches, logged = epoch_order(count, settings.batch, seed, epoch, where), []
        for position, indices in enumerate(batches, epoch * len(batches)):
            scalars = step(draw(indices, generator, epoch))
            for group in optimizer.param_groups:
                group["lr"] = rate(position, len(batches))
            optimizer.zero_grad(set_to_none=True)
            scalars["loss"].backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(weights, clip)
            optimizer.step()
            if average:
                average.update(position + 1)
            logged.append(torch.stack([value.detach().float() for value in scalars.values()]))
            seen += len(indices)
        table = torch.stack(logged).cpu()  # the only synchronisation: once per epoch
        if len(bad := (~table[:, list(scalars).index("loss")].isfinite()).nonzero()):
            first = f"epoch {epoch + 1}, batch {int(bad[0]) + 1} of {len(table)}"
            raise NonFiniteLoss(f"the loss is not finite: {first}; lower the learning rate")
        means = dict(zip(scalars, table.mean(0).tolist(), strict=True))
        extend(curve, means, 6)
        if probe and ((epoch + 1) % max(1, epochs // 10) == 0 or epoch + 1 == epochs):
            began = time.monotonic()
            extend(curve, {"probe_epoch": epoch + 1, **probe()}, 4)
            probing += time.monotonic() - began
        seconds = time.monotonic() - started - probing
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        context.log(f"  epoch {epoch + 1}/{epochs}  {shown}  {seen / seconds:.1f} images/s")
        if epoch + 1 == epochs:
            break
        stop = context.out_of_time()
        if context.checkpoint and (stop or time.monotonic() - saved >= context.every_seconds):
            save_checkpoint(context.checkpoint, kept, optimizer, epoch + 1, earlier + seconds, curve)
            saved = time.monotonic()
        if stop:
            raise OutOfTime(f"time budget used up after epoch {epoch + 1} of {epochs}; run again to go on")
    seconds = time.monotonic() - started - probing
    parts.eval()
    return Trained(curve, earlier + seconds, seen / seconds if seen else 0.0)


def extend(curve: dict[str, list[float]], values: dict[str, float], digits: int) -> None:
    for name, value in values.items():
        curve.setdefault(name, []).append(round(value, digits))


# --- Checkpoints -----------------------------------------------------------------------------------------------------


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


def save_checkpoint(
    path: Path, parts: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, seconds: float, curve: dict
) -> None:
    """Weights and optimiser state as safetensors, the rest as JSON in its header."""
    tensors = {f"weights.{name}": value for name, value in parts.state_dict().items()}
    state = optimizer.state_dict()
    for index, slots in state["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items()}
    header = {"epoch": epoch, "seconds": seconds, "curve": curve, "groups": state["param_groups"]}
    write_tensors(path, tensors, {"header": json.dumps(header)})


def load_checkpoint(
    path: Path, parts: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float, dict[str, list[float]]]:
    """The other half of `save_checkpoint`: -> (epochs done, seconds spent, curve)."""
    tensors, metadata = read_tensors(path)
    header = json.loads(metadata["header"])
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
