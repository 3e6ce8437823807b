"""Few-bit tensors: bucketed scaling, uniform grids and learned levels.

A tensor is flattened and cut into *buckets* of consecutive values; each bucket is scaled by
numbers of its own, so one outlier spoils one bucket only. Inside a bucket a value becomes the
index (*code*) of a level.

* A uniform grid has evenly spaced levels: nothing is stored but codes and scales.
* Learned levels are a sorted table for each tensor, placed by quantiles or by gradient descent.

Source: Polino, Pascanu and Alistarh, "Model compression via distillation and quantization",
arXiv:1802.05668, sections 3.1 (scaling, buckets), 3.2 (uniform) and 4 (learned levels).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.parts.packing import pack, unpack
from gossamer.parts.stored import Stored, shape_of
from gossamer.parts.straight_through import straight_through

Scheme = Literal["linear", "absmax", "absnorm"]
"""How a bucket is scaled: "linear" maps its minimum and maximum to 0 and 1; "absmax" divides
magnitudes by the largest, "absnorm" by the 2-norm, and both keep the sign (levels are then
symmetric around zero, which is itself a level)."""

FLAT = 1e-10
"""Buckets whose range (or norm) is below this are constant for every purpose."""


def bucketed(values: Tensor, bucket: int | None = 256) -> Tensor:
    """Flattens and cuts into buckets ``[buckets, size]``.

    The last bucket is padded with the tensor's last value. A tensor shorter than ``bucket`` is one
    bucket of its own size.

    Args:
        values: any shape, not empty.
        bucket: values a bucket; None for the whole tensor.
    """
    flat = values.flatten()
    if flat.numel() == 0:
        raise InputError("an empty tensor cannot be quantized")
    if bucket is not None and bucket < 1:
        raise InputError(f"a bucket holds at least one value, not {bucket}")
    size = flat.numel() if bucket is None else min(bucket, flat.numel())
    missing = -flat.numel() % size
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, size)


def unbucketed(buckets: Tensor, shape: Sequence[int]) -> Tensor:
    """Drops the padding that :func:`bucketed` added and restores the shape."""
    return buckets.flatten()[: math.prod(shape)].view(tuple(shape))


def bucket_count(count: int, bucket: int | None) -> int:
    """Buckets of a tensor with ``count`` values."""
    return 1 if bucket is None else -(-count // min(bucket, count))


@dataclass(frozen=True)
class QTensor(Stored):
    """A tensor as codes, scales and levels: everything that is stored, nothing that is not.

    Attributes:
        codes: level indices ``[n]``, uint8 (int32 above 8 bits), row-major.
        low: value of unit position 0 in each bucket, float32 ``[buckets]``.
        high: value of unit position 1 in each bucket, float32 ``[buckets]``.
        shape: of the decoded tensor.
        bits: bits a code takes.
        levels: how many levels there are; level ``k`` of a uniform grid lies at
            ``k / (levels - 1)`` between ``low`` and ``high``.
        bucket: values a bucket, or None for one bucket.
        scheme: how buckets were scaled. The symmetric schemes store ``high`` only.
        points: learned levels in unit positions, sorted float32 ``[levels]``; None for a uniform
            grid.
        mean: subtracted from the tensor before scaling and added after decoding.
    """

    codec: ClassVar[str] = "uniform"

    codes: Tensor
    low: Tensor
    high: Tensor
    shape: tuple[int, ...]
    bits: int
    levels: int
    bucket: int | None
    scheme: Scheme = "linear"
    points: Tensor | None = None
    mean: float | None = None

    @property
    def alpha(self) -> Tensor:
        """Range of each bucket, ``[buckets]``; 1 for constant ones, as in the paper."""
        width = self.high - self.low
        return torch.where(width < FLAT, torch.ones_like(width), width)

    def dequantize(self) -> Tensor:
        """The decoded tensor, float32 ``shape``.

        Uniform grids decode as ``low (1 - q) + high q``: unlike ``low + alpha q`` this gives a
        bucket's minimum and maximum back bit for bit, so quantizing twice changes nothing.
        """
        codes = bucketed(self.codes, self.bucket)
        low, high = self.low[:, None], self.high[:, None]
        if self.points is not None:
            decoded = low + self.alpha[:, None] * self.points[codes.long()]
        elif self.scheme == "linear":
            position = codes.to(low.dtype) / (self.levels - 1)
            decoded = low * (1 - position) + high * position
        else:
            steps = (self.levels - 1) // 2
            decoded = high * ((codes.to(low.dtype) - steps) / steps)
        result = unbucketed(decoded, self.shape)
        return result if self.mean is None else result + self.mean

    def size_bits(self) -> int:
        """Bits of codes, scales (float32) and level table.

        ``n * bits + 2 * 32 * buckets`` for linear scaling (one scale a bucket for the symmetric
        schemes), ``32 * levels`` more for learned levels and 32 more for a subtracted mean.
        """
        scales = 2 if self.scheme == "linear" else 1
        bits = self.codes.numel() * self.bits + 32 * scales * self.low.numel()
        bits += 0 if self.points is None else 32 * self.points.numel()
        return bits + (0 if self.mean is None else 32)

    def nbytes(self) -> int:
        """Bytes of :meth:`size_bits`, codes rounded up to whole bytes."""
        return -(-self.size_bits() // 8)

    def decode(self) -> Tensor:
        return self.dequantize()

    def arrays(self) -> dict[str, Tensor]:
        scales = [self.high] if self.scheme != "linear" else [self.low, self.high]
        arrays = {"c": pack(self.codes, self.bits), "s": torch.stack(scales).float()}
        return arrays if self.points is None else arrays | {"p": self.points.float()}

    def record(self) -> Any:
        return [self.shape, self.bits, self.levels, self.bucket, self.scheme, self.mean]

    @classmethod
    def restore(cls, record: Any, arrays: Mapping[str, Tensor]) -> QTensor:
        shape, bits, levels, bucket, scheme, mean = record
        shape = shape_of(shape)
        count = math.prod(shape)
        if scheme not in ("linear", "absmax", "absnorm"):
            raise ValueError(record)
        codes = unpack(arrays["c"], int(bits), count)
        scales = arrays["s"].float()
        points = arrays.get("p")
        if (
            scales.shape != (2 if scheme == "linear" else 1, bucket_count(count, bucket))
            or not 2 <= int(levels) <= 1 << int(bits)
            or int(codes.max()) >= int(levels)
            or (points is not None and points.shape != (int(levels),))
        ):
            raise ValueError(record)
        high = scales[-1].clone()
        return cls(
            codes=codes,
            low=scales[0].clone() if scheme == "linear" else -high,
            high=high,
            shape=shape,
            bits=int(bits),
            levels=int(levels),
            bucket=None if bucket is None else int(bucket),
            scheme=scheme,
            points=points,
            mean=None if mean is None else float(mean),
        )

    def histogram(self) -> Tensor:
        """How often each level is used, int64 ``[levels]``."""
        return torch.bincount(self.codes.flatten().long(), minlength=self.levels)


def compression_factor(bits: int, bucket: int, full: int = 32) -> float:
    """Bits of ``full``-bit values over bits of codes and two scales a bucket (section 3.1)."""
    return full * bucket / (bucket * bits + 2 * full)


def _scales(buckets: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """``low`` and ``high`` of each bucket, ``[buckets]``."""
    match scheme:
        case "linear":
            return buckets.amin(1), buckets.amax(1)
        case "absmax":
            high = buckets.abs().amax(1)
        case "absnorm":
            high = buckets.norm(dim=1)
        case _:
            raise InputError(f"no scaling is called {scheme}; there are linear, absmax, absnorm")
    return -high, high


def _unit(buckets: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Linear scaling to [0, 1]; constant buckets become 0."""
    alpha = high - low
    alpha = torch.where(alpha < FLAT, torch.ones_like(alpha), alpha)
    return ((buckets - low[:, None]) / alpha[:, None]).clamp(0.0, 1.0)


