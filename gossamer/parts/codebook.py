"""Tensors as indices into small tables of values, and kernels that multiply with them.

A weight ``[rows, ...]`` is cut into groups of consecutive rows. Each value is an index of a few
bits into a table of 16-bit entries: one table for all, scaled by a number of each group, or a table
for each group. The kernels read the indices packed as they are in the file: one decodes a block of
rows at a time and multiplies, the other adds up inputs by index and multiplies once for each entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.core.errors import InputError
from gossamer.parts.packing import pack, packed_bytes, unpack
from gossamer.parts.stored import Kernel, Stored, shape_of

ENTRIES = 256
"""Largest table."""

_TRITS = 5  # indices of a table of three that one byte holds: 3^5 = 243


def index_bits(entries: int) -> float:
    """Bits an index into a table takes in a file: whole ones, but 8/5 for a table of three."""
    if not 1 <= entries <= ENTRIES:
        raise InputError(f"a codebook has 1 to {ENTRIES} entries, not {entries}")
    return 8 / _TRITS if entries == 3 else float(max(1, (entries - 1).bit_length()))


def pack_indices(indices: Tensor, entries: int) -> Tensor:
    """Packs indices of a table, any shape, into uint8 ``[bytes]``; three entries five to a byte."""
    bits = index_bits(entries)
    if entries != 3:
        return pack(indices, int(bits))
    flat = indices.detach().cpu().flatten().to(torch.int32)
    if flat.numel() and int(flat.max()) > 2:
        raise InputError(f"index {int(flat.max())} does not fit into a table of 3")
    padded = F.pad(flat, (0, -flat.numel() % _TRITS)).view(-1, _TRITS)
    return (padded * torch.tensor([1, 3, 9, 27, 81])).sum(1).to(torch.uint8)


def unpack_indices(packed: Tensor, entries: int, count: int) -> Tensor:
    """Reads what :func:`pack_indices` wrote: uint8 ``[count]``.

    Raises:
        InputError: if there are not exactly the bytes that ``count`` indices take.
    """
    if entries != 3:
        return unpack(packed, int(index_bits(entries)), count)
    if count < 0 or packed.dtype != torch.uint8 or packed.numel() != -(-count // _TRITS):
        raise InputError(
            f"{count} indices of a table of 3 take {-(-max(count, 0) // _TRITS)} bytes, but there "
            f"are {packed.numel()} of type {packed.dtype}"
        )
    digits = packed.cpu().to(torch.int32)[:, None] // torch.tensor([1, 3, 9, 27, 81]) % 3
    return digits.flatten()[:count].to(torch.uint8)


@dataclass(frozen=True)
class CodebookTensor(Stored):
    """A tensor as indices, tables and scales.

    Attributes:
        packed: the indices ``[rows, columns]``, packed, uint8 ``[bytes]``.
        tables: float16, ``[1, entries]`` or ``[groups, entries]``.
        scales: float16 ``[groups]``, or None where tables need none.
        sizes: rows of each group, in order.
        shape: of the decoded tensor; rows first.
    """

    codec: ClassVar[str] = "codebook"

    packed: Tensor
    tables: Tensor
    scales: Tensor | None
    sizes: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        indices: Tensor,
        tables: Tensor,
        scales: Tensor | None,
        sizes: Sequence[int],
        shape: Sequence[int],
    ) -> CodebookTensor:
        """Packs indices ``[rows, columns]``; the rest as the attributes, in any float type."""
        packed = pack_indices(indices, tables.shape[1])
        scales = None if scales is None else scales.detach().cpu().half()
        return cls(packed, tables.detach().cpu().half(), scales, tuple(sizes), tuple(shape))

    @cached_property
    def indices(self) -> Tensor:
        """uint8 ``[rows, columns]``."""
        count = math.prod(self.shape)
        return unpack_indices(self.packed, self.entries, count).view(self.shape[0], -1)

    @property
    def entries(self) -> int:
        """Values in a table."""
        return self.tables.shape[1]

    @cached_property
    def group_of_row(self) -> Tensor:
        """int64 ``[rows]``."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    def decode(self) -> Tensor:
        return CodebookKernel(self).decode(0, self.shape[0]).view(self.shape)

    def arrays(self) -> dict[str, Tensor]:
        parts = [self.packed, _bytes(self.tables)]
        if self.scales is not None:
            parts.append(_bytes(self.scales))
        if len(self.sizes) > 1:
            parts.append(_bytes(torch.tensor(self.sizes, dtype=_size_type(self.shape[0]))))
        # One array a tensor: each costs the header of a file some 70 bytes.
        return {"b": torch.cat(parts)}

    def nbytes(self) -> int:
        tables, groups = len(self.tables), len(self.sizes)
        return sum(_lengths(self.shape, self.entries, tables, groups, self.scales is not None))

    def record(self) -> Any:
        scaled = int(self.scales is not None)
        return [list(self.shape), self.entries, len(self.tables), len(self.sizes), scaled]

    @classmethod
    def restore(cls, record: Any, arrays: Mapping[str, Tensor]) -> CodebookTensor:
        shape, *numbers = record
        shape = shape_of(shape)
        entries, tables, groups, scaled = map(int, numbers)
        stored = arrays["b"]
        if (
            not shape
            or not 1 <= entries <= ENTRIES
            or not 1 <= groups <= shape[0]
            or tables not in (1, groups)
            or scaled not in (0, 1)
        ):
            raise ValueError(record)
        lengths = _lengths(shape, entries, tables, groups, bool(scaled))
        if stored.dtype != torch.uint8 or stored.shape != (sum(lengths),):
            raise ValueError(record)
        packed, table, scale, size = (part.clone() for part in stored.split(lengths))
        _check_indices(packed, entries, math.prod(shape))
        sizes = (shape[0],)
        if groups > 1:
            # Types of two or four bytes without a sign; torch has few operations on them.
            sizes = tuple(size.numpy().view(_UNSIGNED[_size_type(shape[0])]).tolist())
        if sum(sizes) != shape[0] or min(sizes) < 1:
            raise ValueError("groups that do not add up")
        return cls(
            packed,
            table.view(torch.float16).view(tables, entries),
            scale.view(torch.float16) if scaled else None,
            sizes,
            shape,
        )

    def kernel(self) -> Kernel:
        return CodebookKernel(self)


