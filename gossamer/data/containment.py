"""Which tables of a lake contain which others, by ever finer and dearer filters.

1. *Schemas*: only where all columns of one table are columns of another can it be contained
   (:mod:`gossamer.data.schema_clusters`; nothing is missed).
2. *Least and greatest values* in the files' metadata: a child that reaches beyond its parent in any
   column is not contained (nothing that is contained is dropped, no row is read).
3. *Sampled rows*: rows of the child, drawn without replacement, are looked up in the parent; one
   that is not there drops the edge. What is contained always stays. What is not, with a fraction
   ``e`` of its distinct rows missing, stays with a probability of about ``(1 - e)^rows``.
4. *All rows* (``verify=True``): the exact answer, from full comparisons of what is left.

Column names define the schema: a column that was renamed is another one. Rows are compared with
nulls equal to nulls; containment is one of sets, and what deletion needs beyond it is in
:mod:`gossamer.data.reconstruction`.

Source: Shah et al., "R2D2: Reducing Redundancy and Duplication in Data Lakes", SIGMOD 2024
(PACMMOD 1(4)), arXiv:2312.13427. There is no public code of it.
"""

from __future__ import annotations

import copy
import math
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa

from gossamer.core.errors import InputError, first_line
from gossamer.core.progress import progress
from gossamer.data.column_statistics import why_not_contained
from gossamer.data.lake import Lake, Table, draw_rows, fetch_rows
from gossamer.data.lake_engine import Comparison, Engine, EngineName, open_engine, same
from gossamer.data.reconstruction import anti_join, comparisons
from gossamer.data.schema_clusters import SchemaClusters

Pair = tuple[str, str]


@dataclass(frozen=True)
class Edge:
    """A parent that contains a child, as far as was looked.

    Attributes:
        parent: name of the table.
        child: name of the table.
        columns: that sampled rows were compared in.
        sampled: rows of the child that were looked up.
        casts: columns that were converted to be compared.
        exact: whether every row and column was compared.
    """

    parent: str
    child: str
    columns: tuple[str, ...] = ()
    sampled: int = 0
    casts: tuple[str, ...] = ()
    exact: bool = False


@dataclass(frozen=True)
class Pruned:
    """A pair whose schemas fit and that is no containment.

    Attributes:
        parent: name of the table.
        child: name of the table.
        stage: "types", "min-max", "content" or "exact".
        reason: what was found.
    """

    parent: str
    child: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Stage:
    """What one filter left, and what it cost.

    Attributes:
        name: of the filter.
        edges: left after it.
        seconds: wall clock.
        bytes_read: counted from the files' metadata: footers, and the compressed column chunks
            that a query asks for, whether or not the engine can skip some.
    """

    name: str
    edges: int
    seconds: float
    bytes_read: int


@dataclass(frozen=True)
class ContainmentGraph:
    """Edges from containing to contained tables.

    Attributes:
        lake: the tables.
        edges: those that every filter left, sorted.
        pruned: those that were dropped, and why.
        stages: what each filter left and cost.
        clusters: of the schemas.
        engine: that compared the rows, and can compare more.
        rows: sampled from each child.
        columns: looked at in each; None for all.
        seed: of the sample.
    """

    lake: Lake
    edges: tuple[Edge, ...]
    pruned: tuple[Pruned, ...]
    stages: tuple[Stage, ...]
    clusters: SchemaClusters
    engine: Engine = field(repr=False)
    rows: int
    columns: int | None
    seed: int

    def pairs(self) -> set[Pair]:
        """(parent, child) of all edges."""
        return {(edge.parent, edge.child) for edge in self.edges}

    def contained(self, child: str) -> list[str]:
        """Tables that contain one."""
        return [edge.parent for edge in self.edges if edge.child == child]


def rows_for(missing: float, error: float) -> int:
    """Rows to sample so that a child that lacks a fraction is missed with at most a probability.

    ``ln(error) / ln(1 - missing)``, rounded up: 90 rows for 5 % and 1 %.

    Args:
        missing: fraction of the child's rows that the parent lacks, at least.
        error: probability of not noticing.
    """
    if not (0 < missing < 1 and 0 < error < 1):
        raise InputError("the fraction and the probability must lie between 0 and 1")
    return math.ceil(math.log(error) / math.log1p(-missing))


