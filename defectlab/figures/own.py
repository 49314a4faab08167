"""Figures of a reader's own images: anomaly maps, boxes, and their names in any script."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from defectlab.data.detection import DetectionData
from defectlab.data.images import plain
from defectlab.figures.detection import as_seen, boxed, class_colour
from defectlab.metrics.detection import Boxes, examples
from defectlab.networks.reverse_distillation import MAP_SIZE

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # comes with matplotlib


@cache
def _characters(font: str | Path) -> frozenset[int]:
    try:
        return frozenset(FT2Font(str(font)).get_charmap())
    except (OSError, RuntimeError, ValueError):  # a font that matplotlib cannot open
        return frozenset()


def font_for(texts: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """A font file, and what to draw with it for each text: the text itself, or `#1`, `#2`, ... where no installed font
    has all characters. Line breaks count for nothing."""
    needed = {ord(letter) for text in texts for letter in text if not letter.isspace()}
    installed = (entry.fname for entry in font_manager.fontManager.ttflist if not entry.name.startswith("Last Resort"))
    fonts = (DEJAVU, *map(Path, installed))  # "Last Resort" has a box for every letter
    font = next((font for font in fonts if needed <= _characters(font)), DEJAVU)
    there, drawn = _characters(font), {}
    for text in dict.fromkeys(texts):
        number = f"#{len([t for t in drawn if drawn[t] != t]) + 1}"
        drawn[text] = text if {ord(letter) for letter in text if not letter.isspace()} <= there else number
    return font, drawn


def legend(drawn: dict[str, str]) -> str:
    """One line on the numbers that stand for texts; "" where none does."""
    numbers = [f"{number} = {text}" for text, number in drawn.items() if number != text]
    return f"in the figures: {', '.join(numbers)} (no installed font has these letters)" if numbers else ""


def overlay(image: np.ndarray, heat: np.ndarray) -> Image.Image:
    """Grey image (H, W) uint8 and heat (256, 256) in 0..1 -> a colour image of 256 x 256."""
    grey = np.asarray(Image.fromarray(image).resize((MAP_SIZE, MAP_SIZE), Image.Resampling.BILINEAR))
    colour = matplotlib.colormaps["inferno"](heat.clip(0, 1))[..., :3] * 255
    return Image.fromarray((0.5 * grey[..., None] + 0.5 * colour).astype(np.uint8))


def cases(data: DetectionData, predictions: Boxes, threshold: float) -> tuple[Figure, str]:
    """Examples of the test images, with their boxes; and the `legend` of names that no font has."""
    test = data.test
    shown = examples(predictions, test.ground_truth(), threshold=threshold)
    places = [(predictions[i], float(test.scale[i]), test.offset[i].repeat(2)) for i, _ in shown]
    found = [one | {"boxes": one["boxes"] * scale + offset} for one, scale, offset in places]
    files = [plain(test.names[i]).rsplit("/", 1)[-1] for i, _ in shown]
    font, drawn = font_for([*data.class_names, *files])
    font_manager.fontManager.addfont(font)
    family = font_manager.FontProperties(fname=font).get_name()
    titles = [f"{drawn[file]}\n{why}" for file, (_, why) in zip(files, shown, strict=True)]
    names = [f" {drawn[name]}" for name in data.class_names]  # a legend leaves out what begins with _
    with plt.rc_context({"figure.constrained_layout.use": True, "font.family": family, "text.parse_math": False}):
        figure = boxed(*as_seen(test, [i for i, _ in shown]), found, titles, names, width=13, threshold=threshold)
    return figure, legend(drawn)


def draw(image: Image.Image, boxes: Tensor, labels: Tensor, tags: list[str], font: Path) -> Image.Image:
    """The image with its boxes in the colours of their classes, each with its tag."""
    if not len(boxes):
        return image
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)  # (3, H, W)
    colours = [class_colour(label) for label in labels.tolist()]
    drawn = draw_bounding_boxes(pixels, boxes, tags, colours, width=2, font=str(font), font_size=12)
    return Image.fromarray(drawn.movedim(0, -1).numpy())
