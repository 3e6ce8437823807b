"""Maestro against cutting by singular values, fixed ranks and pruning.

First the two cases with known answers: a linear map of rank three, whose nested best
approximations ordered decomposition must find, and a linear autoencoder on three points, of which
the penalty must leave three components. Then classifiers: all low-rank contenders are cut to the
same share of every layer's rank, the others to as many parameters; everybody trains for as many
epochs in all and gets as many trials, chosen on the validation split after the cut. The simplest
controls are a network of that rank from the start, and singular values with fine-tuning.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.compress.low_rank import (
    Decomposed,
    LowRankTraining,
    Order,
    Sampler,
    decompose,
    published_sgd,
    two_drops,
)
from gossamer.compress.prune.magnitude import prune
from gossamer.core.errors import InputError
from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, constant, fit
from gossamer.core.network import Network
from gossamer.core.task import Task, device_of, evaluating, seed_of, to_device
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.models.plain import mlp
from gossamer.models.resnet import SmallResNet
from gossamer.parts.batchnorm import recalibrate_on
from gossamer.parts.masks import Masks

log = logging.getLogger(__name__)

SHARE = 0.25  # of the full ranks, at which the contenders are compared

# Known answers


class LeastSquares(Task):
    """A linear map to learn: half the squared error of each sample, averaged over samples.

    Args:
        inputs: ``[samples, inputs]``; all of them are one batch.
        targets: ``[samples, outputs]``.
    """

    name = "linear map"
    metric = "negative squared error"

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.data = (inputs, targets)
        self.example_inputs = (inputs[:2],)

    def size(self, split: str) -> int:
        return len(self.data[0])

    def batches(
        self,
        split: str,
        *,
        batch_size: int = 128,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if start == 0:
            yield self.data

    def inputs(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return (batch[0],)

    def criterion(self, outputs: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (outputs - batch[1]).square().sum(1).mean()

    def score(self, model: Callable[..., Any], split: str = "validation") -> float:
        batch = to_device(self.data, device_of(model))
        with evaluating(model):
            return -float(self.criterion(model(batch[0]), batch))


def linear_map(seed: int, *, steps: int = 4000, lr: float = 0.5) -> Row:
    """Ordered decomposition of a 9 x 6 matrix of rank three, seen through the identity.

    Returns:
        A row with the largest squared Frobenius distance, over all ranks, between the first
        components and the best approximation of that rank.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        target = torch.randn(9, 3) @ torch.randn(3, 6)
        module = nn.Sequential(nn.Linear(9, 6, bias=False))
    task = LeastSquares(torch.eye(9), target)
    network = decompose(module, task.example_inputs, last=True)
    rule = LowRankTraining(
        network,
        task,
        lam=0.0,
        eps=0.0,
        optimizer=torch.optim.SGD(network.parameters(), lr=lr),
        schedule=constant,
    )
    fit(rule, task, epochs=steps, batch_size=9, seed=seed, cpu=True, title="linear map")
    left, values, right = torch.linalg.svd(target.T.double())
    (layer,) = network.layers.values()
    u, v = layer.u.detach().double(), layer.v.detach().double()
    errors = []
    for rank in range(1, 7):
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        errors.append(float((u[:, :rank] @ v[:rank] - best).square().sum()))
    return {
        "work": "linear map",
        "contender": "LoD",
        "seed": seed,
        "errors": errors,
        "worst_error": max(errors),
        "norms": (u.norm(dim=0) * v.norm(dim=1)).tolist(),
        "singular_values": values.tolist(),
    }


