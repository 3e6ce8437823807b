"""Allocations: worked scores, exact counts, multiples, budgets by bisection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.compress.prune.allocation import (
    by_score,
    cost_of,
    lamp,
    quanta,
    select,
    uniform,
    unit_widths,
)
from gossamer.core.dependency import analyse
from gossamer.core.errors import BudgetError, InputError
from gossamer.core.graph import Graph
from gossamer.core.surgery import remove
from gossamer.models.resnet import digits_resnet


def test_lamp_worked_example() -> None:
    (scores,) = lamp([torch.tensor([1.0, -2.0, 3.0, -4.0]).abs()])
    expected = torch.tensor([1 / 30, 4 / 29, 9 / 25, 1.0], dtype=torch.float64)
    assert torch.allclose(scores, expected)


def test_lamp_never_empties_a_family() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=generator) * 10.0**-k for k, n in enumerate((9, 5, 30))]
    assert all(float(p.max()) == 1.0 for p in lamp(scores))
    removed = select(lamp(scores), units=44 - 3)
    assert [int((~mask).sum()) for mask in removed] == [1, 1, 1]


def test_global_and_uniform() -> None:
    scores = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 40.0, 30.0, 20.0])]
    removed = select(by_score(scores), units=3)
    assert [mask.tolist() for mask in removed] == [[True, True, True, False], [False] * 4]
    removed = select(uniform(scores), units=4)
    assert removed[0].tolist() == [True, True, False, False]
    assert removed[1].tolist() == [True, False, False, True]


def test_ties_go_by_index() -> None:
    removed = select(by_score([torch.ones(3), torch.ones(3)]), units=3)
    assert [mask.tolist() for mask in removed] == [[True, True, False], [True, False, False]]


def test_infinite_priorities_stay() -> None:
    removed = select([torch.full((4,), torch.inf), torch.arange(4.0)], units=8)
    assert [int(mask.sum()) for mask in removed] == [0, 3]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.sampled_from([1, 2, 4, 8]),
    st.floats(0.0, 0.95),
    st.integers(0, 10**6),
)
def test_counts_and_multiples(sizes: list[int], quantum: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n, generator=generator) for n in sizes]
    removed = select(by_score(scores), units=share, quantum=quantum)
    kept = [int((~mask).sum()) for mask in removed]
    assert all(k % quantum == 0 or k == n for k, n in zip(kept, sizes, strict=True))
    assert min(kept) >= 1
    wanted = round(share * sum(sizes))
    total = sum(sizes) - sum(kept)
    assert total <= wanted
    if quantum == 1:
        assert total == min(wanted, sum(sizes) - len(sizes))
    # A family is short only of a block that did not fit.
    for k, n in zip(kept, sizes, strict=True):
        if k > quantum and quantum > 1:
            block = n % quantum if k == n and n % quantum else quantum
            assert total + block > wanted
    # What goes is the lowest of its family.
    for mask, score in zip(removed, scores, strict=True):
        if bool(mask.any()) and not bool(mask.all()):
            assert float(score[mask].max()) <= float(score[~mask].min())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.15, 0.95), st.sampled_from([1, 3]))
def test_bisection_meets_the_budget_with_the_fewest(seed: int, share: float, quantum: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n, generator=generator) for n in (12, 20, 31)]
    prices = [torch.rand(n, generator=generator) + 0.1 for n in (12, 20, 31)]

    def cost(removed: list[torch.Tensor]) -> float:
        return float(sum(p[~m].sum() for p, m in zip(prices, removed, strict=True)))

    full = cost([torch.zeros(len(p), dtype=torch.bool) for p in prices])
    removed = select(by_score(scores), cost=cost, target=share * full, quantum=quantum)
    assert cost(removed) <= share * full
    # One block less would miss it: give back the most valuable block that went.
    count = sum(int(m.sum()) for m in removed)
    fewer = select(by_score(scores), units=max(0, count - quantum), quantum=quantum)
    if quantum == 1 and count:
        assert cost(fewer) > share * full


def test_impossible_budget_names_the_least() -> None:
    with pytest.raises(BudgetError, match="least possible is 2"):
        select(
            [torch.rand(5), torch.rand(5)],
            cost=lambda r: float(sum((~m).sum() for m in r)),
            target=1.0,
        )
    with pytest.raises(InputError):
        select([torch.rand(5)])
    with pytest.raises(InputError, match="no budget"):
        cost_of("joules", None)  # type: ignore[arg-type]


def test_quanta_respect_wide_units() -> None:
    assert quanta([1, 2, 8, 3], 8) == [8, 4, 1, 8]


@pytest.mark.parametrize("budget", ["macs", "parameters", "units"])
def test_costs_are_those_of_the_network_that_surgery_makes(budget: str) -> None:
    module = digits_resnet(widths=(8, 16)).eval()
    dependency = analyse(module, (torch.randn(2, 1, 8, 8),))
    assert unit_widths(dependency) == [1] * len(dependency.families)
    scores = [torch.rand(f.units) for f in dependency.families]
    cost = cost_of(budget, dependency)
    full = cost([torch.zeros(f.units, dtype=torch.bool) for f in dependency.families])
    removed = select(by_score(scores), cost=cost, target=0.5 * full, quantum=4)
    result = remove(module, dependency, dict(enumerate(removed)))
    assert result.verified
    after = Graph.trace(result.module, (torch.randn(2, 1, 8, 8),))
    measured = {
        "macs": after.macs,
        "parameters": sum(p.numel() for p in result.module.parameters()),
        "units": analyse(result.module, (torch.randn(2, 1, 8, 8),)).units,
    }
    assert cost(removed) == measured[budget] <= 0.5 * full
    assert all(int((~m).sum()) % 4 == 0 for m in removed)
