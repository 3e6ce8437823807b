"""The Pareto front: what nothing else beats in everything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def undominated(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other one is as good as in everything and better than in something.

    Args:
        points: the smaller, the better, in each coordinate.
    """
    values = np.array(points, dtype=float)
    return [not bool(((values <= own).all(1) & (values < own).any(1)).any()) for own in values]
