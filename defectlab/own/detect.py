"""A reader's own images: train a detector on a folder with boxes, or find defects in a folder with a trained one."""

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from defectlab import runs
from defectlab.data.detection import DEEP_PCB_CLASSES, NEU_CLASSES, DetectionData, DetectionSplit
from defectlab.data.images import IMAGE_SUFFIXES, decode, find_files, letterbox
from defectlab.data.own_folder import load_folder
from defectlab.figures.detection import as_seen, boxed, class_colour
from defectlab.files import DataError, write_atomically, write_json
from defectlab.metrics.detection import Boxes, examples
from defectlab.networks.yolo.model import SCALES, Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.own import saved
from defectlab.own.export import check_installed, to_onnx
from defectlab.papers import yolo_dcf
from defectlab.provenance import pick_device, provenance
from defectlab.runs import Context, OutOfTime, Result
from defectlab.studies import detector as baselines
from defectlab.training.detection import fresh, predict, run_detector

CHUNK = 64  # images that are read and held at once
LISTED = 0.01  # lowest score in predictions.json
SETTINGS = {"detector": DetectorSettings, "yolo_dcf": yolo_dcf.Settings}
BUILD = {"detector": build_detector, "yolo_dcf": yolo_dcf.build}  # by the model of the settings
CLASS_NAMES = {  # of the models in runs/
    **dict.fromkeys(("neu_det", "neu_det_index", "synthetic_steel"), NEU_CLASSES),
    **dict.fromkeys(("deep_pcb", "synthetic_board"), DEEP_PCB_CLASSES),
}
REMEDY = "give a .safetensors of a detector from runs/, or train one with --data"


def detect(options: argparse.Namespace) -> int:
    """The command `detect`: with --data `train`, with --model `find`. ValueError for options that do not fit."""
    if options.onnx:
        check_installed()  # before any training
    return train(options) if options.data else find(options)


def read_detector(path: Path, device: str) -> tuple[Detector, tuple[str, ...], saved.Saved]:
    """-> (detector for inference, not yet fused; names of its classes; what the file says). DataError as `saved`'s."""
    model = saved.read(path, SETTINGS, REMEDY)
    names = model.header.get("class_names") or CLASS_NAMES.get(model.settings.dataset, ())
    detector = BUILD[model.settings.model](model.settings, len(names))  # the anchors of v5 are among the tensors
    model.load_into(detector)
    return detector.to(device, memory_format=torch.channels_last).eval(), tuple(names), model


# --- Training --------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> int:
    """Train on a folder, evaluate on its test part, and write into --out:

    detector.safetensors (weights; settings, class names and the threshold from dev in its header), metrics.json,
    predictions.json (see `listed`) and cases.png (examples of the test images). An interrupted training leaves a
    checkpoint there and is continued by the same command.
    """
    if not options.format:
        raise ValueError("--data needs --format voc, yolo or coco: how the boxes of the images are written")
    if options.size % 32:
        raise ValueError(f"--size must be a multiple of 32, got {options.size}")
    if options.batch < 2:
        raise ValueError(f"--batch must be at least 2, got {options.batch}")
    scales = SCALES[options.family]
    if options.scale not in scales:
        raise ValueError(f"--scale of {options.family} must be one of {', '.join(scales)}: {options.scale}")
    device, out = pick_device(options.device), options.out or Path("detections")
    data = load_folder(options.data.resolve(), options.format, options.size, device)  # a name, for "." too
    print(data.report)
    if not (data.dev.labels >= 0).any():
        raise DataError(
            f"{options.data}: none of the {len(data.dev)} dev images has a box, and the score threshold comes from "
            "them: annotate more images, or give folders train, val and test"
        )
    chosen = {name: getattr(options, name) for name in ("size", "epochs", "family", "scale", "batch")}
    settings = DetectorSettings(dataset=data.name, **(baselines.QUICK | chosen))
    identity = runs.row_identity(settings, "own")
    key = runs.make_key(settings.model, data.name, "own", options.seed, identity, {"data": data.fingerprint})
    path = out / "detector.safetensors"
    if path.exists():
        detector, _, model = read_detector(path, device)
        if model.header.get("key") != key:
            raise DataError(f"{path} was trained with other images or settings: give another --out, or delete it")
        print(f"already trained: {path}")
    else:
        checkpoint = out / f"checkpoint-{key.rsplit('-', 1)[-1]}.safetensors"
        deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
        try:
            result = run_detector(settings, options.seed, data, Context(device, checkpoint, deadline))
        except OutOfTime as stop:
            print(stop)
            return 0
        detector = fresh(build_detector, settings, data)
        detector.load_state_dict(result.model)
        detector.to(device, memory_format=torch.channels_last).eval()
        write_findings(out, detector, data, result, settings, options.seed)
    if options.onnx:
        to_onnx(detector, out / "detector.onnx", settings.size)
    if not path.exists():  # last: its presence means finished
        saved.write(path, settings, result.dev, result.model, key=key, class_names=data.class_names)
        checkpoint.unlink(missing_ok=True)
        metrics = ", ".join(f"{k} {result.metrics[k]:.1f}" for k in ("map50", "map50_95") if k in result.metrics)
        print(f"{len(data.test)} test images: {metrics} %; threshold {result.dev['threshold']:.3f}; saved {path}")
    return 0


