"""The anomaly score of stage two (section 3.2.2): AL = sum over k of Conv(M^k), and how its convolutions are fitted.

The paper calls them adaptive and does not say what they are fitted to. Its loss does not contain them, and would bring
them to zero (see `distillation.DistillationLoss`). Ours: after the training they are fitted on dev, to tell pixels of
pasted defects from normal ones.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import binary_cross_entropy_with_logits

from defectlab.networks.reverse_distillation import gaussian_smooth, upsample

KERNELS = {"none": 1, "1x1": 1, "3x3": 3, "5x5": 5, "printed": 1}
FIT_STEPS = 50  # ours: of L-BFGS
FIT_STRIDE = 2  # ours: every second pixel is used in the fit


def inverse_softplus(x: Tensor) -> Tensor:
    return torch.log(torch.expm1(x))


class MapWeighting(nn.Module):
    """A convolution of one channel on each M^k, before it is brought to image size: kernels (3, k, k), at first those
    of the plain sum. Ours: no bias, which would change no order of scores, and edge values repeated at the border."""

    def __init__(self, kernel: int):
        super().__init__()
        kernels = torch.zeros(3, kernel, kernel)
        kernels[:, kernel // 2, kernel // 2] = 1
        self.register_buffer("kernels", kernels)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Three M^k (B, h, w) -> AL (B, 256, 256), not smoothed."""
        weighted = [
            (shifts(m, self.kernels.shape[-1]) * kernel.flatten()[:, None, None]).sum(1)
            for m, kernel in zip(maps, self.kernels, strict=True)
        ]
        return sum(upsample(m) for m in weighted)


def shifts(maps: Tensor, kernel: int) -> Tensor:
    """(B, h, w) -> (B, k k, h, w): what each tap of a k x k convolution sees, row by row."""
    border = kernel // 2
    padded = functional.pad(maps[:, None], (border,) * 4, mode="replicate") if border else maps[:, None]
    return functional.unfold(padded, kernel).unflatten(-1, maps.shape[-2:])


def tap_maps(maps: Tensor, kernel: int) -> Tensor:
    """One M^k (N, h, w) -> the share of each tap in the smoothed AL at weight 1: (k k, N, 128, 128)."""
    taps = shifts(maps, kernel).transpose(0, 1)  # (k k, N, h, w)
    return torch.stack([gaussian_smooth(upsample(tap))[..., ::FIT_STRIDE, ::FIT_STRIDE] for tap in taps])


def fit_weighting(maps: list[Tensor], masks: Tensor, kernel: int) -> MapWeighting:
    """Kernels by which the smoothed AL tells defect from normal pixels: logistic regression (ours), deterministic.

    The defect pixels of each image have the same total weight; all normal pixels together weigh as much as all defect
    pixels. The kernels are positive, since a larger discrepancy must never lower the score, and scaled to a sum of 3,
    that of the plain sum, which changes no order.

    Args:
        maps: three M^k (N, h, w) of images among which some have defects: never those of the test set.
        masks: (N, 256, 256), 1 = defect. ValueError where no pixel, or every pixel, is a defect's.
    """
    target = masks[..., ::FIT_STRIDE, ::FIT_STRIDE].flatten(1).float()  # (N, pixels)
    if target.min() == target.max():
        raise ValueError("the weighting is fitted to tell defect from normal pixels: the masks have only one of them")
    defect = target / target.sum(1, keepdim=True).clamp(min=1)
    importance = defect / defect.sum() + (1 - target) / (1 - target).sum()
    with torch.no_grad():  # AL is linear in the weights: each tap's part is computed once, (3 k k, pixels)
        seen = torch.cat([tap_maps(m, kernel).flatten(1) for m in maps])
    raw = nn.Parameter(inverse_softplus(torch.full((len(seen),), 1 / kernel**2, device=seen.device)))
    bias = nn.Parameter(torch.zeros((), device=seen.device))
    optimizer = torch.optim.LBFGS([raw, bias], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = functional.softplus(raw) @ seen + bias
        loss = binary_cross_entropy_with_logits(logits, target.flatten(), importance.flatten(), reduction="sum")
        loss.backward()
        return loss

    optimizer.step(closure)
    weights = functional.softplus(raw.detach()).clamp(min=1e-6)
    weighting = MapWeighting(kernel).to(seen.device)
    weighting.kernels.copy_((3 * weights / weights.sum()).view(3, kernel, kernel))
    return weighting
