"""Utilities from comparisons: maximum likelihood in the Plackett-Luce family.

A model i is preferred to j with probability ``e^{g_i} / (e^{g_i} + e^{g_j})``; in a list of a
winner and several losers, with ``e^{g_w}`` over the sum of all of them; in a ranking, position by
position. Iterative Luce spectral ranking (I-LSR) finds the maximum of the likelihood as the fixed
point of a Markov chain that goes from losers to winners: with weights ``w = n e^g / sum e^g`` its
rates are the sums of ``1 / sum of w in the list``, and the new g is the logarithm of its stationary
distribution. Utilities are identified up to a constant; here their mean is 0.

Without regularisation a finite maximum exists only if every model can be reached from every other
one along wins (Ford 1957). Where that is not so, the error names the groups, and :func:`groups`
says what is still identifiable.

Sources: Maystre and Grossglauser, "Fast and Accurate Inference of Plackett-Luce Models", NeurIPS
2015; Ghosh et al., "ONEBench to Test Them All", ACL 2025 (arXiv:2412.06745).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from gossamer.core.errors import InputError

PASSES = 100
TOLERANCE = 1e-8


class NotIdentifiable(InputError):
    """Comparisons that do not determine a finite utility of every model.

    Attributes:
        groups: models whose utilities are determined relative to each other, strongest first.
    """

    def __init__(self, sentence: str, groups: Sequence[Sequence[str]]) -> None:
        super().__init__(sentence)
        self.groups = [list(group) for group in groups]


@dataclass(frozen=True)
class Lists:
    """Choices: in each a winner is preferred to some losers.

    Attributes:
        winners: ``[lists]``.
        starts: where each list's losers begin in ``losers``, ``[lists + 1]``.
        losers: ``[all losers]``.
        weights: of each list, ``[lists]``.
    """

    winners: np.ndarray
    starts: np.ndarray
    losers: np.ndarray
    weights: np.ndarray


def fit_pairs(
    wins: np.ndarray,
    *,
    alpha: float = 0.0,
    start: np.ndarray | None = None,
    passes: int = PASSES,
    tolerance: float = TOLERANCE,
) -> np.ndarray:
    """Utilities from counts of pairwise wins.

    Args:
        wins: ``[..., n, n]``: how often the row was preferred to the column; leading axes are
            separate problems that are solved together.
        alpha: added to every rate, in units of comparisons between models of mean weight; needed
            where wins do not connect the models both ways.
        start: utilities ``[..., n]`` to begin with, such as those before some wins were added.
        passes: at most; one pass from zero is the LSR estimator.
        tolerance: stop when no model's weight changes by more on average.

    Returns:
        ``[..., n]`` with mean 0. Cost grows with n^3 for each pass.

    Raises:
        InputError: if counts are negative or not finite.
        NotIdentifiable: if ``alpha`` is 0 and the maximum is not finite.
    """
    wins = np.asarray(wins, float)
    if wins.ndim < 2 or wins.shape[-1] != wins.shape[-2]:
        raise InputError(f"wins of shape {list(wins.shape)} are not square")
    if not np.isfinite(wins).all() or (wins < 0).any():
        raise InputError("counts of wins are finite and not negative")
    if alpha < 0:
        raise InputError(f"alpha is {alpha:g}; 0 or more is needed")
    n = wins.shape[-1]
    if alpha == 0:
        for matrix in wins.reshape(-1, n, n):
            check_connected(matrix)
    utilities = np.zeros(wins.shape[:-1]) if start is None else np.array(start, float)
    losses = np.swapaxes(wins, -1, -2)
    for _ in range(passes):
        weights = _weights(utilities)
        rates = alpha + losses / (weights[..., :, None] + weights[..., None, :])
        found = _stationary(rates)
        change = np.abs(_weights(found) - weights).sum(-1).max()
        utilities = found
        if change <= tolerance * n:
            break
    return utilities


def fit_lists(
    lists: Lists,
    models: int,
    *,
    alpha: float = 0.0,
    passes: int = PASSES,
    tolerance: float = TOLERANCE,
) -> np.ndarray:
    """Utilities from choices of one among several.

    Args:
        lists: the choices.
        models: how many models there are.
        alpha: as in :func:`fit_pairs`.
        passes: as in :func:`fit_pairs`.
        tolerance: as in :func:`fit_pairs`.

    Returns:
        ``[models]`` with mean 0.

    Raises:
        NotIdentifiable: as :func:`fit_pairs`.
    """
    if alpha == 0:
        ones = np.ones(models)
        check_connected(_list_rates(*_columns(lists), ones, models).T)
    utilities = np.zeros(models)
    for _ in range(passes):
        weights = _weights(utilities)
        found = _stationary(alpha + _list_rates(*_columns(lists), weights, models))
        change = np.abs(_weights(found) - weights).sum()
        utilities = found
        if change <= tolerance * models:
            break
    return utilities


def rankings(orders: Sequence[Sequence[int]]) -> Lists:
    """The choices that rankings are made of: each position against all that come after it.

    Args:
        orders: model numbers, best first; each ranking of as many models as one likes.
    """
    winners, losers, lengths = [], [], []
    for order in orders:
        for place in range(len(order) - 1):
            winners.append(order[place])
            losers.extend(order[place + 1 :])
            lengths.append(len(order) - place - 1)
    return Lists(
        np.array(winners, np.int64),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.array(losers, np.int64),
        np.ones(len(winners)),
    )


def log_likelihood(utilities: np.ndarray, wins: np.ndarray) -> float:
    """Log-likelihood of pairwise wins ``[n, n]``, in nats a comparison."""
    gap = utilities[:, None] - utilities[None, :]
    return float(-(wins * np.logaddexp(0.0, -gap)).sum() / wins.sum())


def groups(wins: np.ndarray) -> list[np.ndarray]:
    """Models whose utilities are determined relative to each other.

    Args:
        wins: ``[n, n]``: how often the row was preferred to the column.

    Returns:
        Model numbers of each group. A group that beats another one and never loses to it comes
        before it; groups that were never compared come in any order.
    """
    beaten = csr_array(wins.T > 0)  # from loser to winner
    count, label = connected_components(beaten, directed=True, connection="strong")
    above = np.zeros((count, count), bool)
    losers, winners = beaten.nonzero()
    above[label[winners], label[losers]] = True
    np.fill_diagonal(above, False)
    over = above.sum(0)  # how many groups that are left stand above each
    order: list[int] = []
    for _ in range(count):  # condensations have no cycles, so something stands below nothing
        first = int((over == 0).argmax())
        order.append(first)
        over = over - above[first]
        over[first] = -1
    return [np.flatnonzero(label == k) for k in order]


def is_connected(wins: np.ndarray) -> bool:
    """Whether wins ``[n, n]`` lead from each model to each other one: all are identified then."""
    return connected_components(csr_array(wins > 0), connection="strong")[0] == 1


def check_connected(wins: np.ndarray, names: Sequence[str] | None = None) -> None:
    """Refuses wins that do not determine all utilities.

    Args:
        wins: ``[n, n]``.
        names: of the models. Default: their numbers.

    Raises:
        NotIdentifiable: naming what is compared with what.
    """
    if is_connected(wins):
        return
    found = groups(wins)
    called = [str(k) for k in range(len(wins))] if names is None else list(names)
    named = [[called[int(k)] for k in group] for group in found]
    pieces, label = connected_components(csr_array(wins > 0), directed=False)
    if pieces > 1:
        parts = [[called[int(k)] for k in np.flatnonzero(label == p)] for p in range(pieces)]
        sentence = (
            f"the models fall into {pieces} parts that were never compared: "
            f"{'; '.join(_some(part) for part in parts[:4])}{'; …' if pieces > 4 else ''}; rank "
            "each part alone, add comparisons, or regularise (alpha)"
        )
    else:
        sentence = (
            f"{_some(named[0])} never lost to any of the others, so the gap between them is "
            f"unbounded; only the order of {len(named)} groups and the utilities inside each are "
            "identifiable: add comparisons, or regularise (alpha)"
        )
    raise NotIdentifiable(sentence, named)


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _weights(utilities: np.ndarray) -> np.ndarray:
    shifted = np.exp(utilities - utilities.max(-1, keepdims=True))
    return utilities.shape[-1] * shifted / shifted.sum(-1, keepdims=True)


def _stationary(rates: np.ndarray) -> np.ndarray:
    """Centred logarithms of the stationary distribution of Markov rates ``[..., n, n]``."""
    n = rates.shape[-1]
    chain = rates.copy()
    diagonal = np.arange(n)
    chain[..., diagonal, diagonal] = 0.0
    chain[..., diagonal, diagonal] = -chain.sum(-1)
    # pi Q = 0 has one equation too many; the sum of pi takes its place.
    system = np.swapaxes(chain, -1, -2).copy()
    system[..., -1, :] = 1.0
    right = np.zeros((*rates.shape[:-1], 1))
    right[..., -1, 0] = 1.0
    shares = np.linalg.solve(system, right)[..., 0]
    logarithms = np.log(np.maximum(shares, np.finfo(float).tiny))
    return logarithms - logarithms.mean(-1, keepdims=True)


def _columns(lists: Lists) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.ascontiguousarray(lists.winners, np.int64),
        np.ascontiguousarray(lists.starts, np.int64),
        np.ascontiguousarray(lists.losers, np.int64),
        np.ascontiguousarray(lists.weights, np.float64),
    )


@njit(cache=True)
def _list_rates(
    winners: np.ndarray,
    starts: np.ndarray,
    losers: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
    models: int,
) -> np.ndarray:
    rates = np.zeros((models, models))
    for k in range(len(winners)):
        total = weights[winners[k]]
        for place in range(starts[k], starts[k + 1]):
            total += weights[losers[place]]
        for place in range(starts[k], starts[k + 1]):
            rates[losers[place], winners[k]] += counts[k] / total
    return rates
