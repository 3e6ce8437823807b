"""Projected gradient ascent on the signs of gradients (Madry et al. 2018), for any loss.

Step i of K goes ``x <- P(x + a_i sign(grad))`` with P the projection into the budget and [0, 1].
An image leaves the batch as soon as it is misclassified. Losses may change with the step, which is
how margin decomposition (``margin_attack``) and its kin are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.evaluate.attack import Attack, Chunk, into_budget, likely_targets
from gossamer.evaluate.attack_losses import CE, DLR, MARGIN, Loss, loss_of, targeted_margin
from gossamer.evaluate.sample_noise import uniform
from gossamer.evaluate.victim import Victim

Start = Literal["uniform", "output", "clean"]

LossAt = Callable[[int, Tensor], Loss]
"""The loss to climb at a step, for those rows of the chunk that are still there."""


def ascend(
    victim: Victim,
    chunk: Chunk,
    start: Tensor,
    *,
    eps: float,
    steps: int,
    loss: LossAt,
    size: Callable[[int], float],
) -> Tensor:
    """Climbs a loss by the signs of its gradient, for images that are not misclassified yet.

    Args:
        victim: the network.
        chunk: the images.
        start: where to begin, within the budget.
        eps: the budget.
        steps: how many gradients.
        loss: of a step.
        size: of a step, in pixel values.

    Returns:
        The first misclassified iterate of each image, or the last one.
    """
    found = start.clone()
    rows = torch.arange(len(start), device=start.device)
    images, labels, moved = chunk.images, chunk.labels, start
    for step in range(steps):
        climbed = loss(step, rows)
        logits, gradient = victim.gradient(moved, lambda z, c=climbed, y=labels: c.cotangent(z, y))
        standing = logits.argmax(1) == labels
        if not standing.all():
            found[rows[~standing]] = moved[~standing]
            rows, images, labels = rows[standing], images[standing], labels[standing]
            moved, gradient = moved[standing], gradient[standing]
            if not len(rows):
                return found
        moved = into_budget(moved + size(step) * gradient.sign(), images, eps)
    found[rows] = moved
    return found


class PGD(Attack):
    """Projected gradient descent (on the negative loss, as the field says).

    Args:
        loss: a name of :data:`~gossamer.evaluate.attack_losses.LOSSES`, or "alternating": thirds of
            the steps on ``ce``, ``margin`` and ``dlr`` (the order is ours).
        steps: gradients a start.
        step_size: of the first step, in pixel values. Default: a quarter of ``eps`` (2/255 for
            8/255).
        schedule: "cosine" ``a_i = a cos(pi i / 2K)`` or "linear" ``a (1 - i / K)``.
        start: "uniform" in the budget, "output" (output diversified initialisation, Tashiro et al.
            2020: two steps of size ``eps`` along a random combination of the logits), or "clean".
        restarts: starts; each only for what still stands.

    Raises:
        InputError: if an option is out of range or the loss needs more classes.
    """

    def __init__(
        self,
        model: nn.Module | Victim,
        *,
        loss: str = "ce",
        steps: int = 100,
        step_size: float | None = None,
        schedule: Literal["cosine", "linear"] = "cosine",
        start: Start = "uniform",
        restarts: int = 1,
        eps: float = 8 / 255,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        super().__init__(model, eps=eps, seed=seed, batch_size=batch_size)
        check_counts(steps=steps, restarts=restarts)
        thirds = (CE, MARGIN, DLR) if loss == "alternating" else (loss_of(loss),)
        self.name = f"pgd-{loss}"
        self.losses = thirds
        self.steps = steps
        self.step_size = eps / 4 if step_size is None else step_size
        self.schedule = schedule
        self.start: Start = start
        self.restarts = restarts

    def rounds(self, classes: int) -> int:
        needed = max(loss.classes for loss in self.losses)
        if classes < needed:
            raise InputError(f"{self.name} needs at least {needed} classes; there are {classes}")
        return self.restarts

    def perturb(self, chunk: Chunk, round: int) -> Tensor:
        return ascend(
            self.victim,
            chunk,
            start_of(self.start, self.victim, chunk, self.eps, self.seed_of(round)),
            eps=self.eps,
            steps=self.steps,
            loss=lambda step, _: self.losses[step * len(self.losses) // self.steps],
            size=self._size,
        )

    def _size(self, step: int) -> float:
        done = step / self.steps
        return self.step_size * (
            math.cos(math.pi * done / 2) if self.schedule == "cosine" else 1 - done
        )


class MultiTargeted(Attack):
    """PGD on the margin towards each wrong class in turn (Gowal et al. 2019).

    Args:
        targets: how many of the most likely wrong classes. Default: all.
        steps: gradients a target.
    """

    name = "multi-targeted"

    def __init__(
        self,
        model: nn.Module | Victim,
        *,
        targets: int | None = None,
        steps: int = 100,
        eps: float = 8 / 255,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        super().__init__(model, eps=eps, seed=seed, batch_size=batch_size)
        check_counts(steps=steps, targets=targets or 1)
        self.targets = targets
        self.steps = steps

    def rounds(self, classes: int) -> int:
        return min(self.targets or classes, classes - 1)

    def perturb(self, chunk: Chunk, round: int) -> Tensor:
        targets = likely_targets(chunk, round)
        return ascend(
            self.victim,
            chunk,
            start_of("uniform", self.victim, chunk, self.eps, self.seed_of(round)),
            eps=self.eps,
            steps=self.steps,
            loss=lambda _, rows: targeted_margin(targets[rows]),
            size=lambda step: self.eps / 4 * math.cos(math.pi * step / (2 * self.steps)),
        )


def start_of(
    kind: Start,
    victim: Victim,
    chunk: Chunk,
    eps: float,
    seed: int,
) -> Tensor:
    """Where an attack begins, within the budget and [0, 1]."""
    images = chunk.images
    if kind == "clean":
        return images.clone()
    noise = uniform(chunk.ids, seed, "start", shape=tuple(images.shape[1:]))
    moved = into_budget(images + eps * (2 * noise - 1), images, eps)
    if kind == "output":
        weights = 2 * uniform(chunk.ids, seed, "output", shape=(chunk.clean.shape[1],)) - 1
        for _ in range(2):
            _, gradient = victim.gradient(moved, lambda _: weights)
            moved = into_budget(moved + eps * gradient.sign(), images, eps)
    return moved


def check_counts(**counts: int) -> None:
    """Refuses counts below one.

    Raises:
        InputError: naming the count.
    """
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} is {count}; at least 1 is needed")
