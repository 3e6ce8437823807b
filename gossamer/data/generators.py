"""Generators as black boxes: draw a sample, or draw a variant of one.

Two calls are all that private evolution knows of a generator (Lin et al., ICLR 2024,
arXiv:2305.15560, Section 3), so a diffusion model behind an address, a pool of public images and a
simulator are the same to it. Samples are arrays whose first axis counts them. A *degree* says how
far a variant may be from its original, in the generator's own unit; ``degrees`` proposes a schedule
from far to near.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from gossamer.core.errors import InputError
from gossamer.parts.neighbours import nearest

Embedding = Callable[[np.ndarray], np.ndarray]
"""Samples ``[n, ...]`` in, vectors ``[n, d]`` out; made without any private data."""


class Generator(Protocol):
    """What private evolution asks of a generator."""

    def random(self, labels: np.ndarray, *, seed: int) -> np.ndarray:
        """A fresh sample of each label: ``[n]`` int64 in, ``[n, ...]`` out."""
        ...

    def variation(
        self, samples: np.ndarray, labels: np.ndarray, degree: float, *, seed: int
    ) -> np.ndarray:
        """A variant of each sample, of the same label: ``[n, ...]`` in and out."""
        ...

    def degrees(self, iterations: int) -> list[float]:
        """Degrees for the start and each iteration, ``iterations + 1`` of them."""
        ...


class NearestImage:
    """A public pool as a generator: variants are neighbours of the original in the pool.

    A fresh sample is any of the pool; a variant of degree v is one of the v members that are
    nearest to the original, the original's own place among them. Samples that are not in the pool
    stand for the member nearest to them.

    Args:
        pool: public samples ``[n, ...]``.
        embedding: of samples.
        labels: of the pool, ``[n]``; None answers every label from the whole pool.
    """

    def __init__(
        self, pool: np.ndarray, embedding: Embedding, labels: np.ndarray | None = None
    ) -> None:
        if len(pool) == 0:
            raise InputError("the public pool is empty")
        if labels is not None and len(labels) != len(pool):
            raise InputError(f"the pool has {len(pool)} samples and {len(labels)} labels")
        self.pool = pool
        self.embedding = embedding
        self.features = np.asarray(embedding(pool), dtype=np.float32)
        self.labels = labels
        every = np.arange(len(pool))
        self._members = (
            {} if labels is None
            else {int(label): every[labels == label] for label in np.unique(labels)}
        )  # fmt: skip
        self._every = every
        # Most samples that come back are members, which a look at their bytes tells.
        flat = np.ascontiguousarray(pool).reshape(len(pool), -1)
        self._place = {row.tobytes(): at for at, row in enumerate(flat)}

    def random(self, labels: np.ndarray, *, seed: int) -> np.ndarray:
        """Members of the pool, drawn with replacement."""
        random = np.random.default_rng(seed)
        rows = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            mine = labels == label
            rows[mine] = random.choice(self.members(int(label)), int(mine.sum()))
        return self.pool[rows]

    def variation(
        self, samples: np.ndarray, labels: np.ndarray, degree: float, *, seed: int
    ) -> np.ndarray:
        """One of the ``degree`` nearest members of each sample's label."""
        if degree < 1.0:
            raise InputError(f"a variant is one of at least 1 neighbour, not {degree:g}")
        random = np.random.default_rng(seed)
        features = self._features_of(samples)
        chosen = np.empty(len(samples), dtype=np.int64)
        for label in np.unique(labels):
            mine = np.flatnonzero(labels == label)
            members = self.members(int(label))
            count = min(round(degree), len(members))
            # Parents are drawn with replacement, so many are asked for once only.
            asked, back = np.unique(features[mine], axis=0, return_inverse=True)
            _, near = nearest(asked, self.features[members], k=count)
            drawn = random.integers(0, count, len(mine))
            chosen[mine] = members[near[back.reshape(-1), drawn]]
        return self.pool[chosen]

    def degrees(self, iterations: int) -> list[float]:
        """From a quarter of a label's members to 4, geometrically."""
        sizes = [len(m) for m in self._members.values()] or [len(self.pool)]
        far = max(4.0, min(sizes) / 4.0)
        return [float(v) for v in np.geomspace(far, min(4.0, far), iterations + 1)]

    def members(self, label: int) -> np.ndarray:
        """Rows of the pool that have a label.

        Raises:
            InputError: if there are none.
        """
        if self.labels is None:
            return self._every
        if label not in self._members:
            raise InputError(f"the public pool has no sample of class {label}")
        return self._members[label]

    def _features_of(self, samples: np.ndarray) -> np.ndarray:
        samples = np.ascontiguousarray(samples)
        flat = samples.reshape(len(samples), -1)
        known = samples.dtype == self.pool.dtype and samples.shape[1:] == self.pool.shape[1:]
        places = [self._place.get(row.tobytes(), -1) if known else -1 for row in flat]
        rows = np.array(places, dtype=np.int64)
        features = self.features[rows]
        if (rows < 0).any():
            features[rows < 0] = self.embedding(samples[rows < 0])
        return features


