"""Plans of a scratchpad, and the simulator that checks them byte by byte.

The simulator knows nothing of how a plan was found. It owns a memory of so many bytes, runs the
operators in the plan's order on real bytes, moves what the plan moves, and compares every result
with a run that has all the memory it wants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gossamer.core.errors import GossamerError
from gossamer.hardware.memory_graph import MemoryGraph, MemoryOp


@dataclass(frozen=True)
class Stay:
    """A tensor in the scratchpad, at one address, for some steps.

    Attributes:
        tensor: which.
        first: first step.
        last: last step, this one too.
        address: of its first byte.
        retrieved: whether it comes from memory; otherwise the operator of ``first`` makes it.
    """

    tensor: str
    first: int
    last: int
    address: int
    retrieved: bool


@dataclass(frozen=True)
class Plan:
    """An order of operators, addresses, and what moves between scratchpad and memory.

    Attributes:
        budget: bytes of the scratchpad.
        order: operators by number; one runs in each step.
        stays: which tensor lies where, and when.
        spills: ``(step, tensor)``: written to memory before the step, in which its place is free.
        extra_bytes: bytes spilled and retrieved, the non-compulsory traffic.
        bound: no plan with the same freedom of order moves less, in bytes.
        method: what found it.
        seconds: how long that took.
        notes: what should be known of it.
    """

    budget: int
    order: tuple[int, ...]
    stays: tuple[Stay, ...]
    spills: tuple[tuple[int, str], ...]
    extra_bytes: int
    bound: int = 0
    method: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())

    @property
    def optimal(self) -> bool:
        """Whether it is proved that no plan moves less."""
        return self.extra_bytes == self.bound

    @property
    def status(self) -> Literal["optimal", "not proved"]:
        """In words."""
        return "optimal" if self.optimal else "not proved"

    @property
    def gap(self) -> float:
        """The share of the extra bytes that may be avoidable: (extra - bound) / extra."""
        return 0.0 if self.optimal else (self.extra_bytes - self.bound) / self.extra_bytes

    @property
    def fills(self) -> tuple[tuple[int, str], ...]:
        """``(step, tensor)``: read back from memory for the step."""
        return tuple(sorted((s.first, s.tensor) for s in self.stays if s.retrieved))

    def to_json(self, graph: MemoryGraph) -> dict[str, Any]:
        """The plan by names, as JSON values."""
        return {
            "budget_bytes": self.budget,
            "extra_bytes": self.extra_bytes,
            "bound_bytes": self.bound,
            "status": self.status,
            "gap": self.gap,
            "method": self.method,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
            "order": [graph.ops[n].name for n in self.order],
            "stays": [
                {
                    "tensor": s.tensor, "bytes": graph.sizes[s.tensor], "address": s.address,
                    "first": s.first, "last": s.last, "retrieved": s.retrieved,
                }
                for s in self.stays
            ],
            "spills": [
                {"step": step, "tensor": t, "bytes": graph.sizes[t]} for step, t in self.spills
            ],
            "fills": [
                {"step": step, "tensor": t, "bytes": graph.sizes[t]} for step, t in self.fills
            ],
        }  # fmt: skip


def traffic(graph: MemoryGraph, stays: Iterable[Stay], spills: Iterable[tuple[int, str]]) -> int:
    """Bytes that a plan moves."""
    fills = sum(graph.sizes[s.tensor] for s in stays if s.retrieved)
    return fills + sum(graph.sizes[t] for _, t in spills)


class BrokenPlan(GossamerError):
    """A plan that does not run; the sentence has the step and the tensor."""


@dataclass(frozen=True)
class Replay:
    """What the simulator saw.

    Attributes:
        extra_bytes: bytes that went to memory and back.
        peak_bytes: most bytes in use in one step.
        highest: one more than the highest address ever used.
    """

    extra_bytes: int
    peak_bytes: int
    highest: int


def replay(graph: MemoryGraph, plan: Plan) -> Replay:
    """Runs a plan on real bytes.

    Every operator's outputs are a function of all bytes of its inputs, so a tensor that was
    overwritten, moved or brought back wrong changes everything after it.

    Raises:
        BrokenPlan: if operators run out of order, two tensors overlap, an input is not there, a
            tensor is retrieved that was never written, a byte differs from the run without a
            limit, or the bytes moved are not those the plan says.
    """
    if sorted(plan.order) != list(graph.order):
        raise BrokenPlan("the plan does not run every operator once")
    expected = _unlimited(graph)
    memory = np.zeros(plan.budget, np.uint8)
    owner = np.full(plan.budget, -1, np.int32)  # which stay has a byte
    outside: dict[str, np.ndarray] = {}
    inside: dict[str, int] = {}
    moved = peak = highest = 0
    begins = _by_step(len(graph.ops), [(s.first, n) for n, s in enumerate(plan.stays)])
    ends = _by_step(len(graph.ops), [(s.last + 1, n) for n, s in enumerate(plan.stays)])
    spills = _by_step(len(graph.ops), plan.spills)

    def place(number: int) -> slice:
        stay = plan.stays[number]
        return slice(stay.address, stay.address + graph.sizes[stay.tensor])

    for step, which in enumerate(plan.order):
        op = graph.ops[which]
        for tensor in spills[step]:
            if tensor not in inside:
                raise BrokenPlan(f"step {step} spills {tensor}, which is not in the scratchpad")
            if plan.stays[inside[tensor]].last != step - 1:
                raise BrokenPlan(f"step {step} spills {tensor}, which stays")
            if any(plan.stays[number].tensor == tensor for number in begins[step]):
                raise BrokenPlan(f"step {step} spills {tensor} and brings it back at once")
            outside[tensor] = memory[place(inside[tensor])].copy()
            moved += graph.sizes[tensor]
        for number in ends[step]:
            owner[place(number)] = -1
            del inside[plan.stays[number].tensor]
        for number in begins[step]:
            stay, here = plan.stays[number], place(number)
            if stay.address < 0 or here.stop > plan.budget:
                raise BrokenPlan(f"{stay.tensor} lies outside the scratchpad in step {step}")
            if stay.last < stay.first or stay.tensor in inside:
                raise BrokenPlan(f"{stay.tensor} is there twice in step {step}")
            if np.any(owner[here] != -1):
                other = plan.stays[int(owner[here].max())].tensor
                raise BrokenPlan(f"{stay.tensor} overlaps {other} in step {step}")
            if not stay.retrieved and stay.tensor not in op.outputs:
                raise BrokenPlan(f"step {step} does not make {stay.tensor}")
            owner[here] = number
            inside[stay.tensor] = number
            highest = max(highest, here.stop)
            if stay.retrieved:
                if stay.tensor not in outside:
                    raise BrokenPlan(f"step {step} retrieves {stay.tensor}, which was not spilled")
                memory[here] = outside[stay.tensor]
                moved += graph.sizes[stay.tensor]
        for tensor in (*op.inputs, *op.outputs):
            if tensor not in inside:
                raise BrokenPlan(f"{tensor} is not in the scratchpad in step {step} ({op.name})")
            if tensor in op.outputs and plan.stays[inside[tensor]].first != step:
                raise BrokenPlan(f"{tensor} is there before {op.name} makes it")
        digests = {t: _digest(memory[place(inside[t])]) for t in op.inputs}
        for tensor, content in _run(which, op, graph, digests).items():
            memory[place(inside[tensor])] = content
        digests |= {t: _digest(memory[place(inside[t])]) for t in op.outputs}
        for tensor, digest in digests.items():
            if digest != expected[tensor]:
                raise BrokenPlan(f"{tensor} has wrong bytes in step {step}")
        peak = max(peak, int(np.count_nonzero(owner != -1)))
    if moved != plan.extra_bytes:
        raise BrokenPlan(f"the plan says {plan.extra_bytes} bytes move, but {moved} do")
    return Replay(moved, peak, highest)


def _by_step(steps: int, events: Sequence[tuple[int, Any]]) -> list[list[Any]]:
    found: list[list[Any]] = [[] for _ in range(steps + 1)]
    for step, what in events:
        if not 0 <= step <= steps:
            raise BrokenPlan(f"the plan has a step {step}, the graph has {steps} operators")
        found[step].append(what)
    return found


def _unlimited(graph: MemoryGraph) -> dict[str, bytes]:
    """The digest of every tensor when nothing ever moves."""
    digests: dict[str, bytes] = {}
    for number, op in enumerate(graph.ops):
        made = _run(number, op, graph, {t: digests[t] for t in op.inputs})
        digests |= {tensor: _digest(content) for tensor, content in made.items()}
    return digests


def _digest(content: np.ndarray) -> bytes:
    return hashlib.blake2b(content.data, digest_size=16).digest()


def _run(
    number: int, op: MemoryOp, graph: MemoryGraph, inputs: Mapping[str, bytes]
) -> dict[str, np.ndarray]:
    """The outputs of an operator, from the digests of its inputs."""
    seed = hashlib.blake2b(str(number).encode(), digest_size=16)
    for tensor in op.inputs:
        seed.update(inputs[tensor])
    random = np.random.Generator(np.random.SFC64(int.from_bytes(seed.digest(), "little")))
    return {t: random.integers(0, 256, graph.sizes[t], np.uint8) for t in op.outputs}
