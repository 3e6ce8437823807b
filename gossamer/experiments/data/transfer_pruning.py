"""Which source classes to pretrain on: votes of a surrogate against chance and in-domain scores.

The source has thirty classes: clothes (Fashion-MNIST), digits (MNIST), and such digits turned by 90
degrees. The target is other people's digits (scikit-learn's 8 x 8, enlarged), twenty training
images a class. A small surrogate sees the source for two epochs and votes; a larger network is
pretrained on what is kept for as many epochs in every case, then probed and fine-tuned. Seconds are
of the processor.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.task import Classification
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

PER_CLASS = 200
KEPT = (15, 10, 5)
DRAWS = 3
EPOCHS = 4
DIGITS = range(10, 20)
"""The source classes that the target needs: upright digits."""
NAMES = [
    *(f"clothes {n}" for n in range(10)),
    *(f"digit {n}" for n in range(10)),
    *(f"turned {n}" for n in range(10)),
]


def quick(seeds: Sequence[int]) -> Iterator[Row]:
    """Thirty classes for digits."""
    for seed in seeds:
        source, target = _source(seed), _target(seed)
        yield from _compare(
            source, target, seed, surrogate=_small, large=_large, epochs=EPOCHS,
            surrogate_epochs=2, kept=KEPT, probe_epochs=50, tune_epochs=30,
        )  # fmt: skip


def _compare(
    source: Classification,
    target: Classification,
    seed: int,
    *,
    surrogate: Callable[[int], nn.Module],
    large: Callable[[int], nn.Module],
    epochs: int,
    surrogate_epochs: int,
    kept: Sequence[int],
    probe_epochs: int,
    tune_epochs: int,
) -> Iterator[Row]:
    labels = source.splits["train"].labels.numpy()
    classes = len(source.classes)
    began = time.process_time()
    small = surrogate(seed)
    fit(
        Supervised(small, source, optimizer=sgd(small, lr=0.05)), source, seed=seed,
        epochs=surrogate_epochs, batch_size=64,
    )  # fmt: skip
    trained = time.process_time() - began
    began = time.process_time()
    of_source = embed(source.splits["train"], small, source.preprocess)
    of_target = embed(target.splits["train"], small, source.preprocess)
    looked = time.process_time() - began
    prototypes = prototypes_of(of_source.features, labels)
    own = target.splits["train"].labels.numpy()
    votes: dict[str, Votes] = {
        "LM": label_mapping(of_target.logits),
        "FM": feature_mapping(of_target.features, prototypes),
        "class distance": class_distances(of_source.features, labels, of_target.features, own),
    }
    random = np.random.default_rng(seed)
    in_domain = {
        "GraNd": gradient_norms(source, large, seeds=(seed,)),
        "Moderate": -moderate(of_source.features, labels),
    }

    def row(name: str, count: int, rows: np.ndarray, **more: Any) -> Row:
        found = _transferred(
            subset(source, rows), target, large(seed), epochs, probe_epochs, tune_epochs, seed
        )
        return {
            "seed": seed, "contender": name, "kept": count,
            "share": 100.0 * len(rows) / len(labels), **found, **more,
        }  # fmt: skip

    every = np.arange(len(labels))
    yield row("everything", classes, every, surrogate_seconds=trained, selection_seconds=looked)
    for count in kept:
        for name, vote in votes.items():
            rows = keep_classes(vote, labels, count)
            chosen = ranking(vote)[:count]
            more = {"unvoted": max(0, count - (classes - vote.without_votes))}
            if len(source.classes) == len(NAMES):
                more |= {
                    "digits": int(np.isin(chosen, DIGITS).sum()),
                    "classes": [NAMES[label] for label in sorted(chosen)],
                }
            yield row(name, count, rows, **more)
        yield row("reverse LM", count, keep_classes(votes["LM"], labels, count, reverse=True))
        found = [
            row("random classes", count, np.flatnonzero(np.isin(labels, drawn)))
            for drawn in (random.permutation(classes)[:count] for _ in range(DRAWS))
        ]
        numbers = ("probe", "tuned", "seconds", "share")
        yield {
            "seed": seed, "contender": "random classes", "kept": count,
            **{number: float(np.mean([one[number] for one in found])) for number in numbers},
        }  # fmt: skip
        share = count / classes
        yield row(
            "random samples",
            count,
            np.sort(random.permutation(every)[: round(share * len(labels))]),
        )
        for name, scores in in_domain.items():
            rows = keep(scores, share, labels=labels, balance=1.0)
            yield row(name, count, np.sort(rows))


def _transferred(
    source: Classification,
    target: Classification,
    network: nn.Module,
    epochs: int,
    probe_epochs: int,
    tune_epochs: int,
    seed: int,
) -> dict[str, float]:
    """Pretrains, then probes and fine-tunes; the head has all source classes while pretraining."""
    began = time.process_time()
    optimizer = sgd(network, lr=0.05)
    fit(
        Supervised(network, source, optimizer=optimizer),
        source,
        epochs=epochs,
        batch_size=64,
        seed=seed,
    )
    seconds = time.process_time() - began
    result = {"seconds": seconds}
    for kind, rounds, lr in (("probe", probe_epochs, 1e-2), ("tuned", tune_epochs, 1e-3)):
        copied = copy.deepcopy(network)
        head = list(copied.children())[-1]
        assert isinstance(head, nn.Linear) and isinstance(copied, nn.Sequential)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            copied[-1] = nn.Linear(head.in_features, len(target.classes))
        if kind == "probe":
            copied[:-1].requires_grad_(False)
        adam = torch.optim.Adam([p for p in copied.parameters() if p.requires_grad], lr=lr)
        rule = Supervised(copied, target, optimizer=adam)
        fit(rule, target, epochs=rounds, batch_size=64, seed=seed)
        result[kind] = target.score(copied, "test")
    return result


def _source(seed: int) -> Classification:
    random = np.random.default_rng(seed)
    images, labels = [], []
    for offset, name, turn in ((0, "fashion_mnist", 0), (10, "mnist", 0), (20, "mnist", 1)):
        found = idx_sources(folder_of(name))[0]["train"]
        own = found.labels.numpy()
        order = random.permutation(len(own))
        rows = order[place_in_class(own[order]) < PER_CLASS]
        images.append(torch.rot90(found.fetch(rows), turn, (2, 3)))
        labels.append(found.labels[torch.from_numpy(rows)] + offset)
    pool = ArraySource(torch.cat(images), torch.cat(labels))
    # Everything is for pretraining; nothing is measured on the source.
    return assemble(pool, NAMES, name="thirty classes", validation=pool, test=pool, seed=seed)


def _target(seed: int) -> Classification:
    """Digits of 8 x 8, enlarged to 28 x 28; 20 of each class train, the test split is as usual."""
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
    return ArraySource(nn.functional.pad(large, (4, 4, 4, 4)).round().to(torch.uint8), labels)


def _small(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 5, padding=2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
            nn.Linear(216, 30),
        )  # fmt: skip


def _large(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
            nn.Linear(576, 128), nn.ReLU(), nn.Linear(128, 30),
        )  # fmt: skip


def full(seeds: Sequence[int]) -> Iterator[Row]:
    """A source of a hundred classes (CIFAR-100) for CIFAR-10: surrogate and network of a ResNet."""

    def network(seed: int) -> nn.Module:
        made = resnet18(seed)
        made.fc = nn.Linear(512, 100)
        return nn.Sequential(*list(made.children())[:-1], nn.Linear(512, 100))

    for seed in seeds:
        yield from _compare(
            open_task(folder_of("cifar100"), seed=seed),
            open_task(folder_of("cifar10"), seed=seed, limit=5_000),
            seed, surrogate=network, large=network, epochs=100, surrogate_epochs=16,
            kept=(80, 60, 40, 20), probe_epochs=50, tune_epochs=200,
        )  # fmt: skip


def draw(result: Result, path: Path) -> None:
    """Probed and fine-tuned accuracy against how many classes are kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    rows = list(result.rows)
    names = [name for name in dict.fromkeys(r["contender"] for r in rows) if name != "everything"]
    kept = sorted({row["kept"] for row in rows if row["contender"] != "everything"})
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, ("probe", "tuned"), strict=True):
        whole = Pick(metric, {"contender": "everything"}).by_seed(rows)
        axes.axhline(float(np.mean(list(whole.values()))), color="0.5", linestyle=":")
        for name in names:
            found = [
                list(Pick(metric, {"contender": name, "kept": count}).by_seed(rows).values())
                for count in kept
            ]
            axes.errorbar(
                kept, [np.mean(v) for v in found],
                yerr=[np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in found],
                marker="o", markersize=4, capsize=2, label=name,
                linestyle="--" if "random" in name else "-",
            )  # fmt: skip
        axes.set(xlabel="source classes kept", ylabel="target test accuracy (%)")
        axes.set_title("linear probe" if metric == "probe" else "fine-tuned", fontsize=10)
    panels[1].legend(fontsize=7)
    figure.savefig(path, dpi=110, format="png")


