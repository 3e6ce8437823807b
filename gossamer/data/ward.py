"""Ward linkage of vectors, from a few hundred to a million.

Ward's method merges, again and again, the two clusters whose union has the least additional
variance; the height of a merge of u and v is ``sqrt(2 |u| |v| / (|u| + |v|)) ||c_u - c_v||``. Three
routes compute it:

- *vectors*: nearest-neighbour chains over the centroids, O(n d) memory and O(n² d) time. The
  vectors are first turned into their principal axes, which changes no distance, so that the few
  leading numbers already show that most pairs are too far apart;
- *stored*: all distances in memory (16 bytes a pair while scipy works). It gives the same merges,
  and from some thousand vectors on it was measured slower than *vectors*;
- *micro*: mini-batch k-means (along the 32 axes of largest variance) to some thousand small
  clusters, Ward on their weighted centroids, then Ward inside each. This is an approximation: no
  merge crosses the border of a small cluster before it is complete, and inside one a merge may be
  higher than one above it.

Source: Ward, "Hierarchical grouping to optimize an objective function", JASA 1963; Murtagh and
Contreras, "Algorithms for hierarchical clustering: an overview", 2012 (nearest-neighbour chains).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np

from gossamer.core.errors import InputError
from gossamer.core.progress import progress
from gossamer.parts.neighbours import nearest

Scale = Literal["auto", "stored", "vectors", "micro"]

VECTORS_LIMIT = 100_000
"""Vectors up to which merges are exact by default."""

MICRO_CLUSTERS = (2_000, 10_000)
"""Fewest and most small clusters of the approximate route."""

MICRO_AXES = 32
"""Principal axes along which small clusters are told apart."""

_CHUNK = 8  # coordinates between two looks at whether a pair is already too far apart


@dataclass(frozen=True)
class Linkage:
    """The merges of an agglomerative clustering, lowest first.

    Attributes:
        children: of each merge, ``[n - 1, 2]``; leaves are 0 to n - 1, merge t is node n + t. The
            child that holds the smaller leaf comes first.
        heights: of each merge, ``[n - 1]``.
        route: how it was computed: "stored", "vectors" or "micro".
    """

    children: np.ndarray
    heights: np.ndarray
    route: str


def ward(
    features: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    scale: Scale = "auto",
    micro_clusters: int | None = None,
    seed: int = 0,
) -> Linkage:
    """Clusters vectors by Ward's method with Euclidean distances.

    Merges of the same height are in the order of their smallest leaf, so that ties give the same
    tree everywhere.

    Args:
        features: ``[n, d]``.
        weights: how many points each vector stands for, ``[n]``; only by the route "vectors".
        scale: the route; "auto" is "vectors" up to 100,000 vectors, and "micro" above.
        micro_clusters: small clusters of the route "micro". Default: one for 50 vectors, at least
            2,000 and at most 10,000.
        seed: of k-means in the route "micro".

    Returns:
        The merges.

    Raises:
        InputError: if there are no vectors, a number is not finite, or the route takes no weights.
    """
    features = np.asarray(features)
    if features.ndim != 2 or len(features) == 0:
        raise InputError(f"clustering needs vectors [n, d], n at least 1, not {features.shape}")
    if not np.isfinite(features).all():
        raise InputError("the features hold NaN or infinity, which have no distance to anything")
    count = len(features)
    if scale == "auto":
        scale = "vectors" if count <= VECTORS_LIMIT else "micro"
    if weights is not None and scale != "vectors":
        raise InputError(f"the route {scale!r} takes no weights; use 'vectors'")
    if count == 1:
        return Linkage(np.empty((0, 2), np.int64), np.empty(0), scale)
    if scale == "stored":
        pairs, heights = _stored(features)
    elif scale == "vectors":
        pairs, heights = _chains(features, weights)
    else:
        low, high = MICRO_CLUSTERS
        wanted = micro_clusters or min(high, max(low, count // 50))
        pairs, heights = _micro(features, min(wanted, count), seed)
    children, heights = _in_order(pairs, heights)
    return Linkage(children, heights, scale)


def _stored(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.cluster.hierarchy import linkage

    distances = _distances(np.ascontiguousarray(features, dtype=np.float64))
    merges = linkage(distances, method="ward")
    return merges[:, :2].astype(np.int64), merges[:, 2]


def _chains(
    features: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest-neighbour chains over centroids; merges in the order in which they are found."""
    sizes = np.ones(len(features)) if weights is None else np.array(weights, dtype=np.float64)
    if len(sizes) != len(features) or not (sizes > 0).all():
        raise InputError("clustering needs one weight above 0 for each vector")
    state = _Chain.start(_principal(features), sizes)
    with progress() as bar:
        shown = bar.add_task("clustering", total=len(features) - 1)
        while not state.done:
            state.run(4096)
            bar.update(shown, completed=state.merged)
    return state.pairs, np.sqrt(state.squares)


