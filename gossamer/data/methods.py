"""Every way to choose samples, under one protocol.

A method either scores all samples (then an end of the ranking is kept) or selects rows for a
fraction. What it may look at is a :class:`Candidates`: labels, features, the record of a training,
models trained on subsets. Each is made when a method asks for it, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from gossamer.core.errors import InputError
from gossamer.core.task import Classification
from gossamer.data import coreset, prune, quantize
from gossamer.data.dynamics import Dynamics, record
from gossamer.data.selection import Order, keep, keep_count

MakeNetwork = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Effort:
    """How much a method that trains may spend.

    Attributes:
        epochs: of each network.
        networks: networks to average over (EL2N, GraNd, forgetting).
        subset_models: networks trained on random subsets (memorisation, influence).
        committee: members of a committee.
        batch_size: samples a batch.
        clusters: prototypes of k-means. Default: as many as classes, at least ten.
        cpu: stay on the CPU although there is a GPU.
    """

    epochs: int = 10
    networks: int = 1
    subset_models: int = 50
    committee: int = 4
    batch_size: int = 128
    clusters: int | None = None
    cpu: bool = False


class Candidates:
    """Samples to choose from, and what is known of them.

    Args:
        labels: class indices ``[n]``, or None.
        size: how many samples. Default: as many as labels.
        features: makes ``[n, d]`` when a method asks.
        task: its training split is these samples in this order; for methods that train.
        make_network: a fresh network for a seed; for methods that train.
        effort: how much they may spend.
        seed: of whatever is drawn.
        work: a folder for the state of trainings, so that a killed run goes on.
    """

    def __init__(
        self,
        labels: np.ndarray | None = None,
        *,
        size: int | None = None,
        features: Callable[[], np.ndarray] | None = None,
        task: Classification | None = None,
        make_network: MakeNetwork | None = None,
        effort: Effort | None = None,
        seed: int = 0,
        work: Path | None = None,
    ) -> None:
        if labels is None and task is not None:
            labels = task.splits["train"].labels.numpy()
        if size is None and labels is None:
            raise InputError("there are no candidates to choose from")
        self._labels = labels
        self._features = features
        self._task = task
        self._make_network = make_network
        self.size = size if labels is None else len(labels)
        self.effort = effort or Effort()
        self.seed = seed
        self.work = work

    def __len__(self) -> int:
        return int(self.size or 0)

    @property
    def labels(self) -> np.ndarray:
        """Class indices ``[n]``.

        Raises:
            InputError: if the samples have none.
        """
        if self._labels is None:
            raise InputError("this method needs labels, and the samples have none")
        return self._labels

    @property
    def has_labels(self) -> bool:
        """Whether the samples have labels."""
        return self._labels is not None

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.labels.max()) + 1

    @cached_property
    def features(self) -> np.ndarray:
        """``[n, d]``.

        Raises:
            InputError: if there are none, or not one row for each sample.
        """
        if self._features is None:
            raise InputError("this method needs features of the samples")
        found = self._features()
        if found.ndim != 2 or len(found) != len(self):
            raise InputError(
                f"features of shape {list(found.shape)} are not one row for each of {len(self)} "
                "samples"
            )
        return found

    @property
    def task(self) -> Classification:
        """The task whose training split the samples are.

        Raises:
            InputError: if there is none.
        """
        if self._task is None:
            raise InputError("this method trains a network, so the samples need labels")
        return self._task

    @property
    def make_network(self) -> MakeNetwork:
        """Makes a fresh network for a seed.

        Raises:
            InputError: if none was given.
        """
        if self._make_network is None:
            raise InputError("this method trains a network, so one has to be named")
        return self._make_network

    @cached_property
    def clusters(self) -> int:
        """Prototypes of k-means."""
        wanted = self.effort.clusters or max(10, self.classes if self.has_labels else 0)
        return min(wanted, len(self))

    @cached_property
    def dynamics(self) -> Dynamics:
        """The record of trainings on the samples."""
        return record(
            self.task,
            self.make_network,
            epochs=self.effort.epochs,
            seeds=[self.seed + run for run in range(self.effort.networks)],
            batch_size=self.effort.batch_size,
            checkpoint=None if self.work is None else self.work / "dynamics.safetensors",
            cpu=self.effort.cpu,
        )

    @cached_property
    def subset_models(self) -> prune.SubsetModels:
        """Models trained on random subsets of the samples."""
        return prune.train_on_subsets(
            self.task,
            self.make_network,
            models=self.effort.subset_models,
            epochs=self.effort.epochs,
            batch_size=self.effort.batch_size,
            seed=self.seed,
            checkpoint=None if self.work is None else self.work / "subsets",
            cpu=self.effort.cpu,
        )


Score = Callable[[Candidates], np.ndarray]
Select = Callable[[Candidates, float], np.ndarray]


@dataclass(frozen=True)
class Method:
    """One way to choose.

    Attributes:
        name: on the command line.
        text: what it looks at, in a few words.
        source: paper.
        score: ``(candidates) -> [n]``, high is hard.
        select: ``(candidates, fraction) -> rows``, the best first; in place of ``score``.
        trains: whether it trains networks.
    """

    name: str
    text: str
    source: str
    score: Score | None = None
    select: Select | None = None
    trains: bool = False


@dataclass(frozen=True)
class Choice:
    """What a method chose.

    Attributes:
        rows: the best first.
        scores: ``[n]``; NaN where the method does not score.
    """

    rows: np.ndarray
    scores: np.ndarray


def choose(
    method: Method | str,
    candidates: Candidates,
    fraction: float,
    *,
    order: Order = "hard",
    balance: float = 0.5,
    drop_hardest: float = 0.0,
) -> Choice:
    """Chooses a fraction of the candidates.

    Args:
        method: one of :func:`methods`, or its name.
        candidates: what to choose from.
        fraction: to keep.
        order: which end of a ranking is kept; a method that selects has an order of its own.
        balance: see :func:`gossamer.data.selection.keep`; without labels there is none.
        drop_hardest: see :func:`gossamer.data.selection.keep`.

    Raises:
        InputError: if there is no such method, or the candidates lack what it needs.
    """
    method = method_of(method) if isinstance(method, str) else method
    if method.select is not None:
        if order != "hard" or drop_hardest:
            raise InputError(
                f"{method.name} selects and does not rank, so it has no {order} end to keep and "
                "no hardest samples to drop"
            )
        rows = method.select(candidates, fraction)
        return Choice(rows, np.full(len(candidates), np.nan))
    assert method.score is not None
    scores = method.score(candidates)
    rows = keep(
        scores,
        fraction,
        order=order,
        labels=candidates.labels if candidates.has_labels else None,
        balance=balance if candidates.has_labels else 0.0,
        drop_hardest=drop_hardest,
        seed=candidates.seed,
    )
    return Choice(rows, scores)


def methods() -> Mapping[str, Method]:
    """All methods by name."""
    return {method.name: method for method in _METHODS}


def method_of(name: str) -> Method:
    """The method of a name.

    Raises:
        InputError: if there is none; the sentence lists them.
    """
    known = methods()
    if name not in known:
        raise InputError(f"there is no method {name!r:.40}; there are {', '.join(known)}")
    return known[name]


def _random(candidates: Candidates) -> np.ndarray:
    return np.random.default_rng(candidates.seed).random(len(candidates))


def _prototypes(candidates: Candidates) -> np.ndarray:
    return prune.prototype_distance(candidates.features, candidates.clusters, seed=candidates.seed)


def _class_prototypes(candidates: Candidates) -> np.ndarray:
    return prune.class_prototype_distance(candidates.features, candidates.labels)


def _grand(candidates: Candidates) -> np.ndarray:
    seeds = [candidates.seed + run for run in range(candidates.effort.networks)]
    return prune.gradient_norms(candidates.task, candidates.make_network, seeds=seeds)


def _of_dynamics(read: Callable[[Dynamics], np.ndarray]) -> Score:
    return lambda candidates: read(candidates.dynamics)


def _of_subsets(read: Callable[[prune.SubsetModels], np.ndarray]) -> Score:
    return lambda candidates: read(candidates.subset_models)


def _committee(candidates: Candidates, fraction: float) -> np.ndarray:
    effort = candidates.effort
    inside = prune.ensemble_active_learning(
        candidates.task,
        candidates.make_network,
        fraction,
        members=effort.committee,
        epochs=effort.epochs,
        batch_size=effort.batch_size,
        seed=candidates.seed,
        cpu=effort.cpu,
    )
    return np.flatnonzero(inside)


def _bins(candidates: Candidates, fraction: float) -> np.ndarray:
    labels = candidates.labels if candidates.has_labels else None
    smallest = (
        len(candidates) if labels is None else int(np.unique(labels, return_counts=True)[1].min())
    )
    made = quantize.bins_of(candidates.features, labels, bins=min(quantize.BINS, smallest))
    return quantize.sample(made, fraction, labels=labels, seed=candidates.seed)


def _one_shot(function: quantize.Function) -> Select:
    def select(candidates: Candidates, fraction: float) -> np.ndarray:
        labels = candidates.labels if candidates.has_labels else None
        # Lazy evaluation chooses the same where gains only fall.
        engine = "naive" if function == "graphcut" else "lazy"
        return quantize.one_shot(
            candidates.features, fraction, labels, function=function, engine=engine
        )

    return select


def _in_classes(choose: Callable[[np.ndarray, int], np.ndarray]) -> Select:
    def select(candidates: Candidates, fraction: float) -> np.ndarray:
        features = candidates.features
        return quantize.by_class(
            candidates.labels if candidates.has_labels else None,
            len(candidates),
            fraction,
            lambda rows, count: choose(features[rows], count),
        )

    return select


def _coverage(candidates: Candidates, fraction: float) -> np.ndarray:
    scores = candidates.dynamics.area_under_margin()
    return coreset.coverage(scores, keep_count(len(candidates), fraction), seed=candidates.seed)


_SORSCHER = "Sorscher et al. 2022"
_PAUL = "Paul et al. 2021"
_FELDMAN = "Feldman & Zhang 2020"
_METHODS: tuple[Method, ...] = (
    Method("random", "nothing: the control", "", score=_random),
    Method("prototypes", "distance to the nearest k-means centre", _SORSCHER, score=_prototypes),
    Method(
        "class-prototypes", "distance to the mean of the own class", _SORSCHER,
        score=_class_prototypes,
    ),
    Method(
        "el2n", "norm of the error vector early in training", _PAUL, trains=True,
        score=_of_dynamics(Dynamics.difficulty),
    ),
    Method("grand", "norm of the gradient at the start", _PAUL, trains=True, score=_grand),
    Method(
        "forgetting", "times it was unlearned", "Toneva et al. 2019", trains=True,
        score=_of_dynamics(Dynamics.forgetting),
    ),
    Method(
        "aum", "area under the margin, negative", "Pleiss et al. 2020", trains=True,
        score=_of_dynamics(Dynamics.area_under_margin),
    ),
    Method(
        "loss", "mean loss during training", "", trains=True,
        score=_of_dynamics(lambda dynamics: dynamics.loss.mean((0, 1))),
    ),
    Method(
        "memorization", "right only when trained on", _FELDMAN, trains=True,
        score=_of_subsets(prune.memorization),
    ),
    Method(
        "influence-max", "largest influence on a held-out sample", _FELDMAN, trains=True,
        score=_of_subsets(prune.influence_max),
    ),
    Method(
        "influence-sum", "sum of absolute influences", _FELDMAN, trains=True,
        score=_of_subsets(prune.influence_sum_abs),
    ),
    Method(
        "ddd", "models of a pool that get it wrong", "Meding et al. 2022", trains=True,
        score=_of_subsets(lambda models: prune.dichotomous_difficulty(models.correct)),
    ),
    Method(
        "committee", "what an ensemble disagrees about, grown in rounds", "Chitta et al. 2021",
        select=_committee, trains=True,
    ),
    Method(
        "moderate", "distance from the middle of the class, keep the easy end", "Xia et al. 2023",
        score=lambda c: coreset.moderate(c.features, c.labels),
    ),
    Method("quantize", "a share of ten greedy bins", "Zhou et al. 2023", select=_bins),
    Method("graphcut", "near to what is left, far from the chosen", "Iyer & Bilmes 2013",
           select=_one_shot("graphcut")),
    Method("facility", "everybody has a near representative", "Nemhauser et al. 1978",
           select=_one_shot("facility")),
    Method("logdet", "the volume of the chosen", "Chen et al. 2018", select=_one_shot("logdet")),
    Method("k-center", "the farthest point, again and again", "Sener & Savarese 2018",
           select=_in_classes(coreset.k_center)),
    Method("herding", "the mean of the whole", "Welling 2009",
           select=_in_classes(coreset.herding)),
    Method("ccs", "evenly over the margin's range, without its end", "Zheng et al. 2023",
           select=_coverage, trains=True),
)  # fmt: skip
