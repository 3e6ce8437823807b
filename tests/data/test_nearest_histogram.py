"""Votes: worked numbers, and how much one person can change them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.data.nearest_histogram import (
    count_client_votes,
    nearest_histogram,
    nearest_rows,
    select_rows,
    thresholded,
)
from gossamer.parts.neighbours import Metric

SYNTHETIC = np.array([(0, 0), (1, 0), (0, 2)], dtype=np.float32)
PRIVATE = np.array([(0.1, 0), (0.2, 0.1), (0.9, 0), (0, 1.8), (0.4, 0.1)], dtype=np.float32)


def test_worked_votes() -> None:
    assert nearest_rows(PRIVATE, SYNTHETIC)[:, 0].tolist() == [0, 0, 1, 2, 0]
    assert nearest_histogram(PRIVATE, SYNTHETIC).tolist() == [3.0, 1.0, 1.0]
    two = nearest_histogram(PRIVATE, SYNTHETIC, neighbours=2)
    assert two == pytest.approx([3.5355, 2.8284, 0.7071], abs=5e-5)


def test_worked_threshold_and_selection() -> None:
    weights = thresholded(np.array([1.5, 1.7, 3.2]), 2.0)
    assert weights == pytest.approx([0.0, 0.0, 1.2])
    random = np.random.default_rng(0)
    assert set(select_rows(weights, 50, random=random)[0]) == {2}
    assert thresholded(np.array([-1.0, 2.0]), None).tolist() == [-1.0, 2.0]
    rows, alike = select_rows(np.array([-1.0, 2.0]), 50, random=random)
    assert set(rows) == {1} and not alike
    rows, alike = select_rows(np.zeros(4), 400, random=random)
    assert alike and set(rows) == {0, 1, 2, 3}
    rank, _ = select_rows(np.array([1.0, 3.0, 3.0, 0.0]), 3, how="rank", random=random)
    assert rank.tolist() == [1, 2, 0]


def sets(seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    # A lattice has ties everywhere; copies of a synthetic sample have them in every bit.
    private = random.integers(0, 4, (40, 3)) if ties else random.normal(size=(40, 3))
    synthetic = random.integers(0, 4, (25, 3)) if ties else random.normal(size=(25, 3))
    labels = random.permutation(np.arange(40) % 2), np.arange(25) % 2
    return private.astype(np.float32), synthetic.astype(np.float32), *labels


def norm_of_one(histogram, private, labels, row: int) -> float:
    others = np.delete(np.arange(len(private)), row)
    return float(
        np.linalg.norm(histogram(private, labels) - histogram(private[others], labels[others]))
    )


@given(
    st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(["euclidean", "cosine", "inner"]),
    st.booleans(), st.integers(0, 39),
)  # fmt: skip
def test_one_sample_changes_the_histogram_by_one(
    seed: int, neighbours: int, metric: Metric, ties: bool, row: int
) -> None:
    private, synthetic, labels, bins = sets(seed, ties)

    def histogram(samples: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return nearest_histogram(
            samples, synthetic, neighbours=neighbours, metric=metric,
            private_labels=classes, synthetic_labels=bins,
        )  # fmt: skip

    assert norm_of_one(histogram, private, labels, row) == pytest.approx(1.0, abs=1e-12)


def test_the_check_catches_a_sensitivity_of_two() -> None:
    private, synthetic, labels, _ = sets(0, False)

    def doubled(samples: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return 2.0 * nearest_histogram(samples, synthetic)

    def unscaled(samples: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return np.sqrt(4) * nearest_histogram(samples, synthetic, neighbours=4)

    def normalised(samples: np.ndarray, classes: np.ndarray) -> np.ndarray:
        histogram = nearest_histogram(samples, synthetic)
        return histogram / histogram.max() * 10.0  # depends on everybody

    for mutant in (doubled, unscaled, normalised):
        assert abs(norm_of_one(mutant, private, labels, 3) - 1.0) > 1e-3


@given(st.integers(0, 10_000), st.booleans(), st.integers(1, 3))
def test_order_does_not_matter(seed: int, ties: bool, neighbours: int) -> None:
    private, synthetic, labels, bins = sets(seed, ties)
    options = {"neighbours": neighbours, "synthetic_labels": bins}
    order = np.random.default_rng(seed).permutation(len(private))
    one = nearest_histogram(private, synthetic, private_labels=labels, **options)
    other = nearest_histogram(private[order], synthetic, private_labels=labels[order], **options)
    assert np.array_equal(one, other)
    # Classes one by one, in reverse.
    parts = np.zeros(len(synthetic))
    for label in (1, 0):
        mine, their = labels == label, bins == label
        parts[their] = nearest_histogram(private[mine], synthetic[their], neighbours=neighbours)
    assert np.array_equal(one, parts)
    # Without noise and threshold the weights are the number of samples (of votes, scaled).
    assert thresholded(one, 0.0).sum() == pytest.approx(len(private) * np.sqrt(neighbours))


@given(st.integers(0, 10_000), st.booleans())
def test_nearest_against_brute_force(seed: int, ties: bool) -> None:
    private, synthetic, _, _ = sets(seed, ties)
    apart = np.square(private[:, None].astype(float) - synthetic[None].astype(float)).sum(-1)
    assert nearest_rows(private, synthetic)[:, 0].tolist() == apart.argmin(1).tolist()


def test_many_copies_leave_the_vote_to_the_first() -> None:
    synthetic = np.repeat(np.random.default_rng(0).normal(size=(3, 16)), 40, axis=0)
    rows = nearest_rows(synthetic[::7] + 1e-4, synthetic)[:, 0]
    assert set(rows) <= {0, 40, 80}


def test_one_client_changes_the_histogram_by_one() -> None:
    private, synthetic, labels, bins = sets(4, False)
    clients = np.random.default_rng(1).integers(0, 6, len(private))
    options = {"neighbours": 2, "synthetic_labels": bins}
    every = count_client_votes(private, synthetic, clients, private_labels=labels, **options)
    for client in range(6):
        rest = clients != client
        less = count_client_votes(
            private[rest], synthetic, clients[rest], private_labels=labels[rest], **options
        )
        assert np.linalg.norm(every - less) == pytest.approx(1.0, abs=1e-12)
