"""Constant group width against a constant number of groups, at comparable MACs.

For MobileNet-V1 and ResNeXt-50 each group width is paired with the number of groups whose MACs come
nearest. Counted: MACs, weights and arithmetic intensity of the grouped convolutions. Measured: the
time (and energy, where a meter can be read) of an image, the two networks of a pair in turns; the
time of one layer over all group widths. Trained: a small MobileNet on handwritten digits, pairs
with the same budget, beside the depthwise and the dense network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.export import write_onnx
from gossamer.core.graph import Graph
from gossamer.core.groups import regrouped
from gossamer.core.layers import Layer, layers
from gossamer.core.network import Network
from gossamer.core.task import Task
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.experiments.hardware.training import Budget, trained
from gossamer.experiments.real_data import folder_of
from gossamer.hardware.group_size import (
    CLOSE,
    Match,
    match_macs,
    measure_energy,
    measure_layer,
    modelled_energy,
    reuse,
)
from gossamer.hardware.measure import Contender, compare, measure
from gossamer.models.mobilenet import mobilenet_v1, resnext50, small_mobilenet
from gossamer.parts.regroup import grouped

Make = Callable[..., nn.Module]
MOBILENET, RESNEXT, SMALL = "MobileNet-V1", "ResNeXt-50", "small MobileNet"
WIDTH, NUMBER = "E2GC", "FgGC"
LAYER = Layer(
    "3x3", "3x3", "convolution", 128, 128, 1, (3, 3), padding=(1, 1), input_size=(28, 28),
    output_size=(28, 28),
)  # fmt: skip
"""The layer that is timed at every group width."""


@dataclass(frozen=True)
class Subject:
    """A network whose grouped convolutions can have any width or number of groups.

    Attributes:
        name: for the rows.
        make: takes ``group_width`` or ``groups``.
        inputs: an example batch of two.
        widths: the group widths that are paired.
    """

    name: str
    make: Make
    inputs: Tensor
    widths: tuple[int, ...]

    def layers(self) -> list[Layer]:
        """Of the network with the smallest width."""
        module = self.make(group_width=self.widths[0])
        return layers(Graph.trace(module, (self.inputs,)))

    def matches(self) -> list[Match]:
        """The pairs of comparable complexity."""
        own = self.layers()
        return [match_macs(own, width) for width in self.widths]


def images(side: int, channels: int = 3) -> Tensor:
    """Two images of noise: time and counts do not depend on what they show."""
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def wishes(match: Match) -> dict[str, dict[str, int]]:
    """What the two networks of a pair are made with, by contender."""
    return {WIDTH: {"group_width": match.group_width}, NUMBER: {"groups": match.groups}}


def pair_of(match: Match) -> str:
    """A pair's name in the rows."""
    return f"G={match.group_width}, g={match.groups}"


# Counted


def counted(subject: Subject) -> Iterator[Row]:
    """Counts of every pair, of the depthwise and of the dense network, and the worst of the pairs.

    Yields:
        MACs of the network, and MACs, weights, intensity (of the sums, mean over layers, weighted
        by MACs) and modelled energy of its grouped convolutions.
    """
    own = subject.layers()
    chosen = [layer for layer in own if grouped(layer)]
    rest = sum(layer.macs for layer in own) - sum(layer.macs for layer in chosen)

    def row(contender: str, pair: str | None, **wish: int) -> dict[str, Any]:
        made = [regrouped(layer, **wish) for layer in chosen]
        total = reuse(made)
        return {
            "kind": "counted", "network": subject.name, "contender": contender, "pair": pair,
            **wish, "macs": rest + total.macs, "grouped_macs": total.macs,
            "weights": total.weights, "activations": total.activations,
            "intensity": total.intensity, "mean_intensity": total.mean_intensity,
            "weighted_intensity": total.weighted_intensity,
            "modelled_energy": modelled_energy(made),
        }  # fmt: skip

    yield row("depthwise", None, group_width=1)
    yield row("dense", None, groups=1)
    ratios: list[dict[str, float]] = []
    for match in subject.matches():
        rows = {name: row(name, pair_of(match), **wish) for name, wish in wishes(match).items()}
        yield from rows.values()
        ratio = {
            key: rows[WIDTH][key] / rows[NUMBER][key]
            for key in ("weights", "intensity", "modelled_energy")
        }
        ratios.append(ratio | {"macs_apart": abs(match.difference)})
    yield {
        "kind": "worst pair", "network": subject.name,
        "macs_apart": max(r["macs_apart"] for r in ratios),
        "weights_ratio": max(r["weights"] for r in ratios),
        "intensity_ratio": min(r["intensity"] for r in ratios),
        "modelled_energy_ratio": max(r["modelled_energy"] for r in ratios),
    }  # fmt: skip


