"""GPTQ: weights rounded one input after the other, each error made good by those not yet rounded.

Rounding a layer to the nearest codes is best for the weights; what matters are its outputs. With
``H = X^T X`` over calibration inputs, GPTQ rounds column by column and moves the error of each
column into the remaining ones, as the inverse of ``H`` says. Beside it: the ranges from which the
scales come (the whole range, or one clipped for the least error), and rounding to nearest.

Source: Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", ICLR 2023, arXiv:2210.17323 (section 3 and algorithm 1). Tuned
as in Kurtic et al., "Give Me BF16 or Give Me Death? Accuracy-Performance Trade-Offs in LLM
Quantization", ACL 2025, arXiv:2411.02355.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.parts.scaled import ScaledTensor, WeightFormat, grouped

log = logging.getLogger(__name__)

Order = Literal["none", "static", "group"]
"""In which order inputs are rounded: as they come; those with the largest second moment first, in
groups of neighbours whose scales are found beforehand ("static": nothing more to store); or so that
inputs rounded together also form a group ("group": the group of each input is stored)."""


@dataclass(frozen=True)
class Clipping:
    """Ranges that are smaller than the values, for the least error ``sum |w - Q(w)|^norm``.

    Attributes:
        shrink: by at most this share (0.8 in the published code of GPTQ).
        grid: steps in which the whole range would be shrunk to nothing.
        patience: steps without any gain after which the search ends.
        norm: of the error.

    Raises:
        InputError: if the share is not in (0, 1) or a number is not positive.
    """

    shrink: float = 0.2
    grid: int = 100
    patience: int = 5
    norm: float = 2.4

    def __post_init__(self) -> None:
        if not 0.0 < self.shrink < 1.0:
            raise InputError(f"ranges shrink by a share between 0 and 1, not {self.shrink}")
        if self.grid < 1 or self.patience < 1 or self.norm <= 0.0:
            raise InputError("clipping needs a positive grid, patience and norm")


def find_scales(
    weight: Tensor,
    format: WeightFormat,
    *,
    clipping: Clipping | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points ``[outputs, groups]`` of a weight ``[outputs, inputs]``.

    Args:
        weight: floating point.
        format: of codes and groups.
        clipping: how ranges are made smaller; None takes whole ranges.
        dtype: type in which scales will be stored.
    """
    low, high = format.ranges(weight)
    scale, zero = format.scales(low, high, dtype)
    if clipping is None:
        return scale, zero
    cut = grouped(weight, format.group)

    def errors(scale: Tensor, zero: Tensor | None) -> Tensor:
        shift = 0.0 if zero is None else zero[..., None]
        codes = format.number.codes(cut, scale[..., None], shift)
        return ((codes - shift) * scale[..., None] - cut).abs().pow(clipping.norm).sum(2)

    best, stale = errors(scale, zero), 0
    for step in range(1, int(clipping.shrink * clipping.grid) + 1):
        share = 1.0 - step / clipping.grid
        tried, tried_zero = format.scales(low * share, high * share, dtype)
        error = errors(tried, tried_zero)
        better = error < best
        if not bool(better.any()):
            stale += 1
            if stale == clipping.patience:
                break
            continue
        stale = 0
        best = torch.where(better, error, best)
        scale = torch.where(better, tried, scale)
        if zero is not None and tried_zero is not None:
            zero = torch.where(better, tried_zero, zero)
    return scale, zero


def round_to_nearest(
    weight: Tensor,
    format: WeightFormat,
    *,
    clipping: Clipping | None = None,
    dtype: torch.dtype = torch.float32,
) -> ScaledTensor:
    """Rounds every weight to the nearest code (the baseline; all that FP8 needs).

    Args:
        weight: ``[outputs, inputs]``.
        format: of codes and groups.
        clipping: how ranges are made smaller; None takes whole ranges.
        dtype: type of the stored scales.
    """
    weight = weight.detach().float()
    scale, zero = find_scales(weight, format, clipping=clipping, dtype=dtype)
    return ScaledTensor.of(weight, format, scale, zero, dtype=dtype)


