"""What the results of all trainings share: rounded metrics, and examples shrunk to what a record may weigh."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

SIDE, COLOUR_SIDE = 192, 160  # pixels a side of a record's examples: a dozen and their maps fit into its limit
STEP = 4  # grey levels: noise of a camera below it would take half of that limit


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """To four decimals, without NaN, which JSON does not know: a class without ground truth has no value."""
    return {name: round(value, 4) for name, value in values.items() if value == value}


def example_side(images: Tensor) -> int:
    """Pixels a side of the examples that a record keeps of square images (K, C, S, S): S at most."""
    return min(SIDE if images.shape[1] == 1 else COLOUR_SIDE, images.shape[-1])


def shrunk(images: Tensor, side: int | tuple[int, int]) -> np.ndarray:
    """Means over areas of (K, C, H, W) in 0..255, uint8 in steps of `STEP`: (K, side, side), with several channels
    (K, side, side, C); `side` may be height and width."""
    size = (side, side) if isinstance(side, int) else side
    small = interpolate(images.float(), size, mode="area").movedim(1, -1).cpu()
    stepped = ((small / STEP).round() * STEP).clamp(max=255).byte().numpy()
    return stepped[..., 0] if images.shape[1] == 1 else stepped
