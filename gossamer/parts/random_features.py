"""Ridge regression on random cosine features: a classifier that is learned in one solve.

Rahimi & Recht, "Random Features for Large-Scale Kernel Machines", 2007: cosines of random
projections approximate a Gaussian kernel, so a linear learner on them is a kernel machine. It is
the quick learner with which selections of data are compared: no epochs, no learning rate.
"""

from __future__ import annotations

import math

import numpy as np

from gossamer.core.errors import InputError

RIDGES = tuple(float(ridge) for ridge in np.logspace(-7, 0, 15))
"""Penalties that are tried, per sample."""


class RandomFeatureClassifier:
    """One-hot ridge regression on ``cos(x W + b)``.

    Args:
        count: random features.
        width: of the Gaussian kernel, in multiples of the median distance of two samples.
        ridge: weight of the penalty, per sample. Default: the one of :data:`RIDGES` with the least
            generalized cross-validation error (Golub, Heath & Wahba 1979) on what it learns from.
        seed: of the projections.
    """

    def __init__(
        self, *, count: int = 1500, width: float = 1.0, ridge: float | None = None, seed: int = 0
    ) -> None:
        self.count = count
        self.width = width
        self.ridge = ridge
        self.seed = seed

    def fit(self, inputs: np.ndarray, labels: np.ndarray, classes: int) -> RandomFeatureClassifier:
        """Solves for the weights.

        Args:
            inputs: ``[n, d]``.
            labels: class indices ``[n]``.
            classes: how many.

        Raises:
            InputError: if there is nothing to learn from.
        """
        inputs = np.asarray(inputs, dtype=np.float32)
        if len(inputs) == 0 or len(inputs) != len(labels):
            raise InputError(f"{len(inputs)} samples with {len(labels)} labels cannot be learned")
        random = np.random.default_rng(self.seed)
        self.mean = inputs.mean(0)
        pairs = random.integers(0, len(inputs), (2, 1000))
        apart = np.linalg.norm(inputs[pairs[0]] - inputs[pairs[1]], axis=1)
        scale = self.width * float(np.median(apart[apart > 0])) if (apart > 0).any() else 1.0
        self.projection = (
            random.standard_normal((inputs.shape[1], self.count)).astype(np.float32) / scale
        )
        self.phase = random.uniform(0.0, 2.0 * math.pi, self.count).astype(np.float32)
        features = self._features(inputs).astype(np.float64)
        targets = np.eye(classes)[labels]
        self.offset = targets.mean(0)
        gram = features.T @ features
        # One decomposition serves every penalty.
        values, vectors = np.linalg.eigh(gram)
        values = values.clip(min=0.0)
        projected = vectors.T @ (features.T @ (targets - self.offset))
        self.chosen_ridge = (
            _least_gcv(values, projected, targets - self.offset)
            if self.ridge is None
            else self.ridge
        )
        shrunk = projected / (values + self.chosen_ridge * len(inputs))[:, None]
        self.weights = vectors @ shrunk
        return self

    def scores(self, inputs: np.ndarray) -> np.ndarray:
        """Regressed one-hot scores ``[n, classes]``."""
        features = self._features(np.asarray(inputs, dtype=np.float32))
        return features @ self.weights + self.offset

    def accuracy(self, inputs: np.ndarray, labels: np.ndarray) -> float:
        """Top-1 accuracy in percent."""
        return 100.0 * float((self.scores(inputs).argmax(1) == labels).mean())

    def _features(self, inputs: np.ndarray) -> np.ndarray:
        waves = np.cos((inputs - self.mean) @ self.projection + self.phase)
        return waves * math.sqrt(2.0 / self.count)


def _least_gcv(values: np.ndarray, projected: np.ndarray, targets: np.ndarray) -> float:
    """The penalty with the least ``n * residual / (n - degrees of freedom)^2``."""
    count = len(targets)
    total = float(np.square(targets).sum())
    explained = np.square(projected).sum(1)

    def score(ridge: float) -> float:
        penalty = ridge * count
        freedom = float((values / (values + penalty)).sum())
        gained = (explained * (values + 2.0 * penalty) / np.square(values + penalty)).sum()
        return max(total - float(gained), 0.0) / max(count - freedom, 1e-9) ** 2

    return min(RIDGES, key=score)