# Measured


def timed(
    subject: Subject, seeds: Sequence[int], *, batch: int, rounds: int, device: str = "cpu"
) -> Iterator[Row]:
    """Times the two networks of each pair in turns, once a seed.

    Yields:
        A row for each contender, runtime and seed, and one for each pair with the ratio of times
        (constant width over constant number) and its 5th and 95th percentile over the rounds;
        ``deployed`` marks the runtime that the claims are about (ONNX Runtime on a CPU).
    """
    for match in subject.matches():
        with tempfile.TemporaryDirectory() as folder:
            modules = {n: subject.make(**wish).eval() for n, wish in wishes(match).items()}
            runs: dict[str, Mapping[str, Contender]] = {}
            if device == "cpu":
                runs["onnxruntime"] = {}
                files = {name: Path(folder) / f"{name}.onnx" for name in modules}
                for name, module in modules.items():
                    write_onnx(Network(module, (subject.inputs,)), files[name])
                runs["onnxruntime"] = files
            runs["torch"] = {name: module.to(device) for name, module in modules.items()}
            for seed in seeds:
                for runtime, contenders in runs.items():
                    yield from _turns(
                        subject,
                        match,
                        contenders,
                        runtime,
                        seed,
                        batch=batch,
                        rounds=rounds,
                        deployed=next(iter(runs)),
                    )


def _turns(
    subject: Subject, match: Match, contenders: Mapping[str, Contender], runtime: str, seed: int,
    *, batch: int, rounds: int, deployed: str,
) -> Iterator[Row]:  # fmt: skip
    timings = measure(
        contenders, (subject.inputs,), batch_sizes=(batch,), runtimes=(runtime,),  # type: ignore[arg-type]
        rounds=rounds, energy=True,
    )  # fmt: skip
    about = {
        "network": subject.name, "pair": pair_of(match), "runtime": runtime, "batch": batch,
        "deployed": runtime == deployed,
    }  # fmt: skip
    by_name = {timing.name: timing for timing in timings}
    for name, timing in by_name.items():
        yield {
            "kind": "timed", **about, "contender": name, "seed": seed,
            "milliseconds": timing.latency.p50, "joules": timing.joules,
        }  # fmt: skip
    ratio = compare(by_name[WIDTH], by_name[NUMBER])
    joules = [by_name[name].joules for name in (WIDTH, NUMBER)]
    energy = joules[0] / joules[1] if joules[0] and joules[1] else None
    yield {
        "kind": "ratio", **about, "seed": seed, "time_ratio": ratio.ratio, "low": ratio.low,
        "high": ratio.high, "joules_ratio": energy,
        "spent_ratio": ratio.ratio if energy is None else min(ratio.ratio, energy),
    }  # fmt: skip


