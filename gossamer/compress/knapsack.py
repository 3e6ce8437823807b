"""One choice for each of several things, so that all together fit into a budget.

Layers choose among sparsities, bit widths or ranks; each choice costs something (weights kept,
MACs, bytes) and loses something (distortion). :func:`knapsack` finds the choices that lose the
least, exactly, by dynamic programming over the budget; :func:`lagrangian` finds those on the convex
hull by bisection on one price for all, which is cheaper and never better.

Source: the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, "Knapsack Problems",
2004, chapter 11); as used for pruning by Xu et al., ICCV 2023, arXiv:2308.10438, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gossamer.core.errors import BudgetError, InputError

Numbers = npt.ArrayLike


def knapsack(
    losses: Sequence[Numbers],
    costs: Sequence[Numbers],
    budget: int,
    *,
    units: int | None = None,
) -> list[int]:
    """The choices of least total loss whose costs fit into the budget.

    Time and memory grow with the number of things times the budget (times the choices, for time).

    Args:
        losses: of each thing, one number a choice; any finite numbers.
        costs: of each thing, one whole number (0 or more) a choice.
        budget: what all chosen costs together may reach.
        units: solve in this many equal units of the budget, rounding costs up; what rounding left
            over is then spent on the best single exchanges. None: exactly.

    Returns:
        For each thing the index of its choice; the first of those that are equally good.

    Raises:
        InputError: if losses and costs do not fit together.
        BudgetError: if not even the cheapest choices fit.
    """
    loss, cost = _checked(losses, costs, budget)
    if units is None or budget <= units:
        return _exact(loss, cost, budget)
    unit = -(-budget // units)
    coarse = [-(-c // unit) for c in cost]
    if sum(int(c.min()) for c in coarse) > budget // unit:
        # Rounded up, not even the cheapest choices fit; they do as they are.
        chosen = [int(np.lexsort((v, c))[0]) for v, c in zip(loss, cost, strict=True)]
    else:
        chosen = _exact(loss, coarse, budget // unit)
    return _exchanged(loss, cost, budget, chosen)


def _exact(loss: list[np.ndarray], cost: list[np.ndarray], budget: int) -> list[int]:
    # best[r]: least loss of the things so far when they cost at most r.
    best = np.zeros(budget + 1)
    pointers: list[np.ndarray] = []
    for values, prices in zip(loss, cost, strict=True):
        new = np.full(budget + 1, np.inf)
        choice = np.zeros(budget + 1, dtype=np.uint16)
        for index, (value, price) in enumerate(zip(values, prices, strict=True)):
            if price > budget:
                continue
            candidate = best[: budget + 1 - price] + value
            better = candidate < new[price:]
            np.copyto(new[price:], candidate, where=better)
            np.copyto(choice[price:], np.uint16(index), where=better)
        best = new
        pointers.append(choice)
    chosen: list[int] = []
    room = budget
    for choice, prices in zip(reversed(pointers), reversed(cost), strict=True):
        index = int(choice[room])
        chosen.append(index)
        room -= int(prices[index])
    return chosen[::-1]


def _exchanged(
    loss: list[np.ndarray], cost: list[np.ndarray], budget: int, chosen: list[int]
) -> list[int]:
    """Spends what is left of the budget on single exchanges, the one that gains most first."""
    chosen = list(chosen)
    room = budget - sum(int(c[i]) for c, i in zip(cost, chosen, strict=True))
    while True:
        best = (0.0, -1, -1)
        for thing, (values, prices) in enumerate(zip(loss, cost, strict=True)):
            gain = np.where(
                prices - prices[chosen[thing]] <= room, values[chosen[thing]] - values, -np.inf
            )
            index = int(gain.argmax())
            if gain[index] > best[0]:
                best = (float(gain[index]), thing, index)
        _, thing, index = best
        if thing < 0:
            return chosen
        room -= int(cost[thing][index] - cost[thing][chosen[thing]])
        chosen[thing] = index


def lagrangian(losses: Sequence[Numbers], costs: Sequence[Numbers], budget: int) -> list[int]:
    """Choices that are best at one price of cost for all, the lowest price that fits the budget.

    Only choices on the convex hull of each thing's curve are ever taken, so up to one step of one
    thing's hull is left unspent; what remains is spent on the best single exchanges.

    Args:
        losses: as for :func:`knapsack`.
        costs: as for :func:`knapsack`.
        budget: as for :func:`knapsack`.

    Raises:
        InputError: if losses and costs do not fit together.
        BudgetError: if not even the cheapest choices fit.
    """
    loss, cost = _checked(losses, costs, budget)

    def at(price: float) -> list[int]:
        # Among equals the cheaper one, so that a high enough price always fits.
        return [int(np.lexsort((c, v + price * c))[0]) for v, c in zip(loss, cost, strict=True)]

    def total(chosen: Sequence[int]) -> int:
        return sum(int(c[i]) for c, i in zip(cost, chosen, strict=True))

    low, high = 0.0, 1.0
    if total(at(0.0)) <= budget:
        return at(0.0)
    while total(at(high)) > budget and high < 1e30:
        high *= 4.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if total(at(middle)) > budget else (low, middle)
    chosen = at(high)
    if total(chosen) > budget:
        chosen = [int(np.lexsort((v, c))[0]) for v, c in zip(loss, cost, strict=True)]
    return _exchanged(loss, cost, budget, chosen)


def _checked(
    losses: Sequence[Numbers], costs: Sequence[Numbers], budget: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    loss = [np.asarray(values, dtype=np.float64) for values in losses]
    cost = [np.asarray(values) for values in costs]
    if len(loss) != len(cost) or any(
        v.shape != c.shape or v.ndim != 1 or not len(v) for v, c in zip(loss, cost, strict=False)
    ):
        raise InputError("every choice needs one loss and one cost")
    if any(c.dtype.kind not in "iu" or int(c.min()) < 0 for c in cost):
        raise InputError("costs are whole numbers, 0 or more")
    if not all(np.isfinite(v).all() for v in loss):
        raise InputError("losses must be finite numbers")
    if any(len(v) > 1 << 16 for v in loss):
        raise InputError(f"there are more than {1 << 16} choices")
    least = sum(int(c.min()) for c in cost)
    if least > budget:
        raise BudgetError(f"a budget of {budget} cannot be met: the cheapest choices cost {least}")
    return loss, [c.astype(np.int64) for c in cost]
