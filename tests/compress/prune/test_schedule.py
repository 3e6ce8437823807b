"""Schedules at the points whose values are known."""

from __future__ import annotations

import itertools

import pytest

from gossamer.compress.prune.schedule import SCHEDULES, cubic, iterative, one_shot


def test_cubic() -> None:
    share = cubic(0.8)
    assert [share(t) for t in (0, 0.2, 0.5, 1)] == pytest.approx([0, 0.3904, 0.7, 0.8])
    assert cubic(0.8, initial=0.5)(0.0) == pytest.approx(0.5)


def test_iterative_removes_the_same_share_of_survivors() -> None:
    share = iterative(1 - 0.8**5)
    left = [1 - share(k / 5) for k in range(6)]
    ratios = [b / a for a, b in itertools.pairwise(left)]
    assert ratios == pytest.approx([0.8] * 5)


def test_one_shot_and_names() -> None:
    assert one_shot(0.3)(0.0) == one_shot(0.3)(1.0) == 0.3
    assert all(make(0.6)(1.0) == pytest.approx(0.6) for make in SCHEDULES.values())
