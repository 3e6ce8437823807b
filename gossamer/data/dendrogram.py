"""The tree of a hierarchical clustering, as arrays: ranges of leaves, cuts, and its JSON form.

Leaves are nodes 0 to n - 1 and merges n to 2n - 2, the root last. Every node holds the leaves
``order[start:end]``, so a node costs a few numbers whatever it contains, and everything that is
summed over a cluster (images, hits, classes) is a difference of two running sums. Trees of skewed
data are deeper than Python's recursion limit: nothing here calls itself.

Source: Bertucci et al., "DendroMap: Visual Exploration of Large-Scale Image Datasets for Machine
Learning with Treemaps", IEEE VIS 2022, arXiv:2205.06935, and its published code where the paper is
silent. Different on purpose: a node's ``merging_distance`` is its own (the published files keep
the parent's, and its cut by distance takes the smallest first, which dives into one branch).
"""

from __future__ import annotations

import heapq
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np

from gossamer.core.errors import InputError
from gossamer.core.files import whole_file

Rule = Literal["breadth", "min_merging_distance", "max_node_count"]
RULES: tuple[Rule, ...] = ("breadth", "min_merging_distance", "max_node_count")

UNKNOWN = -1
"""The class of an image that has none."""


@dataclass(frozen=True)
class Cut:
    """The nodes that are drawn for a root.

    Attributes:
        drawn: every node that was visited, parents before their children.
        leaves: those that are not split any further, from left to right.
    """

    drawn: tuple[int, ...]
    leaves: tuple[int, ...]


