"""Few-shot episodes: crops and groups of the domains, the methods by hand, what episodes draw, and rows that learn."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import one_sitting, quiet

from defectlab.data import domains as rules
from defectlab.data.annotations import read_deep_pcb
from defectlab.data.anomaly import plan_of, read_mask
from defectlab.data.domains import DOMAINS, Domain, Domains, load_domains, sets_of, tile_window
from defectlab.data.images import decode, to_square
from defectlab.files import DataError
from defectlab.networks import episodes as methods
from defectlab.networks.episodes import EpisodeNetwork, EpisodeSettings, classification_loss
from defectlab.runs import OutOfTime
from defectlab.training.episodes import (
    Draw,
    answers,
    draw_episode,
    draw_episodes,
    joined,
    parted,
    pool_of,
    run_episodes,
)

SMOKE = EpisodeSettings(
    dataset="synthetic_domains", left_out="boards", size=32, width=8, shots=2, queries=2, epochs=2, episodes=4,
    test_episodes=20, pretrained=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(synthetic: Path) -> Domains:
    return load_domains("synthetic_domains", 32, root=synthetic)


# --- Domains ---------------------------------------------------------------------------------------------------------


def test_windows_hold_their_centre_and_stay_inside() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = tuple(rng.integers(40, 300, 2).tolist())
        centre, side = [rng.uniform(0, most) for most in size], int(rng.integers(10, 200))
        left, top, right, bottom = rules.window(centre, side, size)
        assert right - left == bottom - top == min(side, *size)
        assert 0 <= left <= centre[0] <= right <= size[0] and 0 <= top <= centre[1] <= bottom <= size[1]
    assert rules.window((100, 50), 64, (200, 200)) == (68, 18, 132, 82)


def test_a_tile_is_cut_around_its_mask() -> None:
    mask = np.zeros((300, 200), bool)
    mask[150:160, 100:104] = True
    assert tile_window(mask) == (54, 107, 150, 203)  # 96 px around (102, 155)
    mask[40:200, 100] = True  # 160 px high: a window of 200
    assert tile_window(mask) == (0, 20, 200, 220)


def test_synthetic_domains(data: Domains) -> None:
    assert tuple(data.domains) == DOMAINS and data.label == "synthetic steel, tiles and boards"
    assert [len(domain.class_names) for domain in data.domains.values()] == [6, 5, 6]
    for kind, domain in data.domains.items():
        assert domain.name == kind and domain.images.shape == (len(domain), 1, 32, 32)
        assert domain.images.dtype == torch.uint8 and domain.labels.dtype == domain.groups.dtype == torch.int64
        assert len(set(domain.names)) == len(domain) == len(domain.labels) == len(domain.groups)
        assert (domain.labels.bincount(minlength=len(domain.class_names)) > 0).all()


def test_crops_are_what_lies_around_the_defects(data: Domains, synthetic: Path) -> None:
    plan, tiles = plan_of("synthetic_tile", synthetic), data.domains["tiles"]
    for sample in [sample for sample in plan.parts["test"] if sample.mask]:
        image = decode(plan.folder / sample.path)
        mask = read_mask(plan.folder, sample, image.size, "")
        if not mask.any():
            assert sample.path not in tiles.names
            continue
        crop = to_square(image.crop(tile_window(mask)), 32)[0]
        at = tiles.names.index(sample.path)
        assert np.array_equal(tiles.images[at, 0], crop) and tiles.class_names[tiles.labels[at]] == sample.type
    boards = load_domains("synthetic_domains", 64, root=synthetic).domains["boards"]
    folder = synthetic / "synthetic_board"
    by_path = {image.path: image for image in read_deep_pcb(folder, boards.class_names).images}
    groups = {}
    for name, crop, label, group in zip(boards.names, boards.images[:, 0], boards.labels, boards.groups, strict=True):
        path, box = folder / name.split()[0], int(name.split()[1])
        x1, y1, x2, y2 = by_path[path].boxes[box].tolist()
        left, top = (min(max(round((low + high) / 2 - 32), 0), 640 - 64) for low, high in ((x1, x2), (y1, y2)))
        assert np.array_equal(crop, np.asarray(decode(path))[top : top + 64, left : left + 64])
        assert by_path[path].labels[box] == label and groups.setdefault(path, int(group)) == group
    assert len(set(groups.values())) == len(groups) > 30
    assert max(Counter(zip(boards.labels.tolist(), boards.groups.tolist(), strict=True)).values()) <= 4


def test_rule_and_sets_are_in_the_fingerprint(data: Domains, synthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {data.fingerprint, rules.domains_fingerprint("synthetic_domains", synthetic)}
    assert len(found) == 1
    changed = {"TILE_LEAST": 80, "TILE_SHARE": 1.5, "BOARD_SIDE": 48, "EACH_BOARD": 1, "EACH_CLASS": 9}
    for rule, value in changed.items():
        monkeypatch.setattr(rules, rule, value)
        found.add(rules.domains_fingerprint("synthetic_domains", synthetic))
    boards = load_domains("synthetic_domains", 16, root=synthetic).domains["boards"]
    assert boards.labels.bincount().tolist() == [9] * 6  # and one of a class from each board image
    assert set(Counter(zip(boards.labels.tolist(), boards.groups.tolist(), strict=True)).values()) == {1}
    monkeypatch.setattr(rules, "data_fingerprint", lambda *_: "another set")
    assert len(found | {rules.domains_fingerprint("synthetic_domains", synthetic)}) == 7


def test_domains_that_are_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no domains 'four'"):
        sets_of("four")
    monkeypatch.setenv("DEFECTLAB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"neu_det.*data_scripts/neu_det\.py"):
        load_domains("three_domains", 32)
    assert sets_of("sample/three_domains")["tiles"] == "sample/magnetic_tile"
    sample = load_domains("sample/three_domains", 32)
    assert all(len(domain) > 3 for domain in sample.domains.values())
    with pytest.raises(DataError, match=r"no episode of 5 classes .* fetch the whole sets"):
        run_episodes(replace(SMOKE, left_out="tiles"), 0, sample, quiet())


@pytest.mark.real_data
def test_real_domains(real_set) -> None:
    roots = {real_set(name) for name in ("neu_det", "magnetic_tile", "deep_pcb")}
    if len(roots) > 1:
        pytest.skip("the three sets lie in different places")
    data = load_domains("three_domains", 32, root=roots.pop())
    counts = {kind: domain.labels.bincount().tolist() for kind, domain in data.domains.items()}
    steel_counts = [295, 300, 271, 261, 300, 250]
    tile_counts = [115, 85, 57, 32, 99]  # of 392 images, four have an empty mask
    assert counts == {"steel": steel_counts, "tiles": tile_counts, "boards": [300] * 6}
    steel = data.domains["steel"]
    twins = [steel.names.index(f"IMAGES/patches_{number}.jpg") for number in (101, 105)]
    assert steel.groups[twins[0]] == steel.groups[twins[1]] and len(steel.groups.unique()) == len(steel) - 1
    assert len(data.domains["tiles"].groups.unique()) == 65
    episodes = draw_episodes(pool_of(data.domains["tiles"]), 50, EpisodeSettings())
    assert no_group_on_both_sides(data.domains["tiles"], episodes.support, episodes.queries)


# --- Methods ---------------------------------------------------------------------------------------------------------


def drawn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def test_prototypes_by_hand() -> None:
    support = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[0.0, 4.0], [0.0, 6.0]]], dtype=torch.float64)  # (W, S, D)
    scores = methods.prototype_scores(
        support, torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    )  # means (1, 0) and (0, 5)
    assert scores.tolist() == [[-1.0, -17.0]]
    found = classification_loss(scores, torch.tensor([1]))
    assert float(found["loss"]) == pytest.approx(16 + np.log1p(np.exp(-16.0)), abs=1e-12)
    assert float(found["accuracy"]) == 0.0
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.autograd.gradcheck(
        lambda s, q: classification_loss(methods.prototype_scores(s, q), labels)["loss"], (drawn(3, 2, 4), drawn(6, 4))
    )


def test_cosines_by_hand() -> None:
    support = torch.tensor([[[3.0, 0.0], [0.0, 0.5]], [[-1.0, 0.0], [-9.0, 0.0]]])
    scores = methods.cosine_scores(support, torch.tensor([[2.0, 0.0]]))
    assert scores[0].tolist() == pytest.approx([0.5**0.5, -1.0])  # lengths do not count
    assert torch.autograd.gradcheck(methods.cosine_scores, (drawn(3, 2, 4), drawn(6, 4)))
    network = EpisodeNetwork(replace(SMOKE, method="cosine", scale=4.0), 11)
    scores = network.class_scores(torch.randn(7, 8))
    assert scores.shape == (7, 11) and 2 < scores.abs().max() <= 4


def test_the_inner_loop_is_gradient_descent_and_passes_its_gradient_on() -> None:
    support, queries, weight, bias = drawn(3, 2, 4), drawn(6, 4), drawn(3, 4), drawn(3)
    labels = torch.arange(3).repeat_interleave(2)
    own, offset = weight, bias
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(support.flatten(0, 1) @ own.T + offset, labels)
        slopes = torch.autograd.grad(loss, (own, offset), create_graph=True)
        own, offset = own - 0.5 * slopes[0], offset - 0.5 * slopes[1]
    expected = queries @ own.T + offset
    found = methods.adapted_scores(support, queries, weight, bias, 0.5, 3)
    assert torch.allclose(found, expected, atol=1e-12)
    inputs = support, queries, weight, bias
    losses = [torch.nn.functional.cross_entropy(scores, labels) for scores in (found, expected)]
    for one, other in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        assert torch.allclose(one, other, atol=1e-12) and other.abs().max() > 1e-3
    assert torch.equal(methods.adapted_scores(support, queries, weight, bias, 0.5, 0), queries @ weight.T + bias)


def test_unknown_settings_are_refused(data: Domains) -> None:
    with pytest.raises(ValueError, match="unknown method 'maml'"):
        EpisodeNetwork(replace(SMOKE, method="maml"), 11)
    with pytest.raises(ValueError, match="unknown domain 'wood'"):
        run_episodes(replace(SMOKE, left_out="wood"), 0, data, quiet())


# --- Episodes --------------------------------------------------------------------------------------------------------


def no_group_on_both_sides(domain: Domain, support: torch.Tensor, queries: torch.Tensor) -> bool:
    pairs = zip(domain.groups[support].flatten(1).tolist(), domain.groups[queries].flatten(1).tolist(), strict=True)
    return not any(set(one) & set(other) for one, other in pairs)


def grouped(sizes: list[list[int]], shared: int = 0) -> Domain:
    """Groups of these sizes in each class; the first `shared` groups of all classes are the same."""
    labels, groups = [], []
    for label, counts in enumerate(sizes):
        for number, count in enumerate(counts):
            labels += [label] * count
            groups += [number if number < shared else 100 * label + number] * count
    names = tuple(map(str, range(len(labels))))
    images = torch.zeros(len(labels), 1, 16, 16, dtype=torch.uint8)
    return Domain("tiles", tuple("abcdefg"[: len(sizes)]), images, torch.tensor(labels), torch.tensor(groups), names)


def test_no_group_is_on_both_sides_of_an_episode(data: Domains) -> None:
    tiles = grouped([[6] * 8, [6, 6, 6, 6, 5, 2, 1], [15, 6, 6, 6, 6, 6, 6, 5, 1], [6] * 17, [1] * 40], shared=2)
    episodes = draw_episodes(pool_of(tiles), 100, EpisodeSettings())
    assert episodes.support.shape == (100, 5, 5) and episodes.queries.shape == (100, 5, 8)
    assert no_group_on_both_sides(tiles, episodes.support, episodes.queries)
    both = torch.cat([episodes.support, episodes.queries], 2)
    assert (tiles.labels[both] == episodes.classes[..., None]).all()
    assert (both.flatten(1).sort().values.diff() > 0).all()  # no image twice
    assert {tuple(c) for c in episodes.classes.sort().values.tolist()} == {(0, 1, 2, 3, 4)}
    assert len(both.unique()) > 0.95 * len(tiles)
    shares = [len(s.unique()) for s in tiles.groups[episodes.queries[:, 3]]]
    assert np.mean(shares) > 3  # several tiles, rather than several exposures of one
    boards = data.domains["boards"]
    episodes = draw_episodes(pool_of(boards), 50, SMOKE)
    assert no_group_on_both_sides(boards, episodes.support, episodes.queries)


def test_too_few_images_or_groups_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    for sizes in ([[1] * 9, [1] * 3], [[1] * 9, [20]], [[1] * 9]):
        with pytest.raises(DataError, match="no episode of 2 classes with 2 shots and 2 queries"):
            draw_episode(pool_of(grouped(sizes)), 2, 2, 2, generator)


def test_what_is_held_out_is_not_learnt_from(data: Domains) -> None:
    others = joined([data.domains["steel"], data.domains["boards"]])
    assert len(others.class_names) == 12 and len(set(others.names)) == len(others.images) == len(others)
    pool, held = parted(others)
    learnt, kept = ({index for groups in p for images in groups.values() for index in images} for p in (pool, held))
    assert not learnt & kept and len(learnt | kept) == len(others) and 0.15 < len(kept) / len(others) < 0.25
    assert not set(others.groups[list(learnt)].tolist()) & set(others.groups[list(kept)].tolist())
    assert all(held)
    for method, labels in (("cosine", 20), ("protonet", 10)):
        draw = Draw(others.images, pool, replace(SMOKE, method=method))
        first, again = (draw(torch.arange(20), torch.Generator().manual_seed(1), 0) for _ in range(2))
        assert first[0].shape == (20, 1, 32, 32) and first[1].shape == (labels,)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_answers_are_places_among_the_classes_of_an_episode() -> None:
    domain, network = grouped([[1] * 12] * 6), EpisodeNetwork(SMOKE, 11)
    features = torch.nn.functional.one_hot(domain.labels, 8).float()
    episodes = draw_episodes(pool_of(domain), 60, EpisodeSettings(queries=3))
    expected = torch.arange(5)[:, None].expand(60, 5, 3)
    assert torch.equal(answers(network, features, episodes), expected)
    assert torch.equal(answers(network, features, episodes, 1), expected)
    features[domain.labels == 3] = features[0].clone()  # class 3 looks like class 0: the first of the two is taken
    twins = ((episodes.classes == 0) | (episodes.classes == 3)).sum(1) == 2
    found = answers(network, features, episodes) == expected
    assert found[~twins].all() and (found[twins].double().mean((1, 2)) == 0.8).all() and 0 < twins.sum() < 60


# --- Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["protonet", "anil", "cosine", "frozen"])
def test_a_row_on_synthetic_domains(method: str, data: Domains) -> None:
    settings = replace(SMOKE, method=method, left_out="tiles")
    result = run_episodes(settings, 0, data, quiet())
    arrays, tiles = result.predictions, data.domains["tiles"]
    assert result.metrics.keys() == {"episode_accuracy", "episode_accuracy_1"}
    assert result.metrics["episode_accuracy"] == pytest.approx(arrays["accuracies"].mean(), abs=1e-3)
    assert result.metrics["episode_accuracy_1"] == pytest.approx(arrays["accuracies_1"].mean(), abs=1e-3)
    assert set(result.per_class) == set(tiles.class_names) == set(arrays["class_names"])
    confusion = arrays["confusion"]
    assert confusion.shape == (5, 5) and confusion.sum() == 20 * 5 * 2
    assert 100 * confusion.trace() / confusion.sum() == pytest.approx(result.metrics["episode_accuracy"], abs=1e-3)
    assert arrays["case_images"].shape == (10, 32, 32) and arrays["case_images"].dtype == np.uint8
    assert arrays["case_labels"].tolist() == np.repeat(range(5), 2).tolist()
    assert (arrays["case_right"][::2] <= arrays["case_right"][1::2]).all()
    assert bool(result.curve) == bool(result.dev) == (method != "frozen")
    assert {"parameters_m"} <= result.costs.keys() and result.model


def test_a_seed_gives_the_same_result_and_all_answer_the_same_episodes(data: Domains) -> None:
    first, again, other = (run_episodes(SMOKE, seed, data, quiet()) for seed in (0, 0, 1))
    assert first.metrics == again.metrics and first.dev == again.dev and first.curve == again.curve
    assert all(torch.equal(value, again.model[name]) for name, value in first.model.items())
    assert first.curve != other.curve
    asked = [result.predictions["confusion"].sum(1).tolist() for result in (first, other)]
    assert asked[0] == asked[1]


def test_a_training_goes_on_from_its_checkpoint(data: Domains, tmp_path: Path) -> None:
    whole = run_episodes(SMOKE, 0, data, quiet())
    with pytest.raises(OutOfTime):
        run_episodes(SMOKE, 0, data, one_sitting(tmp_path / "half.safetensors"))
    rest = run_episodes(SMOKE, 0, data, quiet(checkpoint=tmp_path / "half.safetensors"))
    assert rest.metrics == whole.metrics and rest.curve == whole.curve


@pytest.mark.parametrize("method", ["protonet", "anil", "cosine"])
def test_training_classes_are_learnt(method: str, data: Domains) -> None:
    """Held-out images of the training classes: far above chance, 20 %."""
    settings = replace(SMOKE, method=method, left_out="tiles", width=16, epochs=6, episodes=20, learning_rate=0.003)
    result = run_episodes(replace(settings, inner_rate=0.3, test_episodes=60), 0, data, quiet())
    assert result.dev["episode_accuracy"] > 40 and result.curve["loss"][-1] < result.curve["loss"][0]
