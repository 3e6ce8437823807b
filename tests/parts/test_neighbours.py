"""Neighbours and k-means against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

import gossamer.parts.neighbours as module
from gossamer.core.errors import InputError
from gossamer.parts.neighbours import kmeans, nearest, normalised


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [1, 4])
def test_as_scikit_learn(metric, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_VALUES", 1000)  # several blocks
    random = np.random.default_rng(0)
    queries, points = random.normal(size=(50, 6)), random.normal(size=(120, 6))
    expected, rows = NearestNeighbors(n_neighbors=k, metric=metric).fit(points).kneighbors(queries)
    distances, found = nearest(queries, points, k=k, metric=metric)
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_allclose(distances, expected, atol=1e-5)


def test_inner_product_and_ties() -> None:
    points = np.array([[1.0, 0], [1, 0], [0, 2], [1, 0]])
    distances, found = nearest(np.array([[1.0, 0]]), points, k=3, metric="inner")
    assert found.tolist() == [[0, 1, 3]] and distances.tolist() == [[-1, -1, -1]]
    assert nearest(points, points, k=1, exclude_self=True)[1][:, 0].tolist() == [1, 0, 0, 0]


def test_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="do not fit"):
        nearest(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(InputError, match="3 neighbours are asked of 3 points"):
        nearest(np.zeros((3, 1)), np.zeros((3, 1)), k=3, exclude_self=True)
    with pytest.raises(InputError, match="5 clusters are asked of 3"):
        kmeans(np.zeros((3, 1)), 5)


@pytest.mark.parametrize("exact", [10_000, 100])
def test_kmeans_finds_clusters(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_KMEANS", exact)
    random = np.random.default_rng(1)
    centres = np.array([[0.0, 0], [20, 0], [0, 20], [20, 20]])
    points = np.concatenate([centre + random.normal(size=(300, 2)) for centre in centres])
    points = points[random.permutation(len(points))]
    found = kmeans(points, 4, seed=3, batch_size=128)
    assert nearest(centres, found)[0].max() < 0.5
    np.testing.assert_array_equal(found, kmeans(points, 4, seed=3, batch_size=128))


def test_rows_of_zeros_stay() -> None:
    np.testing.assert_allclose(normalised(np.array([[3.0, 4], [0, 0]])), [[0.6, 0.8], [0, 0]])
