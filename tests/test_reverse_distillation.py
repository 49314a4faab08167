"""RD4AD: shapes, its two losses, where gradients go; anomaly maps, image scores, the threshold from dev."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.autograd import gradcheck

from defectlab.metrics.ranking import best_f1_threshold
from defectlab.networks.resnet import Teacher, load_teacher
from defectlab.networks.reverse_distillation import (
    LOSSES,
    MAP_SIZE,
    MultiScaleFusion,
    OneClassEmbedding,
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

SMALL = (8, 16, 32)  # channels of a pretended teacher


def features(channels: tuple[int, ...] = SMALL, count: int = 2, coarsest: int = 4, seed: int = 0) -> list[Tensor]:
    """Random positive maps, as behind a ReLU: three scales, each half the size of the one before."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (4 * coarsest, 2 * coarsest, coarsest)
    return [torch.rand(count, c, s, s, generator=generator) for c, s in zip(channels, sizes, strict=True)]


# --- Shapes ----------------------------------------------------------------------------------------------------------


def test_fusion_brings_every_scale_to_the_coarsest() -> None:
    assert MultiScaleFusion(SMALL)(features()).shape == (2, 3 * 32, 4, 4)


@pytest.mark.parametrize("bottleneck", [0, 4, 2])
def test_embedding_and_decoder_shapes(bottleneck: int) -> None:
    embedded = OneClassEmbedding(3 * 32, 2 * 32, bottleneck)(torch.rand(2, 3 * 32, 4, 4))
    assert embedded.shape == (2, 64, 2, 2)
    decoded = ReverseDecoder(SMALL, bottleneck)(embedded)
    assert [f.shape for f in decoded] == [f.shape for f in features()]


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
        student = ReverseDistillation(teacher.channels, teacher.bottleneck)(maps)
    assert [f.shape for f in student] == [f.shape for f in maps]


# --- Losses ----------------------------------------------------------------------------------------------------------


def two_positions() -> tuple[list[Tensor], list[Tensor]]:
    """One scale, two channels, two positions: a strong one that is right, a weak one that is orthogonal."""
    teacher = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).view(1, 2, 1, 2)  # positions (3, 4) and (0, 1)
    student = torch.tensor([[3.0, 1.0], [4.0, 0.0]]).view(1, 2, 1, 2)  # positions (3, 4) and (1, 0)
    return [teacher], [student]


def test_losses_by_hand_and_that_they_differ() -> None:
    teacher, student = two_positions()
    assert per_position_discrepancy(teacher[0], student[0]).flatten().tolist() == pytest.approx([0, 1], abs=1e-6)
    assert float(per_pixel_loss(teacher, student)) == pytest.approx(0.5)  # mean of 0 and 1
    assert float(whole_map_loss(teacher, student)) == pytest.approx(1 - 25 / 26)  # the weak position hardly counts


def test_losses_sum_over_scales_and_average_over_images() -> None:
    (teacher,), (student,) = two_positions()
    pair = torch.cat([teacher, teacher]), torch.cat([student, teacher])  # the second image is restored perfectly
    assert float(per_pixel_loss([pair[0], teacher], [pair[1], student])) == pytest.approx(0.25 + 0.5)
    whole = 1 - 25 / 26
    assert float(whole_map_loss([pair[0], teacher], [pair[1], student])) == pytest.approx(whole / 2 + whole)