@dataclass(frozen=True)
class Dendrogram:
    """A binary tree of images.

    Attributes:
        children: of each merge, ``[n - 1, 2]``.
        heights: of each merge, ``[n - 1]``.
        filenames: of the leaves, n of them.
        y_true: class of each leaf, ``[n]`` (-1: unknown), or None.
        y_pred: predicted class of each leaf, ``[n]``, or None.
        classes: names of the classes.
        about: how it was made, as JSON values.
    """

    children: np.ndarray
    heights: np.ndarray
    filenames: tuple[str, ...]
    y_true: np.ndarray | None = None
    y_pred: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.filenames)
        if n == 0 or self.children.shape != (n - 1, 2) or self.heights.shape != (n - 1,):
            raise InputError(
                f"a tree of {n} images needs {max(0, n - 1)} merges, not {len(self.children)}"
            )
        used = np.sort(self.children, axis=None)
        below = self.children < np.arange(n, 2 * n - 1)[:, None]
        if not (np.array_equal(used, np.arange(2 * n - 2)) and below.all()):
            raise InputError("the merges are no tree: a node is missing, or merged twice")
        for name, labels in (("true", self.y_true), ("predicted", self.y_pred)):
            if labels is None:
                continue
            if len(labels) != n:
                raise InputError(f"there are {len(labels)} {name} classes for {n} images")
            if labels.min() < UNKNOWN or labels.max() >= len(self.classes):
                raise InputError(
                    f"a {name} class is {int(labels.max())}, but there are "
                    f"{len(self.classes)} classes"
                )

    @property
    def size(self) -> int:
        """How many images."""
        return len(self.filenames)

    @property
    def root(self) -> int:
        """The node that holds everything."""
        return 2 * self.size - 2

    @cached_property
    def _ranges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        children = np.ascontiguousarray(self.children, dtype=np.int64)
        return _ranges_of(children, self.size)

    @property
    def start(self) -> np.ndarray:
        """Where the leaves of each node begin in :attr:`order`, ``[2n - 1]``."""
        return self._ranges[0]

    @property
    def count(self) -> np.ndarray:
        """Images below each node, ``[2n - 1]``."""
        return self._ranges[1]

    @property
    def levels(self) -> np.ndarray:
        """Longest way down to a leaf from each node, ``[2n - 1]``."""
        return self._ranges[2]

    @cached_property
    def order(self) -> np.ndarray:
        """The leaves from left to right, ``[n]``: neighbours in it are alike."""
        order = np.empty(self.size, dtype=np.int64)
        order[self.start[: self.size]] = np.arange(self.size)
        return order

    @cached_property
    def parent(self) -> np.ndarray:
        """Of each node, ``[2n - 1]``; -1 for the root."""
        parent = np.full(2 * self.size - 1, -1, dtype=np.int64)
        parent[self.children.ravel()] = np.repeat(np.arange(self.size, 2 * self.size - 1), 2)
        return parent

    def is_leaf(self, node: int) -> bool:
        """Whether a node is a single image."""
        return node < self.size

    def split(self, node: int) -> tuple[int, int]:
        """The two children of a merge."""
        left, right = self.children[node - self.size]
        return int(left), int(right)

    def height(self, node: int) -> float:
        """The distance at which a node was merged; 0 for a single image."""
        return 0.0 if node < self.size else float(self.heights[node - self.size])

    def members(self, node: int) -> np.ndarray:
        """The images of a node, in leaf order."""
        start = int(self.start[node])
        return self.order[start : start + int(self.count[node])]

    @cached_property
    def _hits(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Running sums of right answers, and of images whose class is known, in leaf order."""
        if self.y_true is None or self.y_pred is None:
            return None
        known = (self.y_true >= 0)[self.order]
        right = (self.y_true == self.y_pred)[self.order] & known
        return np.append(0, np.cumsum(right)), np.append(0, np.cumsum(known))

    def accuracy(self, node: int) -> float | None:
        """Share of right answers below a node, 0 to 1; None where nothing is known."""
        if self._hits is None:
            return None
        start = int(self.start[node])
        stop = start + int(self.count[node])
        right, known = (int(sums[stop] - sums[start]) for sums in self._hits)
        return right / known if known else None

    def cut(
        self,
        k: int,
        rule: Rule | Callable[[int], float] = "breadth",
        *,
        root: int | None = None,
        fits: Callable[[int], bool] | None = None,
    ) -> Cut:
        """Which nodes to draw: from a root down to ``k`` clusters (arXiv:2205.06935, section 4).

        Args:
            k: clusters that are wanted.
            rule: which node is split next. "breadth": level by level, from left to right.
                "min_merging_distance": the one merged at the largest distance, which is the usual
                cut of a dendrogram. "max_node_count": the largest. A function of the node: the
                one with the smallest value.
            root: where to begin. Default: the root of the tree.
            fits: asked before a node is split; one that does not fit stays whole.

        Returns:
            The drawn nodes and the ``k`` leaves among them; fewer where space or images run out.

        Raises:
            InputError: if there is no such rule or node, or k is below 1.
        """
        if k < 1:
            raise InputError(f"at least 1 cluster is shown, not {k}")
        top = self.root if root is None else root
        if not 0 <= top <= self.root:
            raise InputError(f"there is no node {top} in a tree of {self.size} images")
        frontier = _Frontier(self._urgency(rule))
        frontier.push(top)
        drawn, whole, shown = [top], [], 1
        while frontier and shown < k:
            node = frontier.pop()
            if self.is_leaf(node) or (fits is not None and not fits(node)):
                whole.append(node)
                continue
            for child in self.split(node):
                frontier.push(child)
                drawn.append(child)
            shown += 1
        leaves = sorted(whole + list(frontier), key=lambda node: int(self.start[node]))
        return Cut(tuple(drawn), tuple(leaves))

    def _urgency(self, rule: Rule | Callable[[int], float]) -> Callable[[int], float] | None:
        if callable(rule):
            return rule
        match rule:
            case "breadth":
                return None
            case "min_merging_distance":
                return lambda node: -self.height(node)
            case "max_node_count":
                return lambda node: -float(self.count[node])
        raise InputError(f"there is no rule {rule!r:.40}; known are {', '.join(RULES)}")

    # JSON

    def to_json(
        self, path: Path, depth: int | None = None, *, similar: np.ndarray | None = None
    ) -> None:
        """Writes the nested JSON of the paper's tools, ``{"tree": root, "classes": [...]}``.

        Args:
            path: the file; it appears in one rename.
            depth: levels below the root that are written; deeper nodes have no ``children``.
            similar: for each image its nearest others, ``[n, k]``, or None.
        """
        with whole_file(Path(path)) as partial, open(partial, "w", encoding="utf-8") as file:
            file.write('{"tree": ')
            for piece in self._pieces(depth, similar):
                file.write(piece)
            file.write(f', "classes": {json.dumps(list(self.classes))}')
            file.write(f', "about": {json.dumps(self.about)}}}\n')

    def _pieces(self, depth: int | None, similar: np.ndarray | None) -> Iterator[str]:
        waiting: list[tuple[int, int] | str] = [(self.root, 0)]
        while waiting:
            item = waiting.pop()
            if isinstance(item, str):
                yield item
                continue
            node, level = item
            record = json.dumps(self._record(node, similar))
            if self.is_leaf(node) or (depth is not None and level >= depth):
                yield record
                continue
            yield f'{record[:-1]}, "children": ['
            left, right = self.split(node)
            waiting += ["]}", (right, level + 1), ", ", (left, level + 1)]

    def _record(self, node: int, similar: np.ndarray | None) -> dict[str, Any]:
        record: dict[str, Any] = {
            "leaf": self.is_leaf(node),
            "node_index": node,
            "merging_distance": round(self.height(node), 3),
            "node_count": int(self.count[node]),
        }
        if not self.is_leaf(node):
            if (accuracy := self.accuracy(node)) is not None:
                record["accuracy"] = accuracy
            return record
        record |= {"instance_index": node, "filename": self.filenames[node]}
        if similar is not None:
            record["similar"] = [int(other) for other in similar[node]]
        for name, labels in (("true_class", self.y_true), ("predicted_class", self.y_pred)):
            if labels is not None:
                label = int(labels[node])
                record[name] = self.classes[label] if label >= 0 else None
        if self.y_true is not None and self.y_pred is not None:
            record["correct_count"] = int(self.y_true[node] == self.y_pred[node])
        return record

    @classmethod
    def from_json(cls, path: Path) -> Dendrogram:
        """Reads what :meth:`to_json` wrote without ``depth``, however deep it is.

        Heights come back as they were written, rounded to three decimals.

        Raises:
            InputError: if the file is not such a tree.
        """
        try:
            value = parse_deep(Path(path).read_text(encoding="utf-8"))
            return cls._of(value)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        except InputError as error:
            raise InputError(f"{path} is not a whole tree: {error}") from error
        except (
            AttributeError,
            IndexError,
            KeyError,
            OverflowError,
            TypeError,
            ValueError,
        ) as error:
            raise InputError(f"{path} is not a tree of images: {error!r}") from error

    @classmethod
    def _of(cls, value: dict[str, Any]) -> Dendrogram:
        classes = tuple(map(str, value["classes"]))
        label = {name: number for number, name in enumerate(classes)} | {None: UNKNOWN}
        leaves: dict[int, dict[str, Any]] = {}
        merges: dict[int, tuple[int, int, float]] = {}
        waiting = [value["tree"]]
        while waiting:
            node = waiting.pop()
            at = int(node["node_index"])
            if node["leaf"]:
                leaves[at] = node
                continue
            left, right = node["children"]
            pair = (int(left["node_index"]), int(right["node_index"]))
            merges[at] = (*pair, float(node["merging_distance"]))
            waiting += [left, right]
        n = len(leaves)
        rows = [leaves[at] for at in range(n)]
        table = [merges[at] for at in range(n, 2 * n - 1)]

        def labels(key: str) -> np.ndarray | None:
            if key not in rows[0]:
                return None
            return np.array([label[row[key]] for row in rows], dtype=np.int64)

        return cls(
            children=np.array([merge[:2] for merge in table], dtype=np.int64).reshape(-1, 2),
            heights=np.array([merge[2] for merge in table], dtype=np.float64),
            filenames=tuple(str(row["filename"]) for row in rows),
            y_true=labels("true_class"),
            y_pred=labels("predicted_class"),
            classes=classes,
            about=dict(value.get("about", {})),
        )


class _Frontier:
    """Nodes that may still be split: a queue, or the most urgent first (ties: the earlier)."""

    def __init__(self, urgency: Callable[[int], float] | None) -> None:
        self._urgency = urgency
        self._queue: deque[int] = deque()
        self._heap: list[tuple[float, int, int]] = []
        self._pushed = 0

    def __bool__(self) -> bool:
        return bool(self._queue or self._heap)

    def __iter__(self) -> Iterator[int]:
        yield from self._queue
        yield from (node for _, _, node in self._heap)

    def push(self, node: int) -> None:
        if self._urgency is None:
            self._queue.append(node)
        else:
            heapq.heappush(self._heap, (self._urgency(node), self._pushed, node))
            self._pushed += 1

    def pop(self) -> int:
        return self._queue.popleft() if self._urgency is None else heapq.heappop(self._heap)[2]


@numba.njit(nogil=True, cache=True)
def _ranges_of(children: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each node: where its leaves start, how many there are, and the longest way down."""
    total = 2 * n - 1
    start = np.zeros(total, np.int64)
    count = np.ones(total, np.int64)
    levels = np.zeros(total, np.int64)
    for node in range(n, total):
        left, right = children[node - n]
        count[node] = count[left] + count[right]
        levels[node] = max(levels[left], levels[right]) + 1
    for node in range(total - 1, n - 1, -1):
        left, right = children[node - n]
        start[left] = start[node]
        start[right] = start[node] + count[left]
    return start, count, levels


_TOKEN = re.compile(
    r'\s*(?:([\[\]{},:])|("(?:[^"\\\x00-\x1f]|\\.)*")|(-?\d[\d.eE+-]*|true|false|null))'
)


def parse_deep(text: str) -> Any:
    """Reads JSON of any depth; the standard parser calls itself for each level.

    Raises:
        ValueError: if it is not JSON.
    """
    holders: list[list[Any] | dict[str, Any]] = []
    keys: list[str | None] = []
    key: str | None = None
    done: list[Any] = []
    expects = "value"  # or "first" (value or end), "key", "first key", "colon", "next", "end"
    at, length = 0, len(text.rstrip())
    while at < length:
        found = _TOKEN.match(text, at)
        if found is None:
            raise ValueError(f"not JSON at character {at}")
        at = found.end()
        mark, string, plain = found.groups()
        if mark in ("]", "}"):
            closes = expects in ("next", "first" if mark == "]" else "first key")
            if not closes or not holders or isinstance(holders[-1], list) != (mark == "]"):
                raise ValueError(f"unexpected {mark} at character {at - 1}")
            value: Any = holders.pop()
            key = keys.pop()
        elif mark == ",":
            if expects != "next" or not holders:
                raise ValueError(f"unexpected , at character {at - 1}")
            expects = "value" if isinstance(holders[-1], list) else "key"
            continue
        elif mark == ":":
            if expects != "colon":
                raise ValueError(f"unexpected : at character {at - 1}")
            expects = "value"
            continue
        elif expects in ("key", "first key") and string is not None:
            key, expects = json.loads(string), "colon"
            continue
        elif expects not in ("value", "first"):
            raise ValueError(f"unexpected token at character {found.start()}")
        elif mark is not None:
            holders.append([] if mark == "[" else {})
            keys.append(key)
            expects = "first" if mark == "[" else "first key"
            continue
        else:
            value = json.loads(string or plain)
        if not holders:
            done.append(value)
            expects = "end"
            continue
        holder = holders[-1]
        if isinstance(holder, list):
            holder.append(value)
        else:
            assert key is not None
            holder[key] = value
        expects = "next"
    if len(done) != 1 or holders:
        raise ValueError("the text ends too early")
    return done[0]


def chunk_of(tree: Dendrogram, node: int, merges: int = 255) -> dict[str, Any]:
    """The upper part of a subtree, for a viewer that asks for more when it needs it.

    The largest nodes are opened first, so a chunk ends in nodes of about the same size.

    Args:
        tree: the tree.
        node: the top.
        merges: nodes that are opened, at most.

    Returns:
        Columns ``node, left, right, start, count, height, levels`` as lists, parents first;
        children that a chunk does not open are -1 in their own row.
    """
    cut = tree.cut(merges + 1, "max_node_count", root=node)
    rows: Sequence[int] = cut.drawn
    closed = set(cut.leaves)
    splits = [(-1, -1) if at in closed else tree.split(at) for at in rows]
    return {
        "node": list(rows),
        "left": [left for left, _ in splits],
        "right": [right for _, right in splits],
        "start": [int(tree.start[at]) for at in rows],
        "count": [int(tree.count[at]) for at in rows],
        "height": [float(np.float32(tree.height(at))) for at in rows],
        "levels": [int(tree.levels[at]) for at in rows],
    }
