"""The treemap's cells against blocks of a t-SNE grid, k-means and chance: three tasks, no user.

A network learns digits; what is explored are all of them, with 60 of one class turned by 90
degrees, which the network has never seen that way. (a) How pure are 8 cells, and how alike the
features in them? (b) How many images are looked at until 20 of a class are seen, if one always goes
where a small sample promises most? (c) Does going into the least accurate cell lead to the turned
digits? The t-SNE grid (t-SNE, then linear assignment to a square) is searched by the same strategy,
on blocks that are cut in eight again and again; the plain grid is read in random order.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, fit
from gossamer.core.task import Classification, seed_of
from gossamer.data.dendrogram import RULES, Dendrogram, Rule
from gossamer.data.gallery import pixel_features
from gossamer.data.treemap import build_dendrogram, spread
from gossamer.data.ward import ward
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.collection import collection_of, open_collection
from gossamer.datasets.digits import digits
from gossamer.experiments.real_data import folder_of
from gossamer.models.build import build
from gossamer.models.plain import ConvNet
from gossamer.parts.embedding import embed
from gossamer.parts.neighbours import kmeans, nearest

CELLS = 8
SAMPLE = 5
"""Images of a cell that are looked at before choosing one."""
WANTED = 20
"""Images of a class that a search is for."""
TURNED = 60
"""Images of one class that are turned."""
LEAST = 10
"""Images below which a cell's accuracy says nothing."""
ZOOMS = 3
PLAIN = "plain grid"
TSNE = "t-SNE grid"


@dataclass(frozen=True)
class Explored:
    """What is explored.

    Attributes:
        features: penultimate features ``[n, d]``.
        truth: classes ``[n]``.
        predicted: predicted classes ``[n]``.
        turned: which images were turned, ``[n]``.
    """

    features: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    turned: np.ndarray


# A region is a set of images that can be divided further: a node of a tree, or a block of a grid.


@dataclass(frozen=True)
class Region:
    """Some images in the order in which they are shown, and the regions within.

    Attributes:
        rows: of the images.
        inside: divides it; a single image gives nothing.
    """

    rows: np.ndarray
    inside: Callable[[], list[Region]]


def node_region(tree: Dendrogram, node: int, rule: Rule) -> Region:
    """A node of a tree; within it are the clusters that a screen shows."""

    def inside() -> list[Region]:
        cut = tree.cut(CELLS, rule, root=node)
        return [node_region(tree, leaf, rule) for leaf in cut.leaves if leaf != node]

    return Region(tree.members(node), inside)


def block_region(grid: np.ndarray) -> Region:
    """A block of a grid of rows (-1 is empty); within it are eight blocks, four by two."""

    def inside() -> list[Region]:
        if grid.size < CELLS:
            return []
        halves = np.array_split(grid, 2, axis=0)
        blocks = [block for half in halves for block in np.array_split(half, 4, axis=1)]
        return [block_region(block) for block in blocks if (block >= 0).any()]

    flat = grid.ravel()
    return Region(flat[flat >= 0], inside)


def purity(cells: Sequence[np.ndarray], truth: np.ndarray) -> float:
    """Share of images that are of the commonest class of their cell."""
    hits = sum(int(np.bincount(truth[rows]).max()) for rows in cells)
    return hits / sum(len(rows) for rows in cells)


def variance(cells: Sequence[np.ndarray], features: np.ndarray) -> float:
    """Mean squared distance of the features to the mean of their cell."""
    total = sum(float(np.square(features[r] - features[r].mean(0)).sum()) for r in cells)
    return total / sum(len(rows) for rows in cells)


def search_cost(top: Region, wanted: np.ndarray) -> int:
    """Images looked at until :data:`WANTED` of those wanted are seen.

    On each screen a sample of every region is looked at; one goes into the region whose sample
    has the largest share of what is wanted, until a sample has nothing else or there is nothing
    within. Then its images are read in order, and after them those of the region around it.

    Args:
        top: everything.
        wanted: which images are wanted, ``[n]`` bool.
    """
    seen: dict[int, None] = {}

    def enough() -> bool:
        return sum(bool(wanted[row]) for row in seen) >= WANTED

    path = [top]
    while not enough():
        regions = path[-1].inside()
        if not regions:
            break
        shares = []
        for region in regions:
            sample = region.rows[spread(len(region.rows), SAMPLE)]
            seen.update(dict.fromkeys(sample.tolist()))
            shares.append(float(wanted[sample].mean()))
        path.append(regions[int(np.argmax(shares))])
        if max(shares) == 1.0:
            break
    for region in reversed(path):
        for row in region.rows.tolist():
            if enough():
                return len(seen)
            seen[row] = None
    return len(seen)


