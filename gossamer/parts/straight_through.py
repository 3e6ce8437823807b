"""Straight-through estimators: a step function forward, a chosen slope backward.

Rounding, signs, gates and top-k masks have zero gradient almost everywhere. The estimator pretends
that the step is the identity (or a clipped identity) when it differentiates.

Source: Bengio, Leonard and Courville, "Estimating or propagating gradients through stochastic
neurons", arXiv:1308.3432, section 4; the clipped form is Hubara et al., arXiv:1602.02830, eq. 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Replace(torch.autograd.Function):
    # x + (value - x).detach() would do the same, but rounds: its result is not exactly `value`.
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(*(() if mask is None else (mask,)))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        saved = ctx.saved_tensors
        return (gradient * saved[0] if saved else gradient), None, None


def straight_through(x: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """``value`` forward, the gradient of ``x`` backward.

    Args:
        x: what receives the gradient, any shape.
        value: what the forward pass uses, same shape; bit for bit the result.
        mask: multiplies the gradient (0 where it should not pass), or None.

    Returns:
        A tensor equal to ``value``.
    """
    return _Replace.apply(x, value.detach(), mask)  # type: ignore[no-any-return]


def round_through(x: Tensor) -> Tensor:
    """Rounds half to even; slope 1 backward."""
    return straight_through(x, torch.round(x))


def sign_through(x: Tensor, clip: float = 1.0) -> Tensor:
    """The sign (+1 at zero); slope 1 where ``|x| <= clip`` and 0 elsewhere backward."""
    sign = torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x))
    return straight_through(x, sign, (x.abs() <= clip).to(x.dtype))


def gate_through(x: Tensor, threshold: float = 0.0) -> Tensor:
    """1 where ``x > threshold``, otherwise 0; slope 1 backward."""
    return straight_through(x, (x > threshold).to(x.dtype))


def top_k_through(scores: Tensor, k: int) -> Tensor:
    """A mask with ones at the ``k`` largest scores of the whole tensor; slope 1 backward.

    Args:
        scores: any shape.
        k: how many ones, between 0 and the number of scores.
    """
    flat = torch.zeros(scores.numel(), dtype=scores.dtype, device=scores.device)
    flat[scores.detach().flatten().topk(k).indices] = 1
    return straight_through(scores, flat.view_as(scores))
