"""The figure of README: four real images and what recorded networks see in them. Needs the real data sets.

python data_scripts/overview.py      writes results/overview.jpg
"""

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from defectlab.figures.detection import draw_boxes
from defectlab.files import data_dir, project_root
from defectlab.metrics.detection import unpack
from defectlab.studies import study
from defectlab.verdicts.tables import record_store

CREDIT = (
    "NEU-DET: Song and Yan 2013, He et al. 2020 · DeepPCB: Tang et al. 2019 (MIT) · "
    "magnetic tiles: Huang et al. 2020 · metal nut: MVTec AD, Bergmann et al. 2021 (CC BY-NC-SA 4.0), reduced"
)
BOXES = {  # title -> study, row, folder of the set
    "steel strip: YOLO-DCF": ("yolo_dcf", "yolo_dcf", "neu_det"),
    "circuit board: YOLO": ("yolo_dcf", "pcb_baseline", "deep_pcb"),
}
MAPS = {  # of the record's examples with these types of defect, the one with the strongest map
    "magnetic tile: PatchCore": ("bsdrd", "patchcore", "magnetic_tile", ("break",)),
    "metal nut: AMAM + KD": ("amam_kd", "kd_metal_nut", "mvtec_ad/metal_nut", ("scratch",)),
}


def main() -> None:
    store, root = record_store("recorded"), data_dir()
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.9), layout="constrained")
    for axis, (title, (name, row, folder)) in zip(axes, BOXES.items(), strict=False):
        arrays = store.recorded_of(study(name), row)[0][0].arrays
        predictions, _, names, class_names = unpack(arrays)
        index = int(arrays["case_index"][-1])  # the last example is the best
        image = Image.open(root / folder / names[index])
        axis.imshow(image, cmap="gray", extent=(0, image.width, image.height, 0))
        draw_boxes(axis, predictions[index], dict(enumerate(class_names)), 0.25)
        axis.set_title(title)
    for axis, (title, (name, row, folder, kinds)) in zip(axes[2:], MAPS.items(), strict=True):
        arrays = store.recorded_of(study(name), row)[0][0].arrays
        types = arrays["type_names"][arrays["types"][arrays["case_index"]]]
        case = max((i for i, found in enumerate(types) if found in kinds), key=lambda i: arrays["case_maps"][i].max())
        image = Image.open(root / folder / str(arrays["names"][arrays["case_index"][case]])).convert("RGB")
        heat = Image.fromarray(arrays["case_maps"][case]).resize(image.size, Image.Resampling.BICUBIC)
        heat = np.asarray(heat, float) / 255
        axis.imshow(image)
        axis.imshow(heat, cmap="inferno", alpha=0.75 * heat, vmin=0, vmax=1)
        axis.set_title(title)
    for axis in axes:
        axis.axis("off")
    figure.text(0.5, -0.01, CREDIT, ha="center", va="top", fontsize=7, color="#555555")
    path = project_root() / "results" / "overview.jpg"
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 88}, bbox_inches="tight")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