_UNSIGNED = {torch.uint16: np.uint16, torch.uint32: np.uint32}


def _size_type(rows: int) -> torch.dtype:
    return torch.uint16 if rows < 1 << 16 else torch.uint32


def _bytes(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8)


def _check_indices(packed: Tensor, entries: int, count: int) -> None:
    """Refuses indices beyond the table; most tables leave no room for any."""
    if entries == 3:
        highest = int(packed.max()) // 243 * 3
    elif entries & (entries - 1) == 0 and entries > 1:
        return
    else:
        highest = int(unpack_indices(packed, entries, count).max())
    if highest >= entries:
        raise ValueError("an index beyond its table")


def _lengths(
    shape: Sequence[int], entries: int, tables: int, groups: int, scaled: bool
) -> list[int]:
    """Bytes of indices, tables, scales and sizes of groups."""
    count = math.prod(shape)
    packed = -(-count // _TRITS) if entries == 3 else packed_bytes(count, int(index_bits(entries)))
    each = 2 if shape[0] < 1 << 16 else 4
    scales, sizes = 2 * groups if scaled else 0, each * groups if groups > 1 else 0
    return [packed, 2 * tables * entries, scales, sizes]


class CodebookKernel(Kernel):
    """Multiplies with packed indices; at most one block of rows is float at a time.

    Args:
        stored: the weight.
        method: "blocks" decodes a block of rows and multiplies; "buckets" adds inputs up by index
            and multiplies each sum once with its table entry (linear layers, on the CPU), which
            needs no float weights at all.
        block: rows decoded at a time. Default: about a quarter of a megabyte of floats.
    """

    def __init__(
        self,
        stored: CodebookTensor,
        *,
        method: Literal["blocks", "buckets"] = "blocks",
        block: int | None = None,
    ) -> None:
        self.packed = stored.packed.numpy()
        tables = stored.tables.float()
        if stored.scales is not None:
            tables = tables * stored.scales.float()[:, None]
        self.tables = tables.expand(len(stored.sizes), -1).contiguous().numpy()
        self.groups = stored.group_of_row.to(torch.int32).numpy()
        self.shape = stored.shape
        self.columns = math.prod(stored.shape[1:])
        self.method = method
        self.block = block or max(1, (1 << 16) // self.columns)
        self._bytes = _by_byte(self.tables, self.columns)

    def decode(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` as float32 ``[stop - start, columns]``."""
        out = np.empty((stop - start, self.columns), np.float32)
        if self._bytes is None:
            _decode(self.packed, self.tables, self.groups, start, out)
        else:
            width = (0,) * self._bytes.shape[2]
            _decode_bytes(self.packed, self._bytes, self.groups, start, width, out)
        return torch.from_numpy(out)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.shape[0])
        if self.method == "buckets":
            rows = np.ascontiguousarray(x.detach().cpu().float().reshape(-1, self.columns).numpy())
            sums = np.empty((len(rows), self.shape[0]), np.float32)
            _bucket_sums(self.packed, self.tables, self.groups, rows, sums)
            out.copy_(torch.from_numpy(sums).view(out.shape))
        else:
            for start in range(0, self.shape[0], self.block):
                stop = min(start + self.block, self.shape[0])
                weight = self.decode(start, stop).to(x.device, x.dtype)
                out[..., start:stop] = F.linear(x, weight)
        return out if bias is None else out + bias

    def conv2d(
        self,
        x: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        rows, inputs = self.shape[0] // groups, self.shape[1]
        parts = []
        for group in range(groups):
            part = x[:, group * inputs : (group + 1) * inputs]
            for start in range(group * rows, (group + 1) * rows, self.block):
                stop = min(start + self.block, (group + 1) * rows)
                weight = self.decode(start, stop).view(-1, *self.shape[1:]).to(x.device, x.dtype)
                parts.append(
                    F.conv2d(part, weight, None, tuple(stride), tuple(padding), tuple(dilation))
                )
        out = torch.cat(parts, 1)
        return out if bias is None else out + bias.view(-1, 1, 1)


def _by_byte(tables: np.ndarray, columns: int) -> np.ndarray | None:
    """What each byte decodes to, ``[groups, 256, indices a byte]``; None if rows share bytes."""
    entries = tables.shape[1]
    bits = index_bits(entries)
    if entries != 3 and 8 % bits:
        return None
    width = round(8 / bits)
    if columns % width or bits == 8:
        return None
    count = 243 if entries == 3 else 256
    codes = torch.arange(count, dtype=torch.uint8)
    indices = unpack_indices(codes, entries, count * width).view(count, width)
    return tables[:, indices.clamp(max=entries - 1).numpy()]


@numba.njit(nogil=True)
def _decode_bytes(
    packed: np.ndarray,
    tables: np.ndarray,
    groups: np.ndarray,
    start: int,
    width: tuple[int, ...],  # its length is known to the compiler, which unrolls by it
    out: np.ndarray,
) -> None:  # pragma: no cover (compiled)
    rows, columns = out.shape
    count = columns // len(width)
    for row in range(rows):
        table = tables[groups[start + row]]
        first = (start + row) * count
        for byte in range(count):
            value = packed[first + byte]
            for digit in range(len(width)):
                out[row, byte * len(width) + digit] = table[value, digit]


@numba.njit(nogil=True)
def _indices(
    packed: np.ndarray, entries: int, first: int, out: np.ndarray
) -> None:  # pragma: no cover (compiled)
    """Indices ``first`` to ``first + len(out)``."""
    if entries == 3:
        left = first % 5
        value = packed[first // 5]
        for _ in range(left):
            value //= 3
        for i in range(out.size):
            if left == 5:
                left = 0
                value = packed[(first + i) // 5]
            out[i] = value % 3
            value //= 3
            left += 1
        return
    bits = 1
    while 1 << bits < entries:
        bits += 1
    mask = (1 << bits) - 1
    at = first * bits
    for i in range(out.size):
        byte, shift = at >> 3, at & 7
        value = np.uint32(packed[byte])
        if shift + bits > 8:
            value |= np.uint32(packed[byte + 1]) << np.uint32(8)
        out[i] = (value >> np.uint32(shift)) & np.uint32(mask)
        at += bits


@numba.njit(nogil=True)
def _decode(
    packed: np.ndarray, tables: np.ndarray, groups: np.ndarray, start: int, out: np.ndarray
) -> None:  # pragma: no cover (compiled)
    rows, columns = out.shape
    line = np.empty(columns, np.uint8)
    for row in range(rows):
        _indices(packed, tables.shape[1], (start + row) * columns, line)
        table = tables[groups[start + row]]
        for column in range(columns):
            out[row, column] = table[line[column]]


@numba.njit(nogil=True)
def _bucket_sums(
    packed: np.ndarray,
    tables: np.ndarray,
    groups: np.ndarray,
    inputs: np.ndarray,
    out: np.ndarray,
) -> None:  # pragma: no cover (compiled)
    batch, columns = inputs.shape
    entries = tables.shape[1]
    line = np.empty(columns, np.uint8)
    sums = np.empty(entries, np.float32)
    for row in range(out.shape[1]):
        _indices(packed, entries, row * columns, line)
        table = tables[groups[row]]
        for sample in range(batch):
            sums[:] = 0.0
            for column in range(columns):
                sums[line[column]] += inputs[sample, column]
            total = np.float32(0.0)
            for entry in range(entries):
                total += sums[entry] * table[entry]
            out[sample, row] = total
