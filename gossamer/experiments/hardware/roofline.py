"""Operations, efficiency and time of small networks; blocks fused and layer by layer.

Four networks of one skeleton (ResNet, MobileNetV2, ConvNeXt and ConvFirst blocks) are trained
alike on digits of 32 x 32, each with two learning rates chosen on the validation split. They are
counted, bounded by the ceilings of the machine, and timed in turns. One block of each kind is timed
fused against the best of torch in both memory formats and ONNX Runtime layer by layer, with batch
normalisation folded on all sides.
"""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.export import OnnxRunner, onnx_model
from gossamer.core.fit import Supervised, fit
from gossamer.core.task import Task, seed_of
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.experiments.real_data import folder_of
from gossamer.hardware.fused_block import (
    FoldedBlock,
    block_bytes,
    fuse_block,
    plan_blocks,
    tuned_rows,
)
from gossamer.hardware.measure import Timing, compare, measure
from gossamer.hardware.roofline import efficiency_report
from gossamer.models.convfirst import Block, BlockNet, ConvFirst, ConvNeXtBlock, MBConv
from gossamer.models.resnet import BasicBlock

log = logging.getLogger(__name__)

_CLOCK = time.process_time
"""Contenders have one thread each; what other programs take meanwhile is not theirs."""

BLOCKS: dict[str, tuple[Block, ...]] = {
    "ResNet": (lambda i, o, s: BasicBlock(i, o, stride=s, projection=True),),
    "MobileNetV2": (lambda i, o, s: MBConv(i, o, stride=s, expand=6),),
    "ConvNeXt": (
        lambda i, o, s: ConvNeXtBlock(i, o, stride=s),
        lambda i, o, s: ConvNeXtBlock(i, o, stride=s, layer_scale=1.0),
    ),
    "ConvFirst": (lambda i, o, s: ConvFirst(i, o, stride=s, group_width=8, expand=6),),
}
"""The networks' blocks, with the defaults of their papers. ConvNeXt's layer scale of 1e-6 is made
for long training, so it is also tried at 1, and has twice as many trials as the others."""


@dataclass(frozen=True)
class Work:
    """What the networks compete on.

    Attributes:
        name: of the data, for the rows.
        task: of a seed.
        widths: channels of each stage, one tuple for each size.
        depths: blocks of each stage.
        stem_stride: of the first convolution.
        epochs: of each trial.
        rates: learning rates of AdamW, one trial each.
        batch_size: samples of a training batch.
        batch: samples of a timed call.
        shapes: channels, side and batch of timed blocks.
    """

    name: str
    task: Callable[[int], Task]
    widths: tuple[tuple[int, ...], ...]
    depths: tuple[int, ...]
    stem_stride: int
    epochs: int
    rates: tuple[float, ...]
    batch_size: int
    batch: int
    shapes: tuple[tuple[int, int, int], ...]


def _digits(seed: int) -> Task:
    return digits(seed=seed, image_size=(32, 32))


def _cifar(seed: int) -> Task:
    return cifar10(folder_of("cifar10"), seed=seed)


QUICK = Work(
    "digits", _digits, ((32, 64),), (2, 2), 2, 4, (1e-3, 4e-3), 32, 8,
    ((64, 64, 8), (64, 64, 1), (32, 64, 8), (128, 32, 8), (256, 16, 8)),
)  # fmt: skip
FULL = Work(
    "cifar10", _cifar, ((32, 64, 128), (64, 128, 256), (96, 192, 384)), (2, 4, 2), 1, 100,
    (1e-3, 2e-3, 4e-3), 128, 64, ((64, 64, 32), (64, 64, 128), (64, 64, 288)),
)  # fmt: skip


def _train(
    work: Work, makers: Sequence[Callable[[], nn.Module]], task: Task, seed: int
) -> nn.Module:
    """The best of a trial for each maker and learning rate, on the validation split."""
    found: list[tuple[float, nn.Module]] = []
    for make, rate in itertools.product(makers, work.rates):
        with torch.random.fork_rng():
            torch.manual_seed(seed_of("weights", seed))
            network = make()
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
        rule = Supervised(network, task, optimizer=optimizer)
        fit(
            rule,
            task,
            epochs=work.epochs,
            batch_size=work.batch_size,
            seed=seed,
            title=f"training at {rate:g}",
        )
        found.append((task.score(network, "validation"), network))
    return max(found, key=lambda trial: trial[0])[1].eval()


