"""The hybrid detector (section III-C, Fig. 4) and its student (section III-D, Fig. 7), which is what is deployed.

Yu, arXiv 2408.13845. The hybrid reads an image and its latents: the frozen compressor maps them back to features, a
noise filter and the dynamic cross-fusion join them with the three maps of the backbone, and neck and head are
unchanged. The student is the plain detector.

Features belong to the plain image, so a mosaic of four images is not possible. Hybrid, student and their baseline share
a recipe of flips and scale, whose matrix moves the features, too (ours: the paper is silent).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defectlab.geometry import warp
from defectlab.networks.yolo.decode import DefectFinder
from defectlab.networks.yolo.model import Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.papers.d3n.fusion import CrossModelFusion
from defectlab.papers.d3n.resvae import Compressor, feature_shapes


@dataclass(frozen=True)
class HybridSettings(DetectorSettings):
    """The detector's settings and what section III-C adds. Sources as comments."""

    model: ClassVar[str] = "d3n_hybrid"
    version: ClassVar[int] = DetectorSettings.version  # plus one where a change of ours alters results

    compression: Any = None  # CompressionSettings, which name the diffusion model
    fuse: str = "dynamic"  # Table II: "concat", "sum", "weighted_sum"
    noise_filter: bool = True  # Table III
    dual: bool = True  # Table I: self-attention in both branches
    weighted: bool = True  # Table I: learned weights of the branches
    residual: bool = True  # Table I: the detector's features once more
    norm: bool = True  # Table I: features of the diffusion model normalised before cross-attention
    printed_scale: bool = False  # equation 5 as printed, against as usually meant
    positional: str = "none"  # section IV-B.2: encodings worsen


@dataclass(frozen=True)
class InstanceSettings(DetectorSettings):
    """The detector with masks, on a set that has them."""

    model: ClassVar[str] = "instance_detector"
    version: ClassVar[int] = DetectorSettings.version


@dataclass(frozen=True)
class StudentSettings(DetectorSettings):
    """The detector's settings and what section III-D adds."""

    model: ClassVar[str] = "d3n_student"
    version: ClassVar[int] = DetectorSettings.version

    teacher: Any = None  # HybridSettings
    teacher_seed: int | None = None  # ours: None, the student's own, so that its spread is the teacher's, too
    transfer: float = 1.0  # ours: lambda of equation 7 is not stated
    distance: str = "l2"  # section IV-A; "bce": equation 7 with the detector's own losses
    temperature: float = 20.0  # section IV-A
    box: str = "ciou"  # equation 7: the detector's own; "l2": of coordinates relative to the image


SWITCHES = ("fuse", "noise_filter", "dual", "weighted", "residual", "norm", "printed_scale", "positional")


class HybridDetector(nn.Module):
    """Images (B, 3, S, S) in 0..1 and latents (B, C_k / 8, H_k, W_k), finest first -> the detector's raw maps.

    The latents are those of the plain images; `matrices` (B, 3, 3), where given, those of the images' augmentation. The
    decoded features are moved, not the latents: convolution kernels are not symmetric, and zero latents do not decode
    to zero features. Outside the image the features are 0, no difference from the mean features.
    """

    def __init__(self, detector: Detector, compressor: Compressor, fusion: CrossModelFusion):
        super().__init__()
        self.detector, self.fusion, self.compressor = detector, fusion, compressor
        self.family, self.class_count = detector.family, detector.class_count

    @property
    def anchors(self) -> Tensor:
        return self.detector.anchors

    def forward(self, images: Tensor, *latents: Tensor, matrices: Tensor | None = None) -> list[Tensor]:
        maps = self.detector.backbone(images)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            features = self.compressor.decode(latents)  # feature mapping, by fixed parameters (Fig. 5)
            if matrices is not None:
                features = [warp(level, matrices, images.shape[-1]) for level in features]
        return self.detector.head(self.detector.neck(tuple(self.fusion(maps, features))))


def build_hybrid(settings: HybridSettings, detector: Detector, compressor: Compressor) -> HybridDetector:
    """A fresh hybrid of a fresh detector (with or without masks) and a trained compressor."""
    switches = {name: getattr(settings, name) for name in SWITCHES}
    channels = [shape[0] for shape in feature_shapes(settings.compression)]
    return HybridDetector(detector, compressor, CrossModelFusion(detector.widths, channels, **switches))


class D3N(DefectFinder):
    """The student as deployed, images -> boxes: `D3N(StudentSettings(family="v5", scale="s"), classes=6)(images)`;
    `detector` has fresh weights."""

    def __init__(self, settings: StudentSettings, classes: int):
        super().__init__(build_detector(settings, classes))
