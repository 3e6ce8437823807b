"""Other ways to turn measurements into a ranking, to compare Plackett-Luce with.

All take :class:`~gossamer.evaluate.comparisons.Scores` (or pairwise wins) and return one number a
model; higher is better.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from gossamer.evaluate.comparisons import Scores, wins_of

ELO_START, ELO_SCALE, ELO_STEP = 1000.0, 400.0, 4.0


def mean_score(scores: Scores, datasets: np.ndarray | None = None) -> np.ndarray:
    """The mean over data sets of mean scores, each data set brought to 0 to 1 by its own range.

    Args:
        scores: the measurements.
        datasets: the data set of each sample, ``[samples]``, from 0. Default: all are one, and
            scores are taken as they are.

    Returns:
        ``[models]``; NaN for a model without measurements.
    """
    if datasets is None:
        return _mean(scores.models, scores.values, scores.count)
    at, means = datasets[scores.samples], []
    for dataset in np.unique(at):
        here = at == dataset
        values = scores.values[here]
        spread = float(np.ptp(values)) or 1.0
        means.append(_mean(scores.models[here], (values - values.min()) / spread, scores.count))
    table = np.stack(means)
    known = ~np.isnan(table)
    return np.where(known, table, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def _mean(models: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    number = np.bincount(models, minlength=count).astype(float)
    total = np.bincount(models, values, minlength=count)
    return total / np.where(number > 0, number, np.nan)


def borda(scores: Scores) -> np.ndarray:
    """Mean share of the other models of a sample that a model is above (half for ties)."""
    return _positions(scores, False)


def dowdall(scores: Scores) -> np.ndarray:
    """Mean of one over the rank (ties share the mean rank)."""
    return _positions(scores, True)


def _positions(scores: Scores, harmonic: bool) -> np.ndarray:
    points = _points(scores.starts, scores.values, harmonic)
    known = ~np.isnan(points)
    return _mean(scores.models[known], points[known], scores.count)


@njit(cache=True)
def _points(starts: np.ndarray, values: np.ndarray, harmonic: bool) -> np.ndarray:
    points = np.full(len(values), np.nan)
    for sample in range(len(starts) - 1):
        size = starts[sample + 1] - starts[sample]
        if size < 2:
            continue
        for i in range(starts[sample], starts[sample + 1]):
            below, same = 0, 0
            for j in range(starts[sample], starts[sample + 1]):
                below += values[j] < values[i]
                same += values[j] == values[i]
            if harmonic:
                points[i] = 1.0 / (size - below - (same - 1) / 2.0)
            else:
                points[i] = (below + (same - 1) / 2.0) / (size - 1)
    return points


def win_rate(wins: np.ndarray) -> np.ndarray:
    """Share of comparisons won, ``[models]``; NaN for a model that was never compared."""
    total = wins.sum(1) + wins.sum(0)
    return wins.sum(1) / np.where(total > 0, total, np.nan)


def elo(scores: Scores, *, seed: int = 0, step: float = ELO_STEP) -> np.ndarray:
    """Elo ratings, updated comparison by comparison in a random order of the samples.

    The result depends on the order. Ties count half.

    Args:
        scores: the measurements.
        seed: of the order.
        step: how far one comparison moves a rating (K).
    """
    order = np.random.default_rng(seed).permutation(len(scores))
    return _elo(scores.starts, scores.models, scores.values, order, scores.count, step)


@njit(cache=True)
def _elo(
    starts: np.ndarray,
    models: np.ndarray,
    values: np.ndarray,
    order: np.ndarray,
    count: int,
    step: float,
) -> np.ndarray:
    ratings = np.full(count, ELO_START)
    for sample in order:
        for i in range(starts[sample], starts[sample + 1]):
            for j in range(i + 1, starts[sample + 1]):
                a, b = models[i], models[j]
                expected = 1.0 / (1.0 + 10.0 ** ((ratings[b] - ratings[a]) / ELO_SCALE))
                got = 1.0 if values[i] > values[j] else 0.0 if values[i] < values[j] else 0.5
                ratings[a] += step * (got - expected)
                ratings[b] -= step * (got - expected)
    return ratings


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Bradley-Terry by logistic regression without intercept and penalty, on the scale of Elo.

    Args:
        wins: ``[models, models]``, a tie counting the same for both sides.

    Returns:
        ``400 coefficient / ln 10 + 1000`` with mean 1000.
    """
    from sklearn.linear_model import LogisticRegression

    first, second = np.triu_indices(len(wins), 1)
    design = np.zeros((len(first), len(wins)))
    design[np.arange(len(first)), first] = 1.0
    design[np.arange(len(first)), second] = -1.0
    weights = np.concatenate([wins[first, second], wins[second, first]])
    labels = np.repeat([1, 0], len(first))
    kept = weights > 0
    model = LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10, max_iter=1000)
    model.fit(np.concatenate([design, design])[kept], labels[kept], sample_weight=weights[kept])
    coefficients = model.coef_[0] - model.coef_[0].mean()
    return ELO_SCALE * coefficients / np.log(10) + ELO_START


def bradley_terry_of(scores: Scores) -> np.ndarray:
    """Bradley-Terry with wins counting 2 and ties 1 for either side, as arenas fit it."""
    return bradley_terry(2 * wins_of(scores, ties=0.5))
