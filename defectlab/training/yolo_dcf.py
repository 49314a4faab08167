"""YOLO-DCF's detector trained: plain, or taught by a stronger one of its kind."""

import torch
from torch import nn

from defectlab.data.augment import Batch
from defectlab.data.boxes import DetectionData
from defectlab.networks.yolo.model import Detector
from defectlab.papers.yolo_dcf import DistilledLoss, Settings, build, teacher_settings
from defectlab.runs import Context, Result
from defectlab.training.detection import fresh, frozen, train_and_evaluate
from defectlab.training.detector import Loss


def run_yolo_dcf(settings: Settings, seed: int, data: DetectionData, context: Context) -> Result:
    """One row and seed. A distilled student has its teacher trained first, if that has not been run here."""
    if not settings.teacher_scale:
        return train_and_evaluate(settings, seed, data, context, build)
    own = teacher_settings(settings)
    record = context.require(own, settings.teacher_seed)
    teacher = frozen(record, fresh(build, own, data), context.device)

    def make_loss(detector: Detector) -> tuple[Loss, nn.Module]:
        distilled = DistilledLoss(settings, detector, teacher).to(context.device, memory_format=torch.channels_last)

        def loss(batch: Batch) -> dict[str, torch.Tensor]:
            return distilled(detector, teacher, batch.images, batch.boxes, batch.labels)

        return loss, distilled.dual

    result = train_and_evaluate(settings, seed, data, context, build, make_loss)
    result.notes = {"teacher": record.key, "teacher_sha256": record.model_sha256}
    return result