def write_findings(
    out: Path, detector: Detector, data: DetectionData, result: Result, settings: DetectorSettings, seed: int
) -> None:
    """metrics.json, predictions.json and cases.png of the test images."""
    content = {name: getattr(result, name) for name in ("metrics", "per_class", "dev", "costs", "curve", "precision")}
    content |= {"settings": asdict(settings), "seed": seed, "fingerprint": data.fingerprint}
    content["images"] = {part: len(getattr(data, part)) for part in ("train", "dev", "test")}
    write_json(out / "metrics.json", content | provenance(data.test.images.device))
    test, threshold = data.test, result.dev["threshold"]
    predictions = predict(detector, test)
    write_json(out / "predictions.json", listed(predictions, test, data.class_names))
    shown = examples(predictions, test.ground_truth(), threshold=threshold)
    titles = [f"{test.names[i].rsplit('/', 1)[-1]}\n{why}" for i, why in shown]
    places = [(predictions[i], float(test.scale[i]), test.offset[i].repeat(2)) for i, _ in shown]
    found = [one | {"boxes": one["boxes"] * scale + offset} for one, scale, offset in places]
    with plt.rc_context({"figure.constrained_layout.use": True}):
        figure = boxed(
            *as_seen(test, [i for i, _ in shown]), found, titles, data.class_names, width=13, threshold=threshold
        )
        write_atomically(out / "cases.png", lambda aside: figure.savefig(aside, dpi=100, bbox_inches="tight"))
        plt.close(figure)


def listed(predictions: Boxes, split: DetectionSplit, class_names: tuple[str, ...]) -> dict[str, Any]:
    """For predictions.json: an image's file, width, height, and its detections with score >= 0.01, best first:
    boxes (x1, y1, x2, y2 in pixels of the image), scores (0..1), classes (names)."""
    images = []
    for name, (height, width), found in zip(split.names, split.sizes.tolist(), predictions, strict=True):
        kept = found["scores"] >= LISTED
        entry = {"file": name, "width": width, "height": height}
        entry["boxes"] = [[round(value, 2) for value in box] for box in found["boxes"][kept].tolist()]
        entry["scores"] = [round(score, 6) for score in found["scores"][kept].tolist()]
        entry["classes"] = [class_names[label] for label in found["labels"][kept].tolist()]
        images.append(entry)
    return {"lowest_score": LISTED, "class_names": list(class_names), "images": images}


# --- Finding ---------------------------------------------------------------------------------------------------------


