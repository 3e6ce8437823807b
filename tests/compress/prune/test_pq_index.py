"""The PQ index: worked values, the axioms of a sparsity measure, the bound, exact counts."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import gossamer
from gossamer.compress.prune.pq_index import (
    adaptive,
    adaptive_pruning,
    compressibility_limit,
    fixed,
    gini_index,
    hoyer_index,
    keep_lower_bound,
    kept_by_magnitude,
    kurtosis,
    pq_index,
    pq_report,
    removable,
)
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.network import Network
from gossamer.datasets import open_task
from gossamer.models.plain import mlp
from gossamer.parts.masks import Masks

PAIRS = [(0.5, 1.0), (1.0, 2.0), (0.2, 1.0), (1.0, 1.2)]


@pytest.mark.parametrize(
    ("weights", "half", "one"),
    [
        ([1, 2, 3, 4], (0.055586, 3.777657), (0.087129, 3.333333)),
        ([2, -2, 2, 2], (0.0, 4.0), (0.0, 4.0)),
        ([0, 0, 5, 0], (0.75, 1.0), (0.5, 1.0)),
        ([1, 1, 0, 0], (0.5, 2.0), (0.292893, 2.0)),
    ],
)
def test_worked_values(weights: list[float], half: Any, one: Any) -> None:
    w = torch.tensor(weights, dtype=torch.float64)
    for (p, q), (index, bound) in (((0.5, 1.0), half), ((1.0, 2.0), one)):
        found = pq_index(w, p, q)
        assert float(found) == pytest.approx(index, abs=1e-6)
        assert float(keep_lower_bound(found, 4, p, q)) == pytest.approx(bound, abs=1e-6)


def test_slack_lowers_the_bound_as_worked() -> None:
    index = pq_index(torch.tensor([1.0, 2, 3, 4]))
    assert float(keep_lower_bound(index, 4, 0.5, 1.0, 0.1)) == pytest.approx(3.122030, abs=1e-6)
    assert float(keep_lower_bound(index, 4, 0.5, 1.0, 1.0)) == pytest.approx(0.944414, abs=1e-6)


def test_counts_of_a_round() -> None:
    def share(keep: float, gamma: float = 1.0) -> int:
        # An index whose bound is exactly ``keep`` of 1000 weights.
        return int(removable(1.0 - keep / 1000, 1000, gamma=gamma))

    assert (share(700), share(50), share(950, 5.0)) == (300, 900, 250)
    # A bound of 700 but for rounding.
    assert int(removable(1.0 - 0.7 + 1e-12, 1000)) == 300
    assert removable(torch.tensor([0.0, 0.5]), torch.tensor([10, 10])).tolist() == [0, 5]


@st.composite
def vectors(draw: st.DrawFn) -> torch.Tensor:
    values = st.floats(0.01, 100, allow_nan=False)
    return torch.tensor(draw(st.lists(values, min_size=2, max_size=30)), dtype=torch.float64)


@given(vectors(), st.sampled_from(PAIRS), st.floats(0.01, 100), st.integers(0, 99))
def test_scaling_cloning_order_and_sign_change_nothing(
    w: torch.Tensor, pair: tuple[float, float], factor: float, seed: int
) -> None:
    index = float(pq_index(w, *pair))
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
    signs = torch.where(order % 2 == 0, 1.0, -1.0)
    for other in (factor * w, torch.cat([w, w]), w[order], signs * w):
        assert float(pq_index(other, *pair)) == pytest.approx(index, abs=1e-9)
    p, q = pair
    assert -1e-12 <= index <= 1 - len(w) ** (1 / q - 1 / p) + 1e-9


@given(vectors(), st.sampled_from(PAIRS), st.data())
def test_the_axioms_of_a_sparsity_measure(
    w: torch.Tensor, pair: tuple[float, float], data: st.DataObject
) -> None:
    index = float(pq_index(w, *pair))
    big, small = int(w.argmax()), int(w.argmin())
    assume(float(w[big] - w[small]) > 1e-3 * float(w[big]))
    # Robin Hood: from the rich to the poor, without changing who is richer.
    gift = data.draw(st.floats(0.05, 0.45)) * float(w[big] - w[small])
    fairer = w.clone()
    fairer[big] -= gift
    fairer[small] += gift
    assert float(pq_index(fairer, *pair)) < index
    # Rising tide: the same for everyone.
    assert float(pq_index(w + float(w.mean()), *pair)) < index
    # Bill Gates: one becomes rich beyond measure.
    richer = w.clone()
    richer[big] *= 1e6
    assert float(pq_index(richer, *pair)) > index
    # Babies: zeros are born.
    assert float(pq_index(torch.cat([w, torch.zeros(3)]), *pair)) > index


@given(vectors(), st.sampled_from(PAIRS))
def test_the_bound_holds_with_the_true_slack(w: torch.Tensor, pair: tuple[float, float]) -> None:
    p, q = pair
    index = pq_index(w, p, q)
    mass = w.pow(p).sort(descending=True).values
    for r in range(1, len(w) + 1):
        eta = float(mass[r:].sum() / mass[:r].sum())
        assert r >= float(keep_lower_bound(index, len(w), p, q, eta)) - 1e-6 * len(w)


def test_only_what_is_left_counts_and_large_vectors_do_not_overflow() -> None:
    w = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0, 9.0])
    mask = torch.tensor([True] * 4 + [False] * 2)
    assert float(pq_index(w, mask=mask)) == pytest.approx(0.055586, abs=1e-6)
    assert float(pq_index(w, mask=torch.zeros(6, dtype=torch.bool))) == 0.0
    assert float(pq_index(torch.zeros(0))) == 0.0
    rows = pq_index(torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]))
    assert rows.tolist() == pytest.approx([0.5, 0.0])
    huge = torch.full((1_000_000,), 1e-30)
    assert float(pq_index(huge)) == pytest.approx(0.0, abs=1e-9)
    normal = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    # For normal weights: 1 - (E|w|^(1/2))^2 / E|w|.
    half = 2**0.25 * math.gamma(0.75) / math.sqrt(math.pi)
    expected = 1 - half**2 / math.sqrt(2 / math.pi)
    assert float(pq_index(normal)) == pytest.approx(expected, abs=1e-3)


def test_other_measures_have_their_known_values() -> None:
    assert gini_index(torch.tensor([1.0, -2, 3, -4])) == pytest.approx(0.25)
    assert gini_index(torch.ones(5)) == pytest.approx(0.0)
    assert hoyer_index(torch.tensor([0.0, 0, 3])) == pytest.approx(1.0)
    assert hoyer_index(torch.ones(4)) == pytest.approx(0.0)
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert kurtosis(normal) == pytest.approx(3.0, abs=0.05)
    assert (gini_index(torch.zeros(3)), hoyer_index(torch.zeros(3)), kurtosis(torch.zeros(3))) == (
        0.0, 0.0, 0.0,
    )  # fmt: skip


def test_scopes_remove_their_own_counts() -> None:
    weights = {"a": torch.tensor([[5.0, 1, 4, 2], [3, 3, 3, 3]]), "b": torch.tensor([[9.0, 0.5]])}
    alive = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
    alive["a"][0, 1] = False
    every = kept_by_magnitude(weights, alive, fixed(0.5), "global")
    # Nine are left, four go: 0.5, 2 and two of the threes, the first ones.
    assert every["a"].tolist() == [[True, False, True, False], [False, False, True, True]]
    assert every["b"].tolist() == [[True, False]]
    layer = kept_by_magnitude(weights, alive, fixed(0.5), "layer")
    assert [int(m.sum()) for m in layer.values()] == [4, 1]
    neuron = kept_by_magnitude(weights, alive, fixed(0.5), "neuron")
    assert neuron["a"].tolist() == [[True, False, True, False], [False, False, True, True]]
    # A share of everything leaves one weight each.
    last = kept_by_magnitude(weights, alive, fixed(1.0), "neuron")
    assert [m.sum(1).tolist() for m in last.values()] == [[1, 1], [1]]
    # Equal weights are not compressible.
    same = kept_by_magnitude(weights, alive, adaptive(), "neuron")
    assert int(same["a"][1].sum()) == 4 and int(same["a"][0].sum()) == 3
    other = kept_by_magnitude(
        weights, alive, fixed(0.5), "layer", ranked_by={n: -w.exp() for n, w in weights.items()}
    )
    assert torch.equal(other["a"], layer["a"])


def test_the_limit_is_where_the_index_turns() -> None:
    assert compressibility_limit([0.5, 0.4, 0.3, 0.35, 0.2]) == 2
    assert compressibility_limit([0.5, 0.6, 0.4, 0.3]) is None
    assert compressibility_limit([0.3, 0.4]) is None


@pytest.fixture(scope="module")
def task() -> Any:
    torch.set_num_threads(1)
    return open_task("digits", limit=200)


@pytest.fixture(scope="module")
def first() -> nn.Module:
    torch.manual_seed(0)
    return mlp((64, 24, 10))


@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_a_run_prunes_what_its_index_says_and_rewinds(
    first: nn.Module, task: Any, scope: Any
) -> None:
    network = Network(first, task.example_inputs)
    made = adaptive_pruning(
        network, task, rounds=2, epochs=2, lr=0.05, scope=scope, cpu=True, batch_size=32
    )
    report = made.steps[-1]["report"]
    assert [r["round"] for r in report["rounds_run"]] == [1, 2]
    assert 0 < report["rounds_run"][0]["share"] <= 0.9
    if scope == "global":
        # The first round by hand.
        module = copy.deepcopy(first)
        Retraining(epochs=2, lr=0.05, batch_size=32, clip=1.0).train(
            module, task, seed=gossamer.core.task.seed_of("first", 0)
        )
        masks = Masks.full(module, ["1.weight", "3.weight"])
        index = pq_report(module, masks)["global"]
        assert report["index_dense"] == pytest.approx(index)
        bound = math.ceil(float(keep_lower_bound(index, masks.total, 0.5, 1.0)) - 1e-6)
        assert report["rounds_run"][0]["remaining"] == bound
    untouched = adaptive_pruning(network, task, rounds=1, epochs=0, scope=scope, cpu=True)
    for name in ("1.weight", "3.weight"):
        now, then = untouched.module.get_parameter(name), first.get_parameter(name)
        assert torch.equal(now[now != 0], then[now != 0])


def test_a_run_stops_at_the_sparsity(first: nn.Module, task: Any, tmp_path: Path) -> None:
    options = {"rounds": 9, "sparsity": 0.5, "epochs": 1, "lr": 0.05, "gamma": 4.0}
    recipe = Recipe.of(("adaptive-pruning", options))
    result = gossamer.shrink(first, task, recipe=recipe, out=tmp_path / "out", cpu=True)
    report = result.report["steps"][-1]["report"]
    assert report["remaining"] == round(0.5 * (64 * 24 + 240))
    shares = np.array([r["share"] for r in report["rounds_run"]])
    assert len(shares) < 9 and (shares > 0).all()


def test_bad_input_is_one_sentence(first: nn.Module, task: Any) -> None:
    network = Network(first, task.example_inputs)
    with pytest.raises(InputError, match="p < q"):
        pq_index(torch.ones(3), 1.0, 1.0)
    with pytest.raises(InputError, match="p < q"):
        adaptive_pruning(network, task, p=1.0, q=0.5)
    with pytest.raises(InputError, match="beta in"):
        adaptive_pruning(network, task, beta=0.0)
    with pytest.raises(InputError, match=r"\(0, 1\)"):
        adaptive_pruning(network, task, sparsity=1.5)
    with pytest.raises(InputError, match="eta is 0 or more"):
        keep_lower_bound(0.5, 3, 0.5, 1.0, -1.0)
