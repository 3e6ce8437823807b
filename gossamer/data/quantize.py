"""Dataset quantization: bins of falling representativeness, a share of each, and fewer patches.

Zhou et al., "Dataset Quantization", ICCV 2023. Greedy graph cut is run on the whole, then on what
it left, and so on: the first bins hold samples of dense regions, the last ones the outlying rest.
An even draw from all bins keeps the spread that one greedy choice loses. Of each image that is
kept, :mod:`gossamer.data.patches` can store the most informative patches alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.core.task import Classification
from gossamer.data.selection import keep_count
from gossamer.data.submodular import (
    Engine,
    FacilityLocation,
    GraphCut,
    LogDeterminant,
    SetFunction,
    cosine,
    greedy,
)
from gossamer.parts.embedding import embed

Function = Literal["graphcut", "facility", "logdet"]
BINS = 10


def bins_of(
    features: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    bins: int = BINS,
    function: Function = "graphcut",
    weight: float = 1.0,
    engine: Engine = "naive",
    seed: int = 0,
) -> list[np.ndarray]:
    """Cuts samples into disjoint bins, each chosen greedily from what the former left.

    Both sums of the gain are over what is left, so a sample that was taken represents nothing any
    more. Costs ``n^2 d / 2`` within each class, and holds a class's similarity if it is small
    (see :mod:`gossamer.data.submodular`).

    Args:
        features: ``[n, d]``; similarity is ``0.5 + 0.5 cos``.
        labels: class indices ``[n]``: bins are made class by class, whose sizes in a bin then
            differ by at most one. Default: one class.
        bins: how many; 1 is the whole. What rounding leaves over is in the last one.
        function: of the greedy choice.
        weight: lambda of graph cut.
        engine: see :func:`gossamer.data.submodular.greedy`.
        seed: of a stochastic engine.

    Returns:
        Rows of each bin, in the order of choice (class after class).

    Raises:
        InputError: if there are more bins than samples of the smallest class.
    """
    total = len(features)
    groups = (
        [np.arange(total)]
        if labels is None
        else [np.flatnonzero(labels == label) for label in np.unique(labels)]
    )
    smallest = min(map(len, groups), default=0)
    if not 1 <= bins <= smallest:
        raise InputError(
            f"{bins} bins cannot be made: the smallest class has {smallest} samples, and every "
            "bin needs one of each class"
        )
    size = total // bins
    parts: list[list[np.ndarray]] = []
    for place in range(bins):
        last = place == bins - 1
        share = size / sum(map(len, groups))
        taken = []
        for group, rows in enumerate(groups):
            wanted = len(rows) if last else round(share * len(rows))
            found = _choose(features[rows], wanted, function, weight, engine, seed)
            taken.append(rows[found])
            groups[group] = np.delete(rows, found)
        parts.append(taken)
    return [np.concatenate(part) for part in parts]


def sample(
    bins: list[np.ndarray],
    fraction: float,
    *,
    labels: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Draws the same share of every bin, uniformly without replacement.

    Args:
        bins: of :func:`bins_of`.
        fraction: to keep. The total is exact: what rounding takes from or gives to the bins is
            settled bin by bin.
        labels: class indices of all samples: each bin is drawn from class by class.
        seed: of the draw.

    Returns:
        Rows in a random order.
    """
    total = sum(map(len, bins))
    wanted = keep_count(total, fraction)
    random = np.random.default_rng(seed)
    cells = [
        cell
        for part in bins
        for cell in (
            [part]
            if labels is None
            else [part[labels[part] == label] for label in np.unique(labels[part])]
        )
    ]
    # Cumulative rounding: every prefix of the cells is right to half a sample.
    ends = np.rint(np.cumsum([len(cell) for cell in cells]) * (wanted / total)).astype(int)
    sizes = np.diff(ends, prepend=0)
    drawn = [random.permutation(cell)[:size] for cell, size in zip(cells, sizes, strict=True)]
    return random.permutation(np.concatenate(drawn))