class SecondMoment:
    """``sum x x^T`` of a layer's inputs, and how many there were.

    The factor 2 and the division by the number of samples, with which others define it, change
    nothing that follows.

    Args:
        inputs: channels of the layer's input.
        device: where it is summed.
    """

    def __init__(self, inputs: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(inputs, inputs, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Takes in inputs ``[..., channels]``; padding has to be left out before."""
        flat = x.detach().flatten(0, -2).to(self.total)
        self.total.addmm_(flat.T, flat)
        self.tokens += len(flat)


@dataclass(frozen=True)
class Compensated:
    """What GPTQ made of a weight.

    Attributes:
        tensor: the rounded weight.
        loss: half of the sum of squared output errors that could not be made good.
        dampening: with which the factorisation worked; None if none did and the weight was rounded
            to nearest.
    """

    tensor: ScaledTensor
    loss: float | None
    dampening: float | None


def gptq(
    weight: Tensor,
    hessian: Tensor,
    format: WeightFormat,
    *,
    clipping: Clipping | None = None,
    order: Order = "static",
    static_groups: bool = True,
    scale: Tensor | None = None,
    block_size: int = 128,
    dampening: float = 0.01,
    dtype: torch.dtype = torch.float32,
) -> Compensated:
    """Rounds a weight with compensation of errors.

    Columns are corrected lazily: for each block by one product with all errors so far, and inside
    of it by halves (a product of what the first half left over, then the second half), so nearly
    all work is in matrix products. The result does not depend on the block size.

    Args:
        weight: ``[outputs, inputs]``.
        hessian: ``[inputs, inputs]``, up to a factor, see :class:`SecondMoment`.
        format: of codes and groups.
        clipping: how ranges are made smaller; None takes whole ranges.
        order: see :data:`Order`.
        static_groups: scales come from the original weights; False takes them from the weights as
            they are when their group is reached (with all errors of earlier columns in them), in
            the order as they come only.
        scale: symmetric scales ``[outputs, groups]`` in place of those that would be found.
        block_size: columns a block.
        dampening: added to the diagonal of the Hessian, as a share of its mean; ten times as much,
            up to once the mean, where the factorisation fails. Then the weight is rounded to
            nearest.
        dtype: type of the stored scales.

    Returns:
        The rounded weight, on the CPU.

    Raises:
        InputError: if shapes do not fit or an option cannot be used.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise InputError(
            f"a weight with {columns} inputs needs a Hessian of {columns} x {columns}, "
            f"not {' x '.join(map(str, hessian.shape))}"
        )
    if order not in ("none", "static", "group"):
        raise InputError(f"the order is none, static or group, not {order!r:.40}")
    if not static_groups and (order != "none" or scale is not None):
        raise InputError("scales can be found on the way only in the order 'none'")
    if block_size < 1 or dampening < 0.0:
        raise InputError("GPTQ needs a block of one column or more and no negative dampening")
    if scale is not None and not format.symmetric:
        raise InputError("given scales are symmetric")
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    original = weight.detach().to(wide).clone()
    hessian = hessian.detach().to(original, copy=True)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    original[:, dead] = 0.0

    permutation = torch.arange(columns, device=original.device)
    if order != "none":
        permutation = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian = hessian[permutation][:, permutation]
    factor, used = _inverse_factor(hessian, dampening)
    if factor is None:
        log.warning("the Hessian of a layer cannot be factorised; it is rounded to nearest")
        nearest = round_to_nearest(original, format, clipping=clipping, dtype=dtype)
        return Compensated(nearest, None, None)

    zero = None
    moved = original[:, permutation]
    groups = format.groups(columns).to(original.device)
    if order == "static":
        groups = groups[permutation]
    if scale is not None:
        scale = scale.to(original)
    elif static_groups:
        source = moved if order == "group" else original
        scale, zero = find_scales(source, format, clipping=clipping, dtype=dtype)
    # Transposed, so that a column is contiguous.
    start = moved.T.contiguous()
    number = format.number
    state = _State(start, factor, torch.zeros_like(start), torch.zeros_like(start))
    scale_rows = None if scale is None else scale.T.contiguous()
    zero_rows = None if zero is None else zero.T.contiguous()
    group_at: list[int] = groups.tolist()
    found: list[tuple[Tensor, Tensor | None]] = []

    def scales_at(column: int) -> tuple[Tensor, Tensor | float]:
        if scale_rows is not None:
            group = group_at[column]
            return scale_rows[group], 0.0 if zero_rows is None else zero_rows[group]
        if column % (format.group or columns) == 0:
            here = slice(column, min(columns, column + (format.group or columns)))
            found.append(
                find_scales(state.current(here, column).T, format, clipping=clipping, dtype=dtype)
            )
        own, shift = found[-1]
        return own[:, 0], 0.0 if shift is None else shift[:, 0]

    def round_columns(values: Tensor, low: int, high: int) -> None:
        if high - low > 1:
            middle = (low + high) // 2
            half = middle - low
            round_columns(values[:half], low, middle)
            values[half:].addmm_(
                factor[low:middle, middle:high].T, state.errors[low:middle], alpha=-1.0
            )
            round_columns(values[half:], middle, high)
            return
        own, shift = scales_at(low)
        codes = number.codes(values[0], own, shift)
        state.codes[low] = codes
        torch.sub(values[0], (codes - shift) * own, out=state.errors[low])
        state.errors[low] /= factor[low, low]

    for low in range(0, columns, block_size):
        high = min(columns, low + block_size)
        round_columns(state.current(slice(low, high), low), low, high)
    loss = float(state.errors.square().sum()) / 2

    back = torch.argsort(permutation)
    codes = state.codes.T[:, back]
    if scale is None:
        scale = torch.cat([own for own, _ in found], 1)
        zeros = [shift for _, shift in found if shift is not None]
        zero = torch.cat(zeros, 1) if zeros else None
    places = groups[back] if order == "group" and format.group is not None else None
    tensor = ScaledTensor.from_values(codes, format, scale, zero, places, dtype=dtype)
    return Compensated(tensor, loss, used)


@dataclass(frozen=True)
class _State:
    """Weights as given, inverse factor, codes and errors; columns first."""

    start: Tensor
    factor: Tensor
    codes: Tensor
    errors: Tensor

    def current(self, columns: slice, rounded: int) -> Tensor:
        """Columns with the errors of the first ``rounded`` ones taken in."""
        moved = self.factor[:rounded, columns].T @ self.errors[:rounded]
        return self.start[columns] - moved


def _inverse_factor(hessian: Tensor, dampening: float) -> tuple[Tensor | None, float | None]:
    """The upper Cholesky factor of the inverse, and the dampening that made it possible."""
    mean = hessian.diagonal().mean()
    share = dampening
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper, share
        if share >= 1.0 or not bool(torch.isfinite(mean)):
            return None, None
        share = min(1.0, max(10.0 * share, 1e-3))
        log.warning("a Hessian is singular; trying again with a dampening of %g", share)
