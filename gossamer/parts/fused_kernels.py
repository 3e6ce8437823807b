"""Residual blocks of three convolutions computed strip by strip, compiled on first use.

A strip of rows goes through the whole block while it lies in a nearby cache; what a layer-by-layer
run writes to memory and reads again (the expanded activations, the widest tensors of a network)
exists only for a strip and a chunk of channels. Everything is one micro kernel: a tile of output
channels times a few vectors of neighbouring pixels stays in registers while weights are broadcast,
and the tile's start (bias or running sum) and end (activation) cost no pass of their own. Its right
operand is found through a table of offsets (the indirect convolution), so that the same tile
multiplies matrices and convolves; a stride splits rows into phases, which makes its pixels
neighbours again.

Arrays are float32 in the order ``[batch, channels, height, width]``. LLVM compiles for the
processor at hand; compiled code is kept in memory only.

Source: Lavin, "On the efficiency of convolutional neural networks", arXiv:2404.03617 (block
fusion); Dukhan, "The indirect convolution algorithm", arXiv:1907.02129; Goto and van de Geijn,
"Anatomy of high-performance matrix multiplication", ACM TOMS 2008 (register blocking, packing).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic


def _registers() -> tuple[int, int]:
    """Floats in a vector register, and output channels in a tile of three vectors."""
    binding.initialize_native_target()
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 8
    if features.get("avx"):
        return 8, 4  # 16 registers: 12 sums, 3 of pixels, 1 of a weight
    return 4, 8 if features.get("neon") else 4


LANES, ROWS = _registers()
VECTORS = 3

NONE, SILU, RELU = 0, 1, 2
"""Activations."""

# 2^f for |f| <= 1/2, highest power first: least relative error (2.3e-7 in float32).
_EXP2 = (1.32764608e-3, 9.67554096e-3, 5.55071346e-2, 2.40221202e-1, 6.93146944e-1, 1.00000012)
_ROUNDER = 1.5 * 2.0**23
"""Added to a small number, the sum's last bits are the nearest whole number."""


class _Vectors:
    """Instructions on whole vectors."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.type = ir.VectorType(ir.FloatType(), LANES)
        self.whole = ir.VectorType(ir.IntType(32), LANES)

    def call(self, name: str, *values: Any) -> Any:
        kind = ir.FunctionType(self.type, [self.type] * len(values))
        name = f"llvm.{name}.v{LANES}f32"
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, kind, name), values
        )

    def constant(self, value: float) -> Any:
        return ir.Constant(self.type, [value] * LANES)

    def splat(self, number: Any) -> Any:
        nothing = ir.Constant(self.type, ir.Undefined)
        one = self.builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(one, nothing, ir.Constant(self.whole, [0] * LANES))

    def load(self, place: Any) -> Any:
        return self.builder.load(self.builder.bitcast(place, self.type.as_pointer()), align=4)

    def store(self, value: Any, place: Any) -> None:
        self.builder.store(value, self.builder.bitcast(place, self.type.as_pointer()), align=4)

    def clamp(self, x: Any, limit: float) -> Any:
        b, high, low = self.builder, self.constant(limit), self.constant(-limit)
        # Comparisons, since minnum has to look for NaN; a NaN stays one in the division below.
        x = b.select(b.fcmp_ordered("<", x, high), x, high)
        return b.select(b.fcmp_ordered(">", x, low), x, low)

    def silu(self, x: Any) -> Any:
        """``x / (1 + 2^z)``, z = -x / ln 2, the power from z's whole and fractional parts."""
        b, slope = self.builder, self.constant(-1.4426950408889634)
        near = self.clamp(x, 87.0)
        shifted = self.call("fma", near, slope, self.constant(_ROUNDER))
        whole = b.fsub(shifted, self.constant(_ROUNDER))
        fraction = self.call("fma", near, slope, b.fneg(whole))
        power = self.constant(_EXP2[0])
        for coefficient in _EXP2[1:]:
            power = self.call("fma", power, fraction, self.constant(coefficient))
        bits = b.add(b.bitcast(shifted, self.whole), ir.Constant(self.whole, [127] * LANES))
        scale = b.bitcast(b.shl(bits, ir.Constant(self.whole, [23] * LANES)), self.type)
        return b.fdiv(x, self.call("fma", power, scale, self.constant(1.0)))


