"""BSDRD's two students, trained and evaluated in the same way as RD4AD's one."""

from defectlab.data.anomaly import AnomalyData
from defectlab.papers.bsdrd import Settings, build, make_loss, to_maps
from defectlab.runs import Context, Result
from defectlab.training.anomaly import distil


def run_bsdrd(settings: Settings, seed: int, data: AnomalyData, context: Context) -> Result:
    """One row and seed of notebooks 20 and 21."""
    return distil(settings, seed, data, context, build, make_loss, to_maps)
