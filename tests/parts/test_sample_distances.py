"""Distances of sample sets against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import wasserstein_distance

from gossamer.parts.sample_distances import (
    frechet_distance,
    precision_recall,
    sliced_wasserstein,
)


def test_frechet_against_the_textbook() -> None:
    random = np.random.default_rng(0)
    one = random.normal(size=(500, 6)) @ random.normal(size=(6, 6))
    other = random.normal(1.0, 2.0, size=(300, 6))
    a, b = np.cov(one.T), np.cov(other.T)
    wanted = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-8)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-8)
    assert frechet_distance(one, one + 3.0) == pytest.approx(6 * 9.0)


def test_sliced_wasserstein_against_scipy_in_one_dimension() -> None:
    random = np.random.default_rng(1)
    one, other = random.normal(size=(200, 1)), random.normal(0.5, 2.0, size=(300, 1))
    wanted = wasserstein_distance(one[:, 0], other[:, 0])
    assert sliced_wasserstein(one, other) == pytest.approx(wanted, rel=0.01)


def test_precision_and_recall_of_two_clusters() -> None:
    random = np.random.default_rng(2)
    cluster = random.normal(size=(200, 2))
    real = np.concatenate([cluster, cluster + 50.0])
    precision, recall = precision_recall(real, random.normal(size=(200, 2)))
    assert precision > 0.9 and recall == pytest.approx(0.5, abs=0.05)
