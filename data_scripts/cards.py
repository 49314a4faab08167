"""Count the committed data cards from the nine real sets in the data folder.

    python data_scripts/cards.py               write results/data again; a few minutes
    python data_scripts/cards.py --out FOLDER  write below FOLDER instead, to compare
    python data_scripts/cards.py --without elpv  leave a set out, whose card stays as it is

A card says what a reader must know of the whole set: `defectlab.data.cards.card` lists what all cards say, the
functions `card_of_` below what a set's card says besides.
"""

import argparse
import runpy
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from defectlab.data import fetch
from defectlab.data.annotations import DUPLICATES, AnnotatedImage, read_deep_pcb, read_voc
from defectlab.data.anomaly import AnomalyData, load_anomaly
from defectlab.data.cards import SETS, SIDES
from defectlab.data.cells import CLASSES, DEFECTIVE, KINDS, CellData, load_cells, read_labels
from defectlab.data.detection import DEEP_PCB_CLASSES, NEU_CLASSES, DetectionData, load_detection
from defectlab.data.frames import LEFT_OUT, FrameData, FrameSplit, load_frames, position_of
from defectlab.data.images import decode, in_threads, read_header
from defectlab.data.instances import TURNS_LIST, load_instances
from defectlab.data.leaks import compared
from defectlab.data.splits import PARTS, read_list
from defectlab.files import DataError, data_dir, project_root, write_json

Data = AnomalyData | DetectionData | FrameData | CellData
LEAK_SIZE = 128  # px: enough for the leak check
MODULES = "the files do not say which module a cell is from, so any split may have cells of one module on both sides"


def about(folder: str) -> fetch.DataSet:
    """The description in the script that fetches the set."""
    script, _, category = folder.partition("/")
    found = runpy.run_path(str(Path(__file__).with_name(f"{script}.py")))
    return found["dataset"](category) if category else found["DATASET"]


def of_files(folder: str, root: Path) -> dict[str, Any]:
    """What the files say, whatever a reader makes of them."""
    of_set, manifest, contents = about(folder), fetch.read_manifest(root / folder, ""), defaultdict(list)
    for path, (_, sha256) in manifest.files.items():
        if path.endswith(".jpg") or path.startswith(("train/", "test/", "images/")):  # no masks
            contents[sha256].append(path)
    return {name: getattr(of_set, name) for name in ("name", "page", "licence", "citation")} | {
        "command": of_set.command + ("" if of_set.sources else " --archive FILE"),
        "fingerprint": manifest.fingerprint,
        "identical_images": sorted(paths for paths in contents.values() if len(paths) > 1),
    }


def common(folder: str, root: Path, data: Data, counts: dict[str, dict[str, int]], sizes: list) -> dict[str, Any]:
    """What all cards say but leaks. counts: part -> class -> how many; sizes: height and width of every image."""
    heights, widths = zip(*sizes, strict=True)
    return of_files(folder, root) | {
        "label": data.label,
        "counted": "boxes" if isinstance(data, DetectionData) else "images",
        "split_fingerprint": data.fingerprint,
        "classes": list(counts["train"]),
        "parts": {part: {"images": len(getattr(data, part)), "classes": counts[part]} for part in PARTS},
        "pixels": {"width": [min(widths), max(widths)], "height": [min(heights), max(heights)]},
    }


def of_classes(folder: str, root: Path, data: AnomalyData | DetectionData) -> dict[str, Any]:
    """What cards of sets with several classes say."""
    boxes, counts, sizes = isinstance(data, DetectionData), {}, []
    names = data.class_names if boxes else data.type_names
    for part in PARTS:
        split = getattr(data, part)
        labels = split.labels[split.labels >= 0] if boxes else split.types
        counts[part] = dict(zip(names, torch.bincount(labels, minlength=len(names)).tolist(), strict=True))
        sizes += split.sizes.tolist() if boxes else split.original_sizes
    return common(folder, root, data, counts, sizes)


