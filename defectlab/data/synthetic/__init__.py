"""Synthetic sets in the layouts of the real ones, for the smoke profile, the tests and readers without a download.

Nothing measured on these images says anything about the real sets. What is imitated: the magnetic tiles (Huang, Qiu and
Yuan, "Surface defect saliency of magnetic tile", The Visual Computer 36, 2020), MVTec AD metal_nut (Bergmann et al.,
CVPR 2019), NEU-DET (He et al., "An end-to-end steel surface defect detection approach via fusing multiple hierarchical
features", IEEE TIM 69, 2020), NEU-Seg (its images, of three classes, with masks), DeepPCB (Tang et al., "Online PCB
defect detector on a new PCB defect dataset", arXiv 1902.06197), AITEX (Silvestre-Blanes et al., AUTEX Research Journal
19, 2019), a road with potholes (Fan et al., IEEE TIP 29, 2020), ball screws (Schlagenhauf and Landwehr, Data in Brief
39, 2021) and solar cells (Deitsch et al., Solar Energy 185, 2019). The same seed writes the same bytes (with the same
versions of numpy, scipy and pillow).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from defectlab.data.fetch import MANIFEST, Manifest, create_folder, quick_check, write_manifest
from defectlab.data.synthetic.boards import write_board
from defectlab.data.synthetic.cells import write_cells
from defectlab.data.synthetic.fabric import write_fabric
from defectlab.data.synthetic.road import write_road
from defectlab.data.synthetic.screws import write_screws
from defectlab.data.synthetic.steel import write_steel, write_steel_masks
from defectlab.data.synthetic.tiles import write_magnetic_tile, write_mvtec


@dataclass(frozen=True)
class Synthetic:
    label: str  # as printed in tables
    write: Callable[[Path], None]
    content: str  # begin of the manifest's fingerprint of what `write` gives: a test holds it, another set is redone


SYNTHETIC = {  # by the name that the readers take, which is the folder below the data root
    "synthetic_tile": Synthetic("synthetic tiles", write_magnetic_tile, "aa48d0e534a41dc4"),
    # The folder of the nuts is the category's.
    "synthetic_nut": Synthetic("synthetic nuts", partial(write_mvtec, category="."), "caaa94f8f4c124fa"),
    "synthetic_steel": Synthetic("synthetic steel", write_steel, "1f70049ab6bf50e0"),
    "synthetic_board": Synthetic("synthetic boards", write_board, "67d3f5cf7205496c"),
    "synthetic_steel_masks": Synthetic("synthetic steel with masks", write_steel_masks, "5a316204a3104b8e"),
    "synthetic_road": Synthetic("synthetic road", write_road, "77b086e0bc2b3ca4"),
    "synthetic_screw": Synthetic("synthetic ball screws", write_screws, "9fdf9ae76b0ddd46"),
    "synthetic_cell": Synthetic("synthetic solar cells", write_cells, "4fe42b3bc66bf82e"),
    "synthetic_fabric": Synthetic("synthetic fabric", write_fabric, "a8eefc53ab4f5ca7"),
}


def ensure_synthetic(root: Path, name: str) -> Manifest:
    """Write the synthetic set `name` into `root / name` unless one of the same content is there."""
    chosen, target = SYNTHETIC[name], root / name
    source = f"defectlab.data.synthetic, seed 0, content {chosen.content[:12]}"

    def current() -> Manifest | None:
        if not (target / MANIFEST).is_file():
            return None
        manifest = quick_check(target, "load it again, and it is written again")
        return manifest if manifest.source == source else None

    def fill(folder: Path) -> Manifest:
        chosen.write(folder)
        return write_manifest(folder, chosen.label, source)

    return current() or create_folder(target, fill, current)