def _networks(work: Work, seed: int, measured: bool) -> Iterator[Row]:
    """Trains, counts and times the networks of one seed; times are of the first seed alone."""
    task = work.task(seed)
    inputs = task.example_inputs
    channels, classes = inputs[0].shape[1], 10
    for widths in work.widths:
        trained: dict[str, nn.Module] = {}
        for name, blocks in BLOCKS.items():
            makers = [
                partial(
                    BlockNet, block, widths, work.depths, stem_stride=work.stem_stride,
                    in_channels=channels, classes=classes,
                )
                for block in blocks
            ]  # fmt: skip
            trained[name] = _train(work, makers, task, seed)
            row = {
                "work": work.name,
                "contender": name,
                "widths": list(widths),
                "seed": seed,
                "accuracy": task.score(trained[name], "test"),
            }
            log.info("%s", row)
            yield row
        if measured:
            yield from _efficiencies(work, trained, widths, seed, inputs)
            yield from _race(work, trained, widths, seed, inputs)


def _efficiencies(
    work: Work, trained: Mapping[str, nn.Module], widths: Sequence[int], seed: int,
    inputs: Sequence[Any],
) -> Iterator[Row]:  # fmt: skip
    reports = {
        name: efficiency_report(
            module, inputs, batch=work.batch, name=name, seconds=1.0, clock=_CLOCK
        )
        for name, module in trained.items()
    }
    # The identity would hold by definition for the time that gave the efficiency; so it has to tell
    # the times of another run, in which the networks take turns.
    again = {
        timing.name: timing.latency.p50 / 1e3
        for timing in measure(
            trained, inputs, batch_sizes=(work.batch,), runtimes=("torch",), clock=_CLOCK
        )
    }
    common = {"work": work.name, "widths": list(widths), "seed": seed, "batch": work.batch}
    for name, report in reports.items():
        yield {
            **common,
            "contender": f"{name}, efficiency",
            "network": name,
            "macs": sum((r.operations or 0.0) for r in report.layers) / 2 / work.batch,
            "ideal_ms": 1e3 * report.ideal_seconds,
            "bound": report.bound,
            "arithmetic_bound": report.arithmetic_bound,
            "torch_ms": 1e3 * report.latency["torch"],
            "torch_efficiency": report.efficiency("torch"),
            "onnx_ms": 1e3 * report.latency["onnxruntime"],
            "onnx_efficiency": report.efficiency("onnxruntime"),
            "torch_again_ms": 1e3 * again[name],
            "slack_torch": report.bound - report.efficiency("torch"),
            "slack_onnx": report.arithmetic_bound - report.efficiency("onnxruntime"),
            "ridge_of": sorted({r.memory for r in report.layers if r.memory}),
            "peak_gmacs": report.peak / 2e9,
        }
    macs = [report.operations for report in reports.values()]
    told = [r.operations / (r.peak * r.efficiency("torch")) for r in reports.values()]
    times = [again[name] for name in reports]
    yield {
        **common,
        "contender": "ranking",
        "tau_macs": _tau(macs, times),
        "tau_identity": _tau(told, times),
        "identity_error": max(abs(a / b - 1.0) for a, b in zip(told, times, strict=True)),
    }
    yield {
        **common,
        "contender": "waterline",
        "least_slack": min(
            min(r.bound - r.efficiency("torch"), r.arithmetic_bound - r.efficiency("onnxruntime"))
            for r in reports.values()
        ),
    }


