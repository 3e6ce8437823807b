"""The integer program of the paper, row by row, for HiGHS.

Binary variables say for each tensor ``a`` and step ``t`` whether it is created (C), kept (P),
spilled (S) or retrieved (R), integers its base address L; rows 1 to 12 and the two that the printed
formulation leaves to the reader are those of Li, Gupta and Malik 2023, equations 1 to 15. A tensor
has variables only for the steps at which it can live in any order. Rows of addresses exist for
pairs of tensors that can meet. The program grows with steps times pairs: it is for small graphs,
and to check the other one (:mod:`gossamer.hardware.scratchpad_window`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from gossamer.core.errors import GossamerError, InputError
from gossamer.hardware.memory_graph import MemoryGraph
from gossamer.hardware.scratchpad_plan import Plan, Stay, replay, traffic

MOST_VARIABLES = 400_000
"""A larger program is refused: it would not be solved."""


@dataclass(frozen=True)
class RowsResult:
    """What the integer program came to.

    Attributes:
        plan: the best plan; None if there is none or none was found.
        bound: bytes that no plan is below.
        infeasible: whether it is proved that there is none.
        variables: of the program.
    """

    plan: Plan | None
    bound: int
    infeasible: bool
    variables: int


def solve_rows(
    graph: MemoryGraph,
    budget: int,
    *,
    order: Sequence[int] | None = None,
    seconds: float = 60.0,
) -> RowsResult:
    """Solves rows 1 to 12.

    Args:
        graph: the operators.
        budget: bytes of the scratchpad.
        order: operators by number; None lets the program choose.
        seconds: time limit.

    Raises:
        InputError: if the program is too large to be worth solving.
    """
    program = _Rows(graph, order)
    capacity = budget // graph.unit
    program.rows_of_life()
    program.rows_of_eviction()
    program.rows_of_addresses(capacity)
    result = program.solve(program.traffic, seconds)
    if result.status == 2:
        return RowsResult(None, 0, True, program.count)
    dual = getattr(result, "mip_dual_bound", None)
    bound = max(0, int(np.ceil((dual if dual is not None else 0) - 1e-6))) * graph.unit
    if result.x is None:
        return RowsResult(None, bound, False, program.count)
    plan = program.plan(result.x, budget)
    try:
        replay(graph, plan)
    except GossamerError:  # addresses are floats in the solver; what rounding broke is no plan
        return RowsResult(None, bound, False, program.count)
    return RowsResult(plan, min(bound, plan.extra_bytes), False, program.count)


def peak_rows(graph: MemoryGraph, *, seconds: float = 60.0) -> tuple[int, int]:
    """The smallest peak (M_P) by the integer program without eviction and addresses.

    Returns:
        The peak of the best order found, and the bound, in bytes.

    Raises:
        InputError: if the program is too large, or time ran out before an order was found.
    """
    program = _Rows(graph, None)
    program.rows_of_life()
    result = program.solve_peak(seconds)
    if result.x is None:
        raise InputError("no order was found in time; give more seconds")
    unit = graph.unit
    return round(result.fun) * unit, int(np.ceil(result.mip_dual_bound - 1e-6)) * unit


class _Rows:
    def __init__(self, graph: MemoryGraph, order: Sequence[int] | None) -> None:
        self.graph = graph
        self.steps = len(graph.ops)
        self.tensors = list(graph.producer)
        self.size = {t: graph.sizes[t] // graph.unit for t in self.tensors}
        if order is None:
            windows = graph.windows
        else:
            place = {op: step for step, op in enumerate(order)}
            windows = [(place[n], place[n]) for n in graph.order]
        self.windows = windows
        # Steps at which a tensor can live: from its first creation to its last use.
        self.life = {
            t: (
                windows[n][0],
                max([windows[n][1], *(windows[r][1] for r in graph.readers[t])]),
            )
            for t, n in graph.producer.items()
        }
        self.count = 0
        self.integral: list[int] = []
        self.upper: list[float] = []
        self.lower: list[float] = []
        self.entries: list[tuple[int, int, float]] = []
        self.limits: list[tuple[float, float]] = []
        self.traffic: dict[int, float] = {}
        self.C: dict[tuple[str, int], int] = {}
        self.P: dict[tuple[str, int], int] = {}
        self.S: dict[tuple[str, int], int] = {}
        self.R: dict[tuple[str, int], int] = {}
        self.L: dict[tuple[str, int], int] = {}

    def variable(self, upper: float = 1.0, lower: float = 0.0, *, integral: bool = True) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        self.integral.append(int(integral))
        self.count += 1
        if self.count > MOST_VARIABLES:
            raise InputError(
                "the integer program of this graph has too many variables for HiGHS; "
                "use the solver cp-sat or windows"
            )
        return self.count - 1

    def row(
        self, terms: Sequence[tuple[int, float]], low: float = -np.inf, high: float = np.inf
    ) -> None:
        number = len(self.limits)
        self.entries += [(number, column, factor) for column, factor in terms]
        self.limits.append((low, high))

    def rows_of_life(self) -> None:
        """Rows 6, 7 and (ii), with their variables; for (i) there is no P in a first step."""
        for tensor, producer in self.graph.producer.items():
            first, last = self.windows[producer]
            for step in range(first, last + 1):
                self.C[tensor, step] = self.variable()
            self.row([(self.C[tensor, t], 1) for t in range(first, last + 1)], 1, 1)
            for step in range(self.life[tensor][0] + 1, self.life[tensor][1] + 1):
                self.P[tensor, step] = self.variable()
        for op, (first, last) in zip(self.graph.ops, self.windows, strict=True):
            for tensor, step in itertools.product(op.outputs[1:], range(first, last + 1)):
                self.row([(self.C[tensor, step], 1), (self.C[op.outputs[0], step], -1)], 0, 0)
        for step in range(self.steps):
            leads = [self.C.get((op.outputs[0], step)) for op in self.graph.ops]
            self.row([(c, 1) for c in leads if c is not None], high=1)

    def columns(
        self, kinds: Sequence[dict[tuple[str, int], int]], tensor: str, step: int, factor: float
    ) -> list[tuple[int, float]]:
        """Terms of those variables that exist."""
        return [(k[tensor, step], factor) for k in kinds if (tensor, step) in k]

    def rows_of_use(self) -> None:
        """Rows 2 and 5."""
        for (tensor, step), column in self.P.items():
            before = self.columns((self.C, self.P, self.R), tensor, step - 1, -1.0)
            self.row([(column, 1), *before], high=0)
        for op, (first, last) in zip(self.graph.ops, self.windows, strict=True):
            for tensor, step in itertools.product(op.inputs, range(first, last + 1)):
                there = self.columns((self.P, self.R), tensor, step, -1.0)
                self.row([(self.C[op.outputs[0], step], 1), *there], high=0)

    def rows_of_eviction(self) -> None:
        """Rows 1, 3, 4 and 8, and the traffic of row 12."""
        for tensor in self.tensors:
            for step in range(self.life[tensor][0] + 1, self.life[tensor][1] + 1):
                self.S[tensor, step] = self.variable()
                self.R[tensor, step] = self.variable()
                self.traffic[self.S[tensor, step]] = self.size[tensor]
                self.traffic[self.R[tensor, step]] = self.size[tensor]
        for tensor in self.tensors:
            first, last = self.life[tensor]
            spills = [self.S[tensor, t] for t in range(first + 1, last + 1)]
            if spills:
                self.row([(s, 1) for s in spills], high=1)
            for step in range(first, last + 1):
                here = self.columns((self.C, self.P, self.S, self.R), tensor, step, 1.0)
                if len(here) > 1:
                    self.row(here, high=1)
                if step == first:
                    continue
                made = self.columns((self.C, self.P), tensor, step - 1, -1.0)
                self.row([(self.S[tensor, step], 1), *made], high=0)
                written = [(self.S[tensor, t], -1.0) for t in range(first + 1, step + 1)]
                self.row([(self.R[tensor, step], 1), *written], high=0)

    def rows_of_addresses(self, capacity: int) -> None:
        """Rows 9 to 11; row 9 is in the bounds of the addresses."""
        for tensor in self.tensors:
            for step in range(self.life[tensor][0], self.life[tensor][1] + 1):
                self.L[tensor, step] = self.variable(capacity - self.size[tensor])
        big = float(capacity)
        for (tensor, step), kept in self.P.items():
            now, then = self.L[tensor, step], self.L[tensor, step - 1]
            self.row([(now, 1), (then, -1), (kept, big)], high=big)
            self.row([(then, 1), (now, -1), (kept, big)], high=big)
        for a, b in itertools.combinations(self.tensors, 2):
            if not self.can_meet(a, b):
                continue
            first = max(self.life[a][0], self.life[b][0])
            last = min(self.life[a][1], self.life[b][1])
            for step in range(first, last + 1):
                self.apart(a, b, step, big)

    def can_meet(self, a: str, b: str) -> bool:
        """Whether both can be there in one step at all."""
        return max(self.life[a][0], self.life[b][0]) <= min(self.life[a][1], self.life[b][1])

    def apart(self, a: str, b: str, step: int, big: float) -> None:
        above, below = self.variable(), self.variable()
        la, lb = self.L[a, step], self.L[b, step]
        self.row([(la, 1), (lb, -1), (above, -big)], low=self.size[b] - big)
        self.row([(lb, 1), (la, -1), (below, -big)], low=self.size[a] - big)
        there = (self.C, self.P, self.R)
        here = [*self.columns(there, a, step, -1.0), *self.columns(there, b, step, -1.0)]
        self.row([(above, 1), (below, 1), *here], low=-1)
        self.row([(above, 1), (below, 1)], high=1)

    def solve_peak(self, seconds: float) -> OptimizeResult:
        self.rows_of_use()
        most = self.variable(upper=np.inf)
        for step in range(self.steps):
            there = [
                (column, float(self.size[tensor]))
                for kind in (self.C, self.P)
                for (tensor, at), column in kind.items()
                if at == step
            ]
            self.row([*there, (most, -1)], high=0)
        return self._milp({most: 1.0}, seconds)

    def solve(self, objective: dict[int, float], seconds: float) -> OptimizeResult:
        self.rows_of_use()
        return self._milp(objective, seconds)

    def _milp(self, objective: dict[int, float], seconds: float) -> OptimizeResult:
        c = np.zeros(self.count)
        for column, factor in objective.items():
            c[column] = factor
        rows, columns, factors = (np.array(x) for x in zip(*self.entries, strict=True))
        matrix = csr_array((factors, (rows, columns)), shape=(len(self.limits), self.count))
        low, high = np.array(self.limits).T
        return milp(
            c,
            integrality=np.array(self.integral),
            bounds=Bounds(self.lower, self.upper),  # type: ignore[arg-type]
            constraints=LinearConstraint(matrix, low, high),
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )

    def plan(self, x: np.ndarray, budget: int) -> Plan:
        """Reads a plan from the values of the variables."""
        on = np.rint(x).astype(np.int64).tolist()
        graph = self.graph
        when = {
            n: next(t for t in range(first, last + 1) if on[self.C[op.outputs[0], t]])
            for n, (op, (first, last)) in enumerate(zip(graph.ops, self.windows, strict=True))
        }
        order = tuple(sorted(when, key=when.__getitem__))
        stays: list[Stay] = []
        spills: list[tuple[int, str]] = []
        for tensor, producer in graph.producer.items():
            uses = {when[r] for r in graph.readers[tensor]}
            made = when[producer]
            own = [Stay(tensor, made, made, on[self.L[tensor, made]] * graph.unit, False)]
            spilled: int | None = None
            for step in range(made + 1, self.life[tensor][1] + 1):
                if on[self.S[tensor, step]]:
                    spilled = len(own) - 1
                if on[self.R[tensor, step]]:
                    address = on[self.L[tensor, step]] * graph.unit
                    own.append(Stay(tensor, step, step, address, True))
                elif on[self.P[tensor, step]] and step in uses:
                    own[-1] = replace(own[-1], last=step)
            stays += own
            if spilled is not None:
                spills.append((own[spilled].last + 1, tensor))
        return Plan(
            budget, order, tuple(stays), tuple(sorted(spills)), traffic(graph, stays, spills),
            method="integer program (HiGHS)",
        )  # fmt: skip
