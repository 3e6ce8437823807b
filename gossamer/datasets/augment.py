"""Augmentation of raw training batches, vectorised and drawn from one generator.

Each function makes an :data:`~gossamer.core.task.Augment`: ``(images, generator) -> images`` with
images ``[batch, channels, height, width]`` of any dtype, which is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.task import Augment


def flip(probability: float = 0.5) -> Augment:
    """Mirrors each image left to right with ``probability``."""

    def apply(images: Tensor, generator: torch.Generator) -> Tensor:
        mirrored = torch.rand(len(images), generator=generator) < probability
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)

    return apply


def shift(pixels: int) -> Augment:
    """Moves each image by up to ``pixels`` each way; what enters is zero.

    The same as padding by ``pixels`` and cropping at random to the old size (He et al., "Deep
    residual learning for image recognition", section 4.2, with four pixels on CIFAR-10).
    """

    def apply(images: Tensor, generator: torch.Generator) -> Tensor:
        batch, channels, height, width = images.shape
        top, left = torch.randint(0, 2 * pixels + 1, (2, batch), generator=generator)
        padded = pad(images, (pixels, pixels, pixels, pixels))
        rows = (top[:, None] + torch.arange(height)).view(batch, 1, height, 1)
        columns = (left[:, None] + torch.arange(width)).view(batch, 1, 1, width)
        images_of = torch.arange(batch).view(batch, 1, 1, 1)
        channels_of = torch.arange(channels).view(1, channels, 1, 1)
        return padded[images_of, channels_of, rows, columns]

    return apply


def compose(*steps: Augment) -> Augment:
    """Applies one augmentation after the other."""

    def apply(images: Tensor, generator: torch.Generator) -> Tensor:
        for step in steps:
            images = step(images, generator)
        return images

    return apply
