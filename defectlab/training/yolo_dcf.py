"""YOLO-DCF's detector trained: plain, or taught by a stronger one of its kind."""

import torch

from defectlab.data.augment import Batch
from defectlab.data.detection import DetectionData
from defectlab.papers.yolo_dcf import DistilledLoss, Settings, build, teacher_settings
from defectlab.runs import Context, Result
from defectlab.training.detection import fresh, frozen, run_detector, train_and_evaluate


def run_yolo_dcf(settings: Settings, seed: int, data: DetectionData, context: Context) -> Result:
    """One row and seed. A distilled student has its teacher trained first, if that has not been run here."""
    if not settings.teacher_scale:
        return run_detector(settings, seed, data, context, build)
    own = teacher_settings(settings)
    record = context.require(own, settings.teacher_seed)
    teacher = frozen(record, fresh(build, own, data), context.device)
    torch.manual_seed(seed)
    detector = fresh(build, settings, data).to(context.device, memory_format=torch.channels_last)
    distilled = DistilledLoss(settings, detector, teacher).to(context.device, memory_format=torch.channels_last)

    def loss(batch: Batch) -> dict[str, torch.Tensor]:
        return distilled(detector, teacher, batch.images, batch.boxes, batch.labels)

    result = train_and_evaluate(detector, loss, settings, seed, data, context, distilled.dual)
    result.notes = {"teacher": record.key, "teacher_sha256": record.model_sha256}
    return result
