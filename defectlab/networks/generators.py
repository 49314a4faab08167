"""Images made from a few: DCGAN, WGAN-GP and a diffusion model, all class-conditional.

- DCGAN: Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
  Networks", ICLR 2016, arXiv 1511.06434.
- WGAN-GP: Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017, arXiv 1704.00028. Sections and
  numbers of algorithm 1.
- Diffusion: `defectlab.networks.diffusion` on the four pixels of 2 x 2 as channels, a quarter of the work.

Classes are ours: the generator's noise has the class beside it (one-hot), the critic has an output for each class.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from defectlab.networks.diffusion import to_uint8
from defectlab.networks.rebuild.ganomaly import decoder, encoder, initialise
from defectlab.precision import at_least_float32

LATENT = 100  # DCGAN section 4


@dataclass(frozen=True)
class GANSettings:
    """DCGAN, or with `penalty` WGAN-GP; images of 64 px."""

    model: ClassVar[str] = "gan"
    version: ClassVar[int] = 1

    penalty: float = 0.0  # of the gradient; above 0: WGAN-GP (algorithm 1: 10)
    critic_steps: int = 1  # for each of the generator (WGAN-GP: 5)
    width: int = 32  # ours; DCGAN's figure 1 has 128
    draws: int = 1920  # images an epoch: 60 steps, so each epoch has whole turns of critic and generator
    epochs: int = 25
    batch: int = 32  # ours, for few images; DCGAN section 4: 128, WGAN-GP: 64
    learning_rate: float = 0.0002  # DCGAN section 4; WGAN-GP: 0.0001
    betas: tuple[float, float] = (0.5, 0.999)  # DCGAN section 4; WGAN-GP: 0 and 0.9


def no_batch_norm(width: int) -> nn.Module:
    """WGAN-GP section 4: a penalty of each image's own gradient allows no batch norm in the critic; layer norm."""
    return nn.GroupNorm(1, width)


class GAN(nn.Module):
    """Generator and critic of grey images of `size` px (8, 16, 32, ...) in some classes."""

    def __init__(self, settings: GANSettings, classes: int, size: int):
        super().__init__()
        self.penalty, self.classes = settings.penalty, classes
        norm = no_batch_norm if settings.penalty else nn.BatchNorm2d
        self.generator = decoder(size, settings.width, LATENT + classes, 1)
        self.critic = encoder(size, settings.width, classes, 1, norm)
        self.apply(initialise)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """noise (B, 100), labels (B,) int64 -> images (B, 1, S, S) in -1..1."""
        told = torch.cat([noise, F.one_hot(labels, self.classes).to(noise)], 1)
        return self.generator(told[:, :, None, None])

    def judged(self, images: Tensor, labels: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Images and the classes that they shall be of -> (B,) float32: logits of being real, or a critic's values;
        `weights` in place of its own."""
        found = functional_call(self.critic, weights, images) if weights else self.critic(images)
        return at_least_float32(found.flatten(1)).gather(1, labels[:, None])[:, 0]

    def critic_loss(self, real: Tensor, fake: Tensor, labels: Tensor, mix: Tensor) -> Tensor:
        """Real and made images (B, 1, S, S); mix (B, 1, 1, 1) in 0..1: where between both the gradient is penalised."""
        on_real, on_fake = self.judged(real, labels), self.judged(fake, labels)
        if not self.penalty:
            return F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(self.judged(between, labels).sum(), between, create_graph=True)
        return on_fake.mean() - on_real.mean() + self.penalty * gradient_penalty(gradient)

    def generator_loss(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Of the generator alone: the critic gets no gradient."""
        constant = {name: value.detach() for name, value in self.critic.named_parameters()}
        on_fake = self.judged(self(noise, labels), labels, constant)
        return -on_fake.mean() if self.penalty else F.softplus(-on_fake).mean()


def gradient_penalty(gradient: Tensor) -> Tensor:
    """Algorithm 1, line 7: the mean of (length - 1)² over (B, ...)."""
    return (at_least_float32(gradient).flatten(1).norm(dim=1) - 1).square().mean()


@torch.no_grad()
def sample_gan(gan: GAN, labels: Tensor, seed: int, batch: int = 64) -> Tensor:
    """labels (N,) int64 -> uint8 images (N, 1, S, S), by a GAN in eval mode; the noise is drawn on the CPU."""
    noise = torch.randn(len(labels), LATENT, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    made = torch.cat([gan(*part) for part in zip(noise.split(batch), labels.split(batch), strict=True)])
    return to_uint8(made)


def folded(images: Tensor) -> Tensor:
    """(N, 1, S, S) -> (N, 4, S/2, S/2): the four pixels of 2 x 2 as channels."""
    return F.pixel_unshuffle(images, 2)


def unfolded(images: Tensor) -> Tensor:
    """The other way."""
    return F.pixel_shuffle(images, 2)
