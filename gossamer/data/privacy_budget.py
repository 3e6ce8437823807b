"""What noisy answers about private data cost in (epsilon, delta), and a ledger that enforces it.

A release is a vector that one person changes by an L2 norm of at most 1, plus noise of standard
deviation sigma in every entry. Neighbouring sets differ by adding or removing one sample. Adaptive
Gaussian releases together equal one with ``mu^2 = sum of 1 / sigma^2`` (Dong, Roth & Su 2022), and
the exact conversion is that of Balle & Wang, "Improving the Gaussian mechanism for differential
privacy", ICML 2018. Discrete Gaussian releases are bounded through zero-concentrated privacy
(Canonne, Kamath & Steinke 2020, Proposition 12), which asks for a little more noise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_ndtr

from gossamer.core.errors import BudgetError, InputError, MissingExtra
from gossamer.core.files import exclusive, load_state, save_state

Accounting = Literal["gaussian", "zcdp"]

LARGEST_EPSILON = 1e7
ROUNDING = 1.0 + 1e-9
"""Noise is multiplied by this, so that rounding never exceeds a budget."""


def check_budget(epsilon: float, delta: float) -> None:
    """Refuses budgets that mean nothing.

    Raises:
        BudgetError: unless epsilon is above 0 and delta strictly between 0 and 1.
    """
    if math.isnan(epsilon) or epsilon <= 0.0:
        raise BudgetError(
            f"epsilon must be above 0, not {epsilon:g}; with 0 nothing of the private data may be "
            "used, so draw from the generator alone"
        )
    _check_delta(delta)


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise BudgetError(
            f"delta must lie strictly between 0 and 1, not {delta:g}; usual is 1e-5, or less than "
            "one over the number of private samples"
        )


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The exact delta at ``epsilon`` of Gaussian releases with ``mu = sqrt(T) / sigma``.

    ``Phi(-epsilon/mu + mu/2) - exp(epsilon) Phi(-epsilon/mu - mu/2)`` (Balle & Wang, Theorem 8).
    """
    if mu == 0.0:
        return 0.0
    first = float(log_ndtr(-epsilon / mu + mu / 2.0))
    second = epsilon + float(log_ndtr(-epsilon / mu - mu / 2.0))
    # exp(epsilon) alone would overflow; the second term is never above the first.
    return math.exp(first) * -math.expm1(min(second - first, 0.0))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    if gaussian_delta(LARGEST_EPSILON, mu) > delta:
        return math.inf

    def excess(epsilon: float) -> float:
        return gaussian_delta(epsilon, mu) - delta

    high = 1.0
    while excess(high) > 0.0:
        high *= 2.0
    return float(brentq(excess, 0.0, high, xtol=1e-13, rtol=1e-13))  # type: ignore[arg-type]


def gaussian_epsilon(sigma: float, steps: int, delta: float) -> float:
    """The exact epsilon of ``steps`` Gaussian releases of L2 sensitivity 1.

    Args:
        sigma: standard deviation of the noise; 0 has infinite epsilon.
        steps: adaptive releases.
        delta: the probability that is allowed to fail.

    Raises:
        BudgetError: for a delta outside of (0, 1).
        InputError: for negative noise, or fewer than one step.
    """
    _check_delta(delta)
    if sigma < 0.0 or math.isnan(sigma) or steps < 1:
        raise InputError(f"noise {sigma:g} in {steps} steps is no mechanism")
    return math.inf if sigma == 0.0 else _gaussian_epsilon(math.sqrt(steps) / sigma, delta)


def gaussian_sigma(epsilon: float, steps: int, delta: float) -> float:
    """The least noise with which ``steps`` Gaussian releases are (epsilon, delta) private.

    It is solved for ``mu``, so it is proportional to ``sqrt(steps)`` exactly, and there is no
    range of sigma to fall out of.

    Args:
        epsilon: above 0; infinity needs no noise.
        steps: adaptive releases.
        delta: strictly between 0 and 1.

    Raises:
        BudgetError: for an impossible budget.
    """
    check_budget(epsilon, delta)
    _check_steps(steps)
    if math.isinf(epsilon):
        return 0.0
    return math.sqrt(steps) / _largest(lambda mu: gaussian_delta(epsilon, mu) - delta, epsilon)


