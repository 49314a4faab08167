"""AMAM and knowledge distillation: Guo, Lv, "A Two-Stage Deep-Learning Framework for Industrial Anomaly Detection:
Integrating Small-Sample Semantic Segmentation and Knowledge Distillation", Machines 13(8), 712 (2025), doi
10.3390/machines13080712.

- `segmentation.py`: section 3.1, stage one. `segmentation.build(settings)`: images -> foreground logits.
- `distillation.py`: section 3.2, stage two, without its score. `KnowledgeDistillation`: images -> anomaly maps.
- `weighting.py`: section 3.2.2, the score: a convolution of each scale's map, and how it is fitted.
- `two_stage.py`: section 4.3, both. `TwoStage`: images -> anomaly maps, by segmenting, cutting and pasting back.
"""

from defectlab.papers.amam_kd.distillation import DistillationSettings, KnowledgeDistillation
from defectlab.papers.amam_kd.two_stage import TwoStage, TwoStageSettings

__all__ = ["DistillationSettings", "KnowledgeDistillation", "TwoStage", "TwoStageSettings"]