def _checked(values: Tensor) -> Tensor:
    values = values.detach().float()
    if not bool(torch.isfinite(values).all()):
        raise InputError("a tensor with NaN or infinite values cannot be quantized")
    return values


def quantize_tensor(
    values: Tensor,
    *,
    bits: int = 4,
    bucket: int | None = 256,
    scheme: Scheme = "linear",
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    levels: int | None = None,
    subtract_mean: bool = False,
    clip: float | None = None,
) -> QTensor:
    """Rounds a tensor to a uniform grid.

    Args:
        values: any shape, finite.
        bits: of a code; there are ``2^bits`` levels (``2^bits - 1`` for the symmetric schemes,
            whose sign takes a bit: ``2^(bits-1)`` magnitudes).
        bucket: values a bucket; None for one bucket.
        scheme: how buckets are scaled.
        stochastic: round up with probability equal to the distance from the level below, so that
            the expectation is the value itself; otherwise to the nearest level, half to even.
        generator: draws the stochastic rounding.
        levels: fewer levels than the bits allow (linear scaling only).
        subtract_mean: scale the tensor without its mean and add it after decoding.
        clip: clamp values to ``[-clip, clip]`` first, or None.

    Raises:
        InputError: if values are not finite or an option is out of range.

    Source: arXiv:1802.05668, sections 3.1 and 3.2.
    """
    symmetric = scheme != "linear"
    if not (2 if symmetric else 1) <= bits <= 16:
        raise InputError(f"{scheme} codes have {2 if symmetric else 1} to 16 bits, not {bits}")
    values = _checked(values)
    shape = tuple(values.shape)
    if clip is not None:
        values = values.clamp(-clip, clip)
    mean = float(values.mean()) if subtract_mean else None
    buckets = bucketed(values if mean is None else values - mean, bucket)
    low, high = _scales(buckets, scheme)
    if symmetric:
        if levels is not None:
            raise InputError("levels are chosen by bits in the symmetric schemes")
        steps = 2 ** (bits - 1) - 1
        count = 2 * steps + 1
        alpha = torch.where(high < FLAT, torch.ones_like(high), high)[:, None]
        magnitude = (buckets.abs() / alpha).clamp(max=1.0) * steps
        codes = torch.sign(buckets) * _rounded(magnitude, stochastic, generator) + steps
    else:
        count = 2**bits if levels is None else levels
        if not 2 <= count <= 2**bits:
            raise InputError(f"{bits} bits hold 2 to {2**bits} levels, not {count}")
        codes = _rounded(_unit(buckets, low, high) * (count - 1), stochastic, generator)
    return QTensor(
        codes=unbucketed(codes, shape).flatten().to(torch.uint8 if bits <= 8 else torch.int32),
        low=low,
        high=high,
        shape=shape,
        bits=bits,
        levels=count,
        bucket=bucket,
        scheme=scheme,
        mean=mean,
    )


