"""What else finds tables that contain others, to compare with.

Brute force is the truth: every pair of tables, exact anti joins. The others are cheaper and miss or
invent: k-means over schemas, MinHash with an LSH ensemble over columns, and hashes of whole files
or of all rows.

Sources: Zhu, Nargesian, Pu and Miller, "LSH Ensemble: Internet-Scale Domain Search", VLDB 2016,
arXiv:1603.07410 (partitions by size, containment turned into Jaccard similarity at each one's upper
bound); Broder, "On the resemblance and containment of documents", 1997 (MinHash).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gossamer.data.containment import Pair
from gossamer.data.lake import Lake
from gossamer.data.lake_engine import Engine
from gossamer.data.reconstruction import anti_join, comparisons


@dataclass(frozen=True)
class Found:
    """Pairs that a baseline takes for containments.

    Attributes:
        pairs: (parent, child).
        bytes_read: counted as in :class:`gossamer.data.containment.Stage`.
        tests: pairs of schemas compared.
    """

    pairs: frozenset[Pair]
    bytes_read: int
    tests: int


def brute_force(lake: Lake, engine: Engine) -> Found:
    """Every pair: schemas, then an exact anti join on all columns."""
    pairs, tests = schema_pairs(lake)
    return exact_pairs(lake, engine, pairs, tests)


def schema_pairs(lake: Lake) -> tuple[list[Pair], int]:
    """All pairs of which one schema contains the other, by comparing every two."""
    schemas = {table.name: table.names() for table in lake.tables}
    pairs = [(a, b) for a in schemas for b in schemas if a != b and schemas[b] <= schemas[a]]
    return pairs, len(schemas) * (len(schemas) - 1) // 2


def exact_pairs(lake: Lake, engine: Engine, pairs: Sequence[Pair], tests: int) -> Found:
    """Of some pairs those whose every row is in the parent."""
    read = sum(table.metadata_bytes for table in lake.tables)
    found = set()
    for parent, child in pairs:
        a, b = lake.index(child), lake.index(parent)
        columns = comparisons(lake.tables[a], lake.tables[b])
        if isinstance(columns, str):
            continue
        names = [column.name for column in columns]
        read += lake.tables[a].bytes_of(names) + lake.tables[b].bytes_of(names)
        if anti_join(engine, a, b, columns) == 0:
            found.add((parent, child))
    return Found(frozenset(found), read, tests)


def k_means(lake: Lake, engine: Engine, *, clusters: int, seed: int) -> Found:
    """k-means over one-hot schemas, then every pair within a cluster exactly."""
    from sklearn import cluster as sklearn_cluster

    names = sorted(frozenset().union(*(table.names() for table in lake.tables)))
    number = {name: i for i, name in enumerate(names)}
    vectors = np.zeros((len(lake.tables), len(names)))
    for row, table in enumerate(lake.tables):
        vectors[row, [number[name] for name in table.names()]] = 1
    clusters = min(clusters, len(lake.tables))
    fit: Any = sklearn_cluster.KMeans  # its stubs say that n_init is text
    label = fit(clusters, n_init=3, random_state=seed).fit_predict(vectors)
    schemas = [table.names() for table in lake.tables]
    pairs = []
    tests = 0
    for cluster in range(clusters):
        members = np.flatnonzero(label == cluster).tolist()
        tests += len(members) * (len(members) - 1) // 2
        pairs += [
            (lake.tables[a].name, lake.tables[b].name)
            for a in members
            for b in members
            if a != b and schemas[b] <= schemas[a]
        ]
    return exact_pairs(lake, engine, pairs, tests)


def lsh_ensemble(
    lake: Lake,
    engine: Engine,
    *,
    threshold: float = 0.95,
    hashes: int = 128,
    partitions: int = 8,
    seed: int = 0,
) -> Found:
    """MinHash of every column; a child is contained if an ensemble says so of all its columns.

    Args:
        lake: the tables.
        engine: that reads the columns.
        threshold: containment that is searched for.
        hashes: of a signature.
        partitions: of the columns by number of values.
        seed: of the hashes.
    """
    generator = np.random.default_rng(seed)
    prime = (1 << 31) - 1
    a = generator.integers(1, prime, hashes, dtype=np.uint64)
    b = generator.integers(0, prime, hashes, dtype=np.uint64)
    owners: list[tuple[int, str]] = []
    sizes: list[int] = []
    signatures: list[np.ndarray] = []
    read = sum(table.metadata_bytes + sum(table.column_bytes.values()) for table in lake.tables)
    for index, table in enumerate(lake.tables):
        for number, column in enumerate(table.columns):
            values = engine.query(f"SELECT DISTINCT CAST(c{number} AS STRING) FROM t{index}")
            keys = np.array(
                [
                    int.from_bytes(hashlib.blake2b(repr(v).encode(), digest_size=4).digest())
                    for (v,) in values
                ],
                dtype=np.uint64,
            )
            keys %= np.uint64(prime)
            # Values over hashes would be large for long columns: blocks of them.
            least = np.full(hashes, prime, dtype=np.uint64)
            for block in np.array_split(keys, max(1, len(keys) // 4096)):
                if len(block):
                    least = np.minimum(least, ((block[:, None] * a + b) % prime).min(0))
            owners.append((index, column.name))
            sizes.append(len(values))
            signatures.append(least)
    signature, size = np.stack(signatures), np.array(sizes)
    hits = _ensemble(signature, size, threshold, partitions)
    where = {owner: i for i, owner in enumerate(owners)}
    pairs = frozenset(
        (parent.name, child.name)
        for p, parent in enumerate(lake.tables)
        for c, child in enumerate(lake.tables)
        if p != c
        and child.names() <= parent.names()
        and all(hits[where[c, name], where[p, name]] for name in child.names())
    )
    tests = len(lake.tables) * (len(lake.tables) - 1) // 2
    return Found(pairs, read, tests)


def _ensemble(
    signature: np.ndarray, size: np.ndarray, threshold: float, partitions: int
) -> np.ndarray:
    """Whether column q (row) collides with column x (its superset?) in an LSH of x's partition."""
    n, hashes = signature.shape
    hits = np.zeros((n, n), dtype=bool)
    for members in np.array_split(np.argsort(size, kind="stable"), min(partitions, n)):
        upper = int(size[members].max())
        # Queries of about a size share their bands: those of the smallest of them.
        octave = np.floor(np.log2(np.maximum(size, 1)))
        for step in np.unique(octave):
            queries = np.flatnonzero(octave == step)
            q_size = 2.0**step
            # |q n x| >= t |q| means J >= t / (u / |q| + 1 - t) for |x| <= u.
            jaccard = threshold / (upper / q_size + 1 - threshold)
            bands, rows = _bands(hashes, min(1.0, jaccard))
            for band in range(bands):
                part = slice(band * rows, (band + 1) * rows)
                equal = (signature[queries, None, part] == signature[None, members, part]).all(-1)
                hits[np.ix_(queries, members)] |= equal
    return hits


