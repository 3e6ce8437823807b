"""Scores of any kind as comparisons: who did better than whom on which sample.

Accuracy, BLEU and votes of a judge cannot be averaged, but on one sample each of them puts the
models that were measured into an order. Wins add up over samples, so counts of new results are
added to those of old ones. A tie counts ``ties`` for either side: 1 as ONEBench's code has it, .5
as arenas do. A sample of m models has m (m - 1) / 2 pairs; weights keep samples that many models
saw from drowning the others.

Source: Ghosh et al., "ONEBench to Test Them All", ACL 2025 (arXiv:2412.06745).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numba import njit

from gossamer.core.errors import InputError
from gossamer.evaluate.plackett_luce import Lists

Weighting = Literal["pairs", "models", "samples"]


@dataclass(frozen=True)
class Scores:
    """Measurements grouped by sample; higher is better.

    Attributes:
        starts: where each sample's measurements begin, ``[samples + 1]``.
        models: model numbers ``[measurements]``.
        values: scores ``[measurements]``, comparable within a sample only.
        count: how many models there are.
    """

    starts: np.ndarray
    models: np.ndarray
    values: np.ndarray
    count: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def of(
        cls, samples: np.ndarray, models: np.ndarray, values: np.ndarray, count: int | None = None
    ) -> Scores:
        """Groups measurements.

        Args:
            samples: sample numbers ``[measurements]``, from 0.
            models: model numbers ``[measurements]``, from 0.
            values: scores ``[measurements]``; those that are not numbers are left out.
            count: how many models there are. Default: as many as occur.

        Raises:
            InputError: if lengths differ, or a model has two scores on a sample.
        """
        samples, models = np.asarray(samples, np.int64), np.asarray(models, np.int64)
        values = np.asarray(values, float)
        if not len(samples) == len(models) == len(values):
            raise InputError("samples, models and scores differ in length")
        known = ~np.isnan(values)
        samples, models, values = samples[known], models[known], values[known]
        order = np.lexsort((models, samples))
        samples, models, values = samples[order], models[order], values[order]
        if len(samples) > 1:
            twice = (np.diff(samples) == 0) & (np.diff(models) == 0)
            if twice.any():
                at = int(np.flatnonzero(twice)[0])
                raise InputError(
                    f"model {models[at]} has two scores on sample {samples[at]}; keep one"
                )
        size = int(samples[-1]) + 1 if len(samples) else 0
        starts = np.searchsorted(samples, np.arange(size + 1))
        most = int(models.max()) + 1 if len(models) else 0
        return cls(starts.astype(np.int64), models, values, most if count is None else count)

    @classmethod
    def of_matrix(cls, matrix: np.ndarray) -> Scores:
        """From ``[models, samples]`` with NaN where nothing was measured."""
        samples, models = np.nonzero(~np.isnan(matrix.T))
        found = cls.of(samples, models, matrix.T[samples, models], len(matrix))
        missing = matrix.shape[1] - len(found)
        starts = np.concatenate([found.starts, np.full(missing, found.starts[-1])])
        return cls(starts, found.models, found.values, found.count)

    def matrix(self) -> np.ndarray:
        """``[models, samples]`` with NaN where nothing was measured."""
        matrix = np.full((self.count, len(self)), np.nan)
        matrix[self.models, self.samples] = self.values
        return matrix

    @property
    def samples(self) -> np.ndarray:
        """The sample of each measurement."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))


def wins_of(
    scores: Scores,
    *,
    ties: float = 1.0,
    weighting: Weighting = "pairs",
    times: np.ndarray | None = None,
) -> np.ndarray:
    """How often each model did better than each other one.

    Args:
        scores: the measurements.
        ties: what a tie counts for either side.
        weighting: what a sample of m models counts: each of its pairs 1 ("pairs"), 1 / (m - 1)
            ("models": each model as much as in any other sample), or its pairs 1 together
            ("samples").
        times: how often each sample counts, ``[samples]``; for a bootstrap.

    Returns:
        ``[models, models]``: the row above the column. Cost grows with the number of pairs.

    Raises:
        InputError: if ``ties`` is negative.
    """
    if ties < 0:
        raise InputError(f"a tie counts {ties:g}; 0 or more is needed")
    sizes = np.diff(scores.starts).astype(float)
    weights = np.ones(len(scores)) if times is None else np.asarray(times, float)
    if weighting == "models":
        weights = weights / np.maximum(sizes - 1, 1)
    elif weighting == "samples":
        weights = weights / np.maximum(sizes * (sizes - 1) / 2, 1)
    return _wins(scores.starts, scores.models, scores.values, weights, ties, scores.count)


def choices_of(scores: Scores) -> Lists:
    """Each sample as choices: every best model against all that are worse, then the same below.

    With scores of two values these are the choices of each right model against all wrong ones.
    Samples on which all models tie choose nothing.
    """
    order = np.lexsort((-scores.values, scores.samples))
    winners, starts, losers = _choices(scores.starts, scores.models[order], scores.values[order])
    return Lists(winners, starts, losers, np.ones(len(winners)))


@njit(cache=True)
def _wins(
    starts: np.ndarray,
    models: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray,
    ties: float,
    count: int,
) -> np.ndarray:
    wins = np.zeros((count, count))
    for sample in range(len(starts) - 1):
        weight = weights[sample]
        if weight == 0.0:
            continue
        for i in range(starts[sample], starts[sample + 1]):
            for j in range(i + 1, starts[sample + 1]):
                if values[i] > values[j]:
                    wins[models[i], models[j]] += weight
                elif values[i] < values[j]:
                    wins[models[j], models[i]] += weight
                else:
                    wins[models[i], models[j]] += ties * weight
                    wins[models[j], models[i]] += ties * weight
    return wins


@njit(cache=True)
def _choices(
    starts: np.ndarray, models: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Winners, starts and losers; the measurements of a sample come best first."""
    lists, total = _fill(starts, models, values, models[:0], starts[:0], models[:0])
    winners, losers = np.empty(lists, np.int64), np.empty(total, np.int64)
    begins = np.zeros(lists + 1, np.int64)
    _fill(starts, models, values, winners, begins, losers)
    return winners, begins, losers


@njit(cache=True)
def _fill(
    starts: np.ndarray,
    models: np.ndarray,
    values: np.ndarray,
    winners: np.ndarray,
    begins: np.ndarray,
    losers: np.ndarray,
) -> tuple[int, int]:
    """Fills the lists, or only counts them and their losers where there is no room."""
    lists, total, room = 0, 0, len(begins) > 0
    for sample in range(len(starts) - 1):
        stop = starts[sample + 1]
        for i in range(starts[sample], stop):
            below = i + 1
            while below < stop and values[below] == values[i]:
                below += 1
            if below == stop:
                break
            if room:
                winners[lists] = models[i]
                losers[total : total + stop - below] = models[below:stop]
                begins[lists + 1] = total + stop - below
            lists += 1
            total += stop - below
    return lists, total
