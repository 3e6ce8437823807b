"""What several methods keep, learned from: accuracy against the fraction kept.

Each method chooses from the training split; the same learner learns from each choice, with the
same seeds, and is scored on the test split. Random selection is always among the methods, and the
whole training split is the reference. Fewer samples with the same epochs are fewer steps; with
``equal_steps`` everybody takes as many steps as the whole split would, which tells data and steps
apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gossamer.core.errors import InputError
from gossamer.core.experiment import about, half_width
from gossamer.core.files import exclusive, read_json, whole_file, write_json
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.progress import progress
from gossamer.core.task import Classification
from gossamer.data.methods import Candidates, choose, method_of
from gossamer.data.selection import ORDERS, Order, keep_count, read_selection, subset
from gossamer.parts.random_features import RandomFeatureClassifier

Learner = Callable[[Classification, int], float]
"""Learns from the training split of a task with a seed; answers test accuracy in percent."""


@dataclass(frozen=True)
class Contender:
    """A method with the end of its ranking that is kept.

    Attributes:
        name: as it is shown.
        method: its name, or None for the rows of an index file.
        order: which end.
        rows: of an index file, the best first.
    """

    name: str
    method: str | None
    order: Order = "hard"
    rows: np.ndarray | None = None

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Reads ``METHOD`` or ``METHOD:ORDER``, as ``el2n:easy``.

        Raises:
            InputError: if there is no such method or order.
        """
        name, _, order = text.partition(":")
        method_of(name)
        if order and order not in ORDERS:
            raise InputError(f"{text}: samples are kept {', '.join(ORDERS)}, not {order!r:.40}")
        return cls(text, name, order=order or "hard")  # type: ignore[arg-type]

    @classmethod
    def of_file(cls, path: Path, task: Classification) -> Contender:
        """The ranking of an index file about the training split.

        Raises:
            InputError: if it is about another number of samples.
        """
        found = read_selection(path)
        if len(found.names) != task.size("train"):
            raise InputError(
                f"{path} is about {len(found.names)} samples, the training split has "
                f"{task.size('train')}"
            )
        return cls(path.stem, None, rows=found.kept)


def compare(
    make_task: Callable[[int], Classification],
    make_candidates: Callable[[Classification, int], Candidates],
    contenders: Sequence[Contender],
    learner: Learner,
    *,
    fractions: Sequence[float],
    out: Path,
    identity: Mapping[str, Any],
    seeds: Sequence[int] = (0, 1, 2),
    balance: float = 0.5,
) -> dict[str, Any]:
    """Learns from what each contender keeps.

    Args:
        make_task: the data with the split of a seed.
        make_candidates: what methods may look at, for a task and a seed.
        contenders: "random" is added if it is not among them.
        learner: learns and scores.
        fractions: to keep; 1 is always measured, once a seed.
        out: a folder for ``compare.json`` and ``compare.png``; an interrupted run goes on there.
        identity: what the run depends on, as JSON values; another run in the folder is refused.
        seeds: of splits, methods and learners.
        balance: see :func:`gossamer.data.selection.keep`.

    Returns:
        What is written: "whole" accuracy, and for each contender and fraction the mean, half of
        the 95 % interval over seeds, and the paired difference to random.

    Raises:
        InputError: if nothing is to be compared, or the folder holds another run.
    """
    if not contenders or not fractions or not seeds:
        raise InputError("comparing needs at least one method, one fraction and one seed")
    for fraction in fractions:
        keep_count(1, fraction)
    if all(contender.method != "random" for contender in contenders):
        contenders = [*contenders, Contender("random", "random")]
    if len({contender.name for contender in contenders}) < len(contenders):
        raise InputError("two contenders have the same name")
    # Through JSON, as it will be read again (tuples become lists).
    identity = json.loads(json.dumps(dict(identity)))
    wanted = {
        **identity,
        "contenders": [contender.name for contender in contenders],
        "seeds": list(seeds),
        "balance": balance,
    }
    with exclusive(out):
        cells = _Cells(out / "cells.json", wanted)
        with progress() as bar:
            shown = bar.add_task(
                "comparing", total=len(seeds) * (1 + len(contenders) * len(fractions))
            )
            for seed in seeds:
                task = make_task(seed)
                candidates = make_candidates(task, seed)
                if not cells.has("whole", 1.0, seed):
                    cells.add("whole", 1.0, seed, task.size("train"), learner(task, seed))
                bar.advance(shown)
                for contender in contenders:
                    for fraction in fractions:
                        if not cells.has(contender.name, fraction, seed):
                            rows = _rows(contender, candidates, fraction, balance)
                            accuracy = learner(subset(task, rows), seed)
                            cells.add(contender.name, fraction, seed, len(rows), accuracy)
                        bar.advance(shown)
        result = {
            "rows": cells.rows,
            "whole": float(np.mean([row["accuracy"] for row in cells.of("whole")])),
            "curves": _curves(cells, contenders, fractions, seeds),
            "settings": identity,
            **about(seeds=list(seeds)),
        }
        write_json(out / "compare.json", result)
        with whole_file(out / "compare.png") as partial:
            draw(result, partial)
        (out / "cells.json").unlink()
    return result


