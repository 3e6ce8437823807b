"""Attacks on adversarially trained networks: which single one is strongest, and what it costs.

Two tasks: Fashion-MNIST with its 10 classes, and pairs of its images side by side (each at half the
side) with 100 classes, since the probability margin is said to gain with the number of classes. On
each a small perceptron is trained on adversarial images. Single losses get the same number of
gradients, starts and step sizes; the two-stage attacks get that number in two halves. A control
with two plain starts of half as many steps shows whether it is the stages or the restart that help.
Then the whole attack, its ensembles and AutoAttack, with the passes of each counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gossamer.core.errors import MissingExtra
from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import fit
from gossamer.core.task import Classification
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.idx import idx_sources
from gossamer.datasets.splits import assemble
from gossamer.evaluate.adversarial_training import AdversarialTraining
from gossamer.evaluate.attack import Attack
from gossamer.evaluate.auto_attack import auto_attack, pma_plus, pma_then_auto_attack
from gossamer.evaluate.gradient_ascent import PGD
from gossamer.evaluate.margin_attack import MD, PMA
from gossamer.evaluate.robustness import TaskImages
from gossamer.evaluate.victim import Normalised, Victim
from gossamer.experiments.real_data import folder_of

TRAIN, ATTACKED, STEPS = 12_000, 500, 40
TASKS = {"10 classes": 0.1, "100 classes": 0.05}
"""Their names and budgets."""


def _quick(seeds: Sequence[int]) -> Iterator[Row]:
    """Fashion-MNIST and pairs of it."""
    for seed in seeds:
        for name, eps in TASKS.items():
            task = _task(name, seed)
            network = _trained(task, eps, seed)
            images = TaskImages(task, "test", ATTACKED)
            pixels, labels = images.fetch(np.arange(ATTACKED))
            for contender, attack in _contenders(Normalised(network, task.preprocess), eps, seed):
                outcome = attack.run(pixels, labels)
                yield {
                    "seed": seed, "task": name, "contender": contender,
                    "clean": outcome.clean_accuracy, "robust": outcome.accuracy,
                    "passes": sum(cost.forwards + cost.backwards for cost in outcome.costs),
                    "gradients": sum(cost.backwards for cost in outcome.costs),
                    "seconds": sum(cost.seconds for cost in outcome.costs),
                }  # fmt: skip


def _task(name: str, seed: int) -> Classification:
    sources, _ = idx_sources(folder_of("fashion_mnist"))
    random = np.random.default_rng(seed)
    if name == "10 classes":
        parts = []
        for split, count in (("train", TRAIN), ("test", 4 * ATTACKED)):
            rows = random.permutation(len(sources[split]))[:count]
            parts.append(ArraySource(sources[split].fetch(rows), sources[split].labels[rows]))
        classes = [str(label) for label in range(10)]
    else:
        parts = [
            _pairs(sources[split], count, random)
            for split, count in (("train", 4 * TRAIN), ("test", 4 * ATTACKED))
        ]
        classes = [f"{first}{second}" for first in range(10) for second in range(10)]
    return assemble(parts[0], classes, name=name, test=parts[1], seed=seed, augment=None)


def _pairs(source: ArraySource, count: int, random: np.random.Generator) -> ArraySource:
    """Two images side by side at half the side; the class is both of theirs."""
    first, second = random.integers(0, len(source), (2, count))
    halves = [nn.functional.avg_pool2d(source.fetch(rows).float(), 2) for rows in (first, second)]
    labels = 10 * source.labels[first] + source.labels[second]
    return ArraySource(torch.cat(halves, 3), labels)


def _trained(task: Classification, eps: float, seed: int) -> nn.Module:
    pixels = task.example_inputs[0][0].numel()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(),
            nn.Linear(200, len(task.classes)),
        )  # fmt: skip
    rule = AdversarialTraining(
        network, task, eps=eps, steps=5, optimizer=torch.optim.Adam(network.parameters(), 1e-3)
    )
    fit(rule, task, epochs=6, batch_size=64, seed=seed)
    return network


def _contenders(model: nn.Module, eps: float, seed: int) -> Iterator[tuple[str, Attack]]:
    for loss in ("ce", "targeted ce", "margin", "dlr", "mifpe", "pm"):
        yield f"PGD {loss}", PGD(
            Victim(model), loss=loss, steps=STEPS, step_size=2 * eps, eps=eps, seed=seed,
            batch_size=ATTACKED,
        )  # fmt: skip
    yield "PGD pm, two starts", PGD(
        Victim(model), loss="pm", steps=STEPS // 2, restarts=2, step_size=2 * eps, eps=eps,
        seed=seed, batch_size=ATTACKED,
    )  # fmt: skip
    for name, kind in (("MD", MD), ("PMA", PMA)):
        yield (
            f"{name}, 2 x {STEPS // 2}",
            kind(Victim(model), steps=STEPS // 2, eps=eps, seed=seed, batch_size=ATTACKED),
        )
    for name, kind in (("MD", MD), ("PMA", PMA)):
        yield f"{name}, 2 x 100", kind(Victim(model), eps=eps, seed=seed, batch_size=ATTACKED)
    for name, chain in (
        ("PMA+", pma_plus), ("PMA then AutoAttack", pma_then_auto_attack),
        ("AutoAttack", auto_attack),
    ):  # fmt: skip
        yield name, chain(Victim(model), eps=eps, seed=seed, batch_size=ATTACKED)


def _full(seeds: Sequence[int]) -> Iterator[Row]:
    """Three robust CIFAR-10 networks of RobustBench, 1,000 images, eps 8/255."""
    try:
        from robustbench.utils import load_model  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtra("robustbench", "dev") from error

    from gossamer.datasets.cifar import cifar10

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for seed in seeds:
        task = cifar10(folder_of("cifar10"), seed=seed)
        pixels, labels = TaskImages(task, "test", 1000).fetch(np.arange(1000))
        for name in ("Carmon2019Unlabeled", "Rebuffi2021Fixing_70_16_cutmix_extra", "Engstrom2019"):
            model = load_model(name, dataset="cifar10", threat_model="Linf").to(device)
            for contender, attack in _contenders(model, 8 / 255, seed):
                outcome = attack.run(pixels, labels)
                yield {
                    "seed": seed, "task": name, "contender": contender,
                    "clean": outcome.clean_accuracy, "robust": outcome.accuracy,
                    "passes": sum(cost.forwards + cost.backwards for cost in outcome.costs),
                    "gradients": sum(cost.backwards for cost in outcome.costs),
                    "seconds": sum(cost.seconds for cost in outcome.costs),
                }  # fmt: skip


def _of(metric: str, task: str, contender: str) -> Pick:
    return Pick(metric, {"task": task, "contender": contender})


def _claims() -> Iterator[Claim]:
    for task in TASKS:
        for loss in ("ce", "margin", "dlr"):
            yield Claim(
                f"{task}: PGD on the probability margin leaves no more standing than on {loss}, "
                "to .2 points",
                _of("robust", task, "PGD pm"), "<=", _of("robust", task, f"PGD {loss}"), offset=0.2,
            )  # fmt: skip
        yield Claim(
            f"{task}: nor does PMA leave more than MD at equal gradients, to .2 points",
            _of("robust", task, "PMA, 2 x 20"), "<=", _of("robust", task, "MD, 2 x 20"), offset=0.2,
        )  # fmt: skip
        yield Claim(
            f"{task}: PMA+ is within half a point of AutoAttack",
            _of("robust", task, "PMA+"), "<=", _of("robust", task, "AutoAttack"), offset=0.5,
            paper="PMA alone is within .1 of AutoAttack on CIFAR-10 (71.10 both)",
        )  # fmt: skip
        yield Claim(
            f"{task}: by at most a third of its passes",
            _of("share of passes", task, "PMA+"), "<=", 1 / 3,
        )  # fmt: skip


def quick(seeds: Sequence[int]) -> Iterator[Row]:
    """The quick rows; ensembles say what share of AutoAttack's passes they took."""
    yield from _with_shares(list(_quick(seeds)))


