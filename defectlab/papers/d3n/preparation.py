"""Section III-B of D3N, feature preparation: from pictures to a repository of compressed features.

Yu, "D3N: Bring the Power of Diffusion Model to Defect Detection", arXiv 2408.13845, section III-B and Fig. 3. The
training pictures go through the frozen diffusion model once; their decoder features are the first repository, on which
the compressor is trained; its latents are the second one, which the detector's training reads. Both hold training
pictures alone, as in the paper, which leaves open how a test picture is then queried. Ours: features of dev and test
pictures are computed on the fly by the same frozen models. No label is used anywhere here.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from defectlab.data.detection import DetectionData
from defectlab.data.store import DataError
from defectlab.diffusion.ddpm import load_ddpm, noise_schedule
from defectlab.diffusion.features import decoder_channels, decoder_features
from defectlab.diffusion.repository import Repository, build_repository
from defectlab.papers.d3n.compression import (
    CompressionSettings,
    Compressor,
    Shape,
    build_compressor,
    fit_compressor,
    reconstruction_error,
)
from defectlab.runs import Record, Result, load_weights
from defectlab.train import Session, autocast, full_float32, precision_of

PARTS = ("dev", "test")


@dataclass(frozen=True)
class Extractor:
    """The frozen diffusion model of a run, as a function from pictures to features."""

    unet: nn.Module
    settings: CompressionSettings
    record: Record

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 64) -> list[Tensor]:
        """uint8 (N, C, 64, 64) -> three levels (N, C_k, H_k, W_k) float32, finest first."""
        alpha_hat = noise_schedule(self.settings.ddpm.steps).to(images.device)
        options = {"timesteps": self.settings.timesteps, "combine": self.settings.combine, "alpha_hat": alpha_hat}
        with autocast(images.device, precision_of(self.settings.ddpm, images.device)):
            chunks = [decoder_features(self.unet, part, **options) for part in images.split(batch)]
        return [torch.cat(level) for level in zip(*chunks, strict=True)]

    def made_of(self, data: DetectionData) -> str:
        """What the training pictures' features follow from: weights, pictures, settings and precision."""
        precision = precision_of(self.settings.ddpm, next(self.unet.parameters()).device)
        how = f"{self.settings.timesteps} {self.settings.combine} {precision}"
        return f"{self.record.model_sha256} {data.fingerprint} {how}"


def feature_shapes(settings: CompressionSettings) -> list[Shape]:
    """(C_k, H_k, W_k) of the features of one picture, finest first."""
    times, side = len(settings.timesteps) if settings.combine == "concat" else 1, settings.ddpm.size
    return [(times * c, side >> k, side >> k) for k, c in enumerate(decoder_channels(settings.ddpm))]


def extractor(settings: CompressionSettings, data: DetectionData, device: str, session: Session) -> Extractor:
    """The diffusion model that `settings` name, trained first if this machine has not run it."""
    record = session.need(settings.ddpm, 0)  # ours: one diffusion model for all seeds of what follows
    return Extractor(load_ddpm(record, settings.ddpm, data.train.images.shape[1], device), settings, record)


def feature_repository(extract: Extractor, data: DetectionData, session: Session) -> Repository:
    """The first repository: features of the training pictures at native scales, fp16, beside the model's run."""
    settings = extract.settings
    identity = hashlib.sha256(extract.made_of(data).encode()).hexdigest()
    folder = extract.record.path.parent / "features" / f"{extract.record.key}-{identity[:8]}"

    def compute(indices: list[int]) -> list[Tensor]:
        return extract(data.train.images[indices])

    return build_repository(folder, data.train.names, feature_shapes(settings), compute, identity, say=session.say)


