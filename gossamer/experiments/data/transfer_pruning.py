"""Which source classes to pretrain on: votes of a surrogate against chance and in-domain scores.

The source has thirty classes: clothes (Fashion-MNIST), digits (MNIST), and such digits turned by 90
degrees. The target is other people's digits (scikit-learn's 8 x 8, enlarged), twenty training
images a class. All are 14 x 14 pixels. A small surrogate sees the source for two epochs and votes;
a larger network is pretrained on what is kept, then probed and fine-tuned. Every contender is
pretrained for as many epochs; fewer classes are then fewer steps, so those that keep whole classes
are also pretrained for as many steps as the whole source takes. Seconds are of the processor.

Sizes, epochs and rates were chosen by the validation accuracy of the network that was pretrained on
the whole source, and of nothing else.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.task import Classification, Preprocess
from gossamer.data.coreset import moderate
from gossamer.data.prune import gradient_norms
from gossamer.data.selection import keep, place_in_class, subset
from gossamer.data.transfer_pruning import (
    Votes,
    class_distances,
    feature_mapping,
    keep_classes,
    label_mapping,
    prototypes_of,
    ranking,
)
from gossamer.datasets.arrays import ArraySource, fit_images
from gossamer.datasets.idx import idx_sources
from gossamer.datasets.resolve import open_task
from gossamer.datasets.splits import assemble
from gossamer.experiments.data.prune import resnet18
from gossamer.experiments.real_data import folder_of
from gossamer.parts.embedding import embed

PER_CLASS = 100
SHARES = {50: "half of the classes", 33: "a third of the classes", 17: "a sixth of the classes"}
"""Percent of the source's classes that are kept, in words."""
DRAWS = 3
DIGITS = range(10, 20)
"""The source classes that the target needs: upright digits."""
NAMES = [
    *(f"clothes {n}" for n in range(10)),
    *(f"digit {n}" for n in range(10)),
    *(f"turned {n}" for n in range(10)),
]
EPOCHS, STEPS = "equal epochs", "equal steps"


@dataclass(frozen=True)
class Work:
    """Networks and how long they are trained.

    Attributes:
        surrogate: makes the network that votes, for a seed.
        large: makes the network that is pretrained on what is kept, for a seed. Both are
            ``nn.Sequential`` and end in a linear layer.
        surrogate_epochs: on the whole source.
        epochs: of pretraining.
        batch_size: of all trainings.
        lr: of SGD, for the surrogate and in pretraining.
        probe_epochs: of Adam on the last layer alone, everything else frozen.
        probe_lr: of these.
        tune_epochs: of Adam on the whole network.
        tune_lr: of these.
        early_epochs: after which GraNd looks at a network.
        early_seeds: networks that GraNd takes the mean over.
    """

    surrogate: Callable[[int], nn.Module]
    large: Callable[[int], nn.Module]
    surrogate_epochs: int
    epochs: int
    batch_size: int
    lr: float = 0.1
    probe_epochs: int = 50
    probe_lr: float = 1e-2
    tune_epochs: int = 200
    tune_lr: float = 1e-4
    early_epochs: int = 2
    early_seeds: int = 5


def quick(seeds: Sequence[int]) -> Iterator[Row]:
    """Thirty classes for digits."""
    work = Work(
        surrogate=_small, large=_large, surrogate_epochs=2, epochs=20, batch_size=32,
        lr=0.05, tune_epochs=30, tune_lr=3e-3,
    )  # fmt: skip
    for seed in seeds:
        yield from _compare(_source(seed), _target(seed), work, seed)


