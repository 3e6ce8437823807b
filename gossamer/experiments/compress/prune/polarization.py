"""Consensus sub-networks against magnitude, slimming, dropped blocks and gates that stay dynamic.

A residual network is cut to fewer blocks, or to fewer channels inside its blocks. Consensus trains
once with gates and cuts; what is trained without gates is trained for two thirds of the epochs, cut
to as many blocks (or MACs) as consensus kept for that seed, and trained on for the last third.
Every contender has as many trials, chosen by the validation score of the static network among
those that lost at least half of the blocks. The control that could explain a gain is dropping
blocks at random.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.compress.prune.allocation import cost_of, select
from gossamer.compress.prune.criterion import CRITERIA
from gossamer.compress.prune.polarization import (
    Binarize,
    ConsensusTraining,
    Gated,
    Mode,
    find_channels,
    find_residuals,
    gate,
    scaling_penalty,
    settle,
)
from gossamer.core import surgery
from gossamer.core.dependency import analyse
from gossamer.core.errors import InputError
from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Log, Supervised, fit, sgd
from gossamer.core.graph import Graph
from gossamer.core.task import Batch, Classification, Task, seed_of
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.models.resnet import cifar_resnet

log = logging.getLogger(__name__)


class Block(nn.Module):
    """``x + linear(relu(norm(linear(x))))``.

    Args:
        width: of everything.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.norm(self.inner(x))))


