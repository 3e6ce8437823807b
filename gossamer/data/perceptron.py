"""The perceptron theory of data pruning: error against how much is kept, and of which end.

A teacher ``T`` labels Gaussian inputs, ``y = sign(T . x)``. Of ``alpha_total * N`` examples the
fraction ``f`` with the smallest (hard) or largest (easy) margins ``|J . x|`` with respect to a
probe ``J`` is kept, and the student is the maximum-margin perceptron on what is kept. Its error is
``arccos(R) / pi`` with ``R`` the cosine of student and teacher.

Sorscher, Geirhos et al., "Beyond neural scaling laws: beating power law scaling via data pruning",
2022, section 2 and appendix A. The closed equations here are those for a perfect probe that keeps
the hard end; for the other cases there is the simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import nnls, root
from scipy.special import ndtr, ndtri

from gossamer.core.errors import InputError

FARTHEST = 12.0
"""Standard deviations beyond which a Gaussian measure is nothing in double precision."""
NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


@dataclass(frozen=True)
class Theory:
    """The solution of the equations of state.

    Attributes:
        overlap: ``R``, cosine of student and teacher.
        margin: ``kappa``, of the student with unit norm.
        error: share of inputs the student labels otherwise than the teacher.
        residual: the largest of the two equations' residuals.
    """

    overlap: float
    margin: float
    error: float
    residual: float


def perceptron_theory(alpha: float, fraction: float) -> Theory:
    """Solves for the student that keeps the hard end by a perfect probe.

    Args:
        alpha: examples kept per dimension, ``fraction * alpha_total``.
        fraction: of the examples that is kept; 1 is no pruning.

    Raises:
        InputError: if they are not positive, or no solution is found.
    """
    if not alpha > 0.0 or not 0.0 < fraction <= 1.0:
        raise InputError(
            f"examples per dimension are positive and the fraction lies in (0, 1], not {alpha:g} "
            f"and {fraction:g}"
        )

    def equations(unknown: np.ndarray) -> np.ndarray:
        # R = tanh(a) keeps the overlap inside of (-1, 1) for the solver.
        return _state(math.tanh(unknown[0]), float(unknown[1]), alpha, fraction)

    best = None
    for overlap in (0.5, 0.9, 0.99):
        for margin in (0.5, 0.1, 1.0):
            # On its way the solver may step where the exponential overflows; it steps back.
            with np.errstate(over="ignore", invalid="ignore"):
                found = root(equations, [math.atanh(overlap), margin], tol=1e-14)
            residual = float(np.abs(found.fun).max())
            if math.tanh(found.x[0]) > 0 and (best is None or residual < best[0]):
                best = residual, math.tanh(found.x[0]), float(found.x[1])
        if best is not None and best[0] < 1e-11:
            break
    if best is None or best[0] > 1e-8:
        raise InputError(f"no solution was found for alpha {alpha:g} and fraction {fraction:g}")
    residual, overlap, margin = best
    return Theory(overlap, margin, math.acos(overlap) / math.pi, residual)


def _state(overlap: float, margin: float, alpha: float, fraction: float) -> np.ndarray:
    """Left minus right side of the two equations (appendix A)."""
    low = -FARTHEST
    t = 0.5 * (margin - low) * (NODES + 1.0) + low
    measure = 0.5 * (margin - low) * WEIGHTS * np.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)
    rest = math.sqrt(1.0 - overlap * overlap)
    along = overlap * t / rest
    kept, share = np.ones_like(t), ndtr(along)  # H(-x) is the normal distribution function
    if fraction < 1.0:
        threshold = -ndtri((1.0 - fraction) / 2.0)
        kept = -np.expm1(-threshold * (threshold - 2.0 * overlap * t) / (2.0 * rest * rest))
        share = share - ndtr(along - threshold / rest)
    gap = margin - t
    first = (measure * np.exp(-0.5 * along * along) * kept * gap).sum()
    second = (measure * share * gap * gap).sum()
    return np.array(
        [
            overlap - 2.0 * alpha / (fraction * math.sqrt(2.0 * math.pi) * rest) * first,
            rest * rest - 2.0 * alpha / fraction * second,
        ]
    )


def simulated_error(
    alpha: float,
    fraction: float,
    *,
    order: Literal["hard", "easy", "random"] = "hard",
    dimension: int = 200,
    probe_angle: float = 0.0,
    seed: int = 0,
) -> float:
    """Error of one student on one draw.

    Args:
        alpha: examples kept per dimension.
        fraction: of the examples that is kept.
        order: which end.
        dimension: ``N``.
        probe_angle: between probe and teacher, radians.
        seed: of the draw.
    """
    random = np.random.default_rng(seed)
    teacher, across = np.linalg.qr(random.standard_normal((dimension, 2)))[0].T
    probe = math.cos(probe_angle) * teacher + math.sin(probe_angle) * across
    total = round(alpha / fraction * dimension)
    inputs = random.standard_normal((total, dimension))
    labels = np.sign(inputs @ teacher)
    kept = round(alpha * dimension)
    margins = np.abs(inputs @ probe)
    match order:
        case "hard":
            rows = np.argsort(margins, kind="stable")[:kept]
        case "easy":
            rows = np.argsort(-margins, kind="stable")[:kept]
        case "random":
            rows = random.permutation(total)[:kept]
    student = maximum_margin(inputs[rows] * labels[rows, None])
    return math.acos(float(np.clip(student @ teacher, -1.0, 1.0))) / math.pi


def maximum_margin(oriented: np.ndarray) -> np.ndarray:
    """The unit vector with the largest smallest product with all rows.

    The shortest ``w`` with ``Z w >= 1`` is a least-distance problem, which non-negative least
    squares solves exactly (Lawson & Hanson, "Solving Least Squares Problems", 1974, chapter 23):
    no step size and no penalty move the crossing of the curves.

    Args:
        oriented: inputs times their labels, ``[examples, dimensions]``.

    Raises:
        InputError: if no plane through the origin separates the examples.
    """
    count, dimension = oriented.shape
    stacked = np.vstack([oriented.T, np.ones((1, count))])
    target = np.zeros(dimension + 1)
    target[-1] = 1.0
    weights, distance = nnls(stacked, target, maxiter=50 * count)
    residual = stacked @ weights - target
    if distance < 1e-9:
        raise InputError("the examples cannot be separated by a plane through the origin")
    direction = -residual[:-1] / residual[-1]
    return direction / np.linalg.norm(direction)
