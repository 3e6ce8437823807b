"""Packed layers of signs against float32 layers of the same shapes in torch.

A packed layer takes float32 activations and gives float32 results: packing the activations, the
XNOR-popcount product and the result's conversion are all inside of the timed call. Before it is
timed, every layer is compared with the simulated binary layer (a float32 layer of signs on signs):
the results must be equal bit for bit. Both take turns in one process.

    python benchmarks/binary_kernels.py --json benchmarks/results/binary_kernels.json

Target: at least four times as fast from 256 channels on, one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.compress.quantize.binary import sign_of
from gossamer.core.experiment import about
from gossamer.hardware.measure import compare, measure
from gossamer.parts.binary_kernels import BinaryKernel

TARGET = 4.0
# batch, inputs, outputs, side, kernel, stride, groups
CONVOLUTIONS = [
    (1, 64, 64, 56, 3, 1, 1),
    (1, 128, 128, 28, 3, 1, 1),
    (1, 256, 256, 14, 3, 1, 1),
    (16, 256, 256, 14, 3, 1, 1),
    (1, 256, 256, 28, 3, 1, 1),
    (1, 256, 512, 14, 3, 2, 1),
    (1, 512, 512, 7, 3, 1, 1),
    (16, 512, 512, 7, 3, 1, 1),
    (1, 512, 512, 14, 3, 1, 2),
    (1, 300, 300, 14, 3, 1, 1),
]
# rows, inputs, outputs
LINEARS = [
    (1, 1024, 1024),
    (1, 4096, 4096),
    (64, 256, 256),
    (64, 1024, 1024),
    (128, 512, 512),
    (128, 768, 3072),
    (1024, 2304, 256),
    (256, 4608, 512),
    (1024, 576, 64),
]


def contender(layer: nn.Module) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The packed layer, and the simulated one that it must equal."""
    kernel = BinaryKernel(layer.weight.detach())
    signs = sign_of(layer.weight.detach())
    if isinstance(layer, nn.Linear):
        return (
            lambda x: kernel.linear(x, layer.bias),
            lambda x: F.linear(sign_of(x), signs) + layer.bias,
        )
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return (
        lambda x: kernel.conv2d(x, layer.bias, *geometry),
        lambda x: F.conv2d(sign_of(x), signs, None, *geometry) + layer.bias[:, None, None],
    )


def measured(kind: str, shape: tuple[int, ...], layer: nn.Module, x: Tensor, rounds: int) -> dict:
    layer.requires_grad_(False)
    packed, simulated = contender(layer)
    with torch.inference_mode():
        exact = bool(torch.equal(packed(x), simulated(x)))

        # Plain callables, so that both are called alike.
        timings = measure(
            {"float32": lambda x: layer(x), "packed": lambda x: packed(x)}, (x,),
            batch_sizes=(len(x),), runtimes=("torch",), rounds=rounds,
        )  # fmt: skip
    ratio = compare(*timings)
    channels = min(shape[1:3])
    return {
        "kind": kind,
        "shape": list(shape),
        "float32_ms": timings[0].latency.p50,
        "packed_ms": timings[1].latency.p50,
        "ratio": ratio.ratio,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "bit_exact": exact,
        "counts": channels >= 256,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for shape in CONVOLUTIONS:
        batch, inputs, outputs, side, kernel, stride, groups = shape
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        x = torch.randn(batch, inputs, side, side)
        rows.append(measured("convolution", shape, layer, x, options.rounds))
        print(json.dumps(rows[-1]), flush=True)
    for shape in LINEARS:
        x = torch.randn(shape[0], shape[1])
        rows.append(measured("linear", shape, nn.Linear(*shape[1:]), x, options.rounds))
        print(json.dumps(rows[-1]), flush=True)
    judged = [row["ratio"] for row in rows if row["counts"]]
    summary = {
        "target": TARGET,
        "layers": len(judged),
        "reach_target": sum(ratio >= TARGET for ratio in judged),
        "least": min(judged),
        "median": float(np.median(judged)),
        "bit_exact": all(row["bit_exact"] for row in rows),
    }
    print(json.dumps(summary, indent=1))
    if options.json:
        content = {"about": about(), "rows": rows, "summary": summary}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
