"""Greedy choice of a subset that represents, covers or spreads over the whole.

Three set functions on a similarity of all pairs: facility location (everybody has a near
representative), graph cut (near to what is left, far from what is chosen) and log-determinant
(the chosen span a large volume). Each keeps what the next gain needs, so a step costs one row of
the similarity; the engines differ in how many gains they look at. Rows of the similarity are
computed when they are needed where the whole does not fit.

Nemhauser, Wolsey & Fisher 1978 (greedy); Minoux 1978 (lazy); Mirzasoleiman et al., "Lazier than
lazy greedy", 2015 (stochastic); Iyer & Bilmes 2013 (graph cut).
"""

from __future__ import annotations

import heapq
from typing import Literal, Protocol

import numpy as np

from gossamer.core.errors import InputError
from gossamer.parts.neighbours import normalised

STORED = 8192
"""Points up to which the similarity of all pairs is kept (512 MiB in double)."""

Engine = Literal["naive", "lazy", "stochastic"]


class Similarity(Protocol):
    """Similarity of all pairs, a row at a time."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> np.ndarray:
        """``[n]`` float64."""
        ...

    def sums(self) -> np.ndarray:
        """Sum of each row, ``[n]``."""
        ...


class Dense:
    """A similarity that was computed.

    Args:
        matrix: ``[n, n]``, symmetric.
    """

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = np.asarray(matrix, dtype=np.float64)
        if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise InputError(f"a similarity is square, not {list(self.matrix.shape)}")

    def __len__(self) -> int:
        return len(self.matrix)

    def row(self, index: int) -> np.ndarray:
        return self.matrix[index]

    def sums(self) -> np.ndarray:
        return self.matrix.sum(0)


class Cosine:
    """``0.5 + 0.5 cos`` of features, in [0, 1]; rows of zeros have cosine 0 with all.

    Args:
        features: ``[n, d]``.
    """

    def __init__(self, features: np.ndarray) -> None:
        self.unit = normalised(features).astype(np.float64)

    def __len__(self) -> int:
        return len(self.unit)

    def row(self, index: int) -> np.ndarray:
        return 0.5 + 0.5 * (self.unit @ self.unit[index])

    def sums(self) -> np.ndarray:
        # The sum over all pairs needs no pair: cosines add up along the features.
        return 0.5 * len(self.unit) + 0.5 * (self.unit @ self.unit.sum(0))


def cosine(features: np.ndarray) -> Similarity:
    """The cosine similarity of features, stored if they are few."""
    found = Cosine(features)
    if len(found) > STORED:
        return found
    return Dense(0.5 + 0.5 * (found.unit @ found.unit.T))


class SetFunction(Protocol):
    """A function of a growing set, by the gain of each candidate."""

    def gains(self) -> np.ndarray:
        """What adding each point would gain, ``[n]``; chosen points included."""
        ...

    def gain(self, index: int) -> float:
        """What adding one point would gain."""
        ...

    def add(self, index: int) -> None:
        """Adds a point."""
        ...


class GraphCut:
    """``lambda * sum_{j} s(j, x) - 2 sum_{j chosen} s(j, x)``: not monotone.

    Args:
        similarity: of all pairs.
        weight: lambda, of representing the whole.
    """

    def __init__(self, similarity: Similarity, *, weight: float = 1.0) -> None:
        self.similarity = similarity
        self._gains = weight * similarity.sums()

    def gains(self) -> np.ndarray:
        return self._gains

    def gain(self, index: int) -> float:
        return float(self._gains[index])

    def add(self, index: int) -> None:
        self._gains = self._gains - 2.0 * self.similarity.row(index)


class FacilityLocation:
    """``sum_j max_{x chosen} s(j, x)``: monotone and submodular for non-negative similarities.

    Args:
        similarity: of all pairs.
    """

    def __init__(self, similarity: Similarity) -> None:
        self.similarity = similarity
        self.best = np.zeros(len(similarity))

    def gains(self) -> np.ndarray:
        if isinstance(self.similarity, Dense):
            return np.maximum(self.similarity.matrix - self.best, 0.0).sum(1)
        return np.array([self.gain(index) for index in range(len(self.best))])

    def gain(self, index: int) -> float:
        return float(np.maximum(self.similarity.row(index) - self.best, 0.0).sum())

    def add(self, index: int) -> None:
        self.best = np.maximum(self.best, self.similarity.row(index))


class LogDeterminant:
    """``log det(S_chosen + ridge I)``: the gain is the log of what the chosen leave unexplained.

    The Cholesky factor grows by a row each step (Chen, Zhang & Zhou, "Fast Greedy MAP Inference
    for Determinantal Point Process", 2018).

    Args:
        similarity: of all pairs, positive semi-definite.
        ridge: added to the diagonal.
    """

    def __init__(self, similarity: Similarity, *, ridge: float = 1e-6) -> None:
        self.similarity = similarity
        diagonal = (
            np.diag(similarity.matrix)
            if isinstance(similarity, Dense)
            else np.ones(len(similarity))
        )
        self.left = diagonal + ridge
        self.factors: list[np.ndarray] = []

    def gains(self) -> np.ndarray:
        return np.log(np.maximum(self.left, 1e-300))

    def gain(self, index: int) -> float:
        return float(np.log(max(self.left[index], 1e-300)))

    def add(self, index: int) -> None:
        row = self.similarity.row(index).astype(np.float64)
        if self.factors:
            known = np.stack(self.factors)
            row = row - known[:, index] @ known
        factor = row / np.sqrt(max(self.left[index], 1e-300))
        self.left = self.left - factor * factor
        self.factors.append(factor)


def greedy(
    function: SetFunction,
    size: int,
    count: int,
    *,
    engine: Engine = "naive",
    epsilon: float = 0.1,
    seed: int = 0,
) -> np.ndarray:
    """Adds the point of largest gain until the set is full.

    Args:
        function: of the growing set; used up.
        size: how many points there are.
        count: how many to choose.
        engine: "naive" looks at all gains in each step; "lazy" only at those whose last known gain
            could be the largest (the same set where gains only fall: facility location and
            log-determinant; graph cut too, whose gains only fall for non-negative similarities);
            "stochastic" at a random sample of ``size / count * ln(1 / epsilon)``.
        epsilon: of "stochastic".
        seed: of "stochastic".

    Returns:
        Points in the order of choice; ties go to the lower index.

    Raises:
        InputError: if more are wanted than there are.
    """
    if not 0 <= count <= size:
        raise InputError(f"{count} of {size} points cannot be chosen")
    chosen = np.empty(count, dtype=np.int64)
    free = np.ones(size, dtype=bool)
    match engine:
        case "naive":
            for step in range(count):
                gains = np.where(free, function.gains(), -np.inf)
                chosen[step] = _take(function, free, int(gains.argmax()))
        case "lazy":
            heap = [(-gain, index) for index, gain in enumerate(function.gains())]
            heapq.heapify(heap)
            for step in range(count):
                while True:
                    _, index = heapq.heappop(heap)
                    now = -function.gain(index)
                    # Its gain may have fallen since; it wins if it still leads.
                    if not heap or (now, index) <= heap[0]:
                        break
                    heapq.heappush(heap, (now, index))
                chosen[step] = _take(function, free, index)
        case "stochastic":
            random = np.random.default_rng(seed)
            looked = max(1, round(size / max(1, count) * np.log(1.0 / epsilon)))
            for step in range(count):
                left = np.flatnonzero(free)
                some = np.sort(random.choice(left, min(looked, len(left)), replace=False))
                gains = np.array([function.gain(int(index)) for index in some])
                chosen[step] = _take(function, free, int(some[gains.argmax()]))
    return chosen


def _take(function: SetFunction, free: np.ndarray, index: int) -> int:
    function.add(index)
    free[index] = False
    return index