def _pick(metric: str, name: str, kept: int) -> Pick:
    return Pick(metric, {"contender": name, "kept": kept})


def _claims() -> Iterator[Claim]:
    for name in ("LM", "FM"):
        yield Claim(
            f"{name} keeps at least eight upright digits among ten classes",
            _pick("digits", name, 10), ">=", 8.0,
        )  # fmt: skip
        for kept in KEPT:
            yield Claim(
                f"{name}, {kept} classes: the probe loses no more than a point to the full source",
                _pick("probe", name, kept), ">=", _pick("probe", "everything", 30), offset=-1.0,
                paper="40 to 80 % of ImageNet's classes can go at no loss",
            )  # fmt: skip
        for kept in KEPT[1:]:
            yield Claim(
                f"{name}, {kept} classes: the probe is better than with random classes",
                _pick("probe", name, kept), ">", _pick("probe", "random classes", kept),
            )  # fmt: skip
    for kept in KEPT[1:]:
        yield Claim(
            f"random classes are better than the least needed ones ({kept})",
            _pick("probe", "random classes", kept), ">", _pick("probe", "reverse LM", kept),
        )  # fmt: skip
    yield Claim(
        "pretraining on a third of the classes takes at most 40 % of the time",
        Pick("seconds_share", {"contender": "LM", "kept": 10}), "<=", 0.4,
    )  # fmt: skip


def timed(rows: Iterator[Row]) -> Iterator[Row]:
    """Adds the share of the full source's pretraining time to every row."""
    whole: dict[Any, float] = {}
    for row in rows:
        if row["contender"] == "everything":
            whole[row["seed"]] = row["seconds"]
        yield {**row, "seconds_share": row["seconds"] / whole[row["seed"]]}


EXPERIMENT = Experiment(
    spec="dp4tl",
    title="which source classes to pretrain on",
    claims=tuple(_claims()),
    quick=lambda seeds: timed(quick(seeds)),
    full=lambda seeds: timed(full(seeds)),
    draw=draw,
)
