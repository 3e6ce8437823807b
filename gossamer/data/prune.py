"""Data pruning: rank training samples by how hard they are and keep one end of the ranking.

Sorscher, Geirhos et al., "Beyond neural scaling laws: beating power law scaling via data pruning",
2022: with much data keep the hard samples, with little the easy ones; then the error may fall
faster than a power of the number of samples. The ten metrics of the paper's benchmark are here as
functions of what a network says of the samples; all of them are high where a sample is hard.
:mod:`gossamer.data.selection` keeps an end of the ranking, :mod:`gossamer.data.dynamics` records
what EL2N and forgetting need, :mod:`gossamer.data.perceptron` is the paper's theory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gossamer.core.errors import InputError
from gossamer.core.files import whole_file
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.progress import progress
from gossamer.core.task import Classification, device_of, logits_of, seed_of
from gossamer.data.selection import keep_count, subset
from gossamer.parts.neighbours import kmeans, nearest, normalised

MakeNetwork = Callable[[int], nn.Module]


def prototype_distance(features: np.ndarray, k: int, *, seed: int = 0) -> np.ndarray:
    """1 - cosine to the nearest of ``k`` k-means prototypes, ``[n]`` in [0, 2]; no labels needed.

    Features are brought to length 1 first, so clusters and scores use one metric. (Whether the
    paper does is not known.) The paper takes about as many prototypes as classes and finds the
    result flat over one to two orders of magnitude.

    Args:
        features: ``[n, d]``, from a self-supervised network in the paper.
        k: prototypes.
        seed: of k-means.
    """
    unit = normalised(features)
    distances, _ = nearest(unit, kmeans(unit, k, seed=seed), metric="cosine")
    return distances[:, 0].clip(0.0, 2.0)


def class_prototype_distance(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 - cosine to the mean feature of the sample's own class, ``[n]`` in [0, 2].

    Args:
        features: ``[n, d]``.
        labels: class indices ``[n]``.
    """
    unit = normalised(features)
    sums = np.zeros((int(labels.max()) + 1, unit.shape[1]), dtype=np.float64)
    np.add.at(sums, labels, unit)
    means = normalised(sums)
    return (1.0 - np.einsum("nd,nd->n", unit, means[labels])).clip(0.0, 2.0)


def gradient_norms(
    task: Classification,
    make_network: MakeNetwork,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 64,
) -> np.ndarray:
    """GraNd at initialisation: norm of the loss gradient over all weights, mean over networks.

    Paul et al., "Deep Learning on a Data Diet", 2021. Gradients of single samples are computed
    for a batch at once.

    Args:
        task: its training split is scored.
        make_network: a network (fresh, or trained for a few epochs) for a seed.
        seeds: networks to average over.
        batch_size: samples a batch; each holds a gradient of its own.

    Returns:
        ``[n]`` float64.
    """
    total = np.zeros(task.size("train"))
    for seed in seeds:
        network = make_network(seed).eval()
        weights = {name: p.detach() for name, p in network.named_parameters()}
        buffers = dict(network.named_buffers())

        def loss(
            weights: dict[str, Tensor],
            image: Tensor,
            label: Tensor,
            network: nn.Module = network,
            buffers: dict[str, Tensor] = buffers,
        ) -> Tensor:
            outputs = functional_call(network, (weights, buffers), (image[None],))
            return nn.functional.cross_entropy(logits_of(outputs), label[None])

        each = vmap(grad(loss), in_dims=(None, 0, 0))
        norms = []
        for images, labels in task.batches("train", batch_size=batch_size, shuffle=False):
            device = device_of(network)
            gradients = each(weights, images.to(device), labels.to(device))
            squares = sum(g.flatten(1).square().sum(1) for g in gradients.values())
            norms.append(torch.as_tensor(squares).sqrt().cpu())
        total += torch.cat(norms).double().numpy()
    return total / len(seeds)


