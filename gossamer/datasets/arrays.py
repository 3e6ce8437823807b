"""Labelled images held in memory, and the fitting of any images to a size and channel count."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gossamer.core.errors import InputError

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601, as Pillow's mode "L")."""


class ArraySource:
    """Images and labels as tensors.

    Args:
        images: raw images ``[n, channels, height, width]``, uint8 or float.
        labels: class indices ``[n]``.
        channels: 1 or 3: grey is repeated, colour is weighted to grey. Default: as stored.
        size: height and width in pixels; images are resized bilinearly when they are fetched.
            Default: as stored.

    Raises:
        InputError: if the shapes do not belong together.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        channels: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        if images.ndim != 4 or labels.ndim != 1 or len(images) != len(labels):
            raise InputError(
                f"images of shape {list(images.shape)} and labels of shape {list(labels.shape)} "
                "do not belong together; [n, channels, height, width] and [n] are needed"
            )
        if images.shape[1] not in (1, 3):
            raise InputError(f"images have {images.shape[1]} channels; only 1 and 3 are read")
        self.images = images
        self.labels = labels.long()
        self.channels = channels or int(images.shape[1])
        self.size = size or (int(images.shape[2]), int(images.shape[3]))

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: np.ndarray) -> Tensor:
        return fit_images(self.images[torch.from_numpy(indices)], self.channels, self.size)

    def take(self, rows: np.ndarray) -> ArraySource:
        """The source of these rows alone."""
        at = torch.from_numpy(rows)
        return ArraySource(self.images[at], self.labels[at], channels=self.channels, size=self.size)

    def verify(self) -> None:
        """Nothing to do: what is in memory was read."""


def fit_images(images: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Brings a batch of raw images to a channel count and a size.

    Args:
        images: ``[batch, 1 or 3, height, width]``.
        channels: 1 or 3.
        size: height and width in pixels.

    Returns:
        ``[batch, channels, *size]``; the very tensor given when it fits already, otherwise float
        on the same scale of values.
    """
    if images.shape[1] == 3 and channels == 1:
        images = torch.einsum("bchw,c->bhw", images.float(), torch.tensor(LUMA)).unsqueeze(1)
    elif images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    if tuple(images.shape[2:]) != tuple(size):
        images = interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return images
