"""The knapsack: as good as trying everything, and what the cheaper ways may lose."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.compress.knapsack import knapsack, lagrangian
from gossamer.core.errors import BudgetError, InputError

DELTAS = (
    [0, 0.1, 0.5, 2, 9],
    [0, 0.2, 0.3, 1, 2, 6, 20],
    [0, 0.05, 0.1, 0.4, 0.6, 1.5, 3, 7, 30],
)


def _kept() -> list[list[int]]:
    return [[len(d) - 1 - k for k in range(len(d))] for d in DELTAS]


def test_a_worked_example() -> None:
    """Three layers of 4, 6 and 8 weights, of which exactly 9 go."""
    chosen = knapsack(DELTAS, _kept(), 9)
    assert chosen == [2, 3, 4]
    assert sum(d[k] for d, k in zip(DELTAS, chosen, strict=True)) == pytest.approx(2.1)


def _brute(losses: list[list[float]], costs: list[list[int]], budget: int) -> float:
    return min(
        sum(v[i] for v, i in zip(losses, choice, strict=True))
        for choice in itertools.product(*(range(len(v)) for v in losses))
        if sum(c[i] for c, i in zip(costs, choice, strict=True)) <= budget
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]], int]:
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    # Losses need not fall with cost.
    losses = [draw(st.lists(st.integers(-20, 20), min_size=n, max_size=n)) for n in sizes]
    costs = [draw(st.lists(st.integers(0, 12), min_size=n, max_size=n)) for n in sizes]
    least, most = (sum(pick(c) for c in costs) for pick in (min, max))
    return [[x / 4 for x in v] for v in losses], costs, draw(st.integers(least, most))


@given(problems())
def test_no_choice_is_better(problem: tuple[list[list[float]], list[list[int]], int]) -> None:
    losses, costs, budget = problem
    best = _brute(losses, costs, budget)
    for method, exact in ((knapsack, True), (lagrangian, False)):
        chosen = method(losses, costs, budget)
        assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= budget
        value = sum(v[i] for v, i in zip(losses, chosen, strict=True))
        assert value >= best - 1e-9
        if exact:
            assert value == pytest.approx(best)
    coarse = knapsack(losses, costs, budget, units=3)
    assert sum(c[i] for c, i in zip(costs, coarse, strict=True)) <= budget


def test_the_cheaper_ways_are_close_on_convex_curves() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(200, 20_000, 12)
    grid = np.arange(51) / 50
    costs = [n - (grid * n).astype(int) for n in sizes]
    losses = [rng.uniform(0.5, 2) * grid ** rng.uniform(1.5, 4) * n / 1e4 for n in sizes]
    budget = int(0.3 * sizes.sum())

    def total(chosen: list[int]) -> float:
        return sum(float(v[i]) for v, i in zip(losses, chosen, strict=True))

    exact = total(knapsack(losses, costs, budget))
    assert exact <= total(lagrangian(losses, costs, budget)) <= 1.02 * exact
    assert exact <= total(knapsack(losses, costs, budget, units=2000)) <= 1.02 * exact


def test_identical_convex_curves_are_cut_alike() -> None:
    curve = np.linspace(0, 1, 21) ** 2
    chosen = knapsack([curve] * 4, [100 - 5 * np.arange(21)] * 4, 200)
    assert chosen == [10] * 4


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BudgetError, match="the cheapest choices cost 3"):
        knapsack([[1, 2], [1]], [[1, 2], [2]], 2)
    with pytest.raises(InputError, match="one loss and one cost"):
        knapsack([[1, 2]], [[1]], 2)
    with pytest.raises(InputError, match="whole numbers"):
        knapsack([[1.0]], [[0.5]], 2)
    with pytest.raises(InputError, match="finite"):
        knapsack([[np.nan]], [[1]], 2)
