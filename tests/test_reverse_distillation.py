"""RD4AD: shapes, its two losses, where gradients go; anomaly maps, image scores, images to maps."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.autograd import gradcheck
from toy_anomaly import CHANNELS, feature_maps, learning

from defectlab.networks.blocks import PreActivationBlock
from defectlab.networks.resnet import Teacher, extract
from defectlab.networks.reverse_distillation import (
    LOSSES,
    RD4AD,
    MultiScaleFusion,
    OneClassEmbedding,
    RD4ADSettings,
    ResidualBlock,
    ReverseDecoder,
    ReverseDistillation,
    anomaly_map,
    gaussian_smooth,
    image_scores,
    per_pixel_loss,
    per_position_discrepancy,
    upsample,
    whole_map_loss,
)


@pytest.mark.parametrize("bottleneck", [0, 4, 2])
@pytest.mark.parametrize(("scale", "size"), [("same", 4), ("down", 2), ("up", 8)])
def test_residual_block(bottleneck: int, scale: str, size: int) -> None:
    block = ResidualBlock(16, 32, scale, bottleneck)
    assert block(torch.rand(2, 16, 4, 4)).shape == (2, 32, size, size)
    convolutions = [m.weight for m in block.residual if hasattr(m, "weight") and m.weight.ndim == 4]
    assert len(convolutions) == (3 if bottleneck else 2)
    assert convolutions[-1].shape[1] == (32 // bottleneck if bottleneck else 32)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_student_gives_the_teachers_shapes(name: str) -> None:
    with torch.device("meta"):
        teacher = Teacher(name)
        maps = teacher(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
        third = teacher.channels[2]
        fused = MultiScaleFusion(teacher.channels)(maps)
        embedded = OneClassEmbedding(3 * third, 2 * third, teacher.bottleneck)(fused)
        decoded = ReverseDecoder(teacher.channels, teacher.bottleneck)(embedded)
        student = ReverseDistillation(teacher.channels, teacher.bottleneck)(maps)
    assert fused.shape == (2, 3 * third, 4, 4) and embedded.shape == (2, 2 * third, 2, 2)
    assert [f.shape for f in student] == [f.shape for f in decoded] == [f.shape for f in maps]


@pytest.mark.parametrize(("widths", "project", "projects"), [((4, 6), None, 1), ((4, 4), None, 0), ((4, 4), True, 1)])
def test_pre_activation_block(widths: tuple[int, int], project: bool | None, projects: int) -> None:
    block = PreActivationBlock(*widths, project).eval()
    x = torch.randn(2, widths[0], 5, 5)
    kept = x.clone()
    assert block(x).shape == (2, widths[1], 5, 5)
    assert torch.equal(x, kept)  # nothing in place on what comes in
    assert len(list(block.shortcut.parameters())) == projects
    for convolution in (block.residual[2], block.residual[5]):
        torch.nn.init.zeros_(convolution.weight)
    torch.testing.assert_close(block(x), block.shortcut(x))  # neither norm nor ReLU after the sum


def test_losses_by_hand() -> None:
    """Two channels, two positions: a strong one that is right, a weak one that is orthogonal."""
    teacher = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).view(1, 2, 1, 2)  # positions (3, 4) and (0, 1)
    student = torch.tensor([[3.0, 1.0], [4.0, 0.0]]).view(1, 2, 1, 2)  # positions (3, 4) and (1, 0)
    whole = 1 - 25 / 26  # the weak position hardly counts
    assert per_position_discrepancy(teacher, student).flatten().tolist() == pytest.approx([0, 1], abs=1e-6)
    assert float(per_pixel_loss([teacher], [student])) == pytest.approx(0.5)  # mean of 0 and 1
    assert float(whole_map_loss([teacher], [student])) == pytest.approx(whole)
    # a sum over scales and a mean over images: the second image of the first scale is restored perfectly
    scales = [torch.cat([teacher, teacher]), teacher], [torch.cat([student, teacher]), student]
    assert float(per_pixel_loss(*scales)) == pytest.approx(0.25 + 0.5)
    assert float(whole_map_loss(*scales)) == pytest.approx(whole / 2 + whole)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradients_and_float32_of_bf16_features(name: str) -> None:
    teacher, student = feature_maps(seed=0), feature_maps(seed=1)
    low = LOSSES[name]([t.bfloat16() for t in teacher], [s.bfloat16() for s in student])
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(LOSSES[name](teacher, student)), abs=2e-3)
    fixed, moved = (maps[2][:, :3, :2, :2].double() + 0.2 for maps in (teacher, student))
    assert gradcheck(lambda s: LOSSES[name]([fixed], [s]), moved.requires_grad_())


@pytest.mark.parametrize("bottleneck", [0, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_student_weight_learns(loss: str, bottleneck: int) -> None:
    torch.manual_seed(0)
    student, maps = ReverseDistillation(CHANNELS, bottleneck), feature_maps()
    moved, weights = learning([student], lambda: LOSSES[loss](maps, student(maps)))
    assert moved == weights


@pytest.mark.parametrize("shape", [(256, 256), (40, 64), (17, 16)])  # the last: barely more than the kernel's radius
def test_gaussian_smooth_is_scipys(shape: tuple[int, int]) -> None:
    maps = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    expected = np.stack([ndimage.gaussian_filter(m, 4, truncate=4, mode="reflect") for m in maps.double().numpy()])
    np.testing.assert_allclose(gaussian_smooth(maps).numpy(), expected, atol=1e-5)


def test_upsample_is_bilinear_with_aligned_corners() -> None:
    small = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    large = upsample(small)
    assert large.shape == (1, 256, 256)
    assert large[0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [0, 1, 2, 3]  # the corners stay
    rows, columns = torch.meshgrid(torch.linspace(0, 2, 256), torch.linspace(0, 1, 256), indexing="ij")
    torch.testing.assert_close(large[0], rows + columns)


def test_anomaly_map_sums_the_scales_and_keeps_the_place() -> None:
    teacher = [torch.ones(1, 2, s, s) for s in (8, 4, 2)]
    opposite = [-teacher[0], teacher[1], -teacher[2]]
    torch.testing.assert_close(anomaly_map(teacher, opposite), torch.full((1, 256, 256), 4.0))
    student = teacher[0].clone()
    student[0, :, 0, 7] *= -1  # top right
    found = anomaly_map(teacher[:1], [student])[0]
    assert divmod(int(found.argmax()), 256) == (0, 255)
    assert float(found[128:].abs().max()) == pytest.approx(0, abs=1e-6)


def test_image_scores_are_maxima() -> None:
    maps = torch.zeros(3, 4, 5)
    maps[0, 1, 2], maps[1, 0, 0], maps[2] = 7, -1, -2
    assert image_scores(maps).tolist() == [7, 0, -2]


def test_rd4ad_maps_images() -> None:
    torch.manual_seed(0)
    whole = RD4AD(RD4ADSettings(teacher="resnet18_random")).train(False)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    maps = whole(images)
    assert maps.shape == (3, 256, 256) and not maps.requires_grad
    taught = extract(whole.teacher, images, torch.float32)
    torch.testing.assert_close(maps, gaussian_smooth(anomaly_map(taught, whole.network(taught))).detach())
    torch.testing.assert_close(whole(images[1:2]), maps[1:2])  # whatever the batch: norms are in eval mode
    assert not any(p.requires_grad for p in whole.teacher.parameters())
    assert all(p.requires_grad for p in whole.network.parameters())
