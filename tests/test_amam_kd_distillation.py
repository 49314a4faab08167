"""Stage two of AMAM + KD: Table 3's shapes, Table 9's switches, students, losses, images to maps, flips, runs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from toy_anomaly import CHANNELS, check_seeds, fake_data, feature_maps, learning
from toy_runs import quiet

from defectlab.data.anomaly import AnomalyData
from defectlab.networks.resnet import Teacher, load_teacher
from defectlab.networks.reverse_distillation import ResidualBlock, gaussian_smooth
from defectlab.papers.amam_kd import KnowledgeDistillation
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
from defectlab.runs import Result
from defectlab.training import anomaly as training
from defectlab.training.amam_kd import run_distillation

SMALL = DistillationSettings(teacher="resnet18_random", size=64, epochs=1, batch=4, precision="fp32")
TABLE_9 = {
    "pre": {"fusion": False, "vit": False, "residual": False},
    "res": {"fusion": False, "vit": False},
    "mff_res": {"vit": False},
    "full": {},
}
STUDENTS = ("heterogeneous", "homogeneous")


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


@pytest.mark.parametrize("row", TABLE_9)
def test_table_9_leaves_out_what_it_names(row: str) -> None:
    aggregation = FeatureAggregation(CHANNELS, replace(SMALL, **TABLE_9[row])).eval()
    kinds = [type(m) for m in aggregation.modules()]
    assert (ViTBlock in kinds) == (row == "full")
    assert kinds.count(ResidualBlock) == (0 if row == "pre" else 2)
    first, second, third = feature_maps()
    changed = aggregation([first + 1, second + 1, third])
    assert torch.equal(changed, aggregation(feature_maps())) == (row in ("pre", "res"))  # without MFF, layer 3 alone


@pytest.mark.parametrize("bottleneck", [0, 4])
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("row", TABLE_9)
def test_the_teachers_shapes_come_back_and_every_weight_learns(row: str, student: str, bottleneck: int) -> None:
    torch.manual_seed(0)
    settings = replace(SMALL, student=student, **TABLE_9[row])
    network, loss, maps = build(settings, CHANNELS, bottleneck), DistillationLoss(settings), feature_maps()
    assert [m.shape for m in network(maps)] == [m.shape for m in maps]
    if student == "homogeneous":  # as many blocks as layers 3, 2, 1 of ResNet-18 and of ResNet-50
        assert [len(stage) for stage in network.student.stages] == ([6, 4, 3] if bottleneck else [2, 2, 2])
    moved, weights = learning([network], lambda: loss(maps, network(maps))["loss"])
    assert moved == weights


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


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_vit_gives_in_inference_what_it_gives_in_training(precision: str, limit: float) -> None:
    torch.manual_seed(0)  # the library takes another path there
    block, x = ViTBlock(16, 1, 8), torch.randn(2, 512, 4, 4)
    with autocast(x.device, precision):
        trained = block.train()(x).float()
        with torch.inference_mode():
            found = block.eval()(x).float()
    torch.testing.assert_close(found, trained.detach(), rtol=0, atol=limit)


@pytest.mark.parametrize("student", STUDENTS)
def test_students_read_the_embedding_alone(student: str) -> None:
    network = build(replace(SMALL, student=student), CHANNELS, 0).eval()
    embedded = network.aggregation(feature_maps())
    outputs, others = (network.student(embedded, feature_maps(seed=seed)) for seed in (0, 9))
    assert all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))
    assert any(isinstance(m, ResidualBlock) for m in network.student.modules()) == (student == "homogeneous")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"student": "twin"}, "unknown student 'twin': use one of heterogeneous, homogeneous"),
        ({"weighting": "7x7"}, "unknown weighting '7x7': use one of none, 1x1"),
        ({"loss": "huber"}, "unknown loss 'huber': use one of cosine, l1"),
        ({"size": 100}, "multiple of 16 pixels, got 100"),
    ],
)
def test_what_does_not_exist_is_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(replace(SMALL, **wrong), CHANNELS, 0), DistillationLoss(replace(SMALL, **wrong))


def test_losses_by_hand() -> None:
    teacher = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).view(1, 2, 1, 2)  # positions (3, 4) and (0, 1)
    student = torch.tensor([[3.0, 3.0], [4.0, 0.0]]).view(1, 2, 1, 2)  # positions (3, 4) and (3, 0)
    found = {name: float(loss(teacher, student)) for name, loss in LOSSES.items()}
    assert found == pytest.approx({"cosine": 0.5, "l1": 4 / 4, "l2": (0 + 10) / 2, "mse": 10 / 4})


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradients_and_float32_of_bf16_features(name: str) -> None:
    teacher, student = feature_maps(seed=0)[2], feature_maps(seed=1)[2]
    low = LOSSES[name](teacher.bfloat16(), student.bfloat16())
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(LOSSES[name](teacher, student)), rel=2e-2)
    fixed, moved = (m[:, :3, :2, :2].double() + 0.2 for m in (teacher, student))
    assert gradcheck(lambda s: LOSSES[name](fixed, s), moved.requires_grad_())


def test_loss_sums_the_scales_and_names_them() -> None:
    teacher, student = feature_maps(seed=0), feature_maps(seed=1)
    scalars = DistillationLoss(SMALL)(teacher, student)
    assert set(scalars) == {"loss", "layer1", "layer2", "layer3"}
    means = [float(m.mean()) for m in discrepancies(teacher, student)]
    assert [float(scalars[f"layer{k}"]) for k in (1, 2, 3)] == pytest.approx(means)
    assert float(scalars["loss"]) == pytest.approx(sum(means))


def test_weights_trained_with_the_printed_loss_go_towards_zero() -> None:
    loss = DistillationLoss(replace(SMALL, weighting="printed"))
    maps = feature_maps(seed=0), feature_maps(seed=1)
    first = loss(*maps)
    assert first["loss"].item() == pytest.approx(DistillationLoss(SMALL)(*maps)["loss"].item())
    optimizer = torch.optim.Adam(loss.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss(*maps)["loss"].backward()
        optimizer.step()
    last = loss(*maps)
    assert 0 < min(loss.weights().tolist()) < max(loss.weights().tolist()) < 0.02
    assert last["loss"].item() < 0.02 * first["loss"].item()
    assert last["weight2"].item() == pytest.approx(loss.weights()[1].item())
    assert float(last["layer2"]) == float(first["layer2"])  # nothing was learned of the features


def test_images_become_smoothed_maps() -> None:
    stage_two, images = KnowledgeDistillation(SMALL), fake_data().test.images
    maps = stage_two(images)
    assert maps.shape == (6, 256, 256) and maps.dtype == torch.float32
    with torch.no_grad():
        features = stage_two.teacher(images)
        expected = gaussian_smooth(to_maps(stage_two.network, features, stage_two.network(features)))
    torch.testing.assert_close(maps, expected)


@pytest.fixture
def data() -> AnomalyData:
    return fake_data()


def test_flipped_features_are_the_teachers_on_flipped_images(data: AnomalyData) -> None:
    plain = [f.clone() for f in training.teacher_features(data, "train", SMALL)]
    flipped = training.flipped_features(data, "train", SMALL)
    assert [len(f) for f in flipped] == [20, 20, 20]
    teacher, images = load_teacher("resnet18_random"), data.train.images
    for part, axes in enumerate([(), (-1,), (-2,), (-2, -1)]):
        for found, expected in zip(flipped, teacher(images.flip(axes) if axes else images), strict=True):
            torch.testing.assert_close(found[5 * part : 5 * part + 5], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(flipped[2][5:10], plain[2].flip(-1), atol=1e-3)  # flipped features are something else
    shared = training.teacher_features(data, "train", SMALL)
    assert all(torch.equal(a, b) for a, b in zip(shared, plain, strict=True))
    assert [a.data_ptr() for a in shared] == [b.data_ptr() for b in flipped]  # one memory for rows with and without
    assert training.flipped_features(data, "train", SMALL)[0] is flipped[0]


def test_training_draws_each_flip_of_an_image_about_as_often(
    data: AnomalyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught = []
    monkeypatch.setattr(training, "train", lambda parts, draw, *_, **options: caught.append(draw))
    for settings in (SMALL, replace(SMALL, flips=False)):
        training.train_student(settings, 0, data, quiet(), build, DistillationLoss)
    flipped = training.flipped_features(data, "train", SMALL)[2]
    indices = torch.tensor([3, 0, 4]).repeat(100)
    drawn, plain = (draw(indices, torch.Generator().manual_seed(0), 0)[2] for draw in caught)
    same = (drawn[:, None] == flipped[None]).flatten(2).all(-1)  # (300, 20)
    assert same.sum(1).eq(1).all()
    which = same.float().argmax(1)
    assert torch.equal(which % 5, indices)
    assert all(50 < int((which // 5 == flip).sum()) < 100 for flip in range(4))
    assert torch.equal(plain, flipped[indices])


def run(data: AnomalyData, seed: int = 0, **changes: Any) -> Result:
    return run_distillation(replace(SMALL, **changes), seed, data, quiet())


def test_same_seed_gives_the_same_numbers_and_another_gives_others(data: AnomalyData) -> None:
    first, again, other = run(data), run(data), run(data, 1, weighting="none")
    check_seeds(first, again, other)
    assert first.predictions["case_images"].shape == (9, 64, 64, 3)  # in colour


def test_weights_of_the_maps_belong_to_the_model(data: AnomalyData) -> None:
    fitted, plain = run(data, weighting="3x3"), run(data, weighting="none")
    assert fitted.curve == plain.curve  # the fit comes after the training
    assert torch.equal(plain.model["weighting.kernels"], torch.ones(3, 1, 1))
    assert plain.notes["weighting"] == "layer 1: 1, layer 2: 1, layer 3: 1"
    assert fitted.model["weighting.kernels"].shape == (3, 3, 3)
    assert fitted.notes["weighting"] != plain.notes["weighting"]
    whole = KnowledgeDistillation(replace(SMALL, weighting="3x3"))
    whole.network.load_state_dict(fitted.model)
    scores = whole(data.test.images).amax((1, 2))
    assert scores.tolist() == pytest.approx(fitted.predictions["scores"].tolist(), abs=1e-5)


def test_printed_weighting_learns_with_the_student_and_shrinks(data: AnomalyData) -> None:
    found = run(data, weighting="printed", epochs=3)
    weights = [found.curve[f"weight{k}"] for k in (1, 2, 3)]
    assert all(w[0] > w[1] > w[2] > 0 for w in weights)
    assert found.model["weighting.kernels"].flatten().tolist() == pytest.approx([w[-1] for w in weights], rel=0.02)
