"""Which classes of a source a downstream task needs, found before the expensive pretraining.

Zhang et al., "Selectivity Drives Productivity: Efficient Dataset Pruning for Enhanced Transfer
Learning" (DP4TL), NeurIPS 2023. A small surrogate that was trained on the whole source looks at the
target's training images once. Label mapping (LM) counts which source class it takes each for;
feature mapping (FM) counts whose mean feature is nearest, and needs no source labels: clusters do.
The classes with most votes stay, with all their samples; every larger network is pretrained on
those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gossamer.core.errors import InputError
from gossamer.parts.neighbours import kmeans, nearest


@dataclass(frozen=True)
class Votes:
    """How many target samples each source class got.

    Attributes:
        counts: ``[classes]``; their sum is the number of target samples (or 1 for each of several
            targets that were added).
        closeness: ``[classes]``, breaks ties: mean target logit (LM) or minus the mean distance
            (FM); high is close.
    """

    counts: np.ndarray
    closeness: np.ndarray

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def without_votes(self) -> int:
        """Classes that got no vote: their order is that of closeness alone."""
        return int((self.counts == 0).sum())


def label_mapping(target_logits: np.ndarray, *, target_labels: np.ndarray | None = None) -> Votes:
    """Votes by the surrogate's most likely source class.

    Args:
        target_logits: ``[n, source classes]`` of the target's TRAINING images, in evaluation mode
            and without augmentation.
        target_labels: class indices ``[n]``: every target class gets the same weight. Default:
            every sample does, as in the paper.
    """
    _refuse(target_logits)
    classes = target_logits.shape[1]
    weights = _weights(len(target_logits), target_labels)
    counts = np.bincount(target_logits.argmax(1), weights=weights, minlength=classes)
    return Votes(counts, target_logits.mean(0, dtype=np.float64))


def feature_mapping(
    target_features: np.ndarray,
    prototypes: np.ndarray,
    *,
    target_labels: np.ndarray | None = None,
) -> Votes:
    """Votes by the nearest prototype, Euclidean; ties go to the lower class.

    Args:
        target_features: ``[n, d]`` of the target's TRAINING images.
        prototypes: ``[classes, d]``, see :func:`prototypes_of`.
        target_labels: as for :func:`label_mapping`.
    """
    _refuse(target_features)
    classes = len(prototypes)
    distances, found = nearest(target_features, prototypes, k=classes)
    weights = _weights(len(target_features), target_labels)
    counts = np.bincount(found[:, 0], weights=weights, minlength=classes)
    total = np.bincount(found.ravel(), weights=distances.ravel(), minlength=classes)
    return Votes(counts, -total / len(target_features))


def prototypes_of(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean feature of each class or cluster, ``[classes, d]`` float64.

    Args:
        features: ``[n, d]`` of the source.
        labels: classes or clusters ``[n]``, from 0.

    Raises:
        InputError: if a class has no sample.
    """
    sizes = np.bincount(labels)
    if not sizes.all():
        raise InputError(f"class {int(np.flatnonzero(sizes == 0)[0])} of the source has no sample")
    sums = np.zeros((len(sizes), features.shape[1]))
    np.add.at(sums, labels, features)
    return sums / sizes[:, None]


