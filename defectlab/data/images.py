"""Image files as arrays: finding and decoding them, and the two ways to make them square."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate, pad

from defectlab.files import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
MASK_SIZE = 256  # anomaly maps are compared with the masks at this size, whatever the images' size
GROUND = 114  # of 255: the grey outside any image, as in the letterbox


# ------------------------------------------------------------------------------------------------------------ reading


def find_files(folder: Path, suffixes: set[str]) -> list[Path]:
    """Files below `folder` with one of the suffixes (lower case), sorted; hidden ones are left out."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give the one that holds the images and their boxes")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))


@contextmanager
def opened(path: Path, remedy: str) -> Iterator[Image.Image]:
    """The image file, not yet decoded; DataError ending in `remedy` if it is missing or damaged."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {remedy}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # PIL raises all four
        raise DataError(f"{path} cannot be decoded ({error}): {remedy}") from error


def decode(path: Path, remedy: str = "replace or remove this image") -> Image.Image:
    """The image as mode "L" if it is stored so, else "RGB"; DataError if it is missing, damaged or above 8 bits."""
    with opened(path, remedy) as image:
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{path} has more than 8 bits a pixel: save it with 8 bits")
        return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def save_image(path: Path, pixels: np.ndarray) -> None:
    """Save (H, W) or (H, W, 3) uint8, as JPEG in quality 95; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def in_threads(read: Callable[[Any], Any], items: Iterable) -> list:
    """`read` of each item, in order: PIL and scipy decode, resize and label outside the GIL."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(read, items))


def check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")


# ----------------------------------------------------------------------------------------------------------- resizing


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """(3, size, size) uint8, whatever the aspect ratio. PIL's bilinear filter is antialiased where it shrinks."""
    small = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return np.broadcast_to(small, (3, size, size)) if small.ndim == 2 else small.transpose(2, 0, 1)


def resize_mask(mask: np.ndarray, size: int = MASK_SIZE) -> np.ndarray:
    """(H, W) bool to (size, size) uint8, sampled at the pixels' centres."""
    resized = interpolate(torch.from_numpy(mask.astype(np.uint8))[None, None], (size, size), mode="nearest-exact")
    return resized[0, 0].numpy()


def letterbox(image: Image.Image, size: int) -> tuple[np.ndarray, float, tuple[float, float]]:
    """The image centred on a grey square and scaled to `size` pixels: (C, size, size) uint8, scale, offset (x, y).

    C is 1 for a grey image (R = G = B counts), else 3. scaled = original * scale + offset holds exactly. Antialiased
    as `to_square`.
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


def letterbox_maps(maps: Tensor, size: int) -> Tensor:
    """Maps of whole numbers (N, H, W) as `letterbox` scales images: (N, size, size), nearest, 0 beside the image."""
    height, width = maps.shape[1:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = pad(maps, (left, side - width - left, top, side - height - top))
    return interpolate(square[:, None], (size, size), mode="nearest-exact")[:, 0]
