"""A small diffusion model and a noise predictor that knows its image, for the tests of diffusion."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from defectlab.networks.diffusion import DiffusionSettings, build_unet, noise_schedule

TOY = DiffusionSettings(
    dataset="toy", size=16, channels=(8, 16, 24), layers=1, epochs=4, batch=4, learning_rate=2e-3, average_ramp=3.0,
    precision="fp32",
)  # fmt: skip


def random_images(count: int, colours: int = 1, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, colours, size, size), generator=generator, dtype=torch.uint8)


def toy_unet(colours: int = 1, **options):
    torch.manual_seed(0)
    return build_unet(replace(TOY, **options), colours).eval().requires_grad_(False)


class KnowsImage(nn.Module):
    """A noise predictor for one image (1, C, S, S), which it knows; `wrong` of the noise is added to its answer."""

    def __init__(self, clean: Tensor, steps: int = 1000, wrong: float = 0.0):
        super().__init__()
        self.clean, self.alpha_hat, self.wrong = clean, noise_schedule(steps).float(), wrong
        self.config = SimpleNamespace(sample_size=clean.shape[3], in_channels=clean.shape[1], num_train_timesteps=steps)

    def forward(self, noisy: Tensor, timesteps: Tensor) -> SimpleNamespace:
        left = self.alpha_hat[timesteps].reshape(-1, 1, 1, 1)
        noise = (noisy - left.sqrt() * self.clean) / (1 - left).sqrt()
        return SimpleNamespace(sample=noise * (1 + self.wrong))