def survival(missing: float, rows: int) -> float:
    """Probability that a child lacking a fraction passes, for rows drawn with replacement."""
    return (1 - missing) ** rows


def survival_without_replacement(bad: int, total: int, rows: int) -> float:
    """The same for rows drawn without replacement: that none of the bad ones is among them."""
    rows = min(rows, total)
    return math.comb(total - bad, rows) / math.comb(total, rows)


def containment_graph(
    lake: Lake,
    *,
    engine: EngineName = "duckdb",
    rows: int = 90,
    columns: int | None = None,
    choose: Literal["distinct", "random"] = "distinct",
    seed: int = 0,
    typed: bool = False,
    min_max: bool = True,
    content: bool = True,
    verify: bool = False,
    previous: ContainmentGraph | None = None,
    threads: int = 1,
) -> ContainmentGraph:
    """Finds which tables contain which.

    Args:
        lake: from :func:`gossamer.data.lake.read_lake`.
        engine: "duckdb", or "spark" for lakes beyond one machine; the edges are the same.
        rows: sampled from each child; see :func:`rows_for`.
        columns: looked at in each sample. Default: all; fewer see less (the paper's working point
            is about 4 columns and 10 rows).
        choose: which columns, if not all: those with most distinct values in the sample, or any.
        seed: of the rows and columns drawn.
        typed: whether a column of another stored type is another column.
        min_max: whether the second filter is used.
        content: whether the third is.
        verify: whether the fourth is.
        previous: a graph of this lake before some tables came, went or changed; only pairs with one
            of these are compared again.
        threads: of the engine.

    Returns:
        The graph, with what each filter dropped and cost.

    Raises:
        InputError: if a table changes meanwhile (it is named), or a number is out of range.
    """
    if rows < 1:
        raise InputError(f"{rows} rows cannot be sampled; give 1 or more")
    if columns is not None and columns < 1:
        raise InputError(f"{columns} columns cannot be compared; give 1 or more")
    began = time.perf_counter()
    schemas = {
        table.name: [f"{c.name}:{c.type}" if typed else c.name for c in table.columns]
        for table in lake.tables
    }
    clusters, known = _clusters(lake, schemas, previous)
    candidates = sorted(clusters.edges)
    kept: list[Edge] = []
    pruned: list[Pruned] = []
    if previous is not None:
        kept = [e for e in previous.edges if {e.parent, e.child} <= known]
        pruned = [p for p in previous.pruned if {p.parent, p.child} <= known]
        candidates = [pair for pair in candidates if not set(pair) <= known]
    metadata = sum(t.metadata_bytes for t in lake.tables if t.name not in known)
    stages = [Stage("schema", len(candidates) + len(kept), time.perf_counter() - began, metadata)]

    def stage(name: str, left: Sequence[Edge], since: float, read: int) -> None:
        stages.append(Stage(name, len(left) + len(kept), time.perf_counter() - since, read))

    began = time.perf_counter()
    edges: list[Edge] = []
    columns_of: dict[Pair, list[Comparison]] = {}
    for parent, child in candidates:
        made = comparisons(lake[child], lake[parent])
        if isinstance(made, str):
            pruned.append(Pruned(parent, child, "types", made))
            continue
        columns_of[parent, child] = made
        casts = tuple(c.name for c in made if c.cast)
        reason = _beyond(lake[child], lake[parent], made) if min_max else None
        if reason is None:
            edges.append(Edge(parent, child, casts=casts))
        else:
            pruned.append(Pruned(parent, child, "min-max", reason))
    stage("min-max" if min_max else "types", edges, began, 0)

    opened = open_engine(engine, lake, threads=threads)
    if content:
        began = time.perf_counter()
        left, dropped, read = _looked_up(
            opened, lake, edges, columns_of, rows=rows, columns=columns, choose=choose, seed=seed
        )
        edges = left
        pruned += dropped
        stage("content", edges, began, read)
    if verify:
        began = time.perf_counter()
        read = 0
        left = []
        with progress() as bar:
            for edge in bar.track(edges, description="all rows"):
                missing = 0
                if not edge.exact:
                    made = columns_of[edge.parent, edge.child]
                    a, b = lake.index(edge.child), lake.index(edge.parent)
                    missing = anti_join(opened, a, b, made)
                    names = [c.name for c in made]
                    read += lake.tables[a].bytes_of(names) + lake.tables[b].bytes_of(names)
                if missing:
                    reason = f"{missing:,} distinct rows are not in the parent"
                    pruned.append(Pruned(edge.parent, edge.child, "exact", reason))
                else:
                    left.append(replace(edge, exact=True))
        edges = left
        stage("exact", edges, began, read)
    lake.check_unchanged()
    return ContainmentGraph(
        lake,
        tuple(sorted(kept + edges, key=lambda e: (e.parent, e.child))),
        tuple(sorted(pruned, key=lambda p: (p.parent, p.child))),
        tuple(stages),
        clusters,
        opened,
        rows,
        columns,
        seed,
    )


