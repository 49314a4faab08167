"""Few good images: what is drawn, the features and scores against slow or other ones, and whole rows."""

import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toy_anomaly import fake_data, fake_split
from toy_runs import quiet

from defectlab.data.anomaly import AnomalyData, load_anomaly
from defectlab.files import WeightsError
from defectlab.networks import few_normals as networks
from defectlab.networks.efficientnet import Lite0
from defectlab.networks.feature_baselines import PatchCoreSettings
from defectlab.networks.few_normals import FewNormalsSettings, check, load_teacher
from defectlab.networks.resnet import fingerprint
from defectlab.runs import OutOfTime, Result
from defectlab.training import few_normals
from defectlab.training.anomaly import teacher_features
from defectlab.training.feature_baselines import run_patchcore
from defectlab.training.few_normals import cached_maps, draw_normals, run_few_normals, turns
from defectlab.training.light import chosen

SMALL = FewNormalsSettings(dataset="fake", teacher="resnet18_random", size=64, shots=(1, 2), precision="fp32")
RD4AD = replace(SMALL, method="rd4ad", steps=2, batch=2)
DINOV2 = replace(SMALL, method="nearest", teacher="dinov2_small_random", size=56)


def toy(settings: FewNormalsSettings) -> AnomalyData:
    """Twelve good images to train on, four of dev, six to test."""
    parts = fake_split(12, 0, 1, settings.size), fake_split(2, 2, 2, settings.size), fake_split(3, 3, 3, settings.size)
    return AnomalyData("fake", "fake", ("good", "square"), *parts, "fake")


def told(result: Result) -> tuple:
    """All that a record keeps of it, but costs."""
    arrays = {name: values.tolist() for name, values in result.predictions.items()}
    return result.metrics, result.per_class, result.dev, result.curve, arrays


# --- What is drawn ----------------------------------------------------------------------------------------------------


def test_draws_are_nested_and_differ_between_seeds() -> None:
    assert draw_normals(30, 16, 0)[:4] == draw_normals(30, 4, 0)
    assert sorted(draw_normals(30, 30, 0)) == list(range(30))
    assert len({tuple(draw_normals(30, 4, seed)) for seed in range(5)}) == 5
    with pytest.raises(ValueError, match="31 good images cannot be drawn from 30"):
        draw_normals(30, 31, 0)


@pytest.mark.parametrize("turned", [False, True])
def test_fewer_images_are_the_first_ones_and_exactly_their_turns(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = few_normals.remember
    monkeypatch.setattr(few_normals, "remember", lambda *args: seen.append(args[3]) or real(*args))
    data, settings = fake_data(12), replace(SMALL, turned=turned, shots=(2, 5))
    names = run_few_normals(settings, 3, data, quiet()).predictions["drawn"].tolist()
    images = data.train.images[[data.train.names.index(name) for name in names]]
    for shots, found in zip((2, 5), seen, strict=True):
        expected = [np.rot90(images[:shots], turn, (2, 3)) for turn in range(4 if turned else 1)]
        maps = few_normals.maps_of(settings, torch.from_numpy(np.concatenate(expected)))
        patches = networks.patches_of(maps).flatten(0, 2)
        torch.testing.assert_close(found, patches, rtol=1e-3, atol=1e-4)


# --- Features and scores ----------------------------------------------------------------------------------------------


def test_maps_are_kept_under_the_key_of_teacher_features() -> None:
    data = fake_data()
    kept = cached_maps(data, "test", SMALL)
    assert kept is cached_maps(data, "test", SMALL) is teacher_features(data, "test", SMALL)
    assert cached_maps(data, "dev", SMALL)[0].shape == (4, 64, 16, 16)


def test_lite0_has_maps_of_strides_8_and_16() -> None:
    images = fake_split(2, 0, 1).images
    maps = load_teacher(replace(SMALL, teacher="lite0_random"))(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 16, 16), (40, 8, 8), (112, 4, 4)]
    net, x = Lite0(pretrained=False).net, images.float() / 127.5 - 1
    x = net.bn1(net.conv_stem(x))
    for stage in net.blocks[:5]:
        x = stage(x)
    torch.testing.assert_close(maps[2], x, rtol=1e-3, atol=1e-4)
    assert networks.patches_of(maps).shape == (2, 8, 8, 152)


