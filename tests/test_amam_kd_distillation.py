"""Stage two of AMAM + KD: Table 3's shapes, Table 9's switches, students, losses, flips, whole runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torchvision import models
from toy_anomaly import fake_split

from defectlab.data.anomaly import AnomalyData
from defectlab.networks.resnet import Teacher, WeightsError, load_teacher
from defectlab.networks.reverse_distillation import ResidualBlock
from defectlab.papers.amam_kd.distillation import (
    LOSSES,
    DistillationLoss,
    DistillationSettings,
    FeatureAggregation,
    ViTBlock,
    build,
    discrepancies,
    to_maps,
)
from defectlab.precision import autocast
from defectlab.runs import Session
from defectlab.training import anomaly as distil
from defectlab.training.amam_kd import make_loss, map_split, run_distillation

CHANNELS = (8, 16, 32)  # of a pretended teacher
SMALL = DistillationSettings(teacher="resnet18_random", size=64, epochs=1, batch=4)
TABLE_9 = {
    "pre": {"fusion": False, "vit": False, "residual": False},
    "res": {"fusion": False, "vit": False},
    "mff_res": {"vit": False},
    "full": {},
}
STUDENTS = ("heterogeneous", "homogeneous")


def features(count: int = 2, coarsest: int = 4, seed: int = 0) -> list[Tensor]:
    """Random positive maps, as behind a ReLU: three scales, each half the size of the one before."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (4 * coarsest, 2 * coarsest, coarsest)
    return [torch.rand(count, c, s, s, generator=generator) for c, s in zip(CHANNELS, sizes, strict=True)]


# --- Table 3 ---------------------------------------------------------------------------------------------------------


def test_what_table_3_gives_the_teacher_is_the_shape_of_no_layer_without_dilation() -> None:
    printed, image = (2048, 16, 16), torch.empty(1, 3, 256, 256, device="meta")

    def layers(**options) -> list[tuple[int, ...]]:
        with torch.device("meta"):
            net = models.wide_resnet50_2(weights=None, **options).eval()
        x, shapes = net.maxpool(net.relu(net.bn1(net.conv1(image)))), []
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            shapes.append(tuple(x.shape[1:]))
        return shapes

    assert layers() == [(256, 64, 64), (512, 32, 32), (1024, 16, 16), (2048, 8, 8)]
    assert printed not in layers()
    assert layers(replace_stride_with_dilation=[False, False, True])[3] == printed


