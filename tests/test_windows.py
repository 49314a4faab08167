"""Window classifiers: both forms agree, what they learn from, what a threshold finds, their rows and costs."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from skimage import data as skimage_data
from sklearn.metrics import balanced_accuracy_score
from toy_runs import quiet

from defectlab.data.fabric import FabricData, FabricSplit, load_fabric
from defectlab.files import DataError
from defectlab.metrics.windows import balanced_accuracy, best_balanced_threshold, shares
from defectlab.networks import efficientnet
from defectlab.networks.windows import (
    Contrast,
    Frozen,
    SmallCNN,
    WindowSettings,
    build,
    by_loop,
    convolutional,
    count,
    to_pixels,
)
from defectlab.studies import windows as study
from defectlab.training.cost_rows import NoData
from defectlab.training.windows import (
    Draw,
    Slid,
    WindowCostSettings,
    _from_tiles,
    run_window_costs,
    run_windows,
    window_labels,
    window_scores,
)


def cloth(count_: int, height: int = 256, width: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count_)
    return torch.randint(0, 256, (count_, 1, height, width), dtype=torch.uint8, generator=generator)


# --- Networks and forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [32, 64, 128])
@pytest.mark.parametrize("network", [SmallCNN(), Contrast(128)], ids=["cnn", "contrast"])
def test_without_padding_one_pass_gives_the_scores_of_the_loop(network, stride: int) -> None:
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # as after a training
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    images = cloth(2, 256, 384 + 7)  # a rest at the edge that no window fills
    with torch.inference_mode():
        one, each = (form(network.eval(), images, stride) for form in (convolutional, by_loop))
    assert one.shape == each.shape == (2, 128 // stride + 1, 263 // stride + 1)
    assert torch.allclose(one, each, atol=1e-4) and each.std() > 0


def test_padding_makes_the_two_forms_differ_but_for_the_whole_image() -> None:
    network = Frozen("resnet18", 128, pretrained=False).eval()
    with torch.inference_mode():
        gap = (convolutional(network, cloth(1), 64) - by_loop(network, cloth(1), 64)).abs()
        same = convolutional(network, cloth(1)[..., :128, :128], 64) - by_loop(network, cloth(1)[..., :128, :128], 64)
    assert gap.min() > 1e-4 > same.abs().max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convolutional(SmallCNN(), cloth(1), 40), "no multiple of the network's 16"),
        (lambda: SmallCNN(96), "made for windows of 128"),
        (lambda: Frozen("lite0", 112), "multiple of 32"),
        (lambda: build(WindowSettings(network="vgg")), "unknown network 'vgg'"),
        (lambda: window_scores(SmallCNN(), cloth(1), WindowSettings(form="conv")), "unknown form 'conv'"),
        (lambda: SmallCNN()(cloth(1).float()), "must be uint8"),
    ],
)
def test_what_cannot_be_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_windows_are_counted_as_the_survey_does() -> None:
    assert [count(2000, side, 32) for side in (256, 128)] == [55**2, 59**2] == [3025, 3481]
    settings = WindowCostSettings(size=256)
    one, loop = (run_window_costs(replace(settings, form=f), 0, NoData(), quiet()) for f in ("convolutional", "loop"))
    assert one.costs["windows"] == loop.costs["windows"] == 25
    assert one.costs["parameters_m"] == loop.costs["parameters_m"] > 0.1
    assert (
        4 < loop.costs["gflops"] / one.costs["gflops"] < 25
    )  # each pixel is in up to 16 windows, in fewer at the edge
    images = torch.rand(1, 3, 256, 256)
    with torch.inference_mode():
        torch.manual_seed(0)
        slid = Slid(settings)
        assert slid(images).shape == (1, 5, 5)


def test_the_pretrained_network_knows_a_cat() -> None:
    """The tensors of the package are timm's, in the same order: scikit-image's cat is a cat."""
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(efficientnet._imagenet(list(whole.state_dict())))
    cat = torch.from_numpy(skimage_data.cat()).movedim(-1, 0)[None].float()
    cat = torch.nn.functional.interpolate(cat, (224, 224), mode="area").to(torch.uint8)
    network = efficientnet.Lite0()
    with torch.inference_mode():
        features = network(cat)
        assert int(whole.forward_head(features).argmax()) in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    assert features.shape == (1, 1280, 7, 7)
    assert not any(p.requires_grad for p in network.parameters()) and not network.train().training
    with pytest.raises(ValueError, match="hold 296 tensors"):
        efficientnet._imagenet(["one"])


def test_a_map_of_windows_becomes_one_of_pixels() -> None:
    logits = torch.tensor([[[1.0, 3.0]]])
    pixels = to_pixels(logits, 4, 2, (4, 8))
    assert pixels[0, 0].tolist() == [1, 1, 2, 2, 3, 3, 3, 3]  # the last two lie in no window


# --- What is learnt from ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split() -> FabricSplit:
    """Three good tiles of grey 100 and one of grey 50 with a bright defect of 3 x 3 px."""
    images, masks = torch.full((4, 1, 256, 256), 100, dtype=torch.uint8), torch.zeros(4, 256, 256, dtype=torch.uint8)
    images[3], masks[3, 200:203, 40:43] = 50, 1
    images[3, 0, 200:203, 40:43] = 200
    labels = torch.tensor([0, 0, 0, 1], dtype=torch.uint8)
    return FabricSplit(images, masks, labels, labels, ("a", "b", "c", "d"))


def test_windows_at_odd_places_have_the_defect_inside_their_margin(split: FabricSplit) -> None:
    draw = Draw(split, 128, 16)
    images, labels = draw(torch.arange(64), torch.Generator().manual_seed(0))
    assert images.shape == (64, 1, 128, 128) and images.dtype == torch.uint8
    assert labels.tolist() == [0.0, 1.0] * 32
    for image, label in zip(images[:, 0], labels, strict=True):
        bright = image > 2 * image.min()
        assert bright.any() == bool(label)
        if label:
            rows, columns = bright.nonzero().T
            assert rows.min() >= 13 and rows.max() <= 127 and columns.min() >= 13 and columns.max() <= 114
    assert len({int(image.median()) for image in images[::2]}) > 8  # of many brightnesses


def test_draws_depend_on_their_generator_alone(split: FabricSplit) -> None:
    first, again = (Draw(split, 128, 16)(torch.arange(8), torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    tiles, masks = Draw(split, 128, 16).tiles(torch.arange(8), torch.Generator().manual_seed(3))
    assert (masks.amax((1, 2)) > 0).tolist() == [False, True] * 4
    assert torch.equal(masks > 0, tiles[:, 0] > 2 * tiles[:, 0].amin((1, 2), keepdim=True))  # mirrored together


def test_a_set_without_defects_cannot_be_learnt_from(split: FabricSplit) -> None:
    good = FabricSplit(split.images[:3], split.masks[:3], split.labels[:3], split.types[:3], split.names[:3])
    with pytest.raises(DataError, match="no defective tiles"):
        Draw(good, 128, 16)


def test_labels_of_windows(split: FabricSplit) -> None:
    labels = window_labels(split.masks, WindowSettings())
    assert labels.shape == (4, 5, 5) and (labels[:3] == 0).all()
    expected = torch.full((5, 5), -1, dtype=torch.int8)
    expected[3:, 0] = 1  # rows 96 and 128 of a defect at row 200, column 40: its margin ends 16 px before
    expected[3:, 1] = torch.where(torch.tensor([40 + 2 >= 32 + 16] * 2), 1, -1)
    assert torch.equal(labels[3], expected)


def test_a_tile_whose_defect_is_in_the_margins_alone_teaches_nothing(split: FabricSplit) -> None:
    masks = torch.zeros(3, 256, 256, dtype=torch.uint8)
    masks[1, 0, 0] = masks[2, 200:203, 40:43] = 1
    network = Frozen("resnet18", 128, pretrained=False)
    images, generator = split.images[[0, 0, 3]], torch.Generator().manual_seed(0)
    features, labels = _from_tiles(network, images, masks, WindowSettings(network="resnet18"), generator)
    assert features.shape == (6, 256) and labels.tolist() == [0.0] * 4 + [1.0] * 2


# --- Metrics ---------------------------------------------------------------------------------------------------------


def test_balanced_accuracy_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=80), rng.integers(0, 2, 80)
    expected = 100 * balanced_accuracy_score(labels, scores >= 0.3)
    assert balanced_accuracy(scores, labels, 0.3) == pytest.approx(expected)
    weights = rng.integers(0, 3, 80)
    many = np.repeat(np.arange(80), weights)
    drawn = balanced_accuracy(scores[many], labels[many], 0.3)
    assert balanced_accuracy(scores, labels, 0.3, weights) == pytest.approx(drawn)
    found = shares(scores, np.zeros(80), 0.3)
    assert np.isnan(found["found"]) and found["false_alarms"] == 100 * (scores >= 0.3).mean()


def test_the_threshold_of_the_best_balanced_accuracy() -> None:
    scores, labels = np.array([5.0, 4, 3, 3, 1]), np.array([1, 1, 0, 1, 0])
    assert best_balanced_threshold(scores, labels) == 3.5  # 3 cannot be divided: 2/3 + 1 against 1 + 1/2
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 9, 60).astype(float), rng.integers(0, 2, 60)
    best = max(balanced_accuracy(scores, labels, t) for t in np.unique(scores))
    assert balanced_accuracy(scores, labels, best_balanced_threshold(scores, labels)) == pytest.approx(best)
    with pytest.raises(ValueError, match="good and defective"):
        best_balanced_threshold(scores, np.ones(60))


# --- Rows ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(synthetic) -> FabricData:
    return load_fabric("synthetic_fabric", root=synthetic)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "resnet18_moved", "contrast"])
def test_a_row_on_synthetic_cloth(name: str, data: FabricData) -> None:
    settings = replace(study.SETTINGS["smoke"], **_changes(name), draws=32, batch=16, epochs=1)
    result = run_windows(settings, 0, data, quiet())
    assert {"balanced_accuracy", "image_auroc", "found", "false_alarms"} <= result.metrics.keys()
    assert set(result.per_class) == {"broken_pick", "fuzzyball", "nep"}
    arrays = result.predictions
    own = balanced_accuracy(arrays["scores"], arrays["labels"], result.dev["threshold"])
    assert result.metrics["balanced_accuracy"] == pytest.approx(own, abs=1e-3)
    assert np.allclose(arrays["windows"].astype(float).max((1, 2)), arrays["scores"], atol=0.1)
    assert {f"{kind}_0039_010_01" for kind in ("strip", "image", "mask")} <= arrays.keys()
    assert arrays["strip_0039_010_01"].shape == (5, 21) and arrays["image_0039_010_01"].shape == (64, 192)
    assert bool(result.curve) == (name == "cnn")


def _changes(name: str) -> dict:
    network, _, moved = name.partition("_")
    return {"network": network, "learnt": "loop" if moved else ""}


def test_a_seed_gives_the_same_result(data: FabricData) -> None:
    settings = replace(study.SETTINGS["smoke"], network="resnet18", draws=32)
    first, again, other = (run_windows(settings, seed, data, quiet()).predictions["scores"] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_rows_are_the_same_in_every_profile() -> None:
    smoke, quick, paper = (list(study.STUDY.rows[profile]) for profile in ("smoke", "quick", "paper"))
    assert smoke == quick == paper
    assert study.STUDY.rows["quick"]["resnet18"].optional and not study.STUDY.rows["quick"]["lite0"].optional
