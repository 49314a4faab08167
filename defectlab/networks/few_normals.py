"""Anomaly detection from a handful of good images: the features, scores and settings of three methods.

- PatchCore and reverse distillation as in `feature_baselines` and `reverse_distillation`, on 1 to 16 good images.
- AnomalyDINO: Damm et al., "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2", WACV 2025, arXiv
  2405.14529. Each patch token of DINOv2 is compared with all patches of the good images by the cosine. Not here: the
  mask of the object (the authors use none for metal nuts), turns by 45 degrees; a map has 256 px, not the image's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from defectlab.files import WeightsError, weights_dir
from defectlab.networks import resnet
from defectlab.networks.efficientnet import Lite0
from defectlab.networks.feature_baselines import nearest_distances, patch_features
from defectlab.networks.reverse_distillation import gaussian_smooth, upsample
from defectlab.precision import check_uint8

METHODS = ("patchcore", "rd4ad", "nearest")
TEACHERS = ("resnet18", "lite0", "dinov2_small")  # each also with "_random" behind: seeded random weights
DINOV2 = "vit_small_patch14_dinov2.lvd142m"  # timm's name
DINOV2_FILE = "dinov2_small.safetensors"
PATCH = 14  # px a side of DINOv2's patches


@dataclass(frozen=True)
class FewNormalsSettings:
    """One method on growing numbers of good images; ours where nothing else is said."""

    model: ClassVar[str] = "few_normals"
    version: ClassVar[int] = 1

    dataset: str = "mvtec_ad/metal_nut"
    method: str = "patchcore"  # "rd4ad"; "nearest": AnomalyDINO section 3.1, also with the other teachers
    teacher: str = "resnet18"  # "lite0", "dinov2_small" (AnomalyDINO section 3.1)
    size: int = 256  # RD4AD section 4.1; AnomalyDINO: 448 or 672, multiples of 14
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)  # AnomalyDINO table 1: good images, ascending
    turned: bool = False  # AnomalyDINO section 3.2: each good image also turned, there by 45 degrees, here by 90
    bank: int = 4096  # patches kept at most; AnomalyDINO keeps all
    steps: int = 50  # of RD4AD, whatever the number of images; rounded to whole passes over them
    batch: int = 8  # of RD4AD; RD4AD section 4.1 has 16
    learning_rate: float = 0.005  # RD4AD section 4.1, no schedule
    betas: tuple[float, float] = (0.5, 0.999)  # RD4AD section 4.1
    loss: str = "whole_map"  # official RD4AD code
    precision: str = "bf16"  # of the kept features and of RD4AD's training, where the device is fast at it


def check(settings: FewNormalsSettings) -> str:
    """The teacher's name without "_random". ValueError for settings that name nothing, or do not go together."""
    teacher = settings.teacher.removesuffix("_random")
    if settings.method not in METHODS or teacher not in TEACHERS:
        known = f"use one of {', '.join(METHODS)} with one of {', '.join(TEACHERS)}"
        raise ValueError(f"unknown method {settings.method!r} or teacher {settings.teacher!r}: {known}")
    if settings.method == "rd4ad" and teacher != "resnet18":
        raise ValueError(f"the student of RD4AD mirrors resnet18 here, not {teacher}")
    if settings.method == "patchcore" and teacher == "dinov2_small":
        raise ValueError("PatchCore joins maps of two strides, dinov2_small has one: use nearest")
    if teacher == "dinov2_small" and settings.size % PATCH:
        raise ValueError(f"images for DINOv2 must be a multiple of {PATCH} px a side, got {settings.size}")
    shots = settings.shots
    if not shots or sorted(set(shots)) != list(shots) or shots[0] < 1:
        raise ValueError(f"shots must be positive and ascending, got {shots}")
    return teacher


# --- Teachers ---------------------------------------------------------------------------------------------------------


