"""Fixed-point numbers: words of so many bits, some of them behind the binary point.

The format ``<WL, FL>`` (word length, fractional bits) is the grid of step ``2^-FL`` from
``-2^(WL-FL-1)`` to ``2^(WL-FL-1) - 2^-FL``, two's complement. Tensors on such a grid are stored as
their integer codes: in as few bits as the codes that occur need, and where many are zero as a
bitmap and the codes of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.core.errors import InputError
from gossamer.parts.packing import pack, packed_bytes, unpack
from gossamer.parts.stored import Kernel, Stored, shape_of


@dataclass(frozen=True)
class FixedPoint:
    """A fixed-point format.

    Attributes:
        word_length: bits of a word, sign included, 1 to 32.
        fraction: bits behind the binary point, -64 to 64 (it may exceed the word length: the
            leading bits behind the point are then always copies of the sign).

    Raises:
        InputError: if one is out of range.
    """

    word_length: int
    fraction: int

    def __post_init__(self) -> None:
        if not 1 <= self.word_length <= 32 or not -64 <= self.fraction <= 64:
            raise InputError(
                f"a fixed-point word has 1 to 32 bits, and -64 to 64 of them behind the point, "
                f"not {self.word_length} and {self.fraction}"
            )

    def __str__(self) -> str:
        return f"<{self.word_length},{self.fraction}>"

    @property
    def step(self) -> float:
        """Distance of neighbouring numbers."""
        return 2.0**-self.fraction

    @property
    def low(self) -> float:
        """The smallest number."""
        return -(2.0 ** (self.word_length - self.fraction - 1))

    @property
    def high(self) -> float:
        """The largest number."""
        return -self.low - self.step

    def codes(
        self,
        x: Tensor,
        *,
        stochastic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The integers nearest to ``x / step`` that fit into a word, in the type of ``x``.

        Args:
            x: any shape, floating point.
            stochastic: round up with a probability equal to the fraction that is lost, in place of
                to the nearest (half to even).
            generator: of those draws.
        """
        scaled = x * 2.0**self.fraction  # exact, short of overflow
        if stochastic:
            below = scaled.floor()
            draws = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            codes = below + (draws < scaled - below).to(x.dtype)
        else:
            codes = scaled.round()
        largest = 2 ** (self.word_length - 1)
        # The largest code may have more digits than x's type; then the largest one that has not.
        digits = 1 - round(math.log2(torch.finfo(x.dtype).eps))
        top = largest - 2 ** max(0, self.word_length - 1 - digits)
        return codes.clamp(-largest, top)

    def quantize(
        self,
        x: Tensor,
        *,
        stochastic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``x`` on the grid: clamped to the range and rounded, see :meth:`codes`."""
        return self.codes(x, stochastic=stochastic, generator=generator) * self.step


def integer_bits(x: Tensor) -> int:
    """Bits before the point that the magnitudes of ``x`` need, negative for small ones.

    ``ceil(log2 max|x|)``: the largest magnitude fits, or is clamped by one step if it is a power
    of two; -64 for zeros.
    """
    largest = float(x.detach().abs().max()) if x.numel() else 0.0
    return -64 if largest == 0.0 else max(-64, math.ceil(math.log2(largest)))


@dataclass(frozen=True)
class FixedPointTensor(Stored):
    """A tensor on a fixed-point grid, as integers.

    Attributes:
        codes: int32, the shape of the tensor.
        format: what a code stands for.
        activations: the format in which inputs are rounded before they are multiplied with this
            tensor, all in integers; None to multiply in float.
    """

    codec: ClassVar[str] = "fixed-point"

    codes: Tensor
    format: FixedPoint
    activations: FixedPoint | None = None

    @classmethod
    def of(
        cls, x: Tensor, format: FixedPoint, activations: FixedPoint | None = None
    ) -> FixedPointTensor:
        """Rounds a tensor to the nearest numbers of a format."""
        codes = format.codes(x.detach().cpu().double()).to(torch.int32)
        return cls(codes, format, activations)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the tensor."""
        return tuple(self.codes.shape)

    @property
    def bits(self) -> int:
        """Bits that every code fits into, sign included; at most the word length."""
        low, high = int(self.codes.min()), int(self.codes.max())
        return max((-low - 1).bit_length(), high.bit_length()) + 1

    def decode(self) -> Tensor:
        return (self.codes.double() * self.format.step).float()

    def _sparse(self) -> bool:
        """Whether a bitmap and the codes that are not zero take fewer bytes than all codes."""
        count, bits = self.codes.numel(), self.bits
        kept = int(self.codes.count_nonzero())
        return packed_bytes(count, 1) + packed_bytes(kept, bits) < packed_bytes(count, bits)

    def arrays(self) -> dict[str, Tensor]:
        codes = self.codes.flatten()
        arrays = {}
        bits = self.bits
        if self._sparse():
            mask = codes != 0
            arrays["m"] = pack(mask.to(torch.uint8), 1)
            codes = codes[mask]
        words = codes.long() + (1 << (bits - 1))
        arrays["c"] = pack(words & 0xFFFF, min(bits, 16))
        if bits > 16:
            arrays["h"] = pack(words >> 16, bits - 16)
        return arrays

    def nbytes(self) -> int:
        count, bits = self.codes.numel(), self.bits
        planes = [min(bits, 16)] + ([bits - 16] if bits > 16 else [])
        if not self._sparse():
            return sum(packed_bytes(count, plane) for plane in planes)
        kept = int(self.codes.count_nonzero())
        return packed_bytes(count, 1) + sum(packed_bytes(kept, plane) for plane in planes)

    def record(self) -> Any:
        inputs = self.activations and [self.activations.word_length, self.activations.fraction]
        own = [list(self.codes.shape), self.format.word_length, self.format.fraction, self.bits]
        return own if inputs is None else [*own, inputs]

    @classmethod
    def restore(cls, record: Any, arrays: Mapping[str, Tensor]) -> FixedPointTensor:
        shape, word_length, fraction, bits, *inputs = record
        shape, bits = shape_of(shape), int(bits)
        format = _format_of(word_length, fraction)
        if not 1 <= bits <= format.word_length or len(inputs) > 1:
            raise ValueError(record)
        count = kept = math.prod(shape)
        mask = None
        if "m" in arrays:
            mask = unpack(arrays["m"], 1, count).bool()
            kept = int(mask.sum())
        words = unpack(arrays["c"], min(bits, 16), kept).long()
        if bits > 16:
            words += unpack(arrays["h"], bits - 16, kept).long() << 16
        codes = (words - (1 << (bits - 1))).to(torch.int32)
        if mask is not None:
            whole = torch.zeros(count, dtype=torch.int32)
            whole[mask] = codes
            codes = whole
        activations = _format_of(*inputs[0]) if inputs else None
        return cls(codes.view(shape), format, activations)

    def kernel(self) -> Kernel:
        return FixedPointKernel(self)


def _format_of(word_length: Any, fraction: Any) -> FixedPoint:
    try:
        return FixedPoint(int(word_length), int(fraction))
    except InputError as error:
        raise ValueError(str(error)) from error


class FixedPointKernel(Kernel):
    """Multiplies with integer codes, which stay in the smallest integer type that holds them.

    With a format for the inputs all of it is integer arithmetic: products of codes are added in
    64 bits, and the sum is shifted by the fractional bits of both. Otherwise codes become floats
    for the length of a call.

    Args:
        stored: the weight.
    """

    def __init__(self, stored: FixedPointTensor) -> None:
        bits = stored.bits
        kind = torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32
        self.codes = stored.codes.to(kind)
        self.format = stored.format
        self.activations = stored.activations

    def _weight(self, x: Tensor) -> Tensor:
        # Through float64 only where float32 does not hold a code.
        wide = torch.float64 if self.codes.dtype == torch.int32 else torch.float32
        return (self.codes.to(x.device, wide) * self.format.step).to(x.dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.activations is None:
            return F.linear(x, self._weight(x), bias)
        sums = self._inputs(x).long() @ self.codes.to(x.device).long().T
        return self._shifted(sums, bias, x.dtype, 1)

    def conv2d(
        self,
        x: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        if self.activations is None:
            return F.conv2d(
                x, self._weight(x), bias, tuple(stride), tuple(padding), tuple(dilation), groups
            )
        outputs, _, *kernel = self.codes.shape
        windows = F.unfold(
            self._inputs(x), tuple(kernel), tuple(dilation), tuple(padding), tuple(stride)
        ).long()
        windows = windows.unflatten(1, (groups, -1))
        weight = self.codes.to(x.device).long().reshape(groups, outputs // groups, -1)
        sums = (weight @ windows).flatten(1, 2)
        sides = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
        ]
        return self._shifted(sums.unflatten(2, sides), bias, x.dtype, 3)

    def _inputs(self, x: Tensor) -> Tensor:
        assert self.activations is not None
        return self.activations.codes(x.double())  # float64 holds every code and window exactly

    def _shifted(self, sums: Tensor, bias: Tensor | None, dtype: torch.dtype, ndim: int) -> Tensor:
        assert self.activations is not None
        shift = self.format.fraction + self.activations.fraction
        if bias is not None:
            codes = (bias.double() * 2.0**shift).round().long()
            sums = sums + codes.view(-1, *[1] * (ndim - 1))
        return (sums.double() * 2.0**-shift).to(dtype)