def timed_layer(seed: int, *, batch: int = 8, device: str = "cpu") -> Iterator[Row]:
    """Times one layer of 128 channels at 28 x 28 over all group widths."""
    runtimes = ("onnxruntime", "torch") if device == "cpu" else ("torch",)
    for point in measure_layer(LAYER, batch=batch, runtimes=runtimes, device=device, seed=seed):
        yield {
            "kind": "layer", "group_width": point.group_width, "macs": point.macs,
            "runtime": point.latency.runtime, "layout": point.layout, "batch": batch,
            "contender": f"{point.latency.runtime}, {point.layout}", "seed": seed,
            "milliseconds": point.latency.p50, "joules": point.joules,
            "picoseconds_per_mac": 1e9 * point.latency.p50 / (point.macs * batch),
        }  # fmt: skip


# Trained


def accuracies(subject: Subject, task: Task, budget: Budget, seed: int) -> Iterator[Row]:
    """Trains the depthwise, the dense and the paired networks alike.

    Yields:
        One row for each contender with its test accuracy, in percent.
    """
    contenders: list[tuple[str, str | None, dict[str, int]]] = [
        ("depthwise", None, {"group_width": 1}),
        ("dense", None, {"groups": 1}),
    ]
    for match in subject.matches():
        contenders += [(name, pair_of(match), wish) for name, wish in wishes(match).items()]
    for name, pair, wish in contenders:
        best = trained(partial(subject.make, **wish), task, budget, seed)
        module = best.module.cpu()
        yield {
            "kind": "trained", "network": subject.name, "data": task.name, "contender": name,
            "pair": pair, **wish, "seed": seed, "learning_rate": best.rate,
            "macs": Graph.trace(module, task.example_inputs).macs,
            "weights": sum(p.numel() for p in module.parameters()),
            "validation": best.validation, "accuracy": task.score(best.module, "test"),
        }  # fmt: skip


# The two modes


def _subjects() -> list[Subject]:
    return [
        Subject(MOBILENET, mobilenet_v1, images(224), (8, 16)),
        Subject(RESNEXT, resnext50, images(224), (8, 16)),
    ]


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """Counts at full size, times on this machine, accuracy on the digits."""
    subjects = _subjects()
    for subject in subjects:
        yield from counted(subject)
    for subject in subjects:
        yield from timed(subject, seeds, batch=1, rounds=10)
    small = Subject(SMALL, small_mobilenet, images(8, 1), (2, 4))
    budget = Budget(epochs=15, rates=(0.05, 0.2), warm=0.1)
    for seed in seeds:
        yield from timed_layer(seed)
        yield from accuracies(small, digits(seed=seed), budget, seed)