def test_dinov2_gives_the_normalised_patch_tokens_by_place() -> None:
    teacher, images = load_teacher(DINOV2), toy(DINOV2).test.images[:2]
    assert not teacher.train().training
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((images.movedim(1, -1).double() / 255 - mean) / std).movedim(-1, 1).float()
    tokens = teacher.net.forward_features(pixels)
    [found] = teacher(images)
    assert found.shape == (2, 384, 4, 4)
    torch.testing.assert_close(found[1, :, 2, 3], tokens[1, 1 + 4 * 2 + 3], rtol=1e-3, atol=1e-3)


def test_score_nearest_is_the_cosine_to_the_nearest_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    maps, bank = torch.randn(3, 5, 15, 20, generator=generator), torch.randn(40, 5, generator=generator)
    expected = 1 - torch.cosine_similarity(maps.movedim(1, -1)[..., None, :], bank, dim=-1).amax(-1)  # (3, 15, 20)
    highest = expected.flatten(1).sort(1, descending=True).values[:, :3].mean(1)  # 1 % of 300
    monkeypatch.setattr(networks, "gaussian_smooth", lambda x: x)
    monkeypatch.setattr(networks, "upsample", lambda x: x)
    found, scores = networks.score_nearest([maps], 7 * bank, batch=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, highest, rtol=1e-4, atol=1e-5)
    assert float(networks.mean_of_highest(torch.tensor([[1.0, 3.0, 2.0]]))) == 3


# --- Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [SMALL, RD4AD, DINOV2], ids=["patchcore", "rd4ad", "nearest"])
def test_a_row_repeats_itself_and_says_what_a_record_needs(settings: FewNormalsSettings) -> None:
    first, again, other = (run_few_normals(settings, seed, toy(settings), quiet()) for seed in (0, 0, 1))
    assert told(first) == told(again)
    assert not (first.predictions["scores_1"] == other.predictions["scores_1"]).all()
    assert first.predictions["drawn"].tolist() != other.predictions["drawn"].tolist()
    names = {f"{name}_{shots}" for name in few_normals.METRICS for shots in (1, 2)}
    assert set(first.metrics) == set(first.dev) == set(first.per_class["square"]) == names
    assert first.metrics == first.per_class["square"]  # the only type
    assert {"labels", "types", "type_names", "names", "case_images", "case_maps", "scores_2"} < set(first.predictions)
    assert not [name for name in first.predictions if "histogram" in name]
    assert (first.model, bool(first.curve)) == ({}, settings.method == "rd4ad")


def test_with_all_images_and_patches_the_maps_are_patchcores() -> None:
    data = fake_data(12)
    found = run_few_normals(replace(SMALL, shots=(1, 12)), 0, data, quiet())
    whole = run_patchcore(
        PatchCoreSettings(teacher=SMALL.teacher, size=64, coreset=1.0, precision="fp32"), 0, data, quiet()
    )
    np.testing.assert_allclose(found.predictions["scores_12"], whole.predictions["scores"], rtol=1e-3)
    assert abs(found.predictions["scores_1"] / whole.predictions["scores"] - 1).max() > 0.02
    assert found.metrics["pixel_auroc_12"] == pytest.approx(whole.metrics["pixel_auroc"], abs=0.01)
    assert found.metrics["aupro_12"] == pytest.approx(whole.metrics["aupro"], abs=0.01)
    assert found.costs == {"parameters": 0, "remembered_patches": 12 * 64}


