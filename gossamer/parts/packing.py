"""Integer codes of 1 to 16 bits as dense bytes, and how short Huffman codes would make them.

Code ``i`` occupies bits ``i * bits`` to ``(i + 1) * bits - 1`` of the stream, least significant bit
first, so ``n`` codes take exactly ``ceil(n * bits / 8)`` bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import InputError

# Codes packed at a time: bounds the expanded bit matrix; a multiple of 8 so that pieces join at
# byte borders.
_PIECE = 1 << 20


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes into bytes.

    Args:
        codes: integers in 0 .. 2^bits - 1, any shape; taken in row-major order.
        bits: 1 to 16.

    Returns:
        uint8 ``[ceil(n * bits / 8)]`` on the CPU.

    Raises:
        InputError: if a code does not fit or ``bits`` is out of range.
    """
    _check(bits)
    flat = codes.detach().cpu().flatten().numpy()
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= 1 << bits):
        raise InputError(
            f"codes from {flat.min()} to {flat.max()} do not fit into {bits} bits "
            f"(0 to {(1 << bits) - 1})"
        )
    if bits == 8:
        return torch.from_numpy(flat.astype(np.uint8))
    shifts = np.arange(bits, dtype=np.uint16)
    pieces = []
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE].astype(np.uint16)
        ones = ((piece[:, None] >> shifts) & 1).astype(np.uint8)
        pieces.append(np.packbits(ones, bitorder="little"))
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.zeros(0, np.uint8))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Reads what :func:`pack` wrote.

    Args:
        packed: uint8 ``[bytes]``.
        bits: 1 to 16, as packed.
        count: how many codes.

    Returns:
        ``[count]``, uint8 up to 8 bits, int32 above.

    Raises:
        InputError: if there are not exactly the bytes that ``count`` codes take.
    """
    _check(bits)
    if count < 0 or packed.dtype != torch.uint8 or packed.numel() != packed_bytes(count, bits):
        raise InputError(
            f"{count} codes of {bits} bits take {packed_bytes(max(count, 0), bits)} bytes, "
            f"but there are {packed.numel()} of type {packed.dtype}"
        )
    flat = packed.detach().cpu().flatten().numpy()
    if bits == 8:
        return torch.from_numpy(flat.copy())
    weights = (1 << np.arange(bits)).astype(np.uint16)
    codes = np.empty(count, np.uint8 if bits <= 8 else np.int32)
    for start in range(0, count, _PIECE):
        taken = min(_PIECE, count - start)
        ones = np.unpackbits(
            flat[start * bits // 8 : packed_bytes(start + taken, bits)],
            count=taken * bits,
            bitorder="little",
        )
        codes[start : start + taken] = ones.reshape(taken, bits).astype(np.uint16) @ weights
    return torch.from_numpy(codes)


def _check(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise InputError(f"codes have 1 to 16 bits, not {bits}")


def huffman_lengths(frequencies: Sequence[float] | Tensor) -> list[int]:
    """Lengths in bits of an optimal prefix code.

    Args:
        frequencies: how often each symbol occurs (counts or shares). A symbol that never occurs
            gets no code: length 0. A lone symbol gets one bit.

    Returns:
        One length for each symbol.

    Source: Huffman, "A method for the construction of minimum-redundancy codes", 1952.
    """
    values = [float(value) for value in frequencies]
    lengths = [0] * len(values)
    # The counter makes ties a matter of order, not of comparing lists.
    heap = [(value, i, [i]) for i, value in enumerate(values) if value > 0]
    heapq.heapify(heap)
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
        return lengths
    count = len(values)
    while len(heap) > 1:
        low, _, left = heapq.heappop(heap)
        next_low, _, right = heapq.heappop(heap)
        for symbol in (*left, *right):
            lengths[symbol] += 1
        heapq.heappush(heap, (low + next_low, count, left + right))
        count += 1
    return lengths


def huffman_mean_bits(frequencies: Sequence[float] | Tensor) -> float:
    """Mean bits per symbol of an optimal prefix code (0 when nothing occurs)."""
    values = [float(value) for value in frequencies]
    total = sum(values)
    if total <= 0:
        return 0.0
    pairs = zip(values, huffman_lengths(values), strict=True)
    return sum(value * length for value, length in pairs) / total
