"""Data pruning: theory against simulation, and the two ends of a ranking on real images.

The theory says that keeping the hard end loses to keeping everything alike when examples are few,
and wins when they are many. On Fashion-MNIST the same learner (ridge regression on random cosine
features, one solve) learns from what EL2N, prototypes and chance keep, at seven sizes; EL2N comes
from four folds, each scored by the learner of the other three, so no sample is scored by a model
that saw it. CIFAR-10N tells which labels are wrong, so one can see whom "hard" means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.data.compare import network_learner
from gossamer.data.dynamics import record
from gossamer.data.perceptron import perceptron_theory, simulated_error
from gossamer.data.prune import prototype_distance
from gossamer.data.selection import Order, keep, place_in_class, subset
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.collection import open_collection
from gossamer.datasets.idx import idx_sources
from gossamer.experiments.real_data import folder_of
from gossamer.parts.random_features import RandomFeatureClassifier

STATES = ((1.0, 1.0), (2.0, 1.0), (5.0, 1.0), (1.0, 0.5), (2.0, 0.5), (5.0, 0.5), (2.0, 0.2))
DRAWS = 5
DIMENSION = 200
PER_CLASS = 2000
KEPT_PER_CLASS = (2, 10, 50, 200, 800, 1600, 1800)
POOLS = (100, 500, 2000, 5000)
TEST_IMAGES = 4000
FOLDS = 4
COMPONENTS = 50

Images = tuple[np.ndarray, np.ndarray]


def quick(seeds: Sequence[int]) -> Iterator[Row]:
    """Theory, then Fashion-MNIST and CIFAR-10N."""
    for seed in seeds:
        yield from _theory(seed)
    folder = folder_of("fashion_mnist")
    for seed in seeds:
        yield from _ends(folder, seed)
        yield from _pools(folder, seed)
    for seed in seeds:
        yield from _wrong_labels(folder_of("cifar10"), seed)


def _theory(seed: int) -> Iterator[Row]:
    for alpha, fraction in STATES:
        solved = perceptron_theory(alpha, fraction)
        about = {"seed": seed, "part": "perceptron", "alpha": alpha, "fraction": fraction}
        yield {**about, "contender": "theory", "error": solved.error}
        drawn = [
            simulated_error(alpha, fraction, dimension=DIMENSION, seed=DRAWS * seed + draw)
            for draw in range(DRAWS)
        ]
        yield {**about, "contender": "simulated", "error": float(np.mean(drawn))}
    for order in ("easy", "random"):
        drawn = [
            simulated_error(1.0, 0.5, order=order, dimension=DIMENSION, seed=DRAWS * seed + draw)
            for draw in range(DRAWS)
        ]
        yield {
            "seed": seed, "part": "perceptron", "alpha": 1.0, "fraction": 0.5,
            "contender": f"simulated, {order}", "error": float(np.mean(drawn)),
        }  # fmt: skip


def _ends(folder: Path, seed: int) -> Iterator[Row]:
    (images, labels), test = fashion(folder, PER_CLASS, seed)
    scores = cross_fitted_el2n(images, labels, 10, seed=seed)
    reduced = principal(images)
    distance = {k: prototype_distance(reduced, k, seed=seed) for k in (10, 100)}
    contenders: list[tuple[str, np.ndarray, Order]] = [
        ("EL2N, easy", scores, "easy"),
        ("EL2N, hard", scores, "hard"),
        ("random", scores, "random"),
        *((f"{k} prototypes, hard", distance[k], "hard") for k in distance),
    ]
    about = {"seed": seed, "part": "ends", "pool": PER_CLASS}
    yield {
        **about, "contender": "everything", "kept": PER_CLASS,
        "accuracy": learned((images, labels), test, seed),
    }  # fmt: skip
    for kept in (*KEPT_PER_CLASS, 1200):
        for name, values, order in contenders:
            rows = keep(
                values, kept / PER_CLASS, order=order, labels=labels, balance=1.0, seed=seed
            )
            accuracy = learned((images[rows], labels[rows]), test, seed)
            yield {**about, "contender": name, "kept": kept, "accuracy": accuracy}


def _pools(folder: Path, seed: int) -> Iterator[Row]:
    """Which end is better when four fifths are kept, as the data grow."""
    for pool in POOLS:
        (images, labels), test = fashion(folder, pool, seed)
        scores = cross_fitted_el2n(images, labels, 10, seed=seed)
        orders: tuple[Order, ...] = ("hard", "easy", "random")
        found = {}
        for order in orders:
            rows = keep(scores, 0.8, order=order, labels=labels, balance=1.0, seed=seed)
            found[order] = learned((images[rows], labels[rows]), test, seed)
        for order in orders:
            yield {
                "seed": seed, "part": "pools", "pool": pool, "contender": order,
                "accuracy": found[order], "over_random": found[order] - found["random"],
            }  # fmt: skip


def _wrong_labels(folder: Path, seed: int) -> Iterator[Row]:
    """How well scores find the labels that people got wrong (CIFAR-10N)."""
    from sklearn.metrics import roc_auc_score

    every = open_collection(folder)
    with np.load(folder / "human_labels.npz", allow_pickle=False) as found:
        given, right = found["c10n_worse_label"], found["c10n_clean_label"]
    rows = np.sort(np.random.default_rng(seed).permutation(len(every))[:10_000])
    images = every.fetch(rows).flatten(1).float().numpy() / 255.0
    labels = given[rows].astype(np.int64)
    wrong = given[rows] != right[rows]
    reduced = principal(images)
    scores = {
        "EL2N": cross_fitted_el2n(images, labels, 10, seed=seed),
        "10 prototypes": prototype_distance(reduced, 10, seed=seed),
        "random": np.random.default_rng(seed).random(len(rows)),
    }
    for name, values in scores.items():
        hardest = np.argsort(-values)[: len(values) // 5]
        yield {
            "seed": seed, "part": "wrong labels", "contender": name,
            "auc": float(roc_auc_score(wrong, values)),
            "wrong": float(100.0 * wrong.mean()),
            "wrong_in_hardest_fifth": float(100.0 * wrong[hardest].mean()),
        }  # fmt: skip


def cross_fitted_el2n(
    images: np.ndarray, labels: np.ndarray, classes: int, *, seed: int, folds: int = FOLDS
) -> np.ndarray:
    """EL2N of each sample by a learner that did not see it, ``[n]``.

    Regressed one-hot scores become probabilities by cutting at zero and dividing by their sum.

    Args:
        images: ``[n, d]``.
        labels: class indices ``[n]``.
        classes: how many.
        seed: of folds and features.
        folds: how many.
    """
    place = np.random.default_rng(seed).permutation(len(labels)) % folds
    errors = np.empty(len(labels))
    for fold in range(folds):
        inside = place == fold
        model = RandomFeatureClassifier(seed=seed).fit(images[~inside], labels[~inside], classes)
        answers = model.scores(images[inside]).clip(min=1e-6)
        answers /= answers.sum(1, keepdims=True)
        errors[inside] = np.linalg.norm(answers - np.eye(classes)[labels[inside]], axis=1)
    return errors


def fashion(folder: Path, per_class: int, seed: int) -> tuple[Images, Images]:
    """Fashion-MNIST, as many training images of each class, and 4,000 test images."""
    sources, _ = idx_sources(folder)
    random = np.random.default_rng(seed)
    parts = []
    for split, wanted in (("train", per_class), ("test", TEST_IMAGES // 10)):
        source = sources[split]
        labels = source.labels.numpy()
        order = random.permutation(len(labels))
        order = np.sort(order[place_in_class(labels[order]) < wanted])
        images = source.fetch(order).flatten(1).float().numpy() / 255.0
        parts.append((images, labels[order]))
    return parts[0], parts[1]


def learned(train: Images, test: Images, seed: int) -> float:
    """Test accuracy in percent of the quick learner."""
    return RandomFeatureClassifier(seed=seed).fit(*train, 10).accuracy(*test)


def principal(images: np.ndarray) -> np.ndarray:
    """The first principal components, ``[n, 50]``."""
    from sklearn.decomposition import PCA

    reduced = PCA(COMPONENTS, svd_solver="covariance_eigh").fit_transform(images)
    return reduced.astype(np.float32)


def full(seeds: Sequence[int]) -> Iterator[Row]:
    """CIFAR-10, ResNet-18, 200 epochs: pools of several sizes, EL2N of ten networks at epoch 10."""
    folder = folder_of("cifar10")
    for seed in seeds:
        task = cifar10(folder, seed=seed)
        total = task.size("train")
        random = np.random.default_rng(seed)
        learn = network_learner(resnet18, epochs=200, lr=0.1)
        for pool in (5_000, 10_000, 20_000, total):
            part = subset(task, np.sort(random.permutation(total)[:pool]))
            dynamics = record(
                part, resnet18, epochs=10, planned_epochs=200,
                seeds=[100 * seed + run for run in range(10)],
            )  # fmt: skip
            scores = dynamics.el2n[:, -1].mean(0)
            labels = part.splits["train"].labels.numpy()
            for fraction in (0.2, 0.4, 0.6, 0.8, 1.0):
                orders: tuple[Order, ...] = ("hard", "easy", "random")
                for order in orders if fraction < 1.0 else ("random",):
                    rows = keep(
                        scores, fraction, order=order, labels=labels, balance=0.5, seed=seed
                    )
                    yield {
                        "seed": seed, "part": "cifar10", "pool": pool, "fraction": fraction,
                        "contender": order, "accuracy": learn(subset(part, rows), seed),
                    }  # fmt: skip


def resnet18(seed: int) -> nn.Module:
    """ResNet-18 with a 3 x 3 stem and no pooling after it, for images of 32 x 32."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = timm.create_model("resnet18", num_classes=10)
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network


