"""A classifier that learns from ten images a class, and from what generators make of them."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from defectlab.data.leaks import near_duplicates
from defectlab.data.pictures import PictureData, PictureSplit
from defectlab.metrics.costs import flops, parameters
from defectlab.metrics.windows import class_accuracy
from defectlab.networks.conv4 import Conv4
from defectlab.networks.diffusion import as_inputs, build_unet, sample_ddim
from defectlab.networks.episodes import FrozenFeatures
from defectlab.networks.generators import GAN, LATENT, GANSettings, folded, sample_gan, unfolded
from defectlab.precision import autocast, full_float32, precision_of, sent
from defectlab.runs import Context, Result
from defectlab.training.cost_rows import NoData
from defectlab.training.diffusion import random_flips, train_ddpm
from defectlab.training.loop import Trained, adam, rate_per_epoch, train
from defectlab.training.results import rounded
from defectlab.training.segmentation import steps_per_epoch

DDIM_STEPS = 50
SHOWN = 6  # made images of a class in a record, the first ones, whatever they look like


@dataclass(frozen=True)
class TenPicturesSettings:
    """A classifier, what it learns from, and for how long. All is ours: the survey names neither network nor set."""

    model: ClassVar[str] = "ten_pictures"
    version: ClassVar[int] = 1

    dataset: str = "neu_det"
    size: int = 64  # px a side
    each: int = 10  # images of each class to learn from, drawn by the seed; 0: all
    flips: bool = False  # both ways with probability 1/2
    smallest: float = 1.0  # side of a crop, as a part of the image's, at least; 1: no crops
    generator: Any = None  # GANSettings or DiffusionSettings: half of each batch is made by it
    made: int = 300  # images that it makes, the same number of each class
    network: str = "conv4"  # "lite0": frozen, at 224 px, with a linear classifier; it sees no made image
    pretrained: bool = True  # of "lite0"; False: random weights, for smoke
    width: int = 32  # of "conv4"
    draws: int = 1280  # images an epoch, of each class the same number
    epochs: int = 20
    batch: int = 32
    learning_rate: float = 0.001
    penalty: float = 1.0  # of the linear classifier: 1 / C in scikit-learn
    precision: str = "bf16"  # where the device is fast at it


@dataclass(frozen=True)
class Learnt:
    """What a classifier learns from: images (N, 1, S, S) uint8, labels (N,) int64 on the device; the places of each
    class in them (classes, most) and how many these are (classes,), both on the CPU."""

    images: Tensor
    labels: Tensor
    places: Tensor = field(init=False)
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        labels = self.labels.cpu()
        each = [(labels == label).nonzero()[:, 0] for label in range(int(labels.max()) + 1)]
        object.__setattr__(self, "places", nn.utils.rnn.pad_sequence(each, batch_first=True))
        object.__setattr__(self, "counts", torch.tensor([len(one) for one in each]))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Places of `count` images, of each class the same number as far as chance allows: (count,) on the CPU."""
        chosen = torch.randint(len(self.counts), (count,), generator=generator)
        share = torch.rand(count, generator=generator, dtype=torch.float64)
        return self.places[chosen, (share * self.counts[chosen]).long()]


def drawn(split: PictureSplit, each: int, seed: int, classes: int) -> Tensor:
    """Places of `each` images of every class (0: of all images), by the seed alone: (n,) on the CPU, class by class.
    ValueError where a class has fewer."""
    if not each:
        return torch.arange(len(split))
    generator, found = torch.Generator().manual_seed(seed), []
    for label in range(classes):
        own = (split.labels.cpu() == label).nonzero()[:, 0]
        if len(own) < each:
            raise ValueError(f"class {label} has {len(own)} images to learn from: {each} cannot be drawn")
        found.append(own[torch.randperm(len(own), generator=generator)[:each]])
    return torch.cat(found)


# --- Generators ------------------------------------------------------------------------------------------------------


