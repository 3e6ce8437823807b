"""How long plans of a scratchpad take, and what they save on real networks.

Networks: extra bytes of the free-order plan and of the four baselines at M_R (the largest
operator), M_H (halfway) and M_P (the smallest peak of any order), int8, with the bound; every plan
is run on real bytes. Sizes: seconds of each solver on random cells (free order) and DenseNets (one
order) of growing size, at M_R.

    python benchmarks/scratchpad.py --out benchmarks/results/scratchpad.json [--markdown]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torchvision
from torch import nn

from gossamer.core.errors import GossamerError
from gossamer.core.experiment import about
from gossamer.core.files import read_json, write_json
from gossamer.experiments.hardware.scratchpad import DartsCells, RandomCell, memory_graph
from gossamer.hardware.memory_graph import MemoryGraph, minimum_peak
from gossamer.hardware.scratchpad import Solver, budgets, schedule
from gossamer.hardware.scratchpad_baselines import baselines
from gossamer.hardware.scratchpad_plan import replay

Builder = Callable[[], tuple[nn.Module, int]]


def published(name: str, side: int = 224, **options: Any) -> Builder:
    return lambda: (torchvision.models.get_model(name, weights=None, **options), side)


NETWORKS: dict[str, Builder] = {
    "MobileNetV2": published("mobilenet_v2"),
    "ResNet-50": published("resnet50"),
    "Inception v3": published("inception_v3", 299, aux_logits=False, init_weights=False),
    "DenseNet-121": published("densenet121"),
    "ViT-B/16": published("vit_b_16"),
    "DARTS, 8 cells": lambda: (DartsCells(), 32),
    "NASNet-A large": lambda: (timm.create_model("nasnetalarge"), 331),
}


def networks(seconds: float) -> Iterator[dict[str, Any]]:
    """Every network with three readings at three budgets."""
    readings = {
        "activations": {},
        "fused": {"fuse": True},
        "fused, parameters": {"fuse": True, "parameters": True},
    }
    for name, build in NETWORKS.items():
        module, side = build()
        for reading, options in readings.items():
            graph = memory_graph(module, side, **options)
            began = time.monotonic()
            peak = minimum_peak(graph)
            peak_seconds = time.monotonic() - began
            marks = budgets(graph, peak)
            points = {"M_R": marks.required, "M_H": marks.half, "M_P": marks.peak}
            if marks.required == marks.peak:
                points = {"M_R = M_P": marks.peak}
            for point, budget in points.items():
                row = {
                    "network": name,
                    "reading": reading,
                    "operators": len(graph.ops),
                    "tensors": len(graph.sizes),
                    "point": point,
                    "budget": budget,
                    "peak_seconds": peak_seconds,
                    "peak_proved": peak.proved,
                }
                for other in baselines(graph, budget, peak_order=peak.order):
                    row[other.name] = {
                        "extra_bytes": other.extra_bytes,
                        "arena_bytes": other.arena_bytes,
                        "fits": other.plan is not None,
                    }
                try:
                    limit = seconds if len(graph.ops) < 500 else 2 * seconds
                    plan = schedule(graph, budget, seconds=limit, peak=peak)
                    assert replay(graph, plan).extra_bytes == plan.extra_bytes
                    row |= {
                        "extra_bytes": plan.extra_bytes,
                        "bound_bytes": plan.bound,
                        "status": plan.status,
                        "gap": plan.gap,
                        "method": plan.method,
                        "seconds": plan.seconds,
                    }
                except GossamerError as error:
                    row |= {"error": str(error)}
                print({k: v for k, v in row.items() if k != "tensors"}, flush=True)
                yield row


def sizes(seconds: float) -> Iterator[dict[str, Any]]:
    """Graphs of growing size with each solver."""
    graphs: list[tuple[str, MemoryGraph]] = []
    for nodes in (4, 6, 8, 10, 12, 16, 24, 48):
        cell = memory_graph(RandomCell(nodes, 16, seed=1), 16, fuse=True)
        graphs.append(("random cell", cell))
    for blocks in ((4, 4), (6, 12), (6, 12, 24), (6, 12, 24, 16)):
        dense = torchvision.models.DenseNet(32, blocks, 64)  # type: ignore[arg-type]
        graphs.append(("DenseNet", memory_graph(dense, 224)))
    solvers: tuple[Solver, ...] = ("cp-sat", "windows", "highs")
    for kind, graph in graphs:
        peak = minimum_peak(graph)
        budget = graph.required
        for solver in solvers:
            row = {"kind": kind, "operators": len(graph.ops), "budget": budget, "solver": solver}
            began = time.monotonic()
            try:
                plan = schedule(graph, budget, solver=solver, seconds=seconds, peak=peak)
                row |= {
                    "extra_bytes": plan.extra_bytes,
                    "bound_bytes": plan.bound,
                    "status": plan.status,
                }
            except GossamerError as error:
                row |= {"error": str(error)}
            row["seconds"] = time.monotonic() - began
            print(row, flush=True)
            yield row


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""

    def kib(value: int) -> str:
        return f"{value / 1024:,.0f}"

    lines = [
        "| Network | Operators | Budget | KiB | Extra KiB | Bound | Seconds | Best baseline | "
        "Mean of baselines | Baselines that fit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["networks"]:
        others = [v for k, v in row.items() if isinstance(v, dict)]
        fits = [o["extra_bytes"] for o in others if o["fits"]]
        ours = (
            [kib(row["extra_bytes"]), kib(row["bound_bytes"]), f"{row['seconds']:.1f}"]
            if "extra_bytes" in row
            else [row["error"], "", ""]
        )
        mean = sum(o["extra_bytes"] for o in others) / len(others)
        cells = [
            f"{row['network']}, {row['reading']}", str(row["operators"]), row["point"],
            kib(row["budget"]), *ours, kib(min(fits)) if fits else "none", kib(round(mean)),
            f"{len(fits)} of {len(others)}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| Graph | Operators | Solver | Seconds | Extra KiB | Bound | Status |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in result["sizes"]:
        ours = (
            [kib(row["extra_bytes"]), kib(row["bound_bytes"]), row["status"]]
            if "extra_bytes" in row
            else ["", "", row["error"].split(";")[0]]
        )
        head = [row["kind"], str(row["operators"]), row["solver"], f"{row['seconds']:.2f}"]
        lines.append("| " + " | ".join([*head, *ours]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scratchpad.json"))
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="limit of one solve; twice for the largest"
    )
    parser.add_argument("--markdown", action="store_true", help="print the committed result")
    options = parser.parse_args()
    if not options.markdown:
        result = {
            "about": about(seconds=options.seconds),
            "networks": list(networks(options.seconds)),
            "sizes": list(sizes(min(20.0, options.seconds))),
        }
        write_json(options.out, result)
    print(table(read_json(options.out)))


if __name__ == "__main__":
    main()
