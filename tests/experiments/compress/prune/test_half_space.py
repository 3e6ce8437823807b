"""The experiment's networks, controls and claims, and the committed result."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from gossamer.compress.prune.erasing import Space, choose
from gossamer.core.errors import InputError
from gossamer.core.experiment import Result
from gossamer.core.graph import Graph
from gossamer.experiments.compress.prune.half_space import (
    CONTENDERS,
    ERASED,
    ERASERS,
    EXPERIMENT,
    Branches,
    DenseNet,
    full,
    resnet18,
)

COMMITTED = Path(__file__).resolve().parents[4] / "docs" / "results" / "otov3.json"


def test_resnet18_has_the_published_counts() -> None:
    graph = Graph.trace(resnet18(), (torch.randn(2, 3, 32, 32),))
    assert graph.parameters == 11_173_962
    assert round(graph.macs / 1e4) == 55_542  # 555.42 M


def test_share_of_invalid_draws_is_that_of_all_subsets() -> None:
    space = Space.of(Graph.trace(Branches(), (torch.randn(2, 1, 8, 8),)))
    assert len(space.candidates) == 7
    invalid = [not space.is_valid(c) for c in combinations(range(7), ERASED)]
    # Both of a (5 subsets), both of c (5), all of b (1), of 35.
    assert sum(invalid) == 11
    for first in range(7):
        scores = [float(i == first) for i in range(7)]
        assert space.is_valid(choose(space, scores, ERASED))
    result = Result.read(COMMITTED)
    shares = [r["invalid_share"] for r in result.rows if r["contender"] == "random-k"]
    assert all(abs(share - 100 * 11 / 35) < 5 for share in shares)


def test_contenders_try_equally_often() -> None:
    for contenders in (CONTENDERS, ERASERS):
        assert len({len(trials) for _, trials in contenders.values()}) == 1
    assert Graph.trace(DenseNet(), (torch.randn(2, 1, 8, 8),)).parameters == 24_134


def test_committed_result_is_of_these_claims() -> None:
    result = Result.read(COMMITTED)
    assert result.spec == EXPERIMENT.spec == "otov3"
    assert result.mode == "quick"
    assert result.claims == EXPERIMENT.claims
    assert {row["seed"] for row in result.rows} == set(EXPERIMENT.quick_seeds)
    assert all(e.holds is not None for e in result.evidence())
    # Settings were chosen on validation alone: rows of trials know no test accuracy.
    assert all("accuracy" not in row for row in result.rows if "trial" in row)


def test_full_says_where_data_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOSSAMER_DATA", raising=False)
    with pytest.raises(InputError, match="GOSSAMER_DATA"):
        next(iter(full([0])))