def make_images(
    settings: TenPicturesSettings, seed: int, few: Learnt, classes: int, context: Context
) -> tuple[Learnt, Trained]:
    """Train the generator on the few images and let it make `made` more, of each class the same number."""
    labels = torch.arange(classes, device=few.labels.device).repeat_interleave(settings.made // classes)
    if isinstance(settings.generator, GANSettings):
        gan, trained = train_gan(settings.generator, seed, few, classes, context)
        with full_float32():
            return Learnt(sample_gan(gan, labels, seed), labels), trained
    of = settings.generator
    if of.flips:
        raise ValueError("folded images cannot be flipped: set flips=False in the diffusion model's settings")
    unet, trained = train_ddpm(folded(few.images), of, seed, context, few.labels, classes)
    made = []
    for part, chunk in enumerate(labels.split(64)):
        with autocast(labels.device, precision_of(of, labels.device)):
            made.append(sample_ddim(unet, len(chunk), 1000 * seed + part, DDIM_STEPS, labels.device, chunk))
    return Learnt(unfolded(torch.cat(made)), labels), trained


def train_gan(settings: GANSettings, seed: int, few: Learnt, classes: int, context: Context) -> tuple[GAN, Trained]:
    """Critic and generator in turns: a turn is `critic_steps` steps of the one, then one of the other."""
    device = few.images.device
    torch.manual_seed(seed)
    gan = GAN(settings, classes, few.images.shape[-1]).to(device)
    real, turn, steps = as_inputs(few.images), settings.critic_steps + 1, -1
    last = dict.fromkeys(
        ("critic", "generator"), torch.zeros((), device=device)
    )  # 0 before the first turn, also resumed

    def draw(indices: Tensor, generator: torch.Generator, epoch: int) -> tuple[Tensor, ...]:
        nonlocal steps
        if steps < 0:  # a training that goes on does so in the middle of a turn
            steps = epoch * steps_per_epoch(settings.draws, settings.batch)
        count = len(indices)
        noise = torch.randn(count, LATENT, generator=generator)
        mix = torch.rand(count, 1, 1, 1, generator=generator)
        return tuple(sent(one, device) for one in (few.draw(count, generator), noise, mix))

    def step(batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        nonlocal steps
        places, noise, mix = batch
        labels = few.labels[places]
        steps += 1
        if steps % turn:
            with torch.no_grad():
                fake = gan(noise, labels)
            loss = gan.critic_loss(real[places], fake, labels, mix)
            last["critic"] = loss.detach()
        else:
            loss = gan.generator_loss(noise, labels)
            last["generator"] = loss.detach()
        return {"loss": loss, **last}

    optimizer = adam(gan, settings.learning_rate, settings.betas)
    rate = rate_per_epoch(settings.learning_rate, "constant", settings.epochs)
    return gan, train(gan, draw, step, settings.draws, settings, seed, context, optimizer, rate)


# --- Classifiers -----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """uint8 images (B, 1, S, S) -> logits (B, classes) float32."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.features, self.linear = Conv4(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.features(images)).float()


def cropped(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """uint8 images (B, 1, S, S) -> of each a square part, with a side of `smallest` to 1 of the image's, scaled up."""
    sides = smallest + (1 - smallest) * torch.rand(len(images), generator=generator)
    matrix = torch.zeros(len(images), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = sides
    matrix[:, :, 2] = (2 * torch.rand(len(images), 2, generator=generator) - 1) * (1 - sides[:, None])
    grid = F.affine_grid(sent(matrix, images.device), list(images.shape), align_corners=False)
    parts = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    return parts.round().clamp(0, 255).to(torch.uint8)


def train_classifier(
    settings: TenPicturesSettings, seed: int, pools: list[Learnt], classes: int, context: Context
) -> tuple[Classifier, Trained, str]:
    """On batches that are drawn from each of the pools alike. -> classifier in eval mode, its training, precision."""
    device = pools[0].images.device
    precision = precision_of(settings, device)
    torch.manual_seed(seed)
    network = Classifier(settings.width, classes).to(device, memory_format=torch.channels_last)

    def draw(indices: Tensor, generator: torch.Generator, epoch: int) -> tuple[Tensor, Tensor]:
        shares = [part.numel() for part in torch.arange(len(indices)).tensor_split(len(pools))]
        places = [sent(pool.draw(n, generator), device) for pool, n in zip(pools, shares, strict=True)]
        images, labels = (
            torch.cat([getattr(pool, of)[at] for pool, at in zip(pools, places, strict=True)])
            for of in ("images", "labels")
        )
        if settings.flips:
            images = random_flips(images, generator)
        return cropped(images, settings.smallest, generator) if settings.smallest < 1 else images, labels

    def step(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        with autocast(device, precision):
            logits = network(images)
        return {"loss": F.cross_entropy(logits, labels)}

    trained = train(network, draw, step, settings.draws, settings, seed, context)
    return network, trained, precision


@torch.inference_mode()
def outputs(network: nn.Module, images: Tensor, batch: int = 64) -> np.ndarray:
    """uint8 images (N, 1, S, S) -> logits or features (N, C) float32."""
    with full_float32():
        return torch.cat([network(part).float() for part in images.split(batch)]).cpu().numpy()


# --- Evaluation ------------------------------------------------------------------------------------------------------


def run_ten_pictures(settings: TenPicturesSettings, seed: int, data: PictureData, context: Context) -> Result:
    """One row and seed: the seed draws the images, starts the networks, orders the batches. ValueError for a network
    that is not known, or a class with too few images."""
    if settings.network not in ("conv4", "lite0"):
        raise ValueError(f"unknown network {settings.network!r}: use conv4 or lite0")
    classes = len(data.class_names)
    places = drawn(data.train, settings.each, seed, classes)
    chosen = places.to(data.train.images.device)
    few = Learnt(data.train.images[chosen], data.train.labels[chosen])
    pools, curve, predictions, costs = [few], {}, {}, {}
    metrics = {}
    if settings.generator is not None:
        made, trained = make_images(settings, seed, few, classes, context)
        pools.append(made)
        curve = {f"generator_{name}": values for name, values in trained.curve.items()}
        costs = {"generator_seconds": round(trained.seconds, 1)}
        copies, predictions = copied(few, made, data.dev, classes)
        metrics |= copies
    parts = {part: getattr(data, part) for part in ("dev", "test")}
    if settings.network == "conv4":
        # the checkpoint is the generator's, where there is one; this takes a minute
        own = replace(context, checkpoint=None, deadline=None, stopped=None)
        network, trained, precision = train_classifier(settings, seed, pools, classes, own)
        curve |= trained.curve
        costs |= {"parameters": parameters(network)} | trained.costs
        found = {part: outputs(network, split.images).argmax(1) for part, split in parts.items()}
        state = network.state_dict()
    else:
        network, precision, state = FrozenFeatures(settings.pretrained).to(context.device), "fp32", {}
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=1 / settings.penalty, max_iter=2000))
        linear.fit(outputs(network, few.images), few.labels.cpu().numpy())
        found = {part: linear.predict(outputs(network, split.images)) for part, split in parts.items()}
    labels = {part: split.labels.cpu().numpy() for part, split in parts.items()}
    accuracy = {part: {"class_accuracy": class_accuracy(found[part], labels[part])} for part in parts}
    per_class = {
        name: {"class_accuracy": 100 * float(np.mean(found["test"][labels["test"] == label] == label))}
        for label, name in enumerate(data.class_names)
        if (labels["test"] == label).any()
    }
    predictions |= {
        "answers": found["test"].astype(np.uint8),
        "labels": labels["test"].astype(np.uint8),
        "names": np.array(data.test.names),
        "class_names": np.array(data.class_names),
    }
    if settings.each:
        predictions["drawn"] = np.array([data.train.names[i] for i in places.tolist()])
    return Result(
        rounded(accuracy["test"] | metrics),
        {name: rounded(values) for name, values in per_class.items()},
        rounded(accuracy["dev"]),
        curve,
        predictions,
        state,
        costs,
        precision,
    )


def copied(
    few: Learnt, made: Learnt, held_out: PictureSplit, classes: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """ "copies": the part of the made images that the leak check takes for one of the few, in per cent; beside it that
    of real images that were held out. Arrays of made images (the first of each class) and, for each, the nearest of
    the few: uint8 (K, S, S)."""
    shares = {
        name: 100 * len({pair.second for pair in near_duplicates(few.images, images)}) / len(images)
        for name, images in (("copies", made.images), ("copies_held_out", held_out.images))
    }
    first = torch.cat([(made.labels == label).nonzero()[:SHOWN, 0] for label in range(classes)])
    flat = [F.avg_pool2d(of.float(), 2).flatten(1) for of in (made.images[first], few.images)]
    centred = [F.normalize(of - of.mean(1, keepdim=True)) for of in flat]
    nearest = (centred[0] @ centred[1].T).argmax(1)
    arrays = {"case_images": made.images[first, 0], "case_nearest": few.images[nearest, 0]}
    arrays |= {"case_labels": made.labels[first]}
    return shares, {name: values.cpu().numpy() for name, values in arrays.items()}


# --- Costs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneratorCostSettings:
    """What one image costs to make; no data are needed, the weights are random."""

    model: ClassVar[str] = "generator_costs"
    version: ClassVar[int] = 1

    of: Any  # GANSettings or DiffusionSettings
    dataset: str = "none"
    size: int = 64  # px a side
    classes: int = 6


class Made(nn.Module):
    """Any images (B, ...) -> as many made ones, uint8 (B, 1, S, S), all of the first class."""

    def __init__(self, settings: GeneratorCostSettings):
        super().__init__()
        self.settings, of = settings, settings.of
        gan = isinstance(of, GANSettings)
        network = GAN(of, settings.classes, settings.size) if gan else build_unet(of, 4, settings.classes)
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        if isinstance(self.network, GAN):
            return sample_gan(self.network, labels, 0)
        return unfolded(sample_ddim(self.network, len(labels), 0, DDIM_STEPS, images.device, labels))


def run_generator_costs(settings: GeneratorCostSettings, seed: int, data: NoData, context: Context) -> Result:
    """Parameters of what makes the images, and GFLOPs of one; no metrics. How long it takes, `defectlab.bench`
    measures."""
    made = Made(settings)
    used = made.network.generator if isinstance(made.network, GAN) else made.network
    one = flops(made, torch.zeros(1, 1, settings.size, settings.size))
    costs = {"parameters_m": round(parameters(used) / 1e6, 4), "gflops": round(one / 1e9, 3)}
    return Result({}, {}, {}, {}, {}, {}, costs, "fp32")
