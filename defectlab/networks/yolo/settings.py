"""A detector and its recipe: the hyper-parameters that papers and studies vary."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class DetectorSettings:
    """A detector and its recipe. Defaults are frozen, since records are keyed by what differs from them."""

    model: ClassVar[str] = "detector"
    version: ClassVar[int] = 1

    dataset: str = "neu_det"
    family: str = "v8"  # "v8" anchor-free, "v5" anchor-based
    scale: str = "n"
    size: int = 640  # px per side; common in published YOLO papers
    epochs: int = 300  # ours: the papers that state it lie between 100 and 300
    batch: int = 64  # ours: small networks leave a GPU idle at 16
    optimizer: str = "sgd"  # "sgd" (Nesterov) or "adamw"; all rows use adamw
    learning_rate: float = 0.01  # common with SGD and losses summed over 64 images; ours are means
    final_rate: float = 0.01  # of the first, at the end of the schedule
    schedule: str = "cosine"  # or "linear"
    momentum: float = 0.937  # common; Adam's first beta, too
    weight_decay: float = 0.0005  # common; not on norms and biases
    warm_up: float = 3.0  # epochs
    average: float = 0.9999  # EMA of the weights, what is evaluated
    average_ramp: float = 2000.0  # steps: the EMA starts short
    clip: float = 10.0  # largest norm of the gradient
    mosaic: float = 1.0  # probability
    zoom: float = 0.5  # scale factor 1 ± zoom
    translate: float = 0.1  # of the side
    degrees: float = 0.0
    flip_up_down: float = 0.0  # probability
    colours: bool = True  # False: the three planes are no colours, hue and saturation stay
    close_mosaic: int = 10  # last epochs without mosaic
    anchors: str = "coco"  # v5 only: "coco" or "kmeans" on the training boxes
    precision: str = "bf16"  # where the device is fast at it, else fp32
    separate_streams: bool = False  # False in every row so far: order and augmentation start from one generator state
    compile: str = ""  # on a GPU: "inductor" (torch.compile) or "graphs" (its kernels as CUDA graphs); see `gpu-check`