def full(seeds: Sequence[int]) -> Iterable[Row]:
    """Energy and time at batch 128 on a GPU (if there is one), accuracy on CIFAR-10."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = folder_of("cifar10")
    subjects = _subjects()
    for subject in subjects:
        yield from counted(subject)
        yield from timed(subject, seeds, batch=128, rounds=30, device=device)
        for match in subject.matches():
            for name, wish in wishes(match).items():
                yield from _energy(subject, pair_of(match), name, wish, device)
    cifar = (
        Subject(
            MOBILENET, partial(mobilenet_v1, small_images=True, classes=10), images(32), (8, 16)
        ),
        Subject(RESNEXT, partial(resnext50, classes=10), images(64), (8, 16)),
    )
    budget = Budget(epochs=60, rates=(0.045, 0.1), batch_size=128)
    for seed in seeds:
        yield from timed_layer(seed, device=device)
        for subject in cifar:
            side = subject.inputs.shape[-1]
            task = cifar10(folder, seed=seed, image_size=(side, side))
            yield from accuracies(subject, task, budget, seed)


def _energy(
    subject: Subject, pair: str, name: str, wish: dict[str, int], device: str
) -> Iterator[Row]:
    module = subject.make(**wish).eval().to(device)
    batch = subject.inputs[:1].repeat(128, 1, 1, 1).to(device)

    def call() -> None:
        with torch.inference_mode():
            module(batch)
        if device == "cuda":
            torch.cuda.synchronize()

    energy = measure_energy(call, samples=128, seconds=10.0)
    if energy is not None:
        yield {
            "kind": "energy", "network": subject.name, "pair": pair, "contender": name,
            "images_per_joule": energy.samples_per_joule, "watts": energy.watts,
            "images_per_second": energy.samples_per_second, "meter": energy.source, "batch": 128,
        }  # fmt: skip


def draw(result: Result, path: Path) -> None:
    """Time of a layer over group widths, time of the pairs, accuracy against MACs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    layer = [row for row in result.rows if row.get("kind") == "layer"]
    for name in dict.fromkeys(row["contender"] for row in layer):
        own = [row for row in layer if row["contender"] == name]
        widths = sorted({row["group_width"] for row in own})
        at = [[r["milliseconds"] for r in own if r["group_width"] == w] for w in widths]
        left.plot(widths, [sum(t) / len(t) for t in at], marker="o", markersize=3, label=name)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("channels a group (128 channels, 28 x 28, 3 x 3, batch 8)")
    left.set_ylabel("milliseconds, measured")
    ratios = [row for row in result.rows if row.get("kind") == "ratio"]
    names = list(dict.fromkeys((r["network"], r["pair"], r["runtime"]) for r in ratios))
    for place, key in enumerate(names):
        own = [r for r in ratios if (r["network"], r["pair"], r["runtime"]) == key]
        for row in own:
            middle.errorbar(
                row["time_ratio"], place, fmt="o", color="tab:blue", markersize=4,
                xerr=[[row["time_ratio"] - row["low"]], [row["high"] - row["time_ratio"]]],
            )  # fmt: skip
    middle.axvline(1.0, color="grey", linewidth=1)
    middle.set_yticks(range(len(names)), ["\n".join(key) for key in names], fontsize=7)
    middle.set_xlabel("time of E2GC over time of FgGC, measured")
    scores = [row for row in result.rows if row.get("kind") == "trained"]
    for name in dict.fromkeys(row["contender"] for row in scores):
        own = [row for row in scores if row["contender"] == name]
        right.scatter([r["macs"] for r in own], [r["accuracy"] for r in own], s=14, label=name)
    right.set_xlabel("MACs an image, counted")
    right.set_ylabel("test accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def _worst(metric: str, network: str) -> Pick:
    return Pick(metric, {"kind": "worst pair", "network": network})


def _claims(network: str, energy: str) -> tuple[Claim, ...]:
    return (
        Claim(
            f"{network}: the MACs of every pair are within 5 %",
            _worst("macs_apart", network), "<=", CLOSE,
        ),
        Claim(
            f"{network}: a constant width has fewer weights in every pair (grouped convolutions)",
            _worst("weights_ratio", network), "<", 1.0,
        ),
        Claim(
            f"{network}: a constant width has the higher arithmetic intensity in every pair",
            _worst("intensity_ratio", network), ">", 1.0,
        ),
        Claim(
            f"{network}: a constant width takes less energy or time an image (mean of the pairs)",
            Pick("spent_ratio", {"kind": "ratio", "network": network, "deployed": True}),
            "<", 1.0, paper=energy,
        ),
    )  # fmt: skip


EXPERIMENT = Experiment(
    spec="e2gc",
    title="groups of constant width against a constant number of groups, at comparable MACs",
    claims=(
        *_claims(MOBILENET, "P100: 10.8 % more images a joule"),
        *_claims(RESNEXT, "P100: 4.73 % more images a joule"),
        Claim(
            "at a constant width accuracy is not worse by more than 0.5 points (mean of the pairs)",
            Pick("accuracy", {"kind": "trained", "contender": WIDTH}),
            ">=",
            Pick("accuracy", {"kind": "trained", "contender": NUMBER}),
            offset=-0.5,
        ),
    ),
    quick=quick,
    full=full,
    draw=draw,
)