def _multiply_tile(
    _: Any, a: Any, a_at: Any, b: Any, b_at: Any, offsets: Any, offsets_at: Any, count: Any,
    c: Any, c_at: Any, step: Any, bias: Any, bias_at: Any, accumulate: Any, rows: Any,
    vectors: Any,
) -> Any:  # fmt: skip
    """The micro kernel for ``rows`` output channels and ``vectors`` vectors of pixels.

    ``c[r, :] = start[r, :] + sum_k a[k, r] b[offsets[k] :]`` where the start is the bias, or what
    ``c`` holds. Arrays are one-dimensional, each with a place to begin at. Rows are ROWS, 4 or 1,
    vectors 1 to VECTORS: one piece of code is generated for each.
    """
    index = types.intp
    signature = types.void(
        a, index, b, index, offsets, index, index, c, index, index, bias, index, types.boolean,
        index, index,
    )  # fmt: skip

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def at(array: int) -> Any:
            made = context.make_array(signature.args[array])(context, builder, arguments[array])
            return builder.gep(made.data, [arguments[array + 1]])

        a_, b_, offsets_, c_, bias_ = (at(array) for array in (0, 2, 4, 7, 10))
        count, step, accumulate, rows, vectors = (arguments[i] for i in (6, 9, 12, 13, 14))
        for high in sorted({ROWS, 4, 1}):
            for wide in range(1, VECTORS + 1):
                chosen = builder.and_(
                    builder.icmp_signed("==", rows, rows.type(high)),
                    builder.icmp_signed("==", vectors, vectors.type(wide)),
                )
                with builder.if_then(chosen):
                    tile = _tile_function(builder.module, high, wide)
                    builder.call(tile, [a_, b_, offsets_, c_, bias_, count, step, accumulate])
        return context.get_dummy_value()

    return signature, generate