def find(options: argparse.Namespace) -> int:
    """Look for defects in every image below a folder and write into --out:

    predictions.csv, one line per box: file, x1, y1, x2, y2 (pixels of the image), score (0..1), class; with --draw, the
    images with their boxes below `drawn`.
    """
    if not options.images:
        raise ValueError("--model needs --images: the folder of images to look at")
    if options.confidence is not None and not 0 <= options.confidence <= 1:
        raise ValueError(f"--confidence must lie between 0 and 1, got {options.confidence:g}")
    device, out, folder = pick_device(options.device), options.out or Path("found"), options.images
    detector, class_names, model = read_detector(options.model, device)
    confidence = model.threshold if options.confidence is None else options.confidence
    drawn_before = (out / "drawn").resolve()  # --out may lie in the folder
    paths = [path for path in find_files(folder, IMAGE_SUFFIXES) if not path.resolve().is_relative_to(drawn_before)]
    if not paths:
        raise DataError(f"{folder} holds no jpg, png, bmp or tif image: give the folder that holds them")
    lines = []
    for start in range(0, len(paths), CHUNK):
        split, images = read_images(paths[start : start + CHUNK], folder, model.settings.size, device)
        predictions = predict(detector, split, confidence=min(confidence, 0.001))
        for name, image, found in zip(split.names, images, predictions, strict=True):
            kept = found["scores"] >= confidence
            boxes, scores, labels = (found[key][kept] for key in ("boxes", "scores", "labels"))
            names = [class_names[label] for label in labels.tolist()]
            for box, score, kind in zip(boxes.tolist(), scores.tolist(), names, strict=True):
                lines.append([name, *(f"{value:.2f}" for value in box), f"{score:.6f}", kind])
            if options.draw:
                drawn = draw(image, boxes, scores, labels, class_names)
                write_atomically(out / "drawn" / f"{name}.png", drawn.save)
    table = pd.DataFrame(lines, columns=["file", "x1", "y1", "x2", "y2", "score", "class"])
    write_atomically(out / "predictions.csv", lambda aside: table.to_csv(aside, index=False))
    if options.onnx:
        to_onnx(detector, out / "detector.onnx", model.settings.size)
    print(f"{len(paths)} images, {len(lines)} boxes with score >= {confidence:.4f}: {out}")
    if options.confidence is None and confidence >= 1:
        print("no detection on dev was right, so its threshold is 1: give --confidence, or train for longer")
    return 0


def read_images(paths: list[Path], folder: Path, size: int, device: str) -> tuple[DetectionSplit, list[Image.Image]]:
    """Images without boxes as the network takes them, and as they are. DataError names one that cannot be read."""
    images, count = [decode(path) for path in paths], len(paths)
    pixels, scales, offsets = zip(*(letterbox(image, size) for image in images), strict=True)
    split = DetectionSplit(
        torch.stack([torch.from_numpy(one.copy()).expand(3, -1, -1) for one in pixels]).to(device),
        torch.zeros(count, 1, 4, device=device),
        torch.full((count, 1), -1, device=device),
        [path.relative_to(folder).as_posix() for path in paths],
        torch.tensor([(image.height, image.width) for image in images]),
        torch.tensor(scales),
        torch.tensor(offsets),
    )
    return split, images


def draw(
    image: Image.Image, boxes: Tensor, scores: Tensor, labels: Tensor, class_names: tuple[str, ...]
) -> Image.Image:
    """The image with its boxes in the colours of their classes, each with name and score."""
    if not len(boxes):
        return image
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    pixels = pixels.view(image.height, image.width, 3).movedim(-1, 0)  # (3, H, W)
    tags = [f"{class_names[label]} {score:.2f}" for label, score in zip(labels.tolist(), scores.tolist(), strict=True)]
    colours = [class_colour(label) for label in labels.tolist()]
    drawn = draw_bounding_boxes(pixels, boxes, tags, colours, width=2)
    return Image.fromarray(drawn.movedim(0, -1).numpy())
