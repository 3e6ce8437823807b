"""How far apart two sets of samples are, and whether one covers the other."""

from __future__ import annotations

import numpy as np

from gossamer.core.errors import InputError
from gossamer.parts.neighbours import nearest


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The Fréchet distance of the Gaussians with the moments of two sets of embeddings.

    On Inception features this is FID (Heusel et al., "GANs Trained by a Two Time-Scale Update
    Rule", NeurIPS 2017); on others only numbers of one embedding compare.

    Args:
        one: ``[m, d]``.
        other: ``[n, d]``.
    """
    if len(one) < 2 or len(other) < 2 or one.shape[1] != other.shape[1]:
        raise InputError(f"{list(one.shape)} and {list(other.shape)} have no moments to compare")
    first, second = (np.asarray(x, dtype=np.float64) for x in (one, other))
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    # The trace of sqrt(ab) is that of the symmetric sqrt(sqrt(a) b sqrt(a)), which is stable.
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(min=0.0)).sum()
    moved = np.square(first.mean(0) - second.mean(0)).sum()
    return float(max(0.0, moved + np.trace(a) + np.trace(b) - 2.0 * cross))


def sliced_wasserstein(
    one: np.ndarray, other: np.ndarray, *, directions: int = 100, seed: int = 0
) -> float:
    """The mean Wasserstein-1 distance of random one-dimensional projections.

    Args:
        one: ``[m, d]``.
        other: ``[n, d]``.
        directions: projections.
        seed: of the directions.
    """
    lines = np.random.default_rng(seed).normal(size=(one.shape[1], directions))
    lines /= np.linalg.norm(lines, axis=0)
    # Quantile functions at the middles of fine steps.
    steps = 2 * max(len(one), len(other))
    at = (np.arange(steps) + 0.5) / steps
    first, second = (np.sort(np.asarray(x, dtype=np.float64) @ lines, axis=0) for x in (one, other))
    rows = [(at * len(x)).astype(np.int64) for x in (first, second)]
    return float(np.abs(first[rows[0]] - second[rows[1]]).mean())


def precision_recall(
    real: np.ndarray, synthetic: np.ndarray, *, neighbours: int = 3
) -> tuple[float, float]:
    """Share of synthetic samples within the real manifold, and the reverse.

    A manifold is the union of balls that reach to each sample's k-th neighbour (Kynkäänniemi et
    al., "Improved Precision and Recall Metric", NeurIPS 2019).

    Args:
        real: embeddings ``[m, d]``.
        synthetic: embeddings ``[n, d]``.
        neighbours: k.
    """
    return _covered(synthetic, real, neighbours), _covered(real, synthetic, neighbours)


def _covered(samples: np.ndarray, manifold: np.ndarray, neighbours: int) -> float:
    radii = nearest(manifold, manifold, k=neighbours, exclude_self=True)[0][:, -1]
    inside = np.zeros(len(samples), dtype=bool)
    for start in range(0, len(samples), 512):
        part = np.asarray(samples[start : start + 512], dtype=np.float64)
        far = np.square(part).sum(1)[:, None] + np.square(manifold, dtype=np.float64).sum(1)
        far -= 2.0 * part @ np.asarray(manifold, dtype=np.float64).T
        inside[start : start + 512] = (far <= np.square(radii, dtype=np.float64)).any(1)
    return float(inside.mean())
