"""Section III-B of D3N, feature preparation: from images to a repository of compressed features.

Yu, "D3N: Bring the Power of Diffusion Model to Defect Detection", arXiv 2408.13845, section III-B and Fig. 3. The
training images go through the frozen diffusion model once; their decoder features are the first repository, on which
the compressor is trained; its latents are the second one, which the detector's training reads. Both hold training
images alone, as in the paper, which leaves open how a test image is then queried. Ours: features of dev and test
images are computed on the fly by the same frozen models. No label is used anywhere here.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from defectlab.data.detection import DetectionData
from defectlab.files import DataError
from defectlab.networks.diffusion import decoder_features, noise_schedule
from defectlab.papers.d3n import resvae
from defectlab.papers.d3n.resvae import CHUNK, CompressionSettings, Compressor, Level, build_compressor, feature_shapes
from defectlab.precision import autocast, full_float32, precision_of
from defectlab.runs import Context, Record, Result, load_weights
from defectlab.training import feature_store
from defectlab.training.diffusion import load_ddpm
from defectlab.training.loop import Trained, adam, rate_per_epoch, train
from defectlab.training.results import rounded

HELD_OUT = ("dev", "test")
PCA_VECTORS, PCA_CHUNK = 200_000, 4096  # channel vectors that a PCA sees: in all, and at once


def joined(chunks: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Levels of some images after the other -> levels of all."""
    return [torch.cat(level) for level in zip(*chunks, strict=True)]


# --- Features --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extractor:
    """The frozen diffusion model of a run, as a function from images to features."""

    unet: nn.Module
    settings: CompressionSettings
    record: Record

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 64) -> list[Tensor]:
        """uint8 (N, C, 64, 64) -> three levels (N, C_k, H_k, W_k) float32, finest first."""
        alpha_hat = noise_schedule(self.settings.ddpm.steps).to(images.device)
        options = {"timesteps": self.settings.timesteps, "combine": self.settings.combine, "alpha_hat": alpha_hat}
        with autocast(images.device, precision_of(self.settings.ddpm, images.device)):
            return joined(decoder_features(self.unet, part, **options) for part in images.split(batch))

    def made_of(self, data: DetectionData) -> str:
        """What the training images' features follow from: weights, images, settings and precision."""
        precision = precision_of(self.settings.ddpm, next(self.unet.parameters()).device)
        how = f"{self.settings.timesteps} {self.settings.combine} {precision}"
        return f"{self.record.model_sha256} {data.fingerprint} {how}"


def extractor(settings: CompressionSettings, data: DetectionData, context: Context) -> Extractor:
    """The diffusion model that `settings` name, trained first if this machine has not run it."""
    record = context.require(settings.ddpm, 0)  # ours: one diffusion model for all seeds of what follows
    return Extractor(load_ddpm(record, settings.ddpm, data.train.images.shape[1], context.device), settings, record)


def _repository(
    record: Record, made_of: str, shapes: Sequence, compute: Callable, data: DetectionData, context: Context
) -> list[np.ndarray]:
    """Of the training images, beside the run of the network that makes it: (N, *shape) fp16 per level, on disk."""
    identity = hashlib.sha256(made_of.encode()).hexdigest()
    folder = record.path.parent / "features" / f"{record.key}-{identity[:8]}"
    hooks = {"log": context.log, "late": context.out_of_time}
    return feature_store.build(folder, data.train.names, shapes, compute, identity, **hooks)


def feature_repository(extract: Extractor, data: DetectionData, context: Context) -> list[np.ndarray]:
    """The first repository: features at native scales."""

    def compute(indices: list[int]) -> list[Tensor]:
        return extract(data.train.images[indices])

    shapes = feature_shapes(extract.settings)
    return _repository(extract.record, extract.made_of(data), shapes, compute, data, context)


# --- Compression -----------------------------------------------------------------------------------------------------


