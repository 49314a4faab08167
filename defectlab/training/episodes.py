"""Few-shot methods on three domains: episodes are drawn, a network learns from two domains and is tested on the third.

What it learns from and what it is tested on share no class, no image and no kind of surface.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from defectlab.data.domains import Domain, Domains
from defectlab.data.splits import draw_split
from defectlab.files import DataError
from defectlab.metrics.costs import parameters
from defectlab.networks.episodes import EpisodeNetwork, EpisodeSettings, classification_loss
from defectlab.precision import autocast, full_float32, precision_of, sent
from defectlab.runs import Context, Result
from defectlab.training.loop import train
from defectlab.training.results import example_side, rounded, shrunk
from defectlab.training.segmentation import flip

HELD = 0.2  # of the images of the training domains, in whole groups, for dev; ours
SEED = 0  # of the episodes of dev and test: all methods and seeds answer the same
TRIES = 100  # to draw an episode
AT_ONCE = 50  # episodes that are answered together
Pool = list[dict[int, list[int]]]  # for each class: group -> indices of its images


# --- Episodes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Episodes:
    """E episodes of W classes, as indices of classes and images of a domain; int64, on the CPU."""

    classes: Tensor  # (E, W)
    support: Tensor  # (E, W, shots)
    queries: Tensor  # (E, W, queries)


def pool_of(domain: Domain, names: set[str] | None = None) -> Pool:
    """All images, or those with these names."""
    pool: Pool = [defaultdict(list) for _ in domain.class_names]
    for index, (label, group) in enumerate(zip(domain.labels.tolist(), domain.groups.tolist(), strict=True)):
        if names is None or domain.names[index] in names:
            pool[label][group].append(index)
    return pool


def images_of(groups: dict[int, list[int]]) -> list[int]:
    return list(chain.from_iterable(groups.values()))


def _sides(pool: Pool, classes: list[int], shots: int, queries: int, generator: torch.Generator) -> tuple[list, list]:
    """Images of each class to draw the support and the queries from. A group, of whatever classes, is on one side; the
    sides are as shots to queries, as nearly as whole groups allow."""
    side_of: dict[int, int] = {}
    found = [], []
    for c in classes:
        groups, parts = list(pool[c]), ([], [])
        order = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        for group in sorted(order, key=lambda g: g not in side_of):  # first those whose side is given
            lacking = int(len(parts[0]) * queries > len(parts[1]) * shots)
            parts[side_of.setdefault(group, lacking)].extend(pool[c][group])
        for side, part in zip(found, parts, strict=True):
            side.append(part)
    return found


def draw_episode(
    pool: Pool, ways: int, shots: int, queries: int, generator: torch.Generator, held: Pool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> classes (ways,), support (ways, shots), queries (ways, queries); no group is on both sides.

    `held`: the images to draw the queries from; then all of `pool` is there for the support. DataError where the
    images or groups do not suffice.
    """
    for _ in range(TRIES):
        classes = torch.randperm(len(pool), generator=generator)[:ways]
        if held is None:
            sides = _sides(pool, classes.tolist(), shots, queries, generator)
        else:
            sides = tuple([images_of(of[c]) for c in classes.tolist()] for of in (pool, held))
        wanted = list(zip(sides, (shots, queries), strict=True))
        if len(classes) == ways and all(len(images) >= count for side, count in wanted for images in side):
            drawn = ([torch.randperm(len(i), generator=generator)[:n] for i in side] for side, n in wanted)
            both = zip(sides, drawn, strict=True)
            parts = (torch.stack([torch.tensor(i)[o] for i, o in zip(*s, strict=True)]) for s in both)
            return classes, *parts
    least = min(len(images_of(groups)) for groups in pool)
    raise DataError(
        f"no episode of {ways} classes with {shots} shots and {queries} queries can be drawn from {len(pool)} classes, "
        f"the rarest with {least} images: fetch the whole sets, or ask for fewer"
    )


def draw_episodes(
    pool: Pool, count: int, settings: EpisodeSettings, queries: int | None = None, held: Pool | None = None
) -> Episodes:
    """`count` episodes that depend on the images and the episodes' sizes alone. Errors of `draw_episode`."""
    generator = torch.Generator().manual_seed(SEED)
    sizes = settings.ways, settings.shots, queries or settings.queries
    drawn = [draw_episode(pool, *sizes, generator, held) for _ in range(count)]
    return Episodes(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))


# --- Training --------------------------------------------------------------------------------------------------------