class Lite0Maps(Lite0):
    """uint8 images (B, 3, H, W) -> maps of strides 4, 8 and 16, with 24, 40 and 112 channels, as a ResNet's layers."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        check_uint8(images)
        pixels = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        return self.net.forward_intermediates(pixels, [1, 2, 3], stop_early=True, intermediates_only=True)


class DINOv2(nn.Module):
    """The small vision transformer of Oquab et al., "DINOv2", TMLR 2024, for images of one size; frozen, in eval mode.

    Its positions are interpolated from those of 518 px. WeightsError where the weights are not there.
    """

    def __init__(self, size: int, pretrained: bool = True):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the CPU's alone
            self.net = _pretrained(size) if pretrained else timm.create_model(DINOV2, img_size=size)
        self.register_buffer("mean", torch.tensor(resnet.IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(resnet.IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "DINOv2":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """uint8 images (B, 3, S, S) -> the patch tokens after the last norm, one map (B, 384, S/14, S/14)."""
        check_uint8(images)
        tokens = self.net.forward_features((images.float() / 255 - self.mean) / self.std)
        side = images.shape[-1] // PATCH
        return [tokens[:, self.net.num_prefix_tokens :].mT.unflatten(2, (side, side))]


def _pretrained(size: int) -> nn.Module:
    """From dinov2_small.safetensors (timm's keys) in the folder that DEFECTLAB_WEIGHTS names, else the current one."""
    folder = weights_dir()
    try:
        overlay = {"file": str((folder or Path()) / DINOV2_FILE)}
        return timm.create_model(DINOV2, pretrained=True, img_size=size, pretrained_cfg_overlay=overlay)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"no weights of DINOv2 in {folder or 'a folder that DEFECTLAB_WEIGHTS names'} ({type(error).__name__}): on "
            f'a machine with a network, write {DINOV2_FILE} there: python -c "import timm, safetensors.torch as s; '
            f"s.save_file(timm.create_model('{DINOV2}', pretrained=True).state_dict(), '{DINOV2_FILE}')\""
        ) from error


def load_teacher(settings: FewNormalsSettings, device: str | torch.device = "cpu") -> nn.Module:
    """uint8 images -> list of maps, fine to coarse. Errors of `check`; WeightsError where weights are missing."""
    teacher, pretrained = check(settings), not settings.teacher.endswith("_random")
    if teacher == "resnet18":
        network = resnet.load_teacher(settings.teacher, device)
    else:
        network = Lite0Maps(pretrained) if teacher == "lite0" else DINOv2(settings.size, pretrained)
    return network.to(device, memory_format=torch.channels_last)


# --- AnomalyDINO, section 3.1: the nearest patch of the good images ---------------------------------------------------


def patches_of(maps: list[Tensor]) -> Tensor:
    """(B, h, w, C) float32: a vision transformer's one map as it is, those of a CNN as PatchCore joins layers 2, 3."""
    return maps[0].float().permute(0, 2, 3, 1) if len(maps) == 1 else patch_features(maps)


def mean_of_highest(distances: Tensor) -> Tensor:
    """(N, P) -> (N,): the mean of the highest 1 % of the patch distances, of one at least."""
    return distances.topk(max(1, distances.shape[1] // 100)).values.mean(1)


def score_nearest(maps: list[Tensor], bank: Tensor, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Teacher's maps and patches of the good images (M, C) -> smoothed maps (N, 256, 256), image scores (N,).

    A patch's distance is 1 - cosine, in 0..2.
    """
    bank, found, scores = functional.normalize(bank), [], []
    for chunk in zip(*(layer.split(batch) for layer in maps), strict=True):
        patches = functional.normalize(patches_of(list(chunk)), dim=-1)  # (B, h, w, C)
        distances = nearest_distances(patches.flatten(0, 2), bank)[0].view(patches.shape[:3]).square() / 2
        found.append(gaussian_smooth(upsample(distances)))
        scores.append(mean_of_highest(distances.flatten(1)))
    return torch.cat(found), torch.cat(scores)