def clusters_of(features: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """Pseudo-classes of an unlabelled source by k-means, ``[n]``.

    Clusters that k-means leaves empty are closed up, so numbers run from 0 without gaps.

    Args:
        features: ``[n, d]``.
        count: clusters; the paper's number is not known, about as many as classes.
        seed: of k-means.
    """
    _, found = nearest(features, kmeans(features, count, seed=seed))
    return np.unique(found[:, 0], return_inverse=True)[1]


def add_up(votes: Sequence[Votes]) -> Votes:
    """Votes of several targets, each with the same weight whatever its size.

    How the paper joins targets is not known; this is the sum of shares.

    Raises:
        InputError: if they are about different sources.
    """
    if not votes or len({len(vote) for vote in votes}) != 1:
        raise InputError("votes of several targets must be about the same source classes")
    return Votes(
        np.sum([vote.counts / vote.counts.sum() for vote in votes], axis=0),
        np.mean([vote.closeness for vote in votes], axis=0),
    )


def ranking(votes: Votes, *, reverse: bool = False) -> np.ndarray:
    """Source classes, the most needed first: by votes, then closeness, then number.

    Args:
        votes: see :class:`Votes`.
        reverse: the least needed first, a check that must do much worse.
    """
    order = np.lexsort((np.arange(len(votes)), -votes.closeness, -votes.counts))
    return order[::-1] if reverse else order


def samples_of(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """All rows of these classes, in their stored order.

    Args:
        labels: classes or clusters of the source ``[n]``.
        classes: which stay.
    """
    return np.flatnonzero(np.isin(labels, classes))


def keep_classes(
    votes: Votes, labels: np.ndarray, count: int, *, reverse: bool = False
) -> np.ndarray:
    """Rows of the ``count`` most needed classes, in stored order.

    Args:
        votes: of the target.
        labels: classes or clusters of the source ``[n]``.
        count: how many classes stay.
        reverse: keep the least needed.

    Raises:
        InputError: if there are not so many classes.
    """
    if not 1 <= count <= len(votes):
        raise InputError(f"{count} of {len(votes)} source classes cannot stay")
    return samples_of(labels, ranking(votes, reverse=reverse)[:count])


def class_distances(
    source_features: np.ndarray,
    source_labels: np.ndarray,
    target_features: np.ndarray,
    target_labels: np.ndarray,
    *,
    median: bool = False,
    middle: tuple[float, float] = (0.0, 1.0),
) -> Votes:
    """A baseline: how far each source class's mean lies from the target's classes, on average.

    Args:
        source_features: ``[n, d]``.
        source_labels: ``[n]``.
        target_features: ``[m, d]``.
        target_labels: ``[m]``.
        median: compare with the target classes' medians instead of means.
        middle: which part of a target class counts, by distance to its median.

    Returns:
        No votes; closeness is minus the mean distance, so that ranking is by distance.
    """
    means = prototypes_of(source_features, source_labels)
    centres = []
    for label in np.unique(target_labels):
        own = target_features[target_labels == label]
        away = np.linalg.norm(own - np.median(own, axis=0), axis=1)
        low, high = (round(share * len(own)) for share in middle)
        own = own[np.argsort(away, kind="stable")][low : max(high, low + 1)]
        centres.append(np.median(own, axis=0) if median else own.mean(0))
    apart = np.linalg.norm(means[:, None] - np.stack(centres)[None], axis=2).mean(1)
    return Votes(np.zeros(len(means)), -apart)


def class_influence(members: np.ndarray, scores: np.ndarray) -> Votes:
    """An oracle for few classes: what each class adds to the target score, by means.

    Jain et al., "A Data-Based Perspective on Transfer Learning", 2023: networks are pretrained on
    random subsets of the classes and transferred; the mean score with a class less that without it
    is the class's influence.

    Args:
        members: ``[runs, classes]`` bool.
        scores: of the target after transfer, ``[runs]``.

    Raises:
        InputError: if a class is in all subsets or in none.
    """
    inside = members.sum(0)
    if ((inside == 0) | (inside == len(members))).any():
        raise InputError("every source class must be in some subsets and not in all")
    with_it = (members * scores[:, None]).sum(0) / inside
    without = (~members * scores[:, None]).sum(0) / (len(members) - inside)
    return Votes(np.zeros(members.shape[1]), with_it - without)


def _weights(total: int, labels: np.ndarray | None) -> np.ndarray:
    if labels is None:
        return np.ones(total)
    _, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return total / len(sizes) / sizes[place]


def _refuse(values: np.ndarray) -> None:
    if values.ndim != 2 or len(values) == 0:
        raise InputError("the target has no training images to vote with")
    if not np.isfinite(values).all():
        raise InputError("what the surrogate says of the target is not finite")
