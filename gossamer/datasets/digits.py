"""Handwritten digits, embedded: 1,797 real images of 8 x 8 pixels and 17 levels (0 to 16).

The test set of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak, UCI, 1998), which
scikit-learn brings along, so nothing is downloaded. It has no official split: 40 % is carved for
testing, then 20 % of the rest for validation, stratified and as a function of ``seed``. So "ten
splits" are ten seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gossamer.core.task import Augment, Classification
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.augment import shift
from gossamer.datasets.splits import assemble

TEST_FRACTION = 0.4
VALIDATION_FRACTION = 0.2
CLASSES = tuple(str(digit) for digit in range(10))
SCALE = 16.0


def digits(
    *,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
) -> Classification:
    """Opens the handwritten digits.

    Args:
        seed: of the split: 862 training, 216 validation and 719 test images.
        image_size: height and width in pixels. Default: 8 x 8.
        channels: 1 or 3. Default: 1.
        limit: at most about this many training images.
        mean: on the scale 0..1. Default: measured on the training split.
        std: on the scale 0..1. Default: measured on the training split.
        augment: of raw training batches. Default: shifts by up to an eighth of the width.
    """
    pool = digits_source(image_size=image_size, channels=channels)
    return assemble(
        pool,
        CLASSES,
        name="digits",
        seed=seed,
        validation_fraction=VALIDATION_FRACTION,
        test_fraction=TEST_FRACTION,
        limit=limit,
        scale=SCALE,
        mean=mean,
        std=std,
        augment=augment or shift(max(1, pool.size[1] // 8)),
    )


def digits_source(
    *, image_size: tuple[int, int] | None = None, channels: int | None = None
) -> ArraySource:
    """All of the digits, not split.

    Args:
        image_size: height and width in pixels. Default: 8 x 8.
        channels: 1 or 3. Default: 1.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(pixels).reshape(-1, 1, 8, 8)).to(torch.uint8)
    return ArraySource(
        images, torch.from_numpy(np.asarray(labels)), channels=channels, size=image_size
    )
