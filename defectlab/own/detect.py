"""A reader's own pictures: train a detector on a folder with boxes, or find defects in a folder with a trained one."""

import argparse
import csv
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from defectlab import runs
from defectlab.data.detection import DEEP_PCB_CLASSES, NEU_CLASSES, DetectionData, DetectionSplit
from defectlab.data.images import IMAGE_SUFFIXES, decode, find_files, letterbox
from defectlab.data.own_folder import load_folder
from defectlab.figures.detection import CLASS_COLOURS, boxed
from defectlab.files import DataError, write_atomically, write_json
from defectlab.metrics.detection import Boxes, examples
from defectlab.networks.yolo.model import SCALES, Detector, build_detector
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.own.export import check_installed, to_onnx
from defectlab.papers import yolo_dcf
from defectlab.provenance import pick_device
from defectlab.runs import Context, OutOfTime, Result
from defectlab.studies import detector as baselines
from defectlab.training.detection import fresh, predict, run_detector

CHUNK = 64  # pictures that are read and held at once
LISTED = 0.01  # lowest score in predictions.json
KINDS = {"detector": (DetectorSettings, build_detector), "yolo_dcf": (yolo_dcf.Settings, yolo_dcf.build)}
CLASS_NAMES = {  # of the models in runs/
    **dict.fromkeys(("neu_det", "neu_det_index", "synthetic_steel"), NEU_CLASSES),
    **dict.fromkeys(("deep_pcb", "synthetic_board"), DEEP_PCB_CLASSES),
}


@dataclass(frozen=True)
class Trained:
    """A detector as read from its file."""

    detector: Detector  # on the device, for inference
    settings: DetectorSettings
    class_names: tuple[str, ...]
    dev: dict[str, float]  # metrics on dev, and "threshold", the score from which on boxes are kept
    key: str  # of the settings, the pictures and the seed that it was trained with


def detect(options: argparse.Namespace) -> int:
    """The command `detect`: with --data `train`, with --model `find`. ValueError for options that do not fit."""
    if options.onnx:
        check_installed()  # before any training
    return train(options) if options.data else find(options)


# --- Training --------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> int:
    """Train on a folder, evaluate on its test part, and write into --out:

    detector.safetensors (weights; settings, class names and the threshold from dev in its header), metrics.json,
    predictions.json (see `listed`) and cases.png (the telling test pictures). An interrupted training leaves a
    checkpoint there and is continued by the same command.
    """
    if not options.format:
        raise ValueError("--data needs --format voc, yolo or coco: how the boxes of the pictures are written")
    if options.size < 32 or options.size % 32:
        raise ValueError(f"--size must be a multiple of 32, got {options.size}")
    if options.epochs < 1 or options.batch < 2:
        raise ValueError(f"--epochs must be at least 1 and --batch 2, got {options.epochs} and {options.batch}")
    if options.scale not in SCALES[options.family]:
        raise ValueError(
            f"--scale of {options.family} must be one of {', '.join(SCALES[options.family])}: {options.scale}"
        )
    device, out = pick_device(options.device), options.out or Path("detections")
    data = load_folder(options.data.resolve(), options.format, options.size, device)  # a name, for "." too
    print(data.report)
    if not (data.dev.labels >= 0).any():
        raise DataError(
            f"{options.data}: none of the {len(data.dev)} dev pictures has a box, and the score threshold comes from "
            "them: annotate more pictures, or give folders train, val and test"
        )
    chosen = {name: getattr(options, name) for name in ("size", "epochs", "family", "scale", "batch")}
    settings = DetectorSettings(dataset=data.name, **(baselines.QUICK | chosen))
    key = runs.make_key(
        settings.model, data.name, "own", options.seed, runs.row_identity(settings, "own"), {"data": data.fingerprint}
    )
    path = out / "detector.safetensors"
    if path.exists():
        trained = read_model(path, device)
        if trained.key != key:
            raise DataError(f"{path} was trained with other pictures or settings: give another --out, or delete it")
        print(f"already trained: {path}")
        export(options, out, trained.detector, settings.size)
        return 0
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    context = Context(
        device=device, checkpoint=out / f"checkpoint-{key.rsplit('-', 1)[-1]}.safetensors", deadline=deadline
    )
    try:
        result = run_detector(settings, options.seed, data, context)
    except OutOfTime as stop:
        print(stop)
        return 0
    detector = fresh(build_detector, settings, data)
    detector.load_state_dict(result.model)
    detector.to(device, memory_format=torch.channels_last).eval()
    write_findings(out, detector, data, result, settings, options.seed)
    header = {"key": key, "model": settings.model, "settings": json.dumps(asdict(settings))}
    header |= {"dev": json.dumps(result.dev), "class_names": json.dumps(data.class_names)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in result.model.items()}
    export(options, out, detector, settings.size)
    write_atomically(path, lambda aside: save_file(tensors, aside, header))  # last: its presence means finished
    context.checkpoint.unlink(missing_ok=True)
    shown = ", ".join(f"{name} {result.metrics[name]:.1f}" for name in ("map50", "map50_95") if name in result.metrics)
    print(f"{len(data.test)} test pictures: {shown} %; threshold from dev {result.dev['threshold']:.3f}; saved {path}")
    return 0


