"""Wider groups on systolic arrays: modelled cycles and use of the array, and trained accuracy.

Modelled: MobileNet-V1 and V2 on arrays of 8 x 8 to 128 x 128 under four dataflows, for groups of 1
to 32 channels, beside the controls: a constant number of groups, a depthwise network narrowed to
the same latency, and a wider-grouped one narrowed to the same MACs. Trained: a small MobileNet on
handwritten digits for each group width, and the depthwise network widened to the MACs of the widest
groups, all with the same budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.graph import Graph
from gossamer.core.groups import regrouped
from gossamer.core.layers import Layer, layers
from gossamer.core.task import Task
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.experiments.hardware.training import Budget, trained
from gossamer.experiments.real_data import folder_of
from gossamer.hardware.systolic import DATAFLOWS, WIDTHS, Dataflow, SystolicArray, width_at
from gossamer.models.mobilenet import mobilenet_v1, small_mobilenet

SIDES = (8, 16, 32, 64, 128)
PAPER = (64, "rs")
MOBILENET = "MobileNet-V1"


def convolutions(module: nn.Module, side: int, channels: int = 3) -> list[Layer]:
    """The convolutions of a network at an image size; the paper leaves the classifier out."""
    images = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    return [la for la in layers(Graph.trace(module, (images,))) if la.kind == "convolution"]


def regroup_all(chosen: Sequence[Layer], **wish: int) -> list[Layer]:
    """Layers whose depthwise ones have other groups."""
    return [regrouped(layer, **wish) if layer.depthwise else layer for layer in chosen]


# Modelled


def modelled(network: str, chosen: Sequence[Layer], contender: str, **about: Any) -> Iterator[Row]:
    """One network on every array under every dataflow; percent are of the array."""
    macs, weights = sum(la.macs for la in chosen), sum(la.weights for la in chosen)
    for side in SIDES:
        for dataflow in DATAFLOWS:
            yield _row(network, chosen, contender, SystolicArray(side, side, dataflow)) | {
                "macs": macs, "weights": weights, **about,
            }  # fmt: skip


def _row(
    network: str, chosen: Sequence[Layer], contender: str, array: SystolicArray
) -> dict[str, Any]:
    profile = array.profile(chosen)
    return {
        "kind": "modelled", "network": network, "contender": contender, "rows": array.rows,
        "columns": array.columns, "dataflow": array.dataflow, "cross_group": array.cross_group,
        "overlap_folds": array.overlap_folds, "cycles": profile.cycles,
        "mean_utilisation": 100.0 * profile.mean_utilisation,
        "overall_utilisation": 100.0 * profile.overall_utilisation,
        "dram_words": profile.dram_words, "energy": profile.energy(),
    }  # fmt: skip


def sweep() -> Iterator[Row]:
    """Group widths, numbers of groups and the controls of MobileNet-V1; group widths of V2."""
    first = convolutions(mobilenet_v1(), 224)
    second = convolutions(timm.create_model("mobilenetv2_100"), 224)
    for network, chosen in ((MOBILENET, first), ("MobileNet-V2", second)):
        for width in WIDTHS:
            changed = regroup_all(chosen, group_width=width)
            yield from modelled(network, changed, f"G={width}", group_width=width)
    for groups in (64, 32, 16, 8):
        yield from modelled(MOBILENET, regroup_all(first, groups=groups), f"g={groups}")
    # What the claims rest on: a network on chip that feeds several groups, and folds that overlap.
    for width in WIDTHS:
        changed = regroup_all(first, group_width=width)
        for array in (
            SystolicArray(cross_group=True),
            *(SystolicArray(dataflow=d, overlap_folds=True) for d in ("os", "ws", "is")),
        ):
            yield _row(MOBILENET, changed, f"G={width}", array) | {"group_width": width}
    yield from gains(first)
    yield from controls(first)


def gains(first: Sequence[Layer]) -> Iterator[Row]:
    """At 64 x 64, each group width against depthwise under the same dataflow, in percent."""
    for dataflow in DATAFLOWS:
        array = SystolicArray(dataflow=dataflow)
        before = array.profile(first)
        for width in WIDTHS[1:]:
            after = array.profile(regroup_all(first, group_width=width))
            yield {
                "kind": "gain", "network": MOBILENET, "contender": f"G={width}",
                "dataflow": dataflow, "group_width": width,
                "utilisation_gain": 100.0 * (after.mean_utilisation / before.mean_utilisation - 1),
                "utilisation_points": 100.0 * (after.mean_utilisation - before.mean_utilisation),
                "latency_gain": 100.0 * (1 - after.cycles / before.cycles),
            }  # fmt: skip


def controls(first: Sequence[Layer]) -> Iterator[Row]:
    """At 64 x 64: G=8 narrowed to the MACs of depthwise, depthwise narrowed to G=8's latency."""

    def narrowed(group_width: int, width: float) -> list[Layer]:
        return convolutions(mobilenet_v1(group_width=group_width, width=width), 224)

    macs = sum(layer.macs for layer in first)
    same = width_at(partial(narrowed, 8), lambda c: sum(la.macs for la in c), macs, trials=6)
    chosen = narrowed(8, same)
    yield from _control(MOBILENET, chosen, "G=8 at the MACs of G=1", same, DATAFLOWS)
    for dataflow in DATAFLOWS:
        array = SystolicArray(dataflow=dataflow)
        target = array.profile(regroup_all(first, group_width=8)).cycles
        width = width_at(
            partial(narrowed, 1), lambda c, a=array: a.profile(c).cycles, target, trials=6
        )
        name = "G=1 at the latency of G=8"
        yield from _control(MOBILENET, narrowed(1, width), name, width, (dataflow,))