def draw(result: Result, path: Path) -> None:
    """Errors of the perceptron, both ends on Fashion-MNIST, and the hard end as the data grow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    theory, ends, pools = figure.subplots(1, 3)
    rows = [dict(row) for row in result.rows]

    def mean(metric: str, **where: Any) -> float:
        found = Pick(metric, where).by_seed(rows)
        return float(np.mean(list(found.values()))) if found else float("nan")

    for fraction in (1.0, 0.5):
        alphas = np.geomspace(0.3, 8.0, 40)
        name = "everything kept" if fraction == 1.0 else "hard half kept"
        (line,) = theory.plot(
            alphas, [perceptron_theory(a, fraction).error for a in alphas], label=name
        )
        marks = [alpha for alpha, f in STATES if f == fraction]
        theory.plot(
            marks,
            [mean("error", contender="simulated", alpha=a, fraction=fraction) for a in marks],
            "o", color=line.get_color(),
        )  # fmt: skip
    theory.set(xscale="log", yscale="log", xlabel="examples kept per dimension", ylabel="error")
    theory.set_title("perceptron: theory (lines), simulation (points)", fontsize=10)
    theory.legend(fontsize=8)
    names = list(dict.fromkeys(row["contender"] for row in rows if row["part"] == "ends"))
    for name in names[1:]:
        ends.plot(
            KEPT_PER_CLASS,
            [mean("accuracy", part="ends", contender=name, kept=kept) for kept in KEPT_PER_CLASS],
            "--o" if name == "random" else "-o", label=name, markersize=4,
        )  # fmt: skip
    ends.set(xscale="log", xlabel=f"kept of {PER_CLASS} a class", ylabel="test accuracy (%)")
    ends.set_title("Fashion-MNIST", fontsize=10)
    ends.legend(fontsize=8)
    for order in ("hard", "easy"):
        pools.plot(
            POOLS,
            [mean("over_random", part="pools", contender=order, pool=pool) for pool in POOLS],
            "-o", label=order,
        )  # fmt: skip
    pools.axhline(0.0, color="0.5", linestyle=":")
    pools.set(xscale="log", xlabel="images a class before pruning", ylabel="points over random")
    pools.set_title("80 % kept, as the data grow", fontsize=10)
    pools.legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def _end(name: str, kept: int) -> Pick:
    return Pick("accuracy", {"part": "ends", "contender": name, "kept": kept})


def _error(contender: str, alpha: float, fraction: float) -> Pick:
    where = {"part": "perceptron", "contender": contender, "alpha": alpha, "fraction": fraction}
    return Pick("error", where)


def _claims() -> Iterator[Claim]:
    for contender in ("theory", "simulated"):
        yield Claim(
            f"{contender}: with one example a dimension the hard half is worse than as many of all",
            _error(contender, 1.0, 0.5), ">", _error(contender, 1.0, 1.0),
        )  # fmt: skip
        yield Claim(
            f"{contender}: with two examples a dimension the hard half is better",
            _error(contender, 2.0, 0.5), "<", _error(contender, 2.0, 1.0),
        )  # fmt: skip
    for kept in (2, 10, 50):
        yield Claim(
            f"few are kept ({kept} a class): easy is better than random",
            _end("EL2N, easy", kept), ">", _end("random", kept),
        )  # fmt: skip
    for kept in (1600, 1800):
        yield Claim(
            f"most are kept ({kept} of {PER_CLASS} a class): hard is better than random",
            _end("EL2N, hard", kept), ">", _end("random", kept),
        )  # fmt: skip
    for kept in (50, 200):
        yield Claim(
            f"in between ({kept} a class) hard is worse than random by more than ten points",
            _end("EL2N, hard", kept), "<", _end("random", kept), offset=-10.0,
        )  # fmt: skip
    yield Claim(
        "the hard end gains on random as the data grow",
        Pick("over_random", {"part": "pools", "contender": "hard", "pool": POOLS[-1]}),
        ">",
        Pick("over_random", {"part": "pools", "contender": "hard", "pool": POOLS[0]}),
    )
    yield Claim(
        "a fifth can go by prototypes without labels and costs less than a point",
        _end("10 prototypes, hard", 1600), ">=",
        Pick("accuracy", {"part": "ends", "contender": "everything"}), offset=-1.0,
        paper="ImageNet: about 20 % can go with no loss",
    )  # fmt: skip
    for kept in (1200, 1600):
        yield Claim(
            f"prototypes at {kept} of {PER_CLASS} a class are better than random",
            _end("10 prototypes, hard", kept), ">", _end("random", kept),
        )  # fmt: skip


EXPERIMENT = Experiment(
    spec="data-pruning",
    title="which end of a ranking to keep, against how much data there is",
    claims=tuple(_claims()),
    quick=quick,
    full=full,
    draw=draw,
)