@pytest.mark.parametrize(("size", "coarsest"), [(224, 14), (256, 16)])
def test_table_3_aggregation_gives_14_by_14_by_512_and_the_student_the_teachers_maps(size: int, coarsest: int) -> None:
    settings = DistillationSettings(size=size)
    with torch.device("meta"):
        teacher = Teacher("wide_resnet50_2")
        maps = teacher(torch.zeros(2, 3, size, size, dtype=torch.uint8))
        network = build(settings, teacher.channels, teacher.bottleneck)
        embedded = network.aggregation(maps)
        student = network.student(embedded, maps)
        scores = to_maps(network, maps, student)
    assert maps[2].shape == (2, 1024, coarsest, coarsest)
    assert embedded.shape == (2, 512, 14, 14)
    assert [s.shape for s in student] == [m.shape for m in maps]
    assert scores.shape == (2, 256, 256)


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", ["resnet18", "resnet50"])
@pytest.mark.parametrize("row", ["pre", "full"])
def test_every_row_gives_the_teachers_shapes(row: str, teacher: str, student: str) -> None:
    with torch.device("meta"):
        frozen = Teacher(teacher)
        maps = frozen(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
        settings = replace(SMALL, student=student, **TABLE_9[row])
        outputs = build(settings, frozen.channels, frozen.bottleneck)(maps)
    assert [o.shape for o in outputs] == [m.shape for m in maps]


# --- Aggregation and students ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE_9)
def test_table_9_leaves_out_what_it_names(row: str) -> None:
    aggregation = FeatureAggregation(CHANNELS, replace(SMALL, **TABLE_9[row])).eval()
    kinds = [type(m) for m in aggregation.modules()]
    assert (ViTBlock in kinds) == (row == "full")
    assert kinds.count(ResidualBlock) == (0 if row == "pre" else 2)
    first, second, third = features()
    changed = aggregation([first + 1, second + 1, third])
    assert torch.equal(changed, aggregation(features())) == (row in ("pre", "res"))  # without MFF, layer 3 alone


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("row", TABLE_9)
def test_every_weight_learns(row: str, student: str) -> None:
    torch.manual_seed(0)
    settings = replace(SMALL, student=student, **TABLE_9[row])
    network, loss, maps = build(settings, CHANNELS, 0), DistillationLoss(settings), features()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    moved = set()
    for _ in range(2):
        optimizer.zero_grad()
        loss(maps, network(maps))["loss"].backward()
        moved |= {n for n, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert moved == {n for n, _ in network.named_parameters()}


def test_vit_sees_the_whole_map_and_knows_where_it_looks() -> None:
    torch.manual_seed(0)
    block = ViTBlock(16, 1, 8).eval()
    x = torch.randn(1, 512, 4, 4)
    far = x.clone()
    far[..., 3, 3] = torch.randn(512)
    assert not torch.allclose(block(far)[..., 0, 0], block(x)[..., 0, 0], atol=1e-3)
    assert not torch.allclose(block(x.flip(-1)).flip(-1), block(x), atol=1e-3)  # positions are embedded
    with torch.no_grad():
        block.position.zero_()
    torch.testing.assert_close(block(x.flip(-1)).flip(-1), block(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_vit_says_in_inference_what_it_says_in_training(precision: str) -> None:
    torch.manual_seed(0)  # the library takes another path there
    block, x = ViTBlock(16, 1, 8), torch.randn(2, 512, 4, 4)
    with autocast(x.device, precision):
        trained = block.train()(x).float()
        with torch.inference_mode():
            found = block.eval()(x).float()
    torch.testing.assert_close(found, trained.detach(), rtol=0, atol=1e-4 if precision == "fp32" else 0.1)


def test_students_read_the_embedding_alone() -> None:
    for student in STUDENTS:
        torch.manual_seed(0)
        network = build(replace(SMALL, student=student), CHANNELS, 0).eval()
        embedded = network.aggregation(features())
        outputs = network.student(embedded, features())
        others = network.student(embedded, features(seed=9))
        assert all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))


def test_only_the_homogeneous_student_has_the_teachers_blocks() -> None:
    for bottleneck, depths in ((0, (2, 2, 2)), (4, (6, 4, 3))):  # layer 3, 2, 1 of ResNet-18 and of ResNet-50
        homogeneous = build(replace(SMALL, student="homogeneous"), CHANNELS, bottleneck).student
        assert tuple(len(s) for s in homogeneous.stages) == depths
    heterogeneous = build(SMALL, CHANNELS, 0).student
    assert not any(isinstance(m, ResidualBlock | nn.ConvTranspose2d) for m in heterogeneous.modules())


def test_what_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="unknown student 'twin': use one of heterogeneous, homogeneous"):
        build(replace(SMALL, student="twin"), CHANNELS, 0)
    with pytest.raises(ValueError, match="unknown weighting '7x7': use one of none, 1x1"):
        build(replace(SMALL, weighting="7x7"), CHANNELS, 0)
    with pytest.raises(ValueError, match="unknown loss 'huber': use one of cosine, l1"):
        DistillationLoss(replace(SMALL, loss="huber"))
    with pytest.raises(ValueError, match="multiple of 16 pixels, got 100"):
        build(replace(SMALL, size=100), CHANNELS, 0)


# --- Losses ----------------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    teacher = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).view(1, 2, 1, 2)  # positions (3, 4) and (0, 1)
    student = torch.tensor([[3.0, 1.0], [4.0, 0.0]]).view(1, 2, 1, 2)  # positions (3, 4) and (1, 0)
    found = {name: float(loss(teacher, student)) for name, loss in LOSSES.items()}
    assert found == pytest.approx({"cosine": 0.5, "l1": 2 / 4, "l2": (0 + 2) / 2, "mse": 2 / 4})


def test_l2_is_mse_up_to_the_number_of_channels() -> None:
    for teacher, student in zip(features(seed=0), features(seed=1), strict=True):
        expected = teacher.shape[1] * float(LOSSES["mse"](teacher, student))
        assert float(LOSSES["l2"](teacher, student)) == pytest.approx(expected)
        positions = (teacher - student).square().sum(1)  # squared Euclidean distance at each
        assert float(LOSSES["l2"](teacher, student)) == pytest.approx(float(positions.mean()), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradients(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=generator) + 0.2 for _ in range(2))
    assert gradcheck(lambda s: LOSSES[name](teacher, s), student.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_compute_in_float32_from_bf16_features(name: str) -> None:
    teacher, student = features(seed=0)[2], features(seed=1)[2]
    low = LOSSES[name](teacher.bfloat16(), student.bfloat16())
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(LOSSES[name](teacher, student)), rel=2e-2)


def test_loss_sums_the_scales_and_names_them() -> None:
    teacher, student = features(seed=0), features(seed=1)
    scalars = DistillationLoss(SMALL)(teacher, student)
    assert set(scalars) == {"loss", "layer1", "layer2", "layer3"}
    means = [float(m.mean()) for m in discrepancies(teacher, student)]
    assert [float(scalars[f"layer{k}"]) for k in (1, 2, 3)] == pytest.approx(means)
    assert float(scalars["loss"]) == pytest.approx(sum(means))


def test_weights_trained_with_the_printed_loss_go_towards_zero() -> None:
    loss = DistillationLoss(replace(SMALL, weighting="printed"))
    teacher, student = features(seed=0), features(seed=1)
    first = loss(teacher, student)
    assert first["loss"].item() == pytest.approx(DistillationLoss(SMALL)(teacher, student)["loss"].item())
    optimizer = torch.optim.Adam(loss.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        scalars = loss(teacher, student)
        scalars["loss"].backward()
        optimizer.step()
    weights = loss.weights().tolist()
    assert 0 < min(weights) < max(weights) < 0.02
    assert scalars["loss"].item() < 0.02 * first["loss"].item()
    assert scalars["weight2"].item() == pytest.approx(weights[1], rel=0.1)
    assert float(scalars["layer2"]) == float(first["layer2"])  # nothing was learnt of the features


# --- Flips, and whole runs -------------------------------------------------------------------------------------------


@pytest.fixture
def data() -> AnomalyData:
    distil._features.clear()
    splits = fake_split(5, 0, 1), fake_split(2, 2, 2), fake_split(3, 3, 3)
    return AnomalyData("fake", "fake", ("good", "square"), *splits, "fake kd")


def test_flipped_features_are_the_teachers_on_flipped_images(data: AnomalyData) -> None:
    settings = replace(SMALL, precision="fp32")
    plain = [f.clone() for f in distil.cached_features(data, "train", settings, "cpu")]
    flipped = distil.flipped_features(data, "train", settings, "cpu")
    assert [len(f) for f in flipped] == [20, 20, 20]
    teacher, images = load_teacher("resnet18_random"), data.train.images
    for part, axes in enumerate([(), (-1,), (-2,), (-2, -1)]):
        for found, expected in zip(flipped, teacher(images.flip(axes) if axes else images), strict=True):
            torch.testing.assert_close(found[5 * part : 5 * part + 5], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(flipped[2][5:10], plain[2].flip(-1), atol=1e-3)  # flipped features are something else
    shared = distil.cached_features(data, "train", settings, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(shared, plain, strict=True))
    assert [a.data_ptr() for a in shared] == [b.data_ptr() for b in flipped]  # one memory for rows with and without
    assert distil.flipped_features(data, "train", settings, "cpu")[0] is flipped[0]


def test_training_draws_each_flip_of_an_image_about_as_often(
    data: AnomalyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught = {}

    def catch(parts, step, found, **options):
        caught.update(options, found=found)

    monkeypatch.setattr(distil, "train", catch)
    distil.train_student(SMALL, 0, data, "cpu", Session(), build, make_loss)
    assert caught["schedule"] == "cosine"
    assert len(caught["found"][0]) == 5
    flipped = distil.flipped_features(data, "train", SMALL, "cpu")[2]
    indices = torch.tensor([3, 0, 4]).repeat(100)
    drawn = caught["draw"](indices, torch.Generator().manual_seed(0))
    same = (drawn[2][:, None] == flipped[None]).flatten(2).all(-1)  # (300, 20)
    assert same.sum(1).eq(1).all()
    which = same.float().argmax(1)
    assert torch.equal(which % 5, indices)
    assert all(50 < int((which // 5 == flip).sum()) < 100 for flip in range(4))
    again = caught["draw"](indices, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    distil.train_student(replace(SMALL, flips=False), 0, data, "cpu", Session(), build, make_loss)
    assert caught["draw"] is None


def run(data: AnomalyData, seed: int = 0, **changes):
    return run_distillation(replace(SMALL, **changes), seed, data, "cpu", Session(say=lambda line: None))


def test_same_seed_gives_the_same_numbers_and_another_gives_others(data: AnomalyData) -> None:
    first, again, other = run(data), run(data), run(data, 1, weighting="none")
    assert first.metrics == again.metrics
    assert first.curve == again.curve
    assert first.notes == again.notes
    assert all(torch.equal(first.model[k], again.model[k]) for k in first.model)
    assert other.curve != first.curve
    assert (other.predictions["scores"] != first.predictions["scores"]).all()
    assert set(first.metrics) >= {"image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro", "image_f1_dev"}
    assert first.predictions["case_images"].shape == (9, 72, 72, 3)  # in colour


def test_weights_of_the_maps_belong_to_the_model_and_are_told(data: AnomalyData) -> None:
    fitted, plain = run(data, weighting="3x3"), run(data, weighting="none")
    assert fitted.curve == plain.curve  # the fit comes after the training
    assert torch.equal(plain.model["weighting.kernels"], torch.ones(3, 1, 1))
    assert plain.notes["weighting"] == "layer 1: 1, layer 2: 1, layer 3: 1"
    assert fitted.model["weighting.kernels"].shape == (3, 3, 3)
    assert fitted.notes["weighting"] != plain.notes["weighting"]
    settings = replace(SMALL, weighting="3x3")
    network = build(settings, (64, 128, 256), 0).to(memory_format=torch.channels_last)
    network.load_state_dict(fitted.model)
    student = distil.Student(network.eval(), make_loss(settings), None, fitted.precision)
    maps = map_split(student, settings, data, "test", "cpu")
    assert maps.flatten(1).amax(1).tolist() == pytest.approx(fitted.predictions["scores"].tolist(), abs=1e-6)


def test_printed_weighting_learns_with_the_student_and_shrinks(data: AnomalyData) -> None:
    found = run(data, weighting="printed", epochs=3)
    weights = [found.curve[f"weight{k}"] for k in (1, 2, 3)]
    assert all(w[0] > w[1] > w[2] > 0 for w in weights)
    assert found.model["weighting.kernels"].flatten().tolist() == pytest.approx([w[-1] for w in weights], rel=0.02)


def test_teacher_without_weights_is_an_error(
    data: AnomalyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEFECTLAB_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(WeightsError, match="no ImageNet weights for the teacher wide_resnet50_2"):
        run(data, teacher="wide_resnet50_2")
