"""A reader's own images: train a detector on a folder with boxes, or find defects in a folder with a trained one."""

import argparse
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from defectlab.data.detection import DEEP_PCB_CLASSES, NEU_CLASSES, DetectionData, DetectionSplit
from defectlab.data.images import decode, letterbox, plain
from defectlab.data.own_folder import Images, load_folder
from defectlab.figures.own import cases, draw, font_for, legend
from defectlab.files import DataError, write_atomically, write_json
from defectlab.metrics.detection import Boxes
from defectlab.networks.yolo.model import SCALES, Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.own import saved
from defectlab.own.export import check_installed, to_onnx
from defectlab.own.folders import check_same, key_and_checkpoint, prepare
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
NOTHING_RIGHT = "no detection on dev was right, so its threshold is 1: give --confidence, or train for longer"
REMEDY = "give a .safetensors of a detector from runs/, or train one with --data"


def detect(options: argparse.Namespace) -> int:
    """The command `detect`: with --data `train`, with --model `find`. ValueError where an option is missing."""
    if options.onnx:
        check_installed()  # before any training
    return train(options) if options.data else find(options)


def read_detector(path: Path, device: str) -> tuple[Detector, tuple[str, ...], saved.Saved]:
    """-> (detector for inference, not yet fused; names of its classes; what the file says). DataError as `saved`'s."""
    model = saved.read(path, SETTINGS, REMEDY)
    if not model.settings.colours:
        raise DataError(f"{path} looks at boards beside their templates, which a folder of images lacks: {REMEDY}")
    names = model.header.get("class_names") or CLASS_NAMES.get(model.settings.dataset, ())
    detector = model.build(lambda: BUILD[model.settings.model](model.settings, len(names)))  # with the anchors of v5
    return detector.to(device, memory_format=torch.channels_last).eval(), tuple(names), model


# --- Training --------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> int:
    """Train on a folder, evaluate on its test part, and write into --out:

    metrics.json, predictions.json (see `listed`), detector.safetensors (weights; settings, class names and the
    threshold from dev in its header) and cases.png (examples of the test images). An interrupted training goes on."""
    if not options.format:
        raise ValueError("--data needs --format voc, yolo or coco: how the boxes of the images are written")
    saved.check_size(options.size, 32)
    if options.batch < 2:
        raise ValueError(f"--batch must be at least 2, got {options.batch}")
    if options.scale not in (scales := SCALES[options.family]):
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
    path = out / "detector.safetensors"
    key, checkpoint = key_and_checkpoint(path, settings, options.seed, data)
    prepare(out, options.data)
    if path.exists():
        detector, _, model = read_detector(path, device)
        check_same(model, key)
    else:
        deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
        try:
            result = run_detector(settings, options.seed, data, Context(device, checkpoint, deadline))
        except OutOfTime as stop:
            print(f"{stop}; the detector is written after the last epoch")
            return 0
        detector = fresh(build_detector, settings, data)
        detector.load_state_dict(result.model)
        detector.to(device, memory_format=torch.channels_last).eval()
        predictions = predict(detector, data.test)
        write_json(out / "metrics.json", described(data, result, settings, options.seed))
        write_json(out / "predictions.json", listed(predictions, data.test, data.class_names))
        saved.write(path, settings, result.dev, result.model, key=key, class_names=data.class_names)  # now finished
        checkpoint.unlink(missing_ok=True)
        metrics = ", ".join(f"{k} {result.metrics[k]:.1f}" for k in ("map50", "map50_95") if k in result.metrics)
        print(f"{len(data.test)} test images: {metrics} %; threshold {result.dev['threshold']:.3f}; saved {path}")
        if result.dev["threshold"] >= 1:
            print(NOTHING_RIGHT)
        try:
            figure, numbers = cases(data, predictions, result.dev["threshold"])
            write_atomically(out / "cases.png", partial(figure.savefig, format="png", dpi=100, bbox_inches="tight"))
            print(numbers, end="\n" if numbers else "")
        except Exception as error:  # whatever it is: nothing else hangs on this figure
            print(f"warning: {out / 'cases.png'} could not be drawn ({type(error).__name__}: {error})")
    if options.onnx:
        to_onnx(detector, out / "detector.onnx", settings.size)
    return 0


