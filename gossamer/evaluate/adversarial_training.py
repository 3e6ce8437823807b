"""Training on adversarial images, so that there is something robust to measure.

Each batch is moved by a few steps of projected gradient ascent on the cross-entropy before the
update (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
arXiv:1706.06083). All images take all steps, also those that are misclassified already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.core.fit import Log, Supervised
from gossamer.core.task import Classification, seed_of
from gossamer.evaluate.attack import into_budget
from gossamer.evaluate.attack_losses import CE
from gossamer.evaluate.gradient_ascent import check_counts
from gossamer.evaluate.sample_noise import uniform
from gossamer.evaluate.victim import Normalised, Victim


class AdversarialTraining(Supervised):
    """Supervised training on images that were moved within a budget first.

    Args:
        network: takes the task's normalised inputs.
        task: images and labels.
        eps: the largest change of a pixel in [0, 1].
        steps: gradients a batch.
        step_size: in pixel values. Default: 2.5 eps / steps.
        options: of :class:`~gossamer.core.fit.Supervised`.

    Raises:
        InputError: if ``steps`` is below one.
    """

    def __init__(
        self,
        network: Any,
        task: Classification,
        *,
        eps: float,
        steps: int = 5,
        step_size: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network, task, **options)
        check_counts(steps=steps)
        self.eps = eps
        self.steps = steps
        self.step_size = 2.5 * eps / steps if step_size is None else step_size
        self.victim = Victim(Normalised(network, task.preprocess))

    def step(self, batch: tuple[Tensor, Tensor]) -> Log:
        inputs, labels = batch
        unnormalised = self.victim.model
        assert isinstance(unnormalised, Normalised)
        pixels = (inputs * unnormalised.std + unnormalised.mean).clamp(0.0, 1.0)
        moved = self._moved(pixels, labels)
        return super().step(((moved - unnormalised.mean) / unnormalised.std, labels))

    def _moved(self, pixels: Tensor, labels: Tensor) -> Tensor:
        ids = torch.arange(len(pixels), device=pixels.device)
        seed = seed_of("adversarial", self.run.seed, self.run.step)
        noise = uniform(ids, seed, shape=tuple(pixels.shape[1:]))
        moved = into_budget(pixels + self.eps * (2 * noise - 1), pixels, self.eps)
        for _ in range(self.steps):
            _, gradient = self.victim.gradient(moved, lambda z: CE.cotangent(z, labels))
            moved = into_budget(moved + self.step_size * gradient.sign(), pixels, self.eps)
        return moved