def _control(
    network: str, chosen: Sequence[Layer], name: str, width: float, dataflows: Iterable[Dataflow]
) -> Iterator[Row]:
    for dataflow in dataflows:
        yield _row(network, chosen, name, SystolicArray(dataflow=dataflow)) | {
            "kind": "control", "width": width, "macs": sum(la.macs for la in chosen),
            "weights": sum(la.weights for la in chosen),
        }  # fmt: skip


# Trained


def accuracies(
    make: Callable[..., nn.Module], task: Task, widths: Sequence[int], budget: Budget, seed: int,
    array: SystolicArray,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Trains each group width, and the depthwise network at the MACs of the widest groups.

    Yields:
        Test accuracy in percent, counted MACs and weights, modelled cycles on ``array``.
    """
    images = task.example_inputs

    def counted(**wish: Any) -> list[Layer]:
        return layers(Graph.trace(make(**wish), images))

    def macs(chosen: Sequence[Layer]) -> float:
        return sum(layer.macs for layer in chosen)

    target = macs(counted(group_width=widths[-1]))
    wider = width_at(lambda w: counted(group_width=1, width=w), macs, target, low=1.0, trials=5)
    contenders: dict[str, dict[str, Any]] = {f"G={g}": {"group_width": g} for g in widths}
    contenders["G=1, wider"] = {"group_width": 1, "width": wider}
    for name, wish in contenders.items():
        best = trained(partial(make, **wish), task, budget, seed)
        profile = array.profile(Graph.trace(best.module.cpu(), images))
        yield {
            "kind": "trained", "data": task.name, "contender": name, **wish, "seed": seed,
            "accuracy": task.score(best.module, "test"), "validation": best.validation,
            "learning_rate": best.rate, "macs": profile.macs,
            "parameters": sum(p.numel() for p in best.module.parameters()),
            "cycles": profile.cycles, "rows": array.rows, "dataflow": array.dataflow,
        }  # fmt: skip


def with_floor(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to depthwise rows the accuracy less one standard deviation over the seeds."""
    scores = [row["accuracy"] for row in rows if row["contender"] == "G=1"]
    deviation = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
    return [
        row | {"accuracy_floor": row["accuracy"] - deviation} if row["contender"] == "G=1" else row
        for row in rows
    ]


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """All tables, and accuracies on the digits."""
    yield from sweep()
    budget = Budget(epochs=15, rates=(0.05, 0.2), warm=0.1)
    found = []
    for seed in seeds:
        task = digits(seed=seed)
        found += accuracies(small_mobilenet, task, (1, 2, 4, 8), budget, seed, SystolicArray())
    yield from with_floor(found)


def full(seeds: Sequence[int]) -> Iterable[Row]:
    """All tables, and MobileNet-V1 on CIFAR-10 for 60 epochs."""
    folder = folder_of("cifar10")
    yield from sweep()
    make = partial(mobilenet_v1, small_images=True, classes=10)
    budget = Budget(epochs=60, rates=(0.045, 0.1), batch_size=128)
    found = []
    for seed in seeds:
        task = cifar10(folder, seed=seed)
        found += accuracies(make, task, (1, 2, 4, 8, 16), budget, seed, SystolicArray())
    yield from with_floor(found)


def draw(result: Result, path: Path) -> None:
    """Cycles and use of a 64 x 64 array over group widths, and accuracy over modelled cycles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for dataflow, name in DATAFLOWS.items():
        own = [
            row for row in result.rows
            if row.get("kind") == "modelled" and row["network"] == MOBILENET
            and row["rows"] == PAPER[0] and row["dataflow"] == dataflow and "group_width" in row
            and not (row["cross_group"] or row["overlap_folds"])
        ]  # fmt: skip
        widths = [row["group_width"] for row in own]
        for axes, key, scale in ((left, "cycles", 1e-6), (middle, "mean_utilisation", 1.0)):
            axes.plot(widths, [scale * row[key] for row in own], marker="o", label=name)
    left.set_ylabel("million cycles an image, modelled")
    left.set_yscale("log")
    middle.set_ylabel("mean utilisation over layers (%), modelled")
    for axes in (left, middle):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("channels a group, MobileNet-V1, 64 x 64")
    scores = [row for row in result.rows if row.get("kind") == "trained"]
    for name in dict.fromkeys(row["contender"] for row in scores):
        own = [row for row in scores if row["contender"] == name]
        right.scatter([r["cycles"] for r in own], [r["accuracy"] for r in own], s=16, label=name)
    right.set_xlabel("cycles an image, row stationary, modelled")
    right.set_ylabel("test accuracy (%)")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def _on_the_papers_array(metric: str, contender: str, dataflow: str) -> Pick:
    return Pick(
        metric,
        {
            "kind": "modelled", "network": MOBILENET, "contender": contender, "rows": PAPER[0],
            "dataflow": dataflow, "cross_group": False, "overlap_folds": False,
        },
    )  # fmt: skip


def _claims(dataflow: Dataflow, latency: str = "", use: str = "") -> tuple[Claim, ...]:
    name = DATAFLOWS[dataflow]
    return (
        Claim(
            f"{name}, 64 x 64: MobileNet-V1 with groups of 8 takes fewer cycles than depthwise",
            _on_the_papers_array("cycles", "G=8", dataflow), "<",
            _on_the_papers_array("cycles", "G=1", dataflow), paper=latency,
        ),
        Claim(
            f"{name}, 64 x 64: and has the higher mean utilisation",
            _on_the_papers_array("mean_utilisation", "G=8", dataflow), ">",
            _on_the_papers_array("mean_utilisation", "G=1", dataflow), paper=use,
        ),
    )  # fmt: skip


EXPERIMENT = Experiment(
    spec="draco",
    title="wider groups against depthwise convolutions on systolic arrays",
    claims=(
        *_claims("rs", "42.6 % lower latency", "41.8 % higher average PE utilisation"),
        *_claims("os"),
        *_claims("ws"),
        *_claims("is"),
        Claim(
            "groups of 8 are as accurate as depthwise within one standard deviation",
            Pick("accuracy", {"kind": "trained", "contender": "G=8"}),
            ">=",
            Pick("accuracy_floor", {"kind": "trained", "contender": "G=1"}),
            paper="negligible loss of accuracy",
        ),
    ),
    quick=quick,
    full=full,
    draw=draw,
)
