"""D3N: Yu, "Bring the Power of Diffusion Model to Defect Detection", arXiv 2408.13845.

- sections III-A and III-B, the diffusion model and its features: `networks/diffusion.py`
- `resvae.py`: section III-B, compression of the features to latents
- `fusion.py`: section III-C, equations 4 and 5: noise filter, cross-attention, dynamic cross-fusion
- `hybrid.py`: section III-C, Fig. 4: `HybridDetector`, images and latents -> the detector's raw maps;
  section III-D, Fig. 7: `D3N`, the deployed student: images -> boxes
- `transfer.py`: section III-D, equations 6 and 7: the loss by which the hybrid teaches the student
"""

from defectlab.papers.d3n.hybrid import D3N, HybridDetector, HybridSettings, StudentSettings

__all__ = ["D3N", "HybridDetector", "HybridSettings", "StudentSettings"]