def zcdp_epsilon(rho: float, delta: float) -> float:
    """An upper bound of epsilon of a rho-zCDP mechanism (Canonne, Kamath & Steinke, Prop. 12).

    Args:
        rho: ``sum of 1 / (2 sigma^2)``.
        delta: strictly between 0 and 1.
    """
    _check_delta(delta)
    if rho == 0.0:
        return 0.0

    def bound(log_order: float) -> float:
        above = math.exp(log_order)  # the order of the Renyi divergence, less 1
        order = above + 1.0
        return order * rho + (-math.log(delta) - math.log(order)) / above + math.log(above / order)

    # Any order gives a valid bound, so an inexact minimum is safe.
    found: Any = minimize_scalar(bound, bounds=(-12.0, 12.0), method="bounded")
    return max(0.0, float(found.fun))


def zcdp_sigma(epsilon: float, steps: int, delta: float) -> float:
    """Like :func:`gaussian_sigma`, for discrete Gaussian noise.

    Raises:
        BudgetError: for an impossible budget.
    """
    check_budget(epsilon, delta)
    _check_steps(steps)
    if math.isinf(epsilon):
        return 0.0
    mu = _largest(lambda mu: zcdp_epsilon(mu * mu / 2.0, delta) - epsilon, epsilon)
    return math.sqrt(steps) / mu


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise InputError(f"there is at least 1 iteration, not {steps}")


def _largest(excess: Callable[[float], float], epsilon: float) -> float:
    """The ``mu`` at which an increasing ``excess`` crosses zero."""
    low, high = 1.0, 1.0
    while excess(low) > 0.0:
        low /= 2.0
        if low < 1e-12:
            raise BudgetError(
                f"epsilon {epsilon:g} at this delta needs noise beyond 1e12, in which every vote "
                "drowns; allow more"
            )
    while excess(high) < 0.0:
        high *= 2.0
        if high > 1e9:
            raise BudgetError(
                f"epsilon {epsilon:g} is so large that it protects nothing; take infinity to say so"
            )
    return float(brentq(excess, low, high, xtol=1e-15, rtol=1e-13))  # type: ignore[arg-type]


