"""Recognising and recovering blocks from traces of execution, and hiding a MobileNet's.

Random networks of seven families are traced; those of some widths are held out. The rules read them
at L1, beside a random guess, learned attacks on L0, on shares of kernel classes alone and on L1
features, and a recurrent network on L1 events. Stage 2 is judged against the true convolutions.
Then MobileNets are hardened by each maneuver, attacked again, timed in turns, and trained on
handwritten digits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, fit
from gossamer.core.progress import progress
from gossamer.core.task import Batch, Labelled
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.experiments.hardware.training import Budget, trained
from gossamer.experiments.real_data import folder_of
from gossamer.hardware.execution_trace import Trace, trace
from gossamer.hardware.fingerprint import (
    DeepPeep,
    aggregate_features,
    class_features,
    features,
    leaks,
)
from gossamer.hardware.harden import MANEUVERS, harden, secure_mobilenet_v1
from gossamer.hardware.kernel_times import DeviceProfile, calibrate_device
from gossamer.hardware.measure import compare, measure
from gossamer.hardware.trace_shapes import read_sizes
from gossamer.models.compact_blocks import FAMILIES, random_network
from gossamer.models.mobilenet import SMALL_STAGES, MobileNet, small_mobilenet

log = logging.getLogger(__name__)

CHANCE = 100.0 / len(FAMILIES)
SIDE = 32
TRAIN_WIDTHS, HELD_OUT_WIDTHS = (16, 32, 64), (24, 48)
RULES = "L1, rules"
SECURE = "group"
GROUP_SIZE = 8
PLANS: dict[str, tuple[str, ...]] = {
    "none": (), SECURE: ("group",), "pad": ("pad",), "identity-add": ("identity-add",),
    "fuse": ("fuse",), "arena": ("arena",), "group, fuse": ("group", "fuse"),
    "all": tuple(MANEUVERS),
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """A network's trace and its true family."""

    family: str
    module: nn.Module
    trace: Trace


def observed(
    seed: int, count: int, widths: tuple[int, ...], *, first: int, repeats: int,
    maneuvers: Sequence[str] = (), device: str = "cpu",
) -> list[Seen]:  # fmt: skip
    """Traces random networks of every family."""
    found = []
    with progress() as bar:
        shown = bar.add_task("tracing", total=count * len(FAMILIES))
        for family in FAMILIES:
            for number in range(count):
                module = random_network(
                    family, seed=1000 * (seed + 1) + first + number, widths=widths
                )
                if maneuvers:
                    module = harden(module, maneuvers)
                seen = trace(
                    module.to(device), (3, SIDE), level="L2", repeats=repeats, warmup=1, seed=seed
                )
                found.append(Seen(family, module, seen))
                bar.advance(shown)
    return found


# Stage 1


def accuracy(named: Sequence[str], seen: Sequence[Seen]) -> float:
    """Percent of the networks whose family was named."""
    return 100.0 * float(np.mean([n == s.family for n, s in zip(named, seen, strict=True)]))


class Learned:
    """Gradient-boosted trees over features of traces."""

    def __init__(
        self, described: Sequence[Mapping[str, float]], families: Sequence[str], seed: int
    ) -> None:
        from sklearn.ensemble import GradientBoostingClassifier

        self.model = GradientBoostingClassifier(n_estimators=50, random_state=seed)
        self.model.fit(self._table(described), list(families))

    def __call__(self, described: Sequence[Mapping[str, float]]) -> list[str]:
        return [str(name) for name in np.asarray(self.model.predict(self._table(described)))]

    @staticmethod
    def _table(described: Sequence[Mapping[str, float]]) -> np.ndarray:
        return np.array([list(row.values()) for row in described])


class EventTask(Labelled):
    """Sequences of L1 events and the family they come from."""

    metric = "top-1 accuracy"

    def __init__(self, splits: Mapping[str, Sequence[Seen]]) -> None:
        self.name = "events"
        self.classes = FAMILIES
        self.label_smoothing = 0.0
        self.splits = {
            split: (
                _sequences([s.trace for s in seen]),
                torch.tensor([FAMILIES.index(s.family) for s in seen]),
            )
            for split, seen in splits.items()
        }
        self.example_inputs = (self.splits["train"][0][:2],)

    def size(self, split: str) -> int:
        return len(self.splits[split][1]) if split in self.splits else 0

    def batches(
        self, split: str, *, batch_size: int = 128, seed: int = 0, epoch: int = 0, start: int = 0,
        shuffle: bool | None = None,
    ) -> Iterator[Batch]:  # fmt: skip
        x, y = self.splits[split]
        for _, _, rows in self.rows_of(split, batch_size, seed, epoch, start, shuffle):
            chosen = torch.from_numpy(rows)
            yield x[chosen], y[chosen]

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        return (batch[0],)