def _compare(
    source: Classification, target: Classification, work: Work, seed: int
) -> Iterator[Row]:
    labels = source.splits["train"].labels.numpy()
    classes = len(source.classes)
    # The networks are made for the source's inputs: the target's are normalised alike.
    target = copy.copy(target)
    target.preprocess = source.preprocess
    began = time.process_time()
    small = _pretrained(work.surrogate(seed), source, work, work.surrogate_epochs, seed)
    trained = time.process_time() - began
    began = time.process_time()
    of_source = embed(source.splits["train"], small, source.preprocess)
    of_target = embed(target.splits["train"], small, target.preprocess)
    prototypes = prototypes_of(of_source.features, labels)
    own = target.splits["train"].labels.numpy()
    votes: dict[str, Votes] = {
        "LM": label_mapping(of_target.logits),
        "FM": feature_mapping(of_target.features, prototypes),
        "class distance": class_distances(of_source.features, labels, of_target.features, own),
    }
    looked = time.process_time() - began
    random = np.random.default_rng(seed)

    def early(at: int) -> nn.Module:
        return _pretrained(work.large(at), source, work, work.early_epochs, at)

    several = [seed * work.early_seeds + n for n in range(work.early_seeds)]
    in_domain = {
        "GraNd": gradient_norms(source, early, seeds=several),
        "Moderate": -moderate(of_source.features, labels),
    }
    every = np.arange(len(labels))
    whole_steps = work.epochs * source.steps_per_epoch("train", work.batch_size)

    def row(name: str, count: int, rows: np.ndarray, schedule: str = EPOCHS, **more: Any) -> Row:
        part, epochs = subset(source, rows), work.epochs
        if schedule == STEPS:
            epochs = round(whole_steps / part.steps_per_epoch("train", work.batch_size))
        began = time.process_time()
        network = _pretrained(work.large(seed), part, work, epochs, seed)
        seconds = time.process_time() - began
        return {
            "seed": seed, "contender": name, "kept": count,
            "percent": round(100 * count / classes), "schedule": schedule,
            "share": 100.0 * len(rows) / len(labels), "seconds": seconds,
            "steps": epochs * part.steps_per_epoch("train", work.batch_size),
            **_transferred(network, target, work, seed), **more,
        }  # fmt: skip

    yield {
        "seed": seed, "contender": "no pretraining", "kept": 0,
        **_transferred(work.large(seed), target, work, seed),
    }  # fmt: skip
    yield row(
        "everything", classes, every, surrogate_seconds=trained, selection_seconds=looked,
        surrogate_accuracy=source.score(small, "train"),
    )  # fmt: skip
    for percent in SHARES:
        count = round(percent * classes / 100)
        drawn = [
            np.flatnonzero(np.isin(labels, random.permutation(classes)[:count]))
            for _ in range(DRAWS)
        ]
        share = count / classes
        for schedule in (EPOCHS,) if percent == 50 else (EPOCHS, STEPS):
            for name, vote in votes.items():
                if name == "class distance" and schedule == STEPS:
                    continue
                chosen = ranking(vote)[:count]
                more: dict[str, Any] = {}
                if name != "class distance":
                    more["unvoted"] = int((vote.counts[chosen] == 0).sum())
                if len(source.classes) == len(NAMES):
                    more |= {
                        "digits": int(np.isin(chosen, DIGITS).sum()),
                        "classes": [NAMES[label] for label in sorted(chosen)],
                    }
                yield row(name, count, keep_classes(vote, labels, count), schedule, **more)
            least = keep_classes(votes["LM"], labels, count, reverse=True)
            yield row("reverse LM", count, least, schedule)
            yield _mean([row("random classes", count, rows, schedule) for rows in drawn])
        some = np.sort(random.permutation(every)[: round(share * len(labels))])
        yield row("random samples", count, some)
        for name, scores in in_domain.items():
            rows = keep(scores, share, labels=labels, balance=1.0)
            yield row(name, count, np.sort(rows))


def _mean(rows: Sequence[Row]) -> Row:
    """One row with the means of the numbers that are measured."""
    numbers = ("probe", "tuned", "seconds", "steps", "share")
    return {**rows[0], **{name: float(np.mean([row[name] for row in rows])) for name in numbers}}


def _pretrained(
    network: nn.Module, source: Classification, work: Work, epochs: int, seed: int
) -> nn.Module:
    """The network after training on the source; its head has all source classes, kept or not."""
    rule = Supervised(network, source, optimizer=sgd(network, lr=work.lr))
    fit(rule, source, epochs=epochs, batch_size=work.batch_size, seed=seed)
    return network


def _transferred(
    network: nn.Module, target: Classification, work: Work, seed: int
) -> dict[str, float]:
    """Target test accuracy of a probe on frozen features, and of fine-tuning everything."""
    probed = _features(network, target)
    width = probed.example_inputs[0].shape[2]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(width, len(target.classes))
    tuned = copy.deepcopy(network)
    assert isinstance(tuned, nn.Sequential)
    tuned[-1] = copy.deepcopy(head)
    result = {}
    for kind, task, model, epochs, lr in (
        ("probe", probed, nn.Sequential(nn.Flatten(), head), work.probe_epochs, work.probe_lr),
        ("tuned", target, tuned, work.tune_epochs, work.tune_lr),
    ):
        adam = torch.optim.Adam(model.parameters(), lr=lr)
        rule = Supervised(model, task, optimizer=adam)
        fit(rule, task, epochs=epochs, batch_size=work.batch_size, seed=seed)
        result[kind] = task.score(model, "test")
    return result


