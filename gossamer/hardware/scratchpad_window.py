"""Part of a schedule as one constraint program: order, addresses, spills and fills together.

A window is a run of consecutive steps with what lies in the scratchpad before it and what has to
lie there after it; the whole network is the window of all steps. It is equivalent to rows 1 to 12
of the integer program (Li, Gupta and Malik 2023), written for CP-SAT: operators have positions,
every stay of a tensor is a rectangle in time and address, rectangles do not overlap.

Moments are chosen as no optimal plan needs others: a tensor is spilled right after a use and
retrieved right for one, since being away longer costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ortools.sat.python import cp_model

from gossamer.hardware.memory_graph import MemoryGraph
from gossamer.hardware.scratchpad_plan import Stay, traffic


@dataclass(frozen=True)
class Before:
    """A tensor that lives when the window begins.

    Attributes:
        address: where it lies; None if it does not.
        copied: whether memory has a copy.
    """

    address: int | None
    copied: bool


@dataclass(frozen=True)
class After:
    """What has to hold of a tensor that is used after the window.

    Attributes:
        address: where it has to lie in the last step; None if memory has to have a copy instead.
        early: without an address: it must have left before the last step.
        copied: with an address: memory has to have a copy as well.
    """

    address: int | None
    early: bool = False
    copied: bool = False


@dataclass(frozen=True)
class Found:
    """A solved window; steps count from its first one.

    Attributes:
        order: operators by number.
        stays: those of tensors that were there before begin at -1; those that go on end at the
            number of steps.
        spills: ``(step, tensor)``.
        cost: bytes moved (and owed, for what is away at a free end).
        bound: no solution of the window costs less.
    """

    order: tuple[int, ...]
    stays: tuple[Stay, ...]
    spills: tuple[tuple[int, str], ...]
    cost: int
    bound: int


@dataclass(frozen=True)
class Window:
    """Consecutive steps of a schedule.

    Attributes:
        graph: the operators.
        ops: those of the window, in a valid order.
        budget: bytes of the scratchpad.
        before: tensors that live when it begins and are used in it or after it.
        later: tensors that are used after it.
        after: what has to hold of each of those; None leaves the end free: what is away is then
            charged the bytes of bringing it back.
        reorder: whether the order within the window is free.
    """

    graph: MemoryGraph
    ops: tuple[int, ...]
    budget: int
    before: Mapping[str, Before]
    later: frozenset[str]
    after: Mapping[str, After] | None = None
    reorder: bool = False

    @classmethod
    def whole(
        cls, graph: MemoryGraph, order: Sequence[int], budget: int, *, reorder: bool
    ) -> Window:
        """All steps."""
        return cls(graph, tuple(order), budget, {}, frozenset(), None, reorder)

    def solve(
        self,
        *,
        seconds: float,
        threads: int = 1,
        seed: int = 0,
        addresses: bool = True,
        hint: Found | None = None,
        floor: int = 0,
    ) -> Found | bool:
        """Solves the window.

        Args:
            seconds: time limit.
            threads: of the solver.
            seed: of the solver.
            addresses: False leaves them out: a bound from bytes alone, with all addresses 0.
            hint: a solution to start from.
            floor: bytes that any solution costs, if known.

        Returns:
            The best solution found; False if it is proved that there is none; True if time ran
            out before there was one.
        """
        return _Program(self, addresses, floor).solve(seconds, threads, seed, hint)


@dataclass
class _Piece:
    """One stay in the program."""

    tensor: str
    start: Any  # expression of its first step
    end: Any  # and of the step after its last
    present: Any  # literal or True
    address: Any
    retrieved: bool


class _Program:
    def __init__(self, window: Window, addresses: bool, floor: int) -> None:
        self.window = window
        self.graph = window.graph
        self.unit = window.graph.unit
        self.capacity = window.budget // self.unit
        self.steps = len(window.ops)
        self.model = cp_model.CpModel()
        self.with_addresses = addresses
        self.cost: list[Any] = []
        self.pieces: list[_Piece] = []
        self.decisions: dict[tuple[str, ...], Any] = {}
        self.spilled: dict[str, Any] = {}
        inside = set(window.ops)
        self.place: dict[int, Any] = {op: step for step, op in enumerate(window.ops)}
        if window.reorder:
            self._free_positions(inside)
        tensors = dict.fromkeys(window.before)
        tensors |= dict.fromkeys(t for n in window.ops for t in self.graph.ops[n].outputs)
        for tensor in tensors:
            readers = [r for r in self.graph.readers[tensor] if r in inside]
            if window.reorder:
                self._free(tensor, readers)
            else:
                self._fixed(tensor, sorted(readers, key=self.place.__getitem__))
        self._room()
        if any(not isinstance(term, int) for term in self.cost):
            self.model.minimize(sum(self.cost))
            self.model.add(sum(self.cost) >= floor // self.unit)

    def size(self, tensor: str) -> int:
        return self.graph.sizes[tensor] // self.unit

    def address(self, tensor: str) -> Any:
        if not self.with_addresses:
            return 0
        return self.model.new_int_var(0, self.capacity - self.size(tensor), "")

    def choice(self, *name: str) -> Any:
        self.decisions[name] = literal = self.model.new_bool_var(" ".join(name))
        return literal

    # Order

    def _free_positions(self, inside: set[int]) -> None:
        first = dict.fromkeys(self.window.ops, 0)
        last = dict.fromkeys(self.window.ops, 0)
        for op in self.window.ops:
            first[op] = len(self._ancestors(op, inside))
        for op in self.window.ops:
            for earlier in self._ancestors(op, inside):
                last[earlier] += 1
        self.place = {
            op: self.model.new_int_var(first[op], self.steps - 1 - last[op], f"at {op}")
            if first[op] < self.steps - 1 - last[op]
            else first[op]
            for op in self.window.ops
        }
        self.model.add_all_different(list(self.place.values()))
        for op in self.window.ops:
            for earlier in self.graph.predecessors[op]:
                if earlier in inside:
                    self.model.add(self.place[earlier] + 1 <= self.place[op])

    def _ancestors(self, op: int, inside: set[int]) -> set[int]:
        found: set[int] = set()
        stack = [op]
        while stack:
            for earlier in self.graph.predecessors[stack.pop()]:
                if earlier in inside and earlier not in found:
                    found.add(earlier)
                    stack.append(earlier)
        return found

    # Ends of the window

    def _beginning(self, tensor: str) -> tuple[Any, Any, bool]:
        """First step (None if it is away), address, and whether memory has a copy."""
        state = self.window.before.get(tensor)
        if state is None:
            return self.place[self.graph.producer[tensor]], self.address(tensor), False
        if state.address is None:
            return None, None, True
        at = state.address // self.unit if self.with_addresses else 0
        return -1, at, state.copied

    def _spill(self, tensor: str) -> Any:
        """Literal: the tensor is written to memory in the window."""
        literal = self.choice("spill", tensor)
        self.spilled[tensor] = literal
        self.cost.append(self.size(tensor) * literal)
        return literal

    # A given order: gaps between uses

    def _fixed(self, tensor: str, readers: list[int]) -> None:
        start, address, clean = self._beginning(tensor)
        size = self.size(tensor)
        moments = [self.place[r] for r in readers]
        spilled = None if clean else self._spill(tensor)
        earlier: list[Any] = []  # evictions that may have written a copy
        piece: _Piece | None = None
        if start is not None:
            piece = _Piece(tensor, start, start + 1, True, address, False)
            self.pieces.append(piece)

        def evict(gap: int, name: str) -> Any:
            """Literal for leaving in a gap of so many steps; None if it cannot."""
            if gap == 0 and not clean and not earlier:
                return None
            literal = self.choice("evict", tensor, name)
            if spilled is not None:
                self.model.add_implication(literal, spilled)
                if gap == 0:
                    self.model.add_bool_or([literal.Not(), *earlier])
                else:
                    earlier.append(literal)
            return literal

        for reader, moment in zip(readers, moments, strict=True):
            if piece is None:  # it was away
                piece = _Piece(tensor, moment, moment + 1, True, self.address(tensor), True)
                self.pieces.append(piece)
                self.cost.append(size)
                self.decisions["evict", tensor, str(reader)] = 1
                continue
            away = evict(moment - piece.end, str(reader))
            if away is None:
                piece.end = moment + 1
                continue
            self.cost.append(size * away)
            at = self.address(tensor)
            if moment > piece.end:
                self.pieces.append(
                    _Piece(tensor, piece.end, moment, away.Not(), piece.address, False)
                )
            if self.with_addresses:
                self.model.add(at == piece.address).only_enforce_if(away.Not())
            piece = _Piece(tensor, moment, moment + 1, True, at, True)
            self.pieces.append(piece)
        if tensor in self.window.later:
            self._fixed_end(tensor, piece, evict, spilled, earlier)

    def _fixed_end(
        self, tensor: str, piece: _Piece | None, evict: Any, spilled: Any, written: list[Any]
    ) -> None:
        after = self.window.after[tensor] if self.window.after is not None else None
        if piece is None:  # away all the time
            if after is None:
                self.cost.append(self.size(tensor))
            elif after.address is not None:
                raise AssertionError("a tensor that is away would have to be there")
            return
        gap = self.steps - piece.end
        if after is not None and after.address is not None:
            if self.with_addresses:
                self.model.add(piece.address == after.address // self.unit)
            if after.copied and spilled is not None:
                self.model.add_bool_or(written)
            if gap:
                self.pieces.append(
                    _Piece(tensor, piece.end, self.steps, True, piece.address, False)
                )
            return
        if after is not None:
            if spilled is not None:
                self.model.add(spilled == 1)
            if after.early and gap == 0:
                away = evict(0, "end")
                self.model.add(away == 1 if away is not None else False)
            return
        away = evict(gap, "end")
        if away is not None:
            self.cost.append(self.size(tensor) * away)
            if gap:
                self.pieces.append(
                    _Piece(tensor, piece.end, self.steps, away.Not(), piece.address, False)
                )

    # A free order: every reader is served by one stay

    def _free(self, tensor: str, readers: list[int]) -> None:
        start, address, clean = self._beginning(tensor)
        stays: dict[int, _Piece] = {}  # by the reader it is retrieved for; -1 is the first
        model, size, steps = self.model, self.size(tensor), self.steps
        later = tensor in self.window.later
        after = self.window.after[tensor] if later and self.window.after is not None else None
        if start is not None:
            if not readers and not later:
                end: Any = start + 1
            else:
                end = model.new_int_var(0, steps, "")
                model.add(end >= start + 1)
            stays[-1] = _Piece(tensor, start, end, True, address, False)
        retrieved: dict[int, Any] = {}
        for reader in readers:
            literal = self.choice("evict", tensor, str(reader))
            retrieved[reader] = literal
            end = model.new_int_var(1, steps, "")
            at = self.place[reader]
            model.add(end >= at + 1)
            stays[reader] = _Piece(tensor, at, end, literal, self.address(tensor), True)
            self.cost.append(size * literal)
        for reader in readers:
            serves = [retrieved[reader]]
            for origin, piece in stays.items():
                if origin == reader:
                    continue
                literal = self.choice("serve", tensor, str(reader), str(origin))
                serves.append(literal)
                model.add(piece.end >= self.place[reader] + 1).only_enforce_if(literal)
                if origin >= 0:
                    model.add_implication(literal, retrieved[origin])
                    model.add(self.place[reader] >= self.place[origin] + 1).only_enforce_if(literal)
            model.add_exactly_one(serves)
        spilled = None if clean else self._spill(tensor)
        if spilled is not None:
            for reader, literal in retrieved.items():
                model.add_implication(literal, spilled)
                model.add(self.place[reader] >= stays[-1].end + 1).only_enforce_if(literal)
        if len(stays) > 1:
            model.add_no_overlap([self._time(piece) for piece in stays.values()])
        if later:
            self._free_end(tensor, stays, after, spilled)
        self.pieces += stays.values()

    def _free_end(
        self, tensor: str, stays: dict[int, _Piece], after: After | None, spilled: Any
    ) -> None:
        model = self.model
        held: list[Any] = []
        if after is None or after.address is not None:
            for origin, piece in stays.items():
                literal = self.choice("serve", tensor, "end", str(origin))
                held.append(literal)
                model.add(piece.end >= self.steps).only_enforce_if(literal)
                if origin >= 0:
                    model.add_implication(literal, piece.present)
                if after is not None and after.address is not None and self.with_addresses:
                    model.add(piece.address == after.address // self.unit).only_enforce_if(literal)
        if after is not None and after.address is not None:
            model.add_exactly_one(held)
            if after.copied and spilled is not None:
                model.add_bool_or([p.present for origin, p in stays.items() if origin >= 0])
            return
        if after is not None:
            if spilled is not None:
                model.add(spilled == 1)
            if after.early and spilled is not None:
                model.add(stays[-1].end <= self.steps - 1)
            return
        away = self.choice("evict", tensor, "end")
        self.cost.append(self.size(tensor) * away)
        model.add_exactly_one([away, *held])
        if spilled is not None:
            model.add_implication(away, spilled)
            model.add(stays[-1].end <= self.steps - 1).only_enforce_if(away)

    # Room

    def _time(self, piece: _Piece) -> Any:
        if isinstance(piece.start, int) and isinstance(piece.end, int):
            length: Any = piece.end - piece.start
        else:
            length = self.model.new_int_var(0, self.steps + 1, "")
        if piece.present is True:
            return self.model.new_interval_var(piece.start, length, piece.end, "")
        return self.model.new_optional_interval_var(
            piece.start, length, piece.end, piece.present, ""
        )

    def _room(self) -> None:
        if self.window.reorder:
            times = [self._time(p) for p in self.pieces]
            sizes = [self.size(p.tensor) for p in self.pieces]
            self.model.add_cumulative(times, sizes, self.capacity)
        else:
            self._rows()
        if not self.with_addresses:
            return
        horizontal, vertical = [], []
        for piece in self.pieces:
            size = self.size(piece.tensor)
            horizontal.append(self._time(piece))
            top = piece.address + size
            vertical.append(
                self.model.new_interval_var(piece.address, size, top, "")
                if piece.present is True
                else self.model.new_optional_interval_var(
                    piece.address, size, top, piece.present, ""
                )
            )
        self.model.add_no_overlap_2d(horizontal, vertical)

    def _rows(self) -> None:
        """One row of bytes for each step: a relaxation that linear programming is good at."""
        rows: list[list[_Piece]] = [[] for _ in range(self.steps)]
        for piece in self.pieces:
            for step in range(max(0, piece.start), piece.end):
                rows[step].append(piece)
        seen: set[frozenset[int]] = set()
        for row in rows:
            key = frozenset(map(id, row))
            if key in seen:
                continue
            seen.add(key)
            self.model.add(
                sum(self.size(p.tensor) * (1 if p.present is True else p.present) for p in row)
                <= self.capacity
            )

    # Solving

    def solve(self, seconds: float, threads: int, seed: int, hint: Found | None) -> Found | bool:
        if hint is not None:
            self._hint(hint)
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds = max(0.01, seconds)
        solver.parameters.num_workers = threads
        solver.parameters.random_seed = seed
        status = solver.solve(self.model)
        if status == cp_model.INFEASIBLE:
            return False
        if status == cp_model.UNKNOWN:
            return True
        assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE), self.model.validate()
        order, stays, spills, cost = self._read(solver)
        proved = status == cp_model.OPTIMAL
        bound = cost if proved else self._ceiling(solver.best_objective_bound)
        return Found(order, stays, spills, cost, min(bound, cost))

    def _ceiling(self, value: float) -> int:
        return max(0, -int(-(value - 1e-6) // 1)) * self.unit

    def _read(
        self, solver: cp_model.CpSolver
    ) -> tuple[tuple[int, ...], tuple[Stay, ...], tuple[tuple[int, str], ...], int]:
        """Order, stays, spills and what they cost."""
        value = solver.value
        places = {op: value(at) for op, at in self.place.items()}
        gone = {key: bool(value(d)) for key, d in self.decisions.items() if key[0] == "evict"}
        addresses: dict[tuple[str, int], int] = {}
        for piece in self.pieces:
            if piece.present is True or value(piece.present):
                for step in range(value(piece.start), value(piece.end)):
                    addresses[piece.tensor, step] = value(piece.address) * self.unit
        stays: list[Stay] = []
        spills: list[tuple[int, str]] = []
        owed = 0
        window = self.window
        tensors = dict.fromkeys(window.before)
        tensors |= dict.fromkeys(t for n in window.ops for t in self.graph.ops[n].outputs)
        for tensor in tensors:
            own = self._stays(tensor, places, gone, addresses)
            leaves = tensor in window.later and (not own or own[-1].last < self.steps)
            if tensor in self.spilled and (len(own) > 1 or leaves):
                spills.append((own[0].last + 1, tensor))
            if leaves and window.after is None:
                owed += self.graph.sizes[tensor]
            stays += own
        cost = traffic(self.graph, stays, spills) + owed
        order = tuple(sorted(places, key=places.__getitem__))
        return order, tuple(stays), tuple(sorted(spills)), cost

    def _stays(
        self,
        tensor: str,
        places: Mapping[int, int],
        gone: Mapping[tuple[str, ...], bool],
        addresses: Mapping[tuple[str, int], int],
    ) -> list[Stay]:
        """The stays of a tensor, no longer than its uses need."""
        state = self.window.before.get(tensor)
        readers = sorted((r for r in self.graph.readers[tensor] if r in places), key=places.get)  # type: ignore[arg-type]
        current: Stay | None = None
        if state is None:
            at = places[self.graph.producer[tensor]]
            current = Stay(tensor, at, at, addresses[tensor, at], False)
        elif state.address is not None:
            current = Stay(tensor, -1, -1, state.address, False)
        stays: list[Stay] = []
        for reader in readers:
            step = places[reader]
            if current is None or gone.get(("evict", tensor, str(reader)), False):
                if current is not None:
                    stays.append(current)
                current = Stay(tensor, step, step, addresses[tensor, step], True)
            else:
                current = Stay(tensor, current.first, step, current.address, current.retrieved)
        if current is not None:
            if tensor in self.window.later and self._goes_on(tensor, gone):
                last = self.steps
                current = Stay(tensor, current.first, last, current.address, current.retrieved)
            stays.append(current)
        return stays

    def _goes_on(self, tensor: str, gone: Mapping[tuple[str, ...], bool]) -> bool:
        if self.window.after is not None:
            return self.window.after[tensor].address is not None
        return not gone.get(("evict", tensor, "end"), False)

    def _hint(self, hint: Found) -> None:
        steps = {op: step for step, op in enumerate(hint.order)}
        for op, at in self.place.items():
            if not isinstance(at, int):
                self.model.add_hint(at, steps[op])
        spilled = {tensor for _, tensor in hint.spills}
        begins: dict[str, set[int]] = {}
        for stay in hint.stays:
            if stay.retrieved:
                begins.setdefault(stay.tensor, set()).add(stay.first)
        for (kind, tensor, *rest), literal in self.decisions.items():
            if isinstance(literal, int):
                continue
            if kind == "spill":
                self.model.add_hint(literal, tensor in spilled)
            elif kind == "evict" and rest[0] != "end":
                self.model.add_hint(literal, steps[int(rest[0])] in begins.get(tensor, ()))
        if self.with_addresses:
            self._hint_addresses(hint, steps)

    def _hint_addresses(self, hint: Found, steps: Mapping[int, int]) -> None:
        hinted: set[int] = set()
        starts = {id(at): steps[op] for op, at in self.place.items()}
        for piece in self.pieces:
            if isinstance(piece.address, int) or id(piece.address) in hinted:
                continue
            start = piece.start if isinstance(piece.start, int) else starts[id(piece.start)]
            for stay in hint.stays:
                if stay.tensor == piece.tensor and stay.first <= start <= stay.last:
                    self.model.add_hint(piece.address, stay.address // self.unit)
                    hinted.add(id(piece.address))
                    break
