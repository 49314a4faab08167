"""Window classifiers on cloth: what they learn from, how they are trained and evaluated, and their cost rows."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from defectlab.data.fabric import FabricData, FabricSplit
from defectlab.files import DataError
from defectlab.metrics.costs import flops, parameters
from defectlab.metrics.ranking import auroc, average_precision
from defectlab.metrics.windows import balanced_accuracy, best_balanced_threshold, shares
from defectlab.networks.blocks import pick
from defectlab.networks.windows import FORMS, Frozen, WindowNetwork, WindowSettings, build, count, to_pixels
from defectlab.precision import autocast, full_float32, precision_of, sent
from defectlab.runs import Context, Result
from defectlab.training.anomaly import examples
from defectlab.training.cost_rows import NoData
from defectlab.training.loop import train
from defectlab.training.results import STEP, rounded
from defectlab.training.segmentation import flip, lightened

GAIN = 0.2  # brightness of a training window: 1 ± GAIN
PER_TILE = 4  # windows that a classifier learns from one pass over a tile
REDUCED = 4  # a whole strip of 4096 px is kept as 1024


# --- Windows to learn from -------------------------------------------------------------------------------------------


class Draw:
    """Windows of a split, drawn anew at each call: those at odd places have a defect, the others are good cloth."""

    def __init__(self, split: FabricSplit, window: int, margin: int):
        self.split, self.window, self.margin = split, window, margin
        self.good, self.bad = ((split.labels.cpu() == label).nonzero()[:, 0] for label in (0, 1))
        if not len(self.good) or not len(self.bad):
            raise DataError("there are no good or no defective tiles to learn from: the committed sample has none")
        self.pixels = [split.masks[tile].nonzero().cpu() for tile in self.bad]  # (n, 2) row, column

    def __call__(self, indices: Tensor, generator: torch.Generator, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """-> uint8 windows (B, 1, window, window), labels (B,) float."""
        side, most = self.window, self.split.images.shape[-1] - self.window
        labels = indices % 2
        chosen, cut = torch.rand(len(labels), 4, generator=generator, dtype=torch.float64).tolist(), []
        for label, (which, pixel, down, across) in zip(labels.tolist(), chosen, strict=True):
            if label:
                at = int(which * len(self.bad))
                spot = self.pixels[at][int(pixel * len(self.pixels[at]))].tolist()
                room = side - 2 * self.margin  # the pixel lies inside the margin, unless the tile ends before
                place = (c - self.margin - int(u * room) for c, u in zip(spot, (down, across), strict=True))
                row, column = (min(max(c, 0), most) for c in place)
                tile = self.bad[at]
            else:
                tile = self.good[int(which * len(self.good))]
                row, column = int(down * (most + 1)), int(across * (most + 1))
            cut.append(self.split.images[tile, :, row : row + side, column : column + side])
        return varied(torch.stack(cut), generator)[0], sent(labels.float(), self.split.images.device)

    def tiles(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """-> whole tiles (B, 1, H, W) uint8 and their masks (B, H, W), those at odd places defective."""
        which = torch.rand(len(indices), generator=generator, dtype=torch.float64).tolist()
        pairs = zip(which, (indices % 2).tolist(), strict=True)
        sides = ((share, self.bad if label else self.good) for share, label in pairs)
        at = torch.stack([tiles[int(share * len(tiles))] for share, tiles in sides])
        return varied(self.split.images[at], generator, self.split.masks[at])


def varied(images: Tensor, generator: torch.Generator, *more: Tensor) -> list[Tensor]:
    """uint8 images (B, 1, H, W) of another brightness, mirrored at random; masks (B, H, W) mirrored alike."""
    images = lightened(images, generator, GAIN)
    across, down = sent(torch.rand(2, len(images), generator=generator) < 0.5, images.device)
    return [flip(x, across, down) for x in (images, *more)]


def train_windows(
    settings: WindowSettings, seed: int, data: FabricData, context: Context
) -> tuple[WindowNetwork, dict[str, list[float]], dict[str, float], str]:
    """-> network in eval mode, curve, costs of training, precision. Errors of `train` and of `build`."""
    torch.manual_seed(seed)
    network = build(settings).to(context.device, memory_format=torch.channels_last)
    if settings.network == "contrast":
        return network.eval(), {}, {}, "fp32"
    draw = Draw(data.train, settings.window, settings.margin)
    if isinstance(network, Frozen):
        with full_float32():
            _fit(network, draw, settings, seed)
        return network.eval(), {}, {}, "fp32"
    precision = precision_of(settings, context.device)

    def step(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        with autocast(images.device, precision):
            logits = network(images)[:, 0, 0].float()
        return {"loss": F.binary_cross_entropy_with_logits(logits, labels)}

    on_cpu = torch.device("cpu")  # where windows are cut by number, so that no step waits for the device
    trained = train(network, draw, step, settings.draws, settings, seed, context, indices_on=on_cpu)
    return network, trained.curve, trained.costs, precision


@torch.no_grad()
def _fit(network: Frozen, draw: Draw, settings: WindowSettings, seed: int) -> None:
    """The linear classifier, by scikit-learn, on standardised features of windows that were cut out, or of windows in
    the maps of whole tiles: as the settings say."""
    generator = torch.Generator().manual_seed(seed)
    by_loop = pick(FORMS, settings.learnt or settings.form, "form") is FORMS["loop"]
    features, labels = [], []
    for indices in torch.arange(settings.draws // (1 if by_loop else PER_TILE)).split(settings.batch):
        if by_loop:
            images, wanted = draw(indices, generator)
            found = network.pooled(images)[:, :, 0, 0]
        else:
            found, wanted = _from_tiles(network, *draw.tiles(indices, generator), settings, generator)
        features.append(found.cpu())
        labels.append(wanted.cpu())
    scaler = StandardScaler()
    inputs = scaler.fit_transform(torch.cat(features).double().numpy())
    fitted = LogisticRegression(C=1 / settings.penalty, max_iter=2000).fit(inputs, torch.cat(labels).numpy())
    weights = fitted.coef_ / scaler.scale_
    network.classifier.weight.copy_(torch.from_numpy(weights))
    network.classifier.bias.copy_(torch.from_numpy(fitted.intercept_ - weights @ scaler.mean_))


def _from_tiles(
    network: Frozen, images: Tensor, masks: Tensor, settings: WindowSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Features (n, channels) and labels (n,) of up to `PER_TILE` windows of each tile: any of a good one, of a
    defective one those with the defect, which may be none."""
    every = settings.stride // network.step
    maps = network.pooled(images)[:, :, ::every, ::every].flatten(2)
    marked = window_labels(masks, settings).flatten(1)
    chosen = []
    for tile, labels in enumerate(marked):
        fitting = (labels == labels.max().clamp(min=0)).nonzero()[:, 0]
        order = torch.randperm(len(fitting), generator=generator)[:PER_TILE].to(fitting.device)
        chosen += [(tile, window) for window in fitting[order].tolist()]
    tiles, windows = torch.tensor(chosen, device=images.device).T
    return maps[tiles, :, windows], marked[tiles, windows].float()


