"""TODO data.images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from defectlab.files import DataError

MASK_SIZE = 256  # anomaly maps are compared with the masks at this size, whatever the images' size


# ------------------------------------------------------------------------------------------------------------ reading


def decode(path: Path, remedy: str) -> Image.Image:
    """The picture as mode "L" if it is grey, else "RGB"."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path} has more than 8 bits a pixel: save it with 8 bits")
            return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {remedy}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # PIL raises all four
        raise DataError(f"{path} cannot be decoded ({error}): {remedy}") from error


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """(3, size, size) uint8. PIL's bilinear filter widens when it shrinks, so it is antialiased."""
    small = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return np.broadcast_to(small, (3, size, size)) if small.ndim == 2 else small.transpose(2, 0, 1)


def resize_mask(mask: np.ndarray, size: int = MASK_SIZE) -> np.ndarray:
    """(H, W) bool to (size, size) uint8."""
    resized = interpolate(torch.from_numpy(mask.astype(np.uint8))[None, None], (size, size), mode="nearest-exact")
    return resized[0, 0].numpy()


GROUND = 114  # of 255: the grey outside any picture, as in the letterbox


def letterbox(image: Image.Image, size: int) -> tuple[np.ndarray, float, tuple[float, float]]:
    """The picture centred on a grey square and scaled to `size` pixels: (C, size, size) uint8, scale, offset (x, y).

    C is 1 for a grey picture (R = G = B counts), else 3. scaled = original * scale + offset holds exactly. PIL's
    bilinear filter widens when it shrinks, so it is antialiased.
    """
    if image.mode == "RGB":
        red, green, blue = image.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            image = red
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    if image.width != image.height:
        square = Image.new(image.mode, (side, side), (GROUND,) * len(image.getbands()))
        square.paste(image, (left, top))
        image = square
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # (C, size, size)
    scale = size / side
    return pixels, scale, (left * scale, top * scale)
