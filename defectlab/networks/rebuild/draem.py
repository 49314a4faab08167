"""DRAEM: Zavrtanik, Kristan, Skočaj, "DRAEM: A Discriminatively Trained Reconstruction Embedding for Surface Anomaly
Detection", ICCV 2021, arXiv 2108.07610.

Defects are made up: a foreign texture is laid over a good image where Perlin noise says so. One network learns to give
back the good image; a second one sees both, and learns to mark what was laid over it.

Ours: the textures are images of the other data sets of this study (the paper: DTD), turned by right angles (the paper:
three of nine photometric and geometric changes); both networks are narrow in quick; training sees crops, the test whole
images, for all layers are convolutions; the noise has square cells and is stretched to -1..1 before it is cut (public
copies of the official code have cells of two sides and cut the noise as it is: smaller defects). Section numbers are
from memory, as what is marked "not checked".
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defectlab.networks.blocks import two_convolutions
from defectlab.networks.rebuild.autoencoder import ssim_map
from defectlab.networks.rebuild.base import Normal, at_map_size, crops, to_unit
from defectlab.precision import at_least_float32, sent

SCORE_WINDOW = 21  # section 3.3: px a side of the mean whose maximum is the image's score
GAMMA = 2.0  # section 3.2: of the focal loss
LEVELS = 4  # halvings of both networks; the paper: 4 and 5, not checked


@dataclass(frozen=True)
class DRAEMSettings:
    """DRAEM. What the paper has is said where it differs."""

    model: ClassVar[str] = "draem"
    version: ClassVar[int] = 1

    dataset: str = "aitex"
    size: int = 256  # section 4
    patch: int = 128  # ours: px a side of the crops in training; the paper: whole images
    rebuild_width: int = 16  # ours: channels at full size of the first network; official code: 128
    mark_width: int = 12  # ours: of the second; official code: 64
    opacity: tuple[float, float] = (0.1, 1.0)  # section 3.1: beta
    cells: tuple[int, int] = (2, 32)  # of the Perlin noise along a side, a power of two between these; not checked
    good: float = 0.5  # share of the images that stay good; official code
    draws: int = 256  # ours
    epochs: int = 14  # section 4: 700
    batch: int = 8  # section 4
    learning_rate: float = 0.001  # ours, for few steps; section 4: 0.0001
    precision: str = "bf16"  # where the device is fast at it


# --- Section 3.1: defects that are made up ---------------------------------------------------------------------------


def perlin_noise(count: int, side: int, cells: int, generator: torch.Generator) -> Tensor:
    """Gradient noise (Perlin 1985), one draw for each image: (count, side, side), about -0.7 to 0.7, and 0 at the
    corners of `cells` x `cells` squares."""
    angle = 2 * torch.pi * torch.rand(count, cells + 1, cells + 1, generator=generator)
    at = (torch.arange(side) + 0.5) * cells / side
    cell, inside = at.long(), at - at.long()
    fade = inside**3 * (inside * (inside * 6 - 15) + 10)

    def corner(down: int, right: int) -> Tensor:
        here = angle[:, (cell + down)[:, None], cell + right]  # (count, side, side)
        return here.sin() * (inside - down)[:, None] + here.cos() * (inside - right)

    top = torch.lerp(corner(0, 0), corner(0, 1), fade)
    bottom = torch.lerp(corner(1, 0), corner(1, 1), fade)
    return torch.lerp(top, bottom, fade[:, None])


def perlin_masks(count: int, side: int, cells: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Where defects are: (count, side, side) float 0 or 1. Each mask has its own size of cells, the
    same in both directions; the noise is cut off at 0.5 (section 3.1), stretched to -1..1 before (ours)."""
    powers = [2**n for n in range(side.bit_length()) if cells[0] <= 2**n <= min(cells[1], side // 2)]
    chosen = torch.randint(len(powers), (count,), generator=generator).tolist()
    noise = torch.cat([perlin_noise(1, side, powers[which], generator) for which in chosen])
    low, high = noise.amin((1, 2), keepdim=True), noise.amax((1, 2), keepdim=True)
    return (2 * (noise - low) / (high - low) - 1 > 0.5).float()


def make_defects(images: Tensor, textures: Tensor, masks: Tensor, opacity: Tensor) -> Tensor:
    """Equation 2: images and textures (B, C, H, W), masks (B, 1, H, W) 0 or 1, opacity (B, 1, 1, 1) -> the image where
    the mask is 0, else opacity · texture + (1 - opacity) · image. (The beta of the official code is 1 - opacity.)"""
    return images + masks * opacity * (textures - images)


# --- Section 3.2: two networks ---------------------------------------------------------------------------------------


class EncoderDecoder(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H, W); H and W are multiples of 16. Channels double with each halving, at most
    to eight times `width`. `skips`: a U-Net, the decoder sees the encoder's maps; without, all passes the coarsest."""

    def __init__(self, inputs: int, outputs: int, width: int, skips: bool):
        super().__init__()
        self.skips = skips
        widths = [width * min(2**n, 8) for n in range(LEVELS + 1)]
        self.down = nn.ModuleList(two_convolutions(a, b) for a, b in zip((inputs, *widths), widths, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(two_convolutions(a + b if skips else a, b) for a, b in pairs)
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for i, one in enumerate(self.down):
            x = one(F.max_pool2d(x, 2) if i else x)
            found.append(x)
        for one, fine in zip(self.up, found[-2::-1], strict=True):
            x = F.interpolate(x, scale_factor=2)
            x = one(torch.cat([x, fine], 1) if self.skips else x)
        return self.head(x)


def focal_loss(logits: Tensor, masks: Tensor, gamma: float = GAMMA) -> Tensor:
    """Lin et al., ICCV 2017, without class weights: logits and masks 0 or 1 (B, H, W) -> mean of -(1 - p)^gamma log p,
    p the probability of the right class."""
    error = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    return ((1 - torch.exp(-error)) ** gamma * error).mean()


class DRAEM(Normal):
    """Map: probability of a defect; score: the maximum of its mean over 21 x 21 px."""

    foreign = True

    def __init__(self, settings: DRAEMSettings):
        super().__init__()
        if settings.patch % 2**LEVELS or settings.size % 2**LEVELS:
            raise ValueError(
                f"size and patch must be multiples of {2**LEVELS} px, got {settings.size}, {settings.patch}"
            )
        self.settings = settings
        self.rebuild = EncoderDecoder(3, 3, settings.rebuild_width, skips=False)
        self.mark = EncoderDecoder(6, 1, settings.mark_width, skips=True)
        self.textures: Tensor | None = None  # no buffer: they are not saved

    def begin(self, prepared: Tensor, foreign: Tensor | None = None) -> None:
        """Textures for grey images are grey (ours): colour would give them away. ValueError without images of other
        sets."""
        if foreign is None or not len(foreign):
            raise ValueError("DRAEM needs images of other data sets for its textures")
        grey = bool((prepared[:, :1] == prepared).all())
        self.textures = foreign.float().mean(1, keepdim=True).to(foreign.dtype).expand_as(foreign) if grey else foreign

    def corrupted(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Good images (B, 3, P, P) in 0..1 -> the same with made-up defects, and their masks (B, 1, P, P)."""
        count, side = len(images), images.shape[-1]
        chosen = torch.randint(len(self.textures), (count,), generator=generator)
        textures = to_unit(crops(self.textures[sent(chosen, self.textures.device)], side, generator))
        turns = torch.randint(4, (), generator=generator)
        textures = textures.rot90(int(turns), (-2, -1))
        masks = perlin_masks(count, side, self.settings.cells, generator)[:, None]
        spared = torch.rand(count, 1, 1, 1, generator=generator) < self.settings.good
        low, high = self.settings.opacity
        opacity = low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)
        masks, opacity = sent(masks * ~spared, images.device), sent(opacity, images.device)
        return make_defects(images, textures, masks, opacity), masks

    def seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in 0..1 -> their reconstruction and the logits of a defect (B, H, W), float32."""
        images = images.contiguous(memory_format=torch.channels_last)
        rebuilt = self.rebuild(images)
        logits = self.mark(torch.cat([images, rebuilt.to(images.dtype)], 1))
        return at_least_float32(rebuilt), at_least_float32(logits[:, 0])

    def loss(self, prepared: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Equation 5: L2 + SSIM of the reconstruction against the good image + focal loss of the marks."""
        images = to_unit(crops(prepared, self.settings.patch, generator))
        changed, masks = self.corrupted(images, generator)
        rebuilt, logits = self.seen(changed)
        terms = {
            "l2": F.mse_loss(rebuilt, images),
            "ssim": (1 - ssim_map(rebuilt, images)).mean(),
            "focal": focal_loss(logits, masks[:, 0]),
        }
        return {"loss": sum(terms.values())} | terms

    def maps(self, prepared: Tensor) -> Tensor:
        return at_map_size(self.seen(to_unit(prepared))[1].sigmoid())

    def scores(self, prepared: Tensor, maps: Tensor) -> Tensor:
        mean = F.avg_pool2d(maps[:, None], SCORE_WINDOW, 1, SCORE_WINDOW // 2)
        return mean.flatten(1).amax(1)