def accountant_epsilon(sigma: float, steps: int, delta: float) -> float:
    """A second opinion on :func:`gaussian_epsilon`, by Google's dp-accounting (PLD accountant).

    Raises:
        MissingExtra: if dp-accounting is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError as error:
        raise MissingExtra("dp-accounting", "privacy") from error
    accountant = PLDAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    accountant.compose(dp_accounting.GaussianDpEvent(sigma), steps)
    return float(accountant.get_epsilon(delta))


@dataclass(frozen=True)
class Release:
    """One noisy answer that was paid for.

    Attributes:
        key: what was asked: the same key is answered from here, never drawn again.
        sigma: the noise, for a sensitivity of 1.
        accounting: how it is accounted.
        values: the noisy answer ``[n]`` float64.
    """

    key: str
    sigma: float
    accounting: Accounting
    values: np.ndarray


@dataclass
class Ledger:
    """Every noisy answer ever given about one private data set, and the limit of their cost.

    The noisy answer *is* the entry: both become visible in one rename, before anybody uses the
    answer. A run that was killed before it has released nothing; one that was killed after finds
    the same answer again. So noise is never drawn twice for one question, and nothing is free.
    Several runs on the same data share one ledger.

    Attributes:
        epsilon: limit; infinity protects nothing and needs no noise.
        delta: limit.
        releases: so far.
        file: where it is kept; None keeps it in memory, where it ends with the process.
    """

    epsilon: float
    delta: float
    releases: list[Release] = field(default_factory=list)
    file: Path | None = None

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.delta)

    def spent(self, *further: tuple[float, Accounting]) -> float:
        """Epsilon of all releases together (and of ``further`` ones), at the ledger's delta."""
        costs = [(entry.sigma, entry.accounting) for entry in self.releases] + list(further)
        if not costs:
            return 0.0
        if any(sigma == 0.0 for sigma, _ in costs):
            return math.inf
        mu_squared = math.fsum(1.0 / sigma**2 for sigma, _ in costs)
        # A Gaussian release is zCDP too, so a mixture is bounded by that.
        if any(accounting == "zcdp" for _, accounting in costs):
            return zcdp_epsilon(mu_squared / 2.0, self.delta)
        return _gaussian_epsilon(math.sqrt(mu_squared), self.delta)

    def require(self, sigma: float, accounting: Accounting, keys: int) -> None:
        """Refuses now what would be refused later.

        Raises:
            BudgetError: if ``keys`` more releases do not fit into the limit.
        """
        wanted: list[tuple[float, Accounting]] = [(sigma, accounting)] * keys
        planned = self.spent(*wanted)
        if planned > self.epsilon:
            raise BudgetError(
                f"the privacy budget does not allow it: {self.spent():.4g} of epsilon "
                f"{self.epsilon:g} is spent at delta {self.delta:g}, and {keys} more releases with "
                f"noise {sigma:.4g} make {planned:.4g}"
                + ("" if self.file is None else f" ({self.file})")
            )

    def release(
        self,
        key: str,
        sigma: float,
        accounting: Accounting,
        answer: Callable[[], np.ndarray],
    ) -> np.ndarray:
        """The noisy answer to ``key``: an old one if there is one, otherwise a new, paid one.

        Args:
            key: names the question; it must name everything that changes the answer's meaning.
            sigma: noise for a sensitivity of 1.
            accounting: how it is accounted.
            answer: looks at the private data and adds the noise; called once, and only if it fits.

        Raises:
            BudgetError: if it does not fit; the private data is not looked at then.
        """
        for entry in self.releases:
            if entry.key == key:
                return entry.values.copy()
        self.require(sigma, accounting, 1)
        values = np.asarray(answer(), dtype=np.float64)
        entry = Release(key, float(sigma), accounting, values)
        self._write([*self.releases, entry])
        self.releases.append(entry)
        return values.copy()

    def _write(self, releases: list[Release]) -> None:
        if self.file is None:
            return
        save_state(
            self.file,
            {
                "epsilon": self.epsilon,
                "delta": self.delta,
                "releases": [
                    {
                        "key": entry.key,
                        "sigma": entry.sigma,
                        "accounting": entry.accounting,
                        "values": torch.from_numpy(entry.values),
                    }
                    for entry in releases
                ],
            },
        )
        # After a power cut the rename must not be forgotten while what followed it is remembered.
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


LEDGER = "ledger.safetensors"


@contextmanager
def open_ledger(folder: Path | None, epsilon: float, delta: float) -> Iterator[Ledger]:
    """Opens the ledger in a folder, or begins one, and holds it for this process.

    Args:
        folder: where it is kept; None is a ledger in memory.
        epsilon: limit; that of an existing ledger must be the same.
        delta: limit, likewise.

    Raises:
        BudgetError: if the ledger was begun with another limit.
        InputError: if it is damaged, or held by another run.
    """
    if folder is None:
        yield Ledger(epsilon, delta)
        return
    check_budget(epsilon, delta)
    with exclusive(folder):
        file = folder / LEDGER
        ledger = Ledger(epsilon, delta, file=file)
        if file.exists():
            kept = _read(file)
            if (kept.epsilon, kept.delta) != (epsilon, delta):
                raise BudgetError(
                    f"{file} was begun with epsilon {kept.epsilon:g} and delta {kept.delta:g}; a "
                    "promise is not changed afterwards, so give the same"
                )
            ledger.releases = kept.releases
        else:
            ledger._write([])
        yield ledger


def _read(file: Path) -> Ledger:
    state = load_state(file)
    try:
        releases = [
            Release(
                str(entry["key"]),
                float(entry["sigma"]),
                _accounting(entry["accounting"]),
                entry["values"].numpy().astype(np.float64),
            )
            for entry in state["releases"]
        ]
        if any(not entry.sigma >= 0.0 for entry in releases):
            raise ValueError("negative noise")
        return Ledger(float(state["epsilon"]), float(state["delta"]), releases, file)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{file} is no privacy ledger; what was spent is not known, so nothing may be released"
        ) from error


def _accounting(name: str) -> Accounting:
    match name:
        case "gaussian" | "zcdp":
            return name
    raise ValueError(name)