@dataclass(frozen=True)
class SubsetModels:
    """What many networks, each trained on a random subset, get right.

    Attributes:
        member: ``[models, n]`` bool: was the sample in the model's subset?
        correct: ``[models, n]`` bool: is the training sample classified right?
        correct_test: ``[models, m]`` bool: is the test sample classified right?
    """

    member: np.ndarray
    correct: np.ndarray
    correct_test: np.ndarray


def memorization(models: SubsetModels) -> np.ndarray:
    """How much more often a sample is right when it was trained on, ``[n]`` in [-1, 1].

    Feldman & Zhang, "What Neural Networks Memorize and Why", 2020: the difference of mean
    correctness between the models whose subset holds the sample and the others. A mean over no
    model counts as 0.
    """
    inside, outside = _shares(models.member)
    correct = models.correct.astype(np.float64)
    return (inside * correct).sum(0) - (outside * correct).sum(0)


def influence(models: SubsetModels, *, block: int = 1024) -> Iterator[tuple[slice, np.ndarray]]:
    """How much more often each test sample is right when a training sample was trained on.

    Args:
        models: see :class:`SubsetModels`.
        block: training samples at a time; the whole ``[n, m]`` need not fit in memory.

    Yields:
        Rows of training samples and their influence ``[rows, m]``.
    """
    inside, outside = _shares(models.member)
    effect = (inside - outside).T
    correct = models.correct_test.astype(np.float64)
    for start in range(0, len(effect), block):
        rows = slice(start, min(start + block, len(effect)))
        yield rows, effect[rows] @ correct


def influence_max(models: SubsetModels) -> np.ndarray:
    """Largest influence of a training sample on any test sample, ``[n]``."""
    return np.concatenate([part.max(1) for _, part in influence(models)])


def influence_sum_abs(models: SubsetModels) -> np.ndarray:
    """Sum of a training sample's absolute influences on all test samples, ``[n]``."""
    return np.concatenate([np.abs(part).sum(1) for _, part in influence(models)])


def dichotomous_difficulty(correct: np.ndarray) -> np.ndarray:
    """How many of a diverse pool of models get a sample wrong, ``[n]``.

    Meding et al., "Trivial or Impossible", 2022: none wrong is trivial, all wrong impossible.
    Which models the paper pooled is not known; give the pool.

    Args:
        correct: ``[models, n]`` bool.
    """
    return (~np.asarray(correct, dtype=bool)).sum(0).astype(np.float64)


def mutual_information(probabilities: np.ndarray) -> np.ndarray:
    """Disagreement of a committee, ``H(mean_m p_m) - mean_m H(p_m)``, nats, ``[n]``.

    Args:
        probabilities: ``[members, n, classes]``.
    """
    return _entropy(probabilities.mean(0)) - _entropy(probabilities).mean(0)


def variation_ratio(probabilities: np.ndarray) -> np.ndarray:
    """Share of a committee that votes against its majority, ``[n]``.

    Args:
        probabilities: ``[members, n, classes]``.
    """
    members, _, classes = probabilities.shape
    votes = probabilities.argmax(2)
    counts = np.stack([(votes == label).sum(0) for label in range(classes)])
    return 1.0 - counts.max(0) / members


