"""How many units each family loses.

An allocation maps the scores of a criterion (high = keep) to *priorities* that can be compared
across families; :func:`select` then removes the units of lowest priority until a budget is met.
Widths that must be multiples of a number are handled by removing whole blocks of units, so the
total stays as asked instead of drifting by rounding each family for itself.

- :func:`by_score`: the scores themselves (one global ranking).
- :func:`uniform`: the rank inside the family, so every family loses the same share.
- :func:`lamp`: each score divided by the sum of all scores of its family that are not smaller,
  which never empties a family: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based
  Pruning", ICLR 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gossamer.core.errors import BudgetError, InputError

if TYPE_CHECKING:
    from gossamer.core.dependency import Dependency

Allocation = Callable[[Sequence[Tensor]], list[Tensor]]
"""Scores (one tensor a family) to priorities of the same shapes."""


def by_score(scores: Sequence[Tensor]) -> list[Tensor]:
    """Priorities are the scores: one ranking over all families."""
    return [score.clone() for score in scores]


def uniform(scores: Sequence[Tensor]) -> list[Tensor]:
    """Priorities are ranks: a unit's is the share of its family that goes before it goes.

    Args:
        scores: one tensor ``[units]`` for each family.

    Returns:
        Values in (0, 1]: 1/units for the lowest score, 1 for the highest; ties go to the lower
        index first.
    """
    result = []
    for score in scores:
        order = torch.argsort(score, stable=True)
        rank = torch.empty_like(score)
        rank[order] = torch.arange(1, len(score) + 1, device=score.device, dtype=score.dtype)
        result.append(rank / len(score))
    return result


def lamp(scores: Sequence[Tensor]) -> list[Tensor]:
    """Priorities are s_u^2 divided by the sum of s_v^2 over all v that are not smaller.

    Args:
        scores: magnitudes (norms), one tensor ``[units]`` for each family.

    Returns:
        LAMP scores; the largest unit of every family has exactly 1.
    """
    result = []
    for score in scores:
        squares = score.double().square()
        order = torch.argsort(squares, stable=True)
        ascending = squares[order]
        tail = ascending.flip(0).cumsum(0).flip(0)
        priority = torch.empty_like(squares)
        priority[order] = torch.where(tail > 0, ascending / tail.clamp(min=1e-300), 0.0)
        result.append(priority)
    return result


ALLOCATIONS: dict[str, Allocation] = {"global": by_score, "uniform": uniform, "lamp": lamp}
"""Allocations by the names that recipes use."""


def quanta(widths: Sequence[int], round_to: int) -> list[int]:
    """Units of each family that must go together so that widths stay multiples of ``round_to``.

    Args:
        widths: channels that one unit of each family stands for.
        round_to: the multiple, in channels.
    """
    return [round_to // math.gcd(round_to, max(1, width)) for width in widths]


def blocks(
    priorities: Tensor, family: Tensor, live: Tensor, quantum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts each family's live units, lowest priority first, into blocks removed as a whole.

    The first block of a family takes what is over a multiple of its quantum, every other block
    one quantum; the last block of every family stays (so no family loses its last unit).

    Args:
        priorities: ``[n]`` over all families.
        family: family of each unit, ``[n]``.
        live: which units may still be removed, ``[n]`` bool.
        quantum: of each family, ``[families]`` int64.

    Returns:
        ``block`` of each unit ``[n]`` (-1: none, it stays), and of each block the number of units
        and the mean priority. Block numbers rise with priority inside a family.
    """
    n = len(priorities)
    families = len(quantum)
    device = priorities.device
    counts = torch.zeros(families, dtype=torch.long, device=device)
    counts.index_add_(0, family, live.long())
    order = torch.argsort(priorities, stable=True)
    order = order[live[order]]
    order = order[torch.argsort(family[order], stable=True)]
    of = family[order]
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(order), device=device) - starts[of]
    rest = counts % quantum
    # Without a rest the first block is a whole quantum.
    first = torch.where(rest > 0, rest, quantum)
    inside = torch.where(
        rank < first[of], 0, 1 + torch.div(rank - first[of], quantum[of], rounding_mode="floor")
    )
    # A family of u units has ceil(u / q) blocks; the last one is never removed.
    per_family = torch.div(counts + quantum - 1, quantum, rounding_mode="floor")
    removable = (per_family - 1).clamp(min=0)
    block_starts = removable.cumsum(0) - removable
    block = torch.full((n,), -1, dtype=torch.long, device=device)
    stays = inside >= removable[of]
    block[order] = torch.where(stays, -1, block_starts[of] + inside)
    number = int(removable.sum())
    size = torch.zeros(number, dtype=torch.long, device=device)
    mean = torch.zeros(number, dtype=torch.float64, device=device)
    chosen = block >= 0
    size.index_add_(0, block[chosen], torch.ones_like(block[chosen]))
    mean.index_add_(0, block[chosen], priorities[chosen].double())
    return block, size, mean / size.clamp(min=1)


