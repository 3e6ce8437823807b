"""Auto-PGD: gradient ascent that sets its step size by itself.

A step mixes the projected gradient step with momentum, ``x <- P(x + .75 (P(x + a sign g) - x) +
.25 (x - x_before))``. The size starts at 2 eps. At checkpoints that come closer and closer together
it is halved, and the search goes on from the best point, for each image whose loss rose in at most
three quarters of the steps since the last checkpoint, or whose best loss and step size both stayed
what they were.

Images leave the batch once they are misclassified, which changes no other image and saves passes
that the published code makes. Its first comparison of losses is with zero; here it is with the loss
at the start.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020 (arXiv:2003.01690).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.evaluate.attack import Attack, Chunk, into_budget, likely_targets
from gossamer.evaluate.attack_losses import Loss, loss_of, targeted_dlr, targeted_margin
from gossamer.evaluate.gradient_ascent import check_counts
from gossamer.evaluate.sample_noise import uniform
from gossamer.evaluate.victim import Victim

MOMENTUM = 0.25
RISING = 0.75


class APGD(Attack):
    """Auto-PGD on a loss that needs no target.

    Args:
        loss: a name of :data:`~gossamer.evaluate.attack_losses.LOSSES`.
        steps: gradients a start.
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
        restarts: int = 1,
        eps: float = 8 / 255,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        super().__init__(model, eps=eps, seed=seed, batch_size=batch_size)
        check_counts(steps=steps, restarts=restarts)
        self.loss = loss_of(loss)
        self.name = f"apgd-{loss}"
        self.steps = steps
        self.restarts = restarts

    def rounds(self, classes: int) -> int:
        if classes < self.loss.classes:
            raise InputError(
                f"{self.name} needs at least {self.loss.classes} classes; there are {classes}"
            )
        return self.restarts

    def perturb(self, chunk: Chunk, round: int) -> Tensor:
        found, _ = climb(
            self.victim,
            chunk,
            apgd_start(chunk, self.eps, self.seed_of(round)),
            eps=self.eps,
            steps=self.steps,
            loss=lambda _: self.loss,
        )
        return found


class TargetedAPGD(Attack):
    """Auto-PGD towards each of the most likely wrong classes.

    The loss is the targeted difference of logits ratio, which needs four classes; with fewer it is
    the targeted margin, of which the ratio is a multiple.

    Args:
        targets: how many classes, at most one less than there are.
        steps: gradients a start.
        restarts: starts a target.
    """

    name = "apgd-t"

    def __init__(
        self,
        model: nn.Module | Victim,
        *,
        targets: int = 9,
        steps: int = 100,
        restarts: int = 1,
        eps: float = 8 / 255,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        super().__init__(model, eps=eps, seed=seed, batch_size=batch_size)
        check_counts(targets=targets, steps=steps, restarts=restarts)
        self.targets = targets
        self.steps = steps
        self.restarts = restarts

    def rounds(self, classes: int) -> int:
        return min(self.targets, classes - 1) * self.restarts

    def perturb(self, chunk: Chunk, round: int) -> Tensor:
        classes = chunk.clean.shape[1]
        targets = likely_targets(chunk, round % min(self.targets, classes - 1))
        loss = targeted_dlr if classes >= 4 else targeted_margin
        found, _ = climb(
            self.victim,
            chunk,
            apgd_start(chunk, self.eps, self.seed_of(round)),
            eps=self.eps,
            steps=self.steps,
            loss=lambda rows: loss(targets[rows]),
        )
        return found


def apgd_start(chunk: Chunk, eps: float, seed: int) -> Tensor:
    """A random direction, scaled so that one pixel changes by all of ``eps``."""
    noise = 2 * uniform(chunk.ids, seed, "start", shape=tuple(chunk.images.shape[1:])) - 1
    largest = noise.abs().flatten(1).amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return into_budget(chunk.images + eps * noise / largest, chunk.images, eps)


def checkpoints(steps: int) -> list[int]:
    """After how many steps the step size is looked at.

    The first interval is .22 of the steps; each is .03 shorter than the one before, down to .06.
    """
    interval, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    places, place = [], interval
    while place <= steps:
        places.append(place)
        interval = max(interval - less, least)
        place += interval
    return places


def climb(
    victim: Victim,
    chunk: Chunk,
    start: Tensor,
    *,
    eps: float,
    steps: int,
    loss: Callable[[Tensor], Loss],
) -> tuple[Tensor, Tensor]:
    """Auto-PGD for images that are not misclassified yet.

    Args:
        victim: the network.
        chunk: the images.
        start: where to begin, within the budget.
        eps: the budget.
        steps: how many gradients.
        loss: to climb, for those rows of the chunk that are still there.

    Returns:
        The first misclassified iterate of each image, or the one of the largest loss; and the best
        loss of each image after each step, ``[steps + 1, n]`` (it stays what it was once an image
        has left).
    """
    look = {place: place - before for before, place in _intervals(checkpoints(steps))}
    found = start.clone()
    rows = torch.arange(len(start), device=start.device)
    images, labels, now, before = chunk.images, chunk.labels, start, start
    size = torch.full((len(start), 1, 1, 1), 2 * eps, device=start.device)
    best, best_pull, best_loss = start, torch.zeros_like(start), start.new_zeros(len(start))
    last_loss, checked, rises = best_loss, best_loss, best_loss
    halved = torch.ones_like(rows, dtype=torch.bool)
    history = start.new_zeros(steps + 1, len(start))
    pull = best_pull
    for step in range(steps + 1):
        if step:
            ahead = into_budget(now + size * pull.sign(), images, eps)
            mixed = now + (1 - MOMENTUM) * (ahead - now) + MOMENTUM * (now - before)
            before, now = now, into_budget(mixed, images, eps) if step > 1 else ahead
        climbed = loss(rows)
        logits, pull = victim.gradient(now, lambda z, c=climbed, y=labels: c.cotangent(z, y))
        value = climbed.value(logits, labels)
        if step == 0:
            best_pull, best_loss, checked, last_loss = pull, value, value, value
        better = value > best_loss
        best = torch.where(better.view(-1, 1, 1, 1), now, best)
        best_pull = torch.where(better.view(-1, 1, 1, 1), pull, best_pull)
        best_loss = torch.where(better, value, best_loss)
        rises = rises + (value > last_loss)
        last_loss = value
        history[step:, rows] = best_loss
        standing = logits.argmax(1) == labels
        if not standing.all():
            found[rows[~standing]] = now[~standing]
            rows, images, labels = rows[standing], images[standing], labels[standing]
            if not len(rows):
                return found, history
            now, before, pull, size = (
                now[standing],
                before[standing],
                pull[standing],
                size[standing],
            )
            best, best_pull, best_loss = best[standing], best_pull[standing], best_loss[standing]
            last_loss, checked, rises = last_loss[standing], checked[standing], rises[standing]
            halved = halved[standing]
        if step in look:
            few = rises <= RISING * look[step]
            halve = few | (~halved & (best_loss <= checked))
            back = halve.view(-1, 1, 1, 1)
            size = torch.where(back, size / 2, size)
            now, pull = torch.where(back, best, now), torch.where(back, best_pull, pull)
            halved, checked, rises = halve, best_loss, torch.zeros_like(rises)
    found[rows] = best
    return found, history


def _intervals(places: list[int]) -> list[tuple[int, int]]:
    return list(zip([0, *places], places, strict=False))
