"""Which tables to keep and from which kept table to rebuild each of the others, at least cost.

Keeping table ``v`` costs ``c_s S_v + m_v`` a period; deleting it and rebuilding it from ``u``
costs ``A_v (c_r S_u + c_w S_v)``, for ``A_v`` accesses, and takes ``l_r S_u + l_w S_v``, which may
not exceed a bound. What a table is rebuilt from must be kept. This is a facility-location problem;
connected parts are solved apart.

Source: OPT-RET and Dyn-Lin of Shah et al., "R2D2: Reducing Redundancy and Duplication in Data
Lakes", SIGMOD 2024, arXiv:2312.13427; how the costs are split is our reading of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gossamer.core.errors import InputError

Edge = tuple[str, str]


@dataclass(frozen=True)
class Costs:
    """Prices a unit of size and period; the defaults are dollars and seconds a gigabyte and month.

    Attributes:
        storage: of keeping.
        read: of reading what is rebuilt from.
        write: of writing what is rebuilt.
        read_seconds: latency of reading.
        write_seconds: latency of writing.
        unit: bytes in a unit of size.
    """

    storage: float = 0.023
    read: float = 0.0004
    write: float = 0.0008
    read_seconds: float = 2.0
    write_seconds: float = 5.0
    unit: float = 1e9

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value) or value < 0 or (name == "unit" and value == 0):
                raise InputError(f"the cost {name} is {value}; give a number of 0 or more")


@dataclass(frozen=True)
class Problem:
    """What may be deleted, and what it costs.

    Attributes:
        keep: cost of keeping each table.
        rebuild: cost of deleting a table and rebuilding it from another, by (parent, child), for
            those that are allowed.
    """

    keep: Mapping[str, float]
    rebuild: Mapping[Edge, float]


@dataclass(frozen=True)
class Retention:
    """A choice.

    Attributes:
        rebuilt: the table each deleted one is rebuilt from.
        cost: of the whole choice.
    """

    rebuilt: Mapping[str, str]
    cost: float


def latency(parent_bytes: float, child_bytes: float, costs: Costs) -> float:
    """Seconds to rebuild a child, as modelled."""
    return (costs.read_seconds * parent_bytes + costs.write_seconds * child_bytes) / costs.unit


def problem(
    sizes: Mapping[str, float],
    edges: Iterable[Edge],
    *,
    costs: Costs | None = None,
    accesses: Mapping[str, float] | None = None,
    maintenance: Mapping[str, float] | None = None,
    max_latency: float | Mapping[str, float] = math.inf,
    stored: Mapping[Edge, float] | None = None,
) -> Problem:
    """The costs of all choices.

    Args:
        sizes: bytes of each table.
        edges: (parent, child) from which the child can be rebuilt.
        costs: prices.
        accesses: of each table in a period. Default: 1 each.
        maintenance: cost a period of keeping each table, beside its storage. Default: 0.
        max_latency: seconds that a rebuild may take; one number, or one for each table (those not
            named have no bound).
        stored: bytes that the recipe of an edge takes (the list of its rows).
    """
    prices = costs or Costs()
    accesses, maintenance, stored = accesses or {}, maintenance or {}, stored or {}
    keep = {
        name: prices.storage * size / prices.unit + maintenance.get(name, 0.0)
        for name, size in sizes.items()
    }
    rebuild = {}
    for parent, child in edges:
        bound = (
            max_latency.get(child, math.inf) if isinstance(max_latency, Mapping) else max_latency
        )
        if latency(sizes[parent], sizes[child], prices) <= bound:
            once = (prices.read * sizes[parent] + prices.write * sizes[child]) / prices.unit
            extra = prices.storage * stored.get((parent, child), 0.0) / prices.unit
            rebuild[parent, child] = accesses.get(child, 1.0) * once + extra
    return Problem(keep, rebuild)


def cost_of(given: Problem, rebuilt: Mapping[str, str]) -> float:
    """What a choice costs.

    Raises:
        ValueError: if something is rebuilt from a table that is not kept, or may not be.
    """
    if any(parent in rebuilt for parent in rebuilt.values()):
        raise ValueError("rebuilt from a table that is deleted")
    if any((parent, child) not in given.rebuild for child, parent in rebuilt.items()):
        raise ValueError("rebuilt along an edge that is not allowed")
    kept = sum(cost for name, cost in given.keep.items() if name not in rebuilt)
    return kept + sum(given.rebuild[parent, child] for child, parent in rebuilt.items())


def exact(given: Problem) -> Retention:
    """The best choice, by integer programming (HiGHS), each connected part for itself."""
    from scipy.sparse.csgraph import connected_components

    # Rebuilding at the price of keeping is never better than keeping.
    edges = [e for e, cost in given.rebuild.items() if cost < given.keep[e[1]]]
    names = sorted({name for edge in edges for name in edge})
    number = {name: i for i, name in enumerate(names)}
    rebuilt: dict[str, str] = {}
    if edges:
        from scipy.sparse import coo_array

        ends = np.array([(number[a], number[b]) for a, b in edges])
        links = coo_array((np.ones(len(ends)), ends.T), shape=(len(names), len(names)))
        _, part = connected_components(links, directed=False)
        by_part: dict[int, list[Edge]] = {}
        for edge in edges:
            by_part.setdefault(int(part[number[edge[0]]]), []).append(edge)
        for chosen in by_part.values():
            rebuilt |= _integer_program(given, chosen)
    return Retention(rebuilt, cost_of(given, rebuilt))


def _integer_program(given: Problem, edges: Sequence[Edge]) -> dict[str, str]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    names = sorted({name for edge in edges for name in edge})
    number = {name: i for i, name in enumerate(names)}
    n, m = len(names), len(edges)
    parents = np.array([number[a] for a, _ in edges])
    children = np.array([number[b] for _, b in edges])
    objective = np.array([given.keep[v] for v in names] + [given.rebuild[e] for e in edges])
    # x_v + sum_u y_uv = 1
    rows = np.concatenate([np.arange(n), children])
    columns = np.concatenate([np.arange(n), n + np.arange(m)])
    once = coo_array((np.ones(n + m), (rows, columns)), shape=(n, n + m)).tocsr()
    # y_uv - x_u <= 0
    rows = np.concatenate([np.arange(m), np.arange(m)])
    columns = np.concatenate([n + np.arange(m), parents])
    signs = np.concatenate([np.ones(m), -np.ones(m)])
    held = coo_array((signs, (rows, columns)), shape=(m, n + m)).tocsr()
    scale = float(objective.max()) or 1.0  # prices may be far below the solver's tolerance
    found = milp(
        objective / scale,
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(held, -np.inf, 0)],
        integrality=np.ones(n + m),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"the solver found no choice: {found.message}")
    chosen = np.flatnonzero(np.round(found.x[n:]))
    return {edges[i][1]: edges[i][0] for i in chosen.tolist()}


def greedy(given: Problem) -> Retention:
    """Takes what saves most first, as long as nothing rests on what is deleted."""
    rebuilt: dict[str, str] = {}
    needed: set[str] = set()
    savings = [(given.keep[e[1]] - cost, e) for e, cost in given.rebuild.items()]
    for saving, (parent, child) in sorted(savings, key=lambda item: (-item[0], item[1])):
        if saving > 0 and child not in rebuilt and child not in needed and parent not in rebuilt:
            rebuilt[child] = parent
            needed.add(parent)
    return Retention(rebuilt, cost_of(given, rebuilt))


def enumerated(given: Problem) -> Retention:
    """The best choice by trying every set of kept tables; for a dozen tables."""
    names = sorted(given.keep)
    best: Retention | None = None
    for flags in itertools.product((True, False), repeat=len(names)):
        kept = {name for name, flag in zip(names, flags, strict=True) if flag}
        rebuilt: dict[str, str] = {}
        for name in names:
            if name in kept:
                continue
            ways = [(given.rebuild[u, name], u) for u in kept if (u, name) in given.rebuild]
            if not ways:
                break
            rebuilt[name] = min(ways)[1]
        else:
            cost = cost_of(given, rebuilt)
            if best is None or cost < best.cost:
                best = Retention(rebuilt, cost)
    assert best is not None  # keeping all is always possible
    return best


@dataclass(frozen=True)
class Chain:
    """Tables ``v_1, v_2, ...`` each of which can only be rebuilt from earlier ones.

    Attributes:
        keep: cost of keeping each ``[n]``.
        rebuild: cost of rebuilding table ``j`` from table ``i < j``, by (i, j); what is absent is
            not allowed.
    """

    keep: Sequence[float]
    rebuild: Mapping[tuple[int, int], float] = field(default_factory=dict)


def neighbours(chain: Chain) -> tuple[float, list[int]]:
    """Dyn-Lin: the best choice where each table can only be rebuilt from the one before, in O(n).

    ``K_i = keep_i + min(K_{i-1}, D_{i-1})`` and ``D_i = rebuild_{i-1,i} + K_{i-1}`` are the costs
    of the first i tables with the last kept or deleted.

    Returns:
        The cost, and the numbers of the deleted tables.
    """
    kept, deleted = 0.0, math.inf
    before: list[tuple[bool, bool]] = []  # was the table before deleted, if this is kept; and not
    for i, price in enumerate(chain.keep):
        way = chain.rebuild.get((i - 1, i), math.inf) if i else math.inf
        before.append((deleted < kept, False))
        kept, deleted = price + min(kept, deleted), way + kept
    now_deleted = deleted < kept
    cost = min(kept, deleted)
    chosen = []
    for i in range(len(chain.keep) - 1, -1, -1):
        if now_deleted:
            chosen.append(i)
        now_deleted = False if now_deleted else before[i][0]
    return cost, chosen[::-1]


def last_kept(chain: Chain) -> tuple[float, list[int]]:
    """Dyn-Lin with transitive edges: each deleted table is rebuilt from the last one kept.

    The state is the last table kept; O(n^2). It is the best choice if a later table is never a
    dearer one to rebuild from, as where tables shrink along the chain.

    Returns:
        The cost, and the numbers of the deleted tables.
    """
    n = len(chain.keep)
    best = [math.inf] * (n + 1)  # best[j]: table j kept, all before decided; n: past the end
    came = [-1] * (n + 1)
    if n:
        best[0] = chain.keep[0]
    for i in range(n):
        between = 0.0
        for j in range(i + 1, n + 1):
            total = best[i] + between + (chain.keep[j] if j < n else 0.0)
            if total < best[j]:
                best[j], came[j] = total, i
            between += chain.rebuild.get((i, j), math.inf)
    kept = set()
    at = came[n]
    while at >= 0:
        kept.add(at)
        at = came[at]
    return (best[n] if n else 0.0), [i for i in range(n) if i not in kept]