def full(seeds: Sequence[int]) -> Iterator[Row]:
    """As :func:`quick`."""
    yield from _with_shares(list(_full(seeds)))


def _with_shares(rows: Sequence[Row]) -> Iterator[Row]:
    whole = {(r["seed"], r["task"]): r for r in rows if r["contender"] == "AutoAttack"}
    for row in rows:
        reference = whole[row["seed"], row["task"]]
        yield {
            **row,
            "share of passes": row["passes"] / reference["passes"],
            "share of gradients": row["gradients"] / max(reference["gradients"], 1),
        }


def draw(result: Result, path: Path) -> None:
    """Robust accuracy against passes, one panel a task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in result.rows))
    figure = Figure(figsize=(6.2 * len(tasks), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks, strict=True):
        for name in dict.fromkeys(row["contender"] for row in result.rows):
            x = list(_of("passes", task, name).by_seed(result.rows).values())
            y = list(_of("robust", task, name).by_seed(result.rows).values())
            marker = "s" if "Auto" in name else "^" if "PMA" in name else "o"
            axes.errorbar(
                np.mean(x), np.mean(y), yerr=[[np.mean(y) - min(y)], [max(y) - np.mean(y)]],
                marker=marker, linestyle="", capsize=2, label=name,
            )  # fmt: skip
        axes.set(xscale="log", title=task, xlabel="images passed forward and backward")
        axes.set_ylabel("robust accuracy (%), range of the seeds")
        axes.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=7, loc="upper right")
    figure.savefig(path, dpi=110, format="png")


EXPERIMENT = Experiment(
    spec="pma",
    title="the probability margin attack against other losses, schedules and AutoAttack",
    claims=tuple(_claims()),
    quick=quick,
    full=full,
    draw=draw,
)