def _micro(features: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ward on the weighted centroids of small clusters, and inside each of them."""
    count = len(features)
    axes = _principal(features)
    if clusters == count:
        return _chains(axes)
    groups = _small_clusters(axes, clusters, seed)
    pairs: list[np.ndarray] = []
    heights: list[np.ndarray] = []
    tops = np.empty(len(groups), dtype=np.int64)  # the node that holds a whole small cluster
    centroids = np.empty((len(groups), axes.shape[1]))
    merged = 0
    with progress() as bar:
        for at, rows in enumerate(bar.track(groups, description="clustering")):
            centroids[at] = axes[rows].mean(0)
            state = _Chain.start(axes[rows], np.ones(len(rows)))
            state.run(len(rows))
            inside = np.concatenate([rows, count + merged + np.arange(len(rows) - 1)])
            pairs.append(inside[state.pairs])
            heights.append(np.sqrt(state.squares))
            merged += len(rows) - 1
            tops[at] = inside[-1]
    outer, high = _chains(centroids, np.array([len(rows) for rows in groups]))
    above = np.concatenate([tops, count + merged + np.arange(len(groups) - 1)])
    return np.concatenate([*pairs, above[outer]]), np.concatenate([*heights, high])


def _small_clusters(axes: np.ndarray, clusters: int, seed: int) -> list[np.ndarray]:
    """The rows of each small cluster, by k-means along the leading axes.

    Which small cluster a vector falls into need not be exact, so the centres start at random
    vectors: with thousands of them a careful start would take longer than all the rest.
    """
    from sklearn.cluster import MiniBatchKMeans

    leading = np.ascontiguousarray(axes[:, :MICRO_AXES], dtype=np.float32)
    options: dict[str, Any] = {"max_no_improvement": None, "reassignment_ratio": 0.0, "n_init": 1}
    engine: Any = MiniBatchKMeans(
        clusters, init="random", batch_size=8192, max_iter=3, random_state=seed, **options
    )
    centres = engine.fit(leading).cluster_centers_.astype(np.float32)
    _, member = np.unique(nearest(leading, centres)[1][:, 0], return_inverse=True)
    order = np.argsort(member, kind="stable")
    return np.split(order, np.cumsum(np.bincount(member))[:-1])


def _principal(features: np.ndarray) -> np.ndarray:
    """The vectors along their principal axes, largest variance first: the same distances."""
    centred = np.ascontiguousarray(features, dtype=np.float64)
    centred = centred - centred.mean(0)
    if centred.shape[1] <= _CHUNK:
        return centred
    _, axes = np.linalg.eigh(centred.T @ centred)
    return np.ascontiguousarray(centred @ axes[:, ::-1])


def _in_order(pairs: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts merges by (height, smallest leaf), each after its children, and renames the nodes.

    Args:
        pairs: merged nodes, ``[n - 1, 2]``; merge t is node n + t here too, in the order given.
        heights: ``[n - 1]``.
    """
    count = len(pairs) + 1
    # Equal up to rounding counts as equal, or ties would be decided by the processor.
    rounded = np.round(heights, 12) if heights.max(initial=0.0) < 1e3 else heights
    smallest, parent, waiting = _relations(np.ascontiguousarray(pairs, dtype=np.int64))
    keys = rounded.tolist()
    leaves = smallest[count:].tolist()
    above = parent[count:].tolist()
    left = waiting.tolist()
    ready = [(keys[t], leaves[t], t) for t in range(count - 1) if left[t] == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        _, _, t = heapq.heappop(ready)
        order.append(t)
        up = above[t] - count
        if up >= 0:
            left[up] -= 1
            if left[up] == 0:
                heapq.heappush(ready, (keys[up], leaves[up], up))
    sequence = np.array(order, dtype=np.int64)
    names = np.arange(2 * count - 1)
    names[count + sequence] = count + np.arange(count - 1)
    chosen = pairs[sequence]
    swapped = smallest[chosen[:, 0]] > smallest[chosen[:, 1]]
    chosen[swapped] = chosen[swapped][:, ::-1]
    return names[chosen], heights[sequence]


@numba.njit(nogil=True, cache=True)
def _relations(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each node the smallest leaf and the parent; of each merge how many children are merges."""
    count = len(pairs) + 1
    smallest = np.arange(2 * count - 1)
    parent = np.full(2 * count - 1, -1, np.int64)
    waiting = np.zeros(count - 1, np.int64)
    for t in range(count - 1):
        a, b = pairs[t]
        smallest[count + t] = min(smallest[a], smallest[b])
        parent[a] = parent[b] = count + t
        waiting[t] = (a >= count) + (b >= count)
    return smallest, parent, waiting


@numba.njit(nogil=True, fastmath=True, cache=True)
def _distances(x: np.ndarray) -> np.ndarray:
    """Euclidean distances of all pairs, condensed, ``[n (n - 1) / 2]``."""
    n, d = x.shape
    distances = np.empty(n * (n - 1) // 2)
    at = 0
    for i in range(n):
        for j in range(i + 1, n):
            total = 0.0
            for k in range(d):
                difference = x[i, k] - x[j, k]
                total += difference * difference
            distances[at] = np.sqrt(total)
            at += 1
    return distances


@dataclass
class _Chain:
    """The state of nearest-neighbour chains, between two calls of the compiled loop.

    Centroids of living clusters lie packed at the front, so that every search is one pass over
    contiguous memory; the place of a cluster changes, its name does not.
    """

    centroids: np.ndarray  # [n, d], of the living clusters
    sizes: np.ndarray  # [n]
    low: np.ndarray  # [n], smallest leaf
    names: np.ndarray  # [n], node at each place
    place: np.ndarray  # [2n - 1], place of each living node
    chain: np.ndarray  # [n], nodes
    pairs: np.ndarray  # [n - 1, 2]
    squares: np.ndarray  # [n - 1], squared heights
    length: int = 0
    merged: int = 0

    @classmethod
    def start(cls, centroids: np.ndarray, sizes: np.ndarray) -> _Chain:
        n = len(centroids)
        place = np.full(2 * n - 1, -1, np.int64)
        place[:n] = np.arange(n)
        return cls(
            centroids, sizes, np.arange(n), np.arange(n), place, np.empty(n, np.int64),
            np.empty((n - 1, 2), np.int64), np.empty(n - 1),
        )  # fmt: skip

    @property
    def done(self) -> bool:
        return self.merged == len(self.pairs)

    def run(self, merges: int) -> None:
        self.length, self.merged = _grow(
            self.centroids, self.sizes, self.low, self.names, self.place, self.chain,
            self.pairs, self.squares, self.length, self.merged,
            min(self.merged + merges, len(self.pairs)),
        )  # fmt: skip


@numba.njit(nogil=True, fastmath=True, cache=True)
def _grow(
    centroids: np.ndarray,
    sizes: np.ndarray,
    low: np.ndarray,
    names: np.ndarray,
    place: np.ndarray,
    chain: np.ndarray,
    pairs: np.ndarray,
    squares: np.ndarray,
    length: int,
    merged: int,
    until: int,
) -> tuple[int, int]:
    """Follows nearest neighbours and merges mutual ones, until ``until`` merges are done."""
    n, d = centroids.shape
    while merged < until:
        living = n - merged
        if length == 0:
            first = 0
            for s in range(1, living):
                if low[s] < low[first]:
                    first = s
            chain[0] = names[first]
            length = 1
        u = place[chain[length - 1]]
        before = place[chain[length - 2]] if length > 1 else -1
        best, nearest = np.inf, -1
        if before >= 0:
            # The one before wins ties, or the chain could run in a circle.
            total = 0.0
            for k in range(d):
                difference = centroids[u, k] - centroids[before, k]
                total += difference * difference
            best = 2.0 * sizes[u] * sizes[before] / (sizes[u] + sizes[before]) * total
            nearest = before
        for s in range(living):
            if s in (u, before):
                continue
            factor = 2.0 * sizes[u] * sizes[s] / (sizes[u] + sizes[s])
            bound = best / factor
            total = 0.0
            k = 0
            while k + _CHUNK <= d and total <= bound:
                for j in range(k, k + _CHUNK):
                    difference = centroids[u, j] - centroids[s, j]
                    total += difference * difference
                k += _CHUNK
            if total > bound:
                continue
            for j in range(k, d):
                difference = centroids[u, j] - centroids[s, j]
                total += difference * difference
            square = factor * total
            tied = square == best and nearest != before and low[s] < low[nearest]
            if square < best or tied:
                best, nearest = square, s
        if nearest != before or before < 0:
            chain[length] = names[nearest]
            length += 1
            continue
        # u and the one before are each other's nearest: one cluster, at the lower place.
        length -= 2
        kept, gone = min(u, before), max(u, before)
        pairs[merged, 0], pairs[merged, 1] = names[kept], names[gone]
        squares[merged] = best
        total = sizes[kept] + sizes[gone]
        for k in range(d):
            centroids[kept, k] = (
                sizes[kept] * centroids[kept, k] + sizes[gone] * centroids[gone, k]
            ) / total
        sizes[kept] = total
        low[kept] = min(low[kept], low[gone])
        names[kept] = n + merged
        place[n + merged] = kept
        last = living - 1
        if gone != last:
            centroids[gone] = centroids[last]
            sizes[gone], low[gone], names[gone] = sizes[last], low[last], names[last]
            place[names[gone]] = gone
        merged += 1
    return length, merged