def _tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau: 1 for the same order."""
    from scipy.stats import kendalltau

    result: Any = kendalltau(a, b)
    return float(result.statistic)


def _race(
    work: Work, trained: Mapping[str, nn.Module], widths: Sequence[int], seed: int,
    inputs: Sequence[Any],
) -> Iterator[Row]:  # fmt: skip
    """ConvFirst fused against itself layer by layer and ConvNeXt, each in its best executor."""
    sized = inputs[0].repeat(-(-work.batch // len(inputs[0])), 1, 1, 1)[: work.batch].contiguous()
    fused, plans = plan_blocks(trained["ConvFirst"], (sized,), clock=_CLOCK)
    contenders: dict[str, Callable[..., Any]] = {"ConvFirst, fused": _torch(fused)}
    for name in ("ConvFirst", "ConvNeXt"):
        contenders |= _executors(name, trained[name], sized)
    timings = {
        t.name: t
        for t in measure(
            contenders, (sized,), batch_sizes=(work.batch,), runtimes=("torch",), clock=_CLOCK
        )
    }
    common = {"work": work.name, "widths": list(widths), "seed": seed, "batch": work.batch}
    for name in ("ConvFirst", "ConvNeXt"):
        best = _fastest([t for n, t in timings.items() if n.startswith(f"{name}, in ")])
        ratio = compare(best, timings["ConvFirst, fused"])
        yield {
            **common,
            "contender": f"network fused against {name}",
            "other": best.name,
            "fused_ms": timings["ConvFirst, fused"].latency.p50,
            "other_ms": best.latency.p50,
            "ratio": ratio.ratio,
            "low": ratio.low,
            "high": ratio.high,
            "all_ms": {n: t.latency.p50 for n, t in timings.items()},
            "fused_blocks": [plan.name for plan in plans if plan.fused],
            "plans": [plan.said for plan in plans],
        }


def _torch(module: nn.Module) -> Callable[..., Any]:
    def call(x: torch.Tensor) -> Any:
        with torch.inference_mode():
            return module(x)

    return call


def _executors(name: str, module: nn.Module, x: torch.Tensor) -> dict[str, Callable[..., Any]]:
    """Layer by layer: torch in both memory formats, and ONNX Runtime."""
    module = module.eval()
    last = torch.channels_last
    example = torch.randn(2, *x.shape[1:])
    runner = OnnxRunner(onnx_model(module, (example,)).SerializeToString(), threads=1)
    feed = runner.feed(x)
    nhwc = x.to(memory_format=last)
    calls = _torch(module)
    return {
        f"{name}, in torch": calls,
        f"{name}, in torch (channels last)": lambda _: calls(nhwc),
        f"{name}, in ONNX Runtime": lambda _: runner.session.run(None, feed),
    }


def _fastest(timings: Sequence[Timing]) -> Timing:
    return min(timings, key=lambda t: float(np.median(t.rounds)))


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "ConvFirst": lambda c: ConvFirst(c, c, group_width=8, expand=6),
    "MBConv (groups of 8)": lambda c: MBConv(c, c, group_width=8, expand=6),
    "MBConv (depthwise)": lambda c: MBConv(c, c, group_width=1, expand=6),
}


def _blocks(work: Work, seed: int) -> Iterator[Row]:
    """One block of each kind and shape, fused and layer by layer."""
    for kind, make in KINDS.items():
        for channels, side, batch in work.shapes:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                block = make(channels).eval()
                x = torch.randn(batch, channels, side, side)
            folded = FoldedBlock.of(block)
            rows = tuned_rows(folded, x, clock=_CLOCK)
            fused = fuse_block(folded, tile_rows=rows)
            with torch.inference_mode():
                gap = float((fused(x) - block(x)).abs().max())
            contenders = {"fused": _torch(fused), **_executors("folded", folded, x)}
            timings = {
                t.name: t
                for t in measure(
                    contenders, (x,), batch_sizes=(batch,), runtimes=("torch",), clock=_CLOCK
                )
            }
            best = _fastest([t for n, t in timings.items() if n != "fused"])
            ratio = compare(best, timings["fused"])
            row: dict[str, Any] = {
                "work": work.name,
                "contender": f"block: {kind}",
                "shape": f"{channels} channels, {side} x {side}, batch {batch}",
                "seed": seed,
                "difference": gap,
                "tile_rows": rows,
                "fused_ms": timings["fused"].latency.p50,
                "unfused_ms": best.latency.p50,
                "unfused_in": best.name.removeprefix("folded, in "),
                "all_ms": {n: t.latency.p50 for n, t in timings.items()},
                "ratio": ratio.ratio,
                "low": ratio.low,
                "high": ratio.high,
                "winner": ratio.winner,
                "fused_bytes": block_bytes(folded, side, side, batch=batch, tile_rows=rows),
                "unfused_bytes": block_bytes(folded, side, side, batch=batch),
            }
            if (channels, side, batch) == work.shapes[0]:
                for name in ("fused", "unfused"):
                    row[f"{name}_peak_bytes"] = _peak(kind, name, channels, side, batch)
                row["least_saving"] = min(
                    row["unfused_bytes"] - row["fused_bytes"],
                    row["unfused_peak_bytes"] - row["fused_peak_bytes"],
                )
            log.info("%s", row)
            yield row


_PEAK = """
import json, sys, torch
from gossamer.experiments.hardware.roofline import KINDS
from gossamer.hardware import peak_memory
from gossamer.hardware.fused_block import FoldedBlock, fuse_block
kind, name, channels, side, batch = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(1)
block = FoldedBlock.of(KINDS[kind](channels).eval())
block = fuse_block(block) if name == "fused" else block
with torch.inference_mode():
    block(torch.randn(1, channels, 8, 8))  # compiles, loads libraries
    x = torch.randn(batch, channels, side, side)
    before = peak_memory.resident()
    precise = peak_memory.forget()
    block(x)
    print(json.dumps(peak_memory.highest() - before if precise else None))
"""


def _peak(kind: str, name: str, *shape: int) -> int | None:
    """Bytes that one call adds to what is resident, output included, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", _PEAK, kind, name, *map(str, shape)],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    return json.loads(result.stdout)


def _run(work: Work, seeds: Sequence[int]) -> Iterable[Row]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed in seeds:
            yield from _networks(work, seed, measured=seed == seeds[0])
        yield from _blocks(work, seeds[0])
    finally:
        torch.set_num_threads(before)


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """Small networks on digits of 32 x 32, one size."""
    yield from _run(QUICK, seeds)


