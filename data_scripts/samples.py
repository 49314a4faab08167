"""Cut the committed samples, and count the committed data cards, from the eight real sets in the data folder.

    python data_scripts/samples.py               write results/samples and results/data again; a few minutes
    python data_scripts/samples.py --out FOLDER  write below FOLDER instead, to compare

A sample holds a few images of a set, cut out as results/samples/SOURCES.toml says, in the layout of the set and under
their own names: the readers read it by the name `sample/<set>`, and a training image of a published list is a training
image of the sample. A card says what a reader must know of the whole set: see `defectlab.data.cards`. The same versions
of numpy and pillow write the same bytes.
"""

import argparse
import runpy
import shutil
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou

from defectlab.data import cards, fetch
from defectlab.data.annotations import DUPLICATES, AnnotatedImage, read_deep_pcb, read_voc
from defectlab.data.anomaly import AnomalyData, load_anomaly
from defectlab.data.detection import DEEP_PCB_CLASSES, NEU_CLASSES, DetectionData, load_detection
from defectlab.data.frames import LEFT_OUT, FrameData, FrameSplit, load_frames, position_of
from defectlab.data.images import decode, in_threads, read_header
from defectlab.data.instances import TURNS_LIST, load_instances
from defectlab.data.leaks import leak_threshold, near_duplicates
from defectlab.data.splits import PARTS, read_list, samples_dir
from defectlab.files import DataError, data_dir, project_root, write_json, write_text

SCRIPTS = {  # folder of a set: its script and what in it describes the set
    "magnetic_tile": ("magnetic_tile", None),
    "mvtec_ad/metal_nut": ("mvtec_ad", "metal_nut"),
    "aitex": ("aitex", None),
    "neu_det": ("neu_det", None),
    "neu_seg": ("neu_seg", None),
    "deep_pcb": ("deep_pcb", None),
    "road_depth": ("road_depth", None),
    "bsdata": ("bsdata", None),
}
QUALITY = 90  # of a sample's JPEG files
LEAK_SIZE = 128  # px: enough for the leak check


def about(folder: str) -> fetch.DataSet:
    script, category = SCRIPTS[folder]
    found = runpy.run_path(str(Path(__file__).with_name(f"{script}.py")))
    return found["dataset"](category) if category else found["DATASET"]


# --- Samples ---------------------------------------------------------------------------------------------------------


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
}


def write_samples(root: Path, out: Path) -> None:
    listed = tomllib.loads((samples_dir() / "SOURCES.toml").read_text(encoding="utf-8"))
    for folder, cut in CUTS.items():
        shutil.rmtree(out / folder, ignore_errors=True)
        count = cut(root / folder, out / folder, listed[folder])
        note = f"sample of {count} images" + ", reduced" * ("reduced" in listed[folder]["here"])
        fetch.write_manifest(out / folder, listed[folder]["name"], "data_scripts/samples.py", note)
    shutil.rmtree(out / "your_parts", ignore_errors=True)
    cut_part_nuts(root / "mvtec_ad/metal_nut", out / "your_parts/nuts", listed["your_parts/nuts"])
    cut_part_boards(root / "deep_pcb", out / "your_parts/boards", listed["your_parts/boards"])


# --- Cards -----------------------------------------------------------------------------------------------------------


def common(folder: str, root: Path, data: AnomalyData | DetectionData) -> dict[str, Any]:
    """What all cards say: see `cards.card`."""
    boxes = isinstance(data, DetectionData)
    names, parts, sizes = data.class_names if boxes else data.type_names, {}, []
    for part in PARTS:
        split = getattr(data, part)
        labels = split.labels[split.labels >= 0] if boxes else split.types
        counts = torch.bincount(labels, minlength=len(names)).tolist()
        parts[part] = {"images": len(split), "classes": dict(zip(names, counts, strict=True))}
        sizes += split.sizes.tolist() if boxes else split.original_sizes
    heights, widths = zip(*sizes, strict=True)
    return of_files(folder, root) | {
        "label": data.label,
        "counted": "boxes" if boxes else "images",
        "split_fingerprint": data.fingerprint,
        "classes": list(names),
        "parts": parts,
        "pixels": {"width": [min(widths), max(widths)], "height": [min(heights), max(heights)]},
    }