def _clusters(
    lake: Lake, schemas: dict[str, list[str]], previous: ContainmentGraph | None
) -> tuple[SchemaClusters, set[str]]:
    """Clusters, and the tables about which a former graph knows all there is to know."""
    if previous is None:
        return SchemaClusters.build(schemas), set()
    before = {table.name: table.fingerprint for table in previous.lake.tables}
    known = {t.name for t in lake.tables if before.get(t.name) == t.fingerprint}
    clusters = copy.deepcopy(previous.clusters)
    for name in sorted(set(before) - known):
        clusters.remove(name)
    for name in sorted(set(schemas) - known, key=lambda n: (-len(schemas[n]), n)):
        clusters.add(name, schemas[name])
    return clusters, known


def _beyond(child: Table, parent: Table, columns: Iterable[Comparison]) -> str | None:
    """What the metadata say against a containment."""
    if child.distinct_rows is not None:
        most = parent.rows if parent.distinct_rows is None else parent.distinct_rows
        if child.distinct_rows > most:
            return f"{child.distinct_rows:,} distinct rows, more than the parent's {most:,}"
    for column in columns:
        a, b = child.statistics[column.name], parent.statistics[column.name]
        if column.kind == "text" and {
            child.column(column.name).kind, parent.column(column.name).kind
        } != {"text"}:  # fmt: skip
            continue  # compared as spelled, but known by value
        scales = child.column(column.name).scale, parent.column(column.name).scale
        if column.kind in ("timestamp", "instant") and scales[0] != scales[1]:
            continue
        a, b = a.with_numbers_as(column.kind), b.with_numbers_as(column.kind)
        if reason := why_not_contained(a, b):
            return f"{column.name}: {reason}"
    return None


def _looked_up(
    engine: Engine,
    lake: Lake,
    edges: Sequence[Edge],
    columns_of: dict[Pair, list[Comparison]],
    *,
    rows: int,
    columns: int | None,
    choose: Literal["distinct", "random"],
    seed: int,
) -> tuple[list[Edge], list[Pruned], int]:
    """The edges whose sampled rows are all in the parent; one query for many of a parent's."""
    samples: dict[str, pa.Table] = {}
    read = 0
    for child in sorted({edge.child for edge in edges}):
        table = lake[child]
        generator = np.random.default_rng([seed, zlib.crc32(child.encode())])
        try:
            found, size = fetch_rows(table, draw_rows(table, rows, generator))
        except (OSError, pa.ArrowException, LookupError) as error:
            lake.check_unchanged()
            raise InputError(f"{table.path} cannot be read: {first_line(error)}") from error
        samples[child] = found.append_column("i", pa.array(range(found.num_rows)))
        engine.put(f"s{lake.index(child)}", samples[child])
        read += size
    # Edges of one parent that look at the same columns share a scan of it.
    groups: dict[tuple[str, ...], list[tuple[Edge, list[Comparison]]]] = {}
    for edge in edges:
        generator = np.random.default_rng(
            [seed, zlib.crc32(edge.child.encode()), zlib.crc32(edge.parent.encode())]
        )
        chosen = columns_of[edge.parent, edge.child]
        whole = columns is None or columns >= len(chosen)
        if columns is not None and not whole:
            chosen = _choose(chosen, samples[edge.child], columns, choose, generator)
        looked = replace(
            edge,
            columns=tuple(c.name for c in chosen),
            sampled=samples[edge.child].num_rows,
            exact=whole and samples[edge.child].num_rows == lake[edge.child].rows,
        )
        chosen = sorted(chosen, key=lambda c: c.parent)
        group = (edge.parent, *(f"{c.parent}:{c.kind}" for c in chosen))
        groups.setdefault(group, []).append((looked, chosen))
    left: list[Edge] = []
    pruned: list[Pruned] = []
    with progress() as bar:
        for members in bar.track(groups.values(), description="sampled rows"):
            parent = lake.index(members[0][0].parent)
            read += lake.tables[parent].bytes_of(members[0][0].columns)
            matched = {e: int(n) for e, n in engine.query(_lookup(lake, parent, members, samples))}
            for number, (edge, _) in enumerate(members):
                missing = edge.sampled - matched.get(number, 0)
                if missing:
                    reason = f"{missing} of {edge.sampled} sampled rows are not in the parent"
                    pruned.append(Pruned(edge.parent, edge.child, "content", reason))
                else:
                    left.append(edge)
    return left, pruned, read


