"""Coresets: subsets that stand for the whole in feature space, chosen without training.

The baselines that dataset quantization and data pruning are compared with: k-center (Sener &
Savarese 2018), herding (Welling 2009), moderate coresets (Xia et al. 2023) and coverage-centric
selection (Zheng et al. 2023).
"""

from __future__ import annotations

import numpy as np

from gossamer.core.errors import InputError


def k_center(features: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """Adds the point farthest from all chosen ones until there are ``count``.

    Gonzalez 1985: the largest distance of any point to its nearest centre is at most twice the
    least possible. Costs ``count * n * d``.

    Args:
        features: ``[n, d]``.
        count: how many.
        seed: of the first point.

    Returns:
        Rows in the order of choice.
    """
    _refuse(len(features), count)
    features = np.asarray(features, dtype=np.float32)
    squares = np.einsum("nd,nd->n", features, features)
    chosen = np.empty(count, dtype=np.int64)
    nearest = np.full(len(features), np.inf, dtype=np.float32)
    index = int(np.random.default_rng(seed).integers(len(features)))
    for step in range(count):
        chosen[step] = index
        away = squares + squares[index] - 2.0 * (features @ features[index])
        nearest = np.minimum(nearest, away)
        nearest[index] = -np.inf
        index = int(nearest.argmax())
    return chosen


def herding(features: np.ndarray, count: int) -> np.ndarray:
    """Adds the point that brings the mean of the chosen nearest to the mean of all.

    Args:
        features: ``[n, d]``.
        count: how many.

    Returns:
        Rows in the order of choice.
    """
    _refuse(len(features), count)
    features = np.asarray(features, dtype=np.float64)
    squares = np.einsum("nd,nd->n", features, features)
    mean = features.mean(0)
    total = np.zeros(features.shape[1])
    chosen = np.empty(count, dtype=np.int64)
    free = np.ones(len(features), dtype=bool)
    for step in range(count):
        wanted = (step + 1) * mean - total
        away = np.where(free, squares - 2.0 * (features @ wanted), np.inf)
        index = int(away.argmin())
        chosen[step] = index
        free[index] = False
        total += features[index]
    return chosen


def moderate(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Distance to the median feature of the own class, as a rank from its middle; low is moderate.

    Keeping the easy end of this score keeps, in each class, the samples whose distance is nearest
    to the class's median distance.

    Args:
        features: ``[n, d]``.
        labels: class indices ``[n]``.

    Returns:
        ``[n]`` in [0, 1]: 0 in the middle of the class's ranking.
    """
    scores = np.zeros(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        centre = np.median(features[rows], axis=0)
        place = np.argsort(np.argsort(np.linalg.norm(features[rows] - centre, axis=1)))
        middle = (len(rows) - 1) / 2.0
        scores[rows] = np.abs(place - middle) / max(middle, 0.5)
    return scores


def coverage(
    scores: np.ndarray,
    count: int,
    *,
    strata: int = 50,
    drop_hardest: float = 0.1,
    seed: int = 0,
) -> np.ndarray:
    """Samples evenly over the range of a score, without its hardest end.

    The range of what is left is cut into strata of equal width; every stratum has an equal share
    of the budget, and what a small one cannot use goes to the others.

    Args:
        scores: ``[n]``, high is hard; infinity counts as the largest finite score.
        count: how many.
        strata: of equal width.
        drop_hardest: share of the samples that is dropped first.
        seed: of the draw inside of a stratum.

    Returns:
        Rows, drawn stratum by stratum in turns.
    """
    _refuse(len(scores), count)
    finite = np.isfinite(scores)
    top = float(scores[finite].max()) if finite.any() else 0.0
    values = np.where(finite, scores, top)
    ranked = np.argsort(scores, kind="stable")
    left = ranked[: max(count, len(scores) - round(drop_hardest * len(scores)))]
    low, high = values[left].min(), values[left].max()
    width = (high - low) / strata
    place = np.zeros(len(left), dtype=np.int64)
    if width > 0:
        place = np.minimum(((values[left] - low) / width).astype(np.int64), strata - 1)
    sizes = np.bincount(place, minlength=strata)
    quota = np.zeros(strata, dtype=np.int64)
    # The smallest strata first: what they cannot use is shared by those that still can.
    rest = count
    for done, stratum in enumerate(np.argsort(sizes, kind="stable")):
        quota[stratum] = min(sizes[stratum], rest // (strata - done))
        rest -= quota[stratum]
    drawn = np.random.default_rng(seed).permutation(len(left))
    drawn = drawn[np.argsort(place[drawn], kind="stable")]
    at = np.arange(len(left)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    inside = drawn[at < quota[place[drawn]]]
    return left[inside]


def _refuse(total: int, count: int) -> None:
    if not 0 < count <= total:
        raise InputError(f"{count} of {total} samples cannot be chosen")
