"""The probability margin attack: one strong, cheap attack to measure robustness with.

It climbs p_m - p_y, the margin between the best wrong class and the true one in probabilities, by
the two-stage schedule of margin decomposition: a first half that climbs one term of the margin
alone (-p_y in one run, p_m in the next, for what is still standing) after one step towards the true
class, which leaves flat regions; then a second half that climbs the whole margin. Steps sweep twice
from 2 eps to 0 by half cosines.

Margin decomposition (``MD``) is the same with logits in the place of probabilities. ``pma_plus`` is
the attack followed by targeted APGD, ``pma_then_auto_attack`` the one followed by AutoAttack, each
on what is still standing.

The random start is clipped to [0, 1], which the published code leaves to the first step.

Sources: Xie et al., "Towards Million-Scale Adversarial Robustness Evaluation With Stronger
Individual Attacks", CVPR 2025 (arXiv:2411.15210); Ma et al., "Imbalanced Gradients: A Subtle Cause
of Overestimated Adversarial Robustness", Machine Learning 2023 (arXiv:2006.13726).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.evaluate.attack import Attack, Chunk
from gossamer.evaluate.attack_losses import (
    BEST_LOGIT,
    BEST_PROBABILITY,
    LESS_TRUE_LOGIT,
    LESS_TRUE_PROBABILITY,
    MARGIN,
    PM,
    TRUE_LOGIT,
    TRUE_PROBABILITY,
    Loss,
)
from gossamer.evaluate.gradient_ascent import ascend, check_counts, start_of
from gossamer.evaluate.victim import Victim


class TwoStage(Attack):
    """The schedule that both attacks share.

    Args:
        steps: gradients of each run; a restart is two runs.
        first: steps of the first stage. Default: half.
        restarts: pairs of runs; each only for what still stands.

    Raises:
        InputError: if an option is out of range.
    """

    back: Loss
    parts: tuple[Loss, Loss]
    whole: Loss

    def __init__(
        self,
        model: nn.Module | Victim,
        *,
        steps: int = 100,
        first: int | None = None,
        restarts: int = 1,
        eps: float = 8 / 255,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        super().__init__(model, eps=eps, seed=seed, batch_size=batch_size)
        check_counts(steps=steps, restarts=restarts)
        self.steps = steps
        self.first = steps // 2 if first is None else first
        self.restarts = restarts
        if not 0 <= self.first < steps:
            raise InputError(
                f"the first stage has {self.first} of {steps} steps; it must end before the second"
            )

    def rounds(self, classes: int) -> int:
        return 2 * self.restarts

    def perturb(self, chunk: Chunk, round: int) -> Tensor:
        return ascend(
            self.victim,
            chunk,
            start_of("uniform", self.victim, chunk, self.eps, self.seed_of(round)),
            eps=self.eps,
            steps=self.steps,
            loss=lambda step, _: self._loss(step, self.parts[round % 2]),
            size=self.step_size,
        )

    def _loss(self, step: int, part: Loss) -> Loss:
        if step >= self.first:
            return self.whole
        return self.back if step == 0 else part

    def step_size(self, step: int) -> float:
        """The size of a step in pixel values."""
        since = step - 1 if step <= self.first else step - self.first - 1
        return self.eps * (1 + math.cos(math.pi * since / (self.steps - self.first)))


class PMA(TwoStage):
    """The probability margin attack, see the module."""

    name = "pma"
    back = TRUE_PROBABILITY
    parts = (LESS_TRUE_PROBABILITY, BEST_PROBABILITY)
    whole = PM


class MD(TwoStage):
    """Margin decomposition: the two-stage schedule on logits."""

    name = "md"
    back = TRUE_LOGIT
    parts = (LESS_TRUE_LOGIT, BEST_LOGIT)
    whole = MARGIN