def lowest(priorities: Tensor, family: Tensor, live: Tensor, quantum: Tensor, count: int) -> Tensor:
    """The ``count`` live units of lowest priority, in whole blocks and never a whole family.

    Args:
        priorities: ``[n]``.
        family: family of each unit, ``[n]``.
        live: which units may be taken, ``[n]`` bool.
        quantum: of each family, ``[families]`` int64.
        count: how many to take at most; blocks that do not fit are passed over, so the answer
            falls short by less than the largest block wherever enough units are left.

    Returns:
        Which units, ``[n]`` bool.
    """
    block, size, mean = blocks(priorities, family, live, quantum)
    order = torch.argsort(mean, stable=True)
    takes = torch.zeros(len(size), dtype=torch.bool, device=size.device)
    if len(size) and int(size.max()) == 1:
        takes[order[: max(0, count)]] = True
    else:
        # A later block of a family may only go after the earlier ones, so a family whose block
        # was passed over is closed. Few blocks: families times multiples, not units.
        owner = torch.zeros(len(size), dtype=torch.long, device=size.device)
        owner[block[block >= 0]] = family[block >= 0]
        closed: set[int] = set()
        left = count
        for number in order.tolist():
            of, units = int(owner[number]), int(size[number])
            if of in closed:
                continue
            if units > left:
                closed.add(of)
                continue
            takes[number] = True
            left -= units
    result = torch.zeros_like(live)
    chosen = block >= 0
    result[chosen] = takes[block[chosen]]
    return result


def reach(
    priorities: Tensor,
    family: Tensor,
    live: Tensor,
    quantum: Tensor,
    cost: Callable[[Tensor], float],
    target: float,
) -> Tensor:
    """The fewest live units of lowest priority without which the cost meets the target.

    Args:
        priorities: ``[n]``.
        family: family of each unit, ``[n]``.
        live: which units may be taken, ``[n]`` bool.
        quantum: of each family, ``[families]`` int64.
        cost: of the network without the units of a mask ``[n]``; must not rise with more units.
        target: largest cost allowed.

    Returns:
        Which units, ``[n]`` bool.

    Raises:
        BudgetError: if the target is missed even with everything removed that may be.
    """
    block, size, mean = blocks(priorities, family, live, quantum)
    order = torch.argsort(mean, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)

    def first(number: int) -> Tensor:
        result = torch.zeros_like(live)
        chosen = block >= 0
        result[chosen] = position[block[chosen]] < number
        return result

    low, high = 0, len(size)
    least = cost(first(high))
    if least > target:
        raise BudgetError(
            f"a cost of {target:.4g} cannot be met by removing units: the least possible is "
            f"{least:.4g}"
        )
    while low < high:
        middle = (low + high) // 2
        if cost(first(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    return first(low)


def select(
    priorities: Sequence[Tensor],
    *,
    units: int | float | None = None,
    cost: Callable[[list[Tensor]], float] | None = None,
    target: float | None = None,
    quantum: Sequence[int] | int = 1,
) -> list[Tensor]:
    """Removes units of lowest priority until a budget is met.

    Args:
        priorities: one tensor ``[units]`` for each family, from an allocation; units of infinite
            priority are never removed.
        units: how many units to remove: a number, or a share of all as a float.
        cost: in place of ``units``: ``cost(removed)`` of the network without the units, which
            must not rise when more are removed.
        target: largest cost allowed; the fewest blocks that reach it are removed (by bisection).
        quantum: units of each family that go together (see :func:`quanta`).

    Returns:
        For each family which units to remove, ``[units]`` bool; at least one unit (or one
        quantum) of every family stays.

    Raises:
        InputError: if not exactly one budget is given.
        BudgetError: if the target is missed even with everything removed that may be.
    """
    if (units is None) == (cost is None or target is None):
        raise InputError("give either a number of units or a cost with its target")
    sizes = [len(p) for p in priorities]
    flat = torch.cat([p.double() for p in priorities])
    family = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(flat.device)
    each = [quantum] * len(sizes) if isinstance(quantum, int) else list(quantum)
    quantum_ = torch.tensor(each, device=flat.device)
    live = torch.isfinite(flat)
    if units is not None:
        count = round(units * len(flat)) if isinstance(units, float) else units
        return list(lowest(flat, family, live, quantum_, count).split(sizes))
    assert cost is not None and target is not None
    price = cost
    chosen = reach(
        flat, family, live, quantum_, lambda mask: price(list(mask.split(sizes))), target
    )
    return list(chosen.split(sizes))


def cost_of(budget: str, dependency: Dependency) -> Callable[[list[Tensor]], float]:
    """What a network without some units costs, without building it.

    Args:
        budget: "macs", "parameters" or "units".
        dependency: the network's removable families.

    Returns:
        ``cost(removed)`` for one bool mask a family.

    Raises:
        InputError: if there is no such budget.
    """
    if budget == "units":
        return lambda removed: float(sum(int((~mask).sum()) for mask in removed))
    if budget not in ("macs", "parameters"):
        raise InputError(f"there is no budget {budget}; there are macs, parameters and units")

    def cost(removed: list[Tensor]) -> float:
        removal = {i: mask.cpu() for i, mask in enumerate(removed) if bool(mask.any())}
        return float(getattr(dependency.cost(removal), budget))

    return cost


def unit_widths(dependency: Dependency) -> list[int]:
    """Channels that one unit of each family stands for (a head stands for several)."""
    result = []
    for family in dependency.families:
        made = [int((m.owner >= 0).sum()) for m in family.members if m.role == "producer"]
        result.append(max(1, (made[0] if made else family.units) // family.units))
    return result