def of_files(folder: str, root: Path) -> dict[str, Any]:
    """What the files say, whatever a reader makes of them."""
    of_set, manifest, contents = about(folder), fetch.read_manifest(root / folder, ""), defaultdict(list)
    for path, (_, sha256) in manifest.files.items():
        if path.endswith(".jpg") or path.startswith(("train/", "test/")):  # no masks
            contents[sha256].append(path)
    return {name: getattr(of_set, name) for name in ("name", "page", "licence", "citation")} | {
        "command": of_set.command + ("" if of_set.sources else " --archive FILE"),
        "fingerprint": manifest.fingerprint,
        "identical_images": sorted(paths for paths in contents.values() if len(paths) > 1),
    }


def card_of_anomalies(folder: str, root: Path) -> dict[str, Any]:
    """Also how much of the image each kind marks, and the defective images whose mask is empty."""
    data = load_anomaly(folder, 256, root=root)
    test, marked = data.test, {}
    total = int(test.masks.sum())
    for index, kind in enumerate(data.type_names):
        if len(masks := test.masks[(test.types == index) & (test.labels == 1) & test.has_mask].float()):
            shares = {"mean_share": round(masks.mean().item(), 4), "of_all_marked": round(int(masks.sum()) / total, 3)}
            marked[kind] = {"images": len(masks)} | shares
    ratios = [width / height for split in (data.train, test) for height, width in split.original_sizes]
    return common(folder, root, data) | {
        "marked": marked,
        "empty_masks": [name for name, has in zip(test.names, test.has_mask.tolist(), strict=True) if not has],
        "width_by_height": [round(float(value), 2) for value in (min(ratios), np.median(ratios), max(ratios))],
        "leaks": leaks(data),
    }


def leaks(data: AnomalyData | DetectionData | FrameData) -> dict[str, Any]:
    """Test images that show what a training image shows (also of those held out of training as dev), by the leak check:
    how many, of each class of an anomaly set, and which pairs, the most alike first."""
    kinds_known, (train, dev, test) = isinstance(data, AnomalyData), (getattr(data, part) for part in PARTS)
    own = [i for i, name in enumerate(dev.names) if not (kinds_known and "+" in name)]  # not what was pasted
    names = [*train.names, *(dev.names[i] for i in own)]
    both = torch.cat([train.images, dev.images[own]]), test.images
    pairs = near_duplicates(*both)
    seen = {pair.second for pair in pairs}
    best = {pair.second: pair for pair in reversed(pairs)}
    found = {
        "rule": "by defectlab.data.leaks: alike beyond chance, also turned, mirrored or under other light",
        "seen": len(seen),
        "of": len(test),
        "threshold": round(leak_threshold(*both)[0], 2),
        "pairs": [
            [names[pair.first], test.names[pair.second], round(pair.similarity, 2)]
            for pair in sorted(best.values(), key=lambda pair: -pair.similarity)[:20]
        ],
    }
    if kinds_known:
        kinds = {"good": test.labels == 0, "defective": test.labels == 1}
        found |= {
            kind: {"seen": int(sum(map(at.__getitem__, seen))), "of": int(at.sum())} for kind, at in kinds.items()
        }
    return found


def sides(entries: Iterable[AnnotatedImage], class_names: Sequence[str]) -> dict[str, list[int]]:
    """Class -> how many boxes have which side (root of the area, as a part of the image's width), by `cards.SIDES`."""
    found: dict[str, list[float]] = {name: [] for name in class_names}
    for entry in entries:
        lengths = np.sqrt(np.prod((entry.boxes[:, 2:] - entry.boxes[:, :2]) / entry.width, axis=1))
        for label, length in zip(entry.labels, lengths, strict=True):
            found[class_names[label]].append(length)
    return {name: np.histogram(lengths, cards.SIDES)[0].tolist() for name, lengths in found.items()}


