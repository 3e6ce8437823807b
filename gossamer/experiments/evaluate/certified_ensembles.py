"""Run-off elections against plain votes under certified poisoning of the training data.

Every contender learns from all training images of a data set, split by content, and certifies the
same test images; under each training the vote and the run-off election are held on the same
logits. Contenders: disjoint parts (DPA), overlapping parts (FA) and summed models (DPA*), which
cost d times the training, each with and without run-off election. Nothing is tuned: features and
networks are the same for all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import cosine, sgd
from gossamer.core.task import Source
from gossamer.datasets.augment import compose, flip, shift
from gossamer.datasets.collection import Collection, open_collection
from gossamer.evaluate.certified_ensembles import Method, PoisonCertifiedEnsemble
from gossamer.evaluate.part_learners import NetworkLearner, PartLearner, RidgeLearner
from gossamer.evaluate.vote_certificates import Certified, certified_accuracy
from gossamer.experiments.real_data import folder_of
from gossamer.models.network_in_network import network_in_network

log = logging.getLogger(__name__)

FRACTIONS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
"""Of k: sizes of poisoning that are reported."""
NAMES: dict[Method, str] = {"dpa": "DPA", "fa": "FA", "dpa*": "DPA*"}


@dataclass(frozen=True)
class Work:
    """What the contenders compete on.

    Attributes:
        name: of data, base models and k, for the rows.
        data: folder of the data.
        learner: makes the base learner of a seed.
        k: parts.
        methods: methods with their d.
        test_images: how many of the test images, from the first.
    """

    name: str
    data: str
    learner: Callable[[int], PartLearner]
    k: int
    methods: tuple[tuple[Method, int], ...] = (("dpa", 1),)
    test_images: int = 4000


def contend(work: Work, train: Source, test: Source, classes: int, seed: int) -> Iterator[Row]:
    """Trains and certifies every contender for one seed.

    Yields:
        A row for each contender (accuracies in percent), and a row for each gain: the least
        difference of certified accuracies over every whole poisoning size from .2 k to .4 k.
    """
    truth = test.labels.numpy()
    sizes = np.arange(int(np.ceil(0.2 * work.k)), int(np.floor(0.4 * work.k)) + 1)
    reported = [round(fraction * work.k) for fraction in FRACTIONS]
    where = {"work": work.name, "k": work.k, "seed": seed}
    elections: dict[str, Certified] = {}
    for method, d in work.methods:
        ensemble = PoisonCertifiedEnsemble(
            work.learner(seed), k=work.k, d=d, method=method, seed=seed
        ).fit(train, classes)
        lacking = ensemble.partition.lacking(train.labels.numpy(), classes)
        for rule, certified in ensemble.certify(test).items():
            name = NAMES[method] + ("+ROE" if rule == "roe" else "")
            elections[name] = certified
            found = certified_accuracy(certified, truth, reported)
            row: dict[str, Any] = where | {
                "contender": name,
                "d": d,
                "clean": float(found[0]),
                "mean_radius": float(certified.radii.mean()),
                "sizes": reported,
                "certified": found.tolist(),
                "parts_lacking_classes": float((lacking > 0).mean()),
            }
            log.info("%s", row)
            yield row
    gains = [(f"{NAMES[m]}+ROE", NAMES[m]) for m, _ in work.methods]
    gains += [(NAMES[m], "DPA") for m, _ in work.methods if m != "dpa"]
    for better, plain in gains:
        one = certified_accuracy(elections[better], truth, sizes)
        two = certified_accuracy(elections[plain], truth, sizes)
        clean = [certified_accuracy(elections[n], truth, [0])[0] for n in (better, plain)]
        yield where | {
            "gain": f"{better} over {plain}",
            "least_gain": float((one - two).min()),
            "mean_gain": float((one - two).mean()),
            "clean_difference": float(clean[0] - clean[1]),
            "clean_apart": float(abs(clean[0] - clean[1])),
        }


def small_network() -> nn.Module:
    """Two convolutions with strides and a linear layer: 32 x 32 colour images to ten classes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4, 10),
    )


def ridge(seed: int) -> PartLearner:
    """300 random cosine features, as for every part."""
    return RidgeLearner(seed=seed)


def small_networks(seed: int) -> PartLearner:
    """Small convolutional networks, four passes over each part."""
    return NetworkLearner(
        small_network,
        epochs=4,
        batch_size=32,
        optimizer=lambda network: sgd(network, lr=0.05),
        schedule=cosine,
        chunk=10,
        seed=seed,
    )