def one_shot(
    features: np.ndarray,
    fraction: float,
    labels: np.ndarray | None = None,
    *,
    function: Function = "graphcut",
    engine: Engine = "naive",
    seed: int = 0,
) -> np.ndarray:
    """One greedy choice, class by class: the coreset that bins are compared with.

    Args:
        features: ``[n, d]``.
        fraction: to keep.
        labels: class indices ``[n]``, or None.
        function: of the greedy choice.
        engine: see :func:`gossamer.data.submodular.greedy`.
        seed: of a stochastic engine.

    Returns:
        Rows, the first choices of all classes first.
    """
    return by_class(
        labels, len(features), fraction,
        lambda rows, count: _choose(features[rows], count, function, 1.0, engine, seed),
    )  # fmt: skip


def by_class(
    labels: np.ndarray | None,
    total: int,
    fraction: float,
    choose: Callable[[np.ndarray, int], np.ndarray],
) -> np.ndarray:
    """Chooses a share of each class.

    Args:
        labels: class indices ``[n]``, or None for one class.
        total: ``n``.
        fraction: to keep; the total is exact.
        choose: ``(rows of a class, count) -> places among these rows``.

    Returns:
        Rows, the first choices of all classes first.
    """
    wanted = keep_count(total, fraction)
    if labels is None:
        return choose(np.arange(total), wanted)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    ends = np.rint(np.cumsum([len(rows) for rows in groups]) * (wanted / total)).astype(int)
    sizes = np.diff(ends, prepend=0)
    found = [
        rows[choose(rows, int(size))] if size else rows[:0]
        for rows, size in zip(groups, sizes, strict=True)
    ]
    place = np.concatenate([np.arange(len(rows)) for rows in found])
    return np.concatenate(found)[np.argsort(place, kind="stable")]


def gradient_features(
    task: Classification,
    network: nn.Module,
    *,
    width: int | None = 512,
    split: str = "train",
    seed: int = 0,
) -> np.ndarray:
    """Gradients of the loss with respect to the last layer, as in the published code, ``[n, d]``.

    ``G = d loss / d logits`` beside the outer product of ``G`` and the penultimate features. The
    loss is the cross-entropy applied to probabilities (a second softmax), as in the library on
    which the paper builds.

    Args:
        task: whose split is embedded.
        network: answers logits; its penultimate features are read.
        width: random projection to so many columns (Johnson & Lindenstrauss); None keeps all
            ``classes * (features + 1)``.
        split: which images.
        seed: of the projection.
    """
    source = task.splits[split]
    found = embed(source, network, task.preprocess)
    logits = torch.from_numpy(np.array(found.logits)).requires_grad_()
    loss = nn.functional.cross_entropy(logits.softmax(1), source.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    features = torch.from_numpy(np.array(found.features))
    size = gradient.shape[1] * (features.shape[1] + 1)
    generator = torch.Generator().manual_seed(seed)
    turn = None if width is None else torch.randn(size, width, generator=generator) / width**0.5
    parts = []
    for start in range(0, len(features), 1024):
        g, h = gradient[start : start + 1024], features[start : start + 1024]
        whole = torch.cat([g, torch.einsum("nc,nd->ncd", g, h).flatten(1)], 1)
        parts.append(whole if turn is None else whole @ turn)
    return torch.cat(parts).numpy()


def _choose(
    features: np.ndarray,
    count: int,
    function: Function,
    weight: float,
    engine: Engine,
    seed: int,
) -> np.ndarray:
    if count >= len(features):
        # The remainder: nothing is chosen from it.
        return np.arange(len(features))
    return greedy(
        _function(features, function, weight), len(features), count, engine=engine, seed=seed
    )


def _function(features: np.ndarray, function: Function, weight: float) -> SetFunction:
    match function:
        case "graphcut":
            return GraphCut(cosine(features), weight=weight)
        case "facility":
            return FacilityLocation(cosine(features))
        case "logdet":
            return LogDeterminant(cosine(features))
    raise InputError(f"there is no set function {function!r:.40}; graphcut, facility, logdet")
