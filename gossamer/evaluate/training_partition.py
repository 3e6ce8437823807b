"""Training data in parts, so that one sample can spoil few models only.

A sample's bucket is a function of its own content: of no index, order or other sample. Each bucket
feeds some base models, and what a base model learns from is brought into an order that is again a
function of content. So a sample that is inserted or removed changes the parts that its bucket
feeds, and every other part stays the same to the bit.

Source: Levine & Feizi, "Deep Partition Aggregation", ICLR 2021 (disjoint parts); Wang, Levine &
Feizi, "Improved Certified Defenses against Data Poisoning with (Deterministic) Finite Aggregation",
ICML 2022 (overlapping parts).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gossamer.core.errors import InputError
from gossamer.core.task import Classification, Source, seed_of

ContentHash = Callable[[np.ndarray], np.ndarray]
"""Whole numbers ``[n]`` of raw images ``[n, ...]``, each a function of its own image alone."""

BLOCK = 4096
"""Images that are fetched at once."""


def pixel_sum(images: np.ndarray) -> np.ndarray:
    """The sum of an image's raw values (rounded, if they are no whole numbers), ``[n]``.

    The published hash. Its values are few where images are small: thousands of parts need larger
    images or :func:`content_digest`.
    """
    flat = images.reshape(len(images), -1)
    if flat.dtype.kind == "f":
        flat = np.rint(flat)
    return flat.sum(1, dtype=np.int64)


def content_digest(images: np.ndarray) -> np.ndarray:
    """The first 63 bits of BLAKE2b over an image's raw values, ``[n]``."""
    rows = np.ascontiguousarray(images).reshape(len(images), -1)
    return np.array(
        [
            int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") >> 1
            for row in rows
        ],
        dtype=np.int64,
    )


def bucket_rows(
    source: Source, buckets: int, content_hash: ContentHash = pixel_sum
) -> list[np.ndarray]:
    """The samples of each bucket, ordered by their content: raw values, then label.

    Images are read a block at a time, twice, and not kept.

    Args:
        source: labelled raw images, without augmentation.
        buckets: how many.
        content_hash: says which bucket, modulo their number.

    Returns:
        The rows of each bucket; some may be empty.

    Raises:
        InputError: if there is no bucket, or the hash does not answer a whole number an image.
    """
    if buckets < 1:
        raise InputError(f"training data go into one part or more, not {buckets}")
    rows = np.arange(len(source))
    blocks = (rows[low : low + BLOCK] for low in range(0, len(rows), BLOCK))
    hashes = [np.asarray(content_hash(source.fetch(block).numpy())) for block in blocks]
    found = np.concatenate([np.empty(0, np.int64), *hashes])
    if len(found) != len(rows) or any(h.dtype.kind not in "iu" for h in hashes):
        raise InputError("a content hash answers one whole number for each image")
    bucket = found % buckets
    order = np.argsort(bucket, kind="stable")
    bounds = np.searchsorted(bucket[order], np.arange(buckets + 1))
    labels = source.labels.numpy()
    result: list[np.ndarray] = [rows[:0]] * buckets
    # Neighbouring buckets are fetched together.
    first = 0
    while first < buckets:
        last = int(np.searchsorted(bounds, bounds[first] + BLOCK, side="right")) - 1
        last = min(max(last, first + 1), buckets)
        block = order[bounds[first] : bounds[last]]
        keys = _content_keys(source, block, labels)
        for number in range(first, last):
            where = slice(bounds[number] - bounds[first], bounds[number + 1] - bounds[first])
            result[number] = block[where][np.argsort(keys[where], kind="stable")]
        first = last
    return result


