"""TODO training.yolo_dcf."""

from dataclasses import replace
from defectlab.data.augment import Batch
from defectlab.data.boxes import DetectionData
from defectlab.networks.yolo.losses import detection_loss
from defectlab.networks.yolo.model import Detector
from defectlab.papers.yolo_dcf import DualDistillation
from defectlab.papers.yolo_dcf import Settings
from torch import Tensor
import torch



def teacher_settings(settings: Settings) -> Settings:
    """The row that teaches: the same network and recipe at the stronger scale, without distillation."""
    return replace(settings, scale=settings.teacher_scale, teacher_scale="", relation=0.0, channel=0.0)


def make_loss(settings: Settings, data: DetectionData, detector: Detector, device: str, teacher: Detector):
    """The detector's own loss and the distillation's terms -> (loss of `train_detector`, the adapters)."""
    criterion = detection_loss(detector, settings.size)
    dual = DualDistillation(detector.widths, teacher.widths, settings).to(device, memory_format=torch.channels_last)

    def loss(batch: Batch) -> dict[str, Tensor]:
        maps = detector.features(batch.images)
        with torch.no_grad():
            taught = teacher.features(batch.images)
        scalars = criterion(detector.head(maps), batch.boxes, batch.labels)
        terms = dual(maps, taught)
        return scalars | terms | {"loss": scalars["loss"] + sum(terms.values())}

    return loss, dual
