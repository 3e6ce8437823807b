"""Encoded images (files or bytes), decoded in threads and kept in memory up to a limit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.core.progress import progress
from gossamer.datasets.decode import Header, decode, probe

T = TypeVar("T")

CACHE_BYTES = 1 << 30
DEFAULT_SIDE = 224
CHUNK = 32
"""Images a thread takes at a time, so that small ones are not dominated by hand-over."""


class EncodedSource:
    """Labelled images that are decoded when they are fetched.

    Args:
        contents: files or their bytes.
        names: of the images, for errors.
        labels: class indices ``[n]``.
        channels: 1 or 3.
        size: height and width in pixels.
        cache_bytes: decoded images kept in memory, at most.
    """

    def __init__(
        self,
        contents: Sequence[Path | bytes],
        names: Sequence[str],
        labels: Tensor,
        *,
        channels: int,
        size: tuple[int, int],
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.contents = contents
        self.names = names
        self.labels = labels.long()
        self.channels = channels
        self.size = size
        self.cache_bytes = cache_bytes
        # The first rows that fit, for good: when every epoch goes through all images in a new
        # order, throwing out the least recently used keeps nothing that is needed next.
        room = min(len(labels), cache_bytes // max(1, channels * size[0] * size[1]))
        self._kept = np.empty((room, channels, *size), dtype=np.uint8)
        self._known = np.zeros(room, dtype=bool)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: np.ndarray) -> Tensor:
        images = np.empty((len(indices), self.channels, *self.size), dtype=np.uint8)
        kept = indices < len(self._known)
        kept[kept] = self._known[indices[kept]]
        images[kept] = self._kept[indices[kept]]
        missing = np.flatnonzero(~kept)
        for at, pixels in zip(missing, in_threads(self._decode, indices[missing]), strict=True):
            images[at] = pixels
            if indices[at] < len(self._known):
                self._kept[indices[at]] = pixels
                self._known[indices[at]] = True
        return torch.from_numpy(images)

    def take(self, rows: np.ndarray) -> EncodedSource:
        """The source of these rows alone, with its share of the memory."""
        return EncodedSource(
            [self.contents[int(row)] for row in rows],
            [self.names[int(row)] for row in rows],
            self.labels[torch.from_numpy(rows)],
            channels=self.channels,
            size=self.size,
            cache_bytes=self.cache_bytes * len(rows) // max(1, len(self)),
        )

    def verify(self) -> None:
        """Names the first image that cannot be read.

        Images that fit in memory are decoded (and kept). Of the others the header and the end of
        the file are read, and those that show no end are decoded; damage in the middle of such a
        file is named when it is fetched.

        Raises:
            InputError: naming the image.
        """
        rows = np.arange(len(self))
        room = len(self._known)
        with progress() as bar:
            shown = bar.add_task("reading images", total=len(self))
            for row, pixels in zip(rows, in_threads(self._decode, rows[:room]), strict=False):
                self._kept[row] = pixels
                self._known[row] = True
                bar.advance(shown)
            for _ in in_threads(self._glance, rows[room:]):
                bar.advance(shown)

    def _decode(self, row: int) -> np.ndarray:
        return decode(self.contents[row], self.names[row], channels=self.channels, size=self.size)

    def _glance(self, row: int) -> None:
        if not probe(self.contents[row], self.names[row]).ends:
            self._decode(row)


def encoded(
    contents: Sequence[Path | bytes],
    names: Sequence[str],
    labels: Tensor,
    *,
    image_size: tuple[int, int] | None,
    channels: int | None,
    cache_bytes: int = CACHE_BYTES,
) -> EncodedSource:
    """A source whose size and channels, where not given, are read off the images.

    Args:
        contents: files or their bytes.
        names: of the images, for errors.
        labels: class indices ``[n]``.
        image_size: height and width in pixels. Default: the images' own if all have the same and
            no side is over 224, otherwise 224 x 224.
        channels: 1 or 3. Default: 1 if all images are grey, otherwise 3.
        cache_bytes: decoded images kept in memory, at most.

    Raises:
        InputError: if the header of an image cannot be read.
    """
    if image_size is None or channels is None:
        headers = headers_of(contents, names)
        sizes = {(header.height, header.width) for header in headers}
        alike = len(sizes) == 1 and max(next(iter(sizes))) <= DEFAULT_SIDE
        image_size = image_size or (next(iter(sizes)) if alike else (DEFAULT_SIDE, DEFAULT_SIDE))
        channels = channels or max((header.channels for header in headers), default=3)
    return EncodedSource(
        contents, names, labels, channels=channels, size=image_size, cache_bytes=cache_bytes
    )


def headers_of(contents: Sequence[Path | bytes], names: Sequence[str]) -> list[Header]:
    """The headers of all images.

    Raises:
        InputError: naming the first that cannot be read.
    """
    if not contents:
        raise InputError("there are no images")
    with progress() as bar:
        rows = np.arange(len(contents))
        found = in_threads(lambda row: probe(contents[row], names[row]), rows)
        return list(bar.track(found, total=len(contents), description="looking at images"))


def in_threads(work: Callable[[int], T], rows: np.ndarray) -> Iterator[T]:
    """``work`` of each row, in order; Pillow's decoders leave the other threads free."""
    chunks = [rows[at : at + CHUNK] for at in range(0, len(rows), CHUNK)]
    if len(chunks) < 2:
        yield from map(work, rows)
        return
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        for done in pool.map(lambda chunk: [work(row) for row in chunk], chunks):
            yield from done
    finally:
        # After an error the images still in the queue are of no interest.
        pool.shutdown(cancel_futures=True)