def _sequences(traces: Sequence[Trace], longest: int = 160) -> Tensor:
    """Events as ``[traces, longest, 5]``: whether there is one, sizes, frees, times, live bytes."""
    out = torch.zeros(len(traces), longest, 5)
    for i, seen in enumerate(traces):
        size = np.log2(seen.allocated[0, :longest] + 1)
        numbers = [
            np.ones_like(size),
            np.diff(size, prepend=size[0]),
            (np.log2(seen.freed[0, :longest] + 1) - size) / 4,
            np.log2(seen.durations[0, :longest] + 1e-7) + 17,
            np.log2(seen.live[0, :longest] / seen.live[0, 0]),
        ]
        out[i, : len(size)] = torch.from_numpy(np.stack(numbers, 1)).float()
    return out


class EventGru(nn.Module):
    """A recurrent network over events, both ways."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(5, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, len(FAMILIES))

    def forward(self, x: Tensor) -> Tensor:
        lengths = x[..., 0].sum(1).long().clamp_min(1).cpu()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, last = self.gru(packed)
        return self.head(last.transpose(0, 1).flatten(1))


def recurrent(
    train: Sequence[Seen], test: Sequence[Seen], seed: int, epochs: int
) -> tuple[EventGru, list[str]]:
    """Trains on the first networks of each family, stops by the rest; names the families."""
    kept = [s for i, s in enumerate(train) if i % 4]
    task = EventTask({"train": kept, "validation": train[::4], "test": test})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = EventGru()
    rule = Supervised(module, task, optimizer=torch.optim.Adam(module.parameters(), lr=5e-3))
    fit(rule, task, epochs=epochs, batch_size=16, seed=seed, title="GRU over events")
    logits, _ = task.logits(module, "test")
    return module, [FAMILIES[int(k)] for k in logits.argmax(1)]


def stage_one(
    train: Sequence[Seen], test: Sequence[Seen], fused: Sequence[Seen], profile: DeviceProfile,
    seed: int, epochs: int,
) -> Iterator[Row]:  # fmt: skip
    """Accuracy of every attack on the held-out networks.

    Yields:
        A row for each attack, cells of the confusion of the rules, accuracy over added noise, and
        bits that each feature tells.
    """
    attack = DeepPeep(profile)
    labels = [s.family for s in train]
    views = {
        "L0, learned": lambda s: aggregate_features(s.trace.at("L0")),
        "classes only, learned": lambda s: class_features(s.trace),
        "L1, learned": lambda s: features(s.trace.at("L1"), profile),
    }
    draw = np.random.default_rng(seed)
    named: dict[str, list[str]] = {
        "random guess": [str(n) for n in draw.choice(FAMILIES, len(test))],
        RULES: [attack.identify(s.trace.at("L1")).family for s in test],
        "L1 without times, rules": [
            attack.identify(s.trace.at("L1").sizes_only()).family for s in test
        ],
        "L1, GRU": recurrent(train, test, seed, epochs)[1],
    }
    for name, view in views.items():
        named[name] = Learned([view(s) for s in train], labels, seed)([view(s) for s in test])
    for name, families in named.items():
        yield {
            "kind": "stage 1", "contender": name, "networks": "held out", "seed": seed,
            "accuracy": accuracy(families, test),
        }  # fmt: skip
    found = [attack.identify(s.trace.at("L1")).family for s in fused]
    yield {
        "kind": "stage 1", "contender": RULES, "networks": "held out, fused", "seed": seed,
        "accuracy": accuracy(found, fused),
    }  # fmt: skip
    for contender in (RULES, "L1, learned"):
        for true in FAMILIES:
            own = [n for n, s in zip(named[contender], test, strict=True) if s.family == true]
            yield {
                "kind": "confusion", "contender": contender, "family": true, "seed": seed,
                **{f"named {name}": own.count(name) for name in FAMILIES},
            }  # fmt: skip
    for spread in (0.0, 0.1, 0.3, 1.0):
        noisy = [
            attack.identify(s.trace.noisy(spread, seed=seed + i).at("L1")).family
            for i, s in enumerate(test)
        ]
        yield {
            "kind": "noise", "contender": RULES, "spread": spread, "seed": seed,
            "accuracy": accuracy(noisy, test),
        }  # fmt: skip
    everything = [*train, *test]
    for name, view in views.items():
        told = leaks([view(s) for s in everything], [s.family for s in everything])
        for feature, bits in list(told.items())[:5]:
            yield {
                "kind": "leak", "level": name.split(",")[0], "feature": feature, "bits": bits,
                "seed": seed,
            }  # fmt: skip


# Stage 2


@dataclass(frozen=True)
class Truth:
    """A convolution as it is."""

    channels: int
    height: int
    stride: int
    kernel: int
    groups: int


def true_convolutions(module: nn.Module, x: Tensor) -> dict[int, list[Truth]]:
    """What the convolutions of a network really are, by the bytes of their outputs, in order."""
    found: dict[int, list[Truth]] = {}

    def look(layer: nn.Module, _x: object, y: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        truth = Truth(y.shape[1], y.shape[2], layer.stride[0], layer.kernel_size[0], layer.groups)
        found.setdefault(4 * y.numel(), []).append(truth)

    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    with torch.inference_mode():
        module.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


def stage_two(test: Sequence[Seen], profile: DeviceProfile, seed: int) -> Iterator[Row]:
    """What is recovered of held-out networks, family by family.

    Yields:
        Percent of convolutions whose channels and whose stride are exact from allocations alone,
        and (given the family) whose kernel size and grouping are right from times.
    """
    attack = DeepPeep(profile)
    for family in FAMILIES:
        right: dict[str, list[bool]] = {k: [] for k in ("channels", "strides", "kernels", "groups")}
        for s in test:
            if s.family != family:
                continue
            device = next(s.module.parameters()).device
            truth = true_convolutions(s.module, torch.zeros(1, 3, SIDE, SIDE, device=device))
            spec = attack.recover(s.trace.at("L1"), family)
            timed = {layer.event: layer for layer in spec.layers}
            for event in read_sizes(s.trace.at("L1").sizes_only(), rounding=profile.rounding):
                if s.trace.classes[event.index] != 0 or not truth.get(int(event.size)):
                    continue
                real = truth[int(event.size)].pop(0)
                right["channels"].append(event.channels == real.channels)
                right["strides"].append(event.stride == real.stride)
                layer = timed.get(event.index)
                right["kernels"].append(layer is not None and layer.kernel == real.kernel)
                right["groups"].append(layer is not None and layer.groups == real.groups)
        yield {
            "kind": "stage 2", "family": family, "seed": seed,
            "layers": len(right["channels"]),
            **{f"{name}_exact": 100.0 * float(np.mean(v)) for name, v in right.items()},
        }  # fmt: skip


# Hardening


def hardened(
    attack: DeepPeep, learned: Learned, seed: int, *, count: int, repeats: int, rounds: int,
    device: str = "cpu",
) -> Iterator[Row]:  # fmt: skip
    """Recognition and latency of MobileNets after each maneuver.

    Yields:
        For each maneuver: percent recognised by the rules and by the learned attack, what the
        rules take them for, and the time over that of the vanilla network, in turns.
    """

    def make(width: float) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = MobileNet(SMALL_STAGES, stem_stride=1, width=width, classes=10)
        return module.eval()

    draw = np.random.default_rng(seed)
    widths = draw.uniform(0.4, 1.2, count).tolist()
    rows: dict[str, dict[str, Any]] = {}
    for name, maneuvers in PLANS.items():
        rules, guesses = [], []
        for width in widths:
            module = make(width)
            if maneuvers:
                module = harden(module, maneuvers, group_size=GROUP_SIZE)
            seen = trace(module.to(device), (3, SIDE), repeats=repeats, warmup=2, seed=seed)
            rules.append(attack.identify(seen).family)
            guesses += learned([features(seen, attack.profile)])
        rows[name] = {
            "recognised": 100.0 * rules.count("depthwise-separable") / count,
            "recognised_by_learned": 100.0 * guesses.count("depthwise-separable") / count,
            "taken_for": max(sorted(set(rules)), key=rules.count),
        }
    contenders: dict[str, Any] = {
        name: (harden(make(1.0), m, group_size=GROUP_SIZE) if m else make(1.0)).to(device)
        for name, m in PLANS.items()
    }
    x = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).to(device)
    with torch.inference_mode():
        timings = measure(contenders, (x,), batch_sizes=(1,), runtimes=("torch",), rounds=rounds)
    by_name = {timing.name: timing for timing in timings}
    for name, row in rows.items():
        ratio = compare(by_name[name], by_name["none"])
        yield {
            "kind": "hardening", "contender": name, "seed": seed, **row,
            "milliseconds": by_name[name].latency.p50, "latency_ratio": ratio.ratio,
            "latency_low": ratio.low, "latency_high": ratio.high,
        }  # fmt: skip


def accuracies(seed: int, budget: Budget) -> Iterator[Row]:
    """Digits accuracy of a vanilla and a secure MobileNet, trained alike, and of exact maneuvers.

    Yields:
        One row a maneuver; those that compute the same are applied to the trained networks.
    """
    task = digits(seed=seed)
    bases = {
        "none": trained(small_mobilenet, task, budget, seed).module,
        "group": trained(
            partial(small_mobilenet, group_width=GROUP_SIZE), task, budget, seed
        ).module,
    }
    for name, maneuvers in PLANS.items():
        base = bases["group" if "group" in maneuvers else "none"].cpu()
        rest = [m for m in maneuvers if m != "group"]
        module = harden(base, rest) if rest else base
        yield {
            "kind": "trained", "contender": name, "data": task.name, "seed": seed,
            "accuracy": task.score(module, "test"),
        }  # fmt: skip


# The two modes


def _attacks(
    seed: int, *, train: int, test: int, repeats: int, epochs: int, hard: int, rounds: int,
    device: str = "cpu",
) -> Iterator[Row]:  # fmt: skip
    rounding = 512 if device == "cuda" else 1
    profile = calibrate_device(repeats=max(5, repeats), device=device, rounding=rounding)
    look = partial(observed, seed, repeats=repeats, device=device)
    known = look(train, TRAIN_WIDTHS, first=0)
    held_out = look(test, HELD_OUT_WIDTHS, first=500)
    fused = look(max(2, test // 2), HELD_OUT_WIDTHS, first=500, maneuvers=("fuse",))
    yield from stage_one(known, held_out, fused, profile, seed, epochs)
    yield from stage_two(held_out, profile, seed)
    learned = Learned(
        [features(s.trace.at("L1"), profile) for s in known], [s.family for s in known], seed
    )
    yield from hardened(
        DeepPeep(profile), learned, seed, count=hard, repeats=repeats, rounds=rounds, device=device
    )


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """Small random networks on one thread, and the digits."""
    for seed in seeds:
        yield from _attacks(seed, train=6, test=4, repeats=3, epochs=30, hard=4, rounds=5)
        yield from accuracies(seed, Budget(epochs=10, rates=(0.1,), warm=0.1))


def full(seeds: Sequence[int]) -> Iterable[Row]:
    """More networks, published ones too, on a GPU where there is one; CIFAR-10."""
    import torchvision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    profile = calibrate_device(repeats=30, device=device, rounding=512 if device == "cuda" else 1)
    published = {
        "squeezenet1_1": "fire", "densenet121": "dense", "shufflenet_v2_x1_0": "shuffle",
        "mobilenet_v2": "inverted residual", "mobilenet_v3_large": "inverted residual",
        "resnet18": "residual", "resnet50": "residual", "vgg11_bn": "plain",
    }  # fmt: skip
    for name, family in published.items():
        module = torchvision.models.get_model(name, weights=None).eval().to(device)
        seen = trace(module, (3, 224), level="L2", repeats=30)
        found = DeepPeep(profile).identify(seen.at("L1"))
        yield {
            "kind": "published", "network": name, "family": family, "named": found.family,
            "right": 100.0 * (found.family == family),
        }  # fmt: skip
    folder = folder_of("cifar10")
    budget = Budget(epochs=60, rates=(0.045, 0.1), batch_size=128)
    for seed in seeds:
        yield from _attacks(
            seed, train=40, test=20, repeats=30, epochs=60, hard=20, rounds=30, device=device
        )
        task = cifar10(folder, seed=seed)
        for name, size in (("none", 1), (SECURE, GROUP_SIZE)):
            make = partial(secure_mobilenet_v1, size, small_images=True, classes=10)
            module = trained(make, task, budget, seed).module
            yield {
                "kind": "trained", "contender": name, "data": task.name, "seed": seed,
                "accuracy": task.score(module, "test"),
            }  # fmt: skip


def draw(result: Result, path: Path) -> None:
    """Accuracy of the attacks, confusion of the rules, noise, and the maneuvers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9), layout="constrained")
    FigureCanvasAgg(figure)
    (left, right), (low, last) = figure.subplots(2, 2)

    def rows(kind: str) -> list[Row]:
        return [row for row in result.rows if row.get("kind") == kind]

    scores: dict[str, list[float]] = {}
    for row in rows("stage 1"):
        name = row["contender"] + (" (fused)" if "fused" in row["networks"] else "")
        scores.setdefault(name, []).append(row["accuracy"])
    names = sorted(scores, key=lambda n: np.mean(scores[n]))
    left.barh(names, [float(np.mean(scores[n])) for n in names])
    left.axvline(CHANCE, color="grey", linewidth=1)
    left.set_xlabel("family named, percent of held-out networks")
    matrix = np.zeros((len(FAMILIES), len(FAMILIES)))
    for row in rows("confusion"):
        if row["contender"] == RULES:
            cells = [row[f"named {name}"] for name in FAMILIES]
            matrix[FAMILIES.index(row["family"])] += cells
    right.imshow(matrix, cmap="Blues")
    right.set_xticks(range(len(FAMILIES)), FAMILIES, rotation=30, ha="right")
    right.set_yticks(range(len(FAMILIES)), FAMILIES)
    right.set_xlabel("named by the rules at L1")
    for (i, j), value in np.ndenumerate(matrix):
        right.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8)
    noise: dict[float, list[float]] = {}
    for row in rows("noise"):
        noise.setdefault(row["spread"], []).append(row["accuracy"])
    low.plot(list(noise), [float(np.mean(v)) for v in noise.values()], marker="o")
    low.axhline(CHANCE, color="grey", linewidth=1)
    low.set_ylim(0, 100)
    low.set_xlabel("noise added to times, standard deviation of the logarithm")
    low.set_ylabel("family named by the rules, percent")
    for name in PLANS:
        own = [row for row in rows("hardening") if row["contender"] == name]
        trained_rows = [r["accuracy"] for r in rows("trained") if r["contender"] == name]
        if own:
            x = float(np.mean([r["latency_ratio"] for r in own]))
            y = float(np.mean([r["recognised"] for r in own]))
            last.scatter(x, y)
            said = f"{name} ({np.mean(trained_rows):.1f} %)" if trained_rows else name
            last.annotate(said, (x, y), fontsize=8, rotation=20)
    last.axhline(CHANCE, color="grey", linewidth=1)
    last.axvline(1.0, color="grey", linewidth=1)
    last.set_xlabel("time over the vanilla network's, measured (in brackets: digits accuracy)")
    last.set_ylabel("MobileNets recognised by the rules, percent")
    figure.savefig(path, dpi=110)


