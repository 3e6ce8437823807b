"""Rank models on any part of a pool of evaluation samples.

Every sample is an ordinal comparison of the models that were measured on it, whatever the metric
and however many models are missing; a Plackett-Luce model is fitted to all of them. Intervals come
from a bootstrap over samples (not over pairs, which are not independent), and models whose
intervals overlap share a rank range.

Source: Ghosh et al., "ONEBench to Test Them All: Sample-Level Benchmarking Over Open-Ended
Capabilities", ACL 2025 (arXiv:2412.06745). Bootstrap and weighting are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gossamer.core.errors import InputError
from gossamer.evaluate.comparisons import Scores, Weighting, choices_of, wins_of
from gossamer.evaluate.plackett_luce import check_connected, fit_lists, fit_pairs, is_connected
from gossamer.evaluate.ranking_baselines import (
    borda,
    bradley_terry_of,
    dowdall,
    elo,
    mean_score,
    win_rate,
)

Method = Literal["pl", "pl-choices", "bt", "elo", "borda", "dowdall", "mean", "win-rate"]
FEW = 100
"""A ranking from fewer samples is worth little without its intervals."""
REGULARISED = 0.01
"""For draws of a bootstrap that leave some model without a win or a loss."""


@dataclass(frozen=True)
class Ranking:
    """Models from best to worst.

    Attributes:
        models: names.
        utility: of each, highest first.
        low: lower end of the 95 % interval of the utility (NaN without a bootstrap).
        high: upper end.
        best_rank: the rank if every model whose interval overlaps were worse, from 1.
        worst_rank: the rank if they all were better.
        samples: how many samples each model was measured on.
        method: that made the utilities.
        remarks: what a reader should know, in sentences.
    """

    models: tuple[str, ...]
    utility: np.ndarray
    low: np.ndarray
    high: np.ndarray
    best_rank: np.ndarray
    worst_rank: np.ndarray
    samples: np.ndarray
    method: str
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The ranking as JSON values."""

        def number(value: float) -> float | None:
            return None if np.isnan(value) else float(value)

        return {
            "method": self.method,
            "models": [
                {
                    "model": name, "utility": number(self.utility[k]), "low": number(self.low[k]),
                    "high": number(self.high[k]), "best_rank": int(self.best_rank[k]),
                    "worst_rank": int(self.worst_rank[k]), "samples": int(self.samples[k]),
                }
                for k, name in enumerate(self.models)
            ],
            "remarks": list(self.remarks),
        }  # fmt: skip


def rank(
    scores: Scores,
    models: Sequence[str] | None = None,
    *,
    method: Method = "pl",
    ties: float = 1.0,
    alpha: float = 0.0,
    weighting: Weighting = "pairs",
    anchor: str | None = None,
    bootstrap: int = 200,
    datasets: np.ndarray | None = None,
    seed: int = 0,
) -> Ranking:
    """Ranks models by their scores on samples.

    Args:
        scores: the measurements.
        models: names. Default: their numbers.
        method: "pl" (Plackett-Luce on pairs), "pl-choices" (on choices of one among several), "bt"
            (logistic regression), "elo", "borda", "dowdall", "mean" or "win-rate".
        ties: what a tie counts for either side ("pl").
        alpha: regularisation of "pl" and "pl-choices"; needed where models are not connected by
            wins both ways.
        weighting: of samples, see :func:`~gossamer.evaluate.comparisons.wins_of`.
        anchor: a model whose utility is put at 0. Default: the mean of all is 0 (for "pl").
        bootstrap: draws of samples for the intervals; 0 for none.
        datasets: the data set of each sample, for "mean".
        seed: of the draws, and of the order for "elo".

    Raises:
        InputError: if there are fewer than two models, or an option is out of range.
        NotIdentifiable: if wins do not determine the utilities and ``alpha`` is 0.
    """
    names = tuple(str(k) for k in range(scores.count)) if models is None else tuple(models)
    if len(names) != scores.count:
        raise InputError(f"{len(names)} names for {scores.count} models")
    if scores.count < 2:
        raise InputError(
            f"only {names[0] if names else 'no model'} was measured; a ranking needs two models"
        )
    if bootstrap < 0:
        raise InputError(f"{bootstrap} draws of a bootstrap; 0 or more are needed")
    if anchor is not None and anchor not in names:
        raise InputError(f"there is no model {anchor!r} to put at 0; there are {', '.join(names)}")
    sizes = np.diff(scores.starts)
    if not (sizes > 1).any():
        raise InputError("no sample was answered by two models, so nothing can be compared")
    if method == "pl" and alpha == 0:
        check_connected(wins_of(scores, ties=ties), names)
    utility = _fit(scores, method, ties, alpha, weighting, datasets, seed)
    draws = np.empty((0, scores.count))
    remarks = _remarks(scores, sizes, names)
    if bootstrap:
        draws = _draws(
            scores, method, ties, alpha, weighting, datasets, seed, bootstrap, utility, remarks
        )
    if anchor is not None:
        at = names.index(anchor)
        utility, draws = utility - utility[at], draws - draws[:, at : at + 1]
    if bootstrap:
        low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    else:
        low = high = np.full(scores.count, np.nan)
    order = np.argsort(-np.where(np.isnan(utility), -np.inf, utility), kind="stable")
    best, worst = _rank_ranges(utility, low, high, bool(bootstrap))
    return Ranking(
        tuple(names[k] for k in order), utility[order], low[order], high[order], best[order],
        worst[order], np.bincount(scores.models, minlength=scores.count)[order], method,
        tuple(remarks),
    )  # fmt: skip