def described(data: DetectionData, result: Result, settings: DetectorSettings, seed: int) -> dict[str, Any]:
    """The content of metrics.json."""
    content = {name: getattr(result, name) for name in ("metrics", "per_class", "dev", "costs", "curve", "precision")}
    content |= {"settings": asdict(settings), "seed": seed, "fingerprint": data.fingerprint, "data": data.report}
    content["images"] = {part: len(getattr(data, part)) for part in ("train", "dev", "test")}
    return content | provenance(data.test.images.device)


def listed(predictions: Boxes, split: DetectionSplit, class_names: tuple[str, ...]) -> dict[str, Any]:
    """For predictions.json: an image's file, width, height, and its detections with score >= 0.01, best first:
    boxes (x1, y1, x2, y2 in pixels of the image), scores (0..1), classes (names)."""
    images = []
    for name, (height, width), found in zip(split.names, split.sizes.tolist(), predictions, strict=True):
        kept = found["scores"] >= LISTED
        entry = {"file": plain(name), "width": width, "height": height}
        entry["boxes"] = [[round(value, 2) for value in box] for box in found["boxes"][kept].tolist()]
        entry["scores"] = [round(score, 6) for score in found["scores"][kept].tolist()]
        entry["classes"] = [class_names[label] for label in found["labels"][kept].tolist()]
        images.append(entry)
    return {"lowest_score": LISTED, "class_names": list(class_names), "images": images}


# --- Finding ---------------------------------------------------------------------------------------------------------


def find(options: argparse.Namespace) -> int:
    """Look for defects in every image below a folder and write into --out:

    predictions.csv, one line per box: file, x1, y1, x2, y2 (pixels of the image), score (0..1), class; with --draw, the
    images with their boxes below `drawn`. -> exit code, 1 where some images could not be read.
    """
    if not options.images:
        raise ValueError("--model needs --images: the folder of images to look at")
    if options.confidence is not None and not 0 <= options.confidence <= 1:
        raise ValueError(f"--confidence must lie between 0 and 1, got {options.confidence:g}")
    device, out = pick_device(options.device), options.out or Path("found")
    detector, class_names, model = read_detector(options.model, device)
    confidence = model.threshold if options.confidence is None else options.confidence
    images, lines = Images(options.images), []
    prepare(out, options.images)
    font, drawn = font_for(class_names)
    for names, squares in images.chunks(CHUNK, lambda image: (*letterbox(image, model.settings.size), image.size)):
        predictions = predict(detector, as_split(names, squares, device), confidence=min(confidence, 0.001))
        for name, found in zip(names, predictions, strict=True):
            kept = found["scores"] >= confidence
            boxes, scores, labels = (found[key][kept] for key in ("boxes", "scores", "labels"))
            called = [class_names[label] for label in labels.tolist()]
            for box, score, kind in zip(boxes.tolist(), scores.tolist(), called, strict=True):
                lines.append([plain(name), *(f"{value:.2f}" for value in box), f"{score:.6f}", kind])
            if options.draw:
                tags = [f"{drawn[kind]} {score:.2f}" for kind, score in zip(called, scores.tolist(), strict=True)]
                shown = draw(decode(images.folder / name), boxes, labels, tags, font)
                with images.writing("drawing", name):
                    write_atomically(out / "drawn" / f"{name}.png", partial(shown.save, format="PNG"))
    table = pd.DataFrame(lines, columns=["file", "x1", "y1", "x2", "y2", "score", "class"])
    write_atomically(out / "predictions.csv", lambda aside: table.to_csv(aside, index=False))
    if options.onnx:
        to_onnx(detector, out / "detector.onnx", model.settings.size)
    print(f"{len(images.paths) - len(images.broken)} images, {len(lines)} boxes with score >= {confidence:.4f}: {out}")
    if options.confidence is None and confidence >= 1:
        print(NOTHING_RIGHT)
    if options.draw and (numbers := legend(drawn)):
        print(numbers)
    return images.close()


def as_split(names: list[str], squares: list[tuple], device: str) -> DetectionSplit:
    """Letterboxed images (pixels, scale, offset, size (width, height)) without boxes, as the network takes them."""
    pixels, scales, offsets, sizes = zip(*squares, strict=True)
    return DetectionSplit(
        torch.stack([torch.from_numpy(one.copy()).expand(3, -1, -1) for one in pixels]).to(device),
        torch.zeros(len(names), 1, 4, device=device),
        torch.full((len(names), 1), -1, device=device),
        names,
        torch.tensor([(height, width) for width, height in sizes]),
        torch.tensor(scales),
        torch.tensor(offsets),
    )