class UniformBox:
    """A simulator of points: uniform in a box, varied by Gaussian steps of the degree's length.

    Args:
        low: lower end of every coordinate.
        high: upper end.
        dimension: of the points.
        first: standard deviation of the first steps.
        last: of the last.
    """

    def __init__(
        self,
        *,
        low: float = -8.0,
        high: float = 8.0,
        dimension: int = 2,
        first: float = 2.0,
        last: float = 0.15,
    ) -> None:
        self.low = low
        self.high = high
        self.dimension = dimension
        self.first = first
        self.last = last

    def random(self, labels: np.ndarray, *, seed: int) -> np.ndarray:
        """Points uniform in the box, ``[n, dimension]`` float32."""
        random = np.random.default_rng(seed)
        drawn = random.uniform(self.low, self.high, (len(labels), self.dimension))
        return drawn.astype(np.float32)

    def variation(
        self, samples: np.ndarray, labels: np.ndarray, degree: float, *, seed: int
    ) -> np.ndarray:
        """Points moved by a Gaussian step."""
        step = np.random.default_rng(seed).normal(0.0, 1.0, samples.shape) * degree
        return (samples + step).astype(np.float32)

    def degrees(self, iterations: int) -> list[float]:
        """From ``first`` to ``last``, geometrically; the start has the first one, too."""
        steps = np.geomspace(self.first, self.last, iterations)
        return [self.first, *(float(step) for step in steps)]


class MovedImages:
    """A simulator of images: members of a pool that are turned, shifted, scaled and made noisy.

    A degree of 1 turns by up to 20 degrees, shifts by up to 15 % of the side, scales by up to 20 %
    and adds noise of 5 % of the range; smaller degrees do in proportion less. Variants of variants
    are interpolated again and again, so they blur: prefer a pool or a real generator where there is
    one.

    Args:
        pool: public images ``[n, channels, height, width]``, uint8.
        labels: of the pool, ``[n]``; None answers every label from the whole pool.
    """

    def __init__(self, pool: np.ndarray, labels: np.ndarray | None = None) -> None:
        if pool.ndim != 4 or pool.dtype != np.uint8:
            raise InputError(
                "a pool of images is uint8 [n, channels, height, width], not "
                f"{pool.dtype} {list(pool.shape)}"
            )
        self._pool = NearestImage(pool, lambda images: np.zeros((len(images), 1)), labels)

    def random(self, labels: np.ndarray, *, seed: int) -> np.ndarray:
        """Members of the pool, moved by a degree of 1."""
        first, second = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
        return self.variation(self._pool.random(labels, seed=first), labels, 1.0, seed=second)

    def variation(
        self, samples: np.ndarray, labels: np.ndarray, degree: float, *, seed: int
    ) -> np.ndarray:
        """Images moved once more."""
        random = np.random.default_rng(seed)
        count = len(samples)
        turn = np.deg2rad(20.0) * degree * random.uniform(-1.0, 1.0, count)
        scale = np.exp(math.log(1.2) * degree * random.uniform(-1.0, 1.0, count))
        # Normalised coordinates span 2 over a side.
        shift = 2.0 * 0.15 * degree * random.uniform(-1.0, 1.0, (count, 2))
        cosine, sine = np.cos(turn) / scale, np.sin(turn) / scale
        moves = np.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], axis=1)
        moves = torch.from_numpy(moves.reshape(count, 2, 3).astype(np.float32))
        images = torch.from_numpy(samples.astype(np.float32))
        grid = functional.affine_grid(moves, list(images.shape), align_corners=False)
        moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
        noise = random.normal(0.0, 0.05 * 255.0 * degree, samples.shape)
        return (moved.numpy() + noise).round().clip(0, 255).astype(np.uint8)

    def degrees(self, iterations: int) -> list[float]:
        """From 1 to a tenth, geometrically."""
        return [float(degree) for degree in np.geomspace(1.0, 0.1, iterations + 1)]
