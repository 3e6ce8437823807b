"""Keeping by scores, and index files."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.errors import InputError
from gossamer.data.selection import (
    Selection,
    keep,
    place_in_class,
    read_selection,
    subset,
    write_selection,
)
from gossamer.datasets import open_task

SCORES = np.array([0.1, 0.9, 0.5, 0.9, np.inf, 0.0])


def test_ends_of_the_ranking() -> None:
    assert keep(SCORES, 0.5).tolist() == [4, 1, 3]
    assert keep(SCORES, 0.5, order="easy").tolist() == [5, 0, 2]
    assert keep(SCORES, 1 / 3, order="middle").tolist() == [2, 1]
    assert set(keep(SCORES, 1.0)) == set(range(6))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.integers(1, 9))
def test_hard_and_easy_share_the_set(scores: list[float], tenths: int) -> None:
    values, fraction = np.array(scores), tenths / 10
    hard = keep(values, fraction)
    wanted = len(values) - len(hard)
    if wanted == 0:
        return
    easy = keep(values, wanted / len(values), order="easy")
    # Ties are cut at the lower row from both sides, so only distinct scores divide the set.
    if len(set(scores)) == len(scores):
        assert set(hard).isdisjoint(easy) and len(hard) + len(easy) == len(values)


@given(st.integers(0, 10_000), st.sampled_from(["hard", "easy", "middle", "random"]))
def test_kept_sets_are_nested(seed: int, order) -> None:
    scores = np.random.default_rng(seed).random(50)
    sets = [set(keep(scores, f, order=order, seed=3)) for f in (0.1, 0.3, 0.7, 1.0)]
    assert all(small <= large for small, large in itertools.pairwise(sets))


def test_balance() -> None:
    labels = np.repeat([0, 1], [30, 10])
    scores = np.concatenate([np.linspace(1, 2, 30), np.linspace(0, 0.5, 10)])
    free = keep(scores, 0.4, labels=labels)
    assert np.bincount(labels[free], minlength=2).tolist() == [16, 0]
    np.testing.assert_array_equal(free, keep(scores, 0.4))
    half = keep(scores, 0.4, labels=labels, balance=0.5)
    assert np.bincount(labels[half]).tolist() == [14, 2]
    assert set(half[labels[half] == 1]) == {38, 39}  # its own best
    assert np.bincount(labels[keep(scores, 0.4, labels=labels, balance=1.0)]).tolist() == [12, 4]
    with pytest.raises(InputError, match="label for every sample"):
        keep(scores, 0.4, balance=0.5)


def test_the_hardest_can_be_dropped() -> None:
    assert keep(SCORES, 0.5, drop_hardest=1 / 6).tolist() == [1, 3, 2]
    with pytest.raises(InputError, match="only 4 are left"):
        keep(SCORES, 0.9, drop_hardest=1 / 3)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.1, float("nan")])
def test_fractions_out_of_range(fraction: float) -> None:
    with pytest.raises(InputError, match="fraction to keep"):
        keep(SCORES, fraction)


def test_scores_that_are_none() -> None:
    with pytest.raises(InputError, match="1 of 2 scores are NaN"):
        keep(np.array([1.0, np.nan]), 0.5)


def test_place_in_class() -> None:
    assert place_in_class(np.array([1, 0, 1, 1, 0])).tolist() == [0, 0, 1, 2, 1]


def test_index_files_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "kept.parquet"
    written = Selection(
        ["a/1", "b/2", "b/3"], np.array([0.1, np.inf, 0.2]), np.array([1, 2]), ["a", "b", "b"],
        {"metric": "el2n", "seed": 0},
    )  # fmt: skip
    write_selection(path, written)
    read = read_selection(path)
    assert list(read.names) == written.names and read.labels == written.labels
    assert read.kept.tolist() == [1, 2] and read.about == written.about
    np.testing.assert_array_equal(read.scores, written.scores)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="is no index file"):
        read_selection(path)
    with pytest.raises(InputError, match="does not exist"):
        read_selection(tmp_path / "none")


def test_subset_of_a_task() -> None:
    task = open_task("digits")
    rows = np.array([5, 2, 9])
    small = subset(task, rows)
    assert small.size("train") == 3 and small.size("test") == task.size("test")
    whole, labels = next(iter(task.batches("train", batch_size=10, shuffle=False)))
    images, own = next(iter(small.batches("train", batch_size=10, shuffle=False)))
    assert images.equal(whole[rows]) and own.equal(labels[rows])
    with pytest.raises(InputError, match="no training image"):
        subset(task, np.array([]))
