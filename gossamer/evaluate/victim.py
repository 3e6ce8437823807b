"""The classifier under attack: its logits and gradients, counted, and what is odd about it.

Attacks work on images in [0, 1]. A network that wants normalised inputs is wrapped by
:class:`Normalised`, so that the budget of an attack means what it says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.task import Preprocess, device_of, logits_of


class Normalised(nn.Module):
    """A network that takes images in [0, 1], of one that takes normalised ones.

    Args:
        model: takes ``(images - mean) / std``.
        preprocess: the mean and standard deviation of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, -1, 1, 1))
        self.to(device_of(model))

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model((images - self.mean) / self.std))


class Victim:
    """A classifier that counts what it is asked.

    Args:
        model: maps images in [0, 1] to logits ``[n, classes]``.
        repeats: forward passes that logits and gradients are averaged over (expectation over
            transformation, for networks that draw at random).

    Attributes:
        forwards: images that went forward.
        backwards: images that gradients were taken of.
        flat: images among them whose gradient was zero everywhere.
        classes: how many logits it answers; known once it was examined.
        remarks: what was found odd about the network, in sentences.
    """

    def __init__(self, model: nn.Module, *, repeats: int = 1) -> None:
        if repeats < 1:
            raise InputError(f"logits are averaged over {repeats} passes; at least 1 is needed")
        self.model = model
        self.repeats = repeats
        self.device = device_of(model)
        self.forwards = self.backwards = self.flat = self.classes = 0
        self.remarks: list[str] = []
        self._probabilities = False

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Evaluation mode inside the block; every module's mode is restored after."""
        modules = list(self.model.modules())
        modes = [module.training for module in modules]
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode

    def examine(self, images: Tensor) -> None:
        """Looks at the answers for a few images, and remembers what is odd in ``remarks``.

        Answers that are probabilities are read as their logarithms, which are logits.

        Raises:
            InputError: if the images are not in [0, 1], or the answers are no logits of two or
                more classes or not finite.
        """
        low, high = float(images.min()), float(images.max())
        if not (low >= 0.0 and high <= 1.0):
            raise InputError(
                f"pixels go from {low:.3g} to {high:.3g}; attacks need images in [0, 1], with any "
                "normalisation inside the network (gossamer.evaluate.victim.Normalised)"
            )
        with self.ready(), torch.no_grad():
            inputs = images.to(self.device)
            answers = [_at_least_single(logits_of(self.model(inputs))) for _ in range(2)]
        first, second = answers
        if first.ndim != 2 or first.shape[0] != len(images) or first.shape[1] < 2:
            raise InputError(
                f"the network answers {list(first.shape)} for {len(images)} images; logits of two "
                "or more classes, [images, classes], are needed"
            )
        if not first.isfinite().all():
            raise InputError("the network answers NaN or infinity for clean images")
        self.classes = first.shape[1]
        sums = first.sum(1)
        self._probabilities = bool(
            (first >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
        )
        if self._probabilities:
            self._remark(
                "The network answers probabilities, not logits; their logarithms are attacked, "
                "which are flat where a probability is 0 or 1 in float32."
            )
        if not torch.allclose(first, second, rtol=1e-4, atol=1e-5):
            self._remark(
                "The network answers differently when asked twice; gradients of one pass are "
                "noise, so average over several (repeats) and read the result as an upper bound."
            )

    def logits(self, images: Tensor) -> Tensor:
        """Logits ``[n, classes]`` without gradients."""
        with torch.no_grad():
            answers = [self._ask(images) for _ in range(self.repeats)]
        return torch.stack(answers).mean(0) if len(answers) > 1 else answers[0]

    def gradient(
        self, images: Tensor, cotangent: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits, and how they pull at the pixels.

        Args:
            images: ``[n, channels, height, width]``.
            cotangent: logits ``[n, classes]`` to the gradient of a loss for them.

        Returns:
            The logits ``[n, classes]`` and the gradient of the loss for the images.
        """
        logits, gradient = 0.0, 0.0
        for _ in range(self.repeats):
            with torch.enable_grad():
                free = images.detach().requires_grad_()
                answer = self._ask(free)
            pull = cotangent(answer.detach())
            gradient = gradient + torch.autograd.grad(answer, free, pull)[0]
            logits = logits + answer.detach()
        assert isinstance(logits, Tensor) and isinstance(gradient, Tensor)
        self.backwards += len(images) * self.repeats
        self.flat += int((gradient.flatten(1).abs().amax(1) == 0).sum()) * self.repeats
        return logits / self.repeats, gradient / self.repeats

    def jacobian(self, images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the gradients of several combinations of them by one forward pass.

        Args:
            images: ``[n, channels, height, width]``.
            rows: the combinations, ``[combinations, n, classes]``.

        Returns:
            The logits ``[n, classes]`` and the gradients
            ``[combinations, n, channels, height, width]``.
        """
        with torch.enable_grad():
            free = images.detach().requires_grad_()
            answer = self._ask(free)
        gradients = [
            torch.autograd.grad(answer, free, row, retain_graph=k + 1 < len(rows))[0]
            for k, row in enumerate(rows)
        ]
        self.backwards += len(images) * len(rows)
        return answer.detach(), torch.stack(gradients)

    def _ask(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        answer = _at_least_single(logits_of(self.model(images)))
        return answer.clamp_min(1e-38).log() if self._probabilities else answer

    def _remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)


def _at_least_single(logits: Tensor) -> Tensor:
    # Differences of logits in half precision are too coarse to be climbed.
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
