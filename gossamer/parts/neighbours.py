"""Nearest neighbours and k-means on features, exact, in blocks of bounded memory."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from gossamer.core.errors import InputError

Metric = Literal["euclidean", "cosine", "inner"]

BLOCK_VALUES = 1 << 24
"""Distances that are held at a time (64 MiB)."""
ONE_START: Any = 1
EXACT_KMEANS = 20_000
"""Up to so many points k-means looks at all of them in each round; beyond, at mini-batches."""


def normalised(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, ``[n, d]`` float32; a row of zeros stays."""
    features = np.asarray(features, dtype=np.float32)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(lengths == 0.0, 1.0, lengths)


def nearest(
    queries: np.ndarray,
    points: np.ndarray,
    *,
    k: int = 1,
    metric: Metric = "euclidean",
    exclude_self: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nearest points of each query, by comparing with all of them.

    Costs ``len(queries) * len(points) * d`` multiplications. Ties go to the lower index.

    Args:
        queries: ``[m, d]``.
        points: ``[n, d]``.
        k: how many, at most ``n``.
        metric: "euclidean" distance; "cosine" is 1 - cosine; "inner" is minus the inner product.
        exclude_self: queries are the points, and no point is its own neighbour.

    Returns:
        Distances ``[m, k]`` float32, ascending, and indices ``[m, k]`` int64.

    Raises:
        InputError: if there are not ``k`` points, or sizes do not fit.
    """
    points = np.asarray(points, dtype=np.float32)
    if points.ndim != 2 or queries.ndim != 2 or queries.shape[1] != points.shape[1]:
        raise InputError(
            f"queries {list(queries.shape)} and points {list(points.shape)} do not fit together"
        )
    if not 1 <= k <= len(points) - exclude_self:
        raise InputError(f"{k} neighbours are asked of {len(points)} points")
    if metric == "cosine":
        points = normalised(points)
    # In double where squares are subtracted, so that a point's distance to itself is nearly 0.
    squares = np.einsum("nd,nd->n", points, points, dtype=np.float64)
    block = max(1, BLOCK_VALUES // len(points))
    distances = np.empty((len(queries), k), dtype=np.float32)
    indices = np.empty((len(queries), k), dtype=np.int64)
    for start in range(0, len(queries), block):
        part = np.asarray(queries[start : start + block], dtype=np.float32)
        if metric == "cosine":
            part = normalised(part)
        far = part @ points.T
        match metric:
            case "euclidean":
                own = np.einsum("md,md->m", part, part, dtype=np.float64)
                far = (own[:, None] + squares - 2.0 * far).clip(min=0.0)
            case "cosine":
                far = 1.0 - far
            case "inner":
                far = -far
        rows = np.arange(len(part))
        if exclude_self:
            far[rows, start + rows] = np.inf
        if k == 1:
            found = far.argmin(1)[:, None]
        else:
            found = np.sort(np.argpartition(far, k - 1, axis=1)[:, :k], axis=1)
            order = np.argsort(np.take_along_axis(far, found, 1), axis=1, kind="stable")
            found = np.take_along_axis(found, order, 1)
        values = np.take_along_axis(far, found, 1)
        distances[start : start + block] = np.sqrt(values) if metric == "euclidean" else values
        indices[start : start + block] = found
    return distances, indices


def kmeans(
    features: np.ndarray, k: int, *, seed: int = 0, rounds: int = 100, batch_size: int = 4096
) -> np.ndarray:
    """Centres of ``k`` clusters (k-means++, Lloyd's rounds; mini-batches for many points).

    Args:
        features: ``[n, d]``; may be a memory map larger than memory.
        k: clusters, at most ``n``.
        seed: of the start and the order of batches.
        rounds: passes over the data, at most.
        batch_size: points a mini-batch, where there are more than :data:`EXACT_KMEANS`.

    Returns:
        Centres ``[k, d]`` float32.

    Raises:
        InputError: if there are fewer points than clusters.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if not 1 <= k <= len(features):
        raise InputError(f"{k} clusters are asked of {len(features)} points")
    if len(features) <= EXACT_KMEANS:
        found: Any = KMeans(k, n_init=ONE_START, max_iter=rounds, random_state=seed).fit(features)
        return found.cluster_centers_.astype(np.float32)
    # The start looks at a sample that fits in memory; then batches, until the centres rest.
    random = np.random.default_rng(seed)
    sample = np.sort(
        random.choice(len(features), min(len(features), max(EXACT_KMEANS, 3 * k)), False)
    )
    start: Any = KMeans(k, n_init=ONE_START, max_iter=5, random_state=seed).fit(features[sample])
    engine: Any = MiniBatchKMeans(
        k, init=start.cluster_centers_, n_init=ONE_START, random_state=seed, batch_size=batch_size
    )
    before = start.cluster_centers_
    for _ in range(rounds):
        for block in np.array_split(
            random.permutation(len(features)), -(-len(features) // batch_size)
        ):
            engine.partial_fit(features[np.sort(block)])
        moved = float(np.square(engine.cluster_centers_ - before).sum(1).mean())
        before = engine.cluster_centers_.copy()
        if moved <= 1e-4 * float(np.var(features[sample], axis=0).sum()):
            break
    return before.astype(np.float32)
