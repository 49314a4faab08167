"""The frozen teacher: where its weights come from, what it gives, and that nothing moves it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toy_diffusion import random_images

from defectlab.files import WeightsError
from defectlab.networks.resnet import IMAGENET_MEAN, IMAGENET_STD, Teacher, extract, fingerprint, load_teacher


@pytest.fixture(scope="module")
def random_teacher() -> Teacher:
    return load_teacher("resnet18_random")


@pytest.fixture
def empty_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A weights folder and a torchvision cache, both empty. -> the weights folder."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("DEFECTLAB_WEIGHTS", str(folder))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return folder


def torchvision_state(teacher: Teacher) -> dict[str, torch.Tensor]:
    """The teacher's tensors under torchvision's names."""
    state = {key: value.clone() for key, value in teacher.state_dict().items() if key not in ("mean", "std")}
    return {key.replace("stem.0", "conv1").replace("stem.1", "bn1"): value for key, value in state.items()}


def test_stays_in_eval_mode_and_frozen(random_teacher: Teacher) -> None:
    images = random_images(2, colours=3, size=64)
    before, digest = random_teacher(images), fingerprint(random_teacher)
    parent = nn.ModuleList([random_teacher, nn.Dropout()]).train()
    assert parent[1].training
    assert not any(module.training for module in random_teacher.modules())
    assert not any(p.requires_grad for p in random_teacher.parameters())
    after = random_teacher(images)
    assert not any(f.requires_grad for f in after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert fingerprint(random_teacher) == digest


@pytest.mark.parametrize(
    ("name", "channels", "width"),
    [
        ("resnet18", (64, 128, 256), 256),
        ("resnet50", (256, 512, 1024), 256),
        ("wide_resnet50_2", (256, 512, 1024), 512),
    ],
)
def test_shapes(name: str, channels: tuple[int, ...], width: int) -> None:
    with torch.device("meta"):  # shapes only: no memory, no arithmetic
        teacher = Teacher(name)
        features = teacher(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    assert teacher.channels == channels
    assert teacher.layer3[1].conv2.out_channels == width == channels[2] // (teacher.bottleneck or 1)
    expected = [(2, c, 64 // stride, 96 // stride) for c, stride in zip(channels, (4, 8, 16), strict=True)]
    assert [tuple(f.shape) for f in features] == expected


def test_images_are_normalised_as_imagenet(random_teacher: Teacher) -> None:
    images = random_images(1, colours=3, size=64)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = random_teacher.layer1(random_teacher.stem((images.float() / 255 - mean) / std))
    assert torch.equal(random_teacher(images)[0], expected)


def test_random_teacher_is_the_same_each_time(random_teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves all generators alone."""
    torch.manual_seed(0)
    first = fingerprint(Teacher("resnet18_random"))
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)  # what torch.manual_seed calls for the GPUs
    before = torch.get_rng_state()
    again = load_teacher("resnet18_random")
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded
    assert fingerprint(again) == fingerprint(random_teacher) == first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", r"put resnet18\.safetensors .*DEFECTLAB_WEIGHTS.*resnet18-f37072fd\.pth"),
        ("vgg16", "unknown teacher 'vgg16'.*resnet18.*wide_resnet50_2"),
        ("vgg16_random", "unknown teacher 'vgg16_random'"),
    ],
)
def test_weights_that_are_not_there(empty_machine: Path, name: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load_teacher(name)


def test_safetensors_of_the_weights_folder_are_used(empty_machine: Path, random_teacher: Teacher) -> None:
    state = torchvision_state(random_teacher)
    state["layer1.0.conv1.weight"] += 1
    save_file(state, empty_machine / "resnet18_mine.safetensors")
    loaded = load_teacher("resnet18")
    assert torch.equal(loaded.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])
    assert torch.equal(loaded.stem[0].weight, state["conv1.weight"])
    assert fingerprint(loaded) != fingerprint(random_teacher)
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(WeightsError, match="no ImageNet weights for the teacher resnet50"):
        load_teacher("resnet50")  # another architecture's file does not count


def test_torchvision_cache_is_used(empty_machine: Path, random_teacher: Teacher) -> None:
    state = torchvision_state(random_teacher)
    state |= {"fc.weight": torch.zeros(10, 512), "layer4.0.conv1.weight": torch.zeros(1)}  # more than is needed
    path = Path(torch.hub.get_dir()) / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    assert fingerprint(load_teacher("resnet18")) == fingerprint(random_teacher)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer2.0.conv1.weight": None, "layer3.1.bn2.bias": None}, r"lacks layer2\.0\.conv1\.weight and 1 more"),
        ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, "does not fit resnet18"),
        (None, r"resnet18\.safetensors"),  # damaged
    ],
)
def test_a_bad_file_is_named(empty_machine: Path, random_teacher: Teacher, changes: dict | None, message: str) -> None:
    path = empty_machine / "resnet18.safetensors"
    if changes is None:
        path.write_bytes(b"not weights")
    else:
        state = torchvision_state(random_teacher) | changes
        save_file({key: value for key, value in state.items() if value is not None}, path)
    with pytest.raises(WeightsError, match=message) as caught:
        load_teacher("resnet18")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", ["stem.0.weight", "layer3.1.bn2.running_var"])
def test_fingerprint_sees_every_tensor(key: str) -> None:
    teacher = load_teacher("resnet18_random")
    before = fingerprint(teacher)
    assert fingerprint(teacher) == before
    teacher.state_dict()[key].view(-1)[0] += 1e-3
    assert fingerprint(teacher) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extract_equals_forward(random_teacher: Teacher, dtype: torch.dtype) -> None:
    images = random_images(5, colours=3, size=64)
    parts = extract(random_teacher, images, dtype, batch=2)  # the last batch has one image
    for part, whole in zip(parts, random_teacher(images), strict=True):
        assert part.dtype == dtype
        assert part.is_contiguous(memory_format=torch.channels_last)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(part.float(), whole, rtol=tolerance, atol=tolerance)
