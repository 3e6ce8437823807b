"""The tree, its cuts, its JSON form, boxes on a screen, what fills them, and the class table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from gossamer.core.errors import InputError
from gossamer.data.dendrogram import RULES, Dendrogram, chunk_of, parse_deep
from gossamer.data.error_views import class_table
from gossamer.data.treemap import (
    LABEL,
    Box,
    build_dendrogram,
    grid,
    layout,
    scaled,
    slots,
    split_box,
    spread,
)

THUMB = (30.0, 30.0)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"{row}.png" for row in range(count))


def random_tree(count: int, seed: int = 0, classes: int = 4) -> Dendrogram:
    draw = np.random.default_rng(seed)
    return build_dendrogram(
        draw.normal(size=(count, 5)),
        names(count),
        draw.integers(0, classes, count),
        draw.integers(0, classes, count),
        classes=[f"class {c}" for c in range(classes)],
    )


def chain(count: int) -> Dendrogram:
    """The deepest tree there is: every merge adds one image."""
    merges = np.stack([np.r_[0, count + np.arange(count - 2)], np.arange(1, count)], 1)
    return Dendrogram(merges, np.arange(1.0, count), names(count))


# The tree


def test_five_points_on_a_line() -> None:
    tree = build_dendrogram(np.array([0.0, 1.0, 4.0, 6.0, 20.0])[:, None], names(5))
    assert tree.root == 8
    assert tree.count[5:].tolist() == [2, 2, 4, 5]
    assert [tree.height(node) for node in range(5, 9)] == pytest.approx(
        [1.0, 2.0, 6.363961, 21.819716], abs=1e-6
    )


@given(st.integers(1, 80), st.integers(0, 1000))
def test_counts_ranges_and_accuracies_add_up(count: int, seed: int) -> None:
    tree = random_tree(count, seed)
    assert sorted(tree.order.tolist()) == list(range(count))
    assert tree.y_true is not None and tree.y_pred is not None
    right = tree.y_true == tree.y_pred
    for node in range(2 * count - 1):
        assert tree.accuracy(node) == pytest.approx(right[tree.members(node)].mean())
        if tree.is_leaf(node):
            assert tree.members(node).tolist() == [node]
            continue
        left, after = tree.split(node)
        assert tree.count[node] == tree.count[left] + tree.count[after]
        assert set(tree.members(node)) == set(tree.members(left)) | set(tree.members(after))
        assert tree.parent[left] == tree.parent[after] == node
        shares = [tree.accuracy(child) * tree.count[child] for child in (left, after)]  # type: ignore[operator]
        assert tree.accuracy(node) == pytest.approx(sum(shares) / tree.count[node])
        assert tree.levels[node] == 1 + max(tree.levels[left], tree.levels[after])


def test_what_is_no_tree_is_refused() -> None:
    heights = np.ones(2)
    for children in ([[0, 1], [0, 2]], [[0, 1], [4, 2]], [[0, 1], [2, 9]]):
        with pytest.raises(InputError, match="no tree"):
            Dendrogram(np.array(children), heights, names(3))
    with pytest.raises(InputError, match="needs 2 merges"):
        Dendrogram(np.array([[0, 1]]), np.ones(1), names(3))
    with pytest.raises(InputError, match="there are 1 classes"):
        Dendrogram(np.array([[0, 1]]), np.ones(1), names(2), np.array([0, 1]), classes=("a",))


def test_an_image_without_a_class_counts_for_no_accuracy() -> None:
    tree = Dendrogram(
        np.array([[0, 1], [3, 2]]), np.ones(2), names(3),
        np.array([0, -1, 1]), np.array([0, 0, 0]), ("a", "b"),
    )  # fmt: skip
    assert tree.accuracy(4) == 0.5
    assert tree.accuracy(1) is None


# Cuts


@pytest.mark.parametrize("k", [2, 3, 8, 20, 100])
def test_the_cut_by_distance_is_that_of_scipy(k: int) -> None:
    points = np.random.default_rng(5).normal(size=(200, 6))
    tree = build_dendrogram(points, names(200))
    flat = fcluster(linkage(points, "ward"), k, "maxclust")
    ours = {frozenset(tree.members(n).tolist()) for n in tree.cut(k, "min_merging_distance").leaves}
    assert ours == {frozenset(np.flatnonzero(flat == label).tolist()) for label in np.unique(flat)}


def test_breadth_visits_level_by_level() -> None:
    tree = random_tree(300)
    depth = {tree.root: 0}
    for node in range(tree.root, tree.size - 1, -1):
        for child in tree.split(node):
            depth[child] = depth[node] + 1
    drawn = [depth[node] for node in tree.cut(40).drawn]
    assert drawn == sorted(drawn)
    wide = build_dendrogram(np.arange(64.0)[:, None] ** 1.001, names(64))
    assert len(wide.cut(4).leaves) == 4


def test_the_largest_clusters_are_split_first() -> None:
    tree = random_tree(300)
    cut = tree.cut(12, "max_node_count")
    inner = [int(tree.count[node]) for node in cut.drawn if node not in cut.leaves]
    assert min(inner) >= max(int(tree.count[node]) for node in cut.leaves)


@pytest.mark.parametrize("rule", [*RULES, lambda node: float(node)])
@pytest.mark.parametrize("k", [1, 2, 7, 64, 1000])
def test_a_cut_holds_every_image_once(rule: object, k: int) -> None:
    tree = random_tree(90)
    cut = tree.cut(k, rule)  # type: ignore[arg-type]
    assert len(cut.leaves) == min(k, 90)
    together = np.concatenate([tree.members(node) for node in cut.leaves])
    assert np.array_equal(together, tree.order)


def test_bad_cuts_are_refused() -> None:
    tree = random_tree(5)
    for options, sentence in (
        ({"k": 0}, "at least 1"), ({"k": 2, "root": 99}, "no node 99"),
        ({"k": 2, "rule": "depth"}, "no rule 'depth'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            tree.cut(**options)  # type: ignore[arg-type]


# JSON


def test_json_holds_what_the_published_files_hold(tmp_path: Path) -> None:
    tree = random_tree(30)
    similar = np.argsort(np.random.default_rng(0).random((30, 30)), 1)[:, :3]
    tree.to_json(tmp_path / "tree.json", similar=similar)
    value = json.loads((tmp_path / "tree.json").read_text())
    root = value["tree"]
    assert root["node_index"] == 58 and root["node_count"] == 30 and not root["leaf"]
    assert root["merging_distance"] == round(tree.height(58), 3)
    assert root["accuracy"] == tree.accuracy(58)
    node = root
    while not node["leaf"]:
        node = node["children"][0]
    row = node["instance_index"]
    assert node["filename"] == tree.filenames[row] and node["similar"] == similar[row].tolist()
    assert tree.y_true is not None and tree.y_pred is not None
    assert node["true_class"] == tree.classes[tree.y_true[row]]
    assert node["correct_count"] == int(tree.y_true[row] == tree.y_pred[row])

    again = Dendrogram.from_json(tmp_path / "tree.json")
    assert np.array_equal(again.children, tree.children)
    assert again.heights == pytest.approx(tree.heights, abs=5.1e-4)
    assert np.array_equal(again.y_true, tree.y_true)  # type: ignore[arg-type]
    assert (again.filenames, again.classes) == (tree.filenames, tree.classes)


def test_a_tree_deeper_than_the_recursion_limit(tmp_path: Path) -> None:
    tree = chain(20_000)
    assert tree.levels[tree.root] == 19_999
    tree.to_json(tmp_path / "deep.json")
    again = Dendrogram.from_json(tmp_path / "deep.json")
    assert np.array_equal(again.children, tree.children)
    assert len(layout(tree, None, 1200, 900, 20, 20)) == 39
    with pytest.raises(RecursionError):
        json.loads((tmp_path / "deep.json").read_text())


def test_json_to_a_depth(tmp_path: Path) -> None:
    random_tree(30).to_json(tmp_path / "top.json", depth=2)
    root = json.loads((tmp_path / "top.json").read_text())["tree"]
    inner = [node for child in root["children"] for node in child.get("children", [])]
    assert inner and all("children" not in node for node in inner)
    with pytest.raises(InputError, match="is not"):
        Dendrogram.from_json(tmp_path / "top.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.sampled_from([None, 1]))
def test_deep_json_is_read_as_the_standard_parser_does(value: object, indent: int | None) -> None:
    assert parse_deep(json.dumps(value, indent=indent)) == value


@given(st.text('[]{}:,"a1 ', max_size=12))
def test_what_is_no_json_is_refused(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):
            parse_deep(text)
    else:
        assert parse_deep(text) == expected


@pytest.mark.parametrize("text", ["", "[]", '{"tree": 1}', '{"tree": {}, "classes": []}', "{"])
def test_bad_files_are_refused_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=r"bad\.json is not"):
        Dendrogram.from_json(tmp_path / "bad.json")
    with pytest.raises(InputError, match="cannot read"):
        Dendrogram.from_json(tmp_path / "none.json")


def test_chunks_join_to_the_whole_tree() -> None:
    tree = random_tree(700)
    seen: dict[int, tuple[int, int]] = {}
    waiting = [tree.root]
    asked = 0
    while waiting:
        chunk = chunk_of(tree, waiting.pop(), merges=50)
        asked += 1
        inside = set(chunk["node"])
        for node, left, right, count in zip(
            chunk["node"], chunk["left"], chunk["right"], chunk["count"], strict=True
        ):
            assert count == tree.count[node]
            if left >= 0:
                assert {left, right} <= inside
                seen[node] = (left, right)
            elif count > 1:
                waiting.append(node)
    assert seen == {node: tree.split(node) for node in range(700, 1399)}
    assert asked < 200


# Boxes


def test_the_smaller_child_gets_whole_images() -> None:
    assert slots(300.0, 30.0, 1, 4) == (2, 8)
    left, right = split_box(Box(0, 0, 300, 200), (3, 1), THUMB)
    # 240 | 60 before frames: 10 outside, 10 above for the label, 5 on each side of the cut.
    assert (left.x0, left.x1, right.x0, right.x1) == (10, 235, 245, 290 + 0)
    assert (left.y0, left.y1) == (right.y0, right.y1) == (20, 190)
    left, right = split_box(Box(0, 0, 300, 200), (1, 3), THUMB)
    assert left.x1 == 55 and right.x0 == 65
    # On a tie the second is the smaller one.
    left, right = split_box(Box(0, 0, 310, 200), (2, 2), THUMB)
    assert left.x1 == 155 and right.x0 == 165


def test_boxes_one_above_the_other() -> None:
    # 600 high: 20 slots, 5 for the smaller; the cut moves up by the 20 of label and frame.
    upper, lower = split_box(Box(0, 0, 300, 600), (3, 1), THUMB)
    assert (upper.y0, upper.y1, lower.y0, lower.y1) == (20, 425, 435, 590)
    assert (upper.x0, upper.x1) == (10, 290)


def test_a_thin_child_takes_from_its_sibling() -> None:
    left, right = split_box(Box(0, 0, 300, 200), (1000, 1), THUMB)
    assert right.width == pytest.approx(30.0) and left.x1 == right.x0 - 10
    upper, lower = split_box(Box(0, 0, 100, 400), (1, 1000), THUMB)
    assert upper.height == pytest.approx(30.0 + LABEL) and lower.y0 == upper.y1 + 10


def test_frames_go_where_there_is_no_room() -> None:
    left, right = split_box(Box(0, 0, 300, 40), (1, 1), THUMB)
    assert (left.y0, left.y1) == (0, 40)
    assert (left.x0, left.x1, right.x0, right.x1) == (0, 150, 150, 300)


@given(
    st.integers(1, 400), st.integers(0, 50), st.integers(1, 20), st.sampled_from(RULES),
    st.floats(60, 1600), st.floats(60, 1200), st.floats(15, 50),
)  # fmt: skip
def test_cells_lie_inside_their_parents_and_never_overlap(
    count: int, seed: int, k: int, rule: object, width: float, height: float, thumb: float
) -> None:
    tree = random_tree(count, seed)
    cells = layout(tree, None, width, height, thumb, k, rule=rule)  # type: ignore[arg-type]
    box = {cell.node: cell.box for cell in cells}
    for cell in cells:
        if cell.node != tree.root:
            outer = box[int(tree.parent[cell.node])]
            assert outer.x0 - 1e-6 <= cell.box.x0 <= cell.box.x1 <= outer.x1 + 1e-6
            assert outer.y0 - 1e-6 <= cell.box.y0 <= cell.box.y1 <= outer.y1 + 1e-6
    leaves = [cell for cell in cells if len(cell.images)]
    assert len(leaves) <= min(k, count)
    for at, one in enumerate(leaves):
        assert one.box.width >= thumb - 1e-6 and one.box.height >= thumb - 1e-6
        assert set(one.images) <= set(tree.members(one.node))
        for other in leaves[at + 1 :]:
            a, b = one.box, other.box
            apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
            assert apart
    # Every image is below exactly one of them.
    assert sum(int(tree.count[cell.node]) for cell in leaves) == count


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 2, 8, 20])
def test_a_large_screen_shows_exactly_k(rule: object, k: int) -> None:
    tree = random_tree(3000)
    cells = layout(tree, None, 4000, 4000, 20, k, rule=rule)  # type: ignore[arg-type]
    assert sum(len(cell.images) > 0 for cell in cells) == k


def test_one_cluster_is_one_grid() -> None:
    tree = random_tree(1000)
    (cell,) = layout(tree, None, 210, 170, 30, 1)
    assert (cell.box, cell.columns) == (Box(0, 0, 210, 170), 7)
    assert np.array_equal(cell.images, tree.order[spread(1000, 35)])


def test_images_are_spread_over_a_cluster() -> None:
    assert grid(Box(0, 0, 210, 170), THUMB) == (7, 5)
    shown = spread(1000, 35)
    assert len(shown) == 35 and shown[:3].tolist() == [0, 28, 56]
    assert shown.tolist() == list(range(0, 28 * 35, 28))
    assert spread(10, 35).tolist() == list(range(10))
    assert spread(0, 3).tolist() == [] and spread(5, 0).tolist() == []


def test_a_screen_too_small_is_refused() -> None:
    with pytest.raises(InputError, match="fits 20 x 100"):
        layout(random_tree(5), None, 20, 100, 30)


# Features


def test_scales_of_features() -> None:
    draw = np.random.default_rng(0)
    points = draw.normal(size=(50, 3)) * [1.0, 1000.0, 0.0] + [0.0, 5.0, 7.0]
    standard = scaled(points, "standard")
    assert standard.std(0) == pytest.approx([1.0, 1.0, 0.0], abs=1e-5)
    assert np.linalg.norm(scaled(points, "length"), axis=1) == pytest.approx(np.ones(50))
    assert scaled(points, "none") is points
    assert build_dendrogram(points, names(50), normalise="standard").about["normalise"] == (
        "standard"
    )


def test_names_and_features_must_fit() -> None:
    with pytest.raises(InputError, match="do not fit"):
        build_dendrogram(np.zeros((3, 2)), names(2))


# Errors


def test_the_class_table() -> None:
    # Four of class 0, three recognised; five are taken for it.
    truth = np.array([0, 0, 0, 0, 1, 1, 2, -1])
    found = np.array([0, 0, 0, 1, 0, 0, 2, 0])
    table = class_table(truth, found, 4)
    assert (table.actual[0], table.predicted[0], table.right[0]) == (4, 5, 3)
    assert table.accuracy[0] == 0.75
    assert table.false_negative_rate[0] == 0.25
    assert table.false_positive_rate[0] == 0.4
    assert table.accuracy[3] == table.false_negative_rate[3] == table.false_positive_rate[3] == 0.0
    with pytest.raises(InputError, match="out of range"):
        class_table(truth, found, 2)
