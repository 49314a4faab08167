"""What the results of all trainings share: rounded metrics, and examples shrunk to what a record may weigh."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import interpolate


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """To four decimals, without NaN, which JSON does not know: a class without ground truth has no value."""
    return {name: round(value, 4) for name, value in values.items() if value == value}


def shrunk(images: Tensor, side: int) -> Tensor:
    """Means over areas of (K, C, H, W), in float32 on the CPU: (K, side, side), with several channels
    (K, side, side, C)."""
    small = interpolate(images.float(), (side, side), mode="area").movedim(1, -1).cpu()
    return small[..., 0] if images.shape[1] == 1 else small
