"""Figures of a batch that ran out of minutes: nothing finished must not stop a notebook."""

import matplotlib.pyplot as plt
import pytest

from defectlab import figures


@pytest.mark.parametrize(
    "draw",
    [figures.loss_curves, figures.score_histograms, lambda records: figures.dimension_curves(records, ("map",))],
)
def test_no_finished_run_is_said_and_not_an_error(draw) -> None:
    figure = draw({})
    assert "no finished run yet" in figure.texts[0].get_text()
    plt.close(figure)
