"""The four-block network of few-shot learning: Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS
2017, arXiv 1703.05175, section 3.1 (after Vinyals et al., NeurIPS 2016)."""

from torch import Tensor, nn

from defectlab.precision import check_uint8


class Conv4(nn.Module):
    """uint8 images (B, 1, S, S) -> features (B, width) float32: four times a convolution of 3 x 3, batch norm, ReLU
    and 2 x 2 max pooling, then the mean over all places (ours: textures have no fixed place; the paper flattens)."""

    def __init__(self, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (1, width, width, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        self.blocks = nn.Sequential(*layers)
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        check_uint8(images)
        return self.blocks(images.float() / 127.5 - 1).mean((2, 3)).float()
