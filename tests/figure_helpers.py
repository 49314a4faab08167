"""What the tests of figures read from them."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def drawn(figure: Figure) -> list[Axes]:
    """The axes of a figure, after drawing it: errors in drawing show, and so does what is set only then."""
    figure.canvas.draw()
    return figure.axes


def rectangles(axis: Axes) -> list[Rectangle]:
    return [patch for patch in axis.patches if isinstance(patch, Rectangle)]
