"""Where the nut is: a mask by a classical recipe, because MVTec AD marks defects only.

The two-stage paper (Machines 2025, 13, 712, section 4.1) had the nuts of MVTec's metal_nut outlined by hand and did not
release the outlines. All of this is ours; it was settled by eye on the pictures, before any network was trained.
"""

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu

RECIPE_VERSION = 1  # raise when a mask changes: it enters the fingerprint of the data
SMALLEST_PART = 0.005  # of the largest part's area: a bent lobe may lie apart, and dust is smaller


def nut_mask(image: np.ndarray) -> np.ndarray:
    """The nut on its dark ground, the bore left out: (H, W, 3) uint8 -> (H, W) bool.

    Steel is what lies above Otsu's threshold of the logarithm of the blurred grey values (of the grey values
    themselves, it would run through the darker steel). Bent lobes turn away from the light, so what is dimmer, down
    to half way to the ground, counts too where it is broad, which the blurred rim of the nut is not. Then narrow gaps
    are closed, small parts dropped, and all holes filled but the largest, the bore. Lengths scale with the image.

    What it gets wrong, judged on all 335 pictures of metal_nut (reduced copy, 512 px): black side faces of bent lobes
    are taken for ground. By MVTec's masks of these defects, 7 pictures (6 bent, 1 scratch) lose more than 1 % of the
    nut, at worst 1.5 %; by eye the other 328 are right. Against the only whole nuts that MVTec outlined, its 23 "flip"
    masks, the IoU is 97.3 % on average and 96.4 % at least: the hand-drawn outline lies about 1 pixel further out.

    Raises ValueError where nothing stands out of the ground, as in a flat image.
    """
    size = min(image.shape[:2])
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)
    light = np.log1p(ndimage.gaussian_filter(grey, size / 256))
    if light.max() - light.min() < np.log(1.5):
        raise ValueError("the image has no foreground: nothing in it is 1.5 times as bright as the rest")
    steel = threshold_otsu(light)
    ground = np.median(light[light < steel])
    lit, dim = light > steel, light > (ground + steel) / 2

    steps = max(1, round(size / 128))
    lit |= ndimage.binary_opening(dim & ~lit, iterations=steps)
    lit = np.pad(lit, steps + 1)  # closing erodes at the border, and the ground must hold together around the nut
    parts = _large_parts(ndimage.binary_closing(lit, iterations=steps))
    return _without_bore(parts)[steps + 1 : -steps - 1, steps + 1 : -steps - 1]


def _large_parts(mask: np.ndarray) -> np.ndarray:
    parts, _ = ndimage.label(mask)
    areas = np.bincount(parts.ravel())
    areas[0] = 0
    return (areas >= SMALLEST_PART * areas.max())[parts] & mask


def _without_bore(mask: np.ndarray) -> np.ndarray:
    """The mask, which leaves the border free, with all its holes filled but the largest."""
    holes, _ = ndimage.label(~mask)
    areas = np.bincount(holes.ravel())
    outside = holes[0, 0]
    areas[[0, outside]] = 0
    bore = areas.argmax() if areas.any() else outside
    return (holes != outside) & (holes != bore)