def residual_perceptron(
    *, inputs: int = 64, width: int = 48, blocks: int = 8, classes: int = 10
) -> nn.Sequential:
    """A perceptron of residual blocks; images are flattened.

    Args:
        inputs: pixels.
        width: of the blocks.
        blocks: how many.
        classes: logits.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width),
        *(Block(width) for _ in range(blocks)),
        nn.Linear(width, classes),
    )


@dataclass(frozen=True)
class Work:
    """What the contenders compete on.

    Attributes:
        name: of the data, for the rows.
        task: of a seed.
        network: makes the dense network.
        optimizer: of a network and a learning rate.
        epochs: of every contender, all its stages together.
        batch_size: samples a batch.
        lr: learning rate of the gated contenders.
        rates: tried by those without gates.
        act: weight of the activation term beside polarization.
        polars: weights of polarization tried.
        acts: weights of the activation term tried without polarization.
        drops: shares of blocks dropped at random, tried.
        slims: weights of penalties on batch-norm scales, tried.
        t: of the polarizing penalty on scales.
        hidden: width of the gates' hidden layer.
        channels: the (MACs-weighted) share of inner channels that gated contenders should keep
            open; None leaves channels out.
        channel_act: weight of the activation term beside polarization, for channels.
        channel_polars: weights of polarization tried for channels.
        channel_acts: weights of the activation term tried without polarization, for channels.
        cpu: stay on the CPU.
    """

    name: str
    task: Callable[[int], Classification]
    network: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module, float], Optimizer]
    epochs: int = 25
    batch_size: int = 64
    lr: float = 3e-3
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    act: float = 1.0
    polars: tuple[float, ...] = (2.0, 4.0, 8.0)
    acts: tuple[float, ...] = (0.3, 1.0, 2.0)
    drops: tuple[float, ...] = (0.2, 0.5, 0.8)
    slims: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    t: float = 1.2
    hidden: int = 8
    channels: float | None = 0.5
    channel_act: float = 4.0
    channel_polars: tuple[float, ...] = (4.0, 8.0, 16.0)
    channel_acts: tuple[float, ...] = (1.0, 2.0, 4.0)
    cpu: bool = True


@dataclass
class Trial:
    """One trained contender.

    Attributes:
        module: the static network.
        setting: what was tried, by name.
        report: of a gated network, see ``settle``.
        dynamic: the gated network.
    """

    module: nn.Module
    setting: Mapping[str, float]
    report: Mapping[str, Any]
    dynamic: Gated | None = None


class DroppedBlocks(Supervised):
    """Supervised training in which every batch skips random blocks (stochastic depth)."""

    def __init__(self, network: Gated, task: Task, *, drop: float, optimizer: Optimizer) -> None:
        super().__init__(network, task, optimizer=optimizer)
        self.drop = drop
        self.gated = [network]  # not a second module of the rule

    def step(self, batch: Batch) -> Log:
        (gated,) = self.gated
        gated.force(torch.bernoulli(torch.full((sum(gated.counts),), 1.0 - self.drop)))
        logged = super().step(batch)
        gated.force(None)
        return logged


class _Contest:
    """The contenders of one seed."""

    def __init__(self, work: Work, seed: int) -> None:
        self.work = work
        self.seed = seed
        self.task = work.task(seed)
        self.macs = Graph.trace(self.fresh(), self.task.example_inputs).macs

    def fresh(self) -> nn.Module:
        """The untrained network."""
        with torch.random.fork_rng():
            torch.manual_seed(seed_of("network", self.seed))
            return self.work.network()

    def gates(self, module: nn.Module, mode: Mode, **options: Any) -> Gated:
        return gate(
            module,
            self.task.example_inputs,
            mode=mode,
            hidden=self.work.hidden,
            seed=self.seed,
            **options,
        )

    def fit(self, rule: Any, epochs: int, stage: str) -> int:
        history = fit(
            rule,
            self.task,
            epochs=epochs,
            batch_size=self.work.batch_size,
            seed=seed_of(stage, self.seed),
            cpu=self.work.cpu,
            title=f"{self.work.name}: {stage}",
        )
        return history.steps

    def train(
        self,
        module: nn.Module,
        epochs: int,
        lr: float,
        stage: str,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        rule = Supervised(
            module, self.task, optimizer=self.work.optimizer(module, lr), penalty=penalty
        )
        self.fit(rule, epochs, stage)
        module.cpu()

    @property
    def stages(self) -> tuple[int, int]:
        """Epochs before and after a cut."""
        after = self.work.epochs // 3
        return self.work.epochs - after, after

    # How each contender is made

    def dense(self, lr: float) -> Trial:
        module = self.fresh()
        self.train(module, self.work.epochs, lr, "dense")
        return Trial(module, {"learning_rate": lr}, {})

    def gated(
        self,
        mode: Mode,
        act: float,
        polar: float,
        *,
        ramp: bool = True,
        binarize: Binarize = "straight",
    ) -> Trial:
        """Consensus, its traps, and gates that stay dynamic."""
        network = self.gates(self.fresh(), mode, binarize=binarize)
        rule = ConsensusTraining(
            network,
            self.task,
            lambda_act=act,
            lambda_polar=polar,
            ramp="linear" if ramp else "none",
            target=self.work.channels if mode == "channel" else None,
            optimizer=self.work.optimizer(network, self.work.lr),
        )
        steps = self.fit(rule, self.work.epochs, mode)
        module, report = settle(network, self.task)
        report |= {"steps": steps, "training_macs": rule.macs}
        return Trial(module, {"act": act, "polar": polar}, report, network)

    def without_blocks(self, module: nn.Module, keep: Tensor, lr: float) -> nn.Module:
        small = self.gates(module, "layer").extract(keep).module
        self.train(small, self.stages[1], lr, "tuning")
        return small

    def magnitude_blocks(self, kept: int, lr: float) -> Trial:
        """Blocks whose weights are smallest on average leave."""
        module = self.fresh()
        self.train(module, self.stages[0], lr, "dense")
        graph = Graph.trace(module, self.task.example_inputs)
        sizes = []
        for block in find_residuals(graph):
            names = {name for op in graph.operators if op.name in block.inside
                     for name in op.weights if graph.tensors[name].ndim > 1}  # fmt: skip
            weights = torch.cat([graph.tensors[name].detach().flatten() for name in names])
            sizes.append(weights.abs().mean())
        keep = torch.zeros(len(sizes), dtype=torch.bool)
        keep[torch.stack(sizes).topk(kept).indices] = True
        return Trial(self.without_blocks(module, keep, lr), {"learning_rate": lr}, {})

    def random_blocks(self, kept: int, drop: float) -> Trial:
        """Blocks are dropped at random while training, then for good."""
        network = self.gates(self.fresh(), "layer")
        optimizer = self.work.optimizer(network, self.work.lr)
        rule = DroppedBlocks(network, self.task, drop=drop, optimizer=optimizer)
        self.fit(rule, self.stages[0], "dropping")
        network.cpu()
        network.forget()
        generator = torch.Generator().manual_seed(seed_of("blocks", self.seed))
        keep = torch.zeros(sum(network.counts), dtype=torch.bool)
        keep[torch.randperm(len(keep), generator=generator)[:kept]] = True
        small = network.extract(keep).module
        self.train(small, self.stages[1], self.work.lr, "tuning")
        return Trial(small, {"drop": drop}, {})

    def scored_channels(
        self,
        macs: float,
        criterion: str,
        penalty: Callable[[nn.Module], Tensor] | None,
        setting: float,
    ) -> Trial:
        """The channels inside of blocks that score lowest leave, down to so many MACs."""
        module = self.fresh()
        lr = self.work.lr if penalty else setting
        term = partial(_weighted, penalty, module, setting) if penalty else None
        self.train(module, self.stages[0], lr, "channels", term)
        module.eval()
        dependency = analyse(module, self.task.example_inputs)
        inner = find_channels(dependency, find_residuals(dependency.graph))
        free = {group.family for group in inner}
        scores = CRITERIA[criterion](module, dependency, self.task, self.seed)
        priorities = [
            score if i in free else torch.full_like(score, torch.inf)
            for i, score in enumerate(scores)
        ]
        removed = select(priorities, cost=cost_of("macs", dependency), target=macs)
        removal = {i: mask.cpu() for i, mask in enumerate(removed) if bool(mask.any())}
        small = surgery.remove(module, dependency, removal).module
        self.train(small, self.stages[1], lr, "tuning")
        name = "penalty" if penalty else "learning_rate"
        return Trial(small, {name: setting}, {})

    # How it is chosen and measured

    def best(self, make: Callable[[float], Trial], settings: Iterable[float]) -> Trial:
        """The trial with the best static validation score, of those that are half gone if any is.

        Trials that diverge are lost.
        """
        trials = []
        for setting in settings:
            try:
                trials.append(make(setting))
            except InputError as reason:
                log.info("%s at %g: %s", self.work.name, setting, reason)
        if not trials:
            raise InputError(f"every trial on {self.work.name} diverged")

        def rank(trial: Trial) -> tuple[bool, float]:
            report = trial.report
            # By channels a target says how many stay, give or take the last ones.
            half = not report or report["kept"] <= 0.51 * report["gates"]
            return half, self.task.score(trial.module, "validation")

        return max(trials, key=rank)

    def row(self, contender: str, mode: Mode, trial: Trial) -> Row:
        """Test scores of the static network, and of the gated one if there is one."""
        static = self.task.score(trial.module, "test")
        macs = Graph.trace(trial.module, self.task.example_inputs).macs
        result: dict[str, Any] = {
            "work": self.work.name,
            "mode": mode,
            "contender": contender,
            "seed": self.seed,
            "validation": self.task.score(trial.module, "validation"),
            "static": static,
            "macs": macs,
            "macs_share": macs / self.macs,
            **trial.setting,
        }
        if trial.dynamic is not None:
            report = trial.report
            dynamic = self.task.score(trial.dynamic, "test")
            trial.dynamic.forget()
            before = self.task.class_scores(trial.dynamic, "test")
            after = self.task.class_scores(trial.module, "test")
            trial.dynamic.forget()
            losses = [
                b - a
                for b, a in zip(before.values(), after.values(), strict=True)
                if b is not None and a is not None
            ]
            result |= {
                "dynamic": dynamic,
                "difference": abs(dynamic - static),
                "worst_class_loss": max(losses),
                "gap": report["gap"],
                "widest_class_gap": max(report["classes"]["gap"].values()),
                "kept": report["kept"],
                "gates": report["gates"],
                "removed": 1.0 - report["kept"] / report["gates"],
                "dynamic_macs": report["dynamic_macs"],
                "gate_macs": report["gate_macs"],
                "training_macs": report["training_macs"],
            }
        log.info("%s", result)
        return result


def _weighted(penalty: Callable[[nn.Module], Tensor], module: nn.Module, weight: float) -> Tensor:
    return weight * penalty(module)


def contend(work: Work, seed: int) -> Iterator[Row]:
    """Trains, cuts and scores every contender for one seed.

    Args:
        work: the data, the network and the budget.
        seed: of split, initial weights, gates and data order.

    Yields:
        One row for each contender: test accuracy (percent) of the static network, MACs, and of
        gated ones the accuracy with gates, the consensus gap and what was removed.
    """
    contest = _Contest(work, seed)
    yield contest.row("dense", "layer", contest.best(contest.dense, work.rates))

    chosen = contest.best(partial(contest.gated, "layer", work.act), work.polars)
    yield contest.row("consensus", "layer", chosen)
    kept = chosen.report["kept"]

    def dynamic(mode: Mode, binarize: Binarize, act: float) -> Trial:
        return contest.gated(mode, act, 0.0, binarize=binarize)

    trial = contest.best(partial(dynamic, "layer", "straight"), work.acts)
    yield contest.row("no polarization", "layer", trial)
    trial = contest.best(partial(dynamic, "layer", "gumbel"), work.acts)
    yield contest.row("Gumbel gates", "layer", trial)
    trial = contest.best(partial(contest.magnitude_blocks, kept), work.rates)
    yield contest.row("magnitude", "layer", trial)
    trial = contest.best(partial(contest.random_blocks, kept), work.drops)
    yield contest.row("random blocks", "layer", trial)
    # Strong polarization from the first step on: what is open stays open.
    trial = contest.gated("layer", work.act, work.polars[0], ramp=False)
    yield contest.row("polarization without a ramp", "layer", trial)

    if work.channels is None:
        return
    make = partial(contest.gated, "channel", work.channel_act)
    chosen = contest.best(make, work.channel_polars)
    row = contest.row("consensus", "channel", chosen)
    yield row
    trial = contest.best(partial(dynamic, "channel", "straight"), work.channel_acts)
    yield contest.row("no polarization", "channel", trial)
    penalties: dict[str, Callable[[nn.Module], Tensor]] = {
        "network slimming": scaling_penalty,
        "polarized scales": partial(scaling_penalty, t=work.t),
    }
    for name, penalty in penalties.items():
        make = partial(contest.scored_channels, row["macs"], "batchnorm-scale", penalty)
        yield contest.row(name, "channel", contest.best(make, work.slims))
    make = partial(contest.scored_channels, row["macs"], "l2", None)
    yield contest.row("magnitude", "channel", contest.best(make, work.rates))


# Works


def _adam(module: nn.Module, lr: float) -> Optimizer:
    return torch.optim.Adam(module.parameters(), lr=lr)


def _momentum(module: nn.Module, lr: float) -> Optimizer:
    return sgd(module, lr=lr)


def _as_they_are(images: Tensor, generator: torch.Generator) -> Tensor:
    """No augmentation: a perceptron of 25 epochs has enough to do without shifts."""
    return images


DIGITS = Work(
    "digits",
    lambda seed: digits(seed=seed, augment=_as_they_are),
    residual_perceptron,
    _adam,
)


def cifar_work(folder: Path, depth: int) -> Work:
    """CIFAR-10 with a residual network of a depth."""
    return Work(
        f"cifar10, ResNet-{depth}",
        lambda seed: cifar10(folder, seed=seed),
        lambda: cifar_resnet(depth),
        _momentum,
        epochs=160,
        batch_size=128,
        lr=0.1,
        rates=(0.03, 0.1, 0.3),
        slims=(1e-5, 1e-4, 1e-3),
        hidden=16,
        cpu=False,
    )


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """Handwritten digits, a residual perceptron of eight blocks."""
    for seed in seeds:
        yield from contend(DIGITS, seed)


def full(seeds: Sequence[int], *, images: Path = Path("data/cifar10")) -> Iterable[Row]:
    """CIFAR-10 with ResNet-20 and ResNet-56.

    Args:
        seeds: one run of everything each.
        images: a folder that :func:`gossamer.datasets.cifar.cifar10` reads.

    Raises:
        InputError: if the folder is not there.
    """
    works = [cifar_work(images, depth) for depth in (20, 56)]
    works[0].task(0)  # says at once if the images are missing
    for seed in seeds:
        for work in works:
            yield from contend(work, seed)


def draw(result: Result, path: Path) -> None:
    """Draws test accuracy against MACs, with and without gates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    modes = list(dict.fromkeys(row["mode"] for row in result.rows))
    for place, mode in enumerate(modes, 1):
        axes = figure.add_subplot(1, len(modes), place)
        rows = [row for row in result.rows if row["mode"] == mode]
        for number, name in enumerate(dict.fromkeys(row["contender"] for row in rows)):
            chosen = [row for row in rows if row["contender"] == name]
            x = [100 * row["macs_share"] for row in chosen]
            color = f"C{number}"
            axes.scatter(x, [r["static"] for r in chosen], color=color, label=name, s=25)
            gated = [(a, r["dynamic"]) for a, r in zip(x, chosen, strict=True) if "dynamic" in r]
            if gated:
                axes.scatter(*np.array(gated).T, color=color, marker="x", s=25)
        axes.set_title(f"gates on each {mode} (crosses: with gates)", fontsize=9)
        axes.set_xlabel("MACs left (%)")
        axes.set_ylabel("test accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def _of(contender: str, metric: str) -> Pick:
    return Pick(metric, {"contender": contender, "mode": "layer"})


EXPERIMENT = Experiment(
    spec="consensus-subnetwork",
    title="one-pass training with polarized gates against pruning and dynamic gates",
    claims=(
        Claim(
            "with polarization inputs agree: the gap is below 0.005",
            _of("consensus", "gap"),
            "<",
            0.005,
        ),
        Claim(
            "with polarization the static network is within 0.2 points of the dynamic one",
            _of("consensus", "difference"),
            "<",
            0.2,
        ),
        Claim(
            "without polarization they do not: the gap is above 0.02",
            _of("no polarization", "gap"),
            ">",
            0.02,
        ),
        Claim(
            "at least half of the blocks are removed",
            _of("consensus", "removed"),
            ">=",
            0.5,
            paper="half of the connections",
        ),
        Claim(
            "the static network is within 1 point of the dense one",
            _of("consensus", "static"),
            ">=",
            _of("dense", "static"),
            offset=-1.0,
            paper="less than 1 % lost on CIFAR-10 and CIFAR-100",
        ),
        Claim(
            "the static network is at least as good as blocks pruned by magnitude and fine-tuned",
            _of("consensus", "static"),
            ">=",
            _of("magnitude", "static"),
        ),
    ),
    quick=quick,
    full=full,
    quick_seeds=(0, 1, 2),
    draw=draw,
    reconstruction=True,
)
