"""Known costs, and the best choice of every small problem by trying all."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gossamer.core.errors import InputError
from gossamer.data.retention import (
    Chain,
    Costs,
    Problem,
    cost_of,
    enumerated,
    exact,
    greedy,
    last_kept,
    neighbours,
    problem,
)

SIZES = {"A": 100.0, "B": 60.0, "C": 60.0, "D": 20.0}
EDGES = [("A", "B"), ("A", "C"), ("B", "C"), ("C", "B"), ("B", "D")]
PRICES = Costs(storage=1.0, read=0.02, write=0.03, read_seconds=0.01, write_seconds=0.02, unit=1.0)


@pytest.mark.parametrize(
    ("bound", "rebuilt", "cost"),
    [
        (10.0, {"B": "A", "C": "A"}, 142.8),
        (2.1, {"C": "B"}, 183.0),
        (1.7, {}, 240.0),
    ],
)
def test_worked_plan(bound: float, rebuilt: dict[str, str], cost: float) -> None:
    given = problem(
        SIZES, EDGES, costs=PRICES, accesses={"A": 0, "B": 5, "C": 1, "D": 30}, max_latency=bound
    )
    for solve in (exact, enumerated):
        found = solve(given)
        assert found.cost == pytest.approx(cost)
        assert found.rebuilt == rebuilt


def test_a_bound_for_each_table_and_the_price_of_a_list() -> None:
    options = {"costs": PRICES, "accesses": {"B": 1.0, "C": 1.0, "D": 1.0}}
    free = exact(problem(SIZES, EDGES, **options))
    assert set(free.rebuilt) == {"B", "C"} or set(free.rebuilt) == {"C", "D"}
    held = exact(problem(SIZES, EDGES, max_latency={"C": 1.0, "B": 1.0}, **options))
    assert set(held.rebuilt) == {"D"}
    dear = {("A", "B"): 50.0, ("A", "C"): 58.0, ("B", "C"): 60.0, ("C", "B"): 60.0}
    listed = problem(SIZES, EDGES, stored=dear, **options)
    assert listed.rebuild["A", "B"] == pytest.approx(50 + 3.8)
    assert exact(listed).cost == pytest.approx(enumerated(listed).cost)


def test_equal_tables_are_never_both_deleted() -> None:
    for n in range(2, 6):
        names = [f"t{i}" for i in range(n)]
        edges = [(a, b) for a in names for b in names if a != b]
        found = exact(problem(dict.fromkeys(names, 100.0), edges, costs=PRICES))
        assert len(found.rebuilt) == n - 1
        assert not set(found.rebuilt) & set(found.rebuilt.values())


def random_problem(seed: int, most: int = 12) -> Problem:
    g = np.random.default_rng(seed)
    n = int(g.integers(2, most + 1))
    names = [f"t{i}" for i in range(n)]
    sizes = {name: float(g.uniform(1, 100)) for name in names}
    edges = [(a, b) for a in names for b in names if a != b and g.random() < 0.3]
    return problem(
        sizes, edges, costs=PRICES, accesses={name: float(g.integers(0, 20)) for name in names},
        maintenance={name: float(g.uniform(0, 5)) for name in names},
        max_latency=float(g.choice([1.0, 2.0, math.inf])),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_exact_is_brute_force(seed: int) -> None:
    given = random_problem(seed, 12 if seed < 6 else 9)
    best = enumerated(given)
    found = exact(given)
    assert found.cost == pytest.approx(best.cost)
    assert found.cost == cost_of(given, found.rebuilt)
    simple = greedy(given)
    assert found.cost <= simple.cost + 1e-9
    assert simple.cost <= sum(given.keep.values()) + 1e-9


def test_greedy_is_not_always_best() -> None:
    assert any(greedy(g).cost > exact(g).cost + 1e-6 for g in map(random_problem, range(40)))


def test_tiny_prices_are_not_lost_in_the_solver() -> None:
    given = random_problem(3)
    small = Problem(
        {k: v * 1e-12 for k, v in given.keep.items()},
        {k: v * 1e-12 for k, v in given.rebuild.items()},
    )
    assert exact(small).cost == pytest.approx(1e-12 * exact(given).cost)


def chain_problem(chain: Chain) -> Problem:
    return Problem(
        {str(i): price for i, price in enumerate(chain.keep)},
        {(str(i), str(j)): cost for (i, j), cost in chain.rebuild.items()},
    )


@pytest.mark.parametrize("seed", range(25))
def test_chains(seed: int) -> None:
    g = np.random.default_rng(seed)
    n = int(g.integers(1, 10))
    keep = g.uniform(1, 10, n).tolist()
    steps = {(i, i + 1): float(g.uniform(0, 8)) for i in range(n - 1) if g.random() < 0.8}
    cost, deleted = neighbours(Chain(keep, steps))
    best = enumerated(chain_problem(Chain(keep, steps)))
    assert cost == pytest.approx(best.cost)
    assert cost == pytest.approx(
        sum(keep[i] for i in range(n) if i not in deleted) + sum(steps[i - 1, i] for i in deleted)
    )
    # Sizes shrink along the chain, so the last table kept is the cheapest to rebuild from.
    sizes = np.sort(g.uniform(1, 100, n))[::-1]
    accesses = g.integers(0, 30, n)
    jumps = {
        (i, j): float(accesses[j] * (0.02 * sizes[i] + 0.03 * sizes[j]))
        for i in range(n)
        for j in range(i + 1, n)
    }
    whole = Chain(sizes.tolist(), jumps)
    cost, deleted = last_kept(whole)
    assert cost == pytest.approx(enumerated(chain_problem(whole)).cost)
    assert 0 not in deleted
    assert cost <= neighbours(Chain(whole.keep, {k: v for k, v in jumps.items() if k[1] - k[0] == 1}))[0] + 1e-9  # fmt: skip  # noqa: E501


def test_empty_chains() -> None:
    assert neighbours(Chain([])) == (0.0, [])
    assert last_kept(Chain([])) == (0.0, [])


def test_impossible_choices_are_errors() -> None:
    given = Problem({"a": 1.0, "b": 1.0, "c": 1.0}, {("a", "b"): 0.1, ("b", "c"): 0.1})
    with pytest.raises(ValueError, match="is deleted"):
        cost_of(given, {"b": "a", "c": "b"})
    with pytest.raises(ValueError, match="not allowed"):
        cost_of(given, {"a": "c"})
    with pytest.raises(InputError, match="storage"):
        Costs(storage=-1)
