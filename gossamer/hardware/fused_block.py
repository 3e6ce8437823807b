"""Run a whole residual block strip by strip, and decide by measuring where that pays.

Layer by layer, a ConvFirst or MBConv block writes activations ``expand`` times as wide as its
input to memory and reads them again. Fused, a strip of rows goes through all three convolutions
while it lies in a nearby cache, so only the block's input, output and weights move. ConvFirst needs
a halo of its *input* rows alone; MBConv, whose convolution sits in the wide middle, keeps the last
expanded rows in a rolling buffer, so that nothing is computed twice.

Inference only: batch normalisation is folded into the convolutions, which batch statistics would
not admit. There are three executors: ``torch`` (strips in Python, the reference; not faster),
``numba`` (compiled for CPUs, :mod:`gossamer.parts.fused_kernels`) and ``triton`` (for GPUs,
ConvFirst only). :func:`plan_blocks` times fused against layer-by-layer for every block of a network
at its own shapes and keeps what is faster.

Source: Lavin, "On the efficiency of convolutional neural networks", arXiv:2404.03617 (block fusion
and its waterline); strip heights by the rule "half of the second cache" are ours.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from gossamer.core.errors import InputError
from gossamer.core.task import evaluating
from gossamer.hardware.calibrate import reported_caches
from gossamer.hardware.measure import Contender, compare, measure
from gossamer.models.convfirst import ConvFirst, MBConv

Backend = Literal["auto", "torch", "numba", "triton"]
Kind = Literal["convfirst", "mbconv"]

_LINES_OF_CHUNK = 96
"""Expanded channels a pass: with three vectors of pixels they fit into the nearest cache."""


class FoldedBlock(nn.Module):
    """A block of three convolutions with batch normalisation folded in, layer by layer.

    Args:
        kind: "convfirst" (convolution, expansion, activation, projection) or "mbconv" (expansion,
            activation, convolution, activation, projection).
        layers: convolution, expansion and projection, with biases.
        residual: whether the input is added.
    """

    def __init__(
        self, kind: Kind, layers: tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d], residual: bool
    ) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.conv, self.expand, self.project = layers
        self.residual = residual

    @classmethod
    def of(cls, block: nn.Module) -> FoldedBlock:
        """Folds a :class:`ConvFirst` or :class:`MBConv` block as it is in evaluation mode.

        Raises:
            InputError: if it is another module.
        """
        if isinstance(block, FoldedBlock):
            return block
        if isinstance(block, ConvFirst):
            norms = {"conv": block.bn1, "expand": block.bn2, "project": block.bn3}
            kind: Kind = "convfirst"
        elif isinstance(block, MBConv):
            norms = {"expand": block.bn1, "conv": block.bn2, "project": block.bn3}
            kind = "mbconv"
        else:
            raise InputError(
                f"{type(block).__name__} cannot be fused; ConvFirst and MBConv blocks can"
            )
        conv, expand, project = (
            _folded(getattr(block, name), norms[name]) for name in ("conv", "expand", "project")
        )
        return cls(kind, (conv, expand, project), block.residual).eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "convfirst":
            y = self.project(F.silu(self.expand(self.conv(x))))
        else:
            y = self.project(F.silu(self.conv(F.silu(self.expand(x)))))
        return y + x if self.residual else y


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    if norm.running_mean is None or norm.running_var is None:
        raise InputError("batch normalisation without running statistics cannot be folded")
    folded = copy.deepcopy(conv)
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
        norm.bias,
    )  # fmt: skip
    folded.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    folded.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return folded


def fuse_block(
    block: nn.Module, *, tile_rows: int | Literal["auto"] = "auto", backend: Backend = "auto"
) -> FusedBlock:
    """A block that runs strip by strip, for inference.

    Args:
        block: a ConvFirst or MBConv block, with batch normalisation as trained; unchanged.
        tile_rows: output rows of a strip; "auto" takes as many as fit into half of the second
            cache with everything a strip needs.
        backend: "numba" (CPU), "triton" (GPU, ConvFirst), "torch" (strips in Python, the reference)
            or "auto": by the device of the input.

    Raises:
        InputError: if the module is no such block, or an option is impossible.
    """
    return FusedBlock(FoldedBlock.of(block), tile_rows=tile_rows, backend=backend)


class FusedBlock(nn.Module):
    """What :func:`fuse_block` makes. Where gradients are needed, or while it is traced for export,
    it runs layer by layer.

    Args:
        folded: the block.
        tile_rows: output rows of a strip, or "auto".
        backend: see :func:`fuse_block`.
    """

    def __init__(
        self, folded: FoldedBlock, *, tile_rows: int | Literal["auto"], backend: Backend
    ) -> None:
        super().__init__()
        if tile_rows != "auto" and tile_rows < 1:
            raise InputError(f"a strip has at least one row, not {tile_rows}")
        if backend not in ("auto", "torch", "numba", "triton"):
            raise InputError(f"there is no backend {backend!r}; there are torch, numba and triton")
        if backend == "triton" and folded.kind != "convfirst":
            raise InputError("the Triton kernel is for ConvFirst blocks; use numba or torch")
        conv = folded.conv
        if conv.kernel_size[0] != conv.kernel_size[1] or conv.stride[0] != conv.stride[1]:
            raise InputError("the kernel and its stride must be square")
        self.folded = folded
        self.tile_rows = tile_rows
        self.backend: Backend = backend
        self._packed: tuple[np.ndarray, ...] | None = None
        self._rows: dict[tuple[int, int], int] = {}

    def rows(self, width: int, height: int) -> int:
        """Output rows of a strip for inputs of that size."""
        if (width, height) not in self._rows:
            self._rows[width, height] = self._choose_rows(width, height)
        return self._rows[width, height]

    def _choose_rows(self, width: int, height: int) -> int:
        out_height, _ = output_size(self.folded, height, width)
        if not isinstance(self.tile_rows, str):
            return min(self.tile_rows, out_height)
        room = _half_of_second_cache()
        rows = 1
        while rows < out_height and workspace_bytes(self.folded, width, rows + 1) <= room:
            rows += 1
        # Strips of equal height: a last one of one row would waste most of a tile.
        return math.ceil(out_height / math.ceil(out_height / rows))

    def forward(self, x: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or needs_gradient:
            return self.folded(x)
        if x.ndim != 4 or x.shape[1] != self._inputs:
            raise InputError(
                f"the block takes [batch, {self._inputs}, height, width], not {list(x.shape)}"
            )
        backend = self.backend
        if backend == "auto":
            backend = "triton" if x.is_cuda and self.folded.kind == "convfirst" else "numba"
            if x.device.type != "cpu" and backend == "numba":
                backend = "torch"
        if backend == "torch":
            strips = _strips_conv_first if self.folded.kind == "convfirst" else _strips_mb_conv
            with torch.no_grad():
                return strips(self.folded, x, self.rows(x.shape[3], x.shape[2]))
        if x.dtype != torch.float32:
            raise InputError(f"the {backend} kernel computes in float32, not {x.dtype}")
        if backend == "triton":
            return _on_gpu(self.folded, x)
        if x.device.type != "cpu":
            raise InputError(f"the numba kernel runs on the CPU, not on {x.device}")
        return self._compiled(x)

    @property
    def _inputs(self) -> int:
        first = self.folded.conv if self.folded.kind == "convfirst" else self.folded.expand
        return first.in_channels

    def _compiled(self, x: Tensor) -> Tensor:
        from gossamer.parts import fused_kernels

        folded = self.folded
        images = x.detach().contiguous()
        out_height, out_width = output_size(folded, x.shape[2], x.shape[3])
        out = torch.empty(len(x), folded.project.out_channels, out_height, out_width)
        if out.numel() == 0:
            return out
        chunk = chunk_of(folded)
        if self._packed is None:
            self._packed = _pack(folded, chunk)
        conv = folded.conv
        kernel: Any = (
            fused_kernels.conv_first if folded.kind == "convfirst" else fused_kernels.mb_conv
        )
        wide = folded.expand.out_channels
        if folded.kind == "convfirst":
            shape = (conv.out_channels, conv.groups, conv.kernel_size[0], conv.stride[0], wide)
        else:
            shape = (wide, conv.groups, conv.kernel_size[0], conv.stride[0], conv.out_channels)
        rows = self.rows(x.shape[3], x.shape[2])
        arguments = (
            shape, rows, chunk, fused_kernels.SILU, folded.residual, *self._packed
        )  # fmt: skip
        source, target = images.numpy(), out.numpy()
        total = len(x) * out_height
        threads = min(torch.get_num_threads(), math.ceil(total / rows))
        if threads == 1:
            kernel(source, target, 0, total, *arguments)
            return out
        ends = [round(total * i / threads) for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(
                pool.map(
                    lambda part: kernel(source, target, *part, *arguments),
                    itertools.pairwise(ends),
                )
            )
        return out


def _on_gpu(folded: FoldedBlock, x: Tensor) -> Tensor:
    try:
        from gossamer.parts.fused_triton import conv_first
    except ImportError as error:
        raise InputError("Triton is not installed; use the backend torch") from error
    parts = [(layer.weight, layer.bias) for layer in (folded.conv, folded.expand, folded.project)]
    weights: Any = tuple(tensor for part in parts for tensor in part)
    conv = folded.conv
    return conv_first(
        x.detach(), weights, groups=conv.groups, stride=conv.stride[0], residual=folded.residual
    )


def output_size(folded: FoldedBlock, height: int, width: int) -> tuple[int, int]:
    """Height and width of a block's output.

    Raises:
        InputError: if there is nothing in the image.
    """
    k, stride = folded.conv.kernel_size[0], folded.conv.stride[0]
    if min(height, width) < 1:
        raise InputError(f"an image of {height} x {width} has no pixels")
    size = [(side + 2 * (k // 2) - k) // stride + 1 for side in (height, width)]
    return size[0], size[1]


def chunk_of(folded: FoldedBlock) -> int:
    """Expanded channels that go through a strip together."""
    if folded.kind == "convfirst":
        return min(_LINES_OF_CHUNK, folded.expand.out_channels)
    per_group = folded.conv.out_channels // folded.conv.groups
    return per_group * max(1, _LINES_OF_CHUNK // per_group)


def workspace_bytes(folded: FoldedBlock, width: int, tile_rows: int) -> int:
    """Bytes that a strip needs beside the block's input and output, weights of a chunk included.

    Args:
        folded: the block.
        width: of the input, pixels.
        tile_rows: output rows of the strip.
    """
    conv, expand, project = folded.conv, folded.expand, folded.project
    k, stride = conv.kernel_size[0], conv.stride[0]
    lines, padded = (tile_rows - 1) * stride + k, width + 2 * (k // 2)
    pixels = tile_rows * output_size(folded, k, width)[1]
    chunk = chunk_of(folded)
    weights = chunk * (expand.in_channels + project.out_channels)
    sums = project.out_channels * pixels
    if folded.kind == "convfirst":
        elements = conv.in_channels * lines * padded + conv.out_channels * pixels + chunk * 48
    else:
        elements = expand.out_channels * lines * padded + chunk * pixels
    return 4 * (elements + sums + weights)


def block_bytes(
    folded: FoldedBlock,
    height: int,
    width: int,
    *,
    batch: int = 1,
    tile_rows: int | None = None,
    element: int = 4,
) -> int:
    """Modelled traffic of a block: compulsory bytes, each tensor of each kernel once.

    Args:
        folded: the block.
        height: of the input.
        width: of the input.
        batch: samples.
        tile_rows: None counts layer by layer, the sum of the three layers' inputs, outputs and
            weights. A height counts fused: input rows with the halo that a strip reads again
            (``(stride (rows - 1) + k) / (stride rows)``; a rolling buffer has none), output,
            weights once (they stay in a cache).
        element: bytes of a number.
    """
    conv, expand, project = folded.conv, folded.expand, folded.project
    out_height, out_width = output_size(folded, height, width)
    wide, narrow = height * width, out_height * out_width
    weights = sum(layer.weight.numel() for layer in (conv, expand, project))
    if tile_rows is None:
        if folded.kind == "convfirst":
            read = conv.in_channels * wide + (conv.out_channels + expand.out_channels) * narrow
            written = conv.out_channels + expand.out_channels + project.out_channels
            moved = batch * (read + written * narrow) + weights
        else:
            read = (expand.in_channels + expand.out_channels) * wide + conv.out_channels * narrow
            written = (
                expand.out_channels * wide + (conv.out_channels + project.out_channels) * narrow
            )
            moved = batch * (read + written) + weights
        return element * moved
    k, stride = conv.kernel_size[0], conv.stride[0]
    inputs = conv.in_channels if folded.kind == "convfirst" else expand.in_channels
    rows = height
    if folded.kind == "convfirst":
        strips = math.ceil(out_height / tile_rows)
        rows = height + (strips - 1) * max(0, k - stride)  # a halo between two strips
    return element * (batch * (inputs * rows * width + project.out_channels * narrow) + weights)


@cache
def _half_of_second_cache() -> int:
    second = next((c.bytes for c in reported_caches() if c.name == "L2"), 1 << 20)
    return second // 2


def _pack(folded: FoldedBlock, chunk: int) -> tuple[np.ndarray, ...]:
    from gossamer.parts.fused_kernels import pack_chunks, pack_rows

    conv, expand, project = (
        layer.weight.detach().cpu().float().numpy()
        for layer in (folded.conv, folded.expand, folded.project)
    )
    biases = [
        np.ascontiguousarray(layer.bias.detach().cpu().float().numpy())
        for layer in (folded.conv, folded.expand, folded.project)
        if layer.bias is not None
    ]
    convolution = (pack_rows(conv, folded.conv.groups), biases[0])
    expansion = (pack_rows(expand), biases[1])
    projection = (pack_chunks(project.reshape(len(project), -1), chunk), biases[2])
    if folded.kind == "convfirst":
        return (*convolution, *expansion, *projection)
    return (*expansion, *convolution, *projection)


# Strips in Python: what the kernels must agree with


def _strips_conv_first(block: FoldedBlock, x: Tensor, tile_rows: int) -> Tensor:
    conv, k, stride = block.conv, block.conv.kernel_size[0], block.conv.stride[0]
    pad, chunk = k // 2, chunk_of(block)
    out_height, _ = output_size(block, x.shape[2], x.shape[3])
    strips: list[Tensor] = []
    for y0 in range(0, out_height, tile_rows):
        rows = min(tile_rows, out_height - y0)
        strip = _rows_of(x, y0 * stride - pad, (rows - 1) * stride + k)
        t = F.conv2d(strip, conv.weight, conv.bias, stride, (0, pad), groups=conv.groups)
        assert block.project.bias is not None and block.expand.bias is not None
        sums = block.project.bias.view(1, -1, 1, 1).expand(len(x), -1, rows, t.shape[3])
        for begin in range(0, block.expand.out_channels, chunk):
            part = slice(begin, begin + chunk)
            a = F.silu(F.conv2d(t, block.expand.weight[part], block.expand.bias[part]))
            sums = sums + F.conv2d(a, block.project.weight[:, part])
        strips.append(sums + x[:, :, y0 : y0 + rows] if block.residual else sums)
    return torch.cat(strips, 2)


def _strips_mb_conv(block: FoldedBlock, x: Tensor, tile_rows: int) -> Tensor:
    conv, k, stride = block.conv, block.conv.kernel_size[0], block.conv.stride[0]
    pad = k // 2
    out_height, _ = output_size(block, x.shape[2], x.shape[3])
    held = x.new_zeros(len(x), block.expand.out_channels, 0, x.shape[3])  # rows from `first` on
    first = ready = -pad
    strips: list[Tensor] = []
    for y0 in range(0, out_height, tile_rows):
        rows = min(tile_rows, out_height - y0)
        top, end = y0 * stride - pad, (y0 + rows - 1) * stride - pad + k
        ready = max(ready, top)
        inside = _rows_of(x, ready, end - ready)
        expanded = F.silu(block.expand(inside))
        # Outside of the image the convolution sees zeros, not the activated bias.
        outside = torch.tensor([not 0 <= y < x.shape[2] for y in range(ready, end)])
        expanded[:, :, outside.to(x.device)] = 0
        held = torch.cat([held[:, :, top - first :], expanded], 2)
        first, ready = top, end
        a = F.silu(F.conv2d(held, conv.weight, conv.bias, stride, (0, pad), groups=conv.groups))
        sums = block.project(a)
        strips.append(sums + x[:, :, y0 : y0 + rows] if block.residual else sums)
    return torch.cat(strips, 2)


def _rows_of(x: Tensor, begin: int, count: int) -> Tensor:
    """Rows of an image, zeros outside of it."""
    inside = x[:, :, max(0, begin) : max(0, min(x.shape[2], begin + count))]
    above = min(count, max(0, -begin))
    return F.pad(inside, (0, 0, above, count - above - inside.shape[2]))


# Which blocks of a network to fuse


@dataclass(frozen=True)
class BlockPlan:
    """What was measured of one block, and what was decided.

    Attributes:
        name: dotted path of the block.
        kind: "convfirst" or "mbconv".
        input_shape: batch, channels, height, width.
        tile_rows: output rows of a strip.
        unfused_ms: median of a call layer by layer, batch normalisation folded.
        fused_ms: median of a fused call.
        ratio: time layer by layer over time fused, median over rounds: above 1 fused is faster.
        low: 5th percentile of the rounds' ratios.
        high: 95th percentile.
        fused: whether the fused form is used: only where it is faster beyond the noise.
        said: the decision in words.
    """

    name: str
    kind: Kind
    input_shape: tuple[int, ...]
    tile_rows: int
    unfused_ms: float
    fused_ms: float
    ratio: float
    low: float
    high: float
    fused: bool
    said: str


def plan_blocks(
    network: nn.Module,
    inputs: Sequence[Tensor],
    *,
    threads: int = 1,
    rounds: int = 15,
    round_ms: float = 15.0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[nn.Module, list[BlockPlan]]:
    """Fuses the blocks of a network that are faster fused, at the shapes they have in it.

    Args:
        network: unchanged.
        inputs: positional arguments of one call, at the batch size and in the memory format that
            the network will be run with.
        threads: of torch and the kernels.
        rounds: turns of each contender.
        round_ms: time a contender has in a round, milliseconds.
        clock: see :func:`gossamer.hardware.measure.measure`.

    Returns:
        A copy whose ConvFirst and MBConv blocks are fused where that was faster beyond the noise,
        and folded (batch normalisation in the convolutions) elsewhere; and what was measured, one
        row for each block. Blocks of one shape are measured once.

    Raises:
        InputError: if the network has no such block.
    """
    chosen = copy.deepcopy(network).eval()
    blocks = {n: m for n, m in chosen.named_modules() if isinstance(m, ConvFirst | MBConv)}
    if not blocks:
        raise InputError(f"{type(network).__name__} has no ConvFirst or MBConv block")
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen[name] = arguments[0].detach()

        return hook

    handles = [block.register_forward_pre_hook(remember(n)) for n, block in blocks.items()]
    with evaluating(chosen):
        chosen(*inputs)
    for handle in handles:
        handle.remove()
    known: dict[tuple[Any, ...], BlockPlan] = {}
    plans: list[BlockPlan] = []
    for name, block in blocks.items():
        if name not in seen:
            continue
        x = seen[name]
        folded = FoldedBlock.of(block)
        key = (
            folded.kind, tuple(x.shape), x.stride(), folded.conv.groups, folded.conv.kernel_size,
            folded.conv.stride, folded.expand.out_channels, folded.project.out_channels,
        )  # fmt: skip
        if key not in known:
            rows = tuned_rows(folded, x, threads=threads, clock=clock)
            fused = fuse_block(folded, tile_rows=rows)
            known[key] = _timed(name, folded, fused, x, threads, rounds, round_ms, clock)
        plan = known[key]
        plans.append(replace(plan, name=name))
        fused = fuse_block(folded, tile_rows=plan.tile_rows)
        _replace(chosen, name, fused if plan.fused else folded)
    return chosen, plans


def tuned_rows(
    folded: FoldedBlock,
    x: Tensor,
    *,
    threads: int = 1,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """The fastest height of strips for an input, among a few around what "auto" takes.

    Args:
        folded: the block.
        x: the input, ``[batch, channels, height, width]``.
        threads: of the kernel.
        rounds: turns of each height.
        clock: see :func:`gossamer.hardware.measure.measure`.

    Returns:
        Output rows of a strip: what "auto" takes, half or twice as many, or all.
    """
    height, width = x.shape[2:]
    high = output_size(folded, height, width)[0]
    first = fuse_block(folded).rows(width, height)
    heights = sorted({max(1, first // 2), first, min(high, 2 * first), high})
    if len(heights) == 1:
        return first
    contenders: dict[str, Contender] = {
        str(rows): fuse_block(folded, tile_rows=rows) for rows in heights
    }
    timings = measure(
        contenders, (x,), batch_sizes=(len(x),), threads=(threads,), runtimes=("torch",),
        rounds=rounds, round_ms=5.0, warmup_ms=10.0, clock=clock,
    )  # fmt: skip
    return int(min(timings, key=lambda t: float(np.median(t.rounds))).name)


def _timed(
    name: str, folded: FoldedBlock, fused: FusedBlock, x: Tensor, threads: int, rounds: int,
    round_ms: float, clock: Callable[[], float],
) -> BlockPlan:  # fmt: skip
    # A callable is measured with the very tensor, whose memory format counts.
    def layer_by_layer(_: Tensor) -> Tensor:
        with torch.inference_mode():
            return folded(x)

    def fused_at_once(_: Tensor) -> Tensor:
        with torch.inference_mode():
            return fused(x)

    unfused_timing, fused_timing = measure(
        {"layer by layer": layer_by_layer, "fused": fused_at_once}, (x,),
        batch_sizes=(len(x),), threads=(threads,), runtimes=("torch",), rounds=rounds,
        round_ms=round_ms, warmup_ms=50.0, clock=clock,
    )  # fmt: skip
    result = compare(unfused_timing, fused_timing)
    wins = result.winner == "fused"
    if wins:
        said = f"fused: {result.ratio:.2f}x as fast as layer by layer"
    elif result.winner:
        said = f"layer by layer: no kernel here beats it on this shape ({result.ratio:.2f}x)"
    else:
        said = (
            f"layer by layer: the fused kernel is not faster beyond the noise ({result.ratio:.2f}x)"
        )
    return BlockPlan(
        name, folded.kind, tuple(x.shape), fused.rows(x.shape[3], x.shape[2]),
        unfused_timing.latency.p50, fused_timing.latency.p50, result.ratio, result.low,
        result.high, wins, said,
    )  # fmt: skip


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)