def test_a_small_bank_is_the_greedy_coreset_of_the_seed() -> None:
    def run(bank: int, seed: int) -> Result:
        return run_few_normals(replace(SMALL, shots=(12,), bank=bank), seed, fake_data(12), quiet())

    few, other, more = run(20, 0), run(20, 1), run(700, 0)
    assert [result.costs["remembered_patches"] for result in (few, other, more)] == [20, 20, 700]
    assert (few.predictions["scores_12"] != other.predictions["scores_12"]).any()
    assert few.predictions["scores_12"].sum() > more.predictions["scores_12"].sum()  # fewer patches are farther away


class Seen(Exception):
    """In place of a training: its arguments."""


@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("shots", [1, 3, 8, 12])
def test_rd4ad_takes_the_same_number_of_steps_for_any_number_of_images(
    shots: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_normals, "train_student", Mock(side_effect=Seen))
    data, settings = fake_data(12), replace(RD4AD, steps=48, batch=8, turned=each == 4)
    normals = chosen(data.train, list(range(shots)))
    with pytest.raises(Seen):
        few_normals.distil(settings, 0, data, turns(normals) if each == 4 else normals, quiet(checkpoint=Path("x")))
    recipe, _, few, context, *_ = few_normals.train_student.call_args.args
    assert len(few.train) % 8 == 0
    assert recipe.epochs * len(few.train) == 48 * 8
    assert set(few.train.names) == set(data.train.names[:shots])
    assert len(few.train.images.flatten(1).unique(dim=0)) == each * shots
    assert few.derived == {} and context.checkpoint is None


def test_more_normals_of_the_synthetic_nut_are_better_than_chance(synthetic: Path) -> None:
    data = load_anomaly("synthetic_nut", 128, root=synthetic)
    settings = replace(SMALL, dataset="synthetic_nut", size=128, shots=(1, 8))
    metrics = run_few_normals(settings, 0, data, quiet()).metrics
    assert metrics["image_auroc_8"] > 60
    assert metrics["pixel_auroc_8"] > 60
    assert sum(metrics[f"{m}_8"] for m in few_normals.METRICS) > sum(metrics[f"{m}_1"] for m in few_normals.METRICS)


def test_time_is_asked_for_between_two_numbers_of_images() -> None:
    late = quiet(deadline=time.monotonic() - 1)
    with pytest.raises(OutOfTime, match="before 2 good images; run again: the row starts anew"):
        run_few_normals(SMALL, 0, fake_data(12), late)
    assert "scores_1" in run_few_normals(replace(RD4AD, shots=(1,)), 0, fake_data(12), late).predictions


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "padim"}, "unknown method 'padim'"),
        ({"teacher": "resnet50"}, "unknown .* teacher 'resnet50'"),
        ({"method": "rd4ad", "teacher": "lite0_random"}, "mirrors resnet18 here, not lite0"),
        ({"teacher": "dinov2_small", "size": 448}, "dinov2_small has one: use nearest"),
        ({"teacher": "dinov2_small", "method": "nearest"}, "multiple of 14 px a side, got 64"),
        ({"shots": (2, 1)}, "positive and ascending"),
        ({"shots": (0, 1)}, "positive and ascending"),
        ({"shots": ()}, "positive and ascending"),
        ({"shots": (1, 13)}, "13 good images cannot be drawn from 12"),
    ],
)
def test_settings_that_do_not_go_together(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_few_normals(replace(SMALL, **changed), 0, fake_data(12), quiet())
    assert check(FewNormalsSettings(teacher="lite0_random")) == "lite0"


def test_dinov2_from_a_file_and_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFECTLAB_WEIGHTS", str(tmp_path))
    settings = replace(DINOV2, teacher="dinov2_small")
    with pytest.raises(WeightsError, match=r"no weights of DINOv2 in .*: on a machine with a network.*save_file"):
        load_teacher(settings)
    random = load_teacher(DINOV2)
    changed = {name: (value + 0.25).contiguous() for name, value in random.net.state_dict().items()}
    save_file(changed, tmp_path / "dinov2_small.safetensors")
    found = load_teacher(settings)
    assert fingerprint(found) != fingerprint(random)
    assert all(torch.equal(found.net.state_dict()[name], value) for name, value in changed.items())