def card_of_steel(folder: str, root: Path) -> dict[str, Any]:
    """Also boxes given twice, boxes of another class than the file's name, coordinates, the split by number."""
    data, by_number = (load_detection(name, 32, root=root) for name in ("neu_det", "neu_det_index"))
    found = common(folder, root, data)
    entries = {f"IMAGES/{entry.path.name}": entry for entry in read_voc(root / folder, NEU_CLASSES).images}
    others: dict[str, Counter] = {}
    for name, entry in entries.items():
        kind = Path(name).stem.rpartition("_")[0]
        other = Counter(NEU_CLASSES[label] for label in entry.labels.tolist() if NEU_CLASSES[label] != kind)
        if other:
            others[name] = other
    by_kind = {kind: Counter() for kind in NEU_CLASSES}
    for name, other in others.items():
        by_kind[Path(name).stem.rpartition("_")[0]] += other
    ((one, two),) = found["identical_images"]
    overlap = box_iou(*(torch.from_numpy(entries[name].boxes) for name in (one, two))).amax(1).tolist()
    coordinates = np.concatenate([entry.boxes.ravel() for entry in entries.values()])
    return found | {
        "boxes_given_twice": [name for name, entry in entries.items() if entry.notes[DUPLICATES]],
        "iou_of_boxes_on_identical_images": [round(value, 2) for value in overlap],
        "boxes_of_another_class": {kind: dict(sorted(other.items())) for kind, other in by_kind.items()},
        "images_with_boxes_of_another_class": len(others),
        "coordinates": len(coordinates),
        "coordinates_of": {str(value): int((coordinates == value).sum()) for value in (0, 1, 199, 200)},
        "test_by_number": common(folder, root, by_number)["parts"]["test"],
        "in_both_tests": len(set(data.test.names) & set(by_number.test.names)),
        "sides": sides(entries.values(), NEU_CLASSES),
        "leaks": leaks(load_detection(folder, LEAK_SIZE, root=root)),
    }


def card_of_masked_steel(folder: str, root: Path) -> dict[str, Any]:
    """Also the turned copies across the published parts, and the images that are NEU-DET's."""
    data = load_instances(folder, 32, root=root)
    groups = [line.split()[1:] for line in read_list(TURNS_LIST)]
    masks = dict(zip(*masks_of(root / folder, [name for group in groups for name in group]), strict=True))
    turned, same_mask = 0, 0
    for group in groups:
        training = [masks[name] for name in group if name.startswith("training/")]
        turns = {np.rot90(mask, quarter).tobytes() for mask in training for quarter in range(4)}
        tests = [name for name in group if name.startswith("test/")]
        turned += len(tests) * bool(training)
        same_mask += sum(masks[name].tobytes() in turns for name in tests)
    steel = set(in_threads(content, sorted((root / "neu_det/IMAGES").glob("*.jpg"))))
    paths = sorted((root / folder / "images").glob("*/*.jpg"))
    shared = Counter(
        path.parent.name for path, one in zip(paths, in_threads(content, paths), strict=True) if one in steel
    )
    published = load_instances("neu_seg_published", 32, root=root)
    return common(folder, root, data) | {
        "leaks": {
            "rule": "shows a training image of the published split, turned by quarters or not",
            "seen": turned,
            "of": len(data.test),
            "with_the_same_mask": same_mask,
            "different_images": len(groups),
        },
        "published_training_images": len(published.train) + len(published.dev),
        "images_of_neu_det": sum(shared.values()),
        "images_of_neu_det_in_test": shared["test"],
        "specks": int(published.report.rpartition(": ")[2]),
    }


def masks_of(folder: Path, names: Sequence[str]) -> tuple[Sequence[str], list[np.ndarray]]:
    return names, in_threads(lambda name: np.asarray(decode(folder / f"annotations/{name}.png").convert("L")), names)


def content(path: Path) -> bytes:
    return decode(path).convert("L").tobytes()


def card_of_boards(folder: str, root: Path) -> dict[str, Any]:
    """Also the inspected images that hold colour: boxes painted in."""
    data = load_detection(folder, 32, root=root)
    entries = read_deep_pcb(root / folder, DEEP_PCB_CLASSES).images
    painted = in_threads(lambda entry: np.ptp(np.asarray(decode(entry.path).convert("RGB")), axis=2).any(), entries)
    names = [entry.path.relative_to(root / folder).as_posix() for entry in entries]
    return common(folder, root, data) | {
        "painted": [name for name, is_so in zip(names, painted, strict=True) if is_so],
        "templates": len(list((root / folder).glob("PCBData/group*/*/*_temp.jpg"))),
        "sides": sides(entries, DEEP_PCB_CLASSES),
        "leaks": leaks(load_detection(folder, LEAK_SIZE, root=root)),
    }


