"""Divide and conquer for graphs that are too large to plan at once: windows of the schedule.

The paper (Li, Gupta and Malik 2023) takes the order of a hierarchical scheduler and decomposes the
graph, without saying how. This is a reconstruction: the order of the smallest peak is cut into
windows where little lives; each is solved exactly with what lies in the scratchpad before it; what
is away at its end is charged the bytes of bringing it back, so that no window leaves its debts to
the next. Then windows that overlap the cuts are solved again, between fixed ends, until none gains.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gossamer.hardware.memory_graph import MemoryGraph
from gossamer.hardware.scratchpad_plan import Plan, Stay, traffic
from gossamer.hardware.scratchpad_window import After, Before, Found, Window

METHOD = "divide and conquer"


@dataclass(frozen=True)
class Effort:
    """How hard windows are tried.

    Attributes:
        window: operators in one.
        seconds: for all of them.
        per_window: seconds for one.
        threads: of the solver.
        seed: of the solver.
    """

    window: int = 24
    seconds: float = 60.0
    per_window: float = 5.0
    threads: int = 1
    seed: int = 0


def construct(
    graph: MemoryGraph, order: Sequence[int], budget: int, effort: Effort, *, reorder: bool
) -> Plan | None:
    """Plans windows from left to right.

    Args:
        graph: the operators.
        order: which windows are cut from.
        budget: bytes of the scratchpad.
        effort: size of windows, time.
        reorder: whether operators may change places within a window.

    Returns:
        A plan, or None if a window could not be solved, also together with those before it.
    """
    deadline = time.monotonic() + effort.seconds
    cuts = _cuts(graph, order, effort.window)
    solved: list[_Solved] = []
    at = 0
    while at < len(cuts) - 1:
        start, stop = cuts[at], cuts[at + 1]
        before = solved[-1].state if solved else {}
        window = Window(
            graph, tuple(order[start:stop]), budget,
            _still_needed(graph, before, order[start:]), _needed_later(graph, order, stop),
            reorder=reorder,
        )  # fmt: skip
        left = min(effort.per_window, deadline - time.monotonic())
        found = (
            window.solve(seconds=left, threads=effort.threads, seed=effort.seed)
            if left > 0
            else True
        )
        if isinstance(found, Found):
            solved.append(_Solved(start, found, _state_after(window, found)))
            at += 1
        elif solved and left > 0 and stop - solved[-1].start <= 4 * effort.window:
            # What the window before it left behind does not admit this one: both together.
            solved.pop()
            del cuts[at]
            at -= 1
        else:
            return None
    return _joined(graph, budget, solved)


def improve(graph: MemoryGraph, plan: Plan, effort: Effort, *, bound: int, reorder: bool) -> Plan:
    """Solves overlapping windows of a plan again, between fixed ends, until none gains.

    Args:
        graph: the operators.
        plan: a valid plan.
        effort: size of windows, time.
        bound: bytes that no plan is below.
        reorder: whether operators may change places within a window.

    Returns:
        A plan that moves as much or less.
    """
    deadline = time.monotonic() + effort.seconds
    stride = max(1, effort.window // 2)
    quiet: set[tuple[int, int]] = set()  # windows that were solved to their optimum as they are
    gained = True
    while gained and plan.extra_bytes > bound:
        gained = False
        for start in range(0, max(1, len(plan.order) - stride), stride):
            stop = min(len(plan.order), start + effort.window)
            left = min(effort.per_window, deadline - time.monotonic())
            if left <= 0 or plan.extra_bytes <= bound:
                return plan
            if (start, stop) in quiet:
                continue
            better = _again(graph, plan, start, stop, effort, left, reorder)
            if better is None:
                quiet.add((start, stop))
                continue
            plan, gained = better, True
            quiet = {(a, b) for a, b in quiet if b <= start or stop <= a}
    return plan


@dataclass(frozen=True)
class _Solved:
    start: int
    found: Found
    state: Mapping[str, Before]


def _cuts(graph: MemoryGraph, order: Sequence[int], window: int) -> list[int]:
    """Where windows begin and end: near every ``window`` steps, where the least lives."""
    place = {op: step for step, op in enumerate(order)}
    live = [0] * (len(order) + 1)  # bytes that live across the beginning of each step
    for tensor, producer in graph.producer.items():
        last = max((place[r] for r in graph.readers[tensor]), default=-1)
        for step in range(place[producer] + 1, last + 1):
            live[step] += graph.sizes[tensor]
    cuts = [0]
    while len(order) - cuts[-1] > window * 3 // 2:
        choices = range(cuts[-1] + window // 2, cuts[-1] + window + 1)
        cuts.append(min(choices, key=lambda s: (live[s], -s)))
    return [*cuts, len(order)]


def _needed_later(graph: MemoryGraph, order: Sequence[int], stop: int) -> frozenset[str]:
    done = set(order[:stop])
    return frozenset(
        t
        for n in done
        for t in graph.ops[n].outputs
        if any(r not in done for r in graph.readers[t])
    )


def _still_needed(
    graph: MemoryGraph, state: Mapping[str, Before], rest: Sequence[int]
) -> dict[str, Before]:
    left = set(rest)
    return {t: b for t, b in state.items() if any(r in left for r in graph.readers[t])}


def _state_after(window: Window, found: Found) -> dict[str, Before]:
    copied = {t for t, b in window.before.items() if b.copied} | {t for _, t in found.spills}
    there = {s.tensor: s.address for s in found.stays if s.last == len(window.ops)}
    return {t: Before(there.get(t), t in copied) for t in window.later}


def _joined(graph: MemoryGraph, budget: int, solved: Sequence[_Solved]) -> Plan:
    order: list[int] = []
    stays: list[Stay] = []
    spills: list[tuple[int, str]] = []
    open_stays: dict[str, Stay] = {}
    for part in solved:
        start, length = part.start, len(part.found.order)
        order += part.found.order
        spills += [(start + step, t) for step, t in part.found.spills]
        going: dict[str, Stay] = {}
        for stay in part.found.stays:
            moved = replace(stay, first=start + stay.first, last=start + stay.last)
            if stay.first == -1:
                before = open_stays.pop(stay.tensor)
                moved = replace(moved, first=before.first, retrieved=before.retrieved)
            if stay.last == length:
                going[stay.tensor] = replace(moved, last=moved.last - 1)
            else:
                stays.append(moved)
        assert not open_stays
        open_stays = going
    return Plan(
        budget, tuple(order), tuple(stays), tuple(spills), traffic(graph, stays, spills),
        method=METHOD,
    )  # fmt: skip


def _again(
    graph: MemoryGraph,
    plan: Plan,
    start: int,
    stop: int,
    effort: Effort,
    seconds: float,
    reorder: bool,
) -> Plan | None:
    """The plan with one window solved again; None if that gains nothing."""
    later = _needed_later(graph, plan.order, stop)
    spilled = {t: step for step, t in plan.spills}
    early = _needed_later(graph, plan.order, start)
    before: dict[str, Before] = {}
    for tensor in early:
        there = next((s for s in _of(plan, tensor) if s.first < start <= s.last + 1), None)
        copied = spilled.get(tensor, len(plan.order) + 1) < start
        before[tensor] = Before(there.address if there else None, copied)
    after: dict[str, After] = {}
    for tensor in later:
        across = next((s for s in _of(plan, tensor) if s.first < stop <= s.last), None)
        at_once = any(s.retrieved and s.first == stop for s in _of(plan, tensor))
        # What is retrieved later may need the copy that was written here.
        written = start <= spilled.get(tensor, -1) <= stop
        again = any(s.retrieved and s.first >= stop for s in _of(plan, tensor))
        after[tensor] = After(across.address if across else None, at_once, written and again)
    inside = {t for t, state in before.items() if _reads(graph, plan.order[start:stop], t)}
    through = {t for t in before if t in later}
    window = Window(
        graph, plan.order[start:stop], plan.budget,
        {t: b for t, b in before.items() if t in inside or t in through}, later, after, reorder,
    )  # fmt: skip
    hint = _cut_out(plan, start, stop)
    if not any(s.retrieved for s in hint.stays) and not hint.spills:
        return None
    found = window.solve(seconds=seconds, threads=effort.threads, seed=effort.seed, hint=hint)
    if not isinstance(found, Found):
        return None
    better = _spliced(graph, plan, start, stop, window, found)
    return better if better.extra_bytes < plan.extra_bytes else None


def _of(plan: Plan, tensor: str) -> list[Stay]:
    return [s for s in plan.stays if s.tensor == tensor]


def _reads(graph: MemoryGraph, ops: Sequence[int], tensor: str) -> bool:
    return any(tensor in graph.ops[n].inputs for n in ops)


def _cut_out(plan: Plan, start: int, stop: int) -> Found:
    """A window of a plan as a solution of that window."""
    stays = tuple(
        replace(
            s,
            first=max(-1, s.first - start),
            last=min(stop, s.last) - start,
            retrieved=s.retrieved and s.first >= start,
        )
        for s in plan.stays
        if s.first < stop and s.last >= start - 1
    )
    spills = tuple((step - start, t) for step, t in plan.spills if start <= step <= stop)
    return Found(plan.order[start:stop], stays, spills, 0, 0)


def _spliced(
    graph: MemoryGraph, plan: Plan, start: int, stop: int, window: Window, found: Found
) -> Plan:
    """The plan with a window replaced."""
    length = stop - start
    stays: list[Stay] = []
    going_in: dict[str, Stay] = {}
    going_out: dict[str, Stay] = {}
    for stay in plan.stays:
        if stay.first >= stop:
            stays.append(stay)
            continue
        if stay.first < start:
            if stay.last >= start - 1 and stay.tensor in window.before:
                going_in[stay.tensor] = stay
            else:
                stays.append(stay)
        if stay.first < stop <= stay.last:
            going_out[stay.tensor] = stay
    for stay in found.stays:
        new = replace(stay, first=start + stay.first, last=start + stay.last)
        if stay.first == -1:
            old = going_in[stay.tensor]
            new = replace(new, first=old.first, retrieved=old.retrieved)
        if stay.last == length:
            new = replace(new, last=going_out[stay.tensor].last)
        stays.append(new)
    spills = [(step, t) for step, t in plan.spills if not start <= step <= stop]
    spills += [(start + step, t) for step, t in found.spills]
    return replace(
        plan,
        order=(*plan.order[:start], *found.order, *plan.order[stop:]),
        stays=tuple(stays),
        spills=tuple(sorted(spills)),
        extra_bytes=traffic(graph, stays, spills),
        method=METHOD,
    )