def joined(domains: list[Domain]) -> Domain:
    """One domain with the classes of all, "<domain> <class>"."""
    labels, groups, classes, seen = [], [], (), 0
    for domain in domains:
        labels.append(domain.labels + len(classes))
        groups.append(domain.groups + seen)
        classes += tuple(f"{domain.name} {name}" for name in domain.class_names)
        seen += int(domain.groups.max()) + 1
    images = torch.cat([domain.images for domain in domains])
    names = tuple(f"{domain.name} {name}" for domain in domains for name in domain.names)
    return Domain(" and ".join(d.name for d in domains), classes, images, torch.cat(labels), torch.cat(groups), names)


def parted(domain: Domain) -> tuple[Pool, Pool]:
    """What is learnt from and what is held out: a fifth of the images, of each class, in whole groups, by hash."""
    columns = (map(str, column.tolist()) for column in (domain.labels, domain.groups))
    classes, groups = (dict(zip(domain.names, column, strict=True)) for column in columns)
    held = set(draw_split(classes, HELD, "episodes dev", groups))
    return pool_of(domain, set(domain.names) - held), pool_of(domain, held)


class Draw:
    """Batches to learn from, mirrored at random: episodes, or for "cosine" images of all classes, equally often."""

    def __init__(self, images: Tensor, pool: Pool, settings: EpisodeSettings):
        self.images, self.pool, self.settings = images, pool, settings
        self.of_class = [torch.tensor(images_of(groups)) for groups in pool]

    def __call__(self, indices: Tensor, generator: torch.Generator, epoch: int) -> tuple[Tensor, Tensor]:
        """-> uint8 images (B, 1, S, S), and labels: of all images (B,), or of an episode's queries (W * Q,), which come
        after the support, both class by class."""
        own, device = self.settings, self.images.device
        if own.method == "cosine":
            labels = torch.randint(len(self.pool), (len(indices),), generator=generator)
            shares = torch.rand(len(indices), generator=generator, dtype=torch.float64).tolist()
            lists = [self.of_class[c] for c in labels.tolist()]
            at = torch.stack([of[int(share * len(of))] for of, share in zip(lists, shares, strict=True)])
        else:
            _, support, queries = draw_episode(self.pool, own.ways, own.shots, own.queries, generator)
            at = torch.cat([support.flatten(), queries.flatten()])
            labels = torch.arange(own.ways).repeat_interleave(own.queries)
        across, down = sent(torch.rand(2, len(at), generator=generator) < 0.5, device)
        return flip(self.images[sent(at, device)], across, down), sent(labels, device)


