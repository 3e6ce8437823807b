"""Deterministic stratified splits, and the one way from labelled images to a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.core.task import Augment, Classification, Preprocess, Source, seed_of

STATISTICS_SAMPLES = 4096
"""Training images, evenly spaced, from which mean and deviation are measured."""


class Pool(Source, Protocol):
    """A source of which a part can be taken."""

    def take(self, rows: np.ndarray) -> Self:
        """The source of these rows alone."""
        ...

    def verify(self) -> None:
        """Names the first image that cannot be read."""
        ...


def carve(labels: Tensor, count: int, *, seed: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Carves ``count`` rows out of labelled rows, with the classes in proportion.

    Every class keeps at least one row outside of the carved part, so fewer are carved where the
    classes are too small. The rows are a function of the labels, ``seed`` and ``purpose``.

    Args:
        labels: class indices ``[n]``.
        count: how many rows to carve.
        seed: of the draw.
        purpose: names the draw, so that two of the same seed are independent.

    Returns:
        Rows that stay and rows that were carved, each in ascending order.
    """
    values = labels.numpy()
    _, classes, sizes = np.unique(values, return_inverse=True, return_counts=True)
    exact = sizes * (count / max(1, len(values)))
    room = sizes - 1
    quota = np.minimum(np.floor(exact).astype(np.int64), room)
    short = count - int(quota.sum())
    while short > 0 and (quota < room).any():
        # The classes furthest below their share first; ties by class index.
        open_ = np.flatnonzero(quota < room)
        chosen = open_[np.argsort((quota - exact)[open_], kind="stable")][:short]
        quota[chosen] += 1
        short -= len(chosen)
    drawn = np.random.default_rng(seed_of("split", purpose, seed)).permutation(len(values))
    by_class = drawn[np.argsort(classes[drawn], kind="stable")]
    position = np.arange(len(values)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    carved = position < quota[classes[by_class]]
    return np.sort(by_class[~carved]), np.sort(by_class[carved])


def assemble(
    pool: Pool,
    classes: Sequence[str],
    *,
    name: str,
    seed: int = 0,
    validation: Pool | None = None,
    test: Pool | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    limit: int | None = None,
    scale: float = 255.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
) -> Classification:
    """Makes the task of a pool of labelled images.

    Args:
        pool: images to train on; what is not given apart is carved from them.
        classes: names of the classes, in label order.
        name: for reports.
        seed: of the splits.
        validation: validation images that came apart from the pool.
        test: test images that came apart from the pool.
        validation_fraction: share of the training images (after the test split is taken) that
            is carved for validation.
        test_fraction: share of the pool that is carved for testing when there is no ``test``.
        limit: at most about this many training images, and as many for validation (every class
            keeps at least one); the test split stays whole.
        scale: raw values are divided by this.
        mean: per channel on the scale 0..1. Default: measured on the training split.
        std: per channel on the scale 0..1. Default: measured on the training split.
        augment: applied to raw training batches.

    Raises:
        InputError: if a split would be empty, there are fewer than two classes, or an image
            cannot be read.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit on training images must be at least 1, and is {limit}")
    if len(pool) == 0:
        raise InputError(f"{name} holds no training images")
    if len(classes) >= 2 and len(torch.unique(pool.labels)) < 2:
        # A network cannot learn to tell apart what it sees one of, whatever names are known.
        raise InputError(f"all training images of {name} have one and the same class")
    if test is None:
        rest, carved = carve(
            pool.labels, round(test_fraction * len(pool)), seed=seed, purpose="test"
        )
        pool, test = pool.take(rest), pool.take(carved)
    train = pool
    if validation is None:
        rest, carved = carve(
            pool.labels, round(validation_fraction * len(pool)), seed=seed, purpose="validation"
        )
        train, validation = pool.take(rest), pool.take(carved)
    if limit is not None:
        train = _limited(train, limit, seed)
        validation = _limited(validation, limit, seed)
    splits: dict[str, Source] = {}
    for split, source in (("train", train), ("validation", validation), ("test", test)):
        if len(source) == 0:
            raise InputError(
                f"the {split} split of {name} would be empty; more images of each class are needed"
            )
        source.verify()
        splits[split] = source
    shape = train.fetch(np.arange(1)).shape
    if mean is None or std is None:
        measured = statistics(train, scale)
        mean, std = mean or measured[0], std or measured[1]
    if len(mean) != shape[1] or len(std) != shape[1]:
        raise InputError(f"{name} has {shape[1]} channels, so mean and std need as many numbers")
    preprocess = Preprocess(
        channels=int(shape[1]),
        height=int(shape[2]),
        width=int(shape[3]),
        mean=tuple(mean),
        std=tuple(std),
        scale=scale,
    )
    return Classification(splits, preprocess, classes, name=name, augment=augment)


def numbered_classes(labels: Sequence[Tensor], name: str) -> list[str]:
    """Names for classes that have none: their numbers.

    Args:
        labels: class indices of each split.
        name: of the data, for errors.

    Raises:
        InputError: if a number is so high that most classes would have no image.
    """
    present = [split for split in labels if len(split)]
    count = max((int(split.max()) for split in present), default=-1) + 1
    images = sum(len(split) for split in present)
    if count > images:
        raise InputError(
            f"{name} has label {count - 1}, but only {images} images and no names of classes; "
            "number the classes from 0"
        )
    return [str(label) for label in range(count)]


def statistics(source: Source, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, after division by ``scale``.

    Measured on at most :data:`STATISTICS_SAMPLES` evenly spaced images and rounded to four
    digits; a channel without variation gets deviation 1.
    """
    rows = np.unique(np.linspace(0, len(source) - 1, STATISTICS_SAMPLES).astype(np.int64))
    images = source.fetch(rows).double() / scale
    mean = images.mean((0, 2, 3))
    std = images.var((0, 2, 3), correction=0).sqrt()
    std = torch.where(std < 1e-4, torch.ones_like(std), std)
    return (
        tuple(round(float(value), 4) for value in mean),
        tuple(round(float(value), 4) for value in std),
    )


def _limited(source: Pool, limit: int, seed: int) -> Pool:
    if len(source) <= limit:
        return source
    kept, _ = carve(source.labels, len(source) - limit, seed=seed, purpose="limit")
    return source.take(kept)
