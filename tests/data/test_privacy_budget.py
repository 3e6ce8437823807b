"""What noise costs: published numbers, an independent accountant, and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.errors import BudgetError
from gossamer.data.privacy_budget import (
    accountant_epsilon,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_sigma,
    zcdp_epsilon,
    zcdp_sigma,
)
from gossamer.data.privacy_noise import SecretDiscreteGaussian, SecretGaussian, _cumulative


@pytest.mark.parametrize(
    ("sigma", "steps", "delta", "epsilon"),
    [
        (5 * math.sqrt(2), 1, 1e-5, 0.4970),
        (5 * math.sqrt(2), 5, 1e-5, 1.1994),
        (5 * math.sqrt(2), 20, 1e-5, 2.5944),
        (10 * math.sqrt(2), 7, 1e-5, 0.6745),
        (2 * math.sqrt(2), 5, 1e-5, 3.3414),
        (1.0, 1, 1e-5, 4.3772),
        (2.0, 17, 1e-5, 10.378),
        (2.1793, 19, 3e-6, 10.53),
    ],
)
def test_known_epsilon(sigma: float, steps: int, delta: float, epsilon: float) -> None:
    digits = 5e-5 if epsilon < 10 else 5e-3
    assert gaussian_epsilon(sigma, steps, delta) == pytest.approx(epsilon, abs=digits)


@pytest.mark.parametrize(("steps", "sigma"), [(1, 3.7306), (5, 8.3419), (10, 11.7973)])
def test_known_sigma(steps: int, sigma: float) -> None:
    assert gaussian_sigma(1.0, steps, 1e-5) == pytest.approx(sigma, abs=5e-5)
    ratio = gaussian_sigma(1.0, steps, 1e-5) / gaussian_sigma(1.0, 1, 1e-5)
    assert ratio == pytest.approx(math.sqrt(steps), rel=1e-14)


@given(st.floats(0.01, 200.0), st.integers(1, 100), st.floats(1e-12, 0.2))
def test_sigma_and_epsilon_are_inverse(epsilon: float, steps: int, delta: float) -> None:
    sigma = gaussian_sigma(epsilon, steps, delta)
    assert gaussian_delta(epsilon, math.sqrt(steps) / sigma) == pytest.approx(delta, rel=1e-6)
    assert gaussian_epsilon(sigma, steps, delta) == pytest.approx(epsilon, rel=1e-6)


def test_delta_is_the_integral_of_the_privacy_loss() -> None:
    """delta = E[(1 - exp(epsilon - loss))+] with loss ~ N(mu^2/2, mu^2), integrated plainly."""
    z = np.linspace(-12, 12, 400_001)
    weight = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    for epsilon, mu in [(0.0, 0.3), (1.0, 0.5), (2.0, 1.5), (8.0, 2.0)]:
        loss = mu**2 / 2 + mu * z
        wanted = float((weight * np.maximum(0.0, 1.0 - np.exp(epsilon - loss))).sum())
        assert gaussian_delta(epsilon, mu) == pytest.approx(wanted, rel=1e-5)


def test_the_ends_of_the_range() -> None:
    assert gaussian_epsilon(500.0, 1, 1e-3) == 0.0  # more private than asked
    assert gaussian_sigma(1.0, 1, 1e-3) < 500.0
    assert gaussian_epsilon(0.0, 1, 1e-5) == math.inf
    assert gaussian_sigma(math.inf, 3, 1e-5) == 0.0
    assert gaussian_delta(800.0, 1.0) >= 0.0  # exp(800) alone would overflow
    assert math.isfinite(gaussian_epsilon(0.01, 100, 1e-5))
    for epsilon, delta in [(0.0, 1e-5), (-1.0, 1e-5), (1.0, 0.0), (1.0, 1.0), (1.0, math.nan)]:
        with pytest.raises(BudgetError):
            gaussian_sigma(epsilon, 1, delta)


@pytest.mark.parametrize(("sigma", "steps"), [(5 * math.sqrt(2), 20), (2.0, 3), (1.0, 1)])
def test_agrees_with_dp_accounting(sigma: float, steps: int) -> None:
    accounting = pytest.importorskip("dp_accounting", reason="no peer: dp-accounting")
    ours = gaussian_epsilon(sigma, steps, 1e-5)
    exact = accounting.get_epsilon_gaussian(sigma / math.sqrt(steps), 1e-5)
    assert ours == pytest.approx(exact, rel=1e-9)
    # The accountant of discretised privacy losses is an upper bound, and a near one.
    assert ours <= accountant_epsilon(sigma, steps, 1e-5) <= 1.01 * ours + 1e-3
    from dp_accounting.rdp import RdpAccountant

    orders = np.concatenate([np.linspace(1.01, 20, 2000), np.arange(20, 400)])
    rdp = RdpAccountant(orders).compose(accounting.GaussianDpEvent(sigma), steps)
    assert zcdp_epsilon(steps / (2 * sigma**2), 1e-5) == pytest.approx(
        rdp.get_epsilon(1e-5), rel=1e-3
    )


def test_zcdp_bounds_the_exact_epsilon() -> None:
    for sigma in (0.5, 2.0, 10.0):
        exact = gaussian_epsilon(sigma, 1, 1e-5)
        assert exact < zcdp_epsilon(1 / (2 * sigma**2), 1e-5) < 1.3 * exact
    assert zcdp_epsilon(4 / (2 * zcdp_sigma(1.0, 4, 1e-5) ** 2), 1e-5) == pytest.approx(1.0)


def test_discrete_gaussian_has_its_probabilities() -> None:
    """Against the exact probabilities; and a discrete one is as private as its account says."""
    sigma = 1.7
    edges = np.concatenate([[0.0], _cumulative(sigma).astype(np.float64) / 2.0**64, [1.0]])
    reach = len(edges) // 2 - 1
    x = np.arange(-reach, reach + 1)
    mass = np.exp(-(x**2) / (2 * sigma**2))
    mass /= mass.sum()
    assert np.allclose(np.diff(edges), mass, atol=1e-15)
    drawn = SecretDiscreteGaussian().draw(100_000, sigma)
    counts = np.array([(drawn == k).mean() for k in range(-4, 5)])
    assert np.abs(counts - mass[reach - 4 : reach + 5]).max() < 0.01
    # The exact delta of one whole vote more, summed over all outcomes.
    epsilon = zcdp_epsilon(1 / (2 * sigma**2), 1e-5)
    shifted = np.roll(mass, 1)
    assert np.maximum(0.0, mass - math.exp(epsilon) * shifted)[1:].sum() < 1e-5


def test_secret_gaussian_is_normal_and_never_repeats() -> None:
    from scipy.stats import kstest

    drawn = SecretGaussian().draw(50_000, 3.0)
    assert kstest(drawn / 3.0, "norm").pvalue > 1e-6
    assert not np.array_equal(drawn, SecretGaussian().draw(50_000, 3.0))
