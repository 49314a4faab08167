"""Cut the committed samples from the nine real sets in the data folder.

    python data_scripts/samples.py               write results/samples again; half a minute
    python data_scripts/samples.py --out FOLDER  write below FOLDER instead, to compare
    python data_scripts/samples.py --without elpv  leave a set out, whose sample stays as it is

A sample holds a few images of a set, cut out as results/samples/SOURCES.toml says, in the layout of the set and under
their own names: the readers read it by the name `sample/<set>`, and a training image of a published list is a training
image of the sample. The same versions of numpy and pillow write the same bytes.
"""

import argparse
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from defectlab.data import fetch
from defectlab.data.annotations import AnnotatedImage, read_deep_pcb, read_voc
from defectlab.data.cards import SETS, card
from defectlab.data.cells import read_labels
from defectlab.data.detection import DEEP_PCB_CLASSES, NEU_CLASSES
from defectlab.data.images import decode
from defectlab.data.splits import read_list, samples_dir
from defectlab.files import DataError, data_dir, project_root, write_text

QUALITY = 90  # of a sample's JPEG files


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=QUALITY, optimize=True)


def cropped(image: Image.Image, corner: Sequence[int], side: int) -> Image.Image:
    return image.crop((*corner, corner[0] + side, corner[1] + side))


def moved(entry: AnnotatedImage, corner: Sequence[int], side: int) -> list[tuple[int, list[int]]]:
    """(label, x1 y1 x2 y2 in pixels of the crop) of each box of which a part lies in the crop."""
    boxes = (entry.boxes - np.tile(corner, 2)).clip(0, side).round().astype(int)
    there = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return [(int(label), box.tolist()) for label, box, kept in zip(entry.labels, boxes, there, strict=True) if kept]


def cut_pairs(folder: Path, out: Path, listed: Mapping[str, Any], image: str, mask: str) -> int:
    """An image and its mask, grey where the image is; `image`, `mask`: their paths, with {} for the name listed."""
    for name, corner in listed["corners"].items():
        for path in (image.format(name), mask.format(name)):
            save(cropped(decode(folder / path), corner, listed["side"]), out / path)
    return len(listed["corners"])


def nut(folder: Path, name: str) -> Image.Image:
    return decode(next((folder / name).parent.glob(f"{Path(name).name}.*")))  # .jpg in the reduced copy


def cut_nuts(folder: Path, out: Path, listed: Mapping[str, Any]) -> int:
    size = (listed["side"], listed["side"])
    for name in listed["images"]:
        save(nut(folder, name).resize(size, Image.Resampling.LANCZOS), out / f"{name}.jpg")
        if "/good/" not in name:
            mask = f"{name.replace('test', 'ground_truth')}_mask.png"
            save(decode(folder / mask).resize(size, Image.Resampling.NEAREST), out / mask)
    return len(listed["images"])


def cut_cloth(folder: Path, out: Path, listed: Mapping[str, Any]) -> int:
    for name, corner in listed["corners"].items():
        save(cropped(decode(folder / f"{name}.png"), corner, listed["side"]), out / f"{name}.jpg")
        mask = f"{name.replace('test', 'ground_truth')}_mask.png"
        if (folder / mask).is_file():
            save(cropped(decode(folder / mask), corner, listed["side"]), out / mask)
    return len(listed["corners"])


def cut_steel(folder: Path, out: Path, listed: Mapping[str, Any]) -> int:
    entries = {entry.path.stem: entry for entry in read_voc(folder, NEU_CLASSES).images}
    for stem, corner in listed["corners"].items():
        save(cropped(decode(folder / f"IMAGES/{stem}.jpg"), corner, listed["side"]), out / f"IMAGES/{stem}.jpg")
        root = ElementTree.Element("annotation")
        add(root, filename=f"{stem}.jpg")
        add(ElementTree.SubElement(root, "size"), width=listed["side"], height=listed["side"])
        for label, box in moved(entries[stem], corner, listed["side"]):
            found = ElementTree.SubElement(root, "object")
            add(found, name=NEU_CLASSES[label])
            corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            add(ElementTree.SubElement(found, "bndbox"), **dict(corners))
        ElementTree.indent(root)
        write_text(out / f"ANNOTATIONS/{stem}.xml", ElementTree.tostring(root, encoding="unicode") + "\n")
    return len(listed["corners"])


def add(element: ElementTree.Element, **texts: object) -> None:
    for name, text in texts.items():
        ElementTree.SubElement(element, name).text = str(text)


def cut_boards(folder: Path, out: Path, listed: Mapping[str, Any]) -> int:
    entries = {entry.path.stem: entry for entry in read_deep_pcb(folder, DEEP_PCB_CLASSES).images}
    for name, corner in listed["corners"].items():
        group, board, number = name.split("/")
        for path in (f"PCBData/{name}_test.jpg", f"PCBData/{name}_temp.jpg"):
            save(cropped(decode(folder / path), corner, listed["side"]), out / path)
        found = moved(entries[f"{number}_test"], corner, listed["side"])
        lines = "".join(f"{' '.join(map(str, box))} {label + 1}\n" for label, box in found)
        write_text(out / f"PCBData/{group}/{board}_not/{number}.txt", lines)
    for name in ("PCBData/trainval.txt", "PCBData/test.txt"):
        lines = [line for line in read_list(folder / name) if line.split(".")[0] in listed["corners"]]
        write_text(out / name, "".join(f"{line}\n" for line in lines))
    return len(listed["corners"])