def _lookup(
    lake: Lake,
    parent: int,
    members: Sequence[tuple[Edge, list[Comparison]]],
    drawn: Mapping[str, pa.Table],
) -> str:
    """SQL: for each edge, how many sampled rows the parent has; the sample is the small side."""
    first = members[0][1]
    keys = range(len(first))
    samples = " UNION ALL ".join(
        f"SELECT {number} AS e, a.i AS i, "
        + ", ".join(f"{c.child.format(t='a')} AS k{k}" for k, c in enumerate(chosen))
        + f" FROM s{lake.index(edge.child)} a"
        for number, (edge, chosen) in enumerate(members)
    )
    looked = ", ".join(f"{c.parent.format(t='b')} AS k{k}" for k, c in enumerate(first))
    # Where no null was drawn plain equality says the same, and engines can push it into the scan.
    plain = [
        all(_without_nulls(chosen[k], drawn[edge.child]) for edge, chosen in members) for k in keys
    ]
    on = " AND ".join(
        f"x.k{k} = y.k{k}" if plain[k] else same([(f"x.k{k}", f"y.k{k}")]) for k in keys
    )
    listed = ", ".join(f"k{k}" for k in keys)
    # Rows that look alike are looked up once: few values would match most of the parent each.
    return (
        f"WITH x AS (SELECT e, min(i) AS i, count(*) AS n, {listed} FROM ({samples}) s "
        f"GROUP BY e, {listed}), "
        "h AS (SELECT /*+ BROADCAST(x) */ DISTINCT x.e, x.i FROM x "
        f"JOIN (SELECT {looked} FROM t{parent} b) y ON {on}) "
        "SELECT x.e, sum(x.n) FROM x JOIN h ON x.e = h.e AND x.i = h.i GROUP BY x.e"
    )


def _drawn(column: Comparison, sample: pa.Table) -> pa.ChunkedArray | None:
    """The drawn values that a comparison is made of; None where it is made of nulls alone."""
    place = re.search(r"\{t\}\.([cx]\d+)", column.child)
    return None if place is None else sample.column(place.group(1))


def _without_nulls(column: Comparison, sample: pa.Table) -> bool:
    values = _drawn(column, sample)
    return values is not None and values.null_count == 0


def _choose(
    columns: Sequence[Comparison],
    sample: pa.Table,
    count: int,
    choose: Literal["distinct", "random"],
    generator: np.random.Generator,
) -> list[Comparison]:
    if choose == "random":
        picked = np.sort(generator.choice(len(columns), size=count, replace=False))
        return [columns[i] for i in picked]

    def distinct(column: Comparison) -> int:
        values = _drawn(column, sample)
        return 0 if values is None else len(values.unique())

    return sorted(columns, key=lambda c: (-distinct(c), c.name))[:count]


def evidence(graph: ContainmentGraph) -> Iterator[str]:
    """What each stage left, in words."""
    for stage in graph.stages:
        yield (
            f"{stage.name}: {stage.edges:,} edges left, {stage.bytes_read:,} bytes read, "
            f"{stage.seconds:.2f} s"
        )