def _features(network: nn.Module, target: Classification) -> Classification:
    """The target as features ``[n, 1, d, 1]`` of a network that stays as it is."""
    splits: Mapping[str, ArraySource] = {
        split: ArraySource(
            torch.from_numpy(embed(source, network, target.preprocess).features)[:, None, :, None],
            source.labels,
        )
        for split, source in target.splits.items()
    }
    width = splits["train"].fetch(np.arange(1)).shape[2]
    plain = Preprocess(1, width, 1, (0.0,), (1.0,), scale=1.0)
    return Classification(splits, plain, target.classes, name=f"features of {target.name}")


def _source(seed: int) -> Classification:
    random = np.random.default_rng(seed)
    images, labels = [], []
    for offset, name, turn in ((0, "fashion_mnist", 0), (10, "mnist", 0), (20, "mnist", 1)):
        found = idx_sources(folder_of(name))[0]["train"]
        own = found.labels.numpy()
        order = random.permutation(len(own))
        rows = order[place_in_class(own[order]) < PER_CLASS]
        images.append(_halved(torch.rot90(found.fetch(rows), turn, (2, 3))))
        labels.append(found.labels[torch.from_numpy(rows)] + offset)
    pool = ArraySource(torch.cat(images), torch.cat(labels))
    # Everything is for pretraining; nothing is measured on the source.
    return assemble(pool, NAMES, name="thirty classes", validation=pool, test=pool, seed=seed)


def _target(seed: int) -> Classification:
    """Digits of 8 x 8 as MNIST has them; 20 of each class train, the test split is as usual."""
    task = open_task("digits", seed=seed)
    source = task.splits["train"]
    order = np.random.default_rng(seed).permutation(len(source))
    rows = order[place_in_class(source.labels.numpy()[order]) < 20]
    splits = {
        split: _enlarged(task.splits[split].fetch(at), task.splits[split].labels[at])
        for split, at in (("train", rows), ("validation", _every(task, "validation")),
                          ("test", _every(task, "test")))
    }  # fmt: skip
    return assemble(
        splits["train"], task.classes, name="digits, enlarged", validation=splits["validation"],
        test=splits["test"],
    )  # fmt: skip


def _every(task: Classification, split: str) -> np.ndarray:
    return np.arange(task.size(split))


def _enlarged(images: Tensor, labels: Tensor) -> ArraySource:
    large = fit_images(images.float() * (255.0 / 16.0), 1, (20, 20))
    # As in MNIST, digits of 20 x 20 in the middle of 28 x 28.
    return ArraySource(_halved(nn.functional.pad(large, (4, 4, 4, 4))), labels)