def random_features_learner(count: int = 1500) -> Learner:
    """Ridge regression on random cosine features of the pixels: a second each.

    Args:
        count: of features.
    """

    def learn(task: Classification, seed: int) -> float:
        parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for split in ("train", "test"):
            batches = list(task.batches(split, batch_size=4096, shuffle=False))
            parts[split] = (
                np.concatenate([images.flatten(1).numpy() for images, _ in batches]),
                np.concatenate([labels.numpy() for _, labels in batches]),
            )
        model = RandomFeatureClassifier(count=count, seed=seed)
        inputs, labels = parts["train"]
        return model.fit(inputs, labels, len(task.classes)).accuracy(*parts["test"])

    return learn


def network_learner(
    make_network: Callable[[int], nn.Module],
    *,
    epochs: int = 20,
    batch_size: int = 128,
    lr: float = 0.1,
    steps: int | None = None,
    cpu: bool = False,
) -> Learner:
    """Trains a network and scores it after the last epoch.

    Args:
        make_network: a fresh network for a seed.
        epochs: passes over whatever is kept.
        batch_size: samples a batch.
        lr: of SGD, along half a cosine.
        steps: take (about) as many steps as this instead of ``epochs``.
        cpu: stay on the CPU although there is a GPU.
    """

    def learn(task: Classification, seed: int) -> float:
        network = make_network(seed)
        # A small set with large batches would take a handful of steps.
        size = min(batch_size, max(8, task.size("train") // 4))
        passes = epochs
        if steps is not None:
            passes = max(1, round(steps / task.steps_per_epoch("train", size)))
        rule = Supervised(network, task, optimizer=sgd(network, lr=lr))
        fit(rule, task, epochs=passes, batch_size=size, seed=seed, cpu=cpu)
        return task.score(network, "test")

    return learn


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy against the fraction kept, with intervals over the seeds.

    Args:
        result: as :func:`compare` returns it.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(result["whole"], color="0.4", linestyle=":", label="everything kept")
    for name, points in result["curves"].items():
        axes.errorbar(
            [100.0 * point["fraction"] for point in points],
            [point["accuracy"] for point in points],
            yerr=[point["half_width"] or 0.0 for point in points],
            marker="o", capsize=3, label=name, linestyle="--" if name == "random" else "-",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("kept (% of the training samples)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")


class _Cells:
    """Measured cells, written after each so that a killed run goes on."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = dict(identity)
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            found = read_json(path)
            if not isinstance(found, dict) or found.get("identity") != self.identity:
                raise InputError(
                    f"{path.parent} holds a comparison of other methods, seeds or data; choose "
                    "another --out, or remove it"
                )
            self.rows = found["rows"]

    def of(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["contender"] == name]

    def has(self, name: str, fraction: float, seed: int) -> bool:
        return any(row["fraction"] == fraction and row["seed"] == seed for row in self.of(name))

    def add(self, name: str, fraction: float, seed: int, kept: int, accuracy: float) -> None:
        row = {"contender": name, "fraction": fraction, "seed": seed, "kept": kept}
        self.rows.append(row | {"accuracy": accuracy})
        write_json(self.path, {"identity": self.identity, "rows": self.rows})


def _rows(
    contender: Contender, candidates: Candidates, fraction: float, balance: float
) -> np.ndarray:
    if contender.method is not None:
        chosen = choose(
            contender.method, candidates, fraction, order=contender.order, balance=balance
        )
        return chosen.rows
    assert contender.rows is not None
    wanted = keep_count(len(candidates), fraction)
    if wanted > len(contender.rows):
        raise InputError(
            f"{contender.name} keeps {len(contender.rows)} samples, fewer than the {wanted} that "
            f"a fraction of {fraction:g} is"
        )
    return contender.rows[:wanted]


def _curves(
    cells: _Cells,
    contenders: Sequence[Contender],
    fractions: Sequence[float],
    seeds: Sequence[int],
) -> dict[str, list[dict[str, Any]]]:
    found = {
        (row["contender"], row["fraction"], row["seed"]): row["accuracy"] for row in cells.rows
    }
    control = next(contender.name for contender in contenders if contender.method == "random")
    curves: dict[str, list[dict[str, Any]]] = {}
    for contender in contenders:
        for fraction in sorted(fractions):
            own = [found[contender.name, fraction, seed] for seed in seeds]
            gained = [a - found[control, fraction, s] for a, s in zip(own, seeds, strict=True)]
            curves.setdefault(contender.name, []).append(
                {
                    "fraction": fraction,
                    "accuracy": float(np.mean(own)),
                    "half_width": half_width(own),
                    "over_random": float(np.mean(gained)),
                    "over_random_half_width": half_width(gained),
                }
            )
    return curves