# --- Evaluation ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def window_scores(network: WindowNetwork, images: Tensor, settings: WindowSettings, batch: int = 16) -> Tensor:
    """uint8 images (N, 1, H, W) -> logits (N, h, w) float32 of their windows."""
    with full_float32():
        form = pick(FORMS, settings.form, "form")
        return torch.cat([form(network, chunk, settings.stride).float() for chunk in images.split(batch)])


def window_labels(masks: Tensor, settings: WindowSettings) -> Tensor:
    """Masks (N, S, S) -> (N, h, h) int8: 1 where a window has a defect inside its margin, 0 for one of a good tile, -1
    for the rest, which is not counted: the defect touches the margin alone, or is elsewhere in the tile."""
    inside = settings.window - 2 * settings.margin
    cut = masks[:, None, settings.margin :, settings.margin :].float()
    h = (masks.shape[-1] - settings.window) // settings.stride + 1
    labels = F.max_pool2d(cut, inside, settings.stride)[:, 0, :h, :h].to(torch.int8)
    labels[(labels == 0) & (masks.amax((1, 2)) > 0)[:, None, None]] = -1
    return labels


def run_windows(settings: WindowSettings, seed: int, data: FabricData, context: Context) -> Result:
    """One row and seed: a tile's score is that of its worst window; the threshold has the best balanced accuracy of
    dev's tiles."""
    network, curve, costs, precision = train_windows(settings, seed, data, context)
    scores = {part: window_scores(network, getattr(data, part).images, settings).cpu() for part in ("dev", "test")}
    tiles = {part: found.amax((1, 2)).numpy() for part, found in scores.items()}
    labels = {part: getattr(data, part).labels.cpu().numpy() for part in scores}
    threshold = best_balanced_threshold(tiles["dev"], labels["dev"])
    windows = {part: window_labels(getattr(data, part).masks, settings).cpu() for part in scores}
    metrics = {}
    for part in scores:
        used = windows[part] >= 0
        metrics[part] = {
            "balanced_accuracy": balanced_accuracy(tiles[part], labels[part], threshold),
            "image_auroc": auroc(tiles[part], labels[part]),
            "image_ap": average_precision(tiles[part], labels[part]),
            "window_balanced_accuracy": balanced_accuracy(
                scores[part][used].numpy(), windows[part][used].numpy(), threshold
            ),
        } | shares(tiles[part], labels[part], threshold)
    types = data.test.types.cpu().numpy()
    per_class = {}
    for number, kind in enumerate(data.type_names[1:], 1):
        if (types == number).any():
            own = np.isin(types, (0, number))
            found = 100 * float(np.mean(tiles["test"][types == number] >= threshold))
            per_class[kind] = {"image_auroc": auroc(tiles["test"][own], labels["test"][own]), "found": found}
    predictions = {
        "scores": tiles["test"],
        "labels": labels["test"],
        "types": types,
        "names": np.array(data.test.names),
        "type_names": np.array(data.type_names),
        "dev_scores": tiles["dev"],
        "dev_labels": labels["dev"],
        "windows": scores["test"].numpy().astype(np.float16),
        "window_labels": windows["test"].numpy(),
    }
    maps = to_pixels(scores["test"], settings.window, settings.stride, data.test.masks.shape[-2:])
    shown = examples(data.test, maps, scores["test"].amax((1, 2)))
    predictions |= strip_maps(network, data, settings, seed == 0) | shown
    return Result(
        rounded(metrics["test"]),
        {kind: rounded(values) for kind, values in per_class.items()},
        rounded(metrics["dev"]) | {"threshold": threshold},
        curve,
        predictions,
        network.state_dict(),
        {"parameters_m": round(parameters(network) / 1e6, 4)} | costs,
        precision,
    )


