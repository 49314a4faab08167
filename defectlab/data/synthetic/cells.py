"""Synthetic electroluminescence images of solar cells, in the layout that data_scripts/elpv.py unpacks."""

from pathlib import Path

import numpy as np

from defectlab.data.images import save_image
from defectlab.data.synthetic.pasted import smooth_field

SIDE = 100  # px, a third of the real cells' side
NUMBERS = tuple(range(1, 2625, 30))  # of the cells: the split goes by them
PROBABILITIES = (0.0, 1 / 3, 2 / 3, 1.0)
_SHARE = (0.55, 0.1, 0.05, 0.3)  # of the cells that have each, near the real set's
_BARS = (0.18, 0.5, 0.82)  # of the side: bus bars


def draw_cell(rng: np.random.Generator, kind: str, probability: float) -> np.ndarray:
    """A cell (S, S) uint8, "mono" or "poly": what does not shine is dark. Cracks, and from 2/3 on a dark sector."""
    row, column = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    grey = 165 + rng.uniform(-25, 25) + 8 * smooth_field(rng, (SIDE, SIDE), (20, 20))
    if kind == "poly":  # crystals, and dark spots between them that are no defect
        grey = grey - 35 * np.clip(smooth_field(rng, (SIDE, SIDE), (3, 3)) - 1, 0, 1.5)
        grey = grey + 6 * smooth_field(rng, (SIDE, SIDE), (5, 5))
    for _ in range(round(3 * probability) + (probability > 0)):
        angle, middle = rng.uniform(0, np.pi), rng.uniform(0.25, 0.75, 2)
        beside = (row - middle[0]) * np.cos(angle) - (column - middle[1]) * np.sin(angle)
        along = (row - middle[0]) * np.sin(angle) + (column - middle[1]) * np.cos(angle)
        grey = grey - 60 * probability * (np.abs(beside) < 0.012) * (np.abs(along) < rng.uniform(0.2, 0.5))
        if probability > 0.5:
            between = (row > _BARS[0]) & (row < _BARS[1]) if rng.random() < 0.5 else row > _BARS[2]
            grey = grey - 70 * probability * ((beside > 0) & between)
    edge = np.minimum(np.minimum(row, 1 - row), np.minimum(column, 1 - column))
    corner = np.minimum(row, 1 - row) + np.minimum(column, 1 - column) < (0.12 if kind == "mono" else 0.0)
    dark = (edge < 0.02) | corner | (np.abs(row[..., None] - _BARS) < 0.008).any(-1)
    grey = np.where(dark, 45, grey) + rng.normal(0, 3, (SIDE, SIDE))
    return grey.clip(0, 255).astype(np.uint8)


def write_cells(folder: Path, seed: int = 0) -> None:
    """images/cellNNNN.png and labels.csv: path, probability and kind of each, in columns; the kinds lie in blocks."""
    lines = []
    for number in NUMBERS:
        rng = np.random.default_rng([seed, number])
        kind, probability = ("mono", "poly")[number // 70 % 2], rng.choice(PROBABILITIES, p=_SHARE)
        name = f"images/cell{number:04}.png"
        save_image(folder / name, draw_cell(rng, kind, probability))
        lines.append(f"{name}  {probability!s:18} {kind}\n")
    (folder / "labels.csv").write_text("".join(lines), encoding="utf-8")