def channel_vectors(level: Level, x: Tensor, seed: int) -> Iterable[Tensor]:
    """The standardised channel vectors of all pixels of (N, C, H, W), in chunks of about 4096: (M, C) float32.

    If there are more than 200,000, 200,000 are drawn without repetition (ours: about 400 for each of 512 channels).
    """
    count, _, height, width = x.shape
    pixels = torch.randperm(count * height * width, generator=torch.Generator().manual_seed(seed))[:PCA_VECTORS]
    for part in pixels.to(x.device).tensor_split(math.ceil(len(pixels) / PCA_CHUNK)):
        row, column = part // width % height, part % width
        centred = x[part // (height * width), :, row, column].float() - level.mean[:, row, column].T  # (M, C)
        yield centred / level.deviation.flatten()


def fit_compressor(
    settings: CompressionSettings, features: list[Tensor], seed: int, context: Context
) -> tuple[Compressor, Trained | None]:
    """Fit on training features: ResVAEs in one loop, on the sum of the levels' losses; PCA level by level.

    Args:
        features: (N, C_k, H_k, W_k) per level, finest first, fp16 or wider, whole on the device that trains.

    Returns:
        The compressor on the features' device; what `train` returned (curve: "loss", then "mse_level_k" in units of
        variance and "kl_level_k" in nats per latent value), None where nothing is trained by gradients.

    Raises:
        ValueError: settings, features that are not finite or too few for a PCA; OutOfTime, NonFiniteLoss of `train`.
    """
    torch.manual_seed(seed)
    device, precision = features[0].device, precision_of(settings, features[0].device)
    compressor = build_compressor(settings, [tuple(x.shape[1:]) for x in features])
    compressor.to(device, memory_format=torch.channels_last)
    for level, x in zip(compressor.levels, features, strict=True):
        level.fit_standardisation(x)
        if settings.method == "pca":
            level.codec.fit(channel_vectors(level, x, seed))
    if settings.method != "resvae":
        return compressor, None

    codecs = nn.ModuleList(level.codec for level in compressor.levels).requires_grad_(True)

    def draw(indices: Tensor, generator: torch.Generator, epoch: int) -> tuple[list[Tensor], torch.Generator]:
        posterior = int(torch.randint(2**31, (), generator=generator))  # the seed of its samples
        return [x[indices] for x in features], torch.Generator(device).manual_seed(posterior)

    def step(batch: tuple[list[Tensor], torch.Generator]) -> dict[str, Tensor]:
        losses, (maps, posterior) = [], batch
        for level, x in zip(compressor.levels, maps, strict=True):
            target = level.standardise(x).contiguous(memory_format=torch.channels_last)
            with autocast(device, precision):
                outputs = level.codec(target, posterior)
            reconstruction, mean, log_variance = (y.float() for y in outputs)
            losses.append(resvae.vae_loss(reconstruction, target, mean, log_variance, settings.kl, settings.reduction))
        scalars = {"loss": sum(loss["loss"] for loss in losses)}
        return scalars | {f"{name}_level_{k}": loss[name] for name in ("mse", "kl") for k, loss in enumerate(losses)}

    optimizer = adam(codecs, settings.learning_rate)
    rate = rate_per_epoch(settings.learning_rate, "constant", settings.epochs)
    trained = train(codecs, draw, step, len(features[0]), settings, seed, context, optimizer, rate)
    codecs.requires_grad_(False)
    return compressor, trained


@torch.inference_mode()
def reconstruction_error(compressor: Compressor, features: list[Tensor]) -> dict[str, float]:
    """What features (N, C_k, H_k, W_k) per level lose on the way through latents in fp16, as the repository holds them.

    Returns:
        "unexplained_level_k": the fraction of variance (about the mean map) unexplained, in per cent: squared errors by
        squares, both summed over the standardised features. "unexplained": mean over levels.
        "latent_std": of the latent values, mean over levels.
        "kl" (ResVAE only): nats per latent value, mean over levels; near 0 the posterior has collapsed to the prior.
        "compression_ratio": feature values per latent value.
    """
    levels = [level_error(level, x) for level, x in zip(compressor.levels, features, strict=True)]
    found = {name: sum(level[name] for level in levels) / len(levels) for name in levels[0]}
    found |= {f"unexplained_level_{k}": level["unexplained"] for k, level in enumerate(levels)}
    found["compression_ratio"] = found.pop("values") / found.pop("latents")
    return found


def level_error(level: Level, x: Tensor) -> dict[str, float]:
    """Of one level: "unexplained", "latent_std", "kl", and how many "values" became how many "latents"."""
    variational, latents = isinstance(level.codec, resvae.ResVAE), 0
    sums = torch.zeros(5, dtype=torch.float64, device=x.device)  # errors^2, features^2, latents, latents^2, KL
    for part in x.split(CHUNK):
        target = level.standardise(part)
        with full_float32():
            z = level.encode(part).half()
            error = level.decode(z) / level.deviation - target
            kl = resvae.kl_divergence(*level.codec.posterior(target)) if variational else torch.zeros_like(z)
        sums += torch.stack([y.double().sum() for y in (error.square(), target.square(), z, z.double().square(), kl)])
        latents += z.numel()
    lost, total, first, second, nats = sums.tolist()
    std = math.sqrt(max(second / latents - (first / latents) ** 2, 0.0))
    found = {"unexplained": 100 * lost / total, "latent_std": std, "values": x.numel(), "latents": latents}
    return found | ({"kl": nats / latents} if variational else {})


def load_compressor(record: Record, settings: CompressionSettings, device: str) -> Compressor:
    """The compressor of a finished run, frozen."""
    compressor = build_compressor(settings, feature_shapes(settings))
    load_weights(record, compressor)
    return compressor.to(device).eval().requires_grad_(False)


def run_compression(settings: CompressionSettings, seed: int, data: DetectionData, context: Context) -> Result:
    """Build the first repository, train the compressor on it, and measure what it loses, on dev and test images.

    Costs: seconds of training; memory of the training images' features before and after (MB, fp16).
    """
    extract = extractor(settings, data, context)
    features = feature_store.load(feature_repository(extract, data, context), context.device)
    compressor, trained = fit_compressor(settings, features, seed, context)
    compressor = compressor.eval().requires_grad_(False)
    found = {"train": reconstruction_error(compressor, features)}
    for part in HELD_OUT:
        few = getattr(data, part).images.split(64)
        fresh = joined([level.half() for level in extract(images)] for images in few)
        found[part] = reconstruction_error(compressor, fresh)
    before = sum(level.nbytes for level in features) / 1e6
    costs = {"features_mb": before, "latents_mb": before / found["train"]["compression_ratio"]}
    notes = {"ddpm": extract.record.key, "ddpm_sha256": extract.record.model_sha256}
    notes["unexplained_train"] = f"{found['train']['unexplained']:.2f} %"
    return Result(
        metrics=rounded(found["test"]),
        per_class={},
        dev=rounded(found["dev"]),
        curve=trained.curve if trained else {},
        predictions={},
        model=compressor.state_dict(),
        costs={name: round(mb, 3) for name, mb in costs.items()} | (trained.costs if trained else {}),
        precision=precision_of(settings, context.device) if trained else "fp32",
        notes=notes,
    )


# --- Latents ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(compressor: Compressor, features: list[Tensor]) -> list[Tensor]:
    """Features of a few images -> their latents in fp16, computed alike for training images and for new ones."""
    with full_float32():
        return [latents.half() for latents in compressor.encode([level.float() for level in features])]


def latents_of(extract: Extractor, compressor: Compressor, images: Tensor, batch: int = 64) -> list[Tensor]:
    """Images uint8 (N, C, 64, 64) -> their latents, on the fly: three levels (N, C_k / 8, H_k, W_k) fp16."""
    return joined(encode(compressor, extract(part)) for part in images.split(batch))


def latent_repository(
    record: Record, compressor: Compressor, extract: Extractor, data: DetectionData, context: Context
) -> list[np.ndarray]:
    """The second repository: the latents of the compressor whose run is `record`, on training images alone."""
    raw = cache(lambda: feature_repository(extract, data, context))  # needed only where a latent is missing

    def compute(indices: list[int]) -> list[Tensor]:
        return encode(compressor, [torch.tensor(level[indices], device=context.device) for level in raw()])

    settings = extract.settings
    ratio = 1 if settings.method == "none" else settings.ratio
    shapes = [(channels // ratio, *sides) for channels, *sides in feature_shapes(settings)]
    return _repository(record, f"{record.model_sha256} {extract.made_of(data)}", shapes, compute, data, context)


@dataclass(frozen=True)
class Prepared:
    """What a hybrid detector's training and test read."""

    compressor: Compressor
    latents: list[Tensor]  # of the training images: three levels (N, C_k / 8, H_k, W_k) fp16 on the device
    unseen: dict[str, list[Tensor]]  # "dev", "test": the same, computed on the fly
    extract: Extractor
    notes: dict[str, str]


def prepare(
    settings: CompressionSettings, data: DetectionData, context: Context, parts: tuple[str, ...] = HELD_OUT
) -> Prepared:
    """Latents of a set, `data` at the diffusion model's size; runs the stages that this machine has not run yet."""
    record = context.require(settings, 0)  # ours: one compressor for all seeds of what follows
    compressor = load_compressor(record, settings, context.device)
    extract = extractor(settings, data, context)
    if record.notes["ddpm_sha256"] != extract.record.model_sha256:
        raise DataError(f"{record.path} was made from another diffusion model than {extract.record.path}: delete it")
    latents = feature_store.load(latent_repository(record, compressor, extract, data, context), context.device)
    unseen = {part: latents_of(extract, compressor, getattr(data, part).images) for part in parts}
    notes = {"compressor": record.key, "compressor_sha256": record.model_sha256, "ddpm": extract.record.key}
    return Prepared(compressor, latents, unseen, extract, notes)