def _rounded(x: Tensor, stochastic: bool, generator: torch.Generator | None) -> Tensor:
    if not stochastic:
        return torch.round(x)
    below = torch.floor(x)
    draws = torch.rand(x.shape, generator=generator, device=x.device)
    return below + (draws < x - below)


class _ExactUniform(torch.autograd.Function):
    """The uniform quantizer with the gradient through a bucket's own minimum and maximum."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, value: Tensor, bucket: int | None) -> Tensor:
        ctx.save_for_backward(w.detach(), value)
        ctx.bucket = bucket
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g,) = gradients
        w, value = ctx.saved_tensors
        buckets = bucketed(w, ctx.bucket)
        low, high = buckets.amin(1), buckets.amax(1)
        alpha = high - low
        moving = alpha >= FLAT
        alpha = torch.where(moving, alpha, torch.ones_like(alpha))
        # d alpha reaches only w's extremes: dQ = dw + d(alpha) (q - v), from Q = alpha q + beta.
        error = (bucketed(value, ctx.bucket) - buckets) / alpha[:, None]
        padded_g = torch.zeros_like(buckets)
        padded_g.view(-1)[: g.numel()] = g.flatten()
        slope = (padded_g * error).sum(1) * moving
        starts = torch.arange(len(buckets), device=w.device) * buckets.shape[1]
        result = g.flatten().clone()
        # An extreme found in the padding is the last real value, of which the padding is made.
        last = g.numel() - 1
        result.index_add_(0, (starts + buckets.argmax(1)).clamp(max=last), slope)
        result.index_add_(0, (starts + buckets.argmin(1)).clamp(max=last), -slope)
        return result.view_as(g), None, None


Gradient = Literal["straight", "truncated", "complicated"]
"""What passes back through a uniform quantizer. "straight": the identity. "truncated": weights are
clamped to [-1, 1] before quantizing and the gradient is zero where ``|w| > 1``. "complicated": the
exact gradient through a bucket's minimum and maximum, with rounding taken as the identity."""


