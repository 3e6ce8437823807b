"""Utilities from comparisons: worked values, logistic regression, and what is not identifiable."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import InputError
from gossamer.evaluate.plackett_luce import (
    NotIdentifiable,
    check_connected,
    fit_lists,
    fit_pairs,
    groups,
    log_likelihood,
    rankings,
)
from gossamer.evaluate.ranking_baselines import bradley_terry

WINS = np.array([[0, 3, 4], [1, 0, 3], [0, 1, 0]], float)


def test_three_wins_to_one() -> None:
    found = fit_pairs(np.array([[0.0, 3.0], [1.0, 0.0]]))
    assert found[0] - found[1] == pytest.approx(math.log(3), abs=1e-6)


def test_worked_passes() -> None:
    np.testing.assert_allclose(
        fit_pairs(WINS, passes=1), [1.497281, 0.224315, -1.721595], atol=1e-6
    )
    np.testing.assert_allclose(fit_pairs(WINS), [1.419472, 0, -1.419472], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 7))
def test_the_fixed_point_is_the_maximum_of_the_likelihood(seed: int, models: int) -> None:
    wins = np.random.default_rng(seed).integers(1, 20, (models, models)).astype(float)
    np.fill_diagonal(wins, 0)
    found = fit_pairs(wins)
    chance = 1 / (1 + np.exp(found[None, :] - found[:, None]))
    np.testing.assert_allclose((wins - (wins + wins.T) * chance).sum(1), 0, atol=1e-5)
    logistic = (bradley_terry(wins) - 1000) * math.log(10) / 400
    np.testing.assert_allclose(found, logistic, atol=1e-5)
    np.testing.assert_allclose(fit_pairs(7 * wins), found, atol=1e-6)
    np.testing.assert_allclose(fit_pairs(np.stack([wins, wins.T]))[1], -found, atol=1e-5)


def test_a_warm_start_comes_to_the_same_place() -> None:
    more = WINS + np.array([[0, 0, 1], [2, 0, 0], [1, 0, 0]])
    np.testing.assert_allclose(fit_pairs(more, start=fit_pairs(WINS)), fit_pairs(more), atol=1e-6)


def test_rankings_are_luce_choices() -> None:
    """Against a general optimiser on the likelihood of whole rankings."""
    from scipy.optimize import minimize

    random = np.random.default_rng(0)
    truth = np.array([1.0, 0.4, 0.0, -0.6])
    orders = [
        np.argsort(-(truth + random.gumbel(size=4)))[: random.integers(2, 5)] for _ in range(60)
    ]
    found = fit_lists(rankings([list(order) for order in orders]), 4)

    def loss(free: np.ndarray) -> float:
        g = np.append(free, 0.0)
        return sum(
            np.logaddexp.reduce(g[order[k:]]) - g[order[k]]
            for order in orders
            for k in range(len(order) - 1)
        )

    best = np.append(minimize(loss, np.zeros(3), tol=1e-10).x, 0.0)
    np.testing.assert_allclose(found, best - best.mean(), atol=1e-4)
    # Lists of two are pairs.
    pairs = rankings([[0, 1]] * 3 + [[1, 0]] + [[0, 2]] * 4 + [[1, 2]] * 3 + [[2, 1]])
    np.testing.assert_allclose(fit_lists(pairs, 3), fit_pairs(WINS), atol=1e-6)


def test_groups_that_were_never_compared_are_named() -> None:
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[1, 0] = wins[2, 3] = wins[3, 2] = 1
    with pytest.raises(NotIdentifiable, match="2 parts that were never compared: a, b; c, d") as e:
        check_connected(wins, ["a", "b", "c", "d"])
    assert sorted(e.value.groups) == [["a", "b"], ["c", "d"]]
    inside = fit_pairs(wins[:2, :2])
    np.testing.assert_allclose(inside, 0, atol=1e-9)
    assert np.isfinite(fit_pairs(wins, alpha=0.01)).all()


def test_a_model_that_never_lost_is_named_and_the_order_of_groups_is_kept() -> None:
    wins = WINS.copy()
    wins[1, 0] = 0  # the first never loses any more
    with pytest.raises(NotIdentifiable, match="0 never lost to any of the others") as error:
        fit_pairs(wins)
    assert error.value.groups == [["0"], ["1", "2"]]
    assert [group.tolist() for group in groups(wins)] == [[0], [1, 2]]
    regular = fit_pairs(wins, alpha=0.05)
    assert regular[0] > regular[1] > regular[2]


@pytest.mark.parametrize(
    ("wins", "alpha", "says"),
    [
        (np.ones((2, 3)), 0.0, "not square"),
        (-np.ones((2, 2)), 0.0, "not negative"),
        (np.full((2, 2), np.nan), 0.0, "finite"),
        (np.ones((2, 2)), -1.0, "alpha is -1"),
    ],
)
def test_unusable_counts(wins: np.ndarray, alpha: float, says: str) -> None:
    with pytest.raises(InputError, match=says):
        fit_pairs(wins, alpha=alpha)


def test_likelihood_is_the_mean_of_comparisons() -> None:
    found = fit_pairs(WINS)
    gap = found[0] - found[1]
    one = np.zeros((3, 3))
    one[0, 1] = 2
    assert log_likelihood(found, one) == pytest.approx(-math.log1p(math.exp(-gap)))