def _bands(hashes: int, threshold: float) -> tuple[int, int]:
    """Bands and rows whose curve has least area on the wrong sides of a similarity."""
    s = np.linspace(0, 1, 101)
    below = s < threshold
    best = (np.inf, 1, 1)
    for rows in (1, 2, 4, 8, 16, 32):
        for bands in (1, 2, 4, 8, 16, 32, 64, hashes):
            if bands * rows <= hashes:
                curve = 1 - (1 - s**rows) ** bands
                wrong = float(curve[below].sum() + (1 - curve[~below]).sum())
                best = min(best, (wrong, bands, rows))
    return best[1], best[2]


def equal_files(lake: Lake) -> Found:
    """Files with the same bytes: copies, and none of the subsets."""
    digests: dict[str, list[str]] = {}
    for table in lake.tables:
        content = hashlib.sha256()
        for file in [table.path] if table.path.is_file() else sorted(table.path.rglob("*")):
            if file.is_file():
                content.update(file.read_bytes())
        digests.setdefault(content.hexdigest(), []).append(table.name)
    return Found(_mutual(digests.values()), lake.bytes, 0)


def equal_rows(lake: Lake, engine: Engine) -> Found:
    """Tables with the same columns and the same sum of hashes over rows, in any order (DuckDB)."""
    digests: dict[str, list[str]] = {}
    read = 0
    for index, table in enumerate(lake.tables):
        order = sorted(range(len(table.columns)), key=lambda i: table.columns[i].name)
        row = ", ".join(f"CAST(c{i} AS STRING)" for i in order)
        ((total, count),) = engine.query(
            f"SELECT sum(CAST(hash({row}) AS HUGEINT)), count(*) FROM t{index}"
        )
        read += sum(table.column_bytes.values())
        names = [table.columns[i].name for i in order]
        digests.setdefault(f"{names} {total} {count}", []).append(table.name)
    return Found(_mutual(digests.values()), read, 0)


def _mutual(groups: Iterable[Sequence[str]]) -> frozenset[Pair]:
    return frozenset((a, b) for group in groups for a in group for b in group if a != b)