def fake_quantize(
    w: Tensor,
    *,
    bits: int = 4,
    bucket: int | None = 256,
    scheme: Scheme = "linear",
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    gradient: Gradient = "straight",
) -> Tensor:
    """The quantized value of ``w`` with a gradient that trains ``w``.

    Args:
        w: float weights, any shape.
        bits: as in :func:`quantize_tensor`.
        bucket: as there.
        scheme: as there; "complicated" needs "linear".
        stochastic: as there.
        generator: as there.
        gradient: see :data:`Gradient`.

    Source: arXiv:1802.05668, section 3.3, and its published code.
    """
    if gradient == "complicated" and scheme != "linear":
        raise InputError("the complicated gradient is defined for linear scaling only")
    source = w.detach().clamp(-1.0, 1.0) if gradient == "truncated" else w
    value = quantize_tensor(
        source, bits=bits, bucket=bucket, scheme=scheme, stochastic=stochastic, generator=generator
    ).dequantize()
    value = value.to(w.dtype)
    if gradient == "complicated":
        return _ExactUniform.apply(w, value, bucket)  # type: ignore[no-any-return]
    mask = (w.detach().abs() <= 1.0).to(w.dtype) if gradient == "truncated" else None
    return straight_through(w, value, mask)


# Learned levels


def uniform_points(levels: int) -> Tensor:
    """``levels`` evenly spaced unit positions from 0 to 1."""
    return torch.linspace(0.0, 1.0, levels)


def quantile_points(unit: Tensor, levels: int) -> Tensor:
    """The percentiles 0..100, evenly spaced, of unit positions (linear interpolation).

    Args:
        unit: values in [0, 1], any shape.
        levels: how many.

    Returns:
        Sorted ``[levels]``.
    """
    # Sorting: torch.quantile refuses more than 16 million values.
    ordered = unit.detach().flatten().sort().values
    place = torch.linspace(0, ordered.numel() - 1, levels, dtype=torch.float64)
    below = place.floor().long().clamp(max=ordered.numel() - 1)
    above = (below + 1).clamp(max=ordered.numel() - 1)
    share = (place - below).to(ordered)
    below, above = below.to(ordered.device), above.to(ordered.device)
    return ordered[below] + share * (ordered[above] - ordered[below])


def nearest_levels(unit: Tensor, points: Tensor) -> Tensor:
    """Index of the nearest point for each value; exactly midway the upper one.

    Args:
        unit: values, any shape.
        points: sorted ``[levels]``.

    Returns:
        int64, the shape of ``unit``.
    """
    middles = (points[1:] + points[:-1]) / 2
    return torch.searchsorted(middles.contiguous(), unit.contiguous(), right=True)


class SortedAssignment:
    """Nearest levels of values that never change, under levels that move a little each step.

    The values are sorted once. Level borders are then positions in the sorted order, found by as
    many binary searches as there are borders, and only values between the old and the new place
    of a border are assigned anew.

    Args:
        unit: the frozen values, any shape.
        points: sorted ``[levels]``.
    """

    def __init__(self, unit: Tensor, points: Tensor) -> None:
        self._sorted, self._order = unit.detach().flatten().sort()
        self._borders = self._find(points)
        ranks = torch.arange(self._sorted.numel(), device=unit.device)
        codes = torch.empty_like(ranks)
        codes[self._order] = torch.searchsorted(self._borders, ranks, right=True)
        self.codes = codes
        """int64 ``[n]``, in the original order."""

    def _find(self, points: Tensor) -> Tensor:
        middles = (points.detach()[1:] + points.detach()[:-1]) / 2
        return torch.searchsorted(self._sorted, middles.to(self._sorted))

    def update(self, points: Tensor) -> Tensor:
        """Assigns to the moved ``points`` (as many as before); returns ``codes``."""
        borders = self._find(points)
        moved = (borders != self._borders).nonzero().flatten()
        if len(moved):
            low = torch.minimum(borders, self._borders)[moved]
            high = torch.maximum(borders, self._borders)[moved]
            # Pieces may overlap; assigning a rank twice gives the same code.
            lengths = high - low
            total = int(lengths.sum())
            begins = lengths.cumsum(0) - lengths
            ranks = torch.arange(total, device=low.device)
            ranks = ranks + torch.repeat_interleave(low - begins, lengths, output_size=total)
            self.codes[self._order[ranks]] = torch.searchsorted(borders, ranks, right=True)
            self._borders = borders
        return self.codes


