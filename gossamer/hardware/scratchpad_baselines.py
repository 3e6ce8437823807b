"""What a scratchpad costs when order, eviction and addresses are chosen one after the other.

An order is given (the network's own, or that of the smallest peak); a policy evicts where a step
lacks room; a linear allocator of the kind used for microcontrollers then gives every stay an
address.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gossamer.core.errors import BudgetError
from gossamer.hardware.memory_graph import MemoryGraph, minimum_peak
from gossamer.hardware.scratchpad_plan import Plan, Stay, traffic

Policy = Callable[[MemoryGraph, dict[str, int], int], list[str]]
"""``(graph, candidates with their next step of use, bytes lacking) -> tensors to evict``."""


def furthest_next_use(graph: MemoryGraph, candidates: dict[str, int], lacking: int) -> list[str]:
    """Belady's rule: whatever is used last, one after the other, until there is room."""
    evicted: list[str] = []
    for tensor in sorted(candidates, key=lambda t: -candidates[t]):
        if lacking <= 0:
            break
        evicted.append(tensor)
        lacking -= graph.sizes[tensor]
    return evicted


def fewest_bytes(graph: MemoryGraph, candidates: dict[str, int], lacking: int) -> list[str]:
    """The set of fewest bytes that makes room, found exactly, without looking ahead."""
    # Smallest sums first: sets that do not yet make room, one for each sum.
    short: dict[int, tuple[str, ...]] = {0: ()}
    best: tuple[int, tuple[str, ...]] | None = None
    for tensor in candidates:
        size = graph.sizes[tensor]
        for total, chosen in list(short.items()):
            grown = total + size
            if grown < lacking:
                short.setdefault(grown, (*chosen, tensor))
            elif best is None or grown < best[0]:
                best = (grown, (*chosen, tensor))
    return list(best[1]) if best else []


POLICIES: dict[str, Policy] = {"belady": furthest_next_use, "greedy": fewest_bytes}


@dataclass(frozen=True)
class Baseline:
    """What a baseline came to.

    Attributes:
        order: "default" or "mpmf" (that of the smallest peak).
        policy: "belady" or "greedy".
        extra_bytes: bytes that its policy moves.
        arena_bytes: bytes that its allocator needs for what the policy keeps.
        plan: the plan; None where the allocator needs more than there is, by fragmentation.
    """

    order: str
    policy: str
    extra_bytes: int
    arena_bytes: int
    plan: Plan | None

    @property
    def name(self) -> str:
        """As "mpmf, belady"."""
        return f"{self.order}, {self.policy}"


def baselines(
    graph: MemoryGraph, budget: int, *, peak_order: Sequence[int] | None = None
) -> list[Baseline]:
    """The four baselines of the paper (section V): two orders with two policies.

    Args:
        graph: the operators.
        budget: bytes of the scratchpad.
        peak_order: the order of the smallest peak, if it is known already.

    Raises:
        BudgetError: if an operator alone needs more than the budget.
    """
    if peak_order is None:
        peak_order = minimum_peak(graph).order
    orders = {"default": graph.order, "mpmf": tuple(peak_order)}
    return [
        baseline(graph, budget, order, policy, name=name)  # type: ignore[arg-type]
        for name, order in orders.items()
        for policy in POLICIES
    ]


def baseline(
    graph: MemoryGraph,
    budget: int,
    order: Sequence[int],
    policy: Literal["belady", "greedy"],
    *,
    name: str = "default",
) -> Baseline:
    """One baseline: evicts by a policy in a given order, then assigns addresses.

    The first eviction of a tensor costs a spill; later ones cost nothing, since memory has a copy.

    Raises:
        BudgetError: if an operator alone needs more than the budget.
    """
    require_room(graph, budget)
    stays, spills = _replacements(graph, budget, order, POLICIES[policy])
    placed, arena = linear_allocation(graph, stays)
    extra = traffic(graph, stays, spills)
    plan = None
    if arena <= budget:
        method = f"{name} order, {policy}, linear allocation"
        plan = Plan(budget, tuple(order), tuple(placed), tuple(spills), extra, 0, method)
    return Baseline(name, policy, extra, arena, plan)


def require_room(graph: MemoryGraph, budget: int) -> None:
    """Checks that every operator fits alone.

    Raises:
        BudgetError: if one does not; the sentence has the largest and what it needs.
    """
    if budget < graph.required:
        raise BudgetError(
            f"a scratchpad of {budget:,} bytes is too small for {graph.largest.name}, which needs "
            f"{graph.required:,} bytes for its inputs and outputs; give at least that many"
        )


def _replacements(
    graph: MemoryGraph, budget: int, order: Sequence[int], policy: Policy
) -> tuple[list[Stay], list[tuple[int, str]]]:
    """What stays when, without addresses, and what is spilled."""
    place = {op: step for step, op in enumerate(order)}
    uses = {t: sorted(place[r] for r in readers) for t, readers in graph.readers.items()}
    since: dict[str, tuple[int, bool]] = {}  # resident: from which step, whether retrieved
    copied: set[str] = set()
    stays: list[Stay] = []
    spills: list[tuple[int, str]] = []

    def leave(tensor: str, last: int) -> None:
        first, retrieved = since.pop(tensor)
        stays.append(Stay(tensor, first, last, 0, retrieved))

    for step, which in enumerate(order):
        op = graph.ops[which]
        following = {t: next((u for u in uses[t] if u >= step), None) for t in since}
        for tensor, use in following.items():
            if use is None:
                leave(tensor, step - 1)
        missing = [t for t in op.inputs if t not in since]
        demand = sum(graph.sizes[t] for t in (*missing, *op.outputs))
        lacking = sum(graph.sizes[t] for t in since) + demand - budget
        if lacking > 0:
            candidates = {t: u for t in since if t not in op.inputs and (u := following[t])}
            for tensor in policy(graph, candidates, lacking):
                leave(tensor, step - 1)
                if tensor not in copied:
                    copied.add(tensor)
                    spills.append((step, tensor))
        since |= {t: (step, True) for t in missing}
        since |= {t: (step, False) for t in op.outputs}
    for tensor in list(since):
        leave(tensor, max((since[tensor][0], *uses[tensor])))
    return stays, spills


def linear_allocation(graph: MemoryGraph, stays: Sequence[Stay]) -> tuple[list[Stay], int]:
    """Greedy by size: the largest first, each at the lowest gap among those it coexists with.

    Returns:
        The stays with addresses, and the bytes of the whole arena.
    """
    placed: list[Stay] = []
    for stay in sorted(stays, key=lambda s: (-graph.sizes[s.tensor], s.first)):
        size = graph.sizes[stay.tensor]
        taken = sorted(
            (p.address, p.address + graph.sizes[p.tensor])
            for p in placed
            if p.first <= stay.last and stay.first <= p.last
        )
        address = 0
        for low, high in taken:
            if low - address >= size:
                break
            address = max(address, high)
        placed.append(Stay(stay.tensor, stay.first, stay.last, address, stay.retrieved))
    arena = max(itertools.chain([0], (p.address + graph.sizes[p.tensor] for p in placed)))
    return placed, arena