def of_frames(folder: str, root: Path, data: FrameData, of: str, image: str) -> dict[str, Any]:
    """What cards of frames say: all of them show a defect (`of`). image: path of a frame, with {} for its name."""
    splits = {part: getattr(data, part) for part in PARTS}
    paths = [root / folder / image.format(*name.split("/")) for split in splits.values() for name in split.names]
    widths, heights = zip(*(read_header(path, "")[:2] for path in paths), strict=True)
    return of_files(folder, root) | {
        "label": data.label,
        "counted": "images",
        "split_fingerprint": data.fingerprint,
        "classes": [of],
        "parts": {part: {"images": len(s), "classes": {of: len(s)}} for part, s in splits.items()},
        "pixels": {"width": [min(widths), max(widths)], "height": [min(heights), max(heights)]},
        "mean_share": round(torch.cat([split.masks for split in splits.values()]).float().mean().item(), 4),
        "leaks": leaks(data),
    }


def card_of_road(folder: str, root: Path) -> dict[str, Any]:
    """Also what one threshold finds: IoU of the best one of each frame, on grey values and on the disparity."""
    data = load_frames(folder, "session_2", root=root)
    found: dict[str, dict[str, list[float]]] = {"grey": defaultdict(list), "disparity": defaultdict(list)}
    for split in (data.train, data.dev, data.test):
        for index, name in enumerate(split.names):
            for sensor, values in zip(found, (split.images.float().mean(1), split.depth[:, 0].float()), strict=True):
                found[sensor][name.split("/")[0]].append(best_iou(values[index], split, index))
    return of_frames(folder, root, data, "pothole", "{}/rgb/{}.jpg") | {
        "left_out": sum(map(len, LEFT_OUT.values())),
        "iou_of_best_threshold": {
            sensor: {session: round(float(np.mean(values)), 2) for session, values in sorted(of.items())}
            for sensor, of in found.items()
        },
    }


def card_of_screws(folder: str, root: Path) -> dict[str, Any]:
    """Also the camera positions that the official split has on both sides, and what part of a frame is pit."""
    data, official = (load_frames(folder, split, root=root) for split in ("zones", "official"))
    training = {position_of(name) for name in official.train.names + official.dev.names}
    shares = torch.cat([getattr(data, part).masks for part in PARTS]).float().mean((1, 2))
    return of_frames(folder, root, data, "pit", "images/{}.jpg") | {
        "positions": len({position_of(name) for part in PARTS for name in getattr(data, part).names}),
        "official_test": len(official.test),
        "official_test_seen": sum(position_of(name) in training for name in official.test.names),
        "median_share": round(shares.median().item(), 4),
    }


def best_iou(values: torch.Tensor, split: FrameSplit, index: int) -> float:
    """The largest IoU with the mask of what lies on one side of a threshold, of a hundred quantiles."""
    mask, best = split.masks[index] > 0, 0.0
    for threshold in torch.quantile(values.flatten(), torch.linspace(0.005, 0.995, 100)):
        for side in (values < threshold, values > threshold):
            best = max(best, ((side & mask).sum() / (side | mask).sum()).item())
    return best


CARDS = {
    "magnetic_tile": card_of_anomalies,
    "mvtec_ad/metal_nut": card_of_anomalies,
    "aitex": card_of_anomalies,
    "neu_det": card_of_steel,
    "neu_seg": card_of_masked_steel,
    "deep_pcb": card_of_boards,
    "road_depth": card_of_road,
    "bsdata": card_of_screws,
}


def write_cards(root: Path, out: Path) -> None:
    for folder, count in CARDS.items():
        write_json(out / f"{folder.rpartition('/')[2]}.json", count(folder, root))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="instead of DEFECTLAB_DATA, or ./data")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of results")
    options = parser.parse_args(argv)
    root, out = options.data_dir or data_dir(), options.out or project_root() / "results"
    try:
        for folder in CARDS:
            fetch.quick_check(root / folder, f"run `{about(folder).command}`")
        write_samples(root, out / "samples")
        write_cards(root, out / "data")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"samples in {out / 'samples'}, cards in {out / 'data'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
