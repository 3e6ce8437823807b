"""OTOv3: one training run that ends in a smaller network, against pruning and fine-tuning.

Contenders have the same total number of epochs, the same base optimizer (SGD with Nesterov
momentum, weight decay 5e-4, cosine) and the same share of groups to lose; each tries as many
settings as the others, judged on the validation split of its own seed, and the chosen setting is
used for every network and target.

- ``dense``: nothing removed.
- ``hesso``, ``dhspg``: OTOv3's optimizers; the network is constructed, not fine-tuned.
- ``hspg``, ``group-lasso``: no partition. Their penalty decides how much becomes zero; HSPG stops
  at the target, the lasso is cut to the target by norm at the end.
- ``magnitude``: trained, cut once by normalised L2 norm (one global ranking), fine-tuned.
- ``magnitude-macs``: the same, cut to the MACs that HESSO keeps at the target in place of its
  number of groups (these two are not the same thing).
- ``random``: like ``magnitude`` with random groups: what a criterion must beat.
- ``h2spg``: erases three operators of a network of parallel branches; ``random-erase`` trains the
  network without three operators drawn at random among those draws that leave a path.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from gossamer.compress.prune import erasing
from gossamer.compress.prune.groups import Groups
from gossamer.compress.prune.half_space import (
    ProximalGroupLasso,
    SparseTraining,
    construct,
    otov3,
)
from gossamer.compress.prune.magnitude import prune
from gossamer.core.dependency import analyse
from gossamer.core.errors import InputError
from gossamer.core.experiment import Claim, Experiment, Pick, Result
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.core.task import Classification
from gossamer.datasets.digits import digits
from gossamer.hardware.measure import measure
from gossamer.models.resnet import SmallResNet, digits_resnet

log = logging.getLogger(__name__)

TARGETS = (0.5, 0.7)
DRAWS = 1000
ERASED = 3


class DenseLayer(nn.Module):
    """Adds ``growth`` channels to what came in, by concatenation."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(relu(self.norm(x)))], 1)


class DenseNet(nn.Module):
    """A small densely connected network: every layer reads all before it.

    Args:
        stem: channels of the first convolution.
        growth: channels that each layer adds.
        layers: before and after the transition, each.
    """

    def __init__(self, stem: int = 16, growth: int = 12, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, stem, 3, padding=1, bias=False)
        width = stem
        early: list[nn.Module] = []
        for _ in range(layers):
            early.append(DenseLayer(width, growth))
            width += growth
        self.early = nn.Sequential(*early)
        self.norm = nn.BatchNorm2d(width)
        self.transition = nn.Conv2d(width, width // 2, 1, bias=False)
        width //= 2
        late: list[nn.Module] = []
        for _ in range(layers):
            late.append(DenseLayer(width, growth))
            width += growth
        self.late = nn.Sequential(*late)
        self.last = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.stem(x))
        x = nn.functional.avg_pool2d(self.transition(relu(self.norm(x))), 2)
        return self.linear(relu(self.last(self.late(x))).mean((2, 3)))