def _content_keys(source: Source, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Keys ``[n]`` that compare as the bytes of the raw values followed by those of the label."""
    if not len(rows):
        return np.empty(0, "V1")
    images = source.fetch(rows).contiguous().numpy().reshape(len(rows), -1)
    pixels = images.view(np.uint8).reshape(len(rows), -1)
    last = labels[rows].astype(">i8").view(np.uint8).reshape(len(rows), 8)
    joined = np.ascontiguousarray(np.concatenate([pixels, last], axis=1))
    return joined.view(f"V{joined.shape[1]}").ravel()


def finite_shifts(k: int, d: int, seed: int = 0) -> np.ndarray:
    """The fixed shifts of finite aggregation: ``d`` different numbers below ``k * d``.

    Raises:
        InputError: if ``k`` or ``d`` is less than 1.
    """
    if k < 1 or d < 1:
        raise InputError(f"k and d are 1 or more, not {k} and {d}")
    drawn = np.random.default_rng(seed_of("finite aggregation", seed)).permutation(k * d)[:d]
    return np.sort(drawn)


def finite_spread(buckets: int, shifts: Sequence[int] | np.ndarray) -> np.ndarray:
    """The base models that each bucket feeds, ``[buckets, shifts]``.

    Bucket ``j`` feeds ``(j + t) mod buckets`` for each shift ``t``; there are as many models.

    Args:
        buckets: how many.
        shifts: different modulo ``buckets``.

    Raises:
        InputError: if two shifts are the same.
    """
    shifts = np.asarray(shifts, dtype=np.int64) % buckets
    if len(set(shifts.tolist())) != len(shifts):
        raise InputError(f"the shifts {shifts.tolist()} are not different modulo {buckets}")
    return (np.arange(buckets)[:, None] + shifts) % buckets


@dataclass(frozen=True)
class Partition:
    """Which samples each base model learns from.

    Attributes:
        parts: the samples of each base model, in the order of their content (bucket by bucket).
        spread: the models that each bucket feeds ``[buckets, models of a bucket]``; None if each
            has one of its own.
    """

    parts: list[np.ndarray]
    spread: np.ndarray | None

    def lacking(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """How many classes each part has no sample of, ``[parts]``."""
        labels = np.asarray(labels)
        return np.array([classes - len(np.unique(labels[rows])) for rows in self.parts])

    def warning(self, labels: np.ndarray, classes: int) -> str | None:
        """One sentence if many parts lack classes, which spoils the second round of an election."""
        lacking = self.lacking(labels, classes)
        share = float((lacking > 0).mean())
        empty = sum(not len(rows) for rows in self.parts)
        if share < 0.05:
            return None
        without = f", {empty} of them have no sample at all" if empty else ""
        return (
            f"{share:.0%} of the parts lack a class{without}: their models do not know how to "
            "order the classes they never saw, which costs accuracy, and the run-off election "
            "more than the plain vote; take fewer parts or more data"
        )


def disjoint_partition(
    source: Source, parts: int, content_hash: ContentHash = pixel_sum
) -> Partition:
    """Every sample in the part of one base model (DPA)."""
    return Partition(bucket_rows(source, parts, content_hash), None)


def finite_partition(
    source: Source, k: int, d: int, content_hash: ContentHash = pixel_sum, seed: int = 0
) -> Partition:
    """Every sample in the parts of ``d`` of ``k * d`` base models (FA).

    Each base model learns from ``d`` buckets, about one of ``k`` parts of the data. With d = 1 this
    is :func:`disjoint_partition` but for the numbers of the parts.
    """
    spread = finite_spread(k * d, finite_shifts(k, d, seed))
    # Sorted by bucket within each model, since the sort is stable and buckets lie in order.
    rows = bucket_rows(source, k * d, content_hash)
    feeding = np.argsort(spread.ravel(), kind="stable").reshape(k * d, d) // d
    return Partition([np.concatenate([rows[j] for j in own]) for own in feeding], spread)


class Joined:
    """The images of several sources as one, in their order.

    Args:
        sources: with images of the same size and channels.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._starts = np.cumsum([0, *map(len, self.sources)])
        self._labels = torch.cat([source.labels for source in self.sources])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def labels(self) -> torch.Tensor:
        """Class indices ``[n]``, int64."""
        return self._labels

    def fetch(self, indices: np.ndarray) -> torch.Tensor:
        """Raw images ``[n, channels, height, width]`` of these rows."""
        which = np.searchsorted(self._starts, indices, side="right") - 1
        if not len(which):
            return self.sources[0].fetch(indices)
        order = np.argsort(which, kind="stable")
        pieces = [
            self.sources[number].fetch(indices[which == number] - self._starts[number])
            for number in np.unique(which)
        ]
        return torch.cat(pieces)[torch.from_numpy(np.argsort(order))]


def training_data(task: Classification) -> Source:
    """All training images of a task, those held out for validation too.

    Which images a task holds out is a function of their order: one more image would hold out
    others, and reach every part. So the parts are made of both.
    """
    return Joined([task.splits["train"], task.splits["validation"]])