def _tile_function(module: Any, rows: int, vectors: int) -> Any:
    """The micro kernel of one size; a function of its own, so that it is compiled once a module."""
    name = f"gossamer_tile_{rows}_{vectors}"
    if name in module.globals:
        return module.globals[name]
    floats, whole = ir.FloatType().as_pointer(), ir.IntType(64)
    kind = ir.FunctionType(
        ir.VoidType(),
        [floats, floats, whole.as_pointer(), floats, floats, whole, whole, ir.IntType(1)],
    )
    function = ir.Function(module, kind, name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    _generate_tile(builder, *function.args, rows=rows, vectors=vectors)
    builder.ret_void()
    return function


def _generate_tile(
    builder: Any, a: Any, b: Any, offsets: Any, c: Any, bias: Any, count: Any, step: Any,
    accumulate: Any, *, rows: int, vectors: int,
) -> None:  # fmt: skip
    """The instructions of one size of tile; its sums are values and so stay in registers."""
    number, vector = ir.IntType(64), _Vectors(builder)
    places = [
        builder.gep(c, [builder.add(builder.mul(step, number(r)), number(v * LANES))])
        for r in range(rows)
        for v in range(vectors)
    ]
    with builder.if_else(accumulate) as (running, fresh):
        with running:
            held = [vector.load(place) for place in places]
            after_running = builder.block
        with fresh:
            splats = [
                vector.splat(builder.load(builder.gep(bias, [number(r)]))) for r in range(rows)
            ]
            after_fresh = builder.block
    start = []
    for i in range(rows * vectors):
        phi = builder.phi(vector.type)
        phi.add_incoming(held[i], after_running)
        phi.add_incoming(splats[i // vectors], after_fresh)
        start.append(phi)
    before = builder.block
    body, done = builder.append_basic_block("sum"), builder.append_basic_block("summed")
    builder.branch(body)  # there is always something to sum

    builder.position_at_end(body)
    k = builder.phi(number)
    sums = [builder.phi(vector.type) for _ in start]
    line = builder.gep(b, [builder.load(builder.gep(offsets, [k]))])
    pixels = [vector.load(builder.gep(line, [number(v * LANES)])) for v in range(vectors)]
    weights = builder.gep(a, [builder.mul(k, number(rows))])
    grown = []
    for r in range(rows):
        weight = vector.splat(builder.load(builder.gep(weights, [number(r)])))
        for v in range(vectors):
            grown.append(vector.call("fma", weight, pixels[v], sums[r * vectors + v]))
    following = builder.add(k, number(1))
    k.add_incoming(number(0), before)
    k.add_incoming(following, body)
    for phi, first, later in zip(sums, start, grown, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, body)
    builder.cbranch(builder.icmp_signed("<", following, count), body, done)

    builder.position_at_end(done)
    for total, place in zip(grown, places, strict=True):
        vector.store(total, place)


def _activate_vector(_: Any, c: Any, c_at: Any, activation: Any) -> Any:
    """Activates the vector of ``c`` that begins at a place."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = _Vectors(builder)
        made = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(made.data, [arguments[1]])
        value = vector.load(place)
        is_silu = builder.icmp_signed("==", arguments[2], ir.IntType(64)(SILU))
        with builder.if_else(is_silu) as (silu, relu):
            with silu:
                vector.store(vector.silu(value), place)
            with relu:
                vector.store(vector.call("maxnum", value, vector.constant(0.0)), place)
        return context.get_dummy_value()

    return types.void(c, types.intp, types.intp), generate


_tile: Any = intrinsic(_multiply_tile)
_activate: Any = intrinsic(_activate_vector)


@numba.njit(nogil=True)
def _share_of(vectors: int) -> int:
    """Vectors of the next tile: 4 are 2 and 2, not 3 and 1."""
    turns = (vectors + VECTORS - 1) // VECTORS
    return (vectors + turns - 1) // turns


@numba.njit(nogil=True)
def _multiply(
    a: np.ndarray, a_at: int, rows: int, b: np.ndarray, b_at: int, offsets: np.ndarray,
    offsets_at: int, count: int, c: np.ndarray, c_at: int, step: int, vectors: int,
    bias: np.ndarray, bias_at: int, accumulate: bool, activation: int,
) -> None:  # fmt: skip
    """``rows`` channels times ``vectors`` vectors of pixels, tile by tile.

    ``a`` is packed: blocks of as many rows as there are left of ROWS, 4 or 1, each ``[k, rows]``.
    """
    done = 0
    while done < vectors:
        wide = _share_of(vectors - done)
        r = 0
        while r < rows:
            high = ROWS if rows - r >= ROWS else (4 if rows - r >= 4 else 1)
            _tile(
                a, a_at + r * count, b, b_at + done * LANES, offsets, offsets_at, count,
                c, c_at + r * step + done * LANES, step, bias, bias_at + r, accumulate, high, wide,
            )  # fmt: skip
            r += high
        if activation != NONE:  # while the tiles are in the nearest cache
            for i in range(rows):
                for v in range(wide):
                    _activate(c, c_at + i * step + (done + v) * LANES, activation)
        done += wide


# Views of one line each: only then does LLVM know that its numbers lie side by side.


@numba.njit(nogil=True)
def _load_row(
    x: np.ndarray, sample: int, y: int, pad: int, stride: int, strip: np.ndarray, lines: int,
    columns: int, slot: int,
) -> None:  # fmt: skip
    """Puts row ``y`` of a sample of ``x`` ``[batch, channels, height, width]`` into a strip's slot.

    A strip is ``[channels, phases, lines, columns]``, flat: column ``i`` of phase ``f`` is pixel
    ``i stride + f - pad``. Outside of the image there is 0.
    """
    width = x.shape[3]
    inside = 0 <= y < x.shape[2]
    for c in range(x.shape[1]):
        for phase in range(stride):
            place = ((c * stride + phase) * lines + slot) * columns
            line = strip[place : place + columns]
            low, high = _real_columns(width, pad, stride, phase) if inside else (0, 0)
            for i in range(low):
                line[i] = 0
            for i in range(high, columns):
                line[i] = 0
            if not inside:
                continue
            real, source = line[low:high], x[sample, c, y]
            if stride == 1:  # apart, since it compiles to whole vectors
                for i in range(width):
                    real[i] = source[i]
            else:
                begin = low * stride + phase - pad
                for i in range(high - low):
                    real[i] = source[begin + i * stride]


@numba.njit(nogil=True)
def _real_columns(width: int, pad: int, stride: int, phase: int) -> tuple[int, int]:
    """The first column of a phase that is a pixel, and the first after them that is none."""
    low = (pad - phase + stride - 1) // stride if pad > phase else 0
    return low, (width - 1 + pad - phase) // stride + 1


@numba.njit(nogil=True)
def _write_strip(
    sums: np.ndarray, step: int, rows: int, y0: int, sample: int, x: np.ndarray, residual: bool,
    out: np.ndarray,
) -> None:  # fmt: skip
    """Writes rows of each channel, from row ``y0`` on; ``x`` is added for a residual."""
    width = out.shape[3]
    for c in range(out.shape[1]):
        for y in range(rows):
            place = c * step + y * width
            source, target = sums[place : place + width], out[sample, c, y0 + y]
            if residual:
                shortcut = x[sample, c, y0 + y]
                for i in range(width):
                    target[i] = source[i] + shortcut[i]
            else:
                for i in range(width):
                    target[i] = source[i]


@numba.njit(nogil=True)
def _aligned(size: int) -> np.ndarray:
    """Room that begins at a line of the cache: a vector across two lines is loaded twice."""
    room = np.empty(size + 16, np.float32)
    shift = (-(room.ctypes.data // 4)) % 16
    return room[shift : shift + size]


@numba.njit(nogil=True)
def _steps(count: int, step: int) -> np.ndarray:
    """Offsets of rows that lie a constant step apart."""
    offsets = np.empty(count, np.int64)
    for i in range(count):
        offsets[i] = i * step
    return offsets


@numba.njit(nogil=True)
def conv_first(
    x: np.ndarray, out: np.ndarray, first: int, last: int,
    shape: tuple[int, int, int, int, int], tile_rows: int, chunk: int, activation: int,
    residual: bool, conv: np.ndarray, conv_bias: np.ndarray, expand: np.ndarray,
    expand_bias: np.ndarray, project: np.ndarray, project_bias: np.ndarray,
) -> None:  # fmt: skip
    """Grouped convolution, expansion, activation, projection of output rows ``first`` to ``last``.

    Rows are counted through the batch. ``shape`` is channels between convolution and expansion,
    groups, kernel side, stride, expanded channels. Weights are packed (:func:`pack_rows`), the
    projection for each chunk of expanded channels.
    """
    middle, groups, k, stride, expanded = shape
    channels, width = x.shape[1], x.shape[3]
    outputs, out_height, out_width = out.shape[1:]
    pad = k // 2
    fan_in, fan_out = channels // groups, middle // groups
    lines = (tile_rows - 1) * stride + k
    full = (out_width + LANES - 1) // LANES * LANES
    columns = max((width + 2 * pad + stride - 1) // stride, full + (k - 1) // stride)
    columns = (columns + LANES - 1) // LANES * LANES
    strip = _aligned(channels * stride * lines * columns + LANES * VECTORS)
    taps = np.empty(fan_in * k * k, np.int64)
    for c in range(fan_in):
        for ky in range(k):
            for kx in range(k):
                place = (c * stride + kx % stride) * lines + ky
                taps[(c * k + ky) * k + kx] = place * columns + kx // stride
    # An odd number of lines between channels, so that they do not fall into the same sets.
    step = (((tile_rows * out_width + LANES + 15) // 16) | 1) * 16
    wide = LANES * VECTORS
    convolved = _aligned(middle * step + wide)
    sums = _aligned((outputs + ROWS) * step + wide)
    hidden = _aligned((chunk + ROWS) * wide)
    narrow, of_hidden = _steps(middle, step), _steps(chunk, wide)
    row = first
    while row < last:
        sample, y0 = row // out_height, row % out_height
        rows = min(tile_rows, out_height - y0, last - row)
        pixels = rows * out_width
        for line in range((rows - 1) * stride + k):
            y = y0 * stride - pad + line
            _load_row(x, sample, y, pad, stride, strip, lines, columns, line)
        for g in range(groups):
            base = g * fan_in * stride * lines * columns
            # Upwards: what a row writes beyond its end is overwritten by the next.
            for y in range(rows):
                _multiply(
                    conv, g * fan_out * taps.size, fan_out, strip, base + y * stride * columns,
                    taps, 0, taps.size, convolved, g * fan_out * step + y * out_width, step,
                    full // LANES, conv_bias, g * fan_out, False, NONE,
                )  # fmt: skip
        vectors = (pixels + LANES - 1) // LANES
        for begin in range(0, expanded, chunk):
            count = min(chunk, expanded - begin)
            done = 0
            while done < vectors:
                some = _share_of(vectors - done)
                _multiply(
                    expand, begin * middle, count, convolved, done * LANES, narrow, 0, middle,
                    hidden, 0, wide, some, expand_bias, begin, False, activation,
                )  # fmt: skip
                _multiply(
                    project, begin * outputs, outputs, hidden, 0, of_hidden, 0, count, sums,
                    done * LANES, step, some, project_bias, 0, begin > 0, NONE,
                )  # fmt: skip
                done += some
        _write_strip(sums, step, rows, y0, sample, x, residual, out)
        row += rows


@numba.njit(nogil=True)
def mb_conv(
    x: np.ndarray, out: np.ndarray, first: int, last: int,
    shape: tuple[int, int, int, int, int], tile_rows: int, chunk: int, activation: int,
    residual: bool, expand: np.ndarray, expand_bias: np.ndarray, conv: np.ndarray,
    conv_bias: np.ndarray, project: np.ndarray, project_bias: np.ndarray,
) -> None:  # fmt: skip
    """Expansion, grouped convolution, projection, with activations after the first two.

    Expanded rows live in a ring of as many as a strip of output rows needs; each is computed once.
    ``shape`` is expanded channels, groups, kernel side, stride, channels after the convolution.
    """
    expanded, groups, k, stride, middle = shape
    channels, width = x.shape[1], x.shape[3]
    outputs, out_height, out_width = out.shape[1:]
    pad = k // 2
    fan_in, fan_out = expanded // groups, middle // groups
    lines = (tile_rows - 1) * stride + k
    full = (out_width + LANES - 1) // LANES * LANES
    # Room for whole vectors from the first pixel on.
    columns = max((width + pad + stride - 1) // stride + pad + LANES, full + (k - 1) // stride)
    columns = (columns + LANES - 1) // LANES * LANES
    plane = lines * columns
    ring = _aligned(expanded * stride * plane + LANES * VECTORS)
    strip = _aligned(channels * stride * columns + LANES * VECTORS)
    narrow = _steps(channels, stride * columns)
    count_taps = fan_in * k * k
    taps = np.empty(lines * count_taps, np.int64)  # for each slot that the first tap can be in
    for slot in range(lines):
        for c in range(fan_in):
            for ky in range(k):
                for kx in range(k):
                    place = (c * stride + kx % stride) * lines + (slot + ky) % lines
                    at = slot * count_taps + (c * k + ky) * k + kx
                    taps[at] = place * columns + kx // stride
    step = (((tile_rows * out_width + LANES + 15) // 16) | 1) * 16
    wide = LANES * VECTORS
    hidden = _aligned((chunk + ROWS) * step + wide)
    sums = _aligned((outputs + ROWS) * step + wide)
    of_hidden = _steps(chunk, step)
    row, ready, sample_before = first, 0, -1
    while row < last:
        sample, y0 = row // out_height, row % out_height
        rows = min(tile_rows, out_height - y0, last - row)
        pixels = rows * out_width
        top = y0 * stride - pad
        if sample != sample_before:
            ready = top
            sample_before = sample
        for y in range(max(ready, top), (y0 + rows - 1) * stride - pad + k):
            slot = (y + pad) % lines
            inside = 0 <= y < x.shape[2]
            _load_row(x, sample, y, pad, stride, strip, 1, columns, 0)
            for phase in range(stride):
                low, high = _real_columns(width, pad, stride, phase) if inside else (0, 0)
                vectors = (high - low + LANES - 1) // LANES
                _multiply(
                    expand, 0, expanded, strip, phase * columns + low, narrow, 0, channels,
                    ring, (phase * lines + slot) * columns + low, stride * plane, vectors,
                    expand_bias, 0, False, activation,
                )  # fmt: skip
                # The padding is 0, not the activated bias; the last vector reaches into it.
                for c in range(expanded):
                    place = ((c * stride + phase) * lines + slot) * columns
                    for i in range(low):
                        ring[place + i] = 0
                    for i in range(high, columns):
                        ring[place + i] = 0
        ready = (y0 + rows - 1) * stride - pad + k
        for begin in range(0, middle, chunk):
            count = min(chunk, middle - begin)
            for g in range(begin // fan_out, (begin + count) // fan_out):
                for y in range(rows):
                    slot = ((y0 + y) * stride) % lines
                    _multiply(
                        conv, g * fan_out * count_taps, fan_out, ring,
                        g * fan_in * stride * plane, taps, slot * count_taps, count_taps, hidden,
                        (g * fan_out - begin) * step + y * out_width, step, full // LANES,
                        conv_bias, g * fan_out, False, activation,
                    )  # fmt: skip
            _multiply(
                project, begin * outputs, outputs, hidden, 0, of_hidden, 0, count, sums, 0, step,
                (pixels + LANES - 1) // LANES, project_bias, 0, begin > 0, NONE,
            )  # fmt: skip
        _write_strip(sums, step, rows, y0, sample, x, residual, out)
        row += rows


def pack_rows(weight: np.ndarray, groups: int = 1) -> np.ndarray:
    """A weight in the order the micro kernel reads.

    Args:
        weight: ``[outputs, inputs per group, ...]``.
        groups: each is packed on its own.

    Returns:
        One-dimensional: for each group blocks of ROWS, 4 or 1 outputs, each ``[inputs, outputs]``.
    """
    flat = np.ascontiguousarray(weight, np.float32).reshape(len(weight), -1)
    parts: list[np.ndarray] = []
    size = len(flat) // groups
    for g in range(groups):
        r = g * size
        while r < (g + 1) * size:
            left = (g + 1) * size - r
            block = next(n for n in (ROWS, 4, 1) if left >= n)
            parts.append(flat[r : r + block].T.ravel())
            r += block
    return np.concatenate(parts)


def pack_chunks(weight: np.ndarray, chunk: int) -> np.ndarray:
    """A matrix ``[outputs, inputs]`` packed for each chunk of inputs."""
    return np.concatenate(
        [pack_rows(weight[:, i : i + chunk]) for i in range(0, weight.shape[1], chunk)]
    )
