"""ConvFirst and MBConv blocks fused against layer by layer, one thread.

Batch normalisation is folded into the convolutions on all sides. Contenders take turns in one
process: the fused kernel, torch eager in both memory formats (the channels-last one is given a
channels-last input), torch.compile (inductor, weights frozen) and ONNX Runtime. Times are of the
processor, so that other programs do not count. Before it is timed the fused result is compared with
the block.

    python benchmarks/fused_block.py --json benchmarks/results/fused_block.json

Target: faster than the fastest of the others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.experiment import about
from gossamer.core.export import OnnxRunner, onnx_model
from gossamer.hardware.fused_block import FoldedBlock, fuse_block, tuned_rows
from gossamer.hardware.measure import compare, measure
from gossamer.models.convfirst import ConvFirst, MBConv

# block, channels, side, kernel, expansion, group width, stride, batch
SHAPES = [
    ("ConvFirst", 64, 64, 3, 6, 8, 1, 1),
    ("ConvFirst", 64, 64, 3, 6, 8, 1, 8),
    ("ConvFirst", 64, 64, 5, 6, 8, 1, 1),
    ("ConvFirst", 64, 64, 7, 4, 8, 1, 1),
    ("ConvFirst", 64, 64, 3, 6, 8, 2, 1),
    ("ConvFirst", 32, 64, 3, 6, 8, 1, 1),
    ("ConvFirst", 32, 64, 3, 6, 8, 1, 8),
    ("ConvFirst", 128, 28, 3, 6, 8, 1, 1),
    ("ConvFirst", 128, 28, 3, 6, 8, 1, 8),
    ("ConvFirst", 256, 14, 3, 6, 8, 1, 1),
    ("ConvFirst", 256, 14, 3, 6, 8, 1, 8),
    ("ConvFirst", 256, 7, 3, 6, 8, 1, 1),
    ("MBConv", 64, 64, 3, 6, 8, 1, 1),
    ("MBConv", 64, 64, 3, 6, 8, 1, 8),
    ("MBConv", 64, 64, 3, 6, 1, 1, 1),
    ("MBConv", 64, 64, 3, 6, 1, 1, 8),
    ("MBConv", 128, 28, 3, 6, 1, 1, 1),
    ("MBConv", 256, 14, 3, 6, 1, 1, 1),
]


def contenders(folded: FoldedBlock, x: torch.Tensor) -> dict[str, Callable[..., Any]]:
    """Calls by name; each ignores its argument and runs on an input of its own format."""
    runner = OnnxRunner(
        onnx_model(folded, (torch.randn(2, *x.shape[1:]),)).SerializeToString(), threads=1
    )
    feed = runner.feed(x)
    torch.compiler.reset()
    compiled = torch.compile(folded)
    nhwc = x.to(memory_format=torch.channels_last)
    fused = fuse_block(folded, tile_rows=tuned_rows(folded, x, clock=time.process_time))

    def call(module: Callable[..., Any], tensor: torch.Tensor) -> Callable[..., Any]:
        def run(_: Any) -> Any:
            with torch.no_grad():
                return module(tensor)

        return run

    return {
        "fused": call(fused, x),
        "torch": call(folded, x),
        "torch, channels last": call(folded, nhwc),
        "torch.compile": call(compiled, x),
        "torch.compile, channels last": call(compiled, nhwc),
        "ONNX Runtime": lambda _: runner.session.run(None, feed),
    }


def main() -> None:
    """Measures every shape and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    import torch._inductor.config

    torch._inductor.config.freezing = True
    torch.set_num_threads(1)
    rows = []
    for kind, channels, side, kernel, expand, width, stride, batch in SHAPES:
        torch.manual_seed(0)
        make = {"ConvFirst": ConvFirst, "MBConv": MBConv}[kind]
        block: nn.Module = make(
            channels, channels, kernel=kernel, expand=expand, group_width=width, stride=stride
        ).eval()
        x = torch.randn(batch, channels, side, side)
        folded = FoldedBlock.of(block)
        with torch.no_grad():
            gap = float((fuse_block(folded)(x) - block(x)).abs().max())
        assert gap < 1e-4, gap
        timings = {
            t.name: t
            for t in measure(
                contenders(folded, x), (x,), batch_sizes=(batch,), runtimes=("torch",),
                rounds=options.rounds, round_ms=30.0, clock=time.process_time,
            )
        }  # fmt: skip
        others = {n: compare(t, timings["fused"]) for n, t in timings.items() if n != "fused"}
        best = min(others, key=lambda n: float(np.median(timings[n].rounds)))
        row = {
            "block": kind, "channels": channels, "side": side, "kernel": kernel, "expand": expand,
            "group_width": width, "stride": stride, "batch": batch, "difference": gap,
            "ms": {n: t.latency.p50 for n, t in timings.items()},
            "fastest_other": best,
            "ratio": others[best].ratio, "low": others[best].low, "high": others[best].high,
            "winner": others[best].winner,
            "ratios": {n: [c.ratio, c.low, c.high] for n, c in others.items()},
        }  # fmt: skip
        rows.append(row)
        print(
            f"{kind} {channels} ch {side}x{side} k{kernel} r{expand} gw{width} s{stride} b{batch}: "
            f"fused {row['ms']['fused']:.2f} ms, {best} {row['ms'][best]:.2f} ms, "
            f"{others[best]}",
            flush=True,
        )
    wins = sum(row["winner"] == "fused" for row in rows)
    print(f"fused is fastest on {wins} of {len(rows)} shapes")
    if options.json:
        options.json.write_text(
            json.dumps({"about": about(rounds=options.rounds), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