def _halved(images: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(images.float(), 2).round().to(torch.uint8)


def _small(seed: int) -> nn.Module:
    return _network(seed, 12, 24)


def _large(seed: int) -> nn.Module:
    return _network(seed, 16, 32, 64)


def _network(seed: int, *widths: int) -> nn.Module:
    """Convolutions that halve 14 x 14 pixels, batch normalisation after each, and a head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        side = 14
        for before, width in zip((1, *widths), widths, strict=False):
            layers += [
                nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            ]  # fmt: skip
            side = -(-side // 2)
        last = nn.Linear(widths[-1] * side**2, len(NAMES))
        return nn.Sequential(*layers, nn.Flatten(), last)


def full(seeds: Sequence[int]) -> Iterator[Row]:
    """A source of a hundred classes (CIFAR-100) for CIFAR-10: surrogate and network of a ResNet."""

    def network(seed: int) -> nn.Module:
        return nn.Sequential(*list(resnet18(seed).children())[:-1], nn.Linear(512, 100))

    work = Work(
        surrogate=network, large=network, surrogate_epochs=16, epochs=100, batch_size=128,
    )  # fmt: skip
    for seed in seeds:
        source = open_task(folder_of("cifar100"), seed=seed)
        target = open_task(folder_of("cifar10"), seed=seed, limit=5_000)
        yield from _compare(source, target, work, seed)


def draw(result: Result, path: Path) -> None:
    """Probed and fine-tuned accuracy against how many classes are kept, by both schedules."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    rows = list(result.rows)
    pruned = [row for row in rows if "schedule" in row and row["contender"] != "everything"]
    names = list(dict.fromkeys(row["contender"] for row in pruned))
    panels = figure.subplots(2, 2, sharex=True, sharey="col")
    for line, schedule in zip(panels, (EPOCHS, STEPS), strict=True):
        for axes, metric in zip(line, ("probe", "tuned"), strict=True):
            for name, style in (("everything", ":"), ("no pretraining", "-.")):
                level = Pick(metric, {"contender": name}).by_seed(rows)
                axes.axhline(float(np.mean(list(level.values()))), color="0.5", linestyle=style)
            for color, name in enumerate(names):
                points = []
                for count in sorted({row["kept"] for row in pruned}):
                    place = {"contender": name, "kept": count, "schedule": schedule}
                    if found := list(Pick(metric, place).by_seed(pruned).values()):
                        spread = np.std(found, ddof=1) if len(found) > 1 else 0.0
                        points.append((count, np.mean(found), spread))
                if points:
                    at, mean, spread = zip(*points, strict=True)
                    axes.errorbar(
                        at, mean, yerr=spread, marker="o", markersize=4, capsize=2, label=name,
                        color=f"C{color}", linestyle="--" if "random" in name else "-",
                    )  # fmt: skip
            what = "linear probe" if metric == "probe" else "fine-tuned"
            axes.set_title(f"{what}, {schedule}", fontsize=10)
            axes.set(ylabel="target test accuracy (%)")
            axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set(xlabel="source classes kept (dotted: all; dash-dotted: no pretraining)")
    panels[0, 1].legend(fontsize=8)
    figure.savefig(path, dpi=100, format="png")


def _pick(metric: str, name: str, percent: int, schedule: str) -> Pick:
    return Pick(metric, {"contender": name, "percent": percent, "schedule": schedule})


def _claims() -> Iterator[Claim]:
    for name in ("LM", "FM"):
        yield Claim(
            f"{name} keeps at least eight upright digits among ten classes",
            _pick("digits", name, 33, EPOCHS), ">=", 8.0,
        )  # fmt: skip
    fewer = [percent for percent in SHARES if percent < 50]
    for schedule in (EPOCHS, STEPS):
        for name in ("LM", "FM"):
            for percent in SHARES if schedule == EPOCHS else fewer:
                yield Claim(
                    f"{name}, {SHARES[percent]}, {schedule}: the probe loses no more than a point "
                    "to the full source",
                    _pick("probe", name, percent, schedule), ">=",
                    _pick("probe", "everything", 100, EPOCHS), offset=-1.0,
                    paper="40 to 80 % of ImageNet's classes can go at no loss",
                )  # fmt: skip
            for percent in fewer:
                yield Claim(
                    f"{name}, {SHARES[percent]}, {schedule}: the probe is better than with random "
                    "classes",
                    _pick("probe", name, percent, schedule), ">",
                    _pick("probe", "random classes", percent, schedule),
                )  # fmt: skip
        for percent in fewer:
            yield Claim(
                f"{SHARES[percent]}, {schedule}: random ones are better than the least needed ones",
                _pick("probe", "random classes", percent, schedule), ">",
                _pick("probe", "reverse LM", percent, schedule),
            )  # fmt: skip
    yield Claim(
        "at equal epochs pretraining falls to the share of images that are kept: its share of the "
        "time is within 5 points of that",
        Pick("excess_time", {"contender": "LM", "schedule": EPOCHS}), "<=", 5.0,
    )  # fmt: skip


def timed(rows: Iterator[Row]) -> Iterator[Row]:
    """Adds the share of the full source's pretraining time, less that of its images, in points."""
    whole: dict[Any, float] = {}
    for row in rows:
        if row["contender"] == "everything":
            whole[row["seed"]] = row["seconds"]
        if "seconds" not in row:
            yield row
            continue
        share = 100.0 * row["seconds"] / whole[row["seed"]]
        yield {**row, "seconds_share": share, "excess_time": share - row["share"]}


EXPERIMENT = Experiment(
    spec="dp4tl",
    title="which source classes to pretrain on",
    claims=tuple(_claims()),
    quick=lambda seeds: timed(quick(seeds)),
    full=lambda seeds: timed(full(seeds)),
    draw=draw,
)