def latent_repository(
    record: Record, compressor: Compressor, extract: Extractor, data: DetectionData, session: Session
) -> Repository:
    """The second repository: the latents of the compressor whose run is `record`, on training pictures alone."""
    settings, device = extract.settings, next(extract.unet.parameters()).device
    identity = hashlib.sha256(f"{record.model_sha256} {extract.made_of(data)}".encode()).hexdigest()
    folder = record.path.parent / "features" / f"{record.key}-{identity[:8]}"
    raw = cache(lambda: feature_repository(extract, data, session))  # needed only where a latent is missing

    def compute(indices: list[int]) -> list[Tensor]:
        return encode(compressor, [level.to(device) for level in raw().read(indices)])

    ratio = 1 if settings.method == "none" else settings.ratio
    shapes = [(channels // ratio, *sides) for channels, *sides in feature_shapes(settings)]
    return build_repository(folder, data.train.names, shapes, compute, identity, say=session.say)


@torch.no_grad()
def encode(compressor: Compressor, features: list[Tensor]) -> list[Tensor]:
    """Features of a few pictures -> their latents in fp16, computed alike for training pictures and for new ones."""
    with full_float32():
        return [latents.half() for latents in compressor.encode([level.float() for level in features])]


def latents_of(extract: Extractor, compressor: Compressor, images: Tensor, batch: int = 64) -> list[Tensor]:
    """Pictures uint8 (N, C, 64, 64) -> their latents, on the fly: three levels (N, C_k / 8, H_k, W_k) fp16."""
    chunks = [encode(compressor, extract(part)) for part in images.split(batch)]
    return [torch.cat(level) for level in zip(*chunks, strict=True)]


def load_compressor(record: Record, settings: CompressionSettings, device: str) -> Compressor:
    """The compressor of a finished run, frozen."""
    compressor = build_compressor(settings, feature_shapes(settings))
    load_weights(record, compressor)
    return compressor.to(device).eval().requires_grad_(False)


def run_compression(
    settings: CompressionSettings, seed: int, data: DetectionData, device: str, session: Session
) -> Result:
    """Build the first repository, train the compressor on it, and measure what it loses, on dev and test pictures.

    Costs: seconds of training; memory of the training pictures' features before and after (MB, fp16).
    """
    extract = extractor(settings, data, device, session)
    raw = feature_repository(extract, data, session)
    features = raw.load(device)
    compressor, trained = fit_compressor(settings, features, seed, session)
    compressor = compressor.eval().requires_grad_(False)
    found = {"train": reconstruction_error(compressor, features)}
    for part in PARTS:
        fresh = [[level.half() for level in extract(few)] for few in getattr(data, part).images.split(64)]
        found[part] = reconstruction_error(compressor, [torch.cat(level) for level in zip(*fresh, strict=True)])
    rounded = {part: {k: round(v, 4) for k, v in values.items()} for part, values in found.items()}
    ratio = found["train"]["compression_ratio"]
    before = raw.bytes / 1e6
    costs = {"features_mb": round(before, 3), "latents_mb": round(before / ratio, 3)}
    if trained:
        costs |= trained.costs
    notes = {"ddpm": extract.record.key, "ddpm_sha256": extract.record.model_sha256}
    notes["unexplained_train"] = f"{found['train']['unexplained']:.2f} %"
    curve = trained.curve if trained else {}
    precision = precision_of(settings, device) if trained else "fp32"
    return Result(
        rounded["test"], {}, rounded["dev"], curve, {}, compressor.state_dict(), costs, precision, notes=notes
    )


@dataclass(frozen=True)
class Prepared:
    """What a hybrid detector's training and test read."""

    compressor: Compressor
    latents: list[Tensor]  # of the training pictures: three levels (N, C_k / 8, H_k, W_k) fp16 on the device
    unseen: dict[str, list[Tensor]]  # "dev", "test": the same, computed on the fly
    extract: Extractor
    notes: dict[str, str]


def prepare(
    settings: CompressionSettings, data: DetectionData, device: str, session: Session, parts: tuple[str, ...] = PARTS
) -> Prepared:
    """Latents of a set, `data` at the diffusion model's size; runs the stages that this machine has not run yet."""
    record = session.need(settings, 0)  # ours: one compressor for all seeds of what follows
    compressor = load_compressor(record, settings, device)
    extract = extractor(settings, data, device, session)
    if record.notes["ddpm_sha256"] != extract.record.model_sha256:
        raise DataError(f"{record.path} was made from another diffusion model than {extract.record.path}: delete it")
    latents = latent_repository(record, compressor, extract, data, session).load(device)
    unseen = {part: latents_of(extract, compressor, getattr(data, part).images) for part in parts}
    notes = {"compressor": record.key, "compressor_sha256": record.model_sha256, "ddpm": extract.record.key}
    return Prepared(compressor, latents, unseen, extract, notes)