class _Lookup(torch.autograd.Function):
    # Indexing has the same gradient, through a slower scatter.
    @staticmethod
    def forward(ctx: Any, points: Tensor, codes: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(codes, alpha)
        ctx.levels = points.numel()
        return alpha * points[codes] + beta

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (g,) = gradients
        codes, alpha = ctx.saved_tensors
        result = torch.zeros(ctx.levels, dtype=g.dtype, device=g.device)
        return result.index_add_(0, codes, g * alpha), None, None, None


@dataclass(frozen=True)
class FrozenUnits:
    """A frozen tensor scaled once, for learning its levels.

    Attributes:
        unit: scaled values ``[n]`` in [0, 1].
        alpha: range of each value's bucket, ``[n]``.
        beta: minimum of each value's bucket, ``[n]``.
        low: ``[buckets]``.
        high: ``[buckets]``.
        shape: of the tensor.
        bucket: values a bucket.
    """

    unit: Tensor
    alpha: Tensor
    beta: Tensor
    low: Tensor
    high: Tensor
    shape: tuple[int, ...]
    bucket: int | None

    @classmethod
    def of(cls, values: Tensor, bucket: int | None = 256) -> FrozenUnits:
        """Scales ``values`` linearly.

        Raises:
            InputError: if they are not finite.
        """
        values = _checked(values)
        shape = tuple(values.shape)
        buckets = bucketed(values, bucket)
        low, high = _scales(buckets, "linear")
        width = high - low
        alpha = torch.where(width < FLAT, torch.ones_like(width), width)
        spread = buckets.shape[1]
        count = values.numel()
        return cls(
            unit=_unit(buckets, low, high).flatten()[:count],
            alpha=alpha.repeat_interleave(spread)[:count],
            beta=low.repeat_interleave(spread)[:count],
            low=low,
            high=high,
            shape=shape,
            bucket=bucket,
        )

    def decode(self, points: Tensor, codes: Tensor) -> Tensor:
        """``alpha * points[codes] + beta`` in the tensor's shape, differentiable in ``points``.

        ``dL/dp_k`` is the sum of ``alpha_j * dL/dQ_j`` over the values assigned to level ``k``
        (arXiv:1802.05668, section 4).
        """
        decoded = _Lookup.apply(points, codes, self.alpha, self.beta)
        return decoded.view(self.shape)  # type: ignore[union-attr, no-any-return]

    def quantized(self, points: Tensor, codes: Tensor) -> QTensor:
        """What is stored for these levels."""
        bits = max(1, math.ceil(math.log2(points.numel())))
        return QTensor(
            codes=codes.to(torch.uint8 if bits <= 8 else torch.int32),
            low=self.low,
            high=self.high,
            shape=self.shape,
            bits=bits,
            levels=points.numel(),
            bucket=self.bucket,
            points=points.detach().float().clone(),
        )


def redistribute(norms: Sequence[float], levels: int | Sequence[int]) -> list[int]:
    """Gives tensors with larger gradients more levels; the total stays.

    Each tensor keeps half of its levels (rounded down); the rest is shared in proportion to the
    gradient norms (rounded to nearest), and what rounding left over goes to the smallest entry or
    is taken from the largest.

    Args:
        norms: gradient norm of each tensor, not negative.
        levels: levels of each tensor now, or one number for all.

    Returns:
        Levels of each tensor, at least two each.

    Source: published code of arXiv:1802.05668; section 4 describes the idea.
    """
    now = [levels] * len(norms) if isinstance(levels, int) else list(levels)
    if len(now) != len(norms) or any(norm < 0 or not math.isfinite(norm) for norm in norms):
        raise InputError("redistribution needs one finite gradient norm for each tensor")
    total = sum(now)
    kept = [count // 2 for count in now]
    rest = total - sum(kept)
    scale = sum(norms)
    shares = [norm / scale if scale > 0 else 1 / len(norms) for norm in norms]
    result = [keep + round(share * rest) for keep, share in zip(kept, shares, strict=True)]
    over = total - sum(result)
    place = result.index(min(result)) if over > 0 else result.index(max(result))
    result[place] += over
    # A tensor with a single level could say nothing: two is the least, taken from the richest.
    while min(result) < 2 < max(result):
        result[result.index(max(result))] -= 1
        result[result.index(min(result))] += 1
    return result
