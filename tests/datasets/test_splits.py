"""Splits: stratified, disjoint, whole, and functions of their seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.errors import InputError
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.splits import assemble, carve, statistics


def source(counts: list[int], side: int = 2) -> ArraySource:
    labels = torch.repeat_interleave(
        torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64)
    )
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 1, side, side) % 256
    return ArraySource(images.to(torch.uint8), labels)


def test_shares_by_hand() -> None:
    # 100, 50 and 10 rows; a tenth is 10, 5 and 1.
    labels = source([100, 50, 10]).labels
    rest, carved = carve(labels, 16, seed=0, purpose="x")
    assert torch.bincount(labels[carved]).tolist() == [10, 5, 1]
    assert sorted([*rest, *carved]) == list(range(160))
    # 7 of 15 + 15 + 15: two classes give 2.33 -> 2 and one gives 3.
    labels = source([15, 15, 15]).labels
    _, carved = carve(labels, 7, seed=0, purpose="x")
    assert sorted(torch.bincount(labels[carved]).tolist()) == [2, 2, 3]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.floats(0, 1),
    st.integers(0, 2**40),
)
def test_every_carving_is_fair(counts: list[int], share: float, seed: int) -> None:
    labels = source(counts).labels
    count = round(share * len(labels))
    rest, carved = carve(labels, count, seed=seed, purpose="x")
    assert sorted([*rest, *carved]) == list(range(len(labels)))
    assert (np.diff(rest) > 0).all() and (np.diff(carved) > 0).all()
    # Every class keeps a row; as many are carved as that allows.
    assert len(carved) == min(count, len(labels) - len(counts))
    for label, size in enumerate(counts):
        kept = int((labels[rest] == label).sum())
        assert kept >= 1
        if len(carved) == count and min(counts) > 1:
            assert abs((size - kept) - size * count / len(labels)) < len(counts)
    again = carve(labels, count, seed=seed, purpose="x")
    assert np.array_equal(again[0], rest) and np.array_equal(again[1], carved)


def test_draws_differ_by_seed_and_purpose() -> None:
    labels = source([100, 100]).labels
    first = carve(labels, 50, seed=0, purpose="test")[1]
    assert not np.array_equal(first, carve(labels, 50, seed=1, purpose="test")[1])
    assert not np.array_equal(first, carve(labels, 50, seed=0, purpose="validation")[1])


def test_a_task_s_splits_are_disjoint_and_whole() -> None:
    pool = source([40, 60])
    pool.images = torch.arange(100.0).view(-1, 1, 1, 1)
    task = assemble(pool, "ab", name="n", seed=3)
    values = {
        split: set(part.fetch(np.arange(len(part))).flatten().tolist())
        for split, part in task.splits.items()
    }
    assert [len(values[s]) for s in ("train", "validation", "test")] == [72, 8, 20]
    assert set.union(*values.values()) == set(range(100))


def test_splits_that_came_apart_are_kept() -> None:
    task = assemble(
        source([40, 60]), "ab", name="n", test=source([3, 4]), validation=source([1, 1])
    )
    assert [task.size(s) for s in ("train", "validation", "test")] == [100, 2, 7]


def test_a_limit_spares_the_test_split() -> None:
    whole = assemble(source([400, 600]), "ab", name="n", seed=1)
    small = assemble(source([400, 600]), "ab", name="n", seed=1, limit=50)
    assert [small.size(s) for s in ("train", "validation", "test")] == [50, 50, 200]
    assert torch.equal(
        small.splits["test"].fetch(np.arange(200)), whole.splits["test"].fetch(np.arange(200))
    )
    assert torch.bincount(small.splits["train"].labels).tolist() == [20, 30]
    with pytest.raises(InputError, match="must be at least 1, and is 0"):
        assemble(source([4, 6]), "ab", name="n", limit=0)


def test_statistics_by_hand() -> None:
    images = torch.tensor([[[[0, 10]], [[3, 3]]], [[[0, 10]], [[3, 3]]]], dtype=torch.uint8)
    mean, std = statistics(ArraySource(images.flip(1).flip(1)[:, :1], torch.tensor([0, 1])), 10.0)
    assert mean == (0.5,) and std == (0.5,)
    flat = ArraySource(images[:, 1:], torch.tensor([0, 1]))
    assert statistics(flat, 10.0) == ((0.3,), (1.0,))  # nothing varies: not divided by zero


def test_statistics_see_the_training_split_only() -> None:
    pool, test = source([50, 50]), source([2, 2])
    test.images = test.images + 200
    task = assemble(pool, "ab", name="n", test=test)
    train = task.splits["train"]
    assert (task.preprocess.mean, task.preprocess.std) == statistics(train, 255.0)


def test_given_statistics_are_taken() -> None:
    task = assemble(source([5, 5]), "ab", name="n", mean=[0.1], std=[0.2])
    assert (task.preprocess.mean, task.preprocess.std) == ((0.1,), (0.2,))
    with pytest.raises(InputError, match="has 1 channels, so mean and std need as many"):
        assemble(source([5, 5]), "ab", name="n", mean=[0.1] * 3, std=[0.2] * 3)


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ([], "holds no training images"),
        ([5, 0], "have one and the same class"),
        ([1, 1], "the validation split of n would be empty"),
    ],
)
def test_too_little_to_split(counts: list[int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        assemble(source(counts), "ab", name="n")