def full(seeds: Sequence[int]) -> Iterable[Row]:
    """CIFAR-10, three sizes; blocks at the batch sizes of the published benchmark.

    Raises:
        InputError: if the data are not there.
    """
    yield from _run(FULL, seeds)


_SHAPE = "64 channels, 64 x 64, batch 8"

CLAIMS = (
    Claim(
        "multiply-accumulates rank the networks otherwise than their latency (Kendall's tau)",
        Pick("tau_macs", {"contender": "ranking"}), "<", 1.0,
    ),
    Claim(
        "operations / (peak x efficiency), the efficiency of one run, ranks the latencies of "
        "another run (Kendall's tau)",
        Pick("tau_identity", {"contender": "ranking"}), "==", 1.0,
    ),
    Claim(
        "the waterline is at least the measured efficiency, for every network and runtime (least "
        "difference)",
        Pick("least_slack", {"contender": "waterline"}), ">=", 0.0,
    ),
    Claim(
        "the fused block has a lower measured peak memory than torch layer by layer",
        Pick("fused_peak_bytes", {"contender": "block: ConvFirst"}), "<",
        Pick("unfused_peak_bytes", {"contender": "block: ConvFirst"}),
    ),
    Claim(
        "the fused block has less modelled traffic than layer by layer",
        Pick("fused_bytes", {"contender": "block: ConvFirst"}), "<",
        Pick("unfused_bytes", {"contender": "block: ConvFirst"}),
    ),
    Claim(
        "the compiled fused ConvFirst block is faster than its fastest unfused form (64 channels, "
        "64 x 64, batch 8; ratio)",
        Pick("ratio", {"contender": "block: ConvFirst", "shape": _SHAPE}), ">", 1.0,
    ),
    Claim(
        "the fused ConvFirst network is faster than its fastest unfused form (ratio)",
        Pick("ratio", {"contender": "network fused against ConvFirst"}), ">", 1.0,
    ),
    Claim(
        "the fused ConvFirst network is faster than ConvNeXt in its fastest form (ratio)",
        Pick("ratio", {"contender": "network fused against ConvNeXt"}), ">", 1.0,
        paper="about 4 times as fast at similar ImageNet accuracy (fp16, NVIDIA Ampere GPU)",
    ),
    Claim(
        "and at least as accurate",
        Pick("accuracy", {"contender": "ConvFirst"}), ">=",
        Pick("accuracy", {"contender": "ConvNeXt"}),
        paper="similar ImageNet accuracy",
    ),
)  # fmt: skip


def draw(result: Result, path: Path) -> None:
    """Efficiency gaps of the networks, and times of blocks fused and layer by layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    gap, bars = figure.subplots(1, 2)
    colors = {name: f"C{i}" for i, name in enumerate(BLOCKS)}
    for row in result.rows:
        if "ideal_ms" not in row:
            continue
        name = row["network"]
        scores = [
            r["accuracy"] for r in result.rows
            if r["contender"] == name and r["widths"] == row["widths"]
        ]  # fmt: skip
        y = float(np.mean(scores))
        ideal, torch_ms, onnx_ms = row["ideal_ms"], row["torch_ms"], row["onnx_ms"]
        gap.plot([ideal, torch_ms], [y, y], color=colors[name], linewidth=0.8)
        gap.plot(ideal, y, "o", color=colors[name], markerfacecolor="none")
        gap.plot(torch_ms, y, "o", color=colors[name], label=name)
        gap.plot(onnx_ms, y, "s", color=colors[name], markersize=5)
    gap.set_xscale("log")
    gap.set_xlabel("ms a batch: ideal (open), torch (filled), ONNX Runtime (square)")
    gap.set_ylabel("test accuracy (%)")
    gap.legend(fontsize=7)
    gap.grid(alpha=0.3)
    blocks = [row for row in result.rows if str(row["contender"]).startswith("block: ")]
    names = [f"{r['contender'].removeprefix('block: ')}\n{r['shape']}" for r in blocks]
    places = np.arange(len(blocks))
    ratios = [r["ratio"] for r in blocks]
    errors = [
        [r["ratio"] - r["low"] for r in blocks],
        [r["high"] - r["ratio"] for r in blocks],
    ]
    bars.barh(places, ratios, xerr=errors, color=["C0" if r > 1 else "C3" for r in ratios])
    bars.axvline(1.0, color="black", linewidth=0.8)
    bars.set_yticks(places, names, fontsize=5)
    bars.set_xlabel("fastest layer-by-layer time / fused time (5th to 95th percentile)")
    bars.invert_yaxis()
    figure.savefig(path, dpi=120, format="png")


EXPERIMENT = Experiment(
    spec="convfirst",
    title="Operations, efficiency and block fusion",
    claims=CLAIMS,
    quick=quick,
    full=full,
    draw=draw,
)
