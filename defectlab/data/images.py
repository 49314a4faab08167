"""Image files as arrays: finding and decoding them, and the two ways to make them square."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin
from torch import Tensor
from torch.nn.functional import interpolate, pad

from defectlab.files import DataError

JPEG_SUFFIXES = {".jpg", ".jpeg", ".jfif"}
IMAGE_SUFFIXES = JPEG_SUFFIXES | {".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pbm", ".pgm", ".ppm", ".pnm"}
MARKER = ".defectlab"  # lies in each folder that `score` and `detect` wrote: nothing in it is input
MASK_SIZE = 256  # anomaly maps are compared with the masks at this size, whatever the images' size
GROUND = 114  # of 255: the grey outside any image, as in the letterbox, and behind what is transparent
STRIP = 256  # rows that `letterbox` widens at once
# Pillow's own reader of uncompressed TIFF decodes those of orientation 5 to 8 to wrong pixels; libtiff does not.
TiffImagePlugin.READ_LIBTIFF = True


# ----------------------------------------------------------------------------------------------------------- searching


def find_files(folder: Path, suffixes: set[str] | None = None) -> list[Path]:
    """Files below `folder` with one of the suffixes (lower case; None: any), sorted.

    Links to folders are followed. Hidden files and folders, and what `score` and `detect` wrote, are left out.
    DataError: no such folder, one that this program wrote or that cannot be listed, a name that is not UTF-8.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give the folder that holds the images")
    if (folder / MARKER).exists():
        raise DataError(f"{folder} holds results of this program: give the folder of your own images")
    found, entered = [], set()

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror}): make it readable, or move it away")

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        if (real := os.path.realpath(parent)) in entered:  # a link back
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [f for f in folders if not f.startswith(".") and not os.path.exists(Path(parent, f, MARKER))]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    found = sorted(path for path in found if suffixes is None or path.suffix.lower() in suffixes)
    for path in found:
        try:
            plain(path)
        except UnicodeDecodeError as error:
            raise DataError(f"the name of {str(path)!a} is not UTF-8: rename the file") from error
    return found


def plain(name: str | Path) -> str:
    """A file's name as text: under an old locale Python itself holds its letters as escaped bytes."""
    return os.fsencode(name).decode("utf-8")


def find_images(folder: Path) -> list[Path]:
    """The image files below `folder`, as `find_files`; DataError where there is none."""
    images = find_files(folder, IMAGE_SUFFIXES)
    if not images:
        raise DataError(f"{folder} holds no image (jpg, png, tif, webp, ...): give the folder that holds them")
    return images


def others(folder: Path, known: set[str] = IMAGE_SUFFIXES) -> str:
    """One sentence on the files below `folder` that are left out because of their extension; "" if none is."""
    count = Counter(path.suffix.lower() or "no extension" for path in find_files(folder))
    left_out = {suffix: n for suffix, n in sorted(count.items()) if suffix not in known}
    kinds = ", ".join(f"{suffix} {n}" for suffix, n in left_out.items())
    return f"{sum(left_out.values())} files of other kinds left out: {kinds}" if left_out else ""


# ------------------------------------------------------------------------------------------------------------ reading


def _check_whole(path: Path, remedy: str) -> None:
    """DataError for a JPEG, PNG or WebP whose rest is zeros: decoders fill what is missing with grey or black."""
    if path.suffix.lower() not in JPEG_SUFFIXES | {".png", ".webp"} or path.stat().st_size < 8:
        return
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        if file.read() != bytes(8):
            return
        file.seek(0)
        whole = file.read().rstrip(b"\0").endswith((b"\xff\xd9", b"IEND\xaeB`\x82"))
    if not whole:
        raise DataError(f"{path} ends in the middle, the rest is zeros (an interrupted copy?): {remedy}")


@contextmanager
def opened(path: Path, remedy: str) -> Iterator[Image.Image]:
    """The image file, not yet decoded; DataError ending in `remedy` if it is missing, damaged or too large."""
    try:
        _check_whole(path, remedy)
        with Image.open(path) as image:
            yield image
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {remedy}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large ({error}): cut it into parts") from error
    except Exception as error:  # Pillow raises more than a dozen kinds
        raise DataError(f"{path} cannot be decoded ({error}): {remedy}") from error


def read_header(path: Path, remedy: str) -> tuple[int, int, int]:
    """(width, height, orientation tag) of an image, decoding nothing; the size is that of what `decode` gives.

    The tag is 1 for an image stored upright, 5 to 8 where the stored width and height are exchanged.
    """
    with opened(path, remedy) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1)
        exchange = turned in (5, 6, 7, 8) and image.format != "TIFF"  # for these Pillow has done it
        width, height = image.size[::-1] if exchange else image.size
    return width, height, turned


def decode(path: Path, remedy: str = "replace or remove this image") -> Image.Image:
    """The image as every viewer shows it: upright by its orientation tag, in mode "L" if it is stored so, else "RGB".

    What is transparent lies on grey 114. A ppm's samples are scaled by the maximum that it states. DataError: a file
    that is missing, damaged, has more than 8 bits a channel, or several pages.
    """
    with opened(path, remedy) as image:
        if image.mode.startswith(("I", "F")) or ";16" in str(image.tile).replace("BGR;16", ""):
            raise DataError(f"{path} has more than 8 bits a channel: save it with 8")
        pages = getattr(image, "n_frames", 1)
        if pages > 1 and image.format != "MPO":  # a telephone's JPEG, with a second image of the same scene
            raise DataError(f"{path} holds {pages} pages: save each as a file of its own")
        grey = image.mode in ("1", "L", "LA")
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            ground = Image.new("RGBA", upright.size, (GROUND, GROUND, GROUND, 255))
            upright = Image.alpha_composite(ground, upright.convert("RGBA")).convert("RGB")
        return upright.convert("L" if grey else "RGB")


def pixel_hash(paths: Iterable[Path]) -> str:
    """sha256 over the decoded pixels of the images, in grey, one after the other: whoever wrote the files."""
    identity = hashlib.sha256()
    for path in paths:
        identity.update(decode(path).convert("L").tobytes())
    return identity.hexdigest()


def save_image(path: Path, pixels: np.ndarray) -> None:
    """Save (H, W) or (H, W, 3) uint8, or (H, W) uint16 as PNG, by the suffix, JPEG in quality 95; folders are made."""
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
    if image.width != image.height:  # the square of a long strip would take gigabytes: it is never made as a whole
        ground = (GROUND,) * len(image.getbands())
        narrow = Image.new(image.mode, (size, side), ground)
        for y in range(0, image.height, STRIP):
            rows = image.crop((0, y, image.width, min(y + STRIP, image.height)))
            wide = Image.new(image.mode, (side, rows.height), ground)
            wide.paste(rows, (left, 0))
            narrow.paste(wide.resize((size, rows.height), Image.Resampling.BILINEAR), (0, top + y))
        image = narrow
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
