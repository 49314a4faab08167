"""Methods that learn what is normal: trained on good images, asked for maps, evaluated; and looked at in parts."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defectlab.data.anomaly import AnomalyData
from defectlab.data.pooled import foreign_images
from defectlab.files import read_tensors
from defectlab.metrics.costs import flops, parameters
from defectlab.networks.rebuild.autoencoder import Autoencoder, AutoencoderSettings
from defectlab.networks.rebuild.base import Normal
from defectlab.networks.rebuild.contrast import Contrast, ContrastSettings
from defectlab.networks.rebuild.draem import DRAEM, DRAEMSettings
from defectlab.networks.rebuild.efficientad import EfficientAD, EfficientADSettings
from defectlab.networks.rebuild.efficientad_teacher import EfficientADTeacher, EfficientADTeacherSettings
from defectlab.networks.rebuild.ganomaly import GANomaly, GANomalySettings
from defectlab.networks.rebuild.mscdae import MSCDAE, MSCDAESettings
from defectlab.networks.rebuild.simplenet import SimpleNet, SimpleNetSettings
from defectlab.networks.rebuild.sivt import SIVT, SIVTSettings
from defectlab.precision import autocast, full_float32, precision_of, sent
from defectlab.runs import Context, OfAnother, Result, load_weights
from defectlab.training.anomaly import evaluate
from defectlab.training.cost_rows import NoData
from defectlab.training.loop import Trained, train

METHODS: dict[type, type[Normal]] = {
    ContrastSettings: Contrast,
    AutoencoderSettings: Autoencoder,
    GANomalySettings: GANomaly,
    MSCDAESettings: MSCDAE,
    DRAEMSettings: DRAEM,
    SimpleNetSettings: SimpleNet,
    EfficientADTeacherSettings: EfficientADTeacher,
    EfficientADSettings: EfficientAD,
    SIVTSettings: SIVT,
}


def fresh(settings: Any) -> Normal:
    return METHODS[type(settings)](settings)


# --- Learning and asking ---------------------------------------------------------------------------------------------


@torch.no_grad()
def prepared(network: Normal, images: Tensor, batch: int = 32) -> Tensor:
    """What the method keeps of uint8 images (N, 3, S, S), in eval mode."""
    with full_float32():
        return torch.cat([network.prepare(chunk) for chunk in images.split(batch)])


def learn(settings: Any, seed: int, data: AnomalyData, context: Context) -> tuple[Normal, Trained | None, str]:
    """-> network in eval mode, its training (None where nothing is learnt), precision. Errors of `train`."""
    precision = precision_of(settings, context.device)
    torch.manual_seed(seed)
    network = fresh(settings).to(context.device)
    if isinstance(network, EfficientAD):
        record = context.require(settings.teacher, 0)
        network.take_teacher(read_tensors(record.path.with_suffix(".safetensors"))[0])
    images = prepared(network.eval(), data.train.images)
    foreign = foreign_images(settings.dataset, settings.size, context.device) if network.foreign else None
    with torch.no_grad(), full_float32():
        network.begin(images, foreign)
    trained = None
    if any(weight.requires_grad for weight in network.parameters()):
        trained = _train(network, images, settings, seed, context, precision)
    with torch.no_grad(), full_float32():
        network.eval().end(images)
    return network, trained, precision


def _train(network: Normal, images: Tensor, settings: Any, seed: int, context: Context, precision: str) -> Trained:
    def draw(indices: Tensor, generator: torch.Generator, epoch: int) -> tuple[Tensor, torch.Generator]:
        chosen = torch.randint(len(images), (len(indices),), generator=generator)  # with repetition
        return images[sent(chosen, images.device)], generator

    def step(batch: tuple[Tensor, torch.Generator]) -> dict[str, Tensor]:
        with autocast(images.device, precision):
            return network.loss(*batch)

    return train(network, draw, step, settings.draws, settings, seed, context)


@torch.no_grad()
def ask(network: Normal, images: Tensor, batch: int = 16) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, S, S) -> anomaly maps (N, 256, 256) and scores (N,), float32."""
    found = []
    with full_float32():
        for chunk in images.split(batch):
            kept = network.prepare(chunk)
            maps = network.maps(kept)
            found.append((maps, network.scores(kept, maps)))
    maps, scores = zip(*found, strict=True)
    return torch.cat(maps).float(), torch.cat(scores).float()


def judge(network: Normal, data: AnomalyData) -> Result:
    """What the maps and scores of dev and test are worth."""
    (dev_maps, dev_scores), (maps, scores) = (ask(network, getattr(data, part).images) for part in ("dev", "test"))
    return evaluate(data, dev_maps, maps, dev_scores, scores)


def run_rebuild(settings: Any, seed: int, data: AnomalyData, context: Context) -> Result:
    """One row and seed of any of `METHODS`; the last epoch is evaluated, once."""
    network, trained, precision = learn(settings, seed, data, context)
    found = judge(network, data)
    costs = {"parameters": parameters(network)} | (trained.costs if trained else {})
    curve = trained.curve if trained else {}
    return replace(found, curve=curve, precision=precision, model=network.state_dict(), costs=costs)


# --- A finished network, in parts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartSettings(OfAnother):
    """The finished network of another row, on one of its sets or one of its levels; nothing is trained."""

    model: ClassVar[str] = "rebuild_part"
    version: ClassVar[int] = 1

    of: Any  # settings of the row whose network it is
    dataset: str = "aitex"
    level: int = 0  # of a pyramid, from 1; 0: as trained


def run_part(settings: PartSettings, seed: int, data: AnomalyData, context: Context) -> Result:
    """One row and seed; the network is trained first, where it is not there yet."""
    record = context.require(settings.of, seed)
    network = fresh(settings.of).to(context.device).eval()
    load_weights(record, network)
    if settings.level:
        network.level = settings.level
    found = judge(network, data)
    return replace(found, curve={}, notes={"of": record.key, "of_sha256": record.model_sha256})


# --- Costs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RebuildCostSettings(OfAnother):
    """What an image costs; no data are needed, the weights are random."""

    model: ClassVar[str] = "rebuild_costs"
    version: ClassVar[int] = 1

    of: Any  # settings of a row
    part: str = ""  # "backbone" or "decoder" of a network that has them; "": all of it
    dataset: str = "none"


class Asked(nn.Module):
    """Images (B, 3, H, W) in 0..1 -> what a method, or a part of it, gives for them."""

    def __init__(self, settings: RebuildCostSettings):
        super().__init__()
        whole = fresh(settings.of).eval().requires_grad_(False)
        self.part, self.network = settings.part, getattr(whole, settings.part) if settings.part else whole
        if self.part == "decoder":  # of features that the backbone gave, once
            images = torch.zeros(1, 3, settings.size, settings.size, dtype=torch.uint8)
            self.register_buffer("features", whole.prepare(images).float())

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if self.part == "decoder":
            return self.network(self.features)
        images = (255 * images).to(torch.uint8)
        return self.network(images) if self.part else self.network.maps(self.network.prepare(images))


def run_rebuild_costs(settings: RebuildCostSettings, seed: int, data: NoData, context: Context) -> Result:
    """Parameters and GFLOPs of one image; no metrics. How long it takes, `defectlab.bench` measures."""
    asked = Asked(settings)
    one = flops(asked, torch.zeros(1, 3, settings.size, settings.size))
    costs = {"parameters_m": round(parameters(asked) / 1e6, 4), "gflops": round(one / 1e9, 3)}
    return Result({}, {}, {}, {}, {}, {}, costs, "fp32")
