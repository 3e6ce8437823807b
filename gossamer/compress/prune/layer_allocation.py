"""How many weights each layer keeps when single weights go.

An allocation is a function ``(weights, scores, keep) -> weights kept in each layer``; the weights
of highest score stay in each. Totals are exact: shares are rounded by largest remainders.

Sources: ERK, Evci et al., "Rigging the Lottery", ICML 2020, section 3; LAMP, Lee et al.,
"Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021; uniform+, Gale, Elsen and
Hooker, "The State of Sparsity in Deep Neural Networks", 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from gossamer.compress.prune.allocation import lamp as lamp_scores
from gossamer.compress.prune.weight_scores import largest
from gossamer.core.errors import InputError
from gossamer.core.task import seed_of

Allocation = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], int], dict[str, int]]
"""Weights, scores (of weights alive; minus infinity elsewhere) and how many stay in all."""


def uniform(
    weights: Mapping[str, Tensor], scores: Mapping[str, Tensor], keep: int
) -> dict[str, int]:
    """The same share in every layer."""
    return filled(weights, {name: 1.0 for name in weights}, keep)


def uniform_plus(
    weights: Mapping[str, Tensor], scores: Mapping[str, Tensor], keep: int
) -> dict[str, int]:
    """The first layer dense, the last keeps a fifth or more, the others alike.

    Both ends together take half of what stays at most: at extreme sparsity the first layer gives
    way first, so that the layers between are not emptied for it.
    """
    names = list(weights)
    total = sum(w.numel() for w in weights.values())
    fixed: dict[str, int] = {}
    if len(names) > 2:
        first, last = weights[names[0]].numel(), weights[names[-1]].numel()
        # What does not fit between the ends has to stay in them.
        ends = max(keep // 2, keep - (total - first - last))
        fixed[names[-1]] = min(round(max(0.2, keep / total) * last), ends)
        fixed[names[0]] = min(first, ends - fixed[names[-1]])
    rest = {name: w for name, w in weights.items() if name not in fixed}
    found = filled(rest, {name: 1.0 for name in rest}, keep - sum(fixed.values()))
    return {name: fixed[name] if name in fixed else found[name] for name in names}


def global_(
    weights: Mapping[str, Tensor], scores: Mapping[str, Tensor], keep: int
) -> dict[str, int]:
    """One threshold on the scores of all layers."""
    return _counted(scores, keep)


def lamp(weights: Mapping[str, Tensor], scores: Mapping[str, Tensor], keep: int) -> dict[str, int]:
    """One threshold on LAMP scores: s^2 over the sum of all of the layer that are not smaller."""
    flat = [torch.where(s.isfinite(), s, 0.0).flatten().cpu() for s in scores.values()]
    ranked = {
        name: torch.where(scores[name].flatten().cpu().isfinite(), priority, -torch.inf)
        for name, priority in zip(scores, lamp_scores(flat), strict=True)
    }
    return _counted(ranked, keep)


def erk(weights: Mapping[str, Tensor], scores: Mapping[str, Tensor], keep: int) -> dict[str, int]:
    """Densities in proportion to (sum of the axes) / (product of the axes) of each kernel.

    Layers that would be more than dense stay dense, and the others share what is left.
    """
    raw = {name: sum(w.shape) / w.numel() for name, w in weights.items()}
    return filled(weights, raw, keep)


def random(seed: int) -> Allocation:
    """Random densities: the control that every allocation has to beat."""

    def allocate(
        weights: Mapping[str, Tensor], scores: Mapping[str, Tensor], keep: int
    ) -> dict[str, int]:
        rng = np.random.default_rng(seed_of("allocation", seed))
        return filled(weights, {name: float(rng.uniform(0.05, 1.0)) for name in weights}, keep)

    return allocate


ALLOCATIONS: dict[str, Allocation] = {
    "global": global_,
    "uniform": uniform,
    "uniform+": uniform_plus,
    "erk": erk,
    "lamp": lamp,
}
"""Allocations by the names that recipes use."""


def filled(weights: Mapping[str, Tensor], shares: Mapping[str, float], keep: int) -> dict[str, int]:
    """Counts whose densities are in proportion to ``shares``, none above 1, ``keep`` in all.

    Raises:
        InputError: if there are not so many weights.
    """
    sizes = np.array([w.numel() for w in weights.values()], dtype=np.float64)
    share = np.array([shares[name] for name in weights])
    if not 0 <= keep <= sizes.sum():
        raise InputError(f"{keep} weights cannot stay where there are {int(sizes.sum())}")
    dense = np.zeros(len(sizes), dtype=bool)
    exact = np.zeros(len(sizes))
    while True:
        rest = keep - sizes[dense].sum()
        open_ = share * sizes * ~dense
        scale = rest / open_.sum() if open_.sum() else 0.0
        exact = np.where(dense, sizes, scale * open_)
        over = (exact > sizes * (1 + 1e-12)) & ~dense
        if not over.any():
            break
        dense |= over
    counts = np.minimum(np.floor(exact + 1e-9), sizes)
    short = int(keep - counts.sum())
    # What rounding lost goes to the largest remainders.
    order = np.argsort(-(exact - counts), kind="stable")
    order = [i for i in order if counts[i] < sizes[i]]
    for i in order[:short]:
        counts[i] += 1
    return {name: int(count) for name, count in zip(weights, counts, strict=True)}


def _counted(scores: Mapping[str, Tensor], keep: int) -> dict[str, int]:
    flat = torch.cat([s.flatten().double().cpu() for s in scores.values()])
    if not 0 <= keep <= len(flat):
        raise InputError(f"{keep} weights cannot stay where there are {len(flat)}")
    pieces = largest(flat, keep).split([s.numel() for s in scores.values()])
    return {name: int(piece.sum()) for name, piece in zip(scores, pieces, strict=True)}