def ensemble_active_learning(
    task: Classification,
    make_network: MakeNetwork,
    fraction: float,
    *,
    members: int = 4,
    rounds: int = 4,
    epochs: int = 10,
    batch_size: int = 128,
    acquisition: Callable[[np.ndarray], np.ndarray] = mutual_information,
    seed: int = 0,
    cpu: bool = False,
) -> np.ndarray:
    """Grows a subset by what a committee disagrees about; the score is whether a sample is in it.

    Chitta et al., "Training Data Subset Search with Ensemble Active Learning", 2021. The score is
    binary, so it says nothing of other fractions than the one it was grown to. The rounds and the
    acquisition are ours where the paper's are not known.

    Args:
        task: its training split is scored.
        make_network: a fresh network for a seed.
        fraction: of the samples to grow to.
        members: of the committee, which differ in their seeds.
        rounds: of equal additions after a random start of one such size.
        epochs: of each member.
        batch_size: samples a batch.
        acquisition: ``[members, n, classes] -> [n]``.
        seed: of the start and of the members.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        ``[n]``, 1 in the subset and 0 outside.
    """
    total = task.size("train")
    sizes = np.linspace(0, keep_count(total, fraction), rounds + 2).round().astype(int)[1:]
    random = np.random.default_rng(seed_of("committee", seed))
    chosen = np.zeros(total)
    chosen[random.permutation(total)[: max(1, sizes[0])]] = 1.0
    for size in sizes[1:]:
        small = subset(task, np.flatnonzero(chosen))
        answers = []
        for member in range(members):
            network = _trained(small, make_network(member), epochs, batch_size, member, cpu)
            answers.append(task.logits(network, "train")[0].softmax(1).numpy())
        wanted = acquisition(np.stack(answers))
        wanted[chosen > 0.0] = -np.inf
        chosen[np.argsort(-wanted, kind="stable")[: size - int(chosen.sum())]] = 1.0
    return chosen


def train_on_subsets(
    task: Classification,
    make_network: MakeNetwork,
    *,
    models: int = 50,
    share: float = 0.7,
    epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    split: str = "validation",
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> SubsetModels:
    """Trains networks on random subsets, for memorisation and influence.

    Args:
        task: its training split is scored.
        make_network: a fresh network for a seed.
        models: how many; the published scores use thousands.
        share: of the samples in a subset.
        epochs: of each model.
        batch_size: samples a batch.
        seed: of the subsets.
        split: whose samples are influenced. The default keeps the test split out of the scores.
        checkpoint: a folder that keeps every model's answers, so a killed run goes on.
        cpu: stay on the CPU although there is a GPU.
    """
    if models < 2 or not 0.0 < share < 1.0:
        raise InputError(
            f"two models or more and a share between 0 and 1 are needed, not {models} and {share:g}"
        )
    total = task.size("train")
    size = max(1, round(share * total))
    members = np.zeros((models, total), dtype=bool)
    right: list[tuple[np.ndarray, np.ndarray]] = []
    with progress() as bar:
        for model in bar.track(range(models), description="training on subsets"):
            rows = np.random.default_rng(seed_of("subset", seed, model)).permutation(total)[:size]
            members[model, rows] = True
            kept = None if checkpoint is None else checkpoint / f"{model}.npz"
            if kept is not None and kept.exists():
                with np.load(kept, allow_pickle=False) as found:
                    right.append((found["train"], found["test"]))
                continue
            small = subset(task, np.sort(rows))
            network = _trained(small, make_network(model), epochs, batch_size, model, cpu)
            answers = [_correct(task, network, of) for of in ("train", split)]
            right.append((answers[0], answers[1]))
            if kept is not None:
                with whole_file(kept) as partial, open(partial, "wb") as file:
                    np.savez_compressed(file, train=answers[0], test=answers[1])
    return SubsetModels(
        members, np.stack([train for train, _ in right]), np.stack([test for _, test in right])
    )


def _trained(
    task: Classification,
    network: nn.Module,
    epochs: int,
    batch_size: int,
    seed: int,
    cpu: bool,
) -> nn.Module:
    fit(
        Supervised(network, task, optimizer=sgd(network, lr=0.05)),
        task,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        cpu=cpu,
    )
    return network


def _correct(task: Classification, network: nn.Module, split: str) -> np.ndarray:
    logits, labels = task.logits(network, split)
    return (logits.argmax(1) == labels).numpy()


def _shares(member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights with which the models in and out of each sample average, ``[models, n]``."""
    inside = member.astype(np.float64)
    outside = 1.0 - inside
    return inside / inside.sum(0).clip(min=1.0), outside / outside.sum(0).clip(min=1.0)


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = probabilities * np.log(probabilities)
    return -np.nan_to_num(terms).sum(-1)