def _fit(
    scores: Scores,
    method: Method,
    ties: float,
    alpha: float,
    weighting: Weighting,
    datasets: np.ndarray | None,
    seed: int,
) -> np.ndarray:
    plain: dict[str, Callable[[], np.ndarray]] = {
        "pl": lambda: fit_pairs(wins_of(scores, ties=ties, weighting=weighting), alpha=alpha),
        "pl-choices": lambda: fit_lists(choices_of(scores), scores.count, alpha=alpha),
        "bt": lambda: bradley_terry_of(scores),
        "elo": lambda: elo(scores, seed=seed),
        "borda": lambda: borda(scores),
        "dowdall": lambda: dowdall(scores),
        "mean": lambda: mean_score(scores, datasets),
        "win-rate": lambda: win_rate(wins_of(scores, ties=0.5, weighting=weighting)),
    }
    if method not in plain:
        raise InputError(f"there is no method {method!r}; there are {', '.join(plain)}")
    return plain[method]()


def _draws(
    scores: Scores,
    method: Method,
    ties: float,
    alpha: float,
    weighting: Weighting,
    datasets: np.ndarray | None,
    seed: int,
    bootstrap: int,
    utility: np.ndarray,
    remarks: list[str],
) -> np.ndarray:
    random = np.random.default_rng(seed)
    size = len(scores)
    if method != "pl":
        found = []
        for draw in range(bootstrap):
            chosen = random.integers(0, size, size)
            part = _taken(scores, chosen)
            found.append(
                _fit(
                    part, method, ties, max(alpha, REGULARISED), weighting,
                    None if datasets is None else datasets[chosen], seed + draw,
                )
            )  # fmt: skip
        return np.stack(found)
    wins = np.stack(
        [
            wins_of(
                scores, ties=ties, weighting=weighting,
                times=np.bincount(random.integers(0, size, size), minlength=size),
            )
            for _ in range(bootstrap)
        ]
    )  # fmt: skip
    if alpha == 0:
        apart = np.array([not is_connected(matrix) for matrix in wins])
        if apart.any():
            remarks.append(
                f"{int(apart.sum())} of {bootstrap} draws left some model without a win or a loss; "
                f"they were regularised (alpha {REGULARISED}), so its interval is too narrow."
            )
        found = np.empty((bootstrap, scores.count))
        for which, strength in ((~apart, 0.0), (apart, REGULARISED)):
            if which.any():
                start = np.broadcast_to(utility, (int(which.sum()), scores.count))
                found[which] = fit_pairs(wins[which], alpha=strength, start=start)
        return found
    return fit_pairs(wins, alpha=alpha, start=np.broadcast_to(utility, (bootstrap, scores.count)))


def _taken(scores: Scores, chosen: np.ndarray) -> Scores:
    """Some samples, each as often as it was chosen."""
    sizes = np.diff(scores.starts)[chosen]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    places = np.repeat(scores.starts[chosen] - starts[:-1], sizes) + np.arange(starts[-1])
    return Scores(starts, scores.models[places], scores.values[places], scores.count)


def _rank_ranges(
    utility: np.ndarray, low: np.ndarray, high: np.ndarray, known: bool
) -> tuple[np.ndarray, np.ndarray]:
    if not known:
        low = high = utility
    above = low[None, :] > high[:, None]  # surely better than the row
    below = high[None, :] < low[:, None]
    return 1 + above.sum(1), len(utility) - below.sum(1)


def _remarks(scores: Scores, sizes: np.ndarray, names: Sequence[str]) -> list[str]:
    found = []
    compared = int((sizes > 1).sum())
    if compared < FEW:
        found.append(f"Only {compared} samples were answered by two or more models.")
    if not wins_of(scores, ties=0.0).any():
        found.append("Every comparison is a tie, so nothing orders the models.")
    lonely = np.setdiff1d(np.arange(scores.count), scores.models[np.repeat(sizes > 1, sizes)])
    if len(lonely):
        found.append(f"Never compared with any other: {', '.join(names[int(k)] for k in lonely)}.")
    return found
