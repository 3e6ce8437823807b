"""Ridge regression on random features."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge

from gossamer.core.errors import InputError
from gossamer.parts.random_features import RIDGES, RandomFeatureClassifier


def test_is_ridge_regression_on_its_features() -> None:
    random = np.random.default_rng(0)
    inputs, labels = random.normal(size=(60, 5)), random.integers(0, 3, 60)
    model = RandomFeatureClassifier(count=40, ridge=0.01).fit(inputs, labels, 3)
    # Ridge's own intercept differs: ours is the mean of the targets.
    targets = np.eye(3)[labels]
    peer = Ridge(alpha=0.01 * 60, fit_intercept=False)
    features = model._features(inputs.astype(np.float32)).astype(np.float64)
    peer.fit(features, targets - targets.mean(0))
    np.testing.assert_allclose(
        model.scores(inputs), peer.predict(features) + targets.mean(0), atol=1e-6
    )


def test_learns_digits() -> None:
    pixels, labels = load_digits(return_X_y=True)
    model = RandomFeatureClassifier().fit(pixels[:1000], labels[:1000], 10)
    assert model.accuracy(pixels[1000:], labels[1000:]) > 93.0


def test_nothing_to_learn() -> None:
    with pytest.raises(InputError, match="cannot be learned"):
        RandomFeatureClassifier().fit(np.zeros((0, 3)), np.zeros(0, dtype=int), 2)


def test_the_penalty_is_chosen_by_cross_validation() -> None:
    """Generalized cross-validation, written out with the hat matrix."""
    random = np.random.default_rng(1)
    inputs = random.normal(size=(80, 3))
    labels = (inputs[:, 0] + 0.5 * random.normal(size=80) > 0).astype(int)
    model = RandomFeatureClassifier(count=60).fit(inputs, labels, 2)
    features = model._features(inputs.astype(np.float32)).astype(np.float64)
    targets = np.eye(2)[labels] - np.eye(2)[labels].mean(0)

    def error(ridge: float) -> float:
        hat = features @ np.linalg.solve(
            features.T @ features + ridge * 80 * np.eye(60), features.T
        )
        return float(np.square(targets - hat @ targets).sum() / (80 - np.trace(hat)) ** 2)

    assert model.chosen_ridge == min(RIDGES, key=error)
    assert RIDGES[0] < model.chosen_ridge
