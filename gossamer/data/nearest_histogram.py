"""A histogram of which samples private ones are nearest to, made private with noise.

Lin et al., "Differentially Private Synthetic Data via Foundation Model APIs 1: Images", ICLR 2024,
arXiv:2305.15560, Algorithm 2. Adding or removing one private sample changes the histogram by an
L2 norm of at most 1; nothing else here looks at private data.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from gossamer.core.errors import InputError
from gossamer.parts.neighbours import Metric, normalised

Selection = Literal["sample", "rank"]

BLOCK_VALUES = 1 << 22


def nearest_rows(
    private: np.ndarray, synthetic: np.ndarray, *, count: int = 1, metric: Metric = "euclidean"
) -> np.ndarray:
    """The ``count`` nearest synthetic samples of each private one; ties go to the lower index.

    A matrix product's rounding depends on a sample's place among the others, which would make one
    person's vote depend on another's presence. So every sample that rounding could have put among
    the nearest is compared again, one by one in double precision.

    Args:
        private: embeddings ``[m, d]``.
        synthetic: embeddings ``[n, d]``.
        count: neighbours, at most ``n``.
        metric: "euclidean", "cosine" or "inner".

    Returns:
        ``[m, count]`` int64.
    """
    left = np.asarray(private, dtype=np.float32)
    right = np.asarray(synthetic, dtype=np.float32)
    if not 1 <= count <= len(right) or left.shape[1:] != right.shape[1:]:
        raise InputError(
            f"{count} neighbours are asked of {list(right.shape)} for {list(left.shape)}"
        )
    if metric == "cosine":
        left, right = normalised(left), normalised(right)
    squares = np.square(right).sum(1) * (metric != "inner")
    reach = float(np.linalg.norm(right, axis=1).max())
    found = np.empty((len(left), count), dtype=np.int64)
    block = max(1, BLOCK_VALUES // len(right))
    for start in range(0, len(left), block):
        part = left[start : start + block]
        # Up to a number for each row, half of the squared distance, or minus the product.
        far = 0.5 * squares - part @ right.T
        last = far.min(1) if count == 1 else np.partition(far, count - 1, axis=1)[:, count - 1]
        sizes = (np.linalg.norm(part, axis=1) + reach) ** 2
        slack = 4.0 * (part.shape[1] + 4) * np.finfo(np.float32).eps * sizes
        rows, columns = np.nonzero(far <= (last + slack)[:, None])
        one, other = part[rows].astype(np.float64), right[columns].astype(np.float64)
        exact = -(one * other).sum(1) if metric == "inner" else np.square(one - other).sum(1)
        order = np.lexsort((columns, exact, rows))
        first = np.searchsorted(rows, np.arange(len(part)))
        found[start : start + block] = columns[order[first[:, None] + np.arange(count)]]
    return found


def count_votes(
    private: np.ndarray,
    synthetic: np.ndarray,
    *,
    neighbours: int = 1,
    metric: Metric = "euclidean",
    private_labels: np.ndarray | None = None,
    synthetic_labels: np.ndarray | None = None,
) -> np.ndarray:
    """How many private samples have each synthetic sample among their nearest.

    Args:
        private: embeddings ``[m, d]``.
        synthetic: embeddings ``[n, d]``.
        neighbours: votes of each private sample.
        metric: of the nearest.
        private_labels: ``[m]``; samples vote within their class.
        synthetic_labels: ``[n]``.

    Returns:
        Whole counts ``[n]`` float64; one private sample changes ``neighbours`` of them by 1, so
        they change by an L2 norm of ``sqrt(neighbours)``.
    """
    rows = _votes(private, synthetic, neighbours, metric, private_labels, synthetic_labels)
    return np.bincount(rows.ravel(), minlength=len(synthetic)).astype(np.float64)


def count_client_votes(
    private: np.ndarray,
    synthetic: np.ndarray,
    clients: np.ndarray,
    *,
    neighbours: int = 1,
    metric: Metric = "euclidean",
    private_labels: np.ndarray | None = None,
    synthetic_labels: np.ndarray | None = None,
) -> np.ndarray:
    """Like :func:`count_votes`, with every client's votes scaled to an L2 norm of 1.

    A client's samples in all classes are one vector, so that adding or removing *all of a client's
    samples* changes the result by an L2 norm of 1.

    Args:
        private: embeddings ``[m, d]``.
        synthetic: embeddings ``[n, d]``.
        clients: whose sample each is, ``[m]``.
        neighbours: votes of each private sample.
        metric: of the nearest.
        private_labels: ``[m]``; samples vote within their class.
        synthetic_labels: ``[n]``.

    Returns:
        ``[n]`` float64.
    """
    rows = _votes(private, synthetic, neighbours, metric, private_labels, synthetic_labels)
    _, owner = np.unique(clients, return_inverse=True)
    cells = np.repeat(owner, neighbours) * len(synthetic) + rows.ravel()
    cells, votes = np.unique(cells, return_counts=True)
    who, where = np.divmod(cells, len(synthetic))
    lengths = np.sqrt(np.bincount(who, np.square(votes, dtype=np.float64)))
    return np.bincount(where, votes / lengths[who], minlength=len(synthetic))


def nearest_histogram(
    private: np.ndarray,
    synthetic: np.ndarray,
    *,
    neighbours: int = 1,
    metric: Metric = "euclidean",
    private_labels: np.ndarray | None = None,
    synthetic_labels: np.ndarray | None = None,
) -> np.ndarray:
    """The histogram without noise, ``[n]``: votes worth ``1 / sqrt(neighbours)``.

    It is as private as the data: it must not be logged or kept.

    Args:
        private: embeddings ``[m, d]``.
        synthetic: embeddings ``[n, d]``.
        neighbours: votes of each private sample.
        metric: of the nearest.
        private_labels: ``[m]``; samples vote within their class.
        synthetic_labels: ``[n]``.
    """
    counts = count_votes(
        private, synthetic, neighbours=neighbours, metric=metric,
        private_labels=private_labels, synthetic_labels=synthetic_labels,
    )  # fmt: skip
    return counts / math.sqrt(neighbours)


def _votes(
    private: np.ndarray,
    synthetic: np.ndarray,
    neighbours: int,
    metric: Metric,
    private_labels: np.ndarray | None,
    synthetic_labels: np.ndarray | None,
) -> np.ndarray:
    if (private_labels is None) != (synthetic_labels is None):
        raise InputError("either both sides have labels, or none")
    if neighbours < 1:
        raise InputError(f"a private sample has at least 1 vote, not {neighbours}")
    if private_labels is None or synthetic_labels is None:
        return nearest_rows(private, synthetic, count=neighbours, metric=metric)
    rows = np.empty((len(private), neighbours), dtype=np.int64)
    for label in np.unique(private_labels):
        mine = np.flatnonzero(private_labels == label)
        others = np.flatnonzero(synthetic_labels == label)
        if len(others) < neighbours:
            raise InputError(
                f"class {label} has {len(others)} synthetic samples for {neighbours} votes of each "
                "private one; ask for more samples"
            )
        rows[mine] = others[
            nearest_rows(private[mine], synthetic[others], count=neighbours, metric=metric)
        ]
    return rows


def thresholded(noisy: np.ndarray, threshold: float | None) -> np.ndarray:
    """``max(h, H) - H``: weights in which bins below the threshold have none.

    Args:
        noisy: histogram ``[n]``.
        threshold: H; None leaves negative bins as they are.
    """
    return noisy.copy() if threshold is None else np.maximum(noisy, threshold) - threshold


def select_rows(
    weights: np.ndarray,
    count: int,
    *,
    how: Selection = "sample",
    random: np.random.Generator,
) -> tuple[np.ndarray, bool]:
    """Draws parents by their weights.

    Args:
        weights: ``[n]``; negative ones count as 0 when sampled.
        count: parents; more than ``n`` in "rank" begins again at the top.
        how: "sample" with replacement by weight, or "rank": the heaviest, ties to the lower index.
        random: of the draw.

    Returns:
        Rows ``[count]``, and whether no weight was left, so that all were drawn alike.
    """
    if how == "rank":
        order = np.argsort(-weights, kind="stable")
        return np.resize(order, count), False
    chances = np.maximum(weights, 0.0)
    total = chances.sum()
    if total <= 0.0:
        return random.integers(0, len(weights), count), True
    return random.choice(len(weights), count, p=chances / total), False
