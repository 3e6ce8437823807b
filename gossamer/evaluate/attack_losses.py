"""What an attack on a classifier climbs: losses of logits, to be maximised.

With logits z, probabilities p = softmax(z), true class y and m the best class other than y:

====================  ==========================================================================
``ce``                -log p_y
``targeted ce``       log p_m
``margin``            z_m - z_y (Carlini and Wagner 2017)
``dlr``               (z_m - z_y) / (z_(1) - z_(3)), z sorted (Croce and Hein 2020)
``pm``                p_m - p_y, the margin of probabilities (Xie et al. 2025)
``mifpe``             -log p_y of z / (z_(1) - z_(2)), that scale held fixed (Yu and Xu 2023)
``p_y``, ``p_m`` …    the parts of ``pm`` alone, and ``z_y``, ``z_m`` those of ``margin``
====================  ==========================================================================

An attack that moves by the sign of the gradient needs the gradient up to a positive factor for each
image. Where probabilities saturate, p_m, 1 - p_y and with them the gradients of every loss made of
probabilities underflow to zero, so those are written in a form divided by 1 - p_y that keeps its
size at any scale of the logits: with away(k) = -e_k + softmax over the classes other than k,

    grad -log p_y = (1 - p_y) away(y)           grad log p_m = -(1 - p_m) away(m)
    grad (p_m - p_y) = p_y grad(-log p_y) + p_m grad(log p_m)

All functions take logits ``[n, classes]`` and labels ``[n]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import InputError

Of = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss to be maximised.

    Attributes:
        name: as in the table.
        value: ``(logits, labels)`` to ``[n]``.
        direction: ``(logits, labels)`` to the gradient for the logits, ``[n, classes]``, up to a
            positive factor for each image. Default: the gradient of ``value``.
        classes: how many classes it needs at least.
    """

    name: str
    value: Of
    direction: Of | None = None
    classes: int = 2

    def cotangent(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The direction in which the logits should move, ``[n, classes]``."""
        if self.direction is not None:
            return self.direction(logits, labels)
        with torch.enable_grad():
            free = logits.detach().requires_grad_()
            return torch.autograd.grad(self.value(free, labels).sum(), free)[0]


def best_other(logits: Tensor, labels: Tensor) -> Tensor:
    """The best class other than the true one, ``[n]``; ties go to the smaller index."""
    return _without(logits, labels).argmax(1)


def _without(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.scatter(1, classes.unsqueeze(1), -torch.inf)


def _at(values: Tensor, classes: Tensor) -> Tensor:
    return values.gather(1, classes.unsqueeze(1)).squeeze(1)


def _one(logits: Tensor, classes: Tensor, value: float = 1.0) -> Tensor:
    return torch.zeros_like(logits).scatter_(1, classes.unsqueeze(1), value)


def away(logits: Tensor, classes: Tensor) -> Tensor:
    """The gradient of -log p_k divided by 1 - p_k, ``[n, classes]``; it never underflows whole."""
    return _without(logits, classes).softmax(1) + _one(logits, classes, -1.0)


def _towards_best(logits: Tensor, labels: Tensor) -> Tensor:
    return -away(logits, best_other(logits, labels))


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, ``[n]``."""
    return -_at(logits.log_softmax(1), labels)


def targeted_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Log probability of the best other class, ``[n]``."""
    return _at(logits.log_softmax(1), best_other(logits, labels))


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Best other logit less the true one, ``[n]``."""
    return _without(logits, labels).amax(1) - _at(logits, labels)


def _margin_direction(logits: Tensor, labels: Tensor) -> Tensor:
    return _one(logits, best_other(logits, labels)) - _one(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, ``[n]``: the margin over the spread of the three largest."""
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(targets: Tensor) -> Loss:
    """Difference of logits ratio towards the classes ``targets``, ``[n]``; needs four classes."""

    def value(logits: Tensor, labels: Tensor) -> Tensor:
        top = logits.topk(4, dim=1).values
        spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12
        return (_at(logits, targets) - _at(logits, labels)) / spread

    return Loss("targeted dlr", value, classes=4)


def targeted_margin(targets: Tensor) -> Loss:
    """The logits of the classes ``targets`` less the true ones, ``[n]``."""
    return Loss(
        "targeted margin",
        lambda z, y: _at(z, targets) - _at(z, y),
        lambda z, y: _one(z, targets) - _one(z, y),
    )


def pm(logits: Tensor, labels: Tensor) -> Tensor:
    """Margin of probabilities, ``[n]`` in (-1, 1): positive only where another class wins."""
    p = logits.softmax(1)
    return _at(p, best_other(logits, labels)) - _at(p, labels)


def _pm_direction(logits: Tensor, labels: Tensor) -> Tensor:
    best = best_other(logits, labels)
    log_p = logits.log_softmax(1)
    log_rest = _without(log_p, labels).logsumexp(1)  # of 1 - p_y
    p_true = _at(log_p, labels).exp().unsqueeze(1)
    log_best = _at(log_p, best)
    not_best = _without(log_p, best).logsumexp(1).exp()
    share = ((log_best - log_rest).exp() * not_best).unsqueeze(1)
    return p_true * away(logits, labels) - share * away(logits, best)


def mifpe(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits divided by the gap of the two largest, ``[n]``."""
    return ce(logits / _gap(logits), labels)


def _gap(logits: Tensor) -> Tensor:
    top = logits.detach().topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]).clamp_min(1e-12).unsqueeze(1)


CE = Loss("ce", ce, away)
TARGETED_CE = Loss("targeted ce", targeted_ce, _towards_best)
MARGIN = Loss("margin", margin, _margin_direction)
DLR = Loss("dlr", dlr, classes=3)
PM = Loss("pm", pm, _pm_direction)
MIFPE = Loss("mifpe", mifpe, lambda z, y: away(z / _gap(z), y))
TRUE_PROBABILITY = Loss("p_y", lambda z, y: _at(z.softmax(1), y), lambda z, y: -away(z, y))
LESS_TRUE_PROBABILITY = Loss("-p_y", lambda z, y: -_at(z.softmax(1), y), away)
BEST_PROBABILITY = Loss("p_m", lambda z, y: _at(z.softmax(1), best_other(z, y)), _towards_best)
TRUE_LOGIT = Loss("z_y", _at, _one)
LESS_TRUE_LOGIT = Loss("-z_y", lambda z, y: -_at(z, y), lambda z, y: -_one(z, y))
BEST_LOGIT = Loss(
    "z_m", lambda z, y: _without(z, y).amax(1), lambda z, y: _one(z, best_other(z, y))
)

LOSSES = {loss.name: loss for loss in (CE, TARGETED_CE, MARGIN, DLR, PM, MIFPE)}
"""Losses by name."""


def loss_of(name: str) -> Loss:
    """The loss of this name.

    Raises:
        InputError: if there is none.
    """
    if name not in LOSSES:
        raise InputError(f"there is no loss {name!r}; there are {', '.join(LOSSES)}")
    return LOSSES[name]