def strip_maps(
    network: WindowNetwork, data: FabricData, settings: WindowSettings, with_images: bool
) -> dict[str, np.ndarray]:
    """strip_<name>: logits (h, w) float16 of the windows of each whole strip; `with_images`: image_<name> and
    mask_<name>, reduced by `REDUCED`."""
    device = data.test.images.device
    found = {}
    for name, (image, mask) in data.strips.items():
        images = torch.from_numpy(image.copy()).to(device)[None, None]
        found[f"strip_{name}"] = window_scores(network, images, settings)[0].cpu().numpy().astype(np.float16)
        if with_images:
            small = F.avg_pool2d(images.float(), REDUCED)[0, 0].cpu().numpy()
            found[f"image_{name}"] = (STEP * (small / STEP).round()).clip(0, 255).astype(np.uint8)
            marked = torch.from_numpy(mask.astype(np.float32))[None, None]
            found[f"mask_{name}"] = (F.max_pool2d(marked, REDUCED)[0, 0] > 0).numpy()
    return found


# --- Costs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WindowCostSettings:
    """What one large image costs, in one of the two forms; no data are needed, the weights are random."""

    model: ClassVar[str] = "window_costs"
    version: ClassVar[int] = 1

    dataset: str = "none"
    network: str = "cnn"
    form: str = "convolutional"
    window: int = 128
    stride: int = 32
    size: int = 2000  # px a side of the image


class Slid(nn.Module):
    """Images (B, 3, H, W) in 0..1, grey ones three times -> logits of all windows."""

    def __init__(self, settings: WindowCostSettings):
        super().__init__()
        self.settings = settings
        own = WindowSettings(network=settings.network, window=settings.window, pretrained=False)
        self.network = build(own).eval()

    def forward(self, images: Tensor) -> Tensor:
        grey = (255 * images[:, :1]).to(torch.uint8)
        return FORMS[self.settings.form](self.network, grey, self.settings.stride)


def run_window_costs(settings: WindowCostSettings, seed: int, data: NoData, context: Context) -> Result:
    """Windows, parameters and GFLOPs of one image; no metrics. How long it takes, `defectlab.bench` measures."""
    slid = Slid(settings)
    side = settings.size if settings.form == "convolutional" else settings.window
    one = flops(slid, torch.zeros(1, 3, side, side))
    windows = count(settings.size, settings.window, settings.stride)
    costs = {
        "windows": windows,
        "parameters_m": round(parameters(slid) / 1e6, 4),
        "gflops": round(one * (1 if settings.form == "convolutional" else windows) / 1e9, 3),
    }
    return Result({}, {}, {}, {}, {}, {}, costs, "fp32")