def cut_road(folder: Path, out: Path, listed: Mapping[str, Any]) -> int:
    for name, corner in listed["corners"].items():
        session, frame = name.split("/")
        for file in (f"rgb/{frame}.jpg", f"disp/{frame}.png", f"label/{frame}.png"):
            with Image.open(folder / session / file) as image:  # 16 bits of disparity stay as they are
                save(cropped(image, corner, listed["side"]), out / session / file)
    return len(listed["corners"])


def cut_cells(folder: Path, out: Path, listed: Mapping[str, Any]) -> int:
    """Whole cells, reduced; they are JPEG files here, so labels.csv names these."""
    labels, lines = read_labels(folder / "labels.csv", "fetch the set again"), []
    for name in listed["images"]:
        image, probability, kind = labels[name]
        small = decode(folder / image).resize((listed["side"], listed["side"]), Image.Resampling.LANCZOS)
        save(small, out / f"images/{name}.jpg")
        lines.append(f"images/{name}.jpg  {probability:<18}  {kind}\n")
    write_text(out / "labels.csv", "".join(lines))
    return len(listed["images"])


def cut_part_nuts(folder: Path, out: Path, listed: Mapping[str, Any]) -> None:
    side = listed["side"]
    for part in ("good", "inspect"):
        for name in listed[part]:
            whole, (_, kind, number) = nut(folder, name), name.split("/")
            corner = ((whole.width - side) // 2, (whole.height - side) // 2)
            save(cropped(whole, corner, side), out / part / f"{kind}_{number}.jpg")


def cut_part_boards(folder: Path, out: Path, listed: Mapping[str, Any]) -> None:
    entries = {entry.path.stem: entry for entry in read_deep_pcb(folder, DEEP_PCB_CLASSES).images}
    for index, (number, corner) in enumerate(listed["corners"].items()):
        part = {2: "val", 5: "test"}.get(index % 6, "train")
        entry, lines = entries[f"{number}_test"], []
        save(cropped(decode(entry.path), corner, listed["side"]), out / f"images/{part}/{number}.jpg")
        for _, box in moved(entry, corner, listed["side"]):
            x1, y1, x2, y2 = (value / listed["side"] for value in box)
            lines.append(f"0 {(x1 + x2) / 2:.5f} {(y1 + y2) / 2:.5f} {x2 - x1:.5f} {y2 - y1:.5f}\n")
        write_text(out / f"labels/{part}/{number}.txt", "".join(lines))
    write_text(out / "classes.txt", "defect\n")


CUTS = {
    "magnetic_tile": partial(cut_pairs, image="{}.jpg", mask="{}.png"),
    "mvtec_ad/metal_nut": cut_nuts,
    "aitex": cut_cloth,
    "neu_det": cut_steel,
    "neu_seg": partial(cut_pairs, image="images/{}.jpg", mask="annotations/{}.png"),
    "deep_pcb": cut_boards,
    "road_depth": cut_road,
    "bsdata": partial(cut_pairs, image="images/{}.jpg", mask="masks/{}.png"),
    "elpv": cut_cells,
}
OWN_PARTS = {  # for the walk through the commands for own images: set -> folder, what cuts it
    "mvtec_ad/metal_nut": ("your_parts/nuts", cut_part_nuts),
    "deep_pcb": ("your_parts/boards", cut_part_boards),
}


def write_samples(root: Path, out: Path, sets: Sequence[str]) -> None:
    listed = tomllib.loads((samples_dir() / "SOURCES.toml").read_text(encoding="utf-8"))
    for folder in sets:
        shutil.rmtree(out / folder, ignore_errors=True)
        count = CUTS[folder](root / folder, out / folder, listed[folder])
        note = f"sample of {count} images" + ", reduced" * ("reduced" in listed[folder]["here"])
        fetch.write_manifest(out / folder, listed[folder]["name"], "data_scripts/samples.py", note)
    for folder in OWN_PARTS.keys() & set(sets):
        part, cut = OWN_PARTS[folder]
        shutil.rmtree(out / part, ignore_errors=True)
        cut(root / folder, out / part, listed[part])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="instead of DEFECTLAB_DATA, or ./data")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of results")
    parser.add_argument("--without", nargs="+", choices=SETS, default=(), metavar="SET", help="leave these sets out")
    options = parser.parse_args(argv)
    root, out = options.data_dir or data_dir(), (options.out or project_root() / "results") / "samples"
    try:
        sets = [folder for folder in SETS if folder not in options.without]
        for folder in sets:
            fetch.quick_check(root / folder, f"run `{card(folder)['command']}`")
        write_samples(root, out, sets)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"samples in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
