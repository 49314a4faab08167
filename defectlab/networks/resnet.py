"""The frozen teacher of reverse distillation (Deng and Li, CVPR 2022, section 3.1): an ImageNet ResNet's layers 1 to 3.

Their strides are 4, 8 and 16, their channels (64, 128, 256) for ResNet-18 and (256, 512, 1024) for ResNet-50 and
WideResNet-50-2.
"""

import hashlib
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from defectlab.files import WeightsError, weights_dir
from defectlab.precision import full_float32

ARCHITECTURES = {
    "resnet18": (models.resnet18, models.ResNet18_Weights.IMAGENET1K_V1),
    "resnet50": (models.resnet50, models.ResNet50_Weights.IMAGENET1K_V1),
    "wide_resnet50_2": (models.wide_resnet50_2, models.Wide_ResNet50_2_Weights.IMAGENET1K_V1),
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Teacher(nn.Module):
    """Layers 1-3 of a torchvision ResNet, frozen; always in eval mode, also after `train()`: weights with fused batch
    norms (running mean 0 and variance 1 by construction) would give other features in train mode."""

    def __init__(self, name: str):
        super().__init__()
        architecture = base_name(name)
        net = ARCHITECTURES[architecture][0](weights=None)
        self.name = name
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2, self.layer3 = net.layer1, net.layer2, net.layer3
        self.bottleneck = {"resnet18": 0, "resnet50": 4, "wide_resnet50_2": 2}[architecture]
        self.channels = (64, 128, 256) if architecture == "resnet18" else (256, 512, 1024)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """uint8 images (B, 3, H, W) -> features [(B, C1, H/4, W/4), (B, C2, H/8, W/8), (B, C3, H/16, W/16)]."""
        x = self.stem((images.float() / 255 - self.mean) / self.std)
        first = self.layer1(x)
        second = self.layer2(first)
        return [first, second, self.layer3(second)]


def base_name(name: str) -> str:
    """'resnet18_random' -> 'resnet18'. Raises WeightsError for a name that is no teacher."""
    architecture = name.removesuffix("_random")
    if architecture not in ARCHITECTURES:
        raise WeightsError(f"unknown teacher {name!r}: use one of {', '.join(ARCHITECTURES)}, or NAME_random")
    return architecture


def load_teacher(name: str, device: str | torch.device = "cpu") -> Teacher:
    """The teacher `name` with ImageNet weights on `device`.

    Weights come from `<name>.safetensors` or `<name>_<anything>.safetensors` in DEFECTLAB_WEIGHTS, the first by name
    (torchvision's keys, at least the stem and layers 1-3), else from torchvision's own cache. Nothing is downloaded.
    Only `<name>_random`, for smoke runs, has random weights; they are seeded. WeightsError for an unknown name, weights
    that are not there, or keys that do not fit.
    """
    architecture = base_name(name)
    if name.endswith("_random"):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the CPU's alone: torch.manual_seed would seed the GPUs, too
            return Teacher(name).to(device)
    teacher = Teacher(name)
    path = _weights_file(architecture)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if path.suffix == ".pth" else load_file(path)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} cannot be read ({error}): replace it") from error
    _load(teacher, state, path)
    return teacher.to(device)


def _weights_file(architecture: str) -> Path:
    folder = weights_dir()
    local = min(folder.glob(f"{architecture}[._]*safetensors"), default=None) if folder else None
    path = local or Path(torch.hub.get_dir()) / "checkpoints" / Path(ARCHITECTURES[architecture][1].url).name
    if not path.exists():
        raise WeightsError(
            f"no ImageNet weights for the teacher {architecture}: put {architecture}.safetensors into the folder "
            f"that DEFECTLAB_WEIGHTS names, or let torchvision fetch them once into {path}: "
            f'python -c "from torchvision.models import {architecture}; '
            f"{architecture}(weights='IMAGENET1K_V1')\""
        )
    return path


def _load(teacher: Teacher, state: dict[str, Tensor], path: Path) -> None:
    wanted = {k for k in teacher.state_dict() if k not in ("mean", "std") and not k.endswith("batches_tracked")}
    renamed = {re.sub(r"^conv1\b", "stem.0", re.sub(r"^bn1\b", "stem.1", k)): value for k, value in state.items()}
    missing = sorted(wanted - renamed.keys())
    if missing:
        raise WeightsError(
            f"{path} is no {teacher.name} in torchvision's key layout: it lacks {missing[0]} and "
            f"{len(missing) - 1} more of {len(wanted)} tensors; use a file that holds stem and layers 1-3"
        )
    try:
        teacher.load_state_dict({k: renamed[k] for k in wanted}, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit {teacher.name}: {error}") from error


def fingerprint(teacher: Teacher) -> str:
    """Sha256 (16 hex digits) over the teacher's parameters and buffers: what a record means by "weights"."""
    digest = hashlib.sha256()
    for key, value in sorted(teacher.state_dict().items()):
        if not key.endswith("batches_tracked"):
            digest.update(key.encode())
            digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def extract(teacher: Teacher, images: Tensor, dtype: torch.dtype, batch: int = 32) -> list[Tensor]:
    """Teacher features of uint8 images (N, 3, H, W) on its device: three maps (N, C, h, w), channels last in memory.

    The teacher computes in float32; `dtype` (bfloat16 or float32) is that of the features.
    """
    with full_float32():
        parts = [[f.to(dtype) for f in teacher(chunk)] for chunk in images.split(batch)]
    return [torch.cat(layer).contiguous(memory_format=torch.channels_last) for layer in zip(*parts, strict=True)]
