"""When units go: the share removed as a function of the fraction of pruning done.

- :func:`one_shot`: everything at once.
- :func:`iterative`: the same share of the survivors in every round.
- :func:`cubic`: fast first, then slower: Zhu & Gupta, "To prune, or not to prune", 2017, eq. 1.
"""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[float], float]
"""Fraction of pruning done (0..1) to the share of units that is gone by then."""


def one_shot(final: float) -> Schedule:
    """All at once, at the start."""

    def share(fraction: float) -> float:
        return final

    return share


def iterative(final: float) -> Schedule:
    """The same share of the survivors each time: 1 - (1 - final)^fraction."""

    def share(fraction: float) -> float:
        return 1.0 - (1.0 - final) ** min(1.0, max(0.0, fraction))

    return share


def cubic(final: float, *, initial: float = 0.0) -> Schedule:
    """final + (initial - final) (1 - fraction)^3."""

    def share(fraction: float) -> float:
        return final + (initial - final) * (1.0 - min(1.0, max(0.0, fraction))) ** 3

    return share


SCHEDULES: dict[str, Callable[[float], Schedule]] = {
    "one-shot": one_shot,
    "iterative": iterative,
    "cubic": cubic,
}
"""Schedules by the names that recipes use."""