class Unit(nn.Sequential):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 3) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Branches(nn.Module):
    """A network of parallel branches, in the manner of the paper's DemoSupNet.

    Cells of two or three branches end in additions or concatenations; no branch is free of
    parameters, so losing all of a cell cuts the network in two.

    Args:
        width: channels between cells.
        channels: of the images.
        classes: logits.
    """

    def __init__(self, width: int = 16, *, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        half = width // 2
        self.stem = Unit(channels, width)
        self.a1, self.a2 = Unit(width, width, 3), Unit(width, width, 1)
        self.between = Unit(width, width)
        self.b1, self.b2 = Unit(width, half, 3), Unit(width, half, 1)
        self.b3 = nn.Sequential(Unit(width, half, 1), Unit(half, half, 3))
        self.mix = Unit(3 * half, width, 1)
        self.c1, self.c2 = Unit(width, width, 3), Unit(width, width, 5)
        self.head = Unit(width, 2 * width)
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.between(self.a1(x) + self.a2(x))
        x = torch.cat([self.b1(x), self.b2(x), self.b3(x)], 1)
        x = nn.functional.max_pool2d(self.mix(x), 2)
        x = self.head(self.c1(x) + self.c2(x))
        return self.linear(x.mean((2, 3)))


@dataclass(frozen=True)
class Setting:
    """Data, networks and sizes of a run.

    Attributes:
        task: by seed.
        networks: factories by name; the first one is tuned on.
        branches: factory of the network of parallel branches.
        epochs: of every contender, all phases together.
        batch_size: samples a batch.
        lr: learning rate, except where a contender tunes it.
        latency_batch: samples in a timed call.
    """

    task: Callable[[int], Classification]
    networks: Mapping[str, Callable[[], nn.Module]]
    branches: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    lr: float = 0.1
    latency_batch: int = 64


@dataclass(frozen=True)
class Outcome:
    """A contender's network and what is known of it."""

    module: nn.Module
    groups: int
    removed: int
    parameters: int
    macs: int
    difference: float | None = None


Options = Mapping[str, float]
Contender = Callable[[Setting, Classification, Network, float, int, Options], Outcome]


def _dense(
    s: Setting, task: Classification, network: Network, target: float, seed: int, o: Options
) -> Outcome:
    module = copy.deepcopy(network.module)
    rule = Supervised(module, task, optimizer=sgd(module, lr=o["lr"]))
    fit(rule, task, epochs=s.epochs, batch_size=s.batch_size, seed=seed)
    graph = Graph.trace(module.cpu().eval(), network.example_inputs)
    return Outcome(module, 0, 0, graph.parameters, graph.macs)


def _otov3(
    name: Any,
    s: Setting,
    task: Classification,
    network: Network,
    target: float,
    seed: int,
    o: Options,
) -> Outcome:
    result = otov3(
        network,
        task,
        optimizer=name,
        target=target,
        erase=ERASED,
        epochs=s.epochs,
        batch_size=s.batch_size,
        lr=s.lr,
        start=o.get("start", 0.2),
        duration=o.get("duration", 0.4),
        penalty=o.get("penalty"),
        epsilon=o.get("epsilon", 0.0),
        seed=seed,
    )
    report = result.steps[-1]["report"]
    return Outcome(
        result.module,
        report["groups"],
        report["removed"],
        report["parameters"][1],
        report["macs"][1],
        report["output_difference"],
    )


def _group_lasso(
    s: Setting, task: Classification, network: Network, target: float, seed: int, o: Options
) -> Outcome:
    module = copy.deepcopy(network.module)
    dependency = analyse(module, network.example_inputs)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    groups = Groups.of(module, dependency, silenceable=True)
    optimizer = ProximalGroupLasso(module, groups, lr=s.lr, penalty=o["penalty"])
    rule = SparseTraining(module, task, optimizer=optimizer)
    fit(rule, task, epochs=s.epochs, batch_size=s.batch_size, seed=seed)
    which = torch.zeros(groups.total, dtype=torch.bool)
    which[torch.argsort(groups.norms().cpu())[: round(target * groups.total)]] = True
    made = construct(module.cpu().eval(), analyse(module, network.example_inputs), which=which)
    return Outcome(made.module, made.groups, made.removed, made.parameters, made.macs, made.error)


def _cut_and_tune(
    criterion: str,
    s: Setting,
    task: Classification,
    network: Network,
    target: float,
    seed: int,
    o: Options,
) -> Outcome:
    module = copy.deepcopy(network.module)
    first = round(o["trained"] * s.epochs)
    rule = Supervised(module, task, optimizer=sgd(module, lr=s.lr))
    fit(rule, task, epochs=first, batch_size=s.batch_size, seed=seed)
    trained = Network(module.cpu().eval(), network.example_inputs)
    result = prune(
        trained,
        task,
        criterion=criterion,
        units=None if "macs" in o else 1.0 - target,
        macs=o.get("macs"),
        epochs=s.epochs - first,
        batch_size=s.batch_size,
        lr=o["lr"],
        seed=seed,
    )
    report = result.steps[-1]["report"]
    units, left = report["units"]
    return Outcome(result.module, units, units - left, report["parameters"][1], report["macs"][1])


def _random_erase(
    s: Setting, task: Classification, network: Network, target: float, seed: int, o: Options
) -> Outcome:
    graph = Graph.trace(network.module, network.example_inputs)
    space = erasing.Space.of(graph)
    generator = torch.Generator().manual_seed(seed)
    chosen = next(c for c in _draws(space, generator) if space.is_valid(c))
    module = erasing.erase(network.module, graph, space, chosen)
    rule = Supervised(module, task, optimizer=sgd(module, lr=o["lr"]))
    fit(rule, task, epochs=s.epochs, batch_size=s.batch_size, seed=seed)
    graph = Graph.trace(module.cpu().eval(), network.example_inputs)
    return Outcome(module, len(space.candidates), len(chosen), graph.parameters, graph.macs)


def _draws(space: erasing.Space, generator: torch.Generator) -> Iterator[list[int]]:
    while True:
        yield torch.randperm(len(space.candidates), generator=generator)[:ERASED].tolist()


CUT: tuple[Options, ...] = (
    {"trained": 0.15, "lr": 0.1},
    {"trained": 0.3, "lr": 0.1},
    {"trained": 0.5, "lr": 0.1},
    {"trained": 0.5, "lr": 0.05},
)
RATES: tuple[Options, ...] = ({"lr": 0.05}, {"lr": 0.1}, {"lr": 0.2}, {"lr": 0.4})


def _penalties(*values: float, epsilon: float = 0.9) -> tuple[Options, ...]:
    return tuple({"penalty": value, "epsilon": epsilon} for value in values)


CONTENDERS: dict[str, tuple[Contender, tuple[Options, ...]]] = {
    "dense": (_dense, RATES),
    "hesso": (
        partial(_otov3, "hesso"),
        (
            {"start": 0.05, "duration": 0.15},
            {"start": 0.1, "duration": 0.2},
            {"start": 0.1, "duration": 0.4},
            {"start": 0.2, "duration": 0.4},
        ),
    ),
    "dhspg": (partial(_otov3, "dhspg"), _penalties(0.6, 1.0, 2.0, 4.0)),
    "hspg": (partial(_otov3, "hspg"), _penalties(0.5, 0.7, 1.0, 2.0)),
    "group-lasso": (_group_lasso, tuple({"penalty": p} for p in (0.3, 0.45, 0.6, 0.8))),
    "magnitude": (partial(_cut_and_tune, "l2"), CUT),
    "random": (partial(_cut_and_tune, "random"), CUT),
}
ERASERS: dict[str, tuple[Contender, tuple[Options, ...]]] = {
    "dense": (_dense, RATES),
    "h2spg": (partial(_otov3, "h2spg"), _penalties(0.6, 1.0, 2.0, 4.0)),
    "random-erase": (_random_erase, RATES),
}


def measure_all(setting: Setting, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows of every contender; see the module."""
    for seed in seeds:
        task = setting.task(seed)
        rows = list(_channels(setting, task, seed)) + list(_operators(setting, task, seed))
        yield from rows
        for contender in ("hesso", "dhspg", "h2spg"):
            mine = [r for r in rows if r["contender"] == contender and "accuracy" in r]
            yield {
                "contender": contender,
                "seed": seed,
                "summary": "worst",
                "missing_groups": max(abs(r["removed"] - r["wanted"]) for r in mine),
                "sparsity_gap": max(
                    100 * abs(r["removed"] - r["wanted"]) / r["groups"] for r in mine
                ),
                "output_difference": max(r["output_difference"] for r in mine),
            }


def _channels(setting: Setting, task: Classification, seed: int) -> Iterator[dict[str, Any]]:
    first = next(iter(setting.networks))
    options: dict[str, Options] = {}
    for name, (run, trials) in CONTENDERS.items():
        network = _fresh(setting.networks[first], task, seed)
        best = yield from _tuned(setting, task, network, name, run, trials, TARGETS[-1], seed)
        options[name] = best
    timed: dict[str, nn.Module] = {}
    rows: list[dict[str, Any]] = []
    for label, make in setting.networks.items():
        for name, (run, _) in CONTENDERS.items():
            for target in (0.0,) if name == "dense" else TARGETS:
                network = _fresh(make, task, seed)
                outcome = run(setting, task, network, target, seed, options[name])
                row = _row(task, outcome, name, label, target, seed)
                rows.append(row | {"part": "channels", "options": dict(options[name])})
                if name in ("dense", "hesso", "dhspg", "magnitude") and label == first:
                    timed[f"{name} {target}"] = outcome.module
                log.info("%s", rows[-1])
        # HESSO may keep more MACs at the same number of groups: the same MACs spent plainly.
        dense = next(r for r in rows if (r["network"], r["contender"]) == (label, "dense"))
        for row in [r for r in rows if (r["network"], r["contender"]) == (label, "hesso")]:
            same = dict(options["magnitude"]) | {"macs": row["macs"] / dense["macs"]}
            network = _fresh(make, task, seed)
            outcome = _cut_and_tune("l2", setting, task, network, row["target"], seed, same)
            made = _row(task, outcome, "magnitude-macs", label, row["target"], seed)
            rows.append(made | {"part": "channels", "options": same})
    times = measure(timed, task.example_inputs, batch_sizes=(setting.latency_batch,), round_ms=20.0)
    for timing in times:
        name, target = timing.name.split()
        for row in rows:
            if (row["contender"], row["network"], row["target"]) == (name, first, float(target)):
                row["latency_ms"] = timing.latency.p50
                row["latency_p95_ms"] = timing.latency.p95
    yield from rows


def _operators(setting: Setting, task: Classification, seed: int) -> Iterator[dict[str, Any]]:
    network = _fresh(setting.branches, task, seed)
    space = erasing.Space.of(Graph.trace(network.module, network.example_inputs))
    generator = torch.Generator().manual_seed(seed)
    draws = _draws(space, generator)
    invalid = sum(not space.is_valid(next(draws)) for _ in range(DRAWS))
    chosen = 0
    for _ in range(DRAWS):
        scores = torch.rand(len(space.candidates), generator=generator).tolist()
        chosen += not space.is_valid(erasing.choose(space, scores, ERASED))
    for contender, bad in (("random-k", invalid), ("h2spg", chosen)):
        yield {
            "contender": contender,
            "network": "branches",
            "seed": seed,
            "draws": DRAWS,
            "invalid_share": 100 * bad / DRAWS,
        }
    for name, (run, trials) in ERASERS.items():
        best = yield from _tuned(setting, task, network, name, run, trials, 0.0, seed)
        outcome = run(setting, task, network, 0.0, seed, best)
        row = _row(task, outcome, name, "branches", 0.0, seed)
        row["wanted"] = 0 if name == "dense" else ERASED
        yield row | {"part": "operators", "options": dict(best)}


def _tuned(
    setting: Setting,
    task: Classification,
    network: Network,
    name: str,
    run: Contender,
    trials: Sequence[Options],
    target: float,
    seed: int,
) -> Generator[dict[str, Any], None, Options]:
    """Tries every setting; yields a row each, returns the best on validation.

    A setting that misses the target by more than 1 % of the groups comes after all that do not.
    """
    best: tuple[tuple[float, float], Options] | None = None
    for number, options in enumerate(trials):
        outcome = run(setting, task, network, target, seed, options)
        wanted = round(target * outcome.groups) if target else outcome.removed
        gap = abs(outcome.removed - wanted) / max(1, outcome.groups)
        if name == "h2spg":
            gap = abs(outcome.removed - ERASED) / max(1, outcome.groups)
        score = task.score(outcome.module, "validation")
        rank = (-max(0.0, gap - 0.01), score)
        if best is None or rank > best[0]:
            best = (rank, options)
        yield {
            "contender": name,
            "seed": seed,
            "trial": number,
            "options": dict(options),
            "validation_accuracy": score,
            "validation_gap": 100 * gap,
        }
    assert best is not None
    return best[1]


def _row(
    task: Classification, outcome: Outcome, name: str, network: str, target: float, seed: int
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "contender": name,
        "network": network,
        "target": target,
        "seed": seed,
        "accuracy": task.score(outcome.module, "test"),
        "groups": outcome.groups,
        "wanted": round(target * outcome.groups),
        "removed": outcome.removed,
        "macs": outcome.macs,
        "parameters": outcome.parameters,
    }
    if outcome.difference is not None:
        row["output_difference"] = outcome.difference
    return row


def _fresh(make: Callable[[], nn.Module], task: Classification, seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(make(), task.example_inputs)


def quick(seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Digits: a residual and a densely connected network; about four minutes a seed, one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from measure_all(
            Setting(
                task=lambda seed: digits(seed=seed),
                networks={
                    "resnet": partial(digits_resnet, (16, 32), blocks_per_stage=1),
                    "densenet": DenseNet,
                },
                branches=Branches,
                epochs=20,
                batch_size=64,
            ),
            seeds,
        )
    finally:
        torch.set_num_threads(threads)


def resnet18() -> SmallResNet:
    """ResNet-18 for 32 x 32 images: 11,173,962 parameters, 555.42 M MACs."""
    return SmallResNet((64, 128, 256, 512), 2, in_channels=3, classes=10, projection=True)


def full(seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """CIFAR-10: ResNet-18, 60 epochs; the data are looked for in $GOSSAMER_DATA/cifar10."""
    from gossamer.datasets.cifar import cifar10

    folder = os.environ.get("GOSSAMER_DATA")
    if folder is None:
        raise InputError(
            "set GOSSAMER_DATA to the folder that holds cifar10 to run the full experiment"
        )
    yield from measure_all(
        Setting(
            task=lambda seed: cifar10(Path(folder) / "cifar10", seed=seed),
            networks={"resnet": resnet18},
            branches=partial(Branches, 64, channels=3),
            epochs=60,
            batch_size=128,
        ),
        seeds,
    )


def draw(result: Result, path: Path) -> None:
    """Accuracy over MACs of every contender, one panel a network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result.rows if "accuracy" in row]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(1, len(networks), figsize=(4.6 * len(networks), 4), squeeze=False)
    colours = {
        name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["contender"] for row in rows))
    }
    for axis, network in zip(axes[0], networks, strict=True):
        for name, colour in colours.items():
            points: dict[float, list[tuple[float, float]]] = {}
            for row in rows:
                if (row["network"], row["contender"]) == (network, name):
                    points.setdefault(row["target"], []).append(
                        (row["macs"] / 1e6, row["accuracy"])
                    )
            if not points:
                continue
            means = [torch.tensor(values).mean(0).tolist() for values in points.values()]
            axis.plot(*zip(*means, strict=True), "o-", color=colour, label=name)
            for values in points.values():
                axis.plot(*zip(*values, strict=True), ".", color=colour, alpha=0.35)
        axis.set_title(network)
        axis.set_xlabel("MACs of one sample (millions)")
        axis.set_ylabel("test accuracy (%)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _accuracy(contender: str, **where: Any) -> Pick:
    return Pick("accuracy", {"contender": contender} | where)


def _worst(contender: str, metric: str) -> Pick:
    return Pick(metric, {"contender": contender, "summary": "worst"})


def _claims() -> tuple[Claim, ...]:
    found = [
        Claim(
            "HESSO hits the target number of groups exactly (groups missing, worst setting)",
            _worst("hesso", "missing_groups"),
            "==",
            0.0,
        ),
        Claim(
            "DHSPG ends within 1 % of the target (points of sparsity, worst setting)",
            _worst("dhspg", "sparsity_gap"),
            "<=",
            1.0,
            paper="ResNet-18 on CIFAR-10: target 70 % of the groups, reached",
        ),
    ]
    for name in ("hesso", "dhspg", "h2spg"):
        found.append(
            Claim(
                f"the constructed network equals the full one without fine-tuning ({name}, "
                "largest difference of outputs, worst setting)",
                _worst(name, "output_difference"),
                "<=",
                1e-5,
            )
        )
    for name in ("hesso", "dhspg"):
        found.append(
            Claim(
                f"{name} is at least as accurate as one-shot magnitude pruning with fine-tuning "
                "of the same total epochs (mean over networks and targets)",
                _accuracy(name),
                ">=",
                _accuracy("magnitude"),
            )
        )
        found.append(
            Claim(
                f"{name} is within 1 point of the dense networks at 50 % of the groups",
                _accuracy(name, target=0.5),
                ">=",
                _accuracy("dense", part="channels"),
                offset=-1.0,
                paper="ResNet-18 on CIFAR-10: 92.86 % at 70 % of the groups, 93.02 % dense",
            )
        )
    found += [
        Claim(
            "erasing three random operators leaves an invalid graph in a measurable share of "
            "trials (%)",
            Pick("invalid_share", {"contender": "random-k"}),
            ">=",
            1.0,
        ),
        Claim(
            "H2SPG's choice never leaves an invalid graph (% of random scores)",
            Pick("invalid_share", {"contender": "h2spg"}),
            "==",
            0.0,
        ),
    ]
    for name in ("hesso", "dhspg"):
        found.append(
            Claim(
                f"measured latency falls at 50 % of the groups ({name}, residual network, ONNX "
                "Runtime, one thread, ms)",
                Pick("latency_ms", {"contender": name, "network": "resnet", "target": 0.5}),
                "<",
                Pick("latency_ms", {"contender": "dense", "network": "resnet"}),
            )
        )
    return tuple(found)


EXPERIMENT = Experiment(
    spec="otov3",
    title="one training run into a smaller network, against pruning with fine-tuning",
    claims=_claims(),
    quick=quick,
    full=full,
    draw=draw,
)