def train_episodes(
    settings: EpisodeSettings, seed: int, domain: Domain, pool: Pool, context: Context
) -> tuple[EpisodeNetwork, dict[str, list[float]], dict[str, float], str]:
    """-> network in eval mode, curve, costs of training, precision. Errors of `train` and of `EpisodeNetwork`."""
    torch.manual_seed(seed)
    network = EpisodeNetwork(settings, len(domain.class_names))
    network = network.to(context.device, memory_format=torch.channels_last)
    if settings.method == "frozen":
        return network.eval(), {}, {}, "fp32"
    supports, precision = settings.ways * settings.shots, precision_of(settings, context.device)

    def step(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        with autocast(images.device, precision):
            features = network(images)  # (B, D) float32
        if settings.method == "cosine":
            return classification_loss(network.class_scores(features), labels)
        support = features[:supports].unflatten(0, (settings.ways, settings.shots))
        return classification_loss(network.scores(support, features[supports:]), labels)

    draw, count = Draw(domain.images, pool, settings), settings.episodes * settings.batch
    trained = train(network, draw, step, count, settings, seed, context, indices_on=torch.device("cpu"))
    return network, trained.curve, trained.costs, precision


# --- Evaluation ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def features_of(network: EpisodeNetwork, images: Tensor, batch: int = 16) -> Tensor:
    """uint8 images (N, 1, S, S) -> (N, D) float32."""
    with full_float32():
        return torch.cat([network(chunk) for chunk in images.split(batch)])


@torch.inference_mode()
def answers(network: EpisodeNetwork, features: Tensor, episodes: Episodes, shots: int | None = None) -> Tensor:
    """Features (N, D) of a domain's images -> (E, W, queries) on the CPU: as which of the episode's classes, 0 to
    W - 1, each query is taken; from the first `shots` of the support images, or all."""
    found = []
    for support, queries in zip(episodes.support.split(AT_ONCE), episodes.queries.split(AT_ONCE), strict=True):
        asked = features[sent(queries, features.device)]  # (e, W, Q, D)
        scores = network.scores(features[sent(support[..., :shots], features.device)], asked.flatten(1, 2))
        found.append(scores.argmax(-1).unflatten(1, asked.shape[1:3]).cpu())
    return torch.cat(found)


def right(found: Tensor) -> Tensor:
    """Answers (E, W, queries) -> whether they are right."""
    return found == torch.arange(found.shape[1])[:, None]


def dev_accuracy(
    network: EpisodeNetwork, domain: Domain, pool: Pool, held: Pool, settings: EpisodeSettings
) -> dict[str, float]:
    """Episodes of classes of one training domain each, the mean of the domains. The queries were held out, the support
    images were learnt from: a number to compare settings by."""
    features, kinds = features_of(network, domain.images), [name.split()[0] for name in domain.class_names]
    accuracies = []
    for kind in sorted(set(kinds)):
        learnt, asked = ([groups for groups, of in zip(p, kinds, strict=True) if of == kind] for p in (pool, held))
        queries = min(settings.queries, *(len(images_of(groups)) for groups in asked))
        episodes = draw_episodes(learnt, max(1, settings.test_episodes // 2), settings, queries, asked)
        accuracies.append([right(answers(network, features, episodes, n)).double().mean() for n in (None, 1)])
    return named(100 * torch.tensor(accuracies).mean(0))


def named(accuracies: Tensor) -> dict[str, float]:
    return rounded(dict(zip(("episode_accuracy", "episode_accuracy_1"), accuracies.tolist(), strict=True)))


def run_episodes(settings: EpisodeSettings, seed: int, data: Domains, context: Context) -> Result:
    """One row and seed. ValueError for an unknown domain or method, DataError where no episode can be drawn."""
    if settings.left_out not in data.domains:
        raise ValueError(f"unknown domain {settings.left_out!r}: use one of {', '.join(data.domains)}")
    domain = data.domains[settings.left_out]
    episodes = draw_episodes(pool_of(domain), settings.test_episodes, settings)
    others = joined([one for name, one in data.domains.items() if name != settings.left_out])
    pool, held = parted(others)
    network, curve, costs, precision = train_episodes(settings, seed, others, pool, context)
    dev = {} if settings.method == "frozen" else dev_accuracy(network, others, pool, held, settings)
    features = features_of(network, domain.images)
    found, found_1 = (answers(network, features, episodes, shots) for shots in (None, 1))
    accuracies = 100 * torch.stack([right(answer).double().mean((1, 2)) for answer in (found, found_1)])
    said = episodes.classes.gather(1, found.flatten(1)).flatten()
    true = episodes.classes.repeat_interleave(found.shape[2], 1).flatten()
    count = len(domain.class_names)
    confusion = (true * count + said).bincount(minlength=count**2).view(count, count)  # true, said
    share = (100 * confusion.diagonal() / confusion.sum(1)).tolist()
    predictions = {
        "accuracies": accuracies[0].float().numpy(),
        "accuracies_1": accuracies[1].float().numpy(),
        "confusion": confusion.numpy(),
        "class_names": np.array(domain.class_names),
    }
    return Result(
        named(accuracies.mean(1)),
        {name: rounded({"episode_accuracy": value}) for name, value in zip(domain.class_names, share, strict=True)},
        dev,
        curve,
        predictions | examples(domain, episodes, right(found)),
        network.state_dict(),
        {"parameters_m": round(parameters(network) / 1e6, 4)} | costs,
        precision,
    )


def examples(domain: Domain, episodes: Episodes, correct: Tensor) -> dict[str, np.ndarray]:
    """Of each class the image that is right most rarely and the one that is right most often. case_images (K, side,
    side) uint8, case_labels and case_index (K,), case_right (K,) the share of right answers, 0 to 1."""
    at = episodes.queries.flatten()
    times = at.bincount(minlength=len(domain))
    share = at.bincount(correct.flatten().double(), len(domain)) / times  # NaN: never asked
    chosen = []
    for c in range(len(domain.class_names)):
        own = ((domain.labels == c) & (times > 0)).nonzero()[:, 0]
        order = own[share[own].argsort(stable=True)]
        chosen += [order[:1], order[-1:]]
    index = torch.cat(chosen)
    images = domain.images[index.to(domain.images.device)]
    return {
        "case_images": shrunk(images, example_side(images)),
        "case_labels": domain.labels[index].numpy(),
        "case_index": index.numpy(),
        "case_right": share[index].float().numpy(),
    }
