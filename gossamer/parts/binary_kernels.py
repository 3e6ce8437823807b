"""Products of signs: XNOR and popcount over packed bits, compiled on first use.

A vector of values in {-1, +1} is one bit a value (1 for +1), 64 to a word, the first in the lowest
bit. Of two such vectors of ``n`` values the dot product is ``n - 2 popcount(a xor b)``: the bits
that fill the last word are 0 on both sides and cancel. Results are integers and therefore exact:
they equal what a float32 product of the same signs gives, bit for bit, below 2^24 values.

The first operand is broadcast word by word, the second lies in lanes, so that one vector
instruction serves as many results as it has lanes and nothing is summed across lanes. LLVM compiles
it for the processor at hand (VPOPCNTDQ where there is AVX-512, table look-ups otherwise). Compiled
code is kept in memory only, so it needs no folder that can be written.

Source: Rastegari et al., "XNOR-Net", arXiv:1603.05279, section 3.2; packing and padding as in Qin
et al., "BiBench", arXiv:2301.11233, section 4.2 (deployment).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, ClassVar, Self

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor, fx

from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.graph import op_name
from gossamer.parts.packing import pack, packed_bytes, unpack
from gossamer.parts.stored import Kernel, Stored, shape_of

WORD = 64
LANES = 8
"""Results are computed in whole vectors of at least this many words (512 bits)."""
BLOCK = 64
"""Results a pass: their operands fit into the nearest cache."""


def _count_bits(typing_context: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


_popcount: Any = intrinsic(_count_bits)


def _compare_word(typing_context: Any, x: Any, least: Any, start: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.get_value_type(x.dtype)
        vector = ir.VectorType(number, WORD)

        def load(kind: Any, array: Any) -> Any:
            data = context.make_array(kind)(context, builder, array).data
            place = builder.gep(data, [arguments[2]])
            place = builder.bitcast(place, vector.as_pointer())
            return builder.load(place, align=x.dtype.bitwidth // 8)

        reached = builder.fcmp_ordered(">=", load(x, arguments[0]), load(least, arguments[1]))
        return builder.bitcast(reached, ir.IntType(WORD))

    return types.uint64(x, least, types.intp), generate


_reached: Any = intrinsic(_compare_word)
"""``_reached(x, least, start)``: 64 comparisons of contiguous arrays of one type as one word. A
loop over single bits costs more than twice as much."""


@numba.njit(nogil=True)
def _pack_rows(x: np.ndarray, thresholds: np.ndarray, flips: np.ndarray, words: np.ndarray) -> None:
    """Packs where rows ``[m, k]`` reach their thresholds, into words ``[m, ceil(k / 64)]``."""
    whole = x.shape[1] // 64
    for m in range(x.shape[0]):
        row = x[m]
        for w in range(whole):
            words[m, w] = _reached(row, thresholds, w * 64) ^ flips[w]
        for w in range(whole, words.shape[1]):
            word = np.uint64(0)
            for k in range(w * 64, x.shape[1]):
                word |= np.uint64(row[k] >= thresholds[k]) << np.uint64(k - w * 64)
            words[m, w] = word ^ flips[w]


@numba.njit(nogil=True)
def _pack_planes(
    x: np.ndarray, thresholds: np.ndarray, flips: np.ndarray, words: np.ndarray
) -> None:
    """Packs channels ``[c, pixels]`` into words along the channels, ``[ceil(c / 64), pixels]``."""
    for w in range(words.shape[0]):
        plane = words[w]
        for p in range(plane.size):
            plane[p] = flips[w]
        for c in range(w * 64, min(x.shape[0], w * 64 + 64)):
            bit = np.uint64(c - w * 64)
            channel, least = x[c], thresholds[c]
            for p in range(plane.size):
                plane[p] ^= np.uint64(channel[p] >= least) << bit


@numba.njit(nogil=True)
def _product(a: np.ndarray, b: np.ndarray, length: int, out: np.ndarray) -> None:
    """Dot products of ``a`` ``[i, words]`` and ``b`` ``[words, lanes]`` into ``out`` ``[i, j]``.

    ``b`` has as many lanes as ``out`` has columns, rounded up to whole vectors.
    """
    rows, words = a.shape
    first, second = np.empty(64, np.uint64), np.empty(64, np.uint64)
    for start in range(0, out.shape[1], 64):
        count = min(64, out.shape[1] - start)
        stop = start + min(64, (count + 7) // 8 * 8)
        lanes = stop - start
        # Two rows share each load of b; four words a pass keep the sums out of memory.
        for i in range(0, rows, 2):
            pair = min(i + 1, rows - 1)
            for j in range(lanes):
                first[j] = 0
                second[j] = 0
            k = 0
            while k + 4 <= words:
                a0, a1, a2, a3 = a[i, k], a[i, k + 1], a[i, k + 2], a[i, k + 3]
                c0, c1, c2, c3 = a[pair, k], a[pair, k + 1], a[pair, k + 2], a[pair, k + 3]
                b0, b1 = b[k, start:stop], b[k + 1, start:stop]
                b2, b3 = b[k + 2, start:stop], b[k + 3, start:stop]
                for j in range(lanes):
                    w0, w1, w2, w3 = b0[j], b1[j], b2[j], b3[j]
                    first[j] += (
                        _popcount(a0 ^ w0) + _popcount(a1 ^ w1)
                        + _popcount(a2 ^ w2) + _popcount(a3 ^ w3)
                    )  # fmt: skip
                    second[j] += (
                        _popcount(c0 ^ w0) + _popcount(c1 ^ w1)
                        + _popcount(c2 ^ w2) + _popcount(c3 ^ w3)
                    )  # fmt: skip
                k += 4
            while k < words:
                a0, c0 = a[i, k], a[pair, k]
                b0 = b[k, start:stop]
                for j in range(lanes):
                    first[j] += _popcount(a0 ^ b0[j])
                    second[j] += _popcount(c0 ^ b0[j])
                k += 1
            # A view for each row: only then does LLVM know that the results lie side by side.
            upper, lower = out[i, start : start + count], out[pair, start : start + count]
            for j in range(count):
                upper[j] = np.float32(length - 2 * np.int64(first[j]))
            for j in range(count):
                lower[j] = np.float32(length - 2 * np.int64(second[j]))


@numba.njit(nogil=True)
def _columns(
    words: np.ndarray, sizes: tuple[int, ...], geometry: tuple[int, ...], columns: np.ndarray
) -> None:
    """Words ``[w, height * width]`` that each tap of a kernel sees, ``[taps * w, lanes]``.

    Outside of the image the bits are 0 (-1); see ``_border``.
    """
    height, width, out_height, out_width = sizes
    kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, step_y, step_x = geometry
    planes = words.shape[0]
    for ky in range(kernel_y):
        for kx in range(kernel_x):
            offset = kx * step_x - pad_x
            # Outputs whose pixel lies inside: 0 <= ox * stride + offset < width.
            low = min(out_width, max(0, (-offset + stride_x - 1) // stride_x))
            high = max(low, min(out_width, (width - 1 - offset) // stride_x + 1))
            for w in range(planes):
                row = columns[(ky * kernel_x + kx) * planes + w]
                for oy in range(out_height):
                    y = oy * stride_y + ky * step_y - pad_y
                    part = row[oy * out_width : (oy + 1) * out_width]
                    inside = 0 <= y < height
                    first, last = (low, high) if inside else (out_width, out_width)
                    for ox in range(first):
                        part[ox] = 0
                    for ox in range(last, out_width):
                        part[ox] = 0
                    if not inside:
                        continue
                    source = words[w, y * width : (y + 1) * width]
                    if stride_x == 1:
                        for ox in range(low, high):
                            part[ox] = source[ox + offset]
                    else:
                        for ox in range(low, high):
                            part[ox] = source[ox * stride_x + offset]


@numba.njit(nogil=True)
def _convolve(
    x: np.ndarray,
    thresholds: np.ndarray,
    flips: np.ndarray,
    weights: np.ndarray,
    length: int,
    sizes: tuple[int, ...],
    geometry: tuple[int, ...],
    positions: np.ndarray,
    corrections: np.ndarray,
    out: np.ndarray,
) -> None:
    """Convolves ``x`` ``[batch, groups, channels, height * width]``.

    ``thresholds`` is ``[groups, channels]``, ``flips`` ``[groups, words]``, ``weights``
    ``[groups, outputs, words]`` and ``out`` ``[batch, groups, outputs, pixels]``.
    """
    channels, pixels = x.shape[2], x.shape[3]
    planes = np.empty(((channels + 63) // 64, pixels), np.uint64)
    columns = np.zeros((weights.shape[2], (out.shape[3] + 7) // 8 * 8), np.uint64)
    for b in range(x.shape[0]):
        for g in range(x.shape[1]):
            _pack_planes(x[b, g], thresholds[g], flips[g], planes)
            _columns(planes, sizes, geometry, columns)
            _product(weights[g], columns, length, out[b, g])
            for o in range(out.shape[2]):
                for n in range(positions.size):
                    out[b, g, o, positions[n]] += corrections[g, o, n]


# What torch sees


def pack_signs(x: Tensor) -> np.ndarray:
    """Packs the signs of the last axis; 0 counts as positive.

    Args:
        x: ``[..., k]``, on the CPU.

    Returns:
        uint64 ``[rows, ceil(k / 64)]``, the leading axes flattened.
    """
    rows = _array(x.reshape(-1, x.shape[-1]))
    words = np.empty((len(rows), -(-rows.shape[1] // WORD)), np.uint64)
    zeros = np.zeros(rows.shape[1], rows.dtype), np.zeros(words.shape[1], np.uint64)
    _pack_rows(rows, *zeros, words)
    return words


def integer_thresholds(positive: Tensor) -> tuple[Tensor, Tensor] | None:
    """Turns a condition on integers into one comparison for each channel.

    Whatever monotone arithmetic lies between a product of signs and the next sign (a scale, a
    normalisation, a clipped activation), the next sign is a comparison of an integer. From a table
    of the signs for every integer that can occur, computed with the arithmetic itself, the same
    signs come back bit for bit, rounding included.

    Args:
        positive: bool ``[channels, 2 n + 1]``, the sign for the integers ``-n`` to ``n``.

    Returns:
        ``(threshold, flipped)``, ``[channels]``: the sign is + where the integer is at least
        ``threshold``, and where ``flipped`` where it is below. None if some channel changes its
        sign twice.
    """
    if bool(((positive[:, 1:] != positive[:, :-1]).sum(1) > 1).any()):
        return None
    flipped = positive[:, 0] & ~positive[:, -1]
    below = (positive == flipped[:, None]).sum(1)  # how many integers lie below the threshold
    return (below - (positive.shape[1] - 1) // 2).to(torch.int64), flipped


class BinaryKernel(Kernel):
    """Multiplies with a packed matrix or convolution kernel of signs.

    Inputs are binarized by their sign (0 counts as positive); results are exact integers in
    float32, to which the bias is added. Zero padding adds nothing, as in a float convolution: a
    table made once for each input size takes back what the padding bits count. Work is divided
    among torch's threads.

    Args:
        weight: ``[outputs, inputs]`` or ``[outputs, inputs / groups, height, width]``; only signs
            count.
    """

    def __init__(self, weight: Tensor) -> None:
        signs = torch.where(weight >= 0, 1.0, -1.0)
        self.outputs = len(signs)
        self.inputs = int(signs.shape[1])
        self.side = tuple(signs.shape[2:])
        self.length = signs[0].numel()
        if signs.ndim == 2:
            words = pack_signs(signs).T
            self.words = np.zeros((len(words), -(-self.outputs // LANES) * LANES), np.uint64)
            self.words[:, : self.outputs] = words
        else:
            # Taps first, then the words of the channels: the order of _columns.
            words = pack_signs(signs.permute(0, 2, 3, 1))
            self.words = words.reshape(self.outputs, -1)
            self.sums = signs.sum(1)
        self.thresholds: np.ndarray | None = None
        self.flips: np.ndarray | None = None
        self._border: tuple[Any, np.ndarray, np.ndarray] | None = None

    def reads(self, source: fx.Node) -> fx.Node | None:
        """The input of a sign, which the kernel takes itself; None for what is no sign."""
        node = source
        if _is(node, "pad", "constant_pad_nd") and _number(node, 3 if _is(node, "pad") else 2, 1.0):
            # Padded with +1: the padding is part of the image.
            return node if sign_input(node.args[0]) is not None else None
        return sign_input(node)

    def settle(self, program: fx.GraphModule, node: fx.Node) -> Kernel:
        """Takes what is computed for each channel before its signs into thresholds, exactly.

        Between two products of signs that is everything (scale, normalisation, activation, shift):
        the second compares the integers of the first. Elsewhere it is a shift.
        """
        shape = (-1, 1, 1) if self.side else (-1,)
        chain: list[tuple[fx.Node, Any]] = []
        at = node.args[0]
        while isinstance(at, fx.Node) and (step := _step(program, at, shape)) is not None:
            chain.append((at, step))
            at = step[0]
        source = None
        if isinstance(at, fx.Node) and at.op == "call_module" and at.args[1:2] in ((), (None,)):
            source = getattr(program.get_submodule(str(at.target)), "kernel", None)
        if not chain:
            return self
        settled = copy.copy(self)
        if isinstance(source, BinaryKernel) and bool(source.side) == bool(self.side):
            dots = torch.arange(-source.length, source.length + 1, dtype=torch.float32)
            value = dots.view(1, 1, -1) if self.side else dots.view(-1, 1)
            for operator, (_, arguments) in reversed(chain):
                target: Any = operator.target
                value = target(*[value if a is _INPUT else a for a in arguments])
            value = value.squeeze(1) if self.side else value.T
            found = integer_thresholds((value >= 0).expand(source.outputs, -1))
            if found is not None:
                threshold, flipped = found
                settled.thresholds = threshold.to(torch.float32).numpy()
                groups = source.outputs // self.inputs
                settled.flips = pack_signs(flipped.view(groups, -1).float() - 0.5)
                node.update_arg(0, at)
                return settled
        first, (before, arguments) = chain[0]
        if op_name(first.target) != "add" or len(arguments) != 2:
            return self
        # x + t >= 0 exactly where x >= -t: a float sum is 0 only if it is exactly 0.
        (shift,) = [torch.as_tensor(a) for a in arguments if a is not _INPUT]
        groups = self._groups(node)
        wide = shift.flatten().expand(self.inputs * groups)
        settled.thresholds = (-wide).contiguous().float().numpy()
        settled.flips = np.zeros((groups, -(-self.inputs // WORD)), np.uint64)
        node.update_arg(0, before)
        return settled

    def _groups(self, node: fx.Node) -> int:
        groups = node.args[5] if len(node.args) > 5 else 1
        return groups if isinstance(groups, int) else 1

    def _binarizing(self, groups: int, kind: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Thresholds ``[groups, inputs]`` of the type of the input; flips ``[groups, words]``."""
        if self.thresholds is None or self.flips is None:
            words = -(-self.inputs // WORD)
            return np.zeros((groups, self.inputs), kind), np.zeros((groups, words), np.uint64)
        return self.thresholds.reshape(groups, self.inputs).astype(kind, copy=False), self.flips

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[-1] != self.inputs:
            raise InputError(f"the layer takes {self.inputs} values, not {x.shape[-1]}")
        rows = _array(x.reshape(-1, self.inputs))
        y = torch.empty(*x.shape[:-1], self.outputs)
        out = y.numpy().reshape(len(rows), self.outputs)
        thresholds, flips = self._binarizing(1, rows.dtype)

        def work(low: int, high: int) -> None:
            words = np.empty((high - low, len(self.words)), np.uint64)
            _pack_rows(rows[low:high], thresholds[0], flips[0], words)
            _product(words, self.words, self.length, out[low:high])

        _share(work, len(rows))
        y = y.to(_result_type(x))
        return y if bias is None else y + bias

    def conv2d(
        self,
        x: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        batch, channels, height, width = x.shape
        if channels != self.inputs * groups or self.outputs % groups:
            raise InputError(f"the layer takes {self.inputs * groups} channels, not {channels}")
        out_height, out_width = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(
                (height, width), padding, dilation, self.side, stride, strict=True
            )
        )
        if min(out_height, out_width) < 1:
            raise InputError(f"images of {height} x {width} are smaller than the layer's kernel")
        geometry = (*self.side, *stride, *padding, *dilation)
        sizes = (height, width, out_height, out_width)
        positions, corrections = self._corrections(sizes, geometry, groups)
        images = _array(x).reshape(batch, groups, self.inputs, height * width)
        thresholds, flips = self._binarizing(groups, images.dtype)
        weights = self.words.reshape(groups, self.outputs // groups, -1)
        y = torch.empty(batch, self.outputs, out_height, out_width)
        out = y.numpy().reshape(batch, groups, self.outputs // groups, out_height * out_width)

        def work(low: int, high: int) -> None:
            _convolve(
                images[low:high], thresholds, flips, weights, self.length, sizes, geometry,
                positions, corrections, out[low:high],
            )  # fmt: skip

        def work_on_channels(low: int, high: int) -> None:
            _convolve(
                images, thresholds, flips, weights[:, low:high], self.length, sizes, geometry,
                positions, corrections[:, low:high], out[:, :, low:high],
            )  # fmt: skip

        if batch >= torch.get_num_threads():
            _share(work, batch)
        else:
            _share(work_on_channels, self.outputs // groups)
        y = y.to(_result_type(x))
        return y if bias is None else y + bias[:, None, None]

    def _corrections(
        self, sizes: tuple[int, ...], geometry: tuple[int, ...], groups: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels that see padding, and what is added there, ``[groups, outputs, pixels]``.

        Padding bits count as -1: each padded tap took away the sum of its weights.
        """
        key = (sizes, geometry, groups)
        if self._border is None or self._border[0] != key:
            inside = []
            for axis in (0, 1):
                kernel, stride, pad, step = geometry[axis::2]
                at = torch.arange(sizes[2 + axis])[:, None] * stride - pad
                at = at + torch.arange(kernel) * step
                inside.append(((at >= 0) & (at < sizes[axis])).float())
            seen = torch.einsum("yk,xl->yxkl", *inside).flatten(2).flatten(0, 1)
            positions = torch.nonzero((seen == 0).any(1)).flatten()
            lost = self.sums.flatten(1) @ (1 - seen[positions]).T
            table = lost.reshape(groups, self.outputs // groups, -1).contiguous()
            self._border = (key, positions.numpy(), table.numpy())
        return self._border[1], self._border[2]


class BinaryTensor(Stored):
    """Signs, one bit each.

    Args:
        bits: uint8, eight signs a byte in row-major order, 1 for +1.
        shape: of the tensor.
    """

    codec: ClassVar[str] = "binary"

    def __init__(self, bits: Tensor, shape: Sequence[int]) -> None:
        self.bits = bits
        self.shape = tuple(shape)

    @classmethod
    def of(cls, tensor: Tensor) -> BinaryTensor:
        """Stores a tensor of -1 and +1.

        Raises:
            InputError: if it holds anything else.
        """
        if not bool((tensor.abs() == 1).all()):
            raise InputError("a tensor stored as signs may hold only -1 and +1")
        return cls(pack((tensor > 0).to(torch.uint8), 1), tensor.shape)

    def decode(self) -> Tensor:
        codes = unpack(self.bits, 1, math.prod(self.shape))
        return (codes.float() * 2 - 1).view(self.shape)

    def arrays(self) -> dict[str, Tensor]:
        return {"bits": self.bits}

    def record(self) -> Any:
        return list(self.shape)

    @classmethod
    def restore(cls, record: Any, arrays: Mapping[str, Tensor]) -> Self:
        shape, bits = shape_of(record), arrays["bits"]
        if bits.dtype != torch.uint8 or bits.shape != (packed_bytes(math.prod(shape), 1),):
            raise ValueError("signs of another number than their shape says")
        return cls(bits, shape)

    def kernel(self) -> Kernel | None:
        return BinaryKernel(self.decode()) if len(self.shape) in (2, 4) else None


def sign_input(node: Any) -> fx.Node | None:
    """What ``(x >= 0) * 2 - 1``, as a node of a graph, is the sign of; None for anything else."""
    if not (_is(node, "sub") and _number(node, 1, 1.0)):
        return None
    node = node.args[0]
    if not (_is(node, "mul") and _number(node, 1, 2.0)):
        return None
    node = node.args[0]
    while _is(node, "to", "_to_copy", "type_as"):
        node = node.args[0]
    if not (_is(node, "ge") and _number(node, 1, 0.0)):
        return None
    return node.args[0]


_INPUT: Any = object()
"""Stands for the value that comes in, among the arguments of an operator."""
# None that works in place: an earlier node that is read instead would hold another value.
_ELEMENTWISE = ("relu", "hardtanh", "clamp", "clamp_min", "relu6", "add", "sub", "mul", "div")


def _step(
    program: fx.GraphModule, node: fx.Node, shape: tuple[int, ...]
) -> tuple[fx.Node, list[Any]] | None:
    """Input and arguments of an operator that treats each channel by itself; None for others."""
    if node.op != "call_function" or op_name(node.target) not in _ELEMENTWISE or (node.kwargs):
        return None
    arguments = [_constant(program, a) for a in node.args]
    inputs = [a for a, value in zip(node.args, arguments, strict=True) if value is _INPUT]
    if len(inputs) != 1 or not isinstance(inputs[0], fx.Node):
        return None
    for value in arguments:
        if isinstance(value, Tensor):
            alike = value.numel() == 1 or value.shape == value.reshape(shape).shape
            if value.dtype != torch.float32 or not alike:
                return None
    return inputs[0], arguments


def _constant(program: fx.GraphModule, argument: Any) -> Any:
    """The value of an argument that does not depend on the input."""
    if not isinstance(argument, fx.Node):
        return argument
    if argument.op == "get_attr":
        path, _, leaf = str(argument.target).rpartition(".")
        return getattr(program.get_submodule(path), leaf).detach()
    if _is(argument, "view", "reshape", "unsqueeze"):
        source = _constant(program, argument.args[0])
        target: Any = argument.target
        return source if source is _INPUT else target(source, *argument.args[1:])
    return _INPUT


def _is(node: Any, *names: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and (
        op_name(node.target) in names
    )  # fmt: skip


def _number(node: fx.Node, place: int, value: float) -> bool:
    return len(node.args) > place and bool(node.args[place] == value)


def _array(x: Tensor) -> np.ndarray:
    if x.device.type != "cpu":
        raise UnsupportedError("the packed kernel of signs runs on the CPU; move the network there")
    x = x.detach()
    # Half precision widens without changing a sign; narrowing could round to zero.
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return x.contiguous().numpy()


def _result_type(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float32


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="signs")


def _share(work: Callable[[int, int], None], count: int) -> None:
    """Calls ``work(low, high)`` for the parts of ``range(count)``, one for each torch thread."""
    parts = min(torch.get_num_threads(), count)
    if parts <= 1:
        work(0, count)
        return
    ends = [count * i // parts for i in range(parts + 1)]
    list(_pool(parts).map(work, ends[:-1], ends[1:]))