_HELD_OUT = {"kind": "stage 1", "networks": "held out"}

EXPERIMENT = Experiment(
    spec="deeppeep",
    title="Families and hyper-parameters from traces of execution, and MobileNets that hide theirs",
    claims=(
        Claim(
            "at L1 the rules name the family of held-out networks three times as often as chance",
            Pick("accuracy", {**_HELD_OUT, "contender": RULES}), ">=", 3 * CHANCE,
            paper="the design of compact blocks is recovered on P100 and P4000",
        ),
        Claim(
            "and more often than a learned attack that sees L0 only",
            Pick("accuracy", {**_HELD_OUT, "contender": RULES}), ">",
            Pick("accuracy", {**_HELD_OUT, "contender": "L0, learned"}), beyond=1.0,
        ),
        Claim(
            "channels are exact for 90 % of convolutions, from allocations alone",
            Pick("channels_exact", {"kind": "stage 2"}), ">=", 90.0,
        ),
        Claim(
            "strides are exact for 90 % of convolutions, from allocations alone",
            Pick("strides_exact", {"kind": "stage 2"}), ">=", 90.0,
        ),
        Claim(
            "MobileNets are recognised before hardening, three times as often as by chance",
            Pick("recognised", {"kind": "hardening", "contender": "none"}),
            ">=",
            3 * CHANCE,
        ),
        Claim(
            "groups of 8 drop the recognition of MobileNets to near chance (at most twice)",
            Pick("recognised", {"kind": "hardening", "contender": SECURE}), "<=", 2 * CHANCE,
        ),
        Claim(
            "and for the learned attack as well",
            Pick("recognised_by_learned", {"kind": "hardening", "contender": SECURE}),
            "<=",
            2 * CHANCE,
        ),
        Claim(
            "and latency does not rise",
            Pick("latency_ratio", {"kind": "hardening", "contender": SECURE}), "<=", 1.0,
            paper="about 60 % less latency on GPUs",
        ),
        Claim(
            "and accuracy is within 0.5 points or better",
            Pick("accuracy", {"kind": "trained", "contender": SECURE}), ">=",
            Pick("accuracy", {"kind": "trained", "contender": "none"}), offset=-0.5,
            paper="about 2 points better",
        ),
    ),
    quick=quick,
    quick_seeds=(0, 1),
    full=full,
    draw=draw,
    reconstruction=True,
)  # fmt: skip