def of_frames(folder: str, root: Path, data: FrameData, kind: str, image: str) -> dict[str, Any]:
    """What cards of frames say: all of them show a defect (`kind`). image: path of a frame, with {} for its name."""
    splits = {part: getattr(data, part) for part in PARTS}
    paths = [root / folder / image.format(*name.split("/")) for split in splits.values() for name in split.names]
    sizes = [(height, width) for width, height, _ in (read_header(path, "") for path in paths)]
    return common(folder, root, data, {part: {kind: len(split)} for part, split in splits.items()}, sizes) | {
        "mean_share": round(torch.cat([split.masks for split in splits.values()]).float().mean().item(), 4),
        "leaks": leaks(data),
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
    return of_classes(folder, root, data) | {
        "marked": marked,
        "empty_masks": [name for name, has in zip(test.names, test.has_mask.tolist(), strict=True) if not has],
        "width_by_height": [round(float(value), 2) for value in (min(ratios), np.median(ratios), max(ratios))],
        "leaks": leaks(data),
    }


def leaks(data: Data) -> dict[str, Any]:
    """Test images that show what a training image shows (also of those held out of training as dev), by the leak check:
    how many, of each class of an anomaly set or of cells, and which pairs, the most alike first."""
    kinds_known, (train, dev, test) = isinstance(data, AnomalyData), (getattr(data, part) for part in PARTS)
    own = [i for i, name in enumerate(dev.names) if not (kinds_known and "+" in name)]  # not what was pasted
    names = [*train.names, *(dev.names[i] for i in own)]
    both = torch.cat([train.images, dev.images[own]]), test.images
    pairs, threshold = compared(*both)
    seen = {pair.second for pair in pairs}
    best = {pair.second: pair for pair in reversed(pairs)}
    found = {
        "rule": "by defectlab.data.leaks: alike beyond chance, also turned, mirrored or under other light",
        "seen": len(seen),
        "of": len(test),
        "threshold": round(threshold, 2),
        "pairs": [
            [names[pair.first], test.names[pair.second], round(pair.similarity, 2)]
            for pair in sorted(best.values(), key=lambda pair: -pair.similarity)[:20]
        ],
    }
    if kinds_known or isinstance(data, CellData):
        for label, kind in enumerate(("good", "defective") if kinds_known else CLASSES):
            at = test.labels == label
            found[kind] = {"seen": int(at[sorted(seen)].sum()), "of": int(at.sum())}
    if isinstance(data, CellData):
        found["rule"] += f"; {MODULES}"
        apart = [abs(int(names[pair.first][4:]) - int(test.names[pair.second][4:])) for pair in best.values()]
        if apart:
            found["numbers_apart"] = {"median": float(np.median(apart)), "at_most_10": sum(n <= 10 for n in apart)}
    return found


def sides(entries: Iterable[AnnotatedImage], class_names: Sequence[str]) -> dict[str, list[int]]:
    """Class -> how many boxes have which side (root of the area, as a part of the image's width), by `SIDES`."""
    found: dict[str, list[float]] = {name: [] for name in class_names}
    for entry in entries:
        lengths = np.sqrt(np.prod((entry.boxes[:, 2:] - entry.boxes[:, :2]) / entry.width, axis=1))
        for label, length in zip(entry.labels, lengths, strict=True):
            found[class_names[label]].append(length)
    return {name: np.histogram(lengths, SIDES)[0].tolist() for name, lengths in found.items()}


def card_of_steel(folder: str, root: Path) -> dict[str, Any]:
    """Also boxes given twice, boxes of another class than the file's name, coordinates, the split by number."""
    data, by_number = (load_detection(name, 32, root=root) for name in ("neu_det", "neu_det_index"))
    found = of_classes(folder, root, data)
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
        "test_by_number": of_classes(folder, root, by_number)["parts"]["test"],
        "in_both_tests": len(set(data.test.names) & set(by_number.test.names)),
        "sides": sides(entries.values(), NEU_CLASSES),
        "leaks": leaks(load_detection(folder, LEAK_SIZE, root=root)),
    }


def card_of_masked_steel(folder: str, root: Path) -> dict[str, Any]:
    """Also the turned copies across the published parts, and the images that are NEU-DET's."""
    fetch.quick_check(root / "neu_det", f"run `{about('neu_det').command} --archive FILE`")
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
    return of_classes(folder, root, data) | {
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
    return of_classes(folder, root, data) | {
        "painted": [name for name, is_so in zip(names, painted, strict=True) if is_so],
        "templates": len(list((root / folder).glob("PCBData/group*/*/*_temp.jpg"))),
        "sides": sides(entries, DEEP_PCB_CLASSES),
        "leaks": leaks(load_detection(folder, LEAK_SIZE, root=root)),
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


def card_of_cells(folder: str, root: Path) -> dict[str, Any]:
    """Also the cells of each probability and kind; "drawn": the leaks of a split that draws cells by their names."""
    data = load_cells(folder, LEAK_SIZE, root=root)
    counts = {
        part: dict(zip(CLASSES, torch.bincount(getattr(data, part).labels, minlength=2).tolist(), strict=True))
        for part in PARTS
    }
    labels = list(read_labels(root / folder / "labels.csv", "").values())
    given = Counter((probability, kind) for _, probability, kind in labels)
    sizes = [read_header(root / folder / path, "")[1::-1] for path, _, _ in labels]
    defective = {kind: [probability > DEFECTIVE for _, probability, of in labels if of == kind] for kind in KINDS}
    return common(folder, root, data, counts, sizes) | {
        "cells": {
            f"{value:.2f}": {kind: given[value, kind] for kind in KINDS} for value in sorted({p for p, _ in given})
        },
        "defective_share": {kind: round(float(np.mean(of)), 3) for kind, of in defective.items()},
        "leaks": leaks(data),
        "drawn": leaks(load_cells(folder, LEAK_SIZE, "drawn", root=root)),
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
    "elpv": card_of_cells,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="instead of DEFECTLAB_DATA, or ./data")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of results")
    parser.add_argument("--without", nargs="+", choices=SETS, default=(), metavar="SET", help="leave these sets out")
    options = parser.parse_args(argv)
    root, out = options.data_dir or data_dir(), (options.out or project_root() / "results") / "data"
    try:
        sets = [folder for folder in SETS if folder not in options.without]
        for folder in sets:
            fetch.quick_check(root / folder, f"run `{about(folder).command}`")
        for folder in sets:
            write_json(out / f"{folder.rpartition('/')[2]}.json", CARDS[folder](folder, root))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"cards in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
