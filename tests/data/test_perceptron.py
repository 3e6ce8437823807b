"""The theory of data pruning against worked values and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.svm import SVC

from gossamer.core.errors import InputError
from gossamer.data.perceptron import maximum_margin, perceptron_theory, simulated_error

WORKED = [
    (1, 1, 0.67136, 0.78655, 0.26571),
    (2, 1, 0.82976, 0.45458, 0.18848),
    (5, 1, 0.95687, 0.19671, 0.09383),
    (1, 0.5, 0.53304, 0.56500, 0.32105),
    (2, 0.5, 0.90998, 0.25015, 0.13610),
    (5, 0.5, 0.98808, 0.09989, 0.04919),
    (2, 0.2, 0.95381, 0.11012, 0.09712),
    (0.5, 0.5, 0.29183, 1.0828, 0.40573),
    (0.5, 1, 0.51215, 1.2564, 0.32885),
]


@pytest.mark.parametrize(("alpha", "fraction", "overlap", "margin", "error"), WORKED)
def test_worked_values(
    alpha: float, fraction: float, overlap: float, margin: float, error: float
) -> None:
    found = perceptron_theory(alpha, fraction)
    assert found.overlap == pytest.approx(overlap, abs=1.1e-5)
    assert found.margin == pytest.approx(margin, rel=6e-5)
    assert found.error == pytest.approx(error, abs=1.1e-5)
    assert found.residual < 1e-10


def test_nearly_everything_kept_is_everything_kept() -> None:
    assert perceptron_theory(2.0, 1 - 1e-9).error == pytest.approx(
        perceptron_theory(2.0, 1.0).error, abs=1e-6
    )


def test_more_examples_are_better() -> None:
    errors = [perceptron_theory(alpha, 1.0).error for alpha in np.geomspace(0.2, 20, 15)]
    assert all(np.diff(errors) < 0)


def test_theory_is_the_simulation() -> None:
    for alpha, fraction in ((1.0, 1.0), (2.0, 0.5)):
        drawn = [simulated_error(alpha, fraction, seed=seed) for seed in range(8)]
        spread = np.std(drawn, ddof=1) / math.sqrt(8)
        # Of order 1/N off at N = 200, and the spread of the mean.
        assert abs(np.mean(drawn) - perceptron_theory(alpha, fraction).error) < 3 * spread + 0.01


def test_a_bad_probe_is_worse() -> None:
    """Ranking by a probe at a right angle to the teacher is random selection."""
    turned = [simulated_error(2, 0.5, probe_angle=math.pi / 2, seed=s) for s in range(5)]
    good = [simulated_error(2, 0.5, seed=s) for s in range(5)]
    chance = [simulated_error(2, 0.5, order="random", seed=s) for s in range(5)]
    assert np.mean(good) < np.mean(chance) - 0.03
    assert abs(np.mean(turned) - np.mean(chance)) < 0.02


def test_the_largest_margin() -> None:
    random = np.random.default_rng(0)
    inputs = random.standard_normal((60, 8))
    labels = np.sign(inputs @ random.standard_normal(8))
    found = maximum_margin(inputs * labels[:, None])
    # Mirrored, the examples have their plane through the origin in a machine with an offset, too.
    both, signs = np.vstack([inputs, -inputs]), np.concatenate([labels, -labels])
    machine = SVC(kernel="linear", C=1e9, tol=1e-8).fit(both, signs)
    expected = machine.coef_[0] / np.linalg.norm(machine.coef_)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(InputError, match="cannot be separated"):
        maximum_margin(np.array([[1.0, 0], [-1, 0]]))


def test_out_of_range() -> None:
    with pytest.raises(InputError, match=r"not 0 and 0\.5"):
        perceptron_theory(0.0, 0.5)
    with pytest.raises(InputError, match="not 1 and 0"):
        perceptron_theory(1.0, 0.0)
