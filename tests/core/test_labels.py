"""The algebra of labels: equalities, products, reshapes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.labels import FIXED, Labels, _aligned


def sets(store: Labels, vector: np.ndarray) -> list[frozenset[int]]:
    return [store.resolve(int(atom)) for atom in vector]


def test_unified_axes_lose_the_same_indices():
    store = Labels()
    a, b, c = store.fresh(3), store.fresh(3), store.fresh(3)
    store.unify(a, b)
    store.unify(b, c)
    assert sets(store, a) == sets(store, c)
    assert len(set(sets(store, a))) == 3


def test_a_shifted_equality_merges_everything_it_must():
    store = Labels()
    a = store.fresh(4)
    store.unify(a[:3], a[1:])
    assert len(set(sets(store, a))) == 1


def test_pinning_one_side_pins_the_other():
    store = Labels()
    a, b = store.fresh(4), store.fresh(4)
    store.unify(a, b)
    store.pin(a[:2])
    assert sets(store, b)[:2] == [frozenset(), frozenset()]
    assert all(sets(store, b)[2:])
    store.unify(None, b)
    assert not any(sets(store, a))


def test_an_axis_seen_as_heads_depends_on_head_and_position():
    store = Labels()
    channels = store.fresh(6)
    heads, positions = store.split(channels, (2, 3))
    assert heads is not None and positions is not None
    for index, found in enumerate(sets(store, channels)):
        assert found == {int(heads[index // 3]), int(positions[index % 3])}
    # The same view again finds the same factors.
    again = store.split(channels, (2, 3))
    assert sets(store, again[0]) == sets(store, heads)  # type: ignore[arg-type]
    # Joined in the other order it is the transposed axis, as in a channel shuffle.
    shuffled = store.join([positions, heads], [3, 2])
    assert shuffled is not None
    order = np.arange(6).reshape(2, 3).T.ravel()
    assert sets(store, shuffled) == [sets(store, channels)[i] for i in order]


def test_grouped_query_heads_keep_two_ways_of_removal():
    store = Labels()
    queries, shared, group = store.fresh(4), store.fresh(2), store.fresh(2)
    store.unify(queries, store.join([shared, group], [2, 2]))
    assert sets(store, queries) == [
        {int(s), int(g)} for s in shared for g in group
    ]  # fmt: skip


def test_a_removed_index_of_a_broadcast_axis_is_one_atom():
    store = Labels()
    channels = store.fresh(3)
    flat = store.join([channels, None], [3, 4])
    assert flat is not None
    assert sets(store, flat) == [sets(store, channels)[i // 4] for i in range(12)]
    assert store.split(flat, (3, 4))[1] is None


def test_factorisations_that_do_not_fit_forbid_rather_than_allow():
    store = Labels()
    channels = store.fresh(12)
    store.split(channels, (3, 4))
    store.split(channels, (4, 3))
    # Whatever is left must be rectangular in both views.
    found = sets(store, channels)
    for atom in {a for s in found for a in s}:
        gone = np.array([atom in s for s in found])
        for shape in ((3, 4), (4, 3)):
            grid = gone.reshape(shape)
            full = grid.all(0)[None] | grid.all(1)[:, None]
            assert (grid <= full).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_aligned_runs_have_equal_volume_and_cover_both_shapes(sizes, random):
    other = list(sizes)
    random.shuffle(other)
    if random.random() < 0.5:
        other = [int(np.prod(sizes))]
    runs = _aligned(sizes, other)
    assert runs[0][0][0] == runs[0][1][0] == 0
    assert (runs[-1][0][1], runs[-1][1][1]) == (len(sizes), len(other))
    for (i, k), (j, l) in runs:
        assert np.prod(sizes[i:k]) == np.prod(other[j:l])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_equality_that_was_stated_holds_in_the_end(data):
    """Random equalities, views and pins: all of them must hold at once afterwards."""
    store = Labels()
    axes = [store.fresh(12) for _ in range(4)]
    stated: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(data.draw(st.integers(1, 8))):
        a = axes[data.draw(st.integers(0, len(axes) - 1))]
        kind = data.draw(st.sampled_from(["unify", "view", "pin", "roll"]))
        if kind == "pin":
            store.pin(a[: data.draw(st.integers(1, 3))])
        elif kind == "view":
            shape = data.draw(st.sampled_from([(3, 4), (2, 6), (2, 2, 3), (4, 3)]))
            parts = store.split(a, shape)
            joined = store.join(parts, shape)
            full = np.zeros(12, dtype=np.int64) if joined is None else joined
            stated.append((a, full))
        else:
            b = axes[data.draw(st.integers(0, len(axes) - 1))]
            shift = data.draw(st.integers(0, 11)) if kind == "roll" else 0
            store.unify(a, np.roll(b, shift))
            stated.append((a, np.roll(b, shift)))
    for left, right in stated:
        assert sets(store, left) == sets(store, right)


def test_fixed_is_the_label_of_nothing():
    store = Labels()
    assert store.resolve(FIXED) == frozenset()
    assert store.product([]) == FIXED