def find_turned(top: Region, data: Explored) -> dict[str, Any]:
    """Goes into the least accurate region again and again.

    Returns:
        ``zooms``: how many times until the least accurate region on the screen holds mostly
        turned images (None if that never happens within three), ``found`` (1 or 0), and ``rank``:
        at each level the rank by accuracy (1 is worst) of the region with most turned images.
    """
    right = data.truth == data.predicted
    here, zooms, ranks = top, None, []
    for level in range(ZOOMS + 1):
        regions = [region for region in here.inside() if len(region.rows) >= LEAST]
        if not regions:
            break
        order = np.argsort([right[region.rows].mean() for region in regions], kind="stable")
        holds = [int(data.turned[region.rows].sum()) for region in regions]
        ranks.append(1 + int(np.flatnonzero(order == int(np.argmax(holds)))[0]))
        here = regions[int(order[0])]
        if zooms is None and data.turned[here.rows].mean() > 0.5:
            zooms = level
    return {"zooms": zooms, "found": float(zooms is not None), "rank": ranks}


def tsne_grid(features: np.ndarray, seed: int) -> np.ndarray:
    """Images on a square grid, neighbours of t-SNE beside each other, ``[side, side]`` of rows.

    Empty places hold -1.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist
    from sklearn.manifold import TSNE as Embedding

    flat = Embedding(random_state=seed, init="pca").fit_transform(features)
    flat = (flat - flat.min(0)) / np.ptp(flat, axis=0)
    side = int(np.ceil(np.sqrt(len(flat))))
    axis = np.linspace(0.0, 1.0, side)
    places = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    rows, at = linear_sum_assignment(cdist(flat, places, "sqeuclidean"))
    grid = np.full(side * side, -1)
    grid[at] = rows
    return grid.reshape(side, side)


def contend(data: Explored, seed: int) -> Iterator[Row]:
    """Every contender on the same images.

    Yields:
        One row each: purity and variance of 8 cells, mean cost of a search over the classes and
        its share of the plain grid's, and where the turned images were found.
    """
    count = len(data.truth)
    draw = np.random.default_rng(seed_of("plain", seed))
    tree = build_dendrogram(data.features, [str(row) for row in range(count)])
    tops: dict[str, Region] = {rule: node_region(tree, tree.root, rule) for rule in RULES}
    tops[TSNE] = block_region(tsne_grid(data.features, seed))
    cells = {name: [region.rows for region in top.inside()] for name, top in tops.items()}
    centres = kmeans(data.features, CELLS, seed=seed)
    member = nearest(data.features, centres)[1][:, 0]
    cells["k-means"] = [np.flatnonzero(member == c) for c in range(CELLS) if (member == c).any()]
    shuffled = draw.permutation(count)
    ends = np.cumsum([len(rows) for rows in cells["min_merging_distance"]])
    cells["random, sizes of the cells"] = np.split(shuffled, ends[:-1])
    cells["random"] = np.array_split(shuffled, CELLS)

    classes = np.unique(data.truth)
    plain = np.mean([_reading_cost(draw.permutation(count), data.truth == c) for c in classes])
    yield {"contender": PLAIN, "seed": seed, "search_cost": float(plain)}
    for name, parts in cells.items():
        row: dict[str, Any] = {
            "contender": name,
            "seed": seed,
            "purity": 100.0 * purity(parts, data.truth),
            "variance": variance(parts, data.features),
        }
        if name in tops:
            cost = float(np.mean([search_cost(tops[name], data.truth == c) for c in classes]))
            row |= {"search_cost": cost, "search_share": cost / float(plain)}
            row |= find_turned(tops[name], data)
        yield row


def _reading_cost(order: np.ndarray, wanted: np.ndarray) -> int:
    return int(np.flatnonzero(np.cumsum(wanted[order]) >= WANTED)[0]) + 1


def explored(
    images: Tensor, truth: np.ndarray, network: nn.Module, task: Classification, seed: int
) -> Explored:
    """Turns some images of one class by 90 degrees and embeds all.

    Args:
        images: raw, ``[n, c, h, w]``.
        truth: classes ``[n]``.
        network: trained.
        task: says how images are prepared.
        seed: decides which images; the class is ``seed`` modulo the number of classes.
    """
    draw = np.random.default_rng(seed_of("turned", seed))
    label = seed % len(task.classes)
    chosen = draw.choice(np.flatnonzero(truth == label), TURNED, replace=False)
    turned = np.zeros(len(truth), dtype=bool)
    turned[chosen] = True
    images = images.clone()
    images[torch.from_numpy(chosen)] = torch.rot90(images[torch.from_numpy(chosen)], 1, (2, 3))
    source = ArraySource(images, torch.from_numpy(truth))
    found = embed(source, network, task.preprocess)
    return Explored(found.features, truth, found.logits.argmax(1), turned)


def quick(seeds: Sequence[int]) -> Iterator[Row]:
    """Digits; a small network that learned from 862 of them."""
    whole = open_collection("digits")
    assert whole.labels is not None
    for seed in seeds:
        task = digits(seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed_of("network", seed))
            network = ConvNet(1, 8, (16, "pool", 32, "pool"), (64,))
        fit(Supervised(network, task), task, epochs=20, batch_size=64, seed=seed, title="network")
        images = whole.fetch(np.arange(len(whole)))
        data = explored(images, whole.labels, network, task, seed)
        yield {
            "contender": "network",
            "seed": seed,
            "accuracy": task.score(network, "test"),
            "accuracy_turned": 100.0 * float((data.truth == data.predicted)[data.turned].mean()),
        }
        yield from contend(data, seed)


def full(seeds: Sequence[int]) -> Iterator[Row]:
    """The test set of CIFAR-10 with a ResNet-50, and 60,000 images by the approximate route."""
    for seed in seeds:
        task = cifar10(folder_of("cifar10"), seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed_of("network", seed))
            network = build("resnet50", classes=10, channels=3)
        fit(Supervised(network, task), task, epochs=100, seed=seed, title="network")
        test = collection_of(task, "test")
        assert test.labels is not None
        images = test.fetch(np.arange(len(test)))
        yield from contend(explored(images, test.labels, network, task, seed), seed)
    whole = open_collection(folder_of("fashion_mnist"))
    assert whole.labels is not None
    features = pixel_features(whole)
    for route in ("micro", "vectors"):
        began = time.perf_counter()
        linkage = ward(features, scale=route)
        seconds = time.perf_counter() - began
        tree = Dendrogram(linkage.children, linkage.heights, whole.names)
        cells = [tree.members(n) for n in tree.cut(CELLS, "min_merging_distance").leaves]
        yield {
            "contender": f"60,000 images, {route}",
            "seed": 0,
            "seconds": seconds,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "cell_purity": 100.0 * purity(cells, whole.labels),
        }


def draw(result: Result, path: Path) -> None:
    """Purity and cost of a search of every contender, with the range of the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("purity", "purity of 8 cells (%)"), ("search_cost", "images until 20 of a class"))
    for number, (metric, label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, number)
        found: dict[str, list[float]] = {}
        for row in result.rows:
            if row.get(metric) is not None:
                found.setdefault(row["contender"], []).append(float(row[metric]))
        mean = [float(np.mean(values)) for values in found.values()]
        low = [m - min(v) for m, v in zip(mean, found.values(), strict=True)]
        high = [max(v) - m for m, v in zip(mean, found.values(), strict=True)]
        axes.barh(list(found), mean, xerr=[low, high], color="#7c93b8", capsize=3)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def _of(metric: str, contender: str) -> Pick:
    return Pick(metric, {"contender": contender})


MAP: Rule = "min_merging_distance"

EXPERIMENT = Experiment(
    spec="dendromap",
    title="cells of the treemap against a t-SNE grid, k-means and chance",
    claims=(
        Claim(
            "8 cells by distance are purer than 8 blocks of a t-SNE grid",
            _of("purity", MAP),
            ">",
            _of("purity", TSNE),
            paper="users group images about as well on both, and prefer the treemap",
        ),
        Claim(
            "blocks of a t-SNE grid are purer than chance",
            _of("purity", TSNE),
            ">",
            _of("purity", "random"),
        ),
        Claim(
            "a search looks at half as many images as reading a plain grid, or fewer",
            _of("search_share", MAP),
            "<=",
            0.5,
            paper="users search about as fast on the treemap as on the t-SNE grid",
        ),
        Claim(
            "an injected subgroup is the least accurate cell within three zooms, on every seed",
            _of("found", MAP),
            ">=",
            1.0,
            paper="case studies find underperforming subgroups of CIFAR-10 and CIFAR-100",
        ),
    ),
    quick=quick,
    full=full,
    quick_seeds=(0, 1, 2, 3, 4),
    draw=draw,
)
