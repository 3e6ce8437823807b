"""Order, addresses and spills of a network's tensors in a scratchpad, chosen together (COSMA).

An accelerator keeps operands in a small memory managed by software. When the live tensors do not
fit, some are written to the large memory (spilled) and read back. How much moves depends on the
order of operators, on the addresses (fragmentation) and on what is evicted; one program decides all
three and minimises the bytes moved beyond the compulsory ones.

Yi Li, Aarti Gupta and Sharad Malik, "Combined Scheduling, Memory Allocation and Tensor Replacement
for Minimizing Off-Chip Data Accesses of DNN Accelerators", 2023, arXiv:2311.18246. Their integer
program is in :mod:`gossamer.hardware.scratchpad_rows`, the same program for a constraint solver in
:mod:`gossamer.hardware.scratchpad_window`. The paper's divide and conquer for large graphs is not
described in detail: that of :mod:`gossamer.hardware.scratchpad_divide` is a reconstruction.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from gossamer.core.errors import BudgetError, InputError
from gossamer.hardware.memory_graph import MemoryGraph, Peak, minimum_peak
from gossamer.hardware.scratchpad_baselines import baselines, linear_allocation, require_room
from gossamer.hardware.scratchpad_divide import Effort, construct, improve
from gossamer.hardware.scratchpad_first_fit import first_fit
from gossamer.hardware.scratchpad_plan import Plan
from gossamer.hardware.scratchpad_rows import solve_rows
from gossamer.hardware.scratchpad_window import Found, Window

log = logging.getLogger(__name__)

Solver = Literal["auto", "cp-sat", "highs", "windows"]

LARGE = 80
"""Operators from which on "auto" divides a graph whose order is free before it tries the whole."""

SIZES = (12, 24, 40)
"""Operators in a window of divide and conquer, one size after the other."""

LARGEST = 400
"""Operators from which on it does not try the whole."""


@dataclass(frozen=True)
class Budgets:
    """The three budgets that the paper evaluates at, in bytes.

    Attributes:
        required: M_R, what the largest operator needs.
        half: M_H, halfway.
        peak: M_P, the smallest peak of any order; nothing has to move from here on, but for
            fragmentation.
    """

    required: int
    half: int
    peak: int


def budgets(graph: MemoryGraph, peak: Peak | None = None) -> Budgets:
    """M_R, M_H and M_P of a graph."""
    top = (peak or minimum_peak(graph)).bytes
    return Budgets(graph.required, (graph.required + top) // 2, top)


def covering_bound(graph: MemoryGraph, budget: int) -> int:
    """Bytes that every plan of every order moves.

    A tensor made before an operator and read after it in every order lives while that operator
    runs. Where what lives does not fit, some of it is away then, and so is spilled and retrieved at
    least once; the cheapest set of tensors that makes room for every operator is a bound.
    """
    before = [0] * len(graph.ops)
    after = [0] * len(graph.ops)
    for number in graph.order:
        for earlier in graph.predecessors[number]:
            before[number] |= before[earlier] | 1 << earlier
    for number in reversed(graph.order):
        for earlier in graph.predecessors[number]:
            after[earlier] |= after[number] | 1 << number
    readers = {t: sum(1 << r for r in graph.readers[t]) for t in graph.producer}
    rows: set[tuple[int, tuple[str, ...]]] = set()
    for number, op in enumerate(graph.ops):
        alive = tuple(
            t
            for t, producer in graph.producer.items()
            if before[number] >> producer & 1 and readers[t] & after[number] and t not in op.inputs
        )
        lack = graph.working_set(op) + sum(graph.sizes[t] for t in alive) - budget
        if lack > 0:
            rows.add((lack, alive))
    if not rows:
        return 0
    tensors = list(dict.fromkeys(t for _, alive in rows for t in alive))
    sizes = np.array([graph.sizes[t] // graph.unit for t in tensors], dtype=float)
    cover = np.array([sizes * [t in alive for t in tensors] for _, alive in rows])
    lacking = np.array([-(-lack // graph.unit) for lack, _ in rows], dtype=float)
    found = milp(
        2 * sizes,
        integrality=np.ones(len(tensors)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(cover, lacking),  # type: ignore[arg-type]
        options={"time_limit": 5.0, "mip_rel_gap": 0.0},
    )
    return max(0, math.ceil((found.mip_dual_bound or 0) - 1e-6)) * graph.unit


def schedule(
    graph: MemoryGraph,
    budget: int,
    *,
    order: Literal["free", "fixed"] | Sequence[int] = "free",
    solver: Solver = "auto",
    seconds: float = 60.0,
    threads: int = 1,
    seed: int = 0,
    peak: Peak | None = None,
) -> Plan:
    """The plan that moves the fewest bytes.

    Args:
        graph: the operators.
        budget: bytes of the scratchpad.
        order: "free", "fixed" (as the operators are listed), or operators by number.
        solver: "cp-sat" and "highs" solve the whole program; "windows" divides and conquers;
            "auto" is "cp-sat", and "windows" for free orders of large graphs.
        seconds: time limit. When it ends the best plan so far is returned, with the bound.
        threads: of the solver.
        seed: of the solver.
        peak: the order of the smallest peak, if it is known already.

    Returns:
        A plan that is either optimal or not proved to be; it never moves more than the baselines
        whose addresses fit (for a fixed order: those of that order).

    Raises:
        BudgetError: if an operator alone needs more than the budget (the sentence names it), if it
            is proved that no plan exists although each operator fits, or if time ran out before
            any plan was found.
        InputError: if the order is none.
    """
    require_room(graph, budget)
    if seconds <= 0:
        raise InputError(f"seconds is {seconds}; it must be positive")
    began = time.monotonic()
    search = _Search(graph, budget, order, solver, began + seconds, threads, seed, peak)
    plan = search.run()
    return replace(plan, seconds=time.monotonic() - began)


class _Search:
    """The best plan so far, and what is proved."""

    def __init__(
        self,
        graph: MemoryGraph,
        budget: int,
        order: Literal["free", "fixed"] | Sequence[int],
        solver: Solver,
        deadline: float,
        threads: int,
        seed: int,
        peak: Peak | None,
    ) -> None:
        self.graph = graph
        self.budget = budget
        self.deadline = deadline
        self.threads = threads
        self.seed = seed
        # Where no two operators can change places the order is given.
        self.free = order == "free" and any(first != last for first, last in graph.windows)
        given = graph.order if isinstance(order, str) else tuple(order)
        if not graph.is_order(given):
            raise InputError("the order does not run every operator once, after what it reads")
        self.peak = (peak or minimum_peak(graph)) if self.free else None
        self.orders = [given]
        if self.peak is not None and self.peak.order != given:
            self.orders.insert(0, self.peak.order)
        # Whatever is alive in the fullest step and does not fit is spilled and retrieved.
        fullest = self.peak.bound if self.peak is not None else max(graph.footprints(given))
        unit = graph.unit
        room = budget // unit * unit
        self.bound = max(2 * (fullest - room), covering_bound(graph, room), 0)
        self.best: Plan | None = None
        self.impossible = False
        self.solver = solver

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def done(self) -> bool:
        return self.best is not None and self.best.extra_bytes <= self.bound

    def offer(self, plan: Plan | None) -> None:
        if plan is not None and (self.best is None or plan.extra_bytes < self.best.extra_bytes):
            self.best = plan
            log.debug("%s: %d bytes", plan.method, plan.extra_bytes)

    def run(self) -> Plan:
        self.incumbents()
        for stage, share in self.stages():
            if not self.done and not self.impossible and self.left > 0:
                stage(share * self.left)
        if self.best is not None:
            return replace(self.best, bound=min(self.bound, self.best.extra_bytes))
        room = f"{self.budget:,} bytes"
        if self.impossible:
            raise BudgetError(
                f"no plan exists in {room} although every operator fits alone: kept tensors "
                "cannot move, and what is free lies in pieces; give more"
            )
        raise BudgetError(f"no plan for {room} was found in time; give more time or room")

    def stages(self) -> list[tuple[Callable[[float], None], float]]:
        """What is tried, and which share of the time left each may take."""
        count = len(self.graph.ops)
        if self.solver == "highs":
            return [(self.rows, 1.0)]
        if self.solver == "windows":
            return [(self.windows, 0.7), (self.rescue, 1.0)]
        whole = self.free_order if self.free else self.given_orders
        if self.solver == "cp-sat":
            return [(self.given_orders, 0.4), (whole, 1.0)] if self.free else [(whole, 1.0)]
        if not self.free:
            return [(whole, 0.6), (self.windows, 0.5), (whole, 1.0)]
        if count <= LARGE:
            return [(self.given_orders, 0.1), (whole, 0.2), (self.windows, 0.75), (whole, 1.0)]
        if count <= LARGEST:
            return [(self.given_orders, 0.3), (self.windows, 0.7), (whole, 1.0)]
        return [(self.windows, 0.8), (self.given_orders, 1.0)]

    def incumbents(self) -> None:
        """Plans at once: the baselines whose addresses fit, and first fit."""
        for baseline in baselines(self.graph, self.budget, peak_order=self.orders[0]):
            if self.free or baseline.order == "mpmf":  # for a given order that name is its own
                self.offer(baseline.plan)
        for order in self.orders:
            if not self.done:
                self.offer(first_fit(self.graph, order, self.budget, seed=self.seed))

    def rows(self, seconds: float) -> None:
        """The integer program."""
        fixed = None if self.free else self.orders[0]
        found = solve_rows(self.graph, self.budget, order=fixed, seconds=seconds)
        self.offer(found.plan)
        self.impossible = found.infeasible
        self.bound = max(self.bound, found.bound)

    def given_orders(self, seconds: float) -> None:
        """The constraint program for each order at hand."""
        stop = time.monotonic() + seconds
        for number, order in enumerate(self.orders):
            left = (stop - time.monotonic()) / (len(self.orders) - number)
            if self.done or left <= 0:
                return
            impossible = self.in_order(order, left)
            self.impossible = impossible and not self.free

    def in_order(self, order: tuple[int, ...], seconds: float) -> bool:
        """Bytes first, then addresses for that choice, then both at once."""
        window = Window.whole(self.graph, order, self.budget, reorder=False)
        stop = time.monotonic() + seconds
        floor = 0 if self.free else self.bound
        hint = None
        if self.best is not None and self.best.order == order:
            hint = Found(order, self.best.stays, self.best.spills, self.best.extra_bytes, 0)
        relaxed = window.solve(
            seconds=seconds / 3,
            threads=self.threads,
            seed=self.seed,
            addresses=False,
            hint=hint,
            floor=floor,
        )
        if relaxed is False:
            return True
        if isinstance(relaxed, Found):
            if not self.free:
                self.bound = max(self.bound, relaxed.bound)
            floor = max(floor, relaxed.bound)
            if self.best is not None and self.best.extra_bytes <= floor:
                return False
            placed, arena = linear_allocation(self.graph, relaxed.stays)
            if arena <= self.budget:
                self.offer(self.plan_of(replace(relaxed, stays=tuple(placed)), "bytes first"))
            if self.best is not None and self.best.extra_bytes <= floor:
                return False
        if hint is None and isinstance(relaxed, Found):
            hint = relaxed
        left = max(0.1, stop - time.monotonic())
        found = window.solve(
            seconds=left, threads=self.threads, seed=self.seed, hint=hint, floor=floor
        )
        if isinstance(found, Found):
            self.offer(self.plan_of(found, "constraint program, given order"))
            if not self.free:
                self.bound = max(self.bound, found.bound)
        return found is False

    def free_order(self, seconds: float) -> None:
        """The whole constraint program."""
        start = self.best.order if self.best is not None else self.orders[0]
        window = Window.whole(self.graph, start, self.budget, reorder=True)
        hint = None
        if self.best is not None:
            hint = Found(start, self.best.stays, self.best.spills, self.best.extra_bytes, 0)
        found = window.solve(
            seconds=seconds, threads=self.threads, seed=self.seed, hint=hint, floor=self.bound
        )
        self.impossible = found is False
        if isinstance(found, Found):
            self.bound = max(self.bound, found.bound)
            self.offer(self.plan_of(found, "constraint program, free order"))

    def windows(self, seconds: float) -> None:
        """Divide and conquer: a plan from each order, then the best one so far improved."""
        stop = time.monotonic() + seconds

        def effort(size: int, share: float = 1.0) -> Effort:
            left = max(0.0, share * (stop - time.monotonic()))
            return Effort(size, left, threads=self.threads, seed=self.seed)

        for order in self.orders:
            if not self.done:
                tried = effort(SIZES[1], 0.5)
                self.offer(construct(self.graph, order, self.budget, tried, reorder=self.free))
        for size in SIZES:
            if self.best is not None and not self.done:
                better = improve(
                    self.graph, self.best, effort(size), bound=self.bound, reorder=self.free
                )
                self.offer(better)

    def rescue(self, seconds: float) -> None:
        """Any plan at all, where windows that each leave a mess behind found none."""
        if self.best is None:
            self.given_orders(seconds)

    def plan_of(self, found: Found, method: str) -> Plan:
        return Plan(self.budget, found.order, found.stays, found.spills, found.cost, method=method)
