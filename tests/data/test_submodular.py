"""Set functions by hand, from scratch, and by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import gossamer.data.submodular as module
from gossamer.core.errors import InputError
from gossamer.data.coreset import coverage, herding, k_center, moderate
from gossamer.data.submodular import (
    Cosine,
    Dense,
    FacilityLocation,
    GraphCut,
    LogDeterminant,
    cosine,
    greedy,
)

WORKED = np.array([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.2, 0.1], [0.1, 0.2, 1, 0.8], [0.2, 0.1, 0.8, 1]])


def features(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 5))


def test_graph_cut_by_hand() -> None:
    function = GraphCut(Dense(WORKED))
    np.testing.assert_allclose(function.gains(), [2.2, 2.2, 2.1, 2.1])
    function.add(0)
    np.testing.assert_allclose(function.gains()[1:], [0.4, 1.9, 1.7])
    function.add(2)
    np.testing.assert_allclose(function.gains()[[1, 3]], [0.0, 0.1], atol=1e-12)
    assert greedy(GraphCut(Dense(WORKED)), 4, 3).tolist() == [0, 2, 3]


def test_distance_form_by_hand() -> None:
    """Minus squared distances as similarity: near to what is left, far from the chosen."""
    points = np.array([[0.0, 0], [1, 0], [0, 1], [5, 5], [5, 6]])
    apart = np.square(points[:, None] - points[None]).sum(2)

    def worth(chosen: list[int]) -> list[float]:
        left = [j for j in range(5) if j not in chosen]
        return [float(apart[x, chosen].sum() - apart[x, left].sum()) for x in left]

    assert worth([]) == [-113, -96, -94, -133, -164]
    picks = greedy(GraphCut(Dense(-apart)), 5, 3)
    assert picks.tolist() == [2, 3, 1]


@pytest.mark.parametrize("made", [GraphCut, FacilityLocation, LogDeterminant])
def test_incremental_gains_are_those_from_scratch(made) -> None:
    similarity = Dense(0.5 + 0.5 * Cosine(features(30)).unit @ Cosine(features(30)).unit.T)
    matrix = similarity.matrix

    def value(chosen: list[int]) -> float:
        if made is FacilityLocation:
            return float(matrix[:, chosen].max(1).sum()) if chosen else 0.0
        if made is LogDeterminant:
            inside = matrix[np.ix_(chosen, chosen)] + 1e-6 * np.eye(len(chosen))
            return float(np.linalg.slogdet(inside)[1]) if chosen else 0.0
        return float(matrix[:, chosen].sum() - matrix[np.ix_(chosen, chosen)].sum())

    function = made(similarity)
    chosen: list[int] = []
    for index in greedy(made(similarity), 30, 8).tolist():
        for other in (index, 29):
            if other not in chosen:
                gain = value([*chosen, other]) - value(chosen)
                # Graph cut as published counts a point's similarity to itself once less.
                if made is GraphCut:
                    gain += matrix[other, other]
                assert function.gain(other) == pytest.approx(gain, abs=1e-6)
        function.add(index)
        chosen.append(index)


def test_rows_on_demand_are_the_stored_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    data = features(60)
    stored = greedy(GraphCut(cosine(data)), 60, 20)
    monkeypatch.setattr(module, "STORED", 10)
    assert isinstance(cosine(data), Cosine)
    np.testing.assert_array_equal(greedy(GraphCut(cosine(data)), 60, 20), stored)
    np.testing.assert_allclose(cosine(data).sums(), Dense(WORKED).sums()[:0].sum() + np.array(
        [cosine(data).row(i).sum() for i in range(60)]
    ))  # fmt: skip


@pytest.mark.parametrize("made", [FacilityLocation, GraphCut, LogDeterminant])
def test_lazy_is_naive(made) -> None:
    for seed in range(3):
        similarity = cosine(features(50, seed))
        naive = greedy(made(similarity), 50, 12)
        np.testing.assert_array_equal(greedy(made(similarity), 50, 12, engine="lazy"), naive)


def test_greedy_facility_location_is_within_its_bound() -> None:
    for seed in range(5):
        matrix = Dense(
            0.5 + 0.5 * Cosine(features(10, seed)).unit @ Cosine(features(10, seed)).unit.T
        )
        found = greedy(FacilityLocation(matrix), 10, 3)
        best = max(
            matrix.matrix[:, list(some)].max(1).sum()
            for some in itertools.combinations(range(10), 3)
        )
        assert matrix.matrix[:, found].max(1).sum() >= (1 - 1 / math.e) * best


def test_stochastic_is_close_and_reproducible() -> None:
    similarity = cosine(features(200))
    found = greedy(FacilityLocation(similarity), 200, 20, engine="stochastic", seed=1)
    assert len(set(found.tolist())) == 20
    again = greedy(FacilityLocation(similarity), 200, 20, engine="stochastic", seed=1)
    np.testing.assert_array_equal(found, again)
    naive = greedy(FacilityLocation(similarity), 200, 20)

    def value(rows: np.ndarray) -> float:
        return float(np.stack([similarity.row(int(r)) for r in rows]).max(0).sum())

    assert value(found) > 0.9 * value(naive)


def test_a_negative_best_gain_ends_too() -> None:
    assert len(set(greedy(GraphCut(Dense(np.ones((6, 6)))), 6, 6, engine="lazy").tolist())) == 6


def test_a_duplicate_gains_less_by_twice_its_similarity() -> None:
    data = np.vstack([features(10), features(10)[:1]])
    function = GraphCut(cosine(data))
    before = function.gain(10)
    function.add(0)
    assert function.gain(10) == pytest.approx(before - 2.0, abs=1e-6)


def test_zeros_have_no_direction() -> None:
    row = cosine(np.array([[0.0, 0], [1, 0]])).row(0)
    np.testing.assert_allclose(row, [0.5, 0.5])


def test_too_many() -> None:
    with pytest.raises(InputError, match="5 of 4 points"):
        greedy(GraphCut(Dense(WORKED)), 4, 5)
    with pytest.raises(InputError, match="0 of 3 samples"):
        k_center(np.zeros((3, 1)), 0)
    with pytest.raises(InputError, match="square"):
        Dense(np.zeros((2, 3)))


def test_k_center_is_at_most_twice_the_least_radius() -> None:
    points = features(11, 3)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    least = min(apart[:, list(some)].min(1).max() for some in itertools.combinations(range(11), 3))
    for seed in range(4):
        found = k_center(points, 3, seed=seed)
        assert apart[:, found].min(1).max() <= 2 * least + 1e-6
    assert sorted(k_center(points, 11).tolist()) == list(range(11))


def test_herding_step_by_step() -> None:
    points = features(40, 1)
    found = herding(points, 10)
    mean, total = points.mean(0), np.zeros(5)
    for step, index in enumerate(found):
        away = np.linalg.norm((step + 1) * mean - total - points, axis=1)
        away[found[:step]] = np.inf
        assert away[index] == pytest.approx(away.min())
        total += points[index]


def test_moderate_by_hand() -> None:
    points = np.array([[0.0], [1], [2], [10], [-1]])  # median 1: distances 1, 0, 1, 9, 2
    scores = moderate(points, np.zeros(5, dtype=int))
    assert scores.tolist() == [0.5, 1.0, 0.0, 1.0, 0.5]


def test_coverage() -> None:
    scores = np.concatenate([np.full(90, 0.0), np.linspace(0.5, 1.0, 10)])
    rows = coverage(scores, 10, strata=2, drop_hardest=0.0)
    assert (scores[rows] >= 0.5).sum() == 5
    rows = coverage(scores, 20, strata=2, drop_hardest=0.0)
    assert (scores[rows] >= 0.5).sum() == 10 and len(set(rows.tolist())) == 20
    dropped = coverage(scores, 50, strata=10, drop_hardest=0.1)
    assert scores[dropped].max() < 0.5
    never = coverage(np.array([0.1, np.inf, 0.2]), 3, drop_hardest=0.0)
    assert sorted(never.tolist()) == [0, 1, 2]
