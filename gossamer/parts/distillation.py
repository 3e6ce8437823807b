"""Losses by which a student network learns from a teacher's answers.

Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network",
arXiv:1503.02531, section 2; the weighting is that of Polino, Pascanu and Alistarh, "Model
compression via distillation and quantization", arXiv:1802.05668, section 2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Reduction = Literal["batchmean", "mean", "none"]
"""Of a divergence over ``[batch, classes]``: "batchmean" divides the sum by the batch, "mean" by
batch times classes (what the code of 2018 did: the distillation weight is then smaller by the
number of classes), "none" keeps one value a sample."""

Ask = Callable[[Tensor, Tensor], Tensor]
"""(student logits ``[batch, classes]``, labels ``[batch]``) -> bool ``[batch]``: for which samples
the teacher is asked."""


def frozen_teacher(network: nn.Module) -> nn.Module:
    """A copy of ``network`` in evaluation mode whose parameters take no gradients."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def soft_target_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 2.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)), without the factor T^2.

    Args:
        student: logits ``[..., classes]``; every position but the last axis counts as a sample.
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T.
        reduction: see :data:`Reduction`.

    Returns:
        A scalar, or ``[samples]`` with "none".
    """
    student = student.flatten(0, -2) / temperature
    teacher = teacher.detach().flatten(0, -2) / temperature
    each = F.kl_div(
        F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction="none"
    )
    if reduction == "none":
        return each.sum(-1)
    return each.mean() if reduction == "mean" else each.sum(-1).mean()


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    hard: Tensor,
    *,
    temperature: float = 2.0,
    weight: float = 0.7,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """``(1 - weight) * hard + weight * T^2 * KL(teacher || student)``.

    Args:
        student: logits ``[..., classes]``.
        teacher: logits of the same shape.
        hard: the loss against the labels, reduced in the same manner.
        temperature: T; the factor T^2 keeps the gradient's scale (Hinton et al., section 2).
        weight: lambda, share of the teacher.
        reduction: of the divergence.
    """
    soft = soft_target_divergence(student, teacher, temperature=temperature, reduction=reduction)
    return (1.0 - weight) * hard + weight * temperature**2 * soft


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of ``softmax(logits)`` along the last axis."""
    log_p = F.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)


def always(logits: Tensor, labels: Tensor) -> Tensor:
    """Asks the teacher about every sample."""
    return torch.ones(len(labels), dtype=torch.bool, device=logits.device)


def when_unsure(cutoff: float) -> Ask:
    """Asks about samples on which the student's entropy (nats) is above ``cutoff``."""

    def ask(logits: Tensor, labels: Tensor) -> Tensor:
        return entropy(logits.detach()) > cutoff

    return ask


def as_unsure(generator: torch.Generator | None = None) -> Ask:
    """Asks with probability entropy / log(classes).

    Args:
        generator: draws; None takes torch's own state, which training forks and seeds each step.
    """

    def ask(logits: Tensor, labels: Tensor) -> Tensor:
        share = entropy(logits.detach()) / math.log(logits.shape[-1])
        draws = torch.rand(len(share), generator=generator, device=share.device)
        return draws < share

    return ask


def on_mistakes(logits: Tensor, labels: Tensor) -> Tensor:
    """Asks about samples that the student gets wrong."""
    return logits.detach().argmax(-1) != labels


def asked_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    ask: Ask = always,
    temperature: float = 2.0,
    weight: float = 0.7,
    reduction: Literal["batchmean", "mean"] = "batchmean",
) -> Tensor:
    """Distillation on the samples the teacher is asked about, plain cross-entropy on the others.

    The result is the sum of the mean over the asked samples and the mean over the others; a part
    without samples contributes nothing.

    Args:
        student: logits ``[batch, classes]``.
        teacher: logits ``[batch, classes]``.
        labels: class indices ``[batch]``.
        ask: chooses the samples.
        temperature: T.
        weight: lambda, share of the teacher on asked samples.
        reduction: of the divergence.
    """
    asked = ask(student, labels)
    hard = F.cross_entropy(student, labels, reduction="none")
    soft = soft_target_divergence(student, teacher, temperature=temperature, reduction="none")
    if reduction == "mean":
        soft = soft / student.shape[-1]
    mixed = (1.0 - weight) * hard + weight * temperature**2 * soft
    # Sums over masks, not indexing: no shape depends on the data, so it compiles.
    share = asked.to(mixed.dtype)
    rest = 1.0 - share
    return (mixed * share).sum() / share.sum().clamp(min=1) + (
        hard * rest
    ).sum() / rest.sum().clamp(min=1)