def networks_in_network(channels: int) -> Callable[[int], PartLearner]:
    """The paper's base learner, for colour (3) or grey (1) images."""
    augment = compose(shift(4), flip()) if channels == 3 else shift(4)

    def learner(seed: int) -> PartLearner:
        return NetworkLearner(
            lambda: network_in_network(10, channels), augment=augment, seed=seed, chunk=25
        )

    return learner


ALL: tuple[tuple[Method, int], ...] = (("dpa", 1), ("fa", 4), ("dpa*", 4))
QUICK = (
    Work("fashion, k=300", "fashion_mnist", ridge, 300, ALL),
    Work("fashion, k=1000", "fashion_mnist", ridge, 1000),
    Work("mnist, k=300", "mnist", ridge, 300, ALL),
    Work("mnist, k=1000", "mnist", ridge, 1000),
    Work("cifar10 networks, k=50", "cifar10", small_networks, 50, (("dpa", 1), ("dpa*", 2))),
)
PAPER: tuple[tuple[Method, int], ...] = (("dpa", 1), ("fa", 16), ("dpa*", 16))
FULL = (
    Work("cifar10, k=50", "cifar10", networks_in_network(3), 50, PAPER, 10_000),
    Work("cifar10, k=250", "cifar10", networks_in_network(3), 250, PAPER, 10_000),
    Work("mnist, k=1200", "mnist", networks_in_network(1), 1200, PAPER, 10_000),
)


def measure(works: Sequence[Work], seeds: Sequence[int]) -> Iterable[Row]:
    """All works, every seed.

    Raises:
        InputError: if a data set is missing.
    """
    folders = {work.data: folder_of(work.data) for work in works}
    opened: dict[str, tuple[Collection, Collection]] = {}
    for work in works:
        if work.data not in opened:
            opened = {
                work.data: (
                    open_collection(folders[work.data]),
                    open_collection(folders[work.data], split="test"),
                )
            }
        train, test = opened[work.data]
        some = test.source.take(np.arange(min(work.test_images, len(test))))
        for seed in seeds:
            yield from contend(work, train.source, some, len(train.classes), seed)


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """Ridge regression on Fashion-MNIST and MNIST, small networks on CIFAR-10."""
    return measure(QUICK, seeds)


def full(seeds: Sequence[int]) -> Iterable[Row]:
    """The paper's networks, parts and epochs on CIFAR-10 and MNIST."""
    return measure(FULL, seeds)


def draw(result: Result, path: Path) -> None:
    """Draws certified accuracy against the size of the poisoning, a panel for each work."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result.rows if "certified" in row]
    works = list(dict.fromkeys(row["work"] for row in rows))
    figure = Figure(figsize=(4.4 * len(works), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for number, work in enumerate(works, start=1):
        axes = figure.add_subplot(1, len(works), number)
        own = [row for row in rows if row["work"] == work]
        for name in dict.fromkeys(row["contender"] for row in own):
            curves = np.array([row["certified"] for row in own if row["contender"] == name])
            sizes = next(row["sizes"] for row in own if row["contender"] == name)
            style = "-" if name.endswith("ROE") else "--"
            (line,) = axes.plot(sizes, curves.mean(0), style, marker="o", ms=3, label=name)
            axes.fill_between(
                sizes, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.12
            )
        axes.set_title(work, fontsize=10)
        axes.set_xlabel("inserted and removed training samples")
        axes.set_ylabel("certified accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110, format="png")


def _gain(metric: str, work: str, gain: str) -> Pick:
    return Pick(metric, {"work": work, "gain": gain})


def _claims() -> Iterator[Claim]:
    for work in QUICK:
        yield Claim(
            f"{work.name}: the run-off election certifies at least 1 point more than the vote at "
            "every poisoning size from .2 k to .4 k",
            _gain("least_gain", work.name, "DPA+ROE over DPA"),
            ">=",
            1.0,
            paper="up to 3 to 4 points on MNIST, CIFAR-10 and GTSRB",
        )
        yield Claim(
            f"{work.name}: clean accuracy of the run-off election is within 1 point of the vote's",
            _gain("clean_apart", work.name, "DPA+ROE over DPA"),
            "<=",
            1.0,
        )
        if any(method == "dpa*" for method, _ in work.methods):
            yield Claim(
                f"{work.name}: DPA* certifies more than DPA at every poisoning size from .2 k to "
                ".4 k",
                _gain("least_gain", work.name, "DPA* over DPA"),
                ">",
                0.0,
            )


EXPERIMENT = Experiment(
    spec="run-off-election",
    title="certified accuracy under poisoned training data: run-off elections against plain votes",
    claims=tuple(_claims()),
    quick=quick,
    full=full,
    draw=draw,
)
