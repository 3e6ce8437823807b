"""Noise that hides one person: reproducible for research, secret for release, and discrete.

A seeded generator can be run again, so its noise can be subtracted: whoever knows the seed sees the
private counts. For release, bits come from the operating system's cryptographic source. Floating
point leaves traces of the number that noise was added to (Mironov 2012), so whole counts can be
given discrete Gaussian noise (Canonne, Kamath & Steinke, "The discrete Gaussian for differential
privacy", 2020).
"""

from __future__ import annotations

import os
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Protocol

import numpy as np
from scipy.special import ndtri

from gossamer.data.privacy_budget import Accounting


class Noise(Protocol):
    """Independent noise for every entry of a vector of whole counts."""

    accounting: Accounting

    def draw(self, count: int, sigma: float) -> np.ndarray:
        """``[count]`` float64 of standard deviation ``sigma``."""
        ...


class SeededGaussian:
    """Gaussian noise that can be drawn again: for research only.

    Args:
        seed: of NumPy's generator.
    """

    accounting: Accounting = "gaussian"

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def draw(self, count: int, sigma: float) -> np.ndarray:
        """``[count]`` float64 of standard deviation ``sigma``."""
        return self.random.normal(0.0, 1.0, count) * sigma


class SecretGaussian:
    """Gaussian noise from the operating system's cryptographic source, by the inverse normal."""

    accounting: Accounting = "gaussian"

    def draw(self, count: int, sigma: float) -> np.ndarray:
        """``[count]`` float64 of standard deviation ``sigma``."""
        bits = _secret(count)
        # The upper bits are a uniform number below one half, the last one the sign: tails reach as
        # far on both sides as 2^-54.
        half = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-54
        sign = np.where(bits & np.uint64(1), 1.0, -1.0)
        return ndtri(half) * sign * sigma


class SecretDiscreteGaussian:
    """Whole numbers with probability proportional to ``exp(-x^2 / (2 sigma^2))``, from secret bits.

    Tables of 64 bits are looked up, so a draw's distribution is within ``25 sigma 2^-64`` of the
    exact one: over a million draws less than 1e-10 of delta at any noise that is of use.
    """

    accounting: Accounting = "zcdp"

    def draw(self, count: int, sigma: float) -> np.ndarray:
        """``[count]`` float64, all whole, of standard deviation very near ``sigma``."""
        if sigma == 0.0:
            return np.zeros(count)
        table = _cumulative(sigma)
        reach = len(table) // 2
        return (np.searchsorted(table, _secret(count), side="right") - reach).astype(np.float64)


def _secret(count: int) -> np.ndarray:
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


@lru_cache(maxsize=8)
def _cumulative(sigma: float) -> np.ndarray:
    """Thresholds in units of 2^-64 of the whole numbers within 12 sigma, less the last."""
    reach = max(12, int(12.0 * sigma) + 1)
    with localcontext() as context:
        context.prec = 40
        scale = 2 * Decimal(sigma) ** 2
        masses = [(-(Decimal(x) ** 2) / scale).exp() for x in range(-reach, reach + 1)]
        total = sum(masses)
        running, edges = Decimal(0), []
        for mass in masses[:-1]:
            running += mass
            edges.append(min(int(running / total * 2**64), 2**64 - 1))
    return np.array(edges, dtype=np.uint64)