def autoencoder(seed: int, *, steps: int = 2500, lr: float = 0.1, lam: float = 1e-2) -> Row:
    """A linear autoencoder of ten features on three points; three components are enough."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        points = torch.randn(3, 10)
        module = nn.Sequential(nn.Linear(10, 10, bias=False))
    task = LeastSquares(points, points)
    network = decompose(module, task.example_inputs, last=True)
    rule = LowRankTraining(
        network,
        task,
        lam=lam,
        optimizer=torch.optim.SGD(network.parameters(), lr=lr),
        schedule=constant,
    )
    fit(rule, task, epochs=steps, batch_size=3, seed=seed, cpu=True, title="autoencoder")
    return {
        "work": "autoencoder",
        "contender": "Maestro",
        "seed": seed,
        "components": network.ranks()["0"],
        "squared_error": -task.score(network),
    }


# Classifiers


@dataclass(frozen=True)
class Work:
    """What the contenders compete on.

    Attributes:
        name: of the data, for the rows.
        task: of a seed.
        network: makes the dense network.
        epochs: of every contender, all its stages together.
        batch_size: samples a batch.
        lr: of the contenders that try penalties.
        lams: penalties tried.
        rates: learning rates tried by the contenders without a penalty; as many.
        shares: of the full ranks, for the curves.
        cpu: stay on the CPU.
    """

    name: str
    task: Callable[[int], Task]
    network: Callable[[], nn.Module]
    epochs: int = 60
    batch_size: int = 32
    lr: float = 0.02
    lams: tuple[float, ...] = (0.0, 1e-5, 1e-4, 1e-3)
    rates: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    shares: tuple[float, ...] = (1.0, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03125)
    cpu: bool = True


@dataclass
class Trial:
    """One trained contender.

    Attributes:
        network: decomposed, at its trained ranks, or plain.
        setting: what was tried, by name.
        training_macs: forward multiply-accumulates of the training.
    """

    network: nn.Module
    setting: Mapping[str, float]
    training_macs: int


class _Contest:
    """The contenders of one seed."""

    def __init__(self, work: Work, seed: int) -> None:
        self.work = work
        self.seed = seed
        self.task = work.task(seed)
        dense = decompose(self.fresh(), self.task.example_inputs)
        self.ranks = dense.share_of_ranks(SHARE)
        self.parameters = dense.parameters_at(self.ranks)
        self.dense_parameters = dense.parameters_at()
        self.dense_macs = dense.macs_at()

    def fresh(self) -> nn.Module:
        """The untrained network."""
        with torch.random.fork_rng():
            torch.manual_seed(seed_of("network", self.seed))
            return self.work.network()

    def train(
        self,
        network: nn.Module,
        epochs: int,
        lr: float,
        *,
        stage: str,
        schedule: Callable[[float], float] = two_drops,
        after_step: Callable[[], None] | None = None,
    ) -> int:
        """Trains plainly, in place; returns the multiply-accumulates."""
        rule = Supervised(
            network,
            self.task,
            optimizer=published_sgd(network, lr=lr),
            schedule=schedule,
            after_step=after_step,
        )
        self.fit(rule, epochs, stage)
        if isinstance(network, Decomposed):
            each = network.macs_at(factorised=True)
        else:
            each = self.dense_macs
        return each * epochs * self.task.size("train")

    def fit(self, rule: Any, epochs: int, stage: str) -> None:
        fit(
            rule,
            self.task,
            epochs=epochs,
            batch_size=self.work.batch_size,
            seed=seed_of(stage, self.seed),
            cpu=self.work.cpu,
            title=f"{self.work.name}: {stage}",
        )

    # How each contender is made

    def dense(self, lr: float) -> Trial:
        network = self.fresh()
        macs = self.train(network, self.work.epochs, lr, stage="dense")
        return Trial(network, {"learning_rate": lr}, macs)

    def unpenalised(self, sampler: Sampler, lr: float) -> Trial:
        """Ordered decomposition alone."""
        return self.ordered(sampler, lr, 0.0)

    def ordered(self, sampler: Sampler, lr: float, lam: float) -> Trial:
        """Maestro and its ablations."""
        network = decompose(self.fresh(), self.task.example_inputs)
        rule = LowRankTraining(
            network,
            self.task,
            lam=lam,
            sampler=sampler,
            optimizer=published_sgd(network, lr=lr),
        )
        self.fit(rule, self.work.epochs, "low-rank")
        return Trial(network, {"lam": lam, "learning_rate": lr}, rule.macs)

    def fixed(self, warm: float, lr: float) -> Trial:
        """Layers of the compared rank after a share of dense training (Pufferfish; 0: never)."""
        module = self.fresh()
        warm_epochs = round(warm * self.work.epochs)
        macs = self.train(module, warm_epochs, lr, stage="warm-up", schedule=constant)
        network = decompose(module, self.task.example_inputs, share=SHARE)
        macs += self.train(network, self.work.epochs - warm_epochs, lr, stage="low-rank")
        return Trial(network, {"learning_rate": lr}, macs)

    def cut_and_tuned(self, lr: float) -> Trial:
        """Dense for three quarters of the epochs, cut by singular values, then trained on."""
        module = self.fresh()
        tuned = self.work.epochs // 4
        macs = self.train(module, self.work.epochs - tuned, lr, stage="dense")
        network = decompose(module, self.task.example_inputs)
        network.set_ranks(self.ranks)
        macs += self.train(network, tuned, lr / 10, stage="tuning", schedule=constant)
        return Trial(network, {"learning_rate": lr}, macs)

    def magnitude(self, lr: float, rounds: int) -> Trial:
        """The smallest weights go, in rounds, to as many parameters; after each it trains on."""
        module = self.fresh()
        tuned = self.work.epochs // 4
        macs = self.train(module, self.work.epochs - tuned, lr, stage="dense")
        # The layers that the low-rank contenders factorise.
        names = [f"{name}.weight" for name in self.ranks]
        weights = [module.get_parameter(name) for name in names]
        total = sum(w.numel() for w in weights)
        kept = self.parameters - (sum(p.numel() for p in module.parameters()) - total)
        for number in range(1, rounds + 1):
            count = round(total * (kept / total) ** (number / rounds))
            sizes = torch.cat([w.detach().abs().flatten() for w in weights])
            threshold = sizes.topk(count).values[-1]
            masks = Masks(
                module,
                {n: w.detach().abs() >= threshold for n, w in zip(names, weights, strict=True)},
            )
            masks.hold_weights()
            macs += self.train(
                module,
                tuned * number // rounds - tuned * (number - 1) // rounds,
                lr / 10,
                stage=f"tuning {number}",
                schedule=constant,
                after_step=masks.hold_weights,
            )
        return Trial(module, {"learning_rate": lr}, macs)

    def units(self, lr: float) -> Trial:
        """Whole units go by the norm of their weights, down to as many parameters."""
        module = self.fresh()
        tuned = self.work.epochs // 4
        macs = self.train(module, self.work.epochs - tuned, lr, stage="dense")
        share = self.parameters / sum(p.numel() for p in module.parameters())
        small = prune(
            Network(module, self.task.example_inputs),
            self.task,
            parameters=share,
            epochs=tuned,
            batch_size=self.work.batch_size,
            lr=lr / 10,
            seed=self.seed,
            cpu=self.work.cpu,
        )
        macs += round(share * self.dense_macs * tuned * self.task.size("train"))
        return Trial(small.module, {"learning_rate": lr}, macs)

    # How it is cut and measured

    def cut(self, trial: Trial, share: float, *, order: Order = "uniform") -> nn.Module:
        """The contender at a share of the full ranks, as exported.

        In another order than "uniform" it keeps as many parameters as that share would.
        """
        if not isinstance(trial.network, Decomposed):
            return trial.network
        network = copy.deepcopy(trial.network)
        ranks = network.share_of_ranks(share)
        if order != "uniform":
            limit = network.parameters_at(ranks)
            ranks = network.ranks_within(limit, network.parameters_at, order=order)
        network.set_ranks(ranks)
        small = network.export()
        recalibrate_on(small, self.task)
        return small

    def as_decomposed(self, trial: Trial) -> Trial:
        """A plainly trained network by its singular values."""
        network = decompose(trial.network, self.task.example_inputs)
        return Trial(network, trial.setting, trial.training_macs)

    def row(
        self, contender: str, trial: Trial, share: float | None, module: nn.Module, **more: Any
    ) -> Row:
        parameters = sum(int(p.count_nonzero()) for p in module.parameters())
        result = {
            "work": self.work.name,
            "contender": contender,
            "seed": self.seed,
            "share": share,
            "parameters": parameters,
            "parameters_share": parameters / self.dense_parameters,
            "validation": self.task.score(module, "validation"),
            "accuracy": self.task.score(module, "test"),
            "training_macs": trial.training_macs,
            **trial.setting,
            **more,
        }
        log.info("%s", result)
        return result

    def curve(
        self, contender: str, trials: Iterable[Trial], *, order: Order = "uniform"
    ) -> Iterator[Row]:
        """Rows over all shares, each with the points lost since the whole network."""
        trial = self.best(trials, order=order)
        whole: float | None = None
        for share in self.work.shares:
            small = self.cut(trial, share, order=order)
            row = self.row(contender, trial, share, small)
            whole = row["accuracy"] if whole is None else whole
            yield {**row, "drop": whole - row["accuracy"]}

    def tried(self, make: Callable[[float], Trial], settings: Iterable[float]) -> list[Trial]:
        """One trial a setting; those that diverge are lost.

        Raises:
            InputError: if all diverge.
        """
        trials = []
        error: InputError | None = None
        for setting in settings:
            try:
                trials.append(make(setting))
            except InputError as reason:
                error = reason
                log.info("%s at %g: %s", self.work.name, setting, reason)
        if not trials and error is not None:
            raise error
        return trials

    def best(self, trials: Iterable[Trial], *, order: Order = "uniform") -> Trial:
        """The trial with the best validation score at the compared share."""
        return max(
            trials,
            key=lambda t: self.task.score(self.cut(t, SHARE, order=order), "validation"),
        )


def contend(work: Work, seed: int) -> Iterator[Row]:
    """Trains, cuts and scores every contender for one seed.

    Args:
        work: the data, the network and the budget.
        seed: of split, initial weights, data order and sampled ranks.

    Yields:
        Rows with test accuracy (percent) and parameters that are not zero; those of low-rank
        contenders at several shares of the full ranks, with the points lost to the cut.
    """
    contest = _Contest(work, seed)
    task = contest.task
    dense = contest.tried(contest.dense, work.rates)
    chosen = max(dense, key=lambda t: task.score(t.network, "validation"))
    yield contest.row("dense", chosen, None, chosen.network)
    values = [contest.as_decomposed(trial) for trial in dense]
    yield from contest.curve("SVD", values)
    yield from contest.curve("SVD by energy", values, order="energy")

    maestro = contest.tried(partial(contest.ordered, "per_layer", work.lr), work.lams)
    yield from contest.curve("Maestro", maestro)
    yield from contest.curve("Maestro by importance", maestro, order="importance")
    sizes = []
    for trial in maestro:
        assert isinstance(trial.network, Decomposed)
        sizes.append(trial.network.parameters_at())
        small = contest.cut(trial, 1.0)
        ranks = list(trial.network.ranks().values())
        yield contest.row(f"Maestro, lam {trial.setting['lam']:g}", trial, None, small, ranks=ranks)
    yield {
        "work": work.name,
        "contender": "Maestro by lam",
        "seed": seed,
        "sizes": sizes,
        "largest_rise": max(b - a for a, b in itertools.pairwise(sizes)),
    }

    ablations = {
        "HGL without LoD": contest.tried(partial(contest.ordered, "full", work.lr), work.lams),
        "LoD without HGL": contest.tried(partial(contest.unpenalised, "per_layer"), work.rates),
        "LoD across layers": contest.tried(
            partial(contest.unpenalised, "across_layers"), work.rates
        ),
    }
    for name, trials in ablations.items():
        yield from contest.curve(name, trials)
    fixed: dict[str, Callable[[float], Trial]] = {
        "fixed rank": partial(contest.fixed, 0.0),
        "Pufferfish": partial(contest.fixed, 0.25),
        "SVD, fine-tuned": contest.cut_and_tuned,
        "magnitude pruning": partial(contest.magnitude, rounds=1),
        "iterative magnitude pruning": partial(contest.magnitude, rounds=3),
        "unit pruning": contest.units,
    }
    for name, make in fixed.items():
        trial = contest.best(contest.tried(make, work.rates))
        yield contest.row(name, trial, SHARE, contest.cut(trial, SHARE))


def _digits(seed: int) -> Task:
    return digits(seed=seed)


DIGITS = Work("digits", _digits, lambda: mlp((64, 128, 128, 10)))


def cifar_work(folder: Path) -> Work:
    """CIFAR-10 with ResNet-18 and the published schedule."""
    return Work(
        "cifar10",
        lambda seed: cifar10(folder, seed=seed),
        lambda: SmallResNet(
            (64, 128, 256, 512), 2, in_channels=3, classes=10, projection=True
        ),
        epochs=300,
        batch_size=128,
        lr=0.1,
        lams=(0.0, 1e-6, 1e-5, 1e-4),
        rates=(0.03, 0.05, 0.1, 0.2),
        cpu=False,
    )  # fmt: skip


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """The known answers, and a perceptron on handwritten digits."""
    for seed in seeds:
        yield linear_map(seed)
        yield autoencoder(seed)
        yield from contend(DIGITS, seed)


def full(seeds: Sequence[int], *, images: Path = Path("data/cifar10")) -> Iterable[Row]:
    """The known answers, and ResNet-18 on CIFAR-10.

    Args:
        seeds: one run of everything each.
        images: a folder that :func:`gossamer.datasets.cifar.cifar10` reads.

    Raises:
        InputError: if the folder is not there.
    """
    work = cifar_work(images)
    work.task(0)  # says at once if the images are missing
    for seed in seeds:
        yield linear_map(seed)
        yield autoencoder(seed)
        yield from contend(work, seed)


def draw(result: Result, path: Path) -> None:
    """Draws test accuracy against the parameters left, mean over seeds with the range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result.rows if "accuracy" in row]
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["contender"] for row in rows):
        if "lam " in name:
            continue
        chosen = [row for row in rows if row["contender"] == name]
        places = []
        for share in dict.fromkeys(row["share"] for row in chosen):
            scores = [row["accuracy"] for row in chosen if row["share"] == share]
            size = np.mean([row["parameters_share"] for row in chosen if row["share"] == share])
            places.append((100 * size, np.mean(scores), min(scores), max(scores)))
        x, y, low, high = np.array(places).T
        marker = "o" if len(places) > 1 else "s"
        axes.errorbar(x, y, yerr=(y - low, high - y), marker=marker, capsize=2, ms=4, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("parameters left (% of the dense network)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def _drop(contender: str) -> Pick:
    return Pick("drop", {"contender": contender, "share": SHARE})


EXPERIMENT = Experiment(
    spec="maestro",
    title="ordered low-rank training against singular values, fixed ranks and pruning",
    claims=(
        Claim(
            "ordered decomposition finds the best approximation of every rank: the squared error "
            "is below 0.001",
            Pick("worst_error", {"work": "linear map"}),
            "<",
            1e-3,
            paper="a theorem, for data that are uniform on the sphere",
        ),
        Claim(
            "at 25 % of the ranks Maestro loses at most 2 points",
            _drop("Maestro"),
            "<=",
            2.0,
            paper="a smooth trade-off (figure)",
        ),
        Claim(
            "at 25 % of the ranks the plain network cut by its singular values loses more",
            _drop("SVD"),
            ">",
            _drop("Maestro"),
            paper="the plain network collapses (figure)",
        ),
        Claim(
            "parameters never rise with the penalty",
            Pick("largest_rise", {"contender": "Maestro by lam"}),
            "<=",
            0.0,
        ),
        Claim(
            "the largest penalty leaves fewer parameters than none",
            Pick("parameters", {"contender": "Maestro, lam 0.001"}),
            "<",
            Pick("parameters", {"contender": "Maestro, lam 0"}),
        ),
    ),
    quick=quick,
    full=full,
    quick_seeds=(0, 1, 2),
    draw=draw,
)