def write_findings(
    out: Path, detector: Detector, data: DetectionData, result: Result, settings: DetectorSettings, seed: int
) -> None:
    """metrics.json, predictions.json and cases.png of the test pictures."""
    device = str(data.test.images.device)
    content = {
        "metrics": result.metrics,
        "per_class": result.per_class,
        "dev": result.dev,
        "costs": result.costs,
        "curve": result.curve,
        "settings": asdict(settings),
        "seed": seed,
        "precision": result.precision,
        "pictures": {part: len(getattr(data, part)) for part in ("train", "dev", "test")},
        "fingerprint": data.fingerprint,
    }
    write_json(out / "metrics.json", content | runs.provenance(device))
    predictions = predict(detector, data.test)
    write_json(out / "predictions.json", listed(predictions, data.test, data.class_names))
    threshold, truths, test = result.dev["threshold"], data.test.ground_truth(), data.test
    cases = examples(predictions, truths, threshold=threshold)

    def as_drawn(boxes: Boxes) -> Boxes:
        places = [(i, float(test.scale[i]), test.offset[i].repeat(2)) for i, _ in cases]
        return [{**boxes[i], "boxes": boxes[i]["boxes"] * scale + offset} for i, scale, offset in places]

    pictures = [test.images[i].movedim(0, -1).cpu().numpy() for i, _ in cases]  # (S, S, C)
    pictures = [picture[..., 0] if picture.shape[-1] == 1 else picture for picture in pictures]
    titles = [f"{test.names[i].rsplit('/', 1)[-1]}\n{why}" for i, why in cases]
    with plt.rc_context({"figure.constrained_layout.use": True}):
        figure = boxed(
            pictures, as_drawn(truths), as_drawn(predictions), titles, data.class_names, width=13, threshold=threshold
        )
        write_atomically(
            out / "cases.png", lambda aside: figure.savefig(aside, dpi=100, format="png", bbox_inches="tight")
        )
        plt.close(figure)


def listed(predictions: Boxes, split: DetectionSplit, class_names: tuple[str, ...]) -> dict[str, Any]:
    """For predictions.json: a picture's file, width, height, and its detections with score >= 0.01, best first:
    boxes (x1, y1, x2, y2 in pixels of the picture), scores (0..1), classes (names)."""
    pictures = []
    for name, (height, width), found in zip(split.names, split.sizes.tolist(), predictions, strict=True):
        kept = found["scores"] >= LISTED
        entry = {"file": name, "width": width, "height": height}
        entry["boxes"] = [[round(value, 2) for value in box] for box in found["boxes"][kept].tolist()]
        entry["scores"] = [round(score, 6) for score in found["scores"][kept].tolist()]
        entry["classes"] = [class_names[label] for label in found["labels"][kept].tolist()]
        pictures.append(entry)
    return {"lowest_score": LISTED, "class_names": list(class_names), "pictures": pictures}


# --- Finding ---------------------------------------------------------------------------------------------------------


