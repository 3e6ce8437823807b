"""Scaled numbers: int4, int8 and FP8 weights with one scale a channel or a group of inputs.

The conventions are those of compressed-tensors, so that what is rounded here is what its loaders
read: ``b`` bits hold ``-2^(b-1)`` to ``2^(b-1) - 1``, a symmetric scale is the largest magnitude
divided by ``(2^b - 1) / 2`` (7.5 or 127.5), a value is clamped and then rounded half to even; FP8
is E4M3 with the largest magnitude at 448. Activations are scaled in the same way, one scale a
token, found as the network runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from gossamer.core.errors import InputError
from gossamer.parts.stored import Kernel, Stored, shape_of

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
_TINY = torch.finfo(torch.float32).eps
_TILE = 256  # rows that are decoded at a time: they stay in the cache until they are multiplied


@dataclass(frozen=True)
class NumberFormat:
    """What a code is: an integer of so many bits, or FP8 E4M3.

    Attributes:
        kind: "int" or "float".
        bits: 4 or 8; floats have 8.

    Raises:
        InputError: if there is no such format.
    """

    kind: Literal["int", "float"] = "int"
    bits: int = 8

    def __post_init__(self) -> None:
        if (self.kind, self.bits) not in (("int", 4), ("int", 8), ("float", 8)):
            raise InputError(
                f"numbers are integers of 4 or 8 bits or floats of 8, not {self.kind}{self.bits}"
            )

    @property
    def low(self) -> float:
        """The smallest code."""
        return -(2.0 ** (self.bits - 1)) if self.kind == "int" else -FLOAT8_MAX

    @property
    def high(self) -> float:
        """The largest code."""
        return -self.low - 1 if self.kind == "int" else FLOAT8_MAX

    @property
    def half_range(self) -> float:
        """What the largest magnitude is divided by: 7.5, 127.5 or 448."""
        return (self.high - self.low) / 2

    def scale(self, magnitude: Tensor) -> Tensor:
        """The symmetric scale of values up to ``magnitude``."""
        return (magnitude / self.half_range).clamp_min(_TINY)

    def codes(self, x: Tensor, scale: Tensor | float, zero: Tensor | float = 0.0) -> Tensor:
        """Codes of ``x``, in the type of ``x``: clamped, then rounded half to even."""
        codes = x / scale
        if not (isinstance(zero, float) and zero == 0.0):
            codes = codes + zero
        codes = codes.clamp(self.low, self.high)
        return codes.round() if self.kind == "int" else round_float8(codes)


def round_float8(x: Tensor) -> Tensor:
    """Rounds to FP8 E4M3 by arithmetic alone (``|x| <= 448``), in the type of ``x``.

    A cast would do the same, but not every runtime to which a network is exported has one. That a
    logarithm may be off by a digit does no harm: beside a power of two both steps give the same.
    """
    exponent = torch.log2(x.abs().clamp_min(2.0**-6)).floor()
    step = torch.exp2(exponent - 3.0)
    return (x / step).round() * step


@dataclass(frozen=True)
class WeightFormat:
    """How a weight ``[outputs, inputs]`` is stored.

    Attributes:
        number: what a code is.
        group: inputs that share a scale; None for one scale an output. The last group may be
            shorter.
        symmetric: no zero point.

    Raises:
        InputError: if ``group`` is no size, or floats are to have a zero point.
    """

    number: NumberFormat = NumberFormat()
    group: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise InputError(f"a group holds at least one input, not {self.group}")
        if self.number.kind == "float" and not self.symmetric:
            raise InputError("floats have no zero point; leave symmetric as it is")

    def groups(self, inputs: int) -> Tensor:
        """The group of each input, int64 ``[inputs]``."""
        return torch.arange(inputs) // (self.group or inputs)

    def ranges(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each group, ``[outputs, groups]``; zero is always in."""
        cut = grouped(weight, self.group)
        return cut.amin(2).clamp_max(0.0), cut.amax(2).clamp_min(0.0)

    def scales(
        self, low: Tensor, high: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points of ranges.

        Args:
            low: at most 0.
            high: at least 0.
            dtype: type in which scales are stored; they are rounded to it here, in the type of
                ``low``, since codes have to be found with the scale that will be read.
        """
        number = self.number
        if self.symmetric:
            scale = number.scale(torch.maximum(-low, high))
        else:
            scale = ((high - low) / (number.high - number.low)).clamp_min(_TINY)
        if dtype is not None:
            scale = scale.to(dtype).to(low.dtype)
        if self.symmetric:
            return scale, None
        return scale, (number.low - low / scale).clamp(number.low, number.high).round()


def grouped(weight: Tensor, group: int | None) -> Tensor:
    """A weight ``[outputs, inputs]`` as ``[outputs, groups, size]``, padded with zeros."""
    size = group or weight.shape[1]
    return F.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))


@dataclass(frozen=True)
class ActivationFormat:
    """How the inputs of a layer are rounded before they are multiplied.

    Attributes:
        number: what a code is.
        scale: one for all tokens, fixed beforehand; None finds one for each token at run time.
    """

    number: NumberFormat = NumberFormat()
    scale: float | None = None

    def scales(self, x: Tensor) -> Tensor | float:
        """Scales ``[..., 1]`` of tokens ``[..., channels]``, or the one of all."""
        if self.scale is not None:
            return self.scale
        return self.number.scale(x.abs().amax(-1, keepdim=True))

    def round(self, x: Tensor) -> Tensor:
        """The values that remain of ``x`` ``[..., channels]``."""
        wide = x.float()
        scale = self.scales(wide)
        return (self.number.codes(wide, scale) * scale).to(x.dtype)


# Four bits


def pack_nibbles(codes: Tensor) -> Tensor:
    """Packs codes -8 .. 7 ``[rows, n]`` into int32 ``[rows, ceil(n / 8)]``.

    Code ``i`` of eight plus 8 takes bits ``4 i`` to ``4 i + 3``; missing ones are filled with bits
    of zero.
    """
    raised = F.pad((codes.to(torch.int16) + 8).to(torch.uint8), (0, -codes.shape[1] % 8))
    pairs = raised[:, 0::2] | raised[:, 1::2] << 4
    return pairs.contiguous().view(torch.int32)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Reads what :func:`pack_nibbles` wrote: int8 ``[rows, count]``."""
    pairs = packed.contiguous().view(torch.uint8)
    raised = torch.stack([pairs & 15, pairs >> 4], 2).flatten(1)
    return raised[:, :count].to(torch.int8) - 8


# Tensors


@dataclass(frozen=True)
class ScaledTensor(Stored):
    """A weight as codes and scales.

    Attributes:
        codes: int8 or float8_e4m3fn ``[outputs, inputs]``.
        scale: floating point ``[outputs, groups]``, in the type in which it is stored.
        format: what they mean.
        zero: int8 zero points ``[outputs, groups]``, or None.
        order: group of each input, int32 ``[inputs]``, where groups are not neighbours; or None.
        activations: how inputs are rounded before they are multiplied with this; None for not.
    """

    codec: ClassVar[str] = "scaled"

    codes: Tensor
    scale: Tensor
    format: WeightFormat
    zero: Tensor | None = None
    order: Tensor | None = None
    activations: ActivationFormat | None = None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        format: WeightFormat,
        scale: Tensor,
        zero: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> ScaledTensor:
        """Rounds a weight to the nearest codes, with scales ``[outputs, groups]``."""
        at = format.groups(weight.shape[1]).to(weight.device)
        shift = 0.0 if zero is None else zero[:, at]
        return cls.from_values(
            format.number.codes(weight, scale[:, at], shift), format, scale, zero, dtype=dtype
        )

    @classmethod
    def from_values(
        cls,
        codes: Tensor,
        format: WeightFormat,
        scale: Tensor,
        zero: Tensor | None = None,
        order: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> ScaledTensor:
        """Codes given as floating-point numbers."""
        kind = torch.int8 if format.number.kind == "int" else FLOAT8
        return cls(
            codes.detach().cpu().to(kind),
            scale.detach().cpu().to(dtype),
            format,
            None if zero is None else zero.detach().cpu().to(torch.int8),
            None if order is None else order.cpu().to(torch.int32),
        )

    def running_on(self, activations: ActivationFormat | None) -> ScaledTensor:
        """The same tensor, multiplied with inputs that are rounded so."""
        return replace(self, activations=activations)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the tensor."""
        return tuple(self.codes.shape)

    def groups(self) -> Tensor:
        """The group of each input, int64 ``[inputs]``."""
        return self.format.groups(self.shape[1]) if self.order is None else self.order.long()

    def decode(self) -> Tensor:
        at = self.groups()
        values = self.codes.float()
        if self.zero is not None:
            values = values - self.zero.float()[:, at]
        return values * self.scale.float()[:, at]

    def arrays(self) -> dict[str, Tensor]:
        four = self.format.number.bits == 4
        arrays = {"c": pack_nibbles(self.codes) if four else self.codes, "s": self.scale}
        if self.zero is not None:
            arrays["z"] = pack_nibbles(self.zero) if four else self.zero
        if self.order is not None:
            arrays["g"] = self.order
        return arrays

    def record(self) -> Any:
        format, activations = self.format, self.activations
        inputs = activations and [
            activations.number.kind, activations.number.bits, activations.scale
        ]  # fmt: skip
        number = format.number
        return [
            list(self.shape), number.kind, number.bits, format.group, format.symmetric, inputs
        ]  # fmt: skip

    @classmethod
    def restore(cls, record: Any, arrays: Mapping[str, Tensor]) -> ScaledTensor:
        shape, kind, bits, group, symmetric, inputs = record
        rows, columns = shape_of(shape)
        try:
            format = WeightFormat(
                NumberFormat(kind, bits), None if group is None else int(group), bool(symmetric)
            )
            activations = None
            if inputs is not None:
                own_kind, own_bits, scale = inputs
                number = NumberFormat(own_kind, own_bits)
                activations = ActivationFormat(number, None if scale is None else float(scale))
        except InputError as error:
            raise ValueError(str(error)) from error
        return cls(
            *checked(format, (rows, columns), arrays["c"], arrays["s"], arrays.get("z")),
            _checked_order(arrays["g"], format, columns) if "g" in arrays else None,
            activations,
        )

    def kernel(self) -> Kernel:
        return ScaledKernel(self)


def checked(
    format: WeightFormat, shape: tuple[int, int], codes: Tensor, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor, WeightFormat, Tensor | None]:
    """Codes, scales and zero points as they come out of a file (four bits packed along rows).

    Raises:
        ValueError: if they do not fit together.
    """
    rows, columns = shape
    groups = -(-columns // (format.group or columns))
    four = format.number.bits == 4
    if not (
        scale.shape == (rows, groups)
        and scale.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and bool(torch.isfinite(scale).all())
    ):
        raise ValueError("the scales do not fit the weight")
    codes = _unpacked(codes, columns, rows, format.number)
    if (zero is None) != format.symmetric:
        raise ValueError("zero points are there without need, or missing")
    if zero is not None:
        zero = _unpacked(zero, groups, rows, format.number) if four else zero
        if zero.dtype != torch.int8 or zero.shape != (rows, groups):
            raise ValueError("the zero points do not fit the weight")
    return codes, scale, format, zero


def _unpacked(codes: Tensor, columns: int, rows: int, number: NumberFormat) -> Tensor:
    if number.bits == 4:
        if codes.dtype != torch.int32 or codes.shape != (rows, -(-columns // 8)):
            raise ValueError("the packed codes do not fit the weight")
        return unpack_nibbles(codes, columns)
    kind = torch.int8 if number.kind == "int" else FLOAT8
    if codes.dtype != kind or codes.shape != (rows, columns):
        raise ValueError("the codes do not fit the weight")
    return codes


def _checked_order(order: Tensor, format: WeightFormat, columns: int) -> Tensor:
    groups = -(-columns // (format.group or columns))
    if (
        order.dtype != torch.int32
        or order.shape != (columns,)
        or int(order.min()) < 0
        or int(order.max()) >= groups
    ):
        raise ValueError("the groups of inputs do not fit the weight")
    return order


# Products


class ScaledKernel(Kernel):
    """Multiplies with codes as they are stored.

    int8 with rounded inputs: the sums are integers (int32), scaled once. Four bits in bfloat16 on
    a CPU: torch's kernel, which decodes in registers. Everything else: rows of the weight are
    decoded some at a time and multiplied while they are in the cache; so are FP8 weights, for which
    a CPU has no products.
    """

    def __init__(self, tensor: ScaledTensor) -> None:
        number, activations = tensor.format.number, tensor.activations
        self.activations = activations
        self.rows, self.columns = tensor.shape
        self.integer = (
            number == NumberFormat("int", 8)
            and activations is not None
            and activations.number == number
            and tensor.format == WeightFormat(number)
        )
        self.number = number
        self.codes = pack_nibbles(tensor.codes) if number.bits == 4 else tensor.codes
        self.scale = tensor.scale.float()
        self.zero = None if tensor.zero is None else tensor.zero.float()
        self.groups = tensor.groups()
        self.grouped = tensor.format.group if tensor.order is None else None
        self.fused = self._fused(tensor) if number.bits == 4 else None

    def _fused(self, tensor: ScaledTensor) -> tuple[Tensor, Tensor] | None:
        """Codes and scales as torch's kernel for four bits wants them, where it can be used."""
        group = tensor.format.group
        if (
            group not in (32, 64, 128, 256)
            or self.columns % group
            or self.rows % 16
            or tensor.order is not None
            or not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu")
        ):
            return None
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            tensor.codes.to(torch.int32) + 8, 2
        )
        shift = torch.zeros_like(self.scale) if self.zero is None else -self.zero * self.scale
        return codes, torch.stack([self.scale.T, shift.T], 2).contiguous().bfloat16()

    def reads(self, source: fx.Node) -> fx.Node | None:
        """What is rounded before the product: the kernel rounds it itself."""
        if self.activations is None:
            return source
        node = source
        while _named(node, "_to_copy", "to"):
            node = _first(node)
        if not _named(node, "mul"):
            return None
        scale, node = node.args[1], _first(node)
        for _ in range(8):
            if _named(node, "div") and (node.args[1] is scale or node.args[1] == scale):
                node = _first(node)
                while _named(node, "_to_copy", "to"):
                    node = _first(node)
                return node
            node = _first(node)
        return None

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.flatten(0, -2)
        if self.integer:
            y = self._integers(flat)
        elif self.fused is not None and x.dtype == torch.bfloat16 and not x.is_cuda:
            codes, scales = self.fused
            assert self.grouped is not None
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, codes, self.grouped, scales)
        else:
            y = self._tiles(flat)
        y = y if bias is None else y + bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def _integers(self, x: Tensor) -> Tensor:
        assert self.activations is not None
        wide = x.float()
        scale = self.activations.scales(wide)
        codes = self.activations.number.codes(wide, scale).to(torch.int8)
        sums = integer_product(codes, self.codes.to(x.device))
        return sums.float() * scale * self.scale.to(x.device).T

    def _tiles(self, x: Tensor) -> Tensor:
        if self.activations is not None:
            x = self._rounded(x)
        y = x.new_empty(len(x), self.rows)
        for start in range(0, self.rows, _TILE):
            part = slice(start, start + _TILE)
            y[:, part] = F.linear(x, self._tile(part, x))
        return y

    def _rounded(self, x: Tensor) -> Tensor:
        assert self.activations is not None
        number, wide = self.activations.number, x.float()
        scale = self.activations.scales(wide)
        if number.kind == "int":
            return (number.codes(wide, scale) * scale).to(x.dtype)
        codes = (wide / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
        return (codes.float() * scale).to(x.dtype)

    def _tile(self, rows: slice, x: Tensor) -> Tensor:
        packed = self.codes[rows].to(x.device)
        codes = unpack_nibbles(packed, self.columns) if self.number.bits == 4 else packed
        values, scale = codes.float(), self.scale[rows].to(x.device)
        if scale.shape[1] == 1:
            shift = 0.0 if self.zero is None else self.zero[rows].to(x.device)
            return ((values - shift) * scale).to(x.dtype)
        at = self.groups.to(x.device)
        if self.zero is not None:
            values = values - self.zero[rows].to(x.device)[:, at]
        return (values * scale[:, at]).to(x.dtype)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of int8 ``[n, k]`` and ``[m, k]`` in int32, exact."""
    if not a.is_cuda:
        return torch.ops.aten._int_mm(a, b.T)
    if b.shape[0] % 8 or b.shape[1] % 8:  # cuBLAS multiplies whole eights only
        return (a.double() @ b.double().T).to(torch.int32)
    padded = F.pad(a, (0, 0, 0, max(0, 32 - len(a))))
    return torch.ops.aten._int_mm(padded, b.T)[: len(a)]


def _named(node: Any, *names: str) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return str(node.target).split(".")[1:2] in [[name] for name in names]


def _first(node: Any) -> Any:
    return node.args[0] if isinstance(node, fx.Node) and node.args else None
