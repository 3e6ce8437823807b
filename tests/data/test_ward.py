"""Ward linkage: worked heights, scipy's merges, weights, ties, and trees of any depth."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import linkage

from gossamer.core.errors import InputError
from gossamer.data import ward as module
from gossamer.data.dendrogram import Dendrogram
from gossamer.data.ward import Scale, ward

LINE = np.array([0.0, 1.0, 4.0, 6.0, 20.0])[:, None]
ROUTES = [route for route in get_args(Scale) if route != "auto"]


def leaves(children: np.ndarray) -> list[frozenset[int]]:
    """The set of leaves of every merge."""
    found = [frozenset([leaf]) for leaf in range(len(children) + 1)]
    for left, right in children:
        found.append(found[left] | found[right])
    return found[len(children) + 1 :]


@pytest.mark.parametrize("route", ROUTES)
def test_five_points_on_a_line(route: Scale) -> None:
    found = ward(LINE, scale=route, micro_clusters=5)
    assert found.heights == pytest.approx([1.0, 2.0, 6.363961, 21.819716], abs=1e-6)
    assert leaves(found.children) == [{0, 1}, {2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}]
    assert found.route == route


def test_weighted_centroids_merge_like_their_points() -> None:
    found = ward(np.array([[0.5], [5.0]]), weights=np.array([2, 2]), scale="vectors")
    assert found.heights == pytest.approx([6.363961], abs=1e-6)
    found = ward(np.array([[0.5], [5.0], [20.0]]), weights=np.array([2, 2, 1]))
    assert found.heights == pytest.approx([6.363961, 21.819716], abs=1e-6)


@given(st.integers(2, 60), st.integers(1, 30), st.integers(0, 10_000))
def test_chains_give_the_merges_of_scipy(count: int, width: int, seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(count, width))
    expected = linkage(points, "ward")
    found = ward(points, scale="vectors")
    assert found.heights == pytest.approx(expected[:, 2], rel=1e-9)
    assert leaves(found.children) == leaves(expected[:, :2].astype(int))


def test_all_routes_agree_on_clusters_of_one() -> None:
    points = np.random.default_rng(1).normal(size=(300, 12))
    first, *others = [ward(points, scale=route, micro_clusters=300) for route in ROUTES]
    for other in others:
        assert np.array_equal(first.children, other.children)
        assert other.heights == pytest.approx(first.heights, rel=1e-9)


def test_small_clusters_keep_far_groups_apart() -> None:
    draw = np.random.default_rng(2)
    group = draw.integers(0, 6, 3_000)
    points = 50.0 * draw.normal(size=(6, 8))[group] + draw.normal(size=(3_000, 8))
    found = ward(points, scale="micro", micro_clusters=60)
    tree = Dendrogram(found.children, found.heights, tuple(map(str, range(3_000))))
    cells = tree.cut(6, "min_merging_distance").leaves
    assert sorted(len(np.unique(group[tree.members(node)])) for node in cells) == [1] * 6
    assert np.array_equal(found.children, ward(points, scale="micro", micro_clusters=60).children)


def test_equal_heights_are_in_the_order_of_their_leaves() -> None:
    # Pairs at distance 1, far from each other, in shuffled order.
    points = np.repeat(np.arange(20.0) * 100.0, 2) + np.tile([0.0, 1.0], 20)
    shuffled = np.random.default_rng(3).permutation(40)
    for route in ("stored", "vectors"):
        found = ward(points[shuffled][:, None], scale=route)
        smallest = [min(group) for group in leaves(found.children)[:20]]
        assert found.heights[:20] == pytest.approx(np.ones(20))
        assert smallest == sorted(smallest)
    assert (found.children < 40 + np.arange(39)[:, None]).all()


def test_equal_vectors_make_a_tree_of_height_zero() -> None:
    found = ward(np.ones((500, 9)), scale="vectors")
    assert (found.heights == 0.0).all()
    assert leaves(found.children)[-1] == set(range(500))


def test_children_precede_their_parents_where_rounding_swaps_them() -> None:
    # A parent that seems lower than its child by a rounding error.
    pairs = np.array([[0, 1], [4, 2], [5, 3]])
    children, heights = module._in_order(pairs, np.array([1.0, 1.0 - 1e-9, 0.5]))
    assert children.tolist() == [[0, 1], [4, 2], [5, 3]]
    assert heights.tolist() == [1.0, 1.0 - 1e-9, 0.5]


def test_one_image_is_a_tree() -> None:
    assert ward(np.zeros((1, 3))).children.shape == (0, 2)


@pytest.mark.parametrize(
    "bad, sentence",
    [
        (np.zeros((0, 3)), "needs vectors"),
        (np.zeros(3), "needs vectors"),
        (np.array([[0.0], [np.nan]]), "NaN"),
    ],
)
def test_bad_features_are_refused(bad: np.ndarray, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ward(bad)


def test_bad_weights_are_refused() -> None:
    with pytest.raises(InputError, match="takes no weights"):
        ward(LINE, weights=np.ones(5), scale="stored")
    with pytest.raises(InputError, match="one weight above 0"):
        ward(LINE, weights=np.zeros(5), scale="vectors")