def read_model(path: Path, device: str) -> Trained:
    """A detector of `detect --data` or of runs/, its batch norms not yet fused. DataError where it is none of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        kind, build = KINDS[header["model"]]
        fields = json.loads(header["settings"])
        fields.pop("mixup", None)  # a setting of models saved while there was mixup
        settings = kind(**fields)
        names = json.loads(header["class_names"]) if "class_names" in header else CLASS_NAMES[settings.dataset]
        dev = json.loads(header["dev"])
        # The anchors of v5 are among the tensors: COCO's stand in until they are loaded.
        detector = build(settings, len(names))
        detector.load_state_dict(tensors)
        detector.to(device, memory_format=torch.channels_last).eval()
        return Trained(detector, settings, tuple(names), {"threshold": float(dev["threshold"]), **dev}, header["key"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path} is no detector that this program saved ({reason}): give a .safetensors of a detector from runs/, "
            "or train one with --data"
        ) from error


def find(options: argparse.Namespace) -> int:
    """Look for defects in every picture below a folder and write into --out:

    predictions.csv, a line a box: file, x1, y1, x2, y2 (pixels of the picture), score (0..1), class; with --draw, the
    pictures with their boxes below `drawn`.
    """
    if not options.images:
        raise ValueError("--model needs --images: the folder of pictures to look at")
    if options.confidence is not None and not 0 <= options.confidence <= 1:
        raise ValueError(f"--confidence must lie between 0 and 1, got {options.confidence:g}")
    device, out, folder = pick_device(options.device), options.out or Path("found"), options.images
    trained = read_model(options.model, device)
    confidence = trained.dev["threshold"] if options.confidence is None else options.confidence
    drawn_before = (out / "drawn").resolve()  # --out may lie in the folder
    paths = [path for path in find_files(folder, IMAGE_SUFFIXES) if not path.resolve().is_relative_to(drawn_before)]
    if not paths:
        raise DataError(f"{folder} holds no jpg, png, bmp or tif picture: give the folder that holds them")
    lines = []
    for start in range(0, len(paths), CHUNK):
        split, pictures = read_pictures(paths[start : start + CHUNK], folder, trained.settings.size, device)
        predictions = predict(trained.detector, split, confidence=min(confidence, 0.001))
        for name, picture, found in zip(split.names, pictures, predictions, strict=True):
            kept = found["scores"] >= confidence
            found = {key: values[kept] for key, values in found.items()}
            lines += boxes_as_lines(name, found, trained.class_names)
            if options.draw:
                target = out / "drawn" / f"{name}.png"
                drawn = draw(picture, found, trained.class_names)
                write_atomically(target, lambda aside, drawn=drawn: drawn.save(aside, format="png"))

    def write(aside: Path) -> None:
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "x1", "y1", "x2", "y2", "score", "class"])
            writer.writerows(lines)

    write_atomically(out / "predictions.csv", write)
    export(options, out, trained.detector, trained.settings.size)
    print(f"{len(paths)} pictures, {len(lines)} boxes with score >= {confidence:.4f}: {out}")
    if options.confidence is None and confidence >= 1:
        print("no detection on dev was right, so its threshold is 1: give --confidence, or train for longer")
    return 0


def read_pictures(paths: list[Path], folder: Path, size: int, device: str) -> tuple[DetectionSplit, list[Image.Image]]:
    """Pictures without boxes as the network takes them, and as they are. DataError names one that cannot be read."""
    pictures = [decode(path) for path in paths]
    images, scales, offsets = [], [], []
    for picture in pictures:
        pixels, scale, offset = letterbox(picture, size)
        images.append(torch.from_numpy(pixels.copy()).expand(3, -1, -1))
        scales.append(scale)
        offsets.append(offset)
    count = len(paths)
    split = DetectionSplit(
        torch.stack(images).to(device),
        torch.zeros(count, 1, 4, device=device),
        torch.full((count, 1), -1, device=device),
        [path.relative_to(folder).as_posix() for path in paths],
        torch.tensor([(picture.height, picture.width) for picture in pictures]),
        torch.tensor(scales),
        torch.tensor(offsets),
    )
    return split, pictures


def boxes_as_lines(name: str, found: dict[str, Tensor], class_names: tuple[str, ...]) -> Iterator[list[str]]:
    for box, score, label in zip(*(found[key].tolist() for key in ("boxes", "scores", "labels")), strict=True):
        yield [name, *(f"{value:.2f}" for value in box), f"{score:.6f}", class_names[label]]


def draw(picture: Image.Image, found: dict[str, Tensor], class_names: tuple[str, ...]) -> Image.Image:
    """The picture with its boxes in the colours of their classes, each with name and score."""
    if not len(found["boxes"]):
        return picture
    pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    pixels = pixels.view(picture.height, picture.width, 3).movedim(-1, 0)  # (3, H, W)
    labels = found["labels"].tolist()
    tags = [f"{class_names[k]} {s:.2f}" for k, s in zip(labels, found["scores"].tolist(), strict=True)]
    colours = [CLASS_COLOURS[label % len(CLASS_COLOURS)] for label in labels]
    drawn = draw_bounding_boxes(pixels, found["boxes"], tags, colours, width=2)
    return Image.fromarray(drawn.movedim(0, -1).numpy())


def export(options: argparse.Namespace, out: Path, detector: Detector, size: int) -> None:
    """With --onnx: detector.onnx, and how far it is from torch."""
    if options.onnx:
        difference = to_onnx(detector, out / "detector.onnx", size)
        print(
            f"saved {out / 'detector.onnx'}: differs from torch by at most {difference.boxes:.1e} px in boxes and "
            f"{difference.scores:.1e} in scores"
        )