def test_discrepancy_ends_at_two() -> None:
    x = torch.rand(1, 3, 2, 2) + 0.1
    torch.testing.assert_close(per_position_discrepancy(x, -x), torch.full((1, 2, 2), 2.0))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_compute_in_float32_from_bf16_features(name: str) -> None:
    teacher, student = features(seed=0), features(seed=1)
    low = LOSSES[name]([t.bfloat16() for t in teacher], [s.bfloat16() for s in student])
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(LOSSES[name](teacher, student)), abs=2e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_losses(name: str) -> None:
    torch.manual_seed(0)
    teacher = torch.rand(2, 3, 2, 2, dtype=torch.float64) + 0.2
    student = (torch.rand(2, 3, 2, 2, dtype=torch.float64) + 0.2).requires_grad_()
    # Wide steps and tolerance: the losses bring everything to float32, so that a plain float64 gradcheck is too strict.
    assert gradcheck(lambda s: LOSSES[name]([teacher], [s]).double(), student, eps=1e-3, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_check_would_notice_an_error(name: str) -> None:
    torch.manual_seed(0)
    teacher = torch.rand(2, 3, 2, 2, dtype=torch.float64) + 0.2
    student = (torch.rand(2, 3, 2, 2, dtype=torch.float64) + 0.2).requires_grad_()

    def wrong(s: Tensor) -> Tensor:  # the right value with half its gradient
        return LOSSES[name]([teacher], [0.5 * s + 0.5 * s.detach()]).double()

    assert not gradcheck(wrong, student, eps=1e-3, atol=2e-3, rtol=1e-2, raise_exception=False)


@pytest.mark.parametrize("bottleneck", [0, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_student_weight_learns(loss: str, bottleneck: int) -> None:
    torch.manual_seed(0)
    student, maps = ReverseDistillation(SMALL, bottleneck), features()
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    moved = set()
    for _ in range(2):
        optimizer.zero_grad()
        LOSSES[loss](maps, student(maps)).backward()
        moved |= {n for n, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert moved == {n for n, _ in student.named_parameters()}


def test_no_teacher_weight_learns() -> None:
    teacher = load_teacher("resnet18_random")
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    maps = teacher(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    student = ReverseDistillation(teacher.channels, teacher.bottleneck)
    per_pixel_loss(maps, student(maps)).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


# --- Maps and scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 256), (40, 64), (17, 16)])  # the last: barely more than the kernel's radius
def test_gaussian_smooth_is_scipys(shape: tuple[int, int]) -> None:
    maps = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    expected = np.stack([ndimage.gaussian_filter(m, 4, truncate=4, mode="reflect") for m in maps.double().numpy()])
    np.testing.assert_allclose(gaussian_smooth(maps).numpy(), expected, atol=1e-5)


def test_upsample_is_bilinear_with_aligned_corners() -> None:
    small = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    large = upsample(small)
    assert large.shape == (1, MAP_SIZE, MAP_SIZE) == (1, 256, 256)
    assert large[0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [0, 1, 2, 3]  # the corners stay
    rows, columns = torch.meshgrid(torch.linspace(0, 2, 256), torch.linspace(0, 1, 256), indexing="ij")
    torch.testing.assert_close(large[0], rows + columns)


def test_anomaly_map_sums_the_scales() -> None:
    teacher = [torch.ones(1, 2, s, s) for s in (8, 4, 2)]
    opposite = [-teacher[0], teacher[1], -teacher[2]]
    torch.testing.assert_close(anomaly_map(teacher, opposite), torch.full((1, 256, 256), 4.0))


def test_anomaly_map_keeps_the_place() -> None:
    teacher = [torch.ones(1, 2, 8, 8)]
    student = [teacher[0].clone()]
    student[0][0, :, 0, 7] *= -1  # top right
    found = anomaly_map(teacher, student)[0]
    assert divmod(int(found.argmax()), 256) == (0, 255)
    assert float(found[128:].abs().max()) == pytest.approx(0, abs=1e-6)


def test_image_scores_are_maxima() -> None:
    maps = torch.zeros(3, 4, 5)
    maps[0, 1, 2], maps[1, 0, 0], maps[2] = 7, -1, -2
    assert image_scores(maps).tolist() == [7, 0, -2]


@pytest.mark.parametrize(
    ("scores", "labels", "threshold"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 2.5),  # separable: midway
        ([1, 2, 3, 4], [0, 1, 0, 1], 1.5),  # all but the lowest: F1 0.8, against 2/3 for {4} alone
        ([4, 3, 2, 1], [1, 1, 1, 1], 1.0),  # all anomalous: the lowest score itself
        ([5], [1], 5.0),
        ([3, 3, 1, 1], [1, 1, 0, 0], 2.0),  # ties within a class do not matter
    ],
)
def test_threshold_by_hand(scores: list[float], labels: list[int], threshold: float) -> None:
    for order in (list(range(len(scores))), list(range(len(scores)))[::-1]):
        s = torch.tensor(scores, dtype=torch.float32)[order]
        found = best_f1_threshold(s, torch.tensor(labels, dtype=torch.uint8)[order])
        assert found == pytest.approx(threshold)


def f1_at(threshold: float, scores: Tensor, labels: Tensor) -> float:
    called = scores.double() >= threshold
    return float(2 * (called & (labels == 1)).sum() / (called.sum() + labels.sum()))


def test_threshold_reaches_the_best_f1_when_the_classes_tie() -> None:
    """Equal scores fall on one side together: no threshold divides a tie, whatever the order of the images."""
    scores, labels = torch.tensor([3.0, 2.0, 2.0, 2.0, 2.0, 1.0]), torch.tensor([1, 1, 0, 0, 0, 1])
    # Possible: {3} with F1 1/2, {3, 2, 2, 2, 2} with 1/2, all with 2/3. A cut inside the tie would pretend 4/5.
    for order in (list(range(6)), list(range(6))[::-1]):
        found = best_f1_threshold(scores[order], labels[order])
        assert f1_at(found, scores, labels) == pytest.approx(2 / 3)


@pytest.mark.parametrize("levels", [1000, 6])  # 6: most scores tie, also across the classes
def test_threshold_reaches_the_best_f1(levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        labels = torch.randint(0, 2, (24,), generator=generator, dtype=torch.uint8)
        labels[0] = 1
        scores = (torch.randint(0, levels, (24,), generator=generator) + levels // 3 * labels).float()
        best = max(f1_at(float(t), scores, labels) for t in scores.double())
        assert f1_at(best_f1_threshold(scores, labels), scores, labels) == pytest.approx(best)
