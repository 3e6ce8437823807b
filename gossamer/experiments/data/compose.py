"""Prune, combine, augment against random, hard and cropped images, at one to fifty images a class.

Fashion-MNIST, 2,000 training images a class; difficulty is EL2N of four folds. First the learner is
ridge regression on random cosine features, which sees every stored tile once, at full size: that
takes augmentation and optimization out. Then a small convolutional network learns from ten stored
images a class by one protocol, which brings both back: crops inside of a tile or across tiles, RDED
(whose crops a teacher chose, so it is not hard-label only), and random images with soft labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, fit
from gossamer.core.task import Classification
from gossamer.data.compose import (
    Composed,
    Order,
    benchmark,
    compose,
    rded,
    separate,
)
from gossamer.data.coreset import coverage
from gossamer.data.dynamics import record
from gossamer.data.selection import subset
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.splits import assemble
from gossamer.experiments.data.prune import cross_fitted_el2n, fashion, learned, resnet18
from gossamer.experiments.real_data import folder_of

PER_CLASS = 2000
IPC = (1, 5, 10, 50)
RICH = 800
EPOCHS = 300
BATCH = 32  # four steps an epoch for a hundred stored images

Images = tuple[np.ndarray, np.ndarray]


def quick(seeds: Sequence[int]) -> Iterator[Row]:
    """Fashion-MNIST."""
    folder = folder_of("fashion_mnist")
    for seed in seeds:
        train, test = fashion(folder, PER_CLASS, seed)
        scores = cross_fitted_el2n(*train, 10, seed=seed)
        source = ArraySource(_raw(train[0]), torch.from_numpy(train[1]))
        yield from _by_solving(source, scores, test, seed)
        yield from _by_training(source, scores, test, seed)


def _by_solving(source: ArraySource, scores: np.ndarray, test: Images, seed: int) -> Iterator[Row]:
    orders: tuple[Order, ...] = ("easy", "random", "hard")
    for per_class in IPC:
        made = {
            order: compose(source, scores, per_class=per_class, factor=1, order=order, seed=seed)
            for order in orders
        }
        made |= {
            f"{order}, combined": compose(
                source, scores, per_class=per_class, factor=2, order=order, seed=seed
            )
            for order in orders[:2]
        }
        made["easy, cropped"] = compose(
            source, scores, per_class=per_class, factor=2, crop=True, seed=seed
        )
        for name, composed in made.items():
            yield {
                "seed": seed, "learner": "ridge", "contender": name, "ipc": per_class,
                "few": per_class <= 10, "bytes": composed.image_bytes,
                "accuracy": learned(_views(composed), test, seed),
            }  # fmt: skip
        rows = np.concatenate(
            [
                own[coverage(scores[own], per_class, seed=seed)]
                for own in (np.flatnonzero(source.labels.numpy() == label) for label in range(10))
            ]
        )
        spread = Composed(source.fetch(rows), source.labels[rows], 1, rows[:, None])
        yield {
            "seed": seed, "learner": "ridge", "contender": "CCS", "ipc": per_class,
            "accuracy": learned(_views(spread), test, seed), "bytes": spread.image_bytes,
        }  # fmt: skip
    for order in orders:
        composed = compose(source, scores, per_class=RICH, factor=1, order=order, seed=seed)
        yield {
            "seed": seed, "learner": "ridge", "contender": order, "ipc": RICH,
            "accuracy": learned(_views(composed), test, seed), "bytes": composed.image_bytes,
        }  # fmt: skip


def _by_training(source: ArraySource, scores: np.ndarray, test: Images, seed: int) -> Iterator[Row]:
    held_out = ArraySource(_raw(test[0]), torch.from_numpy(test[1]))
    whole = assemble(
        source, [str(label) for label in range(10)], name="Fashion-MNIST", test=held_out, seed=seed
    )
    teacher = _network(seed + 100)
    fit(Supervised(teacher, whole), whole, epochs=3, seed=seed)
    easy = compose(source, scores, per_class=10, factor=1, seed=seed)
    chance = compose(source, scores, per_class=10, factor=1, order="random", seed=seed)
    tiled = compose(source, scores, per_class=10, factor=2, seed=seed)
    chosen = rded(whole, teacher, per_class=10, factor=2, seed=seed)
    tasks = {
        "random": chance.task(whole),
        "easy": easy.task(whole),
        "easy, combined": tiled.task(whole),
        "easy, combined, crops across tiles": tiled.task(whole, confined=False),
        "RDED": chosen.task(whole, confined=False),
    }
    about = {"seed": seed, "learner": "network", "ipc": 10}
    for name, task in tasks.items():
        accuracy = benchmark(task, _network(seed), epochs=EPOCHS, batch_size=BATCH, seed=seed)
        yield {**about, "contender": name, "accuracy": accuracy}
    for name in ("random", "easy, combined"):
        accuracy = benchmark(
            tasks[name], _network(seed), teacher=teacher, epochs=EPOCHS, batch_size=BATCH, seed=seed
        )
        yield {**about, "contender": f"{name}, soft labels", "accuracy": accuracy}
    yield {**about, "contender": "teacher, everything", "accuracy": whole.score(teacher, "test")}


def _views(composed: Composed) -> Images:
    """Every tile at full size, with its label."""
    tiles = separate(composed.images, composed.factor)
    size = int(composed.images.shape[2]), int(composed.images.shape[3])
    if composed.factor > 1:
        tiles = nn.functional.interpolate(tiles.float(), size=size, mode="bilinear")
    labels = composed.labels.repeat(composed.factor**2)
    return tiles.float().flatten(1).numpy() / 255.0, labels.numpy()


def _raw(images: np.ndarray) -> Tensor:
    return torch.from_numpy((images * 255).round().astype(np.uint8)).reshape(-1, 1, 28, 28)


def _network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(48, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip


def full(seeds: Sequence[int]) -> Iterator[Row]:
    """CIFAR-10, ResNet-18, 300 epochs; tiles of 16 pixels are harsh, so factor 1 is there, too."""
    for seed in seeds:
        task = cifar10(folder_of("cifar10"), seed=seed)
        dynamics = record(task, resnet18, epochs=20, planned_epochs=200, seeds=(seed, seed + 1))
        scores = {
            "el2n": dynamics.difficulty(),
            "forgetting": dynamics.forgetting(),
            "aum": dynamics.area_under_margin(),
        }
        teacher = resnet18(seed + 100)
        fit(Supervised(teacher, task), task, epochs=200, seed=seed)
        source = _kept(task)
        for per_class in (1, 10, 20, 50, 100, 200):
            made = {"random": compose(source, scores["el2n"], per_class=per_class, factor=1,
                                      order="random", seed=seed)}  # fmt: skip
            for metric, values in scores.items():
                made[f"easy by {metric}"] = compose(source, values, per_class=per_class, factor=1)
            made["easy, combined"] = compose(source, scores["el2n"], per_class=per_class)
            tasks = {name: composed.task(task) for name, composed in made.items()}
            found = rded(task, teacher, per_class=per_class, seed=seed)
            tasks["RDED"] = found.task(task, confined=False)
            for name, small in tasks.items():
                for soft in (False, True):
                    accuracy = benchmark(
                        small, resnet18(seed), teacher=teacher if soft else None, seed=seed
                    )
                    yield {
                        "seed": seed, "learner": "network", "ipc": per_class,
                        "contender": f"{name}, soft labels" if soft else name,
                        "accuracy": accuracy,
                    }  # fmt: skip


def _kept(task: Classification) -> ArraySource:
    source = subset(task, np.arange(task.size("train"))).splits["train"]
    return ArraySource(source.fetch(np.arange(len(source))), source.labels)


def draw(result: Result, path: Path) -> None:
    """Accuracy against stored images a class, and the network's accuracy at ten."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = list(result.rows)

    def values(learner: str, name: str, per_class: int) -> list[float]:
        where = {"learner": learner, "contender": name, "ipc": per_class}
        return list(Pick("accuracy", where).by_seed(rows).values())

    names = list(dict.fromkeys(r["contender"] for r in rows if r["learner"] == "ridge"))
    for name in names:
        at = [per_class for per_class in (*IPC, RICH) if values("ridge", name, per_class)]
        left.plot(
            at, [np.mean(values("ridge", name, per_class)) for per_class in at],
            "--o" if name == "random" else "-o", label=name,
        )  # fmt: skip
    left.set(xscale="log", xlabel="stored images a class", ylabel="test accuracy (%)")
    left.set_title("ridge regression on random features", fontsize=10)
    left.legend(fontsize=8)
    trained = list(dict.fromkeys(r["contender"] for r in rows if r["learner"] == "network"))
    found = [values("network", name, 10) for name in trained]
    right.barh(
        range(len(trained)), [np.mean(v) for v in found],
        xerr=[np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in found], color="teal", alpha=0.7,
    )  # fmt: skip
    right.set_yticks(range(len(trained)), trained, fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("test accuracy (%), ten stored images a class")
    right.set_title("a small network, one protocol", fontsize=10)
    figure.savefig(path, dpi=110, format="png")


def _ridge(name: str, per_class: int) -> Pick:
    return Pick("accuracy", {"learner": "ridge", "contender": name, "ipc": per_class})


def _few(name: str) -> Pick:
    return Pick("accuracy", {"learner": "ridge", "contender": name, "few": True})


def _claims() -> Iterator[Claim]:
    small = IPC[:3]
    yield Claim(
        "up to ten a class, on average: four small whole images are better than one large",
        _few("easy, combined"), ">", _few("easy"),
    )  # fmt: skip
    yield Claim(
        "up to ten a class, on average: whole images are better than cropped tiles by ten points",
        _few("easy"), ">", _few("easy, cropped"), offset=10.0,
    )  # fmt: skip
    for per_class in small:
        yield Claim(
            f"{per_class} a class: easy images are no more than a point worse than random ones",
            _ridge("easy", per_class), ">=", _ridge("random", per_class), offset=-1.0,
        )  # fmt: skip
        yield Claim(
            f"{per_class} a class: easy images are better than hard ones by ten points",
            _ridge("easy", per_class), ">", _ridge("hard", per_class), offset=10.0,
        )  # fmt: skip
    yield Claim(
        f"with plenty of data ({RICH} a class) the order turns: easy is worse than random",
        _ridge("easy", RICH), "<", _ridge("random", RICH),
    )  # fmt: skip
    where = {"learner": "network", "ipc": 10}
    yield Claim(
        "a network learns more from the whole recipe than from random images",
        Pick("accuracy", {**where, "contender": "easy, combined"}), ">",
        Pick("accuracy", {**where, "contender": "random"}),
        paper="ImageNet-1K, ten a class: 22.8 against 4.6 %",
    )  # fmt: skip
    yield Claim(
        "and than from RDED",
        Pick("accuracy", {**where, "contender": "easy, combined"}), ">",
        Pick("accuracy", {**where, "contender": "RDED"}),
        paper="ImageNet-1K, ten a class: 22.8 against 11.5 %",
    )  # fmt: skip


EXPERIMENT = Experiment(
    spec="pca-compression",
    title="few stored images a class: which ones, how large, and how they are shown",
    claims=tuple(_claims()),
    quick=quick,
    full=full,
    draw=draw,
)
