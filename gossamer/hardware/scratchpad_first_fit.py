"""A plan in one pass: every tensor is placed when it is needed, and what is in the way leaves.

What a search starts from where the baselines' addresses do not fit: eviction looks at addresses, so
it makes one gap large enough instead of many small ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from gossamer.hardware.memory_graph import MemoryGraph
from gossamer.hardware.scratchpad_plan import Plan, Stay, traffic

METHOD = "first fit"


def first_fit(
    graph: MemoryGraph, order: Sequence[int], budget: int, *, tries: int = 20, seed: int = 0
) -> Plan | None:
    """The best of some passes that differ in which end of a gap a tensor takes.

    Args:
        graph: the operators.
        order: in which they run.
        budget: bytes of the scratchpad.
        tries: passes; the first one takes the lowest addresses.
        seed: of the others.

    Returns:
        A plan, or None if every pass met an operator whose inputs lie so that nothing fits
        beside them.
    """
    best: Plan | None = None
    for number in range(tries):
        found = _Pass(graph, order, budget, random.Random(f"{seed} {number}"), number).run()
        if found is not None and (best is None or found.extra_bytes < best.extra_bytes):
            best = found
        if best is not None and best.extra_bytes == 0:
            break
    return best


class _Pass:
    def __init__(
        self,
        graph: MemoryGraph,
        order: Sequence[int],
        budget: int,
        choice: random.Random,
        number: int,
    ) -> None:
        self.graph = graph
        self.order = tuple(order)
        self.budget = budget
        # Addresses are multiples of the unit, as those of the programs that go on from here.
        self.top = budget // graph.unit * graph.unit
        self.choice = choice
        self.wobble = 0.0 if number == 0 else 0.5
        place = {op: step for step, op in enumerate(order)}
        self.uses = {t: sorted(place[r] for r in readers) for t, readers in graph.readers.items()}
        self.there: dict[str, Stay] = {}
        self.copied: set[str] = set()
        self.stays: list[Stay] = []
        self.spills: list[tuple[int, str]] = []

    def run(self) -> Plan | None:
        for step, which in enumerate(self.order):
            op = self.graph.ops[which]
            for tensor in [t for t in self.there if not any(u >= step for u in self.uses[t])]:
                self.leave(tensor)
            needed = set(op.inputs)
            missing = [t for t in op.inputs if t not in self.there]
            new = [(t, True) for t in missing] + [(t, False) for t in op.outputs]
            for tensor, retrieved in sorted(new, key=lambda n: -self.graph.sizes[n[0]]):
                address = self.room(tensor, step, needed)
                if address is None:
                    return None
                self.there[tensor] = Stay(tensor, step, step, address, retrieved)
                needed.add(tensor)
            for tensor in (*op.inputs, *op.outputs):
                old = self.there[tensor]
                self.there[tensor] = Stay(tensor, old.first, step, old.address, old.retrieved)
        self.stays += self.there.values()
        extra = traffic(self.graph, self.stays, self.spills)
        return Plan(
            self.budget, self.order, tuple(self.stays), tuple(sorted(self.spills)), extra,
            method=METHOD,
        )  # fmt: skip

    def leave(self, tensor: str) -> None:
        self.stays.append(self.there.pop(tensor))

    def room(self, tensor: str, step: int, needed: set[str]) -> int | None:
        """An address for a tensor, after evicting what is cheapest to evict there."""
        size = self.graph.sizes[tensor]
        taken = sorted((s.address, self.graph.sizes[t], t) for t, s in self.there.items())
        starts = {0, self.top - size}
        for address, length, _ in taken:
            starts |= {address + length, address - size}
        best: tuple[float, float, int, list[str]] | None = None
        for start in sorted(a for a in starts if 0 <= a <= self.top - size):
            hit = [t for a, length, t in taken if a < start + size and start < a + length]
            if any(t in needed for t in hit):
                continue
            cost = sum(self.price(t, step) for t in hit)
            end = start if self.choice.random() >= self.wobble else self.top - start
            if best is None or (cost, end) < best[:2]:
                best = (cost, end, start, hit)
        if best is None:
            return None
        for other in best[3]:
            if other not in self.copied:
                self.copied.add(other)
                self.spills.append((self.there[other].last + 1, other))
            self.leave(other)
        return best[2]

    def price(self, tensor: str, step: int) -> float:
        """Bytes that an eviction moves; a little less for what is needed late."""
        size = self.graph.sizes[tensor]
        following = next(u for u in self.uses[tensor] if u >= step)
        return size * (1 if tensor in self.copied else 2) * (1 + 1 / (1 + following - step))
