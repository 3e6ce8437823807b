"""A zoomable treemap of images: what is similar lies together, at every level.

Images are clustered by Ward's method on their features (:mod:`gossamer.data.ward`). Of the tree, a
screen shows the K clusters below a root, as boxes whose sizes are whole thumbnails, each filled
with images spread over the cluster. Zooming makes a box the new root. So a screen holds a bounded
number of images, at an abstraction that the user chooses.

Source: Bertucci et al., "DendroMap: Visual Exploration of Large-Scale Image Datasets for Machine
Learning with Treemaps", IEEE VIS 2022, arXiv:2205.06935, and its published code where the paper is
silent. Different on purpose: the cut by distance splits the node merged at the largest distance
first (see :mod:`gossamer.data.dendrogram`); the sample that fills a box is spread over the whole
cluster (the published stride leaves out its tail); a box too low for a label and an image shows
the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gossamer.core.errors import InputError
from gossamer.data.dendrogram import Dendrogram, Rule
from gossamer.data.ward import Scale, ward
from gossamer.parts.neighbours import normalised

Normalise = Literal["standard", "length", "none"]

OUTER = 10.0
"""Pixels around the two children of a box."""
INNER = 10.0
"""Pixels between them."""
TOP = 10.0
"""More pixels above them, for the label."""
LABEL = 20.0
"""Pixels that a label takes from the images of a box."""
_ROUNDING = 1e-6


def build_dendrogram(
    features: np.ndarray,
    filenames: Sequence[str],
    y_true: np.ndarray | None = None,
    y_pred: np.ndarray | None = None,
    *,
    classes: Sequence[str] | None = None,
    method: Literal["ward"] = "ward",
    scale: Scale = "auto",
    normalise: Normalise = "none",
    seed: int = 0,
) -> Dendrogram:
    """Clusters images by their features.

    Args:
        features: ``[n, d]``, one row an image.
        filenames: their names.
        y_true: classes ``[n]``, -1 where unknown, or None.
        y_pred: predicted classes ``[n]``, or None.
        classes: names of the classes. Default: their numbers.
        method: of the linkage.
        scale: how it is computed, see :func:`gossamer.data.ward.ward`.
        normalise: "standard" gives every dimension mean 0 and variance 1, "length" every vector
            length 1; "none" takes features as they are, so that a dimension of a large scale
            dominates. The tree's ``about`` says which it was.
        seed: of the approximate route.

    Returns:
        The tree.

    Raises:
        InputError: if the numbers of rows disagree, or features are not finite.
    """
    if method != "ward":
        raise InputError(f"the linkage is 'ward', not {method!r:.40}")
    features = np.asarray(features)
    if features.ndim != 2 or len(features) != len(filenames):
        raise InputError(
            f"{len(filenames)} names and features of shape {features.shape} do not fit together"
        )
    if classes is None:
        top = max((int(y.max()) for y in (y_true, y_pred) if y is not None and len(y)), default=-1)
        classes = [str(number) for number in range(top + 1)]
    linkage = ward(scaled(features, normalise), scale=scale, seed=seed)
    return Dendrogram(
        linkage.children,
        linkage.heights,
        tuple(filenames),
        None if y_true is None else np.asarray(y_true, dtype=np.int64),
        None if y_pred is None else np.asarray(y_pred, dtype=np.int64),
        tuple(classes),
        {"linkage": method, "route": linkage.route, "normalise": normalise, "seed": seed},
    )


def scaled(features: np.ndarray, normalise: Normalise) -> np.ndarray:
    """Features on the scale in which they are compared, ``[n, d]``.

    A dimension that never changes says nothing, and becomes 0 under "standard".
    """
    if normalise == "none":
        return features
    if normalise == "length":
        return normalised(features)
    if normalise != "standard":
        raise InputError(f"features are scaled 'standard', 'length' or 'none', not {normalise!r}")
    centred = features - features.mean(0, dtype=np.float64)
    spread = centred.std(0)
    flat = spread <= 1e-12 * np.abs(features).max(initial=0.0)
    return np.where(flat, 0.0, centred / np.where(flat, 1.0, spread)).astype(np.float32)


# Layout


@dataclass(frozen=True)
class Box:
    """A rectangle on the screen, in pixels."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0


@dataclass(frozen=True)
class Cell:
    """A node on the screen.

    Attributes:
        node: of the tree.
        box: where.
        images: what fills it, in leaf order, row by row; empty for a box with boxes inside.
        columns: images a row.
    """

    node: int
    box: Box
    images: np.ndarray
    columns: int


def can_split(box: Box, thumb: tuple[float, float]) -> bool:
    """Whether two boxes with an image each fit into a box."""
    width, height = thumb
    return (
        box.width >= 2 * width + INNER + 2 * OUTER
        and box.height >= 2 * height + 3 * TOP + 2 * OUTER + INNER
    )


def slots(length: float, thumb: float, small: int, whole: int) -> tuple[int, int]:
    """How many images long the smaller child is, and the larger one.

    The smaller one gets its share rounded down, but at least one.
    """
    total = int(length // thumb)
    given = max(1, total * small // whole)
    return given, total - given


def split_box(box: Box, counts: tuple[int, int], thumb: tuple[float, float]) -> tuple[Box, Box]:
    """The boxes of the two children (arXiv:2205.06935, section 4.2, and its code).

    A box that is at least as wide as high is cut side by side, otherwise one above the other; the
    child with fewer images (the second on a tie) gets whole thumbnails, the other the rest.

    Args:
        box: of the parent.
        counts: images of the first and the second child.
        thumb: width and height of an image in pixels.
    """
    beside = box.width >= box.height
    length = box.width if beside else box.height
    across = box.height if beside else box.width
    unit, cross = thumb if beside else thumb[::-1]
    label = 0.0 if beside else LABEL
    small, _ = slots(length, unit, min(counts), sum(counts))
    first = small * unit if counts[0] < counts[1] else length - small * unit
    if not beside:
        # The published layout: what the label takes at the top is given to the lower box too.
        first -= TOP + OUTER
    # Frames: along the cut, and across it.
    lead = OUTER if beside else OUTER + TOP
    begin, end = lead, length - OUTER
    stop, go = first - INNER / 2, first + INNER / 2
    if stop - begin < unit + label:
        go += unit + label - (stop - begin)
        stop = begin + unit + label
    if end - go < unit + label:
        stop -= unit + label - (end - go)
        go = end - unit - label
    low, high = (OUTER + TOP, across - OUTER) if beside else (OUTER, across - OUTER)
    if high - low < cross + (LABEL if beside else 0.0):
        # No room for frames: the two take the whole of their parent.
        begin, end, low, high = 0.0, length, 0.0, across
        stop = go = min(max(first, 0.0), length)
    if beside:
        return (
            Box(box.x0 + begin, box.y0 + low, box.x0 + stop, box.y0 + high),
            Box(box.x0 + go, box.y0 + low, box.x0 + end, box.y0 + high),
        )
    return (
        Box(box.x0 + low, box.y0 + begin, box.x0 + high, box.y0 + stop),
        Box(box.x0 + low, box.y0 + go, box.x0 + high, box.y0 + end),
    )


def grid(box: Box, thumb: tuple[float, float]) -> tuple[int, int]:
    """Columns and rows of images in a box, below its label where there is room for both."""
    width, height = thumb
    # A box of one image must hold it, whatever rounding did to its sides.
    across, down = box.width + _ROUNDING, box.height + _ROUNDING
    label = LABEL if down >= height + LABEL else 0.0
    return int(across // width), int((down - label) // height)


def spread(count: int, places: int) -> np.ndarray:
    """Which of ``count`` images in leaf order fill ``places``: every floor(count / places)-th."""
    if places < 1:
        return np.empty(0, dtype=np.int64)
    stride = max(1, count // places)
    return np.arange(0, count, stride)[:places]


def layout(
    tree: Dendrogram,
    node: int | None = None,
    width: float = 1000.0,
    height: float = 700.0,
    thumb: float | tuple[float, float] = 30.0,
    k: int = 8,
    *,
    rule: Rule | Callable[[int], float] = "breadth",
) -> list[Cell]:
    """What a screen shows of a tree: boxes in the order in which they are drawn.

    Args:
        tree: the tree.
        node: the root of the screen. Default: that of the tree.
        width: of the screen, pixels.
        height: of the screen, pixels.
        thumb: side of an image, or its width and height, pixels.
        k: clusters that are wanted.
        rule: which are split first, see :meth:`~gossamer.data.dendrogram.Dendrogram.cut`.

    Returns:
        The cells, parents before their children; those with images are the clusters.

    Raises:
        InputError: if the screen is smaller than an image.
    """
    size = (float(thumb), float(thumb)) if isinstance(thumb, int | float) else thumb
    if min(size) <= 0 or width < size[0] or height < size[1]:
        raise InputError(f"no image of {size[0]:g} x {size[1]:g} fits {width:g} x {height:g}")
    top = tree.root if node is None else node
    boxes = {top: Box(0.0, 0.0, float(width), float(height))}

    def fits(at: int) -> bool:
        # Whoever asks goes on to split, so the children get their boxes here.
        if not can_split(boxes[at], size):
            return False
        children = tree.split(at)
        counts = (int(tree.count[children[0]]), int(tree.count[children[1]]))
        boxes.update(zip(children, split_box(boxes[at], counts, size), strict=True))
        return True

    cut = tree.cut(k, rule, root=top, fits=fits)
    whole = set(cut.leaves)
    cells = []
    for at in cut.drawn:
        columns, rows = grid(boxes[at], size)
        shown = spread(int(tree.count[at]), columns * rows) if at in whole else np.empty(0, int)
        cells.append(Cell(at, boxes[at], tree.members(at)[shown], columns))
    return cells
